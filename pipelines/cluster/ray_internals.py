"""Every name of Ray's that is not part of its public interface, in one place.

An upgrade may change any of them without notice: `tests/test_internals.py` and `tests/test_faults.py` then fail, and
`pyproject.toml` bounds Ray's version until they pass.
"""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pipelines
from entprog.errors import UserError


@dataclass(frozen=True)
class Store:
    """The object store over all nodes, in bytes."""

    used: int
    capacity: int
    spilled: int
    """Written to disk since the cluster began."""


def object_store() -> Store:
    """The store of the connected cluster as it is now, by the same call that Ray Data's own statistics use."""
    import ray
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    stats = get_memory_info_reply(get_state_from_address(ray.get_runtime_context().gcs_address)).store_stats
    return Store(stats.object_store_bytes_used, stats.object_store_bytes_avail, stats.spilled_bytes_total)


def resources_that_may_come() -> dict[str, float]:
    """What the cluster would have with all the machines that its autoscaler may add; {} where that is not known.

    Ray's own autoscalers (`ray up`, KubeRay) do not say it; a cluster that is provided as a service may.
    """
    import ray

    return ray._private.state.state.get_max_resources_from_cluster_config() or {}


STEP_S = 0.05
"""Least time between two steps of an executor of Ray Data that is `unhurried`."""


def unhurried(context) -> None:
    """Executors of a dataset with this DataContext take a step every STEP_S at most.

    One that has to wait for room, for its reader or in the object store, otherwise asks for it without pause, which
    keeps a core busy.
    """
    from ray.data._internal.execution.execution_callback import ExecutionCallback

    class Rest(ExecutionCallback):
        def __init__(self):
            self.next = 0.0

        def on_execution_step(self, executor):
            now = time.monotonic()
            time.sleep(max(self.next - now, 0.0))
            self.next = max(self.next, now) + STEP_S

    context.custom_execution_callback_classes.append(Rest)


def draining_nodes() -> set[str]:
    """Ids of the nodes that Ray drains: nothing new is placed on them, and they are about to end."""
    import ray

    return set(ray._private.state.state.get_draining_nodes())


def found_no_room(error: BaseException) -> bool:
    """Whether it is Ray Train's word that its workers could not be placed in time."""
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    return isinstance(getattr(error, "controller_failure", None), WorkerGroupStartupTimeoutError)


def is_driver() -> bool:
    """Whether this process is the program that connected to Ray; False in a task or an actor, as a trial of Tune is."""
    import ray

    return ray.get_runtime_context().worker.mode == ray.SCRIPT_MODE


def remove_placement_group(key: str) -> None:
    """Give back what a placement group reserves. key: hex, as `placement_group_table` names it."""
    from ray._raylet import PlacementGroupID
    from ray.util.placement_group import PlacementGroup
    from ray.util.placement_group import remove_placement_group as remove

    remove(PlacementGroup(PlacementGroupID(bytes.fromhex(key))))


@contextmanager
def on_loopback() -> Iterator[None]:
    """A Ray that starts inside the block listens on loopback alone.

    Ray takes the machine's address on the network, and then listens on all of them, unless it is on a system where it
    makes no clusters. This is the one switch that keeps all its processes on loopback: 127.0.0.1 is replaced. Raises
    UserError where Ray has it no more.
    """
    from ray._private import ray_constants

    if not hasattr(ray_constants, "ENABLE_RAY_CLUSTER"):
        raise UserError("this version of Ray cannot be kept off the network: install ray==2.60.0, or set RAY_ADDRESS")
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def torch_config(backend: str, prepare: Callable[[], None]):
    """What Ray Train's TorchConfig does, with workers that call `prepare` in their main thread before they begin.

    Its controller reads this, and needs no torch for it, whose import would keep every start of workers waiting.
    """
    import ray
    from ray.exceptions import GetTimeoutError
    from ray.train.backend import Backend, BackendConfig

    class Group(Backend):
        share_cuda_visible_devices = True

        def on_start(self, worker_group, backend_config):
            address, port = worker_group.execute_single(0, _free_address)
            url, world = f"tcp://[{address}]:{port}" if ":" in address else f"tcp://{address}:{port}", len(worker_group)
            joins = [worker_group.execute_single_async(rank, _join, backend, rank, world, url) for rank in range(world)]
            ray.get(joins)
            worker_group.execute(prepare)

        def on_shutdown(self, worker_group, backend_config):
            with suppress(GetTimeoutError):  # a rank that hangs is killed after that
                ray.get(worker_group.execute_async(_leave, len(worker_group) > 1), timeout=LEAVE_S)

    class Config(BackendConfig):
        def __init__(self):
            self.backend = backend

        @property
        def backend_cls(self):
            return Group

        @property
        def train_func_context(self):
            return _on_its_device

    return Config()


UNHEARD = ("start_monitor", "start_api_server", "start_log_monitor")
"""What starts processes of a head's that nobody hears: of its autoscaler, its dashboard and those who follow logs."""


@contextmanager
def quietly() -> Iterator[None]:
    """A Ray that starts inside the block starts none of UNHEARD: two seconds of CPU, for the half of which `ray.init`
    waits. Where Ray names them otherwise, it starts them."""
    from ray._private.node import Node

    before = {name: getattr(Node, name) for name in UNHEARD if hasattr(Node, name)}
    for name in before:
        setattr(Node, name, lambda self, **_: None)
    try:
        yield
    finally:
        for name, start in before.items():
            setattr(Node, name, start)


def torch_trainer(on_sigint: Callable[[Callable], Callable]):
    """Ray Train's TorchTrainer, which answers SIGINT as `on_sigint` says, given what Ray Train does then: it ends its
    workers at once. It is without two actors that it has for what does not happen here, a second and a half of CPU
    each: one shares out data sets, which workers open themselves; the other gives back what a controller that was
    killed had reserved. For a driver `launch` does that; trials of a sweep, which share a job, keep it."""
    from ray.train.torch import TorchTrainer

    class Trainer(TorchTrainer):
        def _create_default_callbacks(self):
            unused = unused_callbacks()
            return [each for each in super()._create_default_callbacks() if not isinstance(each, unused)]

        def _register_sigint_handler(self, controller):
            super()._register_sigint_handler(controller)
            signal.signal(signal.SIGINT, on_sigint(signal.getsignal(signal.SIGINT)))

    return Trainer


def unused_callbacks() -> tuple[type, ...]:
    """Classes of the callbacks that start those actors; () where Ray names them otherwise."""
    with suppress(ImportError):
        from ray.train.v2._internal.callbacks import DatasetsCallback
        from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

        return (DatasetsCallback, PlacementGroupCleanerCallback) if is_driver() else (DatasetsCallback,)
    return ()


def begin_coordinator() -> None:
    """Have Ray start the actor now that Ray Train's controller tells what it needs, and waits for, before it asks for
    workers. Nothing where Ray names it otherwise."""
    with suppress(ImportError):
        from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
            get_or_create_autoscaling_coordinator,
        )

        get_or_create_autoscaling_coordinator()


def begin_statistics() -> None:
    """Have Ray start the actor of Ray Data's statistics now, for which every execution waits. Nothing where Ray names
    it otherwise."""
    with suppress(ImportError):
        from ray.data._internal.stats import get_or_create_stats_actor

        get_or_create_stats_actor()


LEAVE_S = 30.0
"""How long ranks may take to leave their process group."""


def _free_address() -> tuple[str, int]:
    from ray.train._internal.utils import get_address_and_port

    return get_address_and_port()


def _join(backend: str, rank: int, world: int, url: str) -> None:
    with pipelines.importing():
        from ray.train.torch import config

    config._set_torch_distributed_env_vars()
    config._setup_torch_process_group(backend, rank, world, url)


def _leave(destroy: bool) -> None:
    from ray.train.torch import config

    config._shutdown_torch(destroy)


def _on_its_device():
    from ray.train.torch import config

    return config.TorchConfigContextManager()


def state_of_tune(trial) -> Path | None:
    """Where Ray Tune writes its state, by any of its trials, before a thread of its own copies it elsewhere. It does so
    between callbacks: what one of them reads there is of one moment. None where this version of Ray does not say it."""
    folder = getattr(getattr(trial, "storage", None), "experiment_driver_staging_path", None)
    return Path(folder) if folder else None
