"""How many blocks to train next: trial steps of nested candidates that share their weights (Ent-Prog §3.4)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy.special import stdtrit

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
    """T: seconds (slowest rank) or FLOPs of the step; neither evaluation nor what its clips cost before it (reading,
    decoding, encoding), which smaller clips need not lower: trials cut them from whole ones."""


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """Convergence efficiency of one candidate: loss drop per unit of cost, with its 90 % interval."""

    m: int
    value: float | None
    """None where the estimator has too few steps to say."""
    low: float | None
    """None, as `high`, where no two steps of any candidate show how far they scatter."""
    high: float | None
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
    """The same of full training. Both go by the trials, where there were any."""
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


def drops(trials: Sequence[Trial], estimator: str) -> np.ndarray:
    """Loss drops credited to one candidate's trials, in their order: (drop, cost) pairs, float64 [n, 2].

    "paired": across each of its own steps. "paper": from one of its steps to the next, s = 2..S, which counts what the
    other candidates did in between; none with fewer than two steps.
    """
    if estimator == "paired":
        pairs = [(t.loss_before - t.loss, t.cost) for t in trials]
    else:
        pairs = [(a.loss - b.loss, b.cost) for a, b in pairwise(trials)]
    return np.array(pairs, float).reshape(-1, 2)


def efficiencies(candidates: Sequence[Plan], trials: Sequence[Trial], schedule: Schedule) -> list[Efficiency]:
    """CE(m) = Σ drop / Σ T of every candidate, with its 90 % interval.

    Losses fall fastest at a stage's start, whoever trains: drops are compared within rounds, as blocks of an analysis
    of variance. What is left of a step's drop without its candidate's mean and its round's is taken to scatter alike
    whichever candidate makes it, mostly by its clips and their noise: its variance is pooled over all candidates, so
    that two steps of each already say something (Student's t). The paper's sum telescopes: however many steps, it
    scatters as one drop does. An interval is of one look: a search that looks after every round is clear by chance
    more often than one time in ten.
    """
    estimator = schedule.efficiency
    parts = [[t for t in trials if t.candidate == number] for number in range(len(candidates))]
    found = [drops(own, estimator) for own in parts]
    rounds = min(len(pairs) for pairs in found)
    freedom, scatter = (len(found) - 1) * max(rounds - 1, 0), None
    if freedom:
        drop = np.stack([pairs[:rounds, 0] for pairs in found])
        odd = drop - drop.mean(axis=0) - drop.mean(axis=1, keepdims=True) + drop.mean()
        scatter = math.sqrt((odd**2).sum() / freedom)
    out = []
    for plan, own, pairs in zip(candidates, parts, found, strict=True):
        value, width = None, None
        if len(pairs):
            value = float(pairs[:, 0].sum() / pairs[:, 1].sum())
        if value is not None and scatter is not None:
            independent = len(pairs) if estimator == "paired" else 1
            width = float(stdtrit(freedom, 0.95) * scatter * math.sqrt(independent) / pairs[:, 1].sum())
        out.append(
            Efficiency(
                m=plan.m,
                value=value,
                low=None if width is None else value - width,
                high=None if width is None else value + width,
                steps=len(own),
                mean_cost=float(np.mean([t.cost for t in own])),
            )
        )
    return out


def overlap(found: Sequence[Efficiency]) -> bool:
    """Whether the best two candidates cannot be told apart: their intervals overlap, or are not known."""
    known = sorted((e for e in found if e.low is not None), key=lambda e: e.value, reverse=True)
    return len(known) < len(found) or known[0].low < known[1].high


def choose(
    candidates: Sequence[Plan],
    trials: Sequence[Trial],
    schedule: Schedule,
    *,
    stage: int,
    search_cost: float,
    cheapest: Plan,
) -> Decision:
    """m* = argmax CE(m); where nothing is known, or no candidate lowered the loss, the cheapest: whatever is trained
    then, at least it costs little."""
    chosen, found = cheapest, []
    if not trials:
        reason = "a round of candidates costs more than schedule.search_share allows: not searched, cheapest candidate"
    else:
        found = efficiencies(candidates, trials, schedule)
        known = [i for i, e in enumerate(found) if e.value is not None]
        best = max(known, key=lambda i: (found[i].value, size(candidates[i])), default=None)
        if best is None:
            reason = "schedule.efficiency=paper needs two steps of a candidate, paid for was one: cheapest candidate"
        elif found[best].value > 0:
            chosen, reason = candidates[best], f"highest convergence efficiency of {len(trials)} trial steps"
        else:
            reason = f"no candidate lowered the held-out loss in {len(trials)} trial steps: cheapest candidate"
    return Decision(
        stage=stage,
        plan=chosen,
        candidates=tuple(candidates),
        efficiencies=tuple(found),
        reason=reason,
        search_cost=search_cost,
    )
