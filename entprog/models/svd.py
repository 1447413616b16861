"""Stable Video Diffusion: diffusers' `UNetSpatioTemporalConditionModel`, the shape that MimicMotion (arXiv 2406.19680)
fine-tunes for people.

The base sees an image's latents beside the noisy clip: that is the condition `reference`, in the VAE's own scale, which
is how SVD was trained. `pose` enters through new input channels. Spatial and temporal units stand side by side in every
layer and are blocks of their own.

Of a base with `image_encoder/` and `feature_extractor/`, cross-attention sees CLIP's embedding of each clip's
reference, and the reference's latents are those of a picture with a little noise, as much as diffusers' pipeline adds
by default and tells the network. The noise is the picture's own, so that latents can be cached: the base was trained
with more and less of it (arXiv 2311.15127, appendix: log strength of mean -3, spread 0.5), and never without.

Of a base whose pipeline lacks one of them, and of networks that an earlier version trained, cross-attention sees
`model.prompt_embeds` (one token of CLIP's image encoder) for all clips, or zeros, SVD's own for "no image", and the
reference has no noise.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel
from torch import nn
from torch.nn import functional

from entprog import blocks, config
from entprog.diffusion.processes import Edm
from entprog.errors import UserError
from entprog.media.faces import Faces
from entprog.models import loading, sources, texts, vision
from entprog.models import units as units  # registers its block classes
from entprog.models.denoising import VideoDenoiser, own_noise
from entprog.models.geometry import Geometry

CLASS = "UNetSpatioTemporalConditionModel"

FPS, MOTION, REFERENCE_NOISE = 7, 127, 0.02
"""What the network gets about every clip: defaults of diffusers' pipeline. The last one is the deviation of the noise
that is added to the reference, of pixels in -1..1."""
EMBEDDING_PARTS = {
    vision.ENCODER: ("transformers", "CLIPVisionModelWithProjection"),
    "feature_extractor": ("transformers", "CLIPImageProcessor"),
}
"""Folders of its pipeline with CLIP's image encoder, and with what makes its inputs."""
EMBEDDED = "embedded reference"
"""Form of a reference that is noised, and that cross-attention sees too."""
ENCODED_SIDE = 224
"""Height and width of what the image encoder sees: a constant of diffusers' pipeline."""


@blocks.kind.register
def _(network: UNetSpatioTemporalConditionModel, name: str) -> blocks.Kind:
    return "temporal" if ".temporal_" in name else "spatial"


@dataclass(frozen=True, kw_only=True)
class SvdDenoiser(VideoDenoiser):
    """An SVD network with its VAE, conditions and the image embedding that is its text; predicts EDM's v."""

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
    MORE = EMBEDDING_PARTS

    image_encoder: nn.Module | None = None
    """CLIP's image encoder; None: no reference is embedded."""
    image_processor: Any = None
    """What makes its inputs of pixels."""

    @property
    def form(self) -> str:
        return EMBEDDED if self.native else ""

    def check_type(self) -> None:
        if self.autocast is not None and self.device.type == "cpu":
            # torch 2.13's CPU kernel leaves parts of such a Conv3d's weight gradient unwritten.
            raise UserError("model.dtype: SVD's temporal convolutions have no sound bfloat16 on a CPU; take float32")

    def run(self, inputs: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        extra = inputs.new_tensor([FPS - 1, MOTION, REFERENCE_NOISE if self.native else 0.0])
        (v,) = self.network(
            sample=inputs.transpose(1, 2),
            timestep=timestep,
            encoder_hidden_states=texts.spread(text, len(inputs)),
            added_time_ids=extra.expand(len(inputs), -1),
            return_dict=False,
        )
        return v.transpose(1, 2)

    def predict(self, noisy: torch.Tensor, t: torch.Tensor, conditions: dict[str, torch.Tensor]) -> torch.Tensor:
        if "image" in conditions:
            conditions = {**conditions, "text": conditions["image"]}
        return super().predict(noisy, t, conditions)

    @torch.no_grad()
    def condition(
        self,
        reference: torch.Tensor,
        pose: torch.Tensor,
        last: torch.Tensor | None = None,
        faces: Faces | None = None,
    ) -> dict[str, torch.Tensor]:
        out = super().condition(reference, pose, last, faces)
        if "reference" in out and self.vae is not None:
            out["reference"] = out["reference"] / self.vae.config.scaling_factor
        if self.image_encoder is not None:
            out["image"] = self._embedding(self._pixels(reference)[:, :, 0])
        return out

    def reference(self, image: torch.Tensor, frames: int, last: torch.Tensor | None = None) -> torch.Tensor:
        return super().reference(image + REFERENCE_NOISE * own_noise(image) if self.native else image, frames)

    @torch.no_grad()
    def _embedding(self, pictures: torch.Tensor) -> torch.Tensor:
        """What the image encoder says of pictures [B, 3, H, W] in -1..1: [B, 1, width]."""
        small = (antialiased(pictures, ENCODED_SIDE) + 1) / 2
        once = {"do_center_crop": False, "do_resize": False, "do_rescale": False, "do_normalize": True}
        inputs = self.image_processor(images=small.cpu(), **once, return_tensors="pt")["pixel_values"]
        return self.image_encoder(inputs.to(self.device)).image_embeds.unsqueeze(1)

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
    def sees_native(
        cls, network: Any, trained: Mapping[str, Any], settings: config.Model, there: Collection[str]
    ) -> bool:
        sees = network.in_channels == 2 * network.out_channels and set(there) == set(EMBEDDING_PARTS)
        native = trained.get("native", not trained and sees)
        if native and settings.prompt_embeds:
            raise UserError(
                f"model.prompt_embeds: {settings.base} shows its network CLIP's embedding of each clip's reference, "
                "with no place for another one: leave the setting out"
            )
        return native

    @classmethod
    def begins(cls, form: str, native: bool, last: bool) -> bool | None:
        return False if native else None

    @classmethod
    def left_out(cls, native: bool) -> str | None:
        if native:
            return None
        return (
            f"has no {'/ and '.join(EMBEDDING_PARTS)}/, or was trained without them: cross-attention sees "
            "model.prompt_embeds or zeros, where SVD's pipeline shows CLIP's embedding of each clip's reference"
        )

    @classmethod
    def needs(cls, network: Any, form: str, native: bool) -> tuple[str, ...]:
        return tuple(EMBEDDING_PARTS) if native else ()

    @classmethod
    def completed(cls, denoiser: "SvdDenoiser", parts: dict[str, Path]) -> "SvdDenoiser":
        if not parts:
            return denoiser
        processor, encoder = vision.load(parts, EMBEDDING_PARTS)
        return replace(denoiser, image_encoder=encoder.to(denoiser.device), image_processor=processor)

    @classmethod
    def check_network(cls, network: Any) -> None:
        ids = network.projection_class_embeddings_input_dim / network.addition_time_embed_dim
        if ids != 3:
            raise UserError(
                "projection_class_embeddings_input_dim must be 3 × addition_time_embed_dim (fps, motion, noise), "
                f"given {network.projection_class_embeddings_input_dim} and {network.addition_time_embed_dim}"
            )


def antialiased(pictures: torch.Tensor, side: int) -> torch.Tensor:
    """Pictures [B, 3, H, W] as squares of a side, as diffusers' pipeline makes them: blurred by as much as they shrink,
    then bicubic."""
    for axis in (2, 3):
        sigma = max((pictures.shape[axis] / side - 1) / 2, 0.001)
        taps = int(max(4 * sigma, 3)) | 1
        places = torch.arange(taps, device=pictures.device, dtype=pictures.dtype) - taps // 2
        weights = torch.softmax(-((places / sigma) ** 2) / 2, dim=0)
        high, wide = (taps, 1) if axis == 2 else (1, taps)
        padded = functional.pad(pictures, (wide // 2, wide // 2, high // 2, high // 2), mode="reflect")
        pictures = functional.conv2d(padded, weights.view(1, 1, high, wide).expand(3, -1, -1, -1), groups=3)
    return functional.interpolate(pictures, (side, side), mode="bicubic", align_corners=True)


DENOISER = SvdDenoiser
inspect = partial(sources.inspect, DENOISER)
files = partial(sources.files, DENOISER)
load = partial(loading.load, DENOISER)
encoder = partial(loading.encoder, DENOISER)
