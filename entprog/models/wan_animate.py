"""Wan-Animate (Wan 2.2): diffusers' `WanAnimateTransformer3DModel`, which takes reference and pose natively.

The reference is a latent frame of its own before the clip's, marked as given; the drawn pose has a patch embedding of
its own (`entprog.models.reference_frame`). Nothing is widened. As in diffusers' pipeline for its mode "animate", first
segment.

The face video is always "no face" (-1, the pipeline's unconditional branch): clips hold no face crops. Its motion
encoder is therefore never trained. Image tokens are zeros.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import WanAnimateTransformer3DModel
from diffusers.models.transformers.transformer_wan_animate import WanAnimateFaceBlockCrossAttention, WanTransformerBlock
from torch import nn

from entprog import config
from entprog.blocks import bypass, replaced
from entprog.errors import UserError
from entprog.media import styles
from entprog.models import sources, texts
from entprog.models.inputs import CONDITIONS
from entprog.models.reference_frame import ReferenceFrameDenoiser

CLASS = "WanAnimateTransformer3DModel"
MASK_CHANNELS = 4


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

    def predict(self, noisy: torch.Tensor, t: torch.Tensor, conditions: dict[str, torch.Tensor]) -> torch.Tensor:
        reference, pose = conditions["reference"][:, :, :1], conditions["pose"]
        latents = self.led(noisy, reference, t)
        given = torch.cat([reference, self.nothing(noisy)], dim=2)
        mask = torch.zeros_like(latents[:, :1]).repeat(1, MASK_CHANNELS, 1, 1, 1)
        mask[:, :, 0] = 1
        with self.in_its_type(), replaced({self.network.motion_encoder: self._no_motion}):
            (velocity,) = self.network(
                hidden_states=torch.cat([latents, mask, given], dim=1),
                timestep=self.process.timestep(t),
                encoder_hidden_states=texts.spread(conditions.get("text", self.text), len(noisy)),
                encoder_hidden_states_image=None if self.image is None else self.image.repeat(len(noisy), 1, 1),
                pose_hidden_states=pose,
                face_pixel_values=noisy.new_zeros(len(noisy), 1, 4 * (noisy.shape[2] - 1) + 1, 1, 1),
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


inspect = partial(sources.inspect, WanAnimateDenoiser)
files = partial(sources.files, WanAnimateDenoiser)
load = partial(sources.load, WanAnimateDenoiser)
encoder = partial(sources.encoder, WanAnimateDenoiser)
