"""What opening something from outside may cost, whatever its header or its content claims.

Sizes that a header gives are checked before memory is taken for them, others while they are decoded.
"""

import math
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from entprog.config import Prepare
from entprog.errors import UserError
from entprog.masking import one_line

_BATCH_ROWS = 4096
_HEADER_BYTES = 1 << 16


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
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            return rows(file, range(file.num_row_groups), columns, limits)
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except MemoryError:
        raise UserError(f"{path}: not enough memory for it") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise UserError(f"cannot read {path} as Parquet: {one_line(error)}") from None


def rows(
    file: pq.ParquetFile, groups: Sequence[int], columns: Sequence[str] | None = None, limits: Limits = LIMITS
) -> pa.Table:
    """The rows of some row groups of an open Parquet file, or some of their columns.

    Raises UserError if they are larger than the limits allow.
    """
    known = [file.metadata.row_group(group) for group in groups]
    chunks = [part.column(i) for part in known for i in range(part.num_columns)]
    sizes = [c.total_uncompressed_size for c in chunks if columns is None or c.path_in_schema.split(".")[0] in columns]
    if sum(sizes) > limits.max_decoded_bytes:
        raise UserError(too_many_bytes(sum(sizes), limits))
    # A value of a dictionary is stored once, and every row may repeat it.
    most = min(max(limits.max_decoded_bytes // max(*sizes, 1), 1), _BATCH_ROWS)
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


def too_many_bytes(size: int, limits: Limits) -> str:
    """What people read of something larger in memory than the limits allow."""
    return (
        f"{size / 2**20:.0f} MiB in memory, more than {limits.max_decoded_bytes / 2**20:.0f} MiB are not read "
        "(prepare.max_decoded_bytes)"
    )
