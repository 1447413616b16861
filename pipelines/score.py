"""Score: checkpoint + shards → table of every block's score, by CEI or a control of it (JSON, chart).

    python -m pipelines.score --preset demo --shards out/demo/real/shards --base pipelines/demo_base --output out/score

Training does this by itself when its table is missing; the job is for looking at the blocks first.
"""

from typing import Annotated, Any

import typer

from entprog import config, files, storage
from entprog.config import Experiment
from entprog.data import shards as datasets
from entprog.models import fingerprints
from entprog.scoring import priorities
from entprog.scoring.tables import ScoreTable
from entprog.storage import Where
from pipelines import charts, cli, terminal
from pipelines.cluster import capacity, launch, session
from pipelines.command import usage
from pipelines.outputs import claim
from pipelines.outputs import tables as score_tables
from pipelines.training import checks

app = usage.app("Score the blocks of a network by Conditional Entropy Inflation.")


@app.command()
def main(
    preset: cli.Preset = None,
    shards: Annotated[
        str | None, typer.Option(help="Folder written by pipelines.prepare, also s3:// or gs:// (data.shards).")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Diffusers folder, or hub name (model.base).")] = None,
    output: Annotated[str, typer.Option(help="Folder for the table and its chart, also s3:// or gs://.")] = "out/score",
    tables: cli.Tables = None,
    draws_until_stable: Annotated[
        float | None,
        typer.Option(
            metavar="TAU",
            help="Stop once Kendall's τ between two halves of the draws has reached this (priority.until_stable).",
        ),
    ] = None,
    config_file: cli.ConfigFile = None,
    set_: cli.Set = None,
    dry_run: cli.DryRun = False,
    verbose: cli.Verbose = False,
    help_settings: cli.help_settings() = False,
) -> None:
    """Skip every block in turn and measure what it does to the prediction's entropy and to the loss.

    Leaves in OUTPUT: cei.json, cei.png, result.json. The same weights, data and settings are never scored twice.
    """

    def work() -> dict[str, Any]:
        experiment = cli.settings(
            Experiment,
            preset,
            config_file,
            set_,
            trains=False,
            data={"shards": shards},
            model={"base": base},
            priority={"until_stable": draws_until_stable},
        )
        folder = cli.output_of(output)
        if dry_run:
            return explain(experiment, folder)
        score_tables.check(tables)
        claimed(experiment, folder)
        with session.ray_cluster(capacity.LOCAL_CPUS, verbose=verbose):
            return run(experiment, folder, tables=tables, is_claimed=True)

    cli.run("score", None if dry_run else output, work, verbose=verbose)


def identity(experiment: Experiment, dataset: datasets.Dataset) -> dict[str, Any]:
    """By name all that decides the scores."""
    of_training = checks.deciding(experiment, dataset)
    parts = ("model", "priority", "data.shape", "data.batch_size", "data.text", "schedule.frozen_precision")
    parts += ("train.seed", "train.lora", "train.timesteps", "train.timesteps_mean", "train.timesteps_spread")
    parts += ("train.timestep_shift", "train.min_snr")
    mine = {name: value for name, value in of_training.items() if config.is_part_of(name, parts)}
    return mine | {name: value for name, value in of_training.items() if name.startswith(("weights of", "clips of"))}


def claimed(experiment: Experiment, output: Where) -> None:
    """Check all that can be known before anything starts, and make the output this job's. Raises UserError."""
    claim.take(output, "score", identity(experiment, checks.check(experiment)))


def explain(experiment: Experiment, output: Where) -> dict[str, Any]:
    """Print the resolved experiment and the plan of work."""
    dataset = checks.check(experiment)
    claim.check(output, "score", identity(experiment, dataset))
    settings = config.settings(experiment)
    cli.show_settings("Experiment", experiment)
    priority = experiment.priority
    until = f", or fewer once τ between halves is {priority.until_stable:g}" if priority.until_stable else ""
    work = f"with {priority.conditions} conditions × {priority.draws} draws{until}"
    if priority.kind in priorities.WITHOUT_DATA:
        work = "without looking at clips"
    terminal.console.print(
        f"Would score the blocks of {experiment.model.family} from {experiment.model.base or 'new weights'} by "
        f"{priority.kind} {work}, on {dataset.clips('train')} clips."
    )
    return {"settings": settings}


def run(
    experiment: Experiment, output: Where, *, tables: str | Where | None = None, is_claimed: bool = False
) -> dict[str, Any]:
    """Score on the connected Ray cluster; the job's figures. is_claimed: `claimed` was called already."""
    if not is_claimed:
        claimed(experiment, output)
    folder = score_tables.place(output, tables)
    settings = {
        "tables": storage.address(folder.resolve()),
        "weights": fingerprints.base(experiment.model),
        "data": datasets.read_dataset(experiment.data.shards).fingerprint,
    }
    with terminal.console.status("scoring blocks") as status:

        def on_item(item: dict[str, Any]) -> None:
            if "scored" in item:
                status.update(f"scoring blocks: condition {item['scored']} of {item['of']}")
            elif "waiting" in item:
                terminal.console.print(item["waiting"])

        known = launch.run_workers(launch.scoring, settings, experiment, output / "ray", on_item)
    table = ScoreTable.from_json(known)
    files.write_json(output / "cei.json", known)
    charts.cei_chart(known, output / "cei.png")
    ranked = sorted(table.priority(experiment.priority.sign).items(), key=lambda item: -item[1])
    rank = {name: number for number, (name, _) in enumerate(ranked, 1)}
    skipping = table.blocks[0].loss_increase is not None  # kinds that skip blocks measure all three at once
    measures = {"pi_std": "π (std)", "pi_elementwise": "π (elementwise)", "loss_increase": "loss increase"}
    measures = measures if skipping else {}
    terminal.show(
        f"{charts.KINDS[table.kind]}, {table.conditions} conditions × {table.draws} draws",
        [(b.name, b.score, b.std_error, *(getattr(b, name) for name in measures), rank[b.name]) for b in table.blocks],
        ("block", "score", "± std error", *measures.values(), "rank"),
    )
    for line in table.warnings(experiment.priority.sign):
        terminal.console.print(f"warning: {line}")
    terminal.console.print(
        f"{output / 'cei.json'}, {output / 'cei.png'}; the table lies in {folder}, where a training of this base, "
        f"data and priority finds it{'' if folder == cli.TABLES else f' with --tables {folder}'}"
    )
    return {
        "table": str(output / "cei.json"),
        "chart": str(output / "cei.png"),
        "key": table.key,
        "kind": table.kind,
        "ranking": [name for name, _ in ranked],
        "draws": table.conditions * table.draws,
        "halves_tau": table.halves_tau,
        "tau_at": table.tau_at,
        "signed_absolute_tau": table.signed_absolute_tau,
        "loss_tau": table.loss_tau,
        "score_seconds": table.seconds,
        "score_flops": table.flops,
    }


if __name__ == "__main__":
    app()
