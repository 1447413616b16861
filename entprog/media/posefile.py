"""Poses that lie beside a video: read, checked, and brought to a clip's frames.

NAME.pose.npz holds `pose` float [R, 33 or 133, 3], x and y in 0..1 of the upright picture, visibility 0..1, and may
hold `fps`, its rows a second; without that a row is a frame of the video. NAME.pose.json is what MMPose writes of a
video: {"instance_info": [{"instances": [{"keypoints": [[x, y], …], "keypoint_scores": […]}, …]}, …]}, or that list
alone; 133 points in pixels of the upright picture, a list entry a frame.
"""

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from entprog.errors import UserError
from entprog.masking import reason
from entprog.media import limits, person, wholebody
from entprog.media.limits import Limits
from entprog.media.video import VideoError

ENDINGS = (".pose.npz", ".pose.json")
LARGEST_JSON = 8
"""Bytes in memory of a byte of JSON, about."""
SLACK = 0.5, 0.02
"""Seconds, and share of the video's length, by which poses may be longer or shorter than the video."""
HALF = 0.5
"""Another person counts from this share of the foremost one's size on."""


@dataclass(frozen=True)
class Poses:
    """A person's poses through a video."""

    points: np.ndarray
    """float32 [R, 33 or 133, 3]: x, y in 0..1 of the picture, visibility 0..1; NaN, NaN, 0 where not known."""
    fps: float | None
    """Rows a second; None: one a frame of the video."""
    crowded: np.ndarray
    """bool [R]: whether more people than one are there."""


def read(path: Path, height: int, width: int, bounds: Limits) -> Poses:
    """The poses of a file beside a video whose upright picture has height × width pixels. Never unpickled.

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
        raise VideoError("bad_pose", f"{path.name}: {reason(error)}") from None
    points = found.points
    known = np.isfinite(points).all(-1)
    points = np.where(known[..., None], points, np.array([np.nan, np.nan, 0], np.float32))
    points[..., 2] = points[..., 2].clip(0, 1)
    return Poses(points, found.fps, found.crowded)


def at_frames(poses: Poses, frames: int, fps: float, source_fps: float) -> tuple[np.ndarray, np.ndarray]:
    """(poses float32 [frames, …, 3], whether there are more people bool [frames]) nearest to each i / fps.

    source_fps: of the video. Raises VideoError `bad_pose` for poses of another length than the video.
    """
    rate = poses.fps or source_fps
    poses_s, video_s = len(poses.points) / rate, frames / fps
    if abs(poses_s - video_s) > SLACK[0] + SLACK[1] * video_s + 1 / fps:
        raise VideoError(
            "bad_pose", f"{len(poses.points)} poses at {rate:g} fps are {poses_s:.2f} s, the video has {video_s:.2f} s"
        )
    rows = np.floor(np.arange(frames) / fps * rate + 0.5).astype(int)
    inside = rows <= len(poses.points)  # a video's last frame is shown until one frame later
    rows = rows.clip(max=len(poses.points) - 1)
    points = poses.points[rows]
    points[~inside] = np.nan, np.nan, 0
    return points, poses.crowded[rows] & inside


def _npz(path: Path, bounds: Limits) -> Poses:
    points = limits.array(path, "pose", bounds)
    if points.dtype.kind not in "fiu" or points.ndim != 3 or not len(points) or points.shape[2] != 3:
        raise ValueError(f"`pose` is {points.dtype} {list(points.shape)}, needed is float [frames, 33 or 133, 3]")
    if points.shape[1] not in wholebody.LAYOUTS.values():
        raise ValueError(f"its poses have {points.shape[1]} points, needed are 33 (BlazePose) or 133 (COCO-WholeBody)")
    with zipfile.ZipFile(path) as archive:
        says = "fps.npy" in archive.namelist()
    fps = limits.array(path, "fps", bounds) if says else None
    if fps is not None and (fps.size != 1 or fps.dtype.kind not in "fiu" or not 0 < float(fps.reshape(())) < 1e4):
        raise ValueError("`fps` is no number of rows a second")
    rate = None if fps is None else float(fps.reshape(()))
    return Poses(points.astype(np.float32), rate, np.zeros(len(points), bool))


def _json(path: Path, height: int, width: int, bounds: Limits) -> Poses:
    if (size := path.stat().st_size) * LARGEST_JSON > bounds.max_decoded_bytes:
        raise ValueError(f"{size} bytes, more than are read (prepare.max_decoded_bytes)")
    values = json.loads(path.read_text("utf-8"))
    listed = values["instance_info"] if isinstance(values, dict) else values
    rows, crowded, before = [], [], None
    for entry in listed:
        people = [_instance(one) for one in entry["instances"]]
        circles = [_circle(points) for points in people]
        chosen = person.followed(circles, before, height, width)
        if chosen is None:
            before = None
            rows.append(person.nobody(wholebody.POINTS))
        else:
            before, place = chosen
            rows.append(people[place] / np.array([width, height, 1], np.float32))
        crowded.append(chosen is not None and sum(c.radius >= HALF * before.radius for c in circles) > 1)
    if not rows:
        raise ValueError("it lists no frames")
    return Poses(np.stack(rows).astype(np.float32), None, np.array(crowded))


def _instance(one: dict[str, Any]) -> np.ndarray:
    """A person of MMPose's: float32 [133, 3] in pixels."""
    places, scores = np.array(one["keypoints"], np.float32), np.array(one["keypoint_scores"], np.float32)
    if places.shape != (wholebody.POINTS, 2) or scores.shape != (wholebody.POINTS,):
        raise ValueError(f"a person has points {list(places.shape)} and scores {list(scores.shape)}, needed are 133")
    return np.concatenate([places, scores[:, None]], axis=1)


def _circle(points: np.ndarray) -> person.Person:
    """Around the points of a person's body, in pixels."""
    x_y = points[wholebody.BODY, :2]
    return person.of_box(*map(float, (*x_y.min(0), *x_y.max(0))))
