"""A person in a frame, whichever estimator found them: where they are, and who of several comes first."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

POINTS = 33
"""Body points of a pose: BlazePose's, in its order."""


def nobody(points: int = POINTS) -> np.ndarray:
    """The pose of a frame without a person: float32 [points, 3] of x, y, visibility."""
    return np.full((points, 3), (np.nan, np.nan, 0), np.float32)


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


def distance(one: Person, other: Person) -> float:
    """Between the middles of their hips, in pixels."""
    return float(np.hypot(*np.subtract(one.center, other.center)))


def may_be(person: Person, before: Person) -> bool:
    """Whether it may be who was there a frame before: they move less than half of their own size between two frames."""
    return distance(person, before) < before.radius


def followed(people: list[Person], before: Person | None, height: int, width: int) -> tuple[Person, int] | None:
    """The person who is followed, and which of the people it is; the most prominent where nobody is followed yet.

    None where who was followed is not among them: another person must not go on in their place.
    """
    if not people:
        return None
    if before is None:
        best = prominent_first(people, height, width)[0]
    else:
        best = min(people, key=lambda person: distance(person, before))
        if not may_be(best, before):
            return None
    return best, people.index(best)


def of_box(left: float, top: float, right: float, bottom: float) -> Person:
    """Who a box surrounds, in pixels: its middle, and the circle that holds it."""
    return Person(1.0, ((left + right) / 2, (top + bottom) / 2), float(np.hypot(right - left, bottom - top)) / 2, 0.0)
