"""What lies in a bucket on a disk, for what reads or writes disks alone: for as long as it is used, or kept."""

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path

from filelock import FileLock

from entprog.storage.place import Place, Where, inside

AT_ONCE = 8
"""Files that are fetched at once."""


def below(folder: Where) -> list[str]:
    """The files in a folder and in those below it, by their paths in there, sorted; none where it is not there. Raises
    OSError."""
    if isinstance(folder, Place):
        return sorted(folder.below())
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@contextmanager
def local_copy(where: Where) -> Iterator[Path]:
    """A file or a folder to read: itself, or a copy that is there for as long as the block lasts. Raises OSError."""
    if isinstance(where, Path):
        yield where
        return
    with tempfile.TemporaryDirectory(prefix="entprog-") as scratch:
        path = Path(scratch) / where.name
        if where.is_file():
            where.get(path)
        else:
            path.mkdir()
            _get_all(where, path, where.below())
        yield path


@contextmanager
def scratch_for(folder: Where, last: str = "") -> Iterator[Path]:
    """Where to write a folder: itself, or a scratch folder that is not there yet, whose files take their place in the
    bucket when the block ends without an exception. last: the file that says that the others are there. Raises
    OSError."""
    if isinstance(folder, Path):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="entprog-") as scratch:
        path = Path(scratch) / folder.name
        yield path
        for name in sorted(below(path), key=lambda name: name == last):
            (folder / name).put(path / name)


def remove(folder: Where) -> None:
    """A folder and all in it, if it is there. What cannot be removed stays."""
    with suppress(OSError):
        (folder if isinstance(folder, Place) else Place.at(folder)).remove()


def fetched(place: Place, patterns: Sequence[str], into: Path) -> None:
    """Bring the files of a folder in a bucket whose names fit a pattern to a folder of this machine, but for those that
    are there already: of the same size, and last changed at the same time. What lies here alone goes. Processes that do
    so at once wait for each other. Raises OSError, FileNotFoundError where no file fits."""
    there = place.below()
    found = [name for name in there if any(fnmatchcase(name, pattern) for pattern in patterns)]
    if not found:
        raise FileNotFoundError(f"no such folder: {place}")
    into.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{into}.lock"):
        for name in set(below(into)) - there.keys():
            (into / name).unlink()
        _get_all(place, into, found)


def _get_all(place: Place, into: Path, names: Iterable[str]) -> None:
    def get(name: str) -> None:
        if not inside(into, name):
            raise OSError(f"{name!r} of {place} is no file in it")
        (into / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).get(into / name)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        for _ in pool.map(get, names):
            pass
