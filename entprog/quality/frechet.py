"""Fréchet distance between two sets of features: FID, FID-VID and FVD are this, each on its own network's features.

d² = |μ₁ - μ₂|² + tr(Σ₁ + Σ₂ - 2·(Σ₁·Σ₂)^½)   (Heusel et al., arXiv 1706.08500, equation 6)

With Σ = A·Aᵀ the eigenvalues of Σ₁·Σ₂ are the squared singular values of A₁ᵀ·A₂, so the last trace is their sum: no
square root of a matrix that may be singular, and fewer samples than features cost less, not more.
"""

import numpy as np


def frechet_distance(one: np.ndarray, other: np.ndarray) -> float:
    """Squared distance between features [N, D] and [M, D], in float64; covariances divide by N - 1.

    Raises ValueError for fewer than two samples or unlike widths.
    """
    if min(len(one), len(other)) < 2 or one.shape[1:] != other.shape[1:]:
        raise ValueError(f"needed are two samples or more of one width, given {one.shape} and {other.shape}")
    (mean_one, factor_one), (mean_other, factor_other) = _moments(one), _moments(other)
    overlap = np.linalg.svd(factor_one @ factor_other.T, compute_uv=False).sum()
    spread = np.square(factor_one).sum() + np.square(factor_other).sum() - 2 * overlap
    return float(max(np.square(mean_one - mean_other).sum() + spread, 0.0))


def _moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(mean [D], Aᵀ [min(N, D), D] with A·Aᵀ the covariance)."""
    values = np.asarray(features, np.float64)
    mean = values.mean(0)
    centred = (values - mean) / np.sqrt(len(values) - 1)
    return mean, centred if len(values) <= values.shape[1] else np.linalg.qr(centred, mode="r")
