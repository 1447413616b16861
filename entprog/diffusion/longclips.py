"""Clips longer than a network was trained on: overlapping windows that are denoised together.

At every step each window is predicted on its own, and where windows overlap their predictions are mixed with weights
that rise and fall along the overlap (MultiDiffusion, arXiv 2302.08113, over time as in Gen-L-Video, arXiv 2305.18264).
There is one latent a frame, so two windows can never disagree about it.
"""

from collections.abc import Callable

import torch


def windows(total: int, length: int, overlap: int) -> list[slice]:
    """Windows of `length` latent frames over 0..total, each overlapping the one before by `overlap` or more.

    The last one ends with the clip. One window where the clip is no longer than that.
    """
    if not 0 <= overlap < length:
        raise ValueError(f"windows of {length} latent frames cannot overlap by {overlap}")
    if total <= length:
        return [slice(0, total)]
    starts = [*range(0, total - length, length - overlap), total - length]
    return [slice(start, start + length) for start in starts]


def weights(parts: list[slice]) -> list[torch.Tensor]:
    """What each window's prediction counts, frame by frame; they sum to 1 in every frame."""
    total = parts[-1].stop
    raw = []
    for i, part in enumerate(parts):
        length = part.stop - part.start
        rise = parts[i - 1].stop - part.start if i else 0
        fall = part.stop - parts[i + 1].start if i + 1 < len(parts) else 0
        frames = torch.arange(length) + 1.0
        up = (frames / (rise + 1)).clamp(max=1)
        down = ((length + 1 - frames) / (fall + 1)).clamp(max=1)
        raw.append(torch.minimum(up, down))
    sums = torch.zeros(total)
    for part, weight in zip(parts, raw, strict=True):
        sums[part] += weight
    return [weight / sums[part] for part, weight in zip(parts, raw, strict=True)]


def blended(
    predict: Callable[[torch.Tensor, dict[str, torch.Tensor]], torch.Tensor], length: int, overlap: int
) -> Callable[[torch.Tensor, dict[str, torch.Tensor]], torch.Tensor]:
    """`predict` (noisy [B, C, F', H', W'], conditions → prediction) for clips of any number of latent frames.

    One window: `predict` itself, bit for bit.
    """

    def whole(noisy: torch.Tensor, conditions: dict[str, torch.Tensor]) -> torch.Tensor:
        total = noisy.shape[2]
        parts = windows(total, length, overlap)
        if len(parts) == 1:
            return predict(noisy, conditions)
        out = torch.zeros_like(noisy)
        for part, weight in zip(parts, weights(parts), strict=True):
            of_window = {name: value[:, :, part] if value.ndim == 5 else value for name, value in conditions.items()}
            out[:, :, part] += weight.to(out).view(-1, 1, 1) * predict(noisy[:, :, part], of_window)
        return out

    return whole
