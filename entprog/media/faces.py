"""Faces cut out of videos, as Wan-Animate's makers cut them for its motion encoder
(`wan/modules/animate/preprocess/utils.py` of github.com/Wan-Video/Wan2.2)."""

from dataclasses import dataclass

import torch
from torch.nn import functional

from entprog.media import wholebody

AREA = 1.3
"""Area of the cut over that of the box around the face's points."""
ABOVE = 0.75
"""Share of what is added to the box's height that lies above it: points end at the brows."""


@dataclass(frozen=True)
class Faces:
    """Videos and where faces are in them."""

    video: torch.Tensor
    """float [B, F, 3, H, W] in -1..1."""
    pose: torch.Tensor
    """float [B, F, 33 or 133, 3]: x, y in 0..1, score. Of 33 points no face is known."""


def cut(faces: Faces, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(float [B, F, 3, size, size] in -1..1, in steps of 1/127.5, -1 everywhere where no face is seen; bool [B, F]:
    where one is). The box around the points is stretched to a square."""
    video, pose = faces.video, faces.pose.to(faces.video.device)
    out = video.new_full((*video.shape[:2], 3, size, size), -1.0)
    there = torch.zeros(video.shape[:2], dtype=torch.bool, device=video.device)
    if pose.shape[2] != wholebody.POINTS:
        return out, there
    height, width = video.shape[3:]
    points = pose[..., wholebody.FACE, :]
    sure = (points[..., 2] >= wholebody.SURE) & points[..., :2].isfinite().all(-1)
    for clip, frame in (sure.float().mean(-1) >= wholebody.ENOUGH).nonzero().tolist():
        x_y = points[clip, frame, :, :2]
        left, top, right, bottom = _box(x_y[x_y.isfinite().all(-1)], height, width)
        if right > left and bottom > top:
            face = functional.interpolate(
                video[clip, frame, None, :, top:bottom, left:right], (size, size), mode="bilinear"
            )
            out[clip, frame] = (face[0] + 1).mul(127.5).round().clamp(0, 255) / 127.5 - 1
            there[clip, frame] = True
    return out, there


def _box(x_y: torch.Tensor, height: int, width: int) -> tuple[int, int, int, int]:
    """Left, top, right, bottom in pixels of the cut around points [N, 2] in 0..1."""
    sides = x_y.new_tensor([width, height])
    low, high = (x_y.amin(0) * sides).tolist(), (x_y.amax(0) * sides).tolist()
    grown = AREA**0.5 - 1
    wider, taller = (grown * (high[axis] - low[axis]) for axis in (0, 1))
    left, right = max(low[0] - wider / 2, 0), min(high[0] + wider / 2, width)
    top, bottom = max(low[1] - ABOVE * taller, 0), min(high[1] + (0.25 * taller), height)
    return int(left), int(top), int(right), int(bottom)
