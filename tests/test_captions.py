"""Captions: encoded once, by the base's own encoder as its pipeline does, and shown to the clips that they are of."""

import gc
import io
import json
import runpy
import shutil
from dataclasses import replace
from fnmatch import fnmatch
from functools import partial

import diffusers
import numpy as np
import pytest
import torch
from diffusers.utils import is_ftfy_available
from safetensors.torch import load_file, save_file
from transformers import UMT5EncoderModel

from entprog import config, files, models
from entprog.blocks import blocks
from entprog.config import ClipShape, Drop, Generate, Model
from entprog.data import clip_stream, shards
from entprog.data.clips import Latents
from entprog.diffusion import dropping
from entprog.errors import UserError
from entprog.models import captions, fingerprints, folders, part_files, texts, whole
from entprog.training.fit import fit, start
from helpers import encoders, real_clips
from helpers.families import TINY
from helpers.networks import TINY as WAN
from helpers.networks import latents, tiny_experiment
from helpers.processes import join, leave, run_ranks
from helpers.recording import calls
from pipelines.generating import checkpoints
from pipelines.stream.batches import Batches
from pipelines.training import checks, networks, outline

SHAPE = ClipShape(frames=4, height=32, width=16, fps=12)
SAID = ["a person dances", "", "a person walks home", "a person dances"]
HELD_OUT = ["the rain"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    def rows(split, said, source):
        return [{**real_clips.row(source, split, 0.2 * i, SHAPE), "caption": caption} for i, caption in enumerate(said)]

    files = {"train": [rows("train", SAID, "cam01")], "held_out": [rows("held_out", HELD_OUT, "cam04")]}
    return real_clips.write(tmp_path_factory.mktemp("shards"), files, SHAPE)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A Wan pipeline's folder: network, text encoder and tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    models.family("wan").load(Model(init=WAN, vae="none")).save(folder / "base")
    encoders.encoder(folder / "base")
    return folder / "base"


WANS = ("wan", "wan_animate", "wan_vace")
PIPELINES = {"cogvideox": diffusers.CogVideoXPipeline, **dict.fromkeys(WANS, diffusers.WanPipeline)}
if is_ftfy_available():  # without it theirs encode nothing
    animate = partial(diffusers.WanAnimatePipeline, image_processor=None, image_encoder=None)
    PIPELINES |= {"wan_animate": animate, "wan_vace": diffusers.WanVACEPipeline}


def wan(base, **changes):
    return Model(base=str(base), vae="none", **changes)


@torch.no_grad()
@pytest.mark.parametrize("name", encoders.KINDS)
def test_embeddings_are_those_of_the_pipeline(name, tmp_path, dataset):
    """Its own encode_prompt, with its own defaults of what a text may hold."""
    family, settings = models.family(name), Model(family=name, init=TINY[name]["init"], vae="none")
    family.load(settings).save(tmp_path / "base")
    parts = encoders.pipeline(tmp_path / "base", name) | {"vae": None, "scheduler": None}
    found = captions.prepared(Model(family=name, base=str(tmp_path / "base"), vae="none"), dataset, "caption")
    for text in ("", *SAID):
        if name == "motion_unet":
            pipe = diffusers.AnimateDiffPipeline(unet=None, motion_adapter=None, **parts)
            expected = pipe.encode_prompt(text, torch.device("cpu"), 1, False)[0]
        elif name == "latte":
            pipe = diffusers.LattePipeline(transformer=None, **parts)
            expected = texts.padded(pipe.encode_prompt(text, False)[0], 120)
        elif name == "hunyuan_video":
            pipe = diffusers.HunyuanVideoPipeline(transformer=None, **parts)
            expected, pooled, mask = pipe.encode_prompt(text)
            used = int(mask.sum())
            assert torch.equal(mask[0] == 1, torch.arange(256) < used) and 0 < used < 20
            expected = texts.padded(expected[:, :used], 256)
            torch.testing.assert_close(found.of(text)["pooled"], pooled, rtol=1e-4, atol=1e-5)
        else:
            pipe = PIPELINES[name](transformer=None, **parts)
            length = 512 if name in WANS else TINY[name]["init"]["max_text_seq_length"]
            expected = pipe.encode_prompt(text, do_classifier_free_guidance=False, max_sequence_length=length)[0]
        torch.testing.assert_close(found.of(text)["text"], expected, rtol=1e-4, atol=1e-5)
        assert all(value.any() for value in found.of(text).values())
    assert not torch.allclose(found.of("")["text"], found.of(SAID[0])["text"], atol=1e-2)


def test_hunyuan_video_sees_of_each_caption_what_its_pipeline_shows(tmp_path, dataset):
    """Recorded while that samples from the caption itself; in a batch with a longer one, and with a dropped one."""
    torch.manual_seed(0)
    sizes = {**TINY["hunyuan_video"]["init"], "in_channels": 4, "out_channels": 4}
    network = diffusers.HunyuanVideoTransformer3DModel(**sizes).eval()
    kind, vae = TINY["hunyuan_video"]["vae"]
    pipe = diffusers.HunyuanVideoPipeline(
        transformer=network, vae=kind(**vae).eval(), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        **encoders.pipeline(tmp_path / "made", "hunyuan_video"),
    )  # fmt: skip
    pipe.save_pretrained(tmp_path / "base")
    settings = Model(family="hunyuan_video", base=str(tmp_path / "base"), conditions=())
    found = captions.prepared(settings, dataset, "caption")
    denoiser = found.given_to(models.family("hunyuan_video").load(settings))
    noise = torch.randn(1, 4, 3, 8, 8)
    batch = found.beside(Latents(noise.expand(4, -1, -1, -1, -1), {}, torch.arange(4)), "train", np.arange(4))
    batch = dropping.dropped(denoiser, batch.part(torch.tensor([0, 2])), Drop(text=0.0), 0)
    nothing = dropping.dropped(denoiser, batch.part(slice(0, 1)), Drop(text=1.0), 0)
    shown = {name: torch.cat([value, nothing.conditions[name]]) for name, value in batch.conditions.items()}
    assert shown.keys() == {"text", "pooled"}
    for row, prompt in enumerate((SAID[0], SAID[2], "")):
        (told,) = calls(network, lambda prompt=prompt: pipe(
            prompt, height=64, width=64, num_frames=9, num_inference_steps=1, guidance_scale=6.0, latents=noise,
            output_type="latent",
        ))  # fmt: skip
        t = denoiser.process.t(told["timestep"].float()).expand(3)
        (ours,) = calls(denoiser.network, lambda t=t: denoiser.predict(noise.expand(3, -1, -1, -1, -1), t, shown))
        mask = told["encoder_attention_mask"]
        for name, value in ours.items():
            if isinstance(value, torch.Tensor):
                other = told[name] * mask[..., None] if name == "encoder_hidden_states" else told[name]
                torch.testing.assert_close(value[row], other[0].to(value), rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            (expected,) = network(**told)
            got = denoiser.predict(noise.expand(3, -1, -1, -1, -1), t, shown)
        torch.testing.assert_close(got[row], expected[0], rtol=1e-4, atol=1e-4)


def test_two_encoders_are_both_needed(tmp_path, dataset):
    models.family("hunyuan_video").load(
        Model(family="hunyuan_video", init=TINY["hunyuan_video"]["init"], vae="none")
    ).save(tmp_path / "base")
    encoders.encoder(tmp_path / "base", "LlamaModel")
    settings = Model(family="hunyuan_video", base=str(tmp_path / "base"), vae="none")
    with pytest.raises(UserError, match=r"model.base: .* has no text_encoder_2/ and tokenizer_2/: give a folder"):
        captions.source(settings)


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_latte_sees_of_each_clips_text_its_own_tokens(dtype):
    """As its pipeline, which cuts a text to its tokens: whatever longer text is beside it in the batch."""
    denoiser = models.family("latte").load(Model(family="latte", init=TINY["latte"]["init"], vae="none", dtype=dtype))
    generator = torch.Generator().manual_seed(0)
    batch, text = latents([0, 1, 2]), torch.randn(3, 6, 8, generator=generator)
    text[0, 2:], text[1, 5:] = 0, 0
    together = denoiser.predict(batch.clean, torch.full((3,), 0.5), {**batch.conditions, "text": text})
    for row, own in enumerate((2, 5, 6)):
        part = batch.part(slice(row, row + 1))
        alone = {**part.conditions, "text": text[row : row + 1, :own]}
        bound = {"rtol": 1e-4, "atol": 1e-5} if dtype == "float32" else {"rtol": 2e-2, "atol": 2e-2}
        torch.testing.assert_close(
            denoiser.predict(part.clean, torch.tensor([0.5]), alone), together[row : row + 1], **bound
        )
    nothing = {**batch.conditions, "text": torch.zeros(3, 6, 8)}
    one = {**batch.conditions, "text": torch.zeros(3, 1, 8)}
    same = [denoiser.predict(batch.clean, torch.full((3,), 0.5), shown) for shown in (nothing, one)]
    torch.testing.assert_close(*same, rtol=1e-2, atol=1e-2 if dtype == "bfloat16" else 1e-5)


@torch.no_grad()
def test_lattes_saved_pipeline_sees_a_texts_own_tokens():
    network = models.family("latte").load(Model(family="latte", init=TINY["latte"]["init"], vae="none")).network
    shipped = runpy.run_path(str(whole.CODE))["latte"]
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(1, network.config.in_channels, 2, 16, 16, generator=generator)
    text = torch.randn(1, 3, 8, generator=generator)
    seen = [shipped(network, inputs, torch.tensor([500]), texts.padded(text, n), {}) for n in (3, 120)]
    torch.testing.assert_close(*seen)
    none = [shipped(network, inputs, torch.tensor([500]), torch.zeros(1, n, 8), {}) for n in (1, 3)]
    torch.testing.assert_close(*none)


def test_each_text_is_encoded_once_and_kept_without_its_padding(base, dataset, monkeypatch):
    first = captions.prepared(wan(base), dataset, "caption")
    kept = sorted(path.name for path in first.folder.rglob("*.safetensors"))
    assert len(kept) == 1 + len({*SAID, *HELD_OUT} - {""}) == 4
    assert load_file(next(iter(first.folder.rglob("*.safetensors"))))[texts.NAME].shape[0] < 10
    assert first.of(SAID[0])["text"].shape == (1, 512, 8)

    def never(*_):
        raise AssertionError("the encoder was loaded again")

    monkeypatch.setattr(captions, "encoder", never)
    again = captions.prepared(wan(base), dataset, "caption")
    assert again.folder == first.folder and torch.equal(again.of(SAID[2])["text"], first.of(SAID[2])["text"])
    empty = captions.prepared(wan(base), dataset, "empty")
    batch = latents([0, 1])
    assert empty.beside(batch, "train", np.array([0, 1])) is batch
    assert torch.equal(empty.of("")["text"], first.of("")["text"])


def test_of_the_encoder_nothing_is_left_once_texts_are_there(base, tmp_path, monkeypatch):
    """Before training, for which it may be too large to lie beside the network."""
    rows = [[{**real_clips.row("cam01", split, 0.0, SHAPE), "caption": split}] for split in ("train", "held_out")]
    fresh = real_clips.write(tmp_path, {"train": rows[:1], "held_out": rows[1:]}, SHAPE)
    before, seen = captions._write, []

    def write(*given):
        seen.append(loaded())
        before(*given)

    def loaded():
        return sum(isinstance(thing, UMT5EncoderModel) for thing in gc.get_objects())

    monkeypatch.setattr(captions, "_write", write)
    others = loaded()
    captions.prepared(wan(base), fresh, "caption")
    assert seen and min(seen) == others + 1 and loaded() == others


def test_what_a_text_means_is_in_its_key(base, tmp_path, dataset):
    encoders.encoder(tmp_path)
    before = captions.source(wan(base, text_encoder=str(tmp_path)))
    assert captions.source(wan(base)).key == before.key, "where it lies does not matter"
    weights = tmp_path / "text_encoder" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert captions.source(wan(base, text_encoder=str(tmp_path))).key != before.key


@torch.no_grad()
@pytest.mark.parametrize("parts", ["whole", "light"])
def test_what_texts_were_encoded_with_is_what_is_saved(parts, base, tmp_path):
    """Whether the base's index names it or not (here it does not), and that of another folder before the base's."""
    encoders.encoder(tmp_path / "other")
    weights = load_file(tmp_path / "other" / "text_encoder" / "model.safetensors")
    changed = {name: tensor + 0.1 for name, tensor in weights.items()}
    save_file(changed, tmp_path / "other" / "text_encoder" / "model.safetensors", {"format": "pt"})
    shown = []
    for given in (None, str(tmp_path / "other")):
        model = {"base": str(base), "init": {}, "vae": "none", "text_encoder": given}
        experiment = tiny_experiment(model=model, data={"text": "caption"})
        denoiser, out = networks.load(experiment, torch.device("cpu")), tmp_path / f"{parts} of {given is None}"
        denoiser.save(out, shape=SHAPE, parts=parts)
        assert whole.missing(out) == [] and (out / "text_encoder").is_dir() == (parts == "whole")
        made = checkpoints.Checkpoint(out, folders.saved(out), SHAPE, None)
        found = captions.source(experiment.model)
        assert checkpoints.text_source(made, Generate(text="a person")).key == found.key
        pipe = diffusers.DiffusionPipeline.from_pretrained(out, custom_pipeline=str(out), trust_remote_code=True)
        ours = captions.one(found, denoiser.network.config, "a person", "cpu")["text"]
        torch.testing.assert_close(pipe.encoded("a person")[texts.NAME], ours)
        shown.append(ours)
    assert not torch.allclose(*shown, atol=1e-2)
    fixed = tiny_experiment(model=model | {"text_encoder": "not/there"})
    networks.load(fixed, torch.device("cpu")).save(tmp_path / "fixed", shape=SHAPE, parts=parts)
    assert not (tmp_path / "fixed" / "text_encoder").exists() and not folders.saved(tmp_path / "fixed")["elsewhere"]


def test_a_text_that_is_not_mended_is_another_and_is_said(base, tmp_path, monkeypatch):
    """By ftfy, which the makers of Wan's bases had: the same texts, encoded with it and without, lie apart."""
    encoders.encoder(tmp_path, "T5EncoderModel")
    other = Model(family="cogvideox", text_encoder=str(tmp_path))
    said, keys = ["a person dances", "the person’s rain", ""], {}
    for there in (False, True):
        monkeypatch.setattr(captions, "is_ftfy_available", lambda there=there: there)
        keys[there] = [captions.source(settings).key for settings in (wan(base), other)]
        lines = [captions.unmended(family, said) for family in (*WANS, "cogvideox")]
        assert [line.startswith("texts of more than ASCII") and "1 here" in line for line in lines] == (
            [False] * 4 if there else [True, True, True, False]
        )
        assert not captions.unmended("wan", [said[0]]), "there is nothing to mend"
    assert keys[False][0] != keys[True][0] and keys[False][1] == keys[True][1]


def test_a_networks_number_of_tokens_is_in_the_key(tmp_path, dataset):
    """T5 sees what fills a text up, without a mask: the same text of other lengths is another embedding."""
    encoders.encoder(tmp_path, "T5EncoderModel")
    found, shared = {}, tmp_path / "shards"
    shutil.copytree(dataset.folder, shared, ignore=shutil.ignore_patterns(captions.FOLDER))
    for tokens in (3, 7):
        base = tmp_path / str(tokens)
        init = {**TINY["cogvideox"]["init"], "max_text_seq_length": tokens}
        models.family("cogvideox").load(Model(family="cogvideox", init=init, vae="none")).save(base)
        settings = Model(family="cogvideox", base=str(base), vae="none", text_encoder=str(tmp_path))
        copy, said = shards.read_dataset(shared), tiny_experiment(data={"text": "caption"})
        before = outline.texts(said, copy, settings)
        assert ("not used: 1 beside it, of other encoders or numbers of tokens" in before) == bool(found)
        found[tokens] = captions.prepared(settings, copy, "caption")
        said_so = "texts are encoded anew: 1 folders of texts beside" in found[tokens].unused
        assert said_so == (len(found) == 2) and not captions.prepared(settings, copy, "caption").unused
        assert "0 texts are to be encoded" in (after := outline.texts(said, copy, settings)) and "not used" not in after
    assert found[3].folder != found[7].folder
    few, many = (found[tokens].of("a person dances")["text"] for tokens in (3, 7))
    assert few.shape == (1, 3, 8) and many.shape == (1, 7, 8) and not torch.allclose(few, many[:, :3])


class Local(Batches):
    """Clips decoded here: the same as those of Ray's stream, bit for bit (`tests/test_clips.py`)."""

    def _open(self, source, position):
        return clip_stream.local_stream(
            self.dataset, "train", SHAPE, source.clips, start_position=position, seed=self.experiment.train.seed
        )


def test_every_clip_of_a_stream_sees_its_own_caption(base, dataset):
    """Whatever the batch, over two epochs, and on a resume."""
    experiment = tiny_experiment(
        model={"base": str(base), "init": {}, "vae": "none"},
        data={"shape": SHAPE.model_dump(), "shards": str(dataset.folder), "batch_size": 3},
    )
    found = captions.prepared(experiment.model, dataset, "caption")
    denoiser = models.family("wan").load(experiment.model)
    for first in (0, 3):
        batches = Local(experiment, dataset, denoiser, torch.device("cpu"), 1, {}, found)
        stream = batches(SHAPE, first)
        for _ in range(3):
            batch = next(stream)
            numbers = clip_stream.clips_at(batch.position.numpy(), 4, experiment.train.seed)
            for row, clip in zip(batch.conditions["text"], numbers, strict=True):
                assert torch.equal(row[None], found.of(SAID[clip])["text"])
            assert denoiser.predict(batch.clean, torch.full((3,), 0.5), batch.conditions).isfinite().all()
        batches.close()
    plain = config.build(config.merge(experiment.model_dump(), {"train": {"steps": 1}, "schedule": {"kind": "full"}}))
    batches = Local(plain, dataset, denoiser, torch.device("cpu"), 1, {}, found)
    sample = next(iter(batches(SHAPE, 0)))
    steps = list(
        fit(denoiser, blocks(denoiser.network), batches, [sample], sample, None, plain, start(denoiser.network, plain))
    )
    assert [step.last for step in steps] == [True] and np.isfinite(steps[0].held_out_loss)


def test_a_dropped_caption_is_the_empty_text(base, dataset):
    found = captions.prepared(wan(base), dataset, "caption")
    denoiser = found.given_to(models.family("wan").load(wan(base)))
    batch = found.beside(latents(range(4)), "train", np.arange(4))
    dropped = dropping.dropped(denoiser, batch, Drop(text=1.0), 0)
    assert torch.equal(dropped.conditions["text"], found.of("")["text"].expand(4, -1, -1))


def silent(dataset, tmp_path):
    rows = [{**real_clips.row("cam01", "train", 0.0, SHAPE), "caption": " "}]
    return real_clips.write(tmp_path, {"train": [rows], "held_out": [rows]}, SHAPE)


def check(dataset, **parts):
    return checks.check(
        tiny_experiment(**config.merge({"data": {"shape": SHAPE.model_dump(), "shards": str(dataset.folder)}}, parts))
    )


def test_what_is_missing_is_one_line(base, dataset, tmp_path):
    other = {"model": {"base": str(base), "init": {}, "vae": "none"}, "data": {"text": "caption"}}
    assert check(dataset, **other).clips("train") == 4
    bare = tmp_path / "bare"
    models.family("wan").load(Model(init=WAN, vae="none")).save(bare)
    cases = [
        ({"model": {"base": str(bare)}}, f"model.base: {bare} has no text_encoder/ and tokenizer/"),
        ({"model": {"base": None, "init": WAN}}, "a new network has no text encoder: set model.text_encoder"),
        ({"model": {"text_encoder": str(tmp_path / "none")}}, "model.text_encoder: no such folder"),
        ({"model": {"prompt_embeds": "x"}}, "model.prompt_embeds is a fixed text, given data.text=caption"),
        ({"model": {"base": None, "family": "svd", "init": TINY["svd"]["init"]}}, "family svd takes no captions"),
        ({"data": {"text": "captions"}}, "setting data.text: .*'fixed', 'empty' or 'caption'"),
    ]
    for changes, message in cases:
        with pytest.raises(UserError, match=message) as error:
            check(dataset, **config.merge(other, changes))
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"no clip of .* has a caption: prepare with \.txt files"):
        check(silent(dataset, tmp_path / "silent"), **other)
    encoders.encoder(tmp_path / "odd")
    written = tmp_path / "odd" / "text_encoder" / "config.json"
    written.write_text(written.read_text().replace("UMT5EncoderModel", "GPT2LMHeadModel"))
    with pytest.raises(UserError, match="is a GPT2LMHeadModel: known are CLIPTextModel"):
        check(dataset, **config.merge(other, {"model": {"text_encoder": str(tmp_path / "odd")}}))


def _ranks(rank, world, folder, base, sound):
    """Two ranks, and one text: to the other there is nothing to do."""
    join(rank, world, folder, timeout_s=240)
    if not sound:
        settings = wan(base, text_encoder=str(folder / "odd"))
        with pytest.raises(UserError, match="cannot load the text encoder"):
            captions.prepared(settings, shards.read_dataset(folder / "shards"), "empty")
        settings = wan(base, text_encoder=str(folder / ("other" if rank else "sound")))
        with pytest.raises(UserError, match="other, or whether ftfy is there, is not here"):
            captions.prepared(settings, shards.read_dataset(folder / "shards"), "caption")
    else:
        hashed, of = [], files.sha256
        files.sha256 = lambda path: hashed.append(path) or of(path)  # in a process of the test's own
        found = captions.prepared(wan(base), shards.read_dataset(folder / "shards"), "caption")
        assert all(found.of(text)["text"].any() for text in ("", *SAID, *HELD_OUT))
        assert rank == 0 or not hashed, "files of gigabytes are read once a machine"
    leave()


@pytest.mark.parametrize("sound", [True, False])
def test_every_rank_encodes_its_share_and_none_waits_for_one_that_cannot(sound, base, dataset, tmp_path):
    shutil.copytree(dataset.folder, tmp_path / "shards", ignore=shutil.ignore_patterns(captions.FOLDER))
    for name in ("odd", "sound", "other"):
        encoders.encoder(tmp_path / name)
    weights = tmp_path / "odd" / "text_encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    weights = tmp_path / "other" / "text_encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    run_ranks(_ranks, 2, tmp_path, base, sound)


def test_what_others_have_written_meanwhile_decides_no_share(base, dataset, tmp_path, monkeypatch):
    """Ranks look at the folder one after the other, as where one machine fetches the encoder first."""
    shutil.copytree(dataset.folder, tmp_path / "shards", ignore=shutil.ignore_patterns(captions.FOLDER))
    copy = shards.read_dataset(tmp_path / "shards")
    for rank in (0, 1):
        monkeypatch.setattr(captions.agree, "world", lambda rank=rank: (rank, 2))
        of_splits = captions._of_splits(copy, "caption")
        found = captions._share(wan(base), copy, of_splits, captions.source(wan(base)).key, "cpu", lambda *_: None)
    assert not captions.missing(captions.wanted(copy, "caption"), found.folder)


def test_a_text_is_read_once_and_the_oldest_make_room(base, dataset, tmp_path, monkeypatch):
    whole = captions.prepared(wan(base), dataset, "caption")
    shutil.copytree(whole.folder, tmp_path / "KEY")
    texts = replace(whole, folder=tmp_path / "KEY")
    first, second = captions.wanted(dataset, "caption")[:2]
    files = [texts.folder / captions._file(text) for text in (first, second)]
    monkeypatch.setattr(captions, "_KEPT", captions._Kept())
    monkeypatch.setattr(captions, "KEPT_BYTES", sum(captions._bytes(load_file(path)) for path in files) - 1)
    due = texts.of(first)["text"]
    files[0].unlink()
    assert torch.equal(texts.of(first)["text"], due)
    texts.of(second)
    with pytest.raises(UserError, match="damaged text"):
        texts.of(first)


def test_runs_of_different_text_encoders_are_judged_apart(base, dataset, tmp_path):
    encoders.encoder(tmp_path)
    other = {"model": {"base": str(base), "init": {}, "vae": "none"}, "data": {"text": "empty"}}
    weights = tmp_path / "text_encoder" / "config.json"
    weights.write_text(weights.read_text() + " ")
    hashes = {
        fingerprints.held_out(tiny_experiment(**config.merge(other, {"model": {"text_encoder": given}})), dataset)
        for given in (None, str(tmp_path))
    }
    assert len(hashes) == 2


def test_a_phase_may_bring_the_text_encoder(dataset, tmp_path):
    """Its base is the network of the phase before, which has none."""
    models.family("wan").load(Model(init=WAN, vae="none")).save(tmp_path / "bare")
    encoders.encoder(tmp_path)
    later = {"data": {"text": "caption"}, "model": {"text_encoder": str(tmp_path)}}
    experiment = tiny_experiment(
        model={"base": str(tmp_path / "bare"), "init": {}, "vae": "none"},
        data={"shards": str(dataset.folder), "shape": SHAPE.model_dump()},
        phases={"first": {}, "second": later},
    )
    assert [*checks.parts(experiment, tmp_path / "out")] == ["first", "second"]
    wrong = experiment.model_copy(update={"phases": {"first": {}, "second": {"data": {"text": "caption"}}}})
    with pytest.raises(UserError, match=r"phase second: model.text_encoder: .* has no text_encoder/ and tokenizer/"):
        checks.parts(wrong, tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"d_model": 24}, "cannot load the text encoder .*: its weights are not those of its config.json"),
        ({"d_model": "x"}, "cannot load the text encoder"),
        ({"dtype": "zz"}, "cannot load the text encoder"),
        ({"architectures": 5}, "is a network of unknown class: known are"),
        ({"attn_implementation": "some/kernels"}, "asks for a quantised network or foreign kernels"),
        ({"quantization_config": {"quant_method": "gptq"}}, "asks for a quantised network or foreign kernels"),
        (None, "cannot load the tokenizer"),
    ],
)
def test_parts_that_do_not_fit_or_ask_for_more_are_a_line(changes, said, base, tmp_path):
    encoders.encoder(tmp_path / "odd")
    path = tmp_path / "odd" / ("tokenizer/tokenizer.json" if changes is None else "text_encoder/config.json")
    path.write_text("[]" if changes is None else json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=said) as error:
        captions.encoder(captions.source(wan(base, text_encoder=str(tmp_path / "odd"))), None, "cpu")
    assert "\n" not in str(error.value)


def test_a_tokenizers_own_code_is_neither_fetched_nor_run(base, tmp_path, monkeypatch):
    """Whatever is typed where transformers would ask."""
    shutil.copytree(base, tmp_path / "base")
    folder, ran = tmp_path / "base" / "tokenizer", tmp_path / "ran"
    (folder / "evil.py").write_text(f"from pathlib import Path\nPath({str(ran)!r}).touch()\nclass Evil: pass\n")
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", null]}}'
    )
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    found = captions.source(wan(tmp_path / "base"))
    with pytest.raises(UserError, match="cannot load the tokenizer") as error:
        captions.encoder(found, None, "cpu")
    assert not ran.exists() and "\n" not in str(error.value)
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, allow_patterns, **_: asked.extend(allow_patterns)
    )
    with pytest.raises(TypeError):  # of no folder
        captions.source(wan("some/base"))
    taken = [any(fnmatch(f"tokenizer/{name}", pattern) for pattern in asked) for name in (*part_files.WORDS, "evil.py")]
    assert taken == [True] * len(part_files.WORDS) + [False]


def test_a_damaged_text_is_named(base, dataset, tmp_path):
    whole = captions.prepared(wan(base), dataset, "caption")
    path = tmp_path / captions._file("a person dances")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"cut short")
    broken = captions.Texts(tmp_path, whole.tokens, whole.captions, whole.names)
    with pytest.raises(UserError, match=r"damaged text .*\.safetensors .*: delete it"):
        broken.of("a person dances")


def test_a_dry_run_says_which_texts_there_are(base, dataset, tmp_path):
    encoders.encoder(tmp_path)
    model = wan(base, text_encoder=str(tmp_path))
    (tmp_path / "text_encoder" / "model.safetensors").write_bytes(
        (base / "text_encoder" / "model.safetensors").read_bytes()[:-1] + b"\x01"
    )
    said = {
        mode: outline.texts(tiny_experiment(data={"text": mode}), dataset, model)
        for mode in ("fixed", "empty", "caption")
    }
    assert said["fixed"].startswith("Captions: 3 of 4 training clips have one, and none is shown: data.text=caption")
    assert said["empty"].startswith("Texts: the empty one, to be encoded (")
    assert said["caption"].startswith(
        "Texts: 4 of 5 clips have a caption, 3 different ones; 4 texts are to be encoded ("
    )
    assert shards.read_dataset(dataset.folder).fingerprint == dataset.fingerprint


def test_captions_that_nobody_is_shown_are_said(dataset, tmp_path, monkeypatch):
    def said(dataset, **model):
        return outline.captions_left_out(tiny_experiment(model=model), dataset)

    assert said(dataset) and said(silent(dataset, tmp_path / "silent")) is None
    assert said(dataset, prompt_embeds="text") is None, "another text was asked for"
    assert said(dataset, family="svd", init=TINY["svd"]["init"]) is None, "it has no place for captions"
    many = {"train": [[{**real_clips.row("cam01", "train", 0.0, SHAPE), "caption": word}] for word in ("a", "", "b")]}
    some = real_clips.write(tmp_path / "many", {**many, "held_out": many["train"][:1]}, SHAPE)
    monkeypatch.setattr(outline, "CAPTIONS_OF", 2)
    assert said(some).startswith("Captions: 2 of 2 training clips looked at have one")
    (some.folder / some.splits["train"][0].file).write_bytes(b"cut short")
    assert said(some) is None, "the run itself names a damaged shard"
