"""The demo's VAE: frames of people in a sixteenth of their numbers, so that a small network need not carry their noise.

A diffusers `AutoencoderKLWan` that joins no frames. It is trained on single frames, where of its kernels over time only
the last slice sees anything: such a kernel is trained as one over space alone, and put back with zeros before it.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from torch import nn

CHANNELS = 8
CONFIGURATION = {
    "base_dim": 24, "z_dim": CHANNELS, "dim_mult": [1, 2], "num_res_blocks": 1, "temperal_downsample": [False],
    "patch_size": 2, "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 4, "scale_factor_temporal": 1,
    "latents_mean": [0.0] * CHANNELS, "latents_std": [1.0] * CHANNELS,
}  # fmt: skip
"""Of diffusers' class: pixels of 2×2 to channels, halved once more."""
RATE, WARMUP_STEPS, LEAST = 3e-3, 50, 0.05
"""Learning rate; what it ends at, as a share of itself. It falls over the second half."""
KL, EDGES = 1e-4, 0.5
"""Weights beside the absolute and the squared difference: of the posterior's distance to the normal distribution, and
of the absolute difference between neighbouring pixels' differences."""
NORMED_OVER = 40
"""Batches whose latents say mean and deviation of the channels."""
EVERY = 100
"""Updates whose last loss is a point of the curve."""

Frames = Callable[[], torch.Tensor]
"""The next batch of frames, float [B, 3, 1, H, W] in -1..1."""


class OneFrame(nn.Conv3d):
    """A convolution over space alone in the place of one over time."""

    def forward(self, x: torch.Tensor, cache_x: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(x)


def train(frames: Frames, seconds: float, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Train a new VAE for so many seconds of this process's CPU and leave it in `folder`; its record."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan(**CONFIGURATION)
    over_time = {
        name: module
        for name, module in vae.named_modules()
        if isinstance(module, WanCausalConv3d) and module.kernel_size[0] > 1
    }
    for name, module in over_time.items():
        kernel = (1, *module.kernel_size[1:])
        small = OneFrame(module.in_channels, module.out_channels, kernel, module.stride, padding=(0, 1, 1))
        vae.set_submodule(name, small)
    optimizer = torch.optim.AdamW(vae.parameters(), RATE, (0.9, 0.99), weight_decay=0.0, fused=True)
    began, steps, curve = time.process_time(), 0, []
    while (progress := (time.process_time() - began) / seconds) < 1:
        for group in optimizer.param_groups:
            falling = LEAST + (1 - LEAST) * min(1.0, 2 * (1 - progress))
            group["lr"] = RATE * falling * min(1.0, (steps + 1) / WARMUP_STEPS)
        loss = _loss(vae, frames())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        steps += 1
        if steps % EVERY == 0:
            curve.append({"step": steps, "loss": round(loss.item(), 4)})
            say(f"vae: {progress * seconds:.0f}/{seconds:g} s, step {steps}, {curve[-1]['loss']}")
    with torch.no_grad():
        latents = torch.cat([vae.encode(frames()).latent_dist.mode() for _ in range(NORMED_OVER)])
        mean, deviation = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
        for name, module in over_time.items():
            small = vae.get_submodule(name)
            module.weight.zero_()[:, :, -1:] = small.weight
            module.bias.copy_(small.bias)
            vae.set_submodule(name, module)
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=deviation.tolist())
    vae.half().save_pretrained(folder)
    return {"steps": steps, "seconds": time.process_time() - began, "curve": curve}


def psnr_db(vae: AutoencoderKLWan, frames: torch.Tensor) -> float:
    """Of frames that went through the VAE and back."""
    with torch.no_grad():
        back = vae.decode(vae.encode(frames).latent_dist.mode()).sample
    return -10 * math.log10(float(((frames - back) / 2).square().mean()))


def _loss(vae: AutoencoderKLWan, frames: torch.Tensor) -> torch.Tensor:
    posterior = vae.encode(frames).latent_dist
    mode = posterior.mode()
    back = vae.decode(mode + posterior.std * torch.randn_like(mode)).sample
    normal = 0.5 * (mode.square() + posterior.var - 1 - posterior.logvar).mean()
    edges = sum((frames.diff(dim=d) - back.diff(dim=d)).abs().mean() for d in (-1, -2))
    off = frames - back
    return off.abs().mean() + off.square().mean() + EDGES * edges + KL * normal
