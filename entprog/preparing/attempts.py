"""A source may bring down or hold up the process that reads it: once or twice, and never the job.

A native crash of a decoder, or the system's hand when memory runs out, ends the process, and Ray starts the stage again
in another one, for ever. Marks in the folder of parts outlive the process.
"""

import errno
import faulthandler
import math
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from entprog.media.video import VideoError
from entprog.storage import Where

T = TypeVar("T")

MAX_CRASHES = 2
"""Crashes of the process on one machine after which a source is left alone: one may be another's doing (memory)."""
MAX_CRASHES_ANYWHERE = 4
"""The same on all machines together: of a node that is lost no other crash is known."""
_REARM_S = 1.0


class MachineError(Exception):
    """What failed for want of the machine (a full disk), not of the source: it ends the job and is no verdict."""


LACKING = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.EDQUOT, errno.EROFS})
"""Errors of a machine that has no more open files, memory or room on its scratch disk to give. Of others, as of a
network disk that is away, some come with one file for good: they are verdicts, and `again` does not take these for
final."""


def lacking(error: BaseException) -> OSError | None:
    """The error of a machine that lacks something from which another came, if any."""
    seen: BaseException | None = error
    while seen is not None and not (isinstance(seen, OSError) and seen.errno in LACKING):
        seen = seen.__cause__ or seen.__context__
    return seen


def scratch(make: Callable[..., T]) -> T:
    """A temporary file or folder, made by a function of `tempfile`. Raises MachineError where none can be made."""
    try:
        return make(prefix="entprog-")
    except OSError as error:
        message = f"cannot make a scratch file ({error.strerror}): set TMPDIR to a folder with room; run it again"
        raise MachineError(message) from None


@contextmanager
def attempt(parts: Where | None, key: str, stage: str, stall_s: float) -> Iterator[bool]:
    """Whether a stage may be tried with a source: not when it brought its process down MAX_CRASHES times before on this
    machine, or MAX_CRASHES_ANYWHERE times in all.

    The mark, with a line for each process that ended, is taken away when the stage comes back. While it runs, the
    process ends if `heartbeats` saw nothing for `stall_s`: a decoder that never returns can be stopped in no other way.
    """
    if parts is None:
        yield True
        return
    mark = parts / f"{key}.{stage}.tried"
    here = platform.node()
    ended_on = mark.read_bytes().decode().splitlines() if mark.exists() else []
    mark.write_bytes("".join(f"{machine}\n" for machine in [*ended_on, here]).encode())
    faulthandler.dump_traceback_later(stall_s, exit=True, file=2)
    try:
        yield ended_on.count(here) < MAX_CRASHES and len(ended_on) < MAX_CRASHES_ANYWHERE
    finally:
        faulthandler.cancel_dump_traceback_later()
    mark.unlink(missing_ok=True)


def heartbeats(items: Iterable[Any], stall_s: float, watched: bool, work_s: float = math.inf) -> Iterator[Any]:
    """The items; with each of them the watch of `attempt` begins anew.

    Raises VideoError `too_long` once they have taken more than `work_s`: a server may send a byte a minute, for ever.
    """
    began = armed = time.monotonic()
    for item in items:
        now = time.monotonic()
        if now - began > work_s:
            raise VideoError("too_long", f"it takes more than {work_s:g} s (prepare.max_work_s)")
        if watched and now - armed > min(_REARM_S, stall_s / 4):
            faulthandler.dump_traceback_later(stall_s, exit=True, file=2)
            armed = now
        yield item


def forget(parts: Where) -> None:
    """Marks left by a job that was killed from outside say nothing about its sources."""
    for mark in parts.glob("*.tried"):
        mark.unlink(missing_ok=True)
