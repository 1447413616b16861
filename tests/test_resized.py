"""Clips at a smaller shape: the frames in the middle, means over areas, poses where they were."""

import pytest
import torch

from entprog.config import ClipShape, Smaller
from entprog.data.clips import Clips
from entprog.media.color import yuv420_to_rgb

SHAPE = ClipShape(frames=5, height=64, width=32, fps=12)


def clips() -> Clips:
    generator = torch.Generator().manual_seed(0)
    video = torch.randint(16, 236, (2, 5, 96, 32), generator=generator, dtype=torch.uint8)
    reference = torch.randint(0, 256, (2, 64, 32, 3), generator=generator, dtype=torch.uint8)
    return Clips(video, reference, torch.rand(2, 5, 33, 3, generator=generator), torch.tensor([3, 4]))


def test_its_own_shape_is_itself():
    whole = clips()
    assert whole.resized(SHAPE) is whole


def test_fewer_frames_are_the_ones_in_the_middle():
    whole = clips()
    small = whole.resized(Smaller(frames=2).of(SHAPE))
    assert torch.equal(small.video, whole.video[:, 1:3]) and torch.equal(small.pose, whole.pose[:, 1:3])
    assert torch.equal(small.reference, whole.reference) and torch.equal(small.position, whole.position)


@pytest.mark.parametrize("shrink", [2])
def test_a_smaller_size_is_the_mean_over_areas(shrink):
    whole = clips()
    shape = Smaller(shrink=shrink).of(SHAPE)
    small = whole.resized(shape)
    assert small.video.shape == (2, 5, shape.height * 3 // 2, shape.width) and small.video.dtype == torch.uint8
    luma = whole.video[:, :, :64].float().unfold(2, shrink, shrink).unfold(3, shrink, shrink).mean((-1, -2))
    assert (small.video[:, :, : shape.height].float() - luma).abs().max() <= 0.5
    area = whole.reference.float().unfold(1, shrink, shrink).unfold(2, shrink, shrink).mean((-1, -2))
    assert (small.reference.float() - area).abs().max() <= 0.5
    assert torch.equal(small.pose, whole.pose)


def test_colours_and_places_stay_where_they_were():
    """A picture of smooth planes looks the same when it is shrunk in YUV as when it is shrunk in RGB."""
    rows = torch.linspace(60, 180, 64).view(1, 1, 64, 1).expand(1, 1, 64, 32)
    chroma = torch.linspace(90, 160, 16).view(1, 1, 1, 16).expand(1, 1, 32, 16).reshape(1, 1, -1)
    planes = torch.cat([rows.flatten(2), chroma, chroma.flip(-1)], dim=2).view(1, 1, 96, 32).to(torch.uint8)
    whole = Clips(planes, torch.zeros(1, 64, 32, 3, dtype=torch.uint8), torch.zeros(1, 1, 33, 3), torch.tensor([0]))
    small = whole.resized(ClipShape(frames=1, height=32, width=16, fps=12))
    expected = torch.nn.functional.avg_pool2d(yuv420_to_rgb(planes)[0, 0], 2)
    assert (yuv420_to_rgb(small.video)[0, 0] - expected).abs().max() < 0.03
