"""Where a container does not say when its frames are shown."""

import bisect
from collections import deque
from collections.abc import Iterable, Iterator

import av

_DECODING_ORDER = frozenset({"avi", "asf", "asf_o", "mxf"})
"""They may say when a frame is decoded only, and FFmpeg takes that for when it is shown."""
_MOST_REORDERED = 17
"""Frames in a row among which such time stamps are out of order, at most: H.264's 16 B-frames and what they hang on."""


def may_be_disordered(container, stream) -> bool:
    """Whether frames, which come as they are shown, may have time stamps in another order."""
    return container.format.name in _DECODING_ORDER and bool(stream.codec_context.has_b_frames)


class Ordering:
    """Frames in the order they are shown, held until the earliest time stamp of those after them is known."""

    def __init__(self):
        self._frames: deque[av.VideoFrame] = deque()
        self._stamps: list[int] = []

    def given(self, more: Iterable[av.VideoFrame], last: bool) -> Iterator[av.VideoFrame]:
        """Those after which enough others have come, each with the earliest time stamp that none before it has."""
        for frame in more:
            self._frames.append(frame)
            if frame.pts is not None:
                bisect.insort(self._stamps, frame.pts)
        while len(self._frames) > (0 if last else _MOST_REORDERED):
            frame = self._frames.popleft()
            if frame.pts is not None:
                frame.pts = self._stamps.pop(0)
            yield frame
