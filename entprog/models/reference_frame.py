"""Networks of Wan's that have the reference as a latent frame of its own before the clip's: Wan-Animate and VACE.

They noise and denoise that frame along with the clip. Where the clip is at time t, it is at (1 - t)·reference + t·ε
too, whatever came before: here ε is one fixed noise, so that latents have the clip's frames alone, and the frame's own
prediction is left out of the loss.
"""

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import nn

from entprog.diffusion import beside
from entprog.diffusion.objectives import noise_like
from entprog.models.geometry import Geometry
from entprog.models.wan import WanDenoiser


@dataclass(frozen=True, kw_only=True)
class ReferenceFrameDenoiser(WanDenoiser):
    """A network that sees the reference as a frame before the clip's."""

    EXPERTS: ClassVar[bool] = False
    MORE: ClassVar[dict[str, tuple[str, str]]] = {}

    grey: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict, repr=False)
    """Latents of a grey clip, by its size in pixels."""

    @classmethod
    def own_conditions(cls, network: Any, channels: int) -> tuple[str, ...]:
        return ()

    @property
    def mask_channels(self) -> int:
        return 0

    @classmethod
    def form_of(cls, splits: tuple[int, ...], channels: int, conditions: tuple[str, ...]) -> str:
        return ""

    def led(self, noisy: torch.Tensor, reference: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """A noisy clip [B, C, F', H', W'] at times t [B] after its reference [B, C, 1, H', W'], noised alike."""
        first, _ = self.process.pair(reference, _fixed_noise(reference), t)
        return torch.cat([first, noisy], dim=2)

    @torch.no_grad()
    def nothing(self, like: torch.Tensor) -> torch.Tensor:
        """Latents of a grey clip, where a pipeline has frames of a video that is not there."""
        if self.vae is None:
            return torch.zeros_like(like)
        frames, spatial = 1 + (like.shape[2] - 1) * self._geometry.temporal, self._geometry.spatial
        size = (1, 3, frames, like.shape[3] * spatial, like.shape[4] * spatial)
        if size not in self.grey:
            with beside.at_hand(self):  # where every batch is cached the VAE waits on the host
                self.grey[size] = self.latents(torch.zeros(size, device=like.device))
        return self.grey[size].expand(len(like), -1, -1, -1, -1)

    @classmethod
    def geometry(cls, network: Any, vae: nn.Module | None) -> Geometry:
        return Geometry.of(vae, network.patch_size, longest=network.rope_max_seq_len - 1)


def _fixed_noise(frame: torch.Tensor) -> torch.Tensor:
    """One noise for every clip, [B, C, 1, H', W'], equal on every kind of device."""
    return _drawn(tuple(frame.shape[1:]), frame.device).to(frame.dtype).expand_as(frame)


@lru_cache(maxsize=8)
def _drawn(size: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """That noise [1, C, 1, H', W'], float32. Generators of CPUs and GPUs differ: it is drawn on the CPU, once."""
    with torch.inference_mode(False):
        return noise_like(torch.empty(1, *size), torch.zeros(1, dtype=torch.int64), seed=0).to(device)
