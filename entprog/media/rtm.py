"""RTMW whole-body pose through rtmlib (Jiang et al., RTMPose, arXiv 2303.07399): the same interface as BlazePose here.

It gives COCO-WholeBody's 133 points, BlazePose's 33 among them (`wholebody`). rtmlib fetches its networks at the first
use, or takes paths to them.
"""

import sys
from collections.abc import Iterable
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np

from entprog.errors import UserError
from entprog.masking import one_line
from entprog.media import pose, wholebody
from entprog.media.person import Person, followed, nobody, of_box, prominent_first

MIN_SCORE = 0.3
"""Least mean score of a person's body points; the scores of RTMW lie in 0..1 and a little above."""


class RtmEstimator:
    """rtmlib's `Wholebody`, loaded once. Not picklable.

    Raises UserError when rtmlib is not installed or its networks cannot be fetched.
    """

    points = wholebody.POINTS

    def __init__(self, device: str = "cpu", **networks):
        """`networks`: rtmlib's own `det`, `pose`, their input sizes, or `mode`."""
        try:
            from rtmlib import Wholebody
        except ImportError:
            raise UserError(pose.NEEDS["rtmlib"][1]) from None
        try:
            with redirect_stdout(sys.stderr):  # it tells what it loads
                self._model = Wholebody(backend="onnxruntime", device=device, **networks)
        except OSError as error:  # its download failed
            message = one_line(error)
            raise UserError(f"rtmlib cannot fetch its networks ({message}): fetch them once with a network") from None

    @property
    def weights(self) -> tuple[Path, Path]:
        """Files of the detector's and of the pose network's weights."""
        return Path(self._model.det_model.onnx_model), Path(self._model.pose_model.onnx_model)

    def detect(self, frame: np.ndarray) -> list[Person]:
        """People in uint8 RGB [H, W, 3]: the largest and most central first; of their boxes, not of their pose."""
        people = [of_box(*map(float, box[:4])) for box in self._model.det_model(_bgr(frame))]
        return prominent_first(people, *frame.shape[:2])

    def track(self, frames: Iterable[np.ndarray]) -> np.ndarray:
        """The foremost person through uint8 RGB frames [H, W, 3] → float32 [F, 133, 3], as `PoseEstimator.track`."""
        rows, where = [], None
        for frame in frames:
            height, width = frame.shape[:2]
            boxes = np.asarray(self._model.det_model(_bgr(frame)), np.float64).reshape(-1, 4)
            chosen = followed([of_box(*box) for box in boxes.tolist()], where, height, width)
            where = None
            if chosen is None:
                rows.append(nobody(self.points))
                continue
            person, at = chosen
            points, scores = self._model.pose_model(_bgr(frame), bboxes=boxes[at : at + 1])
            if scores[0, wholebody.BODY].mean() < MIN_SCORE:
                rows.append(nobody(self.points))
                continue
            where = person
            placed = points[0] / (width, height)
            rows.append(np.concatenate([placed, scores[0, :, None].clip(0, 1)], axis=1).astype(np.float32))
        return np.stack(rows) if rows else np.zeros((0, self.points, 3), np.float32)


def _bgr(frame: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(frame[..., ::-1])
