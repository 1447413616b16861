"""Whole-body poses drawn as DWPose draws them (Yang et al., arXiv 2307.15880): what many published networks have seen.

Limbs in OpenPose's colours, dimmed, joints over them, then hands and faces. Its sizes are those of a picture with a
shorter side of 512 pixels; here they grow and shrink with it, and edges fade over one pixel. This file stands alone: it
lies beside saved weights as skeleton.py.
"""

import colorsys

import torch

# OpenPose's 18 joints: nose, neck, right arm, left arm, right leg, left leg, eyes, ears. The neck is between the
# shoulders. Numbers of COCO-WholeBody's points.
_NECK = (5, 6)
_JOINTS = (0, None, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3)
_LIMBS = (
    (1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13), (1, 0),
    (0, 14), (14, 16), (0, 15), (15, 17),
)  # fmt: skip
"""Pairs of joints, later ones drawn over earlier ones."""
_COLORS = tuple(
    tuple(level / 255 for level in color)
    for color in (
        (255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0), (0, 255, 0), (0, 255, 85),
        (0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255), (0, 0, 255), (85, 0, 255), (170, 0, 255),
        (255, 0, 255), (255, 0, 170), (255, 0, 85),
    )
)  # fmt: skip
"""RGB in 0..1 of each limb, and of each joint."""
_DIM = 0.6
"""What is left of the limbs' light under the joints."""
_FACE, _HANDS = range(23, 91), (91, 112)
_PARTS = ((23, 91), (91, 112), (112, 133))
_ENOUGH = 0.5
"""Share of the points of a face or hand that are to be seen: of fewer none is drawn. A body's 33 points have a few."""
_BONES = tuple(
    (0 if step == 0 else 4 * finger + step, 4 * finger + step + 1) for finger in range(5) for step in range(4)
)
"""Pairs of a hand's 21 points, from the wrist along each finger."""
_BONE_COLORS = tuple(colorsys.hsv_to_rgb(number / len(_BONES), 1.0, 1.0) for number in range(len(_BONES)))
_BLUE, _WHITE = (0.0, 0.0, 1.0), (1.0, 1.0, 1.0)
_SIDE = 512.0
"""Pixels of the shorter side that the sizes below belong to."""
_LIMB, _JOINT, _BONE, _FINGER, _DOT = 4.0, 4.0, 1.0, 4.0, 3.0
"""Half widths of limbs and of hands' bones, radii of joints and of points of hands and face, in pixels."""
_LEAST = 0.75
"""Least half width or radius in pixels of what is drawn."""

CHUNK_PIXELS = 2**22
"""Pixels held at once (frames × height × width)."""


def draw(points: torch.Tensor, height: int, width: int, min_visibility: float = 0.3) -> torch.Tensor:
    """float [..., 133, 3] (COCO-WholeBody: x, y in 0..1, score) → float32 [..., 3, H, W] in -1..1, black where nothing
    is drawn. What has an end less visible than min_visibility, or NaN, is not drawn, nor is a face or a hand of which
    less than half of the points are seen."""
    leading = points.shape[:-2]
    points = points.reshape(-1, *points.shape[-2:]).float()
    frames = max(1, CHUNK_PIXELS // (height * width))
    drawn = [_draw(part, height, width, min_visibility) for part in points.split(frames) if len(part)]
    out = torch.cat(drawn) if drawn else points.new_empty(0, 3, height, width)
    return out.reshape(*leading, 3, height, width)


def _draw(points: torch.Tensor, height: int, width: int, min_visibility: float) -> torch.Tensor:
    """[N, 133, 3] → [N, 3, H, W]."""
    x_y = points[..., :2] * points.new_tensor([width, height])
    seen = (points[..., 2] >= min_visibility) & x_y.isfinite().all(-1)
    for first, end in _PARTS:
        seen[:, first:end] &= seen[:, first:end].float().mean(1, keepdim=True) >= _ENOUGH
    x_y = torch.where(seen[..., None], x_y, 0)
    neck = x_y[:, _NECK].mean(1)
    joints = torch.stack([neck if place is None else x_y[:, place] for place in _JOINTS], 1)
    there = torch.stack([seen[:, _NECK].all(1) if place is None else seen[:, place] for place in _JOINTS], 1)
    scale = min(height, width) / _SIDE
    canvas = points.new_zeros(len(points), height, width, 3)

    def paint(a, b, visible, radius, color, tapered=False):
        _paint(canvas, a, b, visible, max(radius * scale, _LEAST), color, tapered)

    for (start, end), color in zip(_LIMBS, _COLORS, strict=False):  # 17 limbs, 18 joints
        paint(joints[:, start], joints[:, end], there[:, start] & there[:, end], _LIMB, color, tapered=True)
    canvas *= _DIM
    for place, color in enumerate(_COLORS):
        paint(joints[:, place], joints[:, place], there[:, place], _JOINT, color)
    for first in _HANDS:
        for (start, end), color in zip(_BONES, _BONE_COLORS, strict=True):
            start, end = first + start, first + end
            paint(x_y[:, start], x_y[:, end], seen[:, start] & seen[:, end], _BONE, color)
        for place in range(first, first + 21):
            paint(x_y[:, place], x_y[:, place], seen[:, place], _FINGER, _BLUE)
    for place in _FACE:
        paint(x_y[:, place], x_y[:, place], seen[:, place], _DOT, _WHITE)
    return canvas.permute(0, 3, 1, 2).mul(2).sub(1).contiguous()


def _paint(
    canvas: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    seen: torch.Tensor,
    radius: float,
    color: tuple[float, float, float],
    tapered: bool,
) -> None:
    """Draw a limb from a to b [N, 2] in pixels on those frames [N, H, W, 3] where it is `seen` [N]; only the pixels
    around it are touched. tapered: an ellipse with these ends, `radius` wide at its middle; otherwise a line with round
    ends."""
    height, width = canvas.shape[1:3]
    sides = canvas.new_tensor([width, height])
    low = torch.minimum(a, b).sub(radius + 1).floor().clamp_min(0).minimum(sides)
    high = torch.maximum(a, b).add(radius + 1).ceil().clamp_min(0).minimum(sides)
    reach = torch.where(seen[:, None], high - low, 0).amax(0)
    wide, tall = map(int, reach.tolist())
    if not wide or not tall:
        return
    corner = low.minimum(sides - reach).long()
    columns = corner[:, :1] + torch.arange(wide, device=canvas.device)
    rows = corner[:, 1:] + torch.arange(tall, device=canvas.device)
    frames = torch.arange(len(canvas), device=canvas.device)
    place = frames[:, None, None], rows[:, :, None], columns[:, None, :]
    off = torch.stack(torch.broadcast_tensors(columns[:, None, :], rows[:, :, None]), -1) + 0.5
    distance = (_from_ellipse if tapered else _from_line)(off, a[:, None, None], b[:, None, None], radius)
    cover = (0.5 - distance).clamp(0, 1) * seen[:, None, None]
    canvas[place] = torch.lerp(canvas[place], canvas.new_tensor(color), cover[..., None])


def _from_line(at: torch.Tensor, a: torch.Tensor, b: torch.Tensor, radius: float) -> torch.Tensor:
    """Pixels from places [N, h, w, 2] to the edge of a line of that half width, negative inside."""
    along, to = b - a, at - a
    share = ((to * along).sum(-1) / along.square().sum(-1).clamp_min(1e-6)).clamp(0, 1)
    return (to - share[..., None] * along).square().sum(-1).sqrt() - radius


def _from_ellipse(at: torch.Tensor, a: torch.Tensor, b: torch.Tensor, radius: float) -> torch.Tensor:
    """Pixels from places to the edge of the ellipse with ends a and b, about, negative inside."""
    half = (b - a).square().sum(-1).sqrt().div(2).clamp_min(_LEAST)
    along = (b - a) / (2 * half)[..., None]
    to = at - (a + b) / 2
    u = (to * along).sum(-1)
    v = to[..., 0] * along[..., 1] - to[..., 1] * along[..., 0]
    level = ((u / half).square() + (v / radius).square()).sqrt()
    slope = ((u / half.square()).square() + (v / radius**2).square()).sqrt().clamp_min(1e-6)
    return (level - 1) * level.clamp_min(1e-6) / slope
