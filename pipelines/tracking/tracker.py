"""MLflow: one logical run, across restarts, and training that never waits for it.

The driver makes the store, the experiment and the run (`Tracker.start`); rank 0 logs to its id (`Tracker.attach`).
Points are delivered by a thread, in batches, and kept while MLflow does not answer; what could not be delivered lies in
OUTPUT/mlflow_pending.jsonl until somebody delivers it: a restarted worker, the driver at the end, `deliver_pending`.
"""

import contextlib
import importlib.metadata
import json
import math
import re
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from entprog import files, storage
from entprog.errors import UserError
from entprog.masking import masked, reason
from entprog.storage import Where
from pipelines.tracking.store import (
    alone,
    connect,
    database_file,
    experiment_id,
    open_run,
    tracking_uri,
    unusable,
)

RUN_FILE = "mlflow_run.json"
PENDING_FILE = "mlflow_pending.jsonl"
FLUSH_S = 2.0
RETRY_S = (1.0, 2.0, 5.0, 10.0)
"""Waits between tries while MLflow does not answer; the last one goes on."""
POINTS_PER_BATCH = 1000
ENTITIES_PER_BATCH = 100
PARAM_LENGTH = 6000
TAG_LENGTH = 8000
"""MLflow's own limits."""
Point = tuple[str, float, int, int]
"""Name, value, milliseconds since 1970, step."""
VERSIONS = ("torch", "ray", "diffusers", "mlflow")


def versions() -> dict[str, str]:
    """Of the packages that decide what a run computes and how it is kept."""
    return {name: importlib.metadata.version(name) for name in VERSIONS}


class Tracker:
    """Logs to one MLflow run. Metrics never block and never fail; all else tries for a bounded time, then warns."""

    def __init__(self, uri: str, run_id: str, output: str | Where, warn: Callable[[str], None] = warnings.warn):
        self.run_id = run_id
        self.uri, self._output, self._warn = uri, storage.at(output, "the output"), warn
        self._points: list[Point] = []  # not delivered yet
        self._kept = False  # the file of undelivered points is there, and ours to remove
        self._told_not_finite: set[str] = set()
        self._change = threading.Condition()
        self._hurry = self._failing = False
        self._refused = False  # MLflow has not taken points twice in a row, nor since
        self.closed = threading.Event()
        """Set once no more points are taken."""
        self._client_made = None
        self._thread: threading.Thread | None = None

    @staticmethod
    def start(
        output: Where,
        experiment: str,
        run_name: str,
        *,
        params: Mapping[str, Any],
        tags: Mapping[str, Any],
        parent: str | None = None,
        warn: Callable[[str], None] = warnings.warn,
    ) -> "Tracker":
        """On the driver: the run of an output folder, continued if it was begun before.

        params: {dotted name: JSON value}. parent: id of the run under which this one is nested.
        Raises UnreachableError if MLflow does not answer.
        """
        uri, experiment, run_name = tracking_uri(), masked(experiment), masked(run_name)
        record = output / RUN_FILE
        before = json.loads(record.read_text()) if record.exists() else {}
        known = before.get("run_id")
        try:
            with alone(uri):
                client = connect(uri)
                run_id = open_run(client, experiment_id(client, uri, experiment), run_name, known)
        except UserError:
            raise
        except Exception as error:
            raise unusable(uri, error) from None
        if known not in (None, run_id) and before.get("uri") != masked(uri):
            there = f"MLflow at {masked(uri)} does not have the run of {output}, which is at {before.get('uri')}"
            warn(f"{there}: it gets a new one, of what is to come")
        files.write_json(record, {"run_id": run_id, "experiment": experiment, "uri": masked(uri)})
        tracker = Tracker(uri, run_id, output, warn)
        tracker._client_made = client
        about = {f"version.{name}": version for name, version in versions().items()}
        nested = {"mlflow.parentRunId": parent} if parent else {}
        tracker._describe(params, {**about, **tags, **nested})
        return tracker

    def handle(self) -> dict[str, str]:
        """What `attach` needs; goes to another process."""
        return {"uri": self.uri, "run_id": self.run_id, "output": storage.address(self._output.resolve())}

    @staticmethod
    def attach(handle: Mapping[str, str], warn: Callable[[str], None] = warnings.warn) -> "Tracker":
        """In a worker: log to a run that the driver started. Returns at once; `close` it, the driver ends the run."""
        tracker = Tracker(handle["uri"], handle["run_id"], handle["output"], warn)
        tracker._adopt_pending()
        return tracker

    def metrics(self, step: int, values: Mapping[str, float], at_s: float | None = None) -> None:
        """Log values at a step. NaN and infinities are logged too, and named in the tag `not_finite`.

        at_s: seconds since 1970, None: now. The same values at the same step and time a second time change nothing.
        """
        at_ms = int((time.time() if at_s is None else at_s) * 1000)
        points = [(_key(name), float(value), at_ms, int(step)) for name, value in values.items()]
        with self._change:
            self._points += points
        self._wake()

    def summary(self, values: Mapping[str, float | None]) -> None:
        """Final figures of the run: metrics `final/NAME`; none where a figure is None, which was not measured."""
        self.metrics(0, {f"final/{name}": value for name, value in values.items() if value is not None})

    def tags(self, values: Mapping[str, Any]) -> None:
        """Set tags."""
        self._describe({}, values)

    def child(
        self,
        name: str,
        *,
        tags: Mapping[str, Any],
        params: Mapping[str, Any],
        metrics: Sequence[tuple[str, float, float, int]],
        started_s: float,
        ended_s: float,
        status: str,
    ) -> None:
        """A run nested under this one, made if there is none of that name; a finished one stays as it is.

        One that began or ended at another time is of an attempt that was lost, or goes on: what MLflow holds of it
        cannot be changed, so it is deleted and made anew.

        metrics: (name, value, seconds since 1970, step). status: RUNNING, FINISHED, FAILED or KILLED.
        """
        from mlflow.entities import Metric, Param

        def write(client):
            mine = client.get_run(self.run_id).info
            mark = '"' if "'" in name else "'"
            called = f"tags.`mlflow.parentRunId` = '{self.run_id}' and attributes.run_name = {mark}{name}{mark}"
            run = next(iter(client.search_runs([mine.experiment_id], called)), None)
            started_ms, ended_ms = int(started_s * 1000), int(ended_s * 1000)
            ends = (None,) if status == "RUNNING" else (None, ended_ms)
            if run and (run.info.start_time != started_ms or run.info.end_time not in ends):
                client.delete_run(run.info.run_id)
                run = None
            if run is None:
                marks = {key: str(value) for key, value in tags.items()} | {"mlflow.parentRunId": self.run_id}
                run = client.create_run(mine.experiment_id, started_ms, marks, name)
            if status == "RUNNING" or run.info.status == "FINISHED":
                return
            new = [Param(_key(k), _text(v, PARAM_LENGTH)) for k, v in params.items() if k not in run.data.params]
            client.log_batch(run.info.run_id, params=new)
            for first in range(0, len(metrics), POINTS_PER_BATCH):
                part = metrics[first : first + POINTS_PER_BATCH]
                client.log_batch(run.info.run_id, [Metric(_key(k), v, int(s * 1000), step) for k, v, s, step in part])
            client.set_terminated(run.info.run_id, status, ended_ms)

        self._patiently(write, f"the nested run {name} is not complete")

    def artifact(self, path: Where, folder: str | None = None) -> None:
        """Keep a file, or a folder with all that is in it, with the run."""

        def upload(client):
            with storage.local_copy(path) as file:
                if file.is_dir():
                    client.log_artifacts(self.run_id, str(file), folder or file.name)
                else:
                    client.log_artifact(self.run_id, str(file), folder)

        self._patiently(upload, f"artifact {path} was not uploaded")

    def flush(self, timeout_s: float = 5.0) -> bool:
        """Deliver what is waiting; whether all was. What was not is safe in OUTPUT/mlflow_pending.jsonl. An MLflow that
        takes no points at the moment is not waited for."""
        with self._change:
            if not self.closed.is_set():
                self._hurry = True
                self._change.notify_all()
                self._change.wait_for(lambda: not self._points or self._refused, timeout_s)
                self._hurry = False
            self._keep_pending()
            return not self._points

    def close(self, timeout_s: float = 30.0) -> None:
        """Deliver everything, or warn where it is kept. Safe to call twice."""
        if self.closed.is_set():
            return
        with self._change:
            self._refused = False  # once more
        delivered = self.flush(timeout_s)
        with self._change:
            self.closed.set()
            self._change.notify_all()
        if not delivered:
            self._warn(
                f"MLflow at {masked(self.uri)} does not answer: {len(self._points)} points are kept in {self._pending}"
            )

    def end(self, status: str) -> bool:
        """Close, with what a worker may have left undelivered, and end the run: FINISHED, FAILED or KILLED; whether
        MLflow has taken that."""
        self._adopt_pending()
        self.close()
        return self._patiently(
            lambda client: client.set_terminated(self.run_id, status), f"the run was not marked {status}"
        )

    # ---- inside ----

    @property
    def _pending(self) -> Where:
        return self._output / PENDING_FILE

    def _client(self):
        if self._client_made is None:
            database = database_file(self.uri)
            if database is not None and not database.exists():  # MLflow would make an empty one
                raise FileNotFoundError(f"{database} is not on this machine: workers on others need an MLflow server")
            with alone(self.uri):
                self._client_made = connect(self.uri)
        return self._client_made

    def _describe(self, params: Mapping[str, Any], tags: Mapping[str, Any]) -> None:
        """Parameters cannot change in MLflow: a resumed run's changed ones become tags `changed.NAME`, which stay, with
        the value that was in force last, where one is changed back."""
        from mlflow.entities import Param, RunData, RunTag

        new = {_key(name): _text(value, PARAM_LENGTH) for name, value in params.items()}

        def log(client):
            data = client.get_run(self.run_id).data if new else RunData()
            there = data.params
            marks = {name: _key(f"changed.{name}") for name in new if name in there}
            changed = {mark: new[n] for n, mark in marks.items() if data.tags.get(mark, there[n]) != new[n]}
            entities = [Param(name, value) for name, value in new.items() if name not in there]
            entities += [RunTag(_key(k), _text(v, TAG_LENGTH)) for k, v in {**changed, **tags}.items()]
            for first in range(0, len(entities), ENTITIES_PER_BATCH):
                part = entities[first : first + ENTITIES_PER_BATCH]
                client.log_batch(
                    self.run_id,
                    params=[e for e in part if isinstance(e, Param)],
                    tags=[e for e in part if isinstance(e, RunTag)],
                )

        self._patiently(log, "parameters and tags are not complete")

    def _patiently(self, act: Callable[[Any], None], otherwise: str) -> bool:
        """Do it, again after a while if MLflow does not answer; whether it was done: a warning in the end, never an
        error.

        Once a whole round was in vain the next ones are short: ten charts must not wait for a dead server ten times.
        """
        waits = () if self._failing else RETRY_S[:3]
        for wait_s in (*waits, None):
            try:
                act(self._client())
                self._failing = False
                return True
            except Exception as error:  # whatever store, network or disk raise: tracking must not stop a run
                if wait_s is None:
                    self._failing = True
                    self._warn(f"MLflow: {otherwise}: {reason(error, self.uri)}")
                else:
                    time.sleep(wait_s)
        return False

    def _wake(self) -> None:
        with self._change:
            if self._thread is None and not self.closed.is_set():
                self._thread = threading.Thread(target=self._deliver, name="mlflow", daemon=True)
                self._thread.start()
            self._change.notify_all()

    def _deliver(self) -> None:
        """The thread: deliver every FLUSH_S; when that fails keep the points and try later."""
        failures = 0

        def due() -> bool:
            full = len(self._points) >= POINTS_PER_BATCH and not failures
            return self.closed.is_set() or bool(self._points and (self._hurry or full))

        while True:
            with self._change:
                self._change.wait_for(due, RETRY_S[min(failures, len(RETRY_S)) - 1] if failures else FLUSH_S)
                if self.closed.is_set():
                    return
                batch = self._points[:POINTS_PER_BATCH]
            if not batch:
                continue
            try:
                self._log(batch)
            except Exception as error:  # as in _patiently
                failures += 1
                if failures == 2:  # once may be a busy SQLite file
                    with self._change:
                        self._refused = True
                        self._change.notify_all()
                    self._warn(f"MLflow does not take points, training goes on: {reason(error, self.uri)}")
                time.sleep(0.5)
                continue
            failures = 0
            with self._change:
                self._refused = False
                del self._points[: len(batch)]
                if not self._points and self._kept:
                    with contextlib.suppress(OSError):  # delivered once more they change nothing
                        self._pending.unlink(missing_ok=True)
                    self._kept = False
                self._change.notify_all()

    def _log(self, batch: list[Point]) -> None:
        from mlflow.entities import Metric, RunTag

        client = self._client()
        odd = {key: (value, step) for key, value, _, step in reversed(batch) if not math.isfinite(value)}
        new = {key: found for key, found in odd.items() if key not in self._told_not_finite}
        tags = [RunTag(f"not_finite.{key}", f"{value} at step {step}") for key, (value, step) in new.items()]
        client.log_batch(self.run_id, metrics=[Metric(*point) for point in batch], tags=tags[:ENTITIES_PER_BATCH])
        self._told_not_finite |= set(new)

    def _adopt_pending(self) -> None:
        """Take over what another tracker of this run left behind."""
        try:
            left = _read_points(self._pending) if self._pending.exists() else []
        except OSError as error:
            self._warn(f"cannot read MLflow points in {self._pending}: {reason(error)}")
            return
        if left:
            with self._change:
                self._points += left  # behind: points at the front may be on their way
                self._kept = True
            self._wake()

    def _keep_pending(self) -> None:
        """Write undelivered points to the file (under the lock)."""
        if not self._points:
            return
        try:
            files.write_text(self._pending, "".join(map(_line, self._points)))
            self._kept = True
        except OSError as error:
            self._warn(f"cannot keep MLflow points in {self._pending}: {reason(error)}")


def deliver_pending(output: Where, warn: Callable[[str], None] = warnings.warn) -> bool:
    """Deliver points that a run which is over could not; whether none are left."""
    record, pending = output / RUN_FILE, output / PENDING_FILE
    if not pending.exists():
        return True
    tracker = Tracker.attach(
        {
            "uri": tracking_uri(),
            "run_id": json.loads(record.read_text())["run_id"],
            "output": storage.address(output),
        },
        warn,
    )
    tracker.close()
    return not pending.exists()


def _line(point: Point) -> str:
    """A point in strict JSON, which has no number for a value that is not finite: it is written as text."""
    name, value, at_ms, step = point
    return files.strict_json([name, value if math.isfinite(value) else str(value), at_ms, step]) + "\n"


def _read_points(path: Where) -> list[Point]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [(name, float(value), at_ms, step) for name, value, at_ms, step in rows]


def _key(name: str) -> str:
    """A name that MLflow takes: its alphabet, at most 250 characters."""
    return re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)[:250]


def _text(value: Any, length: int) -> str:
    text = masked(value if isinstance(value, str) else files.strict_json(value))
    return text if len(text) <= length else text[: length - 1] + "…"
