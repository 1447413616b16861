"""Demo: all of it, small, on real clips and on a rendered person, in minutes on two CPU cores.

    make demo

prepare → score → fine-tune a small pre-trained network, which draws people in any pose, to follow one: by plain
training, by the schedule that the presets recommend and, with --search, by Ent-Prog's search, for equal charged seconds
→ generate held-out motions by each → pages that compare them. Whatever wins is printed.

Two subjects, because minutes on a CPU teach so small a network the scene of real clips, but no pose; of one rendered
person, seen by one camera, they teach it the pose too.
"""

import json
import math
import os
import platform
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image

from entprog import config, files, models
from entprog.data import clip_stream, latents, shards
from entprog.diffusion import losses
from entprog.errors import UserError
from entprog.media import assets, h264, sheet, skeleton
from entprog.models import fingerprints
from entprog.quality import posing
from entprog.schedule import plans
from pipelines import charts, cli, compare, generate, prepare, score, terminal, train
from pipelines.cluster import capacity, session
from pipelines.command import usage
from pipelines.generating import driving, motions, rendering
from pipelines.outputs import claim
from pipelines.preparing import latents as caching
from pipelines.tracking.store import how_to_open, tracking_uri
from pipelines.tracking.tracker import versions

app = usage.app("The whole pipeline on real clips: prepare, score, train in two ways, generate, compare.")

BASE = Path(__file__).parent / "demo_base"
"""The pre-trained network that the demo fine-tunes (made by `python -m benchmarks.demo_base`)."""
PERSON = Path(__file__).parent / "demo_person"
"""Clips of a rendered person whose every joint is known (made by `python -m benchmarks.demo_person`)."""
SUBJECTS = {"person": "a rendered person", "real": "real people"}
"""Whose clips the base is fine-tuned on: folder in OUTPUT → what it is called."""
OWN = {"person": [PERSON / "train.yaml"], "real": []}
"""Files of settings over the preset's."""
DIFFER = ("schedule.kind", "train.seed")
"""Settings in which the runs of a subject differ."""
HELD_OUT = "cam04.mp4"
"""The view of the real videos that nothing is trained on."""
ARMS = {"full": "plain training", "progressive": "small clips first", "entprog": "Ent-Prog's search"}
"""Kind of schedule → what it is called."""
SEARCH = "entprog"
"""The arm that is trained only when asked for."""
BEFORE = "before"
STEPS, SHIFT = 12, 3.0
"""Of the sampler: a network that has learned for minutes is cleaner in few steps, most of them on noise."""
POSE_GUIDANCE = 2.0
"""Of networks that were trained with the pose withheld from a tenth of the clips (preset `demo`): so they draw nearer
to the pose, and sharper (docs/schedules.md)."""
COLUMNS = 8
"""Frames of a motion in the picture."""
GIF_FRAME_MS, GIF_HEIGHT = 125, 144
NEARER = 1.1
"""How many times as near to the wanted pose as the base's a drawing is that is called nearer."""
WORTH = 0.75
"""A target loss, as a share of the base's, where plain training got no lower than the base."""


@dataclass(frozen=True)
class HeldOut:
    """A motion that nothing was trained on."""

    motion: motions.Motion
    own: np.ndarray
    """Pose of its reference image, its middle frame: [33, 3]."""
    reference: Path
    pose: Path
    """The files that it is generated from."""


@app.command()
def main(
    output: Annotated[Path, cli.folder("Folder of the demo; the same command again resumes it.")] = Path("out/demo"),
    seconds: Annotated[float, typer.Option(help="Charged seconds of each run on the rendered person.")] = 80.0,
    real_seconds: Annotated[float, typer.Option(help="Charged seconds of each run on real clips.")] = 35.0,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each arm, with train.seed 0, 1, ….")] = 1,
    search: Annotated[bool, typer.Option(help="Train by Ent-Prog's search too.")] = False,
    config_file: cli.ConfigFile = None,
    set_: cli.Set = None,
    dry_run: cli.DryRun = False,
    verbose: cli.Verbose = False,
    help_settings: cli.help_settings() = False,
) -> None:
    """Run everything once and print what came out. Settings given here apply to all runs.

    Leaves in OUTPUT: demo.png and demo.gif, a folder for each subject (person/, real/) with shards/, a folder for each
    arm (model/, charts; further seeds beside them), generated/ and compare/comparison.html, and result.json, whose
    figures are the rendered person's, with the real clips' under `real`. The runs are in MLflow.
    """

    def work() -> dict[str, Any]:
        names = [name for name in ARMS if search or name != SEARCH]
        charged_s = {"person": seconds, "real": real_seconds}
        for pair in set_ or ():
            if (given := pair.partition("=")[0].strip()) in DIFFER:
                raise UserError(f"--set {given}: the demo's runs differ in it; leave it out (--seeds, --search)")
        runs = {
            subject: [
                arm(subject, name, seed, charged_s[subject], output, config_file, set_)
                for seed in range(seeds)
                for name in names
            ]
            for subject in SUBJECTS
        }
        shape, there = runs["person"][0].data.shape, shards.read_dataset(PERSON).shape
        if shape != there:
            raise UserError(f"data.shape: the demo's person was rendered in {there}, given {shape}: leave it out")
        decides = config.deciding(runs["person"][0]) | {"--real-seconds": real_seconds}
        (claim.check if dry_run else claim.take)(output, "demo", decides)
        if dry_run:
            last = runs["person"][-1]
            cli.show_settings(ARMS[names[-1]], last)
            terminal.console.print(
                f"Would prepare real clips, score, train {', '.join(names)} with {seeds} seed(s) from {BASE}, "
                f"{seconds:g} s each on a rendered person, {real_seconds:g} s each on real clips, generate and "
                f"compare, in {output}."
            )
            return {}
        return run(runs, output, verbose=verbose)

    cli.run("demo", None if dry_run else output, work, verbose=verbose)


def arm(subject: str, name: str, seed: int, seconds: float, output: Path, files, pairs) -> config.Experiment:
    """Settings of one run: the preset `demo` with a budget in seconds; a subject's arms differ in the schedule."""
    own = ["train.steps=null", f"train.seconds={seconds}", f"schedule.kind={name}", f"train.seed={seed}"]
    return cli.settings(
        config.Experiment,
        "demo",
        [*OWN[subject], *(files or [])],
        [*own, *(pairs or [])],
        data={"shards": str(output / subject / "shards")},
        model={"base": str(BASE)},
        tracking={"run_name": f"demo-{subject}-{name}-seed-{seed}"},
    )


def place(folder: Path, experiment: config.Experiment) -> Path:
    """Folder of a run in its subject's: `full`, `entprog`, and for further seeds `full-seed-1`, …."""
    seed = experiment.train.seed
    return folder / (experiment.schedule.kind + (f"-seed-{seed}" if seed else ""))


def run(runs: Mapping[str, Sequence[config.Experiment]], output: Path, *, verbose: bool) -> dict[str, Any]:
    """All the steps; each is skipped when it was finished before. A finished demo tells again what came out.
    runs: subject → its runs."""
    started = time.time()
    one = runs["person"][0]
    every = [experiment for subject in runs.values() for experiment in subject]
    identity = config.digest([config.settings(experiment) for experiment in every], fingerprints.base(one.model))
    finished = output / "finished.json"
    if finished.exists() and (known := json.loads(finished.read_text()))["identity"] == identity:
        return _tell(known["result"])
    tables = output / "cei"
    with session.ray_cluster(capacity.LOCAL_CPUS, verbose=verbose):
        _say(1, "prepare: cut clips of people out of real videos, with pose")
        cut = prepared(output, one.data.shape, verbose=verbose)
        copy_person(output / "person" / "shards")
        encode(every, [output / subject for subject in runs], verbose=verbose)

        _say(2, "score: how much does the prediction's entropy grow without each block?")
        scored = score.run(one, output / "score", tables=tables)

        _say(3, f"train {len(every)} times from a base that knows no pose")
        trained: dict[str, dict[str, list[dict[str, Any]]]] = {subject: {} for subject in runs}
        for subject, experiments in runs.items():
            for experiment in experiments:
                name, seed = experiment.schedule.kind, experiment.train.seed
                terminal.console.print(
                    f"{SUBJECTS[subject]}: {ARMS[name]}, seed {seed}, {experiment.train.seconds:g} s", style="bold"
                )
                result = train.run(experiment, place(output / subject, experiment), tables=tables)
                trained[subject].setdefault(name, []).append(result)

    _say(4, "generate the held-out motions by the base and by each arm, and compare")
    held_out = {"person": rendered_motion(output / "person"), "real": real_motion(output, one.data.shape)}
    came = {
        subject: outcome(subject, runs[subject], results, held_out[subject], output)
        for subject, results in trained.items()
    }
    rows = {subject: of.pop("rows") for subject, of in came.items()}
    picture, moving = pictures(rows, output)
    result = {
        **came["person"],
        "subject": SUBJECTS["person"],
        "real": came["real"],
        "prepared": {k: cut[k] for k in ("inputs", "clips", "splits")},
        "score": scored,
        "picture": str(picture),
        "moving_picture": str(moving),
        "wall_s": round(time.time() - started, 1),
        "commit": cli.commit(),  # what is told again later is of this one
        "command": cli.command(),
        **where_it_ran(),
    }
    files.write_json(finished, {"identity": identity, "result": result})
    return _tell(result)


def where_it_ran() -> dict[str, Any]:
    """The machine and the versions, which may be others once the result is looked at."""
    return {
        "device": fingerprints.device_name(torch.device("cpu")),
        "versions": {"python": platform.python_version(), **versions()},
        "load_average": os.getloadavg()[0],
    }


def outcome(
    subject: str,
    experiments: Sequence[config.Experiment],
    trained: Mapping[str, Sequence[dict[str, Any]]],
    held_out: HeldOut,
    output: Path,
) -> dict[str, Any]:
    """What came of a subject's runs: losses, how near what they draw is to the wanted pose, the page that compares
    them, and under `rows` the frames to show."""
    folder, motion, before = output / subject, held_out.motion, loss_before(experiments[0])
    first = {experiment.schedule.kind: experiment for experiment in experiments if experiment.train.seed == 0}
    checkpoints = {BEFORE: BASE} | {name: place(folder, experiment) for name, experiment in first.items()}
    guided = {name: {} if name == BEFORE else {"pose_guidance": POSE_GUIDANCE} for name in checkpoints}
    made = {name: drawn(one, held_out, folder, name, **guided[name]) for name, one in checkpoints.items()}
    clips = {name: h264.decode_rgb(Path(clip["result"]).read_bytes()) for name, clip in made.items()}
    length = len(clips[BEFORE])  # the VAE takes frames in groups
    motion = replace(motion, pose=motion.pose[:length], video=motion.video[:length])

    def away(clip: np.ndarray) -> float:
        return posing.drawn_distance(motion.reference, held_out.own, clip, motion.pose)

    ids = [result["mlflow_run_id"] for results in trained.values() for result in results]
    target, experiment_name = worthwhile(trained["full"], before), experiments[0].tracking.experiment
    page = "compare" if len(ids) == 2 else f"compare-{len(trained)}x{len(trained['full'])}"  # a page is of its runs
    compared = compare.run(experiment_name, folder / page, target, wanted=ids)
    curves = {
        f"{ARMS[name]}, seed {seed}": [(h["charged_s"], h["step"], h["loss"]) for h in result["held_out"]]
        for name, results in trained.items()
        for seed, result in enumerate(results)
    }
    return {
        "before": before,
        "arms": {name: _arm(results, made[name], away(clips[name])) for name, results in trained.items()},
        "pose": {name: away(clip) for name, clip in clips.items()} | {"truth": away(motion.video)},
        "comparison": str(charts.loss_chart(curves, folder / "comparison.png")),
        "compared": {k: compared[k] for k in ("headline", "target_loss", "time_to_target_ratio")},
        "page": compared["page"],
        "rows": frames_to_show(motion, clips),
    }


# ---- steps ----


def prepared(output: Path, shape: config.ClipShape, *, verbose: bool) -> dict[str, Any]:
    """Cut the real videos into OUTPUT/real/shards, HELD_OUT apart, unless it is done; the figures of prepare."""
    videos = assets.demo_videos(output / "videos")
    settings = config.build(
        {"data": {"shape": shape.model_dump()}, "prepare": {"held_out": [HELD_OUT], "stride": 1}}, config.Preparation
    )
    return prepare.run(videos, output / "real" / "shards", settings, verbose=verbose)


def copy_person(folder: Path) -> None:
    """The rendered person's clips, where latents may lie beside them."""
    if not (folder / "dataset.json").exists():  # copied last
        others = shutil.ignore_patterns("dataset.json", "*.yaml")
        shutil.copytree(PERSON, folder, dirs_exist_ok=True, ignore=others, copy_function=shutil.copyfile)
        with files.whole(folder / "dataset.json") as scratch:
            shutil.copyfile(PERSON / "dataset.json", scratch)


def encode(arms: Sequence[config.Experiment], folders: Sequence[Path], *, verbose: bool) -> None:
    """Encode the subjects' training clips once, at every clip shape of an arm, instead of at every step."""
    for schedule in ladders(arms):
        encoding = config.Encoding(model=arms[0].model, schedule=schedule)
        caching.run(*(folder / "shards" for folder in folders), encoding=encoding, verbose=verbose)


def ladders(arms: Sequence[config.Experiment]) -> list[config.Ladder]:
    """What decides the arms' clip shapes, the most first; without those that another one has all shapes of."""
    of = [(set(plans.ladder(arm.schedule, arm.data.shape, last=False)), arm.schedule) for arm in arms]
    found: list[tuple[set[config.ClipShape], config.Ladder]] = []
    for shapes, one in sorted(of, key=lambda pair: -len(pair[0])):
        if not any(shapes <= others for others, _ in found):
            found.append((shapes, config.Ladder(kind=one.kind, shapes=one.shapes, table=one.table)))
    return [ladder for _, ladder in found]


def loss_before(experiment: config.Experiment) -> float:
    """Held-out loss of the base, before the first step, on the clips that all arms are judged by."""
    data, model = experiment.data, experiment.model
    denoiser = models.family(model.family).load(model, "cpu", experiment.train.seed)
    clips = clip_stream.held_out(shards.read_dataset(Path(data.shards)), data.held_out_clips, data.batch_size)
    batches = [latents.encode(denoiser, batch.resized(data.shape)) for batch in clips]
    return losses.held_out_loss(denoiser, batches, data.held_out_draws, data.held_out_seed, experiment.timesteps)


def real_motion(output: Path, shape: config.ClipShape) -> HeldOut:
    """All of HELD_OUT."""
    pose, video = driving.clip(output / "videos" / HELD_OUT, shape, config.Prepare(), most=math.inf)
    return held_out_motion(Path(HELD_OUT).stem, pose, video, output / "real")


def rendered_motion(folder: Path) -> HeldOut:
    """The rendered person's held-out clips, which follow each other."""
    dataset = shards.read_dataset(folder / "shards")
    clips = [
        row
        for info in dataset.splits["held_out"]
        for row in shards.read_rows(dataset.folder / info.file, range(info.clips), ["pose", "video"])
    ]
    pose = np.concatenate([clip["pose"] for clip in clips])
    video = np.concatenate([h264.decode_rgb(clip["video"]) for clip in clips])
    return held_out_motion("person", pose, video, folder)


def held_out_motion(name: str, pose: np.ndarray, video: np.ndarray, folder: Path) -> HeldOut:
    """A motion whose middle frame is its reference image, with both as files in `folder`."""
    middle = len(video) // 2
    reference, poses = folder / "reference.png", folder / "pose.npz"
    Image.fromarray(video[middle]).save(reference)
    np.savez(poses, pose=pose)
    return HeldOut(motions.Motion(name, video[middle], pose, video), pose[middle], reference, poses)


def drawn(checkpoint: Path, held_out: HeldOut, folder: Path, name: str, **how: Any) -> dict[str, Any]:
    """The record of the held-out motion as a checkpoint draws it (pipelines.generate). how: further settings of it."""
    settings = config.Generation(generate=config.Generate(seconds=math.inf, steps=STEPS, shift=SHIFT, **how))
    options = {"reference": held_out.reference, "pose": held_out.pose}
    return generate.run(checkpoint, folder / "generated" / name, settings, **options)["clips"][0]


def worthwhile(plain: Sequence[Mapping[str, Any]], before: float) -> config.Comparison:
    """What to compare at: plain training's final loss, or where it is not below the base's, a loss that is."""
    final = max(result["held_out_loss"] for result in plain)
    return config.build({"compare": {"target_loss": final if final < before else WORTH * before}}, config.Comparison)


def frames_to_show(motion: motions.Motion, made: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Row's title → frames, uint8 RGB [F, H, W, 3]; the reference has one."""
    height, width = motion.reference.shape[:2]
    pose = rendering.pixels(skeleton.draw(torch.from_numpy(motion.pose), height, width))
    titles = {BEFORE: "before: the base, which knows no pose"} | ARMS
    rows = {"reference": motion.reference[None], "pose": pose}
    return rows | {titles[name]: clip for name, clip in made.items()} | {"truth": motion.video}


def pictures(rows: Mapping[str, Mapping[str, np.ndarray]], output: Path) -> tuple[Path, Path]:
    """demo.png, for each subject a row for each of reference, pose, base, arms and truth, and demo.gif, the same side
    by side, the subjects one after the other. rows: subject → `frames_to_show`."""
    titled = [(f"{SUBJECTS[s]}: {name}", clip) for s, of in rows.items() for name, clip in of.items()]
    picture = sheet.contact_sheet(titled, output / "demo.png", columns=COLUMNS)
    frames = []
    for of in rows.values():
        short = dict(zip(of, ("reference", "pose", BEFORE, "plain", *list(of)[4:]), strict=True))
        still = {"reference": np.repeat(of["reference"], len(of["truth"]), 0)}
        frames.extend(sheet.side_by_side([(short[name], clip) for name, clip in (of | still).items()], GIF_HEIGHT))
    first, *others = [Image.fromarray(frame).quantize(128) for frame in frames]
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
    said = [
        *_said("A rendered person in a motion that was held out", result),
        *_said(
            f"Real people, {clips['train']} clips to train on, {clips['held_out']} of a view that was held out",
            result["real"],
        ),
        f"Open {result['picture']}, {result['moving_picture']}, {result['page']} and {result['real']['page']}",
        f"     {how_to_open(tracking_uri())}",
    ]
    terminal.console.print("\nWhat happened", style="bold")
    for line in said:
        terminal.console.print(line, soft_wrap=True, highlight=False, markup=False)
    return result


def _said(title: str, came: Mapping[str, Any]) -> list[str]:
    """What came of one subject's runs."""
    before, pose = came["before"], came["pose"]
    lines = [
        f"{title}: before, held-out loss {before:.3f}, drawn {pose[BEFORE]:.3f} of the height off the wanted pose "
        f"(the true clip: {pose['truth']:.3f})"
    ]
    for name, one in came["arms"].items():
        change = one["held_out_loss"] / before - 1
        nearer = "nearer" if one["pose"] < pose[BEFORE] / NEARER else "no nearer"
        lines.append(
            f"  {ARMS[name]}, {one['seconds']:.0f} s: {one['held_out_loss']:.3f} ({change:+.0%}), "
            f"{one['pose']:.3f} off the pose, {nearer} than before"
        )
    return [*lines, f"  {came['compared']['headline']}"]


def _say(number: int, what: str) -> None:
    terminal.console.print(f"\n{number}/4 {what}", style="bold")


if __name__ == "__main__":
    app()
