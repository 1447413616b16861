"""What workers take, whether a cluster can hold it, and what of it a job uses."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from entprog.config import Experiment
from entprog.errors import UserError
from entprog.masking import masked
from pipelines.cluster import joining, ray_internals, room, session
from pipelines.cluster.room import CPUS_FOR_DATA, Bundle
from pipelines.tracking.store import is_file, tracking_uri

LOCAL_CPUS = 4
"""Least logical CPUs of a local Ray."""


def check_tracking(experiment: Experiment, *others: str) -> None:
    """Raises UserError if MLflow's store is a file and workers may run where it is not.

    others: resources that processes beside the workers take which write there too.
    """
    import ray

    uri, gpus = tracking_uri(), use_gpus(experiment)
    mine = ray.get_runtime_context().get_node_id()
    workers = experiment.train.workers if joining.address() else 1  # a Ray of this machine never gets others
    needed = {"GPU" if gpus else "CPU": workers} | dict.fromkeys(others, 1)
    if is_file(uri) and any(elsewhere(ray.nodes(), mine, *each) for each in needed.items()):
        here = ray.util.get_node_ip_address()
        raise UserError(
            f"MLflow's store {masked(uri)} is a file of this machine, and workers run on others: start a server "
            "(mlflow server --backend-store-uri sqlite:////SHARED/mlflow.db --artifacts-destination /SHARED/artifacts "
            f"--host {here} --allowed-hosts {here}:5000,localhost:5000), and set MLFLOW_TRACKING_URI=http://{here}:5000"
        )


def elsewhere(nodes: Sequence[Mapping[str, Any]], mine: str, resource: str, needed: int = 1) -> bool:
    """Whether workers run, or may run, on other machines than that of the node `mine`: others have what a worker takes,
    or it has less of that than is `needed`, and others have yet to start. nodes: as `ray.nodes` gives them."""
    there = [node for node in nodes if node["Alive"]]
    address = next(node["NodeManagerAddress"] for node in there if node["NodeID"] == mine)
    with_it = Counter()
    for node in there:
        with_it[node["NodeManagerAddress"]] += int(node["Resources"].get(resource, 0))
    return set(+with_it) != {address} or with_it[address] < needed


Asked = Literal["auto", "yes", "no"]
"""A setting that says whether GPUs are used."""


def use_gpus(experiment: Experiment) -> bool:
    """Whether the workers get a GPU each. Raises UserError if the connected Ray can never hold the workers; a cluster
    that may still grow can, and is waited for by `run_workers`."""
    import ray

    cluster = ray.cluster_resources()
    growing = ray_internals.resources_that_may_come()
    grows = joining.address() is not None and not growing

    def most(resource: str) -> int:
        return int(max(cluster.get(resource, 0), growing.get(resource, 0)))

    return _gpus_of(experiment, most("GPU"), most("CPU"), grows=grows, trial=not ray_internals.is_driver())


def gpus_here(experiment: Experiment) -> bool | None:
    """What `use_gpus` will say of the Ray that a job starts on this machine; None where it joins one, which is asked
    then. Raises UserError as that does, before anything starts."""
    import ray
    import torch  # here: Ray Train's controller needs none

    if joining.address() or ray.is_initialized():
        return None
    return _gpus_of(experiment, torch.cuda.device_count(), session.local_cpus(LOCAL_CPUS))


def _gpus_of(experiment: Experiment, gpus: int, cpus: int, grows: bool = False, trial: bool = False) -> bool:
    """Whether the workers get a GPU each, of a cluster that has so many. Raises UserError if it cannot hold them, and
    does not grow."""
    train = experiment.train
    workers = train.min_workers or train.workers
    name = "train.min_workers" if train.min_workers else "train.workers"
    there = joining.has()
    wanted = _chosen(train.gpus, "train.gpus", gpus, cpus >= workers + CPUS_FOR_DATA)
    each = each_worker(experiment, wanted, trial=trial)
    needed = math.ceil(sum(bundle.get("CPU", 0) for bundle in room.bundles(workers, each)))
    if wanted and gpus < workers and not grows:
        raise UserError(f"{name}={workers} needs {workers} GPUs, {there} {gpus}: lower {name}, or set train.gpus=no")
    if cpus < needed and not grows:
        lower = f"{name} or data.decode_cpus" if experiment.data.decode_cpus else name
        raise UserError(
            f"{name}={workers} needs {needed} CPUs ({needed - CPUS_FOR_DATA} for the workers, {CPUS_FOR_DATA} for "
            f"decoding), {there} {cpus}: lower {lower} or join a larger cluster"
        )
    return wanted


def unused_gpus(experiment: Experiment, nodes: Sequence[Mapping[str, Any]] | None) -> str | None:
    """That there are more GPUs than the run takes, in words; None where there are not, or it takes none. nodes: of a
    cluster, as `ray.nodes` gives them; None: this machine alone."""
    import torch  # here: Ray Train's controller needs none

    if nodes is None:
        there = torch.cuda.device_count()
    else:
        there = int(sum(node["Resources"].get("GPU", 0) for node in nodes if node["Alive"]))
    train, batches = experiment.train, experiment.data.batch_size * experiment.train.accumulate
    if train.gpus == "no" or there <= train.workers:
        return None
    return (
        f"{train.workers} of {there} GPUs {'is' if train.workers == 1 else 'are'} used: --set train.workers={there} "
        f"takes all; a step then has {batches * there} clips instead of {batches * train.workers}."
    )


def each_worker(experiment: Experiment, gpus: bool, trial: bool = False) -> Bundle:
    """What Ray reserves for each worker: a GPU or a CPU, and the CPUs of its decoding where it is said how many.

    Of them one is left to the tasks that read what is decoded. Where Ray Data's tasks decode they hold their own. In a
    trial of a sweep none are reserved: it has shared out all CPUs of the cluster, whatever node they are on.
    """
    data = experiment.data
    by_threads = data.decode != "cluster" and not trial
    decoding = max((data.decode_cpus or 0) - CPUS_FOR_DATA, 0) if by_threads else 0
    if not gpus:
        return {"CPU": 1 + decoding}
    return {"GPU": 1} | ({"CPU": decoding} if decoding else {})


def gpus_there(asked: Asked, setting: str, say: Callable[[str], None], cpus: int = 1) -> int:
    """GPUs for a job that takes those that are there; 0: it runs on CPUs, `cpus` of which it needs at least.

    A cluster that has none of what is needed yet is waited for until it has. Raises UserError for GPUs that a Ray of
    this machine does not have, and where nothing says which of the two a cluster would get.
    """
    if not takes_gpus(asked, setting, cpus):
        room.cpus(cpus, say)
        return 0
    if joining.address():
        room.wait([{"GPU": 1, "CPU": 1}], 1, lambda placed: f"{placed} of 1 GPU is free", say)
    elif not _there("GPU"):
        raise UserError(f"{setting}=yes, but Ray has no GPU here: set {setting}=auto, or join a cluster with GPUs")
    return _there("GPU")


def takes_gpus(asked: Asked, setting: str, cpus: int = 1) -> bool:
    """Whether a job takes GPUs of the connected Ray, as it is now. Raises UserError where nothing says it."""
    return _chosen(asked, setting, _there("GPU"), _there("CPU") >= cpus)


def _there(resource: str) -> int:
    import ray

    return int(ray.cluster_resources().get(resource, 0))


def _chosen(asked: Asked, setting: str, gpus: int, enough_cpus: bool) -> bool:
    """Whether GPUs are used, of which there are `gpus` now. Raises UserError where a cluster that has nothing yet
    cannot show it."""
    if asked == "auto" and not gpus and not enough_cpus and joining.address():
        raise UserError(
            f"{setting}=auto, and the cluster has neither a GPU nor enough CPUs now that would say what to wait for: "
            f"set {setting}=yes or {setting}=no"
        )
    return asked == "yes" or (asked == "auto" and gpus > 0)


def threads(cores: int, workers: int) -> int:
    """torch threads of each of some CPU workers on one machine: its cores shared evenly, one of each share left for
    decoding."""
    return max(1, cores // workers - 1)
