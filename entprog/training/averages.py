"""Exponential moving averages of weights (`train.ema_decay`) that follow the freeze.

A frozen block's weights w stand still, so that k updates take its averages a known way towards them:
ema ← w + gap · (ema − w) with gap = decay^k. Of those updates the gap alone is kept, `RunState.ema_gaps`: 1 while one
is trained. The way is made good when the block thaws, and in what is measured, drawn or saved meanwhile. So averages
are those that every update of all weights would have given, whichever plans a run had.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from entprog.blocks import full_weights, put_weights, show
from entprog.distributed import fsdp

Averages = dict[str, torch.Tensor]
"""Parameter → average, of what was trained so far."""
Gaps = dict[str, float]
"""Block that was trained so far → gap, 0..1."""


def start(ema: Averages, network: nn.Module) -> None:
    """Averages of parameters that were never trained start at their weights, before an update moves these."""
    for name, parameter in network.named_parameters():
        if parameter.requires_grad and name not in ema:
            ema[name] = parameter.detach().clone()


@torch.no_grad()
def update(ema: Averages, network: nn.Module, decay: float) -> None:
    """Move the average of every trained parameter towards its weight."""
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            ema[name].lerp_(parameter, 1 - decay)


def widen(gaps: Gaps, trained: Collection[str], decay: float) -> None:
    """Note that there was an update of these blocks: the others stood still."""
    for block, gap in gaps.items():
        gaps[block] = gap * decay
    gaps.update(dict.fromkeys(trained, 1.0))


@torch.no_grad()
def catch_up(ema: Averages, gaps: Gaps, network: nn.Module, trained: Collection[str]) -> None:
    """Bring the averages of blocks that thawed to where they belong, before an update moves their weights."""
    for block in trained:
        if gaps.get(block, 1.0) < 1:
            for name, parameter in network.get_submodule(block).named_parameters(f"{block}"):
                if name in ema:
                    ema[name].lerp_(parameter, 1 - gaps[block])
            gaps[block] = 1.0


def gap_of(name: str, gaps: Mapping[str, float]) -> float:
    """Of a parameter; 1 outside blocks."""
    return next((gap for block, gap in gaps.items() if name.startswith(f"{block}.")), 1.0)


def as_of_now(average: torch.Tensor, weight: torch.Tensor, gap: float) -> torch.Tensor:
    """A parameter's average where it belongs: itself without a gap, else a new tensor beside it."""
    return average if gap == 1 else torch.lerp(weight.detach().to(average.device, average.dtype), average, gap)


@contextmanager
def averaged(network: nn.Module, ema: Mapping[str, torch.Tensor], gaps: Mapping[str, float]) -> Iterator[None]:
    """Averaged weights for passes within a block, then the very weights that were there, to the bit. Of a sharded
    network every rank calls it.

    Passes give what those of the network as it is saved would (`put_in`), to the bit. Meanwhile the host has a copy of
    every weight that lies on the device in float32 alone. Of what a block stores the host keeps float32 numbers anyway:
    these stay the weights' own, also in the network's state.
    """
    if not ema:
        yield
        return
    fsdp.in_parts(network)  # what is brought together already is not of the averages
    kept = full_weights(network, ema)
    own = {n: fsdp.held(kept[n]) if n in kept else _weight(network, n).to("cpu", copy=True) for n in ema}
    try:
        for name, weight in own.items():
            show(network, name, as_of_now(fsdp.held(ema[name]), weight, gap_of(name, gaps)))
        yield
    finally:
        fsdp.in_parts(network)
        for name, weight in own.items():
            show(network, name, weight)


def put_in(network: nn.Module, ema: Mapping[str, torch.Tensor], gaps: Mapping[str, float]) -> None:
    """Averaged weights for good, one after the other: there is never a second network. Of a sharded network every rank
    calls it."""
    fsdp.in_parts(network)
    kept = full_weights(network, ema)

    def now() -> Iterator[tuple[str, torch.Tensor]]:
        for name, average in ema.items():
            weight = fsdp.held(kept.pop(name)) if name in kept else _weight(network, name)
            yield name, as_of_now(fsdp.held(average), weight, gap_of(name, gaps))

    put_weights(network, now())


def _weight(network: nn.Module, name: str) -> torch.Tensor:
    return fsdp.held(network.get_parameter(name)).detach()
