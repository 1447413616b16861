"""Frames per second of the training stream, against plain decoding on the same cores.

    python -m benchmarks.stream                # 256² and 1080p clips, one and two cores: about 12 minutes on two cores

Every number of cores is a process that may run on those alone, with all that it starts: Ray too. In it all arrangements
take turns over the same frames of real video, each with as many decoding threads or processes as cores:

- `stream`: pipelines.feed.stream, as training reads it: batches of planes on the reader's side, with the reference
  image and the pose, which only `decode` has beside it; `stream_cluster`: the same with data.decode=cluster;
- `decode`: what the stream does to a clip, in plain processes without Ray: nothing is sent;
- `pyav`: plain processes that decode, count and throw away. Nothing is sent: no reader ever gets this;
- `dataloader`: torch's DataLoader with PyAV in its workers, batches sent to the reader;
- `decord2`, `torchcodec`: the libraries' own readers, in plain processes as `pyav`, where they are installed;
- `pyav_shards`: as `pyav`, of the shards' own clips, whose encoding (entprog.media.h264) is chosen to decode fast;
- `pyav_whole`: as `pyav_shards`, and each clip's reference image: all that the stream decodes.

The others read what a person has without preparing shards: each clip an mp4 as x264 makes it by default, one key frame
and all, and no need to look for it in a longer video.
Planes are YUV 4:2:0, what the stream sends to the device; `_rgb` arms convert on the CPU, as most training code does,
and so do decord2 and torchcodec: their ratios are to the `_rgb` arms. Leaves benchmarks/results/stream.json.

Beside frames per second stand the CPU seconds that a frame takes of all processes of an arrangement together, Ray's
own too. Other work on the machine moves them far less; where cores never wait, both say the same. Ray's processes run
at the priority of the others here: at the one that Ray gives them (RAY_worker_niceness, 15) whatever else the machine
does would be done first.
"""

import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks import common
from entprog.config import ClipShape
from entprog.data import clip_stream, shards
from entprog.media import assets, h264, pictures, video
from pipelines import terminal
from pipelines.cluster import session
from pipelines.command import usage
from pipelines.stream import feed

app = usage.app("Frames per second of the training stream, against plain decoding on the same cores.")

SIZES = {
    "256x256": (ClipShape(frames=48, height=256, width=256, fps=30), 4),
    "1080x1920": (ClipShape(frames=16, height=1920, width=1080, fps=12), 1),
}
"""Clip shape and batch size."""
SOURCE = "cam01"
CLIPS = 8
"""Different clips of each size."""
WARM_UP_S = 0.3
RUN_IN_S, MOST_RUN_IN_S = 2.0, 30.0
"""A reader's frames are counted once no process has been started for so long, or after the second time."""
SHOWN = (
    "arrangement", "cores", "frames_per_s", "over_pyav", "over_pyav_shards", "over_pyav_whole", "over_dataloader",
    "cpu_us_per_frame", "by_cpu_over_pyav", "by_cpu_over_pyav_shards", "by_cpu_over_pyav_whole", "note",
)  # fmt: skip
Turn = tuple[float, float]
"""Frames per second, and CPU seconds per frame."""
Decode = Callable[[str], int]
"""A clip's file → frames decoded."""


@app.command()
def main(
    sizes: Annotated[list[str] | None, typer.Option("--size", help=f"Clips: {', '.join(SIZES)}. Default: all.")] = None,
    cores: Annotated[list[int] | None, typer.Option(help="Numbers of cores. Default: 1, 2, 4, … as there are.")] = None,
    arms: Annotated[list[str] | None, typer.Option("--arm", help="Only these arrangements.")] = None,
    seconds: Annotated[float, typer.Option(help="About how long one turn of an arrangement lasts.")] = 5.0,
    repeats: Annotated[int, typer.Option(min=1, help="Turns of each arrangement, interleaved.")] = 3,
) -> None:
    """Measure all arrangements in turns; print and keep frames per second and ratios."""
    here = sorted(os.sched_getaffinity(0))
    cores = cores or [2**i for i in range(len(here).bit_length()) if 2**i <= len(here)]
    figures = []
    with tempfile.TemporaryDirectory() as scratch:
        for size in sizes or SIZES:
            write_clips(Path(scratch, size), SIZES[size][0])
            for count in cores:
                task = {"size": size, "cores": here[:count], "arms": arms, "seconds": seconds, "repeats": repeats}
                command = [sys.executable, "-c", "from benchmarks import stream; stream.turns()", scratch]
                found = subprocess.run([*command, json.dumps(task)], check=True, stdout=subprocess.PIPE, text=True)
                figures += rows_of(size, count, json.loads(found.stdout.splitlines()[-1]))
                rows = [{name: row[name] for name in SHOWN} for row in figures if row["size"] == size]
            common.show(f"clips of {size}", rows)
    terminal.console.print(f"kept in {common.write('stream', figures, device='cpu', repeats=repeats)}")


def rows_of(size: str, cores: int, found: dict[str, list[Turn] | str]) -> list[dict[str, Any]]:
    """A row an arrangement. found: its turns, one a round, or why it is not there."""

    def over(name: str, base: str, by_cpu: bool = False) -> float | None:
        """Median ratio within rounds: of frames/s, or of frames per CPU second."""
        if base not in found or isinstance(found[name], str):
            return None
        pairs = zip(found[name], found[base], strict=True)
        return round(statistics.median(b[1] / a[1] if by_cpu else a[0] / b[0] for a, b in pairs), 3)

    def row(name: str) -> dict[str, Any]:
        absent = isinstance(found[name], str)
        rates, cpu = ((), ()) if absent else zip(*found[name], strict=True)
        plain = "pyav" + pixels(name)
        return {
            "size": size,
            "arrangement": name,
            "cores": cores,
            "frames_per_s": None if absent else round(statistics.median(rates), 1),
            "spread": None if absent else [round(min(rates), 1), round(max(rates), 1)],
            "over_pyav": over(name, plain),
            "over_pyav_shards": over(name, "pyav_shards"),
            "over_pyav_whole": over(name, "pyav_whole"),
            "over_dataloader": over(name, "dataloader" + pixels(name)),
            "cpu_us_per_frame": None if absent else round(statistics.median(cpu) * 1e6, 1),
            "by_cpu_over_pyav": over(name, plain, by_cpu=True),
            "by_cpu_over_pyav_shards": over(name, "pyav_shards", by_cpu=True),
            "by_cpu_over_pyav_whole": over(name, "pyav_whole", by_cpu=True),
            "note": found[name] if absent else "",
        }

    return [row(name) for name in found]


def pixels(arrangement: str) -> str:
    """Ending of the arms that give the same pixels: `_rgb`, or none for YUV 4:2:0."""
    return "_rgb" if arrangement.endswith("_rgb") or arrangement in ("decord2", "torchcodec") else ""


def write_clips(folder: Path, shape: ClipShape, held_out: int = 0) -> shards.Dataset:
    """Clips of a real video as shards, the last `held_out` of them held out, and in files/ as one mp4 each, NAME.mp4 by
    x264's defaults and NAME.clip as the shards have it, with NAME.png, its reference."""
    rows = []
    for i in range(CLIPS):
        start_s = 0.02 * i
        times = video.clip_times(start_s, shape.frames, shape.fps)
        frames, _ = video.read_frames(assets.clip(SOURCE), times, size=(shape.height, shape.width))
        rows.append(row_of(f"{SOURCE}#{i}", frames, shape, start_s))
        file = folder / "files" / f"{i}.mp4"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_plain(file, frames, shape.fps)
        file.with_suffix(".clip").write_bytes(rows[-1]["video"])
        file.with_suffix(".png").write_bytes(rows[-1]["reference"])
    return write_rows(folder, rows, shape, held_out)


def row_of(clip_id: str, frames: np.ndarray, shape: ClipShape, start_s: float = 0.0) -> dict[str, Any]:
    """A shard's row of frames uint8 RGB [F, H, W, 3], whose first one is the reference; the pose is all zeros."""
    size = {"height": shape.height, "width": shape.width}
    return {
        "clip_id": clip_id, "source": clip_id.partition("#")[0], "source_sha256": "0" * 64, "split": "train",
        "caption": "", "start_s": start_s, "fps": shape.fps, "frames": shape.frames, **size,
        **{f"source_{k}": v for k, v in size.items()}, **{f"crop_{k}": v for k, v in size.items()},
        "crop_left": 0, "crop_top": 0, "visibility": 1.0, "reference_s": start_s, "reference": pictures.png(frames[0]),
        "pose": np.zeros((shape.frames, shards.POINTS, 3), np.float32), "video": h264.encode(frames, shape.fps),
    }  # fmt: skip


def write_rows(folder: Path, rows: Sequence[dict[str, Any]], shape: ClipShape, held_out: int) -> shards.Dataset:
    """Rows as a dataset, the last `held_out` of them held out."""
    infos: dict[str, list[shards.ShardInfo]] = {"train": [], "held_out": []}
    cut = len(rows) - held_out
    for split, part in (("train", rows[:cut]), ("held_out", rows[cut:])):
        if part:
            infos[split] = [shards.write_shard(folder, f"{split}/00000.parquet", part, shape)]
    return shards.write_dataset(folder, shape, infos, {})


def write_plain(path: Path, frames: np.ndarray, fps: float) -> None:
    """An mp4 with all of x264's defaults."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=round(fps))
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


# ---- one number of cores: in a process of its own ----


def turns() -> None:
    """Program of the measuring process: arguments are the folder and the task; prints {arm: turns or why not}."""
    folder, task = Path(sys.argv[1]), json.loads(sys.argv[2])
    os.sched_setaffinity(0, task["cores"])
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  as Ray spells it
    cores, (shape, batch_size) = len(task["cores"]), SIZES[task["size"]]
    folder = folder / task["size"]
    files = sorted(str(path) for path in (folder / "files").glob("*.mp4"))
    own = sorted(str(path) for path in (folder / "files").glob("*.clip"))
    found: dict[str, Any] = {}
    in_shards = [f"{folder}:{i}" for i in range(CLIPS)]
    plain = {"pyav": (decode_pyav, files), "pyav_rgb": (decode_pyav_rgb, files), "decode": (decode_shard, in_shards)}
    plain |= {"pyav_shards": (decode_pyav, own), "pyav_whole": (decode_whole, own)}
    plain |= {"decord2": (decode_decord, files), "torchcodec": (decode_codec, files)}
    loaders = {"dataloader": decode_pyav, "dataloader_rgb": decode_pyav_rgb}
    with get_context("spawn").Pool(cores, _start) as pool, session.ray_cluster(cores + 2):
        arms: dict[str, Callable[[float], Turn]] = {}
        for name, (decode, what) in plain.items():
            arms[name] = partial(plain_rate, pool, decode, what, cores)
        for name, decode in loaders.items():
            arms[name] = partial(loader_rate, decode, files, batch_size, cores, shape.frames)
        for name, where in (("stream", "worker"), ("stream_cluster", "cluster")):
            arms[name] = partial(stream_rate, shards.read_dataset(folder), shape, batch_size, cores, where)
        if task["arms"]:
            arms = {name: arm for name, arm in arms.items() if name in task["arms"]}
        for number in range(1 + task["repeats"]):
            for name, arm in arms.items():
                if isinstance(found.get(name), str) or (not number and name not in plain):
                    continue
                try:
                    turn = arm(task["seconds"] if number else WARM_UP_S)
                except Exception as error:
                    if name not in ("decord2", "torchcodec"):
                        raise
                    found[name] = " ".join(f"{type(error).__name__}: {error}".split())[:120]
                    continue
                found.setdefault(name, [])
                if number:
                    found[name].append(turn)
    print(json.dumps(found))


def _start() -> None:
    import torch

    torch.set_num_threads(1)


def plain_rate(pool, decode: Decode, files: list[str], processes: int, seconds: float) -> Turn:
    """Of that many processes, each decoding file after file for that long."""
    started = time.perf_counter()
    each = pool.map(partial(_decode_for, decode, files, seconds), range(processes), chunksize=1)
    frames, cpu_s = map(sum, zip(*each, strict=True))
    return frames / (time.perf_counter() - started), cpu_s / frames


def _decode_for(decode: Decode, files: list[str], seconds: float, first: int) -> tuple[int, float]:
    """(frames, CPU seconds)."""
    frames, number, until, cpu_s = 0, first, time.perf_counter() + seconds, time.process_time()
    while time.perf_counter() < until:
        frames += len(decode(files[number % len(files)]))
        number += 1
    return frames, time.process_time() - cpu_s


class _Files:
    """Dataset of torch's DataLoader: clips without end."""

    def __init__(self, decode, files):
        self.decode, self.files = decode, files

    def __len__(self):
        return 1 << 30

    def __getitem__(self, i):
        import torch

        return torch.from_numpy(self.decode(self.files[i % len(self.files)]))


def loader_rate(decode, files, batch_size: int, workers: int, frames: int, seconds: float) -> Turn:
    """At the reader of a DataLoader."""
    from torch.utils.data import DataLoader, SequentialSampler

    data = _Files(decode, files)
    sampler = SequentialSampler(data)
    return _reader_rate(
        iter(DataLoader(data, batch_size, sampler=sampler, num_workers=workers)), batch_size * frames, seconds
    )


def stream_rate(
    dataset: shards.Dataset, shape: ClipShape, batch_size: int, cores: int, where: str, seconds: float
) -> Turn:
    """At the reader of our stream."""
    stream = feed.stream(dataset, "train", shape, batch_size, cpus=cores, where=where)
    try:
        return _reader_rate(stream, batch_size * shape.frames, seconds)
    finally:
        stream.close()


def _reader_rate(batches, frames: int, seconds: float) -> Turn:
    """Once it runs: its processes have all been started, so that their start is no part of it. What was decoded ahead
    meanwhile is made up for by what is at the end."""
    known: set[int] = set()
    began = quiet = time.perf_counter()
    while time.perf_counter() - quiet < RUN_IN_S and time.perf_counter() - began < MOST_RUN_IN_S:
        next(batches)
        if not (running := common.processes()) <= known:
            known, quiet = known | running, time.perf_counter()
    started, cpu_s = time.perf_counter(), common.cpu_seconds()
    count = 0
    while time.perf_counter() - started < seconds:
        next(batches)
        count += 1
    count *= frames
    return count / (time.perf_counter() - started), (common.cpu_seconds() - cpu_s) / count


# ---- the decoders: a clip's file → uint8 array, a frame a row ----


def decode_pyav(file: str, format: str = "yuv420p") -> np.ndarray:
    import av

    with av.open(file) as container:
        container.streams.video[0].codec_context.thread_count = 1
        out = None
        for i, frame in enumerate(container.decode(video=0)):
            image = frame.to_ndarray(format=format)
            if out is None:
                out = np.empty((container.streams.video[0].frames, *image.shape), np.uint8)
            out[i] = image
    return out


def decode_whole(file: str) -> np.ndarray:
    """file: a shard's clip, beside its reference."""
    import av

    with av.open(str(Path(file).with_suffix(".png"))) as container:
        next(container.decode(video=0)).to_ndarray(format="rgb24")
    return decode_pyav(file)


def decode_shard(place: str) -> np.ndarray:
    """place: a dataset's folder and a clip's number."""
    folder, _, number = place.rpartition(":")
    return clip_stream.decode(_dataset(folder), "train", np.array([int(number)]))["video"][0]


@functools.cache
def _dataset(folder: str) -> shards.Dataset:
    return shards.read_dataset(Path(folder))


decode_pyav_rgb = partial(decode_pyav, format="rgb24")


def decode_decord(file: str) -> np.ndarray:
    import decord

    reader = decord.VideoReader(file, num_threads=1)
    return reader.get_batch(range(len(reader))).asnumpy()


def decode_codec(file: str) -> np.ndarray:
    from torchcodec.decoders import VideoDecoder

    return VideoDecoder(file, dimension_order="NHWC", num_ffmpeg_threads=1)[:].numpy()


if __name__ == "__main__":
    app()
