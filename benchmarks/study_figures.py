"""From the study's records to its figures: medians, bootstrap intervals over seeds, rank correlations.

Everything is paired by seed: an arm's seed is compared with full training's run of the same seed, which saw the same
clips with the same noise. An interval resamples seeds (Efron 1979); with three of them it cannot leave what they span,
and holds the truth less often than its 95 % say.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.study_arms import ARMS, TASKS, Scale
from benchmarks.study_units import Unit
from entprog.training import curves

CONFIDENCE = 0.95
RESAMPLES = 2000
SHOWN = ("task", "arm", "seeds", "held_out_loss", "against_full", "ratio", "memory_ratio", "overhead")
"""Figures on the terminal."""
Records = Mapping[Unit, Mapping[str, Any]]
Curve = Sequence[Mapping[str, float]]


def summary(scale: Scale, records: Records) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(a row for every arm of every task, everything else that the result file holds)."""
    tasks = {task: found for task in scale.tasks if (found := arms(task, records))}
    rows = [_row(task, name, arm) for task, found in tasks.items() for name, arm in found.items()]
    if not rows:
        return [], {}
    first = next(iter(tasks))
    return rows, {
        "clock": scale.clock,
        "clock_is": "counted FLOPs of training, search and scoring" if scale.clock == "flops" else "charged seconds",
        "budget": f"what full training takes for {scale.full_steps} steps",
        "confidence": CONFIDENCE,
        "commits": sorted({record["commit"] for record in records.values()}),
        "arms": tasks[first],
        "tasks": {task: found for task, found in tasks.items() if task != first},
        "bases": {TASKS[u.task].family: _without_commit(r) for u, r in records.items() if u.kind == "base"},
        "cei": {task: cei(task, records) for task in scale.tasks if _of(records, "scores", task)},
        "hindsight": hindsight(records),
        "residual": residual(records),
        "tuning": tuning(records),
        "tuning_batches": tuning(records, "batch"),
        "steps": scale.full_steps,
    }


def _without_commit(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != "commit"}


def _of(records: Records, kind: str, task: str) -> dict[Unit, Mapping[str, Any]]:
    return {unit: record for unit, record in records.items() if (unit.kind, unit.task) == (kind, task)}


def _row(task: str, name: str, arm: Mapping[str, Any]) -> dict[str, Any]:
    ratio, difference = arm["time_to_full_loss_ratio"], arm["loss_minus_full"]
    return {
        "task": task,
        "arm": name,
        "seeds": len(arm["seeds"]),
        "held_out_loss": arm["held_out_loss"],
        "against_full": spread(difference),
        "ratio": spread(ratio, ".2f"),
        "memory_ratio": arm["memory_over_full"],
        "overhead": arm["overhead"],
    }


# ---- arms ----


def arms(task: str, records: Records) -> dict[str, dict[str, Any]]:
    """Name → figures of every arm of a task, of the seeds that full training has finished too."""
    runs = {(unit.arm, unit.seed): record for unit, record in _of(records, "run", task).items()}
    full = {seed: record for (arm, seed), record in runs.items() if arm == "full"}
    if not full:
        return {}
    tries = [(unit.batch, r) for unit, r in _of(records, "tune", task).items() if unit.arm == "full"]
    plain = {batch: r["peak_memory_bytes"] for batch, r in [*tries, *((r["batch"], r) for r in full.values())]}
    out = {}
    for name in ARMS:
        mine = {seed: runs[name, seed] for seed in sorted(full) if (name, seed) in runs}
        if mine:
            out[name] = _arm(name, mine, full, plain)
    return out


def _arm(name: str, mine: Mapping[int, Any], full: Mapping[int, Any], plain: Mapping[int, int]) -> dict[str, Any]:
    """plain: batch → bytes that full training takes with it, as far as it was tried."""
    seeds = list(mine)
    records = list(mine.values())
    losses = [record["held_out_loss"] for record in records]
    return {
        "title": ARMS[name].title,
        "seeds": seeds,
        "learning_rate": records[0]["rate"],
        "batch_size": records[0]["batch"],
        "held_out_loss": float(np.mean(losses)),
        "held_out_losses": losses,
        "loss_minus_full": over_seeds([r["held_out_loss"] - full[s]["held_out_loss"] for s, r in mine.items()]),
        "time_to_full_loss_ratio": over_seeds([sooner(r["curve"], full[s]["curve"], "spent") for s, r in mine.items()])
        | {"reached": sum(reached(r["curve"], full[s]["curve"]) for s, r in mine.items())},
        "time_to_full_loss_ratio_cpu": over_seeds(
            [sooner(r["curve"], full[s]["curve"], "cpu_s") for s, r in mine.items()]
        ),
        "seconds": _median([record["seconds"] for record in records]),
        "cpu_seconds": _median([record["cpu_s"] for record in records]),
        "steps": float(np.median([record["steps"] for record in records])),
        "peak_memory_bytes": max(record["peak_memory_bytes"] for record in records),
        "memory_over_full": float(
            np.median([r["peak_memory_bytes"] / full[s]["peak_memory_bytes"] for s, r in mine.items()])
        ),
        "memory_over_full_of_same_batch": max(r["peak_memory_bytes"] for r in records) / plain[records[0]["batch"]]
        if records[0]["batch"] in plain
        else None,
        "overhead": float(np.mean([record["overhead"] for record in records])),
        "trained_blocks": [record["trained_blocks"] for record in records],
        "backwards": [[decision["backward"] for decision in record["decisions"]] for record in records],
        "quality": _quality(records),
        "curves": [record["curve"] for record in records],
    }


def _median(seconds: Sequence[float | None]) -> float | None:
    """None where a machine was busy, so that not all were kept."""
    return None if None in seconds else float(np.median(seconds))


def _quality(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Metric → mean over seeds, each seed's, and the card, which all share."""
    out = {}
    for figures in zip(*(record["quality"] for record in records), strict=True):
        values = [figure["value"] for figure in figures]
        out[figures[0]["metric"]] = {**over_seeds(values), "card": figures[0]["card"]}
    return out


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """Median with its bootstrap interval, mean, and the seeds' own values; None where no seed has one, or this seed."""
    by_seed = [float(value) if math.isfinite(value) else None for value in values]
    found = np.asarray([value for value in values if math.isfinite(value)], float)
    if not len(found):
        return dict.fromkeys(("median", "low", "high", "mean")) | {"by_seed": by_seed}
    picks = np.random.default_rng(0).integers(len(found), size=(RESAMPLES, len(found)))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.median(found[picks], axis=1), [tail, 1 - tail])
    return {
        "median": float(np.median(found)), "low": float(low), "high": float(high), "mean": float(found.mean()),
        "by_seed": by_seed,
    }  # fmt: skip


def spread(figure: Mapping[str, Any], digits: str = "+.4f") -> str:
    """A median with its interval, in words."""
    if figure["median"] is None:
        return "–"
    return "{} [{}, {}]".format(*(format(figure[name], digits) for name in ("median", "low", "high")))


def crossing(curve: Curve, target: float, name: str) -> float | None:
    """Where a curve first comes down to a loss, in `name`; None if it never does."""
    return curves.crossing([(point[name], point["loss"]) for point in curve], target)


def reached(curve: Curve, full: Curve) -> bool:
    """Whether an arm came down to full training's final loss."""
    return crossing(curve, full[-1]["loss"], "spent") is not None


def sooner(curve: Curve, full: Curve, name: str) -> float:
    """Full training's time to its final loss ÷ the arm's, all its costs paid: above 1 the arm is sooner.

    Where the arm never gets there, both are timed at the lowest loss that the arm reached; 0 if it never improved, and
    NaN where full training did not: there is nothing to time; or where seconds were not kept.
    """
    target = full[-1]["loss"]
    if target >= full[0]["loss"] or any(point[name] is None for point in (*curve, *full)):
        return math.nan
    if not reached(curve, full):
        target = min(point["loss"] for point in curve)
        if target >= curve[0]["loss"]:
            return 0.0
    mine, others = crossing(curve, target, name), crossing(full, target, name)
    return (others if others is not None else full[-1][name]) / mine if mine else float("inf")


# ---- scores, choices, gradients ----


def cei(task: str, records: Records) -> dict[str, Any]:
    """CEI beside the loss increase on skip, on the base, over seeds of draws."""
    tables = list(_of(records, "scores", task).values())
    names = [block["name"] for block in tables[0]["blocks"]]

    def mean(name: str) -> list[float]:
        return np.mean([[block[name] for block in table["blocks"]] for table in tables], axis=0).tolist()

    def tau(of: Callable[[Mapping[str, Any]], float]) -> dict[str, Any]:
        return over_seeds([of(table) for table in tables])

    return {
        "family": TASKS[task].family,
        "blocks": names,
        "pi": mean("pi_std"),
        "loss_increase": mean("loss_increase"),
        "draws": tables[0]["conditions"] * tables[0]["draws"],
        "tau_signed_to_loss": tau(lambda table: table["loss_tau"]["signed"]),
        "tau_absolute_to_loss": tau(lambda table: table["loss_tau"]["absolute"]),
        "tau_signed_to_absolute": tau(lambda table: table["signed_absolute_tau"]),
        "tau_halves": tau(lambda table: table["halves_tau"]),
    }


def hindsight(records: Records) -> dict[str, Any]:
    """Arm → how often its search chose what would have ended the stage with the lowest loss, and what it lost by it."""
    out: dict[str, Any] = {}
    for unit, record in records.items():
        if unit.kind != "hindsight" or not record["candidates"]:
            continue
        losses = [candidate["loss"] for candidate in record["candidates"]]
        chosen = next(c for c in record["candidates"] if c["chosen"])
        best = min(record["candidates"], key=lambda c: c["loss"])
        one = {
            "stage": unit.stage,
            "seed": unit.seed,
            "searched": record["searched"],
            "candidates": len(losses),
            "chosen": {name: chosen.get(name) for name in ("m", "backward", "shape", "loss")},
            "best": {name: best.get(name) for name in ("m", "backward", "shape", "loss")},
            "shapes": len({candidate.get("shape") for candidate in record["candidates"]}),
            "regret": chosen["loss"] - best["loss"],
            "spread": max(losses) - min(losses),
            "place": 1 + sum(loss < chosen["loss"] for loss in losses),
        }
        out.setdefault(unit.arm, []).append(one)
    return {
        arm: {
            "choices": len(found),
            "best": sum(one["place"] == 1 for one in found),
            "by_chance": float(sum(1 / one["candidates"] for one in found)),
            "regret": float(np.mean([one["regret"] for one in found])),
            "spread": float(np.mean([one["spread"] for one in found])),
            "decisions": found,
        }
        for arm, found in out.items()
    }


def residual(records: Records) -> dict[str, Any]:
    """What the residual gradient costs: the same blocks trained with both backwards from the same weights."""
    same_steps, same_cost, steps = [], [], []
    for unit, record in records.items():
        if unit.kind != "hindsight":
            continue
        found = {(tuple(c["trained"]), c.get("shape"), c["backward"]): c for c in record["candidates"]}
        for (trained, shape, backward), one in found.items():
            other = found.get((trained, shape, "exact"))
            if (
                backward == "residual"
                and other
                and None not in (one["loss_at_same_steps"], other["loss_at_same_steps"])
            ):
                same_steps.append(one["loss_at_same_steps"] - other["loss_at_same_steps"])
                same_cost.append(one["loss"] - other["loss"])
                steps.append(one["steps"] / max(other["steps"], 1))
    if not same_steps:
        return {"pairs": 0}
    return {
        "pairs": len(same_steps),
        "loss_minus_exact_at_same_steps": over_seeds(same_steps),
        "loss_minus_exact_at_same_cost": over_seeds(same_cost),
        "steps_over_exact_at_same_cost": float(np.mean(steps)),
    }


def tuning(records: Records, by: str = "rate") -> dict[str, Any]:
    """Task → arm → learning rate (before the arm's factor), or batch → the lowest loss that it gave with any batch, or
    rate, on the clips that these are judged by."""
    out: dict[str, Any] = {}
    for unit, record in records.items():
        if unit.kind == "tune" and record["held_out_loss"] is not None:  # None: it diverged
            tried = out.setdefault(unit.task, {}).setdefault(unit.arm, {})
            value = str(getattr(unit, by))
            tried[value] = min(tried.get(value, math.inf), record["held_out_loss"])
    return out
