"""The contract of every model family's entry, at the tiny configurations of `benchmarks.tiny_families`.

`helpers.parity` holds, under the same name, what diffusers' own pipeline makes of such a network.
"""

import diffusers
import torch

from benchmarks.tiny_families import TINY
from entprog import blocks, models
from entprog.config import ClipShape, Model
from entprog.data.clips import Clips
from entprog.scoring import cei

NAMES = list(TINY)


T = torch.tensor([0.2, 0.8])


def settings(name, **changes) -> Model:
    tiny = TINY[name]
    return Model(**{"family": tiny["family"], "init": tiny["init"], "vae": "none", **changes})


def load(name, seed=0, **changes):
    return models.family(TINY[name]["family"]).load(settings(name, **changes), seed=seed)


def published(name):
    """The scheduler of a family's published checkpoints."""
    own = dict(TINY[name]["scheduler"])
    return getattr(diffusers, own.pop("_class_name")).from_config(own)


def again(folder, name, **changes):
    """What was saved to a folder, or what a folder holds."""
    return load(name, init={}, base=str(folder), **{"vae": "auto", **changes})


def ordered(denoiser, batch):
    return cei.blocks_in_order(blocks.blocks(denoiser.network), denoiser.predict, batch.part(slice(0, 1)))


def predict(denoiser, batch):
    return denoiser.predict(batch.clean, T, batch.conditions)


FIVE = ClipShape(frames=5, height=32, width=16, fps=12)


def clips(batch=2, shape=FIVE):
    generator = torch.Generator().manual_seed(0)

    def bytes_(*size):
        return torch.randint(16, 235, size, generator=generator, dtype=torch.uint8)

    pose = torch.rand(batch, shape.frames, 33, 3, generator=generator)
    pose[..., 2] = 1
    return Clips(
        video=bytes_(batch, shape.frames, shape.height * 3 // 2, shape.width),
        reference=bytes_(batch, shape.height, shape.width, 3),
        pose=pose,
        position=torch.arange(batch),
    )
