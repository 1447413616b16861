"""Google's buckets, by pyarrow's client against an emulator: data is read there, and a run's output written."""

from contextlib import closing
from functools import partial
from types import SimpleNamespace
from urllib.parse import parse_qs

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from entprog import config, files, storage
from entprog.config import ClipShape, Evaluation, Prepare
from entprog.data import clip_stream, shards
from entprog.errors import UserError
from entprog.models import folders
from entprog.preparing import inputs
from entprog.preparing.rows import is_video
from entprog.training import checkpoint
from helpers import real_clips, servers
from helpers.networks import tiny_denoiser, tiny_experiment
from helpers.runs import Trained
from pipelines import adapter, cli, evaluate, tune
from pipelines.generating import judging
from pipelines.outputs import claim
from pipelines.sweeping import spaces, state, trial
from pipelines.training import standing, steplog

SHAPE = ClipShape(frames=6, height=48, width=32, fps=12)


@pytest.fixture(scope="module")
def bucket():
    with servers.gs("runs") as address:
        yield address


def test_shards_are_read(bucket, tmp_path):
    rows = [real_clips.row("cam01", "train", 0.1 * i, SHAPE) for i in range(4)]
    local = real_clips.write(tmp_path, {"train": [rows[:3], rows[3:]], "held_out": [rows[:1]]}, SHAPE)
    storage.Place.at(bucket("shards")).upload(tmp_path)
    there = shards.read_dataset(bucket("shards"))
    shards.verify(there, "sha256")
    due = clip_stream.read(local, "train", np.array([3, 0, 2]))
    found = clip_stream.read(there, "train", np.array([3, 0, 2]))
    assert str(there.folder) == "gs://runs/shards" and all(np.array_equal(found[name], due[name]) for name in due)


def test_videos_in_folders_of_folders_are_found(bucket, monkeypatch):
    place = storage.Place.at(bucket("videos"))
    names = ["a.mp4", "deep/er/d.mp4", "one/b.mp4", "one/two/c.mp4"]
    for name in names:
        (place / name).write_bytes(b"x")
    endpoint = parse_qs(place.form[1])["endpoint_override"][0]
    monkeypatch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", f"http://{endpoint}")  # no address may choose it
    found = inputs.find("gs://anonymous@runs/videos", Prepare(), None)
    assert [row["file"] for row in found.rows] == names
    found = inputs.find("gs://anonymous@runs/videos/*/*.mp4", Prepare(), None)
    assert len(found.rows) == 1
    odd = ["dance #3.mp4", "sub#1/x.mp4", "what?.mp4"]  # of a bucket these are letters
    for name in odd:
        (storage.Place.at(bucket("odd")) / name).write_bytes(b"x")
    for asked in ("odd", "odd/m.csv"):
        found = inputs.find(f"gs://anonymous@runs/{asked}", Prepare(), None)
        assert [row["file"] for row in found.rows] == odd and all(map(is_video, found.rows))
        (storage.Place.at(bucket("odd")) / "m.csv").write_bytes("\n".join(["path", *odd]).encode())


def test_checkpoints_are_kept_and_the_old_ones_go(bucket):
    run, where = Trained(layers=1), bucket("run/checkpoints")
    with closing(checkpoint.Saver(where, "id", keep=1, warn=pytest.fail)) as saver:
        for step in (1, 2, 3):
            run.state.step = step
            saver.save(run.network, run.state)
    assert checkpoint.found(where) == ["step-00000003"] == storage.Place.at(where).folders()
    again = Trained(steps=0, layers=1)
    checkpoint.load(where, "step-00000003", again.network, again.state, "id")
    assert again.state.step == 3


def test_an_output_is_claimed_written_and_looked_at(bucket):
    output = cli.output_of(bucket("output"))
    claim.take(output, "train", {"train.steps": 4})
    claim.release(output, [])
    assert not output.exists(), "what was refused leaves nothing"
    claim.take(output, "train", {"train.steps": 4})
    log = steplog.StepLog(output / "steps.jsonl", 0, pytest.fail)
    log.add({"step": 1, "charged_s": 0.5, "flops": 1.0, "held_out_loss": None, "time": 10.0})
    log.keep()
    log.close()
    steplog.warn(output, "a slow disk")
    files.write_json(output / "finished.json", {})
    seen = standing.read(output, now_s=11.0)
    assert (seen.state, len(seen.steps), seen.warnings[0]["warning"]) == ("finished", 1, "a slow disk")


def test_clips_are_made_and_judged_there(bucket, tmp_path):
    """By the actors of `evaluate`, and again by one that is given them."""
    rows = [real_clips.row("cam01", "train", 0.2 * i, SHAPE) for i in range(2)]
    real_clips.write(tmp_path / "shards", {"train": [rows], "held_out": [rows]}, SHAPE)
    tiny_denoiser(tiny_experiment()).save(tmp_path / "model", shape=SHAPE)
    chosen = Evaluation.model_validate({"evaluate": {"metrics": ["psnr"]}, "generate": {"steps": 1}})
    output = storage.Place.at(bucket("judged"))
    task = evaluate.plan(str(tmp_path / "model"), tmp_path / "shards", output, chosen)
    assert len(task.missing) == 2
    columns = {name: np.array([vars(place)[name] for place in task.places]) for name in vars(task.places[0])}
    judging.Generator(task.maker, task.settings.generate, None)(columns)
    names = [f"generated/{place.clip.name}" for place in task.places]
    assert output.below().keys() == set(names) and task.missing == []
    found = judging.Judge(("psnr",), SHAPE, chosen.evaluate, "cpu")(columns)
    assert 0 < min(found["value/psnr"]) <= max(found["value/psnr"]) < 20
    folder = storage.Place.at(bucket("judged/generated"))
    given = evaluate.plan(None, tmp_path / "shards", tmp_path / "out", chosen, generated=folder)
    assert [str(place.clip) for place in given.places] == [f"gs://runs/judged/{name}" for name in names]
    victim = task.places[0].clip
    victim.write_bytes(victim.read_bytes()[:200])
    with pytest.raises(UserError, match=f"generated clip cannot be read: gs://runs/judged/{names[0]}: "):
        judging.read_result(victim, (6, 48, 32, 3))
    victim.unlink()
    with pytest.raises(UserError, match="--generated: gs://runs/judged/generated has no clip for"):
        evaluate.plan(None, tmp_path / "shards", tmp_path / "out", chosen, generated=folder)


def test_a_sweep_is_written_down_there(bucket, tmp_path, monkeypatch):
    """A trial that has finished, one that was stopped, and one that never began."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    output = storage.Place.at(bucket("sweep"))
    begun = state.begin(output, {"concurrent": 1})
    assert state.read(output) == begun and begun.folder.is_relative_to(tmp_path)
    loss = {"held_out_loss": 0.3, "seconds": 60.0, "search_seconds": 5.0, "score_seconds": 1.0, "steps": 3}
    seed = loss | {"seed": 0, "peak_memory_bytes": 9, "seconds_to_target": None, "mlflow_run_id": "x"}
    seed["curve"] = [(30.0, 0.5), (60.0, 0.3)]
    for name, more in (("a", {"status": "finished", "seeds": [seed], **trial.summary([seed])}), ("b", {})):
        folder = trial.folder_of(output, name)
        record = {"id": name, "settings": {"train.learning_rate": 1e-3}, "status": "running", "seeds": []}
        log = steplog.StepLog(folder / "seed-0" / "steps.jsonl", 0)
        for number in (1, 2):
            step = {"step": number, "charged_s": 30.0 * number, "held_out_loss": 1 / number, "memory_bytes": 1}
            log.add(step | {"stage": 0, "phase": "train", "seconds": 1.0, "wait_s": 0.0})
        log.keep()
        log.close()
        files.write_json(folder / trial.RECORD, record | more)
        told = []
        trial.Ticks(90.0, 3, partial(trial._reported, told.append, folder, record | more)).resume(folder / "seed-0")
        assert [tick["held_out_loss"] for tick in told] == [1.0, 0.5]
        (folder / "seed-0" / "checkpoints" / "step-1" / "x").write_bytes(b"x")
    assert [(name, report["tick"]) for name, report in trial.reports(output)] == [
        ("a", 1),
        ("a", 2),
        ("b", 1),
        ("b", 2),
    ]
    rows = [tune._row(output, name, "TERMINATED") for name in "abc"]
    assert [row["status"] for row in rows] == ["finished", "stopped", "failed"] and rows[1]["held_out_loss"] == 0.5
    wanted = config.build({"train": {"seconds": 90}, "tune": {"trials": 3}}, config.Sweep)
    (tmp_path / "space.yaml").write_text("train.learning_rate: {loguniform: [1.0e-4, 1.0e-2]}\n")
    kept = []
    tracker = SimpleNamespace(artifact=kept.append, summary=dict, tags=dict, run_id="x")
    result = tune._leave(wanted, spaces.read(str(tmp_path / "space.yaml")), rows, output, tracker)
    assert result["best"]["config"] == "gs://runs/sweep/best.yaml" and all(file.is_file() for file in kept)
    best = cli.settings(config.Experiment, None, [bucket("sweep/best.yaml")], [])
    assert best.train.learning_rate == 1e-3
    with pytest.raises(UserError, match=r"no such settings file: gs://runs/sweep/none\.yaml"):
        cli.settings(config.Experiment, None, [bucket("sweep/none.yaml")], [])
    storage.remove(trial.folder_of(output, "a") / "seed-0" / "checkpoints")
    assert not [name for name in output.below() if "a/seed-0/checkpoints" in name]


def test_an_adapter_is_extracted_and_merged_there(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("ENTPROG_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    experiment = tiny_experiment()
    for number, name in enumerate(("before", "after")):
        tiny_denoiser(experiment, number).save(tmp_path / name / "model")
    storage.Place.at(bucket("after")).upload(tmp_path / "after")

    def run(*words):
        done = CliRunner().invoke(adapter.app, [str(word) for word in words], env={"COLUMNS": "400"})
        assert done.exit_code == 0, done.output
        return done.output

    extracted = "--before", "before/model", "--after", bucket("after"), "--output", bucket("extracted")
    assert ": gs://runs/extracted/adapter" in run("extract", *extracted, "--rank", 64)
    storage.fetched(storage.Place.at(bucket("extracted/adapter")), ["*"], tmp_path / "adapter")
    run("merge", "--adapter", "adapter", "--base", "before/model", "--output", bucket("merged"))
    merged = load_file(folders.locate(bucket("merged"), "it") / "transformer" / f"{folders.STEM}.safetensors")
    after = load_file(tmp_path / "after" / "model" / "transformer" / f"{folders.STEM}.safetensors")
    assert merged.keys() == after.keys()
    for name, value in after.items():
        torch.testing.assert_close(merged[name], value, rtol=1e-3, atol=1e-4)


def test_a_model_is_saved_and_fetched(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("ENTPROG_CACHE", str(tmp_path))
    with storage.scratch_for(storage.Place.at(bucket("trained/model")), last=folders.ABOUT) as folder:
        tiny_denoiser(tiny_experiment()).save(folder)
    root = folders.locate(bucket("trained"), "model.base")
    weights = root / "transformer" / f"{folders.STEM}.safetensors"
    before = weights.stat().st_ino
    (root / "of_before.json").write_text("{}")
    assert folders.locate(bucket("trained/model"), "model.base") == root and weights.stat().st_ino == before
    assert not (root / "of_before.json").exists()
    assert folders.saved(root)["family"] == "wan"
