"""Wan: diffusers' `WanTransformer3DModel`, with reference image and pose as extra input channels.

Where the network comes from (`model.base`): a transformer's own folder, a diffusers pipeline's folder, a hub name, or
a folder that `save` wrote. Of a pipeline only `transformer/`, `vae/` and the scheduler's shift are read; of Wan 2.2
A14B's two networks the one that `model.expert` names is trained, and the other one samples with it
(`entprog.models.experts`).

Wan 2.1 and 2.2 differ for us in configurations alone: 2.2's TI2V-5B has 48 latent channels of 16×16 pixels.

An image-to-video checkpoint (2.1 with CLIP's image tokens, 2.2 without) gets the reference where its pipeline has the
first frame: as latents of a clip that is grey after it, with a mask, and as tokens by the base's `image_encoder/`. Pose
alone needs new channels. First-and-last-frame checkpoints, and those trained by a version that did not know this, are
fed zeros there, as if no image was given, and have the reference in new channels.

Text cross-attention sees `model.prompt_embeds`, or zeros.
"""

from dataclasses import dataclass, replace
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
from entprog.masking import one_line
from entprog.models import sources, texts
from entprog.models.denoising import VideoDenoiser
from entprog.models.geometry import Geometry

CLASS = "WanTransformer3DModel"
IMAGE_PARTS = {
    "image_encoder": ("transformers", "CLIPVisionModel"),
    "image_processor": ("transformers", "CLIPImageProcessor"),
}
"""Folders of a pipeline with CLIP's image encoder, and with what makes its inputs."""
MASK_CHANNELS = 4
"""Channels of an image-to-video network's mask: clip frames in a latent frame. Networks on pixels have one."""
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
    EXPERTS = True
    TEXT_PIPELINE = "WanPipeline"
    MORE = IMAGE_PARTS

    image: torch.Tensor | None
    """Zero image tokens [rows, tokens, image_dim] of one clip for I2V networks."""
    images: torch.Tensor | None = None
    """Image tokens of a batch's clips [B, tokens, image_dim], where they have their own."""
    image_encoder: nn.Module | None = None
    """CLIP's image encoder of an image-to-video base."""
    image_processor: Any = None
    """What makes its inputs of pixels."""

    @property
    def mask_channels(self) -> int:
        """Channels of the mask beside the first frame's latents; 0 where the reference is no first frame."""
        return _mask_channels(self.network.config.in_channels, self.latent_channels, self.conditions)

    @property
    def form(self) -> str:
        return "first frame" if self.mask_channels else ""

    def reference(self, image: torch.Tensor, frames: int) -> torch.Tensor:
        if not self.mask_channels:
            return super().reference(image, frames)
        after = image.new_zeros(1).expand(*image.shape[:2], frames - 1, *image.shape[3:])
        latents = self.latents(torch.cat([image, after], dim=2))
        mask = torch.zeros_like(latents[:, :1]).repeat(1, self.mask_channels, 1, 1, 1)
        mask[:, :, 0] = 1
        return torch.cat([mask, latents], dim=1)

    @torch.no_grad()
    def condition(self, reference: torch.Tensor, pose: torch.Tensor) -> dict[str, torch.Tensor]:
        out = super().condition(reference, pose)
        if self.image_encoder is not None and self.mask_channels:
            pictures = self.image_processor(images=list(reference.cpu().numpy()), return_tensors="pt")
            seen = self.image_encoder(pictures["pixel_values"].to(self.device), output_hidden_states=True)
            out["image"] = seen.hidden_states[-2]
        return out

    def predict(self, noisy: torch.Tensor, t: torch.Tensor, conditions: dict[str, torch.Tensor]) -> torch.Tensor:
        images = conditions.get("image")
        shown = self if images is None else replace(self, images=images)
        return VideoDenoiser.predict(shown, noisy, t, conditions)

    def run(self, inputs: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        (velocity,) = self.network(
            hidden_states=inputs,
            timestep=timestep,
            encoder_hidden_states=texts.spread(text, len(inputs)),
            encoder_hidden_states_image=self._image_tokens(len(inputs)),
            return_dict=False,
        )
        return velocity

    def _image_tokens(self, clips: int) -> torch.Tensor | None:
        if self.images is not None or self.image is None:
            return self.images
        return self.image.repeat(clips, 1, 1)

    @classmethod
    def own_conditions(cls, network: Any, channels: int) -> tuple[str, ...]:
        first_frame = _mask_channels(network.in_channels, channels, ("reference",))
        return ("reference",) if first_frame and network.pos_embed_seq_len is None else ()

    @classmethod
    def needs(cls, network: Any, channels: int, conditions: tuple[str, ...], inputs: int) -> tuple[str, ...]:
        sees_tokens = network.added_kv_proj_dim is not None and _mask_channels(inputs, channels, conditions)
        return tuple(IMAGE_PARTS) if sees_tokens else ()

    @classmethod
    def completed(cls, denoiser: "WanDenoiser", parts: dict[str, Path]) -> "WanDenoiser":
        if not parts:
            return denoiser
        processor, encoder = _image_parts(parts)
        return replace(denoiser, image_encoder=encoder.to(denoiser.device), image_processor=processor)

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


def _mask_channels(inputs: int, channels: int, conditions: tuple[str, ...]) -> int:
    """Channels of an image-to-video network's mask, of an input layer's channels; 0: it is none, or does not see the
    reference as a first frame. channels: of the latents."""
    extra, mask = inputs - channels * (1 + len(conditions)), 1 if channels == 3 else MASK_CHANNELS
    return mask if extra == mask and "reference" in conditions else 0


def _image_parts(parts: dict[str, Path]) -> tuple[Any, nn.Module]:
    """(image processor, image encoder in float32) of their folders. Raises UserError if they cannot be loaded."""
    try:
        from transformers import CLIPImageProcessor, CLIPVisionModel
    except ImportError:
        raise UserError("image tokens need transformers: pip install 'entprog[text]'") from None
    encoder, processor = (parts[name] for name in IMAGE_PARTS)
    try:
        seeing = CLIPVisionModel.from_pretrained(encoder, use_safetensors=True, local_files_only=True)
        return CLIPImageProcessor.from_pretrained(processor, local_files_only=True), seeing.float().eval()
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot load the image encoder {encoder}: {one_line(error)}") from None


inspect = partial(sources.inspect, WanDenoiser)
files = partial(sources.files, WanDenoiser)
load = partial(sources.load, WanDenoiser)
