"""A second copy of Ray Tune's state of a sweep, which is there whenever a driver is killed.

Ray Tune writes its state again and again, each file in place: a kill at that moment leaves empty ones, of which it says
nothing as it begins the whole sweep anew. Here the last whole state is kept in one file, which is replaced at once.
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


def keep(folder: Path) -> None:
    """Keep Ray Tune's state in a folder as it is, if it is whole. Raises OSError where that cannot be written."""
    found = _newest(folder)
    if _is_whole(found):
        files.write_json(folder.parent / KEPT, {name: base64.b64encode(found[name]).decode() for name in found})


def mend(folder: Path) -> bool:
    """Put the kept state in the place of one that is not whole; whether it was whole, or could be mended so."""
    found = _newest(folder)
    if not found or _is_whole(found):
        return True
    for name in found:
        (folder / name).unlink()
    kept = folder.parent / KEPT
    for name, content in (files.from_json(kept.read_text()) if kept.exists() else {}).items():
        (folder / name).write_bytes(base64.b64decode(content))
    return kept.exists()


def _newest(folder: Path) -> dict[str, bytes]:
    """Name -> content of the files of the newest start."""
    found: dict[str, list[Path]] = {}
    for path in folder.glob("*-*"):
        if of := _OF_A_START.fullmatch(path.name):
            found.setdefault(of[1], []).append(path)
    return {path.name: path.read_bytes() for path in found[max(found)]} if found else {}


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
