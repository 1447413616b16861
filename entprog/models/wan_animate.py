"""Wan-Animate (Wan 2.2): diffusers' `WanAnimateTransformer3DModel`, which takes reference and pose natively.

The reference is a latent frame of its own before the clip's, marked as given; the drawn pose has a patch embedding of
its own (`entprog.models.reference_frame`). Nothing is widened. As in diffusers' pipeline for its mode "animate", first
segment; with the condition `background`, of clips with a mask and of `generate --mask`, for its mode "replace".

Faces are cut out of the clip where its pose has their points (`entprog.media.faces`), and what the network's motion
encoder, which is never trained, says of them is the condition `face`: it is dropped with the pose. A frame without a
face is shown a blank one (-1), as in the pipeline's unconditional branch. The reference's tokens are those of the
base's `image_encoder/`. Networks that an earlier version trained, and new ones, see neither: blank faces, tokens of
zeros.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import WanAnimateTransformer3DModel
from diffusers.models.transformers.transformer_wan_animate import (
    WanAnimateFaceBlockCrossAttention,
    WanAnimateMotionEncoder,
    WanTransformerBlock,
)
from torch import nn

from entprog import config
from entprog.blocks import bypass, replaced
from entprog.distributed import fsdp
from entprog.errors import UserError
from entprog.media import styles
from entprog.media.faces import Faces, cut
from entprog.models import loading, sources, texts, vision
from entprog.models.inputs import CONDITIONS
from entprog.models.reference_frame import ReferenceFrameDenoiser
from entprog.models.wan import IMAGE_PARTS

CLASS = "WanAnimateTransformer3DModel"
MASK_CHANNELS = 4
TEMPORAL = 4
"""Clip frames that a latent frame after the first stands for; the network has a face for each."""
AT_ONCE = 8
"""Faces that it looks at together."""


@bypass.register
def _(module: WanTransformerBlock, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    return hidden_states


@bypass.register
def _(module: WanAnimateFaceBlockCrossAttention, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    return torch.zeros_like(hidden_states)  # the network adds its input to what it gives


@dataclass(frozen=True, kw_only=True)
class WanAnimateDenoiser(ReferenceFrameDenoiser):
    """A Wan-Animate network with its VAE and text; predicts the velocity ε - x_0."""

    FAMILY = "wan_animate"
    NETWORK = WanAnimateTransformer3DModel
    SKELETON = styles.WAN_ANIMATE
    FACES = True
    MORE: ClassVar[dict[str, tuple[str, str]]] = IMAGE_PARTS

    motion_encoder: nn.Module | None = None
    """What says what a face does, float32; None: faces are not seen."""
    blank: torch.Tensor | None = None
    """What it says of a face that is not there: [1, width]."""

    @property
    def form(self) -> str:
        return "tokens and faces" if self.native else ""

    @classmethod
    def sees_native(
        cls, network: Any, trained: Mapping[str, Any], settings: config.Model, there: Collection[str]
    ) -> bool:
        return bool(trained.get("native", not trained))

    @classmethod
    def sees_around(cls, native: bool, vae: bool) -> bool:
        return native and vae

    @classmethod
    def needs(cls, network: Any, form: str, native: bool) -> tuple[str, ...]:
        return tuple(IMAGE_PARTS) if native and network.added_kv_proj_dim is not None else ()

    @classmethod
    def encodes_with(cls, network: Any, native: bool) -> dict[str, nn.Module]:
        if not native:
            return {}
        sizes = {
            "size": network.motion_encoder_size, "style_dim": network.motion_style_dim,
            "motion_dim": network.motion_dim, "out_dim": network.motion_encoder_dim,
            "channels": network.motion_encoder_channel_sizes,
        }  # fmt: skip
        return {"motion_encoder": WanAnimateMotionEncoder(**sizes)}

    @classmethod
    def completed(cls, denoiser: "WanAnimateDenoiser", parts: dict[str, Path]) -> "WanAnimateDenoiser":
        if not denoiser.native:
            return denoiser
        own = fsdp.whole_copy(denoiser.network.motion_encoder).float().eval().requires_grad_(False).to(denoiser.device)
        with torch.no_grad():
            blank = own(torch.full((1, 3, own.size, own.size), -1.0, device=denoiser.device))
        processor, encoder = vision.load(parts, IMAGE_PARTS) if parts else (None, None)
        encoder = encoder and encoder.to(denoiser.device)
        return replace(denoiser, motion_encoder=own, blank=blank, image_encoder=encoder, image_processor=processor)

    @torch.no_grad()
    def condition(
        self,
        reference: torch.Tensor,
        pose: torch.Tensor,
        last: torch.Tensor | None = None,
        faces: Faces | None = None,
    ) -> dict[str, torch.Tensor]:
        out = super().condition(reference, pose, last, faces)
        if self.motion_encoder is not None and self.vae is not None:
            out["face"] = self._motion(faces, *pose.shape[:2])
        return out

    @torch.no_grad()
    def background(self, video: torch.Tensor, person: torch.Tensor, pose: torch.Tensor) -> dict[str, torch.Tensor]:
        """What is given of a clip whose person is replaced, [B, 4 + C, F', H', W']: for each of a latent frame's frames
        1 where it is to be kept, and the video's latents; of a clip without a person in it what the network sees where
        nobody is replaced.

        video uint8 [B, F, H, W, 3]; person bool [B, F, H, W]: where the person is to be. The first latent frame stands
        for one frame, four times."""
        pixels = video.to(self.device).movedim(-1, 1).float() / 127.5 - 1
        spatial = self._geometry.spatial
        kept = (~person.to(self.device)[:, :, ::spatial, ::spatial]).float()
        kept = torch.cat([kept[:, :1].expand(-1, TEMPORAL - 1, -1, -1), kept], dim=1)
        kept = kept.unflatten(1, (-1, TEMPORAL)).transpose(1, 2)
        around = torch.cat([kept, self.latents(pixels)], dim=1)
        there = person.flatten(1).any(1).to(self.device)
        if there.all():
            return {"background": around}
        nothing = self._nothing_around(around[:, MASK_CHANNELS:])
        return {"background": torch.where(there.view(-1, 1, 1, 1, 1), around, nothing)}

    def _nothing_around(self, like: torch.Tensor) -> torch.Tensor:
        """The condition `background` of clips of which nothing is given; like: latents of so many such clips."""
        return torch.cat([like.new_zeros(1).expand(_mask(like)), self.nothing(like)], dim=1)

    def _motion(self, faces: Faces | None, clips: int, frames: int) -> torch.Tensor:
        """What faces do, [B, 4 (width + 1), F', 1, 1]: of each of a latent frame's frames the encoder's vector and 1;
        zeros where no face is seen, and before the first frame, which has a latent frame of its own."""
        said = self.blank.new_zeros(clips, frames + TEMPORAL - 1, self.blank.shape[1] + 1)
        if faces is not None:
            pixels, there = cut(Faces(faces.video.to(self.device), faces.pose), self.motion_encoder.size)
            if there.any():
                each = torch.cat([self.motion_encoder(some) for some in pixels[there].split(AT_ONCE)])
                said[:, TEMPORAL - 1 :][there] = torch.cat([each, torch.ones_like(each[:, :1])], dim=1)
        return said.unflatten(1, (-1, TEMPORAL)).flatten(2).transpose(1, 2)[..., None, None].contiguous()

    def _seen(self, face: torch.Tensor) -> torch.Tensor:
        """Of that condition the encoder's vectors, [B · frames, width], the blank face's where there is none."""
        said = face.flatten(2).transpose(1, 2).unflatten(2, (TEMPORAL, -1)).flatten(1, 2)[:, TEMPORAL - 1 :]
        vectors, there = said[..., :-1], said[..., -1:] > 0.5
        return torch.where(there, vectors, self.blank.to(vectors)).flatten(0, 1)

    def predict(self, noisy: torch.Tensor, t: torch.Tensor, conditions: dict[str, torch.Tensor]) -> torch.Tensor:
        reference, pose = conditions["reference"][:, :, :1], conditions["pose"]
        latents = self.led(noisy, reference, t)
        around = conditions.get("background")
        if around is None:
            around = self._nothing_around(noisy)
        first = torch.cat([noisy.new_ones(1).expand(_mask(reference)), reference], dim=1)
        given = torch.cat([first, around], dim=2)
        frames = TEMPORAL * (noisy.shape[2] - 1) + 1
        faces, encode = noisy.new_zeros(len(noisy), 1, frames, 1, 1), self._no_motion
        if "face" in conditions:  # its encoder has seen them: each is a number among what that said
            said = self._seen(conditions["face"])
            faces = torch.arange(len(said), device=noisy.device, dtype=torch.float32).view(len(noisy), 1, frames, 1, 1)
            encode = lambda numbers: said[numbers.flatten().long()]  # noqa: E731
        images = conditions.get("image")
        if images is None and self.image is not None:
            images = self.image.repeat(len(noisy), 1, 1)
        with self.in_its_type(), replaced({self.network.motion_encoder: encode}):
            (velocity,) = self.network(
                hidden_states=torch.cat([latents, given], dim=1),
                timestep=self.process.timestep(t),
                encoder_hidden_states=texts.spread(conditions.get("text", self.text), len(noisy)),
                encoder_hidden_states_image=images,
                pose_hidden_states=pose,
                face_pixel_values=faces,
                return_dict=False,
            )
        return velocity[:, :, 1:].float()

    @torch.no_grad()
    def _no_motion(self, faces: torch.Tensor) -> torch.Tensor:
        """What the motion encoder says of a face that is not there, as often as asked: [faces, motion dim]."""
        encoder = self.network.motion_encoder
        blank = faces.new_full((1, 3, encoder.size, encoder.size), -1.0)
        return type(encoder).forward(encoder, blank).expand(len(faces), -1)

    def outside(self) -> dict[str, list[nn.Parameter]]:
        """Parameters outside blocks as in every family, without the motion encoder's, which are never trained."""
        groups = super().outside()
        conditions = list(self.network.pose_patch_embedding.parameters())
        left_out = {id(p) for p in (*conditions, *self.network.motion_encoder.parameters())}
        rest = [p for p in groups["rest"] if id(p) not in left_out]
        return {"conditions": groups["conditions"] + conditions, "rest": rest}

    @classmethod
    def check_network(cls, network: Any) -> None:
        super().check_network(network)
        if network.patch_size[0] != 1:
            raise UserError(f"patch_size must be 1 in time for Wan-Animate, given {network.patch_size}")
        if network.num_layers % network.inject_face_latents_blocks:
            raise UserError(
                f"num_layers {network.num_layers} must be a multiple of inject_face_latents_blocks "
                f"{network.inject_face_latents_blocks}"
            )

    @classmethod
    def new_inputs(cls, channels: int, conditions: tuple[str, ...]) -> dict[str, int]:
        return {"in_channels": 2 * channels + MASK_CHANNELS, "latent_channels": channels}

    @classmethod
    def planned_inputs(cls, network: Any, about: dict[str, Any], channels: int, settings: config.Model, index=None):
        if set(settings.conditions) != set(CONDITIONS):
            raise UserError(f"model.conditions: Wan-Animate takes {' and '.join(CONDITIONS)}, both natively; give both")
        return CONDITIONS, (network.in_channels,)

    @classmethod
    def initialise(cls, network: nn.Module) -> None:
        motion = {name: value.clone() for name, value in network.motion_encoder.state_dict().items()}
        super().initialise(network)
        network.motion_encoder.load_state_dict(motion)


def _mask(latents: torch.Tensor) -> tuple[int, ...]:
    """Size of the mask beside latents [B, C, F', H', W']."""
    return len(latents), MASK_CHANNELS, *latents.shape[2:]


DENOISER = WanAnimateDenoiser
inspect = partial(sources.inspect, DENOISER)
files = partial(sources.files, DENOISER)
load = partial(loading.load, DENOISER)
encoder = partial(loading.encoder, DENOISER)
