"""BlazePose: 33 body points a frame, by the two networks of `assets` on the CPU.

Bazarevsky et al., BlazePose: On-device Real-time Body Pose tracking, arXiv 2006.10204. The constants are those of
MediaPipe's graphs `pose_detection` and `pose_landmark`. A detector finds the middle of the hips and a circle around
the body; a square cut out along the body's axis goes to the landmark network, which also says where to look in the
next frame, so that the detector runs only when the person is lost, and now and then to confirm that it is a person.
No smoothing over time: what is drawn is what was seen.
"""

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import numpy as np
from PIL import Image

from entprog.config import Prepare
from entprog.errors import UserError, install
from entprog.media import assets, wholebody
from entprog.media.person import POINTS, Person, may_be, nobody, prominent_first

DETECTOR_SIZE = 224
LANDMARK_SIZE = 256
HEATMAP_SIZE = 64
MIN_SCORE = 0.5
"""Least score of a detection, and of the landmark network's statement that there is a person in its square."""
MIN_OVERLAP = 0.3
"""Detections of which the boxes overlap more (intersection over union) are one person."""
APART = 0.5
"""People whose hips are nearer to each other than this share of the larger one's circle are one person."""
CHECK_SCORE = 0.55
"""Least score of a second look at just the circle's square: in the real clips over 0.68 for whole bodies, 0.54 for
heads and shoulders, under 0.4 nine times in ten for lettering that the first look takes for a person."""
PROBATION = 5
"""A person must pass that check in each of the first frames, or was none in any of them."""
CHECK_EVERY = 10
"""Frames between checks from then on."""
MARGIN = 1.25
"""Side of the square cut out for the landmark network, over the circle's diameter."""

NEEDS = {
    "blazepose": ("ai_edge_litert", f"pose estimation needs ai-edge-litert: {install('pose')}"),
    "rtmlib": (
        "rtmlib",
        f"whole-body poses (prepare.pose=rtmlib, hand_distance, face_distance) need rtmlib: {install('rtmlib')}",
    ),
}
"""`prepare.pose` → the package that it needs, and what is said where that is not there."""


@contextmanager
def _silent() -> Iterator[None]:
    """Without what the networks' C++ writes to standard error by itself, past Python; errors are raised."""
    sys.stderr.flush()
    mine = os.dup(2)
    try:
        with open(os.devnull, "wb") as nothing:  # noqa: PTH123
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(mine, 2)
        os.close(mine)


class PoseEstimator:
    """Detector and landmark network, loaded once. Not picklable: create it where it works.

    Raises UserError when ai-edge-litert is not installed (extra `pose`) or the networks are not in the cache.
    """

    points = POINTS
    """Points of a pose that it gives."""

    def __init__(self, threads: int = 1):
        try:
            from ai_edge_litert.interpreter import Interpreter
        except ImportError:
            raise UserError(NEEDS["blazepose"][1]) from None

        def load(name: str):
            interpreter = Interpreter(str(assets.network(name)), num_threads=threads)
            interpreter.allocate_tensors()
            return interpreter

        with _silent():
            self._detector = load("pose_detection")
            self._landmarks = load("pose_landmark_full")
        self._anchors = _anchors()

    def detect(self, frame: np.ndarray) -> list[Person]:
        """People in uint8 RGB [H, W, 3]: the largest and most central first; empty if there is nobody.

        Looks at the whole frame and, if it is not square, at squares along it: the network sees 224 pixels, too few for
        a person of half the height of a wide frame.
        """
        height, width = frame.shape[:2]
        people = [person for box in _views(height, width) for person in self._detect(frame, box)]
        distinct: list[Person] = []
        for person in sorted(people, key=lambda person: -person.score):
            apart = (np.hypot(*np.subtract(person.center, other.center)) for other in distinct)
            reach = (APART * max(person.radius, other.radius) for other in distinct)
            if all(a > r for a, r in zip(apart, reach, strict=True)):
                distinct.append(person)
        return prominent_first(distinct, height, width)

    def _detect(self, frame: np.ndarray, box: tuple[int, int, int, int], min_score: float = MIN_SCORE) -> list[Person]:
        """People in a part of the frame (left, top, width, height), in pixels of the frame."""
        left, top, width, height = box
        part = np.ascontiguousarray(frame[top : top + height, left : left + width])
        ratio = DETECTOR_SIZE / max(height, width)
        small = max(1, round(width * ratio)), max(1, round(height * ratio))
        border = (DETECTOR_SIZE - small[0]) // 2, (DETECTOR_SIZE - small[1]) // 2
        square = Image.new("RGB", (DETECTOR_SIZE, DETECTOR_SIZE))
        square.paste(Image.fromarray(part).resize(small, Image.Resampling.BILINEAR, reducing_gap=2.0), border)
        raw, logits = _run(self._detector, np.asarray(square, np.float32) / 127.5 - 1)
        scores = _sigmoid(logits[:, 0])
        kept = scores >= min_score
        # Each row: box centre, box size, then four points: hips, whole-body circle, shoulders, upper-body circle.
        rows = raw[kept].reshape(-1, 6, 2) / DETECTOR_SIZE
        rows[:, [0, 2, 3, 4, 5]] += self._anchors[kept, None]
        rows, scores = _merge(rows, scores[kept])
        points = (rows[:, 2:4] * DETECTOR_SIZE - border) / ratio + (left, top)
        return [Person(float(score), *_circle(*pair)) for pair, score in zip(points, scores, strict=True)]

    def track(self, frames: Iterable[np.ndarray]) -> np.ndarray:
        """The foremost person through uint8 RGB frames [H, W, 3] → float32 [F, 33, 3].

        x, y in 0..1 of the frame (outside it for points out of sight), visibility 0..1. Rows of frames in which
        nobody was found: x, y NaN, visibility 0. So is the frame in which who was followed is gone, whoever else is
        there: the foremost is chosen anew from the next one on, and no stretch of found poses is of two people.
        """
        rows = []
        where, age = None, 0  # the person who is followed, and for how many frames
        for frame in frames:
            points = None
            if where is not None:
                points = self._look(frame, where, check=age < PROBATION or age % CHECK_EVERY == 0)
                if points is None and age < PROBATION:
                    rows[-age:] = [nobody()] * age
                    where = None
            if points is None:
                people = (person for person in self.detect(frame) if where is None or may_be(person, where))
                looks = (self._look(frame, person, check=True) for person in people)
                points, age = next((look for look in looks if look is not None), None), 0
            if points is None:
                where = None
                rows.append(nobody())
            else:
                # Points 33 and 34 are the next square's: middle of the hips, and the circle around the body.
                where, age = Person(1.0, *_circle(points[33, :2], points[34, :2])), age + 1
                height, width = frame.shape[:2]
                rows.append((points[:POINTS] / (width, height, 1)).astype(np.float32))
        return np.stack(rows) if rows else np.zeros((0, POINTS, 3), np.float32)

    def _look(self, frame: np.ndarray, person: Person, check: bool) -> np.ndarray | None:
        """Landmarks of a person: float [39, 3], x and y in pixels of the frame; None if there is none after all.

        check: the detector, too, must find a person in the square around the circle. The landmark network alone takes
        lettering for one and follows it.
        """
        side = 2 * MARGIN * person.radius
        if not 1 <= side <= 10 * max(frame.shape):
            return None
        center, turn = np.array(person.center), _turn(person.rotation_rad)
        crop = _cut_out(frame, center, side, turn)
        raw, flag, _, heatmap, _ = _run(self._landmarks, crop.astype(np.float32) / 255)
        if flag[0] < MIN_SCORE:
            return None
        if check:
            body = _cut_out(frame, center, 2 * person.radius, turn)
            if not self._detect(body, (0, 0, LANDMARK_SIZE, LANDMARK_SIZE), CHECK_SCORE):
                return None
        raw = raw.reshape(39, 5)  # x, y, z, visibility and presence (logits)
        x_y = _refine(raw[:, :2] / LANDMARK_SIZE, _sigmoid(heatmap))
        pixels = (x_y - 0.5) @ turn.T * side + center
        return np.concatenate([pixels, _sigmoid(raw[:, 3:4])], axis=1)


def check_installed(settings: Prepare) -> None:
    """Raises UserError if the package of the estimator that `prepare.pose` names is not there; loads nothing."""
    package, message = NEEDS[settings.pose]
    if find_spec(package) is None:
        raise UserError(message)


def estimator(settings: Prepare):
    """The estimator that `prepare.pose` names, with `points`, `detect` and `track` as `PoseEstimator` has them.

    Raises UserError when something that it needs is missing.
    """
    if settings.pose == "rtmlib":
        from entprog.media import rtm

        return rtm.RtmEstimator("cuda" if settings.track_gpus else "cpu")
    return PoseEstimator(threads=1)


def found(points: np.ndarray) -> np.ndarray:
    """[F, 33 or 133, 3] → bool [F]: frames in which a person was found."""
    return np.isfinite(wholebody.body(points)[..., :2]).all(axis=(-1, -2))


def body_box(points: np.ndarray, min_visibility: float = 0.5) -> tuple[float, float, float, float] | None:
    """Smallest box around the body's visible points in all frames [..., 33 or 133, 3]: left, top, right, bottom in 0..1
    of the frame, inside it.

    None when no point is visible. The head's top and the toes lie a little outside: leave a margin.
    """
    points = wholebody.body(points).reshape(-1, 3)
    x_y = points[points[:, 2] >= min_visibility, :2]
    if not len(x_y):
        return None
    (left, top), (right, bottom) = x_y.min(0).clip(0, 1), x_y.max(0).clip(0, 1)
    return float(left), float(top), float(right), float(bottom)


def _run(interpreter, image: np.ndarray) -> list[np.ndarray]:
    """Outputs without their batch dimension."""
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], image[None].astype(np.float32))
    interpreter.invoke()
    return [interpreter.get_tensor(output["index"])[0] for output in interpreter.get_output_details()]


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(x, -100, 100, dtype=np.float64)))


def _views(height: int, width: int) -> list[tuple[int, int, int, int]]:
    """Where the detector looks: the whole frame, and squares along it that overlap by half or more."""
    short, long = sorted((height, width))
    views = [(0, 0, width, height)]
    if long > 1.2 * short:
        count = int(np.ceil(2 * (long - short) / short)) + 1
        starts = np.linspace(0, long - short, count).round().astype(int).tolist()
        views += [(start, 0, short, short) if width > height else (0, start, short, short) for start in starts]
    return views


def _anchors() -> np.ndarray:
    """Centres of the detector's 2,254 anchors in 0..1: [2254, 2]. Two a cell at strides 8 and 16, six at stride 32."""
    grids = []
    for stride, per_cell in ((8, 2), (16, 2), (32, 6)):
        cells = DETECTOR_SIZE // stride
        y, x = np.mgrid[:cells, :cells]
        grids.append(np.repeat((np.stack([x, y], -1).reshape(-1, 2) + 0.5) / cells, per_cell, axis=0))
    return np.concatenate(grids)


def _merge(rows: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Non-maximum suppression in which the suppressed are averaged into the best by score, as MediaPipe does."""
    low, high = rows[:, 0] - rows[:, 1] / 2, rows[:, 0] + rows[:, 1] / 2
    area = (high - low).prod(1)
    left = np.argsort(-scores, kind="stable")
    merged, best = [], []
    while len(left):
        first = left[0]
        shared = np.clip(np.minimum(high[first], high[left]) - np.maximum(low[first], low[left]), 0, None).prod(1)
        same = shared / (area[first] + area[left] - shared) > MIN_OVERLAP
        same[0] = True
        merged.append(np.average(rows[left[same]], axis=0, weights=scores[left[same]]))
        best.append(scores[first])
        left = left[~same]
    return np.array(merged).reshape(-1, 6, 2), np.array(best)


def _circle(hips: np.ndarray, edge: np.ndarray) -> tuple[tuple[float, float], float, float]:
    """(centre, radius, clockwise tilt) from the middle of the hips and the point above the head on the circle."""
    x, y = edge - hips
    return (float(hips[0]), float(hips[1])), float(np.hypot(x, y)), float(np.arctan2(x, -y))


def _turn(rotation_rad: float) -> np.ndarray:
    """Clockwise rotation of (x, y) with y down."""
    cos, sin = np.cos(rotation_rad), np.sin(rotation_rad)
    return np.array([[cos, -sin], [sin, cos]])


def _cut_out(frame: np.ndarray, center: np.ndarray, side: float, turn: np.ndarray) -> np.ndarray:
    """The turned square around `center`, uint8 [256, 256, 3]; black outside the frame."""
    height, width = frame.shape[:2]
    # First shrink what the square touches by a whole number, averaging: sampling alone would alias.
    factor = max(1, int(side / LANDMARK_SIZE))
    reach = side * np.abs(turn).sum(1) / 2 + 2 * factor
    left, top = np.floor(np.clip(center - reach, 0, (width - 1, height - 1))).astype(int)
    right, bottom = np.ceil(np.clip(center + reach, (left + 1, top + 1), (width, height))).astype(int)
    part = Image.fromarray(np.ascontiguousarray(frame[top:bottom, left:right]))
    if factor > 1:
        part = part.reduce(factor)
    step = turn * side / LANDMARK_SIZE / factor
    origin = (center - (left, top)) / factor - step @ np.full(2, LANDMARK_SIZE / 2)
    matrix = (step[0, 0], step[0, 1], origin[0], step[1, 0], step[1, 1], origin[1])
    square = (LANDMARK_SIZE, LANDMARK_SIZE)
    return np.asarray(part.transform(square, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR))


def _refine(x_y: np.ndarray, heatmap: np.ndarray) -> np.ndarray:
    """Move each landmark (0..1, [39, 2]) to the centre of mass of its heatmap ([64, 64, 39], 0..1) in the 7×7 cells
    around it, where that is sure (a cell of at least 0.5).
    """
    refined = x_y.copy()
    for i, (column, row) in enumerate((x_y * HEATMAP_SIZE).astype(int)):
        if not (0 <= column < HEATMAP_SIZE and 0 <= row < HEATMAP_SIZE):
            continue
        top, left = max(0, row - 3), max(0, column - 3)
        window = heatmap[top : row + 4, left : column + 4, i]
        if window.max() >= 0.5:
            rows, columns = np.mgrid[top : top + window.shape[0], left : left + window.shape[1]]
            refined[i] = np.array([(columns * window).sum(), (rows * window).sum()]) / window.sum() / HEATMAP_SIZE
    return refined
