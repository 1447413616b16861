"""Folders of this machine, listed in full or refused: a disk that fails must not make a smaller dataset."""

import errno
import fnmatch
import glob
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from entprog.errors import UserError
from entprog.names import plain

_NOTHING_THERE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP})


def refuse(error: OSError, path: str | Path) -> None:
    """Raises UserError for what cannot be looked at. (An error of reading, unlike one of opening, names no file.)"""
    raise UserError(
        f"cannot list {plain(os.fspath(path))} ({error.strerror}), which lies in the input: make it "
        "readable, or give a glob or a manifest that leaves it out"
    )


def known(path: Path, follow_links: bool = True) -> os.stat_result | None:
    """What the system knows of a path; None where nothing is there. Raises UserError where that cannot be told."""
    try:
        return path.stat(follow_symlinks=follow_links)
    except ValueError:  # a name that no file can have
        return None
    except OSError as error:
        if error.errno not in _NOTHING_THERE:
            refuse(error, path)
        return None


def is_file(path: Path) -> bool:
    """Whether it is a plain file. Raises UserError where that cannot be told."""
    found = known(path)
    return found is not None and stat.S_ISREG(found.st_mode)


def is_folder(path: Path) -> bool:
    """Whether it is a folder. Raises UserError where that cannot be told."""
    found = known(path)
    return found is not None and stat.S_ISDIR(found.st_mode)


def names(folder: Path) -> list[str]:
    """Names in a folder; none where there is no folder. Raises UserError where it cannot be listed."""
    return [entry.name for entry in _entries(folder)]


def matches(folder: Path, parts: Sequence[str], above: frozenset[str] = frozenset()) -> Iterator[Path]:
    """The paths below a folder that the parts of a pattern name, as `glob.iglob(recursive=True)` has them, which passes
    over what it cannot list. Hidden names are not meant by `*` and `**`, and no circle of links is followed.

    Raises UserError where a folder cannot be listed.
    """
    if not parts:
        yield folder
        return
    first, *rest = parts
    if first == "**":
        place = os.path.realpath(folder)
        if place in above or not is_folder(folder):
            return
        yield from matches(folder, rest)
        for entry in _entries(folder):
            if entry.name.startswith("."):
                continue
            if is_folder(folder / entry.name) if entry.is_symlink() else entry.is_dir():
                yield from matches(folder / entry.name, parts, above | {place})
            elif not rest:
                yield folder / entry.name
    elif glob.has_magic(first):
        for name in fnmatch.filter(names(folder), first):
            if first.startswith(".") or not name.startswith("."):
                yield from matches(folder / name, rest)
    elif known(folder / first, follow_links=False) is not None:
        yield from matches(folder / first, rest)


def once(paths: Iterable[Path]) -> list[Path]:
    """Paths in order, of those that links lead to several times only the shortest, which is the first of its length. A
    link to a file is a file of its own, as it is in a folder that is searched."""
    of_place = {}
    for path in sorted(paths, key=lambda path: (len(path.parts), path)):
        # with os.path: a link in a circle raises nothing
        place = os.path.realpath(path) if is_folder(path) else os.path.realpath(path.parent) + f"/{path.name}"
        of_place.setdefault(place, path)
    return sorted(of_place.values())


def _entries(folder: Path) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except ValueError:  # a name that no folder can have
        return []
    except OSError as error:
        if error.errno not in _NOTHING_THERE:
            refuse(error, folder)
        return []
