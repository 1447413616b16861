"""What one trial of a sweep does: the very same training that `pipelines.train` runs, once a seed, and its report.

A trial reports at equal shares of its budget of charged seconds, search and scoring included: where a share ends
between two held-out evaluations its loss is drawn in a straight line between them. Around the shares after which it is
decided whether a trial goes on there is an evaluation at the steps before and after (`train.held_out_shares`). So plans
of unlike speed are judged at equal seconds, whatever the steps they took.
"""

import contextlib
import itertools
import math
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from entprog import config, files, masking, storage
from entprog.config import Experiment
from entprog.data import shards
from entprog.errors import LastingError, UnreachableError, UserError
from entprog.models import fingerprints
from entprog.storage import Where
from entprog.training import curves
from pipelines.cluster import failures
from pipelines.training import steplog

RECORD = "trial.json"
WAITS_S = (5.0, 15.0, 60.0)
"""Waits between tries of a trial while MLflow or a bucket does not answer; the last one goes on."""
Report = tuple[str, dict[str, Any]]
"""A trial's id, and what it reported to Ray Tune."""
Point = tuple[float, float]
"""Charged seconds, held-out loss."""


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What all trials of a sweep share."""

    experiment: dict[str, Any]
    """Settings that trials vary, as JSON."""
    tune: dict[str, Any]
    """Settings of the search, as JSON."""
    output: str
    """Folder of the sweep, or its address."""
    tables: str
    """Where score tables are kept: one for all trials."""
    tracking_uri: str
    cluster: str
    """The cluster as RAY_ADDRESS names it, from whatever node of it; "local": a Ray of this machine alone."""
    sweep_run_id: str
    data: str
    """Fingerprint of the clips that all trials are trained on and judged by."""
    weights: str
    """Fingerprint of the base that they start from, unless the space has others."""


def folder_of(output: Where, trial_id: str) -> Where:
    """A trial's own folder."""
    return output / "trials" / trial_id


def folders(output: Where) -> list[Where]:
    """Those of all trials that have begun, whether Ray Tune's state knows them or not."""
    return list((output / "trials").iterdir()) if (output / "trials").exists() else []


def trainable(spec: Spec) -> Callable[[dict[str, Any]], None]:
    """The function that Ray Tune runs for every trial, on next to no resources: the workers hold those."""

    def trial(values: dict[str, Any]) -> None:
        from ray import tune

        here(spec)
        name = tune.get_context().get_trial_id()
        tune.report(patiently(lambda: run(values, spec, name, tune.report), spec))

    return trial


def patiently(work: Callable[[], Any], spec: Spec, waits_s: Sequence[float] = WAITS_S) -> Any:
    """What the work returns, begun again for as long as it takes where what it needs is away: no setting of the trial's
    is wrong then, and the next trial would fare no better."""
    waits = itertools.chain(waits_s, itertools.repeat(waits_s[-1]))
    while True:
        try:
            return work()
        except Exception as error:
            if not is_away(error, spec):
                raise
        time.sleep(next(waits))


def is_away(error: BaseException, spec: Spec) -> bool:
    """Whether an error is of MLflow, a bucket, a hub or a network disk that may answer later."""
    if isinstance(error, UnreachableError) or files.may_pass(error):
        return True
    if of_workers := failures.of_workers(error.__cause__):
        return any(is_away(each, spec) for each in of_workers)
    in_bucket = "://" in spec.output or "://" in (spec.experiment["train"]["checkpoints"] or "")
    by_bucket = isinstance(error, OSError) and error.errno is None  # a disk's has a number, pyarrow's of a network none
    return in_bucket and by_bucket and not isinstance(error, FileNotFoundError)


def here(spec: Spec) -> None:
    """Give this process, which may be on another machine, what the driver has in its environment."""
    os.environ |= {"MLFLOW_TRACKING_URI": spec.tracking_uri, "RAY_ADDRESS": spec.cluster}


def run(
    values: Mapping[str, Any], spec: Spec, trial_id: str, report: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Train with the drawn values, once a seed; the trial's last report.

    report: gets {"tick", "held_out_loss", …} as the first seed's training passes equal shares of its budget. A
    person's mistake, a loss that is not finite and a device without room end the trial as failed, with the reason, and
    the search learns that its values are bad; a crash raises and is tried again from the checkpoint; so is, by
    `patiently`, what does not answer.
    """
    from pipelines import train
    from pipelines.sweeping import spaces

    experiment = config.build(spec.experiment)
    settings = config.build(spec.tune, config.Tune)
    folder = folder_of(storage.at(spec.output, "the output"), trial_id)
    record = {"id": trial_id, "settings": dict(values), "status": "running", "seeds": [], **_kept(folder)}
    files.write_json(folder / RECORD, record)
    ticks = Ticks(
        experiment.train.seconds,
        settings.reduction**settings.rungs,
        partial(_reported, heard(settings, report), folder, record),
    )
    results, parent, tracker = [], spec.sweep_run_id, None
    try:
        _check_inputs(experiment, spec)
        experiment = spaces.applied(experiment, values)
        if settings.seeds > 1:
            tracker = _group(spec, experiment, trial_id, folder, values)
            parent = tracker.run_id
        for number in range(settings.seeds):
            seed = experiment.train.seed + number
            own = f"trial-{trial_id}" + (f"-seed-{seed}" if settings.seeds > 1 else "")
            one = config.build(
                config.merge(experiment.model_dump(), {"train": {"seed": seed}, "tracking": {"run_name": own}})
            )
            place = folder / f"seed-{seed}"
            if kept := checkpoints(experiment, place):
                one = config.build(config.merge(one.model_dump(), {"train": {"checkpoints": kept}}))
            if number == 0:
                ticks.resume(place)
            result = train.run(
                one,
                place,
                tables=spec.tables,
                parent=parent,
                tags={"entprog.sweep": spec.sweep_run_id, "entprog.trial": trial_id},
                listen=partial(_listen, folder, record, place.name, ticks if number == 0 else None),
            )
            results.append(figures(result, seed, settings.target_loss))
            remove_checkpoints(place, experiment)  # it has ended: model/ is what it came to
        record |= {"status": "finished", "seeds": results} | summary(results)
        last = {name: objective(name, record, one.train.seconds) for name in config.OBJECTIVES}
    except BaseException as error:
        if is_away(error, spec):
            with contextlib.suppress(OSError):  # which may be what is away
                files.write_json(folder / RECORD, record | {"waiting": _reason(error)})
            raise
        of_values = isinstance(error, UserError | LastingError)
        record |= {"status": "failed", "reason": str(error) if of_values else _reason(error)}
        if not of_values:
            files.write_json(folder / RECORD, record)
            raise
        last = dict.fromkeys(config.OBJECTIVES, math.inf)
    finally:
        if tracker is not None and record["status"] != "running":  # one that waits goes on in it
            tracker.summary({k: v for k, v in record.items() if isinstance(v, float)})
            tracker.end("FINISHED" if record["status"] == "finished" else "FAILED")
    files.write_json(folder / RECORD, record)
    return last | {"tick": ticks.of}


def _check_inputs(experiment: Experiment, spec: Spec) -> None:
    """Raises UserError where what lies in the sweep's files is not what it began with."""
    wrong = None
    if shards.read_dataset(experiment.data.shards).fingerprint != spec.data:
        wrong = f"data.shards: {experiment.data.shards} has got other clips"
    elif fingerprints.base(experiment.model) != spec.weights:
        wrong = f"model.base: {experiment.model.base} has got other weights"
    if wrong:
        raise UserError(
            f"{wrong} since this sweep began, and trials on unlike ones cannot be compared: give a copy as it was, or "
            "begin anew"
        )


def heard(settings: config.Tune, report: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    """Who hears what a trial reports on its way: Ray Tune, which wants all objectives in every report, where held-out
    loss is the only one. Others are known at a trial's end."""
    return report if settings.objectives == ("held_out_loss",) else lambda tick: None


def checkpoints(experiment: Experiment, place: Where) -> str | None:
    """Where the checkpoints of one of a trial's trainings lie, where the sweep's experiment says so: each has a folder
    of its own there. place: of the training, TRIAL/seed-N."""
    there = experiment.train.checkpoints
    return storage.within(there, f"{place.parent.name}/{place.name}") if there else None


def remove_checkpoints(place: Where, experiment: Experiment) -> None:
    """Remove those of a training that has ended; arguments as above."""
    storage.remove(place / "checkpoints")
    if kept := checkpoints(experiment, place):
        storage.remove(storage.at(kept, "checkpoints"))


def _reported(report: Callable[[dict[str, Any]], None], folder: Where, record: dict[str, Any], tick: dict[str, Any]):
    """Report a tick. The record has it beforehand: a sweep that goes on judges by it, and Tune may end the trial at
    once for a loss that is no number, of which its steps cannot say so (JSON has no word for it)."""
    said = {"held_out_loss": tick["held_out_loss"], "time": time.time()}
    record.setdefault("reports", {}).setdefault(str(tick["tick"]), said)  # what is reported again was heard of before
    diverged = {} if math.isfinite(tick["held_out_loss"]) else {"diverged": tick["charged_s"]}
    _keep(folder, record | diverged)
    report(tick)


def _listen(
    folder: Where, record: dict[str, Any], training: str, ticks: "Ticks | None", item: Mapping[str, Any]
) -> None:
    """Take down what a training runs on, all devices one after another, and follow its losses."""
    if device := item.get("about", {}).get("entprog.device"):
        record["devices"][training] = device
        _keep(folder, record)
    if ticks is not None:
        ticks.on_item(item)


def _keep(folder: Where, record: Mapping[str, Any]) -> None:
    try:
        files.write_json(folder / RECORD, record)
    except OSError as error:  # the next report, or the trial's end, writes this one too
        warnings.warn(f"trial {folder.name}: {RECORD} could not be written: {_reason(error)}", stacklevel=3)


def reports(output: Where) -> list[Report]:
    """What trials of a sweep have reported so far of the shares of their budgets, in the order in which they did."""
    found = [
        (said["time"], folder.name, int(tick), math.inf if said["held_out_loss"] is None else said["held_out_loss"])
        for folder in folders(output)
        for tick, said in _kept(folder)["reports"].items()
    ]
    return [(name, {"tick": tick, "held_out_loss": loss}) for _, name, tick, loss in sorted(found)]


def waiting(folder: Where) -> str | None:
    """What a trial waits for, in words; None where it does not. Raises OSError where a disk or bucket does not say."""
    try:
        return files.from_json((folder / RECORD).read_text()).get("waiting")
    except (FileNotFoundError, ValueError):
        return None


def _kept(folder: Where) -> dict[str, dict[str, Any]]:
    """What a trial that goes on keeps of its record: {"reports": {share of the budget: {"held_out_loss", "time"}},
    "devices": {training: device}}."""
    path = folder / RECORD
    known = files.from_json(path.read_text()) if path.exists() else {}
    return {name: known.get(name, {}) for name in ("reports", "devices")}


def _reason(error: BaseException) -> str:
    return masking.reason(error, most=500)


def _group(spec: Spec, experiment: Experiment, trial_id: str, folder: Where, values: Mapping[str, Any]):
    """The MLflow run that holds the trainings of a trial of several seeds."""
    from pipelines.tracking.tracker import Tracker

    return Tracker.start(
        folder,
        experiment.tracking.experiment,
        f"trial-{trial_id}",
        params=values,
        tags={"entprog.kind": "trial", "entprog.sweep": spec.sweep_run_id, "entprog.trial": trial_id},
        parent=spec.sweep_run_id,
    )


# ---- figures ----


def figures(result: Mapping[str, Any], seed: int, target: float | None) -> dict[str, Any]:
    """What one training came to."""
    curve = [(point["charged_s"], point["loss"]) for point in result["held_out"]]
    names = ("held_out_loss", "seconds", "search_seconds", "score_seconds", "peak_memory_bytes", "steps")
    return {
        "seed": seed,
        **{name: result[name] for name in names},
        "seconds_to_target": curves.crossing(curve, target) if target else None,
        "curve": curve,
        "mlflow_run_id": result["mlflow_run_id"],
    }


def summary(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over seeds, and the sample standard deviation of the loss (None for one seed)."""

    def mean(name: str) -> float:
        return sum(result[name] for result in results) / len(results)

    loss = mean("held_out_loss")
    spread = math.sqrt(sum((r["held_out_loss"] - loss) ** 2 for r in results) / max(len(results) - 1, 1))
    reached = [result["seconds_to_target"] for result in results]
    return {
        "held_out_loss": loss,
        "held_out_loss_std": spread if len(results) > 1 else None,
        "seconds": mean("seconds"),
        "search_seconds": mean("search_seconds"),
        "score_seconds": mean("score_seconds"),
        "peak_memory_bytes": max(result["peak_memory_bytes"] for result in results),
        "seconds_to_target": None if None in reached else mean("seconds_to_target"),
        "mlflow_run_id": results[0]["mlflow_run_id"],
    }


def objective(name: str, record: Mapping[str, Any], budget_s: float) -> float:
    """A figure as the search sees it: a target that was not reached counts as twice the budget."""
    value = record[name]
    return 2 * budget_s if value is None else float(value)


@dataclass
class Ticks:
    """Reports the first seed's loss at `of` equal shares of the budget, each once."""

    budget_s: float
    of: int
    report: Callable[[dict[str, Any]], None]
    curve: list[Point] = field(default_factory=list)
    reported: int = 0

    def resume(self, training: Where) -> None:
        """Take over what a training that goes on had measured before, and report it again: of what was measured, but
        not reported, when it ended the search knows nothing."""
        steps = steplog.steps_of(training)
        self.curve = [(s["charged_s"], s["held_out_loss"]) for s in steps if s["held_out_loss"] is not None]
        self.reported = 0
        self.tell()

    def on_item(self, item: Mapping[str, Any]) -> None:
        """An item that rank 0 posts."""
        step = item.get("step")
        if step is None or step["held_out_loss"] is None:
            return
        self.curve = [point for point in self.curve if point[0] < step["charged_s"]]
        self.curve.append((step["charged_s"], step["held_out_loss"]))
        self.tell()

    def tell(self) -> None:
        """Report the shares that are over. Nothing of the last one: the trial's own last report is that."""
        while self.reported + 1 < self.of:
            share_s = (self.reported + 1) * self.budget_s / self.of
            charged_s = next((point[0] for point in self.curve if point[0] >= share_s), None)
            if charged_s is None:
                return
            self.reported += 1
            loss = curves.at(self.curve, share_s)
            if not math.isfinite(loss):
                loss = math.inf  # compared as the worst
            self.report({"tick": self.reported, "held_out_loss": loss, "charged_s": charged_s})
