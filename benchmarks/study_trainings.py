"""Trainings of the study, through the project's own `fit`, and one of an arm as it is judged on its way."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks import study_routing
from benchmarks.study_arms import ARMS, Scale, experiment
from benchmarks.study_material import Cut, batches, material, stream, to_device
from benchmarks.study_quality import quality
from benchmarks.study_units import Bench, Unit
from entprog import models
from entprog.blocks import Block, blocks
from entprog.config import Experiment
from entprog.data.clips import Latents
from entprog.diffusion import losses
from entprog.diffusion.denoiser import Denoiser
from entprog.errors import UserError
from entprog.models import lora
from entprog.schedule import plans
from entprog.schedule.state import RunState
from entprog.scoring import cei, priorities
from entprog.training.fit import fit, start
from entprog.training.steps import Step

MOST_WAITED = 1.1
"""Charged seconds over those of the processor, of one thread: beyond it the clock has measured what others do."""


@dataclass(frozen=True)
class Training:
    """A run that is ready to begin."""

    experiment: Experiment
    denoiser: Denoiser
    found: list[Block]
    table: priorities.ScoreTable | None
    state: RunState
    steps: Iterator[Step]


def opened(bench: Bench, wanted: Experiment, train: Cut, search: Sequence[Latents], seed: int) -> Training:
    """A run at its beginning: network loaded, blocks scored."""
    device = bench.device
    denoiser = models.family(wanted.model.family).load(wanted.model, device, seed)
    if wanted.train.lora:
        lora.add(denoiser.network, blocks(denoiser.network), wanted.train.lora, seed)
    size, whole = wanted.data.batch_size, train(wanted.data.shape)
    (sample,) = to_device([whole.part(slice(0, size))], device)
    found = cei.blocks_in_order(blocks(denoiser.network), denoiser.predict, sample.part(slice(0, 1)))
    table = None
    if wanted.schedule.needs_scores:
        needed = 0 if wanted.priority.kind in priorities.WITHOUT_DATA else wanted.priority.conditions
        conditions = to_device(batches(whole.part(slice(0, needed)), size), device) if needed else []
        table = priorities.score(denoiser, found, conditions, wanted.priority, seed=seed)
    state = start(denoiser.network, wanted)
    source = stream(train, wanted, seed, device)
    steps = fit(denoiser, found, source, to_device(search, device), sample, table, wanted, state)
    return Training(wanted, denoiser, found, table, state, steps)


def judged(bench: Bench, unit: Unit, budget: float, rate: float, batch: int) -> dict[str, Any]:
    """One training of an arm, judged along the way on clips that neither it nor tuning saw."""
    scale, goods = bench.scale, material(bench, unit.task)
    tuning = unit.kind == "tune"
    given = {"seed": unit.seed, "rate": rate, "batch": batch, "budget": budget, "tuning": tuning}
    wanted = experiment(scale, unit.task, unit.arm, base=bench.base_of(unit), **given)
    for shape in plans.ladder(wanted.schedule, wanted.data.shape, last=False):
        goods.train(shape)  # kept: the first run at a shape would pay for decoding, alone of all
    began = time.perf_counter()
    cpu = time.process_time()
    run = opened(bench, wanted, goods.train, goods.search, unit.seed)
    if routed := ARMS[unit.arm].routed:
        stages = len(plans.rows(wanted.schedule))
        study_routing.route(run.found, routed, unit.seed, lambda: run.state.stage < stages - 1)
    cpu_s = (run.table is not None and time.process_time() - cpu) or 0.0
    clips = to_device(goods.tune if tuning else goods.test, bench.device)
    marks = budget * np.arange(1, scale.points + 1) / scale.points
    if tuning:
        marks = marks[-1:]
    curve, figures, last = [], [], None
    if not tuning:
        curve.append({"step": 0, "spent": 0.0, "seconds": 0.0, "cpu_s": 0.0, "loss": loss_on(run, clips, scale)})
    while True:
        cpu = time.process_time()
        step = next(run.steps, None)
        if step is None:
            break
        cpu_s += time.process_time() - cpu
        last = step
        spent = bench.spent(step)
        if spent >= marks[0] or step.last:
            marks = marks[marks > spent] if not step.last else marks[-1:]
            loss = loss_on(run, clips, scale)
            curve.append({"step": step.step, "spent": spent, "seconds": step.charged_s, "cpu_s": cpu_s, "loss": loss})
    if not tuning:
        figures = quality(bench, run.denoiser, goods)
    if last is None:
        raise RuntimeError(f"{unit.file}: scoring alone took the budget")
    state = run.state
    if scale.clock == "seconds" and bench.device.type == "cpu":
        check_had_a_core(unit, state.seconds.total, cpu_s)
    return {
        "rate": wanted.train.learning_rate,
        "batch": batch,
        "curve": curve,
        "held_out_loss": curve[-1]["loss"],
        "steps": state.step,
        "seconds": state.seconds.total,
        "cpu_s": cpu_s,
        "wall_s": time.perf_counter() - began,
        "flops": vars(state.flops),
        "overhead": _overhead(bench, state),
        "peak_memory_bytes": state.peak_memory_bytes,
        "trained_blocks": [decision.plan.m for decision in state.decisions],
        "decisions": [_in_short(decision) for decision in state.decisions],
        "quality": figures,
        "loss_tau": run.table.loss_tau if run.table else {},
    }


def check_had_a_core(unit: Unit, charged_s: float, cpu_s: float) -> None:
    """Raises UserError where what was charged is not what the unit's own work took of a processor."""
    if charged_s > MOST_WAITED * cpu_s:
        raise UserError(
            f"{unit.file}: {charged_s:.0f} s were charged, in which this process had {cpu_s:.0f} s of a processor: "
            "others work here; give it an idle core and repeat the command, which does this unit again"
        )


def loss_on(run: Training, clips: Sequence[Latents], scale: Scale) -> float:
    return losses.held_out_loss(run.denoiser, clips, scale.draws, 0)


def _overhead(bench: Bench, state: RunState) -> float:
    """Share of what was spent that went into search and scoring."""
    spent = state.flops if bench.scale.clock == "flops" else state.seconds
    return (spent.search + spent.score) / spent.total


def _in_short(decision) -> dict[str, Any]:
    return {
        "stage": decision.stage,
        "m": decision.plan.m,
        "backward": decision.plan.backward,
        "shape": str(decision.plan.shape),
        "trained": list(decision.plan.trainable),
        "reason": decision.reason,
        "efficiencies": [
            {
                "m": plan.m,
                "backward": plan.backward,
                "shape": str(plan.shape),
                "value": e.value,
                "low": e.low,
                "high": e.high,
                "steps": e.steps,
            }
            for plan, e in zip(decision.candidates, decision.efficiencies, strict=False)
        ],
    }
