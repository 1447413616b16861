"""The two networks ("experts") of Wan 2.2 A14B: `transformer/` for timesteps with much noise, `transformer_2/` for
those below `boundary_ratio` of the pipeline's index.

One of them is trained at a time, as any network is. The other one stays in its folder until something is sampled; then
one of the two is on the device, the other on the host. Both are saved.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from entprog import config
from entprog.blocks import HALF, blocks, form_of, keep_rounded, match_norms, swap_of
from entprog.blocks.swap import Swap, spread
from entprog.distributed import fsdp
from entprog.errors import UserError
from entprog.models import attention, folders, inputs, weight_files, whole

if TYPE_CHECKING:
    from entprog.models.denoising import VideoDenoiser

FOLDERS = {"high": "transformer", "low": folders.SECOND}
"""Folder of each expert in a pipeline."""
OTHER = {"high": "low", "low": "high"}


@dataclass(frozen=True)
class Expert:
    """Which expert a denoiser's network is, and how the other one is loaded."""

    name: str
    """`high` or `low`."""
    boundary: float
    folder: Path
    """Of the other one."""
    conditions: tuple[str, ...]
    """Conditions that the other one sees."""
    splits: tuple[int, ...]
    """Its input channels, in the groups that are summed apart."""
    attention: config.Attention = "native"
    """Kernels of its attention, those of the one that is trained."""
    loaded: dict[str, nn.Module] = field(default_factory=dict, repr=False, compare=False)
    """The other one's network under `network`, once it was needed: on the host between two samplings."""

    @property
    def time_range(self) -> tuple[float, float]:
        return (self.boundary, 1.0) if self.name == "high" else (0.0, self.boundary)

    def other(self, denoiser: "VideoDenoiser") -> "VideoDenoiser":
        """The denoiser with the other one's network; under bfloat16 autocast its blocks are held as that rounds them,
        or as frozen blocks of the one that is trained are; as many of them wait on the host, beside a sharded one all,
        in float32 too. It is saved from its folder."""
        if not self.loaded:
            network = weight_files.pretrained(denoiser.NETWORK, self.folder, "model.base")
            if len(self.splits) > 1:
                inputs.widen(network, denoiser.INPUT, self.splits)
            network.requires_grad_(False).eval()
            if denoiser.autocast == HALF or fsdp.is_sharded(denoiser.network):
                _hold(network, denoiser)
            if denoiser.autocast == HALF:
                match_norms(network)
            attention.choose(network, self.attention)
            self.loaded["network"] = network
        return replace(denoiser, network=self.loaded["network"], conditions=self.conditions, expert=None)

    def entries(self, denoiser: "VideoDenoiser") -> dict[str, Any]:
        """What the saved pipeline's index says of both experts."""
        seen = {FOLDERS[name]: inputs["conditions"] for name, inputs in self.inputs(denoiser).items()}
        return {whole.BOUNDARY: self.boundary, "experts": seen}

    def inputs(self, denoiser: "VideoDenoiser") -> dict[str, dict[str, Any]]:
        """What `entprog.json` says of each expert's inputs."""
        own = {"conditions": denoiser.conditions, "input_channels": denoiser.input_channels}
        other = {"conditions": self.conditions, "input_channels": self.splits}
        return {self.name: own, OTHER[self.name]: other}


def _hold(network: nn.Module, as_in: "VideoDenoiser") -> None:
    """Hold a network that is never trained as frozen blocks of one that is are held. Beside one that is sharded every
    block waits on the host: this rank's device has room for a share, not for a network."""
    trained, found = blocks(as_in.network), blocks(network)
    own, sharded = swap_of(trained), fsdp.is_sharded(as_in.network)
    if sharded:
        swap, number = Swap(as_in.device), len(found)
    else:
        swap, number = (Swap(own.device), len(own.waiting)) if own else (None, 0)
    waiting = spread([block.name for block in found], number)
    form = form_of(trained) if as_in.autocast == HALF else "float32"
    for block in found:
        keep_rounded(block.module, form, as_in.device, swap if block.name in waiting else None)


@contextmanager
def in_turns(denoiser: "VideoDenoiser") -> Iterator[Callable[[torch.Tensor], "VideoDenoiser"]]:
    """While it lasts: scheduler's timestep → the denoiser that is in charge there. Only its network is on the device;
    afterwards the one that is trained is back. A sharded one stays where it is: both are there at times."""
    expert = denoiser.expert
    if expert is None:
        yield lambda timestep: denoiser
        return
    device, boundary = denoiser.device, expert.boundary * denoiser.process.STEPS

    def at(timestep: torch.Tensor) -> "VideoDenoiser":
        if bool(timestep >= boundary) == (expert.name == "high"):
            return turn(denoiser, *expert.loaded.values())
        return turn(expert.other(denoiser), denoiser.network)

    def turn(wanted: "VideoDenoiser", *others: nn.Module) -> "VideoDenoiser":
        for network in others:
            if not fsdp.is_sharded(network):
                network.to("cpu")
        if not fsdp.is_sharded(wanted.network):  # in parts again, it would wait for ranks that are not here
            wanted.network.to(device)
        return wanted

    try:
        yield at
    finally:
        turn(denoiser, *expert.loaded.values())


def chosen(settings: config.Model, root: Path | None, about: dict[str, Any], two: bool) -> str | None:
    """Which expert of a base the settings mean; None: it has one network. about: its `entprog.json`; two: whether the
    family has bases of two. Raises UserError where they do not agree, or say nothing of a base with two."""
    wanted = settings.expert
    if wanted == "both":
        raise UserError("model.expert=both is for train, two trainings one after the other: here set high or low")
    there = two and root is not None and are_in(root, about)
    if not there:
        if wanted:
            has = f"{settings.base} has one network" if settings.base else "a new network is one"
            raise UserError(
                f"model.expert={wanted}: {has}, no {folders.SECOND}/ beside it as in Wan 2.2 A14B: leave it out"
            )
        return None
    if wanted is None and "expert" not in about:
        raise UserError(
            f"model.base: {settings.base} has two networks, one for much noise and one for little: set model.expert to "
            "high, low, or both (one after the other)"
        )
    return wanted or about["expert"]


def are_in(root: Path, about: dict[str, Any]) -> bool:
    """Whether a base has two networks. about: its `entprog.json`."""
    return "expert" in about or (root / folders.SECOND / "config.json").is_file()


def boundary(root: Path, given: str) -> float:
    """Where a base's experts change over. Raises UserError if it does not say."""
    found = whole.index_of(root).get(whole.BOUNDARY)
    if not isinstance(found, int | float) or not 0 < found < 1:
        raise UserError(
            f"model.base: {given} has two networks, and its {folders.INDEX} no {whole.BOUNDARY} between 0 and 1 "
            f"(given {found}): copy or fetch it again"
        )
    return float(found)
