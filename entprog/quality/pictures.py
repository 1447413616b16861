"""Likeness of two clips frame by frame, by torchmetrics: PSNR, SSIM, MS-SSIM.

It is imported by whoever measures: with it come transformers and scipy, which take seconds.
"""

import torch

PSNR_LIMIT = 100.0
"""Decibel given to frames that are equal, which have no finite PSNR."""
MS_SSIM_SIDE = 161
"""Least height and width for MS-SSIM: an 11-pixel window at the fifth scale."""
SSIM_SIDE = 11


def psnr(result: torch.Tensor, truth: torch.Tensor) -> float:
    """Mean over frames of 10·log₁₀(1 / mean squared error), at most PSNR_LIMIT; uint8 [F, 3, H, W]."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    ratio = peak_signal_noise_ratio(*_unit(result, truth), data_range=1.0, dim=(1, 2, 3), reduction="none")
    return float(ratio.clamp(max=PSNR_LIMIT).mean())


def ssim(result: torch.Tensor, truth: torch.Tensor) -> float:
    """Mean structural similarity over frames (Gaussian window of 11 pixels, σ 1.5); uint8 [F, 3, H, W]."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    return float(structural_similarity_index_measure(*_unit(result, truth), data_range=1.0))


def ms_ssim(result: torch.Tensor, truth: torch.Tensor) -> float:
    """Mean multi-scale structural similarity over frames; uint8 [F, 3, H, W] of MS_SSIM_SIDE pixels or more."""
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    return float(multiscale_structural_similarity_index_measure(*_unit(result, truth), data_range=1.0))


def _unit(*clips: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """0..1 in float64: SSIM subtracts squares of means, which in float32 makes equal flat pictures differ."""
    return tuple(clip.double() / 255 for clip in clips)
