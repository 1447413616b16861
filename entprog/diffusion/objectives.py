"""Draws and the loss: pure functions.

A clip's noise and timestep are functions of (seed, its position in the run) alone: they do not depend on how many
workers there are, how batches are split, or what was drawn before.
"""

import functools
import math

import torch

from entprog.config import Timesteps
from entprog.diffusion.processes import Process

_UINT64 = 2**64
ALL = (0.0, 1.0)
"""The range of all times."""


def timesteps(
    positions: torch.Tensor,
    seed: int,
    law: Timesteps = Timesteps(),
    device: str | torch.device | None = None,
    between: tuple[float, float] = ALL,
) -> torch.Tensor:
    """Times t in 0..1 for clips at positions int64 [B]: float32 [B], on the positions' device by default.

    The same bits on every device. between: as of `quantiles`.
    """
    t = quantiles(uniform(positions, seed, 0), law, between)
    return t.to(device=device or positions.device, dtype=torch.float32)


def quantiles(shares: torch.Tensor, law: Timesteps, between: tuple[float, float] = ALL) -> torch.Tensor:
    """Times t in 0..1 that shares in 0..1 of a law's draws lie below, its shift included. between: the times that a
    network is trained for; the law is cut to them, its draws outside left out.

    logit_normal: t = sigmoid(n), n normal; mode: t = 1 - u - s·(cos²(πu/2) - 1 + u) with u = 1 - share (Stable
    Diffusion 3, arXiv 2403.03206, eq. 19 and 20).
    """
    if between != ALL:
        low, high = (share_below(t, law) for t in between)
        return quantiles(low + (high - low) * shares.double(), law).clamp(*between)
    t = shares
    if law.law == "logit_normal":
        t = (law.mean + law.spread * torch.special.ndtri(shares.double())).sigmoid()
    elif law.law == "mode":
        u = 1 - shares.double()
        t = (1 - u - law.spread * ((math.pi / 2 * u).cos() ** 2 - 1 + u)).clamp(0, 1)
    return shifted(t, law.shift)


@functools.cache
def share_below(t: float, law: Timesteps) -> float:
    """The share of a law's draws that lie below a time t in 0..1: found by bisection, for `quantiles` rises."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        below = quantiles(torch.tensor(middle, dtype=torch.float64), law).item() < t
        low, high = (middle, high) if below else (low, middle)
    return low


def uniform(positions: torch.Tensor, seed: int, draw: int) -> torch.Tensor:
    """Evenly spread numbers in 0..1 for clips at positions int64 [B]: float64 [B] on the CPU. draw: 0 for timesteps,
    others for other purposes (1 is noise's)."""
    # 53 bits of the hash, half a step away from both ends.
    numbers = [((_hash(seed, position, draw) >> 11) + 0.5) * 2.0**-53 for position in positions.tolist()]
    return torch.tensor(numbers, dtype=torch.float64)


def shifted(t: torch.Tensor, shift: float) -> torch.Tensor:
    """Times t in 0..1 moved towards noise (shift s > 1) or away from it: t' = s·t / (1 + (s - 1)·t)."""
    return shift * t / (1 + (shift - 1) * t)


def noise_like(clean: torch.Tensor, positions: torch.Tensor, seed: int) -> torch.Tensor:
    """Standard normal ε [B, ...] for clips at positions int64 [B], drawn on clean's device.

    Equal bits for equal (seed, position) on one kind of device; CPU and GPU generators differ.
    """
    generator = torch.Generator(clean.device)
    noise = torch.empty_like(clean, memory_format=torch.contiguous_format)
    for row, position in zip(noise, positions.tolist(), strict=True):
        row.normal_(generator=generator.manual_seed(_hash(seed, position, 1)))
    return noise


def loss(
    prediction: torch.Tensor,
    target: torch.Tensor,
    weights: torch.Tensor | None = None,
    given: tuple[torch.Tensor, torch.Tensor] | None = None,
    within: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean squared error of each clip: [B, ...] twice → float32 [B]. weights [B]: what each counts; None: all alike.
    given: as `Denoiser.given` says; the mean is over the rest. within [B, 1, ...]: what each place in a clip counts,
    Σ w·error / Σ w, so that a clip's share in the batch stays; None: all alike."""
    errors = (prediction.float() - target.float()).square()
    if given is None and within is None:
        losses = errors.flatten(1).mean(1)
    else:
        free = 1 if given is None else 1 - given[0]
        counted = (free if within is None else free * within).expand_as(errors).flatten(1)
        losses = (errors.flatten(1) * counted).sum(1) / counted.sum(1)
    return losses if weights is None else losses * weights


def weights(process: Process, t: torch.Tensor, law: Timesteps) -> torch.Tensor | None:
    """What the loss at times t [B] counts, float32 [B] on t's device; None where all count alike."""
    return None if law.min_snr is None else process.min_snr(t, law.min_snr).float()


def _hash(*numbers: int) -> int:
    """64 well-mixed bits of some integers (SplitMix64's finaliser, chained)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) % _UINT64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % _UINT64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % _UINT64
        state ^= state >> 31
    return state
