"""Poses of either layout drawn, as pictures that a network or a person sees."""

from pathlib import Path

import torch

from entprog.config import Skeleton
from entprog.media import dwpose, skeleton, wholebody
from entprog.media.styles import DWPOSE, LIMBS


def draw(points: torch.Tensor, height: int, width: int, style: Skeleton = LIMBS) -> torch.Tensor:
    """float [..., 33 or 133, 3] (x, y in 0..1, visibility) → float32 [..., 3, H, W] in -1..1.

    style: `limbs`, the body's, in this project's colours (`skeleton`); `dwpose`: body, hands and face as DWPose draws
    them, as far as the pose has their points.
    """
    if style == DWPOSE:
        return dwpose.draw(wholebody.whole(points), height, width)
    return skeleton.draw(wholebody.body(points), height, width)


def program(style: Skeleton) -> Path:
    """The file that draws in a style, which stands alone."""
    return Path((dwpose if style == DWPOSE else skeleton).__file__)


def points(style: Skeleton) -> int:
    """Points of the poses that the `draw` of that file takes."""
    return wholebody.POINTS if style == DWPOSE else len(wholebody.BLAZEPOSE)
