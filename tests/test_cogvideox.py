"""Image-to-video CogVideoX: the network sees at training what its diffusers pipeline shows it at inference."""

import json
from types import SimpleNamespace

import diffusers
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from entprog.config import ClipShape, Drop, Generate, Model
from entprog.data import latents as cache
from entprog.diffusion import dropping, sampling
from entprog.errors import UserError
from entprog.models import adapters
from entprog.models.cogvideox import inspect, load
from helpers import bases
from helpers.families import TINY, clips
from helpers.networks import tiny_experiment
from helpers.recording import calls
from pipelines import adapter
from pipelines.training import checks

SHAPE = ClipShape(frames=9, height=64, width=64, fps=8)


@pytest.fixture(scope="module", params=[False, True], ids=["1.0", "1.5"])
def made(request, tmp_path_factory):
    """(pipeline, its folder, whether it takes frames in pairs)"""
    folder = tmp_path_factory.mktemp("cogvideox")
    return bases.cogvideox(folder, request.param), folder, request.param


def of(folder, **settings):
    return Model(family="cogvideox", base=str(folder), **settings)


def test_inputs_at_training_are_those_of_the_pipeline(made):
    pipe, folder, of_pairs = made
    denoiser, batch = load(of(folder)), clips(1, SHAPE)
    assert denoiser.native and denoiser.conditions == ("reference", "pose") and denoiser.input_channels == (8, 4)
    theirs = calls(pipe.transformer, lambda: pipe(
        Image.fromarray(batch.reference[0].numpy()), height=64, width=64, num_frames=9, num_inference_steps=2,
        guidance_scale=1.0, prompt_embeds=denoiser.text, output_type="latent",
    ))  # fmt: skip
    assert len(theirs) == 2
    conditions = denoiser.condition(batch.reference, batch.pose)
    extra = int(of_pairs)  # 3 latent frames, of 1.5 one more before them
    for told in theirs:
        hidden = told["hidden_states"].transpose(1, 2)
        t = denoiser.process.t(told["timestep"].float())
        (ours,) = calls(denoiser.network, lambda n=hidden[:, :4, extra:], t=t: denoiser.predict(n, t, conditions))
        seen = ours["hidden_states"].transpose(1, 2)
        assert seen.shape == (1, 12, 3 + extra, 8, 8) and hidden[:, 4:8, 0].any() and not hidden[:, 4:8, 1:].any()
        torch.testing.assert_close(seen[:, 4:8], hidden[:, 4:8], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(seen[:, :4, extra:], hidden[:, :4, extra:], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(seen[:, 8:, extra:], conditions["pose"])
        assert (told["ofs"] is not None) == of_pairs
        for name in ("timestep", "ofs", "image_rotary_emb", "encoder_hidden_states"):
            for one, other in zip(_tensors(ours[name]), _tensors(told[name]), strict=True):
                torch.testing.assert_close(one, other.to(one), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_in_training_the_image_has_a_little_noise_of_its_own(made):
    _, folder, of_pairs = made
    denoiser, batch = load(of(folder)), clips(2, SHAPE)
    seen, clean = denoiser.encode(batch).conditions, denoiser.condition(batch.reference, batch.pose)
    assert torch.equal(seen["pose"], clean["pose"]) and not seen["reference"][:, :, 1:].any()
    alone = denoiser.encode(batch.part(slice(1, 2))).conditions["reference"]
    torch.testing.assert_close(alone, seen["reference"][1:], rtol=1e-4, atol=1e-4)
    picture = batch.reference.permute(0, 3, 1, 2).unsqueeze(2) / 127.5 - 1
    seeds = [torch.Generator().manual_seed(int(one.long().sum())) for one in batch.reference]
    noise = torch.stack([torch.empty(3, 1, 64, 64).normal_(generator=seed) for seed in seeds])
    scale = denoiser.vae.config.scaling_factor
    noisy = denoiser.latents(picture + 0.05 * noise) / (scale**2 if of_pairs else 1)
    torch.testing.assert_close(seen["reference"][:, :, :1], noisy, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(seen["reference"], clean["reference"], atol=1e-3)
    shards = SimpleNamespace(fingerprint="")
    model = {"family": "cogvideox", "init": {}, "vae": "auto", "base": str(folder)}
    said = checks.deciding(tiny_experiment(model=model), shards)["inputs of model.base"]
    assert said == "all, noise on the image"


def _tensors(value):
    return [] if value is None else [value] if isinstance(value, torch.Tensor) else list(value)


def test_step_0_is_the_base_and_a_saved_network_the_same(made, tmp_path):
    _, folder, of_pairs = made
    denoiser, batch = load(of(folder)), clips(2, SHAPE)
    encoded, t = denoiser.encode(batch), torch.tensor([0.3, 0.8])
    with torch.no_grad():
        got = denoiser.predict(encoded.clean, t, encoded.conditions)
        base = load(of(folder, conditions=("reference",)))
        alone = base.predict(encoded.clean, t, encoded.conditions)
        torch.testing.assert_close(alone, got, rtol=0, atol=1e-5 * of_pairs)  # a CPU's Linear of a slice: the last bit
        denoiser.save(tmp_path / "model", shape=SHAPE)
        again = load(of(tmp_path / "model"))
        assert again.native and again.conditions == denoiser.conditions
        assert torch.equal(again.encode(batch).conditions["reference"], encoded.conditions["reference"])
        torch.testing.assert_close(again.predict(encoded.clean, t, encoded.conditions), got, rtol=1e-4, atol=1e-5)
        dropped = dropping.dropped(denoiser, encoded, Drop(reference=1.0), 0).conditions
        assert not dropped["reference"].any()
        size, settings = (2, *denoiser.latent_shape(SHAPE)), Generate(steps=2, reference_guidance=2.0)
        drawn = sampling.sample(denoiser, encoded.conditions, size, settings, [0, 1], window=2)
    assert drawn.isfinite().all()
    text_to_video = load(Model(family="cogvideox", init=TINY["cogvideox"]["init"], vae=str(folder)))
    keys = [cache.key(one, "cogvideox", SHAPE) for one in (denoiser, again, text_to_video)]
    assert keys[0] == keys[1] != keys[2] and not text_to_video.native


def test_a_checkpoint_of_an_older_version_keeps_its_own_form(made, tmp_path):
    """The image as zeros, the reference in new channels: what its weights were trained on."""
    pipe, folder, _ = made
    load(of(folder)).save(tmp_path / "old", shape=SHAPE)
    sizes = {**pipe.transformer.config, "in_channels": 8 + 8}
    diffusers.CogVideoXTransformer3DModel.from_config(sizes).save_pretrained(tmp_path / "old" / "transformer")
    about = json.loads((tmp_path / "old" / "entprog.json").read_text()) | {"input_channels": [8, 8]}
    del about["native"]
    (tmp_path / "old" / "entprog.json").write_text(json.dumps(about))
    denoiser = load(of(tmp_path / "old"))
    encoded = denoiser.encode(clips(1, SHAPE))
    (told,) = calls(denoiser.network, lambda: denoiser.predict(encoded.clean, torch.tensor([0.5]), encoded.conditions))
    seen = told["hidden_states"].transpose(1, 2)[:, :, -3:]
    assert denoiser.form == "" and not seen[:, 4:8].any()
    torch.testing.assert_close(seen[:, 8:12], encoded.conditions["reference"])
    assert torch.equal(encoded.conditions["reference"][:, :, 0], encoded.conditions["reference"][:, :, 2])
    given = [
        "extract",
        "--before",
        str(folder),
        "--after",
        str(tmp_path / "old"),
        "--output",
        str(tmp_path / "adapter"),
    ]
    done = CliRunner().invoke(adapter.app, given)
    assert done.exit_code == 2 and "was trained by an earlier version" in done.output
    assert not (tmp_path / "adapter").exists()


def test_what_does_not_fit_is_one_line(made, tmp_path):
    pipe, folder, _ = made
    with pytest.raises(UserError, match=r"was trained with reference; add reference to model\.conditions") as error:
        inspect(of(folder, conditions=("pose",)))
    assert "\n" not in str(error.value)
    sizes = {**pipe.transformer.config, "in_channels": 8 + 3}
    diffusers.CogVideoXTransformer3DModel.from_config(sizes).save_pretrained(tmp_path / "transformer")
    pipe.vae.save_pretrained(tmp_path / "vae")
    unknown = (
        r"takes 11 channels, 7 of them for what family cogvideox does not know, beside 4 of the clip's latents: give"
    )
    with pytest.raises(UserError, match=unknown) as error:
        inspect(of(tmp_path, conditions=()))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("condition", ["reference", "pose"])
def test_an_adapter_sees_what_the_base_that_it_was_trained_on_sees(condition, tmp_path):
    """A text-to-video base with one condition has as many channels as an image-to-video base, and is none."""
    init = {**TINY["cogvideox"]["init"], "in_channels": 4, "out_channels": 4}
    kind, sizes = TINY["cogvideox"]["vae"]
    kind(**sizes).save_pretrained(tmp_path / "base" / "vae")
    diffusers.CogVideoXTransformer3DModel(**init).save_pretrained(tmp_path / "base" / "transformer")
    settings = {"family": "cogvideox", "conditions": (condition,)}
    load(Model(base=str(tmp_path / "base"), **settings)).save(tmp_path / "trained", shape=SHAPE)
    base = load(Model(base=str(tmp_path / "trained"), **settings))
    layer = "transformer_blocks.0.attn1.to_q"
    width = base.network.get_submodule(layer).in_features
    pair = adapters.Pair(torch.zeros(1, width), torch.zeros(width, 1), 1.0)
    about = {"family": "cogvideox", "conditions": [condition], "skeleton": base.skeleton, "points": base.points}
    adapters.write(tmp_path / "adapter", adapters.Adapter({layer: pair}, {}, about), base.PART)
    with_it = inspect(Model(base=str(tmp_path / "trained"), adapter=str(tmp_path / "adapter"), **settings))
    assert not base.native and not with_it.native and with_it.form == base.form == ""


def test_an_adapter_of_an_earlier_version_is_refused_by_an_image_to_video_base(made, tmp_path):
    _, folder, _ = made
    base = load(of(folder))
    layer = "transformer_blocks.0.attn1.to_q"
    width = base.network.get_submodule(layer).in_features
    pair = adapters.Pair(torch.zeros(1, width), torch.zeros(width, 1), 1.0)
    about = {"family": "cogvideox", "conditions": ["reference", "pose"], "points": base.points}
    for name, more in (("old", {}), ("new", {"native": True})):
        adapters.write(tmp_path / name, adapters.Adapter({layer: pair}, {}, about | more), base.PART)
    assert inspect(of(folder, adapter=str(tmp_path / "new"))).native
    with pytest.raises(UserError, match=r"old was trained by an earlier version, .* train it anew"):
        inspect(of(folder, adapter=str(tmp_path / "old")))
