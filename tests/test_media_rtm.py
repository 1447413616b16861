"""RTMW's points, and BlazePose's among them. The networks themselves are fetched by rtmlib and not run here."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest

from entprog import config
from entprog.errors import UserError
from entprog.media import person, pose, rtm, wholebody

MIRRORED = [0, 4, 5, 6, 1, 2, 3, 8, 7, 10, 9, *(i + 1 if i % 2 else i - 1 for i in range(11, 33))]
"""Of BlazePose's points."""


def mirrored_whole_body() -> np.ndarray:
    """COCO-WholeBody's own left-right exchange: body, feet, face (300-W), hands."""
    out = np.arange(133)
    for i in range(1, 17, 2):
        out[[i, i + 1]] = i + 1, i
    out[17:23] = [20, 21, 22, 17, 18, 19]
    face = np.arange(68)
    for one, other in [(36, 45), (37, 44), (38, 43), (39, 42), (40, 47), (41, 46), (48, 54), (49, 53), (50, 52)]:
        face[[one, other]] = other, one
    out[23:91] = 23 + face
    out[91:112], out[112:133] = np.arange(112, 133), np.arange(91, 112)
    return out


def test_left_is_left_and_no_point_stands_for_two():
    assert len(set(wholebody.BLAZEPOSE.tolist())) == pose.POINTS
    assert np.array_equal(mirrored_whole_body()[wholebody.BLAZEPOSE], wholebody.BLAZEPOSE[MIRRORED])
    assert wholebody.BLAZEPOSE[[0, 11, 15, 23, 27]].tolist() == [
        0,
        5,
        9,
        11,
        15,
    ]  # nose, left shoulder, wrist, hip, ankle


def test_the_same_person_is_followed_past_a_larger_one():
    small, large = person.of_box(*([100, 100, 140, 200])), person.of_box(*([180, 0, 380, 400]))
    assert person.followed([small, large], None, 400, 400) == (large, 1)
    assert person.followed([large, small], person.of_box(*([105, 100, 145, 200])), 400, 400) == (small, 1)
    assert person.followed([], small, 400, 400) is None
    assert person.followed([large], small, 400, 400) is None, "who was followed is gone"


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "rtmlib", None)  # as if it were not installed
    with pytest.raises(UserError, match=r"pip install '\.\[rtmlib\]'"):
        pose.estimator(config.Prepare(pose="rtmlib"))


def test_all_points_of_whom_it_follows_are_given_with_their_scores():
    """Around its two networks, which are fetched and not run here: a detector of boxes, and points within a box."""
    frames = [np.zeros((100, 200, 3), np.uint8)] * 3
    boxes = iter([np.array([[0, 0, 20, 50], [100, 0, 180, 100]]), np.zeros((0, 4)), np.array([[0, 0, 20, 50]])])
    scores = iter([np.linspace(0.5, 1.2, 133), np.full(133, 0.1)])

    def points(image, bboxes):
        (left, top, _, _) = bboxes[0]
        return np.stack([left + np.arange(133.0), top + np.arange(133.0)], 1)[None], next(scores)[None]

    estimator = object.__new__(rtm.RtmEstimator)
    estimator._model = SimpleNamespace(det_model=lambda image: next(boxes), pose_model=points)
    track = estimator.track(frames)
    assert track.shape == (3, 133, 3) and track.dtype == np.float32 and estimator.points == 133
    np.testing.assert_allclose(track[0, :, 0], (100 + np.arange(133)) / 200, rtol=1e-6)
    np.testing.assert_allclose(track[0, :, 2], np.linspace(0.5, 1.2, 133).clip(max=1), rtol=1e-6)
    assert pose.found(track).tolist() == [True, False, False], "nobody there, and a body of low scores"
