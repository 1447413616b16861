"""Pictures for people: contact sheets and videos side by side."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np


def contact_sheet(rows: Sequence[tuple[str, np.ndarray]], path: Path, columns: int = 8) -> Path:
    """Write a PNG: a row per (label, uint8 RGB [F, H, W, 3]), at most `columns` frames spread evenly. Atomic."""
    raise NotImplementedError


def side_by_side(parts: Sequence[tuple[str, np.ndarray]]) -> np.ndarray:
    """Clips next to each other under their titles: uint8 RGB [F, H', W', 3], even sizes; tiny ones are enlarged.

    All [F, H, W, 3] with one F and H.
    """
    raise NotImplementedError


def overlay(frames: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Skeletons (float [F, 33, 3]) drawn over uint8 RGB [F, H, W, 3] → uint8 RGB, same shape."""
    raise NotImplementedError
