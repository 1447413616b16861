"""The training stream: clips in the run's order, ahead of their reader, by Ray Data.

Ray Data reads clips as they are stored, and threads of the process that trains decode them: frames are many times as
large, and their way through the object store costs more than decoding them. Where a machine's own cores cannot keep up,
Ray Data's tasks decode, anywhere on the cluster (`data.decode`).

An execution of Ray Data is finite and the stream is not: executions follow one another, each started while the one
before is being read, so that the reader meets no gap.
"""

import functools
import itertools
import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from entprog.config import ClipShape
from entprog.data import clip_stream, latents, shards
from entprog.data.clip_stream import Arrays, Read, Stream
from entprog.errors import UserError
from pipelines.cluster import failures, ray_internals

TASK_BYTES = 32 << 20
FRAMES_TASK_BYTES = 256 << 20
TASK_BATCHES = 32
"""A task makes several batches while they fit in TASK_BYTES (frames: in FRAMES_TASK_BYTES, which its process keeps for
the next task), at most this many: starting a task of Ray has its price, and one of few frames is soon over."""
TASKS = 16
"""Tasks in one execution of Ray Data whose clips may all wait for the reader. Its executor then ends."""
BEGUN_AT = 0.8
"""Part of an execution's batches after which the next one starts, which takes a second or two."""
TASKS_HELD_BACK = 256
"""Tasks in one execution that makes frames, far more than there is memory for: its executor has to wait for room."""
TASKS_PER_CPU = 1.5
"""Tasks that make frames at once, for each CPU that they may take. Ray Data looks for what has ended and starts what
follows every tenth of a second: without a task more, a CPU has nothing to do meanwhile."""
READERS_TASKS = 3
"""Tasks whose clips are with the reader, or next, and fill the store while others wait or are made."""
STORE_SHARE = 0.5
"""Part of the object store that all ranks' waiting clips may fill: beyond it Ray spills to disk and back."""
READING_CPUS = 1.0
"""For tasks that read what is stored: one at a time keeps ahead of the reader, and each more is a process to start."""
PREFETCH_BATCHES = 2
THREADS = 16
"""Most threads that decode for one reader: beyond it they wait for Python's lock."""
BATCHES_AHEAD = 2, 4
"""Batches that are decoded at once: at least and, where they hold fewer clips than threads decode, at most."""
CLOSING_S = 10.0
"""How long a reader that ends waits for an execution that is about to begin, to end it: who fails, or is told to end
while none can begin, has to say so."""
NODE = "ray.io/node-id"
"""Label of a node that Ray gives each."""
Decode = Callable[[Arrays, Callable[..., Iterable]], tuple[object, float]]
"""(stored clips, a pool's `map`) → (batch, seconds to copy it to the device)."""


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
    """Batches of an update, over all ranks."""


@dataclass(frozen=True)
class Work:
    """What one execution of Ray Data may take."""

    tasks: int
    """In all."""
    task_bytes: int
    """Most that a task makes, unless a batch is more."""
    cpus: float
    at_once: int
    """Tasks that run at the same time, and share these CPUs."""
    ahead: int
    """Tasks whose clips may wait for the reader, those that run among them; as many as there are: no limit."""
    avoid: Sequence[str] = ()
    """Ids of nodes on which no task is placed while others have room for it."""

    @property
    def cpus_each(self) -> float:
        """Of a task, in the ten-thousandths that Ray counts, rounded so that as many fit as are to run at once."""
        return math.floor(1e4 * self.cpus / self.at_once) / 1e4


def _to_read(cpus: float) -> Work:
    return Work(TASKS, TASK_BYTES, min(READING_CPUS, cpus), at_once=1, ahead=TASKS)


def _to_decode(cpus: float, avoid: Sequence[str] = ()) -> Work:
    """Without a limit Ray Data goes on until half of the object store is full, and takes the cores that training
    needs."""
    at_once = math.ceil(TASKS_PER_CPU * cpus)
    ahead = min(at_once + math.ceil(cpus) + READERS_TASKS, TASKS_HELD_BACK // 2)
    return Work(TASKS_HELD_BACK, FRAMES_TASK_BYTES, cpus, at_once, ahead, avoid)


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
    where: Literal["worker", "cluster"] = "worker",
    avoid: Sequence[str] = (),
) -> Stream:
    """This rank's Clips from the update at `start_position` on, without end.

    cpus: that this rank's decoding may take, as threads here or as logical CPUs of tasks; they must be free of Ray
    Train's workers. frames: only those in the middle of each clip are decoded; None: all. batches: of an update, over
    all ranks; None: one each. where: clips are decoded in threads here, or by tasks on the cluster; the same bits.
    avoid: ids of nodes on which no such task is placed while others have room.
    Works in a driver and in a Ray Train worker.
    Raises UserError for an empty split or shards of another shape; iterating raises DamagedShardError naming the shard
    and the row of a damaged clip.
    """
    clip_stream.check_shape(dataset, shape)
    if not dataset.clips(split):
        raise UserError(f"shards {dataset.folder} have no clips in split {split!r}: prepare more videos")
    located = shards.located(dataset)
    order = Order(dataset.clips(split), batch_size, rank, world, start_position, seed, batches or world)
    collate = functools.partial(clip_stream.to_clips, device=device)
    if where == "cluster":
        read = functools.partial(clip_stream.decode, located, split, frames=frames, room=clip_stream.reused)
        clip_bytes = (frames or shape.frames) * shape.height * 3 // 2 * shape.width + shape.height * shape.width * 3
        clip_bytes += (frames or shape.frames) * shape.height * shape.width * dataset.masks
        return Stream(_batches(read, collate, order, clip_bytes, _to_decode(cpus, avoid)))
    read = functools.partial(clip_stream.read, located, split)
    stored_bytes = sum(info.bytes for info in dataset.splits[split]) / dataset.clips(split)
    stored_bytes += shape.frames * shape.height * shape.width / 8 * dataset.masks  # small on the disk alone

    def decode(stored: Arrays, apply: Callable[..., Iterable]) -> tuple[object, float]:
        decoded = clip_stream.decoded(stored, located, split, frames, apply)
        return clip_stream.timed(collate, {**decoded, "position": stored["position"]})

    stored = _batches(read, _as_it_is, order, stored_bytes, _to_read(cpus))
    return Stream(_decoded(stored, decode, math.ceil(cpus), batch_size))


def _as_it_is(stored: Arrays) -> Arrays:
    return stored


def _decoded(stored: Iterator[tuple[Arrays, float]], decode: Decode, cpus: int, batch_size: int) -> Iterator:
    """`decode` of each batch, in order, ahead of the reader: some batches at once, their clips shared by threads."""
    threads = min(cpus, THREADS)
    least, most = BATCHES_AHEAD
    count = min(max(math.ceil(threads / batch_size), least), most)
    ahead: deque[Future] = deque()
    with ThreadPoolExecutor(threads, "decode") as pool, ThreadPoolExecutor(count, "batches") as batches:
        try:
            for batch, _ in stored:
                ahead.append(batches.submit(decode, batch, pool.map))
                if len(ahead) > count:
                    yield ahead.popleft().result()
        finally:
            _close(stored)
            for future in ahead:
                future.cancel()


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
    poses: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Stream:
    """The clips of `stream`, as Latents read from a cache. poses: of clips by their numbers, read with them where it is
    given. Iterating raises DamagedLatentsError."""
    here = latents.located(cache)
    count = sum(file.piece.clips for file in here.files)
    order = Order(count, batch_size, rank, world, start_position, seed, batches or world)
    to_device = functools.partial(clip_stream.to_device, device=device)
    collate = functools.partial(latents.to_latents, shapes=here.shapes, to_device=to_device)
    read = functools.partial(_read_latents, here, poses)
    return Stream(_batches(read, collate, order, here.clip_bytes, _to_read(cpus)))


def _read_latents(cache: latents.Cache, poses: Callable[[np.ndarray], np.ndarray] | None, clips: np.ndarray) -> Arrays:
    return latents.read(cache, clips) | ({} if poses is None else {"pose": poses(clips)})


def begin() -> None:
    """Have Ray start now what a first batch waits for, while its reader gets ready: the process of its tasks, with all
    that they import, and the actor of Ray Data's statistics."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=here)(_begin).remote()
    ray_internals.begin_statistics()


def _begin() -> None:
    import ray.data  # noqa: F401  this module is there already


def _batches(read: Read, collate: Callable[[Arrays], object], order: Order, clip_bytes: float, work: Work) -> Iterator:
    """(batch, seconds to collate it) without end, by executions of Ray Data."""
    import ray

    store_bytes = STORE_SHARE * ray.cluster_resources().get("object_store_memory", math.inf) / order.world
    task_bytes = min(work.task_bytes, store_bytes / (2 * work.ahead))  # two executions overlap
    batches = int(min(max(task_bytes // (clip_bytes * order.batch_size), 1), TASK_BATCHES))
    rows = batches * order.batch_size
    ahead_bytes = min(work.ahead * rows * clip_bytes, store_bytes) if work.ahead < work.tasks else None
    task, tasks = functools.partial(_task, read=read, order=order), work.tasks

    def execution(number: int) -> Iterator:
        """The clips of one execution of Ray Data, in order."""
        inputs = [{"first": i * rows, "count": rows} for i in range(number * tasks, (number + 1) * tasks)]
        return _execute(task, inputs, order.batch_size, ahead_bytes, work, collate)

    ahead: Future | None = _begun(execution(0))
    current: Iterator = iter(())
    try:
        for number in itertools.count(1):
            first, current = ahead.result()
            ahead = None
            for done, batch in enumerate(itertools.chain([first], current)):
                if done == int(tasks * batches * BEGUN_AT):
                    ahead = _begun(execution(number))
                yield batch
    finally:
        _close(current)
        if ahead is not None:
            wait([ahead], CLOSING_S)
            ahead.add_done_callback(_unread)


def _begun(batches: Iterator) -> Future:
    """(first batch, the others), once they are there. Asking for the first starts an execution, which takes a second or
    two, or for ever where no CPU is free: its thread waits for Ray alone, and nobody for it when the process ends."""
    future: Future = Future()

    def ask() -> None:
        try:
            future.set_result((next(batches), batches))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=ask, name="next-execution", daemon=True).start()
    return future


def _unread(begun: Future) -> None:
    """End an execution that nobody will read."""
    with suppress(Exception):
        _close(begun.result()[1])


def _close(batches: Iterator) -> None:
    if hasattr(batches, "close"):
        batches.close()


def _task(rows: Arrays, read: Read, order: Order) -> Arrays:
    """One task: a block that holds the number of its first row and how many there are → their clips."""
    (first,), (count,) = rows["first"], rows["count"]
    numbers = first + np.arange(count)
    positions = clip_stream.rank_positions(
        numbers, order.start_position, order.batch_size, order.rank, order.world, order.batches
    )
    return clip_stream.at_positions(read, positions, order.clips, order.seed)


def _execute(
    task, tasks: list[dict[str, int]], batch_size: int, ahead_bytes: float | None, work: Work, collate
) -> Iterator[tuple[object, float]]:
    import ray.data
    from ray.data import ExecutionResources
    from ray.data.collate_fn import NumpyBatchCollateFn

    class Collate(NumpyBatchCollateFn):  # runs in threads ahead of the reader
        def __call__(self, batch):
            return clip_stream.timed(collate, batch)

    read = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map_batches(
        task, batch_size=None, num_cpus=work.cpus_each, **_away_from(work.avoid)
    )
    context = read.context  # this dataset's own copy
    context.enable_progress_bars = False
    context.target_max_block_size = None  # a task's clips stay one block
    ray_internals.unhurried(context)
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ExecutionResources.for_limits(
        cpu=work.cpus, object_store_memory=ahead_bytes
    )
    # A split of one: the executor runs in an actor of its own. In this process it would hold Python's lock while the
    # network trains, and slow every step on a CPU down.
    (split,) = read.streaming_split(1, equal=False)
    batches = iter(
        split.iter_torch_batches(
            batch_size=batch_size, prefetch_batches=PREFETCH_BATCHES, collate_fn=Collate(), device="cpu"
        )
    )
    others, mine = _reading(), set()
    try:
        with failures.plainly():
            for batch in batches:
                mine = mine or _reading() - others  # started by the first `next`
                yield batch
    finally:
        batches.close()
        # Ray ends the whole process if one of them touches it after `ray.shutdown`.
        for thread in mine:
            thread.join(10)


def _away_from(nodes: Sequence[str]) -> dict[str, Any]:
    """Options of tasks that run on other nodes, or where there is room: those others may end."""
    if not nodes:
        return {}
    anywhere = {"label_selector": {NODE: "!none"}}
    return {"label_selector": {NODE: f"!in({', '.join(nodes)})"}, "fallback_strategy": [anywhere]}


def _reading() -> set[threading.Thread]:
    """Ray Data's threads that read for an iterator."""
    return {thread for thread in threading.enumerate() if thread.name == "iter_threaded"}
