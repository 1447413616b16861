"""Tune: preset + search space → many trainings, best settings as a YAML that train takes.

python -m pipelines.tune --preset demo --space cei,convergence --trials 20 --seconds 120 --shards out/shards \
    --base out/base --output out/sweep
"""

import contextlib
import csv
import json
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer
import yaml

from entprog import config, files, storage
from entprog.config import Sweep
from entprog.data import shards as datasets
from entprog.models import fingerprints
from entprog.names import cell
from entprog.storage import Where
from pipelines import cli, terminal
from pipelines.cluster import capacity, joining, launch, room, session
from pipelines.command import usage
from pipelines.outputs import claim
from pipelines.outputs import tables as score_tables
from pipelines.sweeping import alike, charts, checking, findings, spaces, state, sweep, trial
from pipelines.tracking import stages
from pipelines.tracking.store import check_goes_on, how_to_open, tracking_uri
from pipelines.tracking.tracker import RUN_FILE, Tracker
from pipelines.training import checks, outline, steplog

app = usage.app("Search for settings: many trainings at equal seconds, the best ones reported with their uncertainty.")


@app.command()
def main(
    space: Annotated[
        str,
        typer.Option(
            help=f"Spaces joined by commas: {', '.join(spaces.names())}, or YAML files with lines like "
            f"'{spaces.EXAMPLE}'."
        ),
    ],
    preset: cli.Preset = None,
    trials: Annotated[int | None, typer.Option(help="Settings tried (tune.trials).")] = None,
    seconds: Annotated[float | None, typer.Option(help="Charged seconds of each training (train.seconds).")] = None,
    search: Annotated[str | None, typer.Option(help="optuna, random or grid (tune.search).")] = None,
    seeds: Annotated[int | None, typer.Option(help="Trainings of each trial, to see the spread (tune.seeds).")] = None,
    objectives: Annotated[
        str | None,
        typer.Option(help=f"What is to be small, by commas: {', '.join(config.OBJECTIVES)} (tune.objectives)."),
    ] = None,
    target_loss: Annotated[float | None, typer.Option(help="For seconds_to_target (tune.target_loss).")] = None,
    shards: Annotated[
        str | None, typer.Option(help="Folder written by pipelines.prepare, also s3:// or gs:// (data.shards).")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Pre-trained diffusers folder, or hub name (model.base).")] = None,
    output: Annotated[
        str, typer.Option(help="Folder of the sweep, also s3:// or gs://; the same command again resumes it.")
    ] = "out/sweep",
    tables: cli.Tables = None,
    config_file: cli.ConfigFile = None,
    set_: cli.Set = None,
    dry_run: cli.DryRun = False,
    verbose: cli.Verbose = False,
    help_settings: cli.help_settings(Sweep, only="tune.") = False,
) -> None:
    """Train under many settings, each for the same charged seconds, and say which settings matter.

    Leaves in OUTPUT: best.yaml (train --config takes it), trials.csv, charts of importance and response, result.json,
    and trials/ID/ with each training's folder. In MLflow: a run of the sweep, its trials and their stages nested.
    """

    def work() -> dict[str, Any]:
        pairs = [f"train.seconds={seconds}", "train.steps=null"] if seconds is not None else []
        wanted = cli.settings(
            Sweep,
            preset,
            config_file,
            [*pairs, *(set_ or [])],
            data={"shards": shards},
            model={"base": base},
            tune={
                "trials": trials,
                "search": search,
                "seeds": seeds,
                "objectives": [name.strip() for name in objectives.split(",")] if objectives else None,
                "target_loss": target_loss,
            },
        )
        found = spaces.read(space)
        folder = cli.output_of(output)
        check_goes_on(folder / RUN_FILE)
        if dry_run:
            return explain(wanted, found, folder)
        score_tables.check(tables)
        claimed(wanted, found, folder)
        with session.ray_cluster(capacity.LOCAL_CPUS, dashboard=True, verbose=verbose):
            return run(wanted, found, folder, tables=tables, verbose=verbose, is_claimed=True)

    cli.run("tune", None if dry_run else output, work, verbose=verbose)


def claimed(wanted: Sweep, space: spaces.Space, output: Where) -> None:
    """Check everything, and make the output this sweep's. Raises UserError."""
    identity, begun = checked(wanted, space, output)
    capacity.gpus_here(as_begun(wanted.experiment(), begun))
    claim.take(output, "tune", identity)


def checked(wanted: Sweep, space: spaces.Space, output: Where) -> tuple[dict[str, Any], state.State | None]:
    """Check everything; the sweep's identity, and what was begun of it. Raises UserError; changes nothing."""
    identity, dataset = checking.check(wanted, space)
    claim.check(output, "tune", identity)
    begun = state.read(output)
    if begun is None:  # one that an earlier version began goes on: a trial that cannot be trained is marked as failed
        with terminal.console.status("looking at combinations of values"):
            checking.check_together(wanted, space, dataset, terminal.console.print)
    else:
        alike.check(wanted.experiment(), begun.share)
    experiment = wanted.experiment()
    one = trial.checkpoints(experiment, trial.folder_of(output, "any") / "seed-0")
    train = experiment.train.model_copy(update={"checkpoints": one})
    checks.check_reach({"": (experiment.model_copy(update={"train": train}), dataset)})
    return identity, begun


def resources(experiment: config.Experiment, settings: config.Tune) -> dict[str, float]:
    """Resources of the cluster that a run would use, once what it waits for is there, or of a local Ray as it would be
    started."""
    if joining.address():
        with session.ray_cluster(capacity.LOCAL_CPUS) as ray:
            now = ray.cluster_resources()
        gpus = experiment.train.gpus == "yes" or (experiment.train.gpus == "auto" and now.get("GPU", 0) > 0)
        return now | {k: max(now.get(k, 0), least) for k, least in sweep.needs(experiment, settings, gpus).items()}
    import torch

    return {"CPU": session.local_cpus(capacity.LOCAL_CPUS), "GPU": torch.cuda.device_count()}


def explain(wanted: Sweep, space: spaces.Space, output: Where) -> dict[str, Any]:
    """Print the space, the cost and the plan of work."""
    _, begun = checked(wanted, space, output)
    settings, experiment = wanted.tune, as_begun(wanted.experiment(), begun)
    now = config.settings(experiment)
    rows = [(setting, domain, now[setting]) for setting, domain in spaces.described(space)]
    terminal.show("Space", rows, ("setting", "values", "without the sweep"))
    terminal.show("Search", [(k, v) for k, v in config.settings(wanted).items() if k.startswith("tune.")], ("", ""))
    share = sweep.share(experiment, settings, resources(experiment, settings), session.cores())
    if not (lacking := outline.lacks_gpu(experiment)):
        capacity.gpus_here(experiment)
    trials = len(spaces.grid(space, settings.grid_points)) if settings.search == "grid" else settings.trials
    least, most = sweep.estimate_s(settings.model_copy(update={"trials": trials}), experiment.train.seconds,
                                   share.concurrent)  # fmt: skip
    takes = " to ".join(dict.fromkeys(map(_minutes, (least, most))))
    together = 0 if begun else len(checking.combinations(space, settings))
    beyond = f"{together} combinations of them" if together else "a trial whose values do not go together will fail"
    terminal.console.print(f"Checked: {len(spaces.alone(space))} values of the space, each alone; {beyond}.")
    terminal.console.print(
        f"Would run {trials} trials × {settings.seeds} seed(s) × {experiment.train.seconds:g} charged s, "
        f"{share.concurrent} at once ({experiment.train.workers} worker(s), {share.decode_cpus:.3g} decoding CPUs and "
        f"{share.threads} thread(s) each): about {takes} with start-up."
        + ("" if sweep.stops_early(settings) else " No trial is ended early.")
    )
    terminal.console.print(outline.not_looked_at(experiment, output))
    if lacking:
        terminal.console.print(lacking)
    return {"trials": trials, "concurrent": share.concurrent, "seconds_low": least, "seconds_high": most}


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def run(
    wanted: Sweep,
    space: spaces.Space,
    output: Where,
    *,
    tables: str | Where | None = None,
    verbose: bool = False,
    is_claimed: bool = False,
) -> dict[str, Any]:
    """All trials on the connected Ray cluster, and what they say; the figures of result.json.

    is_claimed: `claimed` was called already.
    """
    import ray

    if not is_claimed:
        claimed(wanted, space, output)
    begun = state.read(output)
    experiment, settings = as_begun(wanted.experiment(), begun), wanted.tune
    capacity.check_tracking(experiment, *sweep.NEXT_TO_NOTHING)
    with_gpus = capacity.use_gpus(experiment)
    gpus = "yes" if with_gpus else "no"  # for all trials, also those of a later start
    if joining.address():  # nodes that are still to come are not counted below
        wait(sweep.needs(experiment, settings, with_gpus))
    if settings.early_stop and not sweep.stops_early(settings):
        terminal.console.print("No trial is ended early: that needs held_out_loss as the only objective.")
    now = sweep.share(experiment, settings, ray.cluster_resources(), session.cores())
    # What a trial gets stays as it was: threads decide what is computed, and equal seconds want equal cores.
    commit = cli.commit()
    begun = begun or state.begin(output, vars(now) | alike.kept(experiment, gpus, commit))
    state.take(begun, output)
    given = begun.share
    if line := alike.other_code(given, commit):
        terminal.complain("note", line)
    concurrent = min(given["concurrent"], now.concurrent)  # the cluster may have shrunk since
    of_clips = {"decode_cpus": given["decode_cpus"], "verify": "size"}  # the sweep has read every byte of them once
    if gpus == "no" and experiment.data.decode == "auto":
        of_clips["decode"] = "worker"  # a node that a trial leaves free is another one's
    measured = {*experiment.train.held_out_shares, *(settings.decisions if sweep.stops_early(settings) else ())}
    of_train = {"threads": given["threads"], "gpus": gpus, "held_out_shares": sorted(measured)}
    shared = config.merge(launch.absolute(experiment).model_dump(mode="json"), {"data": of_clips, "train": of_train})
    tracker = Tracker.start(
        output,
        experiment.tracking.experiment,
        experiment.tracking.run_name or f"sweep-{output.name}",
        params={**config.settings(wanted), **{f"space/{k}": v for k, v in spaces.described(space)}},
        tags={"entprog.kind": "sweep", "entprog.commit": commit},
    )
    spec = trial.Spec(
        experiment=shared,
        tune=settings.model_dump(mode="json"),
        output=storage.address(output.resolve()),
        tables=storage.address(score_tables.place(output, tables).resolve()),
        tracking_uri=tracking_uri(),
        cluster=cluster(),
        sweep_run_id=tracker.run_id,
        data=datasets.read_dataset(experiment.data.shards).fingerprint,
        weights=fingerprints.base(experiment.model),
    )
    first = {} if settings.search == "grid" else spaces.own_values(space, experiment)
    try:
        statuses = sweep.run(spec, settings, space, first, concurrent, begun.folder, verbose=verbose)
        rows = [_row(output, name, status) for name, status in statuses.items()]
        for folder in trial.folders(output):  # one that Tune does not know it drew just before its driver was killed
            if _cut_short(folder):
                _close(folder, _row(output, folder.name, statuses.get(folder.name, "ERROR")))
            for place in _trainings(folder):  # nobody goes on from them, however the trial ended
                trial.remove_checkpoints(place, experiment)
        if not any(row["status"] == "finished" for row in rows):
            reasons = [row["reason"] for row in rows if row.get("reason")]
            raise RuntimeError(f"no trial finished; the first one's reason: {(reasons or ['unknown'])[0]}")
        result = _leave(wanted, space, rows, output, tracker)
    except BaseException as error:
        ended = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
        if tracker.end(ended):
            _end_trials(output)
        raise
    tracker.end("FINISHED")
    _show(result, output)
    return result


def as_begun(experiment: config.Experiment, begun: state.State | None) -> config.Experiment:
    """The experiment with or without GPUs as the sweep's first start had it, where the settings leave that open."""
    if begun is None or experiment.train.gpus != "auto":
        return experiment
    train = experiment.train.model_copy(update={"gpus": begun.share.get("gpus", "auto")})
    return experiment.model_copy(update={"train": train})


def wait(needed: Mapping[str, int]) -> None:
    """Wait until resources are free on the connected cluster, on whatever nodes."""
    wanted = [{name: 1} for name, count in needed.items() for _ in range(count)]
    both = " and ".join(f"{count} {name}{'s' if count > 1 else ''}" for name, count in needed.items())
    room.wait(
        wanted, len(wanted), lambda placed: f"trials need {both}, {placed} of them are free", terminal.console.print
    )


def cluster() -> str:
    """The connected cluster as RAY_ADDRESS names it on whatever node."""
    import ray

    return ray.get_runtime_context().gcs_address if joining.address() else "local"


def _row(output: Where, trial_id: str, status: str) -> dict[str, Any]:
    """A trial as result.json has it, from what it left in its folder."""
    folder = trial.folder_of(output, trial_id)
    path = folder / trial.RECORD
    if not path.exists():
        return {"id": trial_id, "settings": {}, "status": "failed", "reason": "it never started"}
    record = json.loads(path.read_text())
    devices = dict.fromkeys(record.get("devices", {}).values())
    row = {name: value for name, value in record.items() if name not in ("reports", "devices")}
    row["device"] = ", ".join(devices) or None
    if not _cut_short(folder):
        return row
    steps = [step for place in _trainings(folder) for step in steplog.steps_of(place)]
    if status == "ERROR" or not steps:
        return row | {"status": "failed", "reason": "its process ended without a word"}
    if (diverged_s := row.get("diverged")) is not None:  # it was stopped for that, before it could say so itself
        return row | {"status": "failed", "reason": f"its held-out loss was not finite after {diverged_s:.3g} s"}
    curve = [(step["charged_s"], step["held_out_loss"]) for step in steps if step["held_out_loss"] is not None]
    records = [place / RUN_FILE for place in _trainings(folder) if (place / RUN_FILE).exists()]
    runs = [json.loads(record.read_text())["run_id"] for record in records]
    if not curve:
        return row | {"status": "failed", "reason": f"it was ended before a held-out loss, after {len(steps)} steps"}
    return row | {
        "status": "stopped",
        "held_out_loss": curve[-1][1],
        "seconds": steps[-1]["charged_s"],
        "search_seconds": steps[-1].get("search_s", 0.0),  # of an earlier version not known
        "peak_memory_bytes": max(step["memory_bytes"] for step in steps),
        "mlflow_run_id": runs[0] if runs else None,
        "seeds": [{"curve": curve}],
    }


def _trainings(folder: Where) -> list[Where]:
    """Folders of a trial's trainings, in the order of their seeds."""
    return sorted(folder.glob("seed-*"), key=lambda place: files.natural(place.name))


def _cut_short(folder: Where) -> bool:
    """Whether a trial was ended by Tune, or with its process: it could not say how it ended."""
    path = folder / trial.RECORD
    return path.exists() and json.loads(path.read_text())["status"] == "running"


def _end_trials(output: Where) -> None:
    """End the MLflow runs of trials that were cut short, as far as MLflow and the output answer: each trial would wait
    for them anew. All are KILLED, whatever ended the sweep: it was none of their own."""
    with contextlib.suppress(OSError):  # what went wrong first is what is said
        for folder in filter(_cut_short, trial.folders(output)):
            if not _end_runs(folder, "KILLED"):
                return


def _close(folder: Where, row: Mapping[str, Any]) -> None:
    """End the MLflow runs of a trial that was cut short and is over. row: what `_row` says of it."""
    if row["status"] == "failed":
        _end_runs(folder, "FAILED", row["reason"])
    else:
        _end_runs(folder, "KILLED", "stopped early: not among the best at equal seconds")


def _end_runs(folder: Where, ended: str, why: str | None = None) -> bool:
    """End the MLflow runs of a trial that have not ended; one that goes on later is running again. Whether MLflow has
    taken that. ended: KILLED or FAILED. why: in words, None where it is to go on."""
    for place in [*_trainings(folder), folder]:
        if not (place / RUN_FILE).exists() or (place / "finished.json").exists():
            continue
        known = json.loads((place / RUN_FILE).read_text())
        tracker = Tracker.attach({"uri": tracking_uri(), "run_id": known["run_id"], "output": storage.address(place)})
        stages.log(tracker, steplog.steps_of(place), ended)
        if why is not None:
            tracker.tags({"entprog.ended": why})
        if not tracker.end(ended):
            return False
    return True


# ---- what it leaves ----


def _leave(
    wanted: Sweep, space: spaces.Space, rows: list[dict[str, Any]], output: Where, tracker: Tracker
) -> dict[str, Any]:
    settings = wanted.tune
    ranked = sorted(rows, key=lambda row: (row["status"] != "finished", row.get("held_out_loss", math.inf)))
    judged, apart = findings.of_one_device(ranked)
    finished = [row for row in judged if row["status"] == "finished"]
    front = findings.pareto(finished, settings.objectives)
    best = min(front, key=lambda row: trial.objective(settings.objectives[0], row, wanted.train.seconds))
    _write_best(wanted, best, len(rows), output / "best.yaml")
    _write_table(ranked, space, output / "trials.csv")
    evidence = findings.evidence(judged, space, wanted.train.seconds, settings)
    said = findings.findings(evidence, space, best, judged, settings.seeds)
    if apart:
        said["recommendation"].insert(0, findings.of_devices(judged, apart))
    left = [output / "best.yaml", output / "trials.csv"]
    left.append(charts.trials_chart(ranked, best["id"], output / "trials.png"))
    if said["responses"]:
        left.append(charts.response_chart(evidence, said["responses"], space, output / "response.png"))
    if said["importance"]:
        left.append(charts.importance_chart(said["importance"], evidence.label, output / "importance.png"))
    if len(settings.objectives) > 1:
        left.append(charts.pareto_chart(finished, front, settings.objectives, output / "pareto.png"))
    for file in left:
        tracker.artifact(file)
    counts = {how: sum(row["status"] == how for row in rows) for how in ("finished", "stopped", "failed")}
    tracker.summary(
        {"held_out_loss": best["held_out_loss"], **{f"trials_{how}": float(count) for how, count in counts.items()}}
    )
    tracker.tags({"entprog.best": best["id"], "mlflow.note.content": "\n\n".join(said["recommendation"])})
    return {
        "trials": [{k: v for k, v in row.items() if k != "seeds"} | {"seeds": _seeds(row)} for row in ranked],
        "best": {k: v for k, v in best.items() if k != "seeds"} | {"config": str(output / "best.yaml")},
        "pareto": [row["id"] for row in front],
        "counts": counts,
        "importance": said["importance"],
        "responses": said["responses"],
        "seed_noise": said["seed_noise"],
        "recommendation": said["recommendation"],
        "evidence": evidence.label,
        "charts": [str(file) for file in left if file.name.endswith(".png")],
        "mlflow_run_id": tracker.run_id,
    }


def _seeds(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{k: v for k, v in seed.items() if k != "curve"} for seed in row.get("seeds", ()) if "seed" in seed]


def _write_best(wanted: Sweep, best: Mapping[str, Any], trials: int, path: Where) -> None:
    """The best trial's settings as `train --config` takes them; what the sweep shared out is left as it was given."""
    experiment = spaces.applied(wanted.experiment(), best["settings"])
    spread = f" ± {best['held_out_loss_std']:.2g} over seeds" if best["held_out_loss_std"] is not None else ""
    header = (
        f"# Best of {trials} trials: {best['id']}, held-out loss {best['held_out_loss']:.5g}{spread} after "
        f"{best['seconds']:.0f} charged seconds.\n# python -m pipelines.train --config {path} --output out/best\n"
    )
    path.write_text(header + yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False))


SHOWN = 10
FIGURES = ("held_out_loss", "held_out_loss_std", "seconds", "search_seconds", "score_seconds", "seconds_to_target",
           "peak_memory_bytes", "device", "mlflow_run_id", "reason")  # fmt: skip


def _write_table(rows: Sequence[Mapping[str, Any]], space: spaces.Space, path: Where) -> None:
    with files.whole(path) as scratch, scratch.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "status", *space, *FIGURES])
        for row in rows:
            values = [row["settings"].get(setting) for setting in space]
            figures = (row.get(name) for name in FIGURES)
            table.writerow([cell(value) for value in (row["id"], row["status"], *values, *figures)])


def _show(result: Mapping[str, Any], output: Where) -> None:
    rows = [
        (
            row["id"], row["status"], _number(row.get("held_out_loss")), _number(row.get("held_out_loss_std")),
            f"{row.get('seconds', 0):.0f} / {row.get('search_seconds', 0):.0f}",
            f"{(row.get('peak_memory_bytes') or 0) / 2**20:.0f}", "*" if row["id"] in result["pareto"] else "",
        )
        for row in result["trials"][:SHOWN]
    ]  # fmt: skip
    columns = ("trial", "status", "held-out loss", "± seeds", "s / search", "MiB", "best")
    more = f", {SHOWN} of them here, all in {output / 'trials.csv'}" if len(result["trials"]) > SHOWN else ""
    terminal.show(f"{len(result['trials'])} trials{more}", rows, columns)
    terminal.show(f"Settings of {result['best']['id']}", list(result["best"]["settings"].items()), ("setting", "value"))
    for row in result["trials"]:
        if row["status"] == "failed":
            terminal.console.print(f"trial {row['id']} failed: {row.get('reason', 'unknown')}")
    for line in result["recommendation"]:
        terminal.console.print(f"- {line}")
    terminal.console.print(f"Train with the best: python -m pipelines.train --config {output / 'best.yaml'} --output …")
    terminal.console.print(f"Charts: {', '.join(result['charts'])}")
    terminal.console.print(f"Compare runs: {how_to_open(tracking_uri())}")


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    app()
