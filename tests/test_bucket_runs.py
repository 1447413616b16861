"""Runs whose output lies in a bucket: nothing of them is on a disk, so any machine goes on with them."""

import os
import re
from contextlib import contextmanager
from pathlib import Path

import mlflow
import pytest
import yaml
from mlflow import MlflowClient
from typer.testing import CliRunner

from entprog import config, models, storage
from entprog.models import folders, weight_files
from entprog.training import checkpoint
from helpers import bases, real_clips, servers, stores
from helpers.commands import SETTINGS
from helpers.networks import tiny_experiment
from helpers.people import two_people
from helpers.processes import running
from pipelines import compare, evaluate, generate, publish, score, status, train
from pipelines.tracking import tracker
from pipelines.tracking.tracker import Tracker
from pipelines.training import phases, steplog

OVER = {
    "train": {
        "steps": 6, "held_out_every": 3, "checkpoint_every": 2, "workers": 2, "samples": 1, "preview_every": 3,
        "parallel": "fsdp",
    },
    "schedule": {"stages": 1},
    "tracking": {"model_name": "in-a-bucket"},
    "name": "tiny",
}  # fmt: skip


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


def begun(words, kill_at: int, **over) -> list[int]:
    """The training of a command's words, of which a worker is killed once a step is heard of: the steps that were."""
    given = dict(zip(words[::2], words[1::2], strict=True))
    of_words = {"data": {"shards": str(given["--shards"])}, "model": {"base": given.get("--base")}}
    values = config.merge(config.read_yaml(given["--config"]), {**of_words, "train": over})
    heard = []

    def listen(item):
        if "step" in item:
            heard.append(item["step"]["step"])
            if len(heard) == kill_at:
                running("RayTrainWorker")[0].kill()

    train.run(config.build(values), storage.Place.at(given["--output"]), listen=listen)
    return heard


def killed(words, steps: int) -> None:
    """Begin the training of a command's words, and kill a worker once so many steps of it are heard of."""
    with pytest.raises(RuntimeError):
        begun(words, steps, max_failures=0)


@pytest.fixture(scope="module")
def finished(command, tmp_path_factory):
    """The folder of a run, one worker of which was killed on the way."""
    words, output = command
    root = tmp_path_factory.mktemp("machines")
    with working_in(root / "first") as empty:
        heard = begun(words, 5)
        # The one after step 4 may have been under way, and is then not used.
        assert any(heard == [*range(1, last + 1), *range(after + 1, 7)] for last in (5, 6) for after in (2, 4)), heard
        assert not list(empty.rglob("*"))
    with working_in(root / "second") as empty:
        assert "Already finished: s3://runs/one" in run(train, *words)
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
    assert checkpoint.newest((finished / "checkpoints").address) == "step-00000006"
    assert any(name.startswith("cei/") for name in there), "score tables survive the machine"
    assert [step["step"] for step in steplog.steps_of(finished)] == [*range(1, 7)]
    shown = steplog.lines_of(finished / steplog.PREVIEWS)
    assert [line["step"] for line in shown] == [3, 6]
    assert all(there[video] for line in shown for video in line["videos"])


def test_mlflow_has_the_run_once(finished):
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    run_id = finished.read_json("result.json")["mlflow_run_id"]
    points = client.get_metric_history(run_id, "loss")
    assert {point.step for point in points} == {*range(1, 7)}
    paths = {artifact.path for artifact in client.list_artifacts(run_id)}
    assert paths >= {"schedule.png", "cei.json", "steps.jsonl", "sheet.png", "previews"}


def test_its_model_is_registered(finished):
    name = finished.read_json("result.json")["registered"]
    assert name == "models:/in-a-bucket/1"
    folder = Path(mlflow.artifacts.download_artifacts(name)) / "artifacts" / "model"
    weights = f"transformer/{folders.STEM}.safetensors"
    assert (folder / weights).read_bytes() == (finished / "model" / weights).read_bytes()


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


@pytest.mark.slow  # test_gs has its clips judged by the same actors
def test_it_is_judged_into_a_bucket(command, finished, s3, cached, tmp_path, monkeypatch):
    """Its clips are made there, and are there for others to judge."""
    monkeypatch.chdir(tmp_path)
    (_, _, _, shards, _, output), into = command[0], servers.address(s3, "runs/judged")
    how = ("--shards", shards, "--clips", 1, "--metrics", "psnr")
    words = ("--checkpoint", output, *how, "--set", "generate.steps=2", "--output", into)
    run(evaluate, *words)
    place = storage.Place.at(into)
    made = place.read_json("result.json")
    assert made["generated"] == "s3://runs/judged/generated" and made["generated_now"] == 1
    assert made["mlflow_run_id"] == finished.read_json("result.json")["mlflow_run_id"]
    assert (place / "sheet.png").exists() and not list(Path().glob("*.*"))
    (clip,) = place.read_json("clips.json")
    assert clip["file"].startswith("s3://runs/judged/generated/") and clip["psnr"] == made["figures"]["psnr"]
    assert "0 of them to be generated" in run(evaluate, *words, "--dry-run")
    of_others = (*how, "--output", "out", "--dry-run", "--generated")
    assert "Would judge 1 clips" in run(evaluate, *of_others, servers.address(s3, "runs/judged/generated"))
    words = [*map(str, of_others), servers.address(s3, "runs/none")]
    done = CliRunner().invoke(evaluate.app, words, env={"COLUMNS": "400"})
    assert done.exit_code == 2 and "--generated: no such folder: s3://runs/none" in done.output


def test_a_step_of_it_is_published(command, finished, cached, tmp_path):
    output = command[0][5]
    run(publish, "--checkpoint", output, "--step", 6, "--to", tmp_path / "published")
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


TWO_PHASES = {
    "model": {"vae": "auto", "expert": "both"},
    "data": {"shape": {"frames": 9, "height": 32, "width": 32, "fps": 12}, "held_out_clips": 2},
    "train": {"steps": 3, "held_out_every": 2, "checkpoint_every": 2},
    "schedule": {"stages": 1},
    "name": "both",
}


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Shards of two clips; made before a test's cache is empty."""
    folder, shape = tmp_path_factory.mktemp("few"), config.ClipShape(**TWO_PHASES["data"]["shape"])
    rows = [real_clips.row("cam01", "train", 0.2 * i, shape) for i in range(2)]
    real_clips.write(folder / "shards", {"train": [rows], "held_out": [rows]}, shape)
    return folder / "shards"


@pytest.mark.slow
def test_both_experts_of_a_base_in_a_bucket_are_trained_into_one(s3, command, few, cached, tmp_path):
    """Killed in the second phase, the same command goes on in it, and its model has both."""
    bases.two_experts(tmp_path / "two", first_frame=False)
    base, output = (servers.address(s3, f"runs/{name}") for name in ("two", "both"))
    storage.Place.at(base).upload(tmp_path / "two")
    values = {name: value for name, value in SETTINGS.items() if name != "model"}
    (tmp_path / "both.yaml").write_text(yaml.safe_dump(config.merge(values, TWO_PHASES)))
    words = ("--config", tmp_path / "both.yaml", "--shards", few, "--base", base, "--output", output)
    killed(words, 6)
    said = run(train, *words)
    assert said.count("Already finished: s3://runs/both/high") == 1
    assert re.search("Resumed from the checkpoint after step [23]", said), "the last may be written before the kill"
    place = storage.Place.at(output)
    assert place.read_json("result.json")["model"] == "s3://runs/both/low/model"
    assert [steps_in(place / phase) for phase in ("high", "low")] == [[1, 2, 3]] * 2
    for phase, network in (("high", "transformer"), ("low", "transformer_2")):
        weights = f"model/{network}/{folders.STEM}.safetensors"
        both = [(place / each / weights).read_bytes() for each in ("high", "low")]
        assert both[0] == both[1] if phase == "high" else both[0] != both[1], "the low one is trained last"
    assert "finished" in run(status, servers.address(s3, "runs/both/low"))


@pytest.mark.slow
def test_a_training_into_googles_bucket(local_ray, tmp_path, tmp_path_factory, monkeypatch):
    """Of two whole networks: killed with its worker, it goes on from an empty working folder."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", stores.made(tmp_path))
    whole = config.merge(OVER, {"train": {"parallel": "ddp"}, "tracking": {"model_name": None}})
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config.merge(SETTINGS, whole)))
    with servers.gs("runs") as address:
        storage.Place.at(address("shards")).upload(two_people(tmp_path_factory))
        words = ("--config", tmp_path / "tiny.yaml", "--shards", address("shards"), "--output", address("one"))
        with working_in(tmp_path / "first") as empty:
            killed(words, 5)
            assert not list(empty.rglob("*"))
        with working_in(tmp_path / "second") as empty:
            said = run(train, *words)
            # The one after step 4 may have been under way, and is then named and not used.
            assert re.search("Resumed from the checkpoint after step [24]", said), said
            assert not list(empty.rglob("*"))
        place = storage.Place.at(address("one"))
        assert place.below().keys() >= LEFT and steps_in(place) == [*range(1, 7)]
        assert checkpoint.newest((place / "checkpoints").address) == "step-00000006"
        assert place.read_json("result.json")["model"] == "gs://runs/one/model"
        assert "finished" in run(status, address("one"))


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
