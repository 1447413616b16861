"""A person in a frame, whichever estimator found them: where they are, and who of several comes first."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

POINTS = 33
"""Body points of a pose: BlazePose's, in its order."""
NOBODY = np.full((POINTS, 3), (np.nan, np.nan, 0), np.float32)
"""The pose of a frame without a person: float32 [33, 3] of x, y, visibility."""


@dataclass(frozen=True)
class Person:
    """A person the detector found, in pixels of the frame."""

    score: float
    """Confidence of the detection, 0..1."""
    center: tuple[float, float]
    """x, y of the middle of the hips."""
    radius: float
    """Radius in pixels of the circle around the hips that holds the whole body."""
    rotation_rad: float
    """Clockwise tilt of the body; 0 is upright."""


def prominent_first(people: Iterable[Person], height: int, width: int) -> list[Person]:
    """The largest and most central first."""
    middle = np.array([width, height]) / 2

    def prominence(person: Person) -> float:
        return person.radius / (1 + np.linalg.norm(person.center - middle) / np.linalg.norm(middle))

    return sorted(people, key=prominence, reverse=True)
