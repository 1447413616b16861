"""Poses of either layout drawn, as pictures that a network or a person sees."""

import torch

from entprog.media import skeleton, wholebody


def draw(points: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """float [..., 33 or 133, 3] (x, y in 0..1, visibility) → float32 [..., 3, H, W] in -1..1."""
    return skeleton.draw(wholebody.body(points), height, width)
