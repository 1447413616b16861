"""Wan: diffusers' `WanTransformer3DModel`, with reference image and pose as extra input channels.

Where the network comes from (`model.base`): a transformer's own folder, a diffusers pipeline's folder, a hub name, or
a folder that `save` wrote. Of a pipeline only `transformer/`, `vae/` and the scheduler's shift are read; of Wan 2.2
A14B's two networks the one that `model.expert` names is trained, and the other one samples with it
(`entprog.models.experts`).

Wan 2.1 and 2.2 differ for us in configurations alone: 2.2's TI2V-5B has 48 latent channels of 16×16 pixels.

An image-to-video checkpoint (2.1 with CLIP's image tokens, 2.2 without) gets the reference where its pipeline has the
first frame: as latents of a clip that is grey after it, with a mask, and as tokens by the base's `image_encoder/`. A
first-and-last-frame checkpoint sees the clip's last frame in the same way (`model.last_frame`). Where that is unknown
it is grey in the latents as in that pipeline without one, and since its network wants tokens of two images, those of a
grey picture. Pose alone needs new channels. Checkpoints trained by a version that did not know this are fed zeros
there, and have the reference in new channels.

Fun-Control (VideoX-Fun's Wan2.1-Fun-Control 1.0) has three times the latents' channels: the noisy clip, the control
video, which is the drawn pose, and the reference as latents of a first frame with zeros after it; and CLIP's tokens of
the reference. diffusers has no pipeline of it: the layout is that of `pipeline_wan_fun_control.py` in
github.com/aigc-apps/VideoX-Fun. Nothing is widened.

Where the base's pipeline has `expand_timesteps` (2.2's TI2V-5B), the reference is the clip's first latent frame itself,
at timestep 0 in all its tokens; loss is on the other frames. Without a reference that network has a frame there as any.

Text cross-attention sees `model.prompt_embeds`, filled up with zeros to the pipeline's number of tokens, or zeros.
Networks that an earlier version trained see the tokens alone that lie with them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch import nn
from torch.nn import functional

from entprog import config
from entprog.blocks import bypass
from entprog.diffusion.processes import Flow
from entprog.errors import UserError
from entprog.media import styles
from entprog.media.faces import Faces
from entprog.models import inputs, loading, sources, texts, vision, whole
from entprog.models.denoising import GIVEN_FRAME, VideoDenoiser
from entprog.models.geometry import Geometry

CLASS = "WanTransformer3DModel"
IMAGE_PARTS = {
    vision.ENCODER: ("transformers", "CLIPVisionModel"),
    "image_processor": ("transformers", "CLIPImageProcessor"),
}
"""Folders of a pipeline with CLIP's image encoder, and with what makes its inputs."""
MASK_CHANNELS = 4
"""Channels of an image-to-video network's mask: clip frames in a latent frame. Networks on pixels have one."""
FIRST_FRAME = "first frame"
"""Form of a reference in further channels beside the clip, which say what its first frame is."""
LAST_FRAME = "first and last frame"
"""Form of a reference that is shown like that, beside the last frame."""
CONTROL = "control"
"""Form of Fun-Control's inputs."""
CONTROLLED = ("pose", "reference")
"""Its conditions, in the order of its channels."""
GREY = 128
"""Level of a picture that is not there, in 0..255: what a pipeline has for frames that are not given."""
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
    TEXT_PIPELINE = "WanPipeline"  # WanVACEPipeline and WanAnimatePipeline encode alike, but never without ftfy
    TEXT_MENDED = True
    FILLED = True
    MORE = IMAGE_PARTS

    image: torch.Tensor | None
    """Image tokens [rows, tokens, image_dim] of a clip without a reference, for image-to-video networks: zeros; in the
    second row, of first-and-last-frame networks, the unknown last image's."""
    images: torch.Tensor | None = None
    """Image tokens of a batch's clips [B, tokens, image_dim], where they have their own; those of the last frame after
    those of the first, where the network sees it."""
    image_encoder: nn.Module | None = None
    """CLIP's image encoder of an image-to-video base."""
    image_processor: Any = None
    """What makes its inputs of pixels."""

    @property
    def mask_channels(self) -> int:
        """Channels of the mask beside the first frame's latents; 0 where the reference is not shown like that."""
        return _mask_channels(self.network.config.in_channels, self.latent_channels, self.conditions)

    @property
    def form(self) -> str:
        form = super().form
        return LAST_FRAME if form == FIRST_FRAME and self.last else form

    @classmethod
    def form_of(cls, splits: tuple[int, ...], channels: int, conditions: tuple[str, ...]) -> str:
        if splits == (3 * channels,) and conditions == CONTROLLED:
            return CONTROL
        if _mask_channels(sum(splits), channels, conditions):
            return FIRST_FRAME
        return GIVEN_FRAME if _is_given_frame(sum(splits), channels, conditions) else ""

    @classmethod
    def skeleton_of(cls, form: str) -> config.Skeleton:
        return styles.DWPOSE if form == CONTROL else cls.SKELETON

    @classmethod
    def sees_last(cls, network: Any, trained: Mapping[str, Any], form: str, settings: config.Model) -> bool:
        of_two = form == FIRST_FRAME and network.pos_embed_seq_len is not None
        able = of_two or (form == FIRST_FRAME and network.added_kv_proj_dim is None)
        if settings.last_frame and not able:
            raise UserError(
                f"model.last_frame: {settings.base or 'a new network'} has no place for a last frame: that have Wan's "
                "first-and-last-frame bases and image-to-video ones without image tokens, with reference in "
                "model.conditions"
            )
        return bool(
            trained.get("last_frame", of_two and not trained) if settings.last_frame is None else settings.last_frame
        )

    @classmethod
    def begins(cls, form: str, native: bool, last: bool) -> bool | None:
        # Samples keep a given frame exactly; VideoX-Fun trains Fun-Control without the picture where it is another one.
        return {FIRST_FRAME: last, GIVEN_FRAME: True, CONTROL: True}.get(form)

    @classmethod
    def check_values(cls, values: Mapping[str, Any], given: str) -> None:
        if values.get("add_ref_conv") or values.get("has_ref_conv"):
            raise UserError(
                f"model.base: {given} is a Fun-Control network with a layer for the reference (ref_conv, from version "
                "1.1 on), which diffusers' network lacks: take Wan2.1-Fun-Control 1.0 in diffusers' format"
            )
        if "in_dim" in values:
            raise UserError(
                f"model.base: {given} has Wan's own configuration (in_dim), not diffusers': give a folder in that "
                "format as model.base, and the weights as model.weights if they are a single file"
            )

    def reference(self, image: torch.Tensor, frames: int, last: torch.Tensor | None = None) -> torch.Tensor:
        if self.form == CONTROL:
            after = self._geometry.latent_frames(frames) - 1
            return functional.pad(self.latents(image), (0, 0, 0, 0, 0, after))
        if self.form == GIVEN_FRAME:
            marked = functional.pad(self.latents(image), (0, 0, 0, 0, 0, 0, 1, 0), value=1.0)
            return functional.pad(marked, (0, 0, 0, 0, 0, self._geometry.latent_frames(frames) - 1))
        if not self.mask_channels:
            return super().reference(image, frames)
        given = [image] if last is None or frames == 1 else [image, last]
        between = image.new_zeros(1).expand(*image.shape[:2], frames - len(given), *image.shape[3:])
        latents = self.latents(torch.cat([image, between, *given[1:]], dim=2))
        mask = torch.zeros_like(latents[:, :1]).repeat(1, self.mask_channels, 1, 1, 1)
        mask[:, :, 0] = 1
        if len(given) > 1:
            mask[:, -1, -1] = 1  # of the last latent frame its last frame alone
        return torch.cat([mask, latents], dim=1)

    @torch.no_grad()
    def condition(
        self,
        reference: torch.Tensor,
        pose: torch.Tensor,
        last: torch.Tensor | None = None,
        faces: Faces | None = None,
    ) -> dict[str, torch.Tensor]:
        if self.last and last is None:
            raise UserError("this network sees the clip's last frame, and none is given")
        out = super().condition(reference, pose, last if self.last else None, faces)
        if self.image_encoder is not None:
            seen = [reference, last] if self.last else [reference]
            out["image"] = torch.cat([self._tokens_of(picture) for picture in seen], dim=1)
        return out

    @torch.no_grad()
    def _tokens_of(self, pictures: torch.Tensor) -> torch.Tensor:
        """What the image encoder says of pictures uint8 [B, H, W, 3]: [B, tokens, image_dim]."""
        inputs = self.image_processor(images=list(pictures.cpu().numpy()), return_tensors="pt")["pixel_values"]
        return self.image_encoder(inputs.to(self.device), output_hidden_states=True).hidden_states[-2]

    def given(self, conditions: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor] | None:
        if self.form != GIVEN_FRAME:
            return None
        return conditions["reference"][:, :1], conditions["reference"][:, 1:]

    def predict(self, noisy: torch.Tensor, t: torch.Tensor, conditions: dict[str, torch.Tensor]) -> torch.Tensor:
        images, given = conditions.get("image"), self.given(conditions)
        shown = self if images is None else replace(self, images=images)
        if given is None:
            return VideoDenoiser.predict(shown, noisy, t, conditions)
        mask, frames = given
        others = [conditions[name] for name in self.conditions if name != "reference"]
        with self.in_its_type():
            inputs = torch.cat([(1 - mask) * noisy + mask * frames, *others], dim=1)
            prediction = self.run(inputs, self._timesteps(t, mask), conditions.get("text", self.text))
        return prediction.float() * (1 - mask)

    def _timesteps(self, t: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Timestep of each token [B, tokens]: 0 where a mask [B, 1, F', H', W'] says that it is given."""
        frames, rows, columns = self.network.config.patch_size
        free = 1 - mask[:, 0, ::frames, ::rows, ::columns].flatten(1)
        return self.process.timestep(t)[:, None] * free

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
        if self.image is None or self.images is None:
            return None if self.image is None else self.image.repeat(clips, 1, 1)
        if self.last:
            return self.images.unflatten(1, (2, -1)).flatten(0, 1)
        last = [row.expand_as(self.images) for row in self.image[1:]]
        return torch.stack([self.images, *last], dim=1).flatten(0, 1)

    @classmethod
    def own_conditions(cls, network: Any, channels: int) -> tuple[str, ...]:
        if _mask_channels(network.in_channels, channels, ("reference",)):
            return ("reference",)
        return CONTROLLED if network.in_channels == 3 * channels else ()

    @classmethod
    def planned_inputs(
        cls,
        network: Any,
        about: dict[str, Any],
        channels: int,
        settings: config.Model,
        index: Mapping[str, Any] = MappingProxyType({}),
    ) -> tuple[tuple[str, ...], tuple[int, ...]]:
        has = tuple(about.get("conditions", ()))
        kept = bool(about) and _is_given_frame(sum(about["input_channels"]), channels, has)
        offered = index.get(whole.EXPAND) is True and "reference" not in has
        if not kept and not (offered and "reference" in settings.conditions):
            return super().planned_inputs(network, about, channels, settings, index)
        if "reference" not in settings.conditions:
            raise UserError(f"model.conditions: {settings.base} was trained with {', '.join(has)}; add reference to it")
        rest = about and about | {"conditions": [name for name in has if name != "reference"]}
        others = settings.model_copy(update={"conditions": [n for n in settings.conditions if n != "reference"]})
        conditions, splits = inputs.planned(network.in_channels, rest, (), channels, others)
        return ("reference", *conditions), splits

    @classmethod
    def needs(cls, network: Any, form: str, native: bool) -> tuple[str, ...]:
        sees = form in (FIRST_FRAME, CONTROL)
        return tuple(IMAGE_PARTS) if sees and network.added_kv_proj_dim is not None else ()

    @classmethod
    def completed(cls, denoiser: "WanDenoiser", parts: dict[str, Path]) -> "WanDenoiser":
        if not parts:
            return denoiser
        processor, encoder = vision.load(parts, IMAGE_PARTS)
        seeing = replace(denoiser, image_encoder=encoder.to(denoiser.device), image_processor=processor)
        if denoiser.network.config.pos_embed_seq_len is None or denoiser.last:
            return seeing
        size = encoder.config.image_size
        unknown = seeing._tokens_of(torch.full((1, size, size, 3), GREY, dtype=torch.uint8))
        return replace(seeing, image=torch.cat([torch.zeros_like(unknown), unknown]))

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


def _is_given_frame(inputs: int, channels: int, conditions: tuple[str, ...]) -> bool:
    """Whether a network sees the reference as the clip's first frame itself: its input layer has channels for the clip
    and the other conditions alone."""
    return "reference" in conditions and inputs == channels * len(conditions)


DENOISER = WanDenoiser
inspect = partial(sources.inspect, DENOISER)
files = partial(sources.files, DENOISER)
load = partial(loading.load, DENOISER)
encoder = partial(loading.encoder, DENOISER)
