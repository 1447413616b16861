"""Exponential moving averages of weights (`train.ema_decay`) that follow the freeze.

A frozen block's weights w stand still, so that k updates take its averages a known way towards them:
ema ← w + gap · (ema − w) with gap = decay^k. Of those updates the gap alone is kept, `RunState.ema_gaps`: 1 while one
is trained. The way is made good when the block thaws, and in what is drawn or saved meanwhile. So averages are those
that every update of all weights would have given, whichever plans a run had.
"""

from collections.abc import Collection, Mapping

import torch
from torch import nn

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
