"""Wan VACE (Wan 2.1, and VACE-Fun of Wan 2.2 with two experts): diffusers' `WanVACETransformer3DModel`, which is
controlled by a video in blocks of its own.

The control video is the drawn pose, all of it to be followed (VACE's mask is white), and nothing of a video is kept: as
`WanVACEPipeline(video=pose, reference_images=reference)` feeds its network, within 1e-4. With the condition
`background`, of clips with a mask and of `generate --mask`, the pose is followed where the mask is white and the video
is kept elsewhere: the pipeline's `video` is then that with the pose drawn into it. The reference is a latent frame
before the clip's, in the control too, where the mask is black (`entprog.models.reference_frame`); of several pictures,
which `generate` alone gives, the first one is next to the clip, as there. Without `reference` in `model.conditions`
there is no such frame. Nothing is widened.

A clip from which the pose is withheld (`diffusion.dropping`: zeros) is shown grey, and a batch from which all
references are has no frame before its clips, as that pipeline has it without `video` and without `reference_images`.
Networks that an earlier version trained see zeros in both places.

VACE's blocks run before the others and make what is added to some of those: without such a block nothing is, and the
control passes by. The first takes the control in (`proj_in`), which is no part of what it adds to it.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import WanVACETransformer3DModel
from diffusers.models.transformers.transformer_wan_vace import WanVACETransformerBlock
from torch import nn
from torch.nn.functional import interpolate

from entprog import config
from entprog.blocks import Kind, bypass, bypass_layers, kind
from entprog.errors import UserError
from entprog.media import drawing, styles
from entprog.models import loading, sources, texts
from entprog.models.inputs import CONDITIONS
from entprog.models.reference_frame import ReferenceFrameDenoiser

CLASS = "WanVACETransformer3DModel"
SIDE = 8
"""Pixels, in height and width, that a latent of Wan 2.1's VAE stands for."""
MASK_CHANNELS = SIDE * SIDE
"""Channels of the control's mask: one for each of those."""


@bypass.register
def _(module: WanVACETransformerBlock, hidden_states, encoder_hidden_states, control_hidden_states, *args, **kwargs):
    if module.proj_in is not None:
        control_hidden_states = module.proj_in(control_hidden_states) + hidden_states
    nothing = control_hidden_states * 0  # a gradient of zero, so that what is trained before the block always has one
    return nothing, control_hidden_states


@bypass_layers.register
def _(module: WanVACETransformerBlock) -> tuple[nn.Module | None, ...]:
    return (module.proj_in,)


@kind.register
def _(network: WanVACETransformer3DModel, name: str) -> Kind:
    return "control" if name.startswith("vace_blocks.") else "both"


@dataclass(frozen=True, kw_only=True)
class WanVaceDenoiser(ReferenceFrameDenoiser):
    """A Wan VACE network with its VAE and text; predicts the velocity ε - x_0."""

    FAMILY = "wan_vace"
    NETWORK = WanVACETransformer3DModel
    SEVERAL = True
    SKELETON = styles.DWPOSE
    EXPERTS = True

    @classmethod
    def other_sees(cls, network: Any, channels: int, conditions: tuple[str, ...]) -> tuple[str, ...]:
        return conditions

    @classmethod
    def sees_native(
        cls, network: Any, trained: Mapping[str, Any], settings: config.Model, there: Collection[str]
    ) -> bool:
        return bool(trained.get("native", not trained))

    @property
    def index_entries(self) -> dict[str, Any]:
        return super().index_entries | ({"withheld_as_without": True} if self.native else {})

    @classmethod
    def sees_around(cls, native: bool, vae: bool) -> bool:
        return vae

    @torch.no_grad()
    def background(self, video: torch.Tensor, person: torch.Tensor, pose: torch.Tensor) -> dict[str, torch.Tensor]:
        """`background` [B, C + 64, F', H', W']: latents of what is kept of the video, grey elsewhere, and the mask; and
        `pose`, drawn where the mask is white, grey elsewhere. The mask of a clip without a person is white all over."""
        person = person.to(self.device)
        person = person | ~person.flatten(1).any(1).view(-1, 1, 1, 1)
        white = person.unsqueeze(1).float()
        pixels = video.to(self.device).movedim(-1, 1).float() / 127.5 - 1
        drawn = drawing.draw(pose.to(self.device), *video.shape[2:4], self.skeleton).transpose(1, 2)
        kept, followed = self.latents(pixels * (1 - white)), self.latents(drawn * white)
        mask = white[:, 0].unflatten(3, (-1, SIDE)).unflatten(2, (-1, SIDE))  # [B, F, H', 8, W', 8]
        mask = mask.permute(0, 3, 5, 1, 2, 4).flatten(1, 2)
        mask = interpolate(mask, size=kept.shape[2:], mode="nearest-exact")
        return {"background": torch.cat([kept, mask], dim=1), "pose": followed}

    @torch.no_grad()
    def with_others(self, reference: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        more = [self.latents(self._pixels(picture)).expand_as(reference) for picture in others.unbind(1)]
        return torch.cat([reference, *more], dim=1)

    def predict(self, noisy: torch.Tensor, t: torch.Tensor, conditions: dict[str, torch.Tensor]) -> torch.Tensor:
        pose, latents, channels = conditions["pose"], noisy, noisy.shape[1]
        first = conditions["reference"][:, :, 0] if "reference" in self.conditions else None
        if self.native:  # zeros are what is withheld: latents of a picture never are
            pose = torch.where(pose.flatten(1).any(1).view(-1, 1, 1, 1, 1), pose, self.nothing(pose))
            first = first if first is not None and first.any() else None
        around = conditions.get("background")
        if around is None:
            around = torch.cat([self.nothing(noisy), pose.new_ones(1).expand(_mask(pose))], dim=1)
        control = torch.cat([around[:, :channels], pose, around[:, channels:]], dim=1)
        if first is not None:
            reference = first.unflatten(1, (-1, channels)).flip(1).transpose(1, 2)
            latents = self.led(noisy, reference, t)
            zeros = reference.new_zeros(1)
            before = [reference, zeros.expand_as(reference), zeros.expand(_mask(reference))]
            control = torch.cat([torch.cat(before, dim=1), control], dim=2)
        with self.in_its_type():
            (velocity,) = self.network(
                hidden_states=latents,
                timestep=self.process.timestep(t),
                encoder_hidden_states=texts.spread(conditions.get("text", self.text), len(noisy)),
                control_hidden_states=control,
                return_dict=False,
            )
        return velocity[:, :, -noisy.shape[2] :].float()

    def outside(self) -> dict[str, list[nn.Parameter]]:
        """Parameters outside blocks as in every family, but conditions enter through the control's embedding alone."""
        groups = super().outside()
        conditions = list(self.network.vace_patch_embedding.parameters())
        known = {id(p) for p in conditions}
        return {
            "conditions": conditions,
            "rest": [p for group in groups.values() for p in group if id(p) not in known],
        }

    @classmethod
    def new_inputs(cls, channels: int, conditions: tuple[str, ...]) -> dict[str, int]:
        return {"in_channels": channels, "vace_in_channels": 2 * channels + MASK_CHANNELS}

    @classmethod
    def planned_inputs(cls, network: Any, about: dict[str, Any], channels: int, settings: config.Model, index=None):
        if "pose" not in settings.conditions:
            raise UserError("model.conditions: a VACE network's control video is the drawn pose; add pose")
        if left_out := [name for name in about.get("conditions", ()) if name not in settings.conditions]:
            names = ", ".join(left_out)
            raise UserError(f"model.conditions: {settings.base} was trained with {names} too; add that")
        if network.vace_in_channels != 2 * channels + MASK_CHANNELS:
            raise UserError(
                f"vace_in_channels must be {2 * channels + MASK_CHANNELS} (latents twice, and a mask of "
                f"{MASK_CHANNELS}), given {network.vace_in_channels}"
            )
        return tuple(name for name in CONDITIONS if name in settings.conditions), (network.in_channels,)


def _mask(latents: torch.Tensor) -> tuple[int, ...]:
    """Size of the control's mask beside its latents [B, C, F', H', W']."""
    return len(latents), MASK_CHANNELS, *latents.shape[2:]


DENOISER = WanVaceDenoiser
inspect = partial(sources.inspect, DENOISER)
files = partial(sources.files, DENOISER)
load = partial(loading.load, DENOISER)
encoder = partial(loading.encoder, DENOISER)
