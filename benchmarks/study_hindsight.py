"""What a search could have chosen: every candidate of one of its stages, trained from the same weights."""

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.study_arms import experiment
from benchmarks.study_material import Material, material, to_device
from benchmarks.study_trainings import loss_on, opened
from benchmarks.study_units import Bench, Unit
from entprog.config import Experiment
from entprog.schedule.plans import Plan
from entprog.training import checkpoint


def hindsight(bench: Bench, unit: Unit, budget: float, rate: float, batch: int) -> dict[str, Any]:
    """Every candidate of a stage's search, each from the same weights for the rest of the stage's budget."""
    goods, scale = material(bench, unit.task), bench.scale
    given = {"seed": unit.seed, "rate": rate, "batch": batch, "budget": budget}
    wanted = experiment(scale, unit.task, unit.arm, base=bench.base_of(unit), **given)
    run = opened(bench, wanted, goods.train, goods.search, unit.seed)
    judged = to_device(goods.test, bench.device)
    step = next((s for s in run.steps if s.decision and s.decision.stage == unit.stage and not run.state.waits), None)
    if step is None:
        return {"candidates": []}
    decision, end = run.state.decisions[-1], budget * (unit.stage + 1) / wanted.schedule.stages
    folder = Path(tempfile.mkdtemp(dir=bench.work))
    try:
        checkpoint.save(folder, run.denoiser.network, run.state, "hindsight", keep=1)
        full_step = decision.full_step_cost or decision.step_cost
        same_steps = max(1, int((end - bench.spent(step)) / full_step))
        found = [
            _branch(bench, wanted, goods, judged, folder, plan, end, same_steps) | {"chosen": plan == decision.plan}
            for plan in decision.candidates
        ]
    finally:
        shutil.rmtree(folder)
    return {
        "loss_before": loss_on(run, judged, scale),
        "searched": bool(decision.efficiencies),
        "same_steps": same_steps,
        "candidates": found,
    }


def _branch(
    bench: Bench, wanted: Experiment, goods: Material, judged, folder: Path, plan: Plan, end: float, same_steps: int
) -> dict[str, Any]:
    """One candidate's training from a checkpoint on, whatever the search said."""
    seed = wanted.train.seed
    given = wanted.model_copy(update={"schedule": wanted.schedule.model_copy(update={"kind": "full"})})
    run = opened(bench, given, goods.train, goods.search, seed)
    state = run.state
    checkpoint.load(folder, checkpoint.newest(folder), run.denoiser.network, state, "hindsight")
    state.plan = plan
    state.decisions[-1] = replace(state.decisions[-1], plan=plan)
    state.begun = {name: step for name, step in state.begun.items() if name in plan.trainable}
    first, at_same_steps = state.step, None
    for step in run.steps:
        if step.step - first == same_steps:
            at_same_steps = loss_on(run, judged, bench.scale)
        if bench.spent(step) >= end:
            break
    return {
        "m": plan.m,
        "backward": plan.backward,
        "shape": str(plan.shape),
        "trained": list(plan.trainable),
        "steps": state.step - first,
        "loss": loss_on(run, judged, bench.scale),
        "loss_at_same_steps": at_same_steps,
    }
