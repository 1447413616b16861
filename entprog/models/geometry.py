"""Which clip shapes fit a network and its VAE, and what latents they give."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from entprog.config import ClipShape
from entprog.errors import UserError
from entprog.models import vaes


@dataclass(frozen=True)
class Geometry:
    """Which clip shapes fit, from the configurations of network and VAE alone."""

    temporal: int
    """Clip frames per latent frame, after the first."""
    step: int
    """Clips have a multiple of this many frames after the first."""
    spatial: int
    """Pixels per latent row or column."""
    patch: tuple[int, int, int]
    """Latent frames, rows and columns of a patch."""
    longest: float = math.inf
    """Most patches along one side."""
    most_frames: float = math.inf
    """Most latent frames."""
    only: tuple[int, int] | None = None
    """Latent rows and columns, where no others fit."""

    @classmethod
    def of(cls, vae: nn.Module | None, patch: Sequence[int] = (1, 1, 1), **limits) -> "Geometry":
        """vae: may be on the meta device; None: pixels."""
        temporal, spatial = (1, 1) if vae is None else vaes.factors(vae)
        step = 1 if vae is None else vaes.frame_step(vae)
        return cls(temporal, step, spatial, tuple(patch), **limits)

    def latent_frames(self, frames: int) -> int:
        return 1 + (frames - 1) // self.temporal

    def whole_frames(self, frames: int) -> int:
        """The most clip frames, up to so many, that the VAE takes."""
        return frames - (frames - 1) % self.step

    def latents(self, shape: ClipShape) -> tuple[int, int, int]:
        """Clip shape → F', H', W'."""
        return self.latent_frames(shape.frames), shape.height // self.spatial, shape.width // self.spatial

    def stream(self, layer: nn.Module, shape: ClipShape) -> tuple[int, int] | None:
        """Tokens of a clip and their width, as a transformer's blocks hand them on, text not among them. layer: cuts
        latents into patches. None: blocks hand on other things, as a U-Net's do."""
        patch = math.prod(getattr(layer, "stride", ()))
        if patch == 1 or patch != math.prod(self.patch):
            return None
        return math.prod(self.latents(shape)) // patch, layer.out_channels

    def check(self, shape: ClipShape, given: bool = False) -> None:
        """Raises UserError if clips of this shape do not fit. given: whether their first latent frame is."""
        if (shape.frames - 1) % self.step:
            fewer = self.whole_frames(shape.frames)
            raise UserError(
                f"data.shape.frames must be {self.step}n+1 with this VAE, given {shape.frames}: "
                f"take {fewer} or {fewer + self.step}"
            )
        for name, pixels, patch in (("height", shape.height, self.patch[1]), ("width", shape.width, self.patch[2])):
            if pixels % (self.spatial * patch):
                raise UserError(
                    f"data.shape.{name} must be a multiple of {self.spatial * patch} for this network "
                    f"(VAE {self.spatial} x patch {patch}), given {pixels}"
                )
        latents = self.latents(shape)
        if given and latents[0] == 1:
            raise UserError(
                f"data.shape.frames: {shape.frames} frames are one latent frame, which the reference gives this "
                f"network: there is nothing to learn; take {1 + self.step} or more, or leave reference out of "
                "model.conditions"
            )
        if latents[0] % self.patch[0]:
            raise UserError(
                f"data.shape.frames: {shape.frames} frames are {latents[0]} latent frames, not a multiple of this "
                f"network's patch of {self.patch[0]}"
            )
        if latents[0] > self.most_frames:
            raise UserError(
                f"data.shape.frames: {shape.frames} frames are {latents[0]} latent frames, this network has positions "
                f"for {self.most_frames:g}"
            )
        if self.only not in (None, latents[1:]):
            rows, columns = (size * self.spatial for size in self.only)
            raise UserError(f"data.shape: {shape}, but this network has positions for {columns}x{rows} alone")
        if max(size // patch for size, patch in zip(latents, self.patch, strict=True)) > self.longest:
            raise UserError(
                f"data.shape: {shape} is more than {self.longest:g} patches along one side, this network's most"
            )
