"""Whether the person moves as told: the pose seen in a result against the pose that it was to follow."""

import numpy as np

MIN_VISIBILITY = 0.5
"""A joint of the wanted pose counts from this visibility on."""
LOST = 1.0
"""Distance of a joint in a frame in which nobody was found, and the most that any joint counts: the body's size."""


def joint_distances(wanted: np.ndarray, seen: np.ndarray, height: int, width: int) -> np.ndarray:
    """Distances of the visible joints, over the body's size: float [joints of all frames], 0..LOST.

    wanted, seen: float [F, 33, 3] (x, y in 0..1 of a frame of height × width pixels, visibility), NaN in `seen` where
    nobody was found. A body's size is the larger side of the box around its visible joints in that frame, as PCK of
    Yang and Ramanan (2013) has it.
    """
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
        "pose_found": float(np.isfinite(seen[..., :2]).all((1, 2)).mean()),
    }
