"""Video files ↔ frames: probing, frames by time, H.264 clips in memory."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

Source = str | Path | bytes
"""A video file's path, or its bytes."""

Box = tuple[int, int, int, int]
"""left, top, width, height in pixels of the upright (rotated) frame, inside it."""


class VideoError(Exception):
    """A video that cannot be read. `reason` is one of REASONS, the message says the rest in one line."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason

    def __reduce__(self):  # picklable: it crosses Ray's process borders
        return VideoError, (self.reason, str(self))


REASONS = ("empty", "unreadable", "corrupt", "no_video_stream", "no_frames")


@dataclass(frozen=True)
class VideoInfo:
    """What a video's header says, plus its first frame."""

    width: int
    """Pixels after rotation."""
    height: int
    """Pixels after rotation."""
    rotation_deg: int
    """Clockwise turn that makes a stored frame upright: 0, 90, 180 or 270; already applied to every frame we give."""
    fps: float
    """Average frames per second."""
    duration_s: float
    """From the first frame to the end of the last; 0 if the header does not say."""
    frames: int | None
    """Number of frames, if the header says."""
    codec: str
    """FFmpeg's name of the codec: h264, vp9, …"""


def probe(source: Source) -> VideoInfo:
    """Open a video and decode its first frame.

    Raises VideoError: `empty` (no bytes), `unreadable` (no such file, not permitted), `corrupt` (not a video file, or
    its first frame cannot be decoded), `no_video_stream`, `no_frames`.
    """
    raise NotImplementedError


def clip_times(start_s: float, frames: int, fps: float) -> np.ndarray:
    """Times of a clip's frames: float64 [F], start_s + i / fps."""
    return start_s + np.arange(frames) / fps


def iter_frames(
    source: Source,
    fps: float | None = None,
    start_s: float = 0.0,
    end_s: float | None = None,
    crop: Box | None = None,
    size: tuple[int, int] | None = None,
) -> Iterator[tuple[float, np.ndarray]]:
    """Yield (time_s, RGB uint8 [H, W, 3]) one at a time.

    fps None: every frame between start_s and end_s with its own time. Otherwise the frame nearest to each
    start_s + i / fps, with that time, as long as it is before end_s (None: the video's end). Times count from the
    first frame. `crop` is cut out of the upright frame, then scaled to `size` (height, width).

    Raises VideoError, after yielding what could be decoded if the file breaks in the middle.
    """
    raise NotImplementedError


def read_frames(
    source: Source,
    times_s: Sequence[float] | np.ndarray,
    crop: Box | None = None,
    size: tuple[int, int] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The frame nearest to each wanted time: (uint8 RGB [F, H, W, 3], float64 [F] the frames' own times).

    times_s ascending, in seconds from the first frame. Nearest by presentation time (variable frame rate, B-frames),
    the earlier one of two equally near; beyond the end the last frame. Only kept frames are converted and held.
    Raises VideoError (`corrupt` when the file breaks before the last wanted time).
    """
    raise NotImplementedError


def encode(frames: np.ndarray, fps: float, crf: int = 18, gop: int = 8) -> bytes:
    """uint8 RGB [F, H, W, 3], H and W even → an mp4 in memory: H.264, 4:2:0, BT.709 limited range, key frame every
    `gop` frames. Equal input gives equal bytes.
    """
    raise NotImplementedError


def write_mp4(path: Path, frames: np.ndarray | Iterable[np.ndarray], fps: float, crf: int = 16) -> Path:
    """Write frames (uint8 RGB [F, H, W, 3], or an iterable of [H, W, 3]) for people to watch: plays while it loads.

    Odd sizes are padded to even ones by repeating the last row or column. Atomic.
    """
    raise NotImplementedError


def decode_yuv(mp4: bytes, frames: range | None = None) -> np.ndarray:
    """A clip's planes without colour conversion: uint8 [F, H*3//2, W], rows of Y, then U and V (each H/4 rows of W).

    `frames`: which frames (ascending; default all). Raises VideoError if it is not a readable 4:2:0 clip of even size
    or has fewer frames.
    """
    raise NotImplementedError


def decode_rgb(mp4: bytes, frames: range | None = None) -> np.ndarray:
    """A clip as RGB by swscale (bilinear chroma, exact rounding): uint8 [F, H, W, 3]; `color.yuv420_to_rgb`'s reference.

    Raises VideoError as decode_yuv does.
    """
    raise NotImplementedError
