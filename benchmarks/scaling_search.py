"""Scoring and a search on many GPUs, simulated: who does what is the code's own (`scoring.split`, `held_out_share`),
the seconds of one forward pass are measured.

A rank's seconds are those of its passes, in FLOPs over a whole forward's, and of the sums over draws that it hands over
or gets. Its wait is what the last rank needs longer. Ranks wait in a group whose time-out is 30 days
(`agree.PATIENCE`); the waits are held against torch's own, which would end the run if they waited in the group that
trains.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from torch.distributed.constants import default_pg_timeout

from benchmarks import scaling_forecast as forecast
from entprog.config import Data, Priority, Schedule
from entprog.data import clip_stream
from entprog.scoring import split, tables

TIMEOUT_S = default_pg_timeout.total_seconds()
PRIORITIES = {
    "default": Priority(),
    "preset finetune": Priority(conditions=16, draws=8),
    "1,000 draws of 8 clips": Priority(conditions=8, draws=125),
    "1,000 draws of 125 clips": Priority(conditions=125, draws=8),
}
HAND_OVER = 1.25e9
"""Bytes a second between two machines through gloo: assumed, 10 Gbit/s."""


@dataclass(frozen=True)
class Network:
    """What a network's passes cost on one GPU."""

    name: str
    costs: split.Costs
    forward_s: float
    """Of one clip."""
    elements: int
    """Of a prediction."""

    @property
    def whole(self) -> int:
        return self.costs.outside + sum(self.costs.blocks)


def networks() -> list[Network]:
    """Wan 2.1's two sizes at clips that they are trained at; seconds at the rate that an H200 was measured at."""
    rate, out = forecast.h200_rate(), []
    for name, sizes, latents in (
        ("Wan 2.1 1.3B, 17 frames of 832x480", forecast.WAN_1_3B, (1, 16, 5, 60, 104)),
        ("Wan 2.1 14B, 81 frames of 832x480", forecast.WAN_14B, (1, 16, 21, 60, 104)),
    ):
        found = forecast.counted(sizes, latents, "full")
        out.append(Network(name, found["costs"], found["forward"] / rate, prod(latents)))
    return out


def busy(network: Network, priority: Priority, at_once: int, ranks: int) -> list[float]:
    """Each rank's seconds in a scoring that goes through all conditions; at_once: draws of a forward."""
    cut = split.pieces(priority.draws, at_once, tables.marks(priority))
    parts = split.shared(range(priority.conditions), cut, network.costs, ranks)
    run = [sum(len(part.draws) * network.costs.of(part.places) for part in own) for own in parts]
    handed = [0] * ranks
    for _, _, _, giver, taker in split.handed_over(parts):
        handed[giver] += 16 * network.elements  # sum and squares, float64
        handed[taker] += 16 * network.elements
    passes = (flops / network.whole * network.forward_s for flops in run)
    return [network.forward_s + seconds + size / HAND_OVER for seconds, size in zip(passes, handed, strict=True)]


def scoring(network: Network, name: str, priority: Priority, counts: Sequence[int]) -> list[dict]:
    """A figure for each number of ranks; `by_conditions_s`: if ranks shared conditions alone."""
    each = priority.draws * network.costs.of(range(len(network.costs.blocks) + 1)) / network.whole * network.forward_s
    out = []
    for ranks in counts:
        seconds = busy(network, priority, 1, ranks)
        wall, wait = max(seconds), max(seconds) - min(seconds)
        alone = -(-priority.conditions // ranks) * each
        out.append(
            {
                "gpus": ranks, "network": network.name, "scoring": name, "wall_s": wall,
                "idle_share": 1 - sum(seconds) / ranks / wall, "longest_wait_s": wait,
                "longest_wait_over_timeout": wait / TIMEOUT_S,
                "efficiency": priority.conditions * each / ranks / wall, "by_conditions_s": alone,
                "by_conditions_idle_share": 1 - priority.conditions * each / ranks / alone,
                "by_conditions_wait_over_timeout": each / TIMEOUT_S if priority.conditions % ranks else 0.0,
            }
        )  # fmt: skip
    return out


def search(constants: forecast.Constants, counts: Sequence[int], about: dict) -> list[dict]:
    """A stage's search at the settings' defaults: `search_steps` steps of each candidate, a held-out loss after each.

    A candidate's step lies between those of a quarter of the blocks and of all; what counting and timing candidates
    takes is the same on every rank, and not in it.
    """
    schedule, data = Schedule(), Data()
    small, whole = forecast.QUARTER, 1.0
    out = []
    for ranks in counts:
        some, full = (sum(forecast.predicted(constants, each, ranks).values()) for each in ("entprog", "full"))
        steps = [some + (full - some) * (share - small) / (whole - small) for share in schedule.candidates]
        shares = [clip_stream.held_out_share(data.held_out_clips, rank, ranks) for rank in range(ranks)]
        judged = [
            sum(clip < schedule.search_clips for clip in clips) * len(range(1)[draws]) * constants.forward_s
            for clips, draws in shares
        ]
        trials = schedule.search_steps * len(steps)
        wall = schedule.search_steps * sum(steps) + (trials + 1) * max(judged)
        waited = (trials + 1) * (max(judged) - sum(judged) / ranks)
        out.append(
            {
                "gpus": ranks, "trials": trials, "wall_s": wall, "idle_share": waited / wall,
                "longest_wait_s": max(judged) - min(judged),
                "longest_wait_over_timeout": (max(judged) - min(judged)) / TIMEOUT_S, **about,
            }
        )  # fmt: skip
    return out
