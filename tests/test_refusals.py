"""What a command can know to be wrong before it starts, it refuses or notes then, in `--dry-run` too."""

import shlex
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from entprog import config, storage
from entprog.errors import UserError
from entprog.media import pose
from entprog.preparing import inputs
from helpers import real_clips
from helpers.commands import SETTINGS
from helpers.people import CLIPS
from pipelines import adapter, cli, prepare, status, train
from pipelines.cluster import launch, session
from pipelines.stream import decoding

WIDE = {"COLUMNS": "400"}


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A folder with shards of four clips and the settings of a short training."""
    folder = tmp_path_factory.mktemp("given")
    rows = {
        split: [[real_clips.row(name, split, start_s, CLIPS) for start_s in (0.0, 0.4)]]
        for name, split in (("cam01", "train"), ("cam04", "held_out"))
    }
    real_clips.write(folder / "shards", rows, CLIPS)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(SETTINGS))
    return folder


@pytest.fixture(autouse=True)
def without_ray(monkeypatch):
    monkeypatch.setattr(session, "ray_cluster", None)


def refused(app, *words) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words], env=WIDE)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert done.exit_code == 2 and len(lines) == 1, done.output
    return lines[0]


@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--memory-budget", "1KB"], "weights, gradients and moments of the smallest plan alone are"),
        (["--set", "model.attention=_native_cudnn"], "_native_cudnn does not run in float32 on a CPU here"),
        (["--set", "data.latents=require"], "hold no latents: make them with"),
        (["--output", "/proc/entprog/run"], "cannot write to output folder /proc/entprog/run"),
        (["--output", "{}/shards/run"], "lies in data.shards"),
        (["--output", ""], "--output is empty"),
        (["--output="], "--output is empty"),
        (["--set", "model.family=whole"], "unknown model.family 'whole'"),
    ],
)
def test_a_training_that_cannot_be(words, message, dry_run, given, tmp_path):
    command = ["--config", given / "tiny.yaml", "--shards", given / "shards", "--output", tmp_path / "out", *dry_run]
    line = refused(train.app, *command, *(word.format(given) for word in words))
    assert message in line and not (tmp_path / "out").exists() and not (given / "shards" / "run").exists()
    assert message != "unknown model.family 'whole'" or "whole" not in line.partition("there are:")[2]


def test_latents_of_another_network_are_not_what_is_required(given, tmp_path):
    (given / "shards" / "latents").mkdir()
    try:
        command = ["--config", given / "tiny.yaml", "--shards", given / "shards", "--output", tmp_path / "out"]
        assert "it has no VAE" in refused(train.app, *command, "--set", "data.latents=require")
    finally:
        (given / "shards" / "latents").rmdir()


def test_settings_that_will_not_do_what_they_say_are_noted(given, tmp_path):
    command = ["--config", given / "tiny.yaml", "--shards", given / "shards", "--output", tmp_path / "out", "--dry-run"]
    command += ["--set", "data.held_out_clips=2"]
    odd = ["data.batch_size=999", "data.held_out_clips=99", "train.warmup_steps=16", "train.drop.text=0.1"]
    more = [word for setting in odd for word in ("--set", setting)]
    for words, number in (([], 0), (more, 4)):
        done = CliRunner().invoke(train.app, [str(word) for word in (*command, *words)], env=WIDE)
        assert done.exit_code == 0, done.output
        assert sum(line.startswith("Note: ") for line in done.output.splitlines()) == number, done.output


@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--input", "", "--output", "out"], "--input is empty"),
        (["--input", ".", "--output", "."], "input and output are the same folder"),
        (["--input", "gone.csv", "--output", "out"], "none of the 1 files that the manifest names is there"),
        (["--input", "notes.md", "--output", "out"], "notes.md is no video by its name"),
        (["--input", ".", "--output", "s3://"], "s3:// names no bucket"),
        (["--input", ".", "--output", "out", "--frames", "99999999"], "data.shape.frames"),
        (
            ["--input", "*.md", "--output", "out"],
            "none of the 1 files of the glob is a video by its name, such as notes",
        ),
        (["--input", "a", "--output", "out", "--set", "prepare.pose=rtmlib"], "need rtmlib: pip install"),
    ],
)
def test_clips_that_cannot_be_prepared(words, message, dry_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pose, "find_spec", {"ai_edge_litert": True}.get)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "a.mp4").touch()
    (tmp_path / "gone.csv").write_text("path\nnowhere.mp4\n")
    (tmp_path / "notes.md").write_text("no video")
    assert message in refused(prepare.app, "--preset", "demo", *words, *dry_run)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "gone.csv", "notes.md"]


@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no clip shape: give --preset NAME or --frames --height --width --fps"),
        (["--preset", "finetune"], "no clip shape: give --preset NAME or --frames --height --width --fps"),
        (["--frames", "8", "--set", "data.shape.fps=12"], "the clip shape lacks --height --width:"),
    ],
)
def test_clips_of_a_shape_that_nobody_named(words, message, dry_run, tmp_path):
    (tmp_path / "a.mp4").touch()
    assert message in refused(prepare.app, "--input", tmp_path, "--output", tmp_path / "out", *words, *dry_run)
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_a_settings_file_names_the_shape(tmp_path):
    (tmp_path / "a.mp4").touch()
    (tmp_path / "mine.yaml").write_text("data: {shape: {frames: 8, height: 96, width: 64, fps: 12}}")
    words = [
        "--input",
        tmp_path / "a.mp4",
        "--output",
        tmp_path / "out",
        "--config",
        tmp_path / "mine.yaml",
        "--dry-run",
    ]
    done = CliRunner().invoke(prepare.app, [str(word) for word in words], env=WIDE)
    assert done.exit_code == 0 and "8 frames of" in done.output, done.output


@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
def test_addresses_that_cannot_be_ones(dry_run, given, tmp_path, monkeypatch):
    """MLflow's is what is said where both are wrong."""
    command = ["--config", given / "tiny.yaml", "--shards", given / "shards", "--output", tmp_path / "out", *dry_run]
    videos = ["--input", given, "--output", tmp_path / "out", "--preset", "demo", *dry_run]
    monkeypatch.setenv("RAY_ADDRESS", "nonsense")
    assert "RAY_ADDRESS=nonsense is no address of a cluster" in refused(train.app, *command)
    assert "RAY_ADDRESS=nonsense is no address of a cluster" in refused(prepare.app, *videos)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "mlruns")
    assert "MLFLOW_TRACKING_URI=mlruns is a folder" in refused(train.app, *command)
    assert not (tmp_path / "out").exists()


FP8 = ["schedule.frozen_precision=fp8", "model.dtype=bfloat16", "schedule.backward=residual", "train.gpus=no"]
AWAY = "gs://anonymous@bucket/run?scheme=http&endpoint_override=127.0.0.1:1&retry_limit_seconds=1"


@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["train.workers=9999", "train.gpus=no"], "needs 10000 CPUs (9999 for the workers, 1 for decoding), a Ray of"),
        (FP8, "schedule.frozen_precision=fp8 needs a GPU"),
    ],
)
def test_what_this_machine_lacks_is_refused_before_ray_starts(settings, message, dry_run, given, tmp_path):
    command = ["--config", given / "tiny.yaml", "--shards", given / "shards", "--output", tmp_path / "out", *dry_run]
    assert message in refused(train.app, *command, *(word for each in settings for word in ("--set", each)))
    assert not (tmp_path / "out").exists()


def test_a_finished_run_is_not_asked_for_the_room_that_it_had(given, tmp_path, monkeypatch):
    """It may have been made on a larger machine. It says that it is finished, and how it is trained on."""

    def claimed(workers, accumulate, *more):
        experiment = cli.settings(
            config.Experiment,
            None,
            [given / "tiny.yaml"],
            [f"train.workers={workers}", f"train.accumulate={accumulate}", "train.gpus=no", *more],
            data={"shards": str(given / "shards")},
        )
        train.claimed(experiment, tmp_path / "out")

    claimed(1, 9999)
    with pytest.raises(UserError, match="needs 10000 CPUs"):
        claimed(9999, 1)
    (tmp_path / "out" / "steps.jsonl").touch()
    with pytest.raises(UserError, match=r"--output$"):
        claimed(1, 9999, "train.steps=77")
    command = ["--config", given / "tiny.yaml", "--shards", given / "shards", "--output", tmp_path / "out"]
    command += ["--set", "train.accumulate=9999", "--set", "train.gpus=no"]
    dry = CliRunner().invoke(train.app, [*map(str, command), "--dry-run"], env=WIDE)
    assert "without --dry-run goes on from the start: there is no checkpoint yet" in dry.output
    (tmp_path / "out" / "finished.json").write_text('{"result": {"steps": 3}}')
    claimed(9999, 1)
    with pytest.raises(UserError, match=r"now 77.*; --base .*out/model there goes on from its weights"):
        claimed(1, 9999, "train.steps=77")
    with pytest.raises(UserError, match=r"--output$"):
        claimed(1, 9999, "train.steps=77", "train.learning_rate=0.5")
    monkeypatch.setattr(train, "session", None)  # no Ray is started for it
    for words in (command, [*command, "--dry-run"]):
        done = CliRunner().invoke(train.app, [*map(str, words)], env=WIDE)
        assert done.exit_code == 0 and f"Already finished: {tmp_path / 'out'}" in done.output, done.output


def test_a_dry_run_asks_who_must_answer_and_says_what_it_did_not_look_at(given, tmp_path, monkeypatch):
    command = ["--config", given / "tiny.yaml", "--shards", given / "shards", "--output", tmp_path / "out", "--dry-run"]
    place = tmp_path / "kept"
    done = CliRunner().invoke(train.app, [*map(str, command), "--set", f"train.checkpoints={place}"], env=WIDE)
    assert "Not looked at: whether MLflow's store and train.checkpoints can be written; what clips" in done.output
    assert done.exit_code == 0 and "nothing else is in the way" in done.output and not place.exists()
    (place / "step-00000001").mkdir(parents=True)
    (place / "step-00000001" / "state.json").write_text('{"experiment": "another", "files": {}}')
    line = refused(train.app, *command, "--set", f"train.checkpoints={place}")
    assert "holds step-00000001 of another training" in line
    line = refused(train.app, *command, "--set", f"train.checkpoints={AWAY}")
    assert "train.checkpoints: cannot look at gs://bucket/run" in line
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    assert "MLflow at http://127.0.0.1:1 cannot be used" in refused(train.app, *command)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept"]


def test_a_gpu_that_is_not_here_is_noted(given, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(decoding, "nodes_there", lambda: None)  # no cluster answers at that address
    command = ["--config", given / "tiny.yaml", "--shards", given / "shards", "--output", tmp_path / "out", "--dry-run"]
    for address, noted in (("", True), ("127.0.0.1:6379", False)):
        monkeypatch.setenv("RAY_ADDRESS", address)
        done = CliRunner().invoke(train.app, [*map(str, command), "--set", "train.gpus=yes"], env=WIDE)
        assert done.exit_code == 0 and ("Note: train.gpus=yes" in done.output) == noted, done.output
        assert ("nothing else is in the way" in done.output) != noted


def test_a_shape_that_shards_do_not_hold_ends_with_the_setting_that_does(given, tmp_path):
    command = ["--config", given / "tiny.yaml", "--shards", given / "shards", "--output", tmp_path / "out"]
    line = refused(train.app, *command, "--set", "data.shape.height=64")
    (pair,) = shlex.split(line.rpartition("--set ")[2])
    assert pair == "data.shape={frames: 8, height: 48, width: 32, fps: 12}"
    assert config.build(config.parse_overrides([pair]), config.Preparation).data.shape == CLIPS


def test_a_tilde_is_the_home_folder(given, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(given))
    assert storage.at("~/shards", "shards") == given / "shards" == storage.at(Path("~/shards"), "shards")
    assert launch._located("~/shards") == str(given / "shards")
    assert storage.at("~nobody-of-that-name/x", "shards") == Path("~nobody-of-that-name/x")
    (given / "a.mp4").touch()
    assert (
        [row["file"] for row in inputs.find("~/*.mp4").rows]
        == ["a.mp4"]
        == [row["file"] for row in inputs.find("~/a.mp4").rows]
    )
    done = CliRunner().invoke(
        train.app,
        ["--config", str(given / "tiny.yaml"), "--shards", "~/shards", "--output", "~/out", "--dry-run"],
        env=WIDE,
    )
    assert done.exit_code == 0 and str(given / "out" / "model") in done.output, done.output


@pytest.mark.parametrize(
    ("app", "words", "message"),
    [
        (prepare.app, [], "missing option '--output'; --help explains"),
        (prepare.app, ["--outptu", "x"], "no such option: --outptu (did you mean --output?); --help explains"),
        (prepare.app, ["--output", "x", "--frames", "abc"], "invalid value for '--frames': "),
        (prepare.app, ["--output", "x", "y"], "unexpected extra argument"),
        (adapter.app, ["extract", "--rank", "0"], "invalid value for '--rank': "),
        (adapter.app, ["merg"], "no such command 'merg'"),
        (adapter.app, ["--rnk"], "no such option: --rnk"),
    ],
)
def test_a_command_line_that_is_wrong(app, words, message):
    line = refused(app, *words)
    assert line.startswith("error: ") and message in line and line.endswith("; --help explains")


def test_an_empty_argument_is_not_the_current_folder():
    assert "an argument is empty" in refused(status.app, "")
