"""The demo and its base: what can be said without running them for minutes."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from PIL import Image
from typer.testing import CliRunner

from benchmarks import demo_base, demo_person, demo_vae
from entprog import config, models
from entprog.config import ClipShape
from entprog.data import shards
from entprog.data.clips import Clips
from entprog.errors import UserError
from entprog.media import skeleton
from entprog.models.wan import WanDenoiser
from entprog.quality import posing
from entprog.schedule import plans
from pipelines import cli, demo
from pipelines.generating import motions

SHAPE = ClipShape(frames=5, height=64, width=48, fps=12)


def person(lean: float, frames: int = 5) -> np.ndarray:
    """Poses [frames, 33, 3] of a body that leans to one side, more and more."""
    rng = np.random.default_rng(0)
    pose = np.concatenate([rng.uniform((0.47, 0.2), (0.53, 0.8), (33, 2)), np.ones((33, 1))], 1)
    out = np.repeat(pose[None].astype(np.float32), frames, 0)
    out[..., 0] += lean * np.linspace(0.5, 1, frames, dtype=np.float32)[:, None]
    return out


def shown(poses: np.ndarray) -> np.ndarray:
    """Pictures of bodies in these poses in front of a still background: uint8 [frames, H, W, 3]."""
    background = np.random.default_rng(1).integers(0, 90, (SHAPE.height, SHAPE.width, 3))
    body = skeleton.distance(torch.from_numpy(poses), SHAPE.height, SHAPE.width).numpy() < 3
    return np.where(body[..., None], 220, background).astype(np.uint8)


def test_distance_is_to_the_nearest_visible_limb():
    pose = np.zeros((1, 33, 3), np.float32)
    assert torch.isinf(skeleton.distance(torch.from_numpy(pose), 8, 8)).all()
    pose[0, 11], pose[0, 12] = (0.25, 0.5, 1), (0.75, 0.5, 1)  # shoulders alone: one limb, four pixels long
    found = skeleton.distance(torch.from_numpy(pose), 8, 8)[0]
    assert found[3, 4] == found[4, 4] == 0.5 and found[0, 4] == 3.5
    assert found[3, 7] == pytest.approx((1.5**2 + 0.5**2) ** 0.5)
    assert (skeleton.draw(torch.from_numpy(pose), 8, 8)[0].max(0).values > -1).eq(found < 1.25).all()


def test_who_draws_the_wanted_pose_is_nearer_to_it():
    reference, wanted = person(-0.7, 1), person(0.35)
    pictures, noise = (
        shown(wanted),
        np.random.default_rng(2).integers(0, 256, (SHAPE.frames, 64, 48, 3)).astype(np.uint8),
    )

    def away(results):
        return posing.drawn_distance(shown(reference)[0], reference[0], results, wanted)

    assert away(pictures) < 0.01 < away(shown(person(0.0))) < away(noise)
    still = np.repeat(shown(reference), SHAPE.frames, 0)
    assert away(still) == 1, "who draws nothing is as far as can be"
    part = pictures.copy()
    part[:, :32] = shown(reference)[:, :32]
    assert away(part) > 5 * away(pictures) + 0.05, "who draws but a part of the person is not near to the pose"


def test_the_comparison_is_at_a_loss_that_had_to_be_worked_for():
    def target(*losses, before):
        return demo.worthwhile([{"held_out_loss": loss} for loss in losses], before).compare.target_loss

    assert target(0.2, 0.25, before=0.3) == 0.25
    assert target(0.31, before=0.3) < 0.3, "plain training that learned nothing sets no target"


def test_pictures_have_a_row_for_everybody(tmp_path):
    poses = person(0.2, 12)
    video = shown(poses)
    motion = motions.Motion("cam", video[6], poses, video)
    rows = demo.frames_to_show(motion, dict.fromkeys((demo.BEFORE, *demo.ARMS), 255 - video))
    picture, moving = demo.pictures(dict.fromkeys(demo.SUBJECTS, rows), tmp_path)
    count = 2 * (4 + len(demo.ARMS))  # reference, pose, before and truth beside the arms
    assert Image.open(picture).height // count in range(192, 240)
    assert Image.open(moving).n_frames == 2 * 12


@pytest.mark.parametrize(("pairs", "times"), [([], 1), (["schedule.shapes=[{frames: 1}]"], 2)])
def test_clips_are_encoded_at_every_shape_of_every_arm(pairs, times, tmp_path):
    arms = [demo.arm("person", name, 0, 9.0, tmp_path, None, pairs) for name in ("full", "progressive", "entprog")]
    ladders = demo.ladders(arms)
    encoded = {shape for ladder in ladders for shape in plans.ladder(ladder, SHAPE, last=False)}
    wanted = [set(plans.ladder(arm.schedule, arm.data.shape, last=False)) for arm in arms]
    assert len(ladders) == times and encoded == set().union(*wanted) and len(encoded) == times + 1


def test_a_finished_demo_tells_again_what_came_out(tmp_path, capsys, monkeypatch):
    runs = {
        subject: [demo.arm(subject, name, 0, 1.0, tmp_path, None, None) for name in demo.ARMS]
        for subject in demo.SUBJECTS
    }
    monkeypatch.setattr(demo.fingerprints, "base", lambda model: "base")
    seed = {"held_out_loss": 0.2, "seconds": 75.0, "pose": 0.01}
    came = {
        "before": 0.3, "arms": dict.fromkeys(demo.ARMS, seed), "pose": {"before": 0.05, "truth": 0.002},
        "compared": {"headline": "sooner"}, "page": "page.html",
    }  # fmt: skip
    result = came | {
        "real": came | {"arms": dict.fromkeys(demo.ARMS, seed | {"held_out_loss": 0.24, "pose": 0.05})},
        "prepared": {"splits": {"train": {"clips": 150}, "held_out": {"clips": 17}}},
        "picture": "demo.png", "moving_picture": "demo.gif",
    }  # fmt: skip
    every = [config.settings(experiment) for subject in runs.values() for experiment in subject]
    identity = config.digest(every, "base")
    (tmp_path / "finished.json").write_text(json.dumps({"identity": identity, "result": result}))
    assert demo.run(runs, tmp_path, verbose=False) == result
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 3 + 2 * (2 + len(demo.ARMS)), "ten lines below the title where two arms were trained"
    assert "(-33%)" in lines[2] and "0.010 off the pose, nearer" in lines[2], lines
    assert "150 clips" in lines[6] and "(-20%)" in lines[7] and "no nearer" in lines[7], lines


@pytest.mark.parametrize(
    ("pair", "wrong"),
    [("schedule.kind=entprog", "leave it out"), ("train.seed=3", "leave it out"),
     ("data.shape.height=32", "rendered in"), ("data.shape.frames=9", "rendered in")],
)  # fmt: skip
def test_settings_that_the_demo_cannot_have_are_refused_before_anything_is_done(pair, wrong, tmp_path):
    done = CliRunner().invoke(demo.app, ["--output", str(tmp_path / "out"), "--set", pair])
    assert done.exit_code == 2 and wrong in " ".join(done.output.split()), done.output
    assert not (tmp_path / "out").exists()


def test_a_file_of_settings_is_over_the_subject_s_own(tmp_path):
    (tmp_path / "mine.yaml").write_text("train: {learning_rate: 1.0e-3}")
    for given, rates in ((None, (2e-3, 5e-4)), ([tmp_path / "mine.yaml"], (1e-3, 1e-3))):
        arms = [demo.arm(subject, "full", 0, 1.0, tmp_path, given, None) for subject in ("person", "real")]
        assert tuple(arm.train.learning_rate for arm in arms) == rates


# ---- the rendered person ----


def test_the_person_that_comes_with_the_project_moves_on_where_a_clip_ends(tmp_path):
    demo.copy_person(tmp_path / "shards")
    (tmp_path / "shards" / "dataset.json").unlink()  # as after a kill
    demo.copy_person(tmp_path / "shards")
    dataset = shards.read_dataset(tmp_path / "shards")
    shards.verify(dataset)
    assert dataset.shape == cli.settings(config.Experiment, "demo", None, None).data.shape
    held_out = demo.rendered_motion(tmp_path)
    moves = np.abs(np.diff(held_out.motion.pose[..., :2], axis=0)).mean((1, 2))
    between = moves[dataset.shape.frames - 1 :: dataset.shape.frames]
    assert len(moves) == 39 and between.max() <= 1.5 * moves.max(initial=0, where=np.arange(39) % 5 != 4)
    assert posing.drawn_distance(
        held_out.motion.reference, held_out.own, held_out.motion.video, held_out.motion.pose
    ) < 0.02, "pose and picture belong together"  # fmt: skip
    assert (np.load(held_out.pose)["pose"] == held_out.motion.pose).all()


def test_the_base_is_judged_at_the_timesteps_that_its_runs_are_judged_at(tmp_path):
    demo.copy_person(tmp_path / "person" / "shards")
    few = ["data.held_out_clips=2", "data.held_out_draws=1"]
    plain, other = (
        demo.loss_before(demo.arm("person", "full", 0, 1.0, tmp_path, None, [*few, *more]))
        for more in ([], ["train.timestep_shift=5"])
    )
    assert abs(other - plain) > 0.001


def test_a_mirror_swaps_sides_and_twice_is_nothing():
    frame = np.random.default_rng(0).normal(size=44)
    once = demo_person.mirrored(frame)
    assert (demo_person.mirrored(once) == frame).all()
    right_knee, left_knee = 20, 34
    assert once[right_knee] == frame[left_knee] and once[left_knee] == frame[right_knee]


# ---- the base ----


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base of a second's training on noise, in its folders."""
    place = tmp_path_factory.mktemp("base")
    rng = np.random.default_rng(0)

    def clips(count):
        video = torch.from_numpy(rng.integers(0, 256, (count, SHAPE.frames, 96, 48), dtype=np.uint8))
        reference = torch.from_numpy(rng.integers(0, 256, (count, 64, 48, 3), dtype=np.uint8))
        return Clips(video, reference, torch.from_numpy(person(0.1)).expand(count, -1, -1, -1), torch.arange(count))

    tiny = ["model.init.num_layers=2", "model.init.num_attention_heads=1", "model.init.ffn_dim=16"]
    parts = demo_base.divided(cli.settings(config.Experiment, "demo_base", None, tiny), 1.0, place)
    material = demo_base.Material(clips(24), clips(4), clips(4), "a")
    return place, parts, material


def test_a_base_is_trained_small_first_kept_in_half_precision_and_goes_on(made, monkeypatch):
    place, parts, material = made
    monkeypatch.setattr(demo_base.common, "RESULTS", place)
    monkeypatch.setattr(demo_base, "SHOWN_STEPS", 2)
    small, whole = parts
    assert (small.experiment.data.shape.height, whole.experiment.data.shape.height) == (32, 64)
    figures = demo_base.run(parts, material, place, place / "left", 1.0)
    of_vae = sum(p.numel() for p in AutoencoderKLWan(**demo_vae.CONFIGURATION).parameters())
    assert figures["bytes"] < 2 * (figures["parameters"] + of_vae) + 80_000
    loaded = models.family("wan").load(config.Model(base=str(place / "left"), conditions=["reference", "pose"]))
    assert demo_base.judged(loaded, material.held_out) == figures["held_out_loss"], "what was measured is what is kept"
    record = json.loads((place / "demo_base.json").read_text())
    assert record["figures"][0]["clips_seen"] > 16 and record["curves"].keys() == {"vae", "small", "whole"}

    assert figures["vae_psnr_db"].keys() == {"held_out", "real"}
    vae = (place / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert demo_base.encoder(material, place / "vae", 1e6)["curve"] == record["curves"]["vae"], "a longer run keeps it"
    assert (place / "vae" / "diffusion_pytorch_model.safetensors").read_bytes() == vae
    done = demo_base.trained(small, material)
    assert demo_base.trained(small, material) == done, "a finished part is not done again"
    more = {"train": {"seconds": done["seconds"] + 1e-4}}  # less than a step takes
    longer = replace(small, experiment=config.build(config.merge(small.experiment.model_dump(), more)))
    assert demo_base.trained(longer, material)["clips"] == done["clips"] + demo_base.SMALL_BATCH


def test_the_base_that_comes_with_the_project_fits_the_preset():
    size = sum(path.stat().st_size for path in demo.BASE.rglob("*") if path.is_file())
    assert size <= 10e6
    experiment = demo.arm("real", "full", 0, 1.0, demo.BASE, None, None)
    network = models.family("wan").inspect(experiment.model, experiment.data.shape)
    assert network.conditions == ("reference", "pose")


def test_the_vae_of_single_frames_sees_every_frame_of_a_clip_alike(made):
    place, _, material = made
    curve = demo_vae.train(demo_base.frames(material), 2.0, place / "a_vae", lambda line: None)
    assert curve["steps"] >= 1
    vae = AutoencoderKLWan.from_pretrained(place / "a_vae", torch_dtype=torch.float32).eval()
    frame = demo_base.frames(material)()[:1]
    clip = frame.expand(-1, -1, SHAPE.frames, -1, -1)
    together, alone = (vae.encode(video).latent_dist.mode() for video in (clip, frame))
    assert together.shape[2] == SHAPE.frames
    torch.testing.assert_close(together, alone.expand_as(together), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        vae.decode(together).sample, vae.decode(alone).sample.expand_as(clip), rtol=1e-3, atol=1e-3
    )
    assert len(vae.config.latents_std) == demo_vae.CHANNELS and min(vae.config.latents_std) > 0


def test_clips_that_wans_vae_would_cut_short_are_refused():
    geometry = WanDenoiser.geometry(
        SimpleNamespace(patch_size=(1, 2, 2), rope_max_seq_len=64), AutoencoderKLWan(**demo_vae.CONFIGURATION)
    )
    geometry.check(SHAPE)
    with pytest.raises(UserError, match="frames"):
        geometry.check(SHAPE.model_copy(update={"frames": 4}))
