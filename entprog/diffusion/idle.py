"""Passes through a sharded network for the other ranks' sake: they bring this rank's parts of the weights along."""

from functools import partial

import torch

from entprog.blocks import blocks, bypass, replaced
from entprog.data.clips import Latents
from entprog.diffusion.denoiser import Denoiser


@torch.no_grad()
def idle_pass(denoiser: Denoiser, spare: Latents) -> None:
    """A pass that computes next to nothing. spare: any batch."""
    t = torch.full((len(spare.position),), 0.5, device=spare.clean.device)
    with replaced({block.module: partial(bypass, block.module) for block in blocks(denoiser.network)}):
        denoiser.predict(spare.clean, t, spare.conditions)
