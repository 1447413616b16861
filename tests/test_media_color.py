"""Colour conversion on the training device equals swscale's."""

import numpy as np
import pytest
import torch

from entprog.media import assets, color, h264, video


@pytest.mark.parametrize(("name", "height", "width"), [("cam01", 96, 64), ("walk", 98, 162), ("jump", 240, 352)])
def test_within_one_level_of_swscale_on_real_clips(name, height, width):
    frames, _ = video.read_frames(assets.clip(name), [0, 0.5, 1.0], size=(height, width))
    frames[2] = np.random.default_rng(0).integers(0, 256, frames[2].shape)  # the hardest chroma there is
    mp4 = h264.encode(frames, 12)
    rgb = color.yuv420_to_rgb(torch.from_numpy(h264.decode_yuv(mp4)))
    assert rgb.shape == (3, 3, height, width) and rgb.dtype == torch.float32
    levels = (rgb * 127.5 + 127.5).permute(0, 2, 3, 1).numpy()
    assert np.abs(levels - h264.decode_rgb(mp4)).max() < 1


def test_batches_and_known_colours():
    height = width = 4
    planes = torch.full((2, 5, height * 3 // 2, width), 128, dtype=torch.uint8)
    planes[0, :, :height], planes[1, :, :height] = 16, 235
    rgb = color.yuv420_to_rgb(planes)
    assert rgb.shape == (2, 5, 3, height, width)
    torch.testing.assert_close(rgb[0], torch.full_like(rgb[0], -1), atol=1e-6, rtol=0)
    torch.testing.assert_close(rgb[1], torch.full_like(rgb[1], 1), atol=1e-6, rtol=0)
    torch.testing.assert_close(rgb[0, 3], color.yuv420_to_rgb(planes[0, 3]))


def test_values_out_of_range_are_clamped():
    planes = torch.randint(0, 256, (3, 12, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert color.yuv420_to_rgb(planes).abs().max() <= 1
