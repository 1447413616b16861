"""Demo: all of it, small, on real clips, in minutes on two CPU cores.

    make demo

prepare → brief pre-training of a tiny base (reference image only) → score → plain training and Ent-Prog with equal
seconds from the same base, several seeds → a sweep of a few short trials → a generated clip of the held-out motion by
each arm → one page that compares them. It reports what came out.
"""

import shutil
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from entprog import config
from entprog.data import shards
from entprog.media import assets, h264, sheet, skeleton
from pipelines import charts, cli, compare, generate, prepare, score, train, tune
from pipelines.cluster import launch
from pipelines.generating import motions, rendering
from pipelines.outputs import claim
from pipelines.sweeping import spaces  # fmt: skip
from pipelines.tracking.store import how_to_open, tracking_uri

app = cli.app("The whole pipeline on real clips: prepare, pre-train, score, train both ways, sweep, generate, compare.")

BASE = Path(__file__).parent / "demo_base"
"""The pre-trained network that the demo fine-tunes (made by `python -m benchmarks.demo_base`)."""
HELD_OUT = "cam04.mp4"
"""The view of the demo's videos that nothing is trained on."""
ARMS = {"full": "plain training", "entprog": "Ent-Prog"}
SPACE = "convergence"
"""What the sweep varies."""


@app.command()
def main(
    output: Annotated[Path, typer.Option(help="Folder of the demo; the same command again resumes it.")] = Path(
        "out/demo"
    ),
    seconds: Annotated[float, typer.Option(help="Charged seconds of each run of an arm (train.seconds).")] = 60.0,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each arm, with train.seed 0, 1, ….")] = 2,
    base_steps: Annotated[int, typer.Option(help="Steps of the base's pre-training.")] = 500,
    trials: Annotated[int, typer.Option(min=0, help="Trials of the sweep; 0: none (tune.trials).")] = 4,
    trial_seconds: Annotated[float, typer.Option(help="Charged seconds of each trial (train.seconds).")] = 20.0,
    config_file: cli.ConfigFile = None,
    set_: cli.Set = None,
    dry_run: cli.DryRun = False,
    verbose: cli.Verbose = False,
    help_settings: cli.help_settings() = False,
) -> None:
    """Run everything once and print the comparison. Settings given here apply to both arms and to the sweep.

    Leaves in OUTPUT: shards/, base/, full/, entprog/ (each with model/, charts; further seeds beside them), sweep/,
    generated clips, compare/comparison.html and result.json; the runs are in MLflow.
    """

    def work() -> dict[str, Any]:
        base_experiment = cli.settings(config.Experiment, "demo_base", None, None, train={"steps": base_steps})
        arms = [arm(name, seed, seconds, output, config_file, set_) for seed in range(seeds) for name in ARMS]
        sweep = sweep_of(trials, trial_seconds, output, config_file, set_) if trials else None
        identity = {"--base-steps": base_steps, "--trials": trials, "--trial-seconds": trial_seconds}
        identity |= {  # more seeds may be added
            name: value
            for name, value in config.settings(arms[0]).items()
            if not config.is_part_of(name, (*config.FREE, *config.PATHS, "data.shards"))
        }
        (claim.check if dry_run else claim.take)(output, "demo", identity)
        if dry_run:
            cli.show("Ent-Prog", list(config.settings(arms[1]).items()), ("setting", "value"))
            cli.console.print(
                f"Would prepare real clips, pre-train for {base_steps} steps, score, train {' and '.join(ARMS)} with "
                f"{seeds} seed(s) of {seconds:g} s each, try {trials} settings for {trial_seconds:g} s each, "
                f"generate and compare, in {output}."
            )
            return {}
        return run(base_experiment, arms, sweep, output, verbose=verbose)

    cli.run("demo", None if dry_run else output, work, verbose=verbose)


def prepared(output: Path, shape: config.ClipShape, *, verbose: bool) -> dict[str, Any]:
    """Cut the real videos into OUTPUT/shards, HELD_OUT apart, unless it is done; the figures of prepare."""
    videos = assets.demo_videos(output / "videos")
    settings = config.build(
        {"data": {"shape": shape.model_dump()}, "prepare": {"held_out": [HELD_OUT], "stride": 1}}, config.Preparation
    )
    return prepare.run(videos, output / "shards", settings, verbose=verbose)


def arm(name: str, seed: int, seconds: float, output: Path, files, pairs) -> config.Experiment:
    """Settings of one run: the preset `demo` with a budget in seconds; the arms differ in the schedule alone."""
    return cli.settings(
        config.Experiment,
        "demo",
        files,
        ["train.steps=null", f"train.seconds={seconds}", f"schedule.kind={name}", *(pairs or []), f"train.seed={seed}"],
        data={"shards": str(output / "shards")},
        model={"base": str(output / "base")},
        tracking={"run_name": f"demo-{name}-seed-{seed}"},
    )


def sweep_of(trials: int, seconds: float, output: Path, files, pairs) -> config.Sweep:
    """The same experiment, many times over."""
    return cli.settings(
        config.Sweep,
        "demo",
        files,
        ["train.steps=null", f"train.seconds={seconds}", *(pairs or [])],
        data={"shards": str(output / "shards")},
        model={"base": str(output / "base")},
        tune={"trials": trials, "early_stop": False},  # so few are all needed
    )


def place(output: Path, experiment: config.Experiment) -> Path:
    """Folder of a run: `full`, `entprog`, and for further seeds `full-seed-1`, …."""
    seed = experiment.train.seed
    return output / (experiment.schedule.kind + (f"-seed-{seed}" if seed else ""))


def run(
    base_experiment: config.Experiment,
    arms: list[config.Experiment],
    sweep: config.Sweep | None,
    output: Path,
    *,
    verbose: bool,
) -> dict[str, Any]:
    """All the steps; each is skipped when it was finished before."""
    started = time.time()
    tables = output / "cei"
    with cli.ray_cluster(launch.LOCAL_CPUS, dashboard=sweep is not None, verbose=verbose):
        _say(1, "prepare: cut clips of people out of real videos, with pose")
        cut = prepared(output, base_experiment.data.shape, verbose=verbose)

        _say(2, "pre-train a tiny base that sees the reference image and no pose")
        base_experiment = config.build(
            config.merge(base_experiment.model_dump(), {"data": {"shards": str(output / "shards")}})
        )
        base = train.run(base_experiment, output / "pretraining", tables=tables)
        if not (output / "base").exists():
            shutil.copytree(output / "pretraining" / "model", output / "base")

        _say(3, "score: how much does the prediction's entropy grow without each block?")
        first = {experiment.schedule.kind: experiment for experiment in arms if experiment.train.seed == 0}
        scored = score.run(first["entprog"], output / "score", tables=tables)

        _say(4, f"train {len(arms)} times from that base, {arms[0].train.seconds:g} s each; pose enters")
        trained: dict[str, list[dict[str, Any]]] = {name: [] for name in ARMS}
        for experiment in arms:
            name = experiment.schedule.kind
            cli.console.print(f"{ARMS[name]}, seed {experiment.train.seed}", style="bold")
            trained[name].append(train.run(experiment, place(output, experiment), tables=tables))

        swept = None
        if sweep is not None:
            _say(5, f"sweep: {sweep.tune.trials} short trials of other settings ({SPACE})")
            swept = tune.run(sweep, spaces.read(SPACE), output / "sweep", tables=tables, verbose=verbose)

    _say(6, "generate the held-out motion with both")
    made = {}
    for name, experiment in first.items():
        folder = place(output, experiment)
        made[name] = generate.run(folder / "model", folder / "generated", shards=output / "shards", split="held_out")
    curves = {
        f"{ARMS[name]}, seed {seed}": [(h["charged_s"], h["step"], h["loss"]) for h in result["held_out"]]
        for name, results in trained.items()
        for seed, result in enumerate(results)
    }
    chart = charts.loss_chart(curves, output / "comparison.png")
    picture = _picture(made, output)

    _say(7, "compare (few seeds, a tiny network: this shows the machinery and proves nothing)")
    ids = [result["mlflow_run_id"] for results in trained.values() for result in results]
    compared = compare.run(arms[0].tracking.experiment, output / "compare", wanted=ids)
    cli.console.print(f"Held-out motion, truth and both arms: {picture}")
    cli.console.print(f"Runs in MLflow: {how_to_open(tracking_uri())}")
    return {
        "arms": {name: _arm(results, made[name]) for name, results in trained.items()},
        "base_held_out_loss": base["held_out_loss"],
        "prepared": {k: cut[k] for k in ("inputs", "clips")},
        "score": scored,
        "sweep": swept and {k: swept[k] for k in ("best", "counts", "recommendation")},
        "comparison": str(chart),
        "compared": {k: compared[k] for k in ("headline", "target_loss", "time_to_target_ratio")},
        "page": compared["page"],
        "picture": str(picture),
        "wall_s": round(time.time() - started, 1),
    }


def _arm(results: list[dict[str, Any]], made: dict[str, Any]) -> dict[str, Any]:
    """The first seed's figures and clips, with all seeds' figures beside."""
    names = ("held_out_loss", "seconds", "search_seconds", "score_seconds", "flops", "peak_memory_bytes", "steps")
    names = (*names, "mlflow_run_id")
    seeds = [{name: result[name] for name in names} for result in results]
    return seeds[0] | {"videos": made["videos"], "sheet": made["sheet"], "seeds": seeds}


def _picture(made: dict[str, dict[str, Any]], output: Path, clips: int = 2) -> Path:
    """Both arms' results under the truth and the pose they were given."""
    settings = config.Generation(generate=config.Generate(count=clips))
    shape = shards.read_dataset(output / "shards").shape
    rows = []
    for motion in motions.motions_from_shards(output / "shards", None, "held_out", settings, shape):
        still = motion.reference[None].repeat(len(motion.video), 0)
        rows += [(f"reference, then truth: {motion.name}", np.concatenate([still[:1], motion.video]))]
        drawn = rendering.pixels(skeleton.draw(torch.from_numpy(motion.pose), shape.height, shape.width))
        rows += [("pose", np.concatenate([np.zeros_like(still[:1]), drawn]))]
        for name, title in ARMS.items():
            result = next(Path(c["result"]) for c in made[name]["clips"] if c["clip"] == motion.name)
            rows += [(title, np.concatenate([np.zeros_like(still[:1]), h264.decode_rgb(result.read_bytes())]))]
    return sheet.contact_sheet(rows, output / "demo.png", columns=shape.frames + 1)


def _say(number: int, what: str) -> None:
    cli.console.print(f"\n{number}/7 {what}", style="bold")


if __name__ == "__main__":
    app()
