"""`model.expert=both` through the real commands: both networks of a base like Wan 2.2 A14B are trained, one after the
other, and generate samples with both."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from entprog.config import ClipShape
from entprog.media import h264
from helpers import bases, real_clips, stores
from pipelines import generate, train

SHAPE = ClipShape(frames=5, height=32, width=32, fps=12)
SETTINGS = {
    "model.expert": "both", "data.held_out_clips": 1, "data.held_out_draws": 1, "train.steps": 3,
    "train.held_out_every": 3, "train.threads": 1, "train.samples": 1, "schedule.kind": "full",
    **{f"data.shape.{name}": value for name, value in SHAPE.model_dump().items()},
}  # fmt: skip


def command(job, *arguments):
    done = CliRunner().invoke(job.app, list(map(str, arguments)), env={"COLUMNS": "400"})
    assert done.exit_code == 0, done.output
    return done.output


def weights(folder: Path, part: str):
    return load_file(folder / part / "diffusion_pytorch_model.safetensors")


def changed(one, other) -> bool:
    return any(one[name].shape != tensor.shape or not one[name].equal(tensor) for name, tensor in other.items())


@pytest.mark.slow
def test_both_are_trained_to_the_end_and_drawn_with(tmp_path, monkeypatch, local_ray):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", stores.made(tmp_path))
    monkeypatch.chdir(tmp_path)
    bases.two_experts(tmp_path / "base", first_frame=True)
    rows = {"train": [[real_clips.row("cam01", "train", start_s, SHAPE) for start_s in (0.0, 0.3)]]}
    rows["held_out"] = [[real_clips.row("cam04", "held_out", 0.0, SHAPE)]]
    real_clips.write(tmp_path / "shards", rows, SHAPE)
    options = [word for name, value in SETTINGS.items() for word in ("--set", f"{name}={value}")]
    options += ["--base", tmp_path / "base", "--shards", tmp_path / "shards", "--output", tmp_path / "out"]
    command(train, *options)
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert list(result["phases"]) == ["high", "low"] and result["steps"] == 6
    model, high = tmp_path / "out" / "model", tmp_path / "out" / "high" / "model"
    assert model.resolve() == (tmp_path / "out" / "low" / "model").resolve()
    for part in ("transformer", "transformer_2"):
        assert changed(weights(model, part), weights(tmp_path / "base", part)), f"{part} is as it was"
    assert not changed(weights(model, "transformer"), weights(high, "transformer")), "the first one is kept"
    assert not changed(weights(high, "transformer_2"), weights(tmp_path / "base", "transformer_2"))
    about = json.loads((model / "entprog.json").read_text())
    assert about["expert"] == "low" and list((tmp_path / "out" / "low" / "samples" / "videos").glob("*.mp4"))
    index = json.loads((model / "model_index.json").read_text())
    assert index["boundary_ratio"] == 0.9 and {"transformer", "transformer_2"} <= index.keys()
    drawn = tmp_path / "drawn"
    command(
        generate, "--checkpoint", tmp_path / "out", "--shards", tmp_path / "shards", "--output", drawn, "--steps", 4
    )
    (clip,) = json.loads((drawn / "result.json").read_text())["clips"]
    frames = h264.decode_rgb(Path(clip["result"]).read_bytes())
    assert frames.shape == (5, 32, 32, 3) and np.ptp(frames) > 0
    assert "Already finished" in command(train, *options)
