"""Charts: drawn from real records, with what must be visible in them."""

import numpy as np
import pytest
from PIL import Image

from entprog import files
from entprog.blocks import blocks
from entprog.scoring import cei
from helpers.networks import latents, tiny_denoiser, tiny_experiment
from pipelines import charts


def pixels(path) -> np.ndarray:
    """uint8 [H, W, 3] of a PNG."""
    return np.asarray(Image.open(path).convert("RGB"))


def has(path, colour: str) -> int:
    """Number of pixels of exactly that colour (#RRGGBB)."""
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return int((pixels(path) == rgb).all(-1).sum())


def record(step, stage, phase, trained, charged_s):
    times = {"charged_s": charged_s, "seconds": 0.5, "wait_s": 0.5}
    return {"step": step, "stage": stage, "phase": phase, "trained": trained, **times}


def test_what_came_before_the_first_step_is_scoring_as_far_as_it_is():
    """A search's opening, which is charged before its first step too, is none."""
    first = record(1, 0, "search", ["a"], 9.0)
    assert charts.scored_s([first | {"score_s": 2.5}]) == 2.5
    assert charts.scored_s([first]) == 8.0, "of an earlier version"
    assert charts.scored_s([]) == 0.0


def test_cei_chart_of_a_real_table(tmp_path):
    experiment = tiny_experiment()
    denoiser = tiny_denoiser(experiment)
    batches = [latents([0, 1])]
    table = cei.cei(denoiser, blocks(denoiser.network), batches, experiment.priority, key="k", seed=0)
    path = charts.cei_chart(table.as_json(), tmp_path / "charts" / "cei.png")
    assert has(path, charts.GREEN) > 100, "no loss increase"
    assert has(path, charts.BLUE) + has(path, charts.ORANGE) > 100, "no π"


def test_cei_chart_shows_negative_scores_in_another_colour(tmp_path):
    def table(sign):
        row = {"score": sign * 0.5, "pi_std": sign * 0.5, "pi_elementwise": sign * 0.4, "std_error": 0.1}
        row |= {"loss_increase": 0.2, "loss_std_error": 0.05}
        return {
            "kind": "cei", "estimator": "std",
            "conditions": 2, "draws": 4, "halves_tau": 1.0, "signed_absolute_tau": 1.0,
            "blocks": [{"name": f"blocks.{i}", **row} for i in range(3)],
        }  # fmt: skip

    positive = charts.cei_chart(table(1), tmp_path / "positive.png")
    negative = charts.cei_chart(table(-1), tmp_path / "negative.png")
    assert has(positive, charts.BLUE) > 100 and not has(positive, charts.ORANGE)
    assert has(negative, charts.ORANGE) > 100 and not has(negative, charts.BLUE)


def test_ranks():
    assert charts._ranks(np.array([0.1, -0.9, 0.5])).tolist() == [2, 3, 1]


def test_schedule_chart_fills_what_was_trained_in_proportion_to_time(tmp_path):
    both = ["blocks.2", "blocks.10"]
    steps = [record(1, 0, "search", both, 2.0), record(2, 0, "train", both[:1], 6.0), record(3, 1, "train", both, 11.0)]
    path = charts.schedule_chart(steps, tmp_path / "schedule.png")
    trained, searched, frozen = (has(path, colour) for colour in (charts.BLUE, charts.ORANGE, charts.GREY))
    # block-seconds: trained 4 + 2·5, searched 2·1, frozen 4; the legend has a little of each
    assert trained / searched == pytest.approx(14 / 2, rel=0.25)
    assert trained / frozen == pytest.approx(14 / 4, rel=0.25)


def test_schedule_chart_has_a_row_for_a_block_that_never_trained(tmp_path):
    steps = [record(1, 0, "train", ["blocks.0"], 1.0)]
    without = charts.schedule_chart(steps, tmp_path / "a.png")
    path = charts.schedule_chart(steps, tmp_path / "b.png", ["blocks.0", "blocks.1"])
    assert has(path, charts.GREY) > 10 * has(without, charts.GREY)


def test_schedule_chart_shows_clip_shapes_where_they_change(tmp_path):
    small, whole = ({"shape": f"8 frames of {w}x48 at 12 fps", "pixels": 8 * w * 48} for w in (16, 32))
    steps = [record(i, i // 4, "train", ["blocks.0"], 2.0 * i + 2) for i in range(8)]
    alike = charts.schedule_chart([step | whole for step in steps], tmp_path / "alike.png")
    growing = [step | (small if step["step"] < 4 else whole) for step in steps]
    path = charts.schedule_chart(growing, tmp_path / "growing.png")
    assert charts.shape_spans(growing, 1.0) == [(1.0, 8.0, 0.5, small["shape"]), (8.0, 16.0, 1.0, whole["shape"])]
    assert not has(alike, charts.GREEN)
    assert len(pixels(path)) > len(pixels(alike))
    green = (pixels(path) == np.array([0x00, 0x9E, 0x73])).all(-1)
    columns = np.flatnonzero(green.any(0))
    left, right = (green[:, columns[len(columns) * part // 8]].sum() for part in (1, 7))
    assert left == pytest.approx(right / 2, rel=0.15)


def test_schedule_chart_of_many_blocks_in_natural_order():
    names = ["blocks.10", "blocks.2", "down.1.attn.0", "down.0.attn.1"]
    assert sorted(names, key=files.natural) == ["blocks.2", "blocks.10", "down.0.attn.1", "down.1.attn.0"]


def test_loss_chart_draws_every_arm_and_survives_nan(tmp_path):
    arms = {"full": [(1.0, 1, 0.5), (2.0, 2, float("nan")), (3.0, 3, 0.3)], "entprog": [(1.0, 2, 0.5), (2.0, 4, 0.2)]}
    path = charts.loss_chart(arms, tmp_path / "loss.png")
    assert has(path, charts.LINES[0]) > 50 and has(path, charts.LINES[1]) > 50
    assert charts.loss_chart({"full": []}, tmp_path / "empty.png").exists()
    assert charts.schedule_chart([], tmp_path / "empty2.png").exists()
