"""A source's row on its way through the stages of prepare: what each stage finds in it, with shapes and units.

At run time a row is a dictionary of text, numbers and bytes, as Ray Data takes it: an array is the bytes of its values.
A stage gives back a new row with its own fields added, and passes a rejected row on as it is. By a source's name it is
known whether it is tried as a video.
"""

import os
from pathlib import Path
from typing import NotRequired, TypedDict

from entprog.masking import bare
from entprog.preparing import addresses

SUFFIXES = frozenset(
    {".3g2", ".3gp", ".asf", ".avi", ".divx", ".dv", ".f4v", ".flv", ".gif", ".h264", ".hevc", ".ivf", ".m2ts", ".m2v"}
    | {".m4v", ".mj2", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".mxf", ".ogm", ".ogv", ".qt", ".rm", ".rmvb"}
    | {".ts", ".vob", ".webm", ".wmv", ".y4m"}
)
"""Endings of file names that are tried as videos. Others are not opened: FFmpeg takes even plain text for a video."""


class Source(TypedDict):
    """A source as `inputs.find` lists it; nothing of it has been opened."""

    file: str
    """Name for people, ledger and clips; unique among the inputs, and without secrets."""
    path: bytes
    """Path or address. File names need not be UTF-8."""
    bytes: int
    """Size; 0 if it is not known."""
    stamp: str
    """Changes with the content; empty if nothing is known that does."""
    frames_fps: float
    """Frames per second of a folder of numbered images; 0: a video."""
    caption: str
    split: str
    """`train` or `held_out` where a manifest asks for one, else empty."""
    crop: str
    """left,top,width,height in pixels of the upright picture; empty: all of it."""
    poses: bytes
    """Path of the file beside it that holds its poses (`media.posefile`); empty: they are estimated."""
    poses_stamp: str
    """Of that file (`posefile.stamp`): hash of its content."""
    mask: bytes
    """Path of the file beside it that holds its mask (`media.masks`); empty: there is none."""
    mask_stamp: str
    """Of that file, alike."""
    key: NotRequired[str]
    """Name of its part: of the files that its stages write."""


class Probed(Source):
    """After the first stage."""

    sha256: str
    """Of the content; empty if it could not be read."""
    stage: str
    """Where it was rejected; empty if it was not, as are the next two."""
    reason: str
    """One of `windows.REASONS`."""
    message: str
    """The reason in more words: one line without secrets."""
    source_height: int
    """Pixels of the whole upright picture."""
    source_width: int
    stored_height: int
    """The same as they are stored, square or not: what programs count in that read it with OpenCV."""
    stored_width: int
    view_height: int
    """Pixels of what the crop leaves."""
    view_width: int
    source_fps: float
    """Frames a second, on average; 0 if its header does not say."""
    field_order: str
    """`tff` or `bff` of an interlaced video that does not say it is one, else empty."""


class Shots(Probed):
    """After the second stage."""

    cuts: bytes
    """int32 [N]: clip frames at which new shots begin."""
    length: int
    """Clip frames in the whole source."""


class Tracked(Shots):
    """After the third stage."""

    track: bytes
    """float32 [T, points, 3]: x and y in 0..1 of the view, visibility 0..1, at the clip's frame rate."""
    points: int
    """Points of a pose, 33 or 133."""
    others: bytes
    """bool [T]: whether more people than one were seen."""


class Cut(Tracked):
    """In the fourth stage."""

    lines: list["Line"]
    """The ledger's, of all its clips."""
    clips: int
    """Number of those that are kept."""
    part_sha256: str
    """Of the file that holds them; empty if there is none."""


class Done(TypedDict):
    """After the last stage, whose results lie in files."""

    file: str
    clips: int
    reason: str


class Line(TypedDict):
    """A line of the ledger, of an input or of one of its clips: what `ledger.SCHEMA` says."""

    kind: str
    file: str
    clip: str
    kept: bool
    reason: str
    stage: str
    message: str
    sha256: str
    bytes: int
    start_s: float
    split: str
    stamp: str


def is_video(row: Source) -> bool:
    """Whether a source is tried as a video, by its name."""
    return bool(row["frames_fps"]) or suffix(row) in SUFFIXES


def suffix(row: Source) -> str:
    """Ending of a source's name, in small letters."""
    return ending(os.fsdecode(row["path"]))


def ending(path: str) -> str:
    """The same of a path or address. In buckets '?' and '#' are letters of a name; but what stands behind them is
    shown only where it is a video's ending, as it may be a signature that somebody has put there."""
    whole = Path(path).suffix.lower()
    is_name = not addresses.is_remote(path) or (whole in SUFFIXES and not addresses.is_web(path))
    return whole if is_name else Path(bare(path)).suffix.lower()
