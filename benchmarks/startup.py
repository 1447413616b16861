"""Seconds from `python -m pipelines.train` to its first step, now and at a commit before: what a person waits for.

    python -m benchmarks.startup                  # against bdc13cc, four turns of each: ten minutes on two cores

Both sides train on the same shards, on the CPU, from the same bases: `small` has next to no weights, `large` a third of
a billion in float32 (1.3 GB). In turns, each with the working tree of its commit and an output folder of its own.
Measured from the start of the process to the first line of steps.jsonl, with the CPU seconds that all its processes
took until then. Leaves benchmarks/results/startup.json.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import diffusers
import torch
import typer

from benchmarks import common, stream
from entprog import files
from entprog.config import ClipShape
from entprog.models.wan import WanDenoiser
from pipelines import cli
from pipelines.command import usage

app = usage.app("Seconds from the command to the first step, now and at a commit before.")

HERE = Path(__file__).parents[1]
SHAPE = ClipShape(frames=4, height=64, width=48, fps=12)
WAN = {"in_channels": 3, "out_channels": 3, "text_dim": 16, "freq_dim": 32, "patch_size": [1, 8, 8]}
BASES = {
    "small": {"num_attention_heads": 2, "attention_head_dim": 24, "ffn_dim": 96, "num_layers": 4},
    "large": {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 6144, "num_layers": 9},
}
SETTINGS = {
    **{f"data.shape.{name}": value for name, value in SHAPE.model_dump().items()},
    "model.vae": "none", "train.steps": 1, "train.warmup_steps": 0, "data.batch_size": 1, "schedule.kind": "full",
}  # fmt: skip
PATIENCE_S = 300


@app.command()
def main(
    before: Annotated[str, typer.Option(help="The commit to compare with.")] = "bdc13cc",
    repeats: Annotated[int, typer.Option(min=1, help="Turns of each side, interleaved.")] = 4,
    bases: Annotated[list[str] | None, typer.Option("--base", help=f"{', '.join(BASES)}. Default: both.")] = None,
) -> None:
    """Measure both sides in turns; print and keep seconds, CPU seconds and their ratio."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        stream.write_clips(folder / "shards", SHAPE, held_out=2)
        git("worktree", "add", "--quiet", "--detach", str(folder / "before"), before)
        try:
            for base in bases or BASES:
                write_base(folder / base, BASES[base])
                turns: dict[str, list[tuple[float, float]]] = {"before": [], "now": []}
                for number in range(1 + repeats):  # the first one reads files into memory
                    for side, tree in (("before", folder / "before"), ("now", HERE)):
                        took = first_step(tree, folder / "shards", folder / base, folder / f"{base}-{side}-{number}")
                        turns[side] += [took] * bool(number)
                rows += rows_of(base, before, turns)
                common.show(f"start-up, base {base}", [row for row in rows if row["base"] == base])
                common.write("startup", rows, device="cpu", repeats=repeats)
        finally:
            git("worktree", "remove", "--force", str(folder / "before"))


def rows_of(base: str, before: str, turns: dict[str, list[tuple[float, float]]]) -> list[dict[str, Any]]:
    """A row a side. turns: (seconds, CPU seconds) of each turn."""
    out = []
    for side, took in turns.items():
        seconds, cpu = zip(*took, strict=True)
        ratios = [a[0] / b[0] for a, b in zip(took, turns["before"], strict=True)]
        row = {"base": base, "side": side, "commit": before if side == "before" else cli.commit()}
        row |= {
            "seconds": round(statistics.median(seconds), 2),
            "spread_s": [round(min(seconds), 2), round(max(seconds), 2)],
        }
        out.append(
            row | {"cpu_s": round(statistics.median(cpu), 2), "over_before": round(statistics.median(ratios), 3)}
        )
    return out


def write_base(folder: Path, sizes: dict[str, int]) -> None:
    torch.manual_seed(0)
    network = diffusers.WanTransformer3DModel(**WAN, **sizes)
    WanDenoiser.initialise(network)
    network.save_pretrained(folder / "transformer")
    files.write_json(folder / "model_index.json", {
        "_class_name": "WanPipeline", "_diffusers_version": diffusers.__version__,
        "transformer": ["diffusers", "WanTransformer3DModel"],
    })  # fmt: skip


def first_step(tree: Path, shards: Path, base: Path, output: Path) -> tuple[float, float]:
    """(seconds, CPU seconds) until the first line of steps.jsonl is there."""
    given = [f"--set={name}={value}" for name, value in SETTINGS.items()]
    command = [sys.executable, "-m", "pipelines.train", f"--shards={shards}", f"--base={base}", f"--output={output}"]
    environment = os.environ | {"PYTHONPATH": str(tree), "MLFLOW_TRACKING_URI": f"sqlite:///{output}.db"}
    log, lines = output.with_suffix(".log"), output / "steps.jsonl"
    with log.open("w") as said:
        began = time.perf_counter()
        process = subprocess.Popen([*command, *given], cwd=tree, env=environment, stdout=said, stderr=said)
        while not (lines.exists() and lines.stat().st_size):
            if process.poll() is not None or time.perf_counter() - began > PATIENCE_S:
                process.kill()
                raise SystemExit(f"{' '.join(command)}: no first step\n{log.read_text()[-2000:]}")
            time.sleep(0.01)
        seconds, cpu = time.perf_counter() - began, common.cpu_seconds(process.pid)
        process.wait(PATIENCE_S)
    return seconds, cpu


def git(*arguments: str) -> None:
    subprocess.run(["git", "-C", str(HERE), *arguments], check=True)


if __name__ == "__main__":
    app()
