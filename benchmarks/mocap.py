"""Rendered people with exact pose: motion capture → shards, by Ray Data. What the study trains on.

    pip install '.[study]'
    python -m benchmarks.mocap --output out/mocap                   # 2,000 source and 512 target clips; < 5 minutes
    python -m benchmarks.mocap --output out/mocap --frames 16 --height 128 --width 96 --source 20000 --target 4000

Leaves OUTPUT/source and OUTPUT/target, datasets as pipelines.prepare writes them, and OUTPUT/NAME/contact_sheet.png.
The target has other motions and other bodies than the source, and holds out a motion and bodies of its own. A clip is a
function of (seed, dataset, split, its number, clip shape): the same command renders the same bytes.
"""

import importlib.util
import io
import json
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image

from benchmarks.mannequin import Camera, Stage, at, motion, random_body
from entprog import files
from entprog.config import ClipShape, digest
from entprog.data import shards
from entprog.errors import UserError, install
from entprog.media import h264, sheet, video
from pipelines import cli, terminal
from pipelines.cluster import session
from pipelines.command import usage
from pipelines.outputs import claim

app = usage.app("Render motion capture into shards of clips with exact pose.")

MOTIONS = {
    ("source", "train"): ("walk", "run", "jump", "punch", "spin"),
    ("source", "held_out"): ("walk", "run", "jump", "punch", "spin"),
    ("target", "train"): ("dance_a", "kick", "spinkick"),
    ("target", "held_out"): ("dance_b",),
    ("varied", "train"): ("walk", "run", "jump", "punch", "spin", "dance_a", "kick", "spinkick"),
    ("varied", "held_out"): ("dance_b",),
}
"""(dataset, split) → what is shown. `varied` is what the demo's base is made of (benchmarks.demo_base)."""
BODIES = {"source": 64, "target": 64, "varied": 4096}
"""Different people in each split of a dataset."""
CLIPS_PER_SHARD = 128
CRF = 12
OVERSAMPLING = 2
"""Rendered so much larger and averaged: the renderer's edges are hard."""
MARGIN = 0.06
"""Least room between a joint and the picture's edge, as a share of its sides."""


@app.command()
def main(
    output: Annotated[Path, typer.Option(help="Folder for both datasets.")] = Path("out/mocap"),
    source: Annotated[int, typer.Option(min=1, help="Training clips of the source.")] = 2000,
    target: Annotated[int, typer.Option(min=1, help="Training clips of the target.")] = 512,
    held_out: Annotated[int, typer.Option(min=1, help="Held-out clips of each.")] = 64,
    frames: Annotated[int, typer.Option(min=1, help="Frames in a clip.")] = 8,
    height: Annotated[int, typer.Option(min=16, help="Pixels, even.")] = 64,
    width: Annotated[int, typer.Option(min=16, help="Pixels, even.")] = 48,
    fps: Annotated[float, typer.Option(min=1, help="Frames per second.")] = 12.0,
    seed: Annotated[int, typer.Option(min=0, help="Of everything that varies.")] = 0,
    dry_run: cli.DryRun = False,
    verbose: cli.Verbose = False,
) -> None:
    """Render both datasets; the same command again leaves finished ones alone."""

    def work() -> dict[str, Any]:
        if height % 2 or width % 2:
            raise UserError(f"--height {height} --width {width}: clips have even sides")
        shape = ClipShape(frames=frames, height=height, width=width, fps=fps)
        counts = {"source": (source, held_out), "target": (target, held_out)}
        if dry_run:
            terminal.console.print(f"Would render {counts} (training, held-out) clips of {shape} into {output}.")
            return {}
        claim.take(output, "mocap", {"counts": counts, "shape": str(shape), "seed": seed})
        with session.ray_cluster(1, verbose=verbose):
            return {name: run(output / name, name, *each, shape, seed) for name, each in counts.items()}

    cli.run("mocap", None if dry_run else output, work, verbose=verbose)


def run(folder: Path, name: str, train: int, held_out: int, shape: ClipShape, seed: int) -> dict[str, Any]:
    """Render one dataset on the connected Ray; figures of it. Raises UserError without pybullet."""
    if importlib.util.find_spec("pybullet") is None:
        raise UserError(f"rendering motion capture needs pybullet: {install('study')}")
    settings = {"prepare": {"crf": CRF, "pose": "exact"}, "mocap": {"seed": seed, "train": train, "held_out": held_out}}
    mark, mine = folder / "mocap.json", {**settings, "shape": shape.model_dump()}
    known = shards.read_dataset(folder) if (folder / "dataset.json").exists() else None
    theirs = {**known.settings, "shape": known.shape.model_dump()} if known else mine
    if mark.exists():
        theirs = json.loads(mark.read_text())
    if theirs != mine:
        raise UserError(f"{folder} holds clips rendered otherwise: choose another --output, or delete it")
    files.write_json(mark, mine)
    if known:
        return {"clips": train + held_out, "seconds": 0.0, "fingerprint": known.fingerprint}
    import ray

    started = time.time()
    plans = [
        {"split": split, "first": first, "stop": min(first + CLIPS_PER_SHARD, count)}
        for split, count in (("train", train), ("held_out", held_out))
        for first in range(0, count, CLIPS_PER_SHARD)
    ]
    work = partial(render_shard, folder=str(folder.resolve()), name=name, shape=shape, seed=seed)
    found, done = {split: [] for split in shards.SPLITS}, 0
    rows = ray.data.from_items(plans, override_num_blocks=len(plans)).map(work).iter_rows()
    for number, row in enumerate(rows, 1):
        found[row["split"]].append(shards.ShardInfo(row["file"], row["clips"], row["bytes"], row["sha256"]))
        done += row["clips"]
        rate = done / (time.time() - started)
        left_s = (train + held_out - done) / rate
        terminal.console.print(f"{name}: {number}/{len(plans)} shards, {rate:.0f} clips/s, ETA {left_s:.0f} s")
    ordered = {split: sorted(infos, key=lambda info: info.file) for split, infos in found.items()}
    dataset = shards.write_dataset(folder, shape, ordered, settings)
    show(dataset, folder / "contact_sheet.png")
    return {
        "clips": done,
        "seconds": round(time.time() - started, 2),
        "fingerprint": dataset.fingerprint,
    }


def render_shard(plan: Mapping[str, Any], folder: str, name: str, shape: ClipShape, seed: int) -> dict[str, Any]:
    """Operator: render some clips and write them as one shard, unless an earlier run has."""
    split, first, stop = plan["split"], plan["first"], plan["stop"]
    file = f"{split}/{first // CLIPS_PER_SHARD:05d}.parquet"
    path = Path(folder, file)
    if path.exists():  # shards are written whole or not at all
        info = shards.ShardInfo(file, stop - first, path.stat().st_size, files.sha256(path))
    else:
        clips = (render(name, split, number, shape, seed) for number in range(first, stop))
        info = shards.write_shard(Path(folder), file, clips, shape)
    return {"split": split, "file": info.file, "clips": info.clips, "bytes": info.bytes, "sha256": info.sha256}


def render(name: str, split: str, number: int, shape: ClipShape, seed: int) -> dict[str, Any]:
    """One clip, as a row of a shard."""
    place = [seed, sorted(MOTIONS).index((name, split))]
    rng = np.random.default_rng([*place, 1, number])
    who = int(rng.integers(BODIES[name]))
    stage = Stage(random_body(np.random.default_rng([*place, 0, who])))
    what = MOTIONS[name, split][number % len(MOTIONS[name, split])]
    speed = rng.uniform(0.8, 1.2)
    times_s = _start_s(stage, what, shape, speed, rng) + speed * np.arange(shape.frames) / shape.fps
    moves = [at(stage.data, what, time_s) for time_s in times_s]
    middle = np.mean([move[[1, 3]] for move in moves], axis=0)
    still = at(stage.data, what, rng.uniform(0, motion(stage.data, what)[0][-1]))  # who: at another moment
    world = np.stack([stage.put(still, middle), *(stage.put(move) for move in moves)])
    camera = _camera(world, shape.width / shape.height, rng)
    _room(stage, world, camera, rng)
    light = np.array([rng.uniform(-1, 1), rng.uniform(0.8, 2), rng.uniform(-1, 1)]) * 10
    pictures = []
    for move, where in ((still, middle), *((move, None) for move in moves)):
        stage.put(move, where)
        size = shape.height * OVERSAMPLING, shape.width * OVERSAMPLING
        pictures.append(video.scale(stage.picture(camera, *size, light), (shape.height, shape.width)))
    points = camera.project(world[1:], shape.width / shape.height)
    origin = f"{name}/{split}/{what}/body{who:02d}"
    return row(f"{name}-{split}-{number:06d}", origin, split, what, times_s[0], shape, seed, pictures, points, CRF)


def row(
    clip_id: str,
    origin: str,
    split: str,
    caption: str,
    start_s: float,
    shape: ClipShape,
    seed: int,
    pictures: Sequence[np.ndarray],
    points: np.ndarray,
    crf: int,
) -> dict[str, Any]:
    """A rendered clip as a row of a shard. pictures: uint8 RGB [height, width, 3], the reference first, then the
    frames. points: x, y of BlazePose's points in every frame [frames, 33, 2], in 0..1."""
    pose = np.concatenate([points, np.ones((*points.shape[:2], 1))], -1).astype(np.float32)
    reference = io.BytesIO()
    Image.fromarray(pictures[0]).save(reference, "PNG")
    return {
        "clip_id": clip_id,
        "source": origin,
        "source_sha256": digest(origin, seed),
        "split": split,
        "caption": caption,
        "start_s": float(start_s),
        "fps": shape.fps,
        "frames": shape.frames,
        "height": shape.height,
        "width": shape.width,
        "source_height": shape.height,
        "source_width": shape.width,
        "crop_left": 0,
        "crop_top": 0,
        "crop_width": shape.width,
        "crop_height": shape.height,
        "visibility": 1.0,
        "reference_s": 0.0,
        "reference": reference.getvalue(),
        "pose": pose,
        "video": h264.encode(np.stack(pictures[1:]), shape.fps, crf=crf),
    }


def _start_s(stage: Stage, what: str, shape: ClipShape, speed: float, rng: np.random.Generator) -> float:
    """Anywhere in a motion that goes round; in another one so that the clip ends with it, if it is long enough."""
    starts, _, loops = motion(stage.data, what)
    free_s = starts[-1] if loops else max(0.0, starts[-1] - speed * (shape.frames - 1) / shape.fps)
    return rng.uniform(0, free_s) if free_s else 0.0


def _camera(world: np.ndarray, aspect: float, rng: np.random.Generator) -> Camera:
    """A camera anywhere around, near enough for the person to fill the picture and far enough to be whole in it."""
    points = world.reshape(-1, 3)
    low, high = points.min(0) - 0.08, points.max(0) + 0.1  # joints lie inside the body
    corners = np.array(np.meshgrid(*zip(low, high, strict=True))).reshape(3, -1).T
    points = np.concatenate([points + np.array((0, 0.1, 0)), points - np.array((0, 0.08, 0))])
    looks = (
        corners.mean(0),
        rng.uniform(0, 2 * np.pi),
        np.radians(rng.uniform(-2, 18)),
        np.radians(rng.uniform(30, 55)),
    )
    near, far = 0.8, 40.0
    for _ in range(30):
        camera = Camera(*looks, distance=(near + far) / 2)
        inside = camera.project(points, aspect)
        fits = inside.min() > MARGIN and inside.max() < 1 - MARGIN
        near, far = (near, camera.distance) if fits else (camera.distance, far)
    return Camera(*looks, distance=far * rng.uniform(1.0, 1.2))


def _room(stage: Stage, world: np.ndarray, camera: Camera, rng: np.random.Generator) -> None:
    """Floor and wall behind the person, seen from the camera, and some coloured boxes along the wall."""
    floor, wall = rng.uniform(0.15, 0.9, 3), rng.uniform(0.15, 0.95, 3)
    lowest = world[..., 1].min() - 0.05
    away = -np.array([np.cos(camera.yaw_rad), 0, np.sin(camera.yaw_rad)])
    across = np.array([-away[2], 0, away[0]])
    center = np.array([camera.target[0], lowest, camera.target[2]])
    behind = rng.uniform(1.5, 3.0)
    stage.box(center - (0, 0.05, 0), (15, 0.05, 15), 0.0, floor)
    stage.box(center + (behind + 0.1) * away + (0, 5, 0), (0.1, 6, 15), camera.yaw_rad, wall)
    for _ in range(int(rng.integers(2, 6))):
        half = tuple(rng.uniform(0.1, 0.5, 3) * (0.2, 1, 1))
        place = center + behind * away + rng.uniform(-2.5, 2.5) * across + (0, rng.uniform(0.1, 2.5), 0)
        stage.box(place, half, camera.yaw_rad, rng.uniform(0, 1, 3))


def show(dataset: shards.Dataset, path: Path, clips: int = 8) -> Path:
    """A contact sheet: some clips of every split, each with its reference first and its pose drawn below."""
    rows = []
    for split in shards.SPLITS:
        index = shards.index(dataset, split)
        for number in np.unique(np.linspace(0, len(index) - 1, clips // 2).round().astype(int)):
            file, row = index[number]
            (clip,) = shards.read_rows(dataset.folder / file, [row])
            seen = h264.decode_rgb(clip["video"])
            reference = np.asarray(Image.open(io.BytesIO(clip["reference"]), formats=["PNG"]))
            drawn = sheet.overlay(seen, clip["pose"])
            rows.append(
                (f"{clip['clip_id']}, {clip['source']}: reference, clip", np.concatenate([reference[None], seen]))
            )
            rows.append(("pose over it", np.concatenate([np.zeros_like(reference)[None], drawn])))
    return sheet.contact_sheet(rows, path, columns=dataset.shape.frames + 1)


if __name__ == "__main__":
    app()
