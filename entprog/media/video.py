"""Video files → frames: probing, frames by time.

Everything here decodes with one thread: who runs many at once (Ray) decides how many cores are used.
"""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, Interpolation
from PIL import Image

from entprog.media.limits import Limits

Source = str | Path | bytes
"""A video file's path, or its bytes."""

Box = tuple[int, int, int, int]
"""left, top, width, height in pixels of the upright (rotated) frame, inside it."""

REASONS = ("empty", "unreadable", "corrupt", "no_video_stream", "no_frames", "too_large", "too_long")

FORMATS = (
    "mov,matroska,webm,avi,flv,asf,asf_o,gif,ogg,rm,mxf,dv,nut,ivf,obu,mpeg,mpegts,mpegvideo,m4v,"
    "h261,h263,h264,hevc,av1,vc1,yuv4mpegpipe,wtv,mp3,wav,aac,aiff,au,caf,flac"
)
"""Containers that are opened (and plain sound, so that it is told from damage). Playlists (HLS, concat) are not among
them: their name would be a video's, and what they show another file of the machine."""

# Linear chroma interpolation, exact rounding: without ACCURATE_RND and FULL_CHR_H_INT swscale takes a faster path that
# repeats chroma samples and is off by up to 3 levels.
EXACT = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.BITEXACT

BT709 = 1  # ITU-T H.273 code, the same for matrix, primaries and transfer
UNSPECIFIED = 2


class VideoError(Exception):
    """A video that cannot be read. `reason` is one of REASONS, the message says the rest in one line."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason

    def __reduce__(self):  # picklable: it crosses Ray's process borders
        return VideoError, (self.reason, str(self))


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
    """Average frames per second; 0 if the header does not say."""
    duration_s: float
    """From the first frame to the end of the last; 0 if the header does not say."""
    frames: int | None
    """Number of frames, if the header says."""
    codec: str
    """FFmpeg's name of the codec: h264, vp9, …"""


def probe(source: Source, limits: Limits | None = None) -> VideoInfo:
    """Open a video and decode its first frame.

    Raises VideoError: `empty` (no bytes), `unreadable` (no such file, not permitted), `corrupt` (not a video file, or
    its first frame cannot be decoded), `no_video_stream`, `no_frames`, `too_large` and `too_long` (over the limits).
    """
    with opened(source, limits) as (container, stream):
        _, frame = next(decoded_frames(source, container, stream))
        rotation = _rotation(frame)
        width, height = (frame.width, frame.height) if rotation % 180 == 0 else (frame.height, frame.width)
        if stream.duration is not None:
            duration_s = float(stream.duration * stream.time_base)
        else:
            duration_s = (container.duration or 0) / av.time_base
        if limits and duration_s > limits.max_duration_s:
            raise _too_long(source, duration_s, limits)
        return VideoInfo(
            width=width,
            height=height,
            rotation_deg=rotation,
            fps=float(stream.average_rate or stream.guessed_rate or 0),
            duration_s=duration_s,
            frames=stream.frames or None,
            codec=stream.codec_context.codec.canonical_name,
        )


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
    quick: bool = False,
    limits: Limits | None = None,
) -> Iterator[tuple[float, np.ndarray]]:
    """Yield (time_s, RGB uint8 [H, W, 3]) one at a time.

    fps None: every frame between start_s and end_s with its own time. Otherwise the frame nearest to each
    start_s + i / fps, with that time, as long as it is before end_s (None: the video's end). Times count from the
    first frame. `crop` is cut out of the upright frame, then scaled to `size` (height, width). quick: colours within
    3 levels and chroma not interpolated, 8 ms sooner a 1080p frame: for frames that are analysed, not kept.

    Raises VideoError, after yielding what could be decoded if the file breaks in the middle.
    """
    end_s = float("inf") if end_s is None else end_s
    if fps is None:
        for time_s, frame in _decoded(source, start_s, limits):
            if time_s >= end_s:
                return
            if time_s >= start_s:
                yield time_s, _rgb(frame, crop, size, quick)
        return
    wanted = _until(end_s, start_s, fps)
    for want, _, frame in _nearest(_decoded(source, start_s, limits), wanted, hold_last=False):
        yield want, _rgb(frame, crop, size, quick)


def thumbnails(source: Source, fps: float, size: tuple[int, int], limits: Limits | None = None) -> Iterator[np.ndarray]:
    """Small pictures of the frames that `iter_frames` gives, as they are stored (not turned): uint8 [height, width, 3].

    Scaled before they are converted: a tenth of the time of a whole frame.
    """
    height, width = size
    before, small = None, None
    for _, time_s, frame in _nearest(_decoded(source, 0.0, limits), _until(float("inf"), 0.0, fps), hold_last=False):
        if time_s != before:
            before = time_s
            scaled = frame.reformat(width, height, "rgb24", interpolation=Interpolation.AREA, threads=1)
            small = scaled.to_ndarray()
        yield small


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
    times_s = [float(t) for t in times_s]
    if not times_s or times_s != sorted(times_s):
        raise ValueError(f"times_s must be ascending and not empty, given {times_s[:5]}")
    own: list[float] = []
    images: list[np.ndarray] = []
    for _, time_s, frame in _nearest(_decoded(source, times_s[0]), iter(times_s), hold_last=True):
        images.append(images[-1] if own and own[-1] == time_s else _rgb(frame, crop, size))
        own.append(time_s)
    return np.stack(images), np.array(own)


def scale(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 RGB [H, W, 3] → [height, width, 3] of `size`: bicubic, averaging over all pixels when it gets smaller."""
    if image.shape[:2] == tuple(size):
        return image
    height, width = size
    # reducing_gap: shrink by a whole factor first; 5 times faster from 1080p and no visible difference.
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0))


# ---- reading ----


def _name(source: Source) -> str:
    return f"{len(source)} bytes" if isinstance(source, bytes) else str(source)


def _error(source: Source, error: Exception) -> VideoError:
    missing = isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError)
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    if isinstance(error, av.error.ArgumentError):  # FFmpeg's answer to both; its own words go to its log
        text = "no kind of video that is read, or larger than is read"
    return VideoError("unreadable" if missing else "corrupt", f"{_name(source)}: {' '.join(text.split())}")


def _too_long(source: Source, seconds: float, limits: Limits) -> VideoError:
    told = f"{seconds:.0f} s, more than {limits.max_duration_s:g} s are not read"
    return VideoError("too_long", f"{_name(source)}: {told}")


@contextmanager
def opened(source: Source, limits: Limits | None = None):
    """(container, first video stream); PyAV's errors inside become VideoError."""
    try:
        if isinstance(source, bytes):
            size, file = len(source), io.BytesIO(source)
        else:
            # "file:" so that a name with a colon, or a list of addresses, is never taken for a network protocol
            size, file = Path(source).stat().st_size, f"file:{source}"
        if size == 0:
            raise VideoError("empty", f"{_name(source)}: no bytes")
        options = {"protocol_whitelist": "file", "format_whitelist": FORMATS}
        pixels = {"max_pixels": str(limits.max_pixels)} if limits else {}  # FFmpeg's own check, also in mid-stream
        with av.open(file, metadata_errors="replace", options=options | pixels) as container:
            if not container.streams.video:
                raise VideoError("no_video_stream", f"{_name(source)}: no video stream")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise VideoError("corrupt", f"{_name(source)}: its video has no codec that FFmpeg knows")
            stream.codec_context.thread_count = 1
            stream.codec_context.options = pixels
            width, height = stream.codec_context.width, stream.codec_context.height
            if limits and width * height > limits.max_pixels:
                told = f"frames of {width}x{height}, more than {limits.max_pixels} pixels are not decoded"
                raise VideoError("too_large", f"{_name(source)}: {told}")
            yield container, stream
    except (av.error.FFmpegError, OSError) as error:
        raise _error(source, error) from None


def decoded_frames(source: Source, container, stream) -> Iterator[tuple[float, av.VideoFrame]]:
    """Decode from where the container stands: (seconds from the stream's start, frame), ascending; at least one."""
    start, numerator, denominator = stream.start_time or 0, stream.time_base.numerator, stream.time_base.denominator
    step_s = float(1 / (stream.average_rate or stream.guessed_rate or 25))
    last_s = None
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise VideoError("corrupt", f"{_name(source)}: the file ends in the middle of a frame")
        for frame in packet.decode():
            if frame.is_corrupt:  # the decoder painted over what it could not read
                raise VideoError("corrupt", f"{_name(source)}: damaged after {last_s or 0:.2f} s")
            if frame.pts is not None:
                time_s = (frame.pts - start) * numerator / denominator  # as Fraction would, in a tenth of its time
            else:
                time_s = 0.0 if last_s is None else last_s + step_s
            if last_s is None or time_s > last_s:
                last_s = time_s
                yield time_s, frame
    if last_s is None:
        raise VideoError("no_frames", f"{_name(source)}: no frame in the video stream")


def _decoded(source: Source, from_s: float, limits: Limits | None = None) -> Iterator[tuple[float, av.VideoFrame]]:
    """Frames from a key frame at or before `from_s` to the end.

    With limits a frame that would stand for too long is `corrupt`: two frames a year apart are a video of a year.
    """
    if limits is None:
        yield from _from_key_frame(source, from_s, None)
        return
    before_s = None
    for time_s, frame in _from_key_frame(source, from_s, limits):
        gap_s = time_s - (time_s if before_s is None else before_s)
        gap_s = max(gap_s, float((frame.duration or 0) * frame.time_base))
        if gap_s > limits.max_gap_s:
            told = f"a frame stands still for {gap_s:.1f} s near {before_s or time_s:.2f} s"
            raise VideoError("corrupt", f"{_name(source)}: {told}")
        if time_s > limits.max_duration_s:
            raise _too_long(source, time_s, limits)
        before_s = time_s
        yield time_s, frame


def _from_key_frame(source: Source, from_s: float, limits: Limits | None) -> Iterator[tuple[float, av.VideoFrame]]:
    with opened(source, limits) as (container, stream):
        ahead = None
        if from_s > 0.5 and stream.start_time is not None:
            container.seek(int(from_s / stream.time_base) + stream.start_time, stream=stream)
            decoded = decoded_frames(source, container, stream)
            with suppress(VideoError):  # nothing to decode there: from the start, then
                ahead = next(decoded)
            if ahead is None or ahead[0] > from_s:  # the index may count in decoding, not presentation, times
                container.seek(stream.start_time, stream=stream)
                ahead = None
        if ahead is None:
            yield from decoded_frames(source, container, stream)
        else:
            yield from chain([ahead], decoded)


def _until(end_s: float, start_s: float, fps: float) -> Iterator[float]:
    i = 0
    while (time_s := start_s + i / fps) < end_s:
        yield time_s
        i += 1


def _nearest(
    decoded: Iterator[tuple[float, av.VideoFrame]], wanted: Iterator[float], hold_last: bool
) -> Iterator[tuple[float, float, av.VideoFrame]]:
    """(wanted time, frame's time, frame) for each wanted time, both ascending. The last frame stands for its duration,
    or with hold_last for ever.
    """
    want = next(wanted, None)
    before = None
    for time_s, frame in decoded:
        while want is not None and want <= time_s:
            if before is not None and want - before[0] <= time_s - want:
                yield want, *before
            else:
                yield want, time_s, frame
            want = next(wanted, None)
        if want is None:
            return
        before = time_s, frame
    last_s, frame = before
    end_s = float("inf") if hold_last else last_s + float((frame.duration or 0) * frame.time_base)
    while want is not None and want < end_s:
        yield want, last_s, frame
        want = next(wanted, None)


def _rotation(frame: av.VideoFrame) -> int:
    """Clockwise degrees to upright, in quarter turns. PyAV gives the display matrix's counter-clockwise angle."""
    return round(-frame.rotation / 90) % 4 * 90


def to_rgb(frame: av.VideoFrame, flags: Interpolation = EXACT) -> av.VideoFrame:
    """To RGB with the frame's own matrix; untagged video is BT.709 from 720 lines up, else BT.601, as players do."""
    matrix = None
    if frame.colorspace == UNSPECIFIED:
        matrix = Colorspace.ITU709 if min(frame.width, frame.height) >= 720 else Colorspace.ITU601
    return frame.reformat(
        format="rgb24", src_colorspace=matrix, dst_color_range=ColorRange.JPEG, interpolation=flags, threads=1
    )


def _rgb(frame: av.VideoFrame, crop: Box | None, size: tuple[int, int] | None, quick: bool = False) -> np.ndarray:
    turns = _rotation(frame) // 90
    full = (frame.width, frame.height) if turns % 2 == 0 else (frame.height, frame.width)
    left, top, width, height = crop or (0, 0, *full)
    if min(left, top) < 0 or left + width > full[0] or top + height > full[1]:
        raise ValueError(f"crop {crop} is not inside the {full[0]}x{full[1]} frame")
    if size is not None and height >= 2 * size[0] and width >= 2 * size[1]:
        quick = True  # the scaling averages over each chroma sample anyway
    image = to_rgb(frame, Interpolation.BILINEAR if quick else EXACT).to_ndarray()
    image = np.rot90(image, -turns)[top : top + height, left : left + width]
    image = np.ascontiguousarray(image)
    return image if size is None else scale(image, size)
