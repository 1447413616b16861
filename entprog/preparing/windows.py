"""Which windows of a video become clips, where the person is cut out, and what is good enough: pure functions.

Times are counted in clip frames (frame i lies i / fps seconds after the video's first). A track is a float32
array [T, 33, 3] with x, y in 0..1 of the source frame and visibility 0..1; frames without a person are NaN, NaN, 0.
"""

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise

import numpy as np

from entprog.media.pose import body_box, found

Box = tuple[int, int, int, int]
"""left, top, width, height in pixels of the upright source frame, inside it."""

REASONS = {
    "not_a_video": "its name does not end as a video's does",
    "empty": "no bytes in it",
    "unreadable": "it cannot be opened",
    "bad_address": "its address is malformed, or of a protocol or a host that is not read",
    "corrupt": "it is damaged, or no video",
    "unsupported": "its colours, or the way it is turned, cannot be shown rightly",
    "no_video_stream": "no picture in it",
    "no_frames": "no frame in it",
    "too_large": "more bytes, or more pixels in a frame, than are read",
    "too_long": "longer than is read",
    "changed": "it changed while it was being prepared",
    "bad_crop": "the manifest's crop is not inside the picture",
    "bad_pose": "the file of poses beside it holds none, or none of this video",
    "bad_mask": "the mask beside it is none, or none of this video, or shows nobody in the clip",
    "too_short": "shorter than one clip",
    "nobody": "no person was found",
    "pose_lost": "the person was found in some frames only",
    "low_visibility": "too much of the body is hidden or outside the picture",
    "too_small": "the person has too few pixels",
    "several_people": "another person is in the picture",
    "too_still": "hardly anything moves",
    "blurred": "no frame of it is sharp",
    "does_not_fit": "the person does not fit into a crop of this aspect",
    "crashed": "it brought the process down that read it",
    "error": "something unforeseen went wrong while reading it",
}
"""Why an input or a clip is rejected. For an input with several reasons, its clips' most frequent one counts."""


def window_starts(total: int, frames: int, stride: int) -> range:
    """First frames of the windows of `frames` frames, `stride` apart, that lie whole in 0..total."""
    return range(0, max(0, total - frames + 1), stride)


def without_phantoms(track: np.ndarray, detected: np.ndarray, min_detected: float) -> np.ndarray:
    """The track without unbroken runs of frames in which the detector hardly ever sees a person.

    The landmark network follows whatever once looked like a person (lettering, a tree) for long, sure of itself;
    the detector, asked anew frame by frame (bool [T]), does not agree with itself about such a thing.
    """
    there = found(track)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], there, [False]])))
    out = track.copy()
    for start, stop in edges.reshape(-1, 2):
        if detected[start:stop].mean() < min_detected:
            out[start:stop] = np.nan, np.nan, 0
    return out


def person_box(
    points: np.ndarray, height: int, width: int, aspect: float, margin: float, min_visibility: float
) -> Box | None:
    """One box around the person through all frames [F, 33, 3] of a source of height × width pixels.

    `aspect` is width / height of the crop, `margin` is added on every side as a fraction of the body's larger
    extent (landmarks lie inside the body: eyes, not the top of the head). Where the box would reach outside the
    frame it is moved inside, and shrunk if it is larger than the frame. None: no visible point.
    """
    body = body_box(points, min_visibility)
    if body is None:
        return None
    left, right = body[0] * width, body[2] * width
    top, bottom = body[1] * height, body[3] * height
    around = 2 * margin * max(right - left, bottom - top)
    box_height = max(bottom - top + around, (right - left + around) / aspect)
    box_height = min(box_height, height, width / aspect)
    pixels_high = int(np.clip(round(box_height), 1, height))
    pixels_wide = int(np.clip(round(box_height * aspect), 1, width))
    x = int(np.clip(round((left + right - pixels_wide) / 2), 0, width - pixels_wide))
    y = int(np.clip(round((top + bottom - pixels_high) / 2), 0, height - pixels_high))
    return x, y, pixels_wide, pixels_high


def to_crop(points: np.ndarray, box: Box, height: int, width: int) -> np.ndarray:
    """Points [..., 3] of a source of height × width pixels → the same points in 0..1 of a crop."""
    left, top, box_width, box_height = box
    x = (points[..., 0] * width - left) / box_width
    y = (points[..., 1] * height - top) / box_height
    return np.stack([x, y, points[..., 2]], axis=-1).astype(np.float32)


def share_inside(points: np.ndarray, min_visibility: float) -> float:
    """Share of visible points [..., 3], in 0..1 of a crop, that lie inside it; 0 if none is visible."""
    visible = points[..., 2] >= min_visibility
    inside = (points[..., :2] >= 0).all(-1) & (points[..., :2] <= 1).all(-1)
    return float((inside & visible).sum() / visible.sum()) if visible.any() else 0.0


def share_visible(points: np.ndarray, min_visibility: float) -> np.ndarray:
    """Share of points visible in each frame: [F, 33, 3] → float [F]."""
    return (points[..., 2] >= min_visibility).mean(-1)


def pose_verdict(points: np.ndarray, min_visibility: float, min_visible: float) -> str | None:
    """Why the pose of a window [F, 33, 3] is not good enough, or None."""
    there = found(points)
    if not there.any():
        return "nobody"
    if not there.all():
        return "pose_lost"
    if share_visible(points, min_visibility).mean() < min_visible:
        return "low_visibility"
    return None


def crop_verdict(
    in_crop: np.ndarray, box: Box, target_height: int, min_visibility: float, min_inside: float, min_scale: float
) -> str | None:
    """Why a crop (points [F, 33, 3] in its coordinates) is not good enough, or None.

    `min_scale`: fewest source pixels per pixel of the clip, so that little is enlarged.
    """
    if share_inside(in_crop, min_visibility) < min_inside:
        return "does_not_fit"
    if box[3] < min_scale * target_height:
        return "too_small"
    return None


STRETCHES = 4
"""Of a shot, each with one frame that references may come from where the best one is blurred."""


class References:
    """The frames of a shot by how well they show the person: for many windows at the cost of one look at the shot.

    track: [T, 33, 3]. others: bool [T], frames that show more people, and are not to be taken while there are others.
    """

    def __init__(self, track: np.ndarray, min_visibility: float, others: np.ndarray | None = None):
        good = found(track) if others is None else found(track) & ~others
        score = np.where(good, np.nan_to_num(share_visible(track, min_visibility)), -1.0)
        self._score = score + 1e-3 * np.round(np.nan_to_num(track[..., 2]).mean(-1), 3)
        self._until = _best_until(self._score)
        self._since = len(score) - 1 - _best_until(self._score[::-1], last=True)[::-1]
        edges = np.linspace(0, len(score), STRETCHES + 1).astype(int)
        bests = [a + int(self._score[a:b].argmax()) for a, b in pairwise(edges) if b > a]
        self._of_stretches = sorted(bests, key=lambda i: -self._score[i])

    def frames(self, window: range) -> list[int]:
        """`frame`, and others that show the person about as well, the better first, in case it is blurred: far from
        each other, as frames beside a blurred one are blurred too."""
        first = self.frame(window)
        return [first, *(i for i in self._of_stretches if i != first and self._is_alike(i, first, window))]

    def _is_alike(self, i: int, first: int, window: range) -> bool:
        return self._score[i] >= self._score[first] - 0.1 and (i not in window or first in window)

    def frame(self, window: range) -> int:
        """The frame that shows the person best: most visible points, then the highest mean visibility.

        Outside the clip's window if the person is seen there about as well (within a tenth of the points): a
        reference out of the clip itself tells what a user's own picture would not.
        """
        score = self._score
        best = int(self._until[-1])
        outside = [int(self._until[window.start - 1])] if window.start else []
        outside += [int(self._since[window.stop])] if window.stop < len(score) else []
        if outside:
            best_outside = max(outside, key=score.__getitem__)  # of equals the earlier
            if score[best_outside] >= score[best] - 0.1:
                return best_outside
        return best


def _best_until(score: np.ndarray, last: bool = False) -> np.ndarray:
    """Where the highest of score[: i + 1] stands, for every i; of equals the first, or the last."""
    highest = np.maximum.accumulate(score)
    new = score == highest if last else np.append(True, score[1:] > highest[:-1])
    return np.maximum.accumulate(np.where(new, np.arange(len(score)), 0))


def picture_verdict(clip: np.ndarray, min_motion: float, min_sharpness: float) -> str | None:
    """Why the pictures of a clip (uint8 RGB [F, H, W, 3]) are not good enough, or None."""
    if len(clip) > 1 and motion(clip) < min_motion:
        return "too_still"
    if max(sharpness(frame) for frame in clip) < min_sharpness:
        return "blurred"
    return None


def motion(clip: np.ndarray) -> float:
    """Mean absolute change from frame to frame, in levels of 0..255 (the camera's own motion counts)."""
    return float(np.mean([np.abs(b.astype(np.int16) - a).mean() for a, b in pairwise(clip)]))


def sharpness(image: np.ndarray) -> float:
    """Variance of the Laplacian of uint8 RGB [H, W, 3], in levels squared (Pech-Pacheco et al., ICPR 2000)."""
    grey = image.mean(-1, dtype=np.float32)
    inner = grey[1:-1, 1:-1]
    laplacian = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * inner
    return float(laplacian.var()) if laplacian.size else 0.0


def main_reason(reasons: Iterable[str]) -> str:
    """The most frequent reason; of equally frequent ones the earlier in REASONS."""
    count = Counter(reasons)
    return min(count, key=lambda reason: (-count[reason], list(REASONS).index(reason)))
