"""Poses of either layout drawn, as pictures that a network or a person sees."""

from pathlib import Path

import torch

from entprog.config import Skeleton
from entprog.media import dwpose, skeleton, wholebody
from entprog.media.styles import DWPOSE, LIMBS, WAN_ANIMATE

LOOKS = {DWPOSE: "DWPOSE", WAN_ANIMATE: "WAN_ANIMATE"}
"""Styles of whole bodies → their names in `dwpose`."""


def draw(points: torch.Tensor, height: int, width: int, style: Skeleton = LIMBS) -> torch.Tensor:
    """float [..., 33 or 133, 3] (x, y in 0..1, visibility) → float32 [..., 3, H, W] in -1..1.

    style: `limbs`, the body's, in this project's colours (`skeleton`); `dwpose`: body, hands and face as DWPose draws
    them; `wan_animate`: body with toes, and hands, as Wan-Animate's makers do; as far as the pose has their points.
    """
    if style in LOOKS:
        return dwpose.draw(wholebody.whole(points), height, width, getattr(dwpose, LOOKS[style]))
    return skeleton.draw(wholebody.body(points), height, width)


def program(style: Skeleton) -> str:
    """A program that stands alone, whose `draw` draws in a style."""
    source = Path((dwpose if style in LOOKS else skeleton).__file__).read_text()
    if style in (LIMBS, DWPOSE):
        return source
    chosen = f"\n\ndraw = functools.partial(draw, look={LOOKS[style]})\n"
    return source.replace("import colorsys\n", "import colorsys\nimport functools\n", 1) + chosen


def points(style: Skeleton) -> int:
    """Points of the poses that the `draw` of that program takes."""
    return wholebody.POINTS if style in LOOKS else len(wholebody.BLAZEPOSE)
