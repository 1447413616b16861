"""MLflow: one run across restarts and no point lost, on real SQLite stores and a real server."""

import json
import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

from entprog import config, masking
from entprog.errors import UserError
from entprog.models import wan
from helpers import bases, stores
from helpers.networks import SHAPE, tiny_denoiser, tiny_experiment
from helpers.runs import Run
from helpers.servers import Server
from pipelines import train, tune
from pipelines.tracking import registry, stages, tracker
from pipelines.tracking import store as mlflow_store
from pipelines.tracking.tracker import PARAM_LENGTH, Tracker
from pipelines.training import figures

WRITERS = 8
DRIVERS = """
import multiprocessing, sys, time
from pathlib import Path
from pipelines.tracking import store
from pipelines.tracking.tracker import Tracker
store.connect("http://127.0.0.1:1")  # what drivers import is imported once, not by each of them; nothing is opened
import mlflow.store.tracking.sqlalchemy_store

def drive(output):
    tracker = Tracker.start(output, "parallel", output.name, params={"seed": 1}, tags={})
    rank_0 = Tracker.attach(tracker.handle())
    for step in range(300):
        rank_0.metrics(step, {"loss": 1 / (step + 1), "seconds": float(step)})
        time.sleep(0.003)
    rank_0.close()
    tracker.end("FINISHED")

fork = multiprocessing.get_context("fork")
drivers = [fork.Process(target=drive, args=(Path(output),)) for output in sys.argv[1:]]
for driver in drivers:
    driver.start()
for driver in drivers:
    driver.join()
sys.exit(any(driver.exitcode for driver in drivers))
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A SQLite store that eight driver processes made, all at once: its URI and their outputs."""
    folder = tmp_path_factory.mktemp("store")
    uri = f"sqlite:///{folder}/out/mlflow.db"
    outputs = [folder / f"run{i}" for i in range(WRITERS)]
    command = [sys.executable, "-c", DRIVERS, *outputs]
    env = {**os.environ, "MLFLOW_TRACKING_URI": uri}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "quiet drivers"
    return uri, outputs


@pytest.fixture
def uri(store, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store[0])
    return store[0]


def client(uri):
    return mlflow_store.connect(uri)


def history(uri, run_id, name) -> list[tuple[int, float]]:
    return sorted((m.step, m.value) for m in client(uri).get_metric_history(run_id, name))


def begin(output, warn=None, **options):
    values = {"params": {}, "tags": {}} | options
    return Tracker.start(output, "tests", "a run", warn=warn or pytest.fail, **values)


def test_eight_drivers_at_once_on_a_fresh_store_lose_nothing(store):
    uri, outputs = store
    ids = [json.loads((output / tracker.RUN_FILE).read_text())["run_id"] for output in outputs]
    assert len(set(ids)) == WRITERS
    for run_id in ids:
        assert history(uri, run_id, "loss") == [(step, 1 / (step + 1)) for step in range(300)]
        assert len(history(uri, run_id, "seconds")) == 300
        assert client(uri).get_run(run_id).info.status == "FINISHED"


def test_two_restarts_are_one_run(uri, tmp_path):
    seen = []
    for part, status in enumerate(("KILLED", "FAILED", "FINISHED")):
        driver = begin(tmp_path, params={"train.steps": 3, "data.verify": part}, tags={"part": part})
        assert client(uri).get_run(driver.run_id).info.status == "RUNNING"
        rank_0 = Tracker.attach(driver.handle(), warn=pytest.fail)
        rank_0.metrics(part, {"loss": float(part)})
        rank_0.close()
        driver.end(status)
        assert client(uri).get_run(driver.run_id).info.status == status
        seen.append(driver.run_id)
    assert len(set(seen)) == 1
    assert history(uri, seen[0], "loss") == [(0, 0.0), (1, 1.0), (2, 2.0)]
    data = client(uri).get_run(seen[0]).data
    assert data.params == {"train.steps": "3", "data.verify": "0"}, "a parameter is never rewritten"
    assert (data.tags["part"], data.tags["changed.data.verify"]) == ("2", "2")


def test_a_setting_that_is_changed_back_is_the_first_one_again(uri, tmp_path):
    for workers in (1, 2, 1):
        driver = begin(tmp_path, params={"train.workers": workers, "train.seed": 0})
        driver.end("KILLED")
    tags = client(uri).get_run(driver.run_id).data.tags
    assert {name: tags[name] for name in tags if name.startswith("changed.")} == {"changed.train.workers": "1"}


def test_a_deleted_run_is_replaced(uri, tmp_path):
    first = begin(tmp_path)
    first.end("KILLED")
    client(uri).delete_run(first.run_id)
    second = begin(tmp_path)
    second.end("FINISHED")
    assert second.run_id != first.run_id


def test_a_run_is_not_cut_in_two_by_another_store(uri, tmp_path, monkeypatch):
    """As the default one is of another working directory."""
    output = tmp_path / "run"
    first = begin(output)
    first.end("KILLED")
    mlflow_store.check_goes_on(output / tracker.RUN_FILE)
    (tmp_path / "b").mkdir()
    for other in ("new", "b/mlflow"):  # not made by the look; there, without the run
        if other != "new":
            stores.made(tmp_path / "b")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/{other}.db")
        with pytest.raises(UserError, match=rf"does not have it: set MLFLOW_TRACKING_URI={uri} "):
            mlflow_store.check_goes_on(output / tracker.RUN_FILE)
        assert (tmp_path / "b" / "mlflow.db").exists() == (other != "new") and not (tmp_path / "new.db").exists()
    for job, more in ((train, []), (tune, ["--space", "optimizer"])):
        done = CliRunner().invoke(job.app, ["--preset", "demo", "--output", str(output), *more])
        assert done.exit_code == 2 and "does not have it" in done.stderr, done.output
    assert [path.name for path in output.iterdir()] == [tracker.RUN_FILE]
    (tmp_path / "copy.db").write_bytes(mlflow_store.database_file(uri).read_bytes())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/copy.db")
    mlflow_store.check_goes_on(output / tracker.RUN_FILE)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/b/mlflow.db")
    warned = []
    assert begin(output, warn=warned.append).run_id != first.run_id
    assert len(warned) == 1 and f"which is at {uri}: it gets a new one" in warned[0]


def test_params_tags_parent_and_artifacts(uri, tmp_path):
    parent = begin(tmp_path / "parent")
    params = {"model.init": {"layers": [1, 2]}, "name": "x", "none": None, "long": "ä" * 9000}
    params |= {f"many.{i}": i for i in range(250)}
    tracker = begin(tmp_path / "child", params=params, tags={"entprog.data": "abc"}, parent=parent.run_id)
    folder = tmp_path / "charts"
    folder.mkdir()
    for file in (tmp_path / "cei.json", folder / "cei.png"):
        file.write_text("x")
    tracker.artifact(tmp_path / "cei.json")
    tracker.artifact(folder)
    tracker.summary({"held_out_loss": 0.25})
    tracker.end("FINISHED")
    parent.end("FINISHED")
    run = client(uri).get_run(tracker.run_id)
    assert run.data.params["model.init"] == '{"layers": [1, 2]}'
    assert (run.data.params["name"], run.data.params["none"]) == ("x", "null")
    assert len(run.data.params["long"]) <= PARAM_LENGTH and run.data.params["long"].endswith("…")
    assert len(run.data.params) == 254
    assert run.data.tags["entprog.data"] == "abc" and run.data.tags["version.torch"]
    assert run.data.tags["mlflow.parentRunId"] == parent.run_id
    assert run.data.metrics == {"final/held_out_loss": 0.25}
    assert {a.path for a in client(uri).list_artifacts(tracker.run_id)} == {"cei.json", "charts"}
    beside = Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts"
    assert list(beside.rglob("cei.png")), "artifacts lie beside the store, wherever the command was given"


def test_nested_runs_are_made_once(uri, tmp_path):
    tracker = begin(tmp_path)
    point = ("loss", float("nan"), 1000.0, 3)
    for status in ("RUNNING", "FAILED", "RUNNING", "FINISHED", "KILLED"):  # a finished one stays as it is
        tracker.child(
            "stage 1", tags={"entprog.kind": "stage"}, params={"m": 2}, metrics=[point], started_s=990.0,
            ended_s=1000.0, status=status,
        )  # fmt: skip
    tracker.end("FINISHED")
    experiment = client(uri).get_run(tracker.run_id).info.experiment_id
    (child,) = client(uri).search_runs([experiment], f"tags.`mlflow.parentRunId` = '{tracker.run_id}'")
    assert (child.info.status, child.info.start_time, child.info.end_time) == ("FINISHED", 990_000, 1_000_000)
    assert child.data.params == {"m": "2"} and len(history(uri, child.info.run_id, "loss")) == 1


def test_a_stage_whose_end_was_lost_is_the_stage_that_was_trained_again(uri, tmp_path):
    """Killed in the second stage, resumed from a checkpoint in the first, which the clock then gives more steps."""

    def steps(numbers, stage, at_s):
        return [
            {
                "step": n, "stage": stage, "time": at_s + n, "seconds": 0.5, "wait_s": 0.0, "charged_s": float(n),
                "loss": 1.0, "held_out_loss": at_s / n, "phase": "train", "trained": ["b"], "backward": "exact",
                "shape": "2x8x8", "plan_memory_bytes": n,
            }
            for n in numbers
        ]  # fmt: skip

    def nested():
        experiment = client(uri).get_run(tracker.run_id).info.experiment_id
        found = client(uri).search_runs([experiment], f"tags.`mlflow.parentRunId` = '{tracker.run_id}'")
        return {run.info.run_name: run for run in found}

    tracker = begin(tmp_path)
    kept = steps(range(1, 5), 0, 100.0)
    stages.log(tracker, [*kept, *steps(range(5, 9), 0, 100.0), *steps([9], 1, 100.0)])
    lost = nested()
    assert {name: run.info.status for name, run in lost.items()} == {"stage 1": "FINISHED", "stage 2": "RUNNING"}
    stages.log(tracker, [*kept, *steps(range(5, 7), 0, 200.0)])
    assert nested()["stage 1"].info.status == "RUNNING"
    stages.log(tracker, [*kept, *steps(range(5, 7), 0, 200.0)], "KILLED")
    again = [*kept, *steps(range(5, 8), 0, 300.0), *steps([8, 9], 1, 300.0)]
    for ended in ("RUNNING", "FINISHED", "FINISHED"):
        stages.log(tracker, again, ended)
    tracker.end("FINISHED")
    first, second = nested()["stage 1"], nested()["stage 2"]
    assert first.info.status == second.info.status == "FINISHED"
    assert first.data.metrics["stage/steps"] == 7 and first.data.metrics["held_out_loss"] == 300.0 / 7
    assert second.info.start_time == 307_500 and second.data.metrics["stage/steps"] == 2
    losses = history(uri, first.info.run_id, "held_out_loss")
    assert [step for step, _ in losses] == [1, 2, 3, 4, 5, 6, 7], "no step of a lost attempt, none twice"


def test_a_registered_model_makes_clips(uri, tmp_path):
    import mlflow

    tiny_denoiser(tiny_experiment()).save(tmp_path / "model", shape=SHAPE)
    tracker = begin(tmp_path)
    assert registry.register(tracker, "dancer", tmp_path / "model", SHAPE, warn=pytest.fail) == "1"
    warned = []
    assert registry.register(tracker, "other", tmp_path / "nothing", SHAPE, warn=warned.append) is None
    assert registry.register(tracker, "dancer", tmp_path / "model", SHAPE, warn=pytest.fail) == "1", "once a run"
    assert len(warned) == 1 and "\n" not in warned[0]
    tracker.end("FINISHED")
    model = mlflow.pyfunc.load_model("models:/dancer/1")
    assert [spec.name for spec in model.metadata.signature.inputs] == ["reference", "pose"]
    people = np.zeros((2, SHAPE.height, SHAPE.width, 3), np.uint8)
    motions = np.zeros((2, SHAPE.frames, 33, 3), np.float32)
    clips = np.asarray(model.predict({"reference": people, "pose": motions}, params={"steps": 2}))
    assert clips.dtype == np.uint8 and clips.shape == (2, SHAPE.frames, SHAPE.height, SHAPE.width, 3)


@pytest.mark.parametrize("clip", [True, False], ids=["FLF2V", "2.2 I2V"])
def test_a_registered_model_takes_the_last_frame_that_it_was_trained_with(clip, uri, tmp_path):
    import mlflow

    bases.image_to_video(tmp_path / "base", clip=clip, last=clip)
    shape = SHAPE.model_copy(update={"frames": 5, "height": 32, "width": 32})
    wan.load(config.Model(base=str(tmp_path / "base"), last_frame=True)).save(tmp_path / "model", shape=shape)
    tracker, name = begin(tmp_path), f"knows the end {clip}"
    assert registry.register(tracker, name, tmp_path / "model", shape, warn=pytest.fail) == "1"
    tracker.end("FINISHED")
    model = mlflow.pyfunc.load_model(f"models:/{name}/1")
    given = {"reference": np.zeros((1, 32, 32, 3), np.uint8), "pose": np.zeros((1, 5, 33, 3), np.float32)}
    ends = [np.full((1, 32, 32, 3), level, np.uint8) for level in (0, 250)]
    dark, light = (np.asarray(model.predict({**given, "last": end}, params={"steps": 2})) for end in ends)
    assert dark.shape == (1, 5, 32, 32, 3) and not np.array_equal(dark, light)
    with pytest.raises(mlflow.exceptions.MlflowException, match="last"):
        model.predict(given, params={"steps": 2})


def test_not_finite_values_and_odd_names_are_logged_visibly(uri, tmp_path):
    tracker = begin(tmp_path)
    tracker.metrics(7, {"loss": float("nan"), "norm": float("inf"), "efficiency[m=3]": 1.0})
    tracker.metrics(8, {"loss": float("nan")})
    tracker.end("FINISHED")
    run = client(uri).get_run(tracker.run_id)
    assert run.data.tags["not_finite.loss"] == "nan at step 7"
    assert run.data.tags["not_finite.norm"] == "inf at step 7"
    assert run.data.metrics["efficiency_m_3_"] == 1.0
    assert len(history(uri, tracker.run_id, "loss")) == 2


def test_many_points_from_one_burst(uri, tmp_path):
    tracker = begin(tmp_path)
    for step in range(500):
        tracker.metrics(step, {f"m{i}": float(step * i) for i in range(7)})
    assert tracker.flush(60)
    tracker.end("FINISHED")
    for i in range(7):
        assert history(uri, tracker.run_id, f"m{i}") == [(step, float(step * i)) for step in range(500)]


def test_a_store_that_is_gone_keeps_the_points_for_the_driver(uri, tmp_path):
    """As for a worker on another machine than a SQLite file's."""
    driver = begin(tmp_path)
    warned = []
    handle = {**driver.handle(), "uri": f"sqlite:///{tmp_path}/elsewhere/mlflow.db"}
    rank_0 = Tracker.attach(handle, warn=warned.append)
    rank_0.metrics(1, {"loss": 0.5})
    assert not rank_0.flush(0.2)
    rank_0.metrics(2, {"loss": 0.4})
    rank_0.close(0.2)
    rank_0.close()
    assert len([line for line in warned if tracker.PENDING_FILE in line and "2 points" in line]) == 1
    assert not (tmp_path / "elsewhere").exists()
    driver.end("FINISHED")
    assert history(uri, driver.run_id, "loss") == [(1, 0.5), (2, 0.4)]
    assert not (tmp_path / tracker.PENDING_FILE).exists()


def test_a_restarted_worker_delivers_what_a_killed_one_kept(uri, tmp_path):
    driver = begin(tmp_path)
    gone = Tracker.attach({**driver.handle(), "uri": f"sqlite:///{tmp_path}/no.db"}, warn=lambda _: None)
    gone.metrics(1, {"loss": 0.5, "odd": math.nan, "large": -math.inf})
    gone.flush(0.2)  # and then it is killed
    for line in (tmp_path / tracker.PENDING_FILE).read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)
    again = Tracker.attach(driver.handle(), warn=pytest.fail)
    again.metrics(2, {"loss": 0.4})
    again.close()
    driver.end("FINISHED")
    assert history(uri, driver.run_id, "loss") == [(1, 0.5), (2, 0.4)]
    assert math.isnan(history(uri, driver.run_id, "odd")[0][1]) and history(uri, driver.run_id, "large")[0][1] < -1e300


class Slow:
    """A server that takes a moment for what is told last, and is away if it is told so."""

    def __init__(self, away=False):
        self.away, self.asked, self.goes_on, self.told = away, threading.Event(), threading.Event(), []

    def log_batch(self, run_id, metrics=(), tags=(), params=()):
        if self.away:
            raise ConnectionError("away")
        if metrics[0].key.startswith("final"):
            self.asked.set()
            assert self.goes_on.wait(20)
        self.told += [metric.key for metric in metrics]

    def set_terminated(self, *_):
        pass


def test_what_a_worker_kept_is_delivered_while_other_points_are_on_their_way(tmp_path):
    lines = [tracker._line(("loss", 1.0, 1000 + number, number)) for number in range(10)]
    (tmp_path / tracker.PENDING_FILE).write_text("".join(lines))
    one = Tracker("http://server", "run", tmp_path, pytest.fail)
    one._client_made = server = Slow()
    one.summary({f"f{number}": 1.0 for number in range(10)})
    assert server.asked.wait(20)
    adopt = one._adopt_pending
    one._adopt_pending = lambda: (adopt(), server.goes_on.set())
    one.end("FINISHED")
    assert server.told.count("loss") == 10 and len(server.told) == 20
    assert not (tmp_path / tracker.PENDING_FILE).exists()


def test_an_mlflow_that_is_away_is_not_waited_for_again_and_again(tmp_path):
    warnings = []
    one = Tracker("http://server", "run", tmp_path, warnings.append)
    one._client_made = Slow(away=True)
    one.metrics(1, {"loss": 1.0})
    assert not one.flush(20)
    waits = []
    one._change.wait_for = lambda ready, timeout_s=None: waits.append(ready()) or waits[-1]
    assert not one.flush() and waits[-1], "nothing to wait for: it has refused points twice"
    assert len(tracker._read_points(tmp_path / tracker.PENDING_FILE)) == 1 and "does not take points" in warnings[0]
    del one._change.wait_for
    one.closed.set()


def test_a_decision_writes_no_stage_but_the_one_that_ended_and_the_one_that_began(tmp_path):
    made = []
    recorder = SimpleNamespace(child=lambda name, **given: made.append((name, given["status"], given["metrics"])))
    line = {"seconds": 0.5, "wait_s": 0.0, "loss": 1.0, "held_out_loss": None, "phase": "train", "trained": ["b"]}
    line |= {"backward": "exact", "shape": "2x8x8", "plan_memory_bytes": 1}
    steps = [line | {"step": n + 1, "stage": n, "time": n + 1.0, "charged_s": n + 1.0} for n in range(30)]
    for stages_ in range(1, 31):
        stages.log(recorder, steps[:stages_], newest=2)
    assert len(made) == 59 and [name for name, *_ in made[-2:]] == ["stage 29", "stage 30"]
    (_, _, ended), (_, status, begun) = made[-2:]
    assert {name: value for name, value, *_ in ended}["stage/seconds"] == 1.0
    assert status == "RUNNING" and not begun


def test_the_search_and_scoring_of_all_stages_are_the_run_s():
    """Blocks are scored again at the second stage's start, between a step and a search step."""
    schedule = {"search_steps": 1, "search_share": 1.0, "search_until_clear": False}
    run, made = Run(tiny_experiment(train={"steps": 12}, schedule=schedule, priority={"rescore": True})), []
    steps = [figures.as_record(step) for step in run.steps()]
    recorder = SimpleNamespace(child=lambda name, **given: made.append({n: v for n, v, *_ in given["metrics"]}))
    stages.log(recorder, steps, "FINISHED")
    spent = figures.final(run.experiment, run.state)["seconds_by_purpose"]
    assert len(made) == 2 and all(stage["stage/search_seconds"] > 0 for stage in made)
    for name, seconds in (("search", spent["search"]), ("score", spent["score"]), ("", sum(spent.values()))):
        figure = f"stage/{name}_seconds" if name else "stage/seconds"
        assert sum(stage[figure] for stage in made) == pytest.approx(seconds), figure
    assert made[0]["stage/score_seconds"] == run.table.seconds, "the first table's, before the first step"


def test_a_server_that_is_down_for_a_while_gets_every_point(uri, tmp_path):
    server = Server(uri, tmp_path / "server.log")
    driver, warned = begin(tmp_path), []
    rank_0 = Tracker.attach({**driver.handle(), "uri": server.uri}, warn=warned.append)
    try:
        started = time.monotonic()
        for step in range(100):  # nobody answers yet
            rank_0.metrics(step, {"loss": float(step)})
        assert time.monotonic() - started < 5, "training does not wait"
        server.start()
        deadline = time.monotonic() + 120
        while not rank_0.flush(2):
            assert time.monotonic() < deadline, server.log.read_text()
        assert history(uri, driver.run_id, "loss") == [(step, float(step)) for step in range(100)]
        assert not (tmp_path / tracker.PENDING_FILE).exists()
        rank_0.metrics(100, {"loss": float("nan")})
        assert rank_0.flush(30), "NaN goes through a server too"
    finally:
        server.kill()
    rank_0.metrics(101, {"loss": 101.0})
    rank_0.close(1)
    assert any(tracker.PENDING_FILE in line for line in warned)
    assert tracker.deliver_pending(tmp_path, warn=pytest.fail)  # by the store itself, which is there
    assert history(uri, driver.run_id, "loss")[-1] == (101, 101.0)
    assert not (tmp_path / tracker.PENDING_FILE).exists()
    driver.end("FINISHED")


def test_no_server_at_the_start_is_told_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UserError, match="MLFLOW_TRACKING_URI") as caught:
        begin(tmp_path)
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)


def test_default_store_and_refused_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert mlflow_store.tracking_uri() == f"sqlite:///{tmp_path}/out/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///runs.db")
    assert mlflow_store.tracking_uri() == f"sqlite:///{tmp_path}/runs.db", "workers run in folders of their own"
    for folder in ("mlruns", "file:///tmp/mlruns"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", folder)
        with pytest.raises(UserError, match=r"sqlite:////"):
            mlflow_store.tracking_uri()


def test_no_secret_is_shown():
    assert masking.masked("postgresql://me:secret@host:5432/db?password=secret") == "postgresql://***@host:5432/db?***"
    assert masking.masked("sqlite:////a/b.db") == "sqlite:////a/b.db"
    assert "--backend-store-uri sqlite:////a/b.db --host 127.0.0.1" in mlflow_store.how_to_open("sqlite:////a/b.db")
    assert "secret" not in mlflow_store.how_to_open("postgresql://me:secret@host/db")
    assert mlflow_store.how_to_open("https://me:secret@host:5000") == "https://***@host:5000"
    error = ValueError("cannot reach postgresql://me:secret@host/db as me with secret")
    assert "secret" not in masking.reason(error, "postgresql://me:secret@host/db")
