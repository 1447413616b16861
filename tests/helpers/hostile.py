"""A corpus of hostile files, made from real clips: `corpus(folder, seed)`. The same seed gives the same damage.

Sound sources in every container and codec at hand, and from them: cut off, flipped bits, lies in headers, wrong names,
nothing, sizes no one expects. All of it small: a few frames each.
"""

import functools
import io
import os
import random
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.codec.context import Flags
from PIL import Image

from entprog import names as texts
from entprog.media import assets, video

FPS = 10


def people(seconds: float = 0.85) -> list[np.ndarray]:
    """A few frames of a real person, large enough to be found whatever encodes them: uint8 RGB [480, 272, 3]."""
    frames = video.iter_frames(assets.clip("cam04"), fps=FPS, end_s=seconds, size=(480, 272))
    return [frame for _, frame in frames]


def in_a_thread(make: Callable[..., bytes], *args, **options) -> bytes:
    """Run as root, SVT-AV1 gives the thread that calls it real-time priority for good, and what that starts inherits
    it: a whole Ray of such processes leaves the machine's others no time."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(make, *args, **options).result()


def encoded(
    frames: list[np.ndarray] | list[av.VideoFrame],
    codec: str,
    container: str,
    pixels: str = "yuv420p",
    options: dict[str, str] | None = None,
    times: list[int] | None = None,
    aspect: Fraction | None = None,
    interlaced: bool = False,
    fps: int = FPS,
) -> bytes:
    """Frames by any encoder in any container. `times`: presentation times in 1/fps s, for a variable frame rate;
    `aspect`: width by height of a pixel. Frames of `wide` keep their colours.
    """
    out = io.BytesIO()
    with av.open(out, "w", format=container, options={"fflags": "+bitexact"}) as file:
        stream = file.add_stream(codec, rate=fps)
        put(file, stream, frames, pixels, options, times, aspect, interlaced, fps)
    return out.getvalue()


def put(
    file,
    stream,
    frames: list[np.ndarray] | list[av.VideoFrame],
    pixels: str = "yuv420p",
    options: dict[str, str] | None = None,
    times: list[int] | None = None,
    aspect: Fraction | None = None,
    interlaced: bool = False,
    fps: int = FPS,
) -> None:
    """Encode frames into a stream of an open file, as `encoded` does."""
    first, context = frames[0], stream.codec_context
    colours = isinstance(first, av.VideoFrame)
    if not context.is_open:
        stream.height, stream.width = (first.height, first.width) if colours else first.shape[:2]
        stream.pix_fmt = pixels
        context.thread_count = 1
        context.options = context.options | (options or {})
    if aspect is not None:
        context.sample_aspect_ratio = stream.sample_aspect_ratio = aspect
    if interlaced:
        context.flags |= Flags.interlaced_dct | Flags.interlaced_me
    if colours:
        context.colorspace, context.color_trc = first.colorspace, first.color_trc
        context.color_primaries, context.color_range = first.color_primaries, first.color_range
    for i, image in enumerate(frames):
        if colours:
            frame = image
        else:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24").reformat(format=pixels)
        frame.pts, frame.time_base = (times or range(len(frames)))[i], Fraction(1, fps)
        file.mux(stream.encode(frame))
    file.mux(stream.encode(None))


def sound(container: str = "mp4") -> bytes:
    """A file with an audio stream alone."""
    out = io.BytesIO()
    with av.open(out, "w", format=container) as file:
        stream = file.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return out.getvalue()


def patched(mp4: bytes, box: bytes, offset: int, value: bytes) -> bytes:
    """Other bytes at an offset after a box's name."""
    at = mp4.index(box) + 4 + offset
    return mp4[:at] + value + mp4[at + len(value) :]


TURNS = {
    "upright": (1, 0, 0, 1),
    "mirrored": (-1, 0, 0, 1),
    "half-turn": (-1, 0, 0, -1),
    "upside-down": (1, 0, 0, -1),
    "transposed": (0, 1, 1, 0),
    "quarter-turn": (0, 1, -1, 0),
    "transversed": (0, -1, -1, 0),
    "three-quarters": (0, -1, 1, 0),
}
"""Display matrices a, b, c, d (x' = ax + cy, y' = bx + dy, y down) of a stored picture that is ... to be upright."""


def turned(mp4: bytes, turn: str = "quarter-turn") -> bytes:
    """The same video with another matrix in its track header (mp4 and mov)."""
    a, b, c, d = (round(value * (1 << 16)) for value in (TURNS | {"slanted": (0.8, 0.6, -0.6, 0.8)})[turn])
    return patched(mp4, b"tkhd", 40, struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30))


def laid(image: np.ndarray, turn: str) -> np.ndarray:
    """How a camera that notes `turn` has stored an upright picture."""
    a, b, c, d = TURNS[turn]
    if a == d == 0:  # x' = cy, y' = bx
        image = image[::-1] if b < 0 else image
        image = image[:, ::-1] if c < 0 else image
        return np.ascontiguousarray(image.transpose(1, 0, 2))
    return np.ascontiguousarray(image[:: d or 1, :: a or 1])


def woven(frames: list[np.ndarray], top_first: bool = True) -> list[np.ndarray]:
    """Interlaced: every two moments become the two fields of one frame."""
    out = []
    for first, second in zip(frames[::2], frames[1::2], strict=False):
        whole = (first if top_first else second).copy()
        whole[1::2] = (second if top_first else first)[1::2]
        out.append(whole)
    return out


def joined(first: bytes, second: bytes) -> bytes:
    """Two transport streams after each other whose packet counters go on, while their time stamps start again."""
    counts, out = {}, bytearray(first + second)
    for at in range(0, len(out), 188):
        pid = int.from_bytes(out[at + 1 : at + 3], "big") & 0x1FFF
        if out[at + 3] & 0x10:  # it has a payload
            counts[pid] = (counts.get(pid, -1) + 1) & 15
            out[at + 3] = (out[at + 3] & 0xF0) | counts[pid]
    return bytes(out)


TO_BT2020 = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])
"""Linear BT.709 to linear BT.2020 (ITU-R BT.2087)."""
TRANSFERS = {"pq": 16, "hlg": 18, "bt2020": 14}
WHITE_NITS = 203
"""Of an ordinary picture inside HDR (ITU-R BT.2408)."""


def wide(image: np.ndarray, transfer: str) -> av.VideoFrame:
    """An ordinary picture (uint8 RGB, even sizes) in BT.2020 colours with one of TRANSFERS: yuv420p10le."""
    light = (image / 255.0) ** 2.4 @ TO_BT2020.T
    signal = {"pq": _pq, "hlg": _hlg, "bt2020": lambda of: of ** (1 / 2.4)}[transfer](light)
    luma = signal @ (0.2627, 0.6780, 0.0593)
    blue, red = (signal[..., 2] - luma) / 1.8814, (signal[..., 0] - luma) / 1.4746
    halved = [plane.reshape(len(plane) // 2, 2, -1, 2).mean((1, 3)) for plane in (blue, red)]
    frame = av.VideoFrame(image.shape[1], image.shape[0], "yuv420p10le")
    for plane, value in zip(frame.planes, (64 + 876 * luma, *(512 + 896 * half for half in halved)), strict=True):
        lines = np.zeros((plane.height, plane.line_size // 2), np.uint16)
        lines[:, : plane.width] = value.round()
        plane.update(lines.tobytes())
    frame.colorspace, frame.color_trc, frame.color_primaries, frame.color_range = 9, TRANSFERS[transfer], 9, 1
    return frame


def _pq(light: np.ndarray) -> np.ndarray:
    """SMPTE ST 2084."""
    powered = (light * WHITE_NITS / 10000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * powered) / (1 + 18.6875 * powered)) ** 78.84375


def _hlg(light: np.ndarray) -> np.ndarray:
    """ITU-R BT.2100 on a screen of 1000 cd/m2."""
    shown = light * WHITE_NITS / 1000
    scene = shown / np.maximum((shown @ (0.2627, 0.6780, 0.0593)) ** (0.2 / 1.2), 1e-6)[..., None]
    high = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-6)) + 0.55991073
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), high)


def formats(frames: list[np.ndarray]) -> dict[str, bytes]:
    """Sound sources by name: they show a person and are to be kept."""
    x264 = {"crf": "20", "preset": "veryfast"}
    vpx = {"deadline": "good", "cpu-used": "5", "b": "2M"}  # "realtime" would encode by how busy the machine is
    plain = encoded(frames, "libx264", "mp4", options=x264)
    wide = [np.ascontiguousarray(np.rot90(frame)) for frame in frames]
    return {
        "plain.mp4": plain,
        "b-frames.mp4": encoded(frames, "libx264", "mp4", options=x264 | {"bf": "3", "b-pyramid": "normal"}),
        "key-frames.mp4": encoded(frames, "libx264", "mp4", options=x264 | {"g": "1"}),
        "10-bit.mp4": encoded(frames, "libx264", "mp4", "yuv420p10le", x264),
        "4-4-4.mp4": encoded(frames, "libx264", "mp4", "yuv444p", x264),
        "fragments.mp4": remuxed(plain, "mp4", {"movflags": "frag_keyframe+empty_moov+default_base_moof"}),
        "quicktime.mov": remuxed(plain, "mov", {}),
        "stream.ts": remuxed(plain, "mpegts", {}),
        "matroska.mkv": remuxed(plain, "matroska", {}),
        "flash.flv": remuxed(plain, "flv", {}),
        "rotated.mp4": turned(encoded(wide, "libx264", "mp4", options=x264)),
        "odd.mkv": encoded([frame[:479, :271] for frame in frames], "ffv1", "matroska", "yuv444p"),
        "hevc.mp4": encoded(
            frames, "libx265", "mp4", options={"x265-params": "log-level=none:pools=none:frame-threads=1"}
        ),
        "vp8.webm": encoded(frames, "libvpx", "webm", options=vpx),
        "vp9.webm": encoded(frames, "libvpx-vp9", "webm", options=vpx),
        "vp9-alpha.webm": encoded(frames, "libvpx-vp9", "webm", "yuva420p", vpx),
        "av1.mp4": in_a_thread(encoded, frames, "libsvtav1", "mp4", options={"preset": "12", "crf": "30"}),
        "mpeg4.avi": encoded(frames, "mpeg4", "avi", options={"b": "3M"}),
        "mjpeg.avi": encoded(frames, "mjpeg", "avi", "yuvj420p", {"q": "3"}),
        "prores-alpha.mov": encoded(frames, "prores_ks", "mov", "yuva444p10le"),
        "alpha.mov": encoded(frames, "qtrle", "mov", "argb"),
        "animation.gif": encoded(frames, "gif", "gif", "rgb8"),
        "variable.mp4": encoded(
            frames, "libx264", "mp4", options=x264, times=[0, 1, 2, 4, 5, 6, 8, 9, 10][: len(frames)]
        ),
    }


def shown(frames: list[np.ndarray]) -> dict[str, bytes]:
    """Sound sources that must not be taken as they are stored, by name: they show a person upright, and are kept."""
    x264 = {"crf": "20", "preset": "veryfast"}
    out = {}
    for turn in TURNS:
        if turn != "upright":
            stored = encoded([laid(frame, turn) for frame in frames], "libx264", "mp4", options=x264)
            out[f"{turn}.mp4"] = turned(stored, turn)
    mpeg4 = encoded([laid(frame, "mirrored") for frame in frames], "mpeg4", "mov", options={"b": "3M"})
    narrow = [np.ascontiguousarray(frame[:, ::2]) for frame in frames]
    low = [np.ascontiguousarray(frame[::2]) for frame in frames]
    fields = woven([frame for frame in frames for _ in range(2)])
    moments = [frame for _, frame in video.iter_frames(assets.clip("cam04"), fps=40, end_s=1.0, size=(480, 272))]
    ts = [remuxed(encoded(some, "libx264", "mp4", options=x264), "mpegts", {}) for some in (frames, frames[::-1])]
    return out | {
        "mirrored.mov": turned(mpeg4, "mirrored"),
        "narrow-pixels.mp4": encoded(narrow, "libx264", "mp4", options=x264, aspect=Fraction(2)),
        "narrow-pixels.ts": encoded(narrow, "mpeg4", "mpegts", options={"b": "3M"}, aspect=Fraction(2)),
        "low-pixels.mkv": encoded(low, "libx264", "matroska", options=x264, aspect=Fraction(1, 2)),
        "fields.mp4": encoded(fields, "libx264", "mp4", options=x264 | {"x264-params": "tff=1"}, interlaced=True),
        "fields.ts": encoded(fields, "mpeg2video", "mpegts", options={"b": "3M"}, interlaced=True),
        "unsaid-fields.mp4": encoded(woven(moments), "libx264", "mp4", options=x264, fps=20),
        "unsaid-fields.avi": encoded(woven(moments, top_first=False), "mpeg4", "avi", options={"b": "3M"}, fps=20),
        "pq.mp4": encoded([wide(frame, "pq") for frame in frames], "libx264", "mp4", "yuv420p10le", x264),
        "hlg.mkv": encoded([wide(frame, "hlg") for frame in frames], "libx264", "matroska", "yuv420p10le", x264),
        "again.ts": joined(*ts),
        "headless.ts": headless(frames[:4] + frames, "libx264", "mpegts", 4),
        "headless.mkv": headless(frames[:4] + frames, "libx264", "matroska", 4),
        "thumbnail.mov": beside(frames[:1], "mjpeg", frames, "mov", "yuvj420p"),
        "preview.mkv": beside([frame[::8, ::8] for frame in frames], "mpeg4", frames, "matroska"),
    }


def headless(frames: list[np.ndarray], codec: str, container: str, gop: int) -> bytes:
    """A file whose first group of pictures has lost its key frame."""
    options = {"g": str(gop), "bf": "0"} | ({"preset": "veryfast", "sc_threshold": "0"} if codec == "libx264" else {})
    return remuxed(encoded(frames, codec, "matroska", options=options), container, {}, skip=1)


def beside(
    small: list[np.ndarray], codec: str, frames: list[np.ndarray], container: str, pixels: str = "yuv420p"
) -> bytes:
    """A video in the second stream, and something lesser in the first."""
    out = io.BytesIO()
    with av.open(out, "w", format=container, options={"fflags": "+bitexact"}) as file:
        first, second = file.add_stream(codec, rate=FPS), file.add_stream("libx264", rate=FPS)
        for stream, some, kind in ((second, frames, "yuv420p"), (first, small, pixels)):
            stream.height, stream.width, stream.pix_fmt = *some[0].shape[:2], kind
        second.codec_context.options = {"crf": "20", "preset": "veryfast"}
        put(file, first, small, pixels)
        put(file, second, frames)
    return out.getvalue()


def remuxed(content: bytes, container: str, options: dict[str, str], skip: int = 0) -> bytes:
    """The same packets in another container, but for the first `skip` of them."""
    out = io.BytesIO()
    options = {"fflags": "+bitexact"} | options  # no random numbers in the file
    with av.open(io.BytesIO(content)) as source, av.open(out, "w", format=container, options=options) as file:
        stream = file.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(source.demux(source.streams.video[0])):
            if packet.dts is not None and number >= skip:
                packet.stream = stream
                file.mux(packet)
    return out.getvalue()


def damaged(sources: dict[str, bytes], rng: random.Random, count: int) -> dict[str, bytes]:
    """`count` files: sources cut off, or with bits flipped in the header, the payload, or the index at the end."""
    out = {}
    names = sorted(sources)
    for i in range(count):
        name = names[i % len(names)]
        whole = bytearray(sources[name])
        kind = ("cut", "head", "payload", "tail", "hole", "swap")[i // len(names) % 6]
        if kind == "cut":
            whole = whole[: rng.randrange(1, len(whole))]
        elif kind == "hole":  # a block of the disk that was never written
            start = rng.randrange(len(whole))
            size = min(rng.choice([512, 4096]), len(whole) - start)
            whole[start : start + size] = bytes(size)
        elif kind == "swap":  # pieces in the wrong order
            a, b = sorted(rng.sample(range(len(whole)), 2))
            whole = whole[:a] + whole[b:] + whole[a:b]
        else:
            edge = min(400, len(whole))
            start, stop = {"head": (0, edge), "payload": (0, len(whole)), "tail": (len(whole) - edge, len(whole))}[kind]
            for _ in range(rng.choice([1, 4, 32])):
                whole[rng.randrange(start, stop)] ^= 1 << rng.randrange(8)
        out[f"damaged/{i:03d}-{kind}-{name}"] = bytes(whole)
    return out


def lies(frames: list[np.ndarray]) -> dict[str, bytes]:
    """Headers that claim what is not so, and pictures that no one expects."""
    x264 = {"crf": "20", "preset": "ultrafast"}
    plain = encoded(frames[:2], "libx264", "mp4", options=x264)
    noise = np.random.default_rng(0).integers(0, 255, (2, 2, 2, 3), np.uint8)
    out = {
        "one-frame.mp4": encoded(frames[:1], "libx264", "mp4", options=x264),
        "two-pixels.mp4": encoded(list(noise), "libx264", "mp4", options=x264),
        "one-pixel.mkv": encoded([image[:1, :1] for image in noise], "ffv1", "matroska", "yuv444p"),
        "one-row.mkv": encoded([frame[:1] for frame in frames], "ffv1", "matroska", "yuv444p"),
        "one-pixel.gif": encoded([image[:1, :1] for image in noise], "gif", "gif", "rgb8"),
        "a-year.mkv": encoded(frames[:2], "libx264", "matroska", options=x264, times=[0, 365 * 24 * 3600 * FPS]),
        "an-hour.mp4": encoded(frames[:3], "libx264", "mp4", options=x264, times=[0, 1, 3600 * FPS]),
        "huge-track.mp4": patched(plain, b"tkhd", 76, struct.pack(">2I", 60000 << 16, 60000 << 16)),
        "huge-sample.mp4": patched(plain, b"avc1", 24, struct.pack(">2H", 65535, 65535)),
        "zero-timescale.mp4": patched(plain, b"mdhd", 12, bytes(4)),
        "zero-durations.mp4": patched(plain, b"stts", 12, bytes(4)),
        "huge-count.mp4": patched(plain, b"stsz", 8, b"\x7f\xff\xff\xff"),
        "huge-box.mp4": patched(plain, b"moov", -8, b"\x7f\xff\xff\xff"),
        "huge.y4m": b"YUV4MPEG2 W30000 H30000 F10:1 Ip A1:1 C420\nFRAME\n" + bytes(1000),
        "no-rate.y4m": b"YUV4MPEG2 W16 H16 F0:0 Ip A1:1 C420\n" + (b"FRAME\n" + bytes(384)) * 3,
        "huge.gif": _big_gif(),
        "edit-list.mp4": _with_edit(plain, 10**6),
        "playlist.mp4": b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n../formats/plain.mp4\n#EXT-X-ENDLIST\n",
        "concat.mp4": b"ffconcat version 1.0\nfile 'plain.mp4'\n",
        "sdp.mp4": b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
        "slanted.mp4": turned(plain, "slanted"),
        "ictcp.mkv": encoded([_ictcp(frame) for frame in frames[:4]], "libx264", "matroska", "yuv420p10le", x264),
        "black.mp4": encoded([np.zeros((64, 64, 3), np.uint8)] * 8, "libx264", "mp4", options=x264),
    }
    for size in (5000, 16000, 60000):
        out[f"really-{size}.gif"] = _real_gif(size)
    return out


def _ictcp(image: np.ndarray) -> av.VideoFrame:
    """Colours in a matrix that nothing here converts."""
    frame = wide(image, "pq")
    frame.colorspace = 14
    return frame


def _big_gif() -> bytes:
    """A screen of 65535 by 65535 that no picture fills."""
    return b"GIF89a" + struct.pack("<2H", 65535, 65535) + b"\x80\0\0" + bytes(6) + b";"


def _real_gif(size: int) -> bytes:
    """A picture of size × size pixels in one colour: a few kilobytes that decode to gigabytes (or end too early)."""
    header = b"GIF89a" + struct.pack("<2H", size, size) + b"\x80\0\0" + bytes(3) + b"\xff" * 3
    image = b"," + struct.pack("<4H", 0, 0, size, size) + b"\0\x02" + b"\x03\x84\x8f\x05" + b"\0"
    return header + image * 2 + b";"


def _with_edit(mp4: bytes, delay_ms: int) -> bytes:
    """The first edit of the track shows nothing for so long."""
    at = mp4.find(b"elst")
    if at < 0:
        return mp4
    return mp4[: at + 12] + struct.pack(">Ii", delay_ms, -1) + mp4[at + 20 :]


@functools.cache
def _encoded() -> tuple:
    """What no seed has a part in: frames, and files of `formats`, `shown`, `lies`, and of `formats` with few frames."""
    frames = people()
    return frames, formats(frames), shown(frames), lies(frames), formats(frames[:4])


def corpus(folder: Path, seed: int = 0, size: int = 520) -> set[str]:
    """Fill a folder with at least `size` files; names of those that are to be kept (inside the folder)."""
    rng = random.Random(seed)
    frames, sound_ones, shown_ones, lying_ones, short_ones = _encoded()
    good = {f"formats/{name}": data for name, data in sound_ones.items()}
    good |= {f"shown/{name}": data for name, data in shown_ones.items()}
    names = (
        "with space.mp4",
        'quote\'s "both".mp4',
        "new\nline.mp4",
        "ünï – 人.mp4",
        "#%23 & ; $(x) `y`.mp4",
        "-i.mp4",
        "\x1b]0;title\x07\x1b[2J\x9b31m.mp4",
        "[/red] [bold.mp4",
    )
    plain = good["formats/plain.mp4"]
    good |= {f"names/{name}": plain for name in names}
    good["names/file:colon.mp4"] = plain
    other = {f"lies/{name}": data for name, data in lying_ones.items()}
    other |= {
        "zero/empty.mp4": b"",
        "zero/zeros.mp4": bytes(5000),
        "zero/one-byte.webm": b"\0",
        "wrong/picture.mp4": _png(frames[0]),
        "wrong/page.mp4": b"<html><body>404</body></html>",
        "wrong/video.txt": plain,
        "wrong/video": plain,
        "wrong/archive.mp4": b"PK\x03\x04" + rng.randbytes(500),
        "wrong/shard.parquet": b"PAR1" + rng.randbytes(500) + b"PAR1",
        "wrong/noise.mkv": rng.randbytes(5000),
        "sound/sound.mp4": sound(),
        "sound/sound.mov": sound("mov"),
        "sound/sound.mkv": sound("matroska"),
    }
    sources = {name: data for name, data in short_ones.items() if not name.startswith(("prores", "alpha"))}
    other |= damaged(sources, rng, size - len(good) - len(other))
    for name, data in (good | other).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (folder / "loop").symlink_to(folder, target_is_directory=True)
    (folder / "circle.mp4").symlink_to(folder / "circle.mp4")
    (folder / "nowhere.mp4").symlink_to("nothing.mp4")
    os.mkfifo(folder / "pipe.mp4")
    (folder / os.fsdecode(b"not-utf8-\xff\xfe.mp4")).write_bytes(plain)
    return {texts.plain(name) for name in good} | {"not-utf8-\\xff\\xfe.mp4"}


def _png(image: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG")
    return out.getvalue()
