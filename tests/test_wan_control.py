"""Fun-Control: pose and reference are where VideoX-Fun's own pipeline has control video and start image."""

import json
from types import SimpleNamespace

import pytest
import torch

from entprog.config import ClipShape, Drop, Generate, Model
from entprog.data import latents as cache
from entprog.diffusion import dropping, sampling
from entprog.errors import UserError
from entprog.media import drawing
from entprog.models.wan import WanDenoiser, inspect, load
from helpers import bases
from helpers.families import TINY, clips
from helpers.networks import tiny_experiment
from helpers.recording import calls
from pipelines.training import checks

SHAPE = ClipShape(frames=9, height=32, width=32, fps=12)
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(an image-to-video pipeline with its VAE and image encoder, the folder with Fun-Control's network)"""
    folder = tmp_path_factory.mktemp("control")
    return bases.control(folder)[0], folder


def scaled(pipe, video):
    """Latents of a video [1, 3, F, H, W] in -1..1, in the scale that networks of Wan see."""
    mean, std = (
        torch.tensor(v).view(1, -1, 1, 1, 1) for v in (pipe.vae.config.latents_mean, pipe.vae.config.latents_std)
    )
    return (pipe.vae.encode(video).latent_dist.mode() - mean) / std


@torch.no_grad()
def test_inputs_are_those_of_the_layout(made):
    """Noise, the control video's latents, the start image's in the first latent frame and zeros after it."""
    pipe, folder = made
    denoiser, batch = load(Model(base=str(folder), first_frame=False)), clips(1, SHAPE)
    assert denoiser.conditions == ("pose", "reference") and denoiser.form == "control"
    assert denoiser.skeleton == "dwpose" and denoiser.network.config.in_channels == 24, "nothing is widened"
    encoded, t = denoiser.encode(batch), torch.tensor([0.4])
    (told,) = calls(denoiser.network, lambda: denoiser.predict(encoded.clean, t, encoded.conditions))
    control = scaled(pipe, drawing.draw(batch.pose, 32, 32, "dwpose").transpose(1, 2))
    start = scaled(pipe, batch.reference.permute(0, 3, 1, 2).unsqueeze(2) / 127.5 - 1)
    after = torch.zeros(1, 8, control.shape[2] - 1, *control.shape[3:])
    expected = torch.cat([encoded.clean, control, torch.cat([start, after], dim=2)], dim=1)
    torch.testing.assert_close(told["hidden_states"], expected, **CLOSE)
    pixels = pipe.image_processor(images=[batch.reference[0].numpy()], return_tensors="pt").pixel_values
    tokens = pipe.image_encoder(pixels, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(told["encoder_hidden_states_image"], tokens, **CLOSE)
    torch.testing.assert_close(told["timestep"], t * 1000)
    dropped = dropping.dropped(denoiser, encoded, Drop(reference=1.0, pose=1.0), 0).conditions
    (told,) = calls(denoiser.network, lambda: denoiser.predict(encoded.clean, t, dropped))
    assert not told["hidden_states"][:, 8:].any() and not told["encoder_hidden_states_image"].any()


@torch.no_grad()
def test_it_is_saved_cached_and_sampled(made, tmp_path):
    _, folder = made
    denoiser, batch = load(Model(base=str(folder))), clips(2, SHAPE)
    encoded, t = denoiser.encode(batch), torch.tensor([0.3, 0.8])
    got = denoiser.predict(encoded.clean, t, encoded.conditions)
    denoiser.save(tmp_path / "model", shape=SHAPE)
    again = load(Model(base=str(tmp_path / "model")))
    assert (again.form, again.conditions, again.skeleton) == (denoiser.form, denoiser.conditions, "dwpose")
    torch.testing.assert_close(again.predict(encoded.clean, t, encoded.conditions), got, rtol=1e-4, atol=1e-5)
    assert cache.key(again, "wan", SHAPE) == cache.key(denoiser, "wan", SHAPE)
    size = (2, *denoiser.latent_shape(SHAPE))
    guided = Generate(steps=2, reference_guidance=2.0, pose_guidance=3.0)
    for window in (None, 2):
        assert sampling.sample(denoiser, encoded.conditions, size, guided, [0, 1], window=window).isfinite().all()


def test_what_it_is_shown_decides_whoever_says_so(made):
    def decides(**model):
        experiment = tiny_experiment(model={"init": {}, "vae": "auto", "base": str(made[1]), **model})
        return checks.deciding(experiment, SimpleNamespace(fingerprint="")).get("model.skeleton")

    assert decides() == decides(skeleton="dwpose") == "dwpose"
    assert decides(skeleton="limbs") is None, "as in runs of before the setting"
    assert decides(skeleton="wan_animate") == "wan_animate"


def test_a_base_with_as_many_channels_that_was_widened_is_none():
    """By an earlier version, which had the pose first."""
    seen = ("pose", "reference")
    assert WanDenoiser.form_of((24,), 8, seen) == "control" != WanDenoiser.form_of((24, 8, 8), 8, seen)


def test_a_text_to_video_base_that_saw_the_pose_first_is_none(tmp_path):
    """Its input layer has the same channels in the same order, and its reference is repeated over all frames."""
    pixels = {"vae": "none", "init": TINY["wan"]["init"]}
    load(Model(**pixels, conditions=("pose",))).save(tmp_path / "pose")
    both = load(Model(base=str(tmp_path / "pose")))
    assert both.conditions == ("pose", "reference") and both.form == "" and both.network.config.in_channels == 9
    both.save(tmp_path / "both")
    assert load(Model(base=str(tmp_path / "both"))).form == ""


def test_what_it_cannot_do_without_is_one_line(made, tmp_path):
    _, folder = made
    for left in ("pose", "reference"):
        with pytest.raises(UserError, match=r"was trained with pose, reference; add .* to model\.conditions") as error:
            inspect(Model(base=str(folder), conditions=(left,)))
        assert "\n" not in str(error.value)
    bare = tmp_path / "bare"
    for name in ("transformer", "vae"):
        (bare / name).mkdir(parents=True)
        for path in (folder / name).iterdir():
            (bare / name / path.name).write_bytes(path.read_bytes())
    with pytest.raises(UserError, match=r"has no image_encoder/ and image_processor/"):
        inspect(Model(base=str(bare)))
    written = bare / "transformer" / "config.json"
    plain = json.loads(written.read_text())
    for own, said in (
        ({"in_dim": 48}, "has Wan's own configuration"),
        ({"add_ref_conv": True}, r"ref_conv, from version 1\.1"),
    ):
        written.write_text(json.dumps(plain | own))
        with pytest.raises(UserError, match=said) as error:
            inspect(Model(base=str(bare)))
        assert "\n" not in str(error.value)
