"""Wan-Animate (Wan 2.2): diffusers' `WanAnimateTransformer3DModel`, which takes reference and pose natively.

The reference is a latent frame of its own before the clip's, marked as given; the drawn pose has a patch embedding of
its own. Nothing is widened. As in diffusers' pipeline for its mode "animate", first segment.

The network noises and denoises the reference's frame along with the clip. Where the clip is at time t, that frame is at
(1 - t)·reference + t·ε too, whatever came before: here ε is one fixed noise, so that latents have the clip's frames
alone, and the frame's own prediction is left out of the loss.

The face video is always "no face" (-1, the pipeline's unconditional branch): clips hold no face crops. Its motion
encoder is therefore never trained. Image tokens are zeros.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from diffusers import WanAnimateTransformer3DModel
from diffusers.models.transformers.transformer_wan_animate import WanAnimateFaceBlockCrossAttention, WanTransformerBlock
from torch import nn

from entprog import config
from entprog.blocks import bypass, replaced
from entprog.diffusion.objectives import noise_like
from entprog.errors import UserError
from entprog.models import sources, texts
from entprog.models.geometry import Geometry
from entprog.models.inputs import CONDITIONS
from entprog.models.wan import WanDenoiser

CLASS = "WanAnimateTransformer3DModel"
MASK_CHANNELS = 4


@bypass.register
def _(module: WanTransformerBlock, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    return hidden_states


@bypass.register
def _(module: WanAnimateFaceBlockCrossAttention, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    return torch.zeros_like(hidden_states)  # the network adds its input to what it gives


@dataclass(frozen=True, kw_only=True)
class WanAnimateDenoiser(WanDenoiser):
    """A Wan-Animate network with its VAE and text; predicts the velocity ε - x_0."""

    FAMILY = "wan_animate"
    NETWORK = WanAnimateTransformer3DModel
    MORE: ClassVar[dict[str, tuple[str, str]]] = {}

    grey: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict, repr=False)
    """Latents of a grey clip, by its size in pixels."""

    @classmethod
    def own_conditions(cls, network: Any, channels: int) -> tuple[str, ...]:
        return ()

    @property
    def mask_channels(self) -> int:
        return 0  # its reference is a frame of its own

    @classmethod
    def needs(cls, network: Any, channels: int, conditions: tuple[str, ...], inputs: int) -> tuple[str, ...]:
        return ()

    def predict(self, noisy: torch.Tensor, t: torch.Tensor, conditions: dict[str, torch.Tensor]) -> torch.Tensor:
        reference, pose = conditions["reference"][:, :, :1], conditions["pose"]
        first, _ = self.process.pair(reference, _fixed_noise(reference), t)
        latents = torch.cat([first, noisy], dim=2)
        given = torch.cat([reference, self._nothing(noisy)], dim=2)
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

    @torch.no_grad()
    def _nothing(self, like: torch.Tensor) -> torch.Tensor:
        """Latents of a grey clip, where the pipeline has an earlier segment's frames."""
        if self.vae is None:
            return torch.zeros_like(like)
        frames, spatial = 1 + (like.shape[2] - 1) * self._geometry.temporal, self._geometry.spatial
        size = (1, 3, frames, like.shape[3] * spatial, like.shape[4] * spatial)
        if size not in self.grey:
            self.grey[size] = self.latents(torch.zeros(size, device=like.device))
        return self.grey[size].expand(len(like), -1, -1, -1, -1)

    def outside(self) -> dict[str, list[nn.Parameter]]:
        """Parameters outside blocks as in every family, without the motion encoder's, which are never trained."""
        groups = super().outside()
        conditions = list(self.network.pose_patch_embedding.parameters())
        left_out = {id(p) for p in (*conditions, *self.network.motion_encoder.parameters())}
        rest = [p for p in groups["rest"] if id(p) not in left_out]
        return {"conditions": groups["conditions"] + conditions, "rest": rest}

    @classmethod
    def geometry(cls, network: Any, vae: nn.Module | None) -> Geometry:
        return Geometry.of(vae, network.patch_size, longest=network.rope_max_seq_len - 1)

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
    def planned_inputs(cls, network: Any, about: dict[str, Any], channels: int, settings: config.Model):
        if set(settings.conditions) != set(CONDITIONS):
            raise UserError(f"model.conditions: Wan-Animate takes {' and '.join(CONDITIONS)}, both natively; give both")
        return CONDITIONS, (network.in_channels,)

    @classmethod
    def initialise(cls, network: nn.Module) -> None:
        motion = {name: value.clone() for name, value in network.motion_encoder.state_dict().items()}
        super().initialise(network)
        network.motion_encoder.load_state_dict(motion)


def _fixed_noise(frame: torch.Tensor) -> torch.Tensor:
    """One noise for every clip, [B, C, 1, H', W']."""
    return noise_like(frame[:1], torch.zeros(1, dtype=torch.int64), seed=0).expand_as(frame)


inspect = partial(sources.inspect, WanAnimateDenoiser)
files = partial(sources.files, WanAnimateDenoiser)
load = partial(sources.load, WanAnimateDenoiser)
