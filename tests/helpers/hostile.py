"""A corpus of hostile files, made from real clips: `corpus(folder, seed)`. The same seed gives the same damage.

Sound sources in every container and codec at hand, and from them: cut off, flipped bits, lies in headers, wrong names,
nothing, sizes no one expects. All of it small: a few frames each.
"""

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
    frames: list[np.ndarray],
    codec: str,
    container: str,
    pixels: str = "yuv420p",
    options: dict[str, str] | None = None,
    times: list[int] | None = None,
) -> bytes:
    """Frames by any encoder in any container. `times`: presentation times in 1/FPS s, for a variable frame rate."""
    out = io.BytesIO()
    with av.open(out, "w", format=container, options={"fflags": "+bitexact"}) as file:
        stream = file.add_stream(codec, rate=FPS)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pixels
        stream.codec_context.thread_count = 1
        stream.codec_context.options = options or {}
        for i, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24").reformat(format=pixels)
            frame.pts, frame.time_base = (times or range(len(frames)))[i], Fraction(1, FPS)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return out.getvalue()


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


def turned(mp4: bytes) -> bytes:
    """The same video, marked as a quarter turn from upright: the matrix of its track header."""
    quarter = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    return patched(mp4, b"tkhd", 40, quarter)


def formats(frames: list[np.ndarray]) -> dict[str, bytes]:
    """Sound sources by name: they show a person and are to be kept."""
    x264 = {"crf": "20", "preset": "veryfast"}
    plain = encoded(frames, "libx264", "mp4", options=x264)
    wide = [np.ascontiguousarray(np.rot90(frame)) for frame in frames]
    return {
        "plain.mp4": plain,
        "b-frames.mp4": encoded(frames, "libx264", "mp4", options=x264 | {"bf": "3", "b-pyramid": "normal"}),
        "key-frames.mp4": encoded(frames, "libx264", "mp4", options=x264 | {"g": "1"}),
        "10-bit.mp4": encoded(frames, "libx264", "mp4", "yuv420p10le", x264),
        "4-4-4.mp4": encoded(frames, "libx264", "mp4", "yuv444p", x264),
        "fragments.mp4": _remuxed(plain, "mp4", {"movflags": "frag_keyframe+empty_moov+default_base_moof"}),
        "quicktime.mov": _remuxed(plain, "mov", {}),
        "stream.ts": _remuxed(plain, "mpegts", {}),
        "matroska.mkv": _remuxed(plain, "matroska", {}),
        "flash.flv": _remuxed(plain, "flv", {}),
        "rotated.mp4": turned(encoded(wide, "libx264", "mp4", options=x264)),
        "odd.mkv": encoded([frame[:479, :271] for frame in frames], "ffv1", "matroska", "yuv444p"),
        "hevc.mp4": encoded(
            frames, "libx265", "mp4", options={"x265-params": "log-level=none:pools=none:frame-threads=1"}
        ),
        "vp8.webm": encoded(frames, "libvpx", "webm", options={"deadline": "realtime", "b": "2M"}),
        "vp9.webm": encoded(frames, "libvpx-vp9", "webm", options={"deadline": "realtime", "cpu-used": "8", "b": "2M"}),
        "vp9-alpha.webm": encoded(frames, "libvpx-vp9", "webm", "yuva420p", {"deadline": "realtime", "b": "2M"}),
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


def _remuxed(mp4: bytes, container: str, options: dict[str, str]) -> bytes:
    out = io.BytesIO()
    options = {"fflags": "+bitexact"} | options  # no random numbers in the file
    with av.open(io.BytesIO(mp4)) as source, av.open(out, "w", format=container, options=options) as file:
        stream = file.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
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
        "black.mp4": encoded([np.zeros((64, 64, 3), np.uint8)] * 8, "libx264", "mp4", options=x264),
    }
    for size in (5000, 16000, 60000):
        out[f"really-{size}.gif"] = _real_gif(size)
    return out


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


def corpus(folder: Path, seed: int = 0, size: int = 520) -> set[str]:
    """Fill a folder with at least `size` files; names of those that are to be kept (inside the folder)."""
    rng = random.Random(seed)
    frames = people()
    good = {f"formats/{name}": data for name, data in formats(frames).items()}
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
    other = {f"lies/{name}": data for name, data in lies(frames).items()}
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
    sources = {name: data for name, data in formats(frames[:4]).items() if not name.startswith(("prores", "alpha"))}
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
