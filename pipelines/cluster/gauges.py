"""Where a cluster's time goes: Ray's metrics of every rank, and a word about a rank that keeps the others waiting."""

import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from entprog.distributed import agree
from entprog.training.steps import Step

LOOK_AT = 50
"""Steps after which a straggler is looked for, again and again."""
SLOWER, OFTEN = 1.2, 0.5
"""A straggler takes this many times the median, and is the slowest in this share of the steps."""


class Gauges:
    """One rank's, for as long as it trains. Prometheus finds the metrics where it finds Ray's own (`entprog_…`)."""

    def __init__(self, warn: Callable[[str], None]):
        from ray.util.metrics import Gauge

        self.warn = warn
        rank, self.world = agree.world()
        tags = {"rank": str(rank)}

        def gauge(name: str, meaning: str):
            made = Gauge(f"entprog_{name}", meaning, tuple(tags))
            made.set_default_tags(tags)
            return made

        self.step = gauge("step", "Updates done")
        self.step_s = gauge("step_s", "Seconds of an update, slowest rank")
        self.wait_s = gauge("wait_s", "Seconds that an update waited for data, slowest rank")
        self.clips_per_s = gauge("clips_per_s", "Clips trained on per second, all ranks")
        self.memory_bytes = gauge("gpu_memory_bytes", "Allocated on this rank's GPU")
        self.places = agree.for_first(place())
        """Of every rank, on rank 0, which looks for stragglers."""
        self.slowest: Counter[int] = Counter()
        self.excess: list[float] = []
        """Slowest rank's seconds over the median's."""

    def show(self, step: Step) -> None:
        self.step.set(step.step)
        self.step_s.set(step.seconds)
        self.wait_s.set(step.wait_s)
        self.clips_per_s.set(step.clips / max(step.seconds + step.wait_s, 1e-9))
        if torch.cuda.is_available():
            self.memory_bytes.set(torch.cuda.memory_allocated())
        if step.pace is not None and self.world > 1:
            self.look_for_stragglers(step.pace)

    def look_for_stragglers(self, pace: agree.Pace) -> None:
        self.slowest[pace.slowest_rank] += 1
        self.excess.append(pace.slowest_s / max(pace.median_s, 1e-9))
        if len(self.excess) < LOOK_AT:
            return
        (rank, times), excess = self.slowest.most_common(1)[0], sorted(self.excess)[LOOK_AT // 2]
        if times >= OFTEN * LOOK_AT and excess >= SLOWER:
            self.warn(
                f"rank {rank} ({self.places[rank]}) is the slowest of {self.world} in {times} of {LOOK_AT} steps and "
                f"takes {excess:.1f} times the median: look at that machine"
            )
        self.slowest, self.excess = Counter(), []


def place() -> str:
    """This worker's machine and GPU."""
    import ray

    gpus = ray.get_gpu_ids()
    return f"node {ray.util.get_node_ip_address()}, {f'GPU {gpus[0]}' if gpus else f'process {os.getpid()}'}"


def metrics(step: Step) -> dict[str, float]:
    """A step's spread over ranks as MLflow metrics."""
    if step.pace is None:
        return {}
    return {
        "ranks/median_s": step.pace.median_s,
        "ranks/slowest_s": step.pace.slowest_s,
        "ranks/slowest_rank": float(step.pace.slowest_rank),
    }


def record(step: Step) -> dict[str, Any]:
    """A step's times over ranks as entries of a line of steps.jsonl."""
    return {} if step.pace is None else {"pace": vars(step.pace)}
