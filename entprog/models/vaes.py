"""Video autoencoders behind two functions, pixels to latents and back, each VAE with its own scaling.

An image VAE sees a clip as a batch of frames. The mode of the posterior is taken, not a sample: latents do not depend
on when or where they were computed.
"""

import functools

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLTemporalDecoder,
    AutoencoderKLWan,
)
from torch import nn

FRAMES_AT_ONCE = 8
"""Frames that an image VAE encodes or decodes at a time."""


@functools.singledispatch
def encode(vae: nn.Module, video: torch.Tensor) -> torch.Tensor:
    """Pixels float [B, 3, F, H, W] in -1..1 → scaled latents [B, C, F', H', W']."""
    raise TypeError(f"{type(vae).__name__}: register its encode, decode, channels and factors in entprog.models.vaes")


@functools.singledispatch
def decode(vae: nn.Module, latents: torch.Tensor) -> torch.Tensor:
    """Scaled latents [B, C, F', H', W'] → pixels [B, 3, F, H, W], about -1..1."""
    raise TypeError(type(vae).__name__)


@functools.singledispatch
def channels(vae: nn.Module) -> int:
    """Channels of its latents."""
    return vae.config.latent_channels


@functools.singledispatch
def factors(vae: nn.Module) -> tuple[int, int]:
    """(clip frames per latent frame after the first, pixels per latent row or column)."""
    return 1, 2 ** (len(vae.config.block_out_channels) - 1)


@functools.singledispatch
def frame_step(vae: nn.Module) -> int:
    """Clips have a multiple of this many frames after the first."""
    return factors(vae)[0]


# ---- Wan: mean and deviation of every channel ----


@encode.register
def _(vae: AutoencoderKLWan, video):
    mean, std = _wan_scale(vae, video.device)
    return (vae.encode(video, return_dict=False)[0].mode() - mean) / std


@decode.register
def _(vae: AutoencoderKLWan, latents):
    mean, std = _wan_scale(vae, latents.device)
    return vae.decode(latents * std + mean, return_dict=False)[0]


@channels.register
def _(vae: AutoencoderKLWan):
    return vae.config.z_dim


@factors.register
def _(vae: AutoencoderKLWan):
    return vae.config.scale_factor_temporal, vae.config.scale_factor_spatial


@frame_step.register
def _(vae: AutoencoderKLWan):
    return 4  # it encodes four frames after the first at a time, also where it does not join them, and drops a rest


def _wan_scale(vae: AutoencoderKLWan, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of its latents, each [1, C, 1, 1, 1]."""
    values = (vae.config.latents_mean, vae.config.latents_std)
    mean, std = (torch.tensor(v, device=device).view(1, -1, 1, 1, 1) for v in values)
    return mean, std


# ---- CogVideoX, HunyuanVideo: one factor ----


@encode.register(AutoencoderKLCogVideoX)
@encode.register(AutoencoderKLHunyuanVideo)
def _(vae, video):
    return vae.encode(video, return_dict=False)[0].mode() * vae.config.scaling_factor


@decode.register(AutoencoderKLCogVideoX)
@decode.register(AutoencoderKLHunyuanVideo)
def _(vae, latents):
    return vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]


@factors.register
def _(vae: AutoencoderKLCogVideoX):
    return int(vae.config.temporal_compression_ratio), 2 ** (len(vae.config.block_out_channels) - 1)


@factors.register
def _(vae: AutoencoderKLHunyuanVideo):
    return vae.config.temporal_compression_ratio, vae.config.spatial_compression_ratio


@frame_step.register
def _(vae: AutoencoderKLCogVideoX):
    return 2 * factors(vae)[0]  # it decodes an even number of latent frames to too many frames


# ---- image VAEs: one factor, sometimes a shift ----


@encode.register(AutoencoderKL)
@encode.register(AutoencoderKLTemporalDecoder)
def _(vae, video):
    frames = video.transpose(1, 2).flatten(0, 1)
    parts = [vae.encode(part, return_dict=False)[0].mode() for part in frames.split(FRAMES_AT_ONCE)]
    latents = (torch.cat(parts) - _shift(vae)) * vae.config.scaling_factor
    return latents.unflatten(0, (len(video), -1)).transpose(1, 2).contiguous()


@decode.register
def _(vae: AutoencoderKL, latents):
    frames = (latents / vae.config.scaling_factor + _shift(vae)).transpose(1, 2).flatten(0, 1)
    parts = [vae.decode(part, return_dict=False)[0] for part in frames.split(FRAMES_AT_ONCE)]
    return torch.cat(parts).unflatten(0, (len(latents), -1)).transpose(1, 2)


@decode.register
def _(vae: AutoencoderKLTemporalDecoder, latents):
    clips, count = len(latents), latents.shape[2]
    frames = (latents / vae.config.scaling_factor).transpose(1, 2).flatten(0, 1)
    return vae.decode(frames, num_frames=count, return_dict=False)[0].unflatten(0, (clips, count)).transpose(1, 2)


def _shift(vae: nn.Module) -> float:
    return getattr(vae.config, "shift_factor", None) or 0.0
