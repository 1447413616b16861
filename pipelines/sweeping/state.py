"""Where Ray Tune keeps a sweep's state: in a folder of the user's own, never in OUTPUT.

Tune pickles its state, and what is unpickled is code: it runs as whoever resumes the sweep. An output folder travels
and is shared; so it names its sweep by a random id alone, and the state lies where nobody else can write.
"""

import os
import re
import secrets
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entprog import files, storage
from entprog.errors import UserError
from entprog.masking import masked, reason
from entprog.storage import Where
from pipelines.outputs import claim

RECORD = "sweep.json"
"""In OUTPUT: the sweep's id, and what each of its trials gets."""

WHERE = "output.json"
"""In the state's folder: where the output is."""


def home() -> Path:
    """Folder of the states of all sweeps."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "entprog" / "sweeps"


@dataclass(frozen=True)
class State:
    """A sweep as it was begun."""

    share: dict[str, Any]
    """What each of the trials that run at once gets."""
    folder: Path
    """Ray Tune's."""


def begin(output: Where, share: dict[str, Any]) -> State:
    """A new sweep's state. Raises UserError if it could be written by others, or not at all."""
    name = secrets.token_hex(16)
    _own(home(), make=True)
    folder = _own(home() / name, make=True)
    files.write_json(output / RECORD, {"id": name, "share": share})
    return State(share, folder)


def read(output: Where) -> State | None:
    """The state of the sweep that was begun in an output, None if none was. Nothing is unpickled here.

    Raises UserError if it was begun by somebody else or on another machine, if somebody else could have written it, or
    if the output is a copy of one that is there still, or may be: both would go on in one state.
    """
    path = output / RECORD
    if not path.exists():
        return None
    try:
        known = files.from_json(path.read_text())
        name, share = known["id"], dict(known["share"])
        whole = re.fullmatch("[0-9a-f]{32}", name)
    except (OSError, ValueError, KeyError, TypeError):
        whole = None
    if whole is None:
        raise UserError(f"{path} is damaged: choose another --output")
    folder = home() / name
    if not folder.is_symlink() and not folder.exists():
        raise UserError(
            f"the sweep in {output} was begun by another user or on another machine: its state is not in {home()}; go "
            "on where it was begun, or choose another --output"
        )
    _own(home())
    begun = State(share, _own(folder))
    where = folder / WHERE
    there = files.from_json(where.read_text())["output"] if where.exists() else None
    if there in (None, _address(output)):
        return begun
    try:
        is_copy = _lies_in(there, name, output)
    except OSError as error:
        raise UserError(
            f"cannot look whether the sweep in {output} still lies in {masked(there)} too: {reason(error, there)}; try "
            f"again once that answers, or remove {where} if it was moved"
        ) from None
    if is_copy:
        raise UserError(
            f"the sweep in {output} is a copy of that in {masked(there)}, and both would go on in one state: go on "
            "there, remove it, or choose another --output"
        )
    return begun


def take(begun: State, output: Where) -> None:
    """Make the state this output's, which may have been moved, and this command's alone. Raises UserError where another
    one goes on in it."""
    claim.hold(begun.folder, output)
    files.write_json(begun.folder / WHERE, {"output": _address(output)})


def _lies_in(there: str, name: str, output: Where) -> bool:
    """Whether the sweep of this id lies there as well, which may be the output by another name of it (a mount, say).
    Raises OSError where that does not answer."""
    other = storage.at(storage.quickly(there), "the output")
    record = other / RECORD
    if not record.exists() or files.from_json(record.read_text()).get("id") != name:
        return False
    return not (isinstance(other, Path) and isinstance(output, Path) and other.samefile(output))


def _address(output: Where) -> str:
    return storage.address(output.resolve())


def _own(folder: Path, make: bool = False) -> Path:
    """The folder, if it is this user's alone. Raises UserError if it is not."""
    try:
        if make:
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir(mode=0o700, exist_ok=True)
        about = folder.lstat()
    except OSError as error:
        raise UserError(f"cannot keep the state of sweeps in {folder}: {error.strerror}; set XDG_STATE_HOME") from None
    mode = stat.S_IMODE(about.st_mode)
    wrong = "no folder" if not stat.S_ISDIR(about.st_mode) else ""
    wrong = wrong or ("another user's" if about.st_uid != os.geteuid() else "")
    wrong = wrong or (f"open to others (mode {mode:o})" if mode & 0o077 else "")
    if wrong:
        raise UserError(
            f"{folder} is {wrong}: Ray Tune's state in it would be run as code; remove it, or set XDG_STATE_HOME to a "
            "folder of your own"
        )
    return folder
