"""`pipelines.prepare --latents`: a dataset's training clips encoded once, so that training reads latents.

Operators of Ray Data, a row a file of the cache: decode (CPUs) → encode (an actor with the VAE for each GPU, or one on
the CPU) → write. A finished file is never done again: after a kill the same command goes on where it was.
"""

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from entprog import models
from entprog.config import ClipShape, Encoding
from entprog.data import clip_stream, latents, shards
from entprog.errors import UserError
from entprog.schedule import plans
from pipelines import cli
from pipelines.cluster import failures, joining, launch
from pipelines.outputs import claim
from pipelines.preparing import packing, progress

OF_MODEL = ("model.", "latents.", "schedule.kind", "schedule.shapes", "schedule.table")
"""Beginnings of the settings that say what latents are made with; all others are of preparing clips."""
CPUS = 2
"""That encoding without a GPU needs: one encodes, one decodes."""
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


# ---- the job ----


def run(folder: Path, encoding: Encoding, *, dry_run: bool = False, verbose: bool = False) -> list[dict[str, Any]]:
    """Cache the latents of a finished dataset at every clip shape asked for; figures of each. Says beforehand how large
    they are and how long it takes; with `dry_run` that is all. Raises UserError for a wrong base or damaged shards."""
    dataset = shards.read_dataset(folder)
    if not claim.is_of(folder, "prepare"):  # a dataset of a version without marks, or of another program
        (claim.check if dry_run else claim.take)(folder, "prepare", packing.identity_of(dataset), earlier=True)
    if not dataset.clips(latents.SPLIT):
        raise UserError(f"shards {dataset.folder} have no clips to train on: there are no latents to make")
    shapes = check_model(encoding, dataset.shape)
    shards.verify(dataset, "size")
    encoding = encoding.model_copy(update={"model": launch.absolute_model(encoding.model)})
    with cli.stderr_into(folder / "latents.log", verbose=verbose), cli.ray_cluster(cpus=3, verbose=verbose) as ray:
        gpus = launch.gpus_there(encoding.latents.gpus, "latents.gpus", cli.console.print, CPUS)
        if not gpus and encoding.latents.gpus == "auto" and joining.address():
            cli.console.print("the cluster has no GPU now: one CPU encodes; latents.gpus=yes waits for a GPU")
        where = {"num_gpus": 1} if gpus else {"num_cpus": 1}
        measure = ray.remote(**where, max_retries=0)(estimates)
        with cli.console.status("loading the VAE, measuring"), failures.plainly():
            found = ray.get(measure.remote(_located(dataset), encoding, shapes))
        return [_one_shape(ray, dataset, encoding, estimate, max(gpus, 1), where, dry_run) for estimate in found]


def _one_shape(ray, dataset, encoding, estimate: Estimate, encoders: int, where, dry_run: bool) -> dict[str, Any]:
    folder = latents.folder_of(dataset, estimate.key)
    pieces = latents.pieces(dataset, estimate.clip_bytes)
    done = {piece: file for piece in pieces if (file := latents.written(folder, piece))}
    left = [piece for piece in pieces if piece not in done]
    to_do = sum(piece.clips for piece in left)
    needed = to_do * estimate.clip_bytes
    total = dataset.clips(latents.SPLIT)
    figures = {
        "shape": str(estimate.shape), "key": estimate.key, "clips": total, "bytes": total * estimate.clip_bytes,
        "done_before": total - to_do, "estimated_s": to_do * estimate.clip_s / encoders, "folder": str(folder),
    }  # fmt: skip
    cli.console.print(
        f"latents of {total} clips of {estimate.shape}: {size(figures['bytes'])} ({size(estimate.clip_bytes)} a clip) "
        f"in {folder}; {total - to_do} clips are done, the others take about {cli.duration(figures['estimated_s'])} on "
        f"{encoders} encoder(s) ({estimate.device})",
    )
    if dry_run:
        return figures
    if needed > latents.free_bytes(dataset.folder):
        free = size(latents.free_bytes(dataset.folder))
        raise UserError(f"latents need {size(needed)}, the disk of {dataset.folder} has {free} free: make room")
    started = time.time()
    encode = functools.partial(_encode_all, ray, _located(dataset), encoding, estimate, encoders, where, folder)
    with failures.plainly():
        done |= {file.piece: file for file in encode(left)} if left else {}
    about = {"shape": estimate.shape.model_dump(), "family": encoding.model.family, "device": estimate.device}
    latents.finish(folder, estimate.shapes, [done[piece] for piece in pieces], about)
    return figures | {"bytes": sum(file.bytes for file in done.values()), "seconds": round(time.time() - started, 3)}


def _encode_all(ray, dataset, encoding, estimate: Estimate, encoders: int, where, folder: Path, pieces):
    """The written files, as they come."""
    rows = [{"number": number} for number in range(len(pieces))]
    decoded = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        functools.partial(_decode, dataset=dataset, pieces=pieces), batch_size=None, num_cpus=1
    )
    context = decoded.context
    context.enable_progress_bars = False
    context.target_max_block_size = None  # a file's clips stay one block
    encoded = decoded.map_batches(
        Encode,
        fn_constructor_args=(encoding, estimate.shape, pieces, folder.resolve()),
        batch_size=None,
        compute=ray.data.ActorPoolStrategy(size=encoders),
        **where,
    )
    out = []
    with progress.bar(len(rows), "files") as advance:
        for row in encoded.iter_rows():
            piece = pieces[row["number"]]
            out.append(latents.Written(piece, row["bytes"], row["sha256"]))
            advance(piece.clips)
    return out


def _decode(rows: dict[str, np.ndarray], dataset: shards.Dataset, pieces) -> clip_stream.Arrays:
    """Operator: a file's clips, decoded."""
    (number,) = rows["number"]
    piece = pieces[number]
    before = 0
    for shard in dataset.splits[latents.SPLIT]:
        if shard.file == piece.shard:
            break
        before += shard.clips
    numbers = before + np.arange(piece.first, piece.stop)
    return {**clip_stream.decode(dataset, latents.SPLIT, numbers), "number": np.full(piece.clips, number)}


class Encode:
    """Operator: decoded clips → one file of latents. Holds the denoiser."""

    def __init__(self, encoding: Encoding, shape: ClipShape, pieces, folder: Path):
        self.denoiser, self.device = load(encoding)
        self.shape, self.pieces, self.folder = shape, pieces, folder

    def __call__(self, batch: clip_stream.Arrays) -> clip_stream.Arrays:
        number = int(batch["number"][0])
        rows = encoded(self.denoiser, batch, self.shape, self.device)
        file = latents.write(self.folder, self.pieces[number], rows, halves=in_halves(self.denoiser))
        return {"number": np.array([number]), "bytes": np.array([file.bytes]), "sha256": np.array([file.sha256])}


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
        one = {name: batch[name][i : i + 1] for name in clip_stream.COLUMNS} | {"position": np.array([i])}
        out.append(latents.compact(denoiser.encode(clip_stream.to_clips(one, device).resized(shape))))
    return out


def estimates(dataset: shards.Dataset, encoding: Encoding, shapes: Sequence[ClipShape]) -> list[Estimate]:
    """Task: load what encodes, and measure it on the first clips, at every shape."""
    denoiser, device = load(encoding)
    count = min(WARM_UP_CLIPS + TIMED_CLIPS, dataset.clips(latents.SPLIT))
    batch = clip_stream.decode(dataset, latents.SPLIT, np.arange(count))
    out = []
    for shape in shapes:
        first = {name: value[:1] for name, value in batch.items()}
        (row,) = encoded(denoiser, first, shape, device)
        started = time.perf_counter()
        encoded(denoiser, batch, shape, device)
        one = denoiser.encode(clip_stream.to_clips({**first, "position": np.array([0])}, device).resized(shape))
        full = {"clean": one.clean} | {f"conditions.{name}": value for name, value in one.conditions.items()}
        out.append(
            Estimate(
                shape=shape,
                key=latents.key(denoiser, encoding.model.family, shape),
                shapes={name: tuple(value.shape[1:]) for name, value in full.items()},
                clip_bytes=sum(value.nbytes for value in latents.stored(row, in_halves(denoiser)).values()),
                clip_s=(time.perf_counter() - started) / (count + 1),
                device=device if device == "cpu" else torch.cuda.get_device_name(),
            )
        )
    return out


def _located(dataset: shards.Dataset) -> shards.Dataset:
    """The dataset with an absolute path: tasks run in another directory."""
    return replace(dataset, folder=dataset.folder.resolve(), settings={})


# ---- words ----


def size(number: float) -> str:
    """A number of bytes in readable units."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"
