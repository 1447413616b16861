"""Manifests: tables of sources (CSV, TSV, Parquet, JSON, JSON lines) and lists of paths (UBC-Fashion's layout)."""

import csv
import json
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from entprog.config import close_to
from entprog.data.shards import SPLITS
from entprog.errors import UserError
from entprog.masking import one_line
from entprog.media import limits
from entprog.media.limits import Limits

TABLES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
LISTS = (".txt", ".lst")
MAX_ROWS = 5_000_000
"""More would take gigabytes."""
SHOWN = 60
"""Characters of a value that a message shows."""
MOST_NAMES = 20
"""Names of columns that a message shows."""
COLUMNS = ("path", "caption", "split", "crop", "fps")


@dataclass(frozen=True)
class Entry:
    """One row of a manifest."""

    path: str
    """Path or URI; a relative one is meant from the manifest's own folder."""
    caption: str = ""
    split: str = ""
    """`train`, `held_out`, or empty: not said."""
    crop: str = ""
    """left,top,width,height in pixels of the upright source, or empty: all of it."""
    fps: float = 0.0
    """Frame rate of a folder of numbered images; 0 where the manifest gives none."""


def read(path: Path, name: str, most: Limits | None = None) -> tuple[list[Entry], list[str]]:
    """(all entries of a manifest or list, names of columns that are not read). `name` is how messages call it.

    Names of columns count without the spaces around them, in small letters.
    Raises UserError naming the row that is wrong, the columns that are missing, or a size over the limits.
    """
    suffix, most = path.suffix.lower(), most or Limits()
    rows: list[dict[str, Any]] = []
    unread: set[str] = set()
    try:
        if suffix == ".parquet":
            _take(_parquet(path, most), rows, unread)
        else:
            if path.stat().st_size > most.max_decoded_bytes:
                raise UserError(limits.too_many_bytes(path.stat().st_size, most))
            with path.open(encoding="utf-8-sig", newline="") as text:
                if suffix in LISTS:
                    lines = [line.strip() for line in islice(text, MAX_ROWS + 1)]
                    _check_count(lines)
                    return [Entry(line) for line in lines if line and not line.startswith("#")], []
                kinds = {".csv": _csv, ".tsv": _tsv, ".json": _json, ".jsonl": _jsonl}
                _take(kinds[suffix](text), rows, unread)
        _check_count(rows)
    except (OSError, ValueError, csv.Error, RecursionError) as error:
        message = str(error).replace(f"{path}: ", "").replace(str(path), name)
        raise UserError(f"cannot read manifest {name}: {one_line(message)}") from None
    entries = [_entry(row, f"manifest {name}, row {number}", unread) for number, row in enumerate(rows, 1)]
    return entries, [f"{column}{close_to(column, COLUMNS)}" for column in sorted(unread)]


def _take(found: Iterable[dict[str, Any]], rows: list[dict[str, Any]], unread: set[str]) -> None:
    """Add what is read of each row, and the names of what is not: a table may have many columns more."""
    for row in islice(map(_named, found), MAX_ROWS + 1):
        unread.update(row.keys() - COLUMNS)
        rows.append({column: row[column] for column in COLUMNS if column in row})


def _check_count(rows: list[Any]) -> None:
    if len(rows) > MAX_ROWS:
        raise ValueError(f"more than {MAX_ROWS} rows are not read: split it")


def _csv(text: Iterable[str], delimiter: str = ",") -> Iterator[dict[str, Any]]:
    """The rows of a table with a header; spaces around a cell do not count."""
    lines = csv.reader(text, delimiter=delimiter, skipinitialspace=True, strict=True)
    header = next(lines, None)
    if not header:
        raise ValueError("it is empty")
    _check_columns(header)
    for cells in lines:
        if cells and len(cells) != len(header):
            raise ValueError(f"line {lines.line_num} has {len(cells)} cells, the header {len(header)}")
        if cells:
            yield dict(zip(header, map(str.strip, cells), strict=True))


def _tsv(text: Iterable[str]) -> Iterator[dict[str, Any]]:
    return _csv(text, "\t")


def _json(text) -> list[dict[str, Any]]:
    rows = json.load(text)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("it is no list of JSON objects")
    return rows


def _jsonl(text: Iterable[str]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(text, 1):
        if line.strip():
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is no JSON object")
            yield row


def _parquet(path: Path, most: Limits) -> list[dict[str, Any]]:
    table = limits.table(path, limits=most)
    _check_columns(table.column_names)
    for field in table.schema:
        plain = field.type.value_type if pa.types.is_list(field.type) else field.type
        if pa.types.is_nested(plain) or pa.types.is_dictionary(plain):  # of a few bytes that may stand for many
            raise ValueError(f"column {field.name} is of type {field.type}: write plain text and numbers")
    return table.slice(0, MAX_ROWS + 1).to_pylist()


def _named(row: dict[str, Any]) -> dict[str, Any]:
    """A row under its columns' plain names."""
    _check_columns(row)
    return {_plain(column): value for column, value in row.items()}


def _check_columns(names: Iterable[Any]) -> None:
    """Raises ValueError for two columns of one name."""
    names = list(names)
    if len({*map(_plain, names)}) < len(names):
        raise ValueError(f"two columns of one name among {', '.join(map(str, names))}")


def _plain(column: Any) -> str:
    return str(column).strip().lower()


def _entry(row: dict[str, Any], where: str, others: Collection[str]) -> Entry:
    """others: names of columns that are not read."""
    given = {name: value for name, value in row.items() if value not in (None, "")}
    if not isinstance(given.get("path"), str):
        if "path" in row:
            raise UserError(f"{where}: no path")
        names = [*row, *sorted(others)]
        found = ", ".join(names[:MOST_NAMES]) or "none"
        found += f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
        found += " (the first line, or each object, names them)"
        raise UserError(f"{where}: no column 'path'{close_to('path', names)}; columns found: {found}")
    caption = given.get("caption", "")
    if caption != caption:  # NaN, which pandas writes where there is none
        caption = ""
    if isinstance(caption, bool) or not isinstance(caption, str | int | float):
        raise UserError(f"{where}: caption is {_short(caption)}, give text")
    try:
        f"{given['path']}{caption}".encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: half a character (a lone surrogate) in path or caption; write it as UTF-8") from None
    split = str(given.get("split", ""))
    if split and split not in SPLITS:
        raise UserError(f"{where}: split is {split!r}, give {' or '.join(SPLITS)}, or leave it empty")
    fps = given.get("fps", 0.0)
    try:
        fps = float(fps)
        if not 0 <= fps <= 1000:
            raise ValueError
    except (TypeError, ValueError):
        raise UserError(f"{where}: fps is {fps!r}, give frames per second") from None
    return Entry(given["path"], str(caption), split, _crop(given.get("crop", ""), where), fps)


def _short(value: Any) -> str:
    text = one_line(repr(value))
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def _crop(given: Any, where: str) -> str:
    """'left,top,width,height' out of a list or a string."""
    if given in ("", []):
        return ""
    parts = given.replace(",", " ").strip("[]() ").split() if isinstance(given, str) else given
    try:
        left, top, width, height = map(int, parts)
        fractions = any(isinstance(part, float) and not part.is_integer() for part in parts)
        if fractions or min(left, top) < 0 or min(width, height) < 1:
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{where}: crop is {given!r}, give left,top,width,height in pixels") from None
    return f"{left},{top},{width},{height}"
