"""How many blocks to train next: trial steps of nested candidates that share their weights (Ent-Prog §3.4)."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from entprog.config import Schedule
from entprog.records import Record
from entprog.schedule.plans import Plan, size


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One search step of one candidate."""

    candidate: int
    """Index in the stage's candidates."""
    loss_before: float
    """ℓ on the fixed held-out set before the step."""
    loss: float
    """ℓ after it."""
    cost: float
    """T: seconds (slowest rank) or FLOPs of the step, evaluation not included."""


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """Convergence efficiency of one candidate: loss drop per unit of cost, with a bootstrap interval."""

    m: int
    value: float
    low: float
    high: float
    steps: int
    mean_cost: float


@dataclass(frozen=True, kw_only=True)
class Decision(Record):
    """What a stage trains, and why."""

    stage: int
    plan: Plan
    candidates: tuple[Plan, ...]
    efficiencies: tuple[Efficiency, ...]
    reason: str
    search_cost: float
    """Seconds or FLOPs that the search took, evaluations included."""
    step_cost: float | None = None
    """Expected seconds or FLOPs of a step of the plan; None where the schedule alone decided."""
    full_step_cost: float | None = None
    """Seconds (or FLOPs) of a step of full training: measured in the search if it was a candidate."""
    memory_bytes: int | None = None
    """Predicted peak of the plan on one device."""
    break_even_step: int | None = None
    """Step at which the plan's savings will have paid for search and scoring so far; None: it saves nothing."""


def turn(trial: int, candidates: int, stage: int, seed: int) -> int:
    """Which candidate takes search step `trial`: every round visits each once, in an order of its own.

    A function of its arguments alone, so that every rank and every resumed run takes the same turns.
    """
    round_number, place = divmod(trial, candidates)
    order = np.random.default_rng([seed, stage, round_number]).permutation(candidates)
    return int(order[place])


def efficiency(trials: Sequence[Trial], estimator: str) -> float:
    """CE(m) of one candidate's trials, in their order.

    "paired": Σ drop across its own steps / Σ T.
    "paper": - Σ_{s=2..S} (ℓ^(s) - ℓ^(s-1)) / Σ_{s=2..S} T^(s); 0 with fewer than two steps.
    """
    if estimator == "paired":
        return sum(t.loss_before - t.loss for t in trials) / sum(t.cost for t in trials)
    if len(trials) < 2:
        return 0.0
    drops = [a.loss - b.loss for a, b in pairwise(trials)]
    return sum(drops) / sum(t.cost for t in trials[1:])


def efficiencies(
    candidates: Sequence[Plan], trials: Sequence[Trial], schedule: Schedule, seed: int, resamples: int = 500
) -> list[Efficiency]:
    """CE of every candidate with its 5-95 % bootstrap interval over steps (paired drops)."""
    out = []
    rng = np.random.default_rng([seed, len(trials)])
    for number, plan in enumerate(candidates):
        own = [t for t in trials if t.candidate == number]
        drops = np.array([t.loss_before - t.loss for t in own])
        costs = np.array([t.cost for t in own])
        picks = rng.integers(len(own), size=(resamples, len(own)))
        low, high = np.quantile(drops[picks].sum(1) / costs[picks].sum(1), [0.05, 0.95])
        out.append(
            Efficiency(
                m=plan.m,
                value=efficiency(own, schedule.efficiency),
                low=float(low),
                high=float(high),
                steps=len(own),
                mean_cost=float(costs.mean()),
            )
        )
    return out


def overlap(found: Sequence[Efficiency]) -> bool:
    """Whether the intervals of the two candidates of highest efficiency overlap."""
    best, second = sorted(found, key=lambda e: e.value, reverse=True)[:2]
    return best.low < second.high


def choose(
    candidates: Sequence[Plan],
    trials: Sequence[Trial],
    schedule: Schedule,
    *,
    stage: int,
    seed: int,
    search_cost: float,
) -> Decision:
    """m* = argmax CE(m); the largest candidate when no candidate lowered the loss, or when nothing could be tried."""
    largest = max(candidates, key=size)
    chosen, found = largest, []
    if not trials:
        reason = "a round of candidates costs more than schedule.search_share allows: not searched, largest candidate"
    else:
        found = efficiencies(candidates, trials, schedule, seed)
        best = max(range(len(found)), key=lambda i: (found[i].value, size(candidates[i])))
        if found[best].value > 0:
            chosen, reason = candidates[best], f"highest convergence efficiency of {len(trials)} trial steps"
        else:
            reason = f"no candidate lowered the held-out loss in {len(trials)} trial steps: largest candidate"
    return Decision(
        stage=stage,
        plan=chosen,
        candidates=tuple(candidates),
        efficiencies=tuple(found),
        reason=reason,
        search_cost=search_cost,
    )
