"""Image-to-video Wan: the network sees at training what its diffusers pipeline shows it at inference."""

import json
import shutil

import diffusers
import pytest
import torch
from PIL import Image

from entprog.config import ClipShape, Drop, Generate, Model
from entprog.data import latents as cache
from entprog.diffusion import dropping, sampling
from entprog.diffusion.objectives import noise_like
from entprog.errors import UserError
from entprog.models import fingerprints
from entprog.models.wan import WanDenoiser, inspect, load
from entprog.models.wan_vace import inspect as inspect_vace
from helpers.bases import image_to_video
from helpers.families import TINY, clips
from helpers.recording import calls

SHAPE = ClipShape(frames=9, height=32, width=32, fps=12)


@pytest.fixture(scope="module", params=[True, False], ids=["2.1", "2.2"])
def made(request, tmp_path_factory):
    """(pipeline, its folder, whether it has image tokens)"""
    folder = tmp_path_factory.mktemp("i2v")
    return image_to_video(folder, request.param), folder, request.param


def test_inputs_at_training_are_those_of_the_pipeline(made):
    pipe, folder, clip = made
    denoiser = load(Model(base=str(folder)))
    assert denoiser.conditions == ("reference", "pose") and denoiser.mask_channels == 4
    batch = clips(1, SHAPE)
    picture = Image.fromarray(batch.reference[0].numpy())
    noise = noise_like(torch.empty(1, *denoiser.latent_shape(SHAPE)), torch.tensor([0]), 5)
    theirs = calls(pipe.transformer, lambda: pipe(
        picture, height=32, width=32, num_frames=9, num_inference_steps=2, guidance_scale=1.0, latents=noise,
        prompt_embeds=torch.zeros(1, 512, 8), output_type="latent",
    ))  # fmt: skip
    assert len(theirs) == 2
    encoded = denoiser.encode(batch)
    for told in theirs:
        noisy = told["hidden_states"][:, :4]
        t = denoiser.process.t(told["timestep"].float())
        (ours,) = calls(denoiser.network, lambda n=noisy, t=t: denoiser.predict(n, t, encoded.conditions))
        torch.testing.assert_close(ours["hidden_states"][:, :12], told["hidden_states"], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours["hidden_states"][:, 12:], encoded.conditions["pose"])
        torch.testing.assert_close(ours["timestep"], told["timestep"].float(), rtol=1e-4, atol=1e-4)
        one, other = ours["encoder_hidden_states_image"], told["encoder_hidden_states_image"]
        assert (one is not None) == clip == (other is not None)
        if clip:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
            assert other.any()


def test_step_0_is_the_base_and_a_saved_network_the_same(made, tmp_path):
    pipe, folder, _ = made
    denoiser, batch = load(Model(base=str(folder))), clips(2, SHAPE)
    encoded, t = denoiser.encode(batch), torch.tensor([0.3, 0.8])
    assert ("image" in encoded.conditions) == (pipe.image_encoder is not None)
    with torch.no_grad():
        got = denoiser.predict(encoded.clean, t, encoded.conditions)
        base = load(Model(base=str(folder), conditions=("reference",)))
        assert torch.equal(got, base.predict(encoded.clean, t, encoded.conditions)), "pose's channels are zero at first"
        alone = denoiser.encode(batch.part(slice(0, 1)))
        one = denoiser.predict(alone.clean, t[:1], alone.conditions)
        torch.testing.assert_close(one, got[:1], rtol=1e-3, atol=1e-4)
        denoiser.save(tmp_path / "model", shape=SHAPE)
        again = load(Model(base=str(tmp_path / "model")))
        assert again.mask_channels == 4 and again.conditions == denoiser.conditions
        for name, value in again.encode(batch).conditions.items():
            assert torch.equal(value, encoded.conditions[name]), name
        torch.testing.assert_close(again.predict(encoded.clean, t, encoded.conditions), got, rtol=1e-4, atol=1e-5)
        assert cache.key(again, "wan", SHAPE) == cache.key(denoiser, "wan", SHAPE), "cached latents are still its own"
        plain = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "model" / "transformer")
        assert plain.config.in_channels == 16


def test_latents_are_cached_and_conditions_dropped_whole(made):
    _, folder, clip = made
    denoiser = load(Model(base=str(folder)))
    encoded = denoiser.encode(clips(2, SHAPE))
    one = cache.compact(encoded.part(slice(0, 1)))
    assert set(one) == {"clean", *(f"conditions.{name}" for name in encoded.conditions)}
    dropped = dropping.dropped(denoiser, encoded, Drop(reference=1.0), 0).conditions
    gone = {"reference", *(["image"] if clip else [])}
    for name, value in dropped.items():
        assert (not value.any()) == (name in gone) or name == "text"
    shown = dropping.without(encoded.conditions, ["pose"])
    assert all(torch.equal(shown[name], dropped[name]) for name in shown)
    settings = Generate(steps=2, reference_guidance=2.0, pose_guidance=3.0)
    size = (2, *denoiser.latent_shape(SHAPE))
    with torch.no_grad():
        made_ = sampling.sample(denoiser, encoded.conditions, size, settings, [0, 1])
        long = sampling.sample(denoiser, encoded.conditions, size, settings, [0, 1], window=2)
    assert made_.isfinite().all() and long.isfinite().all()


def test_latents_of_another_form_are_not_taken(made, tmp_path):
    """Those that a version cached which put the reference into new channels."""
    _, folder, _ = made
    denoiser = load(Model(base=str(folder)))
    text_to_video = load(Model(init={**TINY["wan"]["init"], "patch_size": [1, 2, 2]}, vae=str(folder)))
    keys = {cache.key(one, "wan", SHAPE) for one in (denoiser, text_to_video)}
    assert len(keys) == 2 and text_to_video.form == ""


def test_a_checkpoint_of_an_older_version_keeps_its_own_form(made, tmp_path):
    """Mask and image as zeros, the reference in new channels: what its weights were trained on."""
    pipe, folder, clip = made
    sizes = {**pipe.transformer.config, "in_channels": 12 + 8}
    old = diffusers.WanTransformer3DModel.from_config(sizes)
    WanDenoiser.initialise(old)
    load(Model(base=str(folder))).save(tmp_path / "old")
    old.save_pretrained(tmp_path / "old" / "transformer")
    about = json.loads((tmp_path / "old" / "entprog.json").read_text()) | {"input_channels": [12, 8]}
    (tmp_path / "old" / "entprog.json").write_text(json.dumps(about))
    denoiser = load(Model(base=str(tmp_path / "old")))
    assert denoiser.mask_channels == 0 and denoiser.image_encoder is None
    encoded = denoiser.encode(clips(1, SHAPE))
    (told,) = calls(denoiser.network, lambda: denoiser.predict(encoded.clean, torch.tensor([0.5]), encoded.conditions))
    expected = [encoded.clean, torch.zeros(1, 8, *encoded.clean.shape[2:])]
    expected += [encoded.conditions["reference"], encoded.conditions["pose"]]
    assert torch.equal(told["hidden_states"], torch.cat(expected, dim=1))
    image = told["encoder_hidden_states_image"]
    assert (image is not None) == clip and (image is None or not image.any())


def test_of_a_base_on_the_hub_its_encoder_is_fetched_too(made, monkeypatch):
    _, folder, _ = made
    asked = []

    def fetched(name, revision=None, allow_patterns=()):
        asked.append(set(allow_patterns))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetched)
    parts = {"image_encoder/*.safetensors", "image_encoder/*.json", "image_processor/*.json"}
    assert inspect(Model(base="someone/dancer")).conditions == ("reference", "pose") and parts <= asked[-1]
    with pytest.raises(UserError, match=r"set model\.family=wan"):
        inspect_vace(Model(family="wan_vace", base="someone/dancer"))
    assert not parts & asked[-1], "another family has no use for it"


def test_what_is_missing_is_one_line(made, tmp_path):
    pipe, folder, clip = made
    with pytest.raises(UserError, match=r"was trained with reference; add reference to model\.conditions") as error:
        inspect(Model(base=str(folder), conditions=("pose",)))
    assert "\n" not in str(error.value)
    pipe.transformer.save_pretrained(tmp_path / "alone" / "transformer")
    pipe.vae.save_pretrained(tmp_path / "alone" / "vae")
    if not clip:
        assert inspect(Model(base=str(tmp_path / "alone"))).conditions == ("reference", "pose")
        return
    missing = (
        r"has no image_encoder/ and image_processor/, .*: give its pipeline's whole folder, or its name on the hub$"
    )
    with pytest.raises(UserError, match=missing) as error:
        inspect(Model(base=str(tmp_path / "alone")))
    assert "\n" not in str(error.value)
    load(Model(base=str(folder))).save(tmp_path / "tuned", shape=SHAPE)
    shutil.rmtree(tmp_path / "tuned" / "image_encoder")
    with pytest.raises(UserError, match=r"tuned has no image_encoder/, .*: copy it there again, or train anew"):
        inspect(Model(base=str(tmp_path / "tuned")))
    (tmp_path / "tuned" / "model_index.json").unlink()  # nor anything that names it
    shutil.copytree(folder / "image_encoder", tmp_path / "tuned" / "image_encoder")
    load(Model(base=str(tmp_path / "tuned"))).save(tmp_path / "again", shape=SHAPE)
    assert (tmp_path / "again" / "image_encoder" / "model.safetensors").is_file()
    before = fingerprints.base(Model(base=str(folder)))
    weights = folder / "image_encoder" / "model.safetensors"
    content = weights.read_bytes()
    try:
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert fingerprints.base(Model(base=str(folder))) != before, "the encoder is part of what a run starts from"
    finally:
        weights.write_bytes(content)
