"""Previews: training computes the same with and without them, what is drawn is what `generate` draws, failures warn."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from entprog.blocks import compile_blocks
from entprog.config import Generate
from entprog.errors import UserError
from entprog.media import h264
from entprog.quality import pictures
from helpers.networks import SHAPE, tiny_experiment
from helpers.runs import Run, comparable, differing
from pipelines.generating import rendering
from pipelines.generating.motions import Motion
from pipelines.training import previews, standing, steplog


def motions(count=2):
    random = np.random.default_rng(0)
    return [
        Motion(
            f"clip </script> {n}",
            random.integers(0, 255, (16, 16, 3), np.uint8),
            random.random((2, 33, 3), np.float32),
            None,
            place=n,
        )
        for n in range(count)
    ]


def looking(run, output, settings=None, kept=None, warnings=None):
    return previews.Previews(
        run.denoiser, motions(), SHAPE, output, settings or Generate(steps=2),
        lambda path, folder: None if kept is None else kept.append((path.name, folder)),
        pytest.fail if warnings is None else warnings.append, run.experiment.model.compile_blocks,
    )  # fmt: skip


@pytest.mark.parametrize(
    "parts",
    [
        {"train": {"ema_decay": 0.9}},
        {"schedule": {"backward": "residual"}, "model": {"gradient_checkpointing": True}},
        {"model": {"compile_blocks": True}},
    ],
)
def test_training_computes_the_same_to_the_bit(parts, tmp_path, monkeypatch):
    monkeypatch.setattr("entprog.blocks.compile_blocks", lambda found: compile_blocks(found, backend="eager"))
    experiment = tiny_experiment(**{**parts, "train": {"steps": 12, "held_out_every": 4, **parts.get("train", {})}})
    plain, watched = Run(experiment), Run(experiment)
    expected = [comparable(step) for step in plain.steps()]
    torch.manual_seed(3)
    state, got = torch.random.get_rng_state(), []
    look = looking(watched, tmp_path)
    for step in watched.steps():
        got.append(comparable(step))
        if step.step % 3 == 0:
            look.show(step.step, step.charged_s, watched.state.ema, watched.state.ema_gaps)
    assert got == expected
    assert not differing(plain.weights(), watched.weights())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [line["step"] for line in steplog.lines_of(tmp_path / steplog.PREVIEWS)] == [3, 6, 9, 12]


def test_what_is_drawn_is_what_the_averages_draw(tmp_path):
    run, kept = Run(tiny_experiment(train={"ema_decay": 0.9, "steps": 4})), []
    list(run.steps())
    look = looking(run, tmp_path, kept=kept)
    look.show(4, 1.5, run.state.ema, run.state.ema_gaps)
    (entry,) = steplog.lines_of(tmp_path / steplog.PREVIEWS)
    shown = h264.decode_rgb((tmp_path / entry["videos"][0].replace(".mp4", "_result.mp4")).read_bytes())
    with torch.no_grad():
        for name, parameter in run.denoiser.network.named_parameters():
            if name in run.state.ema:
                parameter.copy_(run.state.ema[name])
    made = rendering.make(run.denoiser, motions(), SHAPE, Generate(steps=2))[0]
    assert np.array_equal(shown, h264.decode_rgb(h264.write(tmp_path / "made.mp4", made, SHAPE.fps).read_bytes()))
    folder = "previews/step-00000004"
    assert {where for _, where in kept} == {folder} and {"sheet.png"} < {name for name, _ in kept}


def test_metrics_are_those_of_the_clips_beside_them(tmp_path):
    run, logged = Run(tiny_experiment(train={"steps": 2})), {}
    random = np.random.default_rng(1)
    seen = [replace(m, video=random.integers(0, 255, (2, 16, 16, 3), np.uint8)) for m in motions()]
    meter = previews.meter(("psnr", "ssim"), SHAPE, 2, 33)
    look = replace(looking(run, tmp_path), motions=seen, meter=meter, log=lambda step, values: logged.update(values))
    look.show(2, 1.0, {}, {})
    (entry,) = steplog.lines_of(tmp_path / steplog.PREVIEWS)
    drawn = [h264.decode_rgb((tmp_path / v.replace(".mp4", "_result.mp4")).read_bytes()) for v in entry["videos"]]
    each = [
        pictures.psnr(*(torch.from_numpy(c).movedim(-1, 1) for c in (a, m.video)))
        for a, m in zip(drawn, seen, strict=True)
    ]
    assert entry["figures"]["psnr"] == pytest.approx(np.mean(each)) and set(entry["figures"]) == {"psnr", "ssim"}
    assert logged == {f"preview/{name}": value for name, value in entry["figures"].items()}
    assert '"psnr"' in (tmp_path / "previews" / "index.html").read_text()
    assert f"psnr {entry['figures']['psnr']:.4g}" in dict(standing.rows(shown(tmp_path)))["last preview"]


def shown(folder):
    (folder / "steps.jsonl").touch()
    return standing.read(folder)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("psnrr",), r"train.preview_metrics: no metric 'psnrr' .did you mean psnr"),
        (("fvd",), r"train.preview_metrics: metric fvd needs clips of|is of a set of clips"),
        (("frechet_efficientnet_lite0",), "is of a set of clips, not of a few: evaluate measures it"),
        (("ms_ssim",), "metric ms_ssim needs frames of 176 pixels a side"),
        (("hand_distance",), "metric hand_distance needs wanted poses of 133 points"),
    ],
)
def test_metrics_that_a_preview_cannot_have_are_one_line(names, said):
    with pytest.raises(UserError, match=said) as caught:
        previews.meter(names, SHAPE, 2, 33)
    assert "\n" not in str(caught.value)


def test_the_page_plays_them_in_order_and_a_motions_name_is_a_text(tmp_path):
    run = Run(tiny_experiment(train={"steps": 2}))
    look = looking(run, tmp_path)
    for step in (10, 20, 30, 20):  # resumed from before the third
        look.show(step, step / 2, {}, {})
    page = (tmp_path / "previews" / "index.html").read_text()
    (content,) = re.findall(r'<script type="application/json" id="previews">(.*?)</script>', page, re.S)
    entries = json.loads(content)
    assert [entry["step"] for entry in entries] == [10, 20] and entries[0]["motions"][0] == "clip </script> 0"
    for entry in entries:
        for video in entry["videos"]:
            assert (tmp_path / "previews" / video).is_file()
    assert not re.search(r"https?://", page)


def test_what_was_drawn_of_a_lost_attempt_goes_when_the_run_goes_on(tmp_path):
    """A run may end before it comes to that step again."""
    for step in (10, 20):
        previews.leave(tmp_path, {"step": step, "charged_s": 1.0, "motions": [], "videos": []})
    for done, left in ((20, [10, 20]), (19, [10])):
        previews.cut(tmp_path, done, pytest.fail)
        assert [line["step"] for line in steplog.lines_of(tmp_path / steplog.PREVIEWS)] == left
        assert ('"step": 20' in (tmp_path / "previews" / "index.html").read_text()) == (20 in left)
    previews.cut(tmp_path, 0, pytest.fail)
    assert not list((tmp_path / "previews").iterdir()), "a page plays at least one"
    (tmp_path / steplog.PREVIEWS).write_text("damaged\n")
    warnings = []
    previews.cut(tmp_path, 5, warnings.append)
    assert len(warnings) == 1 and "previews after step 5" in warnings[0], "a look must not cost the run"


@pytest.mark.parametrize("fault", ["disk", "sampler", "tracking"])
def test_a_failure_is_a_warning_and_weights_come_back(fault, tmp_path):
    run, warnings = Run(tiny_experiment(train={"ema_decay": 0.9, "steps": 3})), []
    list(run.steps())
    before = run.weights()
    settings = Generate(steps=2, sampler="DDIMScheduler") if fault == "sampler" else Generate(steps=2)
    look = looking(run, tmp_path, settings, warnings=warnings)
    if fault == "disk":
        (tmp_path / "previews").write_text("in the way")
    if fault == "tracking":
        object.__setattr__(look, "keep", lambda path, folder: 1 / 0)
    look.show(3, 1.0, run.state.ema, run.state.ema_gaps)
    assert len(warnings) == 1 and warnings[0].startswith("the preview after step 3 failed: ")
    assert not differing(before, run.weights())
