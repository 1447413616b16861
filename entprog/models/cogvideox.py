"""CogVideoX (1.0 and 1.5): diffusers' `CogVideoXTransformer3DModel`, whose blocks carry two streams, video and text.

Reference and pose enter through new input channels. An image-to-video checkpoint, which takes twice the latents'
channels, has the reference where its pipeline has the image: as latents of a first frame, with zeros after it. Networks
that an earlier version trained from one are fed zeros there, and have the reference in new channels.

In training that image has a little noise, added to its pixels, each picture its own, so that latents can be cached: the
base was trained with it (log strength of mean -3, spread 0.5: `image_noise_sigma` in CogVideo's
`finetune/models/cogvideox_i2v/lora_trainer.py`), lest clips stand still. Samples are made from a clean one, as there.

Text and video share one attention, so the number of text tokens matters: `model.prompt_embeds`, or zeros, is filled up
with zeros to the network's own number.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
from torch import nn
from torch.nn import functional

from entprog import config
from entprog.blocks import bypass
from entprog.data.clips import Clips, Latents
from entprog.diffusion.processes import Diffusion
from entprog.errors import UserError
from entprog.models import loading, sources, texts
from entprog.models.denoising import VideoDenoiser, own_noise
from entprog.models.geometry import Geometry

CLASS = "CogVideoXTransformer3DModel"

FIRST_LATENT = "first latent frame"
"""Form of a reference as an image-to-video checkpoint sees it."""
IMAGE_NOISE = 0.05
"""Deviation of the image's noise in training, of pixels in -1..1."""
OFS = 2.0
"""What CogVideoX 1.5's image-to-video networks get beside the timestep: a constant of diffusers' pipeline."""


@bypass.register
def _(module: CogVideoXBlock, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, *args, **kwargs):
    return hidden_states, encoder_hidden_states


@dataclass(frozen=True, kw_only=True)
class CogVideoXDenoiser(VideoDenoiser):
    """A CogVideoX network with its VAE, conditions and text; predicts v."""

    FAMILY = "cogvideox"
    NETWORK = CogVideoXTransformer3DModel
    VAES = (AutoencoderKLCogVideoX,)
    INPUT = "patch_embed.proj"
    PROCESS = Diffusion
    TEXT_PIPELINE = "CogVideoXPipeline"
    TRAINED_WITH = "noise on the image"
    SCHEDULER: ClassVar[dict[str, Any]] = {
        "_class_name": "CogVideoXDDIMScheduler",
        "prediction_type": "v_prediction",
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "rescale_betas_zero_snr": True,
        "snr_shift_scale": 1.0,
        "timestep_spacing": "trailing",
        "clip_sample": False,
    }

    noised: bool = False
    """Whether the image has its noise."""

    @property
    def form(self) -> str:
        return FIRST_LATENT if self.native else ""

    def encode(self, clips: Clips) -> Latents:
        return VideoDenoiser.encode(replace(self, noised=True), clips)

    def reference(self, image: torch.Tensor, frames: int, last: torch.Tensor | None = None) -> torch.Tensor:
        if not self.native:
            return super().reference(image, frames)
        latents = self.latents(image + IMAGE_NOISE * own_noise(image) if self.noised else image)
        if self.vae.config.invert_scale_latents:  # of 1.5: the image was divided by the factor in training
            latents = latents / self.vae.config.scaling_factor**2
        return functional.pad(latents, (0, 0, 0, 0, 0, self._geometry.latent_frames(frames) - 1))

    def run(self, inputs: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        sizes = self.network.config
        # 1.5 takes frames in pairs. As in its training a clip that does not come out even begins with its first again.
        extra = -inputs.shape[2] % (sizes.patch_size_t or 1)
        inputs = torch.cat([inputs[:, :, :1].expand(-1, -1, extra, -1, -1), inputs], dim=2)
        if extra and self.native:  # the image stays the first frame's alone
            inputs[:, self.latent_channels : 2 * self.latent_channels, 1:] = 0
        (v,) = self.network(
            hidden_states=inputs.transpose(1, 2),
            encoder_hidden_states=texts.spread(text, len(inputs)),
            timestep=timestep,
            ofs=None if sizes.ofs_embed_dim is None else inputs.new_full((1,), OFS),
            image_rotary_emb=_rotary(sizes, *inputs.shape[2:], inputs.device),
            return_dict=False,
        )
        return v.transpose(1, 2)[:, :, extra:]

    @classmethod
    def own_conditions(cls, network: Any, channels: int) -> tuple[str, ...]:
        return ("reference",) if network.in_channels == 2 * channels else ()

    @classmethod
    def sees_native(
        cls, network: Any, trained: Mapping[str, Any], settings: config.Model, there: Collection[str]
    ) -> bool:
        # An adapter has no record of channels: of a base that was trained here, that base's says what it is.
        of_base = network.in_channels == 2 * network.out_channels and "input_channels" not in trained
        if "native" in trained or not of_base:
            return trained.get("native", False)
        if settings.adapter and "conditions" in trained:
            raise UserError(
                f"model.adapter: {settings.adapter} was trained by an earlier version, which showed networks of "
                f"{settings.base} zeros for the image: train it anew"
            )
        return "conditions" not in trained  # else an earlier version saved it

    @classmethod
    def begins(cls, form: str, native: bool, last: bool) -> bool | None:
        return False if native else None

    @classmethod
    def text_tokens(cls, network: Any) -> int:
        return network.max_text_seq_length

    @classmethod
    def geometry(cls, network: Any, vae: nn.Module | None) -> Geometry:
        patch = (1, network.patch_size, network.patch_size)
        size = network.sample_height, network.sample_width
        if network.use_learned_positional_embeddings:
            return Geometry.of(vae, patch, only=size)
        if network.patch_size_t is not None:  # 1.5 takes its positions out of a table of that size
            return Geometry.of(vae, patch, longest=min(size) // network.patch_size)
        return Geometry.of(vae, patch)

    @classmethod
    def tensors(cls, network: Any, settings: config.Model, root: Path | None) -> dict[str, torch.Tensor | None]:
        text = texts.embeddings(settings, root, network.text_embed_dim)
        return {"text": texts.padded(text, network.max_text_seq_length)}


def _rotary(sizes: Any, frames: int, rows: int, columns: int, device: torch.device):
    """Rotary positions of a clip's latents as diffusers' pipeline has them; None for a network without."""
    if not sizes.use_rotary_positional_embeddings:
        return None
    patch = sizes.patch_size
    grid, base = (rows // patch, columns // patch), (sizes.sample_height // patch, sizes.sample_width // patch)
    common = {"embed_dim": sizes.attention_head_dim, "grid_size": grid, "device": device}
    if sizes.patch_size_t is None:  # 1.0
        return get_3d_rotary_pos_embed(crops_coords=_fitted(grid, base), temporal_size=frames, **common)
    frames = -(-frames // sizes.patch_size_t)  # 1.5
    return get_3d_rotary_pos_embed(crops_coords=None, temporal_size=frames, grid_type="slice", max_size=base, **common)


def _fitted(grid: tuple[int, int], base: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """First and last (row, column) of a grid that is scaled to fit into the one the network was trained on, and lies in
    its middle. The pipeline's own function lies in a module that needs transformers, an extra of ours."""
    scale = min(there / here for here, there in zip(grid, base, strict=True))
    sizes = [round(scale * here) for here in grid]
    first = tuple(round((there - size) / 2) for there, size in zip(base, sizes, strict=True))
    return first, tuple(start + size for start, size in zip(first, sizes, strict=True))


DENOISER = CogVideoXDenoiser
inspect = partial(sources.inspect, DENOISER)
files = partial(sources.files, DENOISER)
load = partial(loading.load, DENOISER)
encoder = partial(loading.encoder, DENOISER)
