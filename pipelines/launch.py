"""Run one function on a group of Ray Train workers, with the terminal kept informed."""

import logging
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from entprog.config import Experiment
from entprog.errors import UserError

CPUS_FOR_DATA = 1
"""Logical CPUs that must be left beside the workers: with none, Ray Data waits for ever."""
LOCAL_CPUS = 4
"""Least logical CPUs of a local Ray."""


class Board:
    """A tiny actor through which rank 0 tells the driver what happens; no shared file system is needed."""

    def __init__(self):
        self.items: list[dict[str, Any]] = []

    def post(self, item: dict[str, Any]) -> None:
        self.items.append(item)

    def take(self) -> list[dict[str, Any]]:
        out, self.items = self.items, []
        return out


def use_gpus(experiment: Experiment) -> bool:
    """Whether the workers get a GPU each. Raises UserError if the connected cluster cannot hold the workers."""
    import ray

    cluster, train = ray.cluster_resources(), experiment.train
    gpus = int(cluster.get("GPU", 0))
    wanted = train.gpus == "yes" or (train.gpus == "auto" and gpus > 0)
    if wanted and gpus < train.workers:
        raise UserError(
            f"train.workers={train.workers} needs {train.workers} GPUs, the cluster has {gpus}: "
            "lower train.workers, or set train.gpus=no"
        )
    cpus = int(cluster.get("CPU", 0))
    if cpus < train.workers + CPUS_FOR_DATA:
        raise UserError(
            f"train.workers={train.workers} needs {train.workers + CPUS_FOR_DATA} CPUs (one a worker, "
            f"{CPUS_FOR_DATA} for decoding), the cluster has {cpus}: lower train.workers or join a larger cluster"
        )
    return wanted


def decode_cpus(experiment: Experiment) -> float:
    """Logical CPUs that each worker's decoding may use."""
    import ray

    if experiment.data.decode_cpus:
        return experiment.data.decode_cpus
    free = ray.cluster_resources().get("CPU", 0) - experiment.train.workers
    return max(1.0, free / experiment.train.workers)


def threads(experiment: Experiment) -> int:
    """torch threads per CPU worker: cores shared evenly, one of each share left for decoding."""
    return experiment.train.threads or max(1, (os.cpu_count() or 1) // experiment.train.workers - 1)


def absolute(experiment: Experiment) -> Experiment:
    """The same with every local path absolute: workers run in a folder of their own."""
    model, data = experiment.model, experiment.data

    def located(path: str | None) -> str | None:
        return str(Path(path).resolve()) if path and Path(path).exists() else path  # else a hub name

    paths = {name: located(getattr(model, name)) for name in ("base", "vae", "prompt_embeds")}
    return experiment.model_copy(
        update={
            "model": model.model_copy(update=paths),
            "data": data.model_copy(update={"shards": located(data.shards)}),
        }
    )


def run_workers(
    worker: Callable[[dict[str, Any]], None],
    settings: dict[str, Any],
    experiment: Experiment,
    storage: Path,
    heard: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Run `worker(settings)` on every worker of a TorchTrainer; `heard` gets what rank 0 posts; returns its last word.

    A worker posts `{"result": {…}}` when all is done, or `{"user_error": line}` for a person's mistake that only it
    could see. A crash restarts the group up to `train.max_failures` times. Raises UserError, or RuntimeError with the
    workers' own reason in one line.
    """
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    gpus = use_gpus(experiment)
    board = ray.remote(num_cpus=0)(Board).remote()
    last: dict[str, Any] = {}
    done = threading.Event()

    def listen() -> None:
        while True:
            ended = done.is_set()
            for item in ray.get(board.take.remote()):
                if "result" in item or "user_error" in item:
                    last.update(item)
                else:
                    heard(item)
            if ended:
                return
            done.wait(0.3)

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    for name in ("ray.train", "ray.data", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)
    trainer = TorchTrainer(
        worker,
        train_loop_config={**settings, "experiment": absolute(experiment).model_dump(mode="json"), "board": board},
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        scaling_config=ScalingConfig(num_workers=experiment.train.workers, use_gpu=gpus),
        run_config=RunConfig(
            # A name of its own: Ray must not look for state under it; we resume from our own checkpoints.
            name=f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}",
            storage_path=str(storage.resolve()),
            failure_config=FailureConfig(max_failures=experiment.train.max_failures, controller_failure_limit=3),
        ),
    )
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit()
        failure = None
    except Exception as error:
        failure = error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, interrupt)  # Ray Train leaves its own behind, which fails once it is done
        done.set()
        listener.join(timeout=10)
        ray.kill(board)
    if "user_error" in last:
        raise UserError(last["user_error"])
    if failure is not None:
        raise RuntimeError(_reason(failure)) from failure
    if "result" not in last:
        raise RuntimeError("the workers ended without a result")
    return last["result"]


def _reason(error: BaseException) -> str:
    """The line that names the cause, out of Ray's nested traces."""
    failures = getattr(error, "worker_failures", None) or {}
    text = "\n".join(str(failure) for failure in failures.values()) or str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if line.split(":")[0].rsplit(".", 1)[-1].endswith(("Error", "Exception"))]
    return (named or lines or [type(error).__name__])[-1]
