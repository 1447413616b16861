"""The first two stages of a source: is it a usable video at all, and where does it cut?

Plain functions of one row (a dict of plain values and bytes), so that they can run as operators of Ray Data, and safe
to repeat. A source that cannot be used is not an exception: its row carries the verdict (stage, reason, message) on to
the end, and becomes a line of the ledger.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import numpy as np

from entprog.config import Preparation
from entprog.media import footage
from entprog.media.footage import Footage
from entprog.media.video import VideoError
from entprog.preparing import addresses, attempts, fetching, ledger, shots
from entprog.preparing.rows import Probed, Shots, Source, is_video, suffix
from entprog.storage import Where

R = TypeVar("R", bound=Probed)


def probe(row: Source, settings: Preparation, parts: Where | None = None) -> Probed:
    """Hash the source and look at its first frame.

    Adds sha256, source_height and source_width (of the whole upright picture), stored_height and stored_width (of that
    before its pixels are made square), view_height and view_width (of what the crop leaves), source_fps,
    field_order, and the verdict if it is bad. With a folder of `parts`, a source that crashes the process is rejected.
    """
    row = {**row, "sha256": "", "stage": "", "reason": "", "message": "", "field_order": "", "source_fps": 0.0}
    row |= dict.fromkeys((f"{of}_{side}" for of in ("source", "stored", "view") for side in ("height", "width")), 0)
    return tried(row, "probe", settings, parts, _probe)


def cut_shots(row: Probed, settings: Preparation, parts: Where | None = None) -> Shots:
    """Second stage: adds `cuts`, bytes of int32: the clip frames (`shots.cuts`) at which new shots begin; `length`, the
    number of clip frames."""
    return tried({**row, "cuts": b"", "length": 0}, "shots", settings, parts, _cut_shots)


def tried(row: R, stage: str, settings: Preparation, parts: Where | None, work) -> R:
    """`work(row, settings, heartbeats)` with everything that can go wrong made a verdict; a bad row passes by.

    `heartbeats` goes over whatever work waits for, so that a standstill is noticed (`attempts`).
    """
    if row["reason"]:
        return row
    prepare = settings.prepare
    with attempts.attempt(parts, row.get("key", ""), stage, prepare.stall_s) as may_try:
        if not may_try:
            return ledger.crashed(row, stage)
        heartbeats = partial(
            attempts.heartbeats, stall_s=prepare.stall_s, work_s=prepare.max_work_s, watched=parts is not None
        )
        try:
            return _surely(row, settings, heartbeats, work)
        except attempts.MachineError:
            raise
        except Exception as error:  # one bad file must not end a long job, nor vanish: the ledger names the exception
            if lack := attempts.lacking(error):
                raise attempts.MachineError(f"cannot read {row['file']}: {lack.strerror}; run it again") from None
            return ledger.rejected(row, stage, *_verdict(row, error))


def _surely(row: R, settings: Preparation, heartbeats, work) -> R:
    """`work(row, settings, heartbeats)`, once more where it meets damage in a content that is as it was: to a decoder a
    network disk that is away for a moment, or a file that is being written, looks like that.

    Raises VideoError `changed` and `unreadable`, and OSError, for a content that is not.
    """
    try:
        return work(row, settings, heartbeats)
    except VideoError as error:
        if error.reason != "corrupt":
            raise
    if not addresses.is_remote(os.fsdecode(row["path"])):  # what is fetched anew is compared as it comes
        with opened(row, settings, heartbeats) as source:
            if fetching.sha256(source.path, heartbeats) != row["sha256"]:
                raise fetching.changed(row["file"])
    return work(row, settings, heartbeats)


def _verdict(row: Probed, error: Exception) -> tuple[str, str]:
    """(reason, message) of what a source's stage has raised."""
    if isinstance(error, VideoError):
        return error.reason, str(error)
    if isinstance(error, OSError):
        return "unreadable", f"{row['file']}: {error.strerror or error}"
    return "error", f"{type(error).__name__}: {error}"


@contextmanager
def opened(row: Source, settings: Preparation, heartbeats) -> Iterator[Footage]:
    """The source on this machine, as footage. Raises VideoError as `fetching.fetched` does."""
    with fetching.fetched(row, settings.prepare, heartbeats) as path:
        try:
            yield footage.footage(path, row["frames_fps"], row["crop"], settings.prepare, row.get("field_order", ""))
        except VideoError as error:  # people know it by its name, not by where it lay
            raise VideoError(error.reason, str(error).replace(str(path), row["file"])) from None


def _probe(row: Probed, settings: Preparation, heartbeats) -> Probed:
    path, as_video = os.fsdecode(row["path"]), is_video(row)
    fetching.check(row, settings.prepare)
    if addresses.is_remote(path) and not as_video:
        raise _not_a_video(row)
    with opened(row, settings, heartbeats) as source:
        row["sha256"] = fetching.sha256(source.path, heartbeats)
        if not as_video:
            raise _not_a_video(row)
        if not row["bytes"] and not source.frames_fps:
            row["bytes"] = source.path.stat().st_size
        info = footage.probe(source)
        row["field_order"] = footage.field_order(source, heartbeats)
    width, height = source.crop[2:] if source.crop else (info.width, info.height)
    sizes = {"source_height": info.height, "source_width": info.width, "view_height": height, "view_width": width}
    return {**row, **sizes, "source_fps": info.fps, "stored_height": info.stored[1], "stored_width": info.stored[0]}


def _not_a_video(row: Source) -> VideoError:
    ending = suffix(row)
    ending_is = f"ends with {ending!r}" if ending else "has no ending"
    return VideoError("not_a_video", f"its name {ending_is}; if it is a video, give it its ending")


def content_sha256(row: Source, settings: Preparation) -> str:
    """Hash of a source's content, decoding nothing. Raises VideoError as `fetching.fetched` does."""
    with opened(row, settings, lambda pieces: pieces) as source:
        return fetching.sha256(source.path)


def _cut_shots(row: Shots, settings: Preparation, heartbeats) -> Shots:
    with opened(row, settings, heartbeats) as source:
        change = shots.changes(heartbeats(footage.thumbnails(source, settings.data.shape.fps, shots.SIZE)))
    starts = np.array(shots.cuts(change, settings.prepare.shot_change), np.int32)
    return {**row, "cuts": starts.tobytes(), "length": len(change) + 1}
