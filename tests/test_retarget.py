"""Retargeting: a motion takes another body's proportions and keeps its angles."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from entprog.media import retarget, wholebody
from helpers import wholebodies

HEIGHT, WIDTH = 192, 128
BONES = [(5, 7), (7, 9), (6, 8), (8, 10), (11, 13), (13, 15), (12, 14), (14, 16)]


def posed(lengths: dict[str, float], angles: np.ndarray, root: np.ndarray) -> np.ndarray:
    """float32 [F, 133, 3] of a symmetric person: limbs of these lengths in pixels, at these angles [F, 12], hips at
    root [F, 2] in pixels. Hands and face are rigid figures at wrists and nose."""
    frames = len(angles)
    at = np.full((frames, 133, 2), np.nan)
    way = lambda number: np.stack([np.cos(angles[:, number]), np.sin(angles[:, number])], 1)  # noqa: E731
    neck = root + lengths["torso"] * way(0)
    at[:, 0] = neck + lengths["head"] * way(1)
    for side, sign in ((0, 1), (1, -1)):
        at[:, 5 + side] = neck + sign * lengths["shoulders"] * way(2)
        at[:, 11 + side] = root + sign * lengths["hips"] * way(3)
        for first, names, number in ((5, ("upper arms", "forearms"), 4), (11, ("thighs", "shins"), 8)):
            for step, name in enumerate(names):
                angle = way(number + 2 * side + step)
                at[:, first + 2 * step + 2 + side] = at[:, first + 2 * step + side] + lengths[name] * angle
    still = wholebodies.standing()[:, :2] * (WIDTH, HEIGHT)
    for parts, _ in retarget.SHAPES.values():
        for joint, points in parts:
            size = lengths["face" if joint == 0 else "hands" if joint < 11 else "feet"]
            at[:, list(points)] = at[:, [joint]] + size * (still[list(points)] - still[joint])
    return np.concatenate([at / (WIDTH, HEIGHT), np.ones((frames, 133, 1))], 2).astype(np.float32)


NAMES = ("torso", "head", "shoulders", "upper arms", "forearms", "hips", "thighs", "shins", "face", "hands", "feet")


def sizes(seed: int) -> dict[str, float]:
    rng = np.random.default_rng(seed)
    return {name: float(rng.uniform(0.5, 2) if name in retarget.SHAPES else rng.uniform(8, 40)) for name in NAMES}


def motion(seed: int, frames: int = 7) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.uniform(0, 2 * np.pi, (frames, 12)), rng.uniform(40, 80, (frames, 2))


def vectors(pose: np.ndarray) -> np.ndarray:
    """Of each limb in pixels: [F, limbs, 2]."""
    at = pose[..., :2].astype(np.float64) * (WIDTH, HEIGHT)
    middle = lambda pair: at[:, list(pair)].mean(1)  # noqa: E731
    limbs = [at[:, b] - at[:, a] for a, b in BONES]
    return np.stack([*limbs, middle((5, 6)) - middle((11, 12)), at[:, 0] - middle((5, 6))], 1)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([33, 133]))
def test_angles_are_kept_and_lengths_are_the_references(seed, points):
    angles, root = motion(seed)
    driving = wholebody.laid_out(posed(sizes(seed), angles, root), points)
    theirs = sizes(seed + 1)
    own_angles, own_root = motion(seed + 2, 1)
    own = posed(theirs, own_angles, own_root)[0]
    found = retarget.retarget(driving, own, HEIGHT, WIDTH)
    assert found.shape == driving.shape and found.dtype == np.float32
    assert np.array_equal(found[..., 2], driving[..., 2])
    before, after = vectors(wholebody.whole(driving)), vectors(wholebody.whole(found))
    lengths = np.linalg.norm(after, axis=-1)
    cosine = (before * after).sum(-1) / np.linalg.norm(before, axis=-1) / lengths
    np.testing.assert_allclose(cosine, 1, atol=1e-5)
    due = [theirs[name] for name in ("upper arms", "forearms") * 2 + ("thighs", "shins") * 2 + ("torso", "head")]
    np.testing.assert_allclose(lengths, np.broadcast_to(due, lengths.shape), rtol=1e-3)
    whole = wholebody.whole(found)[..., :2] * (WIDTH, HEIGHT)
    hips = whole[:, 11:13].mean(1)
    np.testing.assert_allclose(hips[0], own_root[0], atol=1e-3)
    body = retarget.ratios(driving, own, HEIGHT, WIDTH)["body"]
    np.testing.assert_allclose(hips - hips[0], body * (root - root[0]), atol=0.02)
    if points == 133:
        for name, (parts, _) in retarget.SHAPES.items():
            for joint, of in parts:
                figure, still = (p[:, list(of)] - p[:, [joint]] for p in (whole, own[None, :, :2] * (WIDTH, HEIGHT)))
                np.testing.assert_allclose(figure, np.broadcast_to(still, figure.shape), atol=0.02, err_msg=name)


def test_a_person_of_ones_own_changes_nothing_and_doing_it_twice_neither():
    angles, root = motion(3)
    driving = posed(sizes(3), angles, root)
    np.testing.assert_allclose(retarget.retarget(driving, driving[0], HEIGHT, WIDTH), driving, atol=1e-5)
    own = posed(sizes(4), *motion(5, 1))[0]
    once = retarget.retarget(driving, own, HEIGHT, WIDTH)
    np.testing.assert_allclose(retarget.retarget(once, own, HEIGHT, WIDTH), once, atol=1e-5)


def test_a_limb_that_is_foreshortened_stays_so_in_proportion():
    angles, root = motion(6, 30)
    lengths = sizes(6)
    driving = posed(lengths, angles, root)
    driving[4, 9, :2] = (driving[4, 7, :2] + driving[4, 9, :2]) / 2  # half as long, in one frame
    driving[4, list(retarget.SHAPES["hands"][0][0][1]), :2] = driving[4, 9, :2]
    theirs = sizes(7)
    found = retarget.retarget(driving, posed(theirs, *motion(8, 1))[0], HEIGHT, WIDTH)
    forearm = np.linalg.norm(vectors(found)[:, 1], axis=-1) / theirs["forearms"]
    np.testing.assert_allclose(np.delete(forearm, 4), 1, rtol=1e-3)
    assert forearm[4] == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize("hidden", [range(11, 23), [*range(7, 23), *range(91, 133)], range(23, 133)])
def test_what_the_reference_does_not_show_has_the_bodys_proportion(hidden):
    """A half-length portrait, a bust, and a picture without face and hands."""
    driving, own = posed(sizes(1), *motion(1)), posed(sizes(2), *motion(2, 1))[0]
    own[list(hidden), 2] = 0.1
    by = retarget.ratios(driving, own, HEIGHT, WIDTH)
    found = retarget.retarget(driving, own, HEIGHT, WIDTH)
    assert np.isfinite(found).all()
    if 13 in hidden:
        assert {by[name] for name in ("torso", "hips", "thighs", "shins")} == {by["body"]} != {by["shoulders"]}
        neck = found[0, [5, 6], :2].mean(0)
        np.testing.assert_allclose(neck, own[[5, 6], :2].mean(0), atol=1e-5)
    if 91 in hidden:
        assert by["hands"] == by["forearms"]


def test_frames_without_a_person_stay_empty_and_hidden_points_move_along():
    driving, own = posed(sizes(1), *motion(1)), posed(sizes(2), *motion(2, 1))[0]
    driving[2] = np.nan, np.nan, 0
    driving[4, 9, 2] = 0.1
    found = retarget.retarget(driving, own, HEIGHT, WIDTH)
    assert np.isnan(found[2, :, :2]).all() and (found[2, :, 2] == 0).all()
    assert np.isfinite(found[[0, 1, 3, 4, 5, 6]]).all() and found[4, 9, 2] == np.float32(0.1)
    driving[0] = np.nan, np.nan, 0  # it begins later: where the person is first seen
    found = retarget.retarget(driving, own, HEIGHT, WIDTH)
    np.testing.assert_allclose(found[1, [11, 12], :2].mean(0), own[[11, 12], :2].mean(0), atol=1e-5)


def test_nothing_in_common_is_an_error():
    driving, own = posed(sizes(1), *motion(1)), posed(sizes(2), *motion(2, 1))[0]
    for a, b in ((driving, own * [1, 1, 0]), (driving * [1, 1, 0], own), (driving * np.nan, own)):
        with pytest.raises(ValueError, match="no limb is visible in both"):
            retarget.retarget(a.astype(np.float32), b.astype(np.float32), HEIGHT, WIDTH)


@pytest.mark.parametrize("points", [33, 133])
@pytest.mark.parametrize("lost", [[7], [8, 7], [13], [5], [11], [9], [0], [12, 14]])
def test_what_hangs_on_a_joint_that_is_not_known_moves_on(lost, points):
    driving, own = posed(sizes(1), *motion(1)), posed(sizes(2), *motion(2, 1))[0]
    due = retarget.retarget(wholebody.laid_out(driving, points), own, HEIGHT, WIDTH)
    driving[3, lost] = np.nan, np.nan, 0
    found = retarget.retarget(wholebody.laid_out(driving, points), own, HEIGHT, WIDTH)
    assert np.array_equal(np.isnan(wholebody.whole(found)[3, :17, 0]), np.isin(np.arange(17), lost))
    others = [frame for frame in range(7) if frame != 3]
    np.testing.assert_allclose(found[others], due[others], atol=0.35)  # the longest lengths may be that frame's
    if points == 133:
        assert np.isnan(found[3, :, 0]).sum() == len(lost), "faces, hands and feet too"


@pytest.mark.parametrize("lost", [[11, 12], [11], [11, 12, 5], [11, 12, 13, 14, 15, 16]])
def test_a_motion_without_hips_begins_with_the_neck_or_the_nose(lost):
    driving, own = posed(sizes(1), *motion(1)), posed(sizes(2), *motion(2, 1))[0]
    driving[:, lost] = np.nan, np.nan, 0
    found = retarget.retarget(driving, own, HEIGHT, WIDTH)
    assert np.isnan(found[..., 0]).any(0).sum() == len(lost), "nothing else is lost"
    begin = [0] if 5 in lost else [5, 6]
    np.testing.assert_allclose(found[0, begin, :2].mean(0), own[begin, :2].mean(0), atol=1e-5)
    body = retarget.ratios(driving, own, HEIGHT, WIDTH)["body"]
    moved, before = (pose[:, begin, :2].mean(1) * (WIDTH, HEIGHT) for pose in (found, driving))
    np.testing.assert_allclose(moved - moved[0], body * (before - before[0]), atol=0.02)


def test_hips_that_are_lost_in_some_frames_make_no_leap():
    """Of a still person the frames without hips are as the others."""
    angles, root = motion(1)
    driving = posed(sizes(1), np.repeat(angles[:1], 7, 0), np.repeat(root[:1], 7, 0))
    own = posed(sizes(2), *motion(2, 1))[0]
    due = retarget.retarget(driving, own, HEIGHT, WIDTH)
    driving[[0, 3, 4], 11:13] = np.nan, np.nan, 0
    found = retarget.retarget(driving, own, HEIGHT, WIDTH)
    upper = [0, 5, 6, 7, 8, 9, 10]
    np.testing.assert_allclose(found[:, upper], due[:, upper], atol=1e-5)
