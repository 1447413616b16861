"""What a training leaves once it is over: figures, charts, and the table on the terminal."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from entprog import files, storage
from entprog.data import shards
from entprog.storage import Where
from pipelines import charts, terminal
from pipelines.cluster import stalls
from pipelines.tracking.store import how_to_open
from pipelines.tracking.tracker import Tracker


def figures(result: dict[str, Any], steps: list[dict[str, Any]]) -> dict[str, Any]:
    """The workers' last word with what follows from the lines of steps.jsonl. They need not be all: a run may have been
    begun in another output."""
    held_out = [(s["step"], s["charged_s"], s["held_out_loss"]) for s in steps if s["held_out_loss"] is not None]
    return with_totals(result | {"stalls": asdict(stalls.of(steps))}) | {
        "held_out": [{"step": step, "charged_s": s, "loss": loss} for step, s, loss in held_out],
        "losses": [s["loss"] for s in steps],
    }


def with_totals(result: dict[str, Any]) -> dict[str, Any]:
    """Figures with those that follow from clips, stalls, and what was spent by purpose."""
    purposes, lost = result["seconds_by_purpose"], stalls.Stalls(**result["stalls"])
    return result | {
        "seconds": sum(purposes.values()),
        "search_seconds": purposes["search"],
        "score_seconds": purposes["score"],
        "flops": sum(result["flops_by_purpose"].values()),
        "samples_per_s": result["clips"] / max(purposes["train"] + purposes["search"], 1e-9),
        "wait_share": lost.share(lost.wait_s + lost.open_s),
    }


def final(result: dict[str, Any]) -> dict[str, float]:
    """What MLflow keeps as the run's final figures; `break_even_step` only where it was reached."""
    names = ("held_out_loss", "seconds", "search_seconds", "score_seconds", "flops", "peak_memory_bytes", "steps")
    paid = result["break_even"]["step"]
    return {name: result[name] for name in names} | ({} if paid is None else {"break_even_step": paid})


def leave_charts(
    output: Where, steps: list[dict], blocks: list[str], tracker: Tracker, dataset: shards.Dataset
) -> None:
    """Draw the charts, and keep them and the samples with the MLflow run. blocks: names, in the network's order."""
    left = [charts.schedule_chart(steps, output / "schedule.png", blocks)]
    if (output / "cei.json").exists():
        left += [charts.cei_chart(json.loads((output / "cei.json").read_text()), output / "cei.png")]
        left += [output / "cei.json"]
    held_out = [(s["charged_s"], s["step"], s["held_out_loss"]) for s in steps if s["held_out_loss"] is not None]
    left += [charts.loss_chart({"held-out loss": held_out}, output / "loss.png"), output / "steps.jsonl"]
    files.write_json(output / "decisions.json", [s["decision"] for s in steps if "decision" in s])
    left += [output / "decisions.json", *(output / "samples" / name for name in storage.below(output / "samples"))]
    sheet = [dataset.folder / "contact_sheet.png"] if isinstance(dataset.folder, Path) else []
    for file in [*left, *(path for path in sheet if path.exists())]:
        tracker.artifact(file)


def show(result: dict[str, Any], output: Where, uri: str) -> None:
    """Print the headline figures."""
    left = {"adapter": output / "adapter", "previews": output / "previews" / "index.html"}
    terminal.show(
        "Training",
        [
            ("held-out loss", result["held_out_loss"]),
            ("steps", result["steps"]),
            ("charged seconds", result["seconds"]),
            ("  search / scoring", f"{result['search_seconds']:.1f} / {result['score_seconds']:.1f}"),
            ("samples per second", result["samples_per_s"]),
            ("waiting for data / starting streams", _shares(result["stalls"], "wait_s", "open_s")),
            *([("encoding clips", _shares(result["stalls"], "encode_s"))] if result["stalls"]["encode_s"] else []),
            (f"peak memory ({result['peak_memory_is']})", f"{result['peak_memory_bytes'] / 2**20:.0f} MiB"),
            *_break_even(result),
            ("trained blocks by stage", ", ".join(str(len(d["plan"]["trainable"])) for d in result["decisions"])),
            ("model", str(output / "model")),
            *((name, str(path)) for name, path in left.items() if path.exists()),
            ("MLflow run", result["mlflow_run_id"]),
        ],
        ("figure", "value"),
    )
    for line in result["advice"]:
        terminal.console.print(line)
    terminal.console.print(f"Compare runs: {how_to_open(uri)}")


def _shares(seconds: dict[str, float], *names: str) -> str:
    lost = stalls.Stalls(**seconds)
    return " / ".join(f"{lost.share(seconds[name]):.0%}" for name in names)


def _break_even(result: dict[str, Any]) -> list[tuple[str, str]]:
    """When what the stages saved had paid for search and scoring; no row where no stage was searched."""
    if all(decision["full_step_cost"] is None for decision in result["decisions"]):
        return []
    actual, predicted = result["break_even"]["step"], result["break_even"]["predicted_step"]
    reached = "not reached" if actual is None else str(actual)
    return [("break-even step (predicted)", f"{reached} ({'none' if predicted is None else predicted})")]
