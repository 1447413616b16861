"""A folder of numbered images as a video: the layout of TikTok's and many other sets."""

import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, count, groupby, pairwise
from operator import itemgetter
from pathlib import Path
from statistics import median_low

import numpy as np

from entprog.media import pictures
from entprog.media.limits import Limits
from entprog.media.video import VideoError, VideoInfo

SUFFIXES = pictures.SUFFIXES - {".gif"}  # each GIF is a video by itself
GAP = 2
"""Numbers are missing where they go up by more than so many times what they usually do: where one alone is missing, or
every third was left out, motion is hardly changed."""
_PIECE_BYTES = 1 << 20
_NUMBERED = re.compile(r"(.*?)(\d+)(\.[^.]+)")


def numbered(names: list[str]) -> list[str]:
    """The images among file names if they are one numbered sequence, in its order; otherwise none.

    One sequence: two images or more, alike in name but for the number (and capitals of the ending); hidden files do not
    count.
    """
    found = _sequences(names)
    if len(found) != 1:
        return []
    (images,) = found.values()
    return [m[0] for m in sorted(images, key=lambda m: (int(m[2]), m[0]))] if len(images) > 1 else []


def step(names: Sequence[str]) -> int:
    """What the numbers of a sequence (`numbered`) usually go up by, from image to image: the median, at least 1."""
    return max(1, median_low(_differences(names)))


def parts(names: Sequence[str]) -> list[int]:
    """How many gaps lie before each image of a sequence: [N]. No motion is to be seen from one part to the next."""
    most = GAP * step(names)
    return [0, *accumulate(difference > most for difference in _differences(names))]


def _differences(names: Sequence[str]) -> list[int]:
    return [after - before for before, after in pairwise(int(_NUMBERED.fullmatch(name)[2]) for name in names)]


def mixed(names: list[str]) -> list[str]:
    """What the sequences are called (`frame_*.png`) where there are several, of which none is taken; otherwise none."""
    found = _sequences(names)
    if len(found) < 2 or max(map(len, found.values())) < 2:
        return []
    return [f"{name}*{ending}" for name, ending in sorted(found)]


def _sequences(names: Iterable[str]) -> dict[tuple[str, str], list[re.Match[str]]]:
    """Images among file names by what they have in common: {(before the number, ending in small letters): them}."""
    found = defaultdict(list)
    for m in map(_NUMBERED.fullmatch, names):
        if m and m[3].lower() in SUFFIXES and not m[0].startswith("."):
            found[m[1], m[3].lower()].append(m)
    return found


def paths(folder: Path) -> list[Path]:
    """The folder's images in order. Raises VideoError `unreadable`, or `no_frames` if it is no sequence."""
    try:
        names = [entry.name for entry in os.scandir(folder) if entry.is_file()]
    except OSError as error:
        raise VideoError("unreadable", f"{folder}: {error.strerror}") from None
    found = numbered(names)
    if not found:
        raise VideoError("no_frames", f"{folder}: no numbered images")
    return [folder / name for name in found]


def sha256(folder: Path, heartbeats=lambda pieces: pieces) -> str:
    """Hash over the images' names and contents, in order. `heartbeats`: over pieces of all of them, as read."""
    whole = hashlib.sha256()
    for path, pieces in groupby(heartbeats(_pieces(paths(folder))), key=itemgetter(0)):
        content = hashlib.sha256()
        for _, piece in pieces:
            content.update(piece)
        whole.update(os.fsencode(path.name) + b"\0" + content.digest())
    return whole.hexdigest()


def _pieces(images: Iterable[Path]) -> Iterator[tuple[Path, bytes]]:
    """The images' contents in pieces, of each image at least one. Raises VideoError `unreadable`."""
    for path in images:
        try:
            with path.open("rb") as stream:
                yield path, stream.read(_PIECE_BYTES)
                while piece := stream.read(_PIECE_BYTES):
                    yield path, piece
        except OSError as error:
            raise VideoError("unreadable", f"{path}: {error.strerror}") from None


def probe(folder: Path, own_fps: float, limits: Limits) -> VideoInfo:
    """Count the images and decode the first. Raises VideoError as `video.probe` does."""
    found = paths(folder)
    duration_s = len(found) / own_fps
    if duration_s > limits.max_duration_s:
        message = f"{duration_s:.0f} s, more than {limits.max_duration_s:g} s are not read"
        raise VideoError("too_long", f"{folder}: {message}")
    height, width = pictures.read(found[0], limits).shape[:2]
    return VideoInfo(width, height, (width, height), own_fps, duration_s, len(found), "images")


def shown(time_s: float, own_fps: float, images: int) -> int:
    """The number of the image nearest to a time, counted from 0, of so many."""
    return min(round(time_s * own_fps), images - 1)


def iter_frames(folder: Path, own_fps: float, fps: float, limits: Limits) -> Iterator[tuple[float, np.ndarray]]:
    """(time_s, uint8 RGB [H, W, 3]) of the image nearest to each i / fps, as `video.iter_frames` gives frames."""
    found = paths(folder)
    before, image = -1, None
    for i in count():
        time_s = i / fps
        if time_s >= len(found) / own_fps:
            return
        at = shown(time_s, own_fps, len(found))
        if at != before:
            before, image = at, pictures.read(found[at], limits)
        yield time_s, image
