"""YUV 4:2:0 → RGB on the training device."""

import torch
import torch.nn.functional as F

KR, KB = 0.2126, 0.0722
"""Weights of red and blue in luma, ITU-R BT.709."""


def yuv420_to_rgb(planes: torch.Tensor) -> torch.Tensor:
    """uint8 [..., H*3/2, W] (BT.709 limited range, as `h264.decode_yuv` gives) → float32 [..., 3, H, W] in -1..1.

    Chroma is interpolated linearly between samples in the middle of four pixels, where `h264.encode` puts them.
    In levels (·127.5 + 127.5) it is swscale's RGB (`h264.decode_rgb`: bilinear, accurate_rnd, full_chroma_int)
    before rounding.
    """
    *leading, rows, width = planes.shape
    height = rows * 2 // 3
    flat = planes.reshape(-1, rows * width)
    luma, chroma = flat.split((height * width, height * width // 2), dim=1)
    luma = (luma.reshape(-1, height, width).float() - 16) * (2 / 219) - 1  # -1..1
    chroma = (chroma.reshape(-1, 2, height // 2, width // 2).float() - 128) * (2 / 224)  # -1..1
    blueness, redness = F.interpolate(chroma, (height, width), mode="bilinear", align_corners=False).unbind(1)
    red = luma + 2 * (1 - KR) * redness
    blue = luma + 2 * (1 - KB) * blueness
    green = luma - (2 * KR * (1 - KR) * redness + 2 * KB * (1 - KB) * blueness) / (1 - KR - KB)
    return torch.stack((red, green, blue), 1).clamp_(-1, 1).reshape(*leading, 3, height, width)
