"""Motions for the proportions of who is to move: `generate --retarget`."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from entprog.config import ClipShape, Prepare
from entprog.errors import UserError
from entprog.media import pose as poses
from entprog.media import retarget, wholebody
from entprog.preparing import windows
from entprog.storage import Where
from pipelines import terminal
from pipelines.generating import driving, motions
from pipelines.generating.motions import Motion

SHOWN = 8
"""Motions on the preview."""
TOLD = ("body", "torso", "upper arms", "forearms", "thighs", "shins")
"""Ratios that a person is told."""
FAR = 4
"""Ratio of bodies, or one over it, from which a person is told: hardly more than a limb of one is seen."""
INSIDE = 0.9
"""Share of a motion's visible points below which a person is told that they leave the picture."""


def own_pose(path: Path, shape: ClipShape, crop: Prepare) -> np.ndarray:
    """The pose of the person in a reference picture, as it is cut for clips of a shape: float32 [33 or 133, 3].

    Raises UserError if nobody is found in it.
    """
    picture = motions.read_picture(path, crop)
    height, width = picture.shape[:2]
    track, box = poses.estimator(crop).track([picture]), (0, 0, width, height)
    if poses.found(track).all() and (height, width) != (shape.height, shape.width):
        box = driving.person_box(track, height, width, shape, crop)
    if not poses.found(track).all() or box is None:
        raise UserError(_nobody(str(path)))
    return windows.to_crop(track, box, height, width)[0]


def own_poses(made: Sequence[Motion], crop: Prepare) -> list[np.ndarray]:
    """The same of motions whose reference pictures lie in no files, each [33 or 133, 3]. Raises UserError."""
    estimator = poses.estimator(crop)
    tracks = [estimator.track([motion.reference]) for motion in made]
    for motion, track in zip(made, tracks, strict=True):
        if not poses.found(track).all():
            raise UserError(_nobody(f"the reference picture of {motion.name}"))
    return [track[0] for track in tracks]


def retargeted(made: Sequence[Motion], own: Sequence[np.ndarray]) -> list[Motion]:
    """The motions with the proportions of their references, which have these poses. Raises UserError where a motion and
    its reference show no limb that they have in common."""
    out = []
    for motion, pose in zip(made, own, strict=True):
        height, width = motion.reference.shape[:2]
        try:
            moved = retarget.retarget(motion.pose, pose, height, width)
            by = retarget.ratios(motion.pose, pose, height, width)
        except ValueError:
            raise UserError(
                f"--retarget: {motion.name} and its reference show no limb that is visible in both: give a picture "
                "of the whole person, or leave --retarget out"
            ) from None
        said = ", ".join(f"{name} {by[name]:.2f}" for name in TOLD)
        terminal.console.print(f"{motion.name}: retargeted by {said}")
        if not 1 / FAR < by["body"] < FAR:
            terminal.console.print(
                f"warning: {motion.name}: what is visible in both is more than {FAR} times as large in one of them: "
                "give a video and a picture that show as much of a person"
            )
        inside = windows.share_inside(wholebody.body(moved), retarget.MIN_VISIBILITY)
        if inside < INSIDE:
            terminal.console.print(
                f"warning: {motion.name}: retargeted, {1 - inside:.0%} of its points leave the picture"
            )
        out.append(replace(motion, pose=moved, driver=motion.pose))
    return out


def preview(before: Sequence[Motion], after: Sequence[Motion], own: Sequence[np.ndarray], path: Where) -> Where:
    """A picture of some motions: the reference with its pose, then frames with the driving pose and the new one."""
    from entprog.media import sheet  # here: it draws with torch, and wrong arguments are told at once

    rows = []
    for one, other, pose in list(zip(before, after, own, strict=True))[:SHOWN]:
        still = sheet.overlay(one.reference[None] // 2, pose[None])
        for title, motion in (("driving", one), ("retargeted", other)):
            picked = motion.pose[sheet.spread(len(motion.pose), sheet.COLUMNS - 1)]
            dark = np.zeros((len(picked), *one.reference.shape), np.uint8)
            rows.append((f"{one.name}: reference | {title}", np.concatenate([still, sheet.overlay(dark, picked)])))
    return sheet.contact_sheet(rows, path)


def _nobody(where: str) -> str:
    return f"--retarget: nobody was found in {where}: give a picture of a person, or leave --retarget out"
