"""Poses that lie beside a video: read, checked, and brought to a clip's frames.

NAME.pose.npz holds `pose` float [R, 33 or 133, 3], x and y in 0..1 of the upright picture, visibility 0..1, and may
hold `fps`, its rows a second; without that there is a row for each frame of the video. NAME.pose.json is what MMPose
writes of a video: {"instance_info": [{"instances": [{"keypoints": [[x, y], …], "keypoint_scores": […]}, …]}, …]}, or
that list alone; 133 points in pixels of the upright picture as OpenCV gives it, which makes none square, a list entry a
frame.
"""

import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from entprog import files
from entprog.errors import UserError
from entprog.masking import one_line, reason
from entprog.media import limits, person, rtm, wholebody
from entprog.media.limits import Limits
from entprog.media.video import VideoError

ENDINGS = (".pose.npz", ".pose.json")
LARGEST_JSON = 4
"""What JSON may take in memory while it is read, over `max_decoded_bytes`: for a time, where an array stays."""
COSTS = {b"{": 256, b"[": 104, b":": 100, b",": 48}
"""Bytes in memory, about, of what begins with such a byte of JSON, or follows it: containers, and what is in them."""
SLACK = 0.5, 0.02
"""Seconds, and share of the video's length, by which poses, or a mask, may be longer or shorter than the video."""
FAR = -1, 2
"""Places outside this, where the picture is 0..1, are pixels rather than points outside the picture."""
HALF = 0.5
"""Another person counts from this share of the foremost one's size on."""

PATIENCE = 10
"""Rows of JSON in which who was followed is waited for; then the foremost is chosen anew."""


@dataclass(frozen=True)
class Poses:
    """Poses through a video: of one person, or of all who are in it."""

    people: Sequence[np.ndarray]
    """Of each of R rows float32 [people, 33 or 133, 3]: x, y in 0..1 of the picture, visibility 0..1; NaN, NaN, 0 where
    not known."""
    fps: float | None
    """Rows a second; None: one a frame of the video."""
    size: tuple[int, int] | None = None
    """Height and width of the picture, where one of several people is to be followed; None: each row is of one
    person."""


def stamp(path: Path) -> str:
    """sha256 of a file of poses; empty if it cannot be read, as `read` says then."""
    try:
        return files.sha256(path)
    except OSError:
        return ""


def read(path: Path, height: int, width: int, bounds: Limits) -> Poses:
    """The poses of a file beside a video whose upright picture has height × width pixels as it is stored
    (`VideoInfo.stored`). Never unpickled.

    Raises VideoError `bad_pose` for a file that holds none.
    """
    try:
        found = _json(path, height, width, bounds) if path.suffix == ".json" else _npz(path, bounds)
    except (
        UserError,
        OSError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        OverflowError,
        RecursionError,
    ) as error:
        said = one_line(error) if isinstance(error, UserError | ValueError) else reason(error)
        raise VideoError("bad_pose", f"{path.name}: {said}") from None
    for points in found.people:
        points[~np.isfinite(points).all(-1)] = np.nan, np.nan, 0
        points[..., 2] = points[..., 2].clip(0, 1)
    return found


def at_frames(
    poses: Poses, frames: int, fps: float, shown: tuple[np.ndarray, int] | None, cuts: Sequence[int] = ()
) -> tuple[np.ndarray, np.ndarray]:
    """(poses float32 [frames, …, 3], whether there are more people bool [frames]) nearest to each i / fps.

    shown: of poses without a rate, which of the video's frames the i-th one of the clip is, int [frames], and how many
    the video has (`footage.numbers`). cuts: first frames of new shots. Raises VideoError `bad_pose` for poses of
    another length than the video.
    """
    if poses.fps is None:
        rows, there = shown
        if len(poses.people) != there:
            raise VideoError(
                "bad_pose",
                f"{len(poses.people)} poses, the video has {there} frames: without `fps` (of a .pose.npz) there is to "
                "be one for each",
            )
        return foremost(poses, rows, cuts)
    poses_s, video_s = len(poses.people) / poses.fps, frames / fps
    if abs(poses_s - video_s) > slack_s(video_s) + 1 / fps:
        raise VideoError(
            "bad_pose",
            f"{len(poses.people)} poses at {poses.fps:g} fps are {poses_s:.2f} s, the video has {video_s:.2f} s",
        )
    rows = nearest_rows(np.arange(frames), fps, poses.fps)
    inside = rows <= len(poses.people)  # a video's last frame is shown until one frame later
    points, crowded = foremost(poses, rows.clip(max=len(poses.people) - 1), cuts)
    points[~inside] = np.nan, np.nan, 0
    return points, crowded & inside


def foremost(poses: Poses, rows: np.ndarray, cuts: Sequence[int] = ()) -> tuple[np.ndarray, np.ndarray]:
    """(poses of the foremost person float32 [F, …, 3], whether there are more people bool [F]) in rows, int [F].

    cuts: places among the rows from which on the foremost is chosen anew. In between somebody else is followed only
    after a row of nobody: no stretch of found poses is of two people.
    """
    if poses.size is None:
        return np.stack([poses.people[row][0] for row in rows]), np.zeros(len(rows), bool)
    shots = np.split(rows, [cut for cut in cuts if 0 < cut < len(rows)])
    points, crowded = zip(*map(partial(_foremost, poses.people, *poses.size), shots), strict=True)
    return np.concatenate(points), np.concatenate(crowded)


def _foremost(people: Sequence[np.ndarray], height: int, width: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`foremost` of one shot. Rows between those that are wanted are looked at too: people move little from one to the
    next."""
    found: dict[int, np.ndarray] = {}
    who: dict[int, int] = {}
    crowded: dict[int, bool] = {}
    last, gone, number = None, 0, 0  # who was followed last, for how many rows they are gone, and their number
    for row in range(rows[0], rows[-1] + 1):
        circles = [_circle(points * np.array([width, height, 1], np.float32)) for points in people[row]]
        chosen = person.followed(circles, last if gone < PATIENCE else None, height, width)
        if chosen is None:
            crowded[row], gone = False, gone + 1
            continue
        now, place = chosen
        number += last is not None and not person.may_be(now, last)
        found[row], who[row], last, gone = people[row][place], number, now, 0
        crowded[row] = sum(circle.radius >= HALF * now.radius for circle in circles) > 1
    points, shown = [], None
    for row in rows:
        shown = who.get(row) if shown in (None, who.get(row)) else None
        points.append(person.nobody(wholebody.POINTS) if shown is None else found[row])
    return np.stack(points), np.array([crowded[row] for row in rows])


def slack_s(video_s: float) -> float:
    """Seconds by which what lies beside a video of such a length may be longer or shorter."""
    return SLACK[0] + SLACK[1] * video_s


def nearest_rows(frames: np.ndarray, fps: float, rate: float) -> np.ndarray:
    """Rows, of so many a second, nearest to frames that are counted at `fps`: int64."""
    return np.floor(frames / fps * rate + 0.5).astype(np.int64)


def check_places(points: np.ndarray) -> None:
    """Raises ValueError for poses [..., 3] in pixels: most of what is seen in them lies far outside the picture."""
    places = points[(points[..., 2] >= wholebody.SURE) & np.isfinite(points).all(-1)][:, :2]
    if len(places) and ((places < FAR[0]) | (places > FAR[1])).any(-1).mean() > 0.5:
        raise ValueError(f"x and y must be in 0..1 of the picture; these go up to {places.max():g}")


def rate(path: Path, bounds: Limits) -> float | None:
    """Rows a second of the poses in an .npz; None if it does not say. Raises ValueError, OSError or UserError."""
    with zipfile.ZipFile(path) as archive:
        if "fps.npy" not in archive.namelist():
            return None
    fps = limits.array(path, "fps", bounds)
    if fps.size != 1 or fps.dtype.kind not in "fiu" or not 0 < float(fps.reshape(())) < 1e4:
        raise ValueError("`fps` is no number of rows a second")
    return float(fps.reshape(()))


def _npz(path: Path, bounds: Limits) -> Poses:
    points = limits.array(path, "pose", bounds)
    if points.dtype.kind not in "fiu" or points.ndim != 3 or not len(points) or points.shape[2] != 3:
        raise ValueError(f"`pose` is {points.dtype} {list(points.shape)}, needed is float [frames, 33 or 133, 3]")
    if points.shape[1] not in wholebody.LAYOUTS.values():
        raise ValueError(f"its poses have {points.shape[1]} points, needed are 33 (BlazePose) or 133 (COCO-WholeBody)")
    points = points.astype(np.float32)
    check_places(points)
    return Poses(points[:, None], rate(path, bounds))


def _json(path: Path, height: int, width: int, bounds: Limits) -> Poses:
    values = json.loads(_text(path, LARGEST_JSON * bounds.max_decoded_bytes))
    if isinstance(values, dict) and "instance_info" not in values:
        openpose = ": OpenPose's `people` are not read" if "people" in values else ""
        raise ValueError(f"it has no predictions of MMPose (`instance_info`){openpose}; save them as .pose.npz")
    listed = values["instance_info"] if isinstance(values, dict) else values
    people, scale = [], np.array([width, height, 1], np.float32)
    for entry in listed:
        there = [points / scale for points in map(_instance, entry["instances"]) if _is_somebody(points)]
        people.append(np.stack(there) if there else np.zeros((0, wholebody.POINTS, 3), np.float32))
    if not people:
        raise ValueError("it lists no frames")
    return Poses(people, None, (height, width))


def _text(path: Path, most: int) -> str:
    """A file of JSON that takes at most so many bytes in memory, with all that is in it. Raises ValueError."""
    size = path.stat().st_size
    if size <= most:
        content = path.read_bytes()
        # A text has one width for all of its characters; it is there whole, and once more as the strings in it.
        size = 2 * len(content) * (1 if content.isascii() else 4)
        size += sum(cost * content.count(mark) for mark, cost in COSTS.items())
    if size > most:
        raise ValueError(
            f"it takes {size / 2**20:.1f} MiB to read, more than {most / 2**20:.1f} (prepare.max_decoded_bytes times "
            f"{LARGEST_JSON}): raise that, or save the poses as .pose.npz"
        )
    return content.decode("utf-8")


def _is_somebody(points: np.ndarray) -> bool:
    """Whether a person's body is more than a guess: points float [133, 3] in pixels."""
    body = points[wholebody.BODY]
    known = np.isfinite(body).all(-1)
    return bool(known.any()) and float(np.where(known, body[:, 2], 0).mean()) >= rtm.MIN_SCORE


def _instance(one: dict[str, Any]) -> np.ndarray:
    """A person of MMPose's: float32 [133, 3] in pixels."""
    places, scores = np.array(one["keypoints"], np.float32), np.array(one["keypoint_scores"], np.float32)
    if places.shape != (wholebody.POINTS, 2) or scores.shape != (wholebody.POINTS,):
        raise ValueError(f"a person has points {list(places.shape)} and scores {list(scores.shape)}, needed are 133")
    return np.concatenate([places, scores[:, None]], axis=1)


def _circle(points: np.ndarray) -> person.Person:
    """Around the points of a person's body that are known, in pixels."""
    x_y = points[wholebody.BODY, :2]
    x_y = x_y[np.isfinite(x_y).all(-1)]
    return person.of_box(*map(float, (*x_y.min(0), *x_y.max(0))))
