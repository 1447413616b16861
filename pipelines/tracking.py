"""MLflow: one logical run, across restarts, and training that never waits for it.

The driver makes the store, the experiment and the run (`Tracker.start`); rank 0 logs to its id (`Tracker.attach`).
Points are delivered by a thread, in batches, and kept while MLflow does not answer; what could not be delivered lies in
OUTPUT/mlflow_pending.jsonl until somebody delivers it: a restarted worker, the driver at the end, `deliver_pending`.
"""

import contextlib
import fcntl
import importlib.metadata
import json
import logging
import math
import os
import re
import shlex
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from entprog.errors import UserError

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


# ---- the store ----


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, or the SQLite file out/mlflow.db under the working directory (absolute).

    Raises UserError for a folder store, which MLflow no longer takes.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        return f"sqlite:///{Path('out/mlflow.db').resolve()}"
    if "://" not in uri or uri.startswith("file:"):
        raise UserError(
            f"MLFLOW_TRACKING_URI={uri} is a folder, which MLflow refuses as a store: use sqlite:////PATH/mlflow.db, "
            "a server's address, or unset it"
        )
    return uri


def masked(uri: str) -> str:
    """The URI without what could be a secret: user, password, query."""
    try:
        parts = urlsplit(uri)
    except ValueError:
        return "***"
    if "@" not in parts.netloc and not parts.query:
        return uri  # untouched: putting it together again would lose slashes of sqlite:////
    _, at, host = parts.netloc.rpartition("@")
    return urlunsplit(parts._replace(netloc=f"***{at}{host}" if at else host, query="***" if parts.query else ""))


def how_to_open(uri: str) -> str:
    """What a person types (or opens) to look at the runs; reachable from this machine alone."""
    if uri.startswith(("http://", "https://")):
        return masked(uri)
    program = Path(sys.executable).parent / "mlflow"
    if program.is_relative_to(Path.cwd()):
        program = program.relative_to(Path.cwd())
    shown = shlex.quote(uri) if masked(uri) == uri else '"$MLFLOW_TRACKING_URI"'
    return f"{program} ui --backend-store-uri {shown} --host 127.0.0.1"


def _database_file(uri: str) -> Path | None:
    """File of a SQLite store, None for any other."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def _client(uri: str):
    """A client of a quiet MLflow that gives up soon: retrying is done here. The import takes seconds."""
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
        "GIT_PYTHON_REFRESH": "quiet",
    }.items():
        os.environ.setdefault(name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mlflow import MlflowClient

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.ERROR)
        return MlflowClient(tracking_uri=uri)


@contextlib.contextmanager
def _alone(uri: str) -> Iterator[None]:
    """One process at a time: two that create a SQLite store at once destroy each other's migration."""
    database = _database_file(uri)
    if database is None:
        yield
        return
    database.parent.mkdir(parents=True, exist_ok=True)
    with database.with_name(database.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _experiment_id(client, uri: str, name: str) -> str:
    """The experiment's id; made if there is none. A SQLite store keeps artifacts in `mlartifacts` beside its file."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        database = _database_file(uri)
        place = None if database is None else (database.parent / "mlartifacts").absolute().as_uri()
        try:
            return client.create_experiment(name, artifact_location=place)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another driver was quicker
                raise
            found = client.get_experiment_by_name(name)
    if found.lifecycle_stage == "deleted":
        raise UserError(
            f"MLflow experiment {name!r} was deleted: restore it in MLflow, or set tracking.experiment to another name"
        )
    return found.experiment_id


def _run_id(client, experiment_id: str, run_name: str, known: str | None) -> str:
    """The known run, running again; a new one if there is none or it is gone."""
    from mlflow.exceptions import MlflowException

    if known:
        try:
            if client.get_run(known).info.lifecycle_stage == "active":
                client.update_run(known, status="RUNNING")
                return known
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
    return client.create_run(experiment_id, run_name=run_name).info.run_id


# ---- a run ----


class Tracker:
    """Logs to one MLflow run. Metrics never block and never fail; all else tries for a bounded time, then warns."""

    def __init__(self, uri: str, run_id: str, output: Path, warn: Callable[[str], None] = warnings.warn):
        self.run_id = run_id
        self._uri, self._output, self._warn = uri, Path(output), warn
        self._points: list[Point] = []  # not delivered yet
        self._kept = False  # the file of undelivered points is there, and ours to remove
        self._told_not_finite: set[str] = set()
        self._change = threading.Condition()
        self._hurry = self._closed = self._failing = False
        self._client_made = None
        self._thread: threading.Thread | None = None

    @staticmethod
    def start(
        output: Path,
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
        Raises UserError if MLflow does not answer.
        """
        uri = tracking_uri()
        record = Path(output) / RUN_FILE
        known = json.loads(record.read_text())["run_id"] if record.exists() else None
        try:
            with _alone(uri):
                client = _client(uri)
                run_id = _run_id(client, _experiment_id(client, uri, experiment), run_name, known)
        except UserError:
            raise
        except Exception as error:
            reason = _one_line(error, uri)
            raise UserError(f"MLflow at {masked(uri)} cannot be used: {reason}; check MLFLOW_TRACKING_URI") from None
        record.parent.mkdir(parents=True, exist_ok=True)
        scratch = record.with_name(record.name + ".tmp")
        scratch.write_text(json.dumps({"run_id": run_id, "experiment": experiment, "uri": masked(uri)}) + "\n")
        scratch.replace(record)
        tracker = Tracker(uri, run_id, output, warn)
        tracker._client_made = client
        versions = {f"version.{name}": importlib.metadata.version(name) for name in VERSIONS}
        nested = {"mlflow.parentRunId": parent} if parent else {}
        tracker._describe(params, {**versions, **tags, **nested})
        return tracker

    def handle(self) -> dict[str, str]:
        """What `attach` needs; goes to another process."""
        return {"uri": self._uri, "run_id": self.run_id, "output": str(self._output.resolve())}

    @staticmethod
    def attach(handle: Mapping[str, str], warn: Callable[[str], None] = warnings.warn) -> "Tracker":
        """In a worker: log to a run that the driver started. Returns at once; `close` it, the driver ends the run."""
        tracker = Tracker(handle["uri"], handle["run_id"], Path(handle["output"]), warn)
        tracker._adopt_pending()
        return tracker

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Log values at a step. NaN and infinities are logged too, and named in the tag `not_finite`."""
        now_ms = int(time.time() * 1000)
        points = [(_key(name), float(value), now_ms, int(step)) for name, value in values.items()]
        with self._change:
            self._points += points
        self._wake()

    def summary(self, values: Mapping[str, float]) -> None:
        """Final figures of the run: metrics `final/NAME`."""
        self.metrics(0, {f"final/{name}": value for name, value in values.items()})

    def tags(self, values: Mapping[str, Any]) -> None:
        """Set tags."""
        self._describe({}, values)

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Keep a file, or a folder with all that is in it, with the run."""
        path = Path(path)

        def upload(client):
            if path.is_dir():
                client.log_artifacts(self.run_id, str(path), folder or path.name)
            else:
                client.log_artifact(self.run_id, str(path), folder)

        self._patiently(upload, f"artifact {path} was not uploaded")

    def flush(self, timeout_s: float = 5.0) -> bool:
        """Deliver what is waiting; whether all was. What was not is safe in OUTPUT/mlflow_pending.jsonl."""
        with self._change:
            if not self._closed:
                self._hurry = True
                self._change.notify_all()
                self._change.wait_for(lambda: not self._points, timeout_s)
                self._hurry = False
            self._keep_pending()
            return not self._points

    def close(self, timeout_s: float = 30.0) -> None:
        """Deliver everything, or warn where it is kept. Safe to call twice."""
        if self._closed:
            return
        delivered = self.flush(timeout_s)
        with self._change:
            self._closed = True
            self._change.notify_all()
        if not delivered:
            self._warn(
                f"MLflow at {masked(self._uri)} does not answer: {len(self._points)} points are kept in {self._pending}"
            )

    def end(self, status: str) -> None:
        """Close, with what a worker may have left undelivered, and end the run: FINISHED, FAILED or KILLED."""
        self._adopt_pending()
        self.close()
        self._patiently(lambda client: client.set_terminated(self.run_id, status), f"the run was not marked {status}")

    # ---- inside ----

    @property
    def _pending(self) -> Path:
        return self._output / PENDING_FILE

    def _client(self):
        if self._client_made is None:
            database = _database_file(self._uri)
            if database is not None and not database.exists():  # MLflow would make an empty one
                raise FileNotFoundError(f"{database} is not on this machine: workers on others need an MLflow server")
            with _alone(self._uri):
                self._client_made = _client(self._uri)
        return self._client_made

    def _describe(self, params: Mapping[str, Any], tags: Mapping[str, Any]) -> None:
        """Parameters cannot change in MLflow: a resumed run's changed ones become tags `changed.NAME`."""
        from mlflow.entities import Param, RunTag

        new = {_key(name): _text(value, PARAM_LENGTH) for name, value in params.items()}

        def log(client):
            there = client.get_run(self.run_id).data.params if new else {}
            changed = {f"changed.{name}": new[name] for name in new if there.get(name, new[name]) != new[name]}
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

    def _patiently(self, act: Callable[[Any], None], otherwise: str) -> None:
        """Do it, again after a while if MLflow does not answer; a warning in the end, never an error.

        Once a whole round was in vain the next ones are short: ten charts must not wait for a dead server ten times.
        """
        waits = () if self._failing else RETRY_S[:3]
        for wait_s in (*waits, None):
            try:
                act(self._client())
                self._failing = False
                return
            except Exception as error:  # whatever store, network or disk raise: tracking must not stop a run
                if wait_s is None:
                    self._failing = True
                    self._warn(f"MLflow: {otherwise}: {_one_line(error, self._uri)}")
                else:
                    time.sleep(wait_s)

    def _wake(self) -> None:
        with self._change:
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._deliver, name="mlflow", daemon=True)
                self._thread.start()
            self._change.notify_all()

    def _deliver(self) -> None:
        """The thread: deliver every FLUSH_S; when that fails keep the points and try later."""
        failures = 0

        def due() -> bool:
            full = len(self._points) >= POINTS_PER_BATCH and not failures
            return self._closed or bool(self._points and (self._hurry or full))

        while True:
            with self._change:
                self._change.wait_for(due, RETRY_S[min(failures, len(RETRY_S)) - 1] if failures else FLUSH_S)
                if self._closed:
                    return
                batch = self._points[:POINTS_PER_BATCH]
            if not batch:
                continue
            try:
                self._log(batch)
            except Exception as error:  # as in _patiently
                failures += 1
                if failures == 2:  # once may be a busy SQLite file
                    self._warn(f"MLflow does not take points, training goes on: {_one_line(error, self._uri)}")
                time.sleep(0.5)
                continue
            failures = 0
            with self._change:
                del self._points[: len(batch)]
                if not self._points and self._kept:
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
        if self._pending.exists():
            with self._change:
                self._points = [*_read_points(self._pending), *self._points]
                self._kept = True
            self._wake()

    def _keep_pending(self) -> None:
        """Write undelivered points to the file (under the lock)."""
        if not self._points:
            return
        scratch = self._pending.with_name(PENDING_FILE + ".tmp")
        try:
            scratch.write_text("".join(json.dumps(point) + "\n" for point in self._points))
            scratch.replace(self._pending)
            self._kept = True
        except OSError as error:
            self._warn(f"cannot keep MLflow points in {self._pending}: {error.strerror}")


def deliver_pending(output: Path, warn: Callable[[str], None] = warnings.warn) -> bool:
    """Deliver points that a run which is over could not; whether none are left."""
    record, pending = Path(output) / RUN_FILE, Path(output) / PENDING_FILE
    if not pending.exists():
        return True
    tracker = Tracker.attach(
        {"uri": tracking_uri(), "run_id": json.loads(record.read_text())["run_id"], "output": str(output)}, warn
    )
    tracker.close()
    return not pending.exists()


def _read_points(path: Path) -> list[Point]:
    with path.open() as file:
        return [tuple(json.loads(line)) for line in file]


def _key(name: str) -> str:
    """A name that MLflow takes: its alphabet, at most 250 characters."""
    return re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)[:250]


def _text(value: Any, length: int) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= length else text[: length - 1] + "…"


def _one_line(error: Exception, uri: str) -> str:
    """The reason, without the URI's secrets."""
    secrets = urlsplit(uri)
    text = " ".join(f"{type(error).__name__}: {error}".split()).replace(uri, masked(uri))
    for secret in filter(None, (secrets.password, secrets.username, secrets.query)):
        text = text.replace(secret, "***")
    return text[:300]
