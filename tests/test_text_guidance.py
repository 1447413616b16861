"""Guidance by text: what diffusers' own pipelines make with `guidance_scale`, in `generate` and the saved pipeline."""

import json
import shutil
from dataclasses import replace

import diffusers
import pytest
import torch
from PIL import Image

from entprog import models
from entprog.config import ClipShape, Drop, Generate, Model
from entprog.diffusion import dropping, sampling
from entprog.diffusion.objectives import noise_like
from entprog.diffusion.samplers import sampler
from entprog.errors import UserError
from entprog.media.drawing import draw
from entprog.models import adapters, captions, folders
from entprog.models.wan import WanDenoiser, load
from helpers import bases, encoders, real_clips
from helpers.families import TINY, clips
from helpers.networks import latents
from helpers.recording import calls
from pipelines.generating import checkpoints, protocol

SHAPE = ClipShape(frames=9, height=32, width=32, fps=12)
STEPS, SAID = 2, "a person dances"
GUIDED = Generate(steps=STEPS, seed=5, sampler="UniPCMultistepScheduler", text=SAID, text_guidance=5.0)


def text_to_video(folder):
    torch.manual_seed(0)
    kind, sizes = TINY["wan"]["vae"]
    own = {"in_channels": 4, "out_channels": 4, "patch_size": [1, 2, 2]}
    network = diffusers.WanTransformer3DModel(**{**TINY["wan"]["init"], **own}).eval()
    WanDenoiser.initialise(network)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    parts = {"tokenizer": None, "text_encoder": None, "vae": kind(**sizes).eval(), "scheduler": scheduler}
    pipe = diffusers.WanPipeline(transformer=network, **parts)
    pipe.save_pretrained(folder)
    return pipe


@pytest.fixture(scope="module", params=["text to video", "image to video"])
def made(request, tmp_path_factory):
    """(its own pipeline with encoders, what that is called with, the folder of a network trained with captions)

    Image-to-video's is given texts that are encoded: of itself it does nothing without ftfy."""
    root = tmp_path_factory.mktemp("guided")
    first_frame = request.param == "image to video"
    pipe = bases.image_to_video(root / "base", clip=False) if first_frame else text_to_video(root / "base")
    with torch.no_grad():  # so that texts matter
        for parameter in pipe.transformer.parameters():
            parameter += 0.3 * torch.randn(parameter.shape)
    pipe.transformer.save_pretrained(root / "base" / "transformer")
    pipe.register_modules(**encoders.pipeline(root / "base", "wan"))
    pipe.set_progress_bar_config(disable=True)
    row = {**real_clips.row("cam01", "train", 0.0, SHAPE), "caption": SAID}
    dataset = real_clips.write(root / "shards", {"train": [[row]], "held_out": [[row]]}, SHAPE)
    settings = Model(base=str(root / "base"))
    texts = captions.prepared(settings, dataset, "caption")
    texts.given_to(load(settings)).save(root / "model", shape=SHAPE)
    encoders.encoder(root / "model")
    if not first_frame:
        return pipe, {"prompt": SAID}, root / "model"
    picture = Image.fromarray(clips(1, SHAPE).reference[0].numpy())
    embeds = {"prompt_embeds": texts.of(SAID)["text"], "negative_prompt_embeds": texts.of("")["text"]}
    return pipe, {"image": picture, **embeds}, root / "model"


def sampled(folder, settings):
    """(latents, how often the network was called) by `generate`'s own way to a checkpoint"""
    found = checkpoints.find(str(folder), settings)
    denoiser, batch = checkpoints.load(found, settings), clips(1, SHAPE)
    conditions, out = denoiser.condition(batch.reference, batch.pose), []
    size = (1, *denoiser.latent_shape(SHAPE))
    told = calls(denoiser.network, lambda: out.append(sampling.sample(denoiser, conditions, size, settings, [0])))
    return out[0], len(told)


@torch.no_grad()
def test_it_is_what_the_base_s_own_pipeline_makes(made):
    pipe, given, folder = made
    denoiser, batch = checkpoints.load(checkpoints.find(str(folder), Generate()), Generate()), clips(1, SHAPE)
    pipe.scheduler = sampler(denoiser.process, GUIDED.sampler)
    noise = noise_like(torch.empty(1, *denoiser.latent_shape(SHAPE)), torch.tensor([0]), GUIDED.seed)
    run = {"num_frames": 9, "num_inference_steps": STEPS, "latents": noise, "output_type": "latent"}
    theirs = [pipe(height=32, width=32, guidance_scale=scale, **given, **run).frames for scale in (1.0, 5.0)]
    assert not torch.allclose(*theirs, atol=1e-2)
    for strength, expected in zip((1.0, 5.0), theirs, strict=True):
        ours, told = sampled(folder, GUIDED.model_copy(update={"text_guidance": strength}))
        assert told == STEPS * (1 if strength == 1 else 2)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    saved = diffusers.DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(folder), trust_remote_code=True)
    saved.register_modules(text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer, scheduler=pipe.scheduler)
    saved.set_progress_bar_config(disable=True)
    run |= {"reference": batch.reference[0], "pose": draw(batch.pose[0], 32, 32, denoiser.skeleton)}
    for more, expected in zip(({}, {"text_guidance": 5.0}), theirs, strict=True):
        torch.testing.assert_close(saved(prompt=SAID, **more, **run).frames, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="text_guidance compares a text with none, and none is shown: give prompt"):
        saved(text_guidance=5.0, **run)


@pytest.mark.parametrize("made", ["text to video"], indirect=True)
def test_no_text_is_what_training_shows_for_one_that_is_withheld(made, tmp_path):
    _, _, folder = made
    settings = GUIDED.model_copy(update={"reference_guidance": 2.0, "pose_guidance": 3.0})
    captioned = checkpoints.find(str(folder), settings)
    denoiser = checkpoints.load(captioned, settings)
    batch = latents([0])
    batch = replace(batch, conditions={**batch.conditions, "text": denoiser.text})
    fixed = replace(load(Model(base=str(folder))), no_text={}, texts=None)
    for one in (denoiser, fixed):
        dropped = dropping.dropped(one, batch, Drop(text=1.0), 0).conditions
        shown = dropping.textless(one, batch.conditions)
        assert dropped.keys() == shown.keys() and all(torch.equal(dropped[n], shown[n]) for n in shown)
    assert not shown["text"].any() and denoiser.no_text["text"].any()
    assert torch.equal(denoiser.no_text["text"], load(Model(base=str(folder))).text)
    fixed.save(tmp_path / "fixed", shape=SHAPE)
    encoders.encoder(tmp_path / "fixed")
    kept = folders.saved(tmp_path / "fixed"), folders.saved(folder)
    assert "texts" not in kept[0] and kept[1]["texts"]["shown"] == "caption"
    card = protocol.how_sampled(captioned, settings, False)["guidance"]
    assert card == "reference 2, pose 3, text 5 over the empty text"
    found = checkpoints.find(str(tmp_path / "fixed"), settings)
    assert protocol.how_sampled(found, settings, False)["guidance"] == "reference 2, pose 3, text 5 over zeros"
    assert protocol.how_sampled(found, Generate(), False)["guidance"] == "reference 1, pose 1"


@pytest.mark.parametrize("made", ["text to video"], indirect=True)
def test_where_no_text_is_shown_it_is_refused(made, tmp_path):
    _, _, folder = made
    alone = Generate(text_guidance=5.0)
    load(Model(init=TINY["wan"]["init"], vae="none")).save(tmp_path / "bare", shape=SHAPE)
    svd = models.family("svd").load(Model(family="svd", init=TINY["svd"]["init"], vae="none"))
    svd.save(tmp_path / "svd", shape=SHAPE)
    for given, message in (
        (folder, "is shown the empty text unless --text gives another one, and so nothing to compare it with"),
        (tmp_path / "bare", "is shown zeros unless --text gives"),
        (tmp_path / "svd", "networks of family svd are shown no text here"),
    ):
        found = checkpoints.find(str(given), alone)
        with pytest.raises(UserError, match=rf"--text-guidance .generate.text_guidance.: .*{message}") as error:
            checkpoints.check_text_guidance(found, alone, str(given))
        assert "\n" not in str(error.value)
        checkpoints.check_text_guidance(found, Generate(), str(given))
    checkpoints.check_text_guidance(checkpoints.find(str(folder), GUIDED), GUIDED, str(folder))


@pytest.mark.parametrize("made", ["text to video"], indirect=True)
def test_the_record_of_texts_goes_through_an_adapter(made, tmp_path):
    """And a folder named there is no path to elsewhere."""
    _, _, folder = made
    about = {"family": "wan", "texts": folders.saved(folder)["texts"]}
    denoiser = load(Model(base=str(folder)))
    width = denoiser.network.get_submodule("blocks.0.attn1.to_q").in_features
    pair = adapters.Pair(torch.zeros(1, width), torch.zeros(width, 1), 1.0)
    adapters.write(tmp_path / "adapter", adapters.Adapter({"blocks.0.attn1.to_q": pair}, {}, about), denoiser.PART)
    denoiser.save_text(tmp_path / "adapter")
    base = folder.parent / "base"
    with_adapter = load(Model(base=str(base), adapter=str(tmp_path / "adapter")))
    assert with_adapter.texts == denoiser.texts and torch.equal(with_adapter.no_text["text"], denoiser.text)
    assert load(Model(base=str(base))).texts is None
    shutil.copytree(folder, tmp_path / "moved")
    written = tmp_path / "moved" / "entprog.json"
    values = json.loads(written.read_text())
    written.write_text(json.dumps(values | {"texts": {"shown": "caption", "key": "../../secret"}}))
    with pytest.raises(UserError, match=r"entprog.json is damaged: .*texts.key"):
        folders.saved(tmp_path / "moved")
