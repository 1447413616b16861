"""A checkpoint that makes clips: found, checked, loaded."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entprog import config
from entprog.config import ClipShape, Generate
from entprog.errors import UserError

# torch and diffusers are imported where they are needed: wrong arguments are told at once, not after seconds.


@dataclass(frozen=True)
class Checkpoint:
    """A folder that training wrote."""

    root: Path
    about: dict[str, Any]
    """Content of the checkpoint's entprog.json."""
    shape: ClipShape
    """Clips that it was trained on."""
    process: Any
    """The checkpoint's noise process (`entprog.diffusion.processes`)."""

    @property
    def conditions(self) -> tuple[str, ...]:
        return tuple(self.about["conditions"])

    def model(self, dtype: str = "float32") -> config.Model:
        """The settings that load it."""
        return config.Model(family=self.about["family"], base=str(self.root), conditions=self.conditions, dtype=dtype)


def find(given: str, settings: Generate) -> Checkpoint:
    """The checkpoint of `--checkpoint`, and whether it can be sampled as the settings say.

    Raises UserError for a folder that is none, weights that are not finite, or a sampler or shift that does not fit.
    """
    from entprog import models
    from entprog.diffusion.samplers import sampler
    from entprog.models import finite, folders

    root = folders.locate(given, "--checkpoint")
    about = folders.saved(root)
    if not about:
        raise UserError(f"--checkpoint: {given} was not written by pipelines.train (it has no entprog.json)")
    if not about["shape"]:
        raise UserError(f"--checkpoint: {given} does not say which clips it was trained on (shape in entprog.json)")
    shape = config.build(about["shape"], ClipShape)
    unchecked = Checkpoint(root, about, shape, None)
    process = models.family(about["family"]).inspect(unchecked.model(), shape).process
    sampler(process, settings.sampler, settings.shift)
    for network in filter(None, (folders.part(root, name) for name in folders.NETWORKS)):
        if name := finite.not_finite_in(network):
            raise UserError(f"--checkpoint: {network} is no trained network: {name} is not finite; train it again")
    return Checkpoint(root, about, shape, process)


def sampler_name(checkpoint: Checkpoint, settings: Generate) -> str:
    """The sampler's class, and its timestep shift where there is one."""
    from entprog.diffusion.samplers import sampler

    shift = settings.shift or checkpoint.about["shift"]
    name = type(sampler(checkpoint.process, settings.sampler, settings.shift)).__name__
    return name if shift == 1 else f"{name}, shift {shift:g}"


def load(checkpoint: Checkpoint, settings: Generate):
    """The checkpoint's denoiser on the wanted device. Raises UserError if a GPU is asked for that is not there."""
    import torch

    from entprog import models

    if settings.gpus == "yes" and not torch.cuda.is_available():
        raise UserError("generate.gpus=yes, but torch sees no GPU here")
    device = "cuda" if settings.gpus != "no" and torch.cuda.is_available() else "cpu"
    return models.family(checkpoint.about["family"]).load(checkpoint.model(settings.dtype), device)
