"""Demo: all of it, small, on real clips, in minutes on two CPU cores.

    make demo

prepare → brief pre-training of a tiny base (reference image only) → score → plain training and Ent-Prog with equal
seconds from the same base → a generated clip of the held-out motion by each → a table. It reports what came out.
"""

import shutil
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from entprog import config
from entprog.media import assets, shards, sheet, skeleton, video
from pipelines import charts, generate, jobs, launch, motions, prepare, rendering, score, train
from pipelines.store import how_to_open, tracking_uri

app = jobs.app("The whole pipeline on real clips: prepare, pre-train, score, train both ways, generate.")

ARMS = {"full": "plain training", "entprog": "Ent-Prog"}


@app.command()
def main(
    output: Annotated[Path, typer.Option(help="Folder of the demo; the same command again resumes it.")] = Path(
        "out/demo"
    ),
    seconds: Annotated[float, typer.Option(help="Charged seconds of each arm (train.seconds).")] = 120.0,
    base_steps: Annotated[int, typer.Option(help="Steps of the base's pre-training.")] = 600,
    config_file: jobs.ConfigFile = None,
    set_: jobs.Set = None,
    dry_run: jobs.DryRun = False,
    verbose: jobs.Verbose = False,
) -> None:
    """Run everything once and print the comparison. Settings given here apply to both arms.

    Leaves in OUTPUT: shards/, base/, full/, entprog/ (each with model/, charts, result.json), generated clips,
    comparison.png and result.json; the runs are in MLflow.
    """

    def work() -> dict[str, Any]:
        base_experiment = jobs.experiment("demo_base", None, None, train={"steps": base_steps})
        arms = {name: arm(name, seconds, output, config_file, set_) for name in ARMS}
        if dry_run:
            jobs.show("Both arms", list(config.settings(arms["entprog"]).items()), ("setting", "value"))
            jobs.console.print(
                f"Would prepare real clips, pre-train for {base_steps} steps, score, train {' and '.join(ARMS)} for "
                f"{seconds:g} s each and generate, in {output}."
            )
            return {}
        return run(base_experiment, arms, output, verbose=verbose)

    jobs.run("demo", None if dry_run else output, work, verbose=verbose)


def arm(name: str, seconds: float, output: Path, files, pairs) -> config.Experiment:
    """Settings of one arm: the preset `demo` with a budget in seconds; the schedule is all that differs."""
    return jobs.experiment(
        "demo",
        files,
        ["train.steps=null", f"train.seconds={seconds}", f"schedule.kind={name}", *(pairs or [])],
        data={"shards": str(output / "shards")},
        model={"base": str(output / "base")},
    )


def run(
    base_experiment: config.Experiment, arms: dict[str, config.Experiment], output: Path, *, verbose: bool
) -> dict[str, Any]:
    """All the steps; each is skipped when it was finished before."""
    started = time.time()
    tables = output / "cei"
    with jobs.ray_cluster(launch.LOCAL_CPUS, verbose=verbose):
        _say(1, "prepare: cut clips of people out of real videos, with pose")
        videos = assets.demo_videos(output / "videos")
        settings = config.build(
            {
                "data": {"shape": base_experiment.data.shape.model_dump()},
                "prepare": {"held_out": ["cam04.mp4"], "stride": 1},
            },
            config.Preparation,
        )
        prepared = prepare.run(videos, output / "shards", settings, verbose=verbose)

        _say(2, "pre-train a tiny base that sees the reference image and no pose")
        base_experiment = config.build(
            config.merge(base_experiment.model_dump(), {"data": {"shards": str(output / "shards")}})
        )
        base = train.run(base_experiment, output / "pretraining", tables=tables)
        if not (output / "base").exists():
            shutil.copytree(output / "pretraining" / "model", output / "base")

        _say(3, "score: how much does the prediction's entropy grow without each block?")
        scored = score.run(arms["entprog"], output / "score", tables=tables)

        trained = {}
        for number, (name, title) in enumerate(ARMS.items(), 4):
            _say(number, f"{title}, {arms[name].train.seconds:g} s from that base; pose enters")
            trained[name] = train.run(arms[name], output / name, tables=tables)

    _say(6, "generate the held-out motion with both")
    made = {}
    for name in ARMS:
        folder = output / name / "generated"
        made[name] = generate.run(output / name / "model", folder, shards=output / "shards", split="held_out")
    figures = ("held_out_loss", "seconds", "search_seconds", "score_seconds", "flops", "peak_memory_bytes", "steps")
    results = {
        name: {k: result[k] for k in figures}
        | {"mlflow_run_id": result["mlflow_run_id"], "videos": made[name]["videos"], "sheet": made[name]["sheet"]}
        for name, result in trained.items()
    }
    curves = {
        ARMS[name]: [(h["charged_s"], h["step"], h["loss"]) for h in result["held_out"]]
        for name, result in trained.items()
    }
    chart = charts.loss_chart(curves, output / "comparison.png")
    picture = _picture(made, output)
    _table(results, trained)
    jobs.console.print(f"Held-out motion, truth and both arms: {picture}")
    jobs.console.print(f"Loss over time: {chart}")
    jobs.console.print(f"Runs in MLflow: {how_to_open(tracking_uri())}")
    return {
        "arms": results,
        "base_held_out_loss": base["held_out_loss"],
        "prepared": {k: prepared[k] for k in ("inputs", "clips")},
        "score": scored,
        "comparison": str(chart),
        "picture": str(picture),
        "wall_s": round(time.time() - started, 1),
    }


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
            rows += [(title, np.concatenate([np.zeros_like(still[:1]), video.decode_rgb(result.read_bytes())]))]
    return sheet.contact_sheet(rows, output / "demo.png", columns=shape.frames + 1)


def _say(number: int, what: str) -> None:
    jobs.console.print(f"\n[bold]{number}/6[/bold] {what}")


def _table(results: dict[str, dict[str, Any]], trained: dict[str, dict[str, Any]]) -> None:
    def row(title, figure):
        return (title, *(figure(name) for name in ARMS))

    memory = trained["full"]["peak_memory_is"]
    jobs.show(
        "Equal seconds from the same base (one seed, tiny network: shows the machinery, proves nothing)",
        [
            row("held-out loss", lambda n: f"{results[n]['held_out_loss']:.5f}"),
            row("seconds charged", lambda n: f"{results[n]['seconds']:.1f}"),
            row("of them search", lambda n: f"{results[n]['search_seconds']:.1f}"),
            row("of them scoring", lambda n: f"{results[n]['score_seconds']:.1f}"),
            row("updates", lambda n: results[n]["steps"]),
            row("TFLOP", lambda n: f"{results[n]['flops'] / 1e12:.2f}"),
            row(f"peak memory, {memory} (MiB)", lambda n: f"{results[n]['peak_memory_bytes'] / 2**20:.0f}"),
            row(
                "blocks trained, by stage",
                lambda n: ", ".join(str(len(d["plan"]["trainable"])) for d in trained[n]["decisions"]),
            ),
        ],
        ("", *ARMS.values()),
    )


if __name__ == "__main__":
    app()
