"""Where a video cuts from one shot to the next.

A cut changes the whole picture between two frames: by much, and by far more than the frames around it change, which
tells it from a fast dance or a shaking camera. (PySceneDetect's adaptive detector rests on the same two thoughts.)
Slow dissolves are not found.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np

SIZE = (36, 64)
"""Height and width of the pictures that are compared: small enough that a moving body changes little of them."""
AROUND = 4
"""Changes on each side that a cut is compared with."""
STANDS_OUT = 3.0
"""Times the median change around it."""


def changes(pictures: Iterable[np.ndarray]) -> np.ndarray:
    """Mean absolute change between neighbouring pictures uint8 [H, W, 3], in levels: float32 [T - 1]."""
    out, before = [], None
    for picture in pictures:
        now = picture.astype(np.int16)
        if before is not None:
            out.append(np.abs(now - before).mean())
        before = now
    return np.array(out, np.float32)


def cuts(change: np.ndarray, least: float | None) -> list[int]:
    """First frames of new shots. `change[i]` lies between frames i and i + 1; None: no cuts."""
    if least is None:
        return []
    found = []
    for i in np.flatnonzero(change >= least):
        around = np.concatenate([change[max(0, i - AROUND) : i], change[i + 1 : i + 1 + AROUND]])
        if not len(around) or change[i] >= STANDS_OUT * np.median(around):
            found.append(int(i) + 1)
    return found


def spans(total: int, cuts: Sequence[int]) -> list[range]:
    """The shots of `total` frames."""
    return [range(start, stop) for start, stop in pairwise([0, *(cut for cut in cuts if cut < total), total])]
