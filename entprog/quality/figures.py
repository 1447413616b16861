"""From values of clips to a figure with its confidence interval: bootstrap over clips (Efron 1979).

Clips are drawn with replacement, whole: frames of one clip are no independent samples.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from entprog.quality.frechet import frechet_distance


@dataclass(frozen=True)
class Figure:
    """One number about a set of clips."""

    value: float
    low: float | None
    """Ends of the confidence interval; None for fewer than two clips."""
    high: float | None
    clips: int


def mean_figure(values: Sequence[float], replicates: int, confidence: float, seed: int) -> Figure:
    """Mean over clips, with the percentiles of the replicates' means. NaN: the clip has no such value and is left out.

    Raises ValueError if no clip has one.
    """
    kept = np.asarray(values, np.float64)
    kept = kept[np.isfinite(kept)]
    if not len(kept):
        raise ValueError("no clip has this value")
    low, high = _interval(lambda rows: kept[rows].mean(), len(kept), replicates, confidence, seed) or (None, None)
    return Figure(float(kept.mean()), low, high, len(kept))


def frechet_figure(
    real: Sequence[np.ndarray], made: Sequence[np.ndarray], replicates: int, confidence: float, seed: int
) -> Figure:
    """Fréchet distance of all clips' features ([rows of a clip, D] each), both sides of a clip drawn together.

    A replicate holds fewer distinct clips than the set, which alone makes the distance larger. Its percentiles are
    therefore moved by the difference between the replicates' mean and the value.
    """
    value = frechet_distance(np.concatenate(list(real)), np.concatenate(list(made)))

    def replicate(rows: np.ndarray) -> float:
        return frechet_distance(np.concatenate([real[i] for i in rows]), np.concatenate([made[i] for i in rows]))

    found = _interval(replicate, len(real), replicates, confidence, seed, around=value)
    low, high = found or (None, None)
    return Figure(value, low and max(low, 0.0), high, len(real))


def _interval(
    statistic: Callable[[np.ndarray], float],
    count: int,
    replicates: int,
    confidence: float,
    seed: int,
    around: float | None = None,
) -> tuple[float, float] | None:
    if count < 2 or not replicates:
        return None
    draws = np.random.default_rng(seed).integers(count, size=(replicates, count))
    values = np.array([statistic(rows) for rows in draws])
    if around is not None:
        values += around - values.mean()
    tail = (1 - confidence) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)
