"""Poses of either layout drawn, as pictures that a network or a person sees."""

from pathlib import Path

import torch

from entprog.config import Skeleton
from entprog.media import dwpose, skeleton, wholebody
from entprog.media.styles import DWPOSE, LIMBS, WAN_ANIMATE

LOOKS = {DWPOSE: dwpose.DWPOSE, WAN_ANIMATE: dwpose.WAN_ANIMATE}
"""How whole bodies are drawn, by style."""


def draw(points: torch.Tensor, height: int, width: int, style: Skeleton = LIMBS) -> torch.Tensor:
    """float [..., 33 or 133, 3] (x, y in 0..1, visibility) → float32 [..., 3, H, W] in -1..1.

    style: `limbs`, the body's, in this project's colours (`skeleton`); `dwpose`: body, hands and face as DWPose draws
    them; `wan_animate`: body with toes, and hands, as Wan-Animate's makers do; as far as the pose has their points.
    """
    if style in LOOKS:
        return dwpose.draw(wholebody.whole(points), height, width, LOOKS[style])
    return skeleton.draw(wholebody.body(points), height, width)


def program(style: Skeleton) -> str:
    """A program that stands alone, whose `draw` draws in a style."""
    if style not in LOOKS:
        return Path(skeleton.__file__).read_text()
    return Path(dwpose.__file__).read_text() + f"\nLOOK = {style.upper()}\n"  # there a look is called as its style


def points(style: Skeleton) -> int:
    """Points of the poses that the `draw` of that program takes."""
    return wholebody.POINTS if style in LOOKS else len(wholebody.BLAZEPOSE)
