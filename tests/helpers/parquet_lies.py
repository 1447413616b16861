"""Parquet files that claim little and expand to much, each of a few kilobytes: `make(FOLDER)`."""

import io
import struct
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

PLAIN = {"use_dictionary": False, "write_statistics": False}
COUNT = 1 << 29


def varint(number: int, length: int = 0) -> bytes:
    """A number as Thrift and Parquet write it, of at least that many bytes."""
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    while len(out) < length:
        out[-1] |= 128
        out.append(0)
    return bytes(out)


def zigzag(number: int, length: int = 0) -> bytes:
    return varint(number << 1, length)


def parts(content: bytes) -> tuple[bytes, bytes]:
    """(pages, footer) of a file."""
    size = struct.unpack("<I", content[-8:-4])[0]
    return content[: -8 - size], content[-8 - size : -8]


def whole(pages: bytes, footer: bytes) -> bytes:
    return pages + footer + struct.pack("<I", len(footer)) + b"PAR1"


def written(table: pa.Table, **options) -> bytes:
    out = io.BytesIO()
    pq.write_table(table, out, write_statistics=False, **options)
    return out.getvalue()


def understated(table: pa.Table, **options) -> bytes:
    """A file whose footer says of every column that it takes a hundred bytes in memory."""
    content = written(table, **options)
    pages, footer = parts(content)
    about = pq.ParquetFile(io.BytesIO(content)).metadata
    groups = [about.row_group(i) for i in range(about.num_row_groups)]
    sizes = {group.total_byte_size for group in groups}
    sizes |= {group.column(i).total_uncompressed_size for group in groups for i in range(group.num_columns)}
    for size in sorted(sizes, reverse=True):
        old = zigzag(size)
        if size > 1 << 20:
            assert old in footer
            footer = footer.replace(old, zigzag(100, len(old)))
    return whole(pages, footer)


def page_of(payload: bytes, encoding: int, claimed: int) -> bytes:
    """A file of one page with that content, which says how many values it holds."""
    empty = pa.table({"path": [b""] * 100_003}, schema=pa.schema([pa.field("path", pa.binary(), nullable=False)]))
    content = written(empty, use_dictionary=False, compression="none")
    _, footer = parts(content)
    old = pq.ParquetFile(io.BytesIO(content)).metadata.row_group(0).column(0).total_compressed_size
    size = zigzag(len(payload))
    header = b"\x15\x00\x15" + size + b"\x15" + size
    header += b"\x2c\x15" + zigzag(claimed) + b"\x15" + zigzag(encoding) + b"\x15\x06\x15\x06\x00\x00"
    return whole(b"PAR1" + header + payload, footer.replace(zigzag(old), zigzag(len(header + payload))))


def many_empty_entries() -> bytes:
    """A dictionary of millions of texts, which are all empty: its page is zeros."""
    content = written(pa.table({"path": pa.array([b"a"], pa.binary())}), compression="zstd")
    zeros = pa.compress(bytes(4 * COUNT // 8), "zstd", asbytes=True)
    _, footer = parts(content)
    about = pq.ParquetFile(io.BytesIO(content)).metadata.row_group(0).column(0)
    pages, _ = parts(content)
    data = pages[about.data_page_offset :]
    header = b"\x15\x04\x15" + zigzag(4 * COUNT // 8) + b"\x15" + zigzag(len(zeros))
    header += b"\x4c\x15" + zigzag(COUNT // 8) + b"\x15\x00\x00\x00"
    first = header + zeros
    moved = 4 + len(first)
    for field, old, new in (
        (b"\x16", about.total_compressed_size, len(first + data)),
        (b"\x26", about.data_page_offset, moved),
    ):
        assert field + zigzag(old) in footer
        footer = footer.replace(field + zigzag(old), field + zigzag(new))
    return whole(b"PAR1" + first + data, footer)


def counted() -> bytes:
    """What the delta encodings of texts begin with: that very many follow, all of length 0, in a few bytes."""
    return varint(COUNT) + varint(1) + varint(COUNT) + zigzag(0) + zigzag(0) + b"\0"


def binary(values) -> pa.Table:
    return pa.table({"path": pa.array(values, pa.binary())})


def make(folder: Path, size: int) -> list[Path]:
    """The files, of which each expands to `size` bytes and more."""
    large = bytes(size)
    wide = pa.schema([(f"c{i}", pa.int8()) for i in range(20_000)])
    listed = pa.ListArray.from_arrays([0, size // 4], pa.nulls(size // 4, pa.int32()).fill_null(7))
    once = pa.DictionaryArray.from_arrays(
        pa.nulls(5000, pa.int32()).fill_null(0), pa.array([bytes(size // 20)], pa.binary())
    )
    repeated = pa.table({"path": once})
    kinds = {
        "page": understated(binary([large]), compression="zstd", use_dictionary=False),
        "gzip": understated(binary([large]), compression="gzip", use_dictionary=False),
        "version-2": understated(binary([large]), compression="zstd", use_dictionary=False, data_page_version="2.0"),
        "dictionary": understated(binary([large, b""]), compression="zstd"),
        "repeated": understated(repeated, compression="zstd", store_schema=False),
        "list": written(pa.table({"path": ["a"], "crop": listed}), compression="zstd"),
        "width": written(pa.table({"path": pa.nulls(8, pa.binary(size // 8))}), compression="zstd"),
        "entries": many_empty_entries(),
        "lengths": page_of(counted(), 6, 100_003),
        "prefixes": page_of(counted() * 2, 7, 100_003),
        "columns": written(pa.Table.from_arrays([pa.array([], pa.int8())] * len(wide), schema=wide)),
    }
    for name, content in kinds.items():
        assert len(content) < size / 20, name
        (folder / f"{name}.parquet").write_bytes(content)
    return [folder / f"{name}.parquet" for name in kinds]
