"""A task's clips as the study's networks see them: decoded and encoded once a process, in batches of one order."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import torch

from benchmarks.study_arms import TASKS
from benchmarks.study_units import Bench
from entprog import config, models
from entprog.config import ClipShape, Experiment
from entprog.data import clip_stream, shards
from entprog.data.clips import Latents
from entprog.diffusion.denoiser import Denoiser
from pipelines.generating import rendering

DECODED_AT_ONCE, JUDGED_AT_ONCE = 32, 24


Cut = Callable[[ClipShape], Latents]
"""All training clips at a clip shape."""


@dataclass(frozen=True)
class Material:
    """A task's clips as its networks see them, on the study's device."""

    train: Cut
    search: list[Latents]
    """Batches of held-out clips that a run itself may look at."""
    tune: list[Latents]
    """That learning rates are judged by."""
    test: list[Latents]
    """That arms are judged by."""
    motions: list[rendering.Motion]
    """Some of the same clips, to be generated."""
    dataset: shards.Dataset


@cache
def material(bench: Bench, task: str) -> Material:
    """A task's clips, decoded and encoded once a process."""
    scale, of = bench.scale, TASKS[task]
    dataset = shards.read_dataset(bench.shards("target" if of.target == "rendered" else of.target))
    network = models.family(of.family).load(
        config.Model(family=of.family, base=bench.base(of.family), vae="none"), bench.device, 0
    )
    first, last = scale.search_clips, scale.search_clips + (scale.tune_clips if of.tuned else 0)
    held_out = min(last + scale.test_clips, dataset.clips("held_out"))
    parts = [
        batches(encoded(network, dataset, "held_out", numbers, scale.shape), JUDGED_AT_ONCE) if len(numbers) else []
        for numbers in np.split(np.arange(held_out), (first, last))
    ]
    shown = np.arange(last, min(last + scale.quality_clips, held_out))
    made = clip_stream.to_clips({**clip_stream.decode(dataset, "held_out", shown), "position": shown - last}).resized(
        scale.shape
    )
    motions = rendering.motions_of(made, [f"held-out {number}" for number in shown])
    train = partial(encoded, network, dataset, "train", np.arange(dataset.clips("train")))
    return Material(cache(train), *parts, motions, dataset)


def encoded(denoiser: Denoiser, dataset: shards.Dataset, split: str, numbers: np.ndarray, shape: ClipShape) -> Latents:
    """Clips of a split, cut to a shape, as latents; positions count from 0. What repeats over frames is kept once."""
    parts = []
    for some in np.split(numbers, range(DECODED_AT_ONCE, len(numbers), DECODED_AT_ONCE)):
        decoded = clip_stream.to_clips({**clip_stream.decode(dataset, split, some), "position": some})
        batch = denoiser.encode(decoded.resized(shape))
        once = {name: value[:, :, :1] if name == "reference" else value for name, value in batch.conditions.items()}
        parts.append(Latents(batch.clean, once, batch.position))
    frames = parts[0].clean.shape[2]
    conditions = {name: torch.cat([part.conditions[name] for part in parts]) for name in parts[0].conditions}
    conditions = {name: value.expand(-1, -1, frames, -1, -1) for name, value in conditions.items()}
    return Latents(torch.cat([part.clean for part in parts]), conditions, torch.arange(len(numbers)))


def rows(of: Latents, numbers: np.ndarray, position: np.ndarray, device: torch.device) -> Latents:
    """Some clips, at some positions of a run."""
    picked = torch.from_numpy(numbers).to(of.clean.device)
    conditions = {name: value[picked].to(device) for name, value in of.conditions.items()}
    return Latents(of.clean[picked].to(device), conditions, torch.from_numpy(position))


def batches(of: Latents, size: int) -> list[Latents]:
    return [of.part(slice(first, first + size)) for first in range(0, len(of.position), size)]


def to_device(parts: Sequence[Latents], device: torch.device) -> list[Latents]:
    return [rows(b, np.arange(len(b.position)), b.position.numpy(), device) for b in parts]


def stream(train: Cut, wanted: Experiment, seed: int, device: torch.device):
    """Batches for `fit`: the seed alone decides their order (`entprog.data.clip_stream`), so all arms see the same."""

    def open_at(shape, position):
        of, size = train(shape), wanted.batch_size_at(shape)
        while True:
            positions = position + np.arange(size)
            yield rows(of, clip_stream.clips_at(positions, len(of.position), seed), positions, device)
            position += size

    return open_at
