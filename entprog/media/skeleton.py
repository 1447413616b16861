"""Poses drawn as coloured limbs: what the network sees of a pose."""

import colorsys

import torch

# BlazePose's points: 0 nose, 1-6 eyes, 7/8 ears, 9/10 mouth, then left/right of: 11 shoulders, 13 elbows, 15 wrists,
# 17 little fingers, 19 index fingers, 21 thumbs, 23 hips, 25 knees, 27 ankles, 29 heels, 31 toes. Left is the person's.
_CENTRE = ((7, 8), (9, 10), (11, 12), (23, 24))
_LEFT = ((0, 7), (11, 23), (11, 13), (13, 15), (15, 19), (15, 17), (23, 25), (25, 27), (27, 29), (27, 31))
_RIGHT = tuple((a + (a > 0), b + 1) for a, b in _LEFT)

LIMBS = (*_CENTRE, *_LEFT, *_RIGHT)
"""Pairs of points, later ones drawn over earlier ones."""


def _hues(first: float, last: float, count: int) -> list[tuple[float, float, float]]:
    return [colorsys.hsv_to_rgb(first + (last - first) * i / (count - 1), 1.0, 1.0) for i in range(count)]


# The person's left runs from cyan to violet, the right from red to yellow-green; what joins them is white to grey.
COLORS = (
    (0.55, 0.55, 0.55),
    (0.75, 0.75, 0.75),
    (1.0, 1.0, 1.0),
    (0.85, 0.85, 0.85),
    *_hues(0.46, 0.86, len(_LEFT)),
    *_hues(0.0, 0.32, len(_RIGHT)),
)
"""RGB in 0..1 of each limb."""

CHUNK_PIXELS = 2**20
"""Pixels drawn at once (frames × height × width): bounds memory at some 16 MB a plane."""


def draw(
    points: torch.Tensor, height: int, width: int, line_width: float | None = None, min_visibility: float = 0.5
) -> torch.Tensor:
    """float [..., 33, 3] (x, y in 0..1, visibility) → float32 [..., 3, H, W] in -1..1, black where there is no limb.

    points: a tensor or an array. line_width in pixels; by default 1/40 of the geometric mean of the sides, at least
    1.5. Edges fade over one pixel. Limbs with an end less visible than min_visibility, or NaN, are not drawn.
    """
    points = torch.as_tensor(points)
    leading = points.shape[:-2]
    points = points.reshape(-1, *points.shape[-2:]).float()
    line_width = line_width or max(1.5, (height * width) ** 0.5 / 40)
    frames = max(1, CHUNK_PIXELS // (height * width))
    drawn = [_draw(part, height, width, line_width, min_visibility) for part in points.split(frames)]
    out = torch.cat(drawn) if drawn else points.new_empty(0, 3, height, width)
    return out.reshape(*leading, 3, height, width)


def _draw(points: torch.Tensor, height: int, width: int, line_width: float, min_visibility: float) -> torch.Tensor:
    """[N, 33, 3] → [N, 3, H, W]."""
    x_y = points[..., :2] * points.new_tensor([width, height])
    seen = (points[..., 2] >= min_visibility) & x_y.isfinite().all(-1)
    x_y = torch.where(seen[..., None], x_y, 0)
    row = torch.arange(height, device=points.device)[:, None] + 0.5
    column = torch.arange(width, device=points.device)[None, :] + 0.5
    image = points.new_full((3, len(points), height, width), -1.0)
    for (start, end), color in zip(LIMBS, COLORS, strict=True):
        distance = _from_limb(x_y[:, start], x_y[:, end], row, column)
        cover = distance.neg_().add_((line_width + 1) / 2).clamp_(0, 1)
        cover *= (seen[:, start] & seen[:, end])[:, None, None]
        for plane, ink in zip(image, color, strict=True):
            plane.lerp_(plane.new_tensor(2 * ink - 1), cover)
    return image.transpose(0, 1)


def distance(points: torch.Tensor, height: int, width: int, min_visibility: float = 0.5) -> torch.Tensor:
    """float [N, 33, 3] (x, y in 0..1, visibility) → float32 [N, H, W]: pixels from each pixel's centre to the nearest
    limb, infinite where no limb is visible."""
    x_y = points[..., :2].float() * points.new_tensor([width, height])
    seen = (points[..., 2] >= min_visibility) & x_y.isfinite().all(-1)
    x_y = torch.where(seen[..., None], x_y, 0)
    row, column = torch.arange(height)[:, None] + 0.5, torch.arange(width)[None, :] + 0.5
    nearest = torch.full((len(points), height, width), torch.inf)
    for start, end in LIMBS:
        there = (seen[:, start] & seen[:, end])[:, None, None]
        nearest = torch.where(there, nearest.minimum(_from_limb(x_y[:, start], x_y[:, end], row, column)), nearest)
    return nearest


def _from_limb(a: torch.Tensor, b: torch.Tensor, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    """Distance of each pixel's centre [N, H, W] from the limb a to b [N, 2], from its nearest point a + t·(b - a)."""
    a, b = a[:, :, None, None], b[:, :, None, None]
    along_x, along_y = (b - a).unbind(1)
    to_x, to_y = column - a[:, 0], row - a[:, 1]  # [N, 1, W] and [N, H, 1]
    length2 = (along_x**2 + along_y**2).clamp_min(1e-6)
    t = (to_x * (along_x / length2) + to_y * (along_y / length2)).clamp_(0, 1)
    return (to_x - t * along_x).square_().add_((to_y - t * along_y).square_()).sqrt_()
