"""Where a job's score tables are kept, for every run to share."""

import contextlib

from entprog import files, storage
from entprog.errors import UserError
from entprog.storage import Place, Where
from pipelines import cli, terminal
from pipelines.cluster import joining


def place(output: Where, given: str | Where | None) -> Where:
    """Where a job's score tables are kept. On a cluster what is not named lies in its output: a folder of the machine
    that drives is none of the one that scores. So does that of an output in a bucket, which may be resumed anywhere. Of
    a bucket that can be read alone the tables are copied there, and new ones join them. Raises UserError as
    `check` does."""
    inside = output / "cei"
    own = inside if isinstance(output, Place) or joining.address() else cli.TABLES
    where = storage.at(given or own, "score tables")
    if not isinstance(where, Place) or (there := _only_read(where)) is None:
        return where
    terminal.console.print(f"score tables in {where} can be read alone: copied to {inside}, where new ones are kept")
    for name in there:
        with files.whole(inside / name) as scratch:
            scratch.write_bytes((where / name).read_bytes())
    return inside


def check(given: str | None) -> None:
    """Raises UserError for a bucket that score tables can neither be written to nor read from: before scoring, not
    after hours of it."""
    if given is not None and isinstance(where := storage.at(storage.quickly(given), "score tables"), Place):
        _only_read(where)


def _only_read(tables: Place) -> list[str] | None:
    """The tables in a bucket that cannot be written; None for one that can be. Raises UserError for one that cannot and
    has none."""
    try:
        tables.check("score tables")
    except UserError:
        with contextlib.suppress(OSError):
            if there := [name for name in tables.files() if name.endswith(".json")]:
                return there
        raise
    return None
