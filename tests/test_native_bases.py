"""Bases that have conditions of their own, by the commands: what they lack ends a run before anything starts."""

import shutil

import pytest
from typer.testing import CliRunner

from entprog import models
from entprog.config import ClipShape, Model
from helpers import bases, encoders, real_clips
from helpers.families import TINY
from pipelines import train

SHAPE = ClipShape(frames=5, height=32, width=32, fps=12)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with shards and bases in it."""
    folder = tmp_path_factory.mktemp("native")
    rows = {split: [[real_clips.row("cam01", split, 0.0, SHAPE)]] for split in ("train", "held_out")}
    real_clips.write(folder / "shards", rows, SHAPE)
    bases.vace(folder / "vace")
    pipe = bases.image_to_video(folder / "i2v", clip=True)
    for name in ("transformer", "vae", "scheduler"):
        getattr(pipe, name).save_pretrained(folder / "bare" / name)
    bases.control(folder / "control")
    bases.animate(folder / "whole animate")
    shutil.copytree(folder / "whole animate", folder / "animate", ignore=shutil.ignore_patterns("image_*"))
    hunyuan = {"family": "hunyuan_video", "init": TINY["hunyuan_video"]["init"]}
    models.family("hunyuan_video").load(Model(**hunyuan, vae="none")).save(folder / "hunyuan")
    encoders.encoder(folder / "hunyuan", "LlamaModel")
    return folder


def tree(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


WRONG = {
    "VACE without pose": (
        "wan_vace",
        "vace",
        "[reference]",
        "VACE network's control video is the drawn pose; add pose",
    ),
    "I2V without reference": ("wan", "i2v", "[pose]", "was trained with reference; add reference to model.conditions"),
    "I2V without its encoder": ("wan", "bare", "[reference,pose]", "has no image_encoder/ and image_processor/"),
    "Fun-Control without pose": ("wan", "control", "[reference]", "was trained with pose, reference; add pose"),
    "Fun-Control without reference": ("wan", "control", "[pose]", "was trained with pose, reference; add reference"),
    "Wan-Animate without its encoder": ("wan_animate", "animate", "[reference,pose]", "has no image_encoder/ and"),
    "HunyuanVideo without its second encoder": (
        "hunyuan_video", "hunyuan", "[reference,pose]", "has no text_encoder_2/ and tokenizer_2/: give a folder or hub",
        {"data.text": "caption"},
    ),
    "I2V with tokens and a last frame": (
        "wan", "i2v", "[reference,pose]", "has no place for a last frame", {"model.last_frame": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("dry_run", [True, False])
def test_what_a_base_needs_is_one_line(place, wrong, dry_run):
    family, base, conditions, said, *more = WRONG[wrong]
    before = tree(place)
    given = ["--shards", place / "shards", "--output", place / "out", "--base", place / base]
    settings = {"model.family": family, "model.conditions": conditions, "train.steps": 2}
    settings |= more[0] if more else {}
    settings |= {f"data.shape.{name}": value for name, value in SHAPE.model_dump().items()}
    for name, value in settings.items():
        given += ["--set", f"{name}={value}"]
    done = CliRunner().invoke(train.app, [str(value) for value in given] + ["--dry-run"] * dry_run)
    assert done.exit_code == 2 and done.output.startswith("error: model."), done.output
    assert said in " ".join(done.output.split()) and "Traceback" not in done.output
    assert tree(place) == before, "nothing was left or changed"
