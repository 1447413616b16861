"""What a demo came to, as a result file: losses, pose, cost, for both subjects.

make demo && python -m benchmarks.demo_result                   # benchmarks/results/demo.json, on whatever machine
python -m pipelines.demo --seeds 3 --output out/three
python -m benchmarks.demo_result --of out/three --name demo_seeds
"""

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import common
from entprog.errors import UserError
from pipelines import cli, demo
from pipelines.command import usage

app = usage.app("Write what a finished demo came to into benchmarks/results.")

FIGURES = ("seconds", "steps", "flops", "peak_memory_bytes")
KEPT = ("prepared", "wall_s", "commit", "command", "device", "versions", "load_average")
"""Of the demo's result: what was run, and on what."""


@app.command()
def main(
    of: Annotated[Path, typer.Option(help="Folder of the demo.")] = Path("out/demo"),
    name: Annotated[str, typer.Option(help="Of the result file.")] = "demo",
    dry_run: cli.DryRun = False,
    verbose: cli.Verbose = False,
) -> None:
    """Write benchmarks/results/NAME.json; its commit, machine and versions are the demo's."""

    def work() -> dict[str, Any]:
        path = of / "result.json"
        result = json.loads(path.read_text()) if path.exists() else {}
        if result.get("job") != "demo" or result.get("status") != "done":
            raise UserError(f"--of {of}: no finished demo is there: run make demo first")
        if lacking := [name for name in KEPT if name not in result]:
            raise UserError(
                f"--of {of}: made by an earlier version, which did not keep {lacking[0]}: remove that folder, then "
                "run make demo again"
            )
        rows = [row for subject in demo.SUBJECTS for row in figures(subject, came(result, subject))]
        if not dry_run:
            more = {name: result[name] for name in KEPT}
            more["compared"] = {subject: came(result, subject)["compared"] for subject in demo.SUBJECTS}
            common.write(name, rows, device="cpu", repeats=max(row.get("seeds", 1) for row in rows), more=more)
        shown = ("subject", "arm", "held_out_loss", "of_before", "pose_distance")
        common.show("the demo", [{column: row.get(column, "") for column in shown} for row in rows])
        return {"figures": rows}

    cli.run("demo_result", None, work, verbose=verbose)


def came(result: Mapping[str, Any], subject: str) -> Mapping[str, Any]:
    """A subject's part of the demo's result."""
    return result["real"] if subject == "real" else result


def figures(subject: str, came: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of a subject: the base, each arm (loss: mean over seeds, pose: of the first), and the truth's pose."""
    rows: list[dict[str, Any]] = [
        {"arm": demo.BEFORE, "held_out_loss": came["before"], "pose_distance": came["pose"][demo.BEFORE]}
    ]
    for name, arm in came["arms"].items():
        losses = [seed["held_out_loss"] for seed in arm["seeds"]]
        mean = statistics.mean(losses)
        row = {"arm": name, "held_out_loss": mean, "of_before": mean / came["before"], "pose_distance": arm["pose"]}
        if len(losses) > 1:
            row["held_out_losses"] = losses
        rows.append(row | {"seeds": len(losses)} | {name: arm[name] for name in FIGURES})
    rows.append({"arm": "truth", "pose_distance": came["pose"]["truth"]})
    return [{"subject": subject} | row for row in rows]


if __name__ == "__main__":
    app()
