"""Optimizer and EMA state that follow the freeze."""

from collections.abc import Iterable

import torch
from torch import nn

from entprog.config import Train


def adamw(network: nn.Module, settings: Train) -> torch.optim.AdamW:
    """One AdamW over all parameters. Those without a gradient are not touched, weight decay included, and have no
    state until they are first trained."""
    return torch.optim.AdamW(
        network.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, settings: Train, step: int) -> float:
    """Linear warm-up to the learning rate; returns the rate of this step (0-based)."""
    rate = settings.learning_rate
    if step < settings.warmup_steps:
        rate *= (step + 1) / settings.warmup_steps
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def follow(optimizer: torch.optim.Optimizer, trained: Iterable[nn.Parameter]) -> None:
    """Keep the state of trained parameters on their device; move the others' to the host, from where it comes back
    when they are trained again."""
    trained = set(trained)
    for parameter, state in optimizer.state.items():
        device = parameter.device if parameter in trained else torch.device("cpu")
        for name, value in state.items():
            if torch.is_tensor(value) and value.device != device:
                state[name] = value.to(device)


def state_bytes(optimizer: torch.optim.Optimizer, device: torch.device) -> int:
    """Bytes of optimizer state on a device."""
    tensors = [v for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v)]
    return sum(t.nbytes for t in tensors if t.device == device)


@torch.no_grad()
def update_ema(ema: dict[str, torch.Tensor], network: nn.Module, decay: float) -> None:
    """Move the average of every trained parameter towards its weight; starts at the weight where there is none."""
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        if name in ema:
            ema[name].lerp_(parameter, 1 - decay)
        else:
            ema[name] = parameter.detach().clone()
