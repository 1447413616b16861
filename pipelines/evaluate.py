"""Evaluate: checkpoint + held-out shards → figures with intervals, each with the card of how it was obtained.

    python -m pipelines.evaluate --checkpoint out/run/model --shards shards/ --output out/evaluation
    python -m pipelines.evaluate --generated clips/ --shards shards/ --output out/evaluation

Clips are generated for the split's references and poses, or taken from a folder, and compared with their truth. Figures
of unlike cards say nothing about each other.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from entprog import config, files, storage
from entprog.config import Evaluation
from entprog.data import shards as datasets
from entprog.errors import UserError
from entprog.masking import masked, reason
from entprog.quality.card import ProtocolCard
from entprog.quality.metrics import METRICS, Meter, choose
from entprog.storage import Where
from pipelines import cli, terminal
from pipelines.cluster import capacity, joining, session
from pipelines.command import usage
from pipelines.generating import captioned, checkpoints, judgement, judging, protocol
from pipelines.outputs import claim
from pipelines.tracking.store import connect, tracking_uri
from pipelines.tracking.tracker import RUN_FILE, Tracker

app = usage.app("Judge what a checkpoint generates against the truth.")

CPUS_PER_WORKER = 4
"""Logical CPUs for every actor where there is no GPU."""


def _explain_metrics() -> None:
    known = [(name, m.better, m.meaning, "" if m.offline else "on request") for name, m in METRICS.items()]
    terminal.show("Metrics (--metrics NAME,NAME)", known, ("name", "better", "meaning", "measured"))


HelpSettings = cli.help_settings(Evaluation, also=_explain_metrics)


@app.command()
def main(
    shards: Annotated[str, typer.Option(help="Folder of pipelines.prepare: references, poses and true clips.")],
    checkpoint: Annotated[
        str | None, typer.Option(help="Folder that pipelines.train wrote, also s3:// or gs://.")
    ] = None,
    generated: Annotated[
        str | None,
        typer.Option(
            help="Clips that are there already: an output of pipelines.generate or pipelines.evaluate, or CLIP_ID.mp4 "
            "files; also s3:// or gs://."
        ),
    ] = None,
    output: Annotated[
        str, typer.Option(help="Folder for the figures, also s3:// or gs://; the same command again resumes it.")
    ] = "out/evaluation",
    split: Annotated[str | None, typer.Option(help="Split of the shards (evaluate.split).")] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            help="Names, with commas between; unless given all that need no fetched weights (evaluate.metrics)."
        ),
    ] = None,
    clips: Annotated[
        int | None, typer.Option(help="Clips, spread over the split; unless given all (evaluate.clips).")
    ] = None,
    run_id: Annotated[
        str | None,
        typer.Option("--run", metavar="ID", help="MLflow run that gets the figures; unless given the training's own."),
    ] = None,
    config_file: cli.ConfigFile = None,
    set_: cli.Set = None,
    dry_run: cli.DryRun = False,
    verbose: cli.Verbose = False,
    help_settings: HelpSettings = False,
) -> None:
    """Generate a split's clips with a checkpoint (or take them from a folder), and measure them against the truth.

    Leaves in OUTPUT: evaluation.json (figures and cards), clips.json (values of every clip), sheet.png, generated/,
    result.json; the figures go to the training's MLflow run too.
    """

    def work() -> dict[str, Any]:
        own = {"split": split, "clips": clips, "metrics": metrics and [name.strip() for name in metrics.split(",")]}
        chosen = cli.settings(Evaluation, None, config_file, set_, evaluate=own)
        folder, clips_in = cli.output_of(output), generated and cli.output_of(generated, "generated")
        task = plan(checkpoint, shards, folder, chosen, generated=clips_in, run_id=run_id)
        if dry_run:
            return explain(task)
        claim.take(folder, "evaluate", task.identity)
        with session.ray_cluster(capacity.LOCAL_CPUS, verbose=verbose):
            return run(task, folder, verbose=verbose)

    cli.run("evaluate", None if dry_run else output, work, verbose=verbose)


@dataclass(frozen=True)
class Task:
    """An evaluation that was checked: all that can be known to be wrong before anything starts is not."""

    settings: Evaluation
    dataset: datasets.Dataset
    maker: checkpoints.Checkpoint | None
    """Makes the clips; None: they are there."""
    folder: Where
    """Folder of the generated clips."""
    places: list[judging.Place]
    made: dict[str, Any]
    """How the clips are made, as far as it is known."""
    identity: dict[str, Any]
    """What the output belongs to: the clips that are judged. By which metrics, and how many of them, may change."""
    names: list[str]
    """Names of the metrics."""
    left_out: dict[str, str]
    """Metrics that do not fit, and why."""
    text: captioned.Shown | None
    """What clips are shown as text; None: they are there."""
    meter: Meter
    run_id: str | None
    """MLflow run that gets the figures."""

    @property
    def missing(self) -> list[judging.Place]:
        there = _files(self.folder)
        return [place for place in self.places if place.clip.name not in there]


def plan(
    checkpoint: Path | str | None,
    shards: str | Path,
    output: Where,
    settings: Evaluation,
    *,
    generated: Where | None = None,
    run_id: str | None = None,
) -> Task:
    """What is to be done. Raises UserError for anything wrong with the checkpoint, the shards, the clips given, the
    metrics or the run named.
    """
    if (checkpoint is None) == (generated is None):
        message = "neither was" if checkpoint is None else "both were"
        raise UserError(
            f"--checkpoint generates clips, --generated takes some that are there: give one, {message} given"
        )
    if settings.generate.gpus != "auto":
        asked = settings.generate.gpus
        raise UserError(f"generate.gpus={asked} is of generate alone: give evaluate.gpus={asked}")
    joining.check_form()
    chosen, dataset = settings.evaluate, datasets.read_dataset(storage.quickly(str(shards)))
    datasets.verify(dataset, "size")
    dataset = replace(dataset, folder=storage.at(str(shards), "shards"))  # clips are waited for longer than checks
    maker = None if checkpoint is None else checkpoints.find(str(checkpoint), settings.generate)
    if maker is not None and maker.shape != dataset.shape:
        raise UserError(f"shards {shards} hold clips of {dataset.shape}, the checkpoint makes {maker.shape}")
    text = None
    if maker is not None:
        from entprog.models import captions  # and torch with it

        text = captioned.shown(maker, settings.generate, dataset.folder, captions.of_clips(dataset, chosen.split))
        checkpoints.check_text_guidance(maker, settings.generate, str(checkpoint), text.texts is not None)
    folder = (generated and _clips_of(generated)) or output / "generated"
    places = judging.places(dataset, chosen.split, chosen.clips, folder)
    if maker is None:
        made, places = protocol.how_given(folder), _given(places, folder)
        if (other := made.get("dataset", dataset.fingerprint)) != dataset.fingerprint:
            terminal.console.print(
                f"{folder}: its clips were made for shards of fingerprint {other}, these have {dataset.fingerprint}: "
                "where they were cut anew since, clips are judged against others of the same names"
            )
    else:
        settings = _decided(maker, settings)
        made = protocol.how_made(maker, settings, dataset, text.name)
    identity = {"clips of --shards": dataset.fingerprint, "evaluate.split": chosen.split}
    if maker is None:
        identity["--generated"] = str(folder.resolve())
    else:
        identity |= {"weights of --checkpoint": made["checkpoint"]}
        sampled = ("sampler", "steps", "guidance", "seed", "dtype", "text", "text encoder", "texts")
        identity |= {name: made[name] for name in sampled if name in made}
    claim.check(output, "evaluate", identity)
    names, left_out = choose(chosen.metrics, dataset.shape, len(places), dataset.points, chosen.window_frames)
    run_id = _mlflow_run(maker, run_id)
    meter = Meter(names, chosen)
    return Task(settings, dataset, maker, folder, places, made, identity, names, left_out, text, meter, run_id)


def explain(task: Task) -> dict[str, Any]:
    """Print the plan of work."""
    source = f"in {task.folder}"
    if task.maker is not None:
        source = f"{len(task.missing)} of them to be generated with {task.maker.root} ({_protocol(task.made)})"
    terminal.console.print(
        f"Would judge {len(task.places)} clips of {task.dataset.shape} ({task.settings.evaluate.split} of "
        f"{task.dataset.folder}), {source}, by {', '.join(task.names)}; figures go to "
        f"{f'MLflow run {task.run_id}' if task.run_id else 'no MLflow run'}.",
    )
    if task.maker is not None:
        _tell_shown(task)
    return {"settings": config.flat(task.settings.model_dump(mode="json"))}


def _tell_shown(task: Task) -> None:
    """Print which texts clips are shown, where they have captions, whether the reference is their own first frame, and
    what they are shown that is not what training showed, poses of other points, if anything."""
    if task.text.line:
        terminal.console.print(task.text.line)
    if task.maker.first:
        terminal.console.print("The reference is each clip's own first frame, as in training (model.first_frame).")
    if unmended := task.maker.unmended(task.settings.generate.text):
        terminal.console.print(unmended)
    if unlike := task.maker.unlike(task.dataset.points):
        terminal.console.print(f"{task.dataset.folder}: {unlike}")


def _protocol(made: dict[str, Any]) -> str:
    return f"{made['sampler']}, {made['steps']} steps, guidance {made['guidance']}, seed {made['seed']}"


def run(task: Task, output: Where, *, verbose: bool = False) -> dict[str, Any]:
    """Generate what is missing and judge it all on the connected Ray cluster; the job's figures."""
    claim.take(output, "evaluate", task.identity)
    settings, names, missing = task.settings, task.names, task.missing
    for name, why in task.left_out.items():
        terminal.console.print(f"left out: {name} {why}")
    workers, gpus = _workers(settings)
    if task.maker is not None:
        _tell_shown(task)
        protocol.leave(task.folder, task.made)
        there = len(task.places) - len(missing)
        if there:
            terminal.console.print(f"{there} of {len(task.places)} clips are there already: {task.folder}")
    with terminal.stderr_into(output / "ray.log", verbose=verbose):
        if task.maker is not None and missing:
            judging.generate(missing, task.maker, settings, workers, gpus, task.text.texts)
        rows = judging.judge(task.places, names, task.dataset.shape, settings, workers, gpus)
    rows = {place.clip_id: rows[place.clip_id] for place in task.places}  # they came as they were ready
    values = judgement.values(rows, task.places)
    before = judgement.earlier(output, values)
    if gone := [name for name in before.gone if name not in names]:
        terminal.console.print(f"figures of other clips, or of an earlier version, are not kept: {', '.join(gone)}")
    values = [{**before.clips.get(row["clip"], {}), **row} for row in values]
    files.write_json(output / judgement.CLIPS, values)  # before the intervals, which may take long
    figures = judgement.figures(rows, [place.source for place in task.places], names, settings.evaluate)
    unmeasured = {name: "no clip has this value" for name in names if name not in figures}
    for name, why in unmeasured.items():
        terminal.console.print(f"left out: {name}: {why}")
    with storage.local_copy(task.places[0].clip) as clip:
        cards = {name: _card(task, name, clip) for name in figures}
        if line := judgement.other_rate(clip, task.dataset.shape):
            terminal.console.print(f"{task.places[0].file} {line}")
    evaluation = judgement.evaluation(figures, cards, judgement.key(values), before.evaluation, settings.evaluate)
    files.write_json(output / judgement.EVALUATION, evaluation)
    picture = judgement.sheet(task.places, task.dataset.shape, output)
    if task.run_id:
        _log(task.run_id, output, figures)
    judgement.show(evaluation, len(task.places))
    terminal.console.print(f"How each was measured: {output / judgement.EVALUATION}")
    terminal.console.print(f"At a glance: {picture}")
    return {
        "figures": {name: figure["value"] for name, figure in evaluation["figures"].items()},
        "evaluation": str(output / judgement.EVALUATION),
        "clips": len(task.places),
        "generated": str(task.folder),
        "generated_now": 0 if task.maker is None else len(missing),
        "left_out": task.left_out | unmeasured,
        "mlflow_run_id": task.run_id,
        "sheet": str(picture),
        "settings": config.flat(settings.model_dump(mode="json")),
    }


def _card(task: Task, name: str, clip: Path) -> ProtocolCard:
    """clip: one that was judged."""
    return protocol.card(name, task.meter, task.settings, task.dataset, len(task.places), task.made, clip)


def _files(folder: Where) -> set[str]:
    """Names of what lies in a folder; none where it is not there. A bucket is asked once, not for each of its files."""
    try:
        return {path.name for path in folder.iterdir()}
    except FileNotFoundError:
        return set()


def _clips_of(given: Where) -> Where:
    """The folder of clips in what --generated names: of an output of evaluate, which made them, the one inside."""
    made = given / "generated"
    return made if (made / protocol.FILE).is_file() else given


def _given(todo: list[judging.Place], folder: Where) -> list[judging.Place]:
    """Places with the files that a folder holds for them. Raises UserError for the first clip that it lacks."""
    if not folder.is_dir():
        raise UserError(f"--generated: no such folder: {folder}")
    listed = protocol.read_json(folder / "result.json").get("clips") if (folder / "result.json").is_file() else None
    records = listed if isinstance(listed, list) else []  # a number in an output of evaluate
    results = {r["clip"]: Path(r["result"]) for r in records if isinstance(r, dict) and "result" in r}
    own, videos = _files(folder), _files(folder / "videos")
    out = []
    for place in todo:
        # A moved folder's own files come before where its result.json once said they lie.
        named, path = results.get(place.clip_id), None
        if place.clip.name in own:
            path = place.clip
        elif named is not None and named.name in videos:
            path = folder / "videos" / named.name
        elif named is not None and named.is_file():
            path = named
        if path is None:
            fewer = f"; --clips {len(results)} judges those that it lists" if 0 < len(results) < len(todo) else ""
            raise UserError(
                f"--generated: {folder} has no clip for {place.clip_id}: it should be {place.clip.name}, or be "
                f"listed in the result.json of pipelines.generate{fewer}"
            )
        out.append(replace(place, file=storage.address(path.resolve())))
    return out


# ---- around ----


def _decided(maker: checkpoints.Checkpoint, settings: Evaluation) -> Evaluation:
    """The settings with `generate.dtype`, and what it depends on, `evaluate.gpus`, spelled out: the cards and the
    actors, on whatever machines, have the same. Raises UserError as `capacity.takes_gpus` does.
    """
    if settings.generate.dtype != "auto" or maker.dtype == "float32":
        return settings
    gpu = _gpus(settings)
    dtype = checkpoints.dtype_of(maker, settings.generate, gpu)
    parts = {
        "evaluate": settings.evaluate.model_copy(update={"gpus": "yes" if gpu else "no"}),
        "generate": settings.generate.model_copy(update={"dtype": dtype}),
    }
    return settings.model_copy(update=parts)


def _gpus(settings: Evaluation) -> bool:
    """Whether the actors will have GPUs: a cluster that is joined is asked."""
    import ray

    asked = settings.evaluate.gpus
    if asked != "auto":
        return asked == "yes"
    if not (joining.address() or ray.is_initialized()):
        import torch

        return torch.cuda.is_available()
    with session.ray_cluster(capacity.LOCAL_CPUS):
        return capacity.takes_gpus(asked, "evaluate.gpus")


def _workers(settings: Evaluation) -> tuple[int, bool]:
    """(actors, whether each has a GPU). Raises UserError as `capacity.gpus_there` does."""
    import ray

    gpus = capacity.gpus_there(settings.evaluate.gpus, "evaluate.gpus", terminal.console.print)
    cpus = int(ray.cluster_resources().get("CPU", 1))
    return settings.evaluate.workers or gpus or max(cpus // CPUS_PER_WORKER, 1), gpus > 0


def _mlflow_run(maker: checkpoints.Checkpoint | None, wanted: str | None) -> str | None:
    """The MLflow run that gets the figures: the one named, or the training's whose output the checkpoint lies in.

    Raises UserError for a named run that is not there.
    """
    record = maker and maker.root.parent / RUN_FILE
    run_id = wanted or (protocol.read_json(record).get("run_id") if record and record.is_file() else None)
    if run_id is None:
        return None
    uri = tracking_uri()
    try:
        connect(uri).get_run(run_id)
    except Exception as error:  # whatever store or network raise
        message = f"MLflow at {masked(uri)} has no run {run_id} ({reason(error, uri)})"
        if wanted:
            raise UserError(f"--run: {message}; check MLFLOW_TRACKING_URI") from None
        terminal.console.print(f"warning: {message}: the figures stay in the output folder")
        return None
    return run_id


def _log(run_id: str, output: Where, figures: dict[str, Any]) -> None:
    tracker = Tracker.attach(
        {"uri": tracking_uri(), "run_id": run_id, "output": storage.address(output)},
        warn=lambda text: terminal.console.print(f"warning: {text}"),
    )
    tracker.metrics(0, {f"evaluation/{name}": figure.value for name, figure in figures.items()})
    for name in (judgement.EVALUATION, "sheet.png"):
        tracker.artifact(output / name, None if name.endswith("json") else "evaluation")
    tracker.close()


if __name__ == "__main__":
    app()
