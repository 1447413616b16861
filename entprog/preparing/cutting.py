"""From one video to its clips: after `probing`, the stages track and cut, which take a source's row and give it back.

Two passes over each video, one frame in memory at a time: `track` needs the whole pose track before `cut` knows
where the person is, and a 1080p video held whole would be gigabytes. Equal input gives equal clips.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, cached_property, partial
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate, chain, count, groupby, repeat
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from entprog import files
from entprog.config import Preparation
from entprog.data import shards
from entprog.media import footage, limits, masks, pose, posefile, wholebody
from entprog.media.video import VideoError
from entprog.preparing import again, ledger, shots, windows
from entprog.preparing.attempts import MachineError
from entprog.preparing.extracting import Window, extract
from entprog.preparing.fetching import changed
from entprog.preparing.probing import opened, tried
from entprog.preparing.rows import Cut, Done, Shots, Tracked
from entprog.storage import Where

LONGEST_SIDE = 1920
"""Frames larger than this are scaled down for pose tracking: the landmark network sees 256×256 of the person."""

PEOPLE_SIZE = posefile.HALF
"""Another person counts from this share of the foremost one's size on: smaller ones are passers-by, or no people."""
PEOPLE_SHARE = 0.5
"""Share of the looks at a clip in which another person must be seen: the detector errs in single frames."""


READING = 3
"""Raised where the same source gives other pixels, poses or shots than before, so that no part of an earlier version is
taken for one of this. 2: MMPose's poses over pixels that are not square, untagged HD of less than 720 lines, colour
profiles of pictures. 3: shots of numbered images that lack numbers."""
FILES = "files beside the videos"
"""Where poses come from that no estimator gave, in words."""
READERS = ("entprog", "av", "pillow", "ai-edge-litert")
"""Packages that decide which pixels and poses come out of a video."""


class Track:
    """Third stage: the pose of the foremost person at the clip's frame rate, read where it lies beside the video,
    otherwise estimated. Loads its networks once, when they are first needed."""

    def __init__(self, settings: Preparation, parts: Where | None = None):
        self.settings = settings
        self.parts = parts

    @cached_property
    def estimator(self):
        return pose.estimator(self.settings.prepare)

    def __call__(self, row: Shots) -> Tracked:
        """Adds `track`, the bytes of float32 [T, points, 3], `points`, and `others`, the bytes of bool [T]: whether
        more people were seen."""
        blank = {"track": b"", "points": pose.POINTS, "others": b""}
        if row["reason"]:  # no networks are loaded for it
            return {**row, **blank}
        work = self._read if row["poses"] else partial(self._track, estimator=self.estimator)
        return tried({**row, **blank}, "track", self.settings, self.parts, work)

    def _read(self, row: Tracked, settings: Preparation, heartbeats) -> Tracked:
        """The poses beside the video."""
        fps = settings.data.shape.fps
        bounds, path = limits.of(settings.prepare), Path(os.fsdecode(row["poses"]))
        poses = posefile.read(path, row["stored_height"], row["stored_width"], bounds)
        if posefile.stamp(path) != row["poses_stamp"]:
            raise changed(path.name)
        shown = None
        if poses.fps is None:
            with opened(row, settings, heartbeats) as source:
                shown = footage.numbers(source, row["length"], fps, heartbeats)
        cuts = np.frombuffer(row["cuts"], np.int32).tolist()
        track, others = posefile.at_frames(poses, row["length"], fps, shown, cuts)
        if row["crop"]:
            box = tuple(map(int, row["crop"].split(",")))
            track = windows.to_crop(track, box, row["source_height"], row["source_width"])
        return self._tracked(row, track, others)

    def _track(self, row: Tracked, settings: Preparation, heartbeats, estimator) -> Tracked:
        height, width = row["view_height"], row["view_width"]
        shrink = min(1.0, LONGEST_SIDE / max(height, width))
        size = None if shrink == 1 else (max(1, round(height * shrink)), max(1, round(width * shrink)))
        shape = settings.data.shape
        starts = set(np.frombuffer(row["cuts"], np.int32).tolist())
        people: list[int] = []
        with opened(row, settings, heartbeats) as source:
            frames = self._watched(heartbeats(footage.pictures(source, shape.fps, size, quick=True)), people)
            shot = accumulate(i in starts for i in count())
            by_shot = groupby(zip(shot, frames, strict=False), key=itemgetter(0))
            tracks = [estimator.track(frame for _, frame in frames) for _, frames in by_shot]
        track = np.concatenate([np.zeros((0, estimator.points, 3), np.float32), *tracks])
        seen = np.array(people)
        return self._tracked(row, windows.without_phantoms(track, seen > 0, settings.prepare.min_detected), seen > 1)

    def _tracked(self, row: Tracked, track: np.ndarray, others: np.ndarray) -> Tracked:
        shape, starts = self.settings.data.shape, np.frombuffer(row["cuts"], np.int32).tolist()
        spans = shots.spans(len(track), starts)
        longest = max(map(len, spans))
        if longest < shape.frames:
            message = f"{longest} frames at {shape.fps:g} fps, a clip has {shape.frames}"
            raise VideoError(
                "too_short", message if len(spans) < 2 else f"its longest shot of {len(spans)} has {message}"
            )
        track = np.ascontiguousarray(track, np.float32)
        return {**row, "track": track.tobytes(), "points": track.shape[1], "others": others.tobytes()}

    def _watched(self, frames: Iterable[np.ndarray], people: list[int]) -> Iterator[np.ndarray]:
        """The frames; how many people the detector, asked anew, sees in each goes into `people`."""
        for i, frame in enumerate(frames):
            # Every other frame is enough to tell, and half the cost.
            people.append(self._count(frame) if i % 2 == 0 else people[-1])
            yield frame

    def _count(self, frame: np.ndarray) -> int:
        found = self.estimator.detect(frame)
        return sum(person.radius >= PEOPLE_SIZE * found[0].radius for person in found)


def cut(row: Tracked, settings: Preparation, parts: Where) -> Done:
    """Fourth stage: write the source's clips as the part shard `key`, and its ledger beside it; gives their counts.

    The ledger file comes last: a part with a ledger is finished and never done again.
    """
    row = {**row, "lines": [], "clips": 0, "part_sha256": ""}
    row = tried(row, "cut", settings, parts, partial(_cut, parts=parts))
    lines = [ledger.line(row), *row["lines"]]
    record = {"ledger": lines, "clips": row["clips"], "sha256": row["part_sha256"]}
    record |= {"points": row.get("points", pose.POINTS), "poses": FILES if row["poses"] else settings.prepare.pose}
    record |= {
        "versions": versions(),
        "source_fps": row.get("source_fps", 0.0),
        "masks": bool(row["mask"]),
        "limits": again.limits(settings.prepare.model_dump(mode="json")),
    }
    files.write_json(parts / f"{row['key']}.json", record, indent=None)
    return {"file": row["file"], "clips": row["clips"], "reason": row["reason"]}


@cache
def versions() -> dict[str, str]:
    """Of READERS, as far as they are installed here: another node may have others."""
    found = {}
    for name in READERS:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _cut(row: Cut, settings: Preparation, heartbeats, parts: Where) -> Cut:
    """Writes the part; adds `clips`, their number, `part_sha256`, and the ledger's `lines` of all clips.

    The row is rejected if no clip is kept.
    """
    track = np.frombuffer(row["track"], np.float32).reshape(-1, row["points"], 3)
    kept, verdicts = _choose(row, track, settings)
    part, encoded = None, {}

    def clips(windows_done: Iterable[Window]) -> Iterator[dict[str, Any]]:
        for window in windows_done:
            if window.reason:
                verdicts[window.start] = "picture", window.reason
                continue
            encoded[window.start] = hashlib.sha256(window.video).hexdigest(), len(window.video)
            yield _clip(row, window, track, settings)
            window.video = window.reference = window.mask = b""  # written: hours of clips are not to be held

    if kept:
        with opened(row, settings, heartbeats) as source, _unchanged_mask(row):
            pictures = heartbeats(footage.pictures(source, settings.data.shape.fps))
            extracted = extract(row, kept, pictures, _people(row, source, settings), settings)
            of_source = clips(heartbeats(extracted))  # many may come at once, with the frame that all wait for
            first = next(of_source, None)
            if first is not None:
                file = f"{row['key']}.parquet"
                try:
                    its = chain([first], of_source), settings.data.shape, row["points"], bool(row["mask"])
                    part = shards.write_shard(parts, file, *its)
                except OSError as error:  # what the source may raise is a VideoError
                    raise MachineError(f"cannot write {parts / file}: {error}") from None
    lines = []
    for start, (stage, reason) in sorted(verdicts.items()):
        sha256, size = encoded.get(start, ("", 0))
        decision = {"clip": clip_id(row["file"], start), "start_s": start / settings.data.shape.fps}
        decision |= {"stage": stage if reason else "", "reason": reason, "message": "", "sha256": sha256, "bytes": size}
        lines.append(ledger.line({**row, **decision}))
    row = {**row, "lines": lines}
    if part is not None:
        return {**row, "clips": part.clips, "part_sha256": part.sha256}
    reason = windows.main_reason(line["reason"] for line in lines)
    return ledger.rejected(row, "cut", reason, f"none of its {len(lines)} clips is good enough")


def _choose(row: Tracked, track: np.ndarray, settings: Preparation) -> tuple[list[Window], dict[int, tuple[str, str]]]:
    """Decide on every window by its body's pose: (those kept, {first frame: (stage, reason or '')} of all)."""
    shape, prepare = settings.data.shape, settings.prepare
    height, width = row["view_height"], row["view_width"]
    seen, target = prepare.point_visibility, shape.width / shape.height
    others = np.frombuffer(row["others"], bool)
    kept, verdicts = [], {}
    for shot in shots.spans(len(track), np.frombuffer(row["cuts"], np.int32).tolist()):
        of_shot = wholebody.body(track[shot.start : shot.stop])
        crowds = others[shot.start : shot.stop] if prepare.people == "one" else None
        references = windows.References(of_shot, seen, crowds)
        for at in windows.window_starts(len(shot), shape.frames, stride(settings)):
            start, window = shot.start + at, range(at, at + shape.frames)
            points = of_shot[at : window.stop]
            reason, stage = windows.pose_verdict(points, seen, prepare.min_visibility), "pose"
            if not reason and prepare.people == "one":
                crowded = others[start : start + shape.frames].mean() >= PEOPLE_SHARE
                reason = "several_people" if crowded else None
            if not reason:
                stage = "crop"
                box = windows.person_box(points, height, width, target, prepare.margin, seen)
                reason = "low_visibility"
                if box is not None:
                    in_crop = windows.to_crop(points, box, height, width)
                    limits = seen, prepare.min_inside, prepare.min_scale
                    reason = windows.crop_verdict(in_crop, box, shape.height, *limits)
            verdicts[start] = stage, reason or ""
            if not reason:
                candidates = []
                for best in references.frames(window):
                    there = windows.to_crop(of_shot[best], box, height, width)
                    around = box  # the same picture around the person, if the person is in it
                    if windows.share_inside(there, seen) < prepare.min_inside:
                        alone = of_shot[best : best + 1]
                        around = windows.person_box(alone, height, width, target, prepare.margin, seen) or box
                    candidates.append((shot.start + best, around))
                kept.append(Window(start, box, candidates))
    return kept, verdicts


@contextmanager
def _unchanged_mask(row: Tracked) -> Iterator[None]:
    """Raises VideoError `changed` where the mask beside a source, if there is one, is not what was listed, before or
    after what is done with it."""
    path = Path(os.fsdecode(row["mask"]))

    def check() -> None:
        if row["mask"] and posefile.stamp(path) != row["mask_stamp"]:
            raise changed(path.name)

    check()
    yield
    check()


def _people(row: Tracked, source: footage.Footage, settings: Preparation) -> Iterator[np.ndarray | None]:
    """The frames of the mask beside a source, uint8 RGB, as its own are given; None for each where there is none."""
    if not row["mask"]:
        return repeat(None)
    fps, path = settings.data.shape.fps, Path(os.fsdecode(row["mask"]))
    size = row["source_height"], row["source_width"]
    return masks.read(path, *size, row["length"] / fps, source.crop, fps, source.limits)


def _clip(row: Tracked, window: Window, track: np.ndarray, settings: Preparation) -> dict[str, Any]:
    """A clip as `shards.SCHEMA` has it. Its split is decided when all sources are known."""
    shape = settings.data.shape
    its = track[window.start : window.start + shape.frames]
    points = windows.to_crop(its, window.box, row["view_height"], row["view_width"])
    left, top, width, height = window.box
    view_left, view_top = map(int, row["crop"].split(",")[:2]) if row["crop"] else (0, 0)
    return {
        "clip_id": clip_id(row["file"], window.start),
        "source": row["file"],
        "source_sha256": row["sha256"],
        "split": "",
        "caption": row["caption"],
        "start_s": window.start / shape.fps,
        "fps": shape.fps,
        "frames": shape.frames,
        "height": shape.height,
        "width": shape.width,
        "source_height": row["source_height"],
        "source_width": row["source_width"],
        "crop_left": view_left + left,
        "crop_top": view_top + top,
        "crop_width": width,
        "crop_height": height,
        "visibility": float(wholebody.body(points)[..., 2].mean()),
        "reference_s": window.reference_at / shape.fps,
        "reference": window.reference,
        "pose": points,
        "video": window.video,
        "mask": window.mask,
    }


def stride(settings: Preparation) -> int:
    """Clip frames between neighbouring clips' starts."""
    return settings.prepare.stride or max(1, settings.data.shape.frames // 2)


def clip_id(file: str, start: int) -> str:
    """A clip's name: its source and first frame, counted at the clip's frame rate."""
    return f"{file}#{start:06d}"
