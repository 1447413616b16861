"""A driving video: the person in it, followed frame by frame, and what is cut out around them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from entprog.config import ClipShape, Prepare
from entprog.errors import UserError
from entprog.media import limits, wholebody
from entprog.media import pose as poses
from entprog.media import video as videos
from entprog.media.pictures import BACKGROUND, Color
from entprog.preparing import cutting, windows
from pipelines import terminal


@dataclass(frozen=True)
class Followed:
    """The foremost person of a video, and what is cut out around them: one box for the whole clip."""

    track: np.ndarray
    """float32 [F, 33 or 133, 3] in the whole picture."""
    box: windows.Box
    height: int
    width: int
    """Pixels of the whole picture."""

    @property
    def pose(self) -> np.ndarray:
        """The track in what is cut out."""
        return windows.to_crop(self.track, self.box, self.height, self.width)


def clip(
    path: Path, shape: ClipShape, crop: Prepare, start_s: float = 0.0, most: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The person in a video: (pose float32 [F, 33 or 133, 3] in the crop, its frames uint8 RGB [F, H, W, 3]).

    F: of the clip's length, or up to `most`. Cropped as `pipelines.prepare` does it, around the foremost of several
    people. Raises UserError if there is no such clip in it, or if it is over `crop`'s limits.
    """
    found = followed(path, shape, crop, start_s, most)
    return found.pose, cut_out(path, found, shape, crop, start_s)


def followed(path: Path, shape: ClipShape, crop: Prepare, start_s: float = 0.0, most: float | None = None) -> Followed:
    """Where the person in a video is, as `clip` takes it. Raises UserError as that does."""
    bounds = limits.of(crop)
    end_s = start_s + ((most or shape.frames) - 0.5) / shape.fps
    try:
        info = videos.probe(path, bounds)
        estimator, several = poses.estimator(crop), []
        order = videos.field_order(path, bounds)
        pictures = videos.iter_frames(path, shape.fps, start_s, end_s, quick=True, limits=bounds, order=order)
        # Pose is tracked frame by frame: a clip of full-size frames would not fit into memory.
        track = estimator.track(_watched(estimator, _steady(path, info, pictures), several))
        if len(track) < shape.frames:
            raise UserError(
                f"--video: {path} has {len(track)} frames from {start_s:g} s on at {shape.fps:g} fps, "
                f"a clip has {shape.frames}"
            )
        found = poses.found(track)
        box = person_box(track, info.height, info.width, shape, crop) if found.any() else None
        if box is None:
            raise UserError(f"--video: nobody was found in {path} from {start_s:g} s on")
        if not found.all():
            warn(f"the person is lost in {(~found).sum()} of {len(found)} frames of {path}")
        visible = windows.share_visible(wholebody.body(track[found]), crop.point_visibility).mean()
        if visible < crop.min_visibility:
            warn(
                f"{visible:.0%} of the body's points are visible in {path}: prepare takes clips with "
                f"{crop.min_visibility:.0%} or more, a network has hardly learned from less"
            )
        if np.mean(several) >= cutting.PEOPLE_SHARE:
            warn(f"several people are in {path}: the foremost is followed")
    except videos.VideoError as error:
        raise UserError(f"--video: {error}") from None
    except MemoryError:
        raise UserError(f"--video: {path} does not fit into memory: take less of it with --seconds") from None
    return Followed(track, box, info.height, info.width)


def cut_out(
    path: Path,
    of: Followed,
    shape: ClipShape,
    crop: Prepare,
    start_s: float,
    option: str = "--video",
    background: Color = BACKGROUND,
) -> np.ndarray:
    """What a person's box shows in a video of the same picture size, at the clip's: uint8 RGB [F, H, W, 3].

    background: shows through where it is transparent. Raises UserError, naming the option, for a video that cannot be
    read or has not as many frames as the person's.
    """
    bounds, total, size = limits.of(crop), len(of.track), (shape.height, shape.width)
    end_s = start_s + (total - 0.5) / shape.fps
    try:
        order = videos.field_order(path, bounds)
        cut, count = np.empty((total, *size, 3), np.uint8), 0
        how = {"crop": of.box, "size": size, "limits": bounds, "order": order, "background": background}
        pictures = videos.iter_frames(path, shape.fps, start_s, end_s, **how)
        for _, frame in pictures:
            cut[min(count, total - 1)] = frame
            count += 1
    except videos.VideoError as error:
        raise UserError(f"{option}: {error}") from None
    except MemoryError:
        raise UserError(f"{option}: {path} does not fit into memory: take less of it with --seconds") from None
    if count != total:
        raise UserError(
            f"{option}: {path} has {count} frames from {start_s:g} s on at {shape.fps:g} fps, the motion has {total}"
        )
    return cut


def _steady(path: Path, info: videos.VideoInfo, pictures: Iterable[tuple[float, np.ndarray]]) -> Iterator[np.ndarray]:
    """The frames. Raises VideoError where they have another size than the first one: one box is cut out of all."""
    for time_s, frame in pictures:
        if frame.shape[:2] != (info.height, info.width):
            raise videos.changed_size(path, time_s)
        yield frame


def _watched(estimator, frames: Iterable[np.ndarray], several: list[bool]) -> Iterator[np.ndarray]:
    """The frames; whether the detector, asked anew, sees several people in each goes into `several`."""
    for i, frame in enumerate(frames):
        # Every other frame is enough to tell, and half the cost.
        several.append(several_in(estimator, frame) if i % 2 == 0 else several[-1])
        yield frame


def several_in(estimator, frame: np.ndarray) -> bool:
    """Whether more people are in a frame than the foremost, who are not passers-by."""
    people = estimator.detect(frame)
    return sum(person.radius >= cutting.PEOPLE_SIZE * people[0].radius for person in people) > 1


def person_box(track: np.ndarray, height: int, width: int, shape: ClipShape, crop: Prepare) -> windows.Box | None:
    """What is cut out around the person of a track [F, 33 or 133, 3] for clips of a shape; None: no visible point."""
    return windows.person_box(track, height, width, shape.width / shape.height, crop.margin, crop.point_visibility)


def warn(message: str) -> None:
    """Tell it on the terminal."""
    terminal.console.print(f"warning: {message}")
