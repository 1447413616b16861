"""RTMW's points in BlazePose's order. The networks themselves are fetched by rtmlib and not run here."""

import sys

import numpy as np
import pytest

from entprog import config
from entprog.errors import UserError
from entprog.media import pose, rtm

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
    assert len(set(rtm.POINTS.tolist())) == pose.POINTS
    assert np.array_equal(mirrored_whole_body()[rtm.POINTS], rtm.POINTS[MIRRORED])
    assert rtm.POINTS[[0, 11, 15, 23, 27]].tolist() == [0, 5, 9, 11, 15]  # nose, left shoulder, wrist, hip, ankle


def test_the_same_person_is_followed_past_a_larger_one():
    small, large = rtm._person(np.array([100, 100, 140, 200])), rtm._person(np.array([180, 0, 380, 400]))
    assert rtm._chosen([small, large], None, 400, 400) == (large, 1)
    assert rtm._chosen([large, small], rtm._person(np.array([105, 100, 145, 200])), 400, 400) == (small, 1)
    assert rtm._chosen([], small, 400, 400) is None


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "rtmlib", None)  # as if it were not installed
    with pytest.raises(UserError, match=r"pip install 'entprog\[rtmlib\]'"):
        pose.estimator(config.Prepare(pose="rtmlib"))
