"""What a person should know of folders of numbered images: which are none, which lack numbers, and which may show one
scene in several ways. Names alone are looked at."""

import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from entprog.media import frames
from entprog.media.video import VideoError
from entprog.preparing import addresses
from entprog.preparing.rows import Source


def notes(rows: Sequence[Source]) -> list[str]:
    """In lines, of all that were listed; gaps, and what is alike, are looked for on this machine only."""
    local = [row for row in rows if row["frames_fps"] and not addresses.is_remote(os.fsdecode(row["path"]))]
    names = {row["file"]: _names(row) for row in local}
    return [*_mixed(rows), *_gaps(names), *_alike(names)]


def _names(row: Source) -> list[str]:
    try:
        return [path.name for path in frames.paths(Path(os.fsdecode(row["path"])))]
    except VideoError:  # the first stage says so
        return []


def _more(found: Sequence[str]) -> str:
    """The first, and how many more there are."""
    return found[0] + (f" (and {len(found) - 1} more)" if len(found) > 1 else "")


def _mixed(rows: Sequence[Source]) -> list[str]:
    """Folders whose numbered images are no sequence, as they are several."""
    names_in = defaultdict(list)
    for row in rows:
        folder, _, name = row["file"].rpartition("/")
        names_in[folder].append(name)
    found = [
        f"{folder or '.'}/{{{', '.join(kinds)}}}" for folder in names_in if (kinds := frames.mixed(names_in[folder]))
    ]
    if not found:
        return []
    return [f"{_more(found)}: several sequences of images in one folder, of which none is read: give each its own"]


def _gaps(names: dict[str, list[str]]) -> list[str]:
    """Sequences that lack numbers in between, and those whose numbers go up by more than one."""
    broken = [file for file, images in names.items() if images and frames.parts(images)[-1]]
    thinned = [f"{step} in {file}" for file, images in names.items() if images and (step := frames.step(images)) > 1]
    out = []
    if broken:
        out.append(f"{_more(broken)}: numbers of images are missing: a new shot begins after each such gap")
    if thinned:
        out.append(
            f"numbers of images go up by {_more(thinned)}: prepare.frames_fps, or a manifest's fps, is the rate of "
            "those that are there"
        )
    return out


def _alike(names: dict[str, list[str]]) -> list[str]:
    """Sequences beside each other that have as many images, and names without a number: perhaps one scene's pictures,
    masks and drawn poses. The split goes by source, and would not keep them on one side."""
    beside = defaultdict(list)
    for file, images in names.items():
        folder, _, name = file.rpartition("/")
        if images and not any(map(str.isdigit, name)):
            beside[folder, len(images)].append(name)
    found = [f"{folder or '.'}/{{{', '.join(sorted(its))}}}" for (folder, _), its in beside.items() if len(its) > 1]
    if not found:
        return []
    return [
        f"{_more(found)}: beside each other, with as many images each, and each taken for a video: if they show one "
        "scene (pictures, masks, poses), give one of them as --input 'FOLDER/*/NAME'"
    ]
