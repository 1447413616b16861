"""Google's buckets, by pyarrow's client against an emulator: data is read there, and a run's output written."""

from contextlib import closing
from urllib.parse import parse_qs

import numpy as np
import pytest

from entprog import files, storage
from entprog.config import ClipShape, Prepare
from entprog.data import clip_stream, shards
from entprog.models import folders
from entprog.preparing import inputs
from entprog.training import checkpoint
from helpers import real_clips, servers
from helpers.networks import tiny_denoiser, tiny_experiment
from helpers.runs import Trained
from pipelines import cli
from pipelines.outputs import claim
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
    log.add({"step": 1, "charged_s": 0.5, "time": 10.0})
    log.keep()
    log.close()
    steplog.warn(output, "a slow disk")
    files.write_json(output / "finished.json", {})
    seen = standing.read(output, now_s=11.0)
    assert (seen.state, len(seen.steps), seen.warnings[0]["warning"]) == ("finished", 1, "a slow disk")


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
