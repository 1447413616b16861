"""Stable Video Diffusion: diffusers' `UNetSpatioTemporalConditionModel`, the shape that MimicMotion (arXiv 2406.19680)
fine-tunes for people.

The base sees an image's latents beside the noisy clip: that is the condition `reference`, in the VAE's own scale, which
is how SVD was trained. `pose` enters through new input channels. The image embedding of cross-attention is
`model.prompt_embeds` (1 token of CLIP's image encoder), or zeros, SVD's own for "no image". Spatial and temporal units
stand side by side in every layer and are blocks of their own.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel
from torch import nn

from entprog import blocks, config
from entprog.diffusion.processes import Edm
from entprog.errors import UserError
from entprog.models import loading, sources, texts
from entprog.models import units as units  # registers its block classes
from entprog.models.denoising import VideoDenoiser
from entprog.models.geometry import Geometry

CLASS = "UNetSpatioTemporalConditionModel"

FPS, MOTION, REFERENCE_NOISE = 7, 127, 0.0
"""What the network gets about the clip: SVD's and MimicMotion's own; no noise is added to the reference here."""


@blocks.kind.register
def _(network: UNetSpatioTemporalConditionModel, name: str) -> blocks.Kind:
    return "temporal" if ".temporal_" in name else "spatial"


@dataclass(frozen=True, kw_only=True)
class SvdDenoiser(VideoDenoiser):
    """An SVD network with its VAE, conditions and image embedding; predicts EDM's v."""

    FAMILY = "svd"
    NETWORK = UNetSpatioTemporalConditionModel
    PART = "unet"
    VAES = (AutoencoderKLTemporalDecoder,)
    INPUT = "conv_in"
    PROCESS = Edm
    SCHEDULER: ClassVar[dict[str, Any]] = {
        "_class_name": "EulerDiscreteScheduler",
        "prediction_type": "v_prediction",
        "timestep_type": "continuous",
        "timestep_spacing": "leading",
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "use_karras_sigmas": True,
        "sigma_min": 0.002,
        "sigma_max": 700.0,
        "steps_offset": 1,
    }

    def check_type(self) -> None:
        if self.autocast is not None and self.device.type == "cpu":
            # torch 2.13's CPU kernel leaves parts of such a Conv3d's weight gradient unwritten.
            raise UserError("model.dtype: SVD's temporal convolutions have no sound bfloat16 on a CPU; take float32")

    def run(self, inputs: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        extra = inputs.new_tensor([FPS - 1, MOTION, REFERENCE_NOISE])
        (v,) = self.network(
            sample=inputs.transpose(1, 2),
            timestep=timestep,
            encoder_hidden_states=texts.spread(text, len(inputs)),
            added_time_ids=extra.expand(len(inputs), -1),
            return_dict=False,
        )
        return v.transpose(1, 2)

    @torch.no_grad()
    def condition(self, *given, **more) -> dict[str, torch.Tensor]:
        out = super().condition(*given, **more)
        if "reference" in out and self.vae is not None:
            out["reference"] = out["reference"] / self.vae.config.scaling_factor
        return out

    @classmethod
    def geometry(cls, network: Any, vae: nn.Module | None) -> Geometry:
        halvings = 2 ** (len(network.down_block_types) - 1)  # what it halves it must be able to double again
        return Geometry.of(vae, (1, halvings, halvings))

    @classmethod
    def tensors(cls, network: Any, settings: config.Model, root: Path | None) -> dict[str, torch.Tensor | None]:
        width = network.cross_attention_dim
        return {"text": texts.embeddings(settings, root, width if isinstance(width, int) else width[0])}

    @classmethod
    def own_conditions(cls, network: Any, channels: int) -> tuple[str, ...]:
        return ("reference",) if network.in_channels >= 2 * channels else ()

    @classmethod
    def check_network(cls, network: Any) -> None:
        ids = network.projection_class_embeddings_input_dim / network.addition_time_embed_dim
        if ids != 3:
            raise UserError(
                "projection_class_embeddings_input_dim must be 3 × addition_time_embed_dim (fps, motion, noise), "
                f"given {network.projection_class_embeddings_input_dim} and {network.addition_time_embed_dim}"
            )


inspect = partial(sources.inspect, SvdDenoiser)
files = partial(sources.files, SvdDenoiser)
load = partial(loading.load, SvdDenoiser)
encoder = partial(loading.encoder, SvdDenoiser)
