"""A step and a run in figures: a line of steps.jsonl, MLflow's metrics, result.json."""

import time
from typing import Any

import torch

from entprog.config import Experiment
from entprog.schedule import plans
from entprog.schedule.state import RunState
from entprog.training.steps import Step
from pipelines.cluster import gauges


def as_record(step: Step) -> dict[str, Any]:
    """A step that was just done as a line of steps.jsonl."""
    record = {k: v for k, v in vars(step).items() if k not in ("plan", "decision", "pace")}
    record |= gauges.record(step)
    record |= {"trained": list(step.plan.trainable), "backward": step.plan.backward, "time": time.time()}
    record |= {"shape": str(step.plan.shape), "pixels": step.plan.shape.pixels}
    return record | ({"decision": step.decision.as_json()} if step.decision else {})


def metrics(step: Step) -> dict[str, float]:
    """A step as MLflow metrics."""
    values = {
        "loss": step.loss,
        "learning_rate": step.learning_rate,
        "gradient_norm": step.gradient_norm,
        "skipped_updates": step.skipped_updates,
        "trained_blocks": step.plan.m,
        "clip_pixels": step.plan.shape.pixels,
        "stage": step.stage,
        "searching": float(step.phase == "search"),
        "step_s": step.seconds,
        "wait_s": step.wait_s,
        "open_s": step.open_s,
        "copy_s": step.copy_s,
        "encode_s": step.encode_s,
        "charged_s": step.charged_s,
        "flops": step.flops,
        "samples_per_s": step.clips / max(step.seconds + step.wait_s, 1e-9),
        "peak_memory_bytes": step.memory_bytes,
        "plan_memory_bytes": step.plan_memory_bytes,
        "optimizer_bytes": step.optimizer_bytes,
    }
    values |= gauges.metrics(step)
    if step.held_out_loss is not None:
        values["held_out_loss"] = step.held_out_loss
    if step.drift is not None:
        values["score_drift"] = step.drift
    foreseen = {"predicted_step_s": step.predicted_s, "predicted_memory_bytes": step.predicted_memory_bytes}
    if step.decision is not None:
        decision = step.decision
        values["decision/m"] = decision.plan.m
        values["decision/search_cost"] = decision.search_cost
        labels = plans.labels(decision.candidates)
        for label, efficiency in zip(labels, decision.efficiencies, strict=False):  # none where nothing was tried
            foreseen[f"decision/efficiency_{label}"] = efficiency.value
        names = ("step_cost", "full_step_cost", "break_even_step")
        foreseen |= {f"decision/{name}": getattr(decision, name) for name in names}
    return values | {name: float(value) for name, value in foreseen.items() if value is not None}


def final(experiment: Experiment, state: RunState) -> dict[str, Any]:
    """Final figures of the run."""
    return {
        "steps": state.step,
        "clips": state.position,
        "skipped_updates": state.skipped,
        "seconds_by_purpose": vars(state.seconds),
        "flops_by_purpose": vars(state.flops),
        "peak_memory_bytes": state.peak_memory_bytes,
        "peak_memory_is": "allocated on the GPU" if torch.cuda.is_available() else "counted",
        "decisions": [decision.as_json() for decision in state.decisions],
        "break_even": {
            "predicted_step": next((d.break_even_step for d in state.decisions if d.break_even_step), None),
            "step": state.break_even_step,
            "saved_cost": state.saved_cost,
            "clock": experiment.schedule.clock,
        },
    }
