"""One way to look at a source, be it a video file or a folder of numbered images, whole or cropped."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from entprog.config import Prepare
from entprog.media import frames as images
from entprog.media import limits, video
from entprog.media.limits import Limits
from entprog.media.video import Box, VideoError, VideoInfo


@dataclass(frozen=True)
class Footage:
    """A source on this machine and what of it is looked at."""

    path: Path
    frames_fps: float
    """Frame rate of a folder of images; 0 for a video file."""
    crop: Box | None
    """Part of the upright picture; None: all of it."""
    limits: Limits
    order: str = ""
    """As `field_order` gives it."""


def footage(path: Path, frames_fps: float, crop: str, prepare: Prepare, order: str = "") -> Footage:
    """`crop` is 'left,top,width,height' or empty."""
    box = tuple(map(int, crop.split(","))) if crop else None
    return Footage(path, frames_fps, box, limits.of(prepare), order)


def probe(of: Footage) -> VideoInfo:
    """Its first frame and what is said of the rest; sizes are of the upright, uncropped picture.

    Raises VideoError as `video.probe` does, and `bad_crop` for a crop that is not inside the picture.
    """
    info = images.probe(of.path, of.frames_fps, of.limits) if of.frames_fps else video.probe(of.path, of.limits)
    if of.crop is not None:
        left, top, width, height = of.crop
        if left + width > info.width or top + height > info.height:
            raise VideoError("bad_crop", f"its crop {of.crop} is not inside the {info.width}x{info.height} picture")
    return info


def field_order(of: Footage, heartbeats) -> str:
    """Of an interlaced video that does not say it is one: `tff` or `bff`; else empty. `heartbeats`: over its frames."""
    return "" if of.frames_fps else video.field_order(of.path, of.limits, heartbeats)


def pictures(of: Footage, fps: float, size: tuple[int, int] | None = None, quick: bool = False) -> Iterator[np.ndarray]:
    """uint8 RGB [H, W, 3] nearest to each i / fps, cropped, then scaled to `size`; as `video.iter_frames` does."""
    if not of.frames_fps:
        how = {"crop": of.crop, "size": size, "quick": quick, "limits": of.limits, "order": of.order}
        for _, frame in video.iter_frames(of.path, fps, **how):
            yield frame
        return
    for _, frame in images.iter_frames(of.path, of.frames_fps, fps, of.limits):
        if of.crop is not None:
            left, top, width, height = of.crop
            frame = frame[top : top + height, left : left + width]
        yield frame if size is None else video.scale(frame, size)


def numbers(of: Footage, frames: int, fps: float, heartbeats) -> tuple[np.ndarray, int]:
    """Which of the source's own frames `pictures` gives, int64 [frames], and how many there are. `heartbeats`: over
    them, as they are decoded."""
    wanted = np.arange(frames) / fps
    if of.frames_fps:
        there = len(images.paths(of.path))
        return np.array([images.shown(time_s, of.frames_fps, there) for time_s in wanted], np.int64), there
    times = np.fromiter(heartbeats(video.times(of.path, of.limits, of.order)), float)
    return video.nearest(times, wanted), len(times)


def thumbnails(of: Footage, fps: float, size: tuple[int, int]) -> Iterator[tuple[int, np.ndarray]]:
    """(part, small picture uint8 [height, width, 3]) of the same frames, cropped; without a crop not turned. The part
    goes up where time stamps start again, or numbers of images are missing."""
    if not of.frames_fps:
        yield from video.thumbnails(of.path, fps, size, of.limits, of.crop)
        return
    parts = images.parts([path.name for path in images.paths(of.path)])
    for i, frame in enumerate(pictures(of, fps, size)):
        yield parts[images.shown(i / fps, of.frames_fps, len(parts))], frame
