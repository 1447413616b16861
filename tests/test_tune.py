"""Sweeps through the real command: real clips, real Ray Tune and Train, real MLflow, a real kill."""

import base64
import csv
import errno
import json
import math
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from ray.train import WorkerGroupError
from ray.tune import loguniform
from ray.tune.execution.tune_controller import TuneController
from ray.tune.search.search_generator import SearchGenerator
from ray.tune.utils.serialization import TuneFunctionDecoder
from typer.testing import CliRunner

from entprog import config, files, models, storage
from entprog.data.shards import read_dataset
from entprog.errors import UnreachableError, UserError
from entprog.models import fingerprints
from helpers import servers, stores
from helpers.commands import PATIENCE_S, SETTINGS
from helpers.families import TINY
from helpers.networks import tiny_experiment
from helpers.people import two_people
from pipelines import train, tune
from pipelines.cluster import ray_internals, room
from pipelines.sweeping import checking, spaces, state, sweep, trial
from pipelines.sweeping.keeping import KEPT
from pipelines.tracking import tracker
from pipelines.tracking.tracker import Tracker
from pipelines.training import footprint, steplog

TRIALS = {
    "train": {"steps": None, "seconds": 6, "held_out_every": 4},
    "schedule": {"clock": "seconds", "search_share": 0.3},
    "tune": {"trials": 4, "rungs": 1, "reduction": 2, "retries": 0, "seed": 1},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory, local_ray):
    """A working folder with MLflow's store, settings and shards in it."""
    folder = tmp_path_factory.mktemp("tune")
    os.environ["MLFLOW_TRACKING_URI"] = stores.made(folder)
    os.environ["XDG_STATE_HOME"] = str(folder / "state")
    before = Path.cwd()
    os.chdir(folder)
    (folder / "shards").symlink_to(two_people(tmp_path_factory))
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config.merge(SETTINGS, TRIALS)))
    (folder / "mine.yaml").write_text(
        "train.learning_rate: {loguniform: [1e-4, 1e-2]}\nschedule.candidates: {choice: [[0.34, 1.0], [1.0]]}\n"
    )
    (folder / "rates.yaml").write_text("train.learning_rate: {loguniform: [1e-4, 1e-2]}\n")  # of every schedule
    try:
        yield folder
    finally:
        os.chdir(before)
        del os.environ["MLFLOW_TRACKING_URI"], os.environ["XDG_STATE_HOME"]


def wanted(place, **over) -> config.Sweep:
    values = config.merge(config.merge(SETTINGS, TRIALS), {"data": {"shards": str(place / "shards")}, "name": "tiny"})
    return config.build(config.merge(values, over), config.Sweep)


@pytest.fixture(scope="module")
def swept(place):
    """Optuna and early stopping; one of the values cannot be trained with."""
    experiment = wanted(place).experiment()
    source = models.family("wan").inspect(experiment.model)
    held = footprint.stages(experiment, source, smallest=True)
    least = max(stage.weights + stage.gradients + stage.moments for stage in held)  # and no byte for clips
    (place / "risky.yaml").write_text(f"schedule.memory_budget_bytes: {{choice: [null, {least}]}}\n")
    space = spaces.read(f"{place / 'mine.yaml'},{place / 'risky.yaml'}")
    return tune.run(wanted(place), space, place / "swept", tables=place / "cei")


@pytest.mark.slow
def test_every_trial_is_accounted_for(swept, place):
    trials = swept["trials"]
    assert len(trials) == 4 and sum(swept["counts"].values()) == 4
    for row in trials:
        starved = row["settings"]["schedule.memory_budget_bytes"] is not None
        assert (row["status"] == "failed") == starved
        if starved:
            assert "memory" in row["reason"]
        else:
            assert row["held_out_loss"] > 0 and row["seconds"] > row["search_seconds"] >= 0
            assert row["peak_memory_bytes"] > 0 and row["mlflow_run_id"] and "thread" in row["device"]
            steps = steplog.steps_of(trial.folder_of(place / "swept", row["id"]) / "seed-0")
            judged = next(step for step in steps if step["charged_s"] >= 3.0)
            assert judged["held_out_loss"] is not None, "it is decided at half of the seconds, however long steps are"
    assert swept["counts"]["failed"] >= 1, "the seed draws such a value"
    finished = [row for row in trials if row["status"] == "finished"]
    assert swept["best"]["id"] == min(finished, key=lambda row: row["held_out_loss"])["id"]
    assert swept["pareto"] == [swept["best"]["id"]]
    with (place / "swept" / "trials.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["id"] for row in table] == [row["id"] for row in trials]


@pytest.mark.slow
def test_trials_share_one_table_of_scores(swept, place):
    """The settings that were varied have no part in scoring."""
    assert len(list((place / "cei").glob("*.json"))) == 1


@pytest.mark.slow
def test_train_takes_the_best_settings(swept, place):
    best = place / "swept" / "best.yaml"
    result = CliRunner().invoke(train.app, ["--config", str(best), "--dry-run"])
    assert result.exit_code == 0, result.output
    experiment = config.build(config.read_yaml(best))
    drawn = dict(swept["best"]["settings"].items())
    assert experiment == spaces.applied(wanted(place).experiment(), drawn)


@pytest.mark.slow
def test_mlflow_has_sweep_trials_and_stages(swept):
    from mlflow import MlflowClient

    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    parent = client.get_run(swept["mlflow_run_id"])
    assert parent.info.status == "FINISHED" and parent.data.tags["entprog.kind"] == "sweep"

    def children(run_id):
        return client.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{run_id}'")

    trials = {run.info.run_id: run for run in children(parent.info.run_id)}
    for row in swept["trials"]:
        if row["status"] == "failed":
            continue
        run = trials[row["mlflow_run_id"]]
        assert run.data.tags["entprog.trial"] == row["id"] and run.data.tags["entprog.sweep"] == parent.info.run_id
        assert run.info.status == {"finished": "FINISHED", "stopped": "KILLED"}[row["status"]]
        assert float(run.data.params["train.learning_rate"]) == row["settings"]["train.learning_rate"]
        stages = children(run.info.run_id)
        assert stages and all(stage.info.status in ("FINISHED", "KILLED") for stage in stages)
        steps = client.get_metric_history(run.info.run_id, "loss")
        assert [point.step for point in sorted(steps, key=lambda p: p.step)] == list(range(1, len(steps) + 1))


@pytest.mark.parametrize(
    "objectives", [["held_out_loss"], ["held_out_loss", "peak_memory_bytes"], ["seconds_to_target"]]
)
def test_ray_takes_what_a_trial_reports_on_its_way(objectives):
    settings = config.build({"trials": 2, "objectives": objectives, "target_loss": 0.5}, config.Tune)
    search = SearchGenerator(sweep.searcher(settings, {"train.learning_rate": loguniform(1e-5, 1e-3)}, {}, 1))
    controller = SimpleNamespace(_metric=None, _scheduler_alg=sweep.scheduler(settings), _search_alg=search)
    reported = []

    def report(tick):
        TuneController._validate_result_metrics(controller, tick)
        reported.append(tick)

    trial.heard(settings, report)({"tick": 1, "held_out_loss": 1.0, "charged_s": 1.0, "training_iteration": 1})
    assert len(reported) == (len(objectives) == 1 and objectives[0] == "held_out_loss")


def test_checkpoints_of_trainings_that_ended_are_gone_wherever_they_lay(tmp_path):
    """Each training has a folder of its own there, with the settings of the bucket."""
    there = tmp_path / "checkpoints"
    experiment = tiny_experiment(train={"checkpoints": str(there)})
    place = tmp_path / "trials" / "abc" / "seed-1"
    assert trial.checkpoints(experiment, place) == f"{there}/abc/seed-1"
    for folder in (there / "abc" / "seed-1", there / "abc" / "seed-2"):
        (folder / "step-00000001").mkdir(parents=True)
    trial.remove_checkpoints(place, experiment)
    assert [folder.name for folder in (there / "abc").iterdir()] == ["seed-2"]
    away = tiny_experiment(train={"checkpoints": "s3://b/ck?region=x"})
    assert trial.checkpoints(away, place) == "s3://b/ck/abc/seed-1?region=x"


def test_a_trial_waits_for_an_mlflow_that_is_away(tmp_path, monkeypatch):
    """None of its values is wrong, and Tune is told nothing of them."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    shards = str(Path(tune.__file__).parent / "demo_person")
    experiment = tiny_experiment(data={"shards": shards}).model_dump(mode="json")
    about = {"tables": "", "tracking_uri": "", "cluster": "local", "sweep_run_id": ""}
    spec = trial.Spec(experiment=experiment, tune=config.Tune(seeds=2).model_dump(mode="json"), output=str(tmp_path),
                      data=read_dataset(shards).fingerprint, weights=fingerprints.base(tiny_experiment().model),
                      **about)  # fmt: skip
    watch = sweep.Watch(1, "held_out_loss", tmp_path, tmp_path)
    watch.running.add("a")
    tries = iter((spec, spec, replace(spec, data="others")))
    shown = []
    monkeypatch.setattr(watch.bar.console, "print", lambda line, **_: shown.append(line))

    def begin():
        watch.on_step_end(0, [])
        watch.looked_s = -math.inf
        return trial.run({}, next(tries), "a", pytest.fail)

    assert trial.patiently(begin, spec, (0.0,))["held_out_loss"] == math.inf
    (line,) = shown
    assert re.match("trial a waits, and is tried again: .*MLflow at http://127.0.0.1:1 cannot be used", line)
    assert "other clips" in json.loads((trial.folder_of(tmp_path, "a") / trial.RECORD).read_text())["reason"]
    assert trial.waiting(trial.folder_of(tmp_path, "a")) is None
    (trial.folder_of(tmp_path, "a") / trial.RECORD).unlink()
    (trial.folder_of(tmp_path, "a") / trial.RECORD).mkdir()  # raises OSError, as a bucket that is away
    before = watch.waited = {("a", "MLflow")}
    watch.on_step_end(0, [])
    assert watch.waited is before, "it is not known, and not told anew"


def test_a_trial_that_waits_has_not_failed_in_mlflow(place, monkeypatch):
    def away(*_, **__):
        raise UnreachableError("a hub")

    monkeypatch.setattr(train, "run", away)
    experiment = wanted(place).experiment()
    about = {"tables": "", "tracking_uri": "", "cluster": "local", "sweep_run_id": ""}
    spec = trial.Spec(experiment=experiment.model_dump(mode="json"), tune=config.Tune(seeds=2).model_dump(mode="json"),
                      output=str(place / "waits"), data=read_dataset(experiment.data.shards).fingerprint,
                      weights=fingerprints.base(experiment.model), **about)  # fmt: skip
    with pytest.raises(UnreachableError):
        trial.run({}, spec, "a", pytest.fail)
    from mlflow import MlflowClient

    (record,) = (place / "waits").rglob(tracker.RUN_FILE)
    run_id = json.loads(record.read_text())["run_id"]
    assert MlflowClient(os.environ["MLFLOW_TRACKING_URI"]).get_run(run_id).info.status == "RUNNING"


def of_a_worker(error):
    """As `run_workers` raises what a worker has."""
    told = RuntimeError("a line")
    told.__cause__ = WorkerGroupError("", {0: error})
    return told


@pytest.mark.parametrize(
    ("error", "output", "away"),
    [
        (of_a_worker(UnreachableError("cannot read s3://a/b")), "out", True),
        (of_a_worker(RuntimeError("peer closed")), "out", False),
        (TimeoutError(errno.ETIMEDOUT, "no answer"), "out", True),
        (OSError("AWS Error NETWORK_CONNECTION"), "s3://a/b", True),
        (OSError("AWS Error NETWORK_CONNECTION"), "out", False),
        (FileNotFoundError("gone"), "s3://a/b", False),
        (OSError(errno.ENOSPC, "of this machine's disk"), "s3://a/b", False),
        (UserError("wrong"), "s3://a/b", False),
    ],
)
def test_what_is_away_for_a_while_is_no_fault_of_a_trial(error, output, away):
    about = dict.fromkeys(("tables", "tracking_uri", "cluster", "sweep_run_id", "data", "weights"), "")
    spec = trial.Spec(experiment=tiny_experiment().model_dump(mode="json"), tune={}, output=output, **about)
    assert trial.is_away(error, spec) == away


@pytest.mark.slow
def test_seeds_objectives_and_chance(place):
    over = {
        "trials": 2,
        "search": "optuna",
        "seeds": 2,
        "concurrent": 1,
        "objectives": ["held_out_loss", "peak_memory_bytes"],
    }
    plain = wanted(place, tune=over, train={"seconds": 1}, schedule={"kind": "full"})
    result = tune.run(plain, spaces.read(str(place / "rates.yaml")), place / "seeds")
    for row in result["trials"]:
        assert row["status"] == "finished" and [seed["seed"] for seed in row["seeds"]] == [0, 1]
        losses = [seed["held_out_loss"] for seed in row["seeds"]]
        assert row["held_out_loss"] == pytest.approx(sum(losses) / 2) and row["held_out_loss_std"] > 0
    assert result["seed_noise"] > 0 and set(result["pareto"]) <= {row["id"] for row in result["trials"]}
    assert (place / "seeds" / "pareto.png").stat().st_size > 0


def test_a_grid_is_walked_whole_into_a_bucket_and_a_loss_that_is_no_number_is_told(place, monkeypatch):
    with servers.s3() as endpoint:
        output = storage.Place.at(servers.address(endpoint, "sweeps/grid"))
        output.system.create_dir("sweeps")
        before = {path.name for path in place.iterdir()}
        written, where = [], ray_internals.state_of_tune
        monkeypatch.setattr(ray_internals, "state_of_tune", lambda one: written.append(where(one)) or written[-1])
        _walk_a_grid(place, output)
        assert all(folder.is_dir() for folder in written)
        folder = state.read(output).folder / sweep.NAME
        kept = {name: base64.b64decode(it) for name, it in json.loads((folder.parent / KEPT).read_text()).items()}
        assert kept == {name: (folder / name).read_bytes() for name in kept}, "the last one of all"
        new = {path.name for path in place.iterdir()} - before
        assert {name for name in new if not name.startswith("ml")} - {"state"} == {"grid.yaml"}, "else MLflow's own"
        assert (place / "state").is_dir(), "of this sweep, or of an earlier one too"
        left = output.below()
        assert left.keys() >= {"best.yaml", "trials.csv", "trials.png", "sweep.json"}
        assert not [name for name in left if "checkpoints" in name], "of ended trials"
        best = (output / "best.yaml").address
        done = CliRunner().invoke(train.app, ["--config", best, "--dry-run"], env={"COLUMNS": "400"})
        assert done.exit_code == 0 and "s3://sweeps/grid/best.yaml" in (output / "best.yaml").read_text(), done.output


def _walk_a_grid(place, output):
    (place / "grid.yaml").write_text("train.learning_rate: {choice: [1.0e-3, 1.0e+30]}\n")
    grid = {"trials": 2, "search": "grid", "early_stop": False, "retries": 1, "concurrent": 1}  # so both in one process
    plain = wanted(place, tune=grid, train={"seconds": 1, "max_nonfinite": 1}, schedule={"kind": "full"})
    result = tune.run(plain, spaces.read(str(place / "grid.yaml")), output)
    rows = {row["settings"]["train.learning_rate"]: row for row in result["trials"]}
    assert [rows[rate]["status"] for rate in (1e-3, 1e30)] == ["finished", "failed"]
    assert re.search("not finite|is nan", rows[1e30]["reason"])  # after one step or more
    ended = max(state.read(output).folder.glob(f"{sweep.NAME}/experiment_state-*.json")).read_text()
    assert "ERROR" not in ended, "the search learns that its values are bad, and it is not trained again"
    assert result["best"]["id"] == rows[1e-3]["id"]
    from mlflow import MlflowClient

    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    sweep_run = client.get_run(result["mlflow_run_id"])
    (run,) = client.search_runs([sweep_run.info.experiment_id], f"tags.`entprog.trial` = '{rows[1e30]['id']}'")
    assert run.info.status == "FAILED"
    assert run.data.params["data.decode"] == "worker", "what one trial leaves free is another's"


@pytest.mark.parametrize(
    "line", ["train.timesteps: {choice: [uniform, logit_normal]}", "data.held_out_clips: {choice: [2, 4]}"]
)
def test_what_losses_are_measured_by_is_not_searched(place, line):
    (place / "unlike.yaml").write_text(line + "\n")
    with pytest.raises(UserError, match="ranked by their held-out loss"):
        checking.check(wanted(place), spaces.read(str(place / "unlike.yaml")))


def test_trainings_that_cannot_be_ranked_are_not_swept(place):
    space = spaces.read(str(place / "mine.yaml"))
    phases = {"a": {"train": {"seconds": 2}}, "b": {"train": {"seconds": 3}}}
    with pytest.raises(UserError, match="a sweep is of one training, these settings have several"):
        checking.check(wanted(place, phases=phases), space)
    vae, sizes = TINY["wan"]["vae"]
    three = {**sizes, "z_dim": 3, "latents_mean": [0.0] * 3, "latents_std": [1.0] * 3}
    vae(**three).save_pretrained(place / "vae")
    (place / "vaes.yaml").write_text(f"model.vae: {{choice: [none, {place / 'vae'}]}}\n")
    with pytest.raises(UserError, match="values of this space change the VAE"):
        checking.check(wanted(place), spaces.read(str(place / "vaes.yaml")))


def test_an_interrupted_sweep_leaves_no_training_of_its_trials_running(place, monkeypatch):
    """In MLflow; one that goes on does."""
    output, begun = place / "interrupted", []

    def interrupted(spec, *_, **__):
        for name, status in (("a", "running"), ("b", "finished")):
            folder = trial.folder_of(output, name)
            files.write_json(folder / trial.RECORD, {"status": status})
            begun.append(Tracker.start(folder / "seed-0", "entprog", name, params={}, tags={}).run_id)
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tune.run(wanted(place, schedule={"kind": "full"}), spaces.read(str(place / "rates.yaml")), output)
    from mlflow import MlflowClient

    def statuses():
        client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
        return [client.get_run(run_id).info.status for run_id in begun]

    assert statuses() == ["KILLED", "RUNNING"], "the other one's own"
    Tracker.start(trial.folder_of(output, "a") / "seed-0", "entprog", "a", params={}, tags={})
    assert statuses() == ["RUNNING", "RUNNING"]
    files.write_json(trial.folder_of(output, "b") / trial.RECORD, {"status": "running"})
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(tracker, "RETRY_S", (0.0,))
    with pytest.warns(UserWarning) as told:
        tune._end_trials(output)
    assert len(told) == 1 and "the run was not marked KILLED" in str(told[0].message), "not once a trial"


def steps_of(output: Path) -> dict[str, int]:
    return {path.parts[-3]: len(path.read_bytes().splitlines()) for path in output.glob("trials/*/*/steps.jsonl")}


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def plant(folder: Path) -> Path:
    """Put states into a folder, newer than any, of the names that Ray Tune reads; the file that they would make."""
    made = folder.with_name("it-ran")
    folder.mkdir(exist_ok=True)
    code = pickle.dumps(Evil(made))
    stats = {"_type": "CLOUDPICKLE_FALLBACK", "value": code.hex()}
    state = {"trial_data": [], "runner_data": stats, "stats": {"start_time": 0}}
    (folder / "experiment_state-2999-01-01_00-00-00.json").write_text(json.dumps(state))
    for name in ("searcher-state-2999-01-01_00-00-00.pkl", "tuner.pkl", "trainable.pkl"):
        (folder / name).write_bytes(code)
    return made


def test_the_attack_is_one(tmp_path):
    """Ray Tune would run what is planted, if it read it."""
    made = plant(tmp_path / "tune")
    assert not made.exists()
    (state,) = (tmp_path / "tune").glob("experiment_state-*.json")
    TuneFunctionDecoder(allow_cloudpickle=True).decode(state.read_text())
    assert made.exists()


@pytest.mark.slow
def test_sigkill_of_the_driver_then_the_same_command(place):
    """Killed once one trial is finished and another trains, as Ray Tune writes its state: the first is kept, the other
    goes on where it was."""
    output = place / "killed"
    command = [sys.executable, "-m", "pipelines.tune", "--config", str(place / "tiny.yaml"), "--shards"]
    command += [str(place / "shards"), "--space", str(place / "rates.yaml"), "--trials", "2", "--output", str(output)]
    command += [
        "--set",
        "train.checkpoint_every=1",
        "--set",
        "tune.early_stop=false",
        "--set",
        "tune.concurrent=1",
        "--seconds",
        "8",
    ]
    command += ["--set", "schedule.kind=full"]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    first = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                             start_new_session=True)  # fmt: skip
    deadline = time.time() + PATIENCE_S
    while time.time() < deadline:
        finished = [p for p in output.glob("trials/*/trial.json") if '"finished"' in p.read_text()]
        running = [name for name, steps in steps_of(output).items() if steps >= 3]
        if len(finished) == 1 and len(running) == 2:
            break
        assert first.poll() is None
        time.sleep(0.1)
    os.killpg(first.pid, signal.SIGKILL)
    killed_s = time.time()
    assert first.wait() == -signal.SIGKILL
    kept = {path: path.read_bytes() for path in finished}
    before = steps_of(output)
    planted = plant(output / "tune")
    cut_off = [*state.read(output).folder.glob(f"{sweep.NAME}/experiment_state-*.json")]
    assert cut_off
    for path in cut_off:
        path.write_bytes(b"")
    second = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert second.returncode == 0, second.stdout + second.stderr
    assert not planted.exists(), "a state that lay in OUTPUT was run"
    result = json.loads((output / "result.json").read_text())
    assert set(before) == {row["id"] for row in result["trials"]} and result["counts"]["finished"] == 2
    assert all(path.read_bytes() == data for path, data in kept.items())
    going = next(name for name in before if name != finished[0].parent.name)
    lines = [json.loads(line) for line in (output / f"trials/{going}/seed-0/steps.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert lines[0]["time"] < killed_s < lines[-1]["time"], "it went on from a checkpoint"
    assert "Traceback" not in second.stdout + second.stderr


# -- what is refused, and what would be done


def refused(*arguments) -> str:
    result = CliRunner().invoke(tune.app, [str(a) for a in arguments])
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and "Traceback" not in result.output
    return lines[0]


def test_refusals_and_dry_run(place):
    common = ["--config", place / "tiny.yaml", "--shards", place / "shards", "--output", place / "refused"]
    assert "did you mean cei" in refused(*common, "--space", "ceii")
    assert "--seconds" in refused(*common, "--space", "cei", "--set", "train.seconds=null", "--set", "train.steps=9")
    assert "the grid has" in refused(*common, "--space", "cei", "--search", "grid")
    assert "tune.target_loss" in refused(*common, "--space", "cei", "--objectives", "seconds_to_target")
    assert "tune.search" in refused(*common, "--space", "cei", "--search", "pbt")
    assert "schedule.candidates" in refused(*common, "--space", "cei", "--set", "schedule.candidates=[2]")
    assert not (place / "refused").exists() or not list((place / "refused").iterdir())
    result = CliRunner().invoke(
        tune.app, [str(a) for a in (*common[:-1], place / "dry", "--space", "cei,candidates", "--dry-run")]
    )
    assert result.exit_code == 0, result.output
    assert "Would run 4 trials" in result.output and not (place / "dry").exists()


@pytest.mark.slow
def test_another_sweep_in_the_same_folder_is_refused(swept, place):
    with pytest.raises(UserError, match="choose another --output"):
        tune.run(wanted(place), spaces.read("cei"), place / "swept")


def test_trials_cannot_starve_each_other():
    """Whatever the cluster: all that run at once have their workers and at least a CPU to decode with."""
    for cpus in range(2, 40):
        for workers in (1, 2, 3):
            experiment = config.build({"train": {"seconds": 9, "workers": workers}})
            if cpus < workers + room.CPUS_FOR_DATA:
                with pytest.raises(UserError, match=r"train\.workers"):
                    sweep.share(experiment, config.Tune(), {"CPU": cpus}, cpus)
                continue
            share = sweep.share(experiment, config.Tune(), {"CPU": cpus}, cpus)
            taken = share.concurrent * workers * (1 + share.decode_cpus)
            assert share.concurrent >= 1 and taken <= cpus + 1e-9
            assert workers * share.decode_cpus >= room.CPUS_FOR_DATA - 1e-9


@pytest.mark.parametrize(
    ("asked", "share", "gpus"),
    [
        ("auto", None, "auto"),
        ("auto", {"gpus": "yes"}, "yes"),
        ("auto", {"gpus": "no"}, "no"),
        ("auto", {}, "auto"),  # begun by a version that kept no word of it
        ("no", {"gpus": "yes"}, "no"),
        ("yes", {"gpus": "no"}, "yes"),
    ],
)
def test_a_sweep_goes_on_with_gpus_if_it_began_with_them(asked, share, gpus):
    """Though none is there at the moment: trials are compared at equal seconds."""
    experiment = config.build({"train": {"seconds": 9, "gpus": asked}})
    begun = None if share is None else state.State(share, Path("x"))
    assert tune.as_begun(experiment, begun).train.gpus == gpus


@pytest.mark.parametrize("gpus", [False, True])
@pytest.mark.parametrize("decode", [None, 0.3, 1.0, 2.5])
@pytest.mark.parametrize(("concurrent", "trials"), [(None, 4), (1, 4), (3, 4), (8, 2)])
def test_what_a_sweep_waits_for_is_what_it_needs_and_no_more(decode, gpus, concurrent, trials):
    """Whatever it is, it can be shared out; and with any one of it less it cannot."""
    settings = config.Tune(concurrent=concurrent, trials=trials)
    for workers in (1, 2, 3, 7, 49):
        train = {"seconds": 9, "workers": workers, "gpus": "yes" if gpus else "no"}
        experiment = config.build({"train": train, "data": {"decode_cpus": decode}})
        needs = sweep.needs(experiment, settings, gpus)
        assert sweep.share(experiment, settings, needs, 8).concurrent >= min(concurrent or 1, trials)
        for name, count in needs.items():
            if (name, count) != ("GPU", 1):  # a cluster without any GPU is waited for before
                with pytest.raises(UserError, match=r"train\.workers|tune\.concurrent"):
                    sweep.share(experiment, settings, needs | {name: count - 1}, 8)
