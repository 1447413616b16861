"""Where a video cuts from one shot to the next.

A cut changes the whole picture between two frames: by much, and by far more than the frames around it change, which
tells it from a fast dance or a shaking camera. (PySceneDetect's adaptive detector rests on the same two thoughts.)
Slow dissolves are not found. Where a file's time stamps start again, or numbers of a folder's images are missing, there
is a cut, whatever it shows.
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


def changes(pictures: Iterable[tuple[int, np.ndarray]]) -> np.ndarray:
    """Mean absolute change between neighbouring pictures (part, uint8 [H, W, 3]), in levels: float32 [T - 1].

    Infinite between pictures of two parts (`footage.thumbnails`).
    """
    out, before, last = [], None, 0
    for part, picture in pictures:
        now = picture.astype(np.int16)
        if before is not None:
            out.append(np.abs(now - before).mean() if part == last else np.inf)
        before, last = now, part
    return np.array(out, np.float32)


def cuts(change: np.ndarray, least: float | None) -> list[int]:
    """First frames of new shots. `change[i]` lies between frames i and i + 1; None: only infinite ones are cuts."""
    found = []
    for i in np.flatnonzero(change >= (np.inf if least is None else least)):
        around = np.concatenate([change[max(0, i - AROUND) : i], change[i + 1 : i + 1 + AROUND]])
        if not len(around) or np.isinf(change[i]) or change[i] >= STANDS_OUT * np.median(around):
            found.append(int(i) + 1)
    return found


def spans(total: int, cuts: Sequence[int]) -> list[range]:
    """The shots of `total` frames."""
    return [range(start, stop) for start, stop in pairwise([0, *(cut for cut in cuts if cut < total), total])]
