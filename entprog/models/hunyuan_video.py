"""HunyuanVideo: diffusers' `HunyuanVideoTransformer3DModel`, whose blocks carry two streams, video and text: first with
weights of their own for each, then with shared ones. Copy this file for a network of several kinds of blocks.

Reference and pose enter through new input channels. The text is each clip's caption, by two encoders as its pipeline
has it: Llama's tokens of a text in a template, of which attention sees the used ones alone, and CLIP's pooled text; or
`model.prompt_embeds`, with the pooled text as tensor `pooled_prompt_embeds` beside it; or zeros. Its guidance is
distilled: the network is told a strength, here that of diffusers' pipeline. The text's refiner is no block: the clip
does not pass it. HunyuanVideo-I2V, whose blocks treat the first frame apart, is refused.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoTransformer3DModel
from diffusers.models.transformers.transformer_hunyuan_video import (
    HunyuanVideoSingleTransformerBlock,
    HunyuanVideoTransformerBlock,
)
from torch import nn

from entprog import config
from entprog.blocks import bypass
from entprog.diffusion.processes import Flow
from entprog.errors import UserError
from entprog.models import loading, sources, texts
from entprog.models.denoising import VideoDenoiser
from entprog.models.geometry import Geometry

CLASS = "HunyuanVideoTransformer3DModel"

GUIDANCE = 6.0
"""Strength that the pipeline of diffusers tells the network by default."""
GUIDANCE_STEPS = 1000
"""Its embedding takes the strength times this."""
TEXT_TOKENS = 256
"""Tokens that its pipeline takes of a text, without those of the template."""


@bypass.register(HunyuanVideoTransformerBlock)
@bypass.register(HunyuanVideoSingleTransformerBlock)
def _(module, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, *args, **kwargs):
    return hidden_states, encoder_hidden_states


@dataclass(frozen=True, kw_only=True)
class HunyuanVideoDenoiser(VideoDenoiser):
    """A HunyuanVideo network with its VAE, conditions and text; predicts the velocity ε - x_0."""

    FAMILY = "hunyuan_video"
    NETWORK = HunyuanVideoTransformer3DModel
    VAES = (AutoencoderKLHunyuanVideo,)
    INPUT = "x_embedder.proj"
    PROCESS = Flow
    SCHEDULER: ClassVar[dict[str, Any]] = {"shift": 7.0}
    TEXT_PIPELINE = "HunyuanVideoPipeline"
    TEXT_PARTS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    MASKS = True
    FIXED: ClassVar[dict[str, str]] = {"pooled": "pooled_prompt_embeds"}

    pooled: torch.Tensor
    """Pooled text [1 or clips, width], beside the tokens."""

    def predict(self, noisy: torch.Tensor, t: torch.Tensor, conditions: dict[str, torch.Tensor]) -> torch.Tensor:
        shown = replace(self, pooled=conditions["pooled"]) if "pooled" in conditions else self
        return VideoDenoiser.predict(shown, noisy, t, conditions)

    def run(self, inputs: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        text = texts.spread(text, len(inputs))
        (velocity,) = self.network(
            hidden_states=inputs,
            timestep=timestep,
            encoder_hidden_states=text,
            encoder_attention_mask=texts.used(text).to(text.dtype),
            pooled_projections=self.pooled * text.flatten(1).any(dim=1, keepdim=True),  # dropped with the tokens
            guidance=inputs.new_full((len(inputs),), GUIDANCE * GUIDANCE_STEPS)
            if self.network.config.guidance_embeds
            else None,
            return_dict=False,
        )
        return velocity

    @classmethod
    def text_tokens(cls, network: Any) -> int:
        return TEXT_TOKENS

    @classmethod
    def encode_text(cls, network: Any, pipeline: Any, some: list[str], device: torch.device) -> dict[str, torch.Tensor]:
        embeds, pooled, mask = pipeline.encode_prompt(some, device=device)
        return {"text": embeds * mask.unsqueeze(-1).to(embeds), "pooled": pooled}

    @classmethod
    def geometry(cls, network: Any, vae: nn.Module | None) -> Geometry:
        return Geometry.of(vae, (network.patch_size_t, network.patch_size, network.patch_size))

    @classmethod
    def tensors(cls, network: Any, settings: config.Model, root: Path | None) -> dict[str, torch.Tensor | None]:
        text = texts.embeddings(settings, root, network.text_embed_dim)
        return {"text": text, "pooled": texts.fixed(settings, root, cls.FIXED["pooled"], network.pooled_projection_dim)}

    @classmethod
    def check_network(cls, network: Any) -> None:
        if network.image_condition_type is not None:
            raise UserError(
                f"image_condition_type {network.image_condition_type}: HunyuanVideo-I2V is not supported, its blocks "
                "treat the first frame apart; give a text-to-video checkpoint"
            )


DENOISER = HunyuanVideoDenoiser
inspect = partial(sources.inspect, DENOISER)
files = partial(sources.files, DENOISER)
load = partial(loading.load, DENOISER)
encoder = partial(loading.encoder, DENOISER)
