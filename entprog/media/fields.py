"""Interlaced video: two moments (fields) woven line by line into one frame, of which one moment is made again."""

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple

import av
import numpy as np

from entprog.media import showing
from entprog.media.showing import Shown

LOOKED_AT = 300
"""Frames of a video that are looked at for fields of which it does not say; a video is decided on far fewer."""
_DECIDED_AT = (12, 24, 48)
"""Numbers of moving frames after which the question is asked."""
_LEAST = 6
"""Moving frames without which nothing is decided."""
_MANY = 18
"""Moving frames whose noise, of coarse coding or uneven motion, evens out."""
_COLUMNS = 4  # every fourth is enough to tell, and a fourth of the cost
_STEADY = 3.0
"""Frames between two motions of which one is so many times the other's (a cut, a repeated frame) are passed over."""
_STILL = 0.2
"""Levels of 255 by which a frame differs from the next on average where only a coder refines a still picture."""


class _Pair(NamedTuple):
    """How much lines stand out from their neighbours in two frames after each other, and woven of their lines."""

    own: float
    odd_later: float
    even_later: float


def order(frames: Iterable[av.VideoFrame]) -> str:
    """Which field comes first in a video that does not say it is interlaced: `tff`, `bff`, or empty if it is not.

    The even lines of each frame are put together with the odd lines of the next one, and the other way round. In a
    progressive video one frame's motion lies between both, and the same change of focus or light. Of woven fields it is
    half a frame's motion in one, as inside a frame, and one and a half in the other, in every pair.
    """
    pairs: list[_Pair] = []
    for pair in _moving(islice(frames, LOOKED_AT)):
        pairs.append(pair)
        if len(pairs) in _DECIDED_AT and (found := _decided(pairs)) is not None:
            return found
    return (len(pairs) >= _LEAST and _decided(pairs)) or ""


def _decided(pairs: list[_Pair]) -> str | None:
    """The order; empty for progressive; None where more frames are needed to tell."""
    own, odd_later, even_later = np.array(pairs).T
    top_first = odd_later - even_later
    lean = top_first.sum() / max(np.abs(top_first).sum(), 1e-9)  # 1 or -1: always to the same side
    near, far = sorted(((odd_later - own).sum(), (even_later - own).sum()))
    if abs(lean) >= 0.8 and near <= (0.8 if len(pairs) >= _MANY else 0.5) * far:
        return "tff" if lean > 0 else "bff"
    return "" if near >= 0.9 * far or len(pairs) >= _DECIDED_AT[-1] else None


def _moving(frames: Iterable[av.VideoFrame]) -> Iterator[_Pair]:
    """Of each frame that moves evenly from the one before it to the one after, with the one before it. Ends at what is
    no planar YUV, or says of itself that it is interlaced.
    """
    last: deque[np.ndarray] = deque(maxlen=3)
    for frame in frames:
        luma = _luma(frame)
        if luma is None or frame.interlaced_frame or (last and last[-1].shape != luma.shape):
            return
        last.append(luma)
        if len(last) == 3:
            before, own, after = last
            came, goes = np.abs(own - before).mean(), np.abs(after - own).mean()
            if min(came, goes) > _STILL and came < _STEADY * goes and goes < _STEADY * came:
                steady = (_standing_out(before, before) + _standing_out(own, own)) / 2
                yield _Pair(steady, odd_later=_standing_out(before, own), even_later=_standing_out(own, before))


def _luma(frame: av.VideoFrame) -> np.ndarray | None:
    """float32 [H, W / 4] in levels of 0..255; None of what has no plane of luma."""
    bits = frame.format.components[0].bits
    if not frame.format.is_planar or frame.format.is_rgb or frame.format.is_big_endian or frame.height < 8:
        return None
    plane = frame.planes[0]
    stored = np.frombuffer(plane, np.uint16 if bits > 8 else np.uint8).reshape(plane.height, -1)
    return stored[:, : plane.width : _COLUMNS].astype(np.float32) / 2 ** (bits - 8)


def _standing_out(even: np.ndarray, odd: np.ndarray) -> float:
    """Mean difference of lines, the even ones of one frame and the odd ones of another, from those around them."""
    woven = even.copy()
    woven[1::2] = odd[1::2]
    return float(np.abs(np.diff(woven, 2, axis=0)).mean())


def deinterlaced(frames: Iterator[Shown], order: str = "") -> Iterator[Shown]:
    """The same, with two fields made one moment (bwdif) where a frame says that it is interlaced, or in every frame of
    a video whose `order` was found out.
    """
    graph, kind, ahead = None, None, deque()
    which = f"deint=all:parity={order}" if order else "deint=interlaced"
    for shown in frames:
        frame = shown.frame
        if graph is None and not order and not frame.interlaced_frame:
            yield shown
            continue
        now = shown.part, frame.format.name, frame.width, frame.height
        if now != kind:
            if graph is not None:
                yield from _pulled(graph, None, ahead)
            ratio = f"{frame.time_base.numerator}/{frame.time_base.denominator}"
            buffer = f"video_size={frame.width}x{frame.height}:pix_fmt={frame.format.name}:time_base={ratio}"
            buffer += f":colorspace={int(frame.colorspace)}:range={int(frame.color_range)}"
            graph, kind = showing.graph(buffer, ("bwdif", f"mode=send_frame:{which}")), now
        ahead.append(shown)
        yield from _pulled(graph, frame, ahead)
    if graph is not None:
        yield from _pulled(graph, None, ahead)


def _pulled(graph: av.filter.Graph, frame: av.VideoFrame | None, ahead: deque[Shown]) -> Iterator[Shown]:
    """What a graph gives for one more frame (None: for the end), each with the time of its original."""
    graph.push(frame)
    while ahead:
        try:
            whole = graph.pull()
        except (BlockingIOError, EOFError):
            return
        yield ahead.popleft()._replace(frame=whole)
