"""Poses drawn as coloured limbs: what the network sees of a pose."""

import torch


def draw(
    points: torch.Tensor, height: int, width: int, line_width: float | None = None, min_visibility: float = 0.5
) -> torch.Tensor:
    """float [..., 33, 3] (x, y in 0..1, visibility) → float32 [..., 3, H, W] in -1..1, black where there is no limb.

    line_width in pixels (default: scales with the size). Limbs with an end less visible than
    min_visibility, or NaN, are not drawn.
    """
    raise NotImplementedError
