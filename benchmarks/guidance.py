"""What guidance does to a network that was trained with conditions dropped, and to one that never was.

    python -m benchmarks.guidance                    # two seeds

The demo's base is fine-tuned on the demo's rendered person by plain training, for as many steps as the demo takes, once
with a share of the clips shown without pose, and as large a share without reference (`train.drop`), and once with all
conditions always. Each draws the held-out clips by several strengths of guidance, of both conditions alike and of the
pose alone, which are measured as `evaluate` does; `pose_distance` is the demo's, of the whole held-out motion: how far
from the wanted skeleton what is drawn lies, over the picture's height.

Leaves benchmarks/results/guidance.json after every strength: a row each, and their means over seeds. The same command
again goes on where it stopped.
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks import common
from entprog import config, files
from entprog.media import h264
from entprog.quality import posing
from entprog.quality.metrics import Meter
from pipelines import cli, demo, generate, train
from pipelines.cluster import capacity, session
from pipelines.command import usage
from pipelines.generating import motions
from pipelines.outputs import claim

app = usage.app("What guidance does to networks trained with conditions dropped, and without.")

RATES = (0.1, 0.0)
"""Shares of training clips without pose, and without reference, of the two arms; presets of published bases: 0.1."""
STRENGTHS = (1.0, 1.5, 2.0, 3.0)
METRICS = ("psnr", "ssim", "stlpips")
CLIPS = 8
"""Held-out clips: all that there are."""
JUDGED = (*METRICS, "pose_distance")
GROUP = ("drop", "reference_guidance", "pose_guidance")
"""Columns that rows of the same means share."""


@dataclass(frozen=True)
class Cell:
    """A trained network and how strongly it is guided."""

    drop: float
    seed: int
    reference: float
    pose: float

    @property
    def arm(self) -> str:
        """Folder of its training."""
        return f"drop-{self.drop:g}-seed-{self.seed}"

    @property
    def name(self) -> str:
        return f"{self.arm}-reference-{self.reference:g}-pose-{self.pose:g}"

    @property
    def how(self) -> dict[str, float]:
        """Its settings of `generate`."""
        return {"reference_guidance": self.reference, "pose_guidance": self.pose}


@app.command()
def main(
    steps: Annotated[int, typer.Option(min=1, help="Of each training.")] = 540,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each arm, with train.seed 0, 1, ….")] = 2,
    work: Annotated[Path, cli.folder("Folder of the trainings and their clips.")] = Path("out/guidance"),
    verbose: cli.Verbose = False,
) -> None:
    """Train both arms, draw and judge by every strength; print the means and keep all figures."""

    def measure() -> dict[str, Any]:
        claim.take(work, "guidance", {"code": common.source(), "--steps": steps})
        with session.ray_cluster(capacity.LOCAL_CPUS, verbose=verbose):
            rows = run(work, steps, seeds, verbose=verbose)
        common.show("guidance", means(rows))
        return {"means": means(rows)}

    cli.run("guidance", work, measure, verbose=verbose)


def cells(seeds: int) -> list[Cell]:
    """Seed by seed, so that whatever has been measured compares the arms."""
    both = [(strength, strength) for strength in STRENGTHS]
    alone = [(1.0, strength) for strength in STRENGTHS[1:]]
    return [Cell(rate, seed, *pair) for seed in range(seeds) for rate in RATES for pair in (*both, *alone)]


def experiment(cell: Cell, steps: int, work: Path) -> config.Experiment:
    """A cell's training: the demo's plain one on the rendered person, of so many steps."""
    own = [f"train.steps={steps}", "train.seconds=null", "train.samples=0"]
    own += [f"train.drop.{name}={cell.drop}" for name in ("reference", "pose")]
    own += [f"tracking.run_name=guidance-{cell.arm}"]
    return demo.arm("person", "full", cell.seed, 1.0, work, None, own)


def run(work: Path, steps: int, seeds: int, *, verbose: bool) -> list[dict[str, Any]]:
    """Every cell's row, those of an earlier call as they were; on the connected Ray cluster."""
    shards, kept = work / "person" / "shards", work / "rows.json"
    rows: dict[str, dict[str, Any]] = json.loads(kept.read_text()) if kept.exists() else {}
    commit, todo, meter = _commit(work), cells(seeds), Meter(METRICS, config.Evaluate())
    demo.copy_person(shards)
    demo.encode([experiment(cell, steps, work) for cell in todo], [work / "person"], verbose=verbose)
    held_out = demo.rendered_motion(work / "person")
    for cell in todo:
        if cell.name not in rows:
            trained = train.run(experiment(cell, steps, work), work / cell.arm)
            rows[cell.name] = row(cell, trained, held_out, meter, work)
            files.write_json(kept, rows)
        done = [rows[one.name] for one in todo if one.name in rows]
        common.write("guidance", done, device="cpu", repeats=seeds, more={"commit": commit, "means": means(done)})
    return done


def _commit(work: Path) -> str:
    """The commit at which the first call began: the results that it left are a change too."""
    kept = work / "commit"
    if not kept.exists():
        kept.write_text(common.about("cpu")["commit"])
    return kept.read_text()


def row(cell: Cell, trained: dict[str, Any], held_out: demo.HeldOut, meter: Meter, work: Path) -> dict[str, Any]:
    """A cell's clips, judged. trained: the result of its training."""
    how = {"steps": demo.STEPS, "shift": demo.SHIFT, "count": CLIPS, **cell.how}
    settings, shards = config.Generation(generate=config.Generate(**how)), work / "person" / "shards"
    made = generate.run(work / cell.arm, work / "clips" / cell.name, settings, shards=shards)["clips"]
    shape = experiment(cell, 1, work).data.shape
    wanted = motions.motions_from_shards(shards, None, "held_out", settings, shape)
    measured = [
        meter.measure(frames(clip), motion.video, motion.reference, motion.pose).values
        for clip, motion in zip(made, wanted, strict=True)
    ]
    figures = {name: statistics.mean(one[name] for one in measured) for name in METRICS}
    moved = frames(demo.drawn(work / cell.arm, held_out, work, cell.name, **cell.how))
    of = held_out.motion
    figures["pose_distance"] = posing.drawn_distance(of.reference, held_out.own, moved, of.pose[: len(moved)])
    about = {name: trained[name] for name in ("steps", "seconds", "held_out_loss")}
    return {"drop": cell.drop, "seed": cell.seed, **cell.how, **figures, **about}


def frames(clip: dict[str, Any]) -> np.ndarray:
    """A generated clip, uint8 RGB [F, H, W, 3], by its record."""
    return h264.decode_rgb(Path(clip["result"]).read_bytes())


def means(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each arm and strength the means over seeds of what is judged, and how many seeds there are."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for one in rows:
        groups.setdefault(tuple(one[name] for name in GROUP), []).append(one)
    return [
        dict(zip(GROUP, group, strict=True))
        | {name: statistics.mean(one[name] for one in of) for name in JUDGED}
        | {"seeds": len(of)}
        for group, of in groups.items()
    ]


if __name__ == "__main__":
    app()
