"""Runs whose output lies in a bucket: nothing of them is on a disk, so any machine goes on with them."""

import os
import re
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient
from typer.testing import CliRunner

from entprog import config, models, storage
from entprog.models import weight_files
from entprog.training import checkpoint
from helpers import servers
from helpers.commands import SETTINGS
from helpers.networks import tiny_experiment
from helpers.people import two_people
from helpers.processes import running
from pipelines import compare, generate, publish, score, status, train
from pipelines.tracking import tracker
from pipelines.tracking.tracker import Tracker
from pipelines.training import phases, steplog

OVER = {
    "train": {"steps": 8, "held_out_every": 4, "checkpoint_every": 2, "workers": 2, "samples": 1, "preview_every": 4},
    "schedule": {"stages": 1},
    "name": "tiny",
}


@pytest.fixture(scope="module")
def s3():
    with servers.s3() as endpoint:
        storage.Place.at(servers.address(endpoint, "runs")).system.create_dir("runs")
        yield endpoint


@contextmanager
def working_in(folder):
    before = Path.cwd()
    folder.mkdir()
    os.chdir(folder)
    try:
        yield folder
    finally:
        os.chdir(before)


def run(job, *words):
    done = CliRunner().invoke(job.app, list(map(str, words)), env={"COLUMNS": "400"})
    assert done.exit_code == 0, done.output + str(done.exception)
    return done.output


@pytest.fixture(scope="module")
def command(s3, local_ray, tmp_path_factory):
    """The words of a training of two workers out of a bucket into another folder of it, and that folder."""
    folder = tmp_path_factory.mktemp("bucket-runs")
    shards, output = (servers.address(s3, f"runs/{name}") for name in ("shards", "one"))
    storage.Place.at(shards).upload(two_people(tmp_path_factory))
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config.merge(SETTINGS, OVER)))
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder / 'mlflow.db'}"
    try:
        yield ("--config", folder / "tiny.yaml", "--shards", shards, "--output", output), storage.Place.at(output)
    finally:
        del os.environ["MLFLOW_TRACKING_URI"]


@pytest.fixture(scope="module")
def finished(command, tmp_path_factory):
    """The folder of a run that was killed with its worker, and went on from an empty working folder."""
    words, output = command
    root = tmp_path_factory.mktemp("machines")

    def kill():
        running("RayTrainWorker")[0].kill()

    with working_in(root / "first"):
        parsed = config.read_yaml(words[1])
        experiment = config.build(config.merge(parsed, {"data": {"shards": words[3]}, "train": {"max_failures": 0}}))
        seen = []

        def listen(item):
            seen.append(item)
            if item.get("step", {}).get("step") == 5:
                kill()

        with pytest.raises(RuntimeError):
            train.run(experiment, output, listen=listen)
        assert not list(Path().rglob("*"))
    with working_in(root / "second") as empty:
        said = run(train, *words)
        # The one after step 4 may have been under way, and is then named and not used.
        assert re.search("Resumed from the checkpoint after step [24]", said), said
        assert not list(empty.rglob("*"))
    return output


LEFT = {
    "cei.json", "cei.png", "decisions.json", "entprog-job.json", "finished.json", "loss.png",
    "mlflow_run.json", "model/README.md", "model/entprog.json", "model/model_index.json", "previews/index.html",
    "previews/previews.jsonl", "result.json", "samples/sheet.png", "schedule.png", "steps.jsonl",
}  # fmt: skip


def test_all_that_a_run_leaves_is_there(finished):
    result = finished.read_json("result.json")
    assert result["status"] == "done" and result["model"] == "s3://runs/one/model"
    there = finished.below()
    assert there.keys() >= LEFT, sorted(there)
    assert checkpoint.newest((finished / "checkpoints").address) == "step-00000008"
    assert any(name.startswith("cei/") for name in there), "score tables survive the machine"
    assert [step["step"] for step in steplog.steps_of(finished)] == [*range(1, 9)]
    shown = steplog.lines_of(finished / steplog.PREVIEWS)
    assert [line["step"] for line in shown] == [4, 8]
    assert all(there[video] for line in shown for video in line["videos"])


def test_mlflow_has_the_run_once(finished):
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    run_id = finished.read_json("result.json")["mlflow_run_id"]
    points = client.get_metric_history(run_id, "loss")
    assert {point.step for point in points} == {*range(1, 9)}
    paths = {artifact.path for artifact in client.list_artifacts(run_id)}
    assert paths >= {"schedule.png", "cei.json", "steps.jsonl", "sheet.png", "previews"}


def test_the_same_command_again_has_nothing_to_do_and_another_is_refused(command, finished):
    words, _ = command
    assert "Already finished: s3://runs/one" in run(train, *words)
    before = finished.below()
    done = CliRunner().invoke(train.app, [*map(str, words), "--set", "train.learning_rate=0.5"], env={"COLUMNS": "400"})
    assert done.exit_code == 2 and "s3://runs/one holds a train job of other settings" in done.output
    assert finished.below() == before


def test_status_reads_it_there(command, finished):
    said = run(status, command[0][5])
    assert "finished" in said and "s3://runs/one" in said and "last preview" in said


def test_it_is_compared_into_a_bucket(finished, s3, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    into = servers.address(s3, "runs/page")
    run(compare, "--output", into, "--runs", finished.read_json("result.json")["mlflow_run_id"])
    assert (storage.Place.at(into) / "comparison.html").exists() and not list(tmp_path.iterdir())


@pytest.mark.slow  # what is its own is one line
def test_blocks_are_scored_into_a_bucket(command, finished, s3, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (config_, file, shards_, shards, _, _), into = command[0], servers.address(s3, "runs/scores")
    run(score, config_, file, shards_, shards, "--tables", (finished / "cei").address, "--output", into)
    assert storage.Place.at(into).read_json("cei.json") == finished.read_json("cei.json")
    assert (storage.Place.at(into) / "cei.png").exists() and not list(tmp_path.iterdir())


@pytest.fixture
def cached(tmp_path, monkeypatch):
    monkeypatch.setenv("ENTPROG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_its_model_makes_clips_into_a_bucket(command, finished, s3, cached, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (_, _, _, shards, _, output), into = command[0], servers.address(s3, "runs/clips")
    words = ("--checkpoint", output, "--shards", shards, "--count", 1, "--steps", 2, "--output", into)
    run(generate, *words)
    clips = storage.Place.at(into)
    made = clips.read_json("result.json")
    assert made["status"] == "done" and (clips / "sheet.png").exists() and made["checkpoint"] == "s3://runs/one"
    (record,) = made["clips"]
    assert record["video"].startswith("s3://runs/clips/videos/000_")
    fetched = {path.name for path in cached.rglob("*") if path.is_file() and "hashes" not in path.parts}
    assert "diffusion_pytorch_model.safetensors" in fetched and not {"steps.jsonl", "state.json"} & fetched
    assert "1 of 1 clips are there already" in run(generate, *words)


def test_a_step_of_it_is_published(command, finished, cached, tmp_path):
    output = command[0][5]
    run(publish, "--checkpoint", output, "--step", 8, "--to", tmp_path / "published")
    assert (tmp_path / "published" / "model_index.json").is_file()


def test_its_model_is_a_base(command, finished, cached, tmp_path):
    model = config.Model(base=command[0][5], vae="none", conditions=("reference", "pose"))
    found = models.family("wan").load(model)
    trained = weight_files.of(cached.rglob("transformer").__next__(), "x")
    assert found.network.config.in_channels == 9 and trained.safetensors


def test_points_that_mlflow_did_not_take_lie_in_the_bucket(command, s3):
    place = storage.Place.at(servers.address(s3, "runs/pending"))
    driver = Tracker.start(place, "pending", "a run", params={}, tags={}, warn=pytest.fail)
    warned = []
    rank_0 = Tracker("http://127.0.0.1:1", driver.run_id, driver.handle()["output"], warned.append)
    rank_0.metrics(1, {"loss": 0.5})
    assert not rank_0.flush(0.1) and (place / tracker.PENDING_FILE).exists(), "kept with every checkpoint"
    rank_0.close(0.1)
    assert "1 points are kept in s3://runs/pending/mlflow_pending.jsonl" in warned[-1]
    assert tracker.deliver_pending(place, warn=pytest.fail) and not (place / tracker.PENDING_FILE).exists()
    points = MlflowClient(os.environ["MLFLOW_TRACKING_URI"]).get_metric_history(driver.run_id, "loss")
    assert [(point.step, point.value) for point in points] == [(1, 0.5)]
    driver.end("FINISHED")


def test_a_phase_starts_from_the_model_of_the_one_before(s3):
    place = storage.Place.at(servers.address(s3, "runs/phases"))
    parts = config.phases(tiny_experiment(phases={"one": {}, "two": {}}), place)
    assert storage.Place.at(parts["two"].model.base) == place / "one" / "model"
    assert phases._model(place, "two") == place / "two" / "model", "a bucket has no links"


def logged(folder, first, last, warn=pytest.fail):
    log = steplog.StepLog(folder / "steps.jsonl", first - 1, warn)
    for step in range(first, last + 1):
        log.add({"step": step})
    return log


def steps_in(folder):
    return [step["step"] for step in steplog.steps_of(folder)]


def test_the_log_of_steps_is_as_far_as_the_checkpoint(s3):
    place = storage.Place.at(servers.address(s3, "runs/log"))
    log = logged(place, 1, 5)
    log.keep()
    assert steps_in(place) == [1, 2, 3, 4, 5]
    log.close()
    with pytest.raises(ZeroDivisionError), logged(place, 4, 6):
        1 / 0  # noqa: B018 - what ends a run
    assert steps_in(place) == [1, 2, 3, 4, 5, 6], "lines after the checkpoint were cut off"
    logged(place, 3, 3).close()
    assert steps_in(place) == [1, 2, 3]


def test_a_log_that_a_bucket_does_not_take_is_a_warning_once_and_an_error_at_the_end(s3):
    warned = []
    with servers.counting(s3) as (reading, _):  # which takes nothing
        log = logged(storage.Place.at(servers.address(reading, "runs/refused")), 1, 2, warned.append)
        log.keep()
        log.keep()
        assert len(warned) == 1 and warned[0].startswith("s3://runs/refused/steps.jsonl is not up to date: ")
        with pytest.raises(OSError):
            log.close()
