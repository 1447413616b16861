"""Trainings in phases through the real command: killed within two of them, against running them by hand;
which blocks may train."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import yaml
from typer.testing import CliRunner

from entprog import config, storage
from entprog.errors import UserError
from entprog.schedule import plans
from entprog.schedule.state import Charged, RunState
from helpers import real_clips, stores
from helpers.commands import PATIENCE_S
from helpers.networks import TINY, tiny_experiment
from helpers.runs import Run
from pipelines import cli, train
from pipelines.cluster import capacity
from pipelines.training import figures, phases, report

SHAPE = {"frames": 2, "height": 48, "width": 32, "fps": 12}
SETTINGS = {
    "model": {"init": {**TINY, "patch_size": [1, 8, 8], "num_layers": 4}, "vae": "none", "dtype": "float32"},
    "data": {"shape": SHAPE, "held_out_clips": 2, "held_out_draws": 1},
    "train": {
        "learning_rate": 1e-3, "held_out_every": 4, "checkpoint_every": 2, "threads": 1, "workers": 1, "samples": 0,
    },
    "priority": {"conditions": 2, "draws": 4},
    "schedule": {"stages": 2, "candidates": [0.5, 1.0], "search_steps": 1, "search_share": 0.9, "clock": "flops"},
    "phases": {
        "subject": {"data": {"batch_size": 2}, "train": {"steps": 4}},
        "pose": {"train": {"steps": 12}},
        "video": {"train": {"steps": 12, "lora": {"rank": 4}}, "schedule": {"backward": "residual"}},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working folder with MLflow's store and shards of two real videos."""
    folder = tmp_path_factory.mktemp("phases")
    os.environ["MLFLOW_TRACKING_URI"] = stores.made(folder)
    before = Path.cwd()
    os.chdir(folder)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(SETTINGS, sort_keys=False))
    shape = config.ClipShape(**SHAPE)
    splits = {
        split: [[real_clips.row(name, split, start_s, shape) for start_s in (0.0, 0.4, 0.8, 1.2)]]
        for name, split in (("cam01", "train"), ("cam04", "held_out"))
    }
    real_clips.write(folder / "shards", splits, shape)
    try:
        yield folder
    finally:
        os.chdir(before)
        del os.environ["MLFLOW_TRACKING_URI"]


def arguments(place, output, *more):
    options = ["--preset", "three_phases", "--config", place / "tiny.yaml", "--shards", place / "shards"]
    return [str(a) for a in (*options, "--output", place / output, *more)]


def as_soon_as(happened, act) -> threading.Thread:
    def watch():
        deadline = time.time() + PATIENCE_S
        while time.time() < deadline:
            if happened():
                act()
                return
            time.sleep(0.02)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def kill_workers(killed: list[int]) -> None:
    for process in psutil.process_iter(["cmdline"]):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "RayTrainWorker" in " ".join(process.info["cmdline"] or []) and process.ppid() in raylets():
                process.kill()
                killed.append(process.pid)


def raylets() -> list[int]:
    """Of this process's own Ray."""
    return [child.pid for child in psutil.Process().children(recursive=True) if "raylet" in child.name()]


@pytest.fixture(scope="module")
def interrupted(place, local_ray):
    """The command killed in the middle of its second phase, typed again, and a worker killed in the third."""
    output = place / "out"
    steps = lambda phase: output / phase / "steps.jsonl"  # noqa: E731
    five_of = lambda phase: steps(phase).exists() and len(steps(phase).read_bytes().splitlines()) >= 5  # noqa: E731
    command = [sys.executable, "-m", "pipelines.train", *arguments(place, "out")]
    first = subprocess.Popen(command, cwd=place, stdout=subprocess.DEVNULL, start_new_session=True)
    as_soon_as(lambda: five_of("pose"), lambda: os.killpg(first.pid, signal.SIGKILL)).join()
    assert first.wait() == -signal.SIGKILL and not (output / "pose" / "finished.json").exists()
    killed: list[int] = []
    watcher = as_soon_as(lambda: five_of("video"), lambda: kill_workers(killed))
    again = CliRunner().invoke(train.app, arguments(place, "out"))
    watcher.join()
    assert again.exit_code == 0, again.output
    assert killed and again.output.count("Already finished") == 1, "the first phase"
    assert again.output.count("Resumed from the checkpoint") == 2, "the second and the third"
    return json.loads((output / "result.json").read_text()), output


@pytest.mark.slow
def test_phases_equal_the_trainings_by_hand(interrupted, place):
    result, output = interrupted
    values = yaml.safe_load((cli.PRESETS / "three_phases.yaml").read_text())
    values = config.merge(values, SETTINGS) | {"name": "by-hand"}
    own = values.pop("phases")
    base = {"base": str(output / "subject" / "model"), "init": {}}
    for name in ("pose", "video"):
        over = own[name]
        experiment = config.build(
            config.merge(config.merge(values, over), {"model": base, "data": {"shards": str(place / "shards")}})
        )
        alone = train.run(experiment, place / "hand" / name)
        assert alone["losses"] == result["phases"][name]["losses"], name
        assert alone["held_out_loss"] == result["phases"][name]["held_out_loss"], name
        base = {"base": str(place / "hand" / name / "model"), "init": {}}
    assert result["held_out_loss"] == alone["held_out_loss"] and result["steps"] == 28


@pytest.mark.slow
def test_conditions_grow_and_the_last_model_is_the_runs(interrupted):
    from diffusers import WanTransformer3DModel

    output = interrupted[1]
    channels = {}
    for name in ("subject/model", "pose/model", "video/model", "model"):
        channels[name] = WanTransformer3DModel.from_pretrained(output / name / "transformer").config.in_channels
    assert channels == {"subject/model": 6, "pose/model": 9, "video/model": 9, "model": 9}
    shapes = {name: json.loads((output / name / "model/entprog.json").read_text())["shape"] for name in
              ("subject", "pose", "video")}  # fmt: skip
    assert [shape["frames"] for shape in shapes.values()] == [1, 1, 2]
    assert (output / "video/adapter/adapter_model.safetensors").exists() and not (output / "pose/adapter").exists()


@pytest.mark.slow
def test_mlflow_has_one_run_with_the_phases_in_it(interrupted):
    from mlflow import MlflowClient

    result, output = interrupted
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    run = client.get_run(result["mlflow_run_id"])
    assert run.info.status == "FINISHED" and run.data.metrics["final/steps"] == 28
    assert run.data.params["phases.pose.train.steps"] == "12"
    inside = client.search_runs(
        [run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{run.info.run_id}'", order_by=["start_time"]
    )
    assert [r.data.tags["entprog.phase"] for r in inside] == ["subject", "pose", "video"]
    assert {r.info.status for r in inside} == {"FINISHED"}
    points = client.get_metric_history(run.info.run_id, "phase")
    message = [(p.step, p.timestamp) for p in points]
    assert len(set(message)) == len(message)
    done = 0  # what a killed driver had heard of is there as well, at its own time
    for phase in ("subject", "pose", "video"):
        steps = [json.loads(line) for line in (output / phase / "steps.jsonl").read_text().splitlines()]
        measured = {(done + s["step"], int(s["logged_s"] * 1000)) for s in steps if s["held_out_loss"] is not None}
        assert measured and measured <= set(message), phase
        done += len(steps)
    assert {p.step: p.value for p in points} == {1: 1, 4: 1, 5: 2, 8: 2, 12: 2, 16: 2, 17: 3, 20: 3, 24: 3, 28: 3}


def refused(*arguments) -> str:
    result = CliRunner().invoke(train.app, list(arguments))
    assert result.exit_code == 2, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.strip()]
    return line


def test_wrong_phases_are_one_line_before_anything_starts(place):
    def line(*settings):
        return refused(*arguments(place, "refused", *(a for s in settings for a in ("--set", s))))

    assert "phase pose: unknown setting train.stepz (did you mean train.steps?)" in line("phases.pose.train.stepz=1")
    assert "phase pose sets model.base" in line("phases.pose.model.base=x")
    assert "phase video has no condition pose" in line("phases.video.model.conditions=[reference]")
    assert "phase subject: shards" in line("phases.subject.data.shape.frames=3")
    assert "phase pose: model.last_frame" in line("phases.pose.model.last_frame=true")
    assert "it becomes a folder" in line("phases={'a/b': {}}")
    assert not (place / "refused" / "subject").exists()


def test_a_dry_run_tells_every_phase(place, monkeypatch):
    monkeypatch.setattr(capacity, "unused_gpus", lambda *_: "GPUs are left over")
    result = CliRunner().invoke(train.app, arguments(place, "dry", "--dry-run"))
    assert result.exit_code == 0, result.output
    assert (
        result.output.count("Would train") == 3 and "Phase pose, conditions reference, pose, 1 frames" in result.output
    )
    assert result.output.count("A device's memory, beside what clips take") == 3
    assert result.output.count("GPUs are left over") == 1, "of all phases alike"
    assert not (place / "dry").exists()


def test_only_blocks_of_a_kind_are_trained():
    settings = {"blocks": "temporal", "backward": ["exact", "residual"], "search_steps": 1}
    run = Run(tiny_experiment(train={"steps": 20}, schedule=settings))
    kinds = ("spatial", "temporal")
    run.found = [replace(block, kind=kinds[i % 2]) for i, block in enumerate(run.found)]
    before = run.weights()
    steps = list(run.steps())
    trained = {name for step in steps for name in step.plan.trainable}
    assert trained == {"blocks.1", "blocks.3", "blocks.5"} == set(run.state.decisions[-1].candidates[-1].trainable)
    for name, tensor in run.weights().items():
        assert name.startswith(("blocks.0", "blocks.2", "blocks.4")) <= before[name].equal(tensor), name
    assert {p.backward for p in run.state.decisions[-1].candidates if p.m == 3} == {"exact", "residual"}
    # An evaluation is a forward pass of the whole network, whatever may be trained.
    assert run.state.flops.search == pytest.approx(sum(d.search_cost for d in run.state.decisions))
    everything = Run(tiny_experiment(schedule={"blocks": "temporal"}))  # Wan's blocks mix both
    assert plans.eligible(everything.found, "temporal") == [block.name for block in everything.found]


def test_figures_of_phases_are_those_of_all_of_them():
    def figures_of(seconds, flops, wait_s, **state):
        state = RunState(optimizer=None, seconds=Charged(*seconds), flops=Charged(*flops), **state)
        step = {"step": 1, "loss": 0.5, "held_out_loss": 0.4, "charged_s": 1.0, "seconds": 6.0, "wait_s": wait_s}
        result = report.figures(figures.final(tiny_experiment(), state), [step])
        return result | {"held_out_loss": 0.4, "wall_s": 40.0}

    long = figures_of((29.0, 1.0, 2.0), (3e9, 1e8, 2e8), 2.0, step=10, position=80, skipped=7)
    short = figures_of((1.0, 1.0, 0.0), (1e9, 1e8, 0.0), 6.0, step=2, position=8)
    for order in ({"a": long, "b": short}, {"a": short, "b": long}):
        whole = phases.together(order)
        assert whole["seconds_by_purpose"] == {"train": 30.0, "search": 2.0, "score": 2.0} and whole["seconds"] == 34
        assert whole["flops_by_purpose"] == {"train": 4e9, "search": 2e8, "score": 2e8} and whole["flops"] == 4.4e9
        assert (whole["search_seconds"], whole["score_seconds"], whole["wall_s"]) == (2, 2, 80)
        assert (whole["steps"], whole["clips"], whole["skipped_updates"]) == (12, 88, 7)
        assert whole["samples_per_s"] == 88 / 32 and whole["wait_share"] == 8 / 20 and whole["stalls"]["wait_s"] == 8


def test_clips_are_cut_to_whole_divisions_alone():
    whole = config.ClipShape(frames=8, height=96, width=64, fps=12)
    assert whole.is_cut_of(whole) and whole.model_copy(update={"frames": 1, "height": 48, "width": 32}).is_cut_of(whole)
    for wrong in ({"frames": 9}, {"height": 48}, {"height": 64, "width": 42}, {"fps": 24}):
        assert not whole.model_copy(update=wrong).is_cut_of(whole), wrong


def test_phases_are_the_common_settings_with_their_own_over_them(tmp_path):
    experiment = tiny_experiment(phases={"a": {"train": {"steps": 3}}, "b": {"data": {"shape": {"frames": 1}}}})
    a, b = config.phases(experiment, tmp_path).values()
    assert (a.train.steps, b.train.steps, a.data.shape.frames, b.data.shape.frames) == (3, 24, 2, 1)
    assert a.model == experiment.model and b.model.base == str(tmp_path / "a" / "model") and not b.model.init
    assert not a.phases and a.name == "experiment-a" and a.tracking.run_name == f"{tmp_path.name}-a"
    with pytest.raises(UserError, match="family"):
        config.phases(tiny_experiment(phases={"a": {}, "b": {"model": {"family": "other"}}}), tmp_path)


def test_the_checkpoints_of_a_phase_lie_in_a_folder_of_the_given_one(tmp_path):
    """What follows the '?' of an address are settings of the bucket, not a folder."""
    for given, expected in (
        ("ck/", "ck/one"),
        ("s3://b/ck?region=x&scheme=http", "s3://b/ck/one?region=x&scheme=http"),
    ):
        assert storage.within(given, "one") == expected
    experiment = tiny_experiment(train={"checkpoints": "s3://b/ck?region=x"}, phases={"one": {}, "two": {}})
    found = config.phases(experiment, tmp_path)
    assert [each.train.checkpoints for each in found.values()] == [f"s3://b/ck/{name}?region=x" for name in found]
