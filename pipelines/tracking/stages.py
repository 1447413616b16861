"""A training's stages in MLflow: one run each, nested under the training's, with its times and figures."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.tracking.tracker import Tracker
from pipelines.training.steplog import logged_s

Record = Mapping[str, Any]
"""A line of steps.jsonl."""
CHARGED = {"stage/seconds": "charged_s", "stage/search_seconds": "search_s", "stage/score_seconds": "score_s"}
"""Figure of a stage → what a run had been charged by a step; lines of an earlier version have the first alone."""


def log(tracker: Tracker, steps: Sequence[Record], ended: str = "RUNNING", newest: int | None = None) -> None:
    """Make or complete the runs of all stages that have begun, or of so many newest ones; what is there already is not
    written twice.

    ended: status of the training: the last stage's, the earlier ones are over.
    """
    groups = [list(group) for _, group in itertools.groupby(steps, lambda step: step["stage"])]
    before: Record = {}
    for number, group in enumerate(groups, 1):
        status = ended if number == len(groups) else "FINISHED"
        over = status != "RUNNING"
        if newest is None or number > len(groups) - newest:
            tracker.child(
                f"stage {group[0]['stage'] + 1}",
                tags={"entprog.kind": "stage", "entprog.stage": group[0]["stage"]},
                params=params(group) if over else {},
                metrics=[*points(group), *figures(group, before)] if over else [],
                started_s=logged_s(group[0]) - group[0]["seconds"] - group[0]["wait_s"],
                ended_s=logged_s(group[-1]),
                status=status,
            )
        before = group[-1]


def params(stage: Sequence[Record]) -> dict[str, Any]:
    """A stage's decision as parameters."""
    last = stage[-1]
    decision = next((step["decision"] for step in stage if "decision" in step), None)
    return {
        "trained": " ".join(last["trained"]),
        "trained_blocks": len(last["trained"]),
        "backward": last["backward"],
        "shape": last["shape"],
        "reason": decision["reason"] if decision else "",
    }


def points(stage: Sequence[Record]) -> list[tuple[str, float, float, int]]:
    """(name, value, seconds since 1970, step) of held-out losses and charged seconds where they were measured."""
    return [
        (name, step[name], logged_s(step), step["step"])
        for step in stage
        if step["held_out_loss"] is not None
        for name in ("held_out_loss", "charged_s")
    ]


def figures(stage: Sequence[Record], before: Record) -> list[tuple[str, float, float, int]]:
    """What the stage came to, as points at its last step. before: the step before it; of the first stage {}."""
    last = stage[-1]
    trained = sorted(step["seconds"] for step in stage if step["phase"] == "train")
    charged = {name: last[each] - before.get(each, 0.0) for name, each in CHARGED.items() if each in last}
    values = {
        "stage/steps": len(stage),
        **charged,
        "stage/peak_memory_bytes": max(step["plan_memory_bytes"] for step in stage),
    }
    if losses := [step["loss"] for step in stage if step["loss"] is not None]:  # not finite: null in steps.jsonl
        values["stage/mean_loss"] = sum(losses) / len(losses)
    if trained:
        values["stage/median_step_s"] = trained[len(trained) // 2]
    return [(name, value, logged_s(last), last["step"]) for name, value in values.items()]
