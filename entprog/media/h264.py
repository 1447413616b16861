"""Our own video: H.264 clips in memory, as shards hold them, and mp4 files to look at.

Everything here works with one thread, as `entprog.media.video`.
"""

import io
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import chain

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, Interpolation

from entprog import files
from entprog.media import samples, showing
from entprog.media.errors import VideoError
from entprog.media.limits import LIMITS
from entprog.media.showing import EXACT
from entprog.media.video import BT709, decoded_frames, opened
from entprog.storage import Where

EXACT_INPUT = EXACT | Interpolation.FULL_CHR_H_INP  # from RGB: chroma of all pixels, not of every second one
CRF = 16
"""Quality (x264) of videos that are written to be looked at and measured."""
MOST_BYTES = 1 << 30
"""A clip decodes to no more than this where nobody says how many frames of which size are due."""
_PADDING = 128  # FFmpeg counts whole macroblocks and aligned lines as pixels
TUNE = "fastdecode"
"""x264's tuning of clips that are read once an epoch: no arithmetic coding and no deblocking, so they
decode faster for some more bytes at the same quality."""


def encode(frames: np.ndarray, fps: float, crf: int = 18, gop: int = 8, tune: str | None = TUNE) -> bytes:
    """uint8 RGB [F, H, W, 3], H and W even → an mp4 in memory: H.264, 4:2:0, BT.709 limited range, key frame every
    `gop` frames. Equal input gives equal bytes. tune: x264's; None: none.
    """
    out = io.BytesIO()
    _mux(out, iter(frames), fps, crf, gop, tune)
    return out.getvalue()


def write(path: Where, frames: np.ndarray | Iterable[np.ndarray], fps: float, crf: int = CRF) -> Where:
    """Write frames (uint8 RGB [F, H, W, 3], or an iterable of [H, W, 3]) for people to watch: plays while it loads.

    Odd sizes are padded to even ones by repeating the last row or column. Atomic.
    """
    with files.whole(path) as scratch:
        _mux(f"file:{scratch}", (_even(frame) for frame in frames), fps, crf, gop=round(2 * fps) or 1, tune=None)
    return path


def decode_yuv(mp4: bytes, frames: Sequence[int] | None = None, out: np.ndarray | None = None) -> np.ndarray:
    """A clip's planes without colour conversion: uint8 [F, H*3/2, W]; each frame is Y, U, V one after the other.

    `frames`: which frames (ascending; default all); decoding begins at the key frame before the first. `out`: where to
    write them. Raises VideoError if it is not a readable clip as `encode` makes them (even size, 4:2:0, BT.709 limited
    range), has fewer frames, or frames of another size than `out`.
    """
    planes = None
    size = None if out is None else (out.shape[1] * 2 // 3, out.shape[2])
    for i, frame, count in _clip(mp4, frames, size):
        height, width = frame.height, frame.width
        if planes is None:
            due = (count, height * 3 // 2, width)
            out = _room(due) if out is None else out
            if out.shape != due:
                raise VideoError("corrupt", f"it decodes to {due} where {out.shape} is due")
            planes = out.reshape(count, -1)
        start = 0
        for plane in frame.planes:
            stop = start + plane.height * plane.width
            stored = np.frombuffer(plane, np.uint8)
            if plane.line_size == plane.width:
                planes[i, start:stop] = stored[: stop - start]
            else:  # lines are padded
                lines = stored.reshape(-1, plane.line_size)[: plane.height, : plane.width]
                planes[i, start:stop].reshape(plane.height, plane.width)[:] = lines
            start = stop
    return out


def decode_rgb(mp4: bytes, frames: Sequence[int] | None = None, size: tuple[int, int] | None = None) -> np.ndarray:
    """A clip as RGB by swscale: uint8 [F, H, W, 3]; what `color.yuv420_to_rgb` is checked against.

    size: (H, W) that are due; with `frames` it is what a clip from outside can take, otherwise MOST_BYTES are. Raises
    VideoError as decode_yuv does.
    """
    out = None
    for i, frame, count in _clip(mp4, frames, size):
        image = showing.pixels(frame)
        if out is None:
            due = (count, *(size or image.shape[:2]), 3)
            out = _room(due) if frames is None or size is None else np.empty(due, np.uint8)
        if image.shape != out.shape[1:]:
            raise VideoError("corrupt", f"it decodes to {image.shape} where {out.shape[1:]} is due")
        out[i] = image
    return out


def _room(shape: tuple[int, ...]) -> np.ndarray:
    """An empty uint8 array. Raises VideoError `too_large` rather than take more than MOST_BYTES."""
    if math.prod(shape) > MOST_BYTES:
        raise VideoError("too_large", f"it decodes to {list(shape)}, more than {MOST_BYTES >> 20} MiB are not taken")
    return np.empty(shape, np.uint8)


def _clip(
    mp4: bytes, wanted: Sequence[int] | None, size: tuple[int, int] | None
) -> Iterator[tuple[int, av.VideoFrame, int]]:
    """(place in the result, frame, number of frames in all) of a clip that `encode` made; where one turns out to be
    damaged, or not as `encode` makes them, those given so far are given again.

    size: height and width that are due; FFmpeg decodes no frame that is larger, but for the padding of its own.
    """
    pixels = LIMITS.max_pixels if size is None else (size[0] + _PADDING) * (size[1] + _PADDING)
    stored = samples.of(mp4)
    if stored is not None:
        try:
            yield from _decoded(mp4, stored, range(len(stored)) if wanted is None else wanted, pixels)
            return
        except (av.error.FFmpegError, MemoryError, VideoError):
            pass  # the demuxer says what is wrong, or reads it all the same
    yield from _demuxed(mp4, wanted, pixels)


def _decoded(
    mp4: bytes, stored: samples.Samples, wanted: Sequence[int], pixels: int
) -> Iterator[tuple[int, av.VideoFrame, int]]:
    """`_clip` without a demuxer."""
    if not wanted:
        return
    last, at = wanted[-1], stored.key(wanted[0])
    if last >= len(stored):
        raise VideoError("corrupt", f"only {len(stored)} frames")
    decoder = av.CodecContext.create("h264", "r")
    decoder.thread_count, decoder.extradata, decoder.options = 1, stored.extradata, {"max_pixels": str(pixels)}
    begins, content = stored.begins.tolist(), memoryview(mp4)
    packets = (av.Packet(content[begins[i] : begins[i + 1]]) for i in range(at, last + 1))
    for packet in chain(packets, [None]):
        for frame in decoder.decode(packet):
            if frame.is_corrupt:
                raise VideoError("corrupt", f"frame {at} is damaged")
            if at in wanted:
                _check(frame)
                yield wanted.index(at), frame, len(wanted)
            at += 1
    if at <= last:
        raise VideoError("corrupt", f"only {at} frames")


def _demuxed(mp4: bytes, wanted: Sequence[int] | None, pixels: int) -> Iterator[tuple[int, av.VideoFrame, int]]:
    """`_clip` of any container."""
    limits = replace(LIMITS, max_pixels=pixels, max_gap_s=math.inf, max_duration_s=math.inf)
    with opened(mp4, limits) as (container, stream):
        wanted = range(stream.frames) if wanted is None else wanted
        if len(wanted) > len(mp4):
            raise VideoError("corrupt", f"{len(mp4)} bytes cannot hold {len(wanted)} frames")
        given, rate = 0, float(stream.average_rate or 0)
        if wanted and wanted[0] and 0 < rate < 1e4:
            container.seek(round(wanted[0] / rate / float(stream.time_base)), stream=stream)  # key frame at or before
        for shown in decoded_frames(mp4, container, stream, limits, stream.start_time or 0):
            if given == len(wanted):
                return
            if round(shown.time_s * rate) != wanted[given]:
                continue
            _check(shown.frame)
            yield given, shown.frame, len(wanted)
            given += 1
        if given < len(wanted):
            raise VideoError("corrupt", f"{len(mp4)} bytes: only {given} of {len(wanted)} frames")


def _check(frame: av.VideoFrame) -> None:
    """Raises VideoError unless it is as `encode` makes them."""
    if frame.format.name != "yuv420p" or frame.width % 2 or frame.height % 2:
        raise VideoError("corrupt", f"not an even-sized 4:2:0 clip: {frame.width}x{frame.height} {frame.format.name}")
    if (frame.colorspace, frame.color_range) != (BT709, ColorRange.MPEG):
        raise VideoError("corrupt", "not a clip in BT.709 limited range")


def _even(image: np.ndarray) -> np.ndarray:
    height, width = image.shape[:2]
    return np.pad(image, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge") if height % 2 or width % 2 else image


def _mux(out: str | io.BytesIO, frames: Iterator[np.ndarray], fps: float, crf: int, gop: int, tune: str | None) -> None:
    """H.264 mp4 into a file or memory. One thread and no time stamps in the file: equal frames give equal bytes."""
    first = next(frames, None)
    if first is None:
        raise ValueError("no frames to encode")
    height, width = first.shape[:2]
    if height % 2 or width % 2:
        raise ValueError(f"4:2:0 needs even sizes, given {width}x{height}")
    options = {"fflags": "+bitexact"}
    if isinstance(out, str):  # index first, so that it plays while it loads; needs a second pass over the file
        options["movflags"] = "+faststart"
    with av.open(out, "w", format="mp4", container_options=options) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        context = stream.codec_context
        context.thread_count = 1
        context.color_primaries = context.color_trc = context.colorspace = BT709
        context.color_range = ColorRange.MPEG
        # No B-frames: frames are stored in the order they are shown, so a part of a clip decodes without the rest.
        # Chroma in the middle of four pixels is where swscale puts it; H.264 would assume their left edge.
        # x264's macroblock tree reads memory that nobody wrote: with it, equal frames rarely give other bytes.
        context.options = {
            "crf": str(crf),
            "g": str(gop),
            "bf": "0",
            "sc_threshold": "0",
            "mbtree": "0",
            "rc-lookahead": "0",
            "chroma_sample_location": "center",
        } | ({"tune": tune} if tune else {})
        for image in chain([first], frames):
            rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            yuv = rgb.reformat(
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
                interpolation=EXACT_INPUT,
                threads=1,
            )
            container.mux(stream.encode(yuv))
        container.mux(stream.encode(None))
