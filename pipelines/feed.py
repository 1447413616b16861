"""The training stream: clips in the run's order, decoded ahead of their reader by Ray Data.

An execution of Ray Data is finite and the stream is not: executions follow one another, each started while the one
before is being read, so that the reader meets no gap.
"""

import functools
import itertools
import math
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np

from entprog import latents
from entprog.config import ClipShape
from entprog.errors import UserError
from entprog.media import shards
from pipelines import clips
from pipelines.clips import Arrays, Read, Stream

TASK_BYTES = 32 << 20
TASK_BATCHES = 32
"""A decode task makes several batches while they fit in TASK_BYTES, at most this many: one task of Ray costs about
20 ms of two cores, and 32 MiB of clips about 150 ms of one."""
TASKS = 256
"""Decode tasks in one execution of Ray Data."""
TASKS_AHEAD = 8
"""Tasks' worth of decoded clips that may wait for the reader. Without this limit Ray Data decodes until half of the
object store is full, and takes the cores that training needs."""
STORE_SHARE = 0.3
"""Part of the object store that all ranks' waiting clips may fill: beyond it Ray spills to disk and back."""
PREFETCH_BATCHES = 2


@dataclass(frozen=True)
class Order:
    """Which clips a rank reads, and in which order."""

    clips: int
    """Clips of the split."""
    batch_size: int
    rank: int
    world: int
    start_position: int
    seed: int
    batches: int
    """Of an update, over all ranks."""


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
    frames: int | None = None,
    batches: int | None = None,
) -> Stream:
    """This rank's Clips from the update at `start_position` on, without end, decoded by Ray Data.

    cpus: logical CPUs that this rank's decoding may take; they must be free of Ray Train's workers. frames: only those
    in the middle of each clip are decoded; None: all. batches: of an update, over all ranks; None: one each. Works in a
    driver and in a Ray Train worker.
    Raises UserError for an empty split or shards of another shape; iterating raises DamagedShardError naming the shard
    and the row of a damaged clip.
    """
    clips.check_shape(dataset, shape)
    if not dataset.clips(split):
        raise UserError(f"shards {dataset.folder} have no clips in split {split!r}: prepare more videos")
    located = replace(dataset, folder=dataset.folder.resolve(), settings={})  # tasks run in another directory
    read = functools.partial(clips.decode, located, split, frames=frames)
    clip_bytes = (frames or shape.frames) * shape.height * 3 // 2 * shape.width + shape.height * shape.width * 3
    order = Order(dataset.clips(split), batch_size, rank, world, start_position, seed, batches or world)
    collate = functools.partial(clips.to_clips, device=device)
    return Stream(_batches(read, collate, order, clip_bytes, cpus))


def latent_stream(
    cache: latents.Cache,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    start_position: int = 0,
    seed: int = 0,
    cpus: float = 1.0,
    device="cpu",
    batches: int | None = None,
) -> Stream:
    """The same clips as `stream`'s, as Latents read from a cache. Iterating raises DamagedLatentsError."""
    here = latents.located(cache)
    count = sum(file.piece.clips for file in here.files)
    order = Order(count, batch_size, rank, world, start_position, seed, batches or world)
    to_device = functools.partial(clips.to_device, device=device)
    collate = functools.partial(latents.to_latents, shapes=here.shapes, to_device=to_device)
    return Stream(_batches(functools.partial(latents.read, here), collate, order, here.clip_bytes, cpus))


def _batches(read: Read, collate: Callable[[Arrays], object], order: Order, clip_bytes: int, cpus: float) -> Iterator:
    """(batch, seconds to copy it) without end."""
    import ray

    store_bytes = STORE_SHARE * ray.cluster_resources().get("object_store_memory", math.inf) / order.world
    task_bytes = min(TASK_BYTES, store_bytes / TASKS_AHEAD)
    batches = int(min(max(task_bytes // (clip_bytes * order.batch_size), 1), TASK_BATCHES))
    rows = batches * order.batch_size
    ahead_bytes = min(TASKS_AHEAD * rows * clip_bytes, store_bytes)
    task = functools.partial(_task, read=read, order=order)

    def execution(number: int) -> Iterator:
        """Clips of TASKS decode tasks, in order."""
        tasks = [{"first": i * rows, "count": rows} for i in range(number * TASKS, (number + 1) * TASKS)]
        return _execute(task, tasks, order.batch_size, ahead_bytes, cpus, collate)

    # The thread waits for Ray alone: starting takes a second or two.
    starter = ThreadPoolExecutor(1, "next-execution")
    ahead: Future | None = starter.submit(_begun, execution(0))
    current: Iterator = iter(())
    try:
        for number in itertools.count(1):
            first, current = ahead.result()
            ahead = None
            for done, batch in enumerate(itertools.chain([first], current)):
                if done == TASKS * batches // 2:
                    ahead = starter.submit(_begun, execution(number))
                yield batch
    finally:
        _close(current)
        with suppress(Exception):  # nobody will read it
            if ahead is not None:
                _close(ahead.result()[1])
        starter.shutdown()


def _begun(batches: Iterator) -> tuple[object, Iterator]:
    """(first batch, the others): asking for it starts the execution."""
    return next(batches), batches


def _close(batches: Iterator) -> None:
    if hasattr(batches, "close"):
        batches.close()


def _task(rows: Arrays, read: Read, order: Order) -> Arrays:
    """One decode task: a block that holds the number of its first row and how many there are → their clips."""
    (first,), (count,) = rows["first"], rows["count"]
    numbers = first + np.arange(count)
    positions = clips.rank_positions(
        numbers, order.start_position, order.batch_size, order.rank, order.world, order.batches
    )
    return clips.at_positions(read, positions, order.clips, order.seed)


def _execute(
    task, tasks: list[dict[str, int]], batch_size: int, ahead_bytes: float, cpus: float, collate
) -> Iterator[tuple[object, float]]:
    import ray.data
    from ray.data import ExecutionResources
    from ray.data.collate_fn import NumpyBatchCollateFn

    class Collate(NumpyBatchCollateFn):  # runs in threads ahead of the reader
        def __call__(self, batch):
            return clips.timed(collate, batch)

    decoded = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map_batches(
        task, batch_size=None, num_cpus=min(1.0, cpus)
    )
    context = decoded.context  # this dataset's own copy
    context.enable_progress_bars = False
    context.target_max_block_size = None  # a task's clips stay one block
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ExecutionResources(cpu=cpus, object_store_memory=ahead_bytes)
    # A split of one: the executor runs in an actor of its own. In this process its busy loop would hold Python's lock
    # while the network trains, and slow every step on a CPU down.
    (split,) = decoded.streaming_split(1, equal=False)
    batches = split.iter_torch_batches(
        batch_size=batch_size, prefetch_batches=PREFETCH_BATCHES, collate_fn=Collate(), device="cpu"
    )
    yield from _open_errors(iter(batches))


def _open_errors(batches: Iterator) -> Iterator:
    """Raise the damage that a task found as itself."""
    try:
        yield from batches
    except Exception as error:
        raise _cause(error) from None


def opened(work: Callable[[], object]):
    """What `work` gives; damage that one of its tasks found is raised as itself."""
    try:
        return work()
    except Exception as error:
        raise _cause(error) from None


def _cause(error: Exception) -> Exception:
    """Ray wraps what a task raises, and pickling then drops the cause: only its text, one line, comes across."""
    for kind in (shards.DamagedShardError, latents.DamagedLatentsError, UserError):
        if found := re.search(rf"{kind.__name__}: (.+)", str(error)):
            return kind(found[1])
    return error
