"""RTMW whole-body pose through rtmlib (Jiang et al., RTMPose, arXiv 2303.07399): the same interface as BlazePose here.

Of its 133 points (COCO-WholeBody) those 33 are given that BlazePose has, in BlazePose's order, so that shards and
networks need not know where a pose comes from. rtmlib fetches its networks at the first use, or takes paths to them.
"""

import sys
from collections.abc import Iterable
from contextlib import redirect_stdout

import numpy as np

from entprog.errors import UserError
from entprog.masking import one_line
from entprog.media.person import NOBODY, Person, prominent_first

_FACE, _LEFT_HAND, _RIGHT_HAND = 23, 91, 112
POINTS = np.array(
    [0]  # nose
    + [_FACE + 42, 1, _FACE + 45, _FACE + 39, 2, _FACE + 36]  # left eye: inner corner, middle, outer; right eye
    + [3, 4, _FACE + 54, _FACE + 48]  # ears, corners of the mouth
    + [5, 6, 7, 8, 9, 10]  # shoulders, elbows, wrists
    + [hand + i for i in (17, 5, 2) for hand in (_LEFT_HAND, _RIGHT_HAND)]  # knuckles: little finger, index, thumb
    + [11, 12, 13, 14, 15, 16]  # hips, knees, ankles
    + [19, 22, 17, 20]  # heels, big toes
)
"""Index in COCO-WholeBody of each of BlazePose's points."""
MIN_SCORE = 0.3
"""Least mean score of a person's body points; the scores of RTMW lie in 0..1 and a little above."""
BODY = slice(0, 17)


class RtmEstimator:
    """rtmlib's `Wholebody`, loaded once. Not picklable.

    Raises UserError when rtmlib is not installed or its networks cannot be fetched.
    """

    def __init__(self, device: str = "cpu", **networks):
        """`networks`: rtmlib's own `det`, `pose`, their input sizes, or `mode`."""
        try:
            from rtmlib import Wholebody
        except ImportError:
            raise UserError("prepare.pose=rtmlib needs rtmlib: pip install 'entprog[rtmlib]'") from None
        try:
            with redirect_stdout(sys.stderr):  # it tells what it loads
                self._model = Wholebody(backend="onnxruntime", device=device, **networks)
        except OSError as error:  # its download failed
            message = one_line(error)
            raise UserError(f"rtmlib cannot fetch its networks ({message}): fetch them once with a network") from None

    def detect(self, frame: np.ndarray) -> list[Person]:
        """People in uint8 RGB [H, W, 3]: the largest and most central first; of their boxes, not of their pose."""
        people = [_person(box) for box in self._model.det_model(_bgr(frame))]
        return prominent_first(people, *frame.shape[:2])

    def track(self, frames: Iterable[np.ndarray]) -> np.ndarray:
        """The foremost person through uint8 RGB frames [H, W, 3] → float32 [F, 33, 3], as `PoseEstimator.track`."""
        rows, where = [], None
        for frame in frames:
            height, width = frame.shape[:2]
            boxes = np.asarray(self._model.det_model(_bgr(frame)), np.float64).reshape(-1, 4)
            chosen = _chosen([_person(box) for box in boxes], where, height, width)
            where = None
            if chosen is None:
                rows.append(NOBODY)
                continue
            person, at = chosen
            points, scores = self._model.pose_model(_bgr(frame), bboxes=boxes[at : at + 1])
            if scores[0, BODY].mean() < MIN_SCORE:
                rows.append(NOBODY)
                continue
            where = person
            placed = points[0, POINTS] / (width, height)
            rows.append(np.concatenate([placed, scores[0, POINTS, None].clip(0, 1)], axis=1).astype(np.float32))
        return np.stack(rows) if rows else np.zeros((0, len(POINTS), 3), np.float32)


def _bgr(frame: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(frame[..., ::-1])


def _person(box: np.ndarray) -> Person:
    """A box as (left, top, right, bottom): its middle, and the circle that holds it."""
    left, top, right, bottom = map(float, box[:4])
    radius = np.hypot(right - left, bottom - top) / 2
    return Person(1.0, ((left + right) / 2, (top + bottom) / 2), float(radius), 0.0)


def _chosen(people: list[Person], before: Person | None, height: int, width: int) -> tuple[Person, int] | None:
    """The person who is followed, and which of the people it is; the most prominent where nobody is followed yet.

    Who is followed moves less than half of their own size between two frames.
    """
    if not people:
        return None
    best = prominent_first(people, height, width)[0]
    if before is not None:
        nearest = min(people, key=lambda person: np.hypot(*np.subtract(person.center, before.center)))
        if np.hypot(*np.subtract(nearest.center, before.center)) < before.radius:
            best = nearest
    return best, people.index(best)
