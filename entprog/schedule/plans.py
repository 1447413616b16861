"""Plans: what a stage trains, and how gradient crosses the rest (Ent-Prog §3.3, eq. of ψ_k)."""

import bisect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from entprog.blocks import Block
from entprog.config import Backward, ClipShape, Ladder, Row, Schedule, Smaller
from entprog.cost.model import CostModel
from entprog.errors import UserError
from entprog.records import Record
from entprog.schedule import budget, rotation


@dataclass(frozen=True, kw_only=True)
class Plan(Record):
    """What one stage trains."""

    trainable: tuple[str, ...]
    """Names of the trained blocks, in the network's order."""
    backward: Backward
    """How gradient crosses the frozen blocks."""
    shape: ClipShape
    """Shape of the clips it trains on."""

    @property
    def m(self) -> int:
        """Number of trained blocks."""
        return len(self.trainable)


def eligible(found: Sequence[Block], which: Literal["all", "spatial", "temporal", "control"]) -> list[str]:
    """Names of the blocks that may be trained (`schedule.blocks`); all where none is spatial, or temporal. Raises
    UserError where there is no control branch."""
    some = [block.name for block in found if which in ("all", block.kind)]
    if which == "control" and not some:
        raise UserError(
            "schedule.blocks=control: this network has no control branch (VACE bases, model.family=wan_vace, have "
            "one): leave it out"
        )
    return some or [block.name for block in found]


def full(names: Sequence[str], shape: ClipShape) -> Plan:
    """Plain training: every block that may be trained, the exact gradient."""
    return Plan(trainable=tuple(names), backward="exact", shape=shape)


def top(m: int, names: Sequence[str], priority: Mapping[str, float], schedule: Schedule, shape: ClipShape) -> Plan:
    """The plan of ψ_k: the m blocks of highest priority."""
    return of_set(best(m, names, priority), names, schedule.backwards[0], shape)


def best(m: int, among: Sequence[str], priority: Mapping[str, float]) -> list[str]:
    """ψ_k = argmax over |ψ| = m of Σ_{b ∈ ψ} π_b, of the blocks in `among`; ties go to the earlier block."""
    return sorted(among, key=lambda name: -priority[name])[:m]


def of_set(
    chosen: Collection[str], names: Sequence[str], backward: Backward, shape: ClipShape, others: int = 0
) -> Plan:
    """The plan that trains some blocks; where that is every block there is, plain training, whatever the backward.

    names: of the blocks that may be trained; others: number of those that never are (`schedule.blocks`).
    """
    if len(chosen) == len(names) and not others:
        return full(names, shape)
    chosen = set(chosen)
    return Plan(trainable=tuple(n for n in names if n in chosen), backward=backward, shape=shape)


def count(fraction: float, of: int) -> int:
    """A fraction of the blocks, at least one."""
    return max(1, round(fraction * of))


def rows(schedule: Schedule) -> tuple[Row, ...]:
    """Stages with the share of the budget at which each ends, and what the settings alone say of them. What a search
    decides, and what LISA and BAdam draw, is not in a row."""
    if schedule.kind == "full":
        return (Row(until=1.0),)
    if schedule.kind == "progressive":
        return schedule.table
    ends = [(stage + 1) / schedule.stages for stage in range(schedule.stages)]
    if schedule.kind == "entprog":
        return tuple(Row(until=end) for end in ends)
    shares = {"linear": ends, "lisa": [schedule.lisa_share] * schedule.stages, "badam": [1.0] * schedule.stages}
    clips = [_growing(schedule, stage) for stage in range(schedule.stages)]
    return tuple(
        Row(until=end, share=share, frames=smaller.frames, shrink=smaller.shrink)
        for end, share, smaller in zip(ends, shares[schedule.kind], clips, strict=True)
    )


def _growing(schedule: Schedule, stage: int) -> Smaller:
    """Clips of a stage of a schedule that goes through its shapes evenly and ends with whole clips."""
    steps = [*schedule.shapes, Smaller()]
    return steps[-(-(stage + 1) * len(steps) // schedule.stages) - 1]


def ranks(schedule: Schedule, stage: int) -> bool:
    """Whether stage `stage` (0-based) needs to know which blocks matter most: in a search, or by its row."""
    return schedule.needs_scores and (schedule.kind == "entprog" or rows(schedule)[stage].ranks)


def stage_at(schedule: Schedule, progress: float) -> int:
    """The stage (0-based) in which a run is that has used this share of its budget."""
    ends = [row.until for row in rows(schedule)]
    return min(bisect.bisect_right(ends, progress), len(ends) - 1)


def drawn(
    row: Row,
    names: Sequence[str],
    priority: Mapping[str, float],
    schedule: Schedule,
    shape: ClipShape,
    seed: Sequence[int],
    others: int = 0,
) -> Plan:
    """The plan of a row of the table. shape: of whole clips; seed: of this draw; others: as `of_set` has it."""
    m = count(row.share, len(names))
    if row.choose == "top":
        chosen = best(m, names, priority)
    elif row.choose == "random":
        chosen = rotation.uniform(names, m, seed)
    else:
        chosen = rotation.weighted(names, m, seed, priority)
    return of_set(chosen, names, row.backward or schedule.backwards[0], row.of(shape), others)


def fixed(
    names: Sequence[str],
    priority: Mapping[str, float],
    schedule: Schedule,
    shape: ClipShape,
    stage: int,
    draw: int = 0,
    seed: int = 0,
    others: int = 0,
) -> Plan | None:
    """What stage `stage` (0-based) of a schedule without a search trains; None for one that searches.

    shape: of whole clips. draw: how often the stage has drawn its blocks before (`Row.redraw_every`). others: as
    `of_set` has it.
    """
    if schedule.kind == "entprog":
        return None
    row = rows(schedule)[stage]
    if schedule.kind in rotation.KINDS:
        chosen = rotation.KINDS[schedule.kind](names, schedule, stage, seed)
        return of_set(chosen, names, schedule.backwards[0], row.of(shape), others)
    return drawn(row, names, priority, schedule, shape, [seed, stage, draw], others)


def candidates(
    names: Sequence[str],
    priority: Mapping[str, float],
    schedule: Schedule,
    shape: ClipShape,
    stage: int,
    now: Plan | None = None,
    models: Mapping[ClipShape, CostModel] | None = None,
    seed: int = 0,
    others: int = 0,
) -> list[Plan]:
    """What stage `stage` (0-based) may choose from, each once: smallest first, full training last.

    shape: of whole clips. models: cost model of each shape on the ladder, for generator `budget`. seed: of the
    kinds that draw blocks. others: as `of_set` has it.

    A block below `cei_threshold` is left out until the last stage (if none is above, the highest stays in). Where the
    generators make nothing of those that are left, the highest of them alone is tried.
    `monotone` keeps only sets no smaller than `now`. A schedule other than entprog leaves one plan.
    """
    if plan := fixed(names, priority, schedule, shape, stage, seed=seed, others=others):
        return [plan]
    last = stage == schedule.stages - 1
    eligible = list(names)
    if schedule.cei_threshold is not None and not last:
        eligible = [name for name in names if priority[name] >= schedule.cei_threshold]
        eligible = eligible or [max(names, key=lambda name: priority[name])]
    found: list[Plan] = []
    shapes = ladder(schedule, shape, last)
    for each in shapes:
        for backward in schedule.backwards:
            for generator in schedule.generators:
                sets = GENERATORS[generator](names, eligible, priority, schedule, backward, (models or {}).get(each))
                found += [of_set(chosen, names, backward, each, others) for chosen in sets]
    if len(eligible) == len(names):
        found.append(full(names, shape))
    if not found:  # none of the last blocks is above the threshold, or a budget pays for none that is
        one = best(1, eligible, priority)
        found = [of_set(one, names, backward, each, others) for each in shapes for backward in schedule.backwards]
    if schedule.monotone and now is not None:
        same = of_set(best(now.m, names, priority), names, now.backward, shape, others)
        found = [plan for plan in found if plan.m >= now.m] or [same]
    return sorted(dict.fromkeys(found), key=size)


def ladder(schedule: Schedule | Ladder, shape: ClipShape, last: bool) -> list[ClipShape]:
    """Clip shapes that a stage may train on: in the last stage whole clips' alone. Raises UserError for one that clips
    of `shape` cannot be cut to."""
    steps = {"full": (), "progressive": schedule.table}.get(schedule.kind, schedule.shapes)
    return list(dict.fromkeys([*([] if last else [step.of(shape) for step in steps]), shape]))


def size(plan: Plan) -> tuple:
    """Sorts plans from least to most: number of blocks, then the more exact gradient, then the larger clips."""
    shape = plan.shape
    return plan.m, plan.backward == "exact", shape.frames * shape.height * shape.width


def by_count(names, eligible, priority, schedule, backward, model) -> list[list[str]]:
    """Top-m of the eligible blocks, m by `candidates` (the paper's M_k)."""
    sizes = {min(count(fraction, len(names)), len(eligible)) for fraction in schedule.candidates}
    return [best(m, eligible, priority) for m in sizes]


def by_suffix(names, eligible, priority, schedule, backward, model) -> list[list[str]]:
    """Top-m among the eligible of the last n blocks: exact backward ends at the first of them."""
    out = []
    for suffix in schedule.suffixes:
        among = [name for name in names[-count(suffix, len(names)) :] if name in set(eligible)]
        sizes = {min(count(fraction, len(names)), len(among)) for fraction in schedule.candidates} - {0}
        out += [best(m, among, priority) for m in sizes]
    return out


def by_budget(names, eligible, priority, schedule, backward, model) -> list[list[str]]:
    """The largest Σπ within each fraction of full training's predicted step."""
    if model is None:
        raise ValueError("generator budget needs a cost model")
    whole = model.step(names, "exact")
    sets = [budget.best_set(priority, eligible, model, share * whole, backward) for share in schedule.budgets]
    return [list(chosen) for chosen in sets if chosen]


GENERATORS = {"count": by_count, "suffix": by_suffix, "budget": by_budget}


def labels(candidates: Sequence[Plan]) -> list[str]:
    """A short name of each candidate: `m4`, and more where there are several of four blocks."""
    out = []
    for plan in candidates:
        twins = [other for other in candidates if other.m == plan.m and other != plan]
        label = f"m{plan.m}"
        if any(other.backward != plan.backward for other in twins):
            label += f"_{plan.backward}"
        if any(other.shape != plan.shape for other in twins):
            label += f"_{plan.shape.frames}x{plan.shape.width}x{plan.shape.height}"
        out.append(label)
    repeats = [out[:i].count(label) for i, label in enumerate(out)]
    return [f"{label}_{repeat + 1}" if repeat else label for label, repeat in zip(out, repeats, strict=True)]


def fitting(
    candidates: Sequence[Plan], memory_bytes: Callable[[Plan], int], budget_bytes: int | None
) -> tuple[list[Plan], str]:
    """The plans whose predicted peak memory is within the budget, and a line that says which is the largest.

    Raises UserError, with what the smallest plan needs, if none fits.
    """
    if budget_bytes is None:
        return list(candidates), ""
    needs = {plan: memory_bytes(plan) for plan in candidates}
    fit = [plan for plan in candidates if needs[plan] <= budget_bytes]
    if not fit:
        least = min(candidates, key=lambda plan: needs[plan])
        raise UserError(
            f"no plan fits schedule.memory_budget_bytes ({gigabytes(budget_bytes)}): the smallest trains {least.m} "
            f"block(s) and needs {gigabytes(needs[least])}; try residual backward, gradient checkpointing or a smaller "
            "data.batch_size"
        )
    largest = max(fit, key=size)
    return fit, (
        f"{len(fit)} of {len(candidates)} plans fit {gigabytes(budget_bytes)}, the largest trains {largest.m} of "
        f"{max(plan.m for plan in candidates)} blocks ({gigabytes(needs[largest])})"
    )


def gigabytes(number: int) -> str:
    return f"{number / 1e9:.3g} GB"
