"""Poses of either layout drawn, as pictures that a network or a person sees."""

from pathlib import Path
from typing import get_args

import torch

from entprog.config import Skeleton
from entprog.media import dwpose, skeleton, wholebody

STYLES: tuple[Skeleton, ...] = get_args(Skeleton)
LIMBS, DWPOSE = STYLES


def draw(points: torch.Tensor, height: int, width: int, style: Skeleton = LIMBS) -> torch.Tensor:
    """float [..., 33 or 133, 3] (x, y in 0..1, visibility) → float32 [..., 3, H, W] in -1..1.

    style: `limbs`, the body's, in this project's colours (`skeleton`); `dwpose`: body, hands and face as DWPose draws
    them, as far as the pose has their points.
    """
    if style == DWPOSE:
        return dwpose.draw(wholebody.whole(points), height, width)
    return skeleton.draw(wholebody.body(points), height, width)


def unlike(style: Skeleton, trained: int, shown: int) -> str:
    """What a network that was trained on poses of so many points is shown of poses of others, in words; empty where
    it is the same."""
    if style != DWPOSE or trained == shown:
        return ""
    if shown < trained:
        return f"poses of {shown} points draw the body alone; the network was trained on {trained}, with face and hands"
    return f"poses of {shown} points draw face and hands, which the network has not seen: it was trained on {trained}"


def version(style: Skeleton) -> list[str]:
    """What tells pictures in a style from others in caches; nothing for `limbs`, which was the first."""
    return [] if style == LIMBS else [style, "parts with enough points"]


def program(style: Skeleton) -> Path:
    """The file that draws in a style, which stands alone."""
    return Path((dwpose if style == DWPOSE else skeleton).__file__)


def points(style: Skeleton) -> int:
    """Points of the poses that the `draw` of that file takes."""
    return wholebody.POINTS if style == DWPOSE else len(wholebody.BLAZEPOSE)
