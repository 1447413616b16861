"""Model families. One file a family, named as `model.family` names it; a file is a family when it has

    CLASS: str                                    the diffusers class of its network (config.json `_class_name`)
    inspect(settings: config.Model, shape: ClipShape | None = None)
                                                  UserError for whatever can be known to be wrong without weights
    load(settings: config.Model, device="cpu", seed=0) -> Denoiser
                                                  the base (or a new network from `init`), its input layer widened
                                                  with zeros for conditions it lacks; UserError for a wrong folder
and registers its block classes with `entprog.blocks.bypass`, and with `entprog.blocks.kind` which of them are temporal.
Its class derives from `entprog.models.denoising.VideoDenoiser`, which has all that families share; `sources` has
`inspect` and `load` for it.
"""

import importlib
import logging
import pkgutil
from pathlib import Path
from types import ModuleType
from typing import Protocol

import torch
from torch import nn

from entprog.config import ClipShape, close_to
from entprog.data.clips import Clips, Latents
from entprog.diffusion.processes import Process
from entprog.errors import UserError

HOW_TO_ADD = "README, 'Adding a model family', shows how to add one"

# diffusers imports torchao wherever it is installed, and both then speak of things that nobody asked for.
for _name in ("diffusers.quantizers.torchao", "torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)


class Denoiser(Protocol):
    """A network with everything that turns clips into its inputs and its output into a loss.

    Times are in 0..1: 0 is the clean clip, 1 is noise; `process` says what lies between, and what is predicted.
    """

    network: nn.Module
    """What is trained; its blocks are found by `entprog.blocks.blocks`."""

    conditions: tuple[str, ...]
    """What the network sees beside the noisy clip, in the order of its input channels."""

    process: Process
    """How noise and clip mix, and what the network predicts (`entprog.diffusion.processes`)."""

    shift: float
    """Timestep shift for sampling; 1 where the process has none."""

    def scheduler(self, shift: float | None = None):
        """A diffusers scheduler of the checkpoint's own process. shift: instead of its own."""

    def check(self, shape: ClipShape) -> None:
        """Raises UserError if clips of this shape do not fit."""

    def latent_shape(self, shape: ClipShape) -> tuple[int, int, int, int]:
        """Clip shape → C, F', H', W' of one clip's latents."""

    def encode(self, clips: Clips) -> Latents:
        """Clips → latents and conditions on the network's device, no gradient."""

    def condition(self, reference: torch.Tensor, pose: torch.Tensor) -> dict[str, torch.Tensor]:
        """The conditions alone, as in `encode`: reference uint8 [B, H, W, 3], pose float [B, F, 33, 3]."""

    def predict(self, noisy: torch.Tensor, t: torch.Tensor, conditions: dict[str, torch.Tensor]) -> torch.Tensor:
        """ε̂ of the paper in this family's parametrisation, the target of `process.pair`: float32 [B, C, F', H', W'].

        noisy [B, C, F', H', W'] as `process.pair` mixes it, t float [B].
        """

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents [B, C, F', H', W'] → video float [B, F, 3, H, W] in -1..1."""

    def outside(self) -> dict[str, list[nn.Parameter]]:
        """Parameters outside blocks: {"conditions": the condition input layer, "rest": all others}."""

    def save(self, folder: str | Path, shape: ClipShape | None = None, shift: float | None = None, **record) -> None:
        """A diffusers folder (network, VAE if any, scheduler) with `entprog.json` beside; `load` reads it back.

        shape: the clips it was trained on; shift: timestep shift for sampling; record: JSON values kept beside.
        """


def families() -> list[str]:
    """Names of the families there are."""
    return [m.name for m in pkgutil.iter_modules(__path__) if hasattr(_family(m.name), "CLASS")]


def family(name: str) -> ModuleType:
    """The family's module. Raises UserError for an unknown name."""
    known = families()
    if name not in known:
        raise UserError(f"unknown model.family {name!r}{close_to(name, known)}; there are: {', '.join(known)}")
    return _family(name)


def _family(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")
