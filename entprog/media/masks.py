"""Masks that lie beside a video: read, checked, and kept with a clip as bits.

NAME.mask.mp4 (or another of ENDINGS) is white where the person of NAME.mp4 is, in a picture as large and for as long;
NAME.mask.png is that of every frame. Of a folder of numbered images they lie beside the folder.
"""

from collections.abc import Iterator
from itertools import repeat
from pathlib import Path

import numpy as np

from entprog.masking import one_line
from entprog.media import pictures, posefile, video
from entprog.media.limits import Limits
from entprog.media.video import Box, VideoError

PICTURE = ".mask.png"
ENDINGS = (".mask.mp4", ".mask.mkv", ".mask.mov", ".mask.webm", ".mask.avi", PICTURE)
"""Of several beside one video the first one is read."""
BLACK = (0, 0, 0)
"""What masks lie over where they are transparent."""
WHITE = 128
"""Level of 0..255 from which a mask's pixel is white."""


def white(frames: np.ndarray) -> np.ndarray:
    """Where the person is, bool [..., H, W], in frames of a mask, uint8 RGB [..., H, W, 3]."""
    return frames.mean(-1) >= WHITE


def read(
    path: Path, height: int, width: int, length_s: float, crop: Box | None, fps: float, bounds: Limits
) -> Iterator[np.ndarray]:
    """A mask's frames nearest to each i / fps, uint8 RGB, cropped, of a video whose upright picture has height × width
    pixels and that lasts length_s; the last one without end, of a picture the only one.

    Raises VideoError `bad_mask`, at the first frame too, for a file that is none, or none of this video.
    """
    try:
        if path.name.endswith(PICTURE):
            frame = pictures.read(path, bounds, background=BLACK)
            _check_size(frame.shape[1], frame.shape[0], height, width)
            left, top, wide, high = crop or (0, 0, width, height)
            yield from repeat(frame[top : top + high, left : left + wide])
        info = video.probe(path, bounds)
        _check_size(info.width, info.height, height, width)
        if info.duration_s and abs(info.duration_s - length_s) > posefile.slack_s(length_s) + 1 / fps:
            raise ValueError(f"it lasts {info.duration_s:.2f} s, the video {length_s:.2f} s")
        count = 0
        for _, frame in video.iter_frames(path, fps, crop=crop, limits=bounds, background=BLACK):
            count += 1
            yield frame
        if count < int((length_s - posefile.slack_s(length_s)) * fps):
            raise ValueError(f"it ends after {count / fps:.2f} s, the video lasts {length_s:.2f} s")
        yield from repeat(frame)
    except (VideoError, OSError, ValueError) as error:
        raise VideoError("bad_mask", f"{path.name}: {one_line(error).removeprefix(str(path) + ': ')}") from None


def _check_size(its_width: int, its_height: int, height: int, width: int) -> None:
    if (its_height, its_width) != (height, width):
        raise ValueError(f"it is {its_width}x{its_height}, the video {width}x{height}")


def packed(mask: np.ndarray) -> bytes:
    """bool [F, H, W] → its bits in C order, eight a byte, the first one the highest (`numpy.unpackbits`)."""
    return np.packbits(mask).tobytes()


def unpacked(bits: bytes, frames: int, height: int, width: int) -> np.ndarray:
    """Of `packed`: uint8 [F, H, W], 0 or 1. Raises ValueError for bits of another size."""
    values = frames * height * width
    if len(bits) != (due := -(-values // 8)):
        raise ValueError(f"its mask has {len(bits)} bytes where the dataset's shape gives {due}")
    return np.unpackbits(np.frombuffer(bits, np.uint8), count=values).reshape(frames, height, width)
