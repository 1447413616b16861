"""The training stream: shards → decoded clips in a set order → batches on the device, by Ray Data.

A run has one endless sequence of clips. Position p lies in epoch p // n of the n clips of a split, each epoch a
shuffle of its own, and global batch k is positions k·G … (k+1)·G - 1 with G = batch_size · workers. Every worker reads
its own slice of each global batch, so the clips of step k depend on the seed and on G alone, a resume is a start
position, and no state of an iterator has to be saved.
"""

import functools
import io
import itertools
import math
import re
import time
import zlib
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from PIL import Image

from entprog.config import ClipShape
from entprog.errors import UserError
from entprog.media import shards, video

# torch and entprog.clips are imported where tensors are made: decode tasks run in processes of their own that never
# need them, and importing torch would cost each of them seconds.

COLUMNS = ("reference", "pose", "video")
TASK_BYTES = 8 << 20
TASK_BATCHES = 8
"""A decode task makes several batches while they fit in TASK_BYTES, at most this many: one task of Ray costs about
20 ms of two cores, as much as decoding two hundred frames of 96x64."""
TASKS = 128
"""Decode tasks in one execution of Ray Data. The next one starts an actor, for which the reader waits once."""
TASKS_AHEAD = 8
"""Tasks' worth of decoded clips that may wait for the reader. Without this limit Ray Data decodes until half of the
object store is full, and takes the cores that training needs."""
STORE_SHARE = 0.3
"""Part of the object store that all ranks' waiting clips may fill: beyond it Ray spills to disk and back."""
PREFETCH_BATCHES = 2


# ---- which clip is where ----


@functools.lru_cache(maxsize=4)
def permutation(clips: int, seed: int, epoch: int) -> np.ndarray:
    """Order of an epoch: int64 [clips], each clip once; depends on nothing but the arguments."""
    order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(clips)
    order.flags.writeable = False  # one array for all who ask
    return order


def clips_at(positions: np.ndarray, clips: int, seed: int) -> np.ndarray:
    """The clip (0..clips-1) at each position of the endless sequence."""
    epochs, places = np.divmod(positions, clips)
    out = np.empty_like(positions)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        out[here] = permutation(clips, seed, int(epoch))[places[here]]
    return out


def rank_positions(rows: np.ndarray, start_position: int, batch_size: int, rank: int, world: int) -> np.ndarray:
    """Position of a rank's rows 0, 1, … when its first batch belongs to the global batch at `start_position`."""
    batch, place = np.divmod(rows, batch_size)
    return start_position + (batch * world + rank) * batch_size + place


# ---- decoding: shared by all that read clips ----


def check_shape(dataset: shards.Dataset, shape: ClipShape) -> None:
    """Raises UserError if the shards hold clips of another shape than the settings say."""
    if dataset.shape != shape:
        raise UserError(
            f"shards {dataset.folder} hold clips of {dataset.shape}, the settings (data.shape) ask for {shape}: "
            "prepare shards of that shape, or change data.shape"
        )


def decode(dataset: shards.Dataset, split: str, clips: np.ndarray) -> dict[str, np.ndarray]:
    """Clips of a split by their number: `video` uint8 [B, F, H*3/2, W] planes, `reference` uint8 [B, H, W, 3] RGB,
    `pose` float32 [B, F, 33, 3].

    Raises DamagedShardError naming the shard and the row of a clip that cannot be decoded.
    """
    shape, count = dataset.shape, len(clips)
    out = {
        "video": np.empty((count, shape.frames, shape.height * 3 // 2, shape.width), np.uint8),
        "reference": np.empty((count, shape.height, shape.width, 3), np.uint8),
        "pose": np.empty((count, shape.frames, shards.POINTS, 3), np.float32),
    }
    infos = dataset.splits[split]
    ends = np.cumsum([info.clips for info in infos])
    files = np.searchsorted(ends, clips, side="right")
    for file in np.unique(files):  # each shard is opened once
        path = dataset.folder / infos[file].file
        places = np.flatnonzero(files == file)
        rows = clips[places] - (ends[file] - infos[file].clips)
        for place, row, columns in zip(places, rows, shards.read_rows(path, rows.tolist(), COLUMNS), strict=True):
            try:
                out["video"][place] = _same_shape(video.decode_yuv(columns["video"]), out["video"][place])
                out["reference"][place] = _same_shape(_decode_png(columns["reference"]), out["reference"][place])
                out["pose"][place] = _same_shape(columns["pose"], out["pose"][place])
            except (video.VideoError, OSError, ValueError, SyntaxError, zlib.error) as error:
                raise shards.DamagedShardError(
                    f"damaged shard {path}, row {row}: {' '.join(str(error).split())[:200]}; "
                    "check it against dataset.json's sha256 and restore or prepare it again"
                ) from None
    return out


def _decode_png(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
        return np.asarray(image.convert("RGB"))


def _same_shape(found: np.ndarray, due: np.ndarray) -> np.ndarray:
    """Without this numpy would broadcast a short clip over a whole one."""
    if found.shape != due.shape:
        raise ValueError(f"it decodes to {found.shape} where the dataset's shape gives {due.shape}")
    return found


def to_clips(batch: dict[str, np.ndarray], device="cpu"):
    """Arrays of `decode` plus `position` → Clips on a device (position stays on the CPU)."""
    import torch

    from entprog.clips import Clips

    device = torch.device(device)

    def tensor(name):
        value = torch.tensor(batch[name])  # copies: what comes from the object store is read-only
        return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value.to(device)

    return Clips(tensor("video"), tensor("reference"), tensor("pose"), torch.tensor(batch["position"]))


# ---- streams ----


class Stream:
    """An endless iterator of Clips that counts how long its reader waited. Close it when its shape is done with."""

    def __init__(self, batches: Iterator):
        self._batches = batches
        self.wait_s = 0.0
        """Seconds spent in `next` so far."""

    def __iter__(self) -> "Stream":
        return self

    def __next__(self):
        started = time.perf_counter()
        try:
            return next(self._batches)
        finally:
            self.wait_s += time.perf_counter() - started

    def close(self) -> None:
        """Stop decoding and free its CPUs. Safe to call twice."""
        self._batches.close()


def stream(
    dataset: shards.Dataset,
    split: str,
    shape: ClipShape,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    start_position: int = 0,
    seed: int = 0,
    cpus: float = 1.0,
    device="cpu",
) -> Stream:
    """This rank's Clips from the global batch at `start_position` on, without end, decoded by Ray Data.

    cpus: logical CPUs that this rank's decoding may take; they must be free of Ray Train's workers.
    Works in a driver and in a Ray Train worker. Raises UserError for an empty split or shards of another shape;
    iterating raises DamagedShardError naming the shard and the row of a damaged clip.
    """
    check_shape(dataset, shape)
    if not dataset.clips(split):
        raise UserError(f"shards {dataset.folder} have no clips in split {split!r}: prepare more videos")
    return Stream(_stream(dataset, split, batch_size, rank, world, start_position, seed, cpus, device))


def local_stream(
    dataset: shards.Dataset,
    split: str,
    shape: ClipShape,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    start_position: int = 0,
    seed: int = 0,
    device="cpu",
) -> Stream:
    """The same Clips as `stream`, bit for bit, decoded in this process without Ray."""
    check_shape(dataset, shape)
    rows = (np.arange(batch_size) + first for first in itertools.count(0, batch_size))
    positions = (rank_positions(r, start_position, batch_size, rank, world) for r in rows)
    return Stream(to_clips(_at_positions(dataset, split, p, seed), device) for p in positions)


def held_out(dataset: shards.Dataset, count: int, batch_size: int, rank: int = 0, world: int = 1, device="cpu") -> list:
    """This rank's part of the first `count` held-out Clips (fewer if the split has fewer): every world-th one.

    They are spread evenly over the split, whose clips lie in order of source, so that every source shows. `position` is
    the place among them (0..count-1). Empty for a rank beyond their number.
    """
    clips = dataset.clips("held_out")
    if not clips:
        raise UserError(f"shards {dataset.folder} have no held-out clips: prepare them with a held-out source")
    count = min(count, clips)
    mine = np.arange(count)[rank::world]
    parts = [mine[first : first + batch_size] for first in range(0, len(mine), batch_size)]
    return [
        to_clips({**decode(dataset, "held_out", part * clips // count), "position": part}, device) for part in parts
    ]


def _at_positions(dataset: shards.Dataset, split: str, positions: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    clips = clips_at(positions, dataset.clips(split), seed)
    return {**decode(dataset, split, clips), "position": positions}


def _task(rows: dict[str, np.ndarray], dataset, split, batch_size, rank, world, start_position, seed):
    """One decode task: a block that holds the number of its first row and how many there are → their clips."""
    (first,), (count,) = rows["first"], rows["count"]
    positions = rank_positions(first + np.arange(count), start_position, batch_size, rank, world)
    return _at_positions(dataset, split, positions, seed)


def _stream(dataset, split, batch_size, rank, world, start_position, seed, cpus, device) -> Iterator:
    import ray

    shape = dataset.shape
    clip_bytes = shape.frames * shape.height * 3 // 2 * shape.width + shape.height * shape.width * 3
    batches = min(max(TASK_BYTES // (clip_bytes * batch_size), 1), TASK_BATCHES)
    task = functools.partial(
        _task,
        dataset=replace(dataset, folder=dataset.folder.resolve(), settings={}),  # tasks run in another directory
        split=split,
        batch_size=batch_size,
        rank=rank,
        world=world,
        start_position=start_position,
        seed=seed,
    )
    task_rows = batches * batch_size
    store_bytes = STORE_SHARE * ray.cluster_resources().get("object_store_memory", math.inf) / world
    ahead_bytes = min(TASKS_AHEAD * task_rows * clip_bytes, store_bytes)
    for execution in itertools.count():
        yield from _execute(task, execution * TASKS, task_rows, batch_size, ahead_bytes, cpus, device)


def _execute(
    task, first_task: int, task_rows: int, batch_size: int, ahead_bytes: float, cpus: float, device
) -> Iterator:
    """Clips of TASKS decode tasks, from `first_task` on, in order."""
    import ray.data
    from ray.data import ExecutionResources
    from ray.data.collate_fn import NumpyBatchCollateFn

    class ToClips(NumpyBatchCollateFn):  # runs in a thread ahead of the reader
        def __call__(self, batch):
            return to_clips(batch, device)

    rows = [{"first": i * task_rows, "count": task_rows} for i in range(first_task, first_task + TASKS)]
    clips = ray.data.from_items(rows, override_num_blocks=TASKS).map_batches(
        task, batch_size=None, num_cpus=min(1.0, cpus)
    )
    context = clips.context  # this dataset's own copy
    context.enable_progress_bars = False
    context.target_max_block_size = None  # a task's clips stay one block
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ExecutionResources(cpu=cpus, object_store_memory=ahead_bytes)
    # A split of one: the executor runs in an actor of its own. In this process its busy loop would hold Python's lock
    # while the network trains, and slow every step on a CPU down.
    (split,) = clips.streaming_split(1, equal=False)
    batches = split.iter_torch_batches(
        batch_size=batch_size, prefetch_batches=PREFETCH_BATCHES, collate_fn=ToClips(), device=device
    )
    yield from _open_errors(iter(batches))


def _open_errors(batches: Iterator) -> Iterator:
    """Raise the damage that a task found as itself.

    Ray Data wraps what a task raises, and pickling then drops the cause: only its text, one line, comes across.
    """
    try:
        yield from batches
    except Exception as error:
        found = re.search(rf"{shards.DamagedShardError.__name__}: (.+)", str(error))
        if found is None:
            raise
        raise shards.DamagedShardError(found[1]) from None
