"""The ledger: one row for every input file and every clip window that was found, kept or rejected and why."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from entprog.errors import UserError

SCHEMA = pa.schema(
    [
        pa.field("kind", pa.string(), nullable=False),
        pa.field("file", pa.string(), nullable=False),
        pa.field("clip", pa.string(), nullable=False),
        pa.field("kept", pa.bool_(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("stage", pa.string(), nullable=False),
        pa.field("message", pa.string(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
        pa.field("bytes", pa.int64(), nullable=False),
        pa.field("start_s", pa.float64(), nullable=False),
    ]
)
"""kind: `input` or `clip`. reason, stage, message: empty where kept. sha256 and bytes: of the input file; for a kept
clip of its encoded video. start_s: where in its source a clip begins."""


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write the ledger as Parquet, whole or not at all."""
    scratch = path.with_name(path.name + ".tmp")
    pq.write_table(pa.Table.from_pylist(list(rows), schema=SCHEMA), scratch, compression="ZSTD")
    scratch.replace(path)


def read(path: Path) -> list[dict[str, Any]]:
    """All rows. Raises UserError if there is no readable ledger."""
    try:
        return pq.read_table(path, columns=SCHEMA.names).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"cannot read the ledger {path}: {' '.join(str(error).split())[:200]}") from None


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """{"inputs": {"found", "kept", "rejected": {reason: count}}, "clips": the same}, the frequent reasons first."""
    out = {}
    for name, kind in (("inputs", "input"), ("clips", "clip")):
        of_kind = [row for row in rows if row["kind"] == kind]
        reasons = Counter(row["reason"] for row in of_kind if not row["kept"])
        kept = sum(row["kept"] for row in of_kind)
        out[name] = {"found": len(of_kind), "kept": kept, "rejected": dict(reasons.most_common())}
    return out


def check(rows: Sequence[Mapping[str, Any]], files: Iterable[str], shard_clips: int | None = None) -> None:
    """Nothing may vanish: every file found has one row, every clip one, and what is kept is what the shards hold.

    Raises RuntimeError saying what does not add up.
    """
    counted = Counter(row["file"] for row in rows if row["kind"] == "input")
    wrong = {file: counted[file] for file in {*files, *counted} if counted[file] != 1}
    if wrong or set(counted) != set(files):
        raise RuntimeError(f"the ledger does not have one row for each input: {dict(sorted(wrong.items())[:5])}")
    clips = [row for row in rows if row["kind"] == "clip"]
    twice = [clip for clip, n in Counter(row["clip"] for row in clips).items() if n > 1]
    if twice:
        raise RuntimeError(f"clips found twice: {twice[:5]}")
    without_reason = [row for row in rows if row["kept"] == bool(row["reason"])]
    if without_reason:
        raise RuntimeError(f"rows neither kept nor rejected for a reason: {without_reason[:2]}")
    with_clips = {row["file"] for row in clips if row["kept"]}
    if with_clips != {row["file"] for row in rows if row["kind"] == "input" and row["kept"]}:
        raise RuntimeError("inputs are kept that no clip is kept of, or the other way round")
    kept = sum(row["kept"] for row in clips)
    if shard_clips is not None and kept != shard_clips:
        raise RuntimeError(f"{kept} clips are kept, but the shards hold {shard_clips}")
