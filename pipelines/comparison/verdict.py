"""What groups of runs say against a baseline: time to a target loss, with intervals over seeds, and a true sentence.

Ratios of times are geometric means over seeds, and their intervals are Student's t on the logarithms: paired where both
groups have the same seeds, Welch's otherwise. With three seeds, the usual number here, a percentile bootstrap can never
leave the range of the values seen: it would hold the truth in some 75 % of cases, not 95 %.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from entprog.errors import UserError
from entprog.training import curves
from pipelines.comparison.groups import Group
from pipelines.comparison.runs import Point, Training


@dataclass(frozen=True)
class Estimate:
    """A value over seeds; without an interval where one seed alone has it."""

    value: float
    low: float | None
    high: float | None
    seeds: int


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A group against the baseline."""

    group: Group
    loss: Estimate | None
    """Final held-out loss; None where no run counts."""
    equal_seconds_loss: Estimate | None
    """Held-out loss after `Verdict.equal_s` charged seconds."""
    equal_seconds_loss_difference: Estimate | None
    """The same minus the baseline's; None for the baseline."""
    reached: int
    """Runs that reached the target loss, of those that count."""
    seconds_to_target: Estimate | None
    """Charged seconds to it; None unless every run reached it."""
    steps_to_target: Estimate | None
    ratio: Estimate | None
    """Baseline's seconds to the target ÷ this group's: the net speed-up, search and scoring paid. None unless all runs
    reached it."""
    ratio_at_most: float | None
    """Where not all reached it: the ratio if they had done so just when they ended."""
    break_even_s: float | None
    """Charged seconds from which on its mean loss stays below the baseline's; None: not within the runs."""
    break_even_step: float | None
    """Mean step at which cheaper steps had paid for search and scoring; None unless every run got there."""
    overhead: float | None
    """Share of the charged seconds that went into search and scoring."""
    seconds: float | None
    """Mean charged seconds of a run."""
    steps: float | None
    flops: float | None
    """Mean counted FLOPs of a run."""
    peak_memory_bytes: float | None
    """Highest peak memory of the group's runs."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The comparison: the baseline first, then the lowest loss at equal seconds."""

    target_loss: float
    target_is: str
    """Where the target comes from."""
    equal_s: float
    """Charged seconds that every counted run has spent."""
    confidence: float
    """Confidence of every interval before the correction for several comparisons."""
    level: float
    """Confidence of intervals against the baseline: higher where several groups are compared with it (Bonferroni)."""
    judged: tuple[Judged, ...]

    @property
    def baseline(self) -> Judged:
        return self.judged[0]

    @property
    def best(self) -> Judged | None:
        """The group, other than the baseline, that reaches the target soonest, else the one of lowest loss."""
        others = [j for j in self.judged[1:] if j.loss is not None]
        sooner = [j for j in others if j.ratio is not None]
        if sooner:
            return max(sooner, key=lambda j: j.ratio.value)
        return min(others, key=lambda j: j.equal_seconds_loss.value, default=None)


def judge(groups: Sequence[Group], target_loss: float | None, confidence: float) -> Verdict:
    """Compare groups with the first one, the baseline.

    target_loss: None for the highest final loss among the baseline's seeds, which each of them has reached.
    Raises UserError if no target can be had because no run of the baseline has ended well.
    """
    baseline = groups[0]
    counted = [run for group in groups for run in group.counted]
    if target_loss is None and not baseline.counted:
        raise UserError(
            f"no run of the baseline {baseline.label!r} has finished with a finite loss: wait for it, give "
            "--target-loss, or another --baseline"
        )
    if not counted:
        raise UserError("none of the runs has finished with a finite loss: there is nothing to compare yet")
    if target_loss is None:
        target_loss = max(run.curve[-1].loss for run in baseline.counted)
        seeds = len(baseline.counted)
        target_is = f"final loss of {baseline.label}" + (f", the highest of its {seeds} runs" if seeds > 1 else "")
    else:
        target_is = "given with --target-loss"
    equal_s = min(run.curve[-1].charged_s for run in counted)
    others = sum(bool(group.counted) for group in groups[1:])
    level = 1 - (1 - confidence) / max(others, 1)
    judged = tuple(_judged(group, baseline, target_loss, equal_s, confidence, level) for group in groups)
    first, *others = judged
    others.sort(key=lambda j: math.inf if j.equal_seconds_loss is None else j.equal_seconds_loss.value)
    return Verdict(
        target_loss=target_loss,
        target_is=target_is,
        equal_s=equal_s,
        confidence=confidence,
        level=level,
        judged=(first, *others),
    )


def _judged(group: Group, baseline: Group, target: float, equal_s: float, confidence: float, level: float) -> Judged:
    runs, is_baseline = group.counted, group is baseline
    seconds = [curves.crossing(on(run.curve, "charged_s"), target) for run in runs]
    reached = sum(s is not None for s in seconds)
    whole = bool(runs) and reached == len(runs)
    steps = [curves.crossing(on(run.curve, "step"), target) for run in runs]
    base_seconds = [curves.crossing(on(run.curve, "charged_s"), target) for run in baseline.counted]
    comparable = not is_baseline and bool(base_seconds) and None not in base_seconds and bool(runs)
    ratio = at_most = None
    if comparable and whole:
        ratio = ratio_of(_by_seed(baseline.counted, base_seconds), _by_seed(runs, seconds), level)
    elif comparable:
        ended = [run.curve[-1].charged_s if s is None else s for run, s in zip(runs, seconds, strict=True)]
        at_most = _geometric(base_seconds) / _geometric(ended)
    here = [curves.at(on(run.curve, "charged_s"), equal_s) for run in runs]
    base_here = [curves.at(on(run.curve, "charged_s"), equal_s) for run in baseline.counted]
    difference = None
    if not is_baseline and here and base_here:
        difference = difference_of(_by_seed(runs, here), _by_seed(baseline.counted, base_here), level)
    return Judged(
        group=group,
        loss=over_seeds(runs, [run.curve[-1].loss for run in runs], confidence),
        equal_seconds_loss=over_seeds(runs, here, confidence),
        equal_seconds_loss_difference=difference,
        reached=reached,
        seconds_to_target=_typical(runs, seconds, confidence) if whole else None,
        steps_to_target=_typical(runs, steps, confidence) if whole else None,
        ratio=ratio,
        ratio_at_most=at_most,
        break_even_s=None if is_baseline else break_even(runs, baseline.counted),
        break_even_step=_mean_of_all([run.figures.get("break_even_step") for run in runs]),
        overhead=_overhead(runs),
        seconds=_mean([run.figures.get("seconds") for run in runs]),
        steps=_mean([run.figures.get("steps") for run in runs]),
        flops=_mean([run.figures.get("flops") for run in runs]),
        peak_memory_bytes=max((run.figures.get("peak_memory_bytes", 0) for run in runs), default=0) or None,
    )


# ---- curves ----


def on(curve: Sequence[Point], axis: str) -> list[tuple[float, float]]:
    """(place on `charged_s` or `step`, loss) of every measurement; a loss that is no number is none."""
    return [(float(getattr(point, axis)), point.loss) for point in curve if math.isfinite(point.loss)]


def mean_curve(runs: Sequence[Training], axis: str) -> tuple[np.ndarray, np.ndarray]:
    """The mean of several runs' losses where all of them have one: (places on the axis, losses)."""
    drawn = [on(run.curve, axis) for run in runs]
    if not drawn or not all(drawn):
        return np.empty(0), np.empty(0)
    start, end = max(c[0][0] for c in drawn), min(c[-1][0] for c in drawn)
    inside = {x for c in drawn for x, _ in c if start <= x <= end}
    places = np.array(sorted(inside | ({start, end} if start <= end else set())))
    losses = [np.interp(places, *np.array(c).T) for c in drawn]
    return places, np.mean(losses, axis=0)


def break_even(runs: Sequence[Training], baseline: Sequence[Training]) -> float | None:
    """Charged seconds from which on the mean loss of `runs` stays below the baseline's; None: not within both."""
    ours, theirs = mean_curve(runs, "charged_s"), mean_curve(baseline, "charged_s")
    if not len(ours[0]) or not len(theirs[0]):
        return None
    start, end = max(ours[0][0], theirs[0][0]), min(ours[0][-1], theirs[0][-1])
    if start >= end:
        return None
    places = np.unique(np.clip(np.concatenate([ours[0], theirs[0], [start, end]]), start, end))
    ahead = np.interp(places, *theirs) - np.interp(places, *ours)
    if ahead[-1] <= 0:
        return None
    behind = np.flatnonzero(ahead <= 0)
    if not len(behind):
        return float(start)
    last = behind[-1]
    share = -ahead[last] / (ahead[last + 1] - ahead[last])
    return float(places[last] + share * (places[last + 1] - places[last]))


# ---- intervals over seeds ----

BySeed = list[tuple[int, float]]


def _by_seed(runs: Sequence[Training], values: Sequence[float]) -> BySeed:
    """The values by seed, each seed once: of one that was run several times the mean, for that tells of chance no more
    than one run does."""
    of: dict[int, list[float]] = {}
    for run, value in zip(runs, values, strict=True):
        of.setdefault(run.seed, []).append(value)
    return sorted((seed, float(np.mean(several))) for seed, several in of.items())


def over_seeds(runs: Sequence[Training], values: Sequence[float], confidence: float) -> Estimate | None:
    """Mean over the runs' seeds with Student's t interval; None for no values."""
    return mean_of([value for _, value in _by_seed(runs, values)], confidence)


def mean_of(values: Sequence[float], confidence: float) -> Estimate | None:
    """Mean with Student's t interval; None for no values."""
    if not values:
        return None
    if len(values) == 1:
        return Estimate(float(values[0]), None, None, 1)
    found = stats.ttest_1samp(values, 0.0).confidence_interval(confidence) if np.ptp(values) else None
    mean = float(np.mean(values))
    low, high = (float(found.low), float(found.high)) if found else (mean, mean)
    return Estimate(mean, low, high, len(values))


def _typical(runs: Sequence[Training], values: Sequence[float], confidence: float) -> Estimate | None:
    """Geometric mean over the runs' seeds, with Student's t interval on the logarithms: for times, which no interval
    may take below zero."""
    return _exp(over_seeds(runs, [math.log(v) for v in values], confidence))


def difference_of(a: BySeed, b: BySeed, confidence: float) -> Estimate:
    """Mean of a minus mean of b, each seed once: paired where both have the same ones, else Welch's."""
    seeds_a, seeds_b = [seed for seed, _ in a], [seed for seed, _ in b]
    x, y = np.array([v for _, v in a]), np.array([v for _, v in b])
    paired = seeds_a == seeds_b
    value, seeds = float(x.mean() - y.mean()), min(len(x), len(y))
    if seeds < 2:
        return Estimate(value, None, None, seeds)
    if (paired and not np.ptp(x - y)) or (not paired and not np.ptp(x) and not np.ptp(y)):
        return Estimate(value, value, value, seeds)
    test = stats.ttest_rel(x, y) if paired else stats.ttest_ind(x, y, equal_var=False)
    found = test.confidence_interval(confidence)
    return Estimate(value, float(found.low), float(found.high), seeds)


def ratio_of(baseline: BySeed, group: BySeed, confidence: float) -> Estimate:
    """Geometric mean of the baseline's values ÷ the group's."""
    return _exp(difference_of(*([(seed, math.log(v)) for seed, v in part] for part in (baseline, group)), confidence))


def _exp(logs: Estimate | None) -> Estimate | None:
    """An estimate of logarithms as one of what they are of."""
    if logs is None:
        return None
    return Estimate(*(None if v is None else math.exp(v) for v in (logs.value, logs.low, logs.high)), logs.seeds)


def _geometric(values: Sequence[float]) -> float:
    return math.exp(float(np.mean(np.log(values))))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else None


def _mean_of_all(values: Sequence[float | None]) -> float | None:
    return None if None in values else _mean(values)


def _overhead(runs: Sequence[Training]) -> float | None:
    shares = [
        (run.figures.get("search_seconds", 0.0) + run.figures.get("score_seconds", 0.0)) / run.figures["seconds"]
        for run in runs
        if run.figures.get("seconds") and "search_seconds" in run.figures
    ]
    return _mean(shares)
