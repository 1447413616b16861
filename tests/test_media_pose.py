"""BlazePose on real people, and on nobody."""

import subprocess
import sys

import numpy as np
import pytest

from entprog.errors import UserError
from entprog.media import assets, pose, video

SHOULDERS, HIPS, KNEES, ANKLES = [11, 12], [23, 24], [25, 26], [27, 28]
MIRRORED = [0, 4, 5, 6, 1, 2, 3, 8, 7, 10, 9, *(i + 1 if i % 2 else i - 1 for i in range(11, 33))]


@pytest.fixture(scope="module")
def estimator() -> pose.PoseEstimator:
    return pose.PoseEstimator()


def frames_of(name: str, fps: float, end_s: float = 1.7, start_s: float = 0.0) -> list[np.ndarray]:
    return [f for _, f in video.iter_frames(assets.clip(name), fps=fps, start_s=start_s, end_s=end_s, quick=True)]


@pytest.mark.parametrize("name", ["cam01", "cam02", "cam03", "cam04", "jump"])
def test_finds_the_person_in_every_frame(name, estimator):
    frames = frames_of(name, 8)
    points = estimator.track(frames)
    assert points.shape == (len(frames), 33, 3) and points.dtype == np.float32
    assert pose.found(points).all()
    assert points[..., 2].min() >= 0 and points[..., 2].max() <= 1 and points[..., 2].mean() > 0.8
    left, top, right, bottom = pose.body_box(points)
    assert 0.3 < bottom - top < 1 and 0.2 < right - left < 1
    first = points[0]  # they all stand up at first
    assert (first[SHOULDERS, 1] < first[HIPS, 1]).all() and (first[HIPS, 1] < first[ANKLES, 1]).all()


def test_a_walk_looks_like_one(estimator):
    points = estimator.track(frames_of("walk", 10, start_s=1.5, end_s=3.5))
    assert pose.found(points).all()
    y = points[..., 1]
    for higher, lower in ((SHOULDERS, HIPS), (HIPS, KNEES), (KNEES, ANKLES)):
        assert (y[:, higher].mean(1) < y[:, lower].mean(1)).all()
    hips = points[:, HIPS, 0].mean(1)
    assert (np.diff(hips) < 0).all()  # she walks to the left
    stride = points[:, ANKLES[0], 0] - points[:, ANKLES[1], 0]
    assert stride.min() < 0 < stride.max()  # her feet pass each other


def test_finds_nobody(estimator):
    points = estimator.track(frames_of("no_face", 8, end_s=4))
    assert not pose.found(points).any()
    assert (points[..., 2] == 0).all() and np.isnan(points[..., :2]).all()
    assert pose.body_box(points) is None
    assert estimator.detect(np.zeros((1, 3, 3), np.uint8)) == []
    assert estimator.track([]).shape == (0, 33, 3)


def test_finds_the_person_again(estimator):
    frames = frames_of("cam01", 8)[:4]
    frames[1:3] = [np.zeros_like(frames[0])] * 2
    assert pose.found(estimator.track(frames)).tolist() == [False, False, False, True]  # one frame is no proof
    frames = frames_of("cam01", 10)
    frames[7:9] = [np.zeros_like(frames[0])] * 2
    assert pose.found(estimator.track(frames)).tolist() == [not 7 <= i < 9 for i in range(len(frames))]


def test_mirrored_frames_give_mirrored_points(estimator):
    frames = frames_of("cam01", 5)
    points = estimator.track(frames)
    mirrored = estimator.track([frame[:, ::-1] for frame in frames])[:, MIRRORED]
    mirrored[..., 0] = 1 - mirrored[..., 0]
    seen = (points[..., 2] > 0.8) & (mirrored[..., 2] > 0.8)
    off = np.linalg.norm((points - mirrored)[..., :2] * (1080, 1920), axis=-1)[seen]
    assert np.median(off) < 15 and np.quantile(off, 0.9) < 60  # pixels of 1080x1920


@pytest.mark.parametrize("turns", [1, 3])
def test_tilted_people_are_followed(turns, estimator):
    """A square is cut out along the body's axis, so a person on the side is seen as well as an upright one."""
    frames = frames_of("jump", 6)
    upright, tilted = estimator.track(frames), estimator.track([np.rot90(f, turns) for f in frames])
    assert pose.found(tilted).all()
    x, y = upright[..., 0], upright[..., 1]
    expected = np.stack([y, 1 - x] if turns == 1 else [1 - y, x], -1)
    off = np.linalg.norm((tilted[..., :2] - expected) * (480, 700), axis=-1)
    assert np.median(off) < 12


def test_several_people_the_foremost_first(estimator):
    near = frames_of("jump", 1)[0]
    both = np.zeros((480, 1400, 3), np.uint8)
    both[:, :700], both[100:436, 800:1290] = near, video.scale(near, (336, 490))
    people = estimator.detect(both)
    assert len(people) == 2
    assert people[0].center[0] < 700 < people[1].center[0] and people[0].radius > people[1].radius
    assert all(person.score > 0.8 and abs(person.rotation_rad) < 0.3 for person in people)


def test_who_leaves_is_not_replaced_by_who_stays(estimator):
    """A frame of nobody lies between the two, so that no clip is of both."""
    near, frames = frames_of("jump", 12, end_s=1.0), []
    for i, frame in enumerate(near[:11]):
        both = np.full((480, 1200, 3), 120, np.uint8)
        both[100:436, 700:1190] = video.scale(near[0], (336, 490))
        if i < 7:
            both[:, :700] = frame
        frames.append(both)
    points = estimator.track(frames)
    assert pose.found(points).tolist() == [i != 7 for i in range(11)]
    hips = points[:, HIPS, 0].mean(1)
    assert (hips[:7] < 0.58).all() and (hips[8:] > 0.58).all()


def test_a_small_person_in_a_wide_frame(estimator):
    """Of 125 frames, 1768x524, she takes a tenth of the width; half hidden by a tree at first."""
    assert pose.found(estimator.track(frames_of("walk", 6, end_s=4))).all()
    assert len(estimator.detect(frames_of("walk", 1, start_s=2, end_s=3)[0])) == 1


def test_body_box():
    points = np.zeros((2, 33, 3), np.float32)
    points[0, 0], points[1, 5], points[1, 6] = (0.2, 0.3, 1), (0.4, 1.5, 0.9), (0.1, 0.1, 0.2)
    points[0, 9] = (np.nan, np.nan, 0)
    assert pose.body_box(points) == pytest.approx((0.2, 0.3, 0.4, 1.0))


def test_the_networks_say_nothing_by_themselves():
    """In a process of its own: they would say it once."""
    program = "from entprog.media import pose; pose.PoseEstimator()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout + done.stderr


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", None)  # as if it were not installed
    with pytest.raises(UserError, match=r"pip install '\.\[pose\]'"):
        pose.PoseEstimator()


def test_without_the_networks_it_says_how_to_fetch_them(monkeypatch, tmp_path):
    monkeypatch.setenv("ENTPROG_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"run python -m entprog\.media\.assets"):
        pose.PoseEstimator()
