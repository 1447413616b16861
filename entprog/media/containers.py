"""What FFmpeg does not see in a container by itself: when frames are shown, what is transparent, and that it is cut."""

import bisect
import io
from collections import deque
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import av

from entprog.media.errors import VideoError

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


_WITH_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
"""Decoders of what Matroska holds beside a picture to say where it is transparent; FFmpeg's own leave that out."""


def alpha_decoder(stream) -> av.CodecContext | None:
    """What decodes a stream with its transparency; None where the stream's own decoder does, or there is none.

    Raises VideoError `unsupported` where FFmpeg was built without it.
    """
    own = stream.codec_context
    name = _WITH_ALPHA.get(own.codec.canonical_name)
    if name is None or stream.metadata.get("alpha_mode") != "1":
        return None
    try:
        decoder = av.CodecContext.create(name, "r")
    except av.codec.codec.UnknownCodecError:
        raise VideoError("unsupported", f"it is transparent, which takes FFmpeg's decoder {name}") from None
    decoder.extradata, decoder.options, decoder.thread_count = own.extradata, own.options, own.thread_count
    for said in ("colorspace", "color_range", "color_trc", "color_primaries"):
        setattr(decoder, said, getattr(own, said))
    return decoder


_MATROSKA_SEGMENT = 0x18538067
_MOST_BEFORE_IT = 16  # the file's header, and room left empty


def is_cut_off(file: BinaryIO) -> bool:
    """Whether a Matroska or WebM file (RFC 9559) ends before its Segment, which holds all else, does.

    FFmpeg reads it as a shorter video without a word. Times are no evidence: sound may last longer than the picture.
    What is written while it is filmed says neither its length nor its size, and counts as whole.
    """
    there = file.seek(0, io.SEEK_END)
    at = 0
    for _ in range(_MOST_BEFORE_IT):
        file.seek(at)
        head = file.read(12)
        name_bytes = _number_bytes(head[:1])
        size_bytes = _number_bytes(head[name_bytes : name_bytes + 1])
        content_at = name_bytes + size_bytes
        if not size_bytes or len(head) < content_at:
            return False
        size = int.from_bytes(head[name_bytes:content_at]) & ((1 << 7 * size_bytes) - 1)
        if int.from_bytes(head[:name_bytes]) == _MATROSKA_SEGMENT:
            unknown = size == (1 << 7 * size_bytes) - 1
            return not unknown and at + content_at + size > there
        at += content_at + size
    return False


def _number_bytes(first: bytes) -> int:
    """Bytes of an EBML number (RFC 8794), which the zeros that its first byte begins with count; 0: none is there."""
    return 9 - first[0].bit_length() if first and first[0] else 0
