"""What opening something from outside may cost, whatever its header or its content claims.

Sizes that a header gives are checked before memory is taken for them, others while they are decoded.
"""

import math
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from entprog.config import Prepare
from entprog.errors import UserError
from entprog.masking import one_line
from entprog.media import parquet_pages

_BATCH_ROWS = 4096
_HEADER_BYTES = 1 << 16
_FOOTER_BYTES = 1 << 23
_FOOTER_ITEMS = 1 << 14
"""Columns, and row groups, in a Parquet file: memory for what a footer says is many times the footer."""
_WIDTHS = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "INT96": 12, "FLOAT": 4, "DOUBLE": 8}
"""Bytes in memory of a value of Parquet's types."""


@dataclass(frozen=True)
class Limits:
    """Most that one picture, video, array or table may take. The defaults are those of the settings `prepare.max_*`."""

    max_pixels: int = Prepare.model_fields["max_pixels"].default
    """Pixels in a picture or a frame."""
    max_frames: int = Prepare.model_fields["max_frames"].default
    """Frames decoded of a video."""
    max_duration_s: float = Prepare.model_fields["max_duration_s"].default
    """A video's last frame's time."""
    max_gap_s: float = Prepare.model_fields["max_gap_s"].default
    """Time between one frame of a video and the next."""
    max_work_s: float = Prepare.model_fields["max_work_s"].default
    """Time on the clock from a video's opening to its last frame."""
    max_decoded_bytes: int = Prepare.model_fields["max_decoded_bytes"].default
    """Bytes in memory of an array or a table."""


LIMITS = Limits()


def of(prepare: Prepare) -> Limits:
    """The limits that settings give."""
    return Limits(**{name: getattr(prepare, name) for name in Limits.__dataclass_fields__})


def array(path: Path, name: str | None = None, limits: Limits = LIMITS) -> np.ndarray:
    """The array of an .npy file, or with `name` that of an .npz file; never unpickled.

    Raises UserError if it is not there, is damaged, holds Python objects, or is larger than the limits allow.
    """
    try:
        if name is None:
            with path.open("rb") as stream:
                return _array(stream, path.stat().st_size, limits)
        with zipfile.ZipFile(path) as archive:
            names = [entry.filename.removesuffix(".npy") for entry in archive.infolist()]
            if name not in names:
                raise UserError(f"{path} has no array named {name}, only {', '.join(names[:9]) or 'nothing'}")
            entry = archive.infolist()[names.index(name)]
            with archive.open(entry) as stream:  # gives no more bytes than the entry claims
                return _array(stream, entry.file_size, limits)
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except MemoryError:
        raise UserError(f"{path}: not enough memory for it") from None
    except UserError as error:
        raise UserError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
    except Exception as error:  # zipfile, zlib and numpy raise almost anything on damaged input
        kind = "npy" if name is None else "npz"
        raise UserError(f"cannot read {path} as .{kind}: {one_line(error)}") from None


def _array(stream, size: int, limits: Limits) -> np.ndarray:
    """An array out of a stream in NumPy's format of `size` bytes."""
    if size > limits.max_decoded_bytes + _HEADER_BYTES:
        raise UserError(too_many_bytes(size, limits))
    version = np.lib.format.read_magic(stream)
    if version not in {(1, 0), (2, 0)}:
        raise UserError(f"format {version[0]}.{version[1]} of .npy is not read: save plain numbers")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, column_major, dtype = read(stream)
    if dtype.hasobject:
        raise UserError("it holds Python objects, which are never unpickled: save plain numbers")
    due = math.prod(shape) * dtype.itemsize
    if due > limits.max_decoded_bytes:
        raise UserError(too_many_bytes(due, limits))
    content = stream.read(due)
    if len(content) != due:
        raise UserError(f"it ends after {len(content)} of {due} bytes")
    return np.frombuffer(content, dtype).reshape(shape, order="F" if column_major else "C")


def table(path: Path, columns: Sequence[str] | None = None, limits: Limits = LIMITS) -> pa.Table:
    """A Parquet file's rows, or some of its columns. Read in pieces, as its encodings repeat a value for nothing.

    Raises UserError if it is no Parquet file, lacks a column, or is larger than the limits allow.
    """
    try:
        with parquet(path) as file:
            return rows(path, file, range(file.num_row_groups), columns, limits)
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except MemoryError:
        raise UserError(f"{path}: not enough memory for it") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise UserError(f"cannot read {path} as Parquet: {one_line(error)}") from None


Source = Path | BinaryIO
"""A file by its path, or as a stream that can seek."""


@contextmanager
def _stream(source: Source) -> Iterator[BinaryIO]:
    if not isinstance(source, Path):
        yield source
        return
    with source.open("rb") as stream:
        yield stream


def parquet(source: Source) -> pq.ParquetFile:
    """A Parquet file, opened; of its content only the footer is read, of a bounded size.

    Raises OSError, ValueError or ArrowException.
    """
    with _stream(source) as file:
        size = parquet_pages.footer_bytes(file)
    check_footer(size)
    return pq.ParquetFile(source, page_checksum_verification=True, thrift_container_size_limit=_FOOTER_ITEMS)


def check_footer(size: int) -> None:
    """Raises ValueError for a footer of more bytes than are read."""
    if size > _FOOTER_BYTES:
        raise ValueError(f"its footer has {size} bytes, more than {_FOOTER_BYTES} are not read")


def rows(
    source: Source,
    file: pq.ParquetFile,
    groups: Sequence[int],
    columns: Sequence[str] | None = None,
    limits: Limits = LIMITS,
) -> pa.Table:
    """The rows of some row groups of a Parquet file that `parquet` opened, or some of their columns.

    Raises UserError if they are larger than the limits allow, whatever the file says of it, ValueError for damage.
    """
    largest = _largest_value(source, file, groups, columns, limits)
    # A value of a dictionary is stored once, and every row may repeat it.
    most = min(max(limits.max_decoded_bytes // (4 * largest), 1), _BATCH_ROWS)
    pieces, held = [], 0
    for piece in file.iter_batches(most, row_groups=list(groups), columns=columns, use_threads=False):
        # A file may ask that a column stay a dictionary, in which a text costs nothing however often it stands.
        dense = [c.dictionary_decode() if pa.types.is_dictionary(c.type) else c for c in piece.columns]
        piece = pa.RecordBatch.from_arrays(dense, piece.schema.names)
        held += piece.nbytes
        if held > limits.max_decoded_bytes:
            raise UserError(too_many_bytes(held, limits))
        pieces.append(piece)
    schema = file.schema_arrow
    if columns is not None:
        schema = pa.schema([schema.field(name) for name in schema.names if name in columns])
    return pa.Table.from_batches(pieces, pieces[0].schema if pieces else schema)


def _largest_value(
    source: Source, file: pq.ParquetFile, groups: Sequence[int], columns: Sequence[str] | None, limits: Limits
) -> int:
    """Bytes that one row of a column may take at most, from the headers of all pages that would be unpacked.

    Raises UserError if the pages, or a row's list, are larger than the limits allow.
    """
    largest, whole = 1, 0
    with _stream(source) as stream:
        for part in (file.metadata.row_group(group) for group in groups):
            for i in range(part.num_columns):
                chunk, kind = part.column(i), file.schema.column(i)
                if columns is not None and chunk.path_in_schema.split(".")[0] not in columns:
                    continue
                pages = list(parquet_pages.of_column(stream, chunk))
                whole += sum(page.bytes for page in pages)
                width = _WIDTHS.get(kind.physical_type) or kind.length or max((page.bytes for page in pages), default=0)
                largest = max(largest, width, max((page.bytes for page in pages), default=0))
                # All values of a list may be one row's, and a run of equal ones takes next to no bytes in a page.
                listed = sum(page.values for page in pages) * width if kind.max_repetition_level else 0
                for size in (whole, width, listed):
                    if size > limits.max_decoded_bytes:
                        raise UserError(too_many_bytes(size, limits))
    return largest


def too_many_bytes(size: int, limits: Limits) -> str:
    """What people read of something larger in memory than the limits allow."""
    return (
        f"{size / 2**20:.0f} MiB in memory, more than {limits.max_decoded_bytes / 2**20:.0f} MiB are not read "
        "(prepare.max_decoded_bytes)"
    )
