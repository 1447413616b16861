"""How long training waits for its clips: in a run of the demo's size, and between two executions of Ray Data.

    python -m benchmarks.waiting               # about 5 minutes on two cores

`training` is pipelines.train itself: the demo's network, clip shape and batch on real clips, plainly trained; seconds
as its steps.jsonl has them. Runs that decode in the worker and on the cluster (`data.decode`) take turns. `change_over`
reads the stream alone through several short executions, at the pace of a training step, and notes the longest wait
after the first batch. Leaves benchmarks/results/waiting.json.
"""

import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import common, stream
from entprog import config
from entprog.config import ClipShape
from entprog.data import shards
from pipelines import cli, terminal, train
from pipelines.cluster import capacity, session
from pipelines.command import usage
from pipelines.stream import feed
from pipelines.training import steplog

app = usage.app("How long training waits for its clips.")

SHAPE = ClipShape(frames=8, height=48, width=32, fps=12)
STEP_S = 0.02
"""Pace at which the stream alone is read."""
TASKS = 8
"""Tasks in one of its executions: half as many as in training, so that there are several to look at."""
EXECUTIONS = 4


@app.command()
def main(
    steps: Annotated[int, typer.Option(min=2, help="Training steps.")] = 200,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each kind.")] = 3,
) -> None:
    """Train and read; print and keep the seconds."""
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{scratch}/mlflow.db"
        dataset = stream.write_clips(Path(scratch, "shards"), SHAPE, held_out=4)
        with session.ray_cluster(capacity.LOCAL_CPUS):
            turns = [(number, decode) for number in range(repeats) for decode in ("worker", "cluster")]
            figures = [
                training(dataset, Path(scratch, f"{decode}-{number}"), steps, decode) for number, decode in turns
            ]
            figures += [change_over(dataset) for _ in range(repeats)]
    for row in figures:
        common.show(row["what"], [{"figure": k, "value": v} for k, v in row.items() if k != "settings"])
    terminal.console.print(f"kept in {common.write('waiting', figures, device='cpu', repeats=repeats)}")


def training(dataset: shards.Dataset, scratch: Path, steps: int, decode: str) -> dict[str, Any]:
    """A run of the demo's size."""
    data = {"shards": str(dataset.folder), "held_out_clips": 4, "decode": decode}
    experiment = cli.settings(
        config.Experiment, "demo_base", None, None, data=data, train={"steps": steps, "samples": 0}
    )
    result = train.run(experiment, scratch / "run", tables=scratch / "tables")
    done = steplog.steps_of(scratch / "run")
    waits = [step["wait_s"] - step["open_s"] for step in done]
    lost, running_s = result["stalls"], sum(result["stalls"].values()) - result["stalls"]["copy_s"]
    return {
        "what": "training",
        "decode": decode,
        "steps": steps,
        "step_s_median": round(statistics.median(step["seconds"] for step in done), 4),
        **{name: round(value, 3) for name, value in lost.items()},
        "wait_share": round(lost["wait_s"] / (running_s - lost["open_s"]), 4),
        "longest_wait_s": round(max(waits), 3),
        "object_store_peak_share": result["object_store_peak_share"],
        "spilled_bytes": result["spilled_bytes"],
        "settings": {k: v for k, v in config.settings(experiment).items() if k != "data.shards"},  # a scratch folder
    }


def change_over(dataset: shards.Dataset, batch_size: int = 2) -> dict[str, Any]:
    """The stream alone, read at the pace of a training step."""
    before, feed.TASKS = feed.TASKS, TASKS
    source = feed.stream(dataset, "train", dataset.shape, batch_size, cpus=1.0)
    try:
        next(source)
        open_s, waits = source.wait_s, []
        for _ in range(EXECUTIONS * TASKS * feed.TASK_BATCHES - 1):
            time.sleep(STEP_S)
            so_far = source.wait_s
            next(source)
            waits.append(source.wait_s - so_far)
    finally:
        source.close()
        feed.TASKS = before
    total_s = sum(waits) + STEP_S * len(waits)
    return {
        "what": "change_over",
        "executions": EXECUTIONS,
        "batches": len(waits) + 1,
        "open_s": round(open_s, 3),
        "longest_wait_s": round(max(waits), 3),
        "wait_share": round(sum(waits) / total_s, 4),
    }


if __name__ == "__main__":
    app()
