"""What a training step is fed: clips as they leave the decoder, and latents as the network sees them."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Clips:
    """A batch of B decoded clips of one shape, F frames of H×W pixels.

    Video stays uint8 YUV 4:2:0 until the training device: half the bytes of RGB, and no conversion on the CPU.
    """

    video: torch.Tensor
    """uint8 [B, F, H*3/2, W]: planes Y, U, V stacked (`media.color`)."""
    reference: torch.Tensor
    """uint8 [B, H, W, 3] RGB: the reference image."""
    pose: torch.Tensor
    """float32 [B, F, 33, 3]: x, y in 0..1 of the frame, visibility 0..1."""
    position: torch.Tensor
    """int64 [B], on the CPU: each clip's place in the run's endless sequence of clips; seeds its noise and timestep."""


@dataclass(frozen=True)
class Latents:
    """A batch as the network sees it: clean latents (pixels in -1..1 without a VAE) and its conditions."""

    clean: torch.Tensor
    """float [B, C, F', H', W']."""
    conditions: dict[str, torch.Tensor]
    """Each float, [B, C, F', H', W']: `reference` (repeated over frames), `pose` (drawn skeleton)."""
    position: torch.Tensor
    """int64 [B], on the CPU, as in Clips."""

    def part(self, rows: slice) -> "Latents":
        """Some of the batch's clips."""
        conditions = {name: value[rows] for name, value in self.conditions.items()}
        return Latents(self.clean[rows], conditions, self.position[rows])
