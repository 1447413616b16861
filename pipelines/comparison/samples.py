"""Generated clips of several runs, the same motion side by side, small enough for a page."""

import base64
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from entprog.media import h264, video
from pipelines.comparison.groups import Group
from pipelines.comparison.runs import Training

FILE = re.compile(r"(?:.*/)?(\d{3}_.+)_result\.mp4")
"""What training leaves of a held-out motion: NAME.mp4 (beside reference, pose and truth), NAME_result.mp4 and more."""
GIVEN = ("pose", "truth")
HEIGHT, CRF, LONGEST_FRAMES = 192, 30, 96
"""Height, quality and length to which a clip is reduced that is too large for the page."""


@dataclass(frozen=True)
class Clip:
    """One clip in the page."""

    label: str
    data: str
    """data: URI of an mp4."""
    role: str
    """`given` (pose, truth) or `made`."""


@dataclass(frozen=True)
class Row:
    """One motion: what was given and what every group made of it, or what one made of it while it trained."""

    name: str
    clips: tuple[Clip, ...]


def rows(groups: Sequence[Group], count: int, largest_bytes: int) -> list[Row]:
    """Up to `count` motions that every group with clips has, by each group's typical run."""
    having = [(group, _names(group.typical)) for group in groups if group.typical]
    having = [(group, names) for group, names in having if names]
    if not having or not count:
        return []
    common = [name for name in having[0][1] if all(name in names for _, names in having)]
    out = []
    for name in common[:count]:
        first_run, first_path = having[0][0].typical, having[0][1][name]
        sources = [("given", part, first_run, first_path.removesuffix("result.mp4") + f"{part}.mp4") for part in GIVEN]
        sources += [("made", group.label, group.typical, names[name]) for group, names in having]
        found = [
            (role, label, run.read(path, partial(_data, largest_bytes=largest_bytes)))
            for role, label, run, path in sources
        ]
        clips = tuple(Clip(label, data, role) for role, label, data in found if data)
        out.append(Row(_title(name), clips))
    return out


def over_time(groups: Sequence[Group], largest_bytes: int) -> list[Row]:
    """What each group's typical run drew of its first motion while it trained, step by step."""
    out = []
    for group in groups:
        run, clips, motion = group.typical, [], ""
        for step, paths in sorted(run.previews.items() if run else ()):
            motion, path = next(iter(_results(paths).items()), ("", ""))
            data = run.read(path, partial(_data, largest_bytes=largest_bytes)) if path else None
            clips += [Clip(f"step {step}", data, "made")] if data else []
        if clips:
            out.append(Row(f"{group.label}, {_title(motion)}", tuple(clips)))
    return out


def _names(run: Training) -> dict[str, str]:
    """{motion: artifact of its result}."""
    return _results(run.artifacts)


def _results(paths: Iterable[str]) -> dict[str, str]:
    found = {path: FILE.fullmatch(path) for path in sorted(paths)}
    return {match[1]: path for path, match in found.items() if match}


def _title(motion: str) -> str:
    return motion[4:].replace("_", " ")


def _data(mp4: bytes, largest_bytes: int) -> str:
    """A clip for the page. Raises VideoError for what is none."""
    video.probe(mp4)
    if len(mp4) > largest_bytes:
        mp4 = _smaller(mp4)
    return "data:video/mp4;base64," + base64.b64encode(mp4).decode()


def _smaller(mp4: bytes) -> bytes:
    frames = h264.decode_rgb(mp4, range(LONGEST_FRAMES))
    height = min(HEIGHT, frames.shape[1])
    size = (height, max(2, round(frames.shape[2] * height / frames.shape[1] / 2) * 2))
    return h264.encode(np.stack([video.scale(frame, size) for frame in frames]), video.probe(mp4).fps, CRF)
