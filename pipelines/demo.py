"""Demo: all of it, small, on real clips, in minutes on two CPU cores.

    make demo

prepare → score → fine-tune a small pre-trained network, which draws people in any pose, to follow one: by plain
training, by the schedule that the presets recommend and, with --search, by Ent-Prog's search, for equal charged seconds
→ generate a held-out motion by each → one page that compares them. Whatever wins is printed.
"""

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image

from entprog import config, files, models
from entprog.data import clip_stream, latents, shards
from entprog.diffusion import losses
from entprog.media import assets, h264, sheet, skeleton
from entprog.models import fingerprints
from entprog.quality import posing
from entprog.schedule import plans
from pipelines import charts, cli, compare, generate, prepare, score, train
from pipelines.cluster import launch
from pipelines.generating import motions, rendering
from pipelines.outputs import claim
from pipelines.preparing import latents as caching
from pipelines.tracking.store import how_to_open, tracking_uri

app = cli.app("The whole pipeline on real clips: prepare, score, train in two ways, generate, compare.")

BASE = Path(__file__).parent / "demo_base"
"""The pre-trained network that the demo fine-tunes (made by `python -m benchmarks.demo_base`)."""
HELD_OUT = "cam04.mp4"
"""The view of the demo's videos that nothing is trained on."""
ARMS = {"full": "plain training", "progressive": "small clips first", "entprog": "Ent-Prog's search"}
"""Kind of schedule → what it is called."""
SEARCH = "entprog"
"""The arm that is trained only when asked for."""
BEFORE = "before"
STEPS, SHIFT = 12, 3.0
"""Of the sampler: a network that has learned for minutes is cleaner in few steps, most of them on noise."""
COLUMNS = 8
"""Frames of the motion in the picture."""
GIF_FRAME_MS, GIF_HEIGHT = 125, 192
NEARER = 1.1
"""How many times as near to the wanted pose as the base's a drawing has to be before it is said to be nearer."""
WORTH = 0.75
"""A target loss, as a share of the base's, where plain training got no lower than the base."""


@app.command()
def main(
    output: Annotated[Path, typer.Option(help="Folder of the demo; the same command again resumes it.")] = Path(
        "out/demo"
    ),
    seconds: Annotated[float, typer.Option(help="Charged seconds of each run of an arm (train.seconds).")] = 140.0,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each arm, with train.seed 0, 1, ….")] = 1,
    search: Annotated[bool, typer.Option(help="Train by Ent-Prog's search too.")] = False,
    config_file: cli.ConfigFile = None,
    set_: cli.Set = None,
    dry_run: cli.DryRun = False,
    verbose: cli.Verbose = False,
    help_settings: cli.help_settings() = False,
) -> None:
    """Run everything once and print what came out. Settings given here apply to all arms.

    Leaves in OUTPUT: demo.png and demo.gif, compare/comparison.html, shards/, a folder for each arm (model/, charts,
    generated/; further seeds beside them) and result.json; the runs are in MLflow.
    """

    def work() -> dict[str, Any]:
        names = [name for name in ARMS if search or name != SEARCH]
        arms = [arm(name, seed, seconds, output, config_file, set_) for seed in range(seeds) for name in names]
        (claim.check if dry_run else claim.take)(output, "demo", deciding(arms[0]))
        if dry_run:
            cli.show(ARMS[names[-1]], list(config.settings(arms[-1]).items()), ("setting", "value"))
            cli.console.print(
                f"Would prepare real clips, score, train {', '.join(names)} with {seeds} seed(s) of {seconds:g} s each "
                f"from {BASE}, generate and compare, in {output}."
            )
            return {}
        return run(arms, output, verbose=verbose)

    cli.run("demo", None if dry_run else output, work, verbose=verbose)


def arm(name: str, seed: int, seconds: float, output: Path, files, pairs) -> config.Experiment:
    """Settings of one run: the preset `demo` with a budget in seconds; the arms differ in the schedule alone."""
    return cli.settings(
        config.Experiment,
        "demo",
        files,
        ["train.steps=null", f"train.seconds={seconds}", f"schedule.kind={name}", *(pairs or []), f"train.seed={seed}"],
        data={"shards": str(output / "shards")},
        model={"base": str(BASE)},
        tracking={"run_name": f"demo-{name}-seed-{seed}"},
    )


def deciding(experiment: config.Experiment) -> dict[str, Any]:
    """The settings that a folder of the demo belongs to: more seeds may be added, and it may lie elsewhere."""
    elsewhere = (*config.FREE, *config.PATHS, "data.shards")
    return {
        name: value for name, value in config.settings(experiment).items() if not config.is_part_of(name, elsewhere)
    }


def place(output: Path, experiment: config.Experiment) -> Path:
    """Folder of a run: `full`, `entprog`, and for further seeds `full-seed-1`, …."""
    seed = experiment.train.seed
    return output / (experiment.schedule.kind + (f"-seed-{seed}" if seed else ""))


def run(arms: Sequence[config.Experiment], output: Path, *, verbose: bool) -> dict[str, Any]:
    """All the steps; each is skipped when it was finished before. A finished demo tells again what came out."""
    started = time.time()
    identity = config.digest([config.settings(experiment) for experiment in arms], fingerprints.base(arms[0].model))
    finished = output / "finished.json"
    if finished.exists() and (known := json.loads(finished.read_text()))["identity"] == identity:
        return _tell(known["result"])
    tables, first = output / "cei", {e.schedule.kind: e for e in arms if e.train.seed == 0}
    with cli.ray_cluster(launch.LOCAL_CPUS, verbose=verbose):
        _say(1, "prepare: cut clips of people out of real videos, with pose")
        cut = prepared(output, arms[0].data.shape, verbose=verbose)
        encode(arms, output, verbose=verbose)

        _say(2, "score: how much does the prediction's entropy grow without each block?")
        scored = score.run(arms[0], output / "score", tables=tables)

        _say(3, f"train {len(arms)} times from a base that knows no pose, {arms[0].train.seconds:g} s each")
        trained: dict[str, list[dict[str, Any]]] = {name: [] for name in first}
        for experiment in arms:
            name = experiment.schedule.kind
            cli.console.print(f"{ARMS[name]}, seed {experiment.train.seed}", style="bold")
            trained[name].append(train.run(experiment, place(output, experiment), tables=tables))

    _say(4, "generate the held-out motion by the base and by each arm")
    before = loss_before(arms[0])
    checkpoints = {BEFORE: BASE} | {name: place(output, experiment) for name, experiment in first.items()}
    motion, own = held_out_motion(output, arms[0].data.shape)
    made = {name: drawn(folder, output, name) for name, folder in checkpoints.items()}
    clips = {name: _frames(clip["result"]) for name, clip in made.items()}
    length = len(clips[BEFORE])  # the VAE takes frames in groups
    motion = replace(motion, pose=motion.pose[:length], video=motion.video[:length])
    poses = {name: posing.drawn_distance(motion.reference, own, clip, motion.pose) for name, clip in clips.items()}
    poses["truth"] = posing.drawn_distance(motion.reference, own, motion.video, motion.pose)
    picture, moving = pictures(motion, clips, output)

    _say(5, "compare")
    ids = [result["mlflow_run_id"] for results in trained.values() for result in results]
    compared = compare.run(
        arms[0].tracking.experiment, output / "compare", worthwhile(trained["full"], before), wanted=ids
    )
    curves = {
        f"{ARMS[name]}, seed {seed}": [(h["charged_s"], h["step"], h["loss"]) for h in result["held_out"]]
        for name, results in trained.items()
        for seed, result in enumerate(results)
    }
    result = {
        "before": before,
        "arms": {name: _arm(results, made[name], poses[name]) for name, results in trained.items()},
        "pose": poses,
        "prepared": {k: cut[k] for k in ("inputs", "clips", "splits")},
        "score": scored,
        "comparison": str(charts.loss_chart(curves, output / "comparison.png")),
        "compared": {k: compared[k] for k in ("headline", "target_loss", "time_to_target_ratio")},
        "page": compared["page"],
        "picture": str(picture),
        "moving_picture": str(moving),
        "wall_s": round(time.time() - started, 1),
    }
    files.write_json(finished, {"identity": identity, "result": result})
    return _tell(result)


# ---- steps ----


def prepared(output: Path, shape: config.ClipShape, *, verbose: bool) -> dict[str, Any]:
    """Cut the real videos into OUTPUT/shards, HELD_OUT apart, unless it is done; the figures of prepare."""
    videos = assets.demo_videos(output / "videos")
    settings = config.build(
        {"data": {"shape": shape.model_dump()}, "prepare": {"held_out": [HELD_OUT], "stride": 1}}, config.Preparation
    )
    return prepare.run(videos, output / "shards", settings, verbose=verbose)


def encode(arms: Sequence[config.Experiment], output: Path, *, verbose: bool) -> None:
    """Encode the training clips once, at every clip shape of an arm, instead of at every step."""
    widest = max(arms, key=lambda arm: len(plans.ladder(arm.schedule, arm.data.shape, last=False)))
    kind, shapes, table = widest.schedule.kind, widest.schedule.shapes, widest.schedule.table
    schedule = config.Ladder(kind=kind, shapes=shapes, table=table)
    caching.run(output / "shards", config.Encoding(model=widest.model, schedule=schedule), verbose=verbose)


def loss_before(experiment: config.Experiment) -> float:
    """Held-out loss of the base, before the first step, on the clips that all arms are judged by."""
    data, model = experiment.data, experiment.model
    denoiser = models.family(model.family).load(model, "cpu", experiment.train.seed)
    clips = clip_stream.held_out(shards.read_dataset(Path(data.shards)), data.held_out_clips, data.batch_size)
    batches = [latents.encode(denoiser, batch.resized(data.shape)) for batch in clips]
    return losses.held_out_loss(denoiser, batches, data.held_out_draws, data.held_out_seed)


def held_out_motion(output: Path, shape: config.ClipShape) -> tuple[motions.Motion, np.ndarray]:
    """All of HELD_OUT as one motion, and the pose of its reference image, its middle frame (also left in OUTPUT)."""
    pose, video = motions.driving_clip(output / "videos" / HELD_OUT, shape, config.Prepare(), most=math.inf)
    middle = len(video) // 2
    Image.fromarray(video[middle]).save(output / "reference.png")
    return motions.Motion(Path(HELD_OUT).stem, video[middle], pose, video), pose[middle]


def drawn(checkpoint: Path, output: Path, name: str) -> dict[str, Any]:
    """The record of the held-out motion as a checkpoint draws it (pipelines.generate)."""
    settings = config.Generation(generate=config.Generate(seconds=math.inf, steps=STEPS, shift=SHIFT))
    options = {"reference": output / "reference.png", "video": output / "videos" / HELD_OUT}
    return generate.run(checkpoint, output / "generated" / name, settings, **options)["clips"][0]


def worthwhile(plain: Sequence[Mapping[str, Any]], before: float) -> config.Comparison:
    """What to compare at: plain training's final loss, or where it is not below the base's, a loss that is."""
    final = max(result["held_out_loss"] for result in plain)
    return config.build({"compare": {"target_loss": final if final < before else WORTH * before}}, config.Comparison)


def _frames(path: str) -> np.ndarray:
    return h264.decode_rgb(Path(path).read_bytes())


def pictures(motion: motions.Motion, made: Mapping[str, np.ndarray], output: Path) -> tuple[Path, Path]:
    """demo.png, a row for each of reference, pose, base, arms and truth, and demo.gif, the same side by side."""
    frames, (height, width) = len(motion.video), motion.reference.shape[:2]
    pose = rendering.pixels(skeleton.draw(torch.from_numpy(motion.pose), height, width))
    titles = {BEFORE: "before: the base, which knows no pose"} | ARMS
    rows = {"reference": motion.reference[None], "pose": pose}
    rows |= {titles[name]: clip for name, clip in made.items()} | {"truth": motion.video}
    picture = sheet.contact_sheet(list(rows.items()), output / "demo.png", columns=COLUMNS)
    short = {titles[BEFORE]: BEFORE, ARMS["full"]: "plain"}
    still = {"reference": np.repeat(motion.reference[None], frames, 0)}
    side = sheet.side_by_side([(short.get(name, name), clip) for name, clip in (rows | still).items()], GIF_HEIGHT)
    first, *others = [Image.fromarray(frame).quantize(128) for frame in side]
    with files.whole(output / "demo.gif") as scratch:
        first.save(scratch, "GIF", save_all=True, append_images=others, duration=GIF_FRAME_MS, loop=0)
    return picture, output / "demo.gif"


# ---- what came out ----


def _arm(results: Sequence[dict[str, Any]], clip: Mapping[str, Any], pose: float) -> dict[str, Any]:
    """The first seed's figures and clip, with all seeds' figures beside."""
    names = ("held_out_loss", "seconds", "search_seconds", "score_seconds", "flops", "peak_memory_bytes", "steps")
    names = (*names, "mlflow_run_id")
    seeds = [{name: result[name] for name in names} for result in results]
    return seeds[0] | {"pose": pose, "videos": [clip["video"]], "seeds": seeds}


def _tell(result: dict[str, Any]) -> dict[str, Any]:
    """Ten lines on the terminal: what happened, and what to open."""
    clips = {split: figures["clips"] for split, figures in result["prepared"]["splits"].items()}
    before, pose = result["before"], result["pose"]
    said = [
        f"{clips['train']} clips of real people to train on, {clips['held_out']} of a view that was held out",
        f"before: held-out loss {before:.3f}, drawn {pose[BEFORE]:.3f} of the picture's height off the wanted pose",
    ]
    for name, one in result["arms"].items():
        title = ARMS[name]
        off = 1 - one["held_out_loss"] / before
        nearer = pose[BEFORE] / max(one["pose"], 1e-9)
        than_base = f"{nearer:.1f} times as near as the base" if nearer >= NEARER else "no nearer than the base"
        said.append(
            f"{title}, {one['seconds']:.0f} s: {one['held_out_loss']:.3f} ({-off:+.0%}), "
            f"{one['pose']:.3f} off the pose, {than_base}"
        )
    said += [
        result["compared"]["headline"],
        f"Open {result['picture']} and {result['moving_picture']}: the held-out motion by each",
        f"     {result['page']}: the comparison",
        f"     {how_to_open(tracking_uri())}",
    ]
    cli.console.print("\nWhat happened", style="bold")
    for line in said:
        cli.console.print(line, soft_wrap=True, highlight=False, markup=False)
    return result


def _say(number: int, what: str) -> None:
    cli.console.print(f"\n{number}/5 {what}", style="bold")


if __name__ == "__main__":
    app()
