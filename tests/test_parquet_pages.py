"""Parquet whose footer or pages lie about their sizes, as a manifest and as a shard: a line, and no memory taken."""

import io
import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from entprog.data import shards
from entprog.media import limits, parquet_pages
from helpers import parquet_lies

MOST_BYTES, TAKEN_BYTES = 8 << 20, 64 << 20
"""What the reader is told to take at most, and what the process then may: what is opened lies in memory too."""
SIZE = 300 << 20

MANIFESTS = """
import json, resource, sys
from pathlib import Path
from entprog.errors import UserError
from entprog.media.limits import Limits
from entprog.preparing import manifest

def taken():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

most, *paths = sys.argv[1:]
for path in map(Path, paths):
    before = taken()
    try:
        said = f"read: {manifest.read(path, path.name, Limits(max_decoded_bytes=int(most)))[0][:1]}"
    except UserError as error:
        said = str(error)
    print(json.dumps([path.stem, said, taken() - before]))
"""
SHARD = """
import resource, sys
from pathlib import Path
from entprog.data import shards

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    shards.read_rows(Path(sys.argv[1]), [0])
except shards.DamagedShardError as error:
    print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def child(program, *words) -> list[str]:
    """What a process says whose memory is its own."""
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, words)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_manifest_that_lies_is_a_line_and_takes_no_memory(tmp_path):
    paths = parquet_lies.make(tmp_path, 120 << 20)
    said = {name: (words, taken) for name, words, taken in map(json.loads, child(MANIFESTS, MOST_BYTES, *paths))}
    assert said.keys() == {path.stem for path in paths}
    for name, (words, taken) in said.items():
        assert words.startswith(("cannot read manifest", f"{tmp_path}/{name}.parquet: ")), (name, words)
        assert "\n" not in words and taken < TAKEN_BYTES, (name, words, taken)
    assert "DELTA_LENGTH_BYTE_ARRAY, which is not read" in said["lengths"][0]
    assert "120 MiB in memory, more than 8 MiB are not read" in said["page"][0]


@pytest.mark.parametrize("column", ["video", "caption"])
def test_a_shard_that_lies_is_damaged_and_takes_no_memory(column, tmp_path):
    row = dict.fromkeys(shards.SCHEMA.names, 0)
    row |= dict.fromkeys(("clip_id", "source", "source_sha256", "split", "caption"), "")
    row |= {"video": b"", "reference": b"", "pose": np.zeros(4 * 33 * 3, np.float32), "frames": 4}
    row[column] = bytes(SIZE) if column != "caption" else "\0" * SIZE
    table = pa.Table.from_pylist([row], schema=shards.schema(4))
    del row
    path = tmp_path / "0.parquet"
    path.write_bytes(parquet_lies.understated(table, compression="zstd", use_dictionary=False))
    assert path.stat().st_size < SIZE / 1000
    said, taken = child(SHARD, path)
    assert said.startswith(f"damaged shard {path}, row 0: ") and "300 MiB in memory" in said, said
    assert int(taken) < TAKEN_BYTES


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"data_page_version": "2.0", "compression": "gzip"},
        {"use_dictionary": False, "compression": "none", "data_page_size": 512},
        {"row_group_size": 700, "write_page_index": True, "write_page_checksum": True, "compression": "brotli"},
        {"use_dictionary": False, "column_encoding": {"fps": "BYTE_STREAM_SPLIT", "n": "DELTA_BINARY_PACKED"}},
        {"version": "1.0", "dictionary_pagesize_limit": 100, "store_schema": False},
    ],
)
def test_sound_files_of_any_kind_are_read_as_they_are(options, tmp_path):
    table = pa.table(
        {
            "path": [f"{i % 900}.mp4" for i in range(3000)],
            "fps": [i / 7 for i in range(3000)],
            "n": [None if i % 3 else i for i in range(3000)],
            "crop": [[i, 2] if i % 5 else None for i in range(3000)],
            "deep": [{"a": [b"x" * (i % 4)]} for i in range(3000)],
        }
    )
    pq.write_table(table, tmp_path / "a.parquet", **options)
    assert limits.table(tmp_path / "a.parquet").to_pylist() == table.to_pylist()


def test_any_byte_of_a_pages_header_may_be_another():
    file = io.BytesIO()
    pq.write_table(pa.table({"path": [f"{i}.mp4" for i in range(20)]}), file, use_dictionary=False)
    column = pq.ParquetFile(file).metadata.row_group(0).column(0)
    (page,) = parquet_pages.of_column(file, column)
    told = 0
    for at in range(column.data_page_offset, column.data_page_offset + 16):
        for byte in range(256):
            wrong = bytearray(file.getvalue())
            wrong[at] = byte
            try:
                list(parquet_pages.of_column(io.BytesIO(wrong), column))
            except ValueError as error:
                told += "damaged" in str(error)
    assert page.values == 20 and told > 500
