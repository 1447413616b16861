"""`pipelines.prepare --latents`: a dataset's training clips encoded once, so that training reads latents.

Operators of Ray Data, a row a file of a cache: decode (CPUs) → encode (an actor with the VAE for each GPU, or a few on
CPUs) → write; the files of all clip shapes in one execution. A finished file is never done again: after a kill the same
command goes on where it was.
"""

import functools
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from entprog import models
from entprog.config import ClipShape, Encoding
from entprog.data import clip_stream, latents, shards
from entprog.errors import UserError
from entprog.schedule import plans
from entprog.storage import Place, Where
from pipelines import terminal
from pipelines.cluster import capacity, failures, joining, launch, session
from pipelines.outputs import claim
from pipelines.preparing import packing, progress

OF_MODEL = ("model.", "latents.", "schedule.kind", "schedule.shapes", "schedule.table")
"""Beginnings of the settings that say what latents are made with; all others are of preparing clips."""
CPUS = 2
"""That encoding without a GPU needs: one encodes, one decodes."""
ENCODERS = 2
"""Most on the CPUs of a machine: each has its VAE, and with large frames gigabytes of what that computes."""
WARM_UP_CLIPS = 1
TIMED_CLIPS = 2


@dataclass(frozen=True)
class Estimate:
    """What encoding a dataset's clips at one shape comes to, measured on a few of them."""

    shape: ClipShape
    key: str
    shapes: dict[str, tuple[int, ...]]
    """Tensor → shape of one clip, in full."""
    clip_bytes: int
    clip_s: float
    """Seconds that one encoder takes for a clip."""
    device: str


# ---- settings ----


def mine(pairs: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """--set's pairs: (those of preparing clips, those of the model that clips are encoded for)."""
    pairs = list(pairs or [])
    model = [pair for pair in pairs if pair.strip().startswith(OF_MODEL)]
    return [pair for pair in pairs if pair not in model], model


def check_model(encoding: Encoding, shape: ClipShape) -> list[ClipShape]:
    """The shapes at which clips of a shape are encoded. Raises UserError for what is wrong before weights are read."""
    shapes = plans.ladder(encoding.schedule, shape, last=False)
    for one in shapes:
        if models.family(encoding.model.family).inspect(encoding.model, one, weights=False).vae is None:
            raise UserError(
                f"{encoding.model.base or 'a network from model.init'} has no VAE and works on pixels: there are no "
                "latents to make; give a base with a VAE (--base), or name one (--set model.vae=FOLDER)"
            )
    return shapes


def wanted(encoding: Encoding, shapes: Sequence[ClipShape]) -> str:
    """Which latents are made, in words: training encodes by itself what its own schedule wants beside them."""
    ladder = encoding.schedule
    said = "" if "kind" in ladder.model_fields_set else ", by default: --preset or --config say what training will use"
    return f"latents for schedule.kind={ladder.kind}{said}: {'; '.join(map(str, shapes))} (width x height)"


def decided(encoding: Encoding) -> Encoding:
    """With `latents.gpus=yes` for `auto` on a cluster that has GPUs: if they leave meanwhile, they are waited for.

    Raises UserError for `auto` on a cluster that has none now: whether some would start it does not say, and one CPU
    takes days for what they do in an hour.
    """
    if encoding.latents.gpus != "auto" or not joining.address():
        return encoding
    with session.ray_cluster(cpus=3) as ray:
        there = ray.cluster_resources().get("GPU", 0)
    if not there:
        raise UserError(
            "latents.gpus=auto, and the cluster has no GPU now: set latents.gpus=yes, which waits until one has "
            "started, or latents.gpus=no, which encodes on one CPU"
        )
    return encoding.model_copy(update={"latents": encoding.latents.model_copy(update={"gpus": "yes"})})


# ---- the job ----


@dataclass(frozen=True)
class File:
    """A file of a cache that is to be written."""

    dataset: shards.Dataset
    folder: Where
    """Of the cache; absolute, as the dataset's, for tasks run in another directory."""
    shape: ClipShape
    piece: latents.Piece
    seconds: float
    """What an encoder takes for it."""


@dataclass(eq=False)
class Work:
    """The cache of a dataset at one shape: what is there, and what is to be written."""

    dataset: shards.Dataset
    estimate: Estimate
    files: dict[latents.Piece, latents.Written | None]
    """In order; None: to be written."""
    clips_before: int = 0

    @classmethod
    def of(cls, dataset: shards.Dataset, estimate: Estimate) -> "Work":
        """With the finished files of earlier attempts."""
        folder = latents.folder_of(dataset, estimate.key)
        pieces = latents.pieces(dataset, estimate.clip_bytes)
        files = _finished(dataset, estimate.key, pieces) if isinstance(folder, Place) else None
        if files is None:
            with shards.at_once(folder) as apply:
                files = dict(zip(pieces, apply(functools.partial(latents.written, folder), pieces), strict=True))
        return cls(dataset, estimate, files, sum(piece.clips for piece, file in files.items() if file))

    @property
    def folder(self) -> Where:
        return latents.folder_of(self.dataset, self.estimate.key)

    @property
    def clips(self) -> int:
        """In all."""
        return self.dataset.clips(latents.SPLIT)

    def left(self) -> list[File]:
        """What is to be written."""
        located, folder, of = shards.located(self.dataset), self.folder.resolve(), self.estimate
        pieces = [piece for piece, file in self.files.items() if file is None]
        return [File(located, folder, of.shape, piece, piece.clips * of.clip_s) for piece in pieces]

    def finish(self, family: str) -> None:
        """Every file is there."""
        about = {"shape": self.estimate.shape.model_dump(), "family": family, "device": self.estimate.device}
        latents.finish(self.folder, self.estimate.shapes, list(self.files.values()), about)


def _finished(
    dataset: shards.Dataset, key: str, pieces: Sequence[latents.Piece]
) -> dict[latents.Piece, latents.Written] | None:
    """The files of a finished cache in a bucket, by their sizes alone: all its bytes may be too many to fetch. None
    where there is no such cache."""
    try:
        cache = latents.find(dataset, key)
        if cache is None:
            return None
        latents.verify(cache, "size")
    except latents.DamagedLatentsError:
        return None
    return {file.piece: file for file in cache.files} if [file.piece for file in cache.files] == [*pieces] else None


def run(*folders: Where, encoding: Encoding, dry_run: bool = False, verbose: bool = False) -> list[dict[str, Any]]:
    """Cache the latents of finished datasets at every clip shape asked for; figures of each dataset and shape. Says
    beforehand how large they are and how long it takes; with `dry_run` that is all. All are encoded together, the
    longest first. Raises UserError for a wrong base or damaged shards, and as `decided` does."""
    encoding = decided(encoding)
    asked: list[tuple[shards.Dataset, ClipShape]] = []
    for folder in folders:
        dataset = shards.read_dataset(folder)
        if not claim.is_of(folder, "prepare"):  # a dataset of a version without marks, or of another program
            (claim.check if dry_run else claim.take)(folder, "prepare", packing.identity_of(dataset), earlier=True)
        if not dataset.clips(latents.SPLIT):
            raise UserError(f"shards {dataset.folder} have no clips to train on: there are no latents to make")
        shapes = check_model(encoding, dataset.shape)
        terminal.console.print(wanted(encoding, shapes))
        asked += [(dataset, shape) for shape in shapes]
        shards.verify(dataset, "size")
    encoding = encoding.model_copy(update={"model": launch.absolute_model(encoding.model)})
    with (
        terminal.stderr_into(folders[0] / "latents.log", verbose=verbose),
        session.ray_cluster(cpus=3, verbose=verbose) as ray,
    ):
        gpus = capacity.gpus_there(encoding.latents.gpus, "latents.gpus", terminal.console.print, CPUS)
        with terminal.console.status("loading the VAE, measuring"):
            works = _works(ray, asked, encoding, gpus)
        encoders = gpus or (1 if joining.address() else min(ENCODERS, session.cores()))
        figures = {work.folder: _figures(work, encoders) for work in works}
        for work in works:
            _tell(work, figures[work.folder], encoders)
        if dry_run:
            return list(figures.values())
        _check_room(works)
        started = time.time()
        for work in _encode_all(ray, works, encoding, encoders, gpus):
            work.finish(encoding.model.family)
            bytes_ = sum(file.bytes for file in work.files.values())
            figures[work.folder] |= {"bytes": bytes_, "seconds": round(time.time() - started, 3)}
            terminal.console.print(f"done: {work.folder}: training on clips of this shape reads them")
        return list(figures.values())


def _works(ray, asked: Sequence[tuple[shards.Dataset, ClipShape]], encoding: Encoding, gpus: int) -> list[Work]:
    located = [(shards.located(dataset), shape) for dataset, shape in asked]
    if gpus or joining.address():  # where encoders run
        where = {"num_gpus": 1} if gpus else {"num_cpus": 1}
        measure = ray.remote(**where, max_retries=0)(estimates)
        with failures.plainly():
            made = ray.get(measure.remote(located, encoding))
    else:  # this process has imported what it takes; with as many threads as an encoder
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            made = estimates(located, encoding)
        finally:
            torch.set_num_threads(threads)
    return [Work.of(dataset, estimate) for (dataset, _), estimate in zip(asked, made, strict=True)]


def _figures(work: Work, encoders: int) -> dict[str, Any]:
    of = work.estimate
    return {
        "shape": str(of.shape), "key": of.key, "clips": work.clips, "bytes": work.clips * of.clip_bytes,
        "done_before": work.clips_before, "folder": str(work.folder),
        "estimated_s": (work.clips - work.clips_before) * of.clip_s / encoders,
    }  # fmt: skip


def _tell(work: Work, figures: dict[str, Any], encoders: int) -> None:
    of = work.estimate
    terminal.console.print(
        f"latents of {work.clips} clips of {of.shape}: {size(figures['bytes'])} ({size(of.clip_bytes)} a clip) "
        f"in {work.folder}; {work.clips_before} clips are done, the others take about "
        f"{terminal.duration(figures['estimated_s'])} on {encoders} encoder(s) ({of.device})",
    )


def _check_room(works: Sequence[Work]) -> None:
    """Raises UserError where a disk has no room for what is left."""
    for folder in {work.dataset.folder for work in works if isinstance(work.dataset.folder, Path)}:
        here = [work for work in works if work.dataset.folder == folder]
        needed = sum((work.clips - work.clips_before) * work.estimate.clip_bytes for work in here)
        if needed > (free := latents.free_bytes(folder)):
            raise UserError(f"latents need {size(needed)}, the disk of {folder} has {size(free)} free: make room")


def _encode_all(ray, works: Sequence[Work], encoding: Encoding, encoders: int, gpus: int) -> Iterator[Work]:
    """Write what is left; each of the works once all its files are there."""
    left = [(file, work) for work in works for file in work.left()]
    left.sort(key=lambda pair: -pair[0].seconds)  # the longest first: no encoder is alone at the end for long
    open_files = Counter(work for _, work in left)
    yield from (work for work in works if not open_files[work])
    if not left:
        return
    encoded = _encoding(ray, [file for file, _ in left], encoding, encoders, gpus)
    with failures.plainly(), progress.bar(len(left), "files") as advance:
        for row in encoded.iter_rows():
            file, work = left[row["number"]]
            work.files[file.piece] = latents.Written(file.piece, row["bytes"], row["sha256"])
            advance(file.piece.clips)
            open_files[work] -= 1
            if not open_files[work]:
                yield work


def _encoding(ray, files: Sequence[File], encoding: Encoding, encoders: int, gpus: int):
    """The Dataset of written files. A row is a file with all its clips: what is on GPUs takes a number of rows."""
    rows = [{"number": number} for number in range(len(files))]
    decoded = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        functools.partial(_decode, files=files), batch_size=1, num_cpus=1
    )
    context = decoded.context
    context.enable_progress_bars = False
    context.target_max_block_size = None  # a file's clips stay one block
    # On CPUs an encoder decodes too: what it is given beforehand, another one could have done.
    where = {"num_gpus": 1} if gpus else {"num_cpus": 1}
    ahead = {} if gpus else {"max_tasks_in_flight_per_actor": 1}
    return decoded.map_batches(
        Encode,
        fn_constructor_args=(encoding, files),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(encoders, len(rows)), **ahead),
        **where,
    )


def _decode(rows: dict[str, np.ndarray], files: Sequence[File]) -> clip_stream.Arrays:
    """Operator: a file's clips, decoded, in one row."""
    (number,) = rows["number"]
    dataset, piece = files[number].dataset, files[number].piece
    before = 0
    for shard in dataset.splits[latents.SPLIT]:
        if shard.file == piece.shard:
            break
        before += shard.clips
    numbers = before + np.arange(piece.first, piece.stop)
    clips = clip_stream.decode(dataset, latents.SPLIT, numbers)
    return {**{name: values[None] for name, values in clips.items()}, "number": np.array([number])}


class Encode:
    """Operator: decoded clips → one file of latents. Holds the denoiser."""

    def __init__(self, encoding: Encoding, files: Sequence[File]):
        self.denoiser, self.device = load(encoding)
        self.files = files

    def __call__(self, batch: clip_stream.Arrays) -> clip_stream.Arrays:
        number = int(batch["number"][0])
        file = self.files[number]
        clips = {name: values[0] for name, values in batch.items() if name != "number"}
        rows = encoded(self.denoiser, clips, file.shape, self.device)
        written = latents.write(file.folder, file.piece, rows, halves=in_halves(self.denoiser))
        return {"number": np.array([number]), "bytes": np.array([written.bytes]), "sha256": np.array([written.sha256])}


def load(encoding: Encoding):
    """(denoiser without its network's weights, device): on the GPU that Ray gave this process, or on the CPU."""
    device = "cuda" if torch.cuda.is_available() and encoding.latents.gpus != "no" else "cpu"
    return models.family(encoding.model.family).encoder(encoding.model, device), device


def in_halves(denoiser) -> bool:
    """Whether a denoiser's latents are numbers of bfloat16."""
    return denoiser.vae_autocast is not None


def encoded(denoiser, batch: clip_stream.Arrays, shape: ClipShape, device) -> list[dict[str, np.ndarray]]:
    """Clips of `clips.decode` → latents of each at a shape, as `latents.write` takes them."""
    out = []
    for i in range(len(batch["video"])):
        one = {name: values[i : i + 1] for name, values in batch.items()} | {"position": np.array([i])}
        out.append(latents.compact(denoiser.encode(clip_stream.to_clips(one, device).resized(shape))))
    return out


def estimates(asked: Sequence[tuple[shards.Dataset, ClipShape]], encoding: Encoding) -> list[Estimate]:
    """Load what encodes, and measure it on the first clips of each dataset, at the shape that goes with it."""
    denoiser, device = load(encoding)
    out = []
    for dataset, shape in asked:
        count = min(WARM_UP_CLIPS + TIMED_CLIPS, dataset.clips(latents.SPLIT))
        batch = clip_stream.decode(dataset, latents.SPLIT, np.arange(count))
        first = {name: value[:1] for name, value in batch.items()}
        (row,) = encoded(denoiser, first, shape, device)
        started = time.perf_counter()
        encoded(denoiser, batch, shape, device)
        one = denoiser.encode(clip_stream.to_clips({**first, "position": np.array([0])}, device).resized(shape))
        full = {"clean": one.clean} | {f"conditions.{name}": value for name, value in one.conditions.items()}
        out.append(
            Estimate(
                shape=shape,
                key=latents.key(denoiser, encoding.model.family, shape, dataset.masks),
                shapes={name: tuple(value.shape[1:]) for name, value in full.items()},
                clip_bytes=sum(value.nbytes for value in latents.stored(row, in_halves(denoiser)).values()),
                clip_s=(time.perf_counter() - started) / (count + 1),
                device=device if device == "cpu" else torch.cuda.get_device_name(),
            )
        )
    return out


# ---- words ----


def size(number: float) -> str:
    """A number of bytes in readable units."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"
