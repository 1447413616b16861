"""A training in phases: one after another, each from the last one's weights, nested under one run in MLflow.

A phase is an ordinary training (`train.run`) in OUTPUT/NAME. It is finished, resumed or refused as any other, so the
same command again goes on wherever it stopped, within a phase or between two.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from entprog import config
from entprog.config import Experiment
from entprog.storage import Where
from pipelines import cli, terminal
from pipelines.cluster import capacity
from pipelines.tracking.tracker import Tracker
from pipelines.training import report, steplog

SUMS = ("steps", "clips", "skipped_updates", "wall_s")
"""Figures that add up over phases,"""
SUMS_BY_KEY = ("seconds_by_purpose", "flops_by_purpose", "stalls")
"""and those of several parts that do. Of what neither these nor their totals are the last phase's stands."""


def run(
    experiment: Experiment,
    output: Where,
    train: Callable[..., dict[str, Any]],
    *,
    tables: Where,
    parent: str | None,
    tags: Mapping[str, str] | None,
    listen: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Train every phase on the connected Ray cluster; returns the figures of result.json.

    train: `train.run`. The last phase's model is OUTPUT/model too, but in a bucket.
    """
    parts = config.phases(experiment, output)
    for phase in parts.values():
        capacity.check_tracking(phase)
    tracker = Tracker.start(
        output,
        experiment.tracking.experiment,
        experiment.tracking.run_name or output.resolve().name,
        params=config.settings(experiment),
        tags={"entprog.commit": cli.commit(), "entprog.kind": "phases", **(tags or {})},
        parent=parent,
    )
    results: dict[str, dict[str, Any]] = {}
    status = "FAILED"
    try:
        for number, (name, phase) in enumerate(parts.items(), 1):
            terminal.console.print(f"\nPhase {number} of {len(parts)}: {name}", style="bold")
            done = {key: sum(result[key] for result in results.values()) for key in ("steps", "seconds")}
            tell = _teller(tracker, number, **done)

            def on_item(item: dict[str, Any], tell: Callable[[Mapping[str, Any]], None] = tell) -> None:
                if "step" in item:
                    tell(item["step"])
                listen(item)

            about = {"entprog.phase": name, **(tags or {})}
            if phase.data.shards == next(iter(parts.values())).data.shards:  # every byte was read once, before
                phase = phase.model_copy(update={"data": phase.data.model_copy(update={"verify": "size"})})
            results[name] = train(
                phase, output / name, tables=tables, parent=tracker.run_id, tags=about, listen=on_item
            )
            for step in steplog.steps_of(output / name):  # what was told to a driver that was killed; the rest is there
                tell(step)
            tracker.metrics(done["steps"], {f"phase/{name}_held_out_loss": results[name]["held_out_loss"]})
        model = _model(output, next(reversed(parts)))
        result = together(results) | {"mlflow_run_id": tracker.run_id, "model": str(model)}
        names = ("held_out_loss", "seconds", "search_seconds", "score_seconds", "flops", "peak_memory_bytes", "steps")
        tracker.summary({name: result[name] for name in names})
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        tracker.end(status)
    _show(results, result, model)
    return result


def together(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """All phases' figures in one, with each phase's own under `phases`."""
    last = results[next(reversed(results))]
    sums = {name: sum(result[name] for result in results.values()) for name in SUMS}
    for name in SUMS_BY_KEY:
        sums[name] = {key: sum(result[name][key] for result in results.values()) for key in last[name]}
    return report.with_totals(dict(last) | sums) | {
        "peak_memory_bytes": max(result["peak_memory_bytes"] for result in results.values()),
        "losses": [loss for result in results.values() for loss in result["losses"]],
        "phases": {name: dict(result) for name, result in results.items()},
    }


def _teller(tracker: Tracker, phase: int, steps: int, seconds: float) -> Callable[[Mapping[str, Any]], None]:
    """Tells the run over all phases a step of one (a line of steps.jsonl) that the held-out loss was measured at.

    steps, seconds: of the phases before.
    """

    def tell(step: Mapping[str, Any]) -> None:
        if step["held_out_loss"] is None:
            return
        loss = {} if step["loss"] is None else {"loss": step["loss"]}  # not finite: null in steps.jsonl
        point = loss | {
            "phase": phase,
            "held_out_loss": step["held_out_loss"],
            "trained_blocks": len(step["trained"]),
            "charged_s": seconds + step["charged_s"],
        }
        tracker.metrics(steps + step["step"], point, steplog.logged_s(step))

    return tell


def _model(output: Where, last: str) -> Where:
    """OUTPUT/model stands for the last phase's, which may be large: a link, relative, so that OUTPUT can be moved. In a
    bucket, which has no links, it is the last phase's itself."""
    model, link = output / last / "model", output / "model"
    if not isinstance(link, Path):
        return model
    if link.is_symlink():
        link.unlink()
    link.symlink_to(model.relative_to(output), target_is_directory=True)
    return link


def _show(results: Mapping[str, Mapping[str, Any]], result: Mapping[str, Any], model: Where) -> None:
    rows = [
        (name, r["steps"], r["held_out_loss"], r["seconds"], ", ".join(str(m) for m in _trained(r)))
        for name, r in results.items()
    ]
    columns = ("phase", "steps", "held-out loss", "charged seconds", "trained blocks by stage")
    terminal.show("Phases (each judged on its own clips and conditions)", rows, columns)
    terminal.console.print(f"Model: {model}, after {result['seconds']:.1f} charged seconds in all")


def _trained(result: Mapping[str, Any]) -> list[int]:
    return [len(decision["plan"]["trainable"]) for decision in result["decisions"]]
