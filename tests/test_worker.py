"""What a worker keeps on disk, and what is no model: without Ray."""

import contextlib
import json
import math
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

import pipelines
from entprog import config, files
from entprog.cost.model import CostModel
from entprog.errors import UserError
from entprog.models import fingerprints, folders
from entprog.models.finite import not_finite_in
from entprog.schedule.state import RunState
from entprog.training import checkpoint
from entprog.training.fit import DivergedError
from helpers import disks
from helpers.networks import SHAPE, tiny_denoiser, tiny_experiment
from helpers.runs import Run, Trained
from pipelines import charts, cli, generate
from pipelines.cluster import capacity, launch, session
from pipelines.outputs import tables as score_tables
from pipelines.stream import decoding
from pipelines.training import figures, networks, report, steplog, worker
from pipelines.training.setup import opened
from pipelines.training.startup import Startup


def test_clips_that_came_while_a_run_is_under_way_end_it():
    """Workers that start again would train on others, and be judged by others."""
    shards = Path(pipelines.__file__).parent / "demo_person"
    settings = {"experiment": tiny_experiment(data={"shards": str(shards)}).model_dump(), "data": "of before"}
    with pytest.raises(UserError, match="has got other clips since this command began"):
        opened(settings, lambda item: None, Startup())


def lines(path):
    return path.read_text().splitlines()


def logged(path, first, last):
    log = steplog.StepLog(path, first - 1)
    for step in range(first, last + 1):
        log.add({"step": step, "loss": 1 / step})
    log.close()


def test_a_resume_cuts_the_log_off_and_rewrites_nothing(tmp_path):
    path = tmp_path / "steps.jsonl"
    logged(path, 1, 5)
    before, file = path.read_bytes(), path.stat().st_ino
    logged(path, 4, 4)
    assert path.stat().st_ino == file, "the file itself, whose first lines nobody touched"
    assert path.read_bytes() == before[: before.index(b'{"step": 5')]
    assert steplog.steps_of(tmp_path) == [{"step": step, "loss": 1 / step} for step in (1, 2, 3, 4)]


def test_a_clock_that_is_behind_that_of_the_machine_before_mixes_no_attempts(tmp_path):
    """`compare` takes of a step what was logged last."""
    path, ahead_s = tmp_path / "steps.jsonl", time.time() + 1000.0
    path.write_text("".join(json.dumps({"step": step, "time": ahead_s + step}) + "\n" for step in range(1, 6)) + "{")
    for done in (3, 4):  # the second time no step is lost
        before = max([ahead_s + 5, *map(steplog.logged_s, steplog.steps_of(tmp_path))])
        log = steplog.StepLog(path, done)
        times = [log.later_s(ahead_s - 1000.0) for _ in range(3)]
        log.add({"step": done + 1, "time": ahead_s - 1000.0, "logged_s": times[-1]})
        log.close()
        in_ms = [int(1000 * moment) for moment in (before, *times)]
        assert sorted(set(in_ms)) == in_ms


def test_lines_for_which_there_is_no_room_come_once_there_is(tmp_path):
    path, message = tmp_path / "steps.jsonl", []
    logged(path, 1, 2)
    log = steplog.StepLog(path, 2, message.append)
    with disks.full(path.stat().st_size + 10):  # a part of a line has room
        for step in (3, 4):
            log.add({"step": step, "loss": 1 / step})
        assert len(message) == 1 and "steps.jsonl is not up to date" in message[0]
        with pytest.raises(OSError, match="File too large"):
            log.close()
    log.add({"step": 5, "loss": 1 / 5})
    log.close()
    assert steplog.steps_of(tmp_path) == [{"step": step, "loss": 1 / step} for step in range(1, 6)]


@pytest.mark.parametrize("error", [None, RuntimeError()])
def test_lines_for_which_there_was_no_room_are_kept_where_the_worker_ends(error, tmp_path):
    """Told to, or by a failure: the checkpoint may have their steps."""
    path = tmp_path / "steps.jsonl"
    logged(path, 1, 2)
    with contextlib.suppress(RuntimeError), steplog.StepLog(path, 2) as log:
        with disks.full(path.stat().st_size + 10):
            log.add({"step": 3})
        if error:
            raise error
    assert [step["step"] for step in steplog.steps_of(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize("end", [b'{"step": 3, "lo', b"\0\0\0\0\n", b"[]\n", b'{"step": 9}\n', b"\xff\xfe\n"])
def test_what_a_crash_left_at_the_end_of_the_log_is_cut_off(tmp_path, end):
    path = tmp_path / "steps.jsonl"
    logged(path, 1, 2)
    with path.open("ab") as file:
        file.write(end)
    logged(path, 3, 3)
    assert [json.loads(line)["step"] for line in lines(path)] == [1, 2, 3]


def test_the_log_is_strict_json(tmp_path):
    run = Run(tiny_experiment(train={"steps": 1}, schedule={"kind": "full"}))
    (step,) = run.steps()
    log = steplog.StepLog(tmp_path / "steps.jsonl", 0)
    for loss in (math.nan, math.inf):
        log.add(figures.as_record(step) | {"loss": loss, "gradient_norm": -loss})
    log.close()
    for line in lines(tmp_path / "steps.jsonl"):
        record = json.loads(line, parse_constant=pytest.fail)
        assert record["loss"] is record["gradient_norm"] is None and record["skipped"] is False
    metrics = figures.metrics(step)
    assert metrics["skipped_updates"] == 0
    assert (metrics["wait_s"], metrics["open_s"]) == (step.wait_s, step.open_s)  # docs/stream.md: in both
    assert figures.final(run.experiment, run.state)["skipped_updates"] == 0


def test_a_ray_of_this_machine_has_the_cores_that_this_process_may_use():
    """A scheduler, or a container, may leave it few of the host's."""
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert session.local_cpus(1) == 1 and session.local_cpus(4) == 4
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.parametrize(("cores", "workers", "threads"), [(8, 1, 7), (8, 2, 3), (64, 8, 7), (2, 4, 1), (1, 1, 1)])
def test_threads_are_the_cores_of_a_workers_own_machine(cores, workers, threads):
    assert capacity.threads(cores, workers) == threads


def test_workers_find_what_lies_in_the_folder_of_who_sent_them(tmp_path, monkeypatch):
    """A file of the hub's cache is a link to one whose name says nothing: its own name must stay."""
    monkeypatch.chdir(tmp_path)
    for name in ("base", "adapter"):
        (tmp_path / name).mkdir()
    (tmp_path / "f00d").write_bytes(b"")
    (tmp_path / "wan.safetensors").symlink_to("f00d")
    given = {"base": "base", "vae": "who/vae", "weights": "wan.safetensors", "adapter": "adapter"}
    found = launch.absolute_model(tiny_experiment().model.model_copy(update=given))
    assert (found.base, found.vae) == (f"{tmp_path}/base", "who/vae")
    assert (found.weights, found.adapter) == (f"{tmp_path}/wan.safetensors", f"{tmp_path}/adapter")


def test_a_run_that_goes_on_in_another_output_comes_to_an_end(tmp_path):
    """Its log has the later steps alone, or none where all were taken before."""
    run = Run(tiny_experiment(train={"steps": 2}, schedule={"kind": "full"}))
    steps = [figures.as_record(step) for step in run.steps()]
    last = figures.final(run.experiment, run.state) | {"held_out_loss": 0.5}
    for left in ([], steps[1:]):
        result = report.figures(last, left)
        assert result["held_out_loss"] == 0.5 and len(result["losses"]) == len(left) == len(result["held_out"])
        charts.schedule_chart(left, tmp_path / "schedule.png", [block.name for block in run.found])
    (tmp_path / "steps.jsonl").write_text("".join(f"{json.dumps(step)}\n" for step in steps))
    assert [log_of(tmp_path, done).last for done in (2, 1, 1, 0)] == [2, 1, 1, 0]


def log_of(folder, done):
    log = steplog.StepLog(folder / "steps.jsonl", done)
    log.close()
    return log


def spoilt(network, value):
    with torch.no_grad():
        network.blocks[3].ffn.net[2].weight[1, 2] = value


def test_a_checkpoint_cut_short_is_named_and_the_one_before_is_taken_up(tmp_path):
    run, folder = Trained(), tmp_path / "checkpoints"
    run.state.workers = (4, 2)
    for _ in range(2):
        checkpoint.save(folder, run.network, run.state, "id", keep=2)
        run.update()
    newest = folder / checkpoint.newest(folder)
    state = newest / "state.json"
    state.write_bytes(state.read_bytes()[:100])
    again, posted, warned = Trained(steps=0), [], []
    setup = SimpleNamespace(experiment=again.experiment, denoiser=again.denoiser, post=posted.append)
    worker._take_up(setup, {"output": tmp_path, "identity": "id"}, again.state, warned.append).close()
    (line,) = warned
    assert newest.name in line and str(folder) in line and "not used" in line
    assert again.state.step == 2 and {"resumed": 2} in posted
    assert again.state.workers == (4, 2, 1) and {"about": {"entprog.workers": "4, 2, 1"}} in posted


def test_what_a_run_ran_on_and_how_is_kept_as_it_changes(tmp_path):
    """By a checkpoint; one of an earlier version has none of it. Seconds of another device are measured anew."""
    run, folder = Trained(), tmp_path / "checkpoints"
    run.state.goes_on(devices="A100", latents="cached", ways="as by default")
    costs = dict.fromkeys(("outside", "outside_bytes", "outside_parameter_bytes", "common_bytes", "weight_bytes"), 1)
    costs |= {"clips": 1, "through_common": False, "below": True, "update_per_byte": 0.0, "blocks": ()}
    run.state.models = {SHAPE: CostModel(**costs)}
    checkpoint.save(folder, run.network, run.state, "id", keep=2)
    here = fingerprints.device_name(torch.device("cpu"))

    def resumed(accumulate):
        again, posted = Trained(steps=0), []
        checkpoint.load(folder, checkpoint.newest(folder), again.network, again.state, "id")
        parts = {"train": {"accumulate": accumulate}, "schedule": {"clock": "seconds"}}
        experiment = config.build(config.merge(again.experiment.model_dump(), parts))
        setup = SimpleNamespace(
            experiment=experiment, denoiser=again.denoiser, device=torch.device("cpu"), post=posted.append
        )
        worker._note_how(setup, again.state, cached=True)
        return again.state, posted[0]["about"]

    state, about = resumed(accumulate=2)
    assert about["entprog.device"] == f"A100, {here}" and not state.models
    assert about["entprog.way"] == "as by default; then train.accumulate 2"
    assert about["entprog.latents"] == "cached, pixels"
    kept = folder / checkpoint.newest(folder) / "state.json"
    values = json.loads(kept.read_text())
    files.write_json(kept, {k: v for k, v in values.items() if k not in ("devices", "latents", "ways")})
    state, about = resumed(accumulate=1)
    assert (about["entprog.device"], about["entprog.way"]) == (here, "as by default") and state.models


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_network_that_is_not_finite_is_no_result(value):
    experiment = tiny_experiment()
    denoiser = tiny_denoiser(experiment)
    state = RunState(optimizer=None, step=7)
    assert networks.final(denoiser, experiment, state) is denoiser
    spoilt(denoiser.network, value)
    with pytest.raises(DivergedError, match=r"not finite .blocks\.3\.ffn\.net\.2\.weight. after step 7"):
        networks.final(denoiser, experiment, state)


def test_averages_that_are_not_finite_are_no_result():
    experiment = tiny_experiment()
    denoiser = tiny_denoiser(experiment)
    name, weight = next(iter(denoiser.network.named_parameters()))
    with pytest.raises(DivergedError, match="not finite"):
        networks.final(denoiser, experiment, RunState(optimizer=None, ema={name: torch.full_like(weight, math.nan)}))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_generate_refuses_weights_that_are_not_finite(tmp_path, value):
    denoiser = tiny_denoiser(tiny_experiment())
    model = tmp_path / "model"
    denoiser.save(model, shape=SHAPE)
    assert not_finite_in(folders.part(model, "transformer")) is None
    spoilt(denoiser.network, value)
    denoiser.save(model, shape=SHAPE)
    person = ["--checkpoint", model, "--output", tmp_path / "out", "--reference", model, "--pose", model]
    done = CliRunner().invoke(generate.app, [str(word) for word in person])
    assert done.exit_code == 2, done.output
    (line,) = done.stderr.splitlines()
    assert "blocks.3.ffn.net.2.weight is not finite" in line and "--checkpoint" in line


def test_a_checkpoint_of_before_is_there_after_the_weights_are_lost(tmp_path):
    """An update whose own gradient is finite can still make the weights infinite."""
    run, message = Run(tiny_experiment(train={"max_nonfinite": 2}, schedule={"kind": "full"})), []
    saver = checkpoint.Saver(tmp_path, "id", keep=1, warn=message.append)
    with pytest.raises(DivergedError, match="2 updates in a row"):
        for step in run.steps():
            if step.step == 3:
                spoilt(run.denoiser.network, math.inf)
            saver.save(run.denoiser.network, run.state)
    saver.close()
    assert checkpoint.found(tmp_path) == ["step-00000002"] and len(message) == 3
    assert next(Run(run.experiment, tmp_path).steps()).step == 3


@pytest.mark.parametrize("workers", [1, 2, 8, 16, 64, 256, 1024])
def test_many_workers_are_asked_less_often(workers):
    assert launch.poll_s(workers) == 0.2 or workers / launch.poll_s(workers) == pytest.approx(80)
    assert workers / launch.poll_s(workers) <= 80 + 1e-9
    assert workers > 16 or launch.poll_s(workers) == 0.2


def node(address, **more):
    return {"NodeID": address, "Alive": True, "NodeManagerAddress": address, "Resources": {"CPU": 4.0}} | more


@pytest.mark.parametrize(
    ("nodes", "resource", "elsewhere"),
    [
        ([node("1")], "CPU", False),
        ([node("1", Resources={"CPU": 1.0}), node("1", NodeID="another", Resources={"CPU": 1.0})], "CPU", False),
        ([node("1", Resources={"CPU": 1.0})], "CPU", True),  # the others have yet to start
        ([node("1", Resources={"GPU": 1.0})], "GPU", True),
        ([node("1"), node("1", NodeID="another")], "CPU", False),
        ([node("1"), node("2")], "CPU", True),
        ([node("1"), node("2", Alive=False)], "CPU", False),
        ([node("1", Resources={})], "CPU", True),  # the head of cluster.yaml before its nodes have come
        ([node("1", Resources={"CPU": 0.0})], "CPU", True),
        ([node("1")], "GPU", True),
        ([node("1", Resources={"CPU": 4.0, "GPU": 2.0})], "GPU", False),
        # Nodes that only decode: no worker with a GPU runs there, a trial's own process may.
        ([node("1", Resources={"CPU": 0.0, "GPU": 4.0}), node("2")], "GPU", False),
        ([node("1", Resources={"memory": 9.0, "GPU": 4.0}), node("2", Resources={"memory": 9.0})], "memory", True),
        ([node("1", Resources={"GPU": 4.0}), node("2", Resources={"GPU": 1.0})], "GPU", True),
        ([node("1"), node("2", Resources={"CPU": 0.0})], "CPU", False),
    ],
)
def test_workers_may_be_on_other_machines_than_the_driver(nodes, resource, elsewhere):
    assert capacity.elsewhere(nodes, "1", resource, needed=2) is elsewhere


@pytest.mark.parametrize(
    ("data", "gpus", "each"),
    [
        ({}, False, {"CPU": 1}),
        ({}, True, {"GPU": 1}),
        ({"decode_cpus": 1}, True, {"GPU": 1}),
        ({"decode_cpus": 0.5}, False, {"CPU": 1}),
        ({"decode_cpus": 8}, True, {"GPU": 1, "CPU": 7}),
        ({"decode_cpus": 2.5}, False, {"CPU": 2.5}),
        ({"decode_cpus": 8, "decode": "cluster"}, True, {"GPU": 1}),
    ],
)
def test_what_threads_decode_with_is_reserved_where_it_is_said(data, gpus, each):
    """A CPU of it for the tasks that read; tasks that decode hold their own. Not in a trial: its sweep shares out CPUs
    of all nodes, and no node may have what a worker's part comes to."""
    experiment = config.build({"data": data, "train": {"steps": 1}})
    assert capacity.each_worker(experiment, gpus) == each
    assert capacity.each_worker(experiment, gpus, trial=True) == ({"GPU": 1} if gpus else {"CPU": 1})


def test_score_tables_lie_where_every_machine_sees_them(monkeypatch, tmp_path):
    for none in (None, "", "local"):
        monkeypatch.setenv("RAY_ADDRESS", none) if none is not None else monkeypatch.delenv("RAY_ADDRESS", False)
        assert score_tables.place(tmp_path, None) == cli.TABLES
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert score_tables.place(tmp_path, None) == tmp_path / "cei"
    assert score_tables.place(tmp_path, tmp_path / "own") == tmp_path / "own"


@pytest.mark.parametrize(("cpus", "workers", "each"), [(48, 4, 11.0), (4, 1, 3.0), (3, 2, 1.0), (0, 4, 1.0)])
def test_cpus_of_a_machine_are_shared_by_its_workers_but_for_one_each(cpus, workers, each):
    assert decoding.share(cpus, workers) == each
