"""A run on a cluster of several nodes, with real processes, whose parts are killed one after another."""

import collections
import json
import os
import re
import resource
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import ray
import torch
from mlflow import MlflowClient
from ray.cluster_utils import Cluster
from ray.util import placement_group, placement_group_table

from entprog import config, storage
from entprog.data import clip_stream
from entprog.errors import LastingError, UserError
from entprog.media import assets
from entprog.training import checkpoint
from helpers import real_clips, stores
from helpers.commands import PATIENCE_S, SETTINGS
from helpers.people import CLIPS, two_people
from helpers.processes import running
from helpers.servers import Server, metadata
from pipelines import terminal, train, tune
from pipelines.cluster import capacity, joining, launch, message_board, ray_internals, room, session, spot
from pipelines.cluster.message_board import Listener
from pipelines.preparing import latents
from pipelines.stream import decoding, feed
from pipelines.sweeping import sweep, trial

MIB = 2**20
CPU, GPU = {"CPU": 1}, {"GPU": 1}
"""What a worker takes."""


pytestmark = pytest.mark.timeout(300)


class Nodes:
    """A head with one CPU, and other nodes."""

    def __init__(self):
        self.cluster = Cluster(
            initialize_head=True,
            shutdown_at_exit=False,  # which only a main thread can arrange
            head_node_args={"num_cpus": 1, "object_store_memory": 150 * MIB, "include_dashboard": False},
        )
        self.nodes = []

    def add(self, cpus, **more):
        self.nodes.append((cpus, self.cluster.add_node(num_cpus=cpus, object_store_memory=150 * MIB, **more)))

    def are(self, *cpus):
        """Add and remove until there are these."""
        wanted = collections.Counter(cpus)
        for each in list(self.nodes):
            if wanted[each[0]] > 0:
                wanted[each[0]] -= 1
            else:
                self.nodes.remove(each)
                self.cluster.remove_node(each[1])
        for missing in wanted.elements():
            self.add(missing)

    def with_a_worker(self):
        """A node that a training worker runs on."""
        holders = {process.ppid() for process in running("RayTrainWorker")}
        return next(node for _, node in self.nodes if node.all_processes["raylet"][0].process.pid in holders)

    def drop(self, node):
        """Remove a node of the cluster."""
        (each,) = (each for each in self.nodes if each[1] is node)
        self.nodes.remove(each)
        self.cluster.remove_node(node)

    def kill_one_with_a_worker(self):
        """SIGKILL of a node: its raylet and all that runs under it, at once."""
        holders = {process.ppid() for process in running("RayTrainWorker")}
        for each in self.nodes:
            _, node = each
            (raylet,) = (info.process.pid for info in node.all_processes["raylet"])
            if raylet in holders:
                for process in [*psutil.Process(raylet).children(recursive=True), psutil.Process(raylet)]:
                    process.kill()
                self.nodes.remove(each)
                self.cluster.remove_node(node, allow_graceful=False)
                return
        raise AssertionError("no node holds a worker")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    before, cwd = dict(os.environ), Path.cwd()
    os.environ["MLFLOW_TRACKING_URI"] = stores.made(folder)
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])  # for the nodes' workers
    os.chdir(folder)
    nodes = Nodes()
    try:
        os.environ["RAY_ADDRESS"] = nodes.cluster.address
        with session.ray_cluster(4):
            yield folder, nodes
    finally:
        nodes.cluster.shutdown()
        os.chdir(cwd)
        os.environ.clear()
        os.environ |= before


@pytest.fixture(scope="module")
def nodes(place):
    return place[1]


@pytest.fixture(scope="module")
def run(place, tmp_path_factory):
    """run(name, settings) → (result, what the workers told) of two workers on two real videos."""
    folder, nodes = place
    nodes.are(4, 4)
    shards = two_people(tmp_path_factory)

    def start(name, listen=lambda item: None, **over):
        values = config.merge(SETTINGS, {"data": {"shards": str(shards)}, "name": name})
        values = config.merge(values, {"train": {"workers": 2, "steps": 20, "checkpoint_every": 2, "max_failures": 1}})
        message = []
        experiment = config.build(config.merge(values, over))

        def on_item(item):
            message.append(item)
            listen(item)

        return train.run(experiment, folder / name, tables=folder / "tables", listen=on_item), message

    return start


@pytest.fixture(scope="module")
def undisturbed(run):
    return run("whole")[0]


def at_steps(output: Path, *acts) -> threading.Thread:
    """Do things one after another, each once the run has written that many steps."""

    def watch():
        for lines, act in acts:
            deadline = time.time() + PATIENCE_S
            while time.time() < deadline:
                if (output / "steps.jsonl").exists():
                    *_, seen, _ = [b"", b"", *(output / "steps.jsonl").read_bytes().split(b"\n")]  # whole lines alone
                    if seen and json.loads(seen)["step"] >= lines:
                        break
                time.sleep(0.01)
            done.append(act())

    done = []
    thread = threading.Thread(target=watch, daemon=True)
    thread.done = done
    thread.start()
    return thread


def once_saved(output: Path, act):
    """The act, once the run has a whole checkpoint: it is written beside the steps, on a busy machine after many."""

    def later():
        deadline = time.time() + PATIENCE_S
        while not list((output / "checkpoints").glob("step-*/state.json")) and time.time() < deadline:
            time.sleep(0.01)
        return act()

    return later


def no_space():
    """The kernel refuses the workers large files: what a checkpoint meets on a full disk."""
    for worker in running("RayTrainWorker"):
        worker.rlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))


def kill_controller():
    (controller,) = running("TrainController")
    controller.kill()


def spot_notice():
    running("RayTrainWorker")[0].send_signal(signal.SIGTERM)


def resumed_at(message):
    return [item["resumed"] for item in message if "resumed" in item]


def unreadable(folder: Path):
    """A checkpoint that is there, and reading it fails: EIO, as of a disk that does not answer. Returns what mends
    it."""
    state = folder / checkpoint.newest(folder) / "state.json"
    content = state.read_bytes()
    state.unlink()
    state.symlink_to("/proc/self/mem")

    def mend():
        state.unlink()
        state.write_bytes(content)

    return mend


@pytest.mark.slow
def test_a_run_survives_one_loss_after_another(run, undisturbed, nodes, place):
    """A full disk, the trainer's controller, SIGTERM, a checkpoint that cannot be read, all nodes: it waits for one."""
    folder, _ = place
    nodes.are(4, 4)

    def all_gone():
        nodes.kill_one_with_a_worker()
        nodes.are()

    acts = (3, no_space), (7, kill_controller), (11, spot_notice), (15, all_gone)
    watcher, mends = at_steps(folder / "disturbed", *acts), []

    def listen(item):
        if "SIGTERM" in item.get("warning", ""):
            mends.append(unreadable(folder / "disturbed" / "checkpoints"))
        elif "Input/output error" in item.get("warning", ""):
            mends[0]()
        elif "waiting for nodes" in item.get("waiting", ""):
            watcher.join(PATIENCE_S)
            nodes.are(4)

    result, message = run("disturbed", listen, train={"max_failures": 2})
    assert len(watcher.done) == 4
    warnings = [item["warning"] for item in message if "warning" in item]
    assert any("was not saved" in line and "training goes on" in line for line in warnings)
    assert any("SIGTERM" in line and "from the newest checkpoint" in line for line in warnings)
    assert any("Input/output error" in line and "from the newest checkpoint" in line for line in warnings)
    assert any("room for 0 of 2" in item["waiting"] for item in message if "waiting" in item)
    after_controller, after_notice, after_node = resumed_at(message)
    assert after_controller <= 4, "no checkpoint could be written before"
    assert after_notice >= 11, "a notice is time for a checkpoint of its own"
    assert after_node >= after_notice
    assert not any(f"{after_notice:08d}" in line for line in warnings if "cut short" in line), "it was not damaged"
    assert result["losses"] == undisturbed["losses"]
    assert result["held_out"] == [dict(point, charged_s=mine["charged_s"]) for point, mine in zip(
        undisturbed["held_out"], result["held_out"], strict=True)]  # fmt: skip
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    (found,) = [
        run
        for run in client.search_runs([client.get_experiment_by_name("entprog").experiment_id])
        if run.info.run_name.startswith("disturbed") and "mlflow.parentRunId" not in run.data.tags
    ]
    assert found.info.run_id == result["mlflow_run_id"] and found.info.status == "FINISHED"
    points = client.get_metric_history(found.info.run_id, "loss")
    assert {p.step: p.value for p in points} == dict(enumerate(result["losses"], 1)), "no point is lost"


@pytest.mark.slow
def test_a_run_whose_losses_are_lost_fails_with_its_step_named(run, place):
    """Another try would end alike: there is none, and no model."""
    folder, _ = place
    lost = {"learning_rate": 1e30, "gradient_clip": None, "max_nonfinite": 3, "checkpoint_every": 1}
    with pytest.raises(RuntimeError, match=r"not finite in 3 updates in a row, up to step \d+ .train\.max_nonfinite=3"):
        run("lost", train=lost, schedule={"kind": "full"})
    output = folder / "lost"
    steps = [json.loads(line, parse_constant=pytest.fail) for line in (output / "steps.jsonl").read_text().splitlines()]
    assert [step["skipped"] for step in steps[-4:]] == [False, True, True, True] and steps[-1]["loss"] is None
    assert not (output / "model").exists() and not (output / "finished.json").exists()
    assert checkpoint.newest(output / "checkpoints") == f"step-{steps[-1]['step']:08d}", "its weights are finite"
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    found = client.get_run(json.loads((output / "mlflow_run.json").read_text())["run_id"])
    assert found.info.status == "FAILED" and found.data.metrics["skipped_updates"] == 3


def test_clips_are_decoded_away_from_who_trains_and_by_others_when_those_nodes_die(
    nodes, monkeypatch, tmp_path, tmp_path_factory
):
    """The head trains, a node decodes, and is killed before the reader has all of its clips."""
    nodes.are(3)
    rows = [real_clips.row("cam01", "train", 0.1 * i, CLIPS) for i in range(8)]
    dataset = real_clips.write(tmp_path_factory.mktemp("shards"), {"train": [rows], "held_out": []}, CLIPS)
    said = decoding.outlook(wanting(workers=2, gpus="yes"), dataset, decoding.nodes_there())
    assert re.search(r"on the 2 node\(s\) without GPUs that are there now; .*clips/s \(measured\), 4 of them", said), (
        said
    )
    mine = ray.get_runtime_context().get_node_id()
    (node,) = (each["NodeID"] for each in ray.nodes() if each["Alive"] and each["NodeID"] != mine)
    original = feed._task

    def task(rows, **options):
        (tmp_path / f"{rows['first'][0]:03}-{ray.get_runtime_context().get_node_id()}").touch()
        return original(rows, **options)

    monkeypatch.setattr(feed, "_task", task)
    monkeypatch.setattr(feed, "TASK_BATCHES", 1)
    monkeypatch.setattr(feed, "TASKS_HELD_BACK", 64)
    given, options = ("train", CLIPS, 2), {"cpus": 2, "where": "cluster", "avoid": [mine]}
    due = clip_stream.local_stream(dataset, *given)
    stream = feed.stream(dataset, *given, **options)
    places = lambda: {path.name.split("-")[1] for path in tmp_path.iterdir()}  # noqa: E731
    try:
        for count in range(14):
            if count == 2:
                assert places() == {node}, "while there is room"
                nodes.drop(nodes.nodes[0][1])
            one, other = next(stream), next(due)
            assert all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("position", "video", "pose"))
    finally:
        stream.close()
    assert places() == {node, mine}


@pytest.mark.slow
def test_a_run_decodes_where_its_cluster_has_cpus_and_comes_to_the_same(run, nodes, place):
    """Without other nodes in its workers' threads; after a loss on a node that has come since; and that one dies."""
    folder, _ = place
    plain = {"schedule": {"kind": "full"}, "train": {"steps": 120, "checkpoint_every": 5, "held_out_every": 60}}
    nodes.are(4)
    before, _ = run("threads", **config.merge(plain, {"data": {"decode": "worker"}}))

    def a_node_comes():
        nodes.add(4)
        running("RayTrainWorker")[0].kill()

    def what_decodes_dies():
        trains = nodes.with_a_worker()
        (other,) = (node for _, node in nodes.nodes if node is not trains)
        nodes.drop(other)

    watcher = at_steps(folder / "there", (6, a_node_comes), (40, what_decodes_dies))
    result, message = run("there", **plain)
    assert len(watcher.done) == 2
    first, then = (item["decoding"] for item in message if "decoding" in item)
    assert first == "by threads of each worker, 1 CPU of its machine"
    assert then == "by tasks of Ray Data on 2 nodes without GPUs and workers, 2.5 CPUs for each worker", "head and node"
    assert len(resumed_at(message)) == 1, "what decodes is no loss of what trains"
    assert result["losses"] == before["losses"] and result["held_out"][-1]["loss"] == before["held_out"][-1]["loss"]
    assert (before["decode"], result["decode"]) == ("worker", "cluster")
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    tags = [client.get_run(each["mlflow_run_id"]).data.tags["entprog.decode"] for each in (before, result)]
    assert tags == ["worker", "cluster"]


@pytest.mark.slow
def test_a_machine_that_is_taken_back_is_left_with_a_checkpoint(run, nodes, place):
    """AWS's notice on a node's metadata service, and later the hook before a pod ends, have Ray drain a node: no worker
    stays there."""
    folder, _ = place
    nodes.are(4, 4, 4)
    steps, gone, resumed, goes_on = folder / "drained" / "steps.jsonl", [], [], threading.Event()

    def listen(item):
        if "resumed" in item:
            resumed.append(item["resumed"])
        elif resumed and "step" in item:
            goes_on.set()

    def lines() -> int:
        return len(steps.read_bytes().splitlines())

    def draining():
        gone.append(nodes.with_a_worker())
        return "--address", nodes.cluster.address, "--node-id", gone[-1].node_id

    def notice():
        with metadata("terminate") as address:
            spot.watch(address, *draining(), every_s=0.1)
        return lines()

    def pod_ends():
        assert goes_on.wait(PATIENCE_S)
        before = lines()
        spot.leave(90, *draining())  # returns once the workers have gone
        return before

    watcher = at_steps(folder / "drained", (5, notice), (6, pod_ends))
    long = {"steps": 800, "checkpoint_every": 10_000, "held_out_every": 800}
    result, message = run("drained", listen, schedule={"kind": "full"}, train=long)
    watcher.join(PATIENCE_S)
    for told_at, step in zip(watcher.done, resumed, strict=True):
        assert told_at <= step < 800, "the checkpoint is of after the notice: no step is lost"
    assert len([item for item in message if "Ray drains it" in item.get("warning", "")]) == 2
    assert len(result["losses"]) == 800
    for node in gone:
        nodes.drop(node)


def waited_for(nodes, *arguments, joins, **options):
    """(what a wait for room came to, the lines that it said), while nodes join after one line each."""
    message = []
    with ThreadPoolExecutor(1) as pool:
        came = pool.submit(room.workers, *arguments, message.append, **options)
        for node in joins:
            before = len(message)
            while len(message) == before:
                assert not came.done()
                time.sleep(0.1)
            nodes.add(**node)
        return came.result(), message


def test_a_cluster_that_starts_is_waited_for_until_it_has_settled(nodes, monkeypatch):
    """Not until its first node is there, which would do; and what was asked for is given back."""
    monkeypatch.setattr(room, "SETTLE_S", 1.0)
    monkeypatch.setattr(room, "REMIND_S", 1.0)
    nodes.are(1)
    came, message = waited_for(nodes, 1, 3, CPU, settle_s=60.0, joins=[{"cpus": 2}])
    assert came == 3
    here = r"there is room for {} of 3 workers \(1 CPU each, 1 CPU for decoding\), train.min_workers=1: "
    assert re.fullmatch(here.format(1) + r"waiting for nodes since \d\d:\d\d:\d\d", message[0])
    assert all(re.fullmatch(here.format("[12]") + r"waiting .*, for \d+ min", line) for line in message[1:-1])
    assert re.fullmatch(here.format(3) + "going on", message[-1])
    message.clear()
    assert room.workers(3, 3, CPU, message.append) == 3
    assert room.workers(1, 9, CPU, message.append, settle_s=0.5) == 3, "settled: there is no more"
    came, message = waited_for(nodes, 2, 2, GPU, joins=[{"cpus": 3, "num_gpus": 2}])
    here = "there is room for 0 of 2 workers (1 GPU each, 1 CPU for decoding): waiting for nodes since"
    assert came == 2 and message[0].startswith(here)
    assert capacity.gpus_there("auto", "latents.gpus", message.append) == 2
    with pytest.raises(KeyboardInterrupt):
        stop = threading.Event()
        stop.set()
        room.workers(99, 99, CPU, message.append, stop=stop)


def test_who_waits_holds_nothing_that_others_could_use(nodes, monkeypatch):
    """Two jobs that each need three CPUs of four: one has them, the other one waits, and both come to their turn."""
    monkeypatch.setattr(room, "SETTLE_S", 0.2)
    nodes.are(4)
    stop, message = threading.Event(), []
    with ThreadPoolExecutor(2) as pool:
        larger = pool.submit(room.workers, 8, 8, CPU, message.append, stop=stop)
        try:
            while not message:
                time.sleep(0.1)
            assert "waiting for nodes" in message[0] and not larger.done()
            for _ in range(2):
                assert pool.submit(room.workers, 3, 3, CPU, lambda line: None).result(30) == 3
        finally:
            stop.set()
        with pytest.raises(KeyboardInterrupt):
            larger.result(30)


def test_gpus_whose_machine_has_no_cpu_free_are_used_and_grown_into(nodes, monkeypatch):
    """Ray Train reserves GPUs alone, and Ray Data takes a CPU of any machine: neither waits for ever, and who is told
    to grow finds the room that was there."""
    monkeypatch.setattr(room, "SETTLE_S", 1.0)
    nodes.are(1)
    nodes.add(0, num_gpus=2)
    say = [].append
    assert room.workers(2, 2, GPU, say) == 2 and room.workers(1, 3, GPU, say, settle_s=0.5) == 2

    def told_to_grow(within_s):
        begun, grow = threading.Event(), threading.Event()
        begun.set()
        with room.growing(1, GPU, begun, 0.0, grow.set):
            return grow.wait(within_s)

    assert told_to_grow(30)
    # The head's CPU and that of the other node are taken: no CPU is left for Ray Data.
    held = placement_group([{"CPU": 1}, {"CPU": 1}])
    try:
        assert held.wait(30) and not told_to_grow(2)
        stop = threading.Event()
        with pytest.raises(KeyboardInterrupt):
            room.workers(1, 1, GPU, lambda line: stop.set(), stop=stop)
    finally:
        ray_internals.remove_placement_group(held.id.hex())


def test_a_sweep_waits_for_all_that_its_trials_take(nodes, monkeypatch):
    """What it waits for is what it then shares out; and a dry run says what it will be on a cluster without nodes."""
    monkeypatch.setattr(room, "SETTLE_S", 0.5)
    nodes.are()
    experiment = wanting(workers=1, gpus="no")
    settings = config.Tune(concurrent=2, trials=9)
    share = sweep.share(experiment, settings, tune.resources(experiment, settings), 4)
    assert (share.concurrent, share.decode_cpus) == (2, 1.0)
    message = []
    monkeypatch.setattr(terminal.console, "print", message.append)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(tune.wait, sweep.needs(experiment, settings, False))
        for cpus in (2, 1):  # two workers could begin with the first
            before = len(message)
            while len(message) == before and not waiting.done():
                time.sleep(0.1)
            assert not waiting.done()
            monkeypatch.setattr(room, "REMIND_S", 0.5)
            nodes.add(cpus)
        waiting.result(60)
    assert message[0].startswith("trials need 4 CPUs, 1 of them are free: waiting for nodes since ")
    assert sweep.share(experiment, settings, ray.cluster_resources(), 4).concurrent == 2


def test_a_trial_knows_its_drivers_cluster(nodes):
    """A trial is a worker of Ray's, without the driver's environment: it would take the cluster for one that never
    grows, and refuse what it should wait for."""
    nodes.are(1)
    spec = trial.Spec(experiment={}, tune={}, output="", tables="", tracking_uri="http://127.0.0.1:1",
                      cluster=tune.cluster(), sweep_run_id="", data="", weights="")  # fmt: skip

    def there(spec, experiment):
        os.environ.pop("RAY_ADDRESS", None)  # as under `ray job submit`
        trial.here(spec)
        return joining.address(), capacity.use_gpus(experiment)

    knows = ray.remote(num_cpus=0)(there).remote(spec, wanting(workers=16, gpus="yes"))
    assert ray.get(knows) == (nodes.cluster.address, True)


def wanting(**train):
    return config.build(config.merge(SETTINGS, {"train": train}))


def reserved():
    return [group for group in placement_group_table().values() if group["state"] != "REMOVED"]


def nothing_reserved():
    """Ray takes a moment."""
    deadline = time.monotonic() + 30
    while found := reserved():
        assert time.monotonic() < deadline, found
        time.sleep(0.1)


@pytest.mark.parametrize("by", ["its sweep", "its next try"])
def test_what_a_trial_asked_for_does_not_outlive_its_process(nodes, tmp_path, monkeypatch, by):
    """Ray keeps it for as long as the job lasts."""
    monkeypatch.setattr(room, "SETTLE_S", 0.5)
    nodes.are(1)
    nothing_reserved()

    class Trial:
        def wait(self, run):
            room.workers(8, 9, CPU, print, run=run)

    lost, other = (ray.remote(num_cpus=0)(Trial).remote() for _ in range(2))
    runs = [tmp_path / "trials" / name / "seed-0" / "ray" for name in ("1", "11")]
    for trial_, run in zip((lost, other), runs, strict=True):
        trial_.wait.remote(run)
    deadline = time.monotonic() + 60
    while len(reserved()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    ray.kill(lost)
    time.sleep(1)
    assert len(reserved()) == 2, "it holds what nobody uses"
    if by == "its sweep":
        room.forget(trial.folder_of(tmp_path, "1"))
    else:
        stop = lambda item: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
        with pytest.raises(KeyboardInterrupt):
            launch.run_workers(launch.training, {}, wanting(workers=8, gpus="no"), runs[0], stop)
    while len(reserved()) > 1:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert reserved()[0]["name"].startswith(f"{runs[1]}/"), "the other trial still waits"
    ray.kill(other)
    room.forget(tmp_path)
    nothing_reserved()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_who_waits_for_nodes_can_be_stopped(nodes, tmp_path, monkeypatch, number):
    monkeypatch.setattr(room, "SETTLE_S", 0.5)
    nodes.are(1)
    message = []

    def on_item(item):
        message.append(item["waiting"])
        os.kill(os.getpid(), number)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            launch.run_workers(launch.training, {}, wanting(workers=8, gpus="no"), tmp_path, on_item)
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(message) == 1 and not running("TrainController")
    nothing_reserved()


def test_ctrl_c_asks_who_trains_for_a_checkpoint_and_once_more_ends_it(nodes, tmp_path):
    """Ray Train answers it by an end of the process, which is no failure of the run."""
    nodes.are(1)

    def begun(settings):
        board = settings["board"]
        ray.get(board.post.remote({"step": {"step": 1}}))
        ray.get(board.post.remote({"warning": f"told {ray.get(board.notices.remote())}"}))
        time.sleep(100)

    heard = []

    def on_item(item):
        heard.append(item)
        if "waiting" not in item:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            launch.run_workers(begun, {}, wanting(workers=1, gpus="no"), tmp_path, on_item)
    finally:
        signal.signal(signal.SIGINT, before)
    assert [*map(next, map(iter, heard))] == ["step", "waiting", "warning"]
    assert "Ctrl-C once more" in heard[1]["waiting"] and heard[2]["warning"] == f"told {message_board.JOB_ENDS}"
    nothing_reserved()


@pytest.mark.slow
def test_a_device_without_room_is_asked_once_more(nodes, tmp_path):
    """Not `train.max_failures` times, and not by Ray Tune again: a trial that draws such values has failed."""
    nodes.are(1)

    def starved(settings):
        ray.get(settings["board"].post.remote({"step": {"step": 5}}))
        raise torch.OutOfMemoryError("CUDA out of memory")

    heard = []
    with pytest.raises(LastingError, match="CUDA out of memory"):
        launch.run_workers(starved, {}, wanting(workers=1, gpus="no"), tmp_path, heard.append)
    assert [*map(next, map(iter, heard))] == ["step", "warning", "step"]


def test_before_the_first_step_ctrl_c_has_nothing_to_save():
    listener = SimpleNamespace(begun=threading.Event())  # nobody is to be told
    ended = []
    launch._Stop(listener, print).before(lambda number, frame: ended.append(number))(signal.SIGINT, None)
    assert ended == [signal.SIGINT]


@pytest.mark.parametrize("by", ["its node", "its job"])
def test_copies_lie_where_the_environment_of_node_or_job_says(nodes, tmp_path, by):
    """Not where the driver's own would have them: that process's environment does not reach other machines."""
    nodes.are()
    names = {"TMPDIR": str(tmp_path / "scratch"), "ENTPROG_CACHE": str(tmp_path / "kept")}
    (tmp_path / "scratch").mkdir()
    (tmp_path / "there" / "model").mkdir(parents=True)
    (tmp_path / "there" / "model" / "config.json").write_text("{}")

    def copies(there):
        with storage.local_copy(storage.Place.at(there)) as copy:
            return str(copy), str(assets.cache_folder())

    nodes.add(1, resources={"scratch": 1}, env_vars=names if by == "its node" else {})
    more = {"runtime_env": {"env_vars": names}} if by == "its job" else {}
    task = ray.remote(resources={"scratch": 1}, **more)(copies)
    copy, cache = ray.get(task.remote(str(tmp_path / "there")))
    assert copy.startswith(f"{tmp_path}/scratch/") and cache == f"{tmp_path}/kept"


def test_gpus_that_may_come_are_waited_for_if_they_are_asked_for(nodes):
    nodes.are(1)
    assert capacity.use_gpus(wanting(workers=16, gpus="yes")) is True
    assert capacity.use_gpus(wanting(workers=16, gpus="no")) is False
    assert capacity.use_gpus(wanting(workers=1)) is False, "there are CPUs enough"
    neither = r"gpus=auto, and the cluster has neither .*: set {0}=yes or {0}=no$"
    with pytest.raises(UserError, match=neither.format("train.gpus")):
        capacity.use_gpus(wanting(workers=16))
    with pytest.raises(UserError, match=neither.format("latents.gpus")):
        capacity.gpus_there("auto", "latents.gpus", pytest.fail, cpus=4)


def test_latents_are_encoded_on_a_cluster_without_gpus_if_that_is_asked_for_alone(nodes):
    """Its GPU nodes may have yet to start, and one CPU would encode for days."""
    nodes.are(1)
    settings = lambda gpus: config.build({"latents": {"gpus": gpus}}, config.Encoding)  # noqa: E731
    with pytest.raises(UserError, match=r"no GPU now: set latents\.gpus=yes, .* or latents\.gpus=no") as told:
        latents.decided(settings("auto"))
    assert "\n" not in str(told.value)
    assert [latents.decided(settings(asked)).latents.gpus for asked in ("yes", "no")] == ["yes", "no"]
    nodes.add(0, num_gpus=1)
    assert latents.decided(settings("auto")).latents.gpus == "yes"


def test_a_file_is_no_store_for_runs_on_several_machines(nodes, tmp_path, monkeypatch):
    nodes.are(1)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    capacity.check_tracking(wanting())
    nodes.add(2, node_ip_address="127.0.0.2")
    with pytest.raises(
        UserError, match=r"is a file of this machine.*mlflow server .* MLFLOW_TRACKING_URI=http://"
    ) as e:
        capacity.check_tracking(wanting())
    assert "\n" not in str(e.value) and not list(tmp_path.iterdir())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    capacity.check_tracking(wanting())


@pytest.mark.slow
def test_a_run_begins_on_a_cluster_that_has_no_nodes_yet(run, nodes, tmp_path, monkeypatch):
    """It waits for longer than Ray Train would, starts once with all its workers, and counts CPUs where they are. Where
    they are to be is not known: MLflow's store must be a server."""
    nodes.are()
    server = Server(stores.made(tmp_path), tmp_path / "server.log")
    server.start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "1")
    monkeypatch.setattr(room, "REMIND_S", 1.0)
    really, quicker = room.workers, iter([2])
    # At first there seems to be room, which another job then takes.
    monkeypatch.setattr(room, "workers", lambda *a, **k: next(quicker, None) or really(*a, **k))
    joins = [1, 8]  # one worker could begin with the first, and another CPU decode

    def listen(item):
        if joins and f"room for {2 - len(joins)} of 2" in item.get("waiting", ""):
            nodes.add(joins.pop(0))

    settings = {"schedule": {"kind": "full"}, "train": {"steps": 4, "gpus": "no", "min_workers": 1, "max_failures": 0}}
    server.wait()
    try:
        result, message = run("cold", listen, **settings)
    finally:
        server.kill()
    assert [item["workers"] for item in message if "workers" in item] == [2]
    waiting = [item["waiting"] for item in message if "waiting" in item]
    assert waiting[0] == "another job took the room first: waiting again"
    assert "room for 0 of 2" in waiting[1] and "going on" in waiting[-1] and not joins
    assert result["steps"] == 4
    assert (result["decode"], result["decode_cpus"]) == ("cluster", 1.0), "of the head and the node of one CPU"
    assert not [item for item in message if "warning" in item]


def test_a_board_whose_process_ends_is_made_anew_and_read_on(nodes):
    """Without that a growing group was never heard of again."""
    nodes.are(1)
    got = []
    listener = Listener(got.append)

    def posted(number):
        ray.get(listener.board.post.remote({"step": {"step": number}}), timeout=60)
        deadline = time.time() + 60
        while listener.step < number:
            assert time.time() < deadline
            time.sleep(0.05)

    try:
        posted(1)
        listener.begun.clear()
        (board,) = running("ray::Board")
        board.kill()
        board.wait(60)
        posted(2)
        assert listener.begun.is_set() and [item["step"]["step"] for item in got] == [1, 2]
    finally:
        listener.close()


def test_what_ray_does_not_promise_still_works(nodes):
    store = ray_internals.object_store()
    assert 0 <= store.used <= store.capacity and store.capacity > 100 * MIB and store.spilled == 0
    assert ray_internals.resources_that_may_come() == {} and ray_internals.is_driver()
    assert not ray.get(ray.remote(num_cpus=0)(ray_internals.is_driver).remote())
    group = placement_group([{"CPU": 1}])
    ray_internals.remove_placement_group(group.id.hex())
    assert placement_group_table()[group.id.hex()]["state"] == "REMOVED"


@pytest.mark.slow
def test_elastic_two_workers_one_and_two_again(run, nodes, place):
    """A node goes and another comes: fewer workers take more batches each, and an update sees the same clips. On two
    CPUs, one of them the head's, there is room for one worker: the other CPU decodes. What a worker's threads decode
    with is kept for it."""
    folder, _ = place
    plain = {"schedule": {"kind": "full"}, "train": {"steps": 200, "checkpoint_every": 5}}
    one = config.merge(plain, {"train": {"workers": 1, "accumulate": 2, "steps": 40}})
    one["data"] = {"decode": "worker", "decode_cpus": 3}
    nodes.are(4, 1)
    held = []
    alone, _ = run("alone", lambda item: held.append(reserved()) if "step" in item else None, **one)
    (group,) = held[0]
    assert list(group["bundles"].values()) == [{"CPU": 3}] and alone["decode_cpus"] == 3, "and a CPU reads"
    loses = once_saved(folder / "elastic", nodes.kill_one_with_a_worker)
    watcher = at_steps(folder / "elastic", (6, loses), (12, lambda: nodes.add(4)))
    result, message = run("elastic", **config.merge(plain, {"train": {"min_workers": 1, "resize_every_s": 1.0}}))
    worlds = [item["workers"] for item in message if "workers" in item]
    assert len(watcher.done) == 2 and worlds == [2, 1, 2]
    assert {"about": {"entprog.workers": "2, 1, 2"}} in message
    assert result["clips"] == 200 * 4
    assert result["losses"][:40] == pytest.approx(alone["losses"], rel=1e-3)
    grown = max(number for number, item in enumerate(message) if "resumed" in item)
    before = [item["step"]["step"] for item in message[:grown] if "step" in item]
    assert message[grown]["resumed"] == before[-1] > 12, "growing repeats no step"
