"""Likeness of two clips frame by frame, by torchmetrics: PSNR, SSIM, MS-SSIM.

It is imported by whoever measures: with it come transformers and scipy, which take seconds.
"""

from collections.abc import Callable

import torch

PSNR_LIMIT = 100.0
"""Decibel given to frames that are equal, which have no finite PSNR."""
MS_SSIM_SIDE = 176
"""Least height and width for MS-SSIM: torchmetrics has an 11-pixel window in a sixteenth of them."""
SSIM_SIDE = 11


def psnr(result: torch.Tensor, truth: torch.Tensor) -> float:
    """Mean over frames of 10·log₁₀(1 / mean squared error), at most PSNR_LIMIT; uint8 [F, 3, H, W]."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    return _mean(lambda *pair: peak_signal_noise_ratio(*pair, data_range=1.0).clamp(max=PSNR_LIMIT), result, truth)


def ssim(result: torch.Tensor, truth: torch.Tensor) -> float:
    """Mean structural similarity over frames (Gaussian window of 11 pixels, σ 1.5); uint8 [F, 3, H, W]."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    return _mean(lambda *pair: structural_similarity_index_measure(*pair, data_range=1.0), result, truth)


def ms_ssim(result: torch.Tensor, truth: torch.Tensor) -> float:
    """Mean multi-scale structural similarity over frames; uint8 [F, 3, H, W] of MS_SSIM_SIDE pixels or more."""
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    return _mean(lambda *pair: multiscale_structural_similarity_index_measure(*pair, data_range=1.0), result, truth)


def _mean(measure: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], *clips: torch.Tensor) -> float:
    """Of a measure of two pictures [1, 3, H, W], over the frames of two clips.

    One frame at a time: on a CPU torch lays out every window of what SSIM convolves, 2 GB for a frame of 832x480.
    In 0..1 and float64: SSIM subtracts squares of means, which in float32 makes equal flat pictures differ.
    """
    pairs = zip(*(clip.split(1) for clip in clips), strict=True)
    return float(torch.stack([measure(*(frame.double() / 255 for frame in pair)) for pair in pairs]).mean())
