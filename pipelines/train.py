"""Train: preset + shards → checkpoint in diffusers format, MLflow run.

python -m pipelines.train --preset demo --shards out/demo/shards --base out/demo/base --output out/run
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from entprog import config, files, models
from entprog.blocks import blocks, fp8
from entprog.config import Experiment
from entprog.data import shards
from entprog.errors import UserError
from entprog.models import fingerprints, lora
from entprog.schedule import plans
from entprog.training import storage
from entprog.training.storage import Place
from pipelines import charts, cli
from pipelines.cluster import launch, stalls
from pipelines.tracking import registry, stages
from pipelines.tracking.store import how_to_open, tracking_uri
from pipelines.tracking.tracker import Tracker, deliver_pending
from pipelines.training import expectation, phases, worker

app = cli.app("Fine-tune a human-video diffusion model with Ent-Prog (or plainly) on a Ray cluster.")

TABLES = Path("out/cei")
"""Where score tables are kept by their key, for every run of a working directory to share."""


@app.command()
def main(
    preset: cli.Preset = None,
    shards: Annotated[Path | None, typer.Option(help="Folder written by pipelines.prepare (data.shards).")] = None,
    base: Annotated[str | None, typer.Option(help="Pre-trained diffusers folder, or hub name (model.base).")] = None,
    schedule: Annotated[
        str | None, typer.Option(help="full: plain training; entprog; linear; lisa; badam (schedule.kind).")
    ] = None,
    memory_budget: Annotated[
        str | None,
        typer.Option(help="Memory per device, like 24GB: only plans that fit (schedule.memory_budget_bytes)."),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder of the run; the same command again resumes it.")] = Path(
        "out/train"
    ),
    config_file: cli.ConfigFile = None,
    set_: cli.Set = None,
    dry_run: cli.DryRun = False,
    verbose: cli.Verbose = False,
    help_settings: cli.help_settings() = False,
) -> None:
    """Fine-tune on prepared clips: score blocks, then train the ones that matter.

    Leaves in OUTPUT: model/ (diffusers), checkpoints/, steps.jsonl (a line a step), cei.json and charts, result.json.
    """

    def work() -> dict[str, Any]:
        experiment = cli.settings(
            Experiment,
            preset,
            config_file,
            set_,
            data={"shards": str(shards) if shards else None},
            model={"base": base},
            schedule={"kind": schedule, "memory_budget_bytes": memory_budget},
        )
        if dry_run:
            return explain(experiment, output)
        with cli.ray_cluster(launch.LOCAL_CPUS, verbose=verbose):
            return run(experiment, output)

    cli.run("train", None if dry_run else output, work, verbose=verbose)


def check(experiment: Experiment) -> shards.Dataset:
    """What can be checked before anything starts. Raises UserError; returns the data set."""
    data = experiment.data
    if experiment.in_fp8:
        fp8.check_installed()
    if not data.shards:
        raise UserError("no shards given: --shards FOLDER (pipelines.prepare makes one)")
    dataset = shards.read_dataset(Path(data.shards))
    if not data.shape.is_cut_of(dataset.shape):
        raise UserError(
            f"shards {data.shards} hold clips of {dataset.shape}, the experiment wants {data.shape}: prepare them "
            "anew, or set data.shape to theirs (or to fewer frames, height and width divided by a whole number)"
        )
    for split in ("train", "held_out"):
        if dataset.clips(split) == 0:
            raise UserError(f"shards {data.shards} have no clips in split {split}: prepare with --held-out")
    if experiment.train.checkpoints:
        Place.at(experiment.train.checkpoints)
    shards.verify(dataset, data.verify)
    for shape in plans.ladder(experiment.schedule, data.shape, last=False):
        source = models.family(experiment.model.family).inspect(experiment.model, shape)
    if experiment.train.lora:
        lora.check(source.network, blocks(source.network), experiment.train.lora)
    return dataset


def check_phases(experiment: Experiment, output: Path) -> dict[str, tuple[Experiment, shards.Dataset]]:
    """The phases with their data, each checked as far as can be before the one before it has run. Raises UserError."""
    link = output / "model"
    if link.exists() and not link.is_symlink():
        raise UserError(f"{output} holds a training that is not in phases: choose another --output")
    parts = config.phases(experiment, output)
    first = next(iter(parts.values()))
    out = {}
    for name, phase in parts.items():
        # Its base is not there yet: it will be this network, widened. Of shards every byte is read once.
        network = first.model.model_copy(update={"conditions": phase.model.conditions})
        data = phase.data.model_copy(update={"verify": "size"} if phase is not first else {})
        try:
            out[name] = phase, check(phase.model_copy(update={"model": network, "data": data}))
        except UserError as error:
            raise UserError(f"phase {name}: {error}") from None
    return out


def explain(experiment: Experiment, output: Path) -> dict[str, Any]:
    """Print the resolved experiment and the plan of work."""
    cli.show("Experiment", list(config.settings(experiment).items()), ("setting", "value"))
    if experiment.phases:
        parts = check_phases(experiment, output)
        first = next(iter(parts.values()))[0]
        for name, (phase, dataset) in parts.items():
            cli.console.print(f"Phase {name}, conditions {', '.join(phase.model.conditions)}, {phase.data.shape}:")
            _explain(phase, dataset, first.model)
    else:
        _explain(experiment, check(experiment), experiment.model)
    return {"settings": config.settings(experiment)}


def _explain(experiment: Experiment, dataset: shards.Dataset, model: config.Model) -> None:
    train, schedule = experiment.train, experiment.schedule
    budgets = ((train.steps, "steps"), (train.seconds, "s"), (train.flops, "FLOPs"))
    ends = [f"{number:g} {unit}" for number, unit in budgets if number]
    cli.console.print(
        f"Would train {experiment.model.family} from {experiment.model.base or 'new weights'} on "
        f"{dataset.clips('train')} clips ({dataset.clips('held_out')} held out), {train.workers} worker(s) × "
        f"{experiment.data.batch_size} clips a step, until {' or '.join(ends)}, schedule {schedule.kind} "
        f"({schedule.stages} stages, backward {' or '.join(schedule.backwards)}, clock {schedule.clock})."
    )
    expectation.tell(experiment, model)


def identity(experiment: Experiment, dataset: shards.Dataset) -> str:
    """Hash of all that decides what is computed: a checkpoint belongs to it."""
    elsewhere = (*config.FREE, *config.PATHS, "data.shards")
    deciding = {k: v for k, v in config.settings(experiment).items() if not k.startswith(elsewhere)}
    vae = experiment.model.vae if experiment.model.vae in ("auto", "none") else None
    batches = experiment.train.workers * experiment.train.accumulate
    return config.digest(deciding, batches, vae, fingerprints.base(experiment.model), dataset.fingerprint)


def run(
    experiment: Experiment,
    output: Path,
    *,
    tables: Path = TABLES,
    parent: str | None = None,
    tags: Mapping[str, str] | None = None,
    listen: Callable[[dict[str, Any]], None] = lambda item: None,
) -> dict:
    """Train on the connected Ray cluster; returns the figures of result.json.

    tables: where score tables are kept and looked for. parent: MLflow run under which this one is nested; tags: of the
    run, beside its own. listen: gets all that rank 0 posts, in the order in which it happened.
    """
    started = time.time()
    cli.writable(output)
    if experiment.phases:
        check_phases(experiment, output)
        return phases.run(experiment, output, run, tables=tables, parent=parent, tags=tags, listen=listen)
    dataset = check(experiment)
    key = identity(experiment, dataset)
    finished = output / "finished.json"
    if finished.exists() and (known := json.loads(finished.read_text()))["identity"] == key:
        deliver_pending(output)
        cli.console.print(f"Already finished: {output} (another --output, or other settings, for a new run).")
        return known["result"]
    expectation.tell(experiment)
    gpus = launch.use_gpus(experiment)  # refuses what cannot run before MLflow has a run of it
    if experiment.train.checkpoints:
        Place.at(storage.quickly(experiment.train.checkpoints)).check()
    if experiment.in_fp8 and not gpus:
        fp8.check_device(torch.device("cpu"))
    uri = tracking_uri()
    tracker = Tracker.start(
        output,
        experiment.tracking.experiment,
        experiment.tracking.run_name or f"{experiment.name}-{experiment.schedule.kind}",
        params=config.settings(experiment),
        tags={
            "entprog.commit": cli.commit(),
            "entprog.data": dataset.fingerprint,
            "entprog.held_out": fingerprints.held_out(experiment, dataset),
            "entprog.base": fingerprints.base(experiment.model),
            "entprog.identity": key,
            "entprog.kind": "training",
            **(tags or {}),
        },
        parent=parent,
    )
    settings = {
        "output": str(output.resolve()),
        "tables": str(tables.resolve()),
        "identity": key,
        "tracking": tracker.handle(),
        "threads": launch.threads(experiment),
        "decode_cpus": launch.decode_cpus(experiment),
    }
    try:
        with _Display(experiment) as display, stalls.watched(lambda line: display.heard({"warning": line})) as store:

            def heard(item: dict[str, Any]) -> None:
                display.heard(item)
                if "about" in item:
                    tracker.tags(item["about"])
                if "decision" in item.get("step", ()):
                    stages.log(tracker, worker.steps_of(output))
                listen(item)

            result = launch.run_workers(launch.training, settings, experiment, output / "ray", heard)
        steps = worker.steps_of(output)
        result = _figures(result, steps) | {
            "identity": key,
            "mlflow_run_id": tracker.run_id,
            "model": str(output / "model"),
            "data": dataset.fingerprint,
            "wall_s": round(time.time() - started, 3),
        }
        has_vae = models.family(experiment.model.family).inspect(experiment.model).vae is not None
        encodes = has_vae and result["stalls"]["encode_s"] > 0  # not from cached latents
        told = stalls.advice(stalls.of(steps), settings["decode_cpus"], experiment.train.workers, encodes)
        result |= {"advice": told, **store.figures()}
        _leave_charts(output, steps, result["blocks"], tracker, dataset)
        tracker.summary(_final(result) | result["stalls"] | store.figures())
        tracker.tags({"entprog.memory_is": result["peak_memory_is"]})
        if name := experiment.tracking.model_name:
            version = registry.register(tracker, name, output / "model", experiment.data.shape)
            result["registered"] = version and f"models:/{name}/{version}"
    except BaseException as error:
        status = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
        stages.log(tracker, worker.steps_of(output), status)
        tracker.end(status)
        raise
    stages.log(tracker, steps, "FINISHED")
    tracker.end("FINISHED")
    files.write_json(finished, {"identity": key, "result": result})
    _show(result, output, uri)
    return result


def _figures(result: dict[str, Any], steps: list[dict[str, Any]]) -> dict[str, Any]:
    held_out = [(s["step"], s["charged_s"], s["held_out_loss"]) for s in steps if s["held_out_loss"] is not None]
    purposes = result["seconds_by_purpose"]
    lost = stalls.of(steps)
    return result | {
        "held_out_loss": held_out[-1][2],
        "held_out": [{"step": step, "charged_s": s, "loss": loss} for step, s, loss in held_out],
        "losses": [s["loss"] for s in steps],
        "seconds": sum(purposes.values()),
        "search_seconds": purposes["search"],
        "score_seconds": purposes["score"],
        "flops": sum(result["flops_by_purpose"].values()),
        "samples_per_s": result["clips"] / max(purposes["train"] + purposes["search"], 1e-9),
        "wait_share": lost.share(lost.wait_s + lost.open_s),
        "stalls": asdict(lost),
    }


def _final(result: dict[str, Any]) -> dict[str, float]:
    """What MLflow keeps as the run's final figures; `break_even_step` only where it was reached."""
    names = ("held_out_loss", "seconds", "search_seconds", "score_seconds", "flops", "peak_memory_bytes", "steps")
    paid = result["break_even"]["step"]
    return {name: result[name] for name in names} | ({} if paid is None else {"break_even_step": paid})


def _leave_charts(
    output: Path, steps: list[dict], blocks: list[str], tracker: Tracker, dataset: shards.Dataset
) -> None:
    left = [charts.schedule_chart(steps, output / "schedule.png", blocks)]
    if (output / "cei.json").exists():
        left += [charts.cei_chart(json.loads((output / "cei.json").read_text()), output / "cei.png")]
        left += [output / "cei.json"]
    held_out = [(s["charged_s"], s["step"], s["held_out_loss"]) for s in steps if s["held_out_loss"] is not None]
    left += [charts.loss_chart({"held-out loss": held_out}, output / "loss.png"), output / "steps.jsonl"]
    sheet = dataset.folder / "contact_sheet.png"
    files.write_json(output / "decisions.json", [s["decision"] for s in steps if "decision" in s])
    left += [output / "decisions.json", *sorted((output / "samples").rglob("*.*"))]
    for file in [*left, *([sheet] if sheet.exists() else [])]:
        tracker.artifact(file)


def _show(result: dict[str, Any], output: Path, uri: str) -> None:
    cli.show(
        "Training",
        [
            ("held-out loss", result["held_out_loss"]),
            ("steps", result["steps"]),
            ("charged seconds", result["seconds"]),
            ("  of them search / scoring", f"{result['search_seconds']:.1f} / {result['score_seconds']:.1f}"),
            ("samples per second", result["samples_per_s"]),
            ("waiting for data / starting streams", _shares(result["stalls"], "wait_s", "open_s")),
            *([("encoding clips", _shares(result["stalls"], "encode_s"))] if result["stalls"]["encode_s"] else []),
            (f"peak memory ({result['peak_memory_is']})", f"{result['peak_memory_bytes'] / 2**20:.0f} MiB"),
            ("break-even step (predicted)", _break_even(result["break_even"])),
            ("trained blocks by stage", ", ".join(str(len(d["plan"]["trainable"])) for d in result["decisions"])),
            ("model", str(output / "model")),
        ],
        ("figure", "value"),
    )
    for line in result["advice"]:
        cli.console.print(line)
    cli.console.print(f"Compare runs: {how_to_open(uri)}")


def _shares(seconds: dict[str, float], *names: str) -> str:
    lost = stalls.Stalls(**seconds)
    return " / ".join(f"{lost.share(seconds[name]):.0%}" for name in names)


def _break_even(found: dict[str, Any]) -> str:
    """When what the stages saved had paid for search and scoring."""
    actual, predicted = found["step"], found["predicted_step"]
    return f"{'not reached' if actual is None else actual} ({'none' if predicted is None else predicted})"


class _Display:
    """Progress on the terminal: a bar where there is one, a line now and then where there is none."""

    def __init__(self, experiment: Experiment):
        train = experiment.train
        self.by: Literal["step", "charged_s", "flops"] = (
            "step" if train.steps else "charged_s" if train.seconds else "flops"
        )
        self.total = train.steps or train.seconds or train.flops
        self.elastic, self.most = train.min_workers is not None, train.workers
        self.blocks = 0
        self.clips, self.since, self.begun = 0, time.time(), 0.0
        """Since the first step heard of."""
        self.bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=cli.console,
            disable=not cli.console.is_terminal,
        )
        self.task = self.bar.add_task("starting workers", total=self.total)

    def __enter__(self) -> "_Display":
        self.bar.start()
        return self

    def __exit__(self, *_) -> None:
        self.bar.stop()

    def heard(self, item: dict[str, Any]) -> None:
        if "scored" in item:
            self.bar.update(self.task, description=f"scoring blocks: condition {item['scored']}/{item['of']}")
        elif "workers" in item and self.elastic:
            self.bar.console.print(f"Workers: {item['workers']} of {self.most}.")
        elif "resumed" in item:
            self.bar.console.print(f"Resumed from the checkpoint after step {item['resumed']}.")
        elif "warning" in item:
            self.bar.console.print(f"warning: {item['warning']}")
        elif "step" in item:
            self._step(item["step"])

    def _step(self, step: dict[str, Any]) -> None:
        if self.clips == 0:
            self.since, self.begun = time.time(), step[self.by]
        self.clips += step["clips"]
        elapsed = time.time() - self.since
        rate = (self.clips - step["clips"]) / elapsed if elapsed else 0.0
        done = step[self.by] - self.begun
        eta = f", ETA {max(elapsed * (self.total - step[self.by]) / done, 0):.0f} s" if done else ""
        doing = f"stage {step['stage'] + 1} {step['phase']}, {len(step['trained'])} blocks"
        text = f"{doing}, loss {step['loss']:.4f}, {rate:.1f} clips/s"
        self.bar.update(self.task, completed=step[self.by], description=text)
        if step["held_out_loss"] is not None:
            self.bar.console.print(
                f"step {step['step']:>6}  held-out loss {step['held_out_loss']:.5f}  {text}  "
                f"{step['charged_s']:.0f} s charged{eta}"
            )
        if "decision" in step:
            decision = step["decision"]
            found = ", ".join(f"m={e['m']}: {e['value']:.3g}" for e in decision["efficiencies"])
            self.bar.console.print(
                f"stage {decision['stage'] + 1}: trains {len(decision['plan']['trainable'])} blocks "
                f"({decision['reason']}{'; loss drop per cost ' + found if found else ''})"
            )


if __name__ == "__main__":
    app()
