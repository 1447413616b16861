"""Where the clips of a training are decoded (`data.decode`), and how fast.

Frames are many times as large as stored clips, and decoding releases Python's lock: threads of the worker that trains
on them cost least. But nodes without GPUs are on a cluster for such work, and take it off the machines that train.
"""

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from entprog.config import Data, Experiment
from entprog.data import clip_stream, shards
from entprog.distributed import agree
from pipelines.cluster import capacity, joining, ray_internals, session

TIMED_CLIPS, TIMED_S = 8, 0.3
"""Clips that are decoded again and again for so long, to see how fast that is."""
Node = Mapping[str, Any]
"""A node as `ray.nodes` gives it."""


@dataclass(frozen=True)
class Decoding:
    """Where a worker's clips are decoded."""

    where: Literal["worker", "cluster"]
    """In threads of the worker, or by tasks of Ray Data."""
    cpus: float
    """That decoding may take for this worker: threads, or logical CPUs of tasks."""
    nodes: int = 0
    """That are there for it. 0: threads, or tasks on any node."""
    avoid: tuple[str, ...] = ()
    """Ids of nodes on which no task is placed while others have room for it."""

    def __str__(self) -> str:
        cpus = f"{self.cpus:.3g} CPU{'s' * (self.cpus != 1)}"
        if self.where == "worker":
            return f"by threads of each worker, {cpus} of its machine"
        on = f"{self.nodes} node{'s' * (self.nodes > 1)} without GPUs and workers" if self.nodes else "any node"
        return f"by tasks of Ray Data on {on}, {cpus} for each worker"


def of_this_worker(experiment: Experiment) -> Decoding:
    """Of this Ray Train worker; every rank has to come to this. Its group has its places then, and another group of the
    run may choose anew: the clips are the same bit for bit."""
    import ray
    import ray.train

    data, context = experiment.data, ray.train.get_context()
    mine = ray.get_runtime_context().get_node_id()
    if data.decode == "auto":
        places = agree.for_first(mine)
        others = agree.of_first(lambda: elsewhere(data, ray.nodes(), places, ray_internals.draining_nodes()))
        if others:
            return others
    elif data.decode == "cluster":
        cpus = ray.cluster_resources().get("CPU", 0)
        return Decoding("cluster", data.decode_cpus or share(cpus, context.get_world_size()))
    (here,) = (node["Resources"] for node in ray.nodes() if node["NodeID"] == mine)
    cpus = min(here.get("CPU", 0), session.cores())  # a local Ray may be told of more
    return Decoding("worker", data.decode_cpus or share(cpus, context.get_local_world_size()))


def elsewhere(
    data: Data, nodes: Sequence[Node], places: Sequence[str], draining: Collection[str] = ()
) -> Decoding | None:
    """By tasks on nodes that are there for it: without GPUs, without a worker, and with a CPU for each of the workers;
    None where there are no such nodes. places: the node of each worker, by its id."""
    alive = [node for node in nodes if node["Alive"]]
    free = [node for node in alive if node["NodeID"] not in {*places, *draining} and _only_cpus(node)]
    cpus = sum(node["Resources"]["CPU"] for node in free)
    if cpus < len(places):
        return None
    avoid = {node["NodeID"] for node in alive} - {node["NodeID"] for node in free}
    return Decoding("cluster", data.decode_cpus or cpus / len(places), len(free), tuple(sorted(avoid)))


def _only_cpus(node: Node) -> bool:
    return not node["Resources"].get("GPU") and node["Resources"].get("CPU", 0) >= 1


def share(cpus: float, workers: int) -> float:
    """CPUs for the decoding of each of the workers that share so many: one of them is each worker's own."""
    return max(1.0, (cpus - workers) / workers)


# ---- before a run ----


def nodes_there() -> list[Node] | None:
    """The nodes of the cluster that RAY_ADDRESS names, None where it names none. Raises UserError if it does not
    answer."""
    if not joining.address():
        return None
    with session.ray_cluster(capacity.LOCAL_CPUS) as ray:
        return [node for node in ray.nodes() if node["Alive"]]


def outlook(experiment: Experiment, dataset: shards.Dataset, nodes: Sequence[Node] | None) -> str:
    """Where clips will be decoded and how fast that is, in words. nodes: of `nodes_there`."""
    where, cpus = _foreseen(experiment, nodes)
    a_core = clips_per_s(dataset, experiment.data.shape.frames)
    clips = experiment.clips_at(experiment.data.shape)
    line = f"Clips are decoded {where}; a core like this machine's decodes {a_core:.3g} clips/s (measured)"
    if cpus:
        in_all = a_core * cpus
        line += (
            f", {cpus:.3g} of them {in_all:.3g}: a step of {clips} clips waits if it takes under {clips / in_all:.2g} s"
        )
    return f"{line}."


def _foreseen(experiment: Experiment, nodes: Sequence[Node] | None) -> tuple[str, float | None]:
    """(where, CPUs in all if that can be said)."""
    data, workers = experiment.data, experiment.train.workers
    if nodes is None:  # a Ray of this machine alone
        given = workers * data.decode_cpus if data.decode_cpus else session.cores()
        how = "by tasks of Ray Data" if data.decode == "cluster" else "by threads of each worker"
        return f"{how} on this machine", min(given, session.cores())
    gpus = any(node["Resources"].get("GPU") for node in nodes)
    if data.decode == "cluster":
        return "by tasks of Ray Data on any node", None
    if data.decode == "worker":
        return "by threads of each worker, on its own node", None
    if experiment.train.gpus == "yes" or (experiment.train.gpus == "auto" and gpus):
        others = elsewhere(data, nodes, [""] * workers)  # none of them holds a worker
        if others:
            found = f"by tasks of Ray Data on the {others.nodes} node(s) without GPUs that are there now"
            return found, others.cpus * workers
        return "by threads of each worker, on its own node, unless nodes without GPUs join before it begins", None
    return "by tasks of Ray Data on nodes that hold no worker, else by threads of each worker", None


def clips_per_s(dataset: shards.Dataset, frames: int) -> float:
    """Clips, `frames` of each, that one core of this machine decodes in a second, with their references; measured.

    Raises DamagedShardError.
    """
    located = shards.located(dataset)
    stored = clip_stream.read(located, "train", np.arange(min(TIMED_CLIPS, dataset.clips("train"))))
    each = [{name: values[[place]] for name, values in stored.items()} for place in range(len(stored["clip"]))]

    def one(clip: clip_stream.Arrays) -> None:
        clip_stream.decoded(clip, located, "train", frames, room=clip_stream.reused)

    one(each[0])
    started, count = time.perf_counter(), 0
    while (after := time.perf_counter() - started) < TIMED_S:
        one(each[count % len(each)])
        count += 1
    return count / after
