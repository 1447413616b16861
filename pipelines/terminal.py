"""What jobs show on the terminal: texts, tables, progress; and where the output of C++ libraries goes."""

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from entprog import files, masking
from entprog.errors import UserError
from entprog.names import plain
from entprog.storage import Where


class Terminal(Console):
    """Shows texts as they are, whoever named the files and runs in them: neither markup nor control characters act.

    What is to stand out has a `style`.
    """

    def __init__(self, **options):
        super().__init__(markup=False, emoji=False, highlight=False, soft_wrap=True, **options)

    def render_str(self, text: str, **options) -> Text:
        """Every text that is printed, alone or in a table, becomes what is shown here; addresses without secrets."""
        return super().render_str(plain(masking.masked(text), keep="\n\t"), **options)


console = Terminal()
errors = Terminal(stderr=True)


MOST = 4000
"""Characters of a message: what it quotes of a file may be all of that."""


def complain(what: str, message: str) -> None:
    """One line on standard error, of MOST characters of the message at most."""
    said = masking.cut(masking.masked(message), MOST)
    errors.print(Text.assemble((f"{what}:", "red"), f" {plain(said)}"))


def duration(seconds: float) -> str:
    """Seconds in the two largest units that matter: 3 d 4 h, 5 min 6 s."""
    whole = round(seconds)
    parts = [(whole // 86400, "d"), (whole // 3600 % 24, "h"), (whole // 60 % 60, "min"), (whole % 60, "s")]
    first = next((i for i, (number, _) in enumerate(parts) if number), 3)
    return " ".join(f"{number} {unit}" for number, unit in parts[first : first + 2])


WHOLE_NAME = 36
"""Characters of a name in a table's first column that stay on one line, however narrow the terminal is."""


def show(title: str, rows: list[tuple[Any, ...]], columns: tuple[str, ...]) -> None:
    """A small table of final figures on the terminal."""
    table = Table(*columns, title=title, title_justify="left")
    table.columns[0].overflow = "fold"  # names of blocks and files: all of them, on as many lines as that takes
    table.columns[0].min_width = min(WHOLE_NAME, max((len(str(row[0])) for row in rows), default=0))
    for row in rows:
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row))
    console.print(table)


def progress_bar(left: ProgressColumn | None = None) -> Progress:
    """A bar with what is done, the time it took and the time it will take; nothing where there is no terminal.

    left: what says how long it will take, for work whose parts do not take equally long.
    """
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeElapsedColumn(),
        *([left] if left else [TextColumn("ETA"), TimeRemainingColumn()]),
        console=console,
        disable=not console.is_terminal,
    )


LINE_EVERY_S = 5.0
"""Time between lines where there is no terminal to draw a bar on."""


@contextmanager
def advancing(what: str, total: int, units: str = "clips") -> Iterator[Callable[[int], None]]:
    """Gives a function to call with how many more of the units are done: draws a bar with rate and ETA, or prints a
    line now and then, and one at the end."""
    started = printed = time.monotonic()
    done = 0
    with progress_bar() as bar:
        task = bar.add_task(what, total=total)

        def advance(more: int) -> None:
            nonlocal done, printed
            done, now = done + more, time.monotonic()
            rate = done / max(now - started, 1e-9)
            bar.update(task, completed=done, description=f"{what}, {rate:.2f} {units}/s")
            if not console.is_terminal and (done == total or now - printed >= LINE_EVERY_S):
                printed = now
                left_s = (total - done) / rate
                console.print(f"{what}: {done}/{total} {units}, {rate:.2f} {units}/s, ETA {duration(left_s)}")

        yield advance


@contextmanager
def stderr_into(path: Where, *, verbose: bool = False):
    """What C++ libraries write to this process's stderr goes into a file, which is kept only if the work fails.

    Not if it is refused: a UserError says by itself what is wrong.
    """
    if verbose:
        yield
        return
    sys.stderr.flush()
    mine = os.dup(2)
    scratch = None if isinstance(path, Path) else tempfile.TemporaryDirectory(prefix="entprog-")
    here = path if scratch is None else Path(scratch.name) / path.name
    with files.opened(here, "ab") as log:
        os.dup2(log.fileno(), 2)
    try:
        try:
            yield
        except UserError:
            here.unlink(missing_ok=True)
            raise
        here.unlink(missing_ok=True)
    finally:
        sys.stderr.flush()
        os.dup2(mine, 2)
        os.close(mine)
        if here.exists():
            files.write_text(path, plain(masking.masked(here.read_text(errors="replace")), keep="\n\t"))
        if scratch is not None:
            scratch.cleanup()
