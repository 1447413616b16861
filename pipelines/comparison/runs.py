"""Trainings as MLflow remembers them: settings, tags, held-out losses, files. Reads only."""

import contextlib
import json
import math
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Required, TypeVar

import numpy as np
from pydantic import TypeAdapter
from typing_extensions import TypedDict

from entprog import masking, storage
from entprog.config import close_to
from entprog.errors import UserError
from entprog.masking import masked, reason
from pipelines.tracking.mlflow_internals import latest_ms
from pipelines.tracking.store import connect, database_file, tracking_uri
from pipelines.tracking.tracker import RUN_FILE

ABOVE = ("mlflow.parentRunId", "entprog.sweep")
"""Tags that hold the run which a training is a part of."""
FIGURES = (
    "held_out_loss", "seconds", "search_seconds", "score_seconds", "flops", "peak_memory_bytes", "steps",
    "break_even_step",
)  # fmt: skip
"""What a training leaves as metrics `final/NAME`."""
PREVIEWS, PREVIEW = "previews", re.compile(r"previews/step-(\d+)")
"""Where a training keeps its previews: all of them, one step's."""
PREVIEWS_SHOWN = 4
SHORTEST_ID = 6
"""Fewest characters that a run's id is told by."""
STATUS = {"FINISHED": "finished", "RUNNING": "running", "FAILED": "failed", "KILLED": "killed", "SCHEDULED": "running"}


T = TypeVar("T")


class Step(TypedDict):
    """What is used of a line of steps.jsonl."""

    stage: int
    phase: str
    trained: list[str]
    charged_s: float
    seconds: float
    wait_s: float


class Score(TypedDict, total=False):
    """What is used of a block in cei.json."""

    name: Required[str]
    score: Required[float]
    std_error: float | None
    loss_increase: float | None
    loss_std_error: float | None


class Scores(TypedDict):
    """What is used of cei.json."""

    key: str
    kind: str
    blocks: list[Score]


class Figure(TypedDict, total=False):
    """A metric in evaluation.json."""

    value: Required[float]
    low: float | None
    high: float | None
    card: Required[str]


class Evaluation(TypedDict):
    """What is used of evaluation.json: {metric: figure}, {card's id: the card}."""

    figures: dict[str, Figure]
    cards: dict[str, dict[str, Any]]


class Point(NamedTuple):
    """A held-out loss as it was measured."""

    charged_s: float
    step: int
    loss: float
    wall_s: float = math.nan
    """Since the run was begun, pauses between its restarts counted too."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """One logical training run."""

    run_id: str
    name: str
    status: str
    """finished, running, failed, killed; diverged: finished at a loss that is no number; empty: without a loss."""
    started_s: float
    """Seconds since 1970."""
    last_sign_s: float
    """When it last logged, or ended."""
    settings: dict[str, Any]
    """{dotted name: JSON value}; what a resumed run changed is as it was last."""
    tags: dict[str, str]
    curve: tuple[Point, ...]
    """Held-out losses in the order of their steps, also such as are no number."""
    figures: dict[str, float]
    """The run's known final figures, by the names in FIGURES."""
    files: Callable[[str], bytes | None]
    """An artifact by its path; None where there is none."""
    artifacts: tuple[str, ...]
    """Paths of the artifacts, those of previews apart."""
    previews: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    """Step → paths of its preview's artifacts, for some steps from the first to the last."""
    damage: list[str] = field(default_factory=list)
    """What of its files could not be read, and why; grows as they are asked for."""

    @property
    def counts(self) -> bool:
        """Whether its figures enter a comparison: finished, at a finite loss."""
        return self.status == "finished"

    @property
    def seed(self) -> int:
        return int(self.settings.get("train.seed", 0))

    @property
    def title(self) -> str:
        """Name and the beginning of the id, for people."""
        return f"{self.name} ({self.run_id[:8]})"

    def note(self, now_s: float) -> str:
        """What a person should know about a run beside its status; '' for nothing."""
        odd = [f"{k.removeprefix('not_finite.')}: {v}" for k, v in self.tags.items() if k.startswith("not_finite.")]
        silent = f"last sign of life {_ago(now_s - self.last_sign_s)} ago" if self.status == "running" else ""
        return "; ".join([*filter(None, [silent, self.tags.get("entprog.ended", "")]), *odd])

    def read(self, path: str, parse: Callable[[bytes], T]) -> T | None:
        """An artifact, parsed; None where there is none, or where it is damaged, which `damage` then says."""
        try:
            data = self.files(path)
            return None if data is None else parse(data)
        except Exception as error:  # whatever a store, a decoder or a parser raises: other runs can be compared
            line = f"its {path} cannot be read and is left out ({masking.reason(error, most=120)})"
            if line not in self.damage:
                self.damage.append(line)
            return None

    def evaluation(self) -> Evaluation | None:
        """Quality metrics, if it was evaluated."""
        return self.read("evaluation.json", _evaluation)

    def scores(self) -> Scores | None:
        """Table of its blocks' scores, if it has one."""
        return self.read("cei.json", TypeAdapter(Scores).validate_json)

    def steps(self) -> list[Step]:
        """Its step records; [] where they were not logged, as for a run that has not ended."""
        one = TypeAdapter(Step)
        return self.read("steps.jsonl", lambda data: [one.validate_json(line) for line in data.splitlines()]) or []


def _evaluation(data: bytes) -> Evaluation:
    found = TypeAdapter(Evaluation).validate_json(data)
    for figure in found["figures"].values():
        found["cards"][figure["card"]]  # KeyError: a figure without the card of how it was measured
    return found


@contextlib.contextmanager
def read(
    experiment: str, wanted: Sequence[str] = (), warn: Callable[[str], None] = warnings.warn
) -> Iterator[list[Training]]:
    """The trainings of an MLflow experiment, oldest first. Their files can be read while the context is open.

    wanted: run ids (or beginnings of 6 characters and more), run names, outputs of jobs; a sweep's stands for its
    trials. None given: all trainings. warn: told of runs that are left out because what MLflow has of them is damaged.
    Raises UserError if store, experiment or a wanted run is not there, or if none is left.
    """
    uri = tracking_uri()
    database = database_file(uri)
    if database is not None and not database.exists():  # MLflow would make an empty one
        raise UserError(
            f"no MLflow store at {database}: train first, or set MLFLOW_TRACKING_URI to the store of the runs"
        )
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    try:
        client = connect(uri)
        found = client.get_experiment_by_name(experiment)
        if found is None:
            names = [e.name for e in client.search_experiments() if e.name != "Default"]
            raise UserError(
                f"no MLflow experiment {experiment!r} at {masked(uri)}{close_to(experiment, names)}; there are: "
                f"{', '.join(names) or 'none'}"
            )
        chosen = _chosen(_all_runs(client, found.experiment_id), wanted, experiment)
        with tempfile.TemporaryDirectory(prefix="entprog-compare-") as scratch:
            yield sorted(_trainings(client, chosen, Path(scratch), warn), key=lambda t: t.started_s)
    except _mlflow_errors() as error:
        raise UserError(f"MLflow at {masked(uri)} does not answer: {reason(error, uri)}") from None


def _mlflow_errors() -> tuple[type[Exception], ...]:
    from mlflow.exceptions import MlflowException
    from requests import RequestException

    return MlflowException, RequestException


def _all_runs(client, experiment_id: str) -> list:
    runs, page = [], None
    while True:
        part = client.search_runs([experiment_id], max_results=1000, page_token=page)
        runs += part
        page = part.token
        if not page:
            return runs


def _is_training(run) -> bool:
    tags = run.data.tags
    return tags.get("entprog.kind", "training" if "entprog.identity" in tags else "") == "training"


def _chosen(runs: list, wanted: Sequence[str], experiment: str) -> list:
    trainings = [run for run in runs if _is_training(run)]
    if not trainings:
        raise UserError(f"MLflow experiment {experiment!r} has no training runs: train some first")
    if not wanted:
        return trainings
    chosen = {}
    for word in wanted:
        hits = [
            r for r in runs if word == r.info.run_name or (len(word) >= SHORTEST_ID and r.info.run_id.startswith(word))
        ]
        of_output = None if hits else _run_of(word)
        hits = hits or [r for r in runs if r.info.run_id == of_output]
        below = {r.info.run_id for r in hits}
        mine = [r for r in trainings if below & {r.info.run_id, *(r.data.tags.get(tag) for tag in ABOVE)}]
        if not mine:
            names = list(dict.fromkeys(r.info.run_name for r in trainings))
            shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
            kept = f", which is run {of_output[:8]}" if of_output else close_to(word, names)
            raise UserError(f"experiment {experiment!r} has no training run {word!r}{kept}; there are: {shown}")
        chosen |= {r.info.run_id: r for r in mine}
    return list(chosen.values())


def _run_of(output: str) -> str | None:
    """The id of the run that a job has left its output's name with; None where that is no such output."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, UserError):
        return str(json.loads((storage.at(output, "--runs") / RUN_FILE).read_text())["run_id"])
    return None


def _trainings(client, chosen: list, scratch: Path, warn: Callable[[str], None]) -> list[Training]:
    """All that can be read. Raises UserError if none can be."""
    out, reason = [], ""
    for run in chosen:
        try:
            out.append(_training(client, run, scratch))
        except _damages() as error:
            name = f"{run.info.run_name} ({run.info.run_id[:8]})"
            reason = f"run {name} cannot be read: {masking.one_line(error)}"
            warn(f"{reason}; it is left out")
    if not out:
        raise UserError(f"no run can be compared: {reason}")
    return out


def _damages() -> tuple[type[Exception], ...]:
    from mlflow.exceptions import MlflowException

    return MlflowException, OSError, ValueError, TypeError, KeyError


def _training(client, run, scratch: Path) -> Training:
    info, data = run.info, run.data
    charged = _by_step(client, info.run_id, "charged_s", data.metrics)
    losses = _by_step(client, info.run_id, "held_out_loss", data.metrics)
    begun_ms = info.start_time
    curve = tuple(
        Point(charged[step].value, step, loss.value, (loss.timestamp - begun_ms) / 1000)
        for step, loss in sorted(losses.items())
        if step in charged
    )
    status = STATUS.get(info.status, info.status.lower())
    if status == "finished":
        status = "empty" if not curve else "finished" if math.isfinite(curve[-1].loss) else "diverged"
    changed = {k.removeprefix("changed."): v for k, v in data.tags.items() if k.startswith("changed.")}
    entries = client.list_artifacts(info.run_id)
    paths = tuple(entry.path for entry in entries if not entry.is_dir)
    drawn = any(entry.path == PREVIEWS for entry in entries)
    previews = _previews(client, info.run_id, max(charged, default=0)) if drawn else {}
    readable = {*paths, *(path for some in previews.values() for path in some)}

    def files(path: str) -> bytes | None:
        if path not in readable:
            return None
        folder = scratch / info.run_id
        folder.mkdir(exist_ok=True)
        place = folder / path
        return (place if place.exists() else Path(client.download_artifacts(info.run_id, path, folder))).read_bytes()

    last_ms = info.end_time or latest_ms(data) or info.start_time
    settings = {name: _value(text) for name, text in {**data.params, **changed}.items()}
    int(settings.get("train.seed", 0))  # raises for what is no seed
    return Training(
        run_id=info.run_id,
        name=info.run_name or info.run_id,
        status=status,
        started_s=info.start_time / 1000,
        last_sign_s=last_ms / 1000,
        settings=settings,
        tags=dict(data.tags),
        curve=curve,
        figures=_figures(data.metrics, charged, curve),
        files=files,
        artifacts=paths,
        previews=previews,
    )


def _previews(client, run_id: str, last: int) -> dict[int, tuple[str, ...]]:
    """Few of them: a run may have hundreds, and each is a question to the store. last: the run's last step: what was
    drawn after it is of an attempt that was lost."""
    matches = {entry.path: PREVIEW.fullmatch(entry.path) for entry in client.list_artifacts(run_id, PREVIEWS)}
    steps = {int(match[1]): path for path, match in matches.items() if match and int(match[1]) <= last}
    places = np.linspace(0, len(steps) - 1, min(len(steps), PREVIEWS_SHOWN)).round().astype(int)
    chosen = [sorted(steps)[place] for place in places]
    return {step: tuple(entry.path for entry in client.list_artifacts(run_id, steps[step])) for step in chosen}


def _by_step(client, run_id: str, metric: str, known: dict[str, float]) -> dict[int, Any]:
    """A metric's points by step, without those that a resume went back behind: from the step it went on at, its own
    count alone."""
    if metric not in known:
        return {}
    kept = []
    for point in sorted(client.get_metric_history(run_id, metric), key=lambda m: (m.timestamp, m.step)):
        while kept and kept[-1].step >= point.step:
            kept.pop()
        kept.append(point)
    return {point.step: point for point in kept}


def _figures(metrics: dict[str, float], charged: dict[int, Any], curve: Sequence[Point]) -> dict[str, float]:
    known = {name: metrics[f"final/{name}"] for name in FIGURES if f"final/{name}" in metrics}
    so_far = {"peak_memory_bytes": metrics.get("peak_memory_bytes"), "flops": metrics.get("flops")}
    if charged:
        so_far |= {"steps": max(charged), "seconds": charged[max(charged)].value}
    if curve:
        so_far["held_out_loss"] = curve[-1].loss
    return {name: value for name, value in so_far.items() if value is not None} | known


def _value(text: str) -> Any:
    """Tracked settings are JSON, but for texts, which are as they are."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _ago(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
