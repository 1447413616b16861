"""What a sweep's trials say: which settings matter, how the loss answers to each, what can be told apart from noise.

A forest of regression trees is fitted to (settings → held-out loss), again for every bootstrap sample of the trials.
The response to a setting is the forest's mean over the trials with that setting put to each of its values (partial
dependence), so that the other settings are averaged out; the bootstrap gives its interval. Seed noise is the spread
between trainings that differ in nothing but the seed.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ray.tune.search.sample import Categorical, Domain
from scipy.special import stdtrit

from entprog.config import Tune
from entprog.training import curves
from pipelines.sweeping import spaces
from pipelines.sweeping.spaces import Space

FEW = 6
"""Trials under which nothing is said of single settings."""
SHORT = 20
"""Steps of a training under which its loss says nothing."""
BOOTSTRAPS = 60
TREES = 25
POINTS = 15
"""Values of a range at which the response is drawn."""
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Evidence:
    """The trials that findings rest on."""

    settings: list[dict[str, Any]]
    losses: np.ndarray
    """Held-out loss of each trial, float [trials]."""
    label: str
    """What the losses are, in words."""
    share: float
    """Share of the budget after which they were measured."""
    seeds: int
    """Trainings that each of them is the mean of."""
    noise: float | None
    """Standard deviation of a training's such loss between seeds; None where no trial had two."""
    failed: list[dict[str, Any]]
    """Settings of the trials that failed, for whatever reason: they have no loss."""


def of_one_device(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """(trials that are ranked, those apart): the device that most finished trials ran on, and what has losses of
    another: at equal seconds these are those of the machine. Of an earlier version's trials the device is not known."""
    known = Counter(row["device"] for row in rows if row["status"] == "finished" and row.get("device"))
    if not known:
        return list(rows), []
    ((device, _),) = known.most_common(1)
    is_apart = [row["status"] != "failed" and row.get("device") not in (None, device) for row in rows]
    judged, apart = ([row for row, is_one in zip(rows, is_apart, strict=True) if is_one == of] for of in (False, True))
    return judged, apart


def of_devices(rows: Sequence[Row], apart: Sequence[Row]) -> str:
    """What is to be known where trials ran on unlike devices. rows: those that are ranked."""
    device = next(row["device"] for row in rows if row["status"] == "finished" and row.get("device"))
    others = "; ".join(f"{row['id']} on {row['device']}" for row in apart)
    return (
        f"{len(apart)} of {len(rows) + len(apart)} trials ran on another device than {device} ({others}): at equal "
        "seconds their losses are those of the machine, so they are not ranked, and what follows is without them. "
        "Beside them a trial may have been ended early that is good among its like: a sweep wants one kind of device."
    )


def pareto(rows: Sequence[Row], objectives: Sequence[str]) -> list[Row]:
    """The rows that no other beats: none is as small in every objective and smaller in one. A figure that a row lacks
    (a target never reached) counts as larger than any."""

    def values(row: Row) -> list[float]:
        return [math.inf if row[name] is None else row[name] for name in objectives]

    def beats(a: list[float], b: list[float]) -> bool:
        return all(x <= y for x, y in zip(a, b, strict=True)) and a != b

    return [row for row in rows if not any(beats(values(other), values(row)) for other in rows)]


def evidence(rows: Sequence[Row], space: Space, budget_s: float, settings: Tune) -> Evidence:
    """Final losses where no trial was stopped; otherwise all trials' losses at the latest decision that all passed.

    Stopped trials are those of bad values: fitted to the others alone a response would be flat where it rises most.
    """
    finished = [row for row in rows if row["status"] == "finished"]
    failed = [row["settings"] for row in rows if row["status"] == "failed" and row["settings"]]
    if not any(row["status"] == "stopped" for row in rows):
        losses = np.array([row["held_out_loss"] for row in finished])
        label = f"final held-out loss of {len(finished)} trials"
        given = [row["settings"] for row in finished]
        return Evidence(given, losses, label, 1.0, settings.seeds, seed_noise(rows), failed)
    alike = [row for row in rows if row["status"] in ("finished", "stopped") and row.get("seeds")]
    passed = [s for s in settings.decisions if all(row["seeds"][0]["curve"][-1][0] >= s * budget_s for row in alike)]
    share = passed[-1] if passed else settings.decisions[0]
    losses = np.array([curves.at(row["seeds"][0]["curve"], share * budget_s) for row in alike])
    label = f"held-out loss of {len(alike)} trials after {share * budget_s:.0f} charged seconds, of their first seed"
    several = [[curves.at(seed["curve"], share * budget_s) for seed in row["seeds"]] for row in finished]
    noise = pooled([(float(np.var(of_seeds, ddof=1)), len(of_seeds) - 1) for of_seeds in several if len(of_seeds) > 1])
    return Evidence([row["settings"] for row in alike], losses, label, share, 1, noise, failed)


def seed_noise(rows: Sequence[Row]) -> float | None:
    """Standard deviation of the loss between seeds, pooled over trials; None where no trial had two."""
    return pooled(_spreads(rows))


def _spreads(rows: Sequence[Row]) -> list[tuple[float, int]]:
    """(variance of the loss between seeds, degrees of freedom) of each trial that has several."""
    several = [row for row in rows if row.get("held_out_loss_std") is not None]
    return [(row["held_out_loss_std"] ** 2, len(row["seeds"]) - 1) for row in several]


def pooled(found: Sequence[tuple[float, int]]) -> float | None:
    """Standard deviation from (variance, degrees of freedom) of several samples; None for none."""
    freedom = sum(n for _, n in found)
    return math.sqrt(sum(variance * n for variance, n in found) / freedom) if freedom else None


# ---- importance and response ----


def importance(evidence: Evidence, space: Space) -> dict[str, float]:
    """Share of the loss's variance that each setting explains alone or with others (fANOVA by Optuna), largest first;
    {} for too few trials or equal losses."""
    import optuna
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances
    from ray.tune.search.optuna import OptunaSearch

    if len(evidence.losses) < FEW or np.ptp(evidence.losses) == 0:
        return {}
    distributions = OptunaSearch.convert_search_space(space)
    for name, of in distributions.items():
        if isinstance(of, optuna.distributions.FloatDistribution) and of.step:  # rounding may lie beside a multiple
            distributions[name] = optuna.distributions.FloatDistribution(of.low, max(of.high, space[name].upper))
    study = optuna.create_study(direction="minimize")
    for values, loss in zip(evidence.settings, evidence.losses, strict=True):
        study.add_trial(optuna.trial.create_trial(params=values, distributions=distributions, value=float(loss)))
    varied = [name for name in space if len({values[name] for values in evidence.settings}) > 1]
    found = get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0), params=varied)
    return {name: round(float(value), 6) for name, value in found.items()}


def _encode(space: Space, rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Settings → float [rows, columns]: numbers (their logarithm where the range is even over it), choices one-hot."""
    columns = []
    for name, domain in space.items():
        if isinstance(domain, Categorical):
            columns += [[float(row[name] == category) for row in rows] for category in domain.categories]
        else:
            columns.append([math.log(row[name]) if spaces.is_log(domain) else float(row[name]) for row in rows])
    return np.array(columns).T


def responses(evidence: Evidence, space: Space, noise: float) -> dict[str, dict[str, Any]]:
    """{setting: {"values", "mean", "low", "high", "best", "alike", "worse", "failed"}}; {} for too few trials.

    mean, low, high: the response and its 90 % interval. best: the value of the smallest mean. alike: the values that
    cannot be told from it: whose excess over it is within `noise` (of a difference between trials' means) or whose 90 %
    interval reaches 0. worse: {value: (excess, low, high)} of the others. failed: the value of each trial that failed
    where no trial has a loss: of a choice that no other trial had, of a range beyond the others'. `values` leaves them
    out, for there a forest goes on flat from the last trial that it knows.
    """
    from sklearn.ensemble import ExtraTreesRegressor

    count = len(evidence.losses)
    if count < FEW:
        return {}
    rng = np.random.default_rng(0)
    judged = {name: _judged(name, domain, evidence) for name, domain in space.items()}
    grids, failed = ({name: pair[place] for name, pair in judged.items()} for place in (0, 1))
    asked = [{**row, name: value} for name in space for value in grids[name] for row in evidence.settings]
    inputs, outputs = _encode(space, evidence.settings), _encode(space, asked)
    curves = []
    for number in range(BOOTSTRAPS):
        drawn = rng.integers(0, count, count)
        forest = ExtraTreesRegressor(TREES, min_samples_leaf=2, random_state=number)  # draws no second bootstrap
        forest.fit(inputs[drawn], evidence.losses[drawn])
        curves.append(forest.predict(outputs).reshape(-1, count).mean(1))
    curves = np.array(curves)  # [bootstrap, value of every setting]
    out, first = {}, 0
    for name, grid in grids.items():
        part = curves[:, first : first + len(grid)]
        first += len(grid)
        out[name] = _response(grid, part, noise) | {"failed": failed[name]}
    return out


def _judged(name: str, domain: Domain, evidence: Evidence) -> tuple[list[Any], list[Any]]:
    """Values of a setting at which its response is drawn, and those of failed trials that it says nothing of."""
    values = spaces.spread(domain, POINTS)
    known, lost = ([row[name] for row in rows] for rows in (evidence.settings, evidence.failed))
    if isinstance(domain, Categorical):
        return [v for v in values if v in known], [v for v in lost if v not in known]
    low, high = min(known), max(known)
    below, above = sorted(v for v in lost if v < low), sorted(v for v in lost if v > high)
    inside = {v for v in values if not ((below and v < low) or (above and v > high))}
    return sorted({*inside, *([low] if below else []), *([high] if above else [])}), below + above


def _response(grid: Sequence[Any], curves: np.ndarray, noise: float) -> dict[str, Any]:
    mean = curves.mean(0)
    best = int(mean.argmin())
    excess = curves - curves[:, [best]]
    low, middle, high = np.quantile(excess, 0.05, 0), excess.mean(0), np.quantile(excess, 0.95, 0)
    alike = (middle <= noise) | (low <= 0)
    return {
        "values": list(grid),
        "mean": mean.tolist(),
        "low": np.quantile(curves, 0.05, 0).tolist(),
        "high": np.quantile(curves, 0.95, 0).tolist(),
        "best": grid[best],
        "alike": [value for value, same in zip(grid, alike, strict=True) if same],
        "worse": [
            {"value": value, "excess": float(m), "low": float(lo), "high": float(hi)}
            for value, same, m, lo, hi in zip(grid, alike, middle, low, high, strict=True)
            if not same
        ],
    }


# ---- in words ----


def findings(evidence: Evidence, space: Space, best: Row, rows: Sequence[Row], seeds: int) -> dict[str, Any]:
    """Importance, responses, seed noise, and a recommendation in sentences, each with its uncertainty."""
    noise = seed_noise(rows)
    difference = 0.0 if evidence.noise is None else evidence.noise * math.sqrt(2 / evidence.seeds)
    found = responses(evidence, space, difference)
    shares = importance(evidence, space)
    lines = [_headline(best, rows, noise, seeds)]
    lines.append(
        "Seed noise is unknown (one seed): another seed may change any of this; give --seeds 3 to see it."
        if noise is None
        else f"Seed noise: losses of equal settings differ by {noise:.2g} (standard deviation between seeds)."
    )
    if evidence.failed:
        lines.append(
            f"{len(evidence.failed)} of {len(rows)} trials failed: they have no loss, so that shares of the variance "
            "are those of the others."
        )
    if not found:
        lines.append(f"{len(evidence.losses)} trials are too few to say which settings matter ({FEW} are needed).")
    else:
        lines.append(f"What follows rests on the {evidence.label}; intervals are 90 %, by bootstrap over trials.")
        if evidence.share < 1:
            lines.append(
                f"That is after {evidence.share:.0%} of the budget, the last that stopped trials have a loss of: what "
                "a setting does later, as a cooldown does, is not in it (tune.early_stop=false trains all to the end)."
            )
    short = [row["id"] for row in rows if row["status"] == "finished" and min(s["steps"] for s in row["seeds"]) < SHORT]
    if short:
        lines.append(
            f"{len(short)} trials made fewer than {SHORT} steps: the budget (--seconds) is too short to judge."
        )
    order = sorted(found, key=lambda name: -shares.get(name, 0.0))
    lines += [in_words(name, found[name], space, shares.get(name), noise is not None) for name in order]
    return {"importance": shares, "responses": found, "seed_noise": noise, "recommendation": lines}


def _headline(best: Row, rows: Sequence[Row], noise: float | None, seeds: int) -> str:
    """The best trial against the runner-up: beyond seed noise is what 19 of 20 pairs of equal trials differ by less
    than, by Student's t, for the noise itself is known from few trials."""
    others = [r for r in rows if r["status"] == "finished" and r["id"] != best["id"]]
    said = f"Best: trial {best['id']}, held-out loss {best['held_out_loss']:.5g}"
    if not others:
        return f"{said}; no other trial finished, so there is nothing to compare it with."
    second = min(others, key=lambda row: row["held_out_loss"])
    gap = second["held_out_loss"] - best["held_out_loss"]
    if gap < 0:
        return f"{said}, best in the first objective; trial {second['id']} has a loss {-gap:.2g} lower."
    if noise is None:
        return f"{said}, {gap:.2g} below the next ({second['id']}); with one seed that may be chance."
    within = stdtrit(sum(freedom for _, freedom in _spreads(rows)), 0.975) * noise * math.sqrt(2 / seeds)
    alike = [r for r in others if r["held_out_loss"] - best["held_out_loss"] <= within]
    if alike:
        return f"{said}; {len(alike)} of {len(others)} other finished trials are no worse beyond seed noise."
    return f"{said}, {gap:.2g} below the next ({second['id']}), beyond seed noise."


def in_words(name: str, response: Mapping[str, Any], space: Space, share: float | None, known_noise: bool) -> str:
    """'schedule.cei_threshold: 0.1–0.3 makes no difference beyond seed noise; 0.5 costs 0.012 (0.004 to 0.02).'"""
    beyond = "beyond seed noise" if known_noise else "beyond what these trials can tell"
    explains = f" (explains {share:.0%} of the variance)" if share is not None else ""
    alike, worse, failed = response["alike"], response["worse"], response["failed"]
    if not worse and not failed:
        return f"{name}{explains}: no value makes a difference {beyond}; keep what you have."
    if isinstance(space[name], Categorical):
        same = " or ".join(_text(value) for value in alike)
        kept = f"{same} make no difference {beyond}" if len(alike) > 1 else f"take {same}"
        lost = [f"{_text(value)}, with which {_all(count)} failed" for value, count in Counter(failed).items()]
    else:
        low, high = _around(response)
        kept = f"about {_text(low)}" if low == high else f"{_text(low)}–{_text(high)} makes no difference {beyond}"
        first, last = response["values"][0], response["values"][-1]
        sides = {"below": (first, sum(v < first for v in failed)), "above": (last, sum(v > last for v in failed))}
        lost = [f"{side} {_text(v)}, where {_all(count)} failed" for side, (v, count) in sides.items() if count]
    said = [f"{name}{explains}: {kept}"]
    if worse:
        most = max(worse, key=lambda item: item["excess"])
        interval = f"{most['low']:.2g} to {most['high']:.2g}"
        costs = "costs" if known_noise else "in this one seed seems to cost"
        said.append(f"{_text(most['value'])} {costs} {most['excess']:.2g} more loss ({interval})")
    if failed:
        said.append(f"not judged: {' and '.join(lost)}")
    return "; ".join(said) + "."


def _all(trials: int) -> str:
    return f"all {trials} trials" if trials > 1 else "the one trial"


def _around(response: Mapping[str, Any]) -> tuple[Any, Any]:
    """Ends of the unbroken range around the best value whose values are alike."""
    values = response["values"]
    at = values.index(response["best"])
    low = high = at
    while low > 0 and values[low - 1] in response["alike"]:
        low -= 1
    while high + 1 < len(values) and values[high + 1] in response["alike"]:
        high += 1
    return values[low], values[high]


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
