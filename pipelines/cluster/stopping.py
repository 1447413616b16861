"""Notices that something is about to end: a spot machine (SIGTERM to its workers, or Ray drains
its node), the job (SIGTERM to the driver), or
a group of workers in favour of a larger one.

Always the workers save a checkpoint after the step they are at. Then a group whose machine leaves, or which can grow,
is started anew on what is there; a job that is told to stop ends, and the same command resumes it.
"""

import signal
import threading
from typing import TYPE_CHECKING, Any

from pipelines.cluster.message_board import GOES_ON, MACHINE_ENDS

if TYPE_CHECKING:
    import torch

# torch is imported where ranks agree: Ray Train's controller takes `listen` from here, and needs none.

_noticed = threading.Event()
"""SIGTERM has come to this worker's process."""


class LeavingError(RuntimeError):
    """A worker's machine is about to end; the checkpoint is saved, the group has to start anew without it."""


def listen() -> None:
    """Take SIGTERM as a notice; without this Ray's own handler ends the process at once. Called in the worker's main
    thread, as signals want it."""
    signal.signal(signal.SIGTERM, lambda *_: _noticed.set())


class Notices:
    """The notices a worker got; every rank asks after every step, and all get the same answer."""

    def __init__(self, board: Any, device: "torch.device"):
        import ray

        from entprog.distributed import agree

        self.device = device
        board.join.remote(ray.get_runtime_context().get_node_id())
        self.of_driver = board.notices.remote() if agree.world()[0] == 0 else None

    def newest(self) -> int:
        """GOES_ON, GROWS, MACHINE_ENDS or JOB_ENDS."""
        import ray

        from entprog.distributed import agree

        mine = MACHINE_ENDS if _noticed.is_set() else GOES_ON
        if self.of_driver is not None and ray.wait([self.of_driver], timeout=0)[0]:
            mine = max(mine, ray.get(self.of_driver))
        return int(agree.slowest(float(mine), self.device))
