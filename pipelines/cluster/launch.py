"""Run one function on a group of Ray Train workers, with the terminal kept informed."""

import logging
import math
import os
import signal
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import pipelines
from entprog import files
from entprog.config import Experiment, Model, Train
from entprog.errors import UserError
from entprog.masking import masked
from entprog.storage import Place, Where, remove
from pipelines.cluster import failures, joining, ray_internals, room, session
from pipelines.cluster.message_board import GROWS, JOB_ENDS, Listener
from pipelines.cluster.room import CPUS_FOR_DATA, Bundle
from pipelines.tracking.store import is_file, tracking_uri

LOCAL_CPUS = 4
"""Least logical CPUs of a local Ray."""
POLL_S, POLLS_PER_S = 0.2, 80
"""Ray Train asks each of its workers how it is so often, but all of them together at most so many times a second."""
STOP_S = 60.0
"""How long workers that are told to end may take for it."""


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
    wanted = _chosen(train.gpus, "train.gpus", gpus, cpus >= workers + CPUS_FOR_DATA)
    each = each_worker(experiment, wanted, trial=trial)
    needed = math.ceil(sum(bundle.get("CPU", 0) for bundle in room.bundles(workers, each)))
    if wanted and gpus < workers and not grows:
        raise UserError(
            f"{name}={workers} needs {workers} GPUs, the cluster has {gpus}: lower {name}, or set train.gpus=no"
        )
    if cpus < needed and not grows:
        lower = f"{name} or data.decode_cpus" if experiment.data.decode_cpus else name
        raise UserError(
            f"{name}={workers} needs {needed} CPUs ({needed - CPUS_FOR_DATA} for the workers, {CPUS_FOR_DATA} for "
            f"decoding), the cluster has {cpus}: lower {lower} or join a larger cluster"
        )
    return wanted


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
    import ray

    def there(resource: str) -> int:
        return int(ray.cluster_resources().get(resource, 0))

    if not _chosen(asked, setting, there("GPU"), there("CPU") >= cpus):
        room.cpus(cpus, say)
        return 0
    if joining.address():
        room.wait([{"GPU": 1, "CPU": 1}], 1, lambda placed: f"{placed} of 1 GPU is free", say)
    elif not there("GPU"):
        raise UserError(f"{setting}=yes, but Ray has no GPU here: set {setting}=auto, or join a cluster with GPUs")
    return there("GPU")


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


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def absolute(experiment: Experiment) -> Experiment:
    """The experiment with every local path absolute: workers run in a folder of their own."""
    data, train = experiment.data, experiment.train
    place = train.checkpoints
    return experiment.model_copy(
        update={
            "model": absolute_model(experiment.model),
            "data": data.model_copy(update={"shards": _located(data.shards)}),
            "train": train.model_copy(update={"checkpoints": place and str(Place.at(place).local or place)}),
        }
    )


def absolute_model(model: Model) -> Model:
    """The part of `absolute` that says what is trained."""
    found = {name: _located(getattr(model, name)) for name in ("base", "vae", "prompt_embeds", "text_encoder")}
    # Of a file the name itself counts (its ending), and in the hub's cache that is a link to one without.
    found |= {name: _located(getattr(model, name), follow=False) for name in ("weights", "adapter")}
    return model.model_copy(update=found)


def _located(path: str | None, follow: bool = True) -> str | None:
    if not path or not files.home(path).exists():  # a hub name
        return path
    return str(files.home(path).resolve() if follow else files.home(path).absolute())


def training(settings: dict[str, Any]) -> None:
    """What workers run that train."""
    with pipelines.importing():  # here: their controller unpickles this function, and needs no network for it
        from pipelines.stream import feed

        feed.begin()
        from pipelines.training import worker

    worker.train(settings)


def scoring(settings: dict[str, Any]) -> None:
    """What workers run that score."""
    with pipelines.importing():
        from pipelines.training import worker

    worker.score(settings)


def run_workers(
    worker: Callable[[dict[str, Any]], None],
    settings: dict[str, Any],
    experiment: Experiment,
    storage: Where,
    on_item: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Run `worker(settings)` on every worker of a TorchTrainer; `on_item` gets rank 0's posts; returns the last item.

    A worker posts `{"result": {…}}` when all is done, `{"user_error": line}` for a person's mistake that only it could
    see, `{"failure": line}` for what another try would not mend, `{"stopped": step}` when it was told to end, and
    `{"grows": step}` when there is room for more workers. Whatever else ends the workers, or their trainer, starts them
    again, up to `train.max_failures` times in a row without a step gained. While the cluster has no room for them it is
    waited for, and `on_item` gets `{"waiting": line}` now and then. SIGTERM to this process ends that wait, or lets the
    workers save a checkpoint, and raises KeyboardInterrupt. Raises UserError, or RuntimeError with the workers' own
    reason in one line.
    """
    each = each_worker(experiment, use_gpus(experiment), trial=not ray_internals.is_driver())
    for name in ("ray.train", "ray.data", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)
    listener = Listener(on_item)
    ray_internals.begin_coordinator()
    train, tries, furthest = experiment.train, experiment.train.max_failures, 0
    run = storage.resolve()
    room.forget(run)  # of a trial whose process was lost
    least = train.min_workers or train.workers
    # Nodes of a cluster that starts come one after another: fewer workers begin once they would be left alone for as
    # long as they are to train at least. Later they go on at once, and grow when a node has come.
    settle_s = max(room.SETTLE_S, train.resize_every_s) if joining.address() else room.SETTLE_S
    say = lambda line: on_item({"waiting": line})  # noqa: E731
    try:
        with _stopping(listener) as stop:
            while True:
                workers = room.workers(least, train.workers, each, say, settle_s=settle_s, stop=stop, run=run)
                settle_s = room.SETTLE_S
                with _leaving_nothing_reserved(), _growing(listener, train, workers, each, run):
                    boarded = {**settings, "board": listener.board}
                    failure = _attempt(worker, boarded, experiment, workers, each, storage)
                listener.read()
                last = listener.last
                if last.pop("grows", None) is not None:
                    continue
                if "user_error" in last:
                    raise UserError(last["user_error"])
                if "stopped" in last:
                    raise KeyboardInterrupt
                if "result" in last:
                    return last["result"]
                if "failure" not in last and failure and ray_internals.found_no_room(failure):
                    say("another job took the room first: waiting again")  # no try of ours
                    continue
                reason = last.get("failure") or (
                    failures.reason(failure) if failure else "the workers ended without a result"
                )
                if listener.step > furthest:
                    tries, furthest = train.max_failures, listener.step
                if "failure" in last or not tries:
                    raise RuntimeError(reason) from failure
                tries -= 1
                on_item({"warning": f"{reason}: starting the workers again, from the newest checkpoint"})
    except UserError:
        remove(run)  # Ray's own, from which nobody goes on: it would keep a corrected command out
        raise
    finally:
        listener.close()


@contextmanager
def _growing(listener: Listener, train: Train, workers: int, each: Bundle, run: Where):
    """A group that is smaller than it should be is told when it can grow."""
    import ray

    ray.get(listener.board.anew.remote())
    listener.begun.clear()

    def grow() -> None:
        listener.board.tell.remote(GROWS)

    with room.growing(train.workers - workers, each, listener.begun, train.resize_every_s, grow, run):
        yield


def _attempt(
    worker, settings: dict[str, Any], experiment: Experiment, workers: int, each: Bundle, storage: Where
) -> Exception | None:
    """One group of workers from its start to its end; why it failed."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig

    from pipelines.cluster import stopping

    trainer = ray_internals.torch_trainer()(
        worker,
        train_loop_config={**settings, "experiment": absolute(experiment).model_dump(mode="json")},
        torch_config=ray_internals.torch_config("nccl" if "GPU" in each else "gloo", prepare=stopping.listen),
        scaling_config=ScalingConfig(num_workers=workers, use_gpu="GPU" in each, resources_per_worker=each),
        run_config=RunConfig(
            # A name of its own: Ray must not look for state under it; we resume from our own checkpoints.
            name=f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}",
            **_ray_storage(storage),
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),  # `run_workers` tries again
        ),
    )
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        with _polling(workers):
            trainer.fit()
    except SystemExit:  # how Ray Train ends a process that is told to stop
        raise KeyboardInterrupt from None
    except Exception as error:
        return error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, interrupt)  # Ray Train leaves its own behind, which fails once it is done
    return None


def _ray_storage(folder: Where) -> dict[str, Any]:
    """Where Ray Train keeps what it needs of a group of workers."""
    if isinstance(folder, Place):
        return {"storage_path": folder.root, "storage_filesystem": folder.system}
    return {"storage_path": str(folder.resolve())}


def poll_s(workers: int) -> float:
    """Seconds between two questions of Ray Train's controller to a worker."""
    return max(POLL_S, workers / POLLS_PER_S)


@contextmanager
def _polling(workers: int):
    """A trainer that starts inside asks its workers every `poll_s`, unless a person has set the interval."""
    name = "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"
    if name in os.environ:
        yield
        return
    os.environ[name] = str(poll_s(workers))
    try:
        yield
    finally:
        del os.environ[name]


@contextmanager
def _leaving_nothing_reserved():
    """Afterwards the placement groups made inside are gone: a trainer's controller that was killed leaves its own, and
    with it CPUs and GPUs that would be missing from then on. Trials of a sweep, which share a job, are left to Ray."""
    import ray
    from ray.util import placement_group_table

    if not ray_internals.is_driver():  # inside a trial
        yield
        return
    job = ray.get_runtime_context().get_job_id()

    def reserved() -> set[str]:
        return {key for key, group in placement_group_table().items() if group["state"] != "REMOVED"}

    before = reserved()
    yield
    for key in reserved() - before:
        if key.endswith(job):
            ray_internals.remove_placement_group(key)


@contextmanager
def _stopping(listener: Listener):
    """Gives an event that SIGTERM sets. It also tells the workers to save and end; if they cannot within STOP_S, they
    are ended."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # a trial of a sweep: the sweep hears it
        yield stop
        return
    timers: list[threading.Timer] = []

    def tell(*_) -> None:
        stop.set()
        listener.board.tell.remote(JOB_ENDS)
        timers.append(threading.Timer(STOP_S, os.kill, (os.getpid(), signal.SIGINT)))
        timers[-1].daemon = True
        timers[-1].start()

    before = signal.signal(signal.SIGTERM, tell)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
        for timer in timers:
            timer.cancel()
