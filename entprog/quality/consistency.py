"""Whether frames stay like the reference image, and like each other: cosines of features of whole frames, which are
mostly of the background where the person is small.
"""

import numpy as np


def identity(frames: np.ndarray, reference: np.ndarray) -> float:
    """Mean cosine between each frame's features [F, D] and the reference image's [D]."""
    return float(_cosine(frames, reference[None]).mean())


def temporal(frames: np.ndarray) -> float:
    """Mean cosine between the features [F, D] of neighbouring frames; NaN for a single frame."""
    return float(_cosine(frames[1:], frames[:-1]).mean()) if len(frames) > 1 else float("nan")


def _cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1) + 1e-12)
