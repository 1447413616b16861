"""Shards: clips in Parquet files, an open format that any tool reads (`docs/shards.md` documents it).

A dataset folder holds `dataset.json`, `train/*.parquet` and `held_out/*.parquet`; one row is one clip.
Typed columns and encoded media as bytes: nothing is ever unpickled. Every page carries a checksum that is
checked on reading, every file a sha256 in `dataset.json`, so that a damaged byte is found, and found early.
"""

import contextlib
import functools
import io
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import NativeFile
from pydantic import NonNegativeInt

from entprog import files, masking, storage
from entprog.config import ClipShape, digest
from entprog.errors import UnreachableError, UserError
from entprog.media import limits, parquet_pages, wholebody
from entprog.records import Record
from entprog.storage import Place, Where, tensors
from entprog.storage.ranges import Ranged

FORMAT = "entprog-shards-1"
DATASET = "dataset.json"
POINTS = 33
"""Points of a pose, unless a dataset says otherwise."""
CLIPS_PER_ROW_GROUP = 8
ROW_GROUP_BYTES = 1 << 20
"""A row group holds at most so many clips, or so many bytes: training reads single clips in random order, and Parquet
gives whole row groups alone."""
SPLITS = ("train", "held_out")

SCHEMA = pa.schema(
    [
        pa.field("clip_id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("source_sha256", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("caption", pa.string(), nullable=False),
        pa.field("start_s", pa.float64(), nullable=False),
        pa.field("fps", pa.float64(), nullable=False),
        pa.field("frames", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("source_height", pa.int32(), nullable=False),
        pa.field("source_width", pa.int32(), nullable=False),
        pa.field("crop_left", pa.int32(), nullable=False),
        pa.field("crop_top", pa.int32(), nullable=False),
        pa.field("crop_width", pa.int32(), nullable=False),
        pa.field("crop_height", pa.int32(), nullable=False),
        pa.field("visibility", pa.float32(), nullable=False),
        pa.field("reference_s", pa.float64(), nullable=False),
        pa.field("reference", pa.binary(), nullable=False),
        pa.field("pose", pa.list_(pa.float32()), nullable=False),
        pa.field("video", pa.binary(), nullable=False),
    ]
)
"""Columns of one clip. In a file `pose` is a fixed-size list of frames*points*3 float32 (see `schema`)."""

MASK = pa.field("mask", pa.binary())
"""A further column of shards that hold masks: where the person is, as `media.masks.packed` says; null: not known."""

_MEDIA = ("reference", "video")  # already compressed: zstd would only cost time
_UNIQUE = ("clip_id", "pose", *_MEDIA)  # a dictionary of values that never repeat would hold everything twice
_OTHERS = [name for name in SCHEMA.names if name not in _UNIQUE]


class DamagedShardError(UserError):
    """A shard that cannot be read as what it should be. The message names the file, the row and what to do."""


@dataclass(frozen=True)
class ShardInfo(Record):
    """One shard file as `dataset.json` lists it."""

    file: str
    """Path inside the dataset's folder, with '/'."""
    clips: NonNegativeInt
    bytes: NonNegativeInt
    sha256: str


@dataclass(frozen=True)
class Dataset:
    """A folder of shards, as its `dataset.json` describes it."""

    folder: Where
    shape: ClipShape
    splits: dict[str, tuple[ShardInfo, ...]]
    """Shards by split (`train`, `held_out`), in the order that `index` counts them."""
    settings: dict[str, Any]
    """What it was prepared with."""
    fingerprint: str
    """Hash over split names and shard hashes: equal for equal clips, wherever the folder lies."""
    points: int = POINTS
    """Points of each pose: one of `wholebody.LAYOUTS`."""
    masks: bool = False
    """Whether clips of it have a mask."""

    def clips(self, split: str) -> int:
        """Number of clips of a split (0 if there is no such split)."""
        return sum(shard.clips for shard in self.splits.get(split, ()))


def schema(frames: int, points: int = POINTS, masks: bool = False) -> pa.Schema:
    """SCHEMA with `pose` as a fixed-size list for clips of that many frames, and with MASK where there are any."""
    place = SCHEMA.get_field_index("pose")
    of = SCHEMA.set(place, pa.field("pose", pa.list_(pa.float32(), frames * points * 3), nullable=False))
    return of.append(MASK) if masks else of


def write_shard(
    folder: Where,
    file: str,
    rows: Iterable[Mapping[str, Any]],
    shape: ClipShape,
    points: int = POINTS,
    masks: bool = False,
) -> ShardInfo:
    """Write clips to `folder/file`, whole or not at all; equal rows give equal bytes. Holds one row group at a time.

    Each row has every column of SCHEMA; `pose` is a float32 array [frames, 33 or 133, 3], which is written as `points`
    points (`wholebody.laid_out`). masks: whether rows may have MASK too.
    Raises ValueError for a row of another shape.
    """
    of = schema(shape.frames, points, masks)
    path = folder / file
    clips, left = 0, iter(rows)
    with files.whole(path) as scratch:
        with pq.ParquetWriter(
            scratch,
            of,
            compression={name: "NONE" if name in _MEDIA else "ZSTD" for name in _leaves(of)},
            use_dictionary=_OTHERS,
            write_statistics=_OTHERS,
            write_page_checksum=True,
        ) as writer:
            while some := [_flat(row, shape, points) for row in islice(left, CLIPS_PER_ROW_GROUP)]:
                writer.write_table(pa.Table.from_pylist(some, schema=of), clips_per_row_group(some))
                clips += len(some)
        return ShardInfo(file, clips, scratch.stat().st_size, files.sha256(scratch))


def _flat(row: Mapping[str, Any], shape: ClipShape, points: int) -> dict[str, Any]:
    """A row as the file holds it. Raises ValueError if it is of another shape."""
    pose = np.asarray(row["pose"], np.float32)
    if pose.ndim == 3 and pose.shape[1] in wholebody.LAYOUTS.values():
        pose = wholebody.laid_out(pose, points)
    given = (row["frames"], row["height"], row["width"], pose.shape)
    due = (shape.frames, shape.height, shape.width, (shape.frames, points, 3))
    if given != due:
        raise ValueError(f"clip {row['clip_id']} has (frames, height, width, pose) {given}, the shard {due}")
    return {**row, "pose": pose.ravel()}


def clips_per_row_group(rows: Sequence[Mapping[str, Any]]) -> int:
    """1 to CLIPS_PER_ROW_GROUP, fewer of larger clips."""
    held = (*_MEDIA, MASK.name)
    clip_bytes = sum(len(row.get(name) or b"") for row in rows for name in held) // max(len(rows), 1)
    return min(max(ROW_GROUP_BYTES // max(clip_bytes, 1), 1), CLIPS_PER_ROW_GROUP)


def _leaves(of: pa.Schema) -> list[str]:
    """Parquet's own column paths: a list's values are a column one level down."""
    return [f"{field.name}.list.element" if pa.types.is_nested(field.type) else field.name for field in of]


def write_dataset(
    folder: Where,
    shape: ClipShape,
    splits: Mapping[str, Iterable[ShardInfo]],
    settings: Mapping[str, Any],
    points: int = POINTS,
    masks: bool = False,
) -> Dataset:
    """Write `dataset.json`, the last file of a dataset: a folder without it is not one."""
    kinds = {count: kind for kind, count in wholebody.LAYOUTS.items()}
    record = {
        "format": FORMAT,
        "shape": shape.model_dump(),
        "pose": {"kind": kinds[points], "points": points, "values": ["x", "y", "visibility"]},
        "color": {"matrix": "bt709", "range": "limited", "pixels": "yuv420p"},
        **({"mask": {"values": "bits", "one": "person"}} if masks else {}),
        "splits": {name: [asdict(shard) for shard in splits[name]] for name in SPLITS},
        "settings": dict(settings),
    }
    files.write_json(folder / "dataset.json", record)
    return read_dataset(folder)


def read_dataset(folder: str | Where) -> Dataset:
    """A dataset's description, of a folder or of an address of one; no shard is opened. Raises UserError if it does not
    hold one."""
    folder = storage.at(folder, "shards")
    again = "prepare it with python -m pipelines.prepare"
    if isinstance(folder, Path) and not folder.is_dir():
        raise UserError(f"no such folder of shards: {folder}; {again}")
    try:
        record = files.from_json((folder / DATASET).read_bytes())
    except FileNotFoundError:
        raise UserError(f"{folder} is not a finished dataset (it has no dataset.json): {again}") from None
    except (OSError, ValueError) as error:
        what = f"cannot read {folder}/dataset.json ({masking.one_line(error)})"
        if isinstance(folder, Place) and isinstance(error, OSError):
            raise UnreachableError(f"{what}: look at its name and at the credentials in the environment") from None
        storage.answered(folder / DATASET, error)
        raise UserError(f"{what}: {again} again") from None
    found = record.get("format") if isinstance(record, dict) else None
    if found != FORMAT:
        raise UserError(f"{folder}/dataset.json has format {found!r}, this version reads {FORMAT!r}: {again} again")
    try:
        points = record["pose"]["points"]
        if points not in wholebody.LAYOUTS.values():
            known = " or ".join(map(str, wholebody.LAYOUTS.values()))
            raise UserError(f"{folder} holds poses of {points} points, this version reads {known}: {again} again")
        splits = {name: tuple(map(ShardInfo.from_json, shards)) for name, shards in record["splits"].items()}
        shape = ClipShape(**record["shape"])
        settings = dict(record["settings"])
        for shard in (shard for shards in splits.values() for shard in shards):
            if not storage.inside(folder, shard.file):
                what = f"{folder}/dataset.json names a shard outside the folder: {shard.file!r}"
                raise UserError(f"{what}; {again} again")
            if shard.clips > shard.bytes:  # before a list is made of so many
                raise UserError(f"{folder}/dataset.json claims {shard.clips} clips of {shard.file!r}: {again} again")
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = masking.reason(error)
        raise UserError(f"{folder}/dataset.json is damaged ({reason}): {again} again") from None
    fingerprint = digest({name: [shard.sha256 for shard in shards] for name, shards in splits.items()})
    return Dataset(folder, shape, splits, settings, fingerprint, points, "mask" in record)


def verify(dataset: Dataset, how: Literal["auto", "sha256", "size"] = "sha256") -> None:
    """Check every shard: its size, and with `sha256` every byte; `auto`: every byte of a folder, the sizes of a bucket,
    whose shards may be more than can be read at once. Raises DamagedShardError naming the first bad one,
    UnreachableError where a bucket does not answer."""
    remote = isinstance(dataset.folder, Place)
    if how == "auto":
        how = "size" if remote else "sha256"
    again = f"restore it, or delete {dataset.folder} and prepare it again"
    for infos in dataset.splits.values():
        there = sizes(dataset.folder, (shard.file for shard in infos)) if remote else {}
        for shard in infos:
            path = dataset.folder / shard.file
            try:
                size = there[shard.file] if remote else path.stat().st_size
            except (OSError, KeyError) as error:
                storage.answered(path, error)
                reason = getattr(error, "strerror", None) or "no such object"
                raise DamagedShardError(f"shard {path} is missing ({reason}): {again}") from None
            if size != shard.bytes:
                raise DamagedShardError(f"damaged shard {path}: {_size(size, shard.bytes)}; {again}")
            if how == "sha256" and (found := _sha256(path)) != shard.sha256:
                message = f"sha256 is {found[:12]}… where dataset.json says {shard.sha256[:12]}…"
                raise DamagedShardError(f"damaged shard {path}: {message}; {again}")


def sizes(folder: Place, names: Iterable[str]) -> dict[str, int]:
    """{path inside it: bytes} of what lies beside the named files in a bucket, by a listing of each of their folders
    alone: beside shards there may be very many texts. Raises UnreachableError."""
    out = {}
    for parent in dict.fromkeys(PurePosixPath(name).parent for name in names):
        inner = folder if parent == PurePosixPath() else folder / str(parent)
        try:
            out |= {str(parent / name): size for name, size in inner.files().items()}
        except OSError as error:
            raise UnreachableError(f"cannot list {inner}: {masking.one_line(error)}") from None
    return out


def _sha256(path: Where) -> str:
    try:
        return files.sha256(path)
    except OSError as error:
        storage.answered(path, error)
        raise


def _size(found: int, due: int) -> str:
    return f"{found} bytes where dataset.json says {due}"


def located(dataset: Dataset) -> Dataset:
    """The dataset for tasks, which run in another directory, without what only `prepare` needs."""
    return replace(dataset, folder=dataset.folder.resolve(), settings={})


def index(dataset: Dataset, split: str) -> list[tuple[str, int]]:
    """(file inside the dataset's folder, row) of every clip of a split, in the dataset's own order."""
    return [(shard.file, row) for shard in dataset.splits.get(split, ()) for row in range(shard.clips)]


def read_rows(
    path: Where, rows: Iterable[int], columns: Sequence[str] | None = None, size: int | None = None
) -> list[dict[str, Any]]:
    """Clips of one shard in the order asked for, reading only the row groups and columns needed.

    `pose` comes as a float32 array [frames, 33 or 133, 3], media as bytes, `mask` as bytes or None, of a shard without
    masks too. columns: None: all of the file. Page checksums are verified. A row group that is larger in memory than
    `media.limits` allows is not read. size: bytes of the shard by dataset.json; one in a bucket of another size is
    damaged.
    Raises DamagedShardError naming the file and the row, OSError where a bucket or a disk does not answer.
    """
    wanted = list(rows)
    at = wanted[0] if wanted else 0
    remote = isinstance(path, Place)
    source = _ranged(path, at, size) if remote else path
    try:
        with limits.parquet(source) as file:
            starts = np.cumsum([0] + [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)])
            for at in wanted:
                if not 0 <= at < starts[-1]:
                    raise IndexError(f"it has {starts[-1]} rows")
            places = {at: int(np.searchsorted(starts, at, side="right")) - 1 for at in wanted}
            masked = MASK.name in file.schema_arrow.names
            names = list(columns or [*SCHEMA.names, *([MASK.name] if masked else [])])
            also = ["frames"] if "pose" in names else []
            needed = [name for name in dict.fromkeys([*names, *also]) if masked or name != MASK.name]
            if remote:
                _fetch(source, file.metadata, sorted({*places.values()}), needed)
            groups: dict[int, pa.Table] = {}
            out = []
            for at in wanted:
                group = places[at]
                if group not in groups:
                    groups[group] = limits.rows(source, file, [group], needed, limits.LIMITS)
                out += _rows(groups[group].slice(at - starts[group], 1), names)
            return out
    except _AwayError as error:
        raise error.reason from None
    except (OSError, pa.ArrowException, KeyError, IndexError, ValueError, MemoryError) as error:
        if files.may_pass(error):
            raise
        raise _damaged(path, at, masking.one_line(error)) from None


def _damaged(path: Where, row: int, reason: str) -> DamagedShardError:
    return DamagedShardError(
        f"damaged shard {path}, row {row}: {reason}; check it against dataset.json's sha256 and restore or prepare it "
        "again"
    )


# ---- shards in a bucket ----


class _AwayError(Exception):
    """A bucket that does not answer: no shard of it is damaged."""

    def __init__(self, reason: OSError):
        super().__init__(str(reason))
        self.reason = reason


FOOTERS = 256
"""Shards of buckets whose footers a process keeps."""
_TAIL_BYTES = 1 << 16
THREADS = 16
"""Files of a bucket that a process asks for at once."""


@functools.lru_cache(maxsize=FOOTERS)
def _opened(path: Place, size: int | None) -> tuple[NativeFile, int, bytes]:
    """A shard, its size, and its end with the whole footer. size: that it should have; ValueError if it has not."""
    file = path.ranges()
    there = file.size()
    if size is not None and there != size:
        raise ValueError(_size(there, size))
    tail = tensors.ranged(file, max(there - _TAIL_BYTES, 0), there)
    length = parquet_pages.footer_bytes(io.BytesIO(tail)) + 8
    limits.check_footer(length)
    if len(tail) < length <= there:
        tail = tensors.ranged(file, there - length, there - len(tail)) + tail
    return file, there, tail


def _ranged(path: Place, row: int, size: int | None) -> Ranged:
    """A shard to read parts of."""
    try:
        file, there, tail = _opened(path, size)
    except FileNotFoundError:
        raise _damaged(path, row, "no such object") from None
    except ValueError as error:
        raise _damaged(path, row, str(error)) from None
    return _Shard(file, there, [(there - len(tail), tail)])


class _Shard(Ranged):
    """Tells an answer that does not come from bytes that are not what they should be."""

    def hold(self, ranges: Iterable[tuple[int, int]]) -> None:
        try:
            super().hold(ranges)
        except OSError as error:
            raise _AwayError(error) from None

    def readinto(self, into) -> int:
        try:
            return super().readinto(into)
        except OSError as error:
            raise _AwayError(error) from None


def _fetch(source: Ranged, about: pq.FileMetaData, groups: Sequence[int], columns: Sequence[str]) -> None:
    """Fetch the columns of row groups at once: a shard's pages one by one would take as many answers."""
    ranges = []
    for group in groups:
        for column in (about.row_group(group).column(i) for i in range(about.num_columns)):
            if column.path_in_schema.split(".")[0] in columns:
                begin = column.data_page_offset
                if column.has_dictionary_page and column.dictionary_page_offset:
                    begin = min(begin, column.dictionary_page_offset)
                end = begin + column.total_compressed_size
                if not 0 <= begin <= end <= source.size:
                    raise ValueError("its footer is damaged")
                ranges.append((begin, end))
    source.hold(ranges)


def at_once(folder: Where):
    """Gives a `map` for reading several files of a folder: of a bucket some are asked for at once."""
    if not isinstance(folder, Place):
        return contextlib.nullcontext(map)
    return _pool()


@contextlib.contextmanager
def _pool():
    with ThreadPoolExecutor(THREADS) as pool:
        yield pool.map


def _rows(table: pa.Table, names: Sequence[str]) -> list[dict[str, Any]]:
    """An Arrow table's rows, `pose` as arrays (never through Python floats)."""
    absent = {MASK.name: [None] * len(table)} if MASK.name not in table.column_names else {}
    values = {name: absent.get(name) or table.column(name).to_pylist() for name in names if name != "pose"}
    if "pose" in names:
        pose = table.column("pose").combine_chunks()
        frames = table.column("frames").to_pylist()[:1] or [1]
        pose = pose.flatten().to_numpy().reshape(len(table), frames[0], -1, 3)
        if pose.shape[2] not in wholebody.LAYOUTS.values():
            raise ValueError(f"its pose has {pose.shape[2]} points")
        values["pose"] = pose
    return [{name: values[name][i] for name in names} for i in range(len(table))]
