"""A second copy of Ray Tune's state of a sweep, which is there whenever a driver is killed.

Ray Tune writes its state again and again in a folder of its own and copies it from there, file by file and each in
place, in a thread: a kill at that moment leaves empty files, or the trials of one moment with the search of another,
of which it says nothing as it begins the whole sweep anew, or waits for a trial that it does not know. Here the state
is kept as it was written, in one file, which is replaced at once.
"""

import base64
import json
import re
from pathlib import Path

from entprog import files

KEPT = "kept.json"
"""Beside Ray Tune's folder: name of a file in it -> content, in base64."""
_STATE = "experiment_state-"
_OF_A_START = re.compile(r".+-(\d{4}-\d{2}-\d{2}_\d{2}-\d{2}-\d{2})\.(?:json|pkl)")
"""Names of the files that a start of the sweep leaves, by when it began."""


class Keeper:
    """Keeps the state in `folder`, Ray Tune's own, as often as it changes."""

    def __init__(self, folder: Path):
        self.folder, self.kept = folder, ()

    def keep(self, written: Path) -> None:
        """Keep the state that lies in `written`, which nothing writes to meanwhile, if it is whole and another one than
        the last. Raises OSError where that cannot be written."""
        paths = _newest(written)
        now = tuple((path.name, path.stat().st_mtime_ns) for path in paths)
        if now == self.kept:
            return
        found = _contents(paths)
        if _is_whole(found):
            kept = {name: base64.b64encode(content).decode() for name, content in found.items()}
            files.write_json(self.folder.parent / KEPT, kept)
            self.kept = now


def mend(folder: Path) -> bool:
    """Put the kept state in the place of the one in Ray Tune's folder; whether there is one, or that one was whole, or
    none was begun."""
    kept, paths = folder.parent / KEPT, _newest(folder)
    if not kept.exists() and _is_whole(_contents(paths)):  # ended before it was kept
        return True
    for path in paths:
        path.unlink()
    folder.mkdir(exist_ok=True)
    for name, content in (files.from_json(kept.read_text()) if kept.exists() else {}).items():
        (folder / name).write_bytes(base64.b64decode(content))
    return kept.exists() or not paths


def _newest(folder: Path) -> list[Path]:
    """Files of the newest start."""
    found: dict[str, list[Path]] = {}
    for path in folder.glob("*-*"):
        if of := _OF_A_START.fullmatch(path.name):
            found.setdefault(of[1], []).append(path)
    return sorted(found[max(found)]) if found else []


def _contents(paths: list[Path]) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in paths}


def _is_whole(found: dict[str, bytes]) -> bool:
    return any(name.startswith(_STATE) for name in found) and all(map(_ends, found.values()))


def _ends(content: bytes) -> bool:
    """Whether a file goes on to its end. It is JSON or a pickle, whatever its name says; a pickle ends with a dot."""
    if content.startswith(b"\x80"):
        return content.endswith(b".")
    try:
        json.loads(content)
    except ValueError:
        return False
    return True
