"""OUTPUT/steps.jsonl, what a training leaves of each step, and OUTPUT/warnings.jsonl, what it was warned of.

Light to import, for those that only read them.
"""

import contextlib
import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from entprog import files
from entprog.masking import masked

WARNINGS = "warnings.jsonl"
PREVIEWS = "previews/previews.jsonl"


def steps_of(output: Path) -> list[dict[str, Any]]:
    """The records of a run's steps so far; the last line may be half written."""
    return lines_of(output / "steps.jsonl")


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of JSON lines; none where there is no file. Raises ValueError for a damaged one."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def warn(output: Path, line: str) -> None:
    """Keep a warning; a disk that is full is one already."""
    record = {"time": time.time(), "warning": masked(line)}
    with contextlib.suppress(OSError), (output / WARNINGS).open("a") as file:
        file.write(files.strict_json(record) + "\n")


class StepLog:
    """OUTPUT/steps.jsonl: one line a step. On a resume, lines after the checkpoint are cut off and written anew."""

    def __init__(self, path: Path, done: int):
        """done: steps of the run so far; what was logged of them is left as it is."""
        self.file = path.open("a+b")
        self.file.seek(0)
        self.file.truncate(sum(len(line) for line in _before(self.file, done)))

    def add(self, record: dict[str, Any]) -> None:
        self.file.write(files.strict_json(record).encode() + b"\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def _before(lines: Iterable[bytes], done: int) -> Iterator[bytes]:
    """The whole lines of a log up to a step, as far as they can be read."""
    for line in lines:
        try:
            if not line.endswith(b"\n") or json.loads(line)["step"] > done:
                return
        except (ValueError, KeyError, TypeError):
            return
        yield line
