"""Latte: diffusers' `LatteTransformer3DModel`, whose blocks mix positions within a frame and frames in turn: the shape
of the paper's network.

Trained to predict ε (IDDPM, arXiv 2102.09672). Where the output has channels for a learned variance too, ε is its first
half: the loss is on ε alone, as the paper's is, and the samplers of diffusers use no other.
Text cross-attention sees captions as the base's pipeline does, `model.prompt_embeds`, or zeros. Clips may be shorter
than the `video_length` that it was made for: its positions in time are those of the first frames.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder, LatteTransformer3DModel
from diffusers.models.embeddings import get_1d_sincos_pos_embed_from_grid
from torch import nn

from entprog import blocks, config
from entprog.diffusion.processes import Diffusion
from entprog.errors import UserError
from entprog.models import loading, sources, texts
from entprog.models import units as units  # registers its block class
from entprog.models.denoising import VideoDenoiser
from entprog.models.geometry import Geometry

CLASS = "LatteTransformer3DModel"
TEXT_TOKENS = 120
"""Most tokens that its pipeline takes of a text; of shorter ones their own alone."""


@blocks.kind.register
def _(network: LatteTransformer3DModel, name: str) -> blocks.Kind:
    return "temporal" if name.startswith("temporal_") else "spatial"


@dataclass(frozen=True, kw_only=True)
class LatteDenoiser(VideoDenoiser):
    """A Latte network with its VAE, conditions and text; predicts ε."""

    FAMILY = "latte"
    NETWORK = LatteTransformer3DModel
    VAES = (AutoencoderKL, AutoencoderKLTemporalDecoder)
    TEXT_PIPELINE = "LattePipeline"
    INPUT = "pos_embed.proj"
    PROCESS = Diffusion
    SCHEDULER: ClassVar[dict[str, Any]] = {
        "_class_name": "DDIMScheduler",
        "beta_schedule": "linear",
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "clip_sample": False,
    }

    frames: torch.Tensor
    """Positions of frames [1, video_length, width]."""

    def run(self, inputs: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        self.network.temp_pos_embed = self.frames[:, : inputs.shape[2]]
        text = texts.spread(text, len(inputs))
        (noise,) = self.network(
            hidden_states=inputs,
            timestep=timestep,
            encoder_hidden_states=text,
            encoder_attention_mask=_own_tokens(text, inputs.shape[2]),
            return_dict=False,
        )
        return noise[:, : self.latent_channels]

    @classmethod
    def text_tokens(cls, network: Any) -> int:
        return TEXT_TOKENS

    @classmethod
    def encode_text(cls, network: Any, pipeline: Any, some: list[str], device: torch.device) -> dict[str, torch.Tensor]:
        each = [pipeline.encode_prompt(one, False, device=device)[0] for one in some]  # of one text, its tokens alone
        return {"text": torch.cat([texts.padded(embeds, TEXT_TOKENS) for embeds in each])}

    @classmethod
    def geometry(cls, network: Any, vae: nn.Module | None) -> Geometry:
        return Geometry.of(vae, (1, network.patch_size, network.patch_size), most_frames=network.video_length)

    @classmethod
    def tensors(cls, network: Any, settings: config.Model, root: Path | None) -> dict[str, torch.Tensor | None]:
        width = network.num_attention_heads * network.attention_head_dim
        steps = torch.arange(network.video_length).unsqueeze(1)
        frames = get_1d_sincos_pos_embed_from_grid(width, steps, output_type="pt").float().unsqueeze(0)
        return {"text": texts.embeddings(settings, root, network.caption_channels), "frames": frames}

    @classmethod
    def predicted(cls, network: Any) -> tuple[int, ...]:
        outputs = network.out_channels or network.in_channels
        return (outputs, outputs // 2)

    @classmethod
    def check_network(cls, network: Any) -> None:
        if network.norm_type != "ada_norm_single" or network.caption_channels is None:
            raise UserError(
                f"a Latte network needs norm_type ada_norm_single and caption_channels, given {network.norm_type} and "
                f"{network.caption_channels}"
            )


def _own_tokens(text: torch.Tensor, frames: int) -> torch.Tensor | None:
    """Which tokens of texts [B, tokens, width] are seen (`texts.used`): bool [B · frames, 1, tokens], as blocks take
    it. None where all are."""
    used = texts.used(text)
    return None if used.shape[1] == 1 or used.all() else used[:, None].repeat_interleave(frames, dim=0)


DENOISER = LatteDenoiser
inspect = partial(sources.inspect, DENOISER)
files = partial(sources.files, DENOISER)
load = partial(loading.load, DENOISER)
encoder = partial(loading.encoder, DENOISER)
