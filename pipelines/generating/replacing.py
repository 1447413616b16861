"""A person in a video who is replaced (`generate --mask`): what of it is kept, and where the new one is to be."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from entprog.config import ClipShape, Prepare
from entprog.errors import UserError
from entprog.media import limits, masks
from entprog.media import video as videos
from entprog.media.pictures import BACKGROUND, Color
from pipelines.generating import driving
from pipelines.generating.checkpoints import Checkpoint

ASPECT = 0.02
"""Share by which a picture's aspect may differ from the clip's where all of it is taken."""


@dataclass(frozen=True)
class Scene:
    """The files of a video that somebody is put into."""

    mask: Path
    """A video that is white where the person is to be."""
    background: Path | None
    """The video without the person. None: the driving video, black where the mask is white."""

    def around(
        self, pose: np.ndarray, cut: driving.Followed | None, frames: np.ndarray | None, **span: Any
    ) -> dict[str, np.ndarray]:
        """`person` and `background` of a Motion with that pose. cut: what is cut out of the driving video; frames: what
        was, uint8 RGB [F, H, W, 3]; both None: poses are fractions of the whole picture. span: as of `_read`. Raises
        UserError for files that do not go with the motion."""
        person = masks.white(_read(self.mask, "--mask", len(pose), cut, masks.BLACK, **span))
        if not person.any():
            raise UserError(f"--mask: {self.mask} is nowhere white, where the person is to be")
        if self.background is None:
            return {"person": person, "background": np.where(person[..., None], np.uint8(0), frames)}
        return {"person": person, "background": _read(self.background, "--background", len(pose), cut, **span)}


def scene(
    mask: Path | None, background: Path | None, checkpoint: Checkpoint, motion: Path | None, driven: bool
) -> Scene | None:
    """What the options ask for; None: nobody is replaced. motion: the file or folder of --video or --pose, None with
    --shards; driven: whether it is a video. Raises UserError for what does not go together."""
    if mask is None and background is None:
        return None
    if mask is None:
        raise UserError("--background needs --mask: a video that is white where the person is to be")
    if not checkpoint.replaces:
        raise UserError(
            f"--mask: {checkpoint.root} has no place for a video that a person is put into: networks of Wan-Animate "
            "and VACE (model.family=wan_animate, wan_vace) have"
        )
    if motion is None or motion.is_dir():
        raise UserError("--mask is of one motion: give one file as --video, or as --pose")
    if background is None and not driven:
        raise UserError("--mask with --pose needs --background too: there is no driving video that could be kept")
    return Scene(mask, background)


def _read(
    path: Path,
    option: str,
    frames: int,
    cut: driving.Followed | None,
    under: Color = BACKGROUND,
    *,
    shape: ClipShape,
    crop: Prepare,
    start_s: float,
) -> np.ndarray:
    """Frames of a video that goes with a motion, uint8 RGB [frames, H, W, 3], cut out as that was, over a colour
    where it is transparent."""
    if not path.is_file():
        raise UserError(f"{option}: no such file: {path}")
    try:
        info = videos.probe(path, limits.of(crop))
    except videos.VideoError as error:
        raise UserError(f"{option}: {error}") from None
    size = f"{info.width}x{info.height}"
    if cut is None:
        if abs(info.width * shape.height / (info.height * shape.width) - 1) > ASPECT:
            raise UserError(
                f"{option}: {path} is {size}, the clip {shape.width}x{shape.height}: give one of that aspect, with "
                "--pose all of it is taken"
            )
        cut = driving.Followed(np.empty((frames, 0, 3)), (0, 0, info.width, info.height), info.height, info.width)
    elif (info.height, info.width) != (cut.height, cut.width):
        raise UserError(
            f"{option}: {path} is {size}, the driving video {cut.width}x{cut.height}: both have to be alike"
        )
    return driving.cut_out(path, cut, shape, crop, start_s, option, under)
