"""From noise to a clip: the checkpoint's own diffusers scheduler around a denoiser."""

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
    shift: float | None = None,
    first: int = 0,
) -> torch.Tensor:
    """Latents float32 [B, C, F', H', W'] that follow the conditions (each of that shape, on the network's device).

    shape: B, C, F', H', W'. steps: of the scheduler; flow matching spaces them evenly in t from 1 to 0 before the shift
    s, t' = s·t / (1 + (s - 1)·t), and None is the checkpoint's own shift. A clip's noise depends on (seed, first + its
    row) alone: many clips can be sampled in batches of any size.
    guidance g: classifier-free, ε̂ = ε̂_0 + g·(ε̂_c - ε̂_0) with ε̂_0 the prediction for zeroed conditions; 1: none. It
    helps only a network that was trained with conditions dropped at times.
    """
    device = next(denoiser.network.parameters()).device
    scheduler = denoiser.scheduler(shift)
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), device=device)
    else:
        scheduler.set_timesteps(steps, device=device)
    latents = noise_like(torch.empty(tuple(shape), device=device), torch.arange(first, first + shape[0]), seed)
    latents = latents * scheduler.init_noise_sigma if hasattr(scheduler, "init_noise_sigma") else latents
    nothing = {name: torch.zeros_like(value) for name, value in conditions.items()}
    for timestep in scheduler.timesteps:
        t = denoiser.process.t(timestep).expand(shape[0])
        seen = latents
        if hasattr(scheduler, "scale_model_input"):  # flow matching has none
            seen = scheduler.scale_model_input(latents, timestep)
        prediction = denoiser.predict(seen, t, conditions)
        if guidance != 1:
            without = denoiser.predict(seen, t, nothing)
            prediction = without + guidance * (prediction - without)
        latents = scheduler.step(prediction, timestep, latents, return_dict=False)[0]
    return latents
