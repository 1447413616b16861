"""Clips out of a video's second decoding: each window's frames cut out, judged and encoded, and its reference image."""

import os
import tempfile
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import IO

import numpy as np

from entprog.config import Preparation
from entprog.media import h264, masks, video
from entprog.media.pictures import png
from entprog.media.video import VideoError
from entprog.preparing import attempts, windows
from entprog.preparing.attempts import MachineError
from entprog.preparing.rows import Tracked


@dataclass
class Window:
    """A clip being cut out while its video is decoded."""

    start: int
    box: windows.Box
    candidates: list[tuple[int, windows.Box]]
    """Frames that its reference may come from, the best first, and what of each is shown."""
    blurred: int = 0
    """How many of them were looked at, and are not sharp."""
    reference_at: int = -1
    """The one that was taken."""
    frames: list[np.ndarray] = field(default_factory=list)
    people: list[np.ndarray] = field(default_factory=list)
    """Where the person is, bool [H, W] a frame; empty where there is no mask."""
    reason: str = ""
    video: bytes = b""
    reference: bytes = b""
    mask: bytes | None = None
    aside: int | None = None
    """Where its video, and after it its mask, begin in the scratch file in which they wait."""
    sizes: tuple[int, int] = 0, 0
    """Of video and mask there, in bytes."""

    @property
    def is_encoded(self) -> bool:
        return bool(self.video) or self.aside is not None

    def find_reference(self, shown: Mapping[int, np.ndarray], size: tuple[int, int], min_sharpness: float) -> bool:
        """Whether the frames shown so far tell its reference, which is set: the first candidate that is sharp, or the
        first of all if none is."""
        for at, box in self.candidates[self.blurred :]:
            if at not in shown:
                return False
            picture = crop(shown[at], box, size)
            if windows.sharpness(picture) >= min_sharpness:
                break
            self.blurred += 1
        else:
            at, box = self.candidates[0]
            picture = crop(shown[at], box, size)
        self.reference_at, self.reference = at, png(picture)
        return True

    def put_aside(self, scratch: IO[bytes]) -> None:
        """Raises MachineError where it cannot be written."""
        self.aside, self.sizes = scratch.tell(), (len(self.video), len(self.mask or b""))
        try:
            scratch.write(self.video + (self.mask or b""))
            scratch.flush()  # a full disk says so here, or when nobody listens
        except OSError as error:
            raise MachineError(
                f"cannot write to the scratch folder {tempfile.gettempdir()}: {error.strerror}"
            ) from None
        self.video, self.mask = b"", None if self.mask is None else b""

    def take_back(self, scratch: IO[bytes]) -> None:
        """What `put_aside` has written, if it was called."""
        if self.aside is None:
            return
        scratch.seek(self.aside)
        self.video, mask = map(scratch.read, self.sizes)
        scratch.seek(0, os.SEEK_END)
        self.aside, self.mask = None, None if self.mask is None else mask


def extract(
    row: Tracked,
    kept: list[Window],
    pictures: Iterator[np.ndarray],
    people: Iterator[np.ndarray | None],
    settings: Preparation,
) -> Iterator[Window]:
    """Second pass: all kept windows out of one decoding, in their order, each as soon as it has its `reference` and
    `video`, or its `reason`.

    A source of hours is never held whole: a frame that may be the reference of many windows is held once, clips that
    wait for such a frame lie in a scratch file. Raises VideoError `corrupt` for a video that is another than before.
    """
    size, least = (settings.data.shape.height, settings.data.shape.width), settings.prepare.min_sharpness
    wanted, shown = Counter(at for window in kept for at, _ in window.candidates), {}
    waiting = deque(kept)
    with attempts.scratch(tempfile.TemporaryFile) as scratch:
        for i, frame, whole in _cut_out(row, kept, pictures, people, settings):
            if wanted[i]:
                shown[i] = frame
            while waiting:
                window = waiting[0]
                if not window.reason and not (window.is_encoded and window.find_reference(shown, size, least)):
                    break
                window.take_back(scratch)
                waiting.popleft()
                for at, _ in window.candidates:
                    wanted[at] -= 1
                    if not wanted[at]:
                        shown.pop(at, None)
                yield window
            if not waiting:
                return
            for window in whole:
                if window.video and not window.reference:  # not given
                    window.put_aside(scratch)
    raise VideoError("corrupt", f"{row['file']}: frames that were there at first are gone")


def _cut_out(
    row: Tracked,
    kept: list[Window],
    pictures: Iterator[np.ndarray],
    people: Iterator[np.ndarray | None],
    settings: Preparation,
) -> Iterator[tuple[int, np.ndarray, list[Window]]]:
    """Each frame with its number and the windows whose clips end with it: judged, and encoded if they are good."""
    shape, prepare = settings.data.shape, settings.prepare
    size = shape.height, shape.width
    video_at = defaultdict(list)
    for window in kept:
        for i in range(window.start, window.start + shape.frames):
            video_at[i].append(window)
    for i, (frame, person) in enumerate(zip(pictures, people, strict=False)):
        if frame.shape[:2] != (row["view_height"], row["view_width"]):
            raise VideoError("corrupt", f"{row['file']}: its picture changes size at {i / shape.fps:.2f} s")
        whole = []
        for window in video_at.pop(i, ()):
            window.frames.append(crop(frame, window.box, size))
            if person is not None:
                window.people.append(masks.white(crop(person, window.box, size)))
            if len(window.frames) == shape.frames:
                clip = np.stack(window.frames)
                window.frames.clear()
                window.reason = windows.picture_verdict(clip, prepare.min_motion, prepare.min_sharpness) or ""
                if window.people:
                    window.mask = masks.packed(np.stack(window.people))
                    window.reason = window.reason or ("" if any(map(np.any, window.people)) else "bad_mask")
                    window.people.clear()
                if not window.reason:
                    window.video = h264.encode(clip, shape.fps, crf=prepare.crf)
                whole.append(window)
        yield i, frame, whole


def crop(frame: np.ndarray, box: windows.Box, size: tuple[int, int]) -> np.ndarray:
    left, top, width, height = box
    return video.scale(frame[top : top + height, left : left + width], size)
