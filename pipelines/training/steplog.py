"""OUTPUT/steps.jsonl, what a training leaves of each step, and OUTPUT/warnings.jsonl, what it was warned of.

Light to import, for those that only read them.
"""

import contextlib
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from entprog import files, storage
from entprog.masking import masked, one_line
from entprog.storage import Where

WARNINGS = "warnings.jsonl"
PREVIEWS = "previews/previews.jsonl"
SENT_EVERY_S = 10.0
"""To a bucket, in which a file is written whole: less often where that takes more than a part of the time,"""
SENT_SHARE = 0.05
"""namely this one."""


def steps_of(output: Where) -> list[dict[str, Any]]:
    """The records of a run's steps so far; the last line may be half written."""
    return lines_of(output / "steps.jsonl")


def lines_of(path: Where) -> list[dict[str, Any]]:
    """The whole lines of a file of JSON lines; none where there is no file. Raises ValueError for a damaged one."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [files.from_json(line) for line in lines if line.endswith("\n")]


def logged_s(step: Mapping[str, Any]) -> float:
    """A step's time in MLflow, seconds since 1970; an earlier version's lines have one time."""
    return step["logged_s"] if "logged_s" in step else step["time"]


def warn(output: Where, line: str) -> None:
    """Keep a warning; a disk that is full, or a bucket that is away, is one already."""
    text = files.strict_json({"time": time.time(), "warning": masked(line)}) + "\n"
    path = output / WARNINGS
    with contextlib.suppress(OSError):
        if isinstance(path, Path):
            with files.opened(path, "a") as file:
                file.write(text)
        else:  # few lines
            path.write_text((path.read_text() if path.exists() else "") + text)


class StepLog:
    """OUTPUT/steps.jsonl: one line a step. On a resume, lines after the checkpoint are cut off and written anew.

    In a bucket the file is written anew by a thread, every SENT_EVERY_S or less often, and by `keep`. The thread ends
    with a `with`, which keeps the log once more where it ends by an exception.
    """

    def __init__(self, path: Where, done: int, warn: Callable[[str], None] = lambda line: None):
        """done: steps of the run so far; what was logged of them is left as it is. warn: gets what went wrong with a
        disk or a bucket. Raises OSError."""
        self.path, self.warn = path, warn
        self.file = files.opened(path, "a+b") if isinstance(path, Path) else _copy(path)
        self.file.seek(0)
        size, last = 0, b'{"step": 0}'
        for last in _before(self.file, done):
            size += len(last)
        self.file.seek(size)
        lost = self.file.readlines()
        self.file.truncate(size)
        os.lseek(self.file.fileno(), 0, os.SEEK_END)
        self.unwritten = b""
        """Lines, or the end of one, that the disk has not taken yet."""
        self.last: int = files.from_json(last)["step"]
        """Number of the last step that was left; 0: none was."""
        self.newest_s = max(map(_logged_s, (last, *lost)))
        """Time of the newest line in MLflow, lines that were cut off among them: seconds since 1970."""
        self.sender = None if isinstance(path, Path) else _Sender(Path(self.file.name), path, warn)

    def later_s(self, time_s: float) -> float:
        """The next line's time in MLflow (`logged_s`), of when its step was done: after that of every line before it,
        for a machine's clock may be behind that of the machine before, and MLflow tells a lost attempt's points from
        those that count by their time. Seconds since 1970."""
        self.newest_s = max(time_s, self.newest_s + 0.002)  # MLflow has milliseconds
        return self.newest_s

    def add(self, record: dict[str, Any]) -> None:
        """Of a disk that is full, or away, the first of failures in a row is a warning: its lines come with the next
        that can be written."""
        first = not self.unwritten
        self.unwritten += files.strict_json(record).encode() + b"\n"
        try:
            self._write()
        except OSError as error:
            if first:
                self.warn(f"{self.path} is not up to date: {one_line(error)}; tried again at every step")

    def keep(self) -> None:
        """What was added so far must not be lost with this process or machine. A bucket that does not answer is a
        warning."""
        with contextlib.suppress(OSError):  # of a full disk it was told
            self._write()
        if self.sender:
            self.sender.tried()

    def close(self) -> None:
        """Keep what was added. Raises OSError where a disk or a bucket does not take it."""
        self._write()
        if self.sender:
            self.sender.stop()
            self.sender.send()
        self.file.close()

    def _write(self) -> None:
        """Past Python's buffer, which does not say how much of it was written where that fails. Raises OSError."""
        while self.unwritten:
            self.unwritten = self.unwritten[os.write(self.file.fileno(), self.unwritten) :]

    def __enter__(self) -> "StepLog":
        return self

    def __exit__(self, *_) -> None:
        if self.sender:
            self.sender.stop()  # whoever goes on may have begun already
        if not self.file.closed:  # the worker failed, or was told to end
            self.keep()


class _Sender:
    """Brings a file of this machine to a bucket again and again."""

    def __init__(self, file: Path, path: storage.Place, warn: Callable[[str], None]):
        self.file, self.warn, self.failing = file, warn, False
        self.path = storage.at(storage.quickly(path.address), "the output")
        self.one = threading.RLock()
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._go_on, name=f"send {path.name}", daemon=True)
        self.thread.start()

    def send(self) -> float:
        """Seconds that it took. Raises OSError."""
        with self.one:
            begun = time.monotonic()
            self.path.put(self.file)
            return time.monotonic() - begun

    def tried(self) -> float:
        """As `send`; of failures in a row the first is a warning."""
        with self.one:
            try:
                took_s, failed = self.send(), False
            except OSError as error:
                took_s, failed = 0.0, True
                if not self.failing:
                    again = f"tried again every {SENT_EVERY_S:.0f} s"
                    self.warn(f"{self.path} is not up to date: {one_line(error)}; {again}")
            self.failing = failed
            return took_s

    def stop(self) -> None:
        self.stopped.set()
        self.thread.join()

    def _go_on(self) -> None:
        wait_s = 0.0  # lines after the checkpoint are no longer shown
        while not self.stopped.wait(wait_s):
            wait_s = max(SENT_EVERY_S, self.tried() / SENT_SHARE)


def _copy(path: storage.Place) -> Any:
    """The file in a bucket as one of this machine, which goes when it is closed; an empty one where there is none."""
    file = tempfile.NamedTemporaryFile("w+b", prefix="entprog-")  # noqa: SIM115 - as long as the log
    if path.exists():
        with path.open() as there:
            shutil.copyfileobj(there, file)
    return file


def _logged_s(line: bytes) -> float:
    """A line's time in MLflow; 0 where there is none that can be read."""
    try:
        return float(logged_s(files.from_json(line)))
    except (ValueError, KeyError, TypeError):
        return 0.0


def _before(lines: Iterable[bytes], done: int) -> Iterator[bytes]:
    """The whole lines of a log up to a step, as far as they can be read."""
    for line in lines:
        try:
            if not line.endswith(b"\n") or files.from_json(line)["step"] > done:
                return
        except (ValueError, KeyError, TypeError):
            return
        yield line
