"""The train and score jobs through their real commands: real clips, real Ray, real MLflow, real kills."""

import contextlib
import importlib
import json
import os
import queue
import re
import shutil
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray
import torch
import yaml
from diffusers import WanTransformer3DModel
from mlflow import MlflowClient
from typer.testing import CliRunner

from entprog import config
from entprog.models import whole as whole_folder
from entprog.training import checkpoint
from helpers import stores
from helpers.commands import SETTINGS, Command, when_at
from helpers.people import two_people
from helpers.processes import running
from helpers.servers import Server
from pipelines import cli, score, status, train
from pipelines.cluster import message_board, ray_internals, silence
from pipelines.tracking import store as mlflow_store
from pipelines.training import report, steplog

WIDE = {"COLUMNS": "400"}


@pytest.fixture(scope="module")
def place(tmp_path_factory, local_ray):
    """A working folder with MLflow's store in it."""
    folder = tmp_path_factory.mktemp("train")
    os.environ["MLFLOW_TRACKING_URI"] = stores.made(folder)
    before = Path.cwd()
    os.chdir(folder)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(SETTINGS))
    try:
        yield folder
    finally:
        os.chdir(before)
        del os.environ["MLFLOW_TRACKING_URI"]


@pytest.fixture(scope="module")
def shards(place, tmp_path_factory):
    return two_people(tmp_path_factory)


def experiment(shards, **over):
    values = config.merge(SETTINGS, {"data": {"shards": str(shards)}, "name": "tiny"})
    return config.build(config.merge(values, over))


def whole(shards, **train):
    return experiment(shards, train={"samples": 1, **train})


@pytest.fixture(scope="module")
def undisturbed(place, shards):
    """The run that all others are compared with, and its folder."""
    output = place / "whole"
    looks = {"preview_every": 8, "preview_clips": 1, "preview_metrics": ["psnr"]}
    seen = whole(shards, **looks)  # those that it is compared with draw none
    return train.run(seen, output, tables=place / "tables"), output


def test_a_run_leaves_what_it_promises(undisturbed, shards):
    result, output = undisturbed
    assert len(result["losses"]) == 16 and result["held_out"][-1]["loss"] == result["held_out_loss"]
    assert len(result["decisions"]) == 2 and result["seconds"] > result["search_seconds"] > 0
    assert result["flops"] > 0 and result["peak_memory_bytes"] > 0
    *parts, total = result["startup_s"].values()
    assert list(result["startup_s"])[:4] == ["tracking", "workers", "weights", "held_out_clips"]
    assert result["startup_s"]["first_batch"] > 0.1, "Ray Data's tasks had to start"
    assert 0 < total <= result["wall_s"] and total == pytest.approx(sum(parts), abs=0.01)
    for name in ("schedule.png", "cei.png", "loss.png", "cei.json", "steps.jsonl", "model/entprog.json"):
        assert (output / name).stat().st_size > 0
    assert list((output / "samples").rglob("*.mp4"))
    network = WanTransformer3DModel.from_pretrained(output / "model" / "transformer")
    assert network.config.in_channels == 9  # noise, reference, pose
    assert whole_folder.missing(output / "model") == []
    card = (output / "model" / "README.md").read_text()
    assert f"| held-out loss | {result['held_out_loss']:.5g} |" in card and result["data"] in card
    assert all(step["time"] <= step["logged_s"] for step in steplog.steps_of(output))
    shown = steplog.lines_of(output / steplog.PREVIEWS)
    assert [line["step"] for line in shown] == [8, 16] and (output / "previews" / "index.html").is_file()
    assert all((output / video).is_file() for line in shown for video in line["videos"])


def test_actors_that_nothing_needs_are_not_started_and_those_to_come_are_begun_early(local_ray):
    trainer = ray_internals.torch_trainer(lambda abort: abort)(print)
    plain = super(type(trainer), trainer)._create_default_callbacks()
    left_out = {type(each) for each in plain} - {type(each) for each in trainer._create_default_callbacks()}
    assert {each.__name__ for each in left_out} == {"DatasetsCallback", "PlacementGroupCleanerCallback"}
    ray_internals.begin_coordinator()
    ray_internals.begin_statistics()
    there = {each["name"] for each in local_ray.util.list_named_actors(all_namespaces=True)}
    assert {"AutoscalingCoordinator", "datasets_stats_actor"} <= there


def test_what_comes_after_a_message_that_cannot_be_kept_is_heard(local_ray):
    told = []

    def full(item):
        told.append(item)
        if "step" in item:
            raise OSError("no space left on device")

    listener = message_board.Listener(full)
    try:
        listener._done.set()
        listener._thread.join()
        said = {"step": {"step": 1}}, {"warning": "a"}, {"result": {"steps": 3}}
        for item in said:  # one by one: Ray keeps no order of what an async actor is told at once
            local_ray.get(listener.board.post.remote(item))
        listener.read()
        assert listener.last == {"result": {"steps": 3}} and listener.step == 1
        assert [*told[0], *told[1], told[2]] == ["step", "warning", {"warning": "a"}]
        assert "no space left on device" in told[1]["warning"]
    finally:
        listener.close()


def test_that_nothing_is_heard_of_workers_is_told(local_ray, monkeypatch):
    quiet = silence.Silence(heard_s=0.0)
    assert [now for now in range(0, 5000, 100) if quiet.to_tell(now)] == [600, 1200, 2400, 4800]
    quiet.heard(5000.0)
    assert quiet.to_tell(14_900.0) is None and quiet.to_tell(15_100.0), "longer than any before"
    monkeypatch.setattr(silence, "QUIET_S", 0.5)
    told: queue.Queue = queue.Queue()
    listener = message_board.Listener(told.put)
    try:
        local_ray.get(listener.board.post.remote({"step": {"step": 7}}))
        assert "step" in told.get(timeout=60), "before its first step a group is silent"
        assert "no word from the workers for 0 min, since step 7" in told.get(timeout=60)["warning"]
    finally:
        listener.close()


@pytest.mark.slow  # test_worker sees what ends it
def test_a_run_that_diverged_leaves_no_model_however_often_it_is_tried(place, shards):
    wild = {"steps": 2, "learning_rate": 1e30, "checkpoint_every": 1}
    for _ in range(2):  # the second time there is no step left to take
        with pytest.raises(RuntimeError, match="the held-out loss after step 2 is nan: no model is saved"):
            train.run(experiment(shards, train=wild, schedule={"kind": "full"}), place / "diverged")
    assert not (place / "diverged" / "model").exists() and not (place / "diverged" / "finished.json").exists()


def test_mlflow_has_the_run(undisturbed, place):
    result, output = undisturbed
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    run = client.get_run(result["mlflow_run_id"])
    assert run.info.run_name == output.name
    assert run.info.status == "FINISHED"
    assert run.data.params["schedule.candidates"] == "[0.34, 1.0]" and run.data.params["train.steps"] == "16"
    for name in ("data", "held_out", "base", "scores", "device", "way", "commit"):
        assert run.data.tags[f"entprog.{name}"], name
    assert run.data.tags["entprog.kind"] == "training" and run.data.tags["entprog.workers"] == "1"
    names = ("loss", "held_out_loss", "trained_blocks", "charged_s", "samples_per_s")
    for name in (*names, "peak_memory_bytes", "optimizer_bytes"):
        assert name in run.data.metrics, name
    measured = client.get_metric_history(run.info.run_id, "preview/psnr")
    assert [p.step for p in measured] == [8, 16] and all(0 < p.value < 100 for p in measured)
    points = client.get_metric_history(run.info.run_id, "loss")
    assert [p.step for p in points] == list(range(1, 17)) and [p.value for p in points] == result["losses"]
    assert {a.path for a in client.list_artifacts(run.info.run_id)} >= {
        "schedule.png", "cei.png", "cei.json", "loss.png", "contact_sheet.png", "previews",
    }  # fmt: skip
    assert [a.path for a in client.list_artifacts(run.info.run_id, "previews")] == [
        "previews/step-00000008", "previews/step-00000016",
    ]  # fmt: skip


def test_mlflow_has_the_stages_nested(undisturbed, place):
    result, output = undisturbed
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    run = client.get_run(result["mlflow_run_id"])
    found = client.search_runs([run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{run.info.run_id}'")
    stages = sorted(found, key=lambda stage: stage.info.run_name)
    assert [s.info.run_name for s in stages] == ["stage 1", "stage 2"]
    assert all(s.info.status == "FINISHED" and s.data.tags["entprog.kind"] == "stage" for s in stages)
    assert run.info.start_time <= stages[0].info.start_time < stages[0].info.end_time <= stages[1].info.start_time
    seconds = sum(s.data.metrics["stage/seconds"] for s in stages)
    assert seconds == pytest.approx(result["seconds"])  # scoring is in the first
    for part in ("search_seconds", "score_seconds"):
        assert sum(s.data.metrics[f"stage/{part}"] for s in stages) == pytest.approx(result[part]), part
    assert sum(s.data.metrics["stage/steps"] for s in stages) == 16
    assert stages[1].data.metrics["held_out_loss"] == result["held_out_loss"]
    assert stages[1].data.params["trained"] == " ".join(result["decisions"][1]["plan"]["trainable"])
    losses = client.get_metric_history(run.info.run_id, "held_out_loss")
    steps = [json.loads(line) for line in (output / "steps.jsonl").read_text().splitlines()]
    for point in losses:  # by wall time too: a point's time is its step's
        assert point.timestamp / 1000 == pytest.approx(steps[point.step - 1]["time"], abs=0.5)
    assert "system/cpu_utilization_percentage" in run.data.metrics


def test_the_same_again_is_finished(undisturbed, shards, place, capsys):
    result, output = undisturbed
    assert train.run(whole(shards), output, tables=place / "tables") == result
    assert "Already finished" in capsys.readouterr().out
    report.show(result, output, "")
    said = capsys.readouterr().out
    assert "previews" in said and "adapter" not in said


def test_another_experiment_in_the_same_folder_is_refused_and_changes_nothing(undisturbed, shards, place):
    result, output = undisturbed
    record = lambda: MlflowClient(os.environ["MLFLOW_TRACKING_URI"]).get_run(result["mlflow_run_id"]).to_dictionary()  # noqa: E731
    before, files = record(), {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    with pytest.raises(cli.UserError, match=r"train\.learning_rate was 0\.001, now 0\.5\): choose another --output"):
        train.run(whole(shards, learning_rate=0.5), output, tables=place / "tables")
    assert record() == before and before["info"]["status"] == "FINISHED"
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == files


@pytest.mark.slow  # test_bucket_runs kills one too
def test_sigkill_of_the_worker_resumes_to_the_bit(undisturbed, shards, place):
    killed = []

    def kill():
        for process in running("RayTrainWorker"):
            process.kill()
            killed.append(process.pid)

    output = place / "killed"
    watcher = when_at(output / "steps.jsonl", 7, kill)
    result = train.run(experiment(shards), output, tables=place / "tables")
    watcher.join()
    assert killed
    assert result["losses"] == undisturbed[0]["losses"]
    assert result["held_out_loss"] == undisturbed[0]["held_out_loss"]
    plans = [[d["plan"] for d in r["decisions"]] for r in (result, undisturbed[0])]
    assert plans[0] == plans[1]


def test_score_uses_the_table_that_training_made(undisturbed, shards, place, capsys):
    before = list((place / "tables").iterdir())
    result = score.run(experiment(shards), place / "score", tables=place / "tables")
    assert list((place / "tables").iterdir()) == before
    assert sorted(result["ranking"]) == [f"blocks.{i}" for i in range(6)]
    assert f"{place / 'score' / 'cei.json'}, " in capsys.readouterr().out


@pytest.mark.slow
def test_sigkill_of_the_driver_then_the_same_command(undisturbed, shards, place):
    command = Command(place, shards, "driver")
    command.killed(at_9=lambda: None)
    said, record = command.again()
    assert "Resumed from the checkpoint after step" in said
    assert record["status"] == "done" and record["job"] == "train" and record["commit"]
    assert record["losses"] == undisturbed[0]["losses"]


@pytest.fixture(scope="module")
def two(shards, place):
    """What two workers come to that hold the network whole."""
    return train.run(experiment(shards, train={"workers": 2}), place / "two", tables=place / "tables")


@pytest.mark.slow
def test_sharded_workers_are_killed_and_another_number_goes_on(two, shards, place):
    """FSDP: a killed worker, then a killed driver; then one worker with two batches an update takes up what two had
    saved in parts. It sees the clips that two undisturbed workers with whole networks see, and ends like them."""
    command, message = Command(place, shards, "fsdp"), []
    checkpoints = command.output / "checkpoints"

    def kill_a_worker():
        running("RayTrainWorker")[1].kill()

    def look():
        newest = checkpoints / checkpoint.newest(checkpoints)
        message.append((newest.name, len(list(newest.glob("*.safetensors")))))

    command.killed("train.parallel=fsdp", "train.workers=2", at_6=kill_a_worker, at_14=look)
    ((name, parts),) = message
    assert name >= "step-00000008" and parts == 2, "each worker's own"
    said, record = command.again("train.parallel=fsdp", "train.workers=1", "train.accumulate=2")
    step = re.search(r"Resumed from the checkpoint after step (\d+)", said)
    assert int(step[1]) >= 8
    assert record["clips"] == two["clips"]
    assert record["losses"] == pytest.approx(two["losses"], rel=1e-3)
    assert [d["plan"] for d in record["decisions"]] == [d["plan"] for d in two["decisions"]]
    got, expected = (
        WanTransformer3DModel.from_pretrained(Path(folder) / "transformer").state_dict()
        for folder in (record["model"], two["model"])
    )
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=2e-2, atol=2e-4)


@pytest.mark.slow
def test_a_full_object_store_and_a_tracking_server_away(undisturbed, shards, place, tmp_path, monkeypatch, capsys):
    """Other objects fill Ray's store, MLflow's server is killed and comes back: the run is the undisturbed one."""
    store = os.environ["MLFLOW_TRACKING_URI"]
    server, ballast = Server(store, tmp_path / "server.log"), []
    server.start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    server.wait()
    capacity = int(ray.cluster_resources()["object_store_memory"])

    def disturb():
        server.kill()
        ballast.extend(ray.put(np.zeros(capacity // 8, np.uint8)) for _ in range(9))

    output = place / "strained"
    first = when_at(output / "steps.jsonl", 2, disturb)
    second = when_at(output / "steps.jsonl", 12, server.start)
    try:
        result = train.run(experiment(shards), output, tables=place / "tables")
        first.join(), second.join()
        assert result["losses"] == undisturbed[0]["losses"]
        assert result["spilled_bytes"] > 0 and "Ray has spilled" in capsys.readouterr().out
        run = mlflow_store.connect(server.uri).get_run(result["mlflow_run_id"])
        assert run.info.status == "FINISHED" and run.data.metrics["final/spilled_bytes"] == result["spilled_bytes"]
        points = mlflow_store.connect(server.uri).get_metric_history(run.info.run_id, "loss")
        assert [p.step for p in points] == list(range(1, 17)) and [p.value for p in points] == result["losses"]
    finally:
        server.kill()


@pytest.fixture(scope="module")
def held_up(shards, place):
    """Plain training by two workers, one of which is stopped most of the time, as by a machine that something else
    keeps busy: (result, what was reported, the workers' seconds by Ray's own metrics)."""
    messages, seen, over = [], {}, threading.Event()

    def hold_up():
        slow = running("RayTrainWorker")[0]
        messages.append({"pid": slow.pid})
        with contextlib.suppress(psutil.NoSuchProcess):  # the run is over
            while not over.is_set():
                slow.suspend()
                time.sleep(0.05)
                slow.resume()
                time.sleep(0.03)

    def scrape():
        (node,) = ray.nodes()
        page = f"http://127.0.0.1:{node['MetricsExportPort']}/metrics"
        while not over.is_set() and {"0", "1"} - seen.keys():
            with urllib.request.urlopen(page) as answer:
                seen.update(re.findall(r'ray_entprog_step_s{.*rank="(\d)".*} (\S+)', answer.read().decode()))
            time.sleep(0.2)

    output = place / "straggler"
    watchers = [when_at(output / "steps.jsonl", 1, act) for act in (hold_up, scrape)]
    plain = experiment(shards, schedule={"kind": "full"}, train={"steps": 52, "workers": 2})
    try:
        result = train.run(plain, output, tables=place / "tables", listen=messages.append)
    finally:
        over.set()
        for watcher in watchers:
            watcher.join()
    return result, messages, seen


@pytest.mark.slow  # test_bucket_runs has two workers too
def test_two_workers_train_one_model(held_up):
    result, _, _ = held_up
    assert result["clips"] == 52 * 2 * 2 and len(result["losses"]) == 52


@pytest.mark.slow
def test_plain_training_has_no_search(held_up):
    result, _, _ = held_up
    assert result["search_seconds"] == result["score_seconds"] == 0
    assert [len(d["plan"]["trainable"]) for d in result["decisions"]] == [6]


@pytest.mark.slow
def test_a_straggler_is_named_and_every_step_has_its_spread(held_up):
    result, messages, seen = held_up
    (pid,) = [item["pid"] for item in messages if "pid" in item]
    (line,) = [item["warning"] for item in messages if "is the slowest" in item.get("warning", "")]
    named = re.fullmatch(r"rank (\d) \(node [\d.]+, process (\d+)\) is the slowest of 2 in (\d+) of 50 steps .*", line)
    assert int(named[2]) == pid
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    run = client.get_run(result["mlflow_run_id"])
    assert run.data.tags["entprog.straggler"] == line
    history = {
        name: {p.step: p.value for p in client.get_metric_history(run.info.run_id, f"ranks/{name}")}
        for name in ("median_s", "slowest_s", "slowest_rank")
    }
    assert all(sorted(values) == list(range(1, 53)) for values in history.values())
    assert sum(history["slowest_rank"][step] == int(named[1]) for step in range(1, 51)) == int(named[3])
    assert all(history["slowest_s"][step] >= history["median_s"][step] > 0 for step in range(1, 53))
    assert seen.keys() == {"0", "1"} and all(float(seconds) > 0 for seconds in seen.values()), "Ray's own metrics"


# -- bad input: one line, exit status 2, before anything starts


def refused(*arguments) -> str:
    result = CliRunner().invoke(train.app, [str(a) for a in arguments])
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and "Traceback" not in result.output
    return lines[0]


@pytest.fixture
def base_command(place, shards):
    return ["--config", place / "tiny.yaml", "--shards", shards, "--output", place / "refused"]


def test_unknown_names_and_values(base_command):
    assert "did you mean demo" in refused("--preset", "demoo", "--output", "x")
    assert "did you mean schedule.cei_threshold" in refused(*base_command, "--set", "schedule.cei_treshold=1")
    assert "schedule.stages" in refused(*base_command, "--set", "schedule.stages=0")
    assert "schedule.kind" in refused(*base_command, "--schedule", "entprogg")
    assert "did you mean wan" in refused(*base_command, "--set", "model.family=wann")


def test_wrong_data(base_command, place, shards):
    assert "--shards" in refused("--config", place / "tiny.yaml", "--output", place / "x")
    assert "48" in refused(*base_command, "--set", "data.shape.height=64")
    empty = place / "nothing"
    empty.mkdir(exist_ok=True)
    assert str(empty) in refused("--config", place / "tiny.yaml", "--shards", empty, "--output", place / "x")


def test_a_damaged_shard_is_named(base_command, place, shards):
    copy = place / "damaged"
    shutil.copytree(shards, copy)
    victim = next((copy / "train").glob("*.parquet"))
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 0xFF
    victim.write_bytes(data)
    line = refused("--config", place / "tiny.yaml", "--shards", copy, "--output", place / "x")
    assert victim.name in line


@pytest.mark.slow  # test_outputs sees what a corrected command takes over
def test_a_clip_that_only_workers_find_damaged_is_told_and_the_corrected_command_goes_on_there(place, shards):
    copy, output = place / "damaged-held-out", place / "corrected"
    shutil.copytree(shards, copy)
    victim = next((copy / "held_out").glob("*.parquet"))
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 0xFF
    victim.write_bytes(data)
    more = ["--output", output, "--set", "data.verify=size", "--set", "train.steps=2", "--tables", place / "tables"]
    line = refused("--config", place / "tiny.yaml", "--shards", copy, *more)
    record = json.loads((output / "result.json").read_text())
    assert victim.name in line and record["status"] == "refused" and victim.name in record["error"]
    assert MlflowClient().get_run(record["mlflow_run_id"]).info.status == "FAILED"
    assert "refused: " in CliRunner().invoke(status.app, [str(output)], env=WIDE).output
    corrected = ["--config", place / "tiny.yaml", "--shards", shards, *more]
    done = CliRunner().invoke(train.app, [str(word) for word in corrected], env=WIDE)
    assert done.exit_code == 0, done.output
    result = json.loads((output / "result.json").read_text())
    assert result["status"] == "done"
    assert MlflowClient().get_run(result["mlflow_run_id"]).info.status == "FINISHED"


def test_a_checkpoint_of_another_family(base_command, place):
    other = place / "other"
    other.mkdir(exist_ok=True)
    (other / "config.json").write_text(json.dumps({"_class_name": "LatteTransformer3DModel"}))
    assert "LatteTransformer3DModel" in refused(*base_command, "--base", other, "--set", "model.init={}")


def test_more_workers_than_the_cluster_has(base_command):
    assert "train.workers=99" in refused(*base_command, "--set", "train.workers=99")


def test_a_bucket_that_does_not_answer(base_command):
    nobody = "gs://anonymous@bucket/run?scheme=http&endpoint_override=127.0.0.1:1&retry_limit_seconds=1"
    assert "cannot be written to gs://bucket/run" in refused(*base_command, "--set", f"train.checkpoints={nobody}")
    assert "bucket name" in refused(*base_command, "--set", "train.checkpoints=gs:///run")


def test_fp8_without_a_gpu_that_has_it(base_command):
    fp8 = ["--set", "schedule.frozen_precision=fp8", "--set", "schedule.backward=residual"]
    assert "model.dtype=bfloat16" in refused(*base_command, *fp8)
    assert "compute capability 8.9" in refused(*base_command, *fp8, "--set", "model.dtype=bfloat16")


def test_unwritable_output(base_command, place):
    (place / "file").write_text("")
    assert "cannot write" in refused(*base_command[:-1], place / "file" / "x")


def test_dry_run_writes_nothing(base_command, place):
    result = CliRunner().invoke(train.app, [*map(str, base_command[:-1]), str(place / "dry"), "--dry-run"])
    assert "Stages" in result.output and "0% to " in result.output
    assert "differs from the defaults" in result.output and "tracking.experiment" not in result.output
    assert result.exit_code == 0 and "Would train" in result.output and not (place / "dry").exists()
    assert "Poses:" not in result.output
    wide = CliRunner().invoke(train.app, [*map(str, base_command[:-1]), str(place / "dry"), "--dry-run"], env=WIDE)
    assert re.search(
        r"decoded by threads of each worker on this machine; a core like this machine's decodes [\d.e+]+ clips/s "
        r"\(measured\), \d+ of them [\d.e+]+: a step of \d+ clips waits if it takes under [\d.e-]+ s\.",
        wide.output,
    )
    drawn = [*map(str, base_command[:-1]), str(place / "dry"), "--dry-run", "--set", "model.skeleton=dwpose"]
    assert "have 33 points, without face and hands" in CliRunner().invoke(train.app, drawn, env=WIDE).output


@pytest.mark.parametrize(
    ("job", "setting"),
    [
        ("prepare", "prepare.min_visibility"),
        ("prepare", "latents.gpus"),
        ("prepare", "model.vae_dtype"),
        ("prepare", "schedule.table"),
        ("score", "priority.draws"),
        ("train", "schedule.search_share"),
        ("tune", "tune.trials"),
        ("generate", "generate.steps"),
        ("evaluate", "evaluate.metrics"),
    ],
)
def test_help_teaches_without_other_options(job, setting):
    app = importlib.import_module(f"pipelines.{job}").app
    result = CliRunner().invoke(app, ["--help-settings"])
    assert result.exit_code == 0 and setting in result.output
    assert "--help-settings" in CliRunner().invoke(app, ["--help"]).output
