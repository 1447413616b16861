"""Wan VACE (Wan 2.1, and VACE-Fun of Wan 2.2 with two experts): diffusers' `WanVACETransformer3DModel`, which is
controlled by a video in blocks of its own.

The control video is the drawn pose, all of it to be followed (VACE's mask is white), and nothing of a video is kept: as
`WanVACEPipeline(video=pose, reference_images=reference)` feeds its network, within 1e-4. The reference is a latent
frame before the clip's, in the control too, where the mask is black (`entprog.models.reference_frame`); without
`reference` in `model.conditions` there is no such frame. Nothing is widened.

VACE's blocks run before the others and make what is added to some of those: without such a block nothing is, and the
control passes by. The first takes the control in (`proj_in`), which is no part of what it adds to it.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import WanVACETransformer3DModel
from diffusers.models.transformers.transformer_wan_vace import WanVACETransformerBlock
from torch import nn

from entprog import config
from entprog.blocks import Kind, bypass, kind
from entprog.errors import UserError
from entprog.media import styles
from entprog.models import loading, sources, texts
from entprog.models.inputs import CONDITIONS
from entprog.models.reference_frame import ReferenceFrameDenoiser

CLASS = "WanVACETransformer3DModel"
MASK_CHANNELS = 64
"""Channels of the control's mask: pixels that a latent stands for, 8×8 with Wan 2.1's VAE."""


@bypass.register
def _(module: WanVACETransformerBlock, hidden_states, encoder_hidden_states, control_hidden_states, *args, **kwargs):
    if module.proj_in is not None:
        control_hidden_states = module.proj_in(control_hidden_states) + hidden_states
    nothing = control_hidden_states * 0  # a gradient of zero, so that what is trained before the block always has one
    return nothing, control_hidden_states


@kind.register
def _(network: WanVACETransformer3DModel, name: str) -> Kind:
    return "control" if name.startswith("vace_blocks.") else "both"


@dataclass(frozen=True, kw_only=True)
class WanVaceDenoiser(ReferenceFrameDenoiser):
    """A Wan VACE network with its VAE and text; predicts the velocity ε - x_0."""

    FAMILY = "wan_vace"
    NETWORK = WanVACETransformer3DModel
    SKELETON = styles.DWPOSE
    EXPERTS = True
    TEXT_PIPELINE = "WanVACEPipeline"

    @classmethod
    def other_sees(cls, network: Any, channels: int, conditions: tuple[str, ...]) -> tuple[str, ...]:
        return conditions

    def predict(self, noisy: torch.Tensor, t: torch.Tensor, conditions: dict[str, torch.Tensor]) -> torch.Tensor:
        pose, latents = conditions["pose"], noisy
        control = torch.cat([self.nothing(noisy), pose, pose.new_ones(1).expand(_mask(pose))], dim=1)
        if "reference" in self.conditions:
            reference = conditions["reference"][:, :, :1]
            latents = self.led(noisy, reference, t)
            zeros = reference.new_zeros(1)
            first = [reference, zeros.expand_as(reference), zeros.expand(_mask(reference))]
            control = torch.cat([torch.cat(first, dim=1), control], dim=2)
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
        """Parameters outside blocks as in every family; the control's embedding is of the conditions too."""
        groups = super().outside()
        conditions = list(self.network.vace_patch_embedding.parameters())
        rest = [p for p in groups["rest"] if id(p) not in {id(c) for c in conditions}]
        return {"conditions": groups["conditions"] + conditions, "rest": rest}

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


inspect = partial(sources.inspect, WanVaceDenoiser)
files = partial(sources.files, WanVaceDenoiser)
load = partial(loading.load, WanVaceDenoiser)
encoder = partial(loading.encoder, WanVaceDenoiser)
