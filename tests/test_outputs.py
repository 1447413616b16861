"""OUTPUT belongs to the job that began in it: attacks on files that are not its own, through the real commands.

Nothing here starts Ray: what is refused is refused before, and what is not stops where Ray would be started.
"""

import contextlib
import hashlib
import importlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
import ray
import yaml
from filelock import FileLock
from PIL import Image
from typer.testing import CliRunner

from entprog import config, files, models
from entprog.errors import UserError
from entprog.media import assets
from entprog.preparing import ledger
from entprog.training import checkpoint
from helpers import real_clips
from helpers.commands import SETTINGS
from helpers.people import CLIPS
from helpers.runs import Trained
from pipelines import cli, train
from pipelines.cluster import session
from pipelines.outputs import claim
from pipelines.preparing import packing
from pipelines.sweeping import state
from pipelines.training import standing

JOBS = ("prepare", "score", "train", "tune", "generate", "evaluate", "compare", "demo")
WITH_RAY = ("prepare", "score", "train", "tune", "evaluate", "demo")
OTHERS = {
    "prepare": (["--set", "prepare.margin=0.3"], "prepare.margin was 0.15, now 0.3"),
    "score": (["--set", "priority.draws=6"], "priority.draws was 4, now 6"),
    "train": (["--set", "train.steps=17"], "train.steps was 16, now 17"),
    "tune": (["--trials", "3"], "tune.trials was 2, now 3"),
    "generate": (["--seed", "5"], "generate.seed was 0, now 5"),
    "evaluate": (["--set", "generate.steps=7"], "steps was 20, now 7"),
    "compare": (["--runs", "abcdef"], '--runs was [], now ["abcdef"]'),
    "demo": (["--seconds", "7"], "train.seconds was 80.0, now 7.0"),
}
"""Another setting of each job, and what is said of it."""
FOREIGN = (
    "notes.txt", "model/weights.safetensors", "checkpoints/mine.partial/x", "checkpoints/step-00000001/state.json",
    "train/00000.parquet", "held_out/00000.parquet", "parts/0123456789abcdef.json", "ledger.parquet", "result.json",
    "ledger.next.parquet", "error.log", "steps.jsonl", "cei.json", "sweep.json", "trials/a/seed-0/checkpoints/x",
    "videos/000_clip.mp4", "sheet.png", "evaluation.json", "generated/clip.mp4", "comparison.html", "base/config.json",
    "tune/experiment_state-1.json", "mlflow_run.json",
)  # fmt: skip
"""Files of the names that jobs write, remove or replace."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """{job: its command without --output}."""
    folder = tmp_path_factory.mktemp("inputs")
    rows = [[real_clips.row(name, split, s, CLIPS) for s in (0.0, 0.4)] for name, split in
            (("cam01", "train"), ("cam04", "held_out"))]  # fmt: skip
    real_clips.write(folder / "shards", {"train": rows[:1], "held_out": rows[1:]}, CLIPS)
    (folder / "videos").mkdir()
    (folder / "videos" / "cam01.mp4").symlink_to(assets.clip("cam01"))
    (folder / "tiny.yaml").write_text(yaml.safe_dump(SETTINGS))
    (folder / "space.yaml").write_text("train.learning_rate: {loguniform: [1e-4, 1e-2]}\n")
    experiment = config.build(SETTINGS)
    models.family("wan").load(experiment.model, "cpu", 0).save(folder / "run" / "model", shape=CLIPS)
    Image.fromarray(np.zeros((48, 32, 3), np.uint8)).save(folder / "me.png")
    of_training = ["--config", folder / "tiny.yaml", "--shards", folder / "shards"]
    made = ["--checkpoint", folder / "run", "--shards", folder / "shards"]
    return {
        "prepare": ["--input", folder / "videos", "--frames", 8, "--height", 48, "--width", 32, "--fps", 12],
        "score": [*of_training, "--tables", folder / "tables"],
        "train": of_training,
        "tune": [
            *of_training,
            "--space",
            folder / "space.yaml",
            "--trials",
            2,
            "--seconds",
            5,
            "--set",
            "schedule.clock=seconds",
        ],
        "generate": [*made, "--steps", 1, "--count", 1],
        "evaluate": [*made, "--metrics", "psnr"],
        "compare": [],
        "demo": [],
    }


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder, in which Ray ends as if Ctrl-C was pressed while it starts."""

    @contextlib.contextmanager
    def interrupted(*_, **__):
        raise KeyboardInterrupt
        yield

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(session, "ray_cluster", interrupted)
    return tmp_path


def run(job, *arguments):
    app = importlib.import_module(f"pipelines.{job}").app
    return CliRunner().invoke(app, [str(a) for a in arguments])


def refused(job, *arguments) -> str:
    done = run(job, *arguments)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert done.exit_code == 2 and len(lines) == 1, done.output + done.stderr
    return lines[0]


def everything(folder) -> dict[str, tuple[str, int]]:
    """{path: (hash, time of change)} of all files and folders."""
    return {
        str(path.relative_to(folder)): (
            hashlib.sha256(path.read_bytes() if path.is_file() else b"").hexdigest(),
            path.stat().st_mtime_ns,
        )
        for path in sorted(folder.rglob("*"))
    }


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def put(folder, paths) -> None:
    for name in paths:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"mine: {name}")


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("job", JOBS)
def test_a_folder_of_somebody_else_is_left_as_it_is(job, dry_run, inputs, place):
    put(place / "out", FOREIGN)
    before = everything(place)
    said = refused(job, *inputs[job], "--output", place / "out", *(["--dry-run"] if dry_run else []))
    assert str(place / "out") in said and "choose another --output" in said and "checkpoints" in said
    assert everything(place) == before and not ray.is_initialized()


def test_two_commands_are_not_at_work_in_one_folder(inputs, place):
    """The second one, of whatever process, is refused; a lock of one that was killed holds nobody up."""
    output = place / "out"
    assert run("train", *inputs["train"], "--output", output).exit_code == 1, "stopped where Ray would start"
    path = str(output / claim.LOCK)
    hold = f"import filelock; lock = filelock.FileLock({path!r}); lock.acquire(); print(flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        other.stdout.readline()
        before = everything(output)
        said = refused("train", *inputs["train"], "--output", output)
        assert f"another command is at work in {output} (process {os.getpid()} on {socket.gethostname()}): " in said
        assert said.strip().endswith(f"if its machine is gone, remove {path}")
        assert everything(output) == before
    finally:
        other.kill()
        other.wait()
    assert run("train", *inputs["train"], "--output", output).exit_code == 1


@pytest.mark.parametrize("name", ["notes.txt", "model", ".hidden"])
def test_one_foreign_file_is_enough(name, inputs, place):
    put(place / "out", [name])
    assert name in refused("train", *inputs["train"], "--output", place / "out")
    assert names(place / "out") == [name]


@pytest.mark.parametrize("job", JOBS)
def test_another_setting_is_refused_with_both_values_and_the_same_goes_on(job, inputs, place):
    output = place / "out"
    if job == "compare":  # it needs no Ray, and here are no runs to compare
        claim.take(output, "compare", {"--experiment": "entprog", "--runs": []})
    else:
        first = run(job, *inputs[job], "--output", output)
        assert first.exit_code == (1 if job in WITH_RAY else 0), first.output
        assert json.loads((output / "result.json").read_text())["job"] == job
    put(output, ["since.txt"])
    before = everything(place)
    other, message = OTHERS[job]
    for dry_run in ([], ["--dry-run"]):
        said = refused(job, *inputs[job], *other, "--output", output, *dry_run)
        assert message in said and "choose another --output" in said
        assert everything(place) == before, "a refused command changed something"
    someone = next(name for name in JOBS if name != job)
    assert re.search(rf"output of an? {job} job", refused(someone, *inputs[someone], "--output", output))
    assert everything(place) == before
    if job in WITH_RAY:
        assert run(job, *inputs[job], "--output", output).exit_code == 1, "the same command goes on, up to Ray"


def test_what_a_resumed_run_may_change_is_no_other_setting(inputs, place):
    output = place / "out"
    run("train", *inputs["train"], "--output", output)
    free = {"train.workers": 2, "train.max_failures": 9, "data.decode_cpus": 1, "tracking.run_name": "other"}
    more = [word for name, value in free.items() for word in ("--set", f"{name}={value}")]
    done = run("train", *inputs["train"], *more, "--set", "train.accumulate=1", "--output", output)
    assert done.exit_code == 2 and "accumulate was 1, now 2" in done.stderr, "an update of twice as many batches"
    assert run("train", *inputs["train"], *more[2:], "--output", output).exit_code == 1


def test_other_clips_and_other_weights_are_another_identity(inputs, place):
    output, base = place / "out", place / "base"
    experiment = config.build(SETTINGS)
    for seed, said in ((0, None), (1, "weights of model.base was")):
        models.family("wan").load(experiment.model, "cpu", seed).save(base, shape=CLIPS)
        arguments = [*inputs["train"], "--base", base, "--set", "model.init={}", "--output", output]
        if said is None:
            run("train", *arguments)
        else:
            assert said in refused("train", *arguments)
    rows = [real_clips.row("cam01", split, 0.8, CLIPS) for split in ("train", "held_out")]
    real_clips.write(place / "shards", {"train": [rows[:1]], "held_out": [rows[1:]]}, CLIPS)
    said = refused("train", *inputs["train"][:2], "--shards", place / "shards", "--base", base, "--set",
                   "model.init={}", "--output", output)  # fmt: skip
    assert "clips of data.shards was" in said


def test_phases_are_part_of_what_a_training_is(inputs, place):
    output = place / "out"
    phases = lambda steps: ["--set", f"phases={{one: {{train: {{steps: 4}}}}, two: {{train: {{steps: {steps}}}}}}}"]  # noqa: E731
    assert run("train", *inputs["train"], *phases(5), "--output", output).exit_code == 1, "up to Ray"
    assert "(two: train.steps was 5, now 6)" in refused("train", *inputs["train"], *phases(6), "--output", output)
    assert 'phases was ["one", "two"], now []' in refused("train", *inputs["train"], "--output", output)
    assert run("train", *inputs["train"], *phases(5), "--output", output, "--dry-run").exit_code == 0


REFUSED = {
    "result.json": '{"job": "train", "status": "refused", "error": "clip 7 is damaged"}', "mlflow_run.json": "{}",
    "warnings.jsonl": "{}", "steps.jsonl": "", "cei/KEY.json": "{}",
}  # fmt: skip
"""What workers leave that refuse what they are to train on."""
WORTH = {
    "a step": {"steps.jsonl": "{}\n"},
    "a checkpoint, half written": {"checkpoints/step-00000002/part-00001-of-00002.safetensors": "x"},
    "a phase": {"high/steps.jsonl": "{}\n"},
    "a file of mine": {"notes.txt": "x"},
    "not refused": {"result.json": '{"job": "train", "status": "interrupted"}'},
}


def leave(output, texts):
    for name, text in texts.items():
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_text(text)


def test_of_a_training_that_its_workers_refused_the_corrected_command_takes_the_place(inputs, place):
    """It has trained nothing: what it has left goes, but for tables of scores."""
    output, corrected = place / "out", [*inputs["train"], "--set", "train.learning_rate=0.5"]
    assert run("train", *inputs["train"], "--output", output).exit_code == 1, "up to Ray"
    leave(output, REFUSED)
    (output / "checkpoints").mkdir()
    before = everything(place)
    assert run("train", *corrected, "--output", output, "--dry-run").exit_code == 0 and everything(place) == before
    done = run("train", *corrected, "--output", output)
    assert done.exit_code == 1 and json.loads((output / "result.json").read_text())["status"] == "interrupted"
    assert done.stderr == "interrupted: the same command resumes\n"
    assert dict(standing.rows(standing.read(output)))["state"].startswith(
        "interrupted (Ctrl-C, or told to stop): the sa"
    )
    left = {"entprog-job.json", "result.json", "steps.jsonl", "cei", "checkpoints", claim.LOCK}
    assert set(names(output)) == left and (output / "cei" / "KEY.json").exists()
    assert "learning_rate was 0.5, now 0.001" in refused("train", *inputs["train"], "--output", output), "its own now"


def test_who_is_interrupted_reads_where_the_same_command_resumes(tmp_path):
    trained = Trained(steps=2)
    assert train._resumes(trained.experiment, tmp_path) == "from the start: there is no checkpoint yet"
    checkpoint.save(tmp_path / "checkpoints", trained.network, trained.state, "id", keep=1)
    assert train._resumes(trained.experiment, tmp_path) == "after step 2"


@pytest.mark.parametrize("worth", WORTH)
def test_of_a_training_that_has_trained_nothing_is_taken(worth, inputs, place):
    output, corrected = place / "out", [*inputs["train"], "--set", "train.learning_rate=0.5"]
    assert run("train", *inputs["train"], "--output", output).exit_code == 1, "up to Ray"
    leave(output, REFUSED | WORTH[worth])
    before = everything(place)
    for dry_run in ([], ["--dry-run"]):
        assert "holds a train job of other settings" in refused("train", *corrected, "--output", output, *dry_run)
        assert everything(place) == before


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("job", [*WITH_RAY, "generate"])
def test_a_command_that_is_refused_later_leaves_nothing(job, there, inputs, place, monkeypatch):
    """Here for a cluster, or a GPU, that is not there: the same output can be taken with other settings then."""

    def away(*_, **__):
        raise UserError("no Ray cluster answers")

    monkeypatch.setattr(session, "ray_cluster", away)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    output = place / "deep" / "er" / "out"
    if there:
        output.mkdir(parents=True)
    before = everything(place)
    gpus = ["--set", "generate.gpus=yes"] if job == "generate" else []
    said = refused(job, *inputs[job], *gpus, "--output", output)
    assert ("torch sees no GPU" if gpus else "no Ray") in said
    assert everything(place).keys() == before.keys() and output.exists() == there


def test_a_crash_before_the_claim_writes_nothing(place):
    put(place / "out", ["error.log", "result.json"])
    before = everything(place)

    def work():
        raise RuntimeError("a mistake of ours")

    with contextlib.suppress(cli.typer.Exit):
        cli.run("train", place / "out", work)
    assert everything(place) == before


@pytest.mark.parametrize("content", ["", "{", "[]", '{"job": 3, "identity": {}}', '{"job": "train"}'])
def test_a_damaged_mark_is_one_line(content, inputs, place):
    put(place / "out", ["x"])
    (place / "out" / claim.MARK).write_text(content)
    assert "is damaged" in refused("train", *inputs["train"], "--output", place / "out")


def test_an_output_that_is_a_file(inputs, place):
    (place / "out").write_text("mine")
    assert "cannot write to output folder" in refused("score", *inputs["score"], "--output", place / "out")
    assert (place / "out").read_text() == "mine"


# ---- prepare: inside its own folder, too, it removes and replaces what it wrote down alone


def test_shards_and_parts_that_prepare_did_not_write_stay(tmp_path):
    parts = tmp_path / "parts"
    put(tmp_path, ["parts/notes.txt", "train/00007.parquet", "train/00001.parquet", "train/00002.parquet"])
    for number in (1, 2):
        (parts / f"train-0000{number}.parquet.done").write_text("{}")
    plan = {"file": "train/00002.parquet", "split": "train", "clips": []}
    mine = {"train/00000.parquet": "in the way"}
    put(tmp_path, mine)
    with pytest.raises(UserError, match=r"00000\.parquet is in the way"):
        packing.pack_all(None, [plan, {**plan, "file": "train/00000.parquet"}], tmp_path, CLIPS, {})
    packing.pack_all(None, [], tmp_path, CLIPS, {})
    assert names(tmp_path / "train") == ["00000.parquet", "00007.parquet"], "only those written down"
    packing.remove_parts(parts)
    assert names(parts) == ["notes.txt"]


def test_an_unmarked_dataset_of_before_is_recognised(inputs, place):
    """What a version without marks has finished, or begun with the same settings, goes on; other settings do not."""
    begun = place / "begun"
    run("prepare", *inputs["prepare"], "--output", begun)
    identity = json.loads((begun / claim.MARK).read_text())["identity"]
    cut = packing.cut_settings(config.build({"data": {"shape": CLIPS.model_dump()}}, config.Preparation))
    (begun / "prepare.json").write_text(json.dumps(cut))
    assert config.flat(cut) == identity
    (begun / claim.MARK).unlink()
    assert "choose another" in refused("prepare", *inputs["prepare"], *OTHERS["prepare"][0], "--output", begun)
    assert run("prepare", *inputs["prepare"], "--output", begun).exit_code == 1, "up to Ray"
    (rows,) = [[real_clips.row("cam01", "train", 0.0, CLIPS)]]
    finished = real_clips.write(place / "shards", {"train": [rows], "held_out": []}, CLIPS)
    ledger.write(place / "shards" / "ledger.parquet", [])
    assert packing.identity_of(finished).items() <= identity.items()
    claim.check(finished.folder, "prepare", packing.identity_of(finished), earlier=True)


# ---- tune: what it unpickles is its own


@pytest.fixture
def states(place, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(place / "state"))
    (place / "out").mkdir()
    return place / "state" / "entprog" / "sweeps"


def test_the_state_of_a_sweep_is_its_users_alone(states, place):
    share = {"concurrent": 1, "decode_cpus": 2.0, "threads": 1}
    assert state.read(place / "out") is None
    begun = state.begin(place / "out", share)
    assert state.read(place / "out") == begun and begun.share == share and begun.folder.parent == states
    assert {path.stat().st_mode & 0o777 for path in (states, begun.folder)} == {0o700}


def test_a_copy_of_a_sweep_does_not_go_on_in_its_state(states, place, monkeypatch):
    """A moved one does; nor do two commands in one state, whose bucket has no locks."""
    first, copied = place / "out", place / "copied"
    begun = state.begin(first, {})
    state.take(begun, first)
    shutil.copytree(first, copied)
    assert state.read(first) == begun
    (place / "mounted").symlink_to(first)
    files.write_json(begun.folder / state.WHERE, {"output": str(place / "mounted")})
    assert state.read(first) == begun, "the same folder by another name"
    away = place / ("a" * 300)  # raises OSError, as a bucket does
    files.write_json(begun.folder / state.WHERE, {"output": str(away)})
    with pytest.raises(UserError, match=f"still lies in {away} too"):
        state.read(first)
    state.take(begun, first)
    with pytest.raises(UserError, match=rf"is a copy of that in {first}, and both would go on in one state"):
        state.read(copied)
    shutil.rmtree(first)
    with claim.alone():
        with FileLock(begun.folder / claim.LOCK), pytest.raises(UserError, match="another command is at work in "):
            state.take(state.read(copied), copied)
        state.take(state.read(copied), copied)
    (place / "out").mkdir()
    state.begin(place / "out", {})  # another one
    assert state.read(copied) == begun


def _another(folder):
    moved = folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to(moved)


@pytest.mark.parametrize(
    ("attack", "said"),
    [
        (lambda out, folder: folder.chmod(0o770), "open to others"),
        (lambda out, folder: folder.chmod(0o702), "open to others"),
        (lambda out, folder: folder.parent.chmod(0o777), "open to others"),
        (lambda out, folder: _another(folder), "no folder"),
        (lambda out, folder: (folder.rmdir(), folder.write_text("")), "no folder"),
        (lambda out, folder: folder.rmdir(), "another machine"),
        (lambda out, folder: (out / "sweep.json").write_text('{"id": "../../out/tune", "share": {}}'), "is damaged"),
        (lambda out, folder: (out / "sweep.json").write_text('{"id": ["a"], "share": {}}'), "is damaged"),
        (lambda out, folder: (out / "sweep.json").write_text('{"share": {}}'), "is damaged"),
        (lambda out, folder: (out / "sweep.json").write_text("{"), "is damaged"),
    ],
)
def test_a_state_that_somebody_else_could_have_written_is_not_taken_up(attack, said, inputs, states, place):
    output = place / "out"
    assert run("tune", *inputs["tune"], "--output", output).exit_code == 1, "up to Ray"
    begun = state.begin(output, {"concurrent": 1, "decode_cpus": 2.0, "threads": 1})
    attack(output, begun.folder)
    before = everything(place)
    for dry_run in ([], ["--dry-run"]):
        assert said in refused("tune", *inputs["tune"], "--output", output, *dry_run)
    assert everything(place) == before
