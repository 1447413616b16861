"""A job's OUTPUT belongs to it: the folder was empty when the job began there, and carries the job's mark since.

The mark, OUTPUT/entprog-job.json, names the job and its *identity*: all that decides what the job leaves there. The
same job of the same identity goes on in the folder; everything else is refused before anything was touched, so that no
job ever replaces or removes what a person, or another job, has put there. While a command works in a folder it holds
OUTPUT/.entprog.lock, so that the same command, begun twice, does not work there twice at once.
"""

import contextlib
import json
import os
import socket
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from entprog import files, masking, storage
from entprog.errors import UserError
from entprog.names import plain
from entprog.storage import PROBE, Place, Where

MARK = "entprog-job.json"
RESULT = "result.json"
LOCK = ".entprog.lock"
SHOWN = 3
"""Names, or settings, that a refusal shows."""
SHOWN_CHARACTERS = 60
"""Of each value."""
ABSENT = "not set"

_holding: ContextVar[ExitStack | None] = ContextVar("_holding", default=None)
"""Where `alone` keeps the locks of the folders that were taken inside it."""


class OtherSettingsError(UserError):
    """The folder holds the same job's work, of other settings."""

    def __init__(self, message: str, names: Collection[str]):
        super().__init__(message)
        self.names = names
        """Of what differs."""


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process holds every folder of a disk that it takes: another command is refused there. Locks end with
    the process, however it ends. (Trials of a sweep, which Ray starts again, go without: the sweep holds theirs.)"""
    with ExitStack() as locks:
        before = _holding.set(locks)
        try:
            yield
        finally:
            _holding.reset(before)


def check(
    output: Where, job: str, identity: Mapping[str, Any], *, earlier: bool = False, idle: Mapping[str, bool] = {}
) -> None:
    """Raises UserError unless `output` is new, empty, or this job's with this identity (OtherSettingsError: with
    another). Changes nothing.

    identity: {setting, or what else decides: JSON value}. earlier: the job has recognised an unmarked folder by records
    of its own, which a version without marks wrote. idle: {name of what the job leaves before it has done any work:
    whether that goes with the command that left it}. A job that was refused, and has left nothing beside that, is in
    nobody's way: its command, corrected, may take the folder.
    """
    another = "choose another --output"
    try:
        there = _names(output)
    except FileNotFoundError:
        _check_above(output)
        return
    except OSError as error:
        raise _unwritable(output, error) from None
    if links := _links(output):
        raise UserError(
            f"{output} holds links ({_some(links)}), and what is written there would come into other files: {another}, "
            "or remove them"
        )
    if not set(there) - {MARK}:  # a mark alone is of a command that was refused before it did anything
        return
    if MARK not in there:
        if earlier:
            return
        raise UserError(
            f"{output} holds files that are not of {_a(job)} job ({_some(there)}): {another}, a new or an empty one"
        )
    known = _read(output)
    if known["job"] != job:
        raise UserError(f"{output} is the output of {_a(known['job'])} job: {another} for {job}")
    differing = _differing(output, identity)
    if differing and not _was_idle(output, idle):
        message = _some([f"{name} was {before}, now {now}" for name, (before, now) in differing.items()], "; ")
        raise OtherSettingsError(f"{output} holds {_a(job)} job of other settings ({message}): {another}", differing)


def _differing(output: Where, identity: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """{what decides: (as the mark has it, now)} of all that is not the same, as a refusal shows it."""
    now = masking.masked_in(json.loads(files.strict_json(identity)))
    before = masking.masked_in(_read(output)["identity"])
    names = [name for name in {**now, **before} if now.get(name, ABSENT) != before.get(name, ABSENT)]
    return {name: (_shown(before, name), _shown(now, name)) for name in names}


def take(
    output: Where, job: str, identity: Mapping[str, Any], *, earlier: bool = False, idle: Mapping[str, bool] = {}
) -> None:
    """Make the folder this job's. Raises UserError as `check` does, or if the folder cannot be written."""
    check(output, job, identity, earlier=earlier, idle=idle)
    writable(output)
    hold(output)
    check(output, job, identity, earlier=earlier, idle=idle)  # who held it a moment ago may have begun to work
    if _was_idle(output, idle) and _differing(output, identity):
        for name in (RESULT, *(name for name, goes in idle.items() if goes)):
            _remove(output / name)
    files.write_json(output / MARK, {"job": job, "identity": masking.masked_in(identity)})


def _was_idle(output: Where, idle: Mapping[str, bool]) -> bool:
    """Whether a job was refused that has left no more than it does before it has done any work. Empty files and
    folders are nothing."""
    try:
        refused = idle and files.from_json((output / RESULT).read_text())["status"] == "refused"
    except (OSError, ValueError, KeyError, TypeError):
        return False
    if isinstance(output, Place):
        filled = {name.partition("/")[0] for name, size in output.below().items() if size}
    else:
        filled = {path.relative_to(output).parts[0] for path in output.rglob("*") if _is_something(path)}
    return bool(refused) and filled <= {MARK, LOCK, RESULT, *idle}


def _is_something(path: Path) -> bool:
    return path.is_symlink() or (not path.is_dir() and path.stat().st_size > 0)


def _remove(path: Where) -> None:
    if path.is_dir():
        storage.remove(path)
    else:
        path.unlink(missing_ok=True)


def hold(folder: Where, of: Where | None = None) -> None:
    """Raises UserError where another command works in a folder. Storage without locks, as a bucket is, tells nobody of
    another. of: the output that the folder is part of, where that is another one."""
    locks, output = _holding.get(), of or folder
    if locks is None or isinstance(folder, Place):
        return
    path = folder / LOCK
    holder = _holder(path)  # older filelock empties what it tries to lock
    lock = FileLock(path, timeout=0, is_singleton=True)  # one for all that this process does in a folder
    try:
        locks.enter_context(lock)
        with files.opened(path, "w") as file:
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
    except Timeout:
        # NFS 3 keeps the lock of a machine that never comes back for good, NFS 4 for a minute or two.
        raise UserError(
            f"another command is at work in {output}{holder}: wait for its end (`entprog status {output}`), or end it; "
            f"if its machine is gone, remove {path}"
        ) from None
    except (NotImplementedError, OSError):
        return


def _holder(lock: Path) -> str:
    """Who has taken a lock last, in brackets; empty where that is not known."""
    try:
        said = plain(masking.one_line(lock.read_text(errors="replace"), most=100))
    except OSError:
        return ""
    return f" ({said})" if said else ""


def writable(folder: Where) -> None:
    """Make a folder. Raises UserError if it cannot be written."""
    if isinstance(folder, Place):
        folder.check("the output")
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _unwritable(folder, error) from None


def _check_above(output: Where) -> None:
    """Raises UserError for a folder that is not there and cannot be made: where nothing can be written above it. What
    is tried leaves nothing."""
    if isinstance(output, Place):
        return
    above = next(folder for folder in output.absolute().parents if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as error:
        raise _unwritable(output, error) from None


def _unwritable(output: Where, error: OSError) -> UserError:
    reason = error.strerror or masking.one_line(error)
    return UserError(f"cannot write to output folder {output}: {reason}; choose another --output")


def check_outside(output: Where, inputs: Mapping[str, str | None]) -> None:
    """Raises UserError for an output that lies in a folder that the job reads. inputs: by setting."""
    folders = {setting: Path(given).expanduser() for setting, given in inputs.items() if given}
    for setting, folder in folders.items():
        if isinstance(output, Path) and folder.is_dir() and output.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{output} lies in {setting}, {folder}, which is only read: choose another --output")


def is_of(output: Where, job: str) -> bool:
    """Whether the folder carries the job's mark, of whatever identity; a damaged mark is nobody's. Raises OSError where
    a bucket does not answer."""
    if isinstance(output, Place) and not (output / MARK).exists():
        return False
    with contextlib.suppress(UserError):
        return _read(output)["job"] == job
    return False


def release(output: Where, made: Sequence[Path]) -> None:
    """Take back a mark in a folder that holds nothing else: what was refused leaves nothing behind.

    made: folders, innermost first, that were not there before this command: they go too if they are empty.
    """
    if output.is_dir() and _names(output) == [MARK]:
        (output / MARK).unlink()
        if isinstance(output, Path):
            (output / LOCK).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # somebody else's file may have come into one meanwhile
            for folder in made:
                folder.rmdir()
            if isinstance(output, Place) and "/" in output.root:  # not a bucket itself
                output.rmdir()  # what stands for a folder that a file was removed from


def _names(output: Where) -> list[str]:
    """What is in a folder, without the lock, and without what a check that was killed has left in a bucket. Raises
    OSError."""
    names = sorted(path.name for path in output.iterdir() if path.name != LOCK)
    return [name for name in names if not (isinstance(output, Place) and name.startswith(PROBE))]


def _links(output: Where) -> list[str]:
    """The links in a folder that are not to folders: a job writes files by these names."""
    if isinstance(output, Place):
        return []
    return sorted(path.name for path in output.iterdir() if path.is_symlink() and not path.is_dir())


def missing(output: Where) -> list[Path]:
    """The folder and those above it that are not there, innermost first; of a bucket, which has none, no one."""
    if isinstance(output, Place):
        return []
    return [folder for folder in (output, *output.parents) if not folder.exists()]


def _read(output: Where) -> dict[str, Any]:
    path = output / MARK
    try:
        known = files.from_json(path.read_text())
        if isinstance(known["job"], str) and isinstance(known["identity"], dict):
            return known
        reason = "no job and identity in it"
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = masking.reason(error, most=100)
    raise UserError(f"{path} is damaged ({reason}): choose another --output")


def _a(job: str) -> str:
    return f"{'an' if job[0] in 'aeiou' else 'a'} {job}"


def _some(items: Sequence[str], between: str = ", ") -> str:
    more = f"{between}and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return between.join(items[:SHOWN]) + more


def _shown(values: Mapping[str, Any], name: str) -> str:
    if name not in values:
        return ABSENT
    value = values[name]
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"
