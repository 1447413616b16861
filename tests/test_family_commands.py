"""The real commands on every family beside Wan, on real clips: train, generate, evaluate, compare."""

import json
import os
from pathlib import Path

import diffusers
import mlflow
import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from entprog import models
from entprog.config import ClipShape
from entprog.media import h264
from helpers import stores
from helpers.families import TINY
from helpers.real_clips import row, write
from pipelines import compare, evaluate, generate, train
from pipelines.generating import judging
from pipelines.tracking.store import connect, tracking_uri

SHAPE = ClipShape(frames=4, height=32, width=32, fps=12)
SETTINGS = {
    "data": {"shape": SHAPE.model_dump(), "held_out_clips": 1, "held_out_draws": 1},
    "train": {"steps": 3, "held_out_every": 3, "workers": 1, "threads": 1, "samples": 0},
    "priority": {"conditions": 2, "draws": 4},
    "schedule": {"stages": 2, "candidates": [0.5, 1.0], "search_steps": 1, "search_share": 0.9, "clock": "flops"},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory, local_ray):
    """A working folder with MLflow's store and shards of real clips in it."""
    folder = tmp_path_factory.mktemp("families")
    before = Path.cwd()
    os.environ["MLFLOW_TRACKING_URI"] = stores.made(folder)
    os.chdir(folder)
    splits = {"train": [[row("cam01", "train", start_s, SHAPE) for start_s in (0.0, 0.3)]]}
    splits["held_out"] = [[row("cam04", "held_out", start_s, SHAPE) for start_s in (0.0, 0.3)]]
    write(folder / "shards", splits, SHAPE)
    try:
        yield folder
    finally:
        os.chdir(before)
        del os.environ["MLFLOW_TRACKING_URI"]


def command(job, output: Path, *arguments) -> dict:
    """Run a job by its own command line: its result.json."""
    done = CliRunner().invoke(job.app, [str(a) for a in (*arguments, "--output", output)])
    assert done.exit_code == 0, done.output
    return json.loads((output / "result.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TINY if name not in ("wan", "cogvideox15")])
def test_a_family_is_trained_generated_with_judged_and_shown(place, name):
    tiny, folder = TINY[name], place / name
    folder.mkdir()
    model = {"family": tiny["family"], "init": tiny["init"], "vae": "none", "dtype": "float32"}
    (folder / "tiny.yaml").write_text(yaml.safe_dump({**SETTINGS, "model": model}))
    given = ["--config", folder / "tiny.yaml", "--shards", place / "shards"]
    trained = command(train, folder / "run", *given, "--set", f"tracking.model_name={name}")
    assert trained["steps"] == 3 and len(trained["decisions"]) == 2 and np.isfinite(trained["losses"]).all()
    assert 0 < len(trained["decisions"][0]["plan"]["trainable"]) <= len(trained["blocks"])
    family = models.family(tiny["family"])
    network, part = getattr(diffusers, family.CLASS), family.DENOISER.PART
    network.from_pretrained(folder / "run" / "model" / part)

    how = ["--checkpoint", folder / "run", "--shards", place / "shards"]
    made = command(generate, folder / "clips", *how, "--steps", 2, "--without", "pose")
    assert len(made["clips"]) == 2 and all(clip["difference"] > 0 for clip in made["clips"]), "pose is seen"
    alone = ["--set", "evaluate.workers=1"]  # of several actors: test_evaluate
    judged = command(evaluate, folder / "judged", *how, *alone, "--metrics", "psnr,ssim", "--set", "generate.steps=2")
    assert judged["generated_now"] == 2 and judged["mlflow_run_id"] == trained["mlflow_run_id"]
    kept = connect(tracking_uri()).get_run(trained["mlflow_run_id"]).data.metrics
    assert {n: kept[f"evaluation/{n}"] for n in ("psnr", "ssim")} == pytest.approx(judged["figures"])
    for clip in made["clips"]:  # what evaluate's actors made is what generate made
        theirs = Path(judged["generated"]) / judging.file_name(clip["clip"])
        ours, theirs = (h264.decode_rgb(Path(path).read_bytes()).astype(int) for path in (clip["result"], theirs))
        assert ours.shape == theirs.shape == (4, 32, 32, 3) and np.abs(ours - theirs).mean() < 2

    compared = command(compare, folder / "page", "--runs", trained["mlflow_run_id"])
    assert [run["run_id"] for run in compared["runs"]] == [trained["mlflow_run_id"]]
    page = Path(compared["page"]).read_text()
    assert "psnr" in page and f"{judged['figures']['psnr']:.4g}" in page, "the figures that evaluate left in MLflow"

    assert trained["registered"] == f"models:/{name}/1"
    about = mlflow.models.get_model_info(trained["registered"])
    assert [spec.name for spec in about.signature.inputs] == ["reference", "pose"]
    checkpoint = Path(mlflow.artifacts.download_artifacts(trained["registered"])) / "artifacts" / "model"
    network.from_pretrained(checkpoint / part)
