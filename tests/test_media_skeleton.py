"""Drawn poses."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from entprog.media.skeleton import COLORS, LIMBS, draw

POSES = hnp.arrays(
    np.float32, (2, 33, 3), elements=st.floats(-2, 3, width=32) | st.sampled_from([np.nan, np.inf, -np.inf])
)


def standing() -> torch.Tensor:
    """A pose with all points visible, spread out."""
    points = torch.rand(33, 3, generator=torch.Generator().manual_seed(0))
    points[:, 2] = 1
    return points


@settings(max_examples=40, deadline=None)
@given(POSES)
def test_any_pose_gives_finite_values_in_range(poses):
    drawn = draw(torch.from_numpy(poses), 24, 16)
    assert drawn.shape == (2, 3, 24, 16) and drawn.dtype == torch.float32
    assert bool(((drawn >= -1) & (drawn <= 1)).all())
    torch.testing.assert_close(drawn, torch.stack([draw(torch.from_numpy(pose), 24, 16) for pose in poses]))
    assert torch.equal(draw(poses, 24, 16), drawn), "an array, as pose files hold, is as good as a tensor"


@settings(max_examples=20, deadline=None)
@given(POSES)
def test_nobody_is_black(poses):
    poses = torch.from_numpy(poses)
    poses[..., 2] = 0.4
    assert (draw(poses, 24, 16) == -1).all()
    nobody = torch.full((33, 3), float("nan"))
    assert (draw(nobody, 24, 16) == -1).all()


def test_a_limb_is_all_pixels_near_its_line():
    start, end = LIMBS[6]
    points = torch.zeros(33, 3)
    points[start], points[end] = torch.tensor([0.2, 0.3, 1.0]), torch.tensor([0.7, 0.8, 1.0])
    drawn = ((draw(points, 40, 60, line_width=4) + 1) / 2).permute(1, 2, 0).numpy()
    a, b = np.array([0.2 * 60, 0.3 * 40]), np.array([0.7 * 60, 0.8 * 40])
    for row in range(40):
        for column in range(60):
            pixel = np.array([column + 0.5, row + 0.5])
            t = np.clip((pixel - a) @ (b - a) / ((b - a) @ (b - a)), 0, 1)
            cover = np.clip(2.5 - np.linalg.norm(pixel - a - t * (b - a)), 0, 1)
            np.testing.assert_allclose(drawn[row, column], cover * np.array(COLORS[6]), atol=1e-5)


def test_a_limb_needs_both_ends():
    points = standing()
    whole = draw(points, 64, 64)
    for lost in (torch.tensor([0.5, 0.5, 0.1]), torch.tensor([float("nan"), 0.5, 1.0])):
        points = standing()
        points[13] = lost  # left elbow
        alone = standing()
        alone[:, 2] = 0
        alone[[11, 15, 19]] = standing()[[11, 15, 19]]
        assert not torch.equal(draw(points, 64, 64), whole)
        without_hand = alone.clone()
        without_hand[[15, 19], 2] = 0
        assert (draw(without_hand, 64, 64) == -1).all()  # a shoulder alone is no limb
        assert (draw(alone, 64, 64) > -1).any()  # wrist to finger is


def test_limbs_can_be_told_apart():
    assert len(set(LIMBS)) == len(LIMBS) == len(COLORS)
    colors = np.array(COLORS)
    distances = np.linalg.norm(colors[:, None] - colors[None], axis=-1) + np.eye(len(colors))
    assert distances.min() > 0.12
    left = [i for i, (a, b) in enumerate(LIMBS) if b % 2 and a and a % 2]
    right = [i for i, (a, b) in enumerate(LIMBS) if not b % 2 and a and not a % 2]
    assert len(left) == len(right) == 9
    assert np.linalg.norm(colors[left] - colors[right], axis=-1).min() > 0.7


def test_lines_grow_with_the_picture():
    share = [(draw(standing(), *size) > -0.9).any(0).float().mean() for size in ((96, 64), (768, 512))]
    assert 0.5 < share[0] / share[1] < 2


def test_chunks_and_shapes_do_not_matter(monkeypatch):
    points = torch.rand(2, 3, 33, 3, generator=torch.Generator().manual_seed(1))
    whole = draw(points, 32, 20)
    assert whole.shape == (2, 3, 3, 32, 20)
    monkeypatch.setattr("entprog.media.skeleton.CHUNK_PIXELS", 1)
    assert torch.equal(draw(points, 32, 20), whole)
    assert draw(points[:0], 32, 20).shape == (0, 3, 3, 32, 20)
