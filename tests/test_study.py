"""The study at its smallest: what it renders, compares and says, and that a unit is done once."""

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from benchmarks import common, study, study_figures, study_page, study_routing
from benchmarks.study_arms import CPU, GPU, SCALES, SMOKE, TASKS, experiment
from benchmarks.study_material import material
from benchmarks.study_trainings import check_had_a_core
from benchmarks.study_units import Bench, Unit, without_seconds
from benchmarks.study_work import work
from entprog import config, files
from entprog.blocks import blocks
from entprog.data import shards
from entprog.diffusion import losses
from entprog.errors import UserError
from entprog.media import h264
from entprog.schedule import plans
from entprog.schedule.freezing import Freeze
from entprog.schedule.prices import Prices
from helpers import families
from helpers.networks import SHAPE, latents, tiny_denoiser, tiny_experiment
from pipelines.training import expectation, outline

ROOT = Path(__file__).parents[1]

FULL = {
    "backward": ["exact", "residual"], "candidates": [0.25, 1.0], "kind": "entprog", "search_share": 0.1,
}  # fmt: skip


# ---- what is rendered ----


def test_a_rendered_pose_lies_on_the_body():
    pytest.importorskip("pybullet")
    from benchmarks import mannequin, mocap

    red = dict.fromkeys(("skin", "shirt", "trousers", "shoes", "sleeve"), (1.0, 0.0, 0.0))
    body = mannequin.Body(legs=1.1, arms=0.9, girth=1.0, head=1.0, colors=red)
    stage = mannequin.Stage(body)
    world = stage.put(mannequin.at(stage.data, "dance_b", 1.3))
    camera = mocap._camera(world[None], 1.0, np.random.default_rng(3))
    points = camera.project(world, 1.0)
    assert points.min() > 0 and points.max() < 1
    picture = stage.picture(camera, 256, 256, np.array([5.0, 10, 5])).astype(int)
    is_body = picture[..., 0] - picture[..., 1] > 40
    for joint in (11, 12, 13, 14, 23, 24, 25, 26, 27, 28):  # shoulders, elbows, hips, knees, ankles
        x, y = (points[joint] * 256).astype(int)
        assert is_body[y - 3 : y + 4, x - 3 : x + 4].any(), joint
    assert points[0, 1] < points[23, 1] < points[27, 1]  # upright: nose over hips over ankles
    mirrored = points * (-1, 1) + (1, 0)
    off = [not is_body[int(y * 256), int(x * 256)] for x, y in mirrored[[13, 14, 25, 26]]]
    assert any(off)  # the test sees a wrong pose


def test_equal_seeds_render_equal_clips():
    pytest.importorskip("pybullet")
    from benchmarks import mocap

    shape = config.ClipShape(frames=2, height=32, width=24, fps=12)
    first = mocap.render("target", "train", 4, shape, seed=1)
    mocap.render("source", "train", 2, shape, seed=1)
    again, other = (mocap.render("target", "train", 4, shape, seed=seed) for seed in (1, 2))
    assert first["video"] == again["video"] and np.array_equal(first["pose"], again["pose"])
    assert first["video"] != other["video"]
    assert (first["pose"][..., :2] > 0).all() and (first["pose"][..., :2] < 1).all()


# ---- what is run ----


def rows(split, count, shape):
    """Clips of a bright square that moves, in place of people."""
    for number in range(count):
        frames = np.full((shape.frames, shape.height, shape.width, 3), 20 + 8 * number, np.uint8)
        for i, frame in enumerate(frames):
            left = (number + 2 * i) % (shape.width - 8)
            frame[8:16, left : left + 8] = 200
        png = io.BytesIO()
        Image.fromarray(frames[0]).save(png, "PNG")
        pose = np.full((shape.frames, 33, 3), 0.5, np.float32)
        yield {
            "clip_id": f"{split}{number}", "source": "s", "source_sha256": "", "split": split, "caption": "",
            "start_s": 0.0, "fps": shape.fps, "frames": shape.frames, "height": shape.height, "width": shape.width,
            "source_height": 1, "source_width": 1, "crop_left": 0, "crop_top": 0, "crop_width": 1, "crop_height": 1,
            "visibility": 1.0, "reference_s": 0.0, "reference": png.getvalue(), "pose": pose,
            "video": h264.encode(frames, shape.fps),
        }  # fmt: skip


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A work folder with clips and a base."""
    folder = tmp_path_factory.mktemp("study")
    for name in ("source", "target"):
        out = folder / "mocap" / name
        infos = {
            split: [shards.write_shard(out, f"{split}/00000.parquet", rows(split, n, SMOKE.rendered), SMOKE.rendered)]
            for split, n in (("train", 8), ("held_out", 12))
        }
        shards.write_dataset(out, SMOKE.rendered, infos, {})
    bench = Bench(SMOKE, folder, torch.device("cpu"))
    files.write_json(folder / Unit(kind="clips", task="wan_rendered").file, {"commit": "x"})
    return bench


def test_units_go_through_fit_and_are_done_once(bench, monkeypatch):
    done = study.read(bench)
    base = Unit(kind="base", task="wan_rendered")
    run = Unit(kind="run", task="wan_rendered", arm="past")
    assert done.is_ready(SMOKE, base) and not done.is_ready(SMOKE, run)
    with study.claimed(bench.work / base.file) as mine:
        assert mine and not study.do(bench, base, done)  # another process has it
    for kind in ("base", "budget"):
        assert study.do(bench, Unit(kind=kind, task="wan_rendered"), study.read(bench))
    assert not study.do(bench, base, study.read(bench))
    for number, rate in enumerate(SMOKE.rates):
        tried = Unit(kind="tune", task="wan_rendered", arm="past", seed=SMOKE.tune_seed, rate=rate, batch=2)
        files.write_json(bench.work / tried.file, {"commit": "x", "held_out_loss": [float("nan"), 1.0][number]})
    done = study.read(bench)
    assert done.is_ready(SMOKE, run) and done.tuned(SMOKE, run) == (SMOKE.rates[1], 2)  # a run that diverged never wins

    monkeypatch.setattr(study_figures, "RESAMPLES", 50)
    records = {}
    for unit in (run, dataclasses.replace(run, arm="full")):
        records[unit] = {"commit": "x", **work(bench, unit, done.budget(unit), SMOKE.rates[0], 2)}
    past, full = records.values()
    budget = done.budget(run)
    assert full["steps"] == SMOKE.full_steps and full["curve"][-1]["spent"] == budget
    assert full["curve"][0]["loss"] == past["curve"][0]["loss"]  # all arms start from the same network
    assert budget <= past["curve"][-1]["spent"] < 1.1 * budget and past["flops"]["score"] > 0
    looked = work(bench, dataclasses.replace(run, kind="hindsight"), budget, SMOKE.rates[0], 2)
    assert sum(one["chosen"] for one in looked["candidates"]) == 1 and looked["searched"]
    assert len({one["loss"] for one in looked["candidates"]}) > 1


def test_search_tuning_and_judging_see_disjoint_clips(bench):
    if not (bench.work / "bases" / "wan").exists():
        study.do(bench, Unit(kind="base", task="wan_rendered"), study.read(bench))
    goods = material(bench, "wan_rendered")
    parts = [torch.cat([batch.clean for batch in part]) for part in (goods.search, goods.tune, goods.test)]
    assert [len(part) for part in parts] == [SMOKE.search_clips, SMOKE.tune_clips, 8]
    for i, one in enumerate(parts):
        for other in parts[i + 1 :]:
            assert not any(torch.equal(a, b) for a in one for b in other)


def routed_pass(share=None, stage_routes=True, trained=("blocks.1", "blocks.4")):
    """(tokens that each block sees in a training pass, its loss and gradients, the loss that evaluation sees)."""
    wanted = tiny_experiment()
    denoiser, batch = tiny_denoiser(wanted), latents([0, 1])
    found, seen = blocks(denoiser.network), {}
    if share:
        study_routing.route(found, share, 3, lambda: stage_routes)
    for block in found:

        def note(module, args, name=block.name):
            seen.setdefault(name, args[0].shape[1])

        block.module.norm1.register_forward_pre_hook(note)
    freeze = Freeze(denoiser, found, wanted)
    freeze.put(plans.of_set(trained, [block.name for block in found], "residual", wanted.data.shape))
    loss = losses.training_loss(denoiser, batch, wanted.train)
    loss.backward()
    gradients = {n: p.grad for n, p in denoiser.network.named_parameters() if p.grad is not None}
    return seen, {"loss": loss.detach(), **gradients}, losses.held_out_loss(denoiser, [batch], 2, 0)


def test_frozen_blocks_see_a_share_of_the_tokens_in_training_alone():
    seen, plain, judged = routed_pass()
    tokens = seen["blocks.0"]
    for same in ({"share": 1.0}, {"share": 0.5, "stage_routes": False}):  # every token; the last stage
        everywhere, got, judged_so = routed_pass(**same)
        assert everywhere == seen and judged_so == judged and got.keys() == plain.keys()
        assert all(torch.equal(got[name], plain[name]) for name in plain), same
    seen, got, judged_so = routed_pass(0.5)
    assert {name for name, count in seen.items() if count == tokens} == {"blocks.1", "blocks.4"}
    assert {count for name, count in seen.items() if name not in ("blocks.1", "blocks.4")} == {tokens // 2}
    assert judged_so == judged and not torch.equal(got["loss"], plain["loss"])
    assert got.keys() == plain.keys() and all(value.isfinite().all() for value in got.values())


def test_tokens_that_a_block_does_not_see_take_its_bypass():
    wanted = tiny_experiment()
    denoiser = tiny_denoiser(wanted)
    found = blocks(denoiser.network)
    block = found[0].module
    study_routing.route(found, 0.25, 0, lambda: True)
    Freeze(denoiser, found, wanted).put(plans.of_set(["blocks.5"], [b.name for b in found], "residual", SHAPE))
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 16, 32, generator=draw, requires_grad=True)
    text, temb = torch.randn(2, 4, 32, generator=draw), torch.randn(2, 6, 32, generator=draw)
    rotary = tuple(torch.randn(1, 16, 1, 16, generator=draw) for _ in range(2))
    out = block(tokens, text, temb, rotary)
    places = [place for place in range(16) if not torch.equal(out[:, place], tokens[:, place])]
    assert len(places) == 4
    with torch.no_grad():
        alone = block(tokens[:, places], text, temb, tuple(part[:, places] for part in rotary))
    assert torch.equal(out[:, places], alone)
    weights = torch.randn(out.shape, generator=draw)
    (out * weights).sum().backward()
    assert torch.equal(tokens.grad, weights)  # gradient crosses it on the bypass, whoever was seen


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_every_arm_of_every_scale_is_an_experiment(scale):
    for task in scale.tasks:
        for arm in scale.arms:
            built = experiment(scale, task, arm, base="x", seed=0, rate=1e-3, batch=2, budget=1e9, tuning=arm == "past")
            assert built.model.family == TASKS[task].family and built.schedule.clock == scale.clock
    wanted = study.units(scale)
    assert len({unit.file for unit in wanted}) == len(wanted)


def test_the_gpu_scale_is_as_large_as_it_says():
    from entprog import models

    settings = {"family": "wan", "init": dict(GPU.networks["wan"]), "vae": "none"}
    source = models.family("wan").inspect(config.Model(**settings), GPU.shape)
    assert sum(p.numel() for p in source.network.parameters()) > 1e8


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--scale", "gpuu"], "did you mean gpu?"),
        (["--only", "lissa"], "did you mean lisa?"),
        (["--scale", "gpu", "--device", "cpu", "--busy"], "is seconds"),
    ],
)
def test_a_wrong_name_is_one_line(capsys, tmp_path, wrong, message):
    outcome = CliRunner().invoke(study.app, ["--scale", "smoke", "--work", str(tmp_path), *wrong])
    assert outcome.exit_code == 2
    assert message in capsys.readouterr().err + outcome.output


# ---- what is said ----


def curve(*losses, step=1.0):
    return [{"step": i * 10, "spent": i * step, "cpu_s": i * step, "loss": loss} for i, loss in enumerate(losses)]


def test_sooner_is_a_ratio_of_first_crossings():
    full = curve(1.0, 0.8, 0.6, 0.4)
    assert study_figures.sooner(full, full, "spent") == pytest.approx(1)
    assert study_figures.sooner(curve(1.0, 0.4, 0.3, 0.2), full, "spent") == pytest.approx(3)
    assert study_figures.sooner(curve(1.0, 0.9, 0.8, 0.7), full, "spent") == pytest.approx(1.5 / 3)  # never there
    assert study_figures.sooner(curve(1.0, 1.1, 1.2, 1.3), full, "spent") == 0


def run_record(loss, rate=1e-3):
    card = {"metric": "psnr", "id": "abc"}
    return {
        "commit": "c", "rate": rate, "batch": 4, "curve": curve(1.0, (1 + loss) / 2, loss), "held_out_loss": loss,
        "steps": 20,
        "seconds": 9.0, "cpu_s": 4.0, "overhead": 0.1, "peak_memory_bytes": 100, "trained_blocks": [4],
        "decisions": [{"backward": "exact"}], "quality": [{"metric": "psnr", "value": 20.0, "card": card}],
    }  # fmt: skip


@pytest.fixture
def records():
    """Three seeds in which one arm is always worse and another always better than full training."""
    found = {Unit(kind="base", task="wan_rendered"): {"commit": "c", "parameters": 1e6, "blocks": 8}}
    block = {"name": "b0", "pi_std": -0.1, "loss_increase": 0.2}
    taus = {"loss_tau": {"signed": -1.0, "absolute": 1.0}, "signed_absolute_tau": -1.0, "halves_tau": 1.0}
    for seed in range(3):
        scored = {"commit": "c", "blocks": [block], "conditions": 4, "draws": 4, **taus}
        found[Unit(kind="scores", task="wan_rendered", seed=seed)] = scored
        for arm, loss in (("full", 0.5), ("paper", 0.6), ("lisa", 0.4)):
            found[Unit(kind="run", task="wan_rendered", arm=arm, seed=seed)] = run_record(loss + 0.01 * seed)
    candidates = [
        {"m": m, "backward": backward, "trained": trained, "loss": loss, "loss_at_same_steps": loss + 0.1, "steps": 3,
         "chosen": loss == 0.3}
        for m, backward, trained, loss in (
            (1, "residual", ["b0"], 0.3), (1, "exact", ["b0"], 0.2), (2, "exact", ["b0", "b1"], 0.4)
        )
    ]  # fmt: skip
    looked = {"commit": "c", "candidates": candidates, "searched": True}
    return found | {Unit(kind="hindsight", task="wan_rendered", arm="past"): looked}


def test_the_page_says_what_the_numbers_say(records, tmp_path):
    figures, more = study_figures.summary(CPU, records)
    assert {row["arm"] for row in figures} == {"full", "paper", "lisa"}
    arms = more["arms"]
    assert arms["paper"]["time_to_full_loss_ratio"]["high"] < 1 < arms["lisa"]["time_to_full_loss_ratio"]["low"]
    assert arms["paper"]["time_to_full_loss_ratio"]["reached"] == 0 and arms["lisa"]["seeds"] == [0, 1, 2]
    assert more["hindsight"]["past"]["best"] == 0 and more["hindsight"]["past"]["regret"] == pytest.approx(0.1)
    assert more["residual"]["loss_minus_exact_at_same_cost"]["median"] == pytest.approx(0.1)
    about = {"device": "CPU, x", "commit": "c" * 40, "scale": "cpu", "units_left": 2}
    (tmp_path / "study_cpu.json").write_text(json.dumps({**about, "figures": figures, **more}))
    page = study_page.leave(tmp_path, tmp_path / "docs").read_text()
    assert "plain training wins" in page and "2 of the study's units have not been run" in page
    for picture in ("loss", "ratio", "cei"):
        assert (
            f"study/cpu_{picture}.png" in page and (tmp_path / "docs" / "study" / f"cpu_{picture}.png").stat().st_size
        )


def test_an_arm_is_shown_beside_the_one_whose_rate_it_took_and_without_seconds_of_a_busy_machine(records):
    for seed in range(3):
        own, other = (Unit(kind="run", task="wan_rendered", arm=a, seed=seed) for a in ("rotating_routed", "rotating"))
        records[other] = run_record(0.3 + 0.01 * seed)
        if seed:
            records[own] = without_seconds(run_record(0.35 + 0.01 * seed))
    arms = study_figures.summary(CPU, records)[1]["arms"]
    assert arms["rotating_routed"]["seeds"] == [1, 2] and arms["rotating_routed"]["cpu_seconds"] is None
    line = study_page.beside_own(arms).splitlines()[-1]
    assert "| 1, 2 |" in line and "| 0.3600, 0.3700 (0.3100, 0.3200) |" in line
    (row,) = [line for line in study_page.table(arms).splitlines() if "half of the tokens" in line]
    assert row.count("| – |") == 2
    told = study_page.verdict({**arms, "rotating_routed": {**arms["rotating_routed"], "held_out_loss": 0.1}})
    assert "half of the tokens while clips are small**: " in told
    assert "3 seeds or more: half resolution for two thirds" in told  # two seeds are no mean of three
    assert "half of the tokens" not in study_page.beside_own({"full": arms["full"], "rotating": arms["rotating"]})


def test_a_seed_without_a_figure_keeps_its_place_and_a_loss_above_plain_training_s_is_told(records, tmp_path):
    """Plain training of one seed ends no lower than it began; an arm that is soon at its own lowest loss ends above."""
    for seed in range(3):
        full = Unit(kind="run", task="wan_rendered", seed=seed)
        records[full] = run_record(0.5 if seed else 1.2)
        records[dataclasses.replace(full, arm="rotating")] = run_record(0.5)
        records[dataclasses.replace(full, arm="rotating_routed")] = run_record(0.55)
    more = study_figures.summary(CPU, records)[1]
    arms = more["arms"]
    first, *rest = arms["rotating_routed"]["time_to_full_loss_ratio"]["by_seed"]
    assert first is None and None not in rest
    line = study_page.beside_own(arms).splitlines()[-1]
    assert f"| –, {', '.join(f'{value:.2f}' for value in rest)} (–, 1.00, 1.00) |" in line
    about = {"device": "CPU", "commit": "c", "units_left": 0}
    for of in ("paper", "lisa"):
        arms[of]["time_to_full_loss_ratio"] = study_figures.over_seeds([float("nan")] * 3) | {"reached": 0}
    page = study_page.section("cpu", about | more, tmp_path)
    assert "| rotating" not in page and "nothing to time" in page
    soon = arms["rotating_routed"]["time_to_full_loss_ratio"] | {"low": 1.5, "high": 2.0, "reached": 1}
    above = {**arms["rotating_routed"], "time_to_full_loss_ratio": soon}
    above["loss_minus_full"] = study_figures.over_seeds([0.01, 0.02, 0.03])
    told = study_page.in_words(above)
    assert "sooner than full training in every resample" not in told and "it ends above full training" in told


def test_memory_is_compared_with_plain_training_of_as_many_clips_where_that_was_tried(records):
    for batch, peak in ((2, 60), (4, 120)):
        tried = Unit(kind="tune", task="wan_rendered", rate=1e-3, batch=batch)
        records[tried] = run_record(0.5) | {"peak_memory_bytes": peak}
    for seed in range(3):
        records[Unit(kind="run", task="wan_rendered", arm="paper", seed=seed)] |= {"batch": 2, "peak_memory_bytes": 30}
        records[Unit(kind="run", task="wan_rendered", arm="lisa", seed=seed)] |= {"batch": 1}
    arms = study_figures.summary(CPU, records)[1]["arms"]
    assert arms["paper"]["memory_over_full"] == 0.3 and arms["paper"]["memory_over_full_of_same_batch"] == 0.5
    assert (
        arms["lisa"]["memory_over_full_of_same_batch"] is None and arms["full"]["memory_over_full_of_same_batch"] == 1
    )
    rows = study_page.table(arms).splitlines()
    assert "| 0.30 | 0.50 |" in rows[3] and "| 1.00 | – |" in rows[4]


def test_candidates_of_two_clip_shapes_are_two_candidates(records):
    plan = {"m": 2, "trained": ["b0", "b1"], "loss_at_same_steps": 0.5, "steps": 3}
    candidates = [
        {**plan, "backward": backward, "shape": shape, "loss": loss, "chosen": shape == "whole" and backward == "exact"}
        for shape, backward, loss in (
            ("half", "exact", 0.2), ("half", "residual", 0.3), ("whole", "residual", 0.25), ("whole", "exact", 0.4)
        )
    ]  # fmt: skip
    looked = {"commit": "c", "candidates": candidates, "searched": True}
    unit = Unit(kind="hindsight", task="wan_rendered", arm="search")
    more = study_figures.summary(CPU, {unit: looked} | {u: r for u, r in records.items() if u.kind != "hindsight"})[1]
    assert sorted(more["residual"]["loss_minus_exact_at_same_cost"]["by_seed"]) == pytest.approx([-0.15, 0.1])
    assert "| 4/4 | 2 exact of half |" in study_page.choices(more["hindsight"])


def test_seconds_of_a_machine_that_others_use_are_no_record():
    unit = Unit(kind="run", task="wan_rendered", arm="full")
    check_had_a_core(unit, 50.0, 49.0)
    with pytest.raises(UserError, match=r"seed0\.json: 50 s were charged, .* had 40 s of a processor: others work"):
        check_had_a_core(unit, 50.0, 40.0)


def test_a_sitting_adds_to_a_result_file_whose_folder_is_gone(records, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(study_figures, "RESAMPLES", 50)
    first = study.Done(records, [])
    bench = Bench(CPU, tmp_path / "first", torch.device("cpu"))
    path = study.write("study_cpu", bench, "cpu", first)
    told = json.loads(path.read_text())
    assert told["records"].keys() == {unit.file for unit in records}
    told["tuning"] = {"wan_rendered": {"full": {"0.001": 0.3}}}  # of records that were lost
    path.write_text(json.dumps(told))

    bench = Bench(CPU, tmp_path / "second", torch.device("cpu"), study.earlier("study_cpu")["records"])
    done = study.read(bench)
    assert done.records == records
    kinds = [unit.kind for unit in done.asked(["paper"])]
    assert kinds[:4] == ["clips", "base", "budget", "run"] and "tune" not in kinds  # the rate is known
    assert {unit.task for unit in done.asked(["lisa"])} == {"wan_rendered"}  # real clips are none of its business
    runs = [unit for unit in done.asked(["paper"]) if unit.kind == "run" and unit.task == "wan_rendered"]
    assert [unit.seed for unit in runs] == [3, 4]
    assert not done.is_ready(CPU, runs[0]) and done.tuned(CPU, runs[0]) == (1e-3, 4)
    routed = [unit for unit in done.asked(["rotating_routed"]) if unit.kind == "tune"]
    assert len(routed) == 12 and {unit.arm for unit in routed} == {"rotating"}
    for kind, record in (("clips", {}), ("budget", {"budget": 2.0}), ("run", run_record(0.3))):
        unit = dataclasses.replace(runs[0], kind=kind, **({} if kind == "run" else {"arm": "full", "seed": 0}))
        files.write_json(bench.work / unit.file, {"commit": "d", **record})
    done = study.read(bench)
    assert not done.is_ready(CPU, runs[1]), "no base here"
    base = dataclasses.replace(runs[0], kind="base", arm="full", seed=0)
    files.write_json(bench.work / base.file, records[base])
    assert study.read(bench).is_ready(CPU, runs[1])
    added = json.loads(study.write("study_cpu", bench, "cpu", study.read(bench)).read_text())
    assert added["arms"]["paper"]["seeds"] == [0, 1, 2] and added["tuning"] == told["tuning"]
    new = {runs[0].file, *(f"units/wan_rendered/{kind}/full-seed0.json" for kind in ("clips", "budget"))}
    assert added["records"].keys() == told["records"].keys() | new
    with pytest.raises(UserError, match="cannot be compared"):
        study.check_same(base, {"held_out_loss": 0.21}, {"held_out_loss": 0.20})
    rendered, clips = dataclasses.replace(base, kind="clips"), {"source": {"fingerprint": "a"}, "seconds": 1}
    study.check_same(rendered, clips, clips | {"seconds": 2})
    with pytest.raises(UserError, match=r"rendered clips made anew .*a, b"):
        study.check_same(rendered, clips, {"source": {"fingerprint": "b"}})


def test_a_limit_is_told_of_long_runs_that_choose_blocks():
    assert expectation.lines(tiny_experiment(), 6) == [], "short"
    assert expectation.lines(tiny_experiment(train={"steps": 9999}, schedule={"kind": "full"}), 6) == []
    (line,) = expectation.lines(tiny_experiment(train={"steps": 9999}), 6)
    found = expectation.limit(tiny_experiment(train={"steps": 9999}), 6)
    assert (
        f"at most {found.sooner:.2f}x as soon" in line
        and (ROOT / expectation.STUDY).is_file()
        and expectation.STUDY in line
    )


@pytest.mark.parametrize("backward", ["exact", "residual"])
def test_the_counted_limit_is_a_limit(backward):
    """Against FLOPs counted on a real network: no plan of the schedule costs less, and the cheapest little more."""
    wanted = tiny_experiment(schedule={**FULL, "backward": backward, "candidates": [0.34, 1.0]}, train={"steps": 2000})
    denoiser = tiny_denoiser(wanted)
    found = blocks(denoiser.network)
    freeze = Freeze(denoiser, found, wanted)
    prices = Prices(denoiser, found, latents([0, 1]), freeze, wanted, {})
    names = [block.name for block in found]
    plan = plans.of_set(names[:2], names, backward, wanted.data.shape)
    counted = prices.step_flops(plan) / prices.step_flops(prices.full)
    limit = expectation.limit(wanted, len(found)).step
    assert limit <= counted * 1.02 and counted < limit * 1.25


@pytest.mark.parametrize(("family", "kind"), [("latte", "temporal"), ("wan_vace", "control")])
@pytest.mark.parametrize("backward", ["exact", "residual"])
def test_where_some_blocks_may_be_trained_the_others_are_frozen(family, kind, backward):
    """All that may be trained, gradient crosses the others as is asked for, and the limit is one for that too."""
    schedule = {
        "kind": "progressive",
        "table": [{"until": 1}],
        "backward": backward,
        "blocks": kind,
        "outside": "never",
    }
    wanted = tiny_experiment(schedule=schedule, train={"steps": 2000})
    denoiser, batch = families.load(family), latents([0, 1])
    found = families.ordered(denoiser, batch)
    names = plans.eligible(found, kind)
    others = len(found) - len(names)
    plan = plans.fixed(names, dict.fromkeys(names, 0.0), wanted.schedule, wanted.data.shape, 0, others=others)
    assert others and plan.backward == backward and plan.trainable == tuple(names)
    prices = Prices(denoiser, found, batch, Freeze(denoiser, found, wanted), wanted, {})
    counted = prices.step_flops(plan) / prices.step_flops(prices.whole)
    assert expectation.limit(wanted, len(names), others).step <= counted * 1.05 < 1
    assert [row[-1] for row in outline.rows(wanted, len(names), others)] == [backward]


def test_what_the_presets_rest_on_is_kept_and_shown():
    """The figures that presets and documents quote follow from a file of the repository."""
    table = study_page.small_first(common.RESULTS / "small_first.json")
    line = next(line for line in table.splitlines() if "(`progressive`)" in line and "rendered, batch 4" in line)
    assert "| 3.77, 3.02, 3.03 | 2.58, 2.05, 2.03 |" in line
    assert "never" in next(line for line in table.splitlines() if "the best quarter of the blocks throughout" in line)
    assert table in (ROOT / "docs" / "study.md").read_text()
