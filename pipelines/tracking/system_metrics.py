"""What the machine of rank 0 does meanwhile: MLflow's own system metrics, delivered as every other point is."""

import threading
from collections.abc import Callable

from pipelines.tracking.mlflow_internals import Machine
from pipelines.tracking.tracker import Tracker


def watch(tracker: Tracker, every_s: float, step: Callable[[], int]) -> None:
    """Log `system/…` (CPU, memory, disk, network, GPU where there is one) from a thread until the tracker is closed.

    step: the training's step now, so that the points can be set against steps as well as against time. MLflow's own
    thread is not used: it ends for good when a server is away for a moment.
    """

    def look() -> None:
        machine = Machine(tracker.run_id, tracker.uri)
        while not tracker.closed.wait(every_s):
            tracker.metrics(step(), {f"system/{name}": value for name, value in machine.look().items()})

    threading.Thread(target=look, name="machine", daemon=True).start()
