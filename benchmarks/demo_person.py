"""One rendered person in one room, who the demo's base learns to pose: clips that come with the project.

    pip install '.[study]'
    python -m benchmarks.demo_person                                # a minute on one core

Minutes of fine-tuning teach a network of two million parameters no pose from real clips. They do teach it one figure
whose every joint is known, seen by one camera, on the spot. Motions and their mirror images are trained on; another
motion is held out, whose windows follow each other. Leaves a dataset as pipelines.prepare writes it.
"""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks import mocap
from benchmarks.mannequin import HINGES, LEFT, RIGHT, SPHERICAL, Body, Camera, Stage, at, motion
from entprog import config
from entprog.config import ClipShape
from entprog.data import shards
from entprog.errors import UserError, install
from entprog.media import video
from pipelines import cli, demo, terminal
from pipelines.command import usage

app = usage.app("Render the person that the demo fine-tunes its base on.")

TRAIN = ("walk", "run", "jump", "punch", "spin", "dance_a", "kick", "spinkick")
HELD_OUT = "dance_b"
BODY = Body(
    legs=1.0,
    arms=1.0,
    girth=1.0,
    head=1.05,
    colors={
        "skin": (0.93, 0.70, 0.55),
        "sleeve": (0.93, 0.70, 0.55),
        "shirt": (0.85, 0.16, 0.13),
        "trousers": (0.10, 0.13, 0.45),
        "shoes": (0.12, 0.12, 0.12),
    },
)
CAMERA = Camera(np.array([0.0, 0.92, 0.0]), yaw_rad=0.35, pitch_rad=0.08, fov_rad=0.70, distance=3.3)
LIGHT = np.array([8.0, 15.0, 6.0])
CRF = 20
SPEEDS = (0.8, 1.2)
OPPOSITE = dict(zip((*RIGHT, *LEFT), (*LEFT, *RIGHT), strict=True))
"""Joint of a limb → that of the other side."""


@app.command()
def main(
    output: Annotated[Path, typer.Option(help="Where the dataset is left; a folder that is not there.")] = (
        demo.PERSON
    ),
    clips: Annotated[int, typer.Option(min=1, help="Clips to train on.")] = 384,
    held_out: Annotated[int, typer.Option(min=1, help="Clips of the motion that is held out.")] = 8,
    dry_run: cli.DryRun = False,
    verbose: cli.Verbose = False,
) -> None:
    """Render training clips, and the held-out motion window by window."""

    def work() -> dict[str, Any]:
        if importlib.util.find_spec("pybullet") is None:
            raise UserError(f"rendering motion capture needs pybullet: {install('study')}")
        if output.exists():
            raise UserError(f"{output} exists: delete it, or choose another --output")
        if dry_run:
            terminal.console.print(f"Would render {clips} training and {held_out} held-out clips into {output}.")
            return {}
        return run(
            output, config.ClipShape(frames=5, height=64, width=48, fps=12.0), {"train": clips, "held_out": held_out}
        )

    cli.run("demo_person", None, work, verbose=verbose)


def run(output: Path, shape: ClipShape, counts: dict[str, int]) -> dict[str, Any]:
    """Render the dataset into OUTPUT; figures of it."""
    stage = Stage(BODY)
    furnish(stage)
    found = {
        split: [shards.write_shard(output, f"{split}/00000.parquet", rendered(stage, split, count, shape), shape)]
        for split, count in counts.items()
    }
    settings = {"prepare": {"crf": CRF, "pose": "exact"}, "demo_person": counts}
    dataset = shards.write_dataset(output, shape, found, settings)
    return {"clips": sum(counts.values()), "fingerprint": dataset.fingerprint}


def rendered(stage: Stage, split: str, count: int, shape: ClipShape) -> Iterator[dict[str, Any]]:
    """Rows of a split: training clips begin anywhere in a motion, held-out ones follow each other in theirs."""
    for number in range(count):
        rng = np.random.default_rng([shards.SPLITS.index(split), number])
        if split == "held_out":
            what, mirror, speed, start_s = HELD_OUT, False, 1.0, number * shape.frames / shape.fps
        else:
            what, mirror = TRAIN[number % len(TRAIN)], bool(number // len(TRAIN) % 2)
            speed, start_s = rng.uniform(*SPEEDS), rng.uniform(0, motion(stage.data, what)[0][-1])
        times_s = start_s + speed * np.arange(shape.frames) / shape.fps
        still_s = rng.uniform(0, motion(stage.data, what)[0][-1])
        moves = [at(stage.data, what, time_s) for time_s in (still_s, *times_s)]  # the reference: at another moment
        pictures, points = [], []
        for move in map(mirrored, moves) if mirror else moves:
            points.append(stage.put(move, np.zeros(2)))
            size = shape.height * mocap.OVERSAMPLING, shape.width * mocap.OVERSAMPLING
            pictures.append(video.scale(stage.picture(CAMERA, *size, LIGHT), (shape.height, shape.width)))
        seen = CAMERA.project(np.stack(points[1:]), shape.width / shape.height)
        origin = f"person/{split}/{what}{'-mirrored' if mirror else ''}"
        yield mocap.row(f"{split}-{number:04d}", origin, split, what, times_s[0], shape, 0, pictures, seen, CRF)


def furnish(stage: Stage) -> None:
    """Floor, wall and two pictures on it, behind the person as the camera sees it."""
    away = -np.array([np.cos(CAMERA.yaw_rad), 0, np.sin(CAMERA.yaw_rad)])
    across = np.array([-away[2], 0, away[0]])
    stage.box(np.array([0, -0.07, 0]), (15, 0.05, 15), 0.0, np.array([0.55, 0.45, 0.35]))
    stage.box(2.1 * away + (0, 5, 0), (0.1, 6, 15), CAMERA.yaw_rad, np.array([0.62, 0.70, 0.68]))
    for sideways, up, color in ((-0.95, 1.7, (0.95, 0.75, 0.2)), (1.05, 1.2, (0.25, 0.5, 0.35))):
        place = 2.0 * away + sideways * across + (0, up, 0)
        stage.box(place, (0.05, 0.3, 0.25), CAMERA.yaw_rad, np.array(color))


def mirrored(frame: np.ndarray) -> np.ndarray:
    """A frame of motion capture [44] as a mirror shows it: right and left joints change places."""
    out = frame.copy()
    out[3] *= -1
    turned = (1, -1, -1, 1)  # w, x, y, z
    out[4:8] = frame[4:8] * turned
    for joint, start in SPHERICAL.items():
        there = SPHERICAL[OPPOSITE.get(joint, joint)]
        out[start : start + 4] = frame[there : there + 4] * turned
    for joint, place in HINGES.items():
        out[place] = frame[HINGES[OPPOSITE[joint]]]
    return out


if __name__ == "__main__":
    app()
