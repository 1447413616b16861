"""Whole-body poses drawn as DWPose draws them (Yang et al., arXiv 2307.15880), or as Wan-Animate's makers do: what many
published networks have seen.

Limbs in OpenPose's colours, dimmed, joints over them, then hands and faces. DWPose's sizes are those of a picture with
a shorter side of 512 pixels; here they grow and shrink with it. Wan-Animate's drawing (`human_visualization.py` of
github.com/Wan-Video/Wan2.2) has toes and no face, and is finer. Edges fade over one pixel. This file stands alone: it
lies beside saved weights as skeleton.py.
"""

import colorsys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import NamedTuple

import torch

# OpenPose's 18 joints: nose, neck, right arm, left arm, right leg, left leg, eyes, ears; each the middle of these of
# COCO-WholeBody's points.
_JOINTS = tuple(
    places if isinstance(places, tuple) else (places,)
    for places in (0, (5, 6), 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3)
)
_TOES = ((17, 18), (20, 21))
"""Left and right: the middle of big and small toe, or the big one where a pose has no other."""
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
        (255, 0, 255), (255, 0, 170), (255, 0, 85), (200, 200, 0), (100, 100, 0),
    )
)  # fmt: skip
"""RGB in 0..1 of each limb, and of each joint."""
_DIM = 0.6
"""What is left of the limbs' light under the joints."""
_FACE, _HANDS = range(23, 91), (91, 112)
_PARTS = ((23, 91), (91, 112), (112, 133))
_BONES = tuple(
    (0 if step == 0 else 4 * finger + step, 4 * finger + step + 1) for finger in range(5) for step in range(4)
)
"""Pairs of a hand's 21 points, from the wrist along each finger."""
_BONE_COLORS = tuple(colorsys.hsv_to_rgb(number / len(_BONES), 1.0, 1.0) for number in range(len(_BONES)))
_BLUE, _WHITE = (0.0, 0.0, 1.0), (1.0, 1.0, 1.0)
_LEAST = 0.75
"""Least half width or radius in pixels of what DWPose draws."""


@dataclass(frozen=True)
class Sizes:
    """Half widths and radii in pixels."""

    limb: float
    joint: float
    bone: float
    finger: float
    dot: float
    """Of a face's points."""


@dataclass(frozen=True)
class Look:
    """What is drawn of a pose, and how large."""

    joints: tuple[tuple[int, ...], ...]
    limbs: tuple[tuple[int, int], ...]
    face: bool
    sure: float
    """Least score of a point that is drawn."""
    joint_score: Callable[..., torch.Tensor]
    """Score of a joint in the middle of two points: of theirs [N, 2], with dim=1."""
    enough: float
    """Share of the points of a face or hand that are to be seen: of fewer none is drawn."""
    sizes: Callable[[int], Sizes]
    """Shorter side of the picture in pixels → what is drawn in it."""


def _as_at_512(side: int) -> Sizes:
    return Sizes(*(max(pixels * side / 512, _LEAST) for pixels in (4, 4, 1, 4, 3)))


def _in_whole_pixels(side: int) -> Sizes:
    """Pixels to either side of the middle one, which counts half; of a hand's bones the whole width."""
    stick = max(side // 200 - 1, 1)
    fine = max(stick // 2, 1)
    return Sizes(stick + 0.5, stick + 0.5, fine / 2, fine + 0.5, 0)


DWPOSE = Look(_JOINTS, _LIMBS, face=True, sure=0.3, joint_score=torch.amin, enough=0.5, sizes=_as_at_512)
WAN_ANIMATE = Look(
    (*_JOINTS, *_TOES), (*_LIMBS, (13, 18), (10, 19)), face=False, sure=0.5, joint_score=torch.mean, enough=0,
    sizes=_in_whole_pixels,
)  # fmt: skip
LOOK = DWPOSE
"""What is drawn where nothing else is asked for."""

_KNOWN = 0.5
"""Share of the points of a face or hand that are to have a place, whatever their score: three of a hand
are among a body's 33, which are none."""
CHUNK_PIXELS = 2**22
"""Pixels held at once (frames × height × width)."""


def draw(points: torch.Tensor, height: int, width: int, look: Look | None = None) -> torch.Tensor:
    """float [..., 133, 3] (COCO-WholeBody: x, y in 0..1, score) → float32 [..., 3, H, W] in -1..1, black where nothing
    is drawn. What has an end that is less sure than the look wants, or NaN, is not drawn, nor is a face or a hand of
    which fewer points are seen, or fewer than half are there at all. points: a tensor or an array."""
    points = torch.as_tensor(points)
    leading = points.shape[:-2]
    points = points.reshape(-1, *points.shape[-2:]).float()
    frames = max(1, CHUNK_PIXELS // (height * width))
    drawn = [_draw(part, height, width, look or LOOK) for part in points.split(frames) if len(part)]
    out = torch.cat(drawn) if drawn else points.new_empty(0, 3, height, width)
    return out.reshape(*leading, 3, height, width)


def _draw(points: torch.Tensor, height: int, width: int, look: Look) -> torch.Tensor:
    """[N, 133, 3] → [N, 3, H, W]."""
    points = points.clone()
    for big, small in _TOES:
        there = points[:, small, :2].isfinite().all(-1, keepdim=True)
        points[:, small] = torch.where(there, points[:, small], points[:, big])
    x_y = points[..., :2] * points.new_tensor([width, height])
    known, scores = x_y.isfinite().all(-1), points[..., 2]
    sure = torch.stack([look.joint_score(scores[:, places], dim=1) for places in look.joints], 1) >= look.sure
    there = sure & torch.stack([known[:, places].all(1) for places in look.joints], 1)
    joints = torch.stack([x_y[:, places].mean(1) for places in look.joints], 1)
    joints = torch.where(there[..., None], joints, 0)
    seen = known & (scores >= look.sure)
    for first, end in _PARTS:
        there_are, seen_are = (of[:, first:end].float().mean(1, keepdim=True) for of in (known, seen))
        seen[:, first:end] &= (there_are >= _KNOWN) & (seen_are >= look.enough)
    x_y = torch.where(seen[..., None], x_y, 0)
    sizes = look.sizes(min(height, width))
    canvas = points.new_zeros(len(points), height, width, 3)

    def strokes(of, visible, ends, radius, colors):
        return [
            _Stroke(of[:, start], of[:, end], visible[:, start] & visible[:, end], radius, color)
            for (start, end), color in zip(ends, colors, strict=False)
        ]

    def dots(of, visible, places, radius, colors):
        return strokes(of, visible, [(place, place) for place in places], radius, colors)

    _paint(canvas, strokes(joints, there, look.limbs, sizes.limb, _COLORS), tapered=True)  # one fewer than joints
    canvas *= _DIM
    over = dots(joints, there, range(len(look.joints)), sizes.joint, _COLORS)
    for first in _HANDS:
        bones = [(first + start, first + end) for start, end in _BONES]
        over += strokes(x_y, seen, bones, sizes.bone, _BONE_COLORS)
        over += dots(x_y, seen, range(first, first + 21), sizes.finger, repeat(_BLUE))
    if look.face:
        over += dots(x_y, seen, _FACE, sizes.dot, repeat(_WHITE))
    _paint(canvas, over)
    return canvas.permute(0, 3, 1, 2).mul(2).sub(1).contiguous()


class _Stroke(NamedTuple):
    """A limb from a to b [N, 2] in pixels, on those frames where it is `seen` [N]."""

    a: torch.Tensor
    b: torch.Tensor
    seen: torch.Tensor
    radius: float
    color: tuple[float, float, float]


def _paint(canvas: torch.Tensor, strokes: Sequence[_Stroke], tapered: bool = False) -> None:
    """Draw limbs over frames [N, H, W, 3], one after the other; only the pixels around each are touched. tapered:
    ellipses with these ends, `radius` wide at their middle; otherwise lines with round ends."""
    height, width = canvas.shape[1:3]
    sides = canvas.new_tensor([width, height])
    a, b, seen = (torch.stack([getattr(stroke, name) for stroke in strokes]) for name in ("a", "b", "seen"))
    around = canvas.new_tensor([stroke.radius + 1 for stroke in strokes])[:, None, None]
    low = torch.minimum(a, b).sub(around).floor().clamp_min(0).minimum(sides)
    high = torch.maximum(a, b).add(around).ceil().clamp_min(0).minimum(sides)
    reaches = torch.where(seen[..., None], high - low, 0).amax(1)
    corners = low.minimum(sides - reaches[:, None]).long()
    frames = torch.arange(len(canvas), device=canvas.device)
    # A GPU is waited for once, not for every limb.
    for stroke, corner, (wide, tall) in zip(strokes, corners, reaches.long().tolist(), strict=True):
        if not wide or not tall:
            continue
        columns = corner[:, :1] + torch.arange(wide, device=canvas.device)
        rows = corner[:, 1:] + torch.arange(tall, device=canvas.device)
        place = frames[:, None, None], rows[:, :, None], columns[:, None, :]
        off = torch.stack(torch.broadcast_tensors(columns[:, None, :], rows[:, :, None]), -1) + 0.5
        ends = stroke.a[:, None, None], stroke.b[:, None, None]
        distance = (_from_ellipse if tapered else _from_line)(off, *ends, stroke.radius)
        cover = (0.5 - distance).clamp(0, 1) * stroke.seen[:, None, None]
        canvas[place] = torch.lerp(canvas[place], canvas.new_tensor(stroke.color), cover[..., None])


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
