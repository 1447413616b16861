"""Schedules that neither score nor search: which blocks each stage trains is drawn anew. What Ent-Prog has to beat.

A stage is one period of theirs: `schedule.stages` is how often they change blocks.
"""

from collections.abc import Callable, Sequence

import numpy as np

from entprog.config import Schedule


def lisa(names: Sequence[str], schedule: Schedule, stage: int, seed: int) -> list[str]:
    """LISA (arXiv 2403.17919): every period a random share of the blocks, beside what lies outside all of them."""
    count = max(1, round(schedule.lisa_share * len(names)))
    return [names[i] for i in np.random.default_rng([seed, stage]).choice(len(names), count, replace=False)]


def badam(names: Sequence[str], schedule: Schedule, stage: int, seed: int) -> list[str]:
    """BAdam (arXiv 2404.02827): one block a period, in a random order that is drawn anew for every round of them.

    Its Adam starts each period without moments: `train.frozen_state=drop`.
    """
    lap, place = divmod(stage, len(names))
    return [names[np.random.default_rng([seed, lap]).permutation(len(names))[place]]]


KINDS: dict[str, Callable[[Sequence[str], Schedule, int, int], list[str]]] = {"lisa": lisa, "badam": badam}
"""`schedule.kind` → (names of all blocks, schedule, stage, seed) → the stage's blocks."""
