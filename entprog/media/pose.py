"""BlazePose: 33 body points a frame, by the two networks of `assets` on the CPU."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

POINTS = 33


@dataclass(frozen=True)
class Person:
    """A person the detector found, in pixels of the frame."""

    score: float
    """0..1."""
    center: tuple[float, float]
    """x, y of the middle of the hips."""
    radius: float
    """Of the circle around the hips that holds the whole body."""
    rotation_rad: float
    """Clockwise tilt of the body; 0 is upright."""


class PoseEstimator:
    """Detector and landmark network, loaded once. Not picklable: create it where it works.

    Raises UserError when ai-edge-litert is not installed (extra `pose`) or the networks are not in the cache.
    """

    def __init__(self, threads: int = 1):
        raise NotImplementedError

    def detect(self, frame: np.ndarray) -> list[Person]:
        """People in uint8 RGB [H, W, 3]: the largest and most central first; empty if there is nobody."""
        raise NotImplementedError

    def track(self, frames: Iterable[np.ndarray]) -> np.ndarray:
        """The foremost person through uint8 RGB frames [H, W, 3] → float32 [F, 33, 3].

        x, y in 0..1 of the frame (outside it for points out of sight), visibility 0..1. Rows of frames in which
        nobody was found: x, y NaN, visibility 0.
        """
        raise NotImplementedError


def found(points: np.ndarray) -> np.ndarray:
    """[F, 33, 3] → bool [F]: frames in which a person was found."""
    return np.isfinite(points[..., :2]).all(axis=(-1, -2))


def body_box(points: np.ndarray, min_visibility: float = 0.5) -> tuple[float, float, float, float] | None:
    """Smallest box around the visible points of all frames: left, top, right, bottom in 0..1 of the frame, inside it.

    None when no point is visible. The head's top and the toes lie a little outside: leave a margin.
    """
    raise NotImplementedError
