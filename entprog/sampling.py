"""From noise to a clip: diffusers' flow-matching Euler scheduler around a denoiser."""

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from entprog.models import Denoiser
from entprog.objectives import noise_like


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    conditions: dict[str, torch.Tensor],
    shape: Sequence[int],
    steps: int,
    seed: int,
    guidance: float = 1.0,
    shift: float = 1.0,
    first: int = 0,
) -> torch.Tensor:
    """Latents float32 [B, C, F', H', W'] that follow the conditions (each of that shape, on the network's device).

    shape: B, C, F', H', W'. steps: Euler steps, evenly spaced in t from 1 to 0 before the shift s,
    t' = s·t / (1 + (s - 1)·t). A clip's noise depends on (seed, first + its row) alone: many clips can be sampled in
    batches of any size.
    guidance g: classifier-free, v = v_0 + g·(v_c - v_0) with v_0 the prediction for zeroed conditions; 1: none. It
    helps only a network that was trained with conditions dropped at times.
    """
    device = next(denoiser.network.parameters()).device
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), device=device)
    latents = noise_like(torch.empty(tuple(shape), device=device), torch.arange(first, first + shape[0]), seed)
    nothing = {name: torch.zeros_like(value) for name, value in conditions.items()}
    for timestep in scheduler.timesteps:
        t = (timestep / scheduler.config.num_train_timesteps).expand(shape[0])
        velocity = denoiser.predict(latents, t, conditions)
        if guidance != 1:
            without = denoiser.predict(latents, t, nothing)
            velocity = without + guidance * (velocity - without)
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    return latents
