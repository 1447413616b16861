"""From values of clips to a figure with its confidence interval: bootstrap (Efron 1979) over what clips were cut from.

Sources are drawn with replacement, whole, as clusters (Davison and Hinkley 1997, §3.8): frames of one clip are no
independent samples, nor are clips of one video, which show the same person and may share frames. Where all clips are of
one source, clips are drawn; the interval then says nothing about other sources, and is too narrow where clips overlap.
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
    sources: int
    """That the clips were cut from, and that were drawn; 1: clips were drawn."""


def mean_figure(
    values: Sequence[float], replicates: int, confidence: float, seed: int, sources: Sequence[str] | None = None
) -> Figure:
    """Mean over clips, with the percentiles of the replicates' means. NaN: the clip has no such value and is left out.

    sources: what each clip was cut from; None: each from another one. Raises ValueError if no clip has a value.
    """
    given = np.asarray(values, np.float64)
    finite = np.isfinite(given)
    kept, of = given[finite], np.asarray(_each(sources, len(given)))[finite]
    if not len(kept):
        raise ValueError("no clip has this value")
    low, high = _interval(lambda rows: kept[rows].mean(), of, replicates, confidence, seed) or (None, None)
    return Figure(float(kept.mean()), low, high, len(kept), len(set(of)))


def frechet_figure(
    real: Sequence[np.ndarray],
    made: Sequence[np.ndarray],
    replicates: int,
    confidence: float,
    seed: int,
    sources: Sequence[str] | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> Figure:
    """Fréchet distance of all clips' features ([rows of a clip, D] each), both sides of a clip drawn together.

    sources: as `mean_figure` has it; advance: called with 1 after every replicate.

    A replicate holds fewer distinct clips than the set, which alone makes the distance larger. Its percentiles are
    therefore moved by the difference between the replicates' mean and the value.
    """
    value = frechet_distance(np.concatenate(list(real)), np.concatenate(list(made)))

    def replicate(rows: np.ndarray) -> float:
        found = frechet_distance(np.concatenate([real[i] for i in rows]), np.concatenate([made[i] for i in rows]))
        advance(1)
        return found

    of = np.asarray(_each(sources, len(real)))
    found = _interval(replicate, of, replicates, confidence, seed, around=value)
    low, high = found or (None, None)
    return Figure(value, low and max(low, 0.0), high, len(real), len(set(of)))


def _each(sources: Sequence[str] | None, clips: int) -> Sequence[str]:
    return [str(i) for i in range(clips)] if sources is None else sources


def _interval(
    statistic: Callable[[np.ndarray], float],
    sources: np.ndarray,
    replicates: int,
    confidence: float,
    seed: int,
    around: float | None = None,
) -> tuple[float, float] | None:
    """sources: of each clip."""
    if len(sources) < 2 or not replicates:
        return None
    names, place = np.unique(sources, return_inverse=True)
    drawn = (
        [np.flatnonzero(place == i) for i in range(len(names))] if len(names) > 1 else np.arange(len(sources))[:, None]
    )
    draws = np.random.default_rng(seed).integers(len(drawn), size=(replicates, len(drawn)))
    values = np.array([statistic(np.concatenate([drawn[i] for i in draw])) for draw in draws])
    if around is not None:
        values += around - values.mean()
    tail = (1 - confidence) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)
