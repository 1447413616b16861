"""From one video to its clips, in three stages that each take a source and give it back: probe, track, cut.

Each stage is a plain function of one row (a dict of plain values and bytes), so that it can run as an operator of
Ray Data, and is safe to repeat: equal input gives equal clips. A video that cannot be used is not an exception: its
row carries the verdict (stage, reason, message) on to the end, and becomes a line of the ledger.

Two passes over each video, one frame in memory at a time: `track` needs the whole pose track before `cut` knows
where the person is, and a 1080p video held whole would be gigabytes.
"""

import hashlib
import io
import json
import os
import stat
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from entprog.config import Preparation
from entprog.media import pose, shards, video, windows
from entprog.media.video import VideoError

SUFFIXES = frozenset(
    {".3g2", ".3gp", ".asf", ".avi", ".divx", ".dv", ".f4v", ".flv", ".gif", ".h264", ".hevc", ".ivf", ".m2ts", ".m2v"}
    | {".m4v", ".mj2", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".mxf", ".ogm", ".ogv", ".qt", ".rm", ".rmvb"}
    | {".ts", ".vob", ".webm", ".wmv", ".y4m"}
)
"""Endings of file names that are tried as videos. Others are not opened: FFmpeg takes even plain text for a video."""

LONGEST_SIDE = 1920
"""Frames larger than this are scaled down for pose tracking: the landmark network sees 256×256 of the person."""

MAX_CRASHES = 2
"""Crashes of the process after which a source is left alone: one may be another's doing (memory, a lost node)."""

Row = dict[str, Any]


def source_row(root: Path, path: Path) -> Row:
    """A file as the first stage takes it. `file` is its name for people and the ledger, `path` its name's bytes."""
    name = os.fsencode(path.relative_to(root)).decode("utf-8", "backslashreplace")
    try:
        known = path.stat()
        size, changed_ns = known.st_size, known.st_mtime_ns
    except OSError:  # a link to nowhere, or gone since it was listed: `probe` says so
        size, changed_ns = 0, 0
    return {"file": name, "path": os.fsencode(path), "bytes": size, "changed_ns": changed_ns}


@contextmanager
def _attempt(row: Row, stage: str, parts: Path | None) -> Iterator[bool]:
    """Whether a stage may be tried with a source: not when it brought its process down MAX_CRASHES times before.

    A native crash (of a decoder, say) ends the process, and Ray starts the stage again in another one, for ever. A
    mark in the folder of parts outlives the process; it is taken away when the stage comes back.
    """
    if parts is None:
        yield True
        return
    mark = parts / f"{row['key']}.{stage}.tried"
    crashes = mark.stat().st_size if mark.exists() else 0
    with mark.open("ab") as file:
        file.write(b".")
    yield crashes < MAX_CRASHES
    mark.unlink(missing_ok=True)


def forget_crashes(parts: Path) -> None:
    """Marks left by a job that was killed from outside say nothing about its sources."""
    for mark in parts.glob("*.tried"):
        mark.unlink(missing_ok=True)


def probe(row: Row, parts: Path | None = None) -> Row:
    """Hash the file and look at its first frame: adds sha256, source_height, source_width, and the verdict if bad.

    With a folder of `parts`, a source that crashes the process (`_attempt`) is rejected.
    """
    with _attempt(row, "probe", parts) as may_try:
        row = {**row, "sha256": "", "source_height": 0, "source_width": 0, "stage": "", "reason": "", "message": ""}
        return _probe(row) if may_try else _crashed(row, "probe")


def _probe(row: Row) -> Row:
    path = Path(os.fsdecode(row["path"]))
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for without end
            return _rejected(row, "probe", "unreadable", f"{row['file']}: not a plain file")
        row["sha256"] = shards.sha256(path)
        if path.suffix.lower() not in SUFFIXES:
            ending = f"ends with {path.suffix!r}" if path.suffix else "has no ending"
            return _rejected(row, "probe", "not_a_video", f"its name {ending}; if it is a video, give it its ending")
        info = video.probe(path)
        return {**row, "source_height": info.height, "source_width": info.width}
    except VideoError as error:
        return _rejected(row, "probe", error.reason, str(error))
    except OSError as error:
        return _rejected(row, "probe", "unreadable", f"{row['file']}: {error.strerror}")
    except Exception as error:
        return _unforeseen(row, "probe", error)


class Track:
    """Second stage: the pose of the foremost person at the clip's frame rate. Loads its networks once."""

    def __init__(self, settings: Preparation, parts: Path | None = None):
        self.settings = settings
        self.parts = parts
        self.estimator = pose.PoseEstimator(threads=1)

    def __call__(self, row: Row) -> Row:
        """Adds `track`, the bytes of float32 [T, 33, 3]."""
        row = {**row, "track": b""}
        if row["reason"]:
            return row
        with _attempt(row, "track", self.parts) as may_try:
            return self._track(row) if may_try else _crashed(row, "track")

    def _track(self, row: Row) -> Row:
        height, width = row["source_height"], row["source_width"]
        shrink = min(1.0, LONGEST_SIDE / max(height, width))
        size = None if shrink == 1 else (max(1, round(height * shrink)), max(1, round(width * shrink)))
        shape = self.settings.data.shape
        frames = video.iter_frames(os.fsdecode(row["path"]), fps=shape.fps, size=size, quick=True)
        detected = []
        try:
            track = self.estimator.track(self._watched(frames, detected))
        except VideoError as error:
            return _rejected(row, "track", error.reason, str(error))
        except Exception as error:
            return _unforeseen(row, "track", error)
        if len(track) < shape.frames:
            told = f"{len(track)} frames at {shape.fps:g} fps, a clip has {shape.frames}"
            return _rejected(row, "track", "too_short", told)
        track = windows.without_phantoms(track, np.array(detected), self.settings.prepare.min_detected)
        return {**row, "track": np.ascontiguousarray(track, np.float32).tobytes()}

    def _watched(self, frames: Iterator[tuple[float, np.ndarray]], detected: list[bool]) -> Iterator[np.ndarray]:
        """The frames; whether the detector, asked anew, sees anybody in them goes into `detected`."""
        for i, (_, frame) in enumerate(frames):
            # Every other frame is enough to tell, and half the cost.
            detected.append(bool(self.estimator.detect(frame)) if i % 2 == 0 else detected[-1])
            yield frame


@dataclass
class _Window:
    """A clip being cut out while its video is decoded."""

    start: int
    points: np.ndarray
    box: windows.Box
    reference_at: int
    reference_box: windows.Box
    frames: list[np.ndarray] = field(default_factory=list)
    video: bytes = b""
    reference: bytes = b""


def cut(row: Row, settings: Preparation, parts: Path) -> Row:
    """Third stage: write the source's clips as the part shard `key`, and its ledger beside it; gives their counts.

    The ledger file comes last: a part with a ledger is finished and never done again.
    """
    with _attempt(row, "cut", parts) as may_try:
        ledger, clips = _cut(row if may_try else _crashed(row, "cut"), settings)
    key = row["key"]
    part = None
    if clips:
        part = shards.write_shard(parts, f"{key}.parquet", clips, settings.data.shape)
    record = {"ledger": ledger, "clips": len(clips), "sha256": part.sha256 if part else ""}
    path = parts / f"{key}.json"
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text(json.dumps(record))
    scratch.replace(path)
    return {"file": row["file"], "clips": len(clips), "found": len(ledger) - 1}


def _cut(row: Row, settings: Preparation) -> tuple[list[Row], list[Row]]:
    """(ledger rows, the input's own first; rows of the clips kept)."""
    if row["reason"]:
        return [ledger_row(row)], []
    track = np.frombuffer(row["track"], np.float32).reshape(-1, pose.POINTS, 3)
    try:
        kept, ledger = _choose(row, track, settings)
        clips = _extract(row, kept, settings)
    except VideoError as error:
        return [ledger_row(_rejected(row, "cut", error.reason, str(error)))], []
    except Exception as error:
        return [ledger_row(_unforeseen(row, "cut", error))], []
    encoded = {clip["clip_id"]: clip["video"] for clip in clips}
    ledger = [{**line, **_fingerprint(encoded.get(line["clip"]))} for line in ledger]
    if not clips:
        reason = windows.main_reason(line["reason"] for line in ledger)
        row = _rejected(row, "cut", reason, f"none of its {len(ledger)} clips is good enough")
    return [ledger_row(row), *ledger], clips


def _fingerprint(encoded: bytes | None) -> Row:
    """A clip's own hash and size in the ledger, once it is encoded."""
    if encoded is None:
        return {"sha256": "", "bytes": 0}
    return {"sha256": hashlib.sha256(encoded).hexdigest(), "bytes": len(encoded)}


def _choose(row: Row, track: np.ndarray, settings: Preparation) -> tuple[list[_Window], list[Row]]:
    """Decide on every window of a source: (those kept, a ledger row for each)."""
    shape, prepare = settings.data.shape, settings.prepare
    height, width = row["source_height"], row["source_width"]
    seen, target = prepare.point_visibility, shape.width / shape.height
    kept, ledger = [], []
    for start in windows.window_starts(len(track), shape.frames, stride(settings)):
        window = range(start, start + shape.frames)
        points = track[start : window.stop]
        reason = windows.pose_verdict(points, seen, prepare.min_visibility)
        stage = "pose" if reason else "crop"
        if reason is None:
            box = windows.person_box(points, height, width, target, prepare.margin, seen)
            reason = "low_visibility"
            if box is not None:
                in_crop = windows.to_crop(points, box, height, width)
                limits = seen, prepare.min_inside, prepare.min_scale
                reason = windows.crop_verdict(in_crop, box, shape.height, *limits)
        if reason is None:
            at = windows.reference_frame(track, window, seen)
            there = windows.to_crop(track[at], box, height, width)
            around = box  # the same picture around the person, if the person is in it
            if windows.share_inside(there, seen) < prepare.min_inside:
                around = windows.person_box(track[at : at + 1], height, width, target, prepare.margin, seen) or box
            kept.append(_Window(start, in_crop, box, at, around))
        told = {"clip": clip_id(row["file"], start), "start_s": start / shape.fps}
        ledger.append(ledger_row({**row, "reason": reason or "", "stage": stage if reason else "", **told}))
    return kept, ledger


def _extract(row: Row, kept: list[_Window], settings: Preparation) -> list[Row]:
    """Second pass: cut the frames of all kept windows out of one decoding, and encode each clip when it is whole."""
    if not kept:
        return []
    shape = settings.data.shape
    size = shape.height, shape.width
    video_at, reference_at = defaultdict(list), defaultdict(list)
    for window in kept:
        reference_at[window.reference_at].append(window)
        for i in range(window.start, window.start + shape.frames):
            video_at[i].append(window)
    last = max(*video_at, *reference_at)
    for i, (_, frame) in enumerate(video.iter_frames(os.fsdecode(row["path"]), fps=shape.fps)):
        if frame.shape[:2] != (row["source_height"], row["source_width"]):
            raise VideoError("corrupt", f"{row['file']}: its picture changes size at {i / shape.fps:.2f} s")
        for window in video_at.pop(i, ()):
            window.frames.append(_crop(frame, window.box, size))
            if len(window.frames) == shape.frames:
                window.video = video.encode(np.stack(window.frames), shape.fps, crf=settings.prepare.crf)
                window.frames.clear()
        for window in reference_at.pop(i, ()):
            window.reference = _png(_crop(frame, window.reference_box, size))
        if i == last:
            break
    if video_at or reference_at:
        raise VideoError("corrupt", f"{row['file']}: frames that were there at first are gone")
    return [_clip(row, window, settings) for window in kept]


def _crop(frame: np.ndarray, box: windows.Box, size: tuple[int, int]) -> np.ndarray:
    left, top, width, height = box
    return video.scale(frame[top : top + height, left : left + width], size)


def _png(image: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG")
    return out.getvalue()


def _clip(row: Row, window: _Window, settings: Preparation) -> Row:
    """A clip as `shards.SCHEMA` has it. Its split is decided when all sources are known."""
    shape = settings.data.shape
    left, top, width, height = window.box
    return {
        "clip_id": clip_id(row["file"], window.start),
        "source": row["file"],
        "source_sha256": row["sha256"],
        "split": "",
        "caption": "",
        "start_s": window.start / shape.fps,
        "fps": shape.fps,
        "frames": shape.frames,
        "height": shape.height,
        "width": shape.width,
        "source_height": row["source_height"],
        "source_width": row["source_width"],
        "crop_left": left,
        "crop_top": top,
        "crop_width": width,
        "crop_height": height,
        "visibility": float(window.points[..., 2].mean()),
        "reference_s": window.reference_at / shape.fps,
        "reference": window.reference,
        "pose": window.points,
        "video": window.video,
    }


def stride(settings: Preparation) -> int:
    """Clip frames between neighbouring clips' starts."""
    return settings.prepare.stride or max(1, settings.data.shape.frames // 2)


def clip_id(file: str, start: int) -> str:
    """A clip's name: its source and first frame, counted at the clip's frame rate."""
    return f"{file}#{start:06d}"


def ledger_row(row: Row) -> Row:
    """What the ledger says of an input, or with `clip` and `start_s` of a clip."""
    return {
        "kind": "clip" if row.get("clip") else "input",
        "file": row["file"],
        "clip": row.get("clip", ""),
        "kept": not row["reason"],
        "reason": row["reason"],
        "stage": row["stage"],
        "message": row["message"],
        "sha256": row["sha256"],
        "bytes": row["bytes"],
        "start_s": row.get("start_s", 0.0),
    }


def _rejected(row: Row, stage: str, reason: str, message: str) -> Row:
    return {**row, "stage": stage, "reason": reason, "message": " ".join(message.split())[:500]}


def _crashed(row: Row, stage: str) -> Row:
    return _rejected(row, stage, "crashed", f"it brought the process down {MAX_CRASHES} times")


def _unforeseen(row: Row, stage: str, error: Exception) -> Row:
    """One bad file must not end a long job, nor vanish: the ledger names the exception."""
    return _rejected(row, stage, "error", f"{type(error).__name__}: {error}")
