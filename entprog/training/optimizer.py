"""Optimizer state that follows the freeze."""

from collections.abc import Collection, Iterable, Mapping
from typing import Literal

import torch
from torch import nn

from entprog import optimizers
from entprog.blocks import blocks
from entprog.config import Train
from entprog.distributed import fsdp
from entprog.optimizers import parts

OUTSIDE = ""
"""`block` of the group of parameters that are in none."""


def adamw(network: nn.Module, settings: Train) -> torch.optim.Optimizer:
    """One optimizer of kind `train.optimizer` over all parameters: a group for what lies outside blocks, and one for
    each block. Parameters without a gradient are not touched, weight decay included, and have no state until they are
    first trained."""
    found = blocks(network)
    inside = {parameter for block in found for parameter in block.module.parameters()}
    rest = [parameter for parameter in network.parameters() if parameter not in inside]
    groups = [{"params": list(block.module.parameters()), "block": block.name} for block in found]
    groups.insert(0, {"params": rest, "block": OUTSIDE})
    return optimizers.make(settings.optimizer, groups, settings.learning_rate, settings.weight_decay, settings.seed)


def set_learning_rate(
    optimizer: torch.optim.Optimizer,
    settings: Train,
    step: int,
    begun: Mapping[str, int] | None = None,
    progress: float = 0.0,
) -> float:
    """Linear warm-up to the learning rate, and cool-down at the end; returns the rate of this step (0-based). Sets the
    step's number too, by which moments are rounded at random.

    progress: share of the run's budget used so far, 0..1.
    begun: step at which each trained block began to be trained; on top of the run's own warm-up its rate grows over
    `block_warmup_steps` from there.
    """
    rate = settings.learning_rate
    if step < settings.warmup_steps:
        rate *= (step + 1) / settings.warmup_steps
    if progress > 1 - settings.cooldown_share:
        rate *= (1 - progress) / settings.cooldown_share
    for group in optimizer.param_groups:
        own = step - (begun or {}).get(group["block"], 0)
        young = group["block"] != OUTSIDE and own < settings.block_warmup_steps
        its = rate * (own + 1) / settings.block_warmup_steps if young else rate
        group["lr"] = group["lr"].fill_(its) if torch.is_tensor(group["lr"]) else its
        group["update"] = step
    return rate


def follow(
    optimizer: torch.optim.Optimizer,
    trained: Iterable[nn.Parameter],
    frozen_state: Literal["host", "keep", "drop"] = "host",
) -> None:
    """Bring the moments of trained parameters to their device; those of the others stay, move to the host until they
    are trained again, or are forgotten."""
    trained, stays = set(trained), optimizers.on_host(optimizer)
    for parameter in list(optimizer.state):
        if parameter in trained:
            _move(optimizer.state[parameter], parameter.device, stays)
        elif frozen_state == "drop":
            del optimizer.state[parameter]
        elif frozen_state == "host":
            _move(optimizer.state[parameter], torch.device("cpu"), stays)


def _move(state: dict, device: torch.device, stays: Collection[str]) -> None:
    for name, value in state.items():
        if torch.is_tensor(value) and value.device != device and name not in stays:
            state[name] = value.to(device)


def state_bytes(optimizer: torch.optim.Optimizer, device: torch.device) -> int:
    """Bytes of optimizer state on a device."""
    tensors = [v for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v)]
    return sum(fsdp.held(part).nbytes for t in tensors if t.device == device for part in parts(t).values())
