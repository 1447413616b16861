"""AdamW as `train.optimizer` wants it: moments in float32, in bfloat16 (`rounded`), or in 8 bits (`eight_bit`)."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from entprog.config import OptimizerKind
from entprog.optimizers import eight_bit
from entprog.optimizers.rounded import RoundedAdamW

MOMENTS: Mapping[OptimizerKind, float] = {"adamw": 2.0, "adamw_bf16": 1.0, "adamw_8bit": eight_bit.MOMENTS}
"""Bytes of moments for each byte of trained float32 weights."""


def make(
    kind: OptimizerKind,
    groups: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
    learning_rate: float,
    weight_decay: float = 0.0,
    seed: int = 0,
) -> torch.optim.Optimizer:
    """An optimizer over parameters, or over groups of them. seed: of the rounding of moments in bfloat16."""
    if kind == "adamw":
        return torch.optim.AdamW(groups, lr=learning_rate, weight_decay=weight_decay, fused=True)
    if kind == "adamw_bf16":
        return RoundedAdamW(groups, learning_rate, weight_decay, seed)
    return eight_bit.adamw(groups, learning_rate, weight_decay)


def on_host(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """Names of what lies on the host in every parameter's state, wherever the parameter lies."""
    return eight_bit.ON_HOST if torch.is_tensor(optimizer.param_groups[0]["lr"]) else ()


def parts(moment: torch.Tensor) -> dict[str, torch.Tensor]:
    """The plain tensors that a tensor of an optimizer's state holds, by the ends of their names: itself, or what 8 bits
    take."""
    return eight_bit.parts(moment) if eight_bit.is_one(moment) else {"": moment}


def joined(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A parameter's state of tensors, some of which are in `parts`."""
    return eight_bit.joined(state)
