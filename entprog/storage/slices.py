"""A checkpoint's files, on a disk or in a bucket: each rank writes its own, and reads the ranges that it needs alone.

`torch.distributed.checkpoint` plans which parts of which stored tensors a rank's own tensors want, whatever the numbers
of ranks that wrote and that read; this reads them, a piece of bounded size at a time, in threads.
"""

import json
import math
import re
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from entprog.files import from_json
from entprog.storage import Place, tensors
from entprog.storage.tensors import Stored

if TYPE_CHECKING:
    from pyarrow import NativeFile

SUFFIX = ".safetensors"
FILE = re.compile(rf"part-\d{{5,}}-[0-9a-f]{{8}}{re.escape(SUFFIX)}")
"""Names of the files that hold tensors."""
OFFSETS = "DCP_SHARDING_INFO"
"""Text of a file that says where in the whole tensors its own begin, as torch writes it."""
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
PIECE_BYTES = 32 << 20
THREADS = 8
"""Pieces read at once: with PIECE_BYTES, the memory that reading takes beside the tensors themselves."""
# Said where a rank plans for itself: it saves all, or reads its own.
warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
# Of bytes that are copied from and never written to.
warnings.filterwarnings("ignore", message="The given buffer is not writable", category=UserWarning)


BAD = (ValueError, KeyError, AssertionError)
"""What reading a file raises that does not hold what it should."""


@contextmanager
def bare() -> Iterator[None]:
    """What torch wraps inside is raised itself: the first of the failures that is no bad file, else the first."""
    try:
        yield
    except dcp.CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        raise next((cause for cause in causes if not isinstance(cause, BAD)), causes[0]) from None


@dataclass(frozen=True)
class Chunk:
    """A part of a tensor, as one file holds it."""

    file: str
    offsets: tuple[int, ...]
    """Where it begins in the whole tensor."""
    stored: Stored


Chunks = dict[str, list[Chunk]]
"""Of every tensor of a checkpoint, by its name."""


def chunks(place: Place, files: Iterable[str]) -> Chunks:
    """What some files of a checkpoint hold: their headers alone are read.

    Raises ValueError or KeyError where one is damaged, OSError where one cannot be read.
    """

    def of(name: str) -> list[tuple[str, Chunk]]:
        with (place / name).ranges() as file:
            found, texts = tensors.header(file)
        where = from_json(texts[OFFSETS]) if OFFSETS in texts else {}
        return [
            (full, Chunk(name, tuple(where[full]["saved_offsets"] if where else (0,) * len(stored.shape)), stored))
            for full, stored in found.items()
        ]

    out: Chunks = {}
    with ThreadPoolExecutor(THREADS) as pool:
        for full, chunk in (each for part in pool.map(of, sorted(files)) for each in part):
            out.setdefault(full, []).append(chunk)
    return out


@dataclass(frozen=True)
class _Wish:
    """Whole rows of a stored tensor, for a part of one of the rank's own."""

    begin: int
    end: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    within: tuple[slice, ...]
    """What of the rows is wanted."""
    target: torch.Tensor


class Reader(dcp.StorageReader):
    """Reads what `dcp.load` plans. Raises OSError for what cannot be read whole."""

    def __init__(self, place: Place, chunks: Chunks):
        self.place = place
        self.chunks = {(name, chunk.offsets): chunk for name, parts in chunks.items() for chunk in parts}
        self.metadata = Metadata({name: _described(name, parts) for name, parts in chunks.items()})

    def read_metadata(self) -> Metadata:
        return self.metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        wishes: dict[str, list[_Wish]] = {}
        for item in plan.items:
            chunk = self.chunks[item.storage_index.fqn, tuple(item.storage_index.offset or ())]
            target = planner.resolve_tensor(item).detach()
            wishes.setdefault(chunk.file, []).extend(_wishes(item, chunk.stored, target))
        with ThreadPoolExecutor(THREADS) as pool:
            opened = dict(zip(wishes, pool.map(lambda name: (self.place / name).ranges(), wishes), strict=True))
            runs = [(opened[file], run) for file, some in wishes.items() for run in _runs(some)]
            for _ in pool.map(_fill, *zip(*runs, strict=True)) if runs else ():
                pass
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def reset(self, checkpoint_id=None) -> None:
        pass

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args, **kwargs) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id) -> bool:
        return True


class Writer(dcp.StorageWriter):
    """Writes a file a rank as a stream, straight to where it belongs: neither a second copy in memory nor one on a
    disk beside it. Files of one checkpoint share a word, so that those of an earlier try do not count as its own."""

    def __init__(self, place: Place, word: str):
        self.place, self.word = place, word
        self.files: set[str] = set()
        """Of all ranks, once all have written; rank 0 alone knows them."""

    def set_up_storage_writer(self, is_coordinator: bool, *args, **kwargs) -> None:
        self.place.make()

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [replace(plan, storage_data=number) for number, plan in enumerate(plans, 1)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        name = f"part-{plan.storage_data:05d}-{self.word}{SUFFIX}"
        found = {item.index.fqn: planner.resolve_data(item).detach().contiguous() for item in plan.items}
        offsets = {item.index.fqn: {"saved_offsets": [*item.tensor_data.chunk.offsets]} for item in plan.items}
        order = sorted(found, key=lambda full: (-found[full].itemsize, full))
        about = [(full, NAMES[found[full].dtype], found[full].shape) for full in order]
        if order:
            with self.place.create(name) as stream:
                stream.write(tensors.header_of(about, {OFFSETS: json.dumps(offsets)}))
                for full in order:
                    stream.write(memoryview(found[full].flatten().view(torch.uint8).numpy()))
        done: Future[list[WriteResult]] = Future()
        done.set_result([WriteResult(item.index, found[item.index.fqn].nbytes, name) for item in plan.items])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        self.files = {each.storage_data for rank in results for each in rank}  # `state.json` makes it whole

    def reset(self, checkpoint_id=None) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id) -> bool:
        return True


def _described(name: str, parts: list[Chunk]) -> TensorStorageMetadata:
    ends = zip(*([o + s for o, s in zip(part.offsets, part.stored.shape, strict=True)] for part in parts), strict=True)
    whole = torch.Size(max(each) for each in ends)
    if sum(math.prod(part.stored.shape) for part in parts) != whole.numel():
        raise ValueError(f"parts of {name} are missing, or there twice")
    return TensorStorageMetadata(
        TensorProperties(DTYPES[parts[0].stored.dtype]),
        whole,
        [ChunkStorageMetadata(torch.Size(part.offsets), torch.Size(part.stored.shape)) for part in parts],
    )


def _wishes(item: ReadItem, stored: Stored, target: torch.Tensor) -> Iterator[_Wish]:
    """What one item of the plan wants, in pieces."""
    dtype = DTYPES[stored.dtype]
    if not stored.shape:
        yield _Wish(stored.begin, stored.end, dtype, (), (), target)
        return
    (first, *inner), (rows, *lengths) = item.storage_offsets, item.lengths
    within = tuple(slice(offset, offset + length) for offset, length in zip(inner, lengths, strict=True))
    most = max(PIECE_BYTES // max(stored.row_bytes, 1), 1)
    for at in range(0, rows if target.numel() else 0, most):
        count = min(most, rows - at)
        begin = stored.begin + (first + at) * stored.row_bytes
        shape = (count, *stored.shape[1:])
        yield _Wish(begin, begin + count * stored.row_bytes, dtype, shape, within, target.narrow(0, at, count))


def _runs(wishes: list[_Wish]) -> Iterator[list[_Wish]]:
    """Wishes for bytes that follow each other in a file are read at once, up to PIECE_BYTES."""
    run: list[_Wish] = []
    for wish in sorted(wishes, key=lambda wish: wish.begin):
        if run and (wish.begin != run[-1].end or wish.end - run[0].begin > PIECE_BYTES):
            yield run
            run = []
        run.append(wish)
    if run:
        yield run


def _fill(file: "NativeFile", run: list[_Wish]) -> None:
    start = run[0].begin
    content = tensors.ranged(file, start, run[-1].end)
    for wish in run:
        size = (wish.end - wish.begin) // wish.dtype.itemsize
        rows = torch.frombuffer(content, dtype=wish.dtype, count=size, offset=wish.begin - start).view(wish.shape)
        wish.target.copy_(rows[(slice(None), *wish.within)] if wish.shape else rows)
