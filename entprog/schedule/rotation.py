"""Blocks that are drawn anew again and again: for rows of `schedule.table`, and as LISA and BAdam draw them.

Every draw is a function of its arguments alone, so that all ranks, and a resumed run, draw alike.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from entprog.config import Schedule


def uniform(names: Sequence[str], count: int, seed: Sequence[int]) -> list[str]:
    """`count` of the blocks, each as likely as any other."""
    return [names[i] for i in np.random.default_rng(seed).choice(len(names), count, replace=False)]


def weighted(names: Sequence[str], count: int, seed: Sequence[int], priority: Mapping[str, float]) -> list[str]:
    """`count` of the blocks, drawn one after another: half of each draw is even, half in proportion to π_b, so that no
    block is left out for good. Where priorities are negative: to π_b - min π, as in `budget.best_set`."""
    worth = np.array([priority[name] for name in names])
    worth = worth - min(0.0, worth.min())
    odds = np.full(len(names), 1 / len(names))
    if worth.sum() > 0:
        odds = (odds + worth / worth.sum()) / 2
    return [names[i] for i in np.random.default_rng(seed).choice(len(names), count, replace=False, p=odds)]


def lisa(names: Sequence[str], schedule: Schedule, stage: int, seed: int) -> list[str]:
    """LISA (arXiv 2403.17919): every period, a stage here, a random share of the blocks, beside what lies outside all
    of them."""
    return uniform(names, max(1, round(schedule.lisa_share * len(names))), [seed, stage])


def badam(names: Sequence[str], schedule: Schedule, stage: int, seed: int) -> list[str]:
    """BAdam (arXiv 2404.02827): one block a period, in a random order that is drawn anew for every round of them.

    Its Adam starts each period without moments: `train.frozen_state=drop`.
    """
    lap, place = divmod(stage, len(names))
    return [names[np.random.default_rng([seed, lap]).permutation(len(names))[place]]]


KINDS: dict[str, Callable[[Sequence[str], Schedule, int, int], list[str]]] = {"lisa": lisa, "badam": badam}
"""`schedule.kind` → (names of all blocks, schedule, stage, seed) → the stage's blocks."""
