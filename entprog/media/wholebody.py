"""The two layouts of a pose's points, and where body, face and hands lie in them.

BlazePose's 33 points are among COCO-WholeBody's 133 (17 of the body, 6 of the feet, 68 of the face, 21 of each hand):
what asks for a body's 33 gets them out of either. Functions take numpy arrays and torch tensors.
"""

import numpy as np

POINTS = 133
BODY, FEET, FACE = slice(0, 17), slice(17, 23), slice(23, 91)
LEFT_HAND, RIGHT_HAND = slice(91, 112), slice(112, 133)
"""The person's own left and right."""

BLAZEPOSE = np.array(
    [0]  # nose
    + [FACE.start + 42, 1, FACE.start + 45, FACE.start + 39, 2, FACE.start + 36]  # eyes: inner corner, middle, outer
    + [3, 4, FACE.start + 54, FACE.start + 48]  # ears, corners of the mouth
    + [5, 6, 7, 8, 9, 10]  # shoulders, elbows, wrists
    + [hand.start + i for i in (17, 5, 2) for hand in (LEFT_HAND, RIGHT_HAND)]  # knuckles: little finger, index, thumb
    + [11, 12, 13, 14, 15, 16]  # hips, knees, ankles
    + [19, 22, 17, 20]  # heels, big toes
)
"""Index in COCO-WholeBody of each of BlazePose's points, left before right."""
PARTS = {"face": (FACE,), "hand": (LEFT_HAND, RIGHT_HAND)}
SURE, ENOUGH = 0.3, 0.5
"""A point of face or hand counts from this score on (RTMW's lie in 0..1), and a part where this share of its points
counts: of fewer the box around them would be another one."""
LAYOUTS = {"blazepose33": len(BLAZEPOSE), "wholebody133": POINTS}
"""Names of the layouts → numbers of points."""


def body(points):
    """BlazePose's points [..., 33, 3] of a pose [..., 33 or 133, 3]."""
    return points if points.shape[-2] == len(BLAZEPOSE) else points[..., BLAZEPOSE.tolist(), :]


def whole(points):
    """A pose [..., 33 or 133, 3] as [..., 133, 3]; points that it lacks are NaN, NaN, visibility 0. `body` of that is
    the pose's own."""
    if points.shape[-2] == POINTS:
        return points
    known = {int(place): number for number, place in enumerate(BLAZEPOSE)}
    out = points[..., [known.get(place, 0) for place in range(POINTS)], :]
    unknown = [place for place in range(POINTS) if place not in known]
    out[..., unknown, :2] = float("nan")
    out[..., unknown, 2] = 0
    return out


def laid_out(points, count: int):
    """A pose in the layout of so many points, 33 or 133."""
    return body(points) if count == len(BLAZEPOSE) else whole(points)
