"""Stable Video Diffusion: the network sees at training what its diffusers pipeline shows it at inference."""

import json
import shutil

import diffusers
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from entprog.config import ClipShape, Drop, Generate, Model, build
from entprog.data import latents as cache
from entprog.diffusion import dropping, sampling
from entprog.errors import UserError
from entprog.models import fingerprints, svd
from entprog.models.svd import inspect, load
from helpers import bases
from helpers.families import clips
from helpers.recording import calls
from pipelines.training import outline

SHAPE = ClipShape(frames=4, height=32, width=32, fps=7)
IMAGE_PARTS = ("image_encoder", "feature_extractor")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(pipeline, its folder, that of one without an image encoder)"""
    folder = tmp_path_factory.mktemp("svd")
    pipe = bases.svd(folder / "whole")
    without_encoder(folder / "whole", folder / "bare")
    index = json.loads((folder / "bare" / "model_index.json").read_text())
    nothing = {name: [None, None] for name in IMAGE_PARTS}  # as diffusers writes it
    (folder / "bare" / "model_index.json").write_text(json.dumps(index | nothing))
    return pipe, folder / "whole", folder / "bare"


def without_encoder(folder, new):
    shutil.copytree(folder, new, ignore=shutil.ignore_patterns(*IMAGE_PARTS))


def of(folder, **settings):
    return Model(family="svd", base=str(folder), **settings)


def test_inputs_at_training_are_those_of_the_pipeline(made):
    pipe, folder, _ = made
    denoiser, batch = load(of(folder)), clips(1, SHAPE)
    assert denoiser.native and denoiser.conditions == ("reference", "pose")
    picture = batch.reference[0]
    seed = torch.Generator().manual_seed(int(picture.long().sum()))  # of the noise that the reference has
    theirs = calls(pipe.unet, lambda: pipe(
        Image.fromarray(picture.numpy()), height=32, width=32, num_frames=4, num_inference_steps=2,
        max_guidance_scale=1.0, generator=seed, output_type="latent",
    ))  # fmt: skip
    assert len(theirs) == 2
    encoded = denoiser.encode(batch)
    for told in theirs:
        sample, t = told["sample"].transpose(1, 2), denoiser.process.t(told["timestep"].float().reshape(1))
        (ours,) = calls(denoiser.network, lambda n=sample[:, :4], t=t: denoiser.predict(n, t, encoded.conditions))
        seen = ours["sample"].transpose(1, 2)
        torch.testing.assert_close(seen[:, :8], sample, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(seen[:, 8:], encoded.conditions["pose"])
        assert told["encoder_hidden_states"].any()
        assert told["added_time_ids"][0].tolist() == pytest.approx([6, 127, 0.02])
        for name in ("encoder_hidden_states", "added_time_ids", "timestep"):
            torch.testing.assert_close(ours[name].flatten(), told[name].float().flatten(), rtol=1e-4, atol=1e-4)


def test_the_embedding_is_cached_and_dropped_with_the_reference(made):
    _, folder, _ = made
    denoiser, batch = load(of(folder)), clips(2, SHAPE)
    encoded = denoiser.encode(batch)
    assert encoded.conditions["image"].shape == (2, 1, 8) and not torch.equal(*encoded.conditions["image"])
    one = cache.compact(encoded.part(slice(0, 1)))
    assert set(one) == {"clean", "conditions.reference", "conditions.pose", "conditions.image"}
    again = denoiser.encode(batch.part(slice(0, 1))).conditions  # noise too is the clip's own
    for name, value in again.items():
        torch.testing.assert_close(value, encoded.conditions[name][:1], rtol=1e-4, atol=1e-4)
    dropped = dropping.dropped(denoiser, encoded, Drop(reference=1.0, text=1.0), 0)
    (told,) = calls(denoiser.network, lambda: denoiser.predict(encoded.clean, torch.rand(2), dropped.conditions))
    assert not told["encoder_hidden_states"].any() and not told["sample"][:, :, 4:8].any()
    shown = dropping.dropped(denoiser, encoded, Drop(text=1.0), 0)
    (told,) = calls(denoiser.network, lambda: denoiser.predict(encoded.clean, torch.rand(2), shown.conditions))
    assert torch.equal(told["encoder_hidden_states"], encoded.conditions["image"]), "it is no text"
    size = (2, *denoiser.latent_shape(SHAPE))
    settings = Generate(steps=2, reference_guidance=2.0)
    drawn = [sampling.sample(denoiser, encoded.conditions, size, settings, [0, 1], window=w) for w in (None, 2)]
    assert all(latents.isfinite().all() for latents in drawn)


def test_a_saved_network_sees_the_same_and_an_older_one_what_it_was_trained_on(made, tmp_path):
    _, folder, bare = made
    denoiser, batch = load(of(folder)), clips(2, SHAPE)
    encoded = denoiser.encode(batch)
    denoiser.save(tmp_path / "model", shape=SHAPE)
    again = load(of(tmp_path / "model"))
    for name, value in again.encode(batch).conditions.items():
        assert torch.equal(value, encoded.conditions[name]), name
    same, own, other = (cache.key(one, "svd", SHAPE) for one in (again, denoiser, load(of(bare))))
    assert same == own != other
    assert fingerprints.base(of(folder)) != fingerprints.base(of(bare))
    about = json.loads((tmp_path / "model" / "entprog.json").read_text())
    assert about["native"]
    pipe = diffusers.DiffusionPipeline.from_pretrained(
        tmp_path / "model", custom_pipeline=str(tmp_path / "model"), trust_remote_code=True
    )
    with pytest.raises(ValueError, match=r"embedding of the reference in place of a text: give no prompt_embeds"):
        pipe.text(torch.ones(1, 1, 8), None)
    with pytest.raises(ValueError, match=r"embedding of the reference in place of a text: give no text_guidance"):
        pipe.no_text({"prompt_embeds": torch.ones(1, 1, 8)})
    (tmp_path / "model" / "entprog.json").write_text(json.dumps({k: v for k, v in about.items() if k != "native"}))
    older = load(of(tmp_path / "model"))
    assert older.image_encoder is None and older.form == ""
    for one in (older, load(of(bare))):
        conditions = one.encode(batch).conditions
        (told,) = calls(one.network, lambda o=one, c=conditions: o.predict(encoded.clean, torch.rand(2), c))
        assert set(conditions) == {"reference", "pose"} and not told["encoder_hidden_states"].any()
        assert told["added_time_ids"].tolist() == [[6, 127, 0]] * 2
        assert not torch.equal(conditions["reference"], encoded.conditions["reference"]), "without noise"


def test_what_a_base_lacks_is_said(made, tmp_path):
    _, folder, bare = made
    experiment = build({"model": {"family": "svd", "base": str(bare)}, "train": {"steps": 4}})
    line = f"{bare} has no image_encoder/ and feature_extractor/, or was trained without them: cross-attention sees"
    dataset = _Dataset()
    assert any(line in note for note in outline.notes(experiment, dataset, inspect(experiment.model)))
    assert not any("cross-attention" in note for note in outline.notes(experiment, dataset, inspect(of(folder))))
    save_file({"prompt_embeds": torch.ones(1, 8)}, tmp_path / "prompt.safetensors")
    given = {"prompt_embeds": str(tmp_path / "prompt.safetensors")}
    assert torch.equal(load(of(bare, **given)).text, torch.ones(1, 1, 8))
    with pytest.raises(
        UserError, match=r"^model\.prompt_embeds: .* CLIP's embedding of each clip's .*: leave the"
    ) as e:
        inspect(of(folder, **given))
    assert "\n" not in str(e.value)
    load(of(folder)).save(tmp_path / "tuned", shape=SHAPE)
    shutil.rmtree(tmp_path / "tuned" / "feature_extractor")
    with pytest.raises(
        UserError, match=r"tuned has no feature_extractor/, which this network was trained with: copy it"
    ):
        inspect(of(tmp_path / "tuned"))


def test_an_encoder_that_its_index_names_and_nobody_fetched_is_missing(made, tmp_path, monkeypatch):
    """An earlier version had no use for it: its copy of a base on the hub lacks it, and may stay all that there is."""
    snapshot = tmp_path / "models--someone--dancer" / "snapshots" / ("0123456789abcdef" * 3)[:40]
    without_encoder(made[1], snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(snapshot.name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    line = r"^model\.base: .* has no image_encoder/ and feature_extractor/, which this network was trained with: {}$"
    for base, remedy in (
        ("someone/dancer", "it was fetched without, .*: run this once where the hub can be reached"),
        (snapshot, "give its pipeline's whole folder, or its name on the hub"),
    ):
        with pytest.raises(UserError, match=line.format(remedy)):
            inspect(of(base))


def test_without_transformers_it_is_one_line(made, monkeypatch):
    monkeypatch.setattr("entprog.models.places.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^model\.base: the image encoder of .* needs transformers: pip install"):
        inspect(of(made[1]))
    assert not inspect(of(made[2])).native


class _Dataset:
    """Of which notes ask for the number of clips alone."""

    def clips(self, split: str) -> int:
        return 8


def test_pictures_are_made_smaller_as_the_pipeline_does():
    from diffusers.pipelines.stable_video_diffusion import pipeline_stable_video_diffusion as theirs

    for height, width in ((1024, 576), (300, 224), (64, 225)):
        picture = torch.rand(2, 3, height, width) * 2 - 1
        expected = theirs._resize_with_antialiasing(picture, (224, 224))
        torch.testing.assert_close(svd.antialiased(picture, 224), expected, rtol=1e-4, atol=1e-4)
