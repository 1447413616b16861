"""What lies beside videos and belongs to them: captions (NAME.txt of NAME.mp4), poses (NAME.pose.npz), masks
(NAME.mask.mp4). Files that are taken so are no sources themselves.

Each function takes the rows that were listed and the folder of the input, into which such files may be links, and gives
the rows with what was found, and notes: what a person should know.
"""

import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from entprog.config import Prepare
from entprog.files import lies_in, may_pass
from entprog.masking import reason
from entprog.media import limits, masks, posefile
from entprog.media.video import VideoError
from entprog.names import counted
from entprog.preparing import addresses, disk
from entprog.preparing.rows import Source, is_video, suffix

CAPTION_BYTES = 1 << 16
"""Largest text beside a video that is taken for its caption."""
TEXTS = (".txt", ".caption")
"""Endings, in small letters, of files that people mean as captions."""


def captions(rows: Sequence[Source], root: Path) -> tuple[list[Source], list[str]]:
    """Of videos with a NAME.txt its text, as `caption`."""
    found, taken, unread = {}, set(), {}
    for row in rows:
        if not is_video(row) or not row["stamp"]:  # no video, or none that is there
            continue
        beside = Path(_stem(row) + ".txt")
        try:
            if not _stays(beside, root):
                raise ValueError("a link out of the input")
            known = beside.stat()
            if not stat.S_ISREG(known.st_mode) or known.st_size > CAPTION_BYTES:
                raise ValueError(f"no text of at most {CAPTION_BYTES} bytes")
            found[row["file"]] = beside.read_text("utf-8-sig").strip()
            taken.add(os.fsencode(beside))
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            if may_pass(error):  # kept without it, a clip would have no caption for good
                disk.refuse(error, beside)
            unread[os.fsencode(beside)] = f"{beside.name}: {reason(error)}"
    left = [row | {"caption": found.get(row["file"], "")} for row in rows if row["path"] not in taken]
    videos = sum(is_video(row) and not any(_before(row, ending) for ending in masks.ENDINGS) for row in left)
    texts, empty = sum(map(bool, found.values())), [file for file, text in found.items() if not text]
    alone = [row["file"] for row in left if suffix(row) in TEXTS and row["stamp"] and row["path"] not in unread]
    notes = []
    if texts:
        notes.append(f"captions of {texts} of {counted(videos, 'video')} are those of the .txt files beside them")
    if empty:
        notes.append(f"{counted(len(empty), 'video')} with an empty .txt file beside ({empty[0]}): no caption")
    if unread:
        first = next(iter(unread.values()))
        notes.append(f"{counted(len(unread), '.txt file')} beside videos cannot be read as captions ({first})")
    if alone:
        these = f"{counted(len(alone), 'file')} of text ({alone[0]})"
        notes.append(f"{these} not read: a caption is NAME.txt, in small letters, beside NAME.mp4 or a folder NAME")
    return left, notes


def poses(rows: Sequence[Source], root: Path) -> tuple[list[Source], list[str]]:
    """Of videos with a file of poses its path and stamp, as `poses` and `poses_stamp`."""
    left, count, several, links = _beside(rows, posefile.ENDINGS, "poses", root)
    notes = (
        [f"poses of {counted(count, 'video')} are those of the .pose.npz and .pose.json files beside them"]
        if count
        else []
    )
    if several:
        notes.append(f"{counted(len(several), 'video')} with both ({several[0]}): .pose.npz is read")
    if links:
        notes.append(f"{len(links)} files of poses are links out of the input ({links[0]}): not read")
    if alone := _alone(left, posefile.ENDINGS):
        notes.append(f"{len(alone)} files of poses belong to no video by their names ({alone[0]}): not read")
    if openpose := [row["file"] for row in left if row["file"].endswith("_keypoints.json")]:
        notes.append(
            f"{counted(len(openpose), 'file')} of OpenPose ({openpose[0]}) not read: poses are taken from NAME.pose.npz"
        )
    return left, notes


def bad_poses(rows: Sequence[Source], prepare: Prepare) -> list[str]:
    """In words what is wrong with the first file of poses, which is read: whoever wrote it wrote the others. Whether
    it is as long as its video is seen when that is decoded."""
    first = next((Path(os.fsdecode(row["poses"])) for row in rows if row["poses"]), None)
    try:
        if first is not None:
            posefile.read(first, 1, 1, limits.of(prepare))
    except VideoError as error:
        return [f"{error}: videos with such poses are rejected ({error.reason})"]
    return []


def person_masks(rows: Sequence[Source], root: Path) -> tuple[list[Source], list[str]]:
    """Of videos with a mask its path and stamp, as `mask` and `mask_stamp`."""
    left, count, several, links = _beside(rows, masks.ENDINGS, "mask", root)
    notes = [f"masks of {counted(count, 'video')} are those of the .mask files beside them"] if count else []
    if several:
        first = " before ".join(masks.ENDINGS)
        notes.append(
            f"{counted(len(several), 'video')} with several masks ({several[0]}): one of them is read, {first}"
        )
    if links:
        notes.append(f"{len(links)} masks are links out of the input ({links[0]}): not read")
    if alone := _alone(left, masks.ENDINGS):
        notes.append(f"{len(alone)} masks belong to no video by their names ({alone[0]}): taken for sources themselves")
    return left, notes


def elsewhere(rows: Sequence[Source]) -> tuple[list[Source], list[str]]:
    """The rows of another machine, where neither poses nor masks beside videos are read, without these masks: by their
    names they are videos."""
    there = {_stem(row) for row in rows if is_video(row)}
    poses, its_masks = (
        {row["file"] for row in rows for ending in endings if _before(row, ending) in there}
        for endings in (posefile.ENDINGS, masks.ENDINGS)
    )
    notes = [
        f"{len(found)} {what} there are not read: they are taken beside videos on this machine{instead}"
        for found, what, instead in ((poses, "files of poses", "; poses are estimated"), (its_masks, "masks", ""))
        if found
    ]
    return [row for row in rows if row["file"] not in its_masks], notes


def _before(row: Source, ending: str) -> str | None:
    """A path as far as an ending; None if it has another."""
    path = os.fsdecode(row["path"])
    return path.removesuffix(ending) if path.endswith(ending) else None


def _alone(rows: Sequence[Source], endings: Sequence[str]) -> list[str]:
    """Names of files on this machine that are called so: there is no video that they lie beside."""
    local = (row for row in rows if not addresses.is_remote(os.fsdecode(row["path"])))
    return [row["file"] for row in local if any(_before(row, ending) for ending in endings)]


def _beside(
    rows: Sequence[Source], endings: Sequence[str], name: str, root: Path
) -> tuple[list[Source], int, list[str], list[str]]:
    """(the rows, of videos with path and stamp of the first file beside it that has one of the endings, as `name` and
    `name_stamp`; how many have one; those that have several; names of links out of `root`, which are not read). Files
    that lie beside videos are no sources."""
    known: dict[str, dict[str, Any]] = {}
    taken, several, links = set(), [], []
    for row in rows:
        if addresses.is_remote(os.fsdecode(row["path"])) or not is_video(row):
            continue
        there = [Path(_stem(row) + ending) for ending in endings]
        is_file = disk.is_file if row["stamp"] else os.path.isfile  # where the video itself cannot be read, it is told
        there = [path for path in there if is_file(path)]
        taken |= {os.fsencode(path) for path in there}
        links += [path.name for path in there if not _stays(path, root)]
        there = [path for path in there if _stays(path, root)]
        if there:
            known[row["file"]] = {name: os.fsencode(there[0]), f"{name}_stamp": posefile.stamp(there[0])}
        if len(there) > 1:
            several.append(row["file"])
    left = [{**row, **known.get(row["file"], {})} for row in rows if row["path"] not in taken]
    return left, sum(row["file"] in known for row in left), several, links


def _stem(row: Source) -> str:
    """What names of files beside a source begin with: its path, without the ending of a video's."""
    path = os.fsdecode(row["path"])
    return path if row["frames_fps"] else os.path.splitext(path)[0]  # noqa: PTH122 (a folder's name has no ending)


def _stays(beside: Path, root: Path) -> bool:
    """Whether a file beside a video is, if it is a link, one to a file in the input or beside the video itself: no
    other text of this machine must come into the shards."""
    return not beside.is_symlink() or any(lies_in(beside, folder) for folder in (beside.parent, root))
