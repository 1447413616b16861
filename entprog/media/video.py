"""Video files → frames: probing, frames by time.

Everything here decodes with one thread: who runs many at once (Ray) decides how many cores are used.
"""

import io
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, dropwhile, takewhile
from pathlib import Path

import av
import numpy as np
from av.format import Flags
from av.stream import Disposition
from av.video.reformatter import Interpolation
from PIL import Image

from entprog.media import containers, fields, showing
from entprog.media.errors import REASONS, VideoError
from entprog.media.limits import LIMITS, Limits
from entprog.media.pictures import BACKGROUND, Color
from entprog.media.showing import EXACT, Shown

__all__ = ["REASONS", "VideoError"]

Source = str | Path | bytes
"""A video file's path, or its bytes."""

Box = tuple[int, int, int, int]
"""left, top, width, height in pixels of the upright (rotated) frame, inside it."""

FORMATS = (
    "mov,matroska,webm,avi,flv,asf,asf_o,gif,ogg,rm,mxf,dv,nut,ivf,obu,mpeg,mpegts,mpegvideo,m4v,"
    "h261,h263,h264,hevc,av1,vc1,yuv4mpegpipe,wtv,mp3,wav,aac,aiff,au,caf,flac"
)
"""Containers that are opened (and plain sound, so that it is told from damage). Playlists (HLS, concat) are not among
them: their name would be a video's, and what they show another file of the machine."""

BT709 = 1  # ITU-T H.273 code, the same for matrix, primaries and transfer

_SAME_TIME_S = 0.25
"""Time stamps that go back by less are of frames out of order, by more of a video that starts again."""


@dataclass(frozen=True)
class VideoInfo:
    """What a video's header says, plus its first frame."""

    width: int
    """Of the upright picture in square pixels, as every frame is given."""
    height: int
    """The same."""
    stored: tuple[int, int]
    """Width and height of the upright picture in pixels as they are stored, square or not: those of OpenCV."""
    fps: float
    """Average frames per second; 0 if the header does not say."""
    duration_s: float
    """From the first frame to the end of the last; 0 if the header does not say."""
    frames: int | None
    """Number of frames, if the header says."""
    codec: str
    """FFmpeg's name of the codec: h264, vp9, …"""


def probe(source: Source, limits: Limits = LIMITS) -> VideoInfo:
    """Open a video and decode its first frame.

    Raises VideoError: `empty` (no bytes), `unreadable` (no such file, not permitted), `corrupt` (not a video file, or
    its first frame cannot be decoded), `unsupported` (it cannot be shown rightly), `no_video_stream`, `no_frames`,
    `too_large` and `too_long` (over the limits).
    """
    with opened(source, limits) as (container, stream):
        first = next(decoded_frames(source, container, stream, limits))
        with _named(source):
            width, height = showing.size(first)
            stored = showing.size(first._replace(aspect=Fraction(1)))
        if stream.duration is not None:
            duration_s = float(stream.duration * stream.time_base)
        else:
            duration_s = (container.duration or 0) / av.time_base
        if duration_s > limits.max_duration_s:
            raise _too_long(source, duration_s, limits)
        return VideoInfo(
            width=width,
            height=height,
            stored=stored,
            fps=float(stream.average_rate or stream.guessed_rate or 0),
            duration_s=duration_s,
            frames=stream.frames or None,
            codec=stream.codec_context.codec.canonical_name,
        )


def field_order(source: Source, limits: Limits = LIMITS, heartbeats=lambda frames: frames) -> str:
    """Of an interlaced video that does not say it is one: `tff` or `bff`; else empty (`fields.order`).

    Decodes as many frames as it takes to tell; `heartbeats` goes over them. Damage behind the first frame is for
    whoever reads on.
    """
    with opened(source, limits) as (container, stream):
        frames = (shown.frame for shown in decoded_frames(source, container, stream, limits))
        return fields.order(heartbeats(_sound(frames)))


def _sound(frames: Iterator[av.VideoFrame]) -> Iterator[av.VideoFrame]:
    """The frames as far as they can be decoded."""
    with suppress(VideoError, av.error.FFmpegError):
        yield from frames


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
    limits: Limits = LIMITS,
    order: str = "",
    background: Color = BACKGROUND,
) -> Iterator[tuple[float, np.ndarray]]:
    """Yield (time_s, RGB uint8 [H, W, 3]) one at a time.

    fps None: every frame between start_s and end_s with its own time. Otherwise the frame nearest to each
    start_s + i / fps, with that time, as long as it is before end_s (None: the video's end). Times count from the
    first frame; where time stamps start again they go on. `crop` is cut out of the upright picture in square pixels,
    then scaled to `size` (height, width). quick: colours within 3 levels and chroma not interpolated, 8 ms sooner a
    1080p frame: for frames that are analysed, not kept. order: as `field_order` gives it.
    background: shows through where frames are transparent.

    Raises VideoError, after yielding what could be decoded if the file breaks in the middle, or if a picture of which a
    `crop` is cut out changes its size.
    """
    end_s = float("inf") if end_s is None else end_s
    if fps is None:
        decoded = ((shown.time_s, shown) for shown in _decoded(source, start_s, limits, order))
        inside = dropwhile(lambda at: at[0] < start_s, takewhile(lambda at: at[0] < end_s, decoded))
    else:
        wanted = _until(end_s, start_s, fps)
        inside = _nearest(_decoded(source, start_s, limits, order), wanted, hold_last=False)
    for time_s, shown in inside if crop is None else _of_one_size(source, inside):
        yield time_s, _rgb(source, shown, crop, size, quick, background)


def _of_one_size(source: Source, frames: Iterator[tuple[float, Shown]]) -> Iterator[tuple[float, Shown]]:
    """The same, as long as a place in one is that place in all."""
    whole = None
    for time_s, shown in frames:
        whole = whole or showing.size(shown)
        if showing.size(shown) != whole:
            raise changed_size(source, time_s)
        yield time_s, shown


def changed_size(source: Source, time_s: float) -> VideoError:
    """Of a video whose picture has another size from a time on."""
    return VideoError("corrupt", f"{_name(source)}: its picture changes size at {time_s:.2f} s")


def times(source: Source, limits: Limits = LIMITS, order: str = "") -> Iterator[float]:
    """Seconds of every frame, from the first one on. Raises VideoError as `iter_frames` does."""
    for shown in _decoded(source, 0.0, limits, order):
        yield shown.time_s


def nearest(times_s: np.ndarray, wanted_s: np.ndarray) -> np.ndarray:
    """Number of the frame that `iter_frames` gives for each wanted time: int64. times_s: of all frames, ascending."""
    after = np.searchsorted(times_s, wanted_s).clip(max=len(times_s) - 1)
    before = np.maximum(after - 1, 0)
    return np.where(np.abs(wanted_s - times_s[before]) <= np.abs(times_s[after] - wanted_s), before, after)


def thumbnails(
    source: Source, fps: float, size: tuple[int, int], limits: Limits = LIMITS, crop: Box | None = None
) -> Iterator[tuple[int, np.ndarray]]:
    """Small pictures of the frames that `iter_frames` gives, or of their `crop`: (part, uint8 [height, width, 3]),
    where the part goes up by one when time stamps start again. Raises VideoError as `iter_frames` does.

    Without a crop they are as they are stored (not turned, pixels not squared) and scaled before they are converted, in
    a tenth of the time.
    """
    height, width = size
    before, small = None, None
    frames = _nearest(_decoded(source, 0.0, limits), _until(float("inf"), 0.0, fps), hold_last=False)
    for _, shown in frames if crop is None else _of_one_size(source, frames):
        if shown.time_s != before:
            before = shown.time_s
            if crop is not None:
                small = _rgb(source, shown, crop, size, quick=True)
            elif showing.is_plain(shown.frame):
                scaled = shown.frame.reformat(width, height, "rgb24", interpolation=Interpolation.AREA, threads=1)
                small = scaled.to_ndarray()
            else:
                scaled = shown.frame.reformat(width, height, interpolation=Interpolation.AREA, threads=1)
                with _named(source):
                    small = showing.pixels(scaled, Interpolation.BILINEAR)
        yield shown.part, small


def read_frames(
    source: Source,
    times_s: Sequence[float] | np.ndarray,
    crop: Box | None = None,
    size: tuple[int, int] | None = None,
    limits: Limits = LIMITS,
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
    for _, shown in _nearest(_decoded(source, times_s[0], limits), iter(times_s), hold_last=True):
        images.append(images[-1] if own and own[-1] == shown.time_s else _rgb(source, shown, crop, size))
        own.append(shown.time_s)
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


@contextmanager
def _named(source: Source):
    """What is wrong with a frame is raised with its source's name."""
    try:
        yield
    except VideoError as error:
        raise VideoError(error.reason, f"{_name(source)}: {error}") from None


def _error(source: Source, error: Exception) -> VideoError:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    if isinstance(error, MemoryError):
        return VideoError("too_large", f"{_name(source)}: not enough memory for it")
    missing = isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError)
    if isinstance(error, av.error.ArgumentError):  # FFmpeg's answer to both; its own words go to its log
        text = "no kind of video that is read, or larger than is read"
    return VideoError("unreadable" if missing else "corrupt", f"{_name(source)}: {' '.join(text.split())}")


def _too_long(source: Source, seconds: float, limits: Limits) -> VideoError:
    message = f"{seconds:.0f} s, more than {limits.max_duration_s:g} s are not read"
    return VideoError("too_long", f"{_name(source)}: {message}")


@contextmanager
def opened(source: Source, limits: Limits = LIMITS):
    """(container, the video stream that FFmpeg thinks best); PyAV's errors inside become VideoError."""
    try:
        if isinstance(source, bytes):
            size, file = len(source), io.BytesIO(source)
        else:
            # "file:" so that a name with a colon, or a list of addresses, is never taken for a network protocol
            size, file = Path(source).stat().st_size, f"file:{source}"
        if size == 0:
            raise VideoError("empty", f"{_name(source)}: no bytes")
        options = {"protocol_whitelist": "file", "format_whitelist": FORMATS}
        pixels = {"max_pixels": str(limits.max_pixels)}  # FFmpeg's own check, also in mid-stream
        with av.open(file, metadata_errors="replace", options=options | pixels) as container:
            stream = _best(container)
            if stream is None or stream.disposition & Disposition.attached_pic:  # the cover of a piece of music
                raise VideoError("no_video_stream", f"{_name(source)}: no video stream")
            if stream.codec_context is None:
                raise VideoError("corrupt", f"{_name(source)}: its video has no codec that FFmpeg knows")
            stream.codec_context.thread_count = 1
            stream.codec_context.options = pixels
            width, height = showing.square(stream.codec_context.width, stream.codec_context.height, _aspect(stream))
            if width * height > limits.max_pixels:
                message = f"frames of {width}x{height}, more than {limits.max_pixels} pixels are not decoded"
                raise VideoError("too_large", f"{_name(source)}: {message}")
            yield container, stream
    except (av.error.FFmpegError, OSError, MemoryError) as error:
        raise _error(source, error) from None


def _best(container):
    """The video stream that FFmpeg thinks best, but none of a single picture where another one moves; None: none."""
    best = container.streams.best("video")
    moving = [s for s in container.streams.video if s.frames != 1 and s.codec_context is not None]
    if not moving or best.index in {stream.index for stream in moving}:
        return best
    return max(moving, key=lambda stream: stream.codec_context.width * stream.codec_context.height)


def _aspect(stream) -> Fraction:
    """Width by height of a pixel; 1 if the file does not say."""
    given = stream.sample_aspect_ratio
    return Fraction(given) if given else Fraction(1)


def decoded_frames(
    source: Source, container, stream, limits: Limits = LIMITS, start: int | None = None
) -> Iterator[Shown]:
    """Decode from where the container stands: frames with ascending times, at least one.

    Begins with the first key frame: what lies before it cannot be decoded rightly. start: time stamp of the video's
    first frame; None: this is it. Where time stamps start again, or leap in a container of broadcasts, the next key
    frame begins another part, at the time that follows.

    Raises VideoError: `corrupt` for damage and for a frame that stands for longer than `max_gap_s` (two frames a year
    apart are a video of a year), `too_long` over the other limits, `no_frames`.
    """
    numerator, denominator = stream.time_base.numerator, stream.time_base.denominator
    step_s = float(1 / (stream.average_rate or stream.guessed_rate or 25))
    leaps = bool(container.format.flags & Flags.ts_discont.value)
    aspect, began_s = _aspect(stream), time.monotonic()
    last_s, part, count, waiting = None, 0, 0, True
    ordering = containers.Ordering() if containers.may_be_disordered(container, stream) else None
    with _named(source):
        decoder = containers.alpha_decoder(stream)
    first_key = None  # its picture may be cut away by an edit list: what follows it is whole all the same
    for packet in container.demux(stream):
        if first_key is None and packet.is_keyframe:
            first_key = packet.pts
        if packet.is_corrupt and (packet.is_keyframe or not waiting):
            raise VideoError("corrupt", f"{_name(source)}: damaged or cut off after {last_s or 0:.2f} s")
        try:
            frames = packet.decode()
            if decoder is not None:  # FFmpeg's own has seen to sizes and damage
                frames = decoder.decode(packet if packet.size else None)
        except av.error.FFmpegError:
            if packet.is_keyframe or not waiting:
                raise
            continue
        if ordering is not None:
            frames = ordering.given(frames, last=not packet.size)
        for frame in frames:
            count += 1
            if count > limits.max_frames:
                raise VideoError("too_long", f"{_name(source)}: more than {limits.max_frames} frames are not decoded")
            if time.monotonic() - began_s > limits.max_work_s:
                raise VideoError("too_long", f"{_name(source)}: not decoded within {limits.max_work_s:g} s")
            follows = last_s is None and None not in (first_key, frame.pts) and frame.pts >= first_key
            if waiting and not (follows or _is_key(frame, packet, stream)):
                continue
            if frame.is_corrupt:  # the decoder painted over what it could not read
                raise VideoError("corrupt", f"{_name(source)}: damaged after {last_s or 0:.2f} s")
            if frame.pts is None:
                time_s = 0.0 if last_s is None else last_s + step_s
            else:
                start = frame.pts if start is None else start
                time_s = (frame.pts - start) * numerator / denominator  # as Fraction would, in a tenth of its time
                leap_s = 0.0 if last_s is None else time_s - last_s
                if leap_s < -_SAME_TIME_S or (leaps and leap_s > limits.max_gap_s):
                    waiting = not _is_key(frame, packet, stream)
                    if waiting:
                        continue
                    part += 1
                    start = frame.pts - round((last_s + step_s) * denominator / numerator)
                    time_s = (frame.pts - start) * numerator / denominator
            waiting = False
            if last_s is not None and time_s <= last_s:
                continue
            duration_s = (frame.duration or 0) * numerator / denominator
            stands_s = max(duration_s, 0.0 if last_s is None else time_s - last_s)
            if stands_s > limits.max_gap_s:
                message = f"a frame stands still for {stands_s:.1f} s near {last_s or 0:.2f} s"
                raise VideoError("corrupt", f"{_name(source)}: {message}")
            if time_s > limits.max_duration_s:
                raise _too_long(source, time_s, limits)
            last_s = time_s
            yield Shown(time_s, duration_s, frame, part, aspect)
    if last_s is None:
        if stream.frames:  # so many are said to be there
            raise VideoError("corrupt", f"{_name(source)}: none of {stream.frames} frames can be decoded")
        raise VideoError("no_frames", f"{_name(source)}: no frame in the video stream, or no key frame")
    if "matroska" in container.format.name:
        with io.BytesIO(source) if isinstance(source, bytes) else Path(source).open("rb") as file:
            if containers.is_cut_off(file):
                raise VideoError("corrupt", f"{_name(source)}: cut off after {last_s:.2f} s")


def _is_key(frame: av.VideoFrame, packet, stream) -> bool:
    """Not every decoder says it of its frames; where there are no B-frames a packet comes out at once as a frame."""
    return bool(frame.key_frame or (packet.is_keyframe and not stream.codec_context.has_b_frames))


def _decoded(source: Source, from_s: float, limits: Limits, order: str = "") -> Iterator[Shown]:
    """Whole frames from a key frame at or before `from_s` to the end."""
    with opened(source, limits) as (container, stream):
        yield from fields.deinterlaced(_from_key_frame(source, container, stream, from_s, limits), order)


def _from_key_frame(source: Source, container, stream, from_s: float, limits: Limits) -> Iterator[Shown]:
    twice = container.format.flags & Flags.ts_discont.value  # the same time stamp may stand there twice
    if from_s <= 0.5 or twice or containers.may_be_disordered(container, stream):
        yield from decoded_frames(source, container, stream, limits)
        return
    start = next(decoded_frames(source, container, stream, limits)).frame.pts
    ahead = None
    if start is not None:
        container.seek(int(from_s / stream.time_base) + start, stream=stream)
        decoded = decoded_frames(source, container, stream, limits, start)
        with suppress(VideoError):  # nothing to decode there: from the start, then
            ahead = next(decoded)
    if ahead is not None and ahead.time_s <= from_s:
        yield from chain([ahead], decoded)
        return
    # the index may count in decoding, not presentation, times
    container.seek(stream.start_time or 0, stream=stream)
    yield from decoded_frames(source, container, stream, limits)


def _until(end_s: float, start_s: float, fps: float) -> Iterator[float]:
    if not 0 < fps < float("inf"):
        raise ValueError(f"frames per second must be a positive number, given {fps}")
    i = 0
    while (time_s := start_s + i / fps) < end_s:
        yield time_s
        i += 1


def _nearest(decoded: Iterator[Shown], wanted: Iterator[float], hold_last: bool) -> Iterator[tuple[float, Shown]]:
    """(wanted time, frame) for each wanted time, both ascending. The last frame stands for its duration, or with
    hold_last for ever.
    """
    want = next(wanted, None)
    before = None
    for shown in decoded:
        while want is not None and want <= shown.time_s:
            nearer = before is not None and want - before.time_s <= shown.time_s - want
            yield want, before if nearer else shown
            want = next(wanted, None)
        if want is None:
            return
        before = shown
    end_s = float("inf") if hold_last else before.time_s + before.duration_s
    while want is not None and want < end_s:
        yield want, before
        want = next(wanted, None)


def _rgb(
    source: Source,
    shown: Shown,
    crop: Box | None,
    size: tuple[int, int] | None,
    quick: bool = False,
    background: Color = BACKGROUND,
) -> np.ndarray:
    """The picture, or its `crop`, at `size`: uint8 RGB [H, W, 3]."""
    with _named(source):
        full = showing.size(shown)
        left, top, width, height = crop or (0, 0, *full)
        if min(left, top) < 0 or left + width > full[0] or top + height > full[1]:
            raise ValueError(f"crop {crop} is not inside the {full[0]}x{full[1]} frame")
        if size is not None and height >= 2 * size[0] and width >= 2 * size[1]:
            quick = True  # the scaling averages over each chroma sample anyway
        image = showing.rgb(shown, Interpolation.BILINEAR if quick else EXACT, background)
    image = np.ascontiguousarray(image[top : top + height, left : left + width])
    return image if size is None else scale(image, size)
