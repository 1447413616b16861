"""AnimateDiff: diffusers' `UNetMotionModel`, an image UNet with temporal modules between its layers.

A checkpoint is a folder with `unet/`, `vae/` and `scheduler/`, as `AnimateDiffPipeline.save_pretrained` writes it:
image model and motion adapter joined once, by diffusers. Reference and pose enter through new input channels.
Text cross-attention sees `model.prompt_embeds`, or zeros.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, UNetMotionModel
from torch import nn

from entprog import blocks, config
from entprog.diffusion.processes import Diffusion
from entprog.errors import UserError
from entprog.models import loading, sources, texts
from entprog.models import units as units  # registers its block classes
from entprog.models.denoising import VideoDenoiser
from entprog.models.geometry import Geometry

CLASS = "UNetMotionModel"
TEXT_TOKENS = 77
"""Of CLIP's text encoder."""


@blocks.kind.register
def _(network: UNetMotionModel, name: str) -> blocks.Kind:
    return "temporal" if ".motion_modules." in name else "spatial"


@dataclass(frozen=True, kw_only=True)
class MotionUnetDenoiser(VideoDenoiser):
    """An AnimateDiff network with its VAE, conditions and text; predicts ε."""

    FAMILY = "motion_unet"
    NETWORK = UNetMotionModel
    PART = "unet"
    VAES = (AutoencoderKL,)
    INPUT = "conv_in"
    PROCESS = Diffusion
    TEXT_PIPELINE = "AnimateDiffPipeline"
    SCHEDULER: ClassVar[dict[str, Any]] = {
        "_class_name": "DDIMScheduler",
        "beta_schedule": "linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "clip_sample": False,
        "timestep_spacing": "linspace",
        "steps_offset": 1,
    }

    def run(self, inputs: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        clips, _, frames = inputs.shape[:3]
        (noise,) = self.network(
            sample=inputs,
            timestep=timestep,
            encoder_hidden_states=texts.spread(text, clips * frames),
            return_dict=False,
        )
        return noise

    @classmethod
    def text_tokens(cls, network: Any) -> int:
        return TEXT_TOKENS

    @classmethod
    def encode_text(cls, network: Any, pipeline: Any, some: list[str], device: torch.device) -> dict[str, torch.Tensor]:
        embeds, _ = pipeline.encode_prompt(some, device, 1, False)
        return {"text": embeds}

    @classmethod
    def geometry(cls, network: Any, vae: nn.Module | None) -> Geometry:
        return Geometry.of(vae, most_frames=network.motion_max_seq_length)

    @classmethod
    def tensors(cls, network: Any, settings: config.Model, root: Path | None) -> dict[str, torch.Tensor | None]:
        width = network.cross_attention_dim
        return {"text": texts.embeddings(settings, root, width if isinstance(width, int) else width[0])}

    @classmethod
    def check_network(cls, network: Any) -> None:
        for name in ("addition_embed_type", "encoder_hid_dim_type"):
            if getattr(network, name) is not None:
                raise UserError(f"UNetMotionModel with {name}={getattr(network, name)} (SDXL) is not supported")


DENOISER = MotionUnetDenoiser
inspect = partial(sources.inspect, DENOISER)
files = partial(sources.files, DENOISER)
load = partial(loading.load, DENOISER)
encoder = partial(loading.encoder, DENOISER)
