"""The protocol that every model family fulfils: what training, scoring and sampling ask of a network."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import nn

from entprog.config import ClipShape, Skeleton
from entprog.data.clips import Clips, Latents
from entprog.diffusion.processes import Process
from entprog.media.faces import Faces


class Denoiser(Protocol):
    """A network with everything that turns clips into its inputs and its output into a loss.

    Times are in 0..1: 0 is the clean clip, 1 is noise; `process` says what lies between, and what is predicted.
    """

    network: nn.Module
    """What is trained; its blocks are found by `entprog.blocks.blocks`."""

    conditions: tuple[str, ...]
    """What the network sees beside the noisy clip, in the order of its input channels."""

    skeleton: Skeleton
    """How poses are drawn for it (`media.drawing`)."""

    text: torch.Tensor
    """What text cross-attention sees of a clip without text of its own, float [1, tokens, width]."""

    no_text: Mapping[str, torch.Tensor]
    """What stands for a text that is withheld: `text`, as above, and what belongs to it, by name, of networks that are
    shown an encoder's texts; empty: zeros do."""

    process: Process
    """How noise and clip mix, and what the network predicts (`entprog.diffusion.processes`)."""

    time_range: tuple[float, float]
    """Times that the network is trained for: (0, 1), or the part of one of a base's two experts."""

    shift: float
    """Timestep shift for sampling; 1 where the process has none."""

    def scheduler(self, shift: float | None = None):
        """A diffusers scheduler of the checkpoint's own process. shift: instead of its own."""

    def check(self, shape: ClipShape) -> None:
        """Raises UserError if clips of this shape do not fit."""

    def whole_frames(self, frames: int) -> int:
        """The most clip frames, up to so many, that the VAE takes."""

    def latent_shape(self, shape: ClipShape) -> tuple[int, int, int, int]:
        """Clip shape → C, F', H', W' of one clip's latents."""

    def encode(self, clips: Clips) -> Latents:
        """Clips → latents and conditions on the network's device, no gradient."""

    last: bool
    """Whether the network sees the clip's last frame."""

    first: bool
    """Whether in training its reference is each clip's own first frame."""

    native: bool
    """Whether it sees all that its base's pipeline shows it, where earlier versions left something out."""

    trained_with: str
    """What it is shown in training alone, in words."""

    faces: bool
    """Whether it sees faces."""

    replaces: bool
    """Whether it sees a video that a person is put into: the condition `background`."""

    def condition(
        self,
        reference: torch.Tensor,
        pose: torch.Tensor,
        last: torch.Tensor | None = None,
        faces: Faces | None = None,
    ) -> dict[str, torch.Tensor]:
        """The conditions alone, as in `encode`: reference uint8 [B, H, W, 3], pose float [B, F, 33 or 133, 3]; last, as
        the reference: the last frame, and faces: where they are, of networks that see that."""

    def background(self, video: torch.Tensor, person: torch.Tensor, pose: torch.Tensor) -> dict[str, torch.Tensor]:
        """The condition `background`, and those that are others with it, of networks that put a person into a video
        (`replaces`): video uint8 [B, F, H, W, 3] and, bool [B, F, H, W], where in it the person is to be, who moves by
        the pose; of a clip where that is nowhere nothing is shown of it."""

    def with_others(self, reference: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """The condition `reference` with further pictures beside the first, uint8 [B, pictures, H, W, 3], of networks
        that take several (`model.family=wan_vace`)."""

    def predict(self, noisy: torch.Tensor, t: torch.Tensor, conditions: dict[str, torch.Tensor]) -> torch.Tensor:
        """ε̂ of the paper in this family's parametrisation, the target of `process.pair`: float32 [B, C, F', H', W'].

        noisy [B, C, F', H', W'] as `process.pair` mixes it, t float [B]. conditions: those of `conditions`, and `text`
        [B, tokens, width] where clips have their own.
        """

    def given(self, conditions: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor] | None:
        """What conditions say of the clip itself: (mask [B, 1, F', H', W'], 1 where latents are given; those latents).
        `predict` shows the network these whatever is noisy there, and gives 0. None: nothing."""

    def sampling(self) -> AbstractContextManager[Callable[[torch.Tensor], "Denoiser"]]:
        """While it lasts: entry of the scheduler's `timesteps` → the denoiser that predicts there, itself or the other
        one of a base's two experts."""

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents [B, C, F', H', W'] → video float [B, F, 3, H, W] in -1..1."""

    def outside(self) -> dict[str, list[nn.Parameter]]:
        """Parameters outside blocks: {"conditions": the condition input layer, "rest": all others}."""

    def save(
        self,
        folder: str | Path,
        shape: ClipShape | None = None,
        shift: float | None = None,
        parts: Literal["whole", "light"] = "whole",
        points: int | None = None,
        **record,
    ) -> None:
        """A pipeline's folder, which plain diffusers runs, with `entprog.json` beside; `load` reads it back.

        shape: the clips it was trained on; shift: timestep shift for sampling; parts: `light` names the VAE and others
        that are not trained instead of copying them; points: of the poses it was trained on, where these are not its
        base's; record: JSON values kept beside.
        """
