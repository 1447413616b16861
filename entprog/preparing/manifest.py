"""Manifests: tables of sources (CSV, Parquet, JSON lines) and plain lists of paths (the layout of UBC-Fashion)."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from entprog.config import close_to
from entprog.data.shards import SPLITS
from entprog.errors import UserError

TABLES = (".csv", ".jsonl", ".parquet")
LISTS = (".txt", ".lst")
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


def read(path: Path, name: str) -> tuple[list[Entry], list[str]]:
    """(all entries of a manifest or list, names of columns that are not read). `name` is how messages call it.

    Raises UserError naming the row that is wrong, or the columns that are missing.
    """
    suffix = path.suffix.lower()
    try:
        if suffix in LISTS:
            lines = (line.strip() for line in path.read_text("utf-8-sig").splitlines())
            return [Entry(line) for line in lines if line and not line.startswith("#")], []
        rows = {".csv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}[suffix](path)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"cannot read manifest {name}: {' '.join(str(error).split())[:200]}") from None
    entries = [_entry(row, f"manifest {name}, row {number}") for number, row in enumerate(rows, 1)]
    return entries, sorted({column for row in rows for column in row} - set(COLUMNS))


def _csv(path: Path) -> list[dict[str, Any]]:
    header = pa.csv.open_csv(path).schema.names
    strings = pa.csv.ConvertOptions(column_types=dict.fromkeys(header, pa.string()), strings_can_be_null=False)
    quoted = pa.csv.ParseOptions(newlines_in_values=True)
    return pa.csv.read_csv(path, convert_options=strings, parse_options=quoted).to_pylist()


def _jsonl(path: Path) -> list[dict[str, Any]]:
    rows = []
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is no JSON object")
            rows.append(row)
    return rows


def _parquet(path: Path) -> list[dict[str, Any]]:
    return pq.read_table(path).to_pylist()


def _entry(row: dict[str, Any], where: str) -> Entry:
    given = {name: value for name, value in row.items() if value not in (None, "") and name in COLUMNS}
    if not isinstance(given.get("path"), str):
        if "path" in row:
            raise UserError(f"{where}: no path")
        found = ", ".join(row) or "none"
        raise UserError(f"{where}: no column 'path'{close_to('path', row)}; columns found: {found}")
    try:
        f"{given['path']}{given.get('caption', '')}".encode()
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
    return Entry(given["path"], str(given.get("caption", "")), split, _crop(given.get("crop", ""), where), fps)


def _crop(given: Any, where: str) -> str:
    """'left,top,width,height' out of a list or a string."""
    if given in ("", []):
        return ""
    parts = given.replace(",", " ").strip("[]() ").split() if isinstance(given, str) else given
    try:
        left, top, width, height = (int(part) for part in parts)
        if min(left, top) < 0 or min(width, height) < 1:
            raise ValueError
    except (TypeError, ValueError):
        raise UserError(f"{where}: crop is {given!r}, give left,top,width,height in pixels") from None
    return f"{left},{top},{width},{height}"
