"""Whole-body poses without a network: a person of 133 points (COCO-WholeBody) who moves."""

import numpy as np

from entprog.media import wholebody

# The person faces us: their left is at the picture's right.
_BODY = [
    (0.50, 0.14), (0.52, 0.12), (0.48, 0.12), (0.55, 0.13), (0.45, 0.13), (0.60, 0.26), (0.40, 0.26), (0.66, 0.38),
    (0.34, 0.38), (0.70, 0.50), (0.30, 0.50), (0.56, 0.52), (0.44, 0.52), (0.57, 0.70), (0.43, 0.70), (0.57, 0.88),
    (0.43, 0.88), (0.60, 0.92), (0.58, 0.92), (0.56, 0.90), (0.40, 0.92), (0.42, 0.92), (0.44, 0.90),
]  # fmt: skip


def standing() -> np.ndarray:
    """float32 [133, 3] of x, y in 0..1 and visibility 1: arms a little apart, hands open, face towards us."""
    out = np.ones((wholebody.POINTS, 3), np.float32)
    out[: len(_BODY), :2] = _BODY
    turns = np.linspace(0, 2 * np.pi, 68, endpoint=False)
    out[wholebody.FACE, :2] = out[0, :2] + 0.04 * np.stack([np.sin(turns), np.cos(turns)], 1)
    for hand, wrist, side in ((wholebody.LEFT_HAND, 9, 1), (wholebody.RIGHT_HAND, 10, -1)):
        fingers = [(side * (0.012 * finger - 0.024), 0.01 * (joint + 1)) for finger in range(5) for joint in range(4)]
        out[hand, :2] = out[wrist, :2] + np.array([(0, 0), *fingers], np.float32)
    return out


def moving(frames: int) -> np.ndarray:
    """float32 [frames, 133, 3]: the person lifts both hands, and sways."""
    out = np.repeat(standing()[None], frames, axis=0)
    share = np.linspace(0, 1, frames, dtype=np.float32)[:, None]
    for hand, wrist in ((wholebody.LEFT_HAND, 9), (wholebody.RIGHT_HAND, 10)):
        out[:, wrist, 1] -= 0.2 * share[:, 0]
        out[:, hand, 1] -= 0.2 * share
    out[..., 0] += 0.03 * np.sin(6 * share)
    return out


def pictures(points: np.ndarray, height: int, width: int) -> list[np.ndarray]:
    """uint8 RGB [height, width, 3] a frame: bright squares at the points on a still, textured ground."""
    ground = np.random.default_rng(0).integers(0, 90, (height, width, 3), np.uint8)
    out = []
    for pose in points:
        frame = ground.copy()
        for x, y, _ in pose:
            row, column = round(float(y) * height), round(float(x) * width)
            frame[max(0, row - 3) : row + 3, max(0, column - 3) : column + 3] = 230
        out.append(frame)
    return out


def mmpose(points: np.ndarray, height: int, width: int) -> dict:
    """What MMPose would write of that person, with a smaller one beside."""
    frames = []
    for pose in points:
        pixels, scores = pose[:, :2] * (width, height), pose[:, 2]
        small = pixels * 0.2
        people = [(small, scores), (pixels, scores)]
        instances = [
            {"keypoints": p.tolist(), "keypoint_scores": s.tolist(), "bbox": [[0, 0, 1, 1]]} for p, s in people
        ]
        frames.append({"frame_id": len(frames) + 1, "instances": instances})
    return {"meta_info": {"dataset_name": "coco_wholebody"}, "instance_info": frames}
