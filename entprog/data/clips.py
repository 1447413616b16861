"""What a training step is fed: clips as they leave the decoder, and latents as the network sees them."""

from dataclasses import dataclass

import torch
from torch.nn.functional import avg_pool2d

from entprog.config import ClipShape


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
    """float32 [B, F, 33 or 133, 3] (`media.wholebody`): x, y in 0..1 of the frame, visibility 0..1."""
    position: torch.Tensor
    """int64 [B], on the CPU: each clip's place in the run's endless sequence of clips; seeds its noise and timestep."""
    mask: torch.Tensor | None = None
    """bool [B, F, H, W]: where the person is; nowhere in a clip whose mask is not known. None: of no clip is it."""

    def part(self, rows: slice) -> "Clips":
        """Some of the batch's clips."""
        return Clips(*(None if value is None else value[rows] for value in vars(self).values()))

    def resized(self, shape: ClipShape) -> "Clips":
        """These clips at a smaller shape: the frames in their middle, and the mean over whole areas of pixels.

        What they show stays where it was, so that poses, which are fractions of the frame, need no change. Itself
        where `shape` is its own. shape: of `config.Smaller.of`: heights and widths divide evenly.
        """
        frames, height = self.video.shape[1], self.reference.shape[1]
        if (frames, height) == (shape.frames, shape.height):
            return self
        first = (frames - shape.frames) // 2
        middle = slice(first, first + shape.frames)
        shrink = height // shape.height
        video = _shrunk_planes(self.video[:, middle], shrink)
        reference = _shrunk(self.reference.permute(0, 3, 1, 2), shrink).permute(0, 2, 3, 1)
        mask = None if self.mask is None else _shrunk(255 * self.mask[:, middle].byte(), shrink) >= 128
        return Clips(video, reference.contiguous(), self.pose[:, middle], self.position, mask)


def _shrunk(pixels: torch.Tensor, by: int) -> torch.Tensor:
    """uint8 [B, C, H, W] → uint8 [B, C, H/by, W/by]: rounded means."""
    return avg_pool2d(pixels.float(), by).round().to(torch.uint8)


def _shrunk_planes(video: torch.Tensor, by: int) -> torch.Tensor:
    """Area means of planes Y, U, V: uint8 [B, F, H*3/2, W] → uint8 [B, F, H/by*3/2, W/by]."""
    clips, frames, rows, width = video.shape
    height = rows * 2 // 3
    luma, chroma = video.flatten(2).split((height * width, height * width // 2), dim=2)
    parts = (luma.reshape(clips, frames, height, width), chroma.reshape(clips, 2 * frames, height // 2, width // 2))
    small = torch.cat([_shrunk(part, by).reshape(clips, frames, -1) for part in parts], dim=2)
    return small.reshape(clips, frames, rows // by, width // by)


@dataclass(frozen=True)
class Latents:
    """A batch as the network sees it: clean latents (pixels in -1..1 without a VAE) and its conditions."""

    clean: torch.Tensor
    """float [B, C, F', H', W']."""
    conditions: dict[str, torch.Tensor]
    """Each float, [B, C', F', H', W']: `reference` (mostly repeated over frames), `pose` (drawn skeleton), `face`
    (what it does, with H', W' of 1). Others are [B, tokens, width]: `text` where clips have their own, `image` (tokens
    of the reference); or [B, width]: `pooled` (of the text)."""
    position: torch.Tensor
    """int64 [B], on the CPU, as in Clips."""
    pose: torch.Tensor | None = None
    """As in Clips: where face and hands are. None: not known."""

    def part(self, rows: slice | torch.Tensor) -> "Latents":
        """Some of the batch's clips, by place or by number."""
        conditions = {name: value[rows] for name, value in self.conditions.items()}
        pose = None if self.pose is None else self.pose[rows]
        return Latents(self.clean[rows], conditions, self.position[rows], pose)


@dataclass(frozen=True)
class Spent:
    """Seconds that a rank's batches have cost it."""

    wait_s: float = 0.0
    """Waiting for the stream, starting it included."""
    open_s: float = 0.0
    """The part of the waiting that passed until a stream's first batch was there."""
    copy_s: float = 0.0
    """Copying to the device; most of it happens while the step before is computed, and holds nobody up."""
    encode_s: float = 0.0
    """Encoding clips to latents on the device."""

    def since(self, before: "Spent") -> "Spent":
        """What came to it after `before`."""
        return Spent(*(now - then for now, then in zip(vars(self).values(), vars(before).values(), strict=True)))
