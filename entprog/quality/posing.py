"""Whether the person moves as asked: the pose seen in a result against the pose that it was to follow."""

import numpy as np
import torch
from torch.nn import functional

from entprog.media import skeleton, wholebody

MIN_VISIBILITY = 0.5
"""A joint of the wanted pose counts from this visibility on."""
LOST = 1.0
"""Distance of a joint in a frame in which nobody was found, and the most that any joint counts: the body's size."""


def joint_distances(wanted: np.ndarray, seen: np.ndarray, height: int, width: int) -> np.ndarray:
    """Distances of the visible joints, over the body's size: float [joints of all frames], 0..LOST.

    wanted, seen: float [F, 33 or 133, 3] (x, y in 0..1 of a frame of height × width pixels, visibility), NaN in `seen`
    where nobody was found; the body's points count. A body's size is the larger side of the box around its visible
    joints in that frame, as PCK of Yang and Ramanan (2013) has it.
    """
    wanted, seen = wholebody.body(wanted), wholebody.body(seen)
    visible = wanted[..., 2] >= MIN_VISIBILITY
    pixels = np.array([width, height])
    offset = np.linalg.norm((seen[..., :2] - wanted[..., :2]) * pixels, axis=-1)
    parts = []
    for joints, points, distances in zip(visible, wanted[..., :2] * pixels, offset, strict=True):
        if joints.sum() < 2:
            continue
        size = max(np.ptp(points[joints], axis=0).max(), 1.0)
        parts.append(np.nan_to_num(distances[joints] / size, nan=LOST).clip(max=LOST))
    return np.concatenate(parts) if parts else np.zeros(0)


def pose_values(
    wanted: np.ndarray, seen: np.ndarray, height: int, width: int, pck_threshold: float
) -> dict[str, float]:
    """A clip's `pose_distance` (mean), `pck` (share of joints within the threshold) and `pose_found` (share of frames
    in which there is a person); NaN for the first two if no joint is visible in the wanted pose.
    """
    distances = joint_distances(wanted, seen, height, width)
    return {
        "pose_distance": float(distances.mean()) if len(distances) else float("nan"),
        "pck": float((distances <= pck_threshold).mean()) if len(distances) else float("nan"),
        "pose_found": float(np.isfinite(wholebody.body(seen)[..., :2]).all((1, 2)).mean()),
    }


def part_values(wanted: np.ndarray, seen: np.ndarray, height: int, width: int) -> dict[str, float]:
    """A clip's `face_distance` and `hand_distance`: mean distance of the points of its faces, and of its hands, from
    the wanted ones, over the larger side of the box around these in that frame, each at most LOST; NaN if the wanted
    pose shows none.

    wanted, seen: float [F, 33 or 133, 3] as of `joint_distances`. A part counts in frames in which the wanted pose has
    enough of its points (`wholebody.ENOUGH`), and there those points.
    """
    wanted, seen = wholebody.whole(wanted), wholebody.whole(seen)
    pixels, out = np.array([width, height]), {}
    for name, parts in wholebody.PARTS.items():
        found = []
        for part in parts:
            places, count = wanted[:, part, :2] * pixels, wanted[:, part, 2] >= wholebody.SURE
            offset = np.linalg.norm(seen[:, part, :2] * pixels - places, axis=-1)
            for here, points, distances in zip(count, places, offset, strict=True):
                if here.mean() >= wholebody.ENOUGH:
                    size = max(np.ptp(points[here], axis=0).max(), 1.0)
                    found.append(np.nan_to_num(distances[here] / size, nan=LOST).clip(max=LOST))
        out[f"{name}_distance"] = float(np.concatenate(found).mean()) if found else float("nan")
    return out


CHANGED = 16.0
"""Levels of 0..255 by which a pixel differs from the reference image before it counts as drawn."""
BODY = 0.07
"""How far a body reaches from its skeleton, over the picture's height."""


def drawn_distance(reference: np.ndarray, own: np.ndarray, results: np.ndarray, wanted: np.ndarray) -> float:
    """How far what a clip draws, beside what its reference image shows, and the wanted skeleton are from each other,
    over the picture's height: 0..1, smaller is better; what random drawing gives depends on the motion.

    For pictures that are too small for a pose network, in front of a background that stands still. reference uint8
    [H, W, 3] shows the person in the pose `own` [33 or 133, 3]; results uint8 [F, H, W, 3]; wanted [F, 33 or 133, 3].
    The larger of two means, as in the modified Hausdorff distance (Dubuisson and Jain 1994): how far outside the wanted
    body what is drawn lies, weighted by how much it differs from the reference image; and how far the next drawn pixel
    is from each pixel of the wanted limbs. What lies in the reference image's own body counts in neither: what it
    uncovers is no drawing.
    """
    height, width = reference.shape[:2]
    change = torch.from_numpy(np.abs(results.astype(np.float32) - reference).mean(-1))
    change = functional.avg_pool2d(change[:, None], 3, 1, 1)[:, 0]  # without speckles
    away, there = (
        skeleton.distance(torch.from_numpy(wholebody.body(p)).float(), height, width) for p in (wanted, own[None])
    )
    free = there > BODY * height
    weight = (change - CHANGED).clamp_min(0) * free
    outside = (away.clamp(max=height) - BODY * height).clamp_min(0) / height
    extra = float((weight * outside).sum() / weight.sum()) if weight.sum() > 0 else 1.0
    frames = zip((away < 1) & free, (change > CHANGED) & free, strict=True)
    gaps = torch.cat([_gaps(limbs, drawn) for limbs, drawn in frames]).clamp(max=height) / height
    return max(extra, float(gaps.mean())) if len(gaps) else extra


def _gaps(limbs: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """Distance in pixels of every pixel of `limbs` from the nearest one of `drawn`, infinite where there is none: both
    bool [H, W]; float [pixels of limbs]."""
    points, others = limbs.nonzero().float(), drawn.nonzero().float()
    return torch.cdist(points, others).amin(1) if len(others) else torch.full((len(points),), torch.inf)
