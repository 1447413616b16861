"""A decoded frame as a player shows it: whole, in square pixels, upright, opaque, in the colours of an ordinary screen.

What a frame says of itself decides; a frame of which nothing has to be changed is only converted to RGB.
"""

import functools
import struct
import threading
from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np
from av.sidedata.sidedata import Type as SideData
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation

from entprog.media import pictures
from entprog.media.errors import VideoError

# Linear chroma interpolation, exact rounding: without ACCURATE_RND and FULL_CHR_H_INT swscale takes a faster path that
# repeats chroma samples and is off by up to 3 levels.
EXACT = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.BITEXACT

UNSPECIFIED = 2  # ITU-T H.273 code, the same for matrix, primaries and transfer
BT2020 = 9  # of matrix (not constant luminance) and primaries
HDR = frozenset({ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67})
"""PQ and HLG."""
_TRANSFERS = HDR | {ColorTrc.LINEAR, ColorTrc.LOG, ColorTrc.LOG_SQRT, ColorTrc.SMPTE428}
"""Curves that look wrong where a screen takes them for its own."""
_GAMUTS = frozenset({BT2020, ColorPrimaries.SMPTE428, ColorPrimaries.SMPTE431, ColorPrimaries.SMPTE432})
"""Primaries that look pale where a screen takes them for its own."""
_NEARLY_SQUARE = Fraction(1, 100)
_NEARLY_STRAIGHT = 0.02  # about a degree


class Shown(NamedTuple):
    """A frame and when it is shown."""

    time_s: float
    """From the video's first frame on."""
    duration_s: float
    """0 if the file does not say."""
    frame: av.VideoFrame
    part: int
    """How often the time stamps have started again before it: parts do not belong together."""
    aspect: Fraction
    """Width by height of a stored pixel."""


def size(shown: Shown) -> tuple[int, int]:
    """(width, height) of the upright picture in square pixels. Raises VideoError as `rgb` does."""
    width, height = square(shown.frame.width, shown.frame.height, shown.aspect)
    return (height, width) if _turn(shown.frame)[0] else (width, height)


def square(width: int, height: int, aspect: Fraction) -> tuple[int, int]:
    """Width and height in square pixels: the shorter side of the pixels is enlarged, so that nothing is thrown away."""
    if abs(aspect - 1) < _NEARLY_SQUARE:
        return width, height
    return (round(width * aspect), height) if aspect > 1 else (width, round(height / aspect))


def rgb(shown: Shown, flags: Interpolation = EXACT, background: pictures.Color = pictures.BACKGROUND) -> np.ndarray:
    """The upright picture in square pixels: uint8 RGB [H, W, 3].

    Raises VideoError `unsupported` for colours or a turn that cannot be shown rightly.
    """
    transpose, left_right, top_bottom = _turn(shown.frame)
    image = pixels(shown.frame, flags, square(shown.frame.width, shown.frame.height, shown.aspect), background)
    image = image.transpose(1, 0, 2) if transpose else image
    image = image[:, ::-1] if left_right else image
    return image[::-1] if top_bottom else image


def pixels(
    frame: av.VideoFrame,
    flags: Interpolation = EXACT,
    size: tuple[int, int] | None = None,
    background: pictures.Color = pictures.BACKGROUND,
) -> np.ndarray:
    """As it is stored, to uint8 RGB [height, width, 3] of `size` (width, height; None: its own).

    By the frame's own matrix; untagged video is BT.709 from 1280 pixels a line or 577 lines up, else BT.601, as players
    do (mpv's mp_csp_guess_colorspace; of an upright picture its sides change places). Wide colours and HDR become those
    of BT.709, and what is brighter than HDR's white is clipped to it. Transparent frames lie over the background.
    """
    width, height = size or (frame.width, frame.height)
    if not is_plain(frame):
        return _to_bt709(frame, width, height)
    matrix = None
    if frame.colorspace == UNSPECIFIED:
        short, long = sorted((frame.width, frame.height))
        matrix = Colorspace.ITU709 if long >= 1280 or short > 576 else Colorspace.ITU601
    clear = any(component.is_alpha for component in frame.format.components)
    try:
        frame = frame.reformat(
            width,
            height,
            "rgba" if clear else "rgb24",
            src_colorspace=matrix,
            dst_color_range=ColorRange.JPEG,
            interpolation=flags,
            threads=1,
        )
    except OSError as error:
        raise _unsupported(frame, error) from None
    if not clear:
        return frame.to_ndarray()
    (plane,) = frame.planes
    lines = np.frombuffer(plane, np.uint8).reshape(height, plane.line_size // 4, 4)
    return pictures.over_background(lines[:, :width], background)


def is_plain(frame: av.VideoFrame) -> bool:
    """Whether its colours are those of an ordinary screen, or it does not say."""
    return frame.color_trc not in _TRANSFERS and frame.color_primaries not in _GAMUTS


def _turn(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """What makes it upright, in this order: rows to columns, left to right, top to bottom.

    Its display matrix maps x, y (down) to a·x + c·y, b·x + d·y.
    """
    stored = frame.side_data.get(SideData.DISPLAYMATRIX)
    if stored is None:
        return False, False, False
    a, b, _, c, d = struct.unpack_from("=5i", bytes(stored))
    straight, across = abs(a) + abs(d), abs(b) + abs(c)
    if across <= _NEARLY_STRAIGHT * straight:
        return False, a < 0, d < 0
    if straight <= _NEARLY_STRAIGHT * across:
        return True, c < 0, b < 0
    raise VideoError("unsupported", "it is to be shown turned by other than quarter turns")


# ---- colours ----


def _to_bt709(frame: av.VideoFrame, width: int, height: int) -> np.ndarray:
    """By libswscale's colour management (relative colorimetric: what both can show stays as it is)."""
    if frame.color_trc in HDR:  # HDR that says no more of itself is BT.2020
        frame.color_primaries = BT2020 if frame.color_primaries == UNSPECIFIED else frame.color_primaries
        frame.colorspace = BT2020 if frame.colorspace == UNSPECIFIED else frame.colorspace
    names = (frame.format.name, int(frame.colorspace), int(frame.color_range), frame.color_trc, frame.color_primaries)
    try:
        made = _bt709_graph(threading.get_ident(), frame.width, frame.height, *names, width, height)
        made.push(frame)
        return made.pull().reformat(format="rgb24", threads=1).to_ndarray()
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise _unsupported(frame, error) from None


@functools.lru_cache(maxsize=8)  # its table of colours takes seconds to make
def _bt709_graph(
    thread: int, width: int, height: int, pixels: str, matrix: int, levels: int, *rest: int
) -> av.filter.Graph:
    """A graph for frames of one kind (`rest` begins with their transfer and primaries, which frames carry along), and
    for one thread.
    """
    *_, wide, high = rest
    buffer = f"video_size={width}x{height}:pix_fmt={pixels}:time_base=1/1000:colorspace={matrix}:range={levels}"
    scale = f"{wide}:{high}:flags=bilinear:out_primaries=bt709:out_transfer=bt709:intent=relative_colorimetric"
    # By way of 16 bits: straight to 8, libswscale is off by up to 12 levels, and by far more with full_chroma_int.
    return graph(buffer, ("scale", scale), ("format", "gbrp16le"))


def graph(buffer: str, *filters: tuple[str, str]) -> av.filter.Graph:
    """libavfilter's filters (name, options) one after the other, on one thread, for frames of a buffer's kind."""
    made = av.filter.Graph()
    made.threads = 1
    chain = [made.add("buffer", buffer), *(made.add(*each) for each in filters), made.add("buffersink")]
    made.link_nodes(*chain).configure()
    return made


def _unsupported(frame: av.VideoFrame, error: Exception) -> VideoError:
    colours = f"matrix {frame.colorspace}, transfer {frame.color_trc}, primaries {frame.color_primaries}"
    message = f"its colours ({frame.format.name}, {colours} of H.273) cannot be shown rightly"
    return VideoError("unsupported", f"{message}: {getattr(error, 'strerror', None) or error}")
