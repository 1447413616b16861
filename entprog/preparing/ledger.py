"""The ledger: one row for every input file and every clip window that was found, kept or rejected and why."""

import io
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from entprog import files
from entprog.config import digest
from entprog.errors import UserError
from entprog.masking import bare, one_line
from entprog.names import plain
from entprog.preparing import addresses
from entprog.preparing.rows import Line, Probed, Source
from entprog.storage import Where

R = TypeVar("R", bound=Probed)

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
        pa.field("split", pa.string(), nullable=False),
        pa.field("stamp", pa.string(), nullable=False),
    ]
)
"""kind: `input` or `clip`. reason, stage: empty where kept. message: why it is rejected; of a kept input, which other
one has the same content. sha256 and bytes: of the input; for a kept clip of
its encoded video. start_s: where in its source a clip begins. split: `train` or `held_out` where kept. stamp: of an
input, what tells it from a changed one without reading it (`inputs.Inputs`), and what a manifest says of it."""


def line(row: Mapping[str, Any]) -> Line:
    """What the ledger says of a source, or with `clip` and `start_s` of one of its clips."""
    is_clip = bool(row.get("clip"))
    return {
        "kind": "clip" if is_clip else "input",
        "file": row["file"],
        "clip": row.get("clip", ""),
        "kept": not row["reason"],
        "reason": row["reason"],
        "stage": row["stage"],
        "message": row["message"],
        "sha256": row["sha256"],
        "bytes": row["bytes"],
        "start_s": row.get("start_s", 0.0),
        "split": "",
        "stamp": "" if is_clip else stamp(row),
    }


def stamp(row: Source) -> str:
    """What an input is, as far as its listing tells: its own stamp, or for want of one (on the web, in a manifest) its
    address on another machine without what is signed anew; and what lies beside it or a manifest says."""
    beside = [row["poses_stamp"]] if row["poses"] else []
    beside += ["mask", row["mask_stamp"]] if row["mask"] else []
    path = os.fsdecode(row["path"])
    own = row["stamp"] or (bare(path) if addresses.is_remote(path) else "")
    return f"{own} {digest(row['caption'], row['crop'], row['frames_fps'], *beside)}"


def rejected(row: R, stage: str, reason: str, message: str) -> R:
    """The row with its verdict."""
    shown = plain(one_line(message, os.fsdecode(row.get("path", b"")), most=500))
    return {**row, "stage": stage, "reason": reason, "message": shown}


def crashed(row: R, stage: str) -> R:
    """The verdict on a source that brought its process down again and again."""
    return rejected(row, stage, "crashed", "it brought the process down, or stood still, again and again")


def write(path: Where, rows: Iterable[Line]) -> None:
    """Write the ledger as Parquet, whole or not at all."""
    with files.whole(path) as scratch:
        pq.write_table(pa.Table.from_pylist(list(rows), schema=SCHEMA), scratch, compression="ZSTD")


def read(path: Where) -> list[Line]:
    """All rows. Raises UserError if there is no readable ledger."""
    try:
        # A process that ends while Arrow's threads still run, as one that is refused does, was aborted now and then.
        return pq.read_table(io.BytesIO(path.read_bytes()), columns=SCHEMA.names, use_threads=False).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"cannot read the ledger {path}: {one_line(error)}") from None


def summary(rows: Sequence[Line]) -> dict[str, dict[str, Any]]:
    """{"inputs": {"found", "kept", "rejected": {reason: count}}, "clips": the same}, the frequent reasons first."""
    out = {}
    for name, kind in (("inputs", "input"), ("clips", "clip")):
        of_kind = [row for row in rows if row["kind"] == kind]
        reasons = Counter(row["reason"] for row in of_kind if not row["kept"])
        kept = sum(row["kept"] for row in of_kind)
        out[name] = {"found": len(of_kind), "kept": kept, "rejected": dict(reasons.most_common())}
    return out


def examples(rows: Sequence[Line], most: int = 3) -> list[str]:
    """Of each of the most frequent reasons one input's message. Files that are no videos by name are not among them."""
    of = [row for row in rows if row["kind"] == "input" and row["reason"] not in ("", "not_a_video")]
    first = {row["reason"]: f"{row['file']}: {row['message'].removeprefix(row['file'] + ': ')}" for row in reversed(of)}
    frequent = Counter(row["reason"] for row in of).most_common(most)
    return [f"{reason}, such as {first[reason]}" for reason, _ in frequent]


def check(rows: Sequence[Line], files: Iterable[str], shard_clips: int | None = None) -> None:
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
