"""Arithmetic on loss curves: pairs (place, loss) with rising places, straight lines between them."""

import itertools
import math
from collections.abc import Sequence

import numpy as np

Curve = Sequence[tuple[float, float]]


def at(curve: Curve, place: float) -> float:
    """The loss at a place; outside the curve that of its nearest end."""
    places, losses = zip(*curve, strict=True)
    return float(np.interp(place, places, losses))


def crossing(curve: Curve, target: float) -> float | None:
    """Where a curve first comes down to a loss; None: never. A loss that is no number is no measurement."""
    points = [(place, loss) for place, loss in curve if math.isfinite(loss)]
    if points and points[0][1] <= target:
        return float(points[0][0])
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if y1 <= target:
            return x0 + (x1 - x0) * (y0 - target) / (y0 - y1)
    return None
