"""Train: preset + shards → checkpoint in diffusers format, MLflow run.

python -m pipelines.train --preset demo --shards out/demo/real/shards --base pipelines/demo_base --output out/run
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any

import typer

from entprog import config, files, masking, models, storage
from entprog.blocks import blocks
from entprog.config import Experiment
from entprog.data import shards
from entprog.errors import UserError
from entprog.models import fingerprints
from entprog.schedule import plans
from entprog.storage import Place, Where
from entprog.training import checkpoint
from pipelines import cli, terminal
from pipelines.cluster import capacity, launch, session, stalls
from pipelines.command import usage
from pipelines.outputs import claim
from pipelines.outputs import tables as score_tables
from pipelines.stream import batches, decoding
from pipelines.tracking import registry, stages, store
from pipelines.tracking.tracker import RUN_FILE, Tracker, deliver_pending
from pipelines.training import (
    checks,
    expectation,
    footprint,
    model_card,
    outline,
    phases,
    report,
    startup,
    steplog,
    workload,
)
from pipelines.training.checks import Parts
from pipelines.training.display import Display
from pipelines.training.startup import Startup

HOW_LONG = ("train.steps", "train.seconds", "train.flops", "schedule.")
"""Beginnings of names of what a finished run may be trained on with: budgets, and which blocks they go to."""

app = usage.app("Fine-tune a human-video diffusion model: progressively, by Ent-Prog's search or plainly.")


@app.command()
def main(
    preset: cli.Preset = None,
    shards: Annotated[
        str | None, typer.Option(help="Folder written by pipelines.prepare, also s3:// or gs:// (data.shards).")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Pre-trained diffusers folder, or hub name (model.base).")] = None,
    schedule: Annotated[
        str | None,
        typer.Option(help="full: plain training; progressive; entprog; linear; lisa; badam (schedule.kind)."),
    ] = None,
    memory_budget: Annotated[
        str | None,
        typer.Option(help="Memory per device, like 24GB: only plans that fit (schedule.memory_budget_bytes)."),
    ] = None,
    output: Annotated[
        str, typer.Option(help="Folder of the run, also s3:// or gs://; the same command again resumes it.")
    ] = "out/train",
    tables: cli.Tables = None,
    config_file: cli.ConfigFile = None,
    set_: cli.Set = None,
    dry_run: cli.DryRun = False,
    verbose: cli.Verbose = False,
    help_settings: cli.help_settings() = False,
) -> None:
    """Fine-tune on prepared clips, by a schedule of clip shapes and blocks; one that ranks blocks scores them first.

    Leaves in OUTPUT: model/ (a pipeline that plain diffusers runs, with its card), checkpoints/, steps.jsonl (a line a
    step), charts, cei.json where blocks were scored, result.json.
    """

    def work() -> dict[str, Any]:
        clock = Startup.of_process()
        clock.over("imports")
        experiment = cli.settings(
            Experiment,
            preset,
            config_file,
            set_,
            data={"shards": shards},
            model={"base": base},
            schedule={"kind": schedule, "memory_budget_bytes": memory_budget},
        )
        folder = cli.output_of(output)
        if not (folder / "finished.json").exists():
            store.check_goes_on(folder / RUN_FILE)
        if dry_run:
            return explain(experiment, folder)
        score_tables.check(tables)
        parts = claimed(experiment, folder)
        if (result := _finished(folder)) is not None:
            return result
        clock.over("checks")
        startup.beside(store.make_ready)  # MLflow's seconds pass while Ray's processes start
        with session.ray_cluster(capacity.LOCAL_CPUS, verbose=verbose):
            clock.over("ray")
            _tell_unused_gpus(experiment, folder)
            return run(experiment, folder, parts=parts, tables=tables, clock=clock)

    cli.run("train", None if dry_run else output, work, verbose=verbose)


def _tell_unused_gpus(experiment: Experiment, output: Where) -> None:
    """Of the command alone: runs that another job begins share what there is, or are to be small."""
    import ray

    line = capacity.unused_gpus(experiment, ray.nodes())
    if line and not (output / "finished.json").exists():
        terminal.console.print(line)


def claimed(experiment: Experiment, output: Where) -> Parts:
    """What is to be trained, checked, in an output that is this training's from now on. Raises UserError."""
    parts = checks.parts(experiment, output)
    if not (output / "finished.json").exists():
        checks.check_room(parts)
    with _going_on_told(output):
        claim.take(output, "train", checks.whole_identity(parts), idle=checks.IDLE)
    return parts


@contextlib.contextmanager
def _going_on_told(output: Where) -> Iterator[None]:
    """Of a finished run that is to be trained for longer, or otherwise, the refusal says how."""
    try:
        yield
    except claim.OtherSettingsError as error:
        if not all(name.startswith(HOW_LONG) for name in error.names) or not (output / "finished.json").exists():
            raise
        raise UserError(
            f"{error}; --base {output / 'model'} there goes on from its weights (optimizer and schedule begin anew)"
        ) from None


def explain(experiment: Experiment, output: Where) -> dict[str, Any]:
    """Print the resolved experiment and the plan of work."""
    parts = checks.parts(experiment, output)
    with _going_on_told(output):
        claim.check(output, "train", checks.whole_identity(parts), idle=checks.IDLE)
    if not (lacking := outline.lacks_gpu(experiment)) and not (output / "finished.json").exists():
        checks.check_room(parts)
    checks.check_reach(parts)
    nodes = decoding.nodes_there()
    cli.show_settings("Experiment", experiment)
    if line := capacity.unused_gpus(experiment, nodes):
        terminal.console.print(line)
    first = next(iter(parts.values()))[0]
    for name, (part, dataset) in parts.items():
        if name:
            terminal.console.print(f"Phase {name}, conditions {', '.join(part.model.conditions)}, {part.data.shape}:")
        _explain(part, dataset, checks.stand_in(part, first), nodes)
    other = experiment.data.text != "fixed" and experiment.model.text_encoder
    beside = {
        "whole": f"VAE and the base's encoders copied{f', those of texts from {other}' if other else ''}",
        "light": "VAE and encoders by name, not copied (train.save=light)",
    }
    if every := experiment.train.preview_every:
        terminal.console.print(
            f"Would draw {experiment.train.preview_clips} held-out motions every {every} steps, uncharged: "
            f"{output / 'previews' / 'index.html'}"
        )
    terminal.console.print(
        f"Would leave {output / 'model'}, which plain diffusers runs: network, {beside[experiment.train.save]}, card."
    )
    terminal.console.print(outline.not_looked_at(experiment, output))
    finished = (output / "finished.json").exists()
    terminal.console.print(_prospect(experiment, output) if finished or not lacking else lacking)
    return {"settings": config.settings(experiment)}


def _explain(
    experiment: Experiment, dataset: shards.Dataset, model: config.Model, nodes: Sequence[decoding.Node] | None
) -> None:
    train, schedule = experiment.train, experiment.schedule
    budgets = ((train.steps, "steps"), (train.seconds, "s"), (train.flops, "FLOPs"))
    ends = [f"{number:g} {unit}" for number, unit in budgets if number]
    terminal.console.print(
        f"Would train {experiment.model.family} from {experiment.model.base or 'new weights'} on "
        f"{dataset.clips('train')} clips ({dataset.clips('held_out')} held out), {train.workers} worker(s) × "
        f"{experiment.data.batch_size} clips a step, until {' or '.join(ends)}, schedule {schedule.kind} "
        f"(clock {schedule.clock})."
    )
    source = models.family(experiment.model.family).inspect(model, experiment.data.shape)
    found = blocks(source.network)
    eligible = plans.eligible(found, schedule.blocks)
    said = (
        outline.chosen(schedule, len(eligible), len(found)),
        outline.texts(experiment, dataset, model),
        outline.withheld(experiment, source),
        outline.begins(experiment, source),
        outline.timesteps(experiment),
        workload.epochs(experiment, dataset.clips("train")),
    )
    said += (outline.expert(source), outline.poses(dataset, source), outline.masks(dataset, source))
    for line in said:
        if line:
            terminal.console.print(line)
    terminal.show("Stages", outline.rows(experiment, len(eligible), len(found) - len(eligible)), outline.COLUMNS)
    terminal.show("A device's memory, beside what clips take", footprint.rows(experiment, source), footprint.COLUMNS)
    telling = (footprint.beside, footprint.loading, footprint.copying, footprint.inputs)
    telling += (footprint.other_expert, footprint.advice)
    for line in (
        *(say(experiment, source) for say in telling),
        footprint.host_advice(experiment, source, footprint.machine_bytes()),
    ):
        if line:
            terminal.console.print(line)
    cached = " Where latents are cached they are read in place of clips." if source.vae is not None else ""
    terminal.console.print(f"{decoding.outlook(experiment, dataset, nodes)}{cached}")
    expectation.tell(experiment, model)
    for line in outline.notes(experiment, dataset, source):
        terminal.console.print(line)


def run(
    experiment: Experiment,
    output: Where,
    *,
    parts: Parts | None = None,
    tables: str | Where | None = None,
    parent: str | None = None,
    tags: Mapping[str, str] | None = None,
    listen: Callable[[dict[str, Any]], None] = lambda item: None,
    clock: Startup | None = None,
) -> dict:
    """Train on the connected Ray cluster; returns the figures of result.json.

    parts: what `claimed` returned, if it was called already. tables: where score tables are kept and looked for, None:
    as `score_tables.place` says.
    parent: MLflow run under which this one is nested; tags: of the run, beside its own. listen: gets all that rank 0
    posts, in the order in which it happened. clock: of the command, where it began before this call.
    """
    started, clock = time.time(), clock or Startup()
    parts = parts or claimed(experiment, output)
    tables = score_tables.place(output, tables)
    if experiment.parts:
        return phases.run(experiment, output, run, tables=tables, parent=parent, tags=tags, listen=listen)
    ((_, dataset),) = parts.values()
    key = checks.identity(experiment, dataset)
    if (result := _finished(output)) is not None:
        return result
    expectation.tell(experiment)
    source = models.family(experiment.model.family).inspect(experiment.model)
    said = (outline.poses(dataset, source), outline.masks(dataset, source))
    said += (outline.captions_left_out(experiment, dataset), workload.epochs(experiment, dataset.clips("train")))
    for line in (*said, *outline.notes(experiment, dataset, source)):
        if line:
            terminal.console.print(line)
    gpus = capacity.use_gpus(experiment)  # refuses what cannot run before MLflow has a run of it
    capacity.check_tracking(experiment)
    if experiment.train.checkpoints:
        place = storage.quickly(experiment.train.checkpoints)
        Place.at(place).check()
        checkpoint.check_owner(place, key)
    if not gpus:
        checks.check_cpus(experiment)
    uri, weights = store.tracking_uri(), fingerprints.base(experiment.model)
    tracker = Tracker.start(
        output,
        experiment.tracking.experiment,
        experiment.tracking.run_name or output.resolve().name,
        params=config.settings(experiment),
        tags={
            "entprog.commit": cli.commit(),
            "entprog.data": dataset.fingerprint,
            "entprog.held_out": fingerprints.held_out(experiment, dataset),
            "entprog.base": weights,
            "entprog.identity": key,
            "entprog.kind": "training",
            **(tags or {}),
        },
        parent=parent,
    )
    clock.over("tracking")
    settings = {
        "output": storage.address(output.resolve()),
        "tables": storage.address(tables.resolve()),
        "identity": key,
        "weights": weights,
        "data": dataset.fingerprint,
        "tracking": tracker.handle(),
    }
    startup_s: dict[str, float] = {}
    try:
        with Display(experiment) as display, stalls.watched(lambda line: on_item({"warning": line})) as watch:

            def on_item(item: dict[str, Any]) -> None:
                if "warning" in item:
                    steplog.warn(output, item["warning"])
                if "started" in item and not startup_s:
                    marks = [*clock.marks, *item["started"]]
                    startup_s.update(startup.seconds(clock.begun, marks, item["waited_s"]))
                    display.line(startup.line(startup_s))
                display.show(item)
                if "about" in item:
                    tracker.tags(item["about"])
                if "decision" in item.get("step", ()):
                    with contextlib.suppress(OSError):  # a bucket that is away: the end makes up for it
                        stages.log(tracker, steplog.steps_of(output), newest=2)  # the last one ended, one began
                listen(item)

            result = launch.run_workers(launch.training, settings, experiment, output / "ray", on_item)
        steps = steplog.steps_of(output)
        result = report.figures(result, steps) | {
            "identity": key,
            "mlflow_run_id": tracker.run_id,
            "model": str(output / "model"),
            "data": dataset.fingerprint,
            "startup_s": startup_s,
            "wall_s": round(time.time() - started, 3),
        }
        on_latents = source.vae is not None
        message = stalls.advice(
            stalls.of(steps), result["decode_cpus"], experiment.train.workers, on_latents, batches.caching(experiment)
        )
        result |= {"advice": message, **watch.figures()}
        if failed := model_card.tried(output / "model", experiment.name, experiment, result):
            steplog.warn(output, failed)
            terminal.complain("warning", failed)
        report.leave_charts(output, steps, result["blocks"], tracker, dataset)
        tracker.summary(report.final(result) | result["stalls"] | watch.figures())
        tracker.tags({"entprog.memory_is": result["peak_memory_is"]})
        if name := experiment.tracking.model_name:
            version = registry.register(tracker, name, output / "model", experiment.data.shape)
            result["registered"] = version and f"models:/{name}/{version}"
    except BaseException as error:
        status = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
        with contextlib.suppress(OSError):  # what went wrong first is what is said
            stages.log(tracker, steplog.steps_of(output), status)
        tracker.end(status)
        if isinstance(error, UserError):  # what a command leaves that fails or is interrupted, it leaves itself
            record = {"job": "train", "status": "refused", "error": str(error), "mlflow_run_id": tracker.run_id}
            files.write_json(output / "result.json", masking.masked_in(record))
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(_resumes(experiment, output)) from None
        raise
    stages.log(tracker, steps, "FINISHED")
    tracker.end("FINISHED")
    files.write_json(output / "finished.json", {"identity": key, "result": result})
    report.show(result, output, uri)
    return result


def _finished(output: Where) -> dict[str, Any] | None:
    """The figures of a run that is finished, which is said; None: it is not."""
    if not (output / "finished.json").exists():
        return None
    deliver_pending(output)
    terminal.console.print(_already(output))
    return json.loads((output / "finished.json").read_text())["result"]


def _already(output: Where) -> str:
    return f"Already finished: {output} (another --output for a new run)."


def _prospect(experiment: Experiment, output: Where) -> str:
    """What the command does without --dry-run, in words."""
    if (output / "finished.json").exists():
        return _already(output)
    does = "begins"
    if claim.is_of(output, "train"):
        does = f"goes on {'where it stopped' if experiment.parts else _resumes(experiment, output)}"
    return f"Checked: nothing else is in the way; the same command without --dry-run {does}."


def _resumes(experiment: Experiment, output: Where) -> str:
    """Where the same command resumes, in words."""
    checkpoints = experiment.train.checkpoints or storage.address(output / "checkpoints")
    try:
        newest = checkpoint.newest(storage.quickly(checkpoints))
    except OSError:  # a bucket that is away
        return "from the newest checkpoint"
    return f"after step {int(newest.removeprefix('step-'))}" if newest else "from the start: there is no checkpoint yet"


if __name__ == "__main__":
    app()
