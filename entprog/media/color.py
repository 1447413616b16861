"""YUV 4:2:0 → RGB on the training device."""

import torch


def yuv420_to_rgb(planes: torch.Tensor) -> torch.Tensor:
    """uint8 [..., H*3/2, W] (BT.709 limited range, as `video.decode_yuv` gives) → float32 [..., 3, H, W] in -1..1."""
    raise NotImplementedError
