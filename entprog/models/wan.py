"""Wan: diffusers' `WanTransformer3DModel`, with reference image and pose as extra input channels.

Where the network comes from (`model.base`): a transformer's own folder, a diffusers pipeline's folder, a hub name, or
a folder that `save` wrote. Of a pipeline only `transformer/`, `vae/` and the scheduler's shift are read; of Wan 2.2's
two networks that is the one for high noise, `transformer_2` is left alone (give its folder to train it).

Wan 2.1 and 2.2 differ for us in configurations alone: 2.2's TI2V-5B has 48 latent channels of 16×16 pixels.

A Wan I2V checkpoint's further inputs, mask and image, are fed zeros, its image tokens too: as if no image was given.
Text cross-attention sees `model.prompt_embeds`, or zeros.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch import nn

from entprog import config
from entprog.blocks import bypass
from entprog.diffusion.processes import Flow
from entprog.errors import UserError
from entprog.models import sources, texts
from entprog.models.denoising import VideoDenoiser
from entprog.models.geometry import Geometry

CLASS = "WanTransformer3DModel"
TEXT_TOKENS = 512
"""Tokens of a text; diffusers' Wan attention counts on that number where image tokens come before them."""


@bypass.register
def _(module: WanTransformerBlock, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    return hidden_states


@dataclass(frozen=True, kw_only=True)
class WanDenoiser(VideoDenoiser):
    """A Wan network with its VAE, conditions and text; predicts the velocity ε - x_0."""

    FAMILY = "wan"
    NETWORK = WanTransformer3DModel
    VAES = (AutoencoderKLWan,)
    INPUT = "patch_embedding"
    PROCESS = Flow
    SCHEDULER: ClassVar[dict[str, Any]] = {"shift": 1.0}
    TEXT_PIPELINE = "WanPipeline"

    image: torch.Tensor | None
    """Zero image tokens [rows, tokens, image_dim] of one clip for I2V networks."""

    def run(self, inputs: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        (velocity,) = self.network(
            hidden_states=inputs,
            timestep=timestep,
            encoder_hidden_states=texts.spread(text, len(inputs)),
            encoder_hidden_states_image=None if self.image is None else self.image.repeat(len(inputs), 1, 1),
            return_dict=False,
        )
        return velocity

    @classmethod
    def geometry(cls, network: Any, vae: nn.Module | None) -> Geometry:
        return Geometry.of(vae, network.patch_size, longest=network.rope_max_seq_len)

    @classmethod
    def tensors(cls, network: Any, settings: config.Model, root: Path | None) -> dict[str, torch.Tensor | None]:
        text = texts.embeddings(settings, root, network.text_dim)
        if network.added_kv_proj_dim is None:
            return {"text": text, "image": None}
        text = texts.padded(text, TEXT_TOKENS)
        if network.pos_embed_seq_len is None:
            return {"text": text, "image": torch.zeros(1, 1, network.image_dim)}
        # First and last image arrive as two rows of the batch, which diffusers joins (Wan FLF2V).
        return {"text": text, "image": torch.zeros(2, network.pos_embed_seq_len // 2, network.image_dim)}

    @classmethod
    def text_tokens(cls, network: Any) -> int:
        return TEXT_TOKENS

    @classmethod
    def check_network(cls, network: Any) -> None:
        if len(network.patch_size) != 3:
            raise UserError(f"patch_size needs 3 numbers (frames, height, width), given {network.patch_size}")

    @classmethod
    def initialise(cls, network: nn.Module) -> None:
        """Wan's own initialisation, except that the last layer is small, not zero."""
        for module in network.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(network.patch_embedding.weight.data.flatten(1))
        embedder = network.condition_embedder
        for part in (embedder.text_embedder, embedder.time_embedder):
            nn.init.normal_(part.linear_1.weight, std=0.02)
            nn.init.normal_(part.linear_2.weight, std=0.02)
        nn.init.normal_(network.proj_out.weight, std=0.02)


inspect = partial(sources.inspect, WanDenoiser)
files = partial(sources.files, WanDenoiser)
load = partial(sources.load, WanDenoiser)
