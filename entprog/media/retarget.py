"""A motion for a body of other proportions: limbs keep their angles and take another person's lengths.

Pure functions over poses. Both persons are seen in two dimensions: a limb that points at the camera is shorter in the
picture, and stays so in proportion. What a person's limb measures is its greatest length, over the frames and over
left and right.
"""

import numpy as np

from entprog.media import wholebody

MIN_VISIBILITY = 0.5
"""A point is measured from this visibility on. Points less visible move along all the same."""
LONGEST = 0.95
"""Quantile over frames that is taken for a length's greatest: single frames err."""

# Joints beyond COCO-WholeBody's points: the middles of hips and of shoulders.
_ROOT, _NECK = wholebody.POINTS, wholebody.POINTS + 1
_MIDDLES = {_ROOT: (11, 12), _NECK: (5, 6)}
_ROOTS = (_ROOT, _NECK, 0)
"""Where a motion begins: at the first of them that is known."""
LIMBS = {
    "torso": ((_ROOT, _NECK),),
    "head": ((_NECK, 0),),
    "shoulders": ((_NECK, 5), (_NECK, 6)),
    "upper arms": ((5, 7), (6, 8)),
    "forearms": ((7, 9), (8, 10)),
    "hips": ((_ROOT, 11), (_ROOT, 12)),
    "thighs": ((11, 13), (12, 14)),
    "shins": ((13, 15), (14, 16)),
}
"""Limbs (from, to), left before right, from the root outward: each begins where another one ends."""
_BEFORE = {end: (name, start) for name, limbs in LIMBS.items() for start, end in limbs}
"""The limb that ends at a joint, and the joint that it begins at."""
_FACE = (1, 2, 3, 4, *range(wholebody.FACE.start, wholebody.FACE.stop))
_LEFT_HAND, _RIGHT_HAND = (tuple(range(p.start, p.stop)) for p in (wholebody.LEFT_HAND, wholebody.RIGHT_HAND))
SHAPES = {
    "face": (((0, _FACE),), None),
    "hands": (((9, _LEFT_HAND), (10, _RIGHT_HAND)), "forearms"),
    "feet": (((15, (17, 18, 19)), (16, (20, 21, 22))), "shins"),
}
"""Parts that are scaled as a whole: ((joint they hang on, points), …), and the limb that they are scaled with where the
reference does not show them; None: the whole body."""


def retarget(driving: np.ndarray, own: np.ndarray, height: int, width: int) -> np.ndarray:
    """The motion `driving` float [F, 33 or 133, 3] with the proportions of the person in the pose `own` [33 or 133, 3]:
    float32, of driving's shape. Both: x, y in 0..1 of pictures of height × width pixels, and visibility.

    Every limb keeps its angle, in pixels, and its length is multiplied by the ratio of the two persons' (`ratios`).
    The middle of the hips moves as driving's does, by the ratio of the whole body, from where it is in `own`; where the
    hips are not visible there, the shoulders or the nose begin in their place. NaN stays NaN, visibility as it is; what
    hangs on a joint that is NaN hangs on the nearest one before it that is not.

    Raises ValueError if the two have no visible limb in common.
    """
    return _retargeted(driving, own, height, width, ratios(driving, own, height, width))


def ratios(driving: np.ndarray, own: np.ndarray, height: int, width: int) -> dict[str, float]:
    """What each of LIMBS and SHAPES, and the whole `body`, measures in `own` over what it measures in `driving`. A limb
    that is not visible in both has the body's ratio.

    Raises ValueError if none is visible in both.
    """
    there, here = (_pixels(pose, height, width, visible=True) for pose in (driving, own[None]))
    found = {}
    for name, limbs in LIMBS.items():
        found[name] = [_greatest([_lengths(of, *limb) for limb in limbs]) for of in (there, here)]
    known = [pair for pair in found.values() if np.isfinite(pair).all() and min(pair) > 0]
    if not known:
        raise ValueError("no limb is visible in both poses")
    body = float(np.divide(*np.sum(known, axis=0)[::-1]))
    out = {"body": body}
    for name, (theirs, ours) in found.items():
        out[name] = ours / theirs if np.isfinite([theirs, ours]).all() and min(theirs, ours) > 0 else body
    for name, (parts, fallback) in SHAPES.items():
        sizes = [_greatest([_size(of, other, *part) for part in parts]) for of, other in ((there, here), (here, there))]
        good = np.isfinite(sizes).all() and min(sizes) > 0
        out[name] = sizes[1] / sizes[0] if good else out[fallback or "body"]
    return out


def _retargeted(driving: np.ndarray, own: np.ndarray, height: int, width: int, by: dict[str, float]) -> np.ndarray:
    before, ours = _pixels(driving, height, width), _pixels(own[None], height, width, visible=True)[0]
    after = _placed(before, by)
    shown = np.isfinite(ours).all(-1) & np.isfinite(after).all(-1)  # [frames, joints]
    # Where none of the three is known, it begins with the middle of what is.
    places = next(([joint] for joint in _ROOTS if shown[:, joint].any()), range(wholebody.POINTS))
    for first in np.flatnonzero(shown[:, list(places)].any(1))[:1]:
        places = [place for place in places if shown[first, place]]
        after += (ours[places] - after[first, places]).mean(0)
    out = np.array(wholebody.whole(driving), np.float64)
    out[..., :2] = after[:, : wholebody.POINTS] / (width, height)
    return wholebody.laid_out(out, driving.shape[1]).astype(np.float32)


def _placed(before: np.ndarray, by: dict[str, float]) -> np.ndarray:
    """Joints and points [F, 133 + middles, 2] of limbs times their ratios, out of those `before`, in pixels.

    The hips are where they were, times the body's ratio; in frames without them the neck is, without that the nose, at
    the distance that it has from there in frames that have both.
    """
    after = np.full_like(before, np.nan)
    for joint in _ROOTS:
        due = by["body"] * before[:, joint]
        both = np.isfinite(after[:, joint]).all(-1)
        away = (after[both, joint] - due[both]).mean(0) if both.any() else 0
        after[:, joint] = np.where(both[:, None], after[:, joint], due + away)
        for name, limbs in LIMBS.items():
            for start, end in limbs:
                _hang(after, before, [end], start, name, by)
    for name, (parts, _) in SHAPES.items():
        for joint, points in parts:
            _hang(after, before, list(points), joint, name, by)
    return after


def _hang(
    after: np.ndarray, before: np.ndarray, points: list[int], joint: int, name: str, by: dict[str, float]
) -> None:
    """Put points that have no place yet at their joint, or where that is NaN at the nearest one before it that is not,
    at the mean ratio of the limbs between."""
    between, chain = [by[name]], [joint]
    while chain[-1] in _BEFORE:
        chain.append(_BEFORE[chain[-1]][1])
    for at in (*chain, *_ROOTS):
        if at not in points:
            there = np.isfinite(after[:, [at]]).all(-1) & ~np.isfinite(after[:, points]).all(-1)
            placed = after[:, [at]] + np.mean(between) * (before[:, points] - before[:, [at]])
            after[:, points] = np.where(there[..., None], placed, after[:, points])
        if at in _BEFORE:
            between.append(by[_BEFORE[at][0]])


def _pixels(pose: np.ndarray, height: int, width: int, *, visible: bool = False) -> np.ndarray:
    """x, y in pixels [F, 133 + middles, 2] of poses [F, 33 or 133, 3]. visible: NaN for points that are not."""
    whole = np.array(wholebody.whole(pose), np.float64)
    places = whole[..., :2] * (width, height)
    if visible:
        places[~(whole[..., 2] >= MIN_VISIBILITY)] = np.nan
    middles = [places[:, pair].mean(1) for pair in _MIDDLES.values()]
    return np.concatenate([places, np.stack(middles, 1)], axis=1)


def _lengths(places: np.ndarray, start: int, end: int) -> np.ndarray:
    """Pixels from one joint to another, [F]."""
    return np.linalg.norm(places[:, end] - places[:, start], axis=-1)


def _size(places: np.ndarray, other: np.ndarray, joint: int, points: tuple[int, ...]) -> np.ndarray:
    """Root mean square distance of a part's points from its joint, [F]; those count that both persons ever show."""
    seen = [p for p in points if all(np.isfinite(of[:, p]).all(-1).any() for of in (places, other))]
    if not seen:
        return np.full(len(places), np.nan)
    return np.sqrt(np.square(places[:, seen] - places[:, [joint]]).sum(-1).mean(1))


def _greatest(sides: list[np.ndarray]) -> float:
    """The greatest of lengths over frames, and over the sides; NaN if there are none."""
    found = [float(np.quantile(side[np.isfinite(side)], LONGEST)) for side in sides if np.isfinite(side).any()]
    return max(found, default=float("nan"))
