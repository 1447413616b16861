"""Where MLflow keeps runs: which store, how it is opened, made and named without showing secrets."""

import contextlib
import logging
import os
import shlex
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

from entprog import files
from entprog.errors import UnreachableError, UserError
from entprog.masking import masked, reason
from entprog.storage import Where


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, or the SQLite file out/mlflow.db under the working directory; a file's path is absolute, for
    workers run in folders of their own.

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
    file = database_file(uri)
    return uri if file is None or file.name == ":memory:" else f"sqlite:///{file.absolute()}"


def how_to_open(uri: str) -> str:
    """What a person types (or opens) to look at the runs; reachable from this machine alone."""
    if uri.startswith(("http://", "https://")):
        return masked(uri)
    program = Path(sys.executable).parent / "mlflow"
    if program.is_relative_to(Path.cwd()):
        program = program.relative_to(Path.cwd())
    shown = shlex.quote(uri) if masked(uri) == uri else '"$MLFLOW_TRACKING_URI"'
    return f"{program} ui --backend-store-uri {shown} --host 127.0.0.1"


def database_file(uri: str) -> Path | None:
    """File of a SQLite store, None for any other."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def is_file(uri: str) -> bool:
    """Whether the store is a file, which other machines do not have, or must not write to at once."""
    return uri.startswith("sqlite")


def connect(uri: str):
    """A client of a quiet MLflow that gives up soon: retrying is done here. The import takes seconds."""
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "GIT_PYTHON_REFRESH": "quiet",
    }.items():
        os.environ.setdefault(name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mlflow import MlflowClient

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.ERROR)
        return MlflowClient(tracking_uri=uri)


def unusable(uri: str, error: Exception) -> UnreachableError:
    return UnreachableError(f"MLflow at {masked(uri)} cannot be used: {reason(error, uri)}; check MLFLOW_TRACKING_URI")


def check_answers() -> None:
    """Raises UnreachableError where MLFLOW_TRACKING_URI names a server that does not answer. Other stores are not
    opened: that would make them."""
    uri = tracking_uri()
    if uri.startswith(("http://", "https://")):
        try:
            connect(uri).search_experiments(max_results=1)
        except Exception as error:
            raise unusable(uri, error) from None


_making = threading.Lock()
_made: list[bytes] = []
"""The file of a SQLite store without runs, if `make_ready` has made one."""


def make_ready() -> None:
    """Import MLflow and, where a SQLite store is yet to be made, make its tables, which the first that `alone` opens it
    puts there: a command that is refused meanwhile leaves nothing. Three seconds, in a thread beside what else is to be
    done first. Raises what `connect` raises."""
    uri = tracking_uri()
    if (database := database_file(uri)) is None or database.exists():
        connect(uri)
        return
    with _making, tempfile.TemporaryDirectory(prefix="entprog-") as folder:
        file = Path(folder) / "mlflow.db"
        connect(f"sqlite:///{file}").search_experiments()
        _made.append(file.read_bytes())


@contextlib.contextmanager
def alone(uri: str) -> Iterator[None]:
    """One process at a time: two that create a SQLite store at once destroy each other's migration."""
    database = database_file(uri)
    if database is None:
        yield
        return
    database.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{database}.lock"):
        with _making:
            if _made and not database.exists():
                with files.whole(database) as scratch:
                    scratch.write_bytes(_made[-1])
        yield


def experiment_id(client, uri: str, name: str) -> str:
    """The experiment's id; made if there is none. A SQLite store keeps artifacts in `mlartifacts` beside its file."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        database = database_file(uri)
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


def open_run(client, experiment_id: str, run_name: str, known: str | None) -> str:
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


def check_goes_on(record: Where) -> None:
    """Raises UserError where a run lies in a SQLite store that is there still, and would go on in another store, which
    does not have it: each would hold a part of its curves. record: file of the run's id and store, in its output."""
    uri = tracking_uri()
    try:
        known = files.from_json(record.read_text())
        before, run_id = str(known["uri"]), str(known["run_id"])
    except (OSError, ValueError, KeyError, TypeError):  # none was begun, or it is not ours: `claim` says so
        return
    file = database_file(before)
    if before == masked(uri) or file is None or not file.exists() or _has(uri, run_id):
        return
    raise UserError(
        f"the MLflow run of {record.parent} is in {before}, and {masked(uri)}, where it would go on, does not have it: "
        f"set MLFLOW_TRACKING_URI={before} (the default is of the working directory)"
    )


def _has(uri: str, run_id: str) -> bool:
    """Whether a store, which is not made for that, has a run. Raises UnreachableError where it does not answer."""
    if (file := database_file(uri)) is not None and not file.exists():
        return False
    try:
        with alone(uri):
            connect(uri).get_run(run_id)
    except Exception as error:  # whatever store, network or disk raise
        if getattr(error, "error_code", None) == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise unusable(uri, error) from None
    return True
