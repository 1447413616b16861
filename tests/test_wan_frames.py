"""Wan's bases whose first frame is given in another way: first-and-last-frame, and TI2V with timesteps of tokens."""

import json
import shutil
from dataclasses import replace

import diffusers
import pytest
import torch
from PIL import Image

from entprog import config, models
from entprog.blocks import blocks
from entprog.config import ClipShape, Drop, Generate, Model, Priority, Train
from entprog.data import latents as cache
from entprog.diffusion import dropping, losses, sampling
from entprog.diffusion.objectives import noise_like
from entprog.diffusion.samplers import sampler
from entprog.errors import UserError
from entprog.media import drawing
from entprog.media.color import yuv420_to_rgb
from entprog.media.skeleton import draw
from entprog.models import fingerprints
from entprog.models.wan import GREY, inspect, load
from entprog.scoring import priorities
from helpers import bases
from helpers.families import TINY, clips
from helpers.networks import tiny_experiment
from helpers.recording import calls
from pipelines.training import checks

SHAPE = ClipShape(frames=9, height=32, width=32, fps=12)
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
TEXT = torch.zeros(1, 512, 8)
UNIPC = "UniPCMultistepScheduler"


@pytest.fixture(scope="module")
def first_and_last(tmp_path_factory):
    """(pipeline, its folder)"""
    folder = tmp_path_factory.mktemp("flf")
    return bases.image_to_video(folder, clip=True, last=True), folder


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """(pipeline, its folder)"""
    folder = tmp_path_factory.mktemp("ti2v")
    return bases.given_frame(folder), folder


def picture(batch):
    return Image.fromarray(batch.reference[0].numpy())


def frame(batch, number):
    """One of a clip's own frames."""
    pixels = (yuv420_to_rgb(batch.video)[0, number] + 1) * 127.5
    return Image.fromarray(pixels.round().byte().movedim(0, -1).numpy())


def noise(denoiser):
    return noise_like(torch.empty(1, *denoiser.latent_shape(SHAPE)), torch.tensor([0]), 5)


def seen(denoiser, noisy, t, conditions):
    (told,) = calls(denoiser.network, lambda: denoiser.predict(noisy, t, conditions))
    return told


# ---- first and last frame


def test_a_last_frame_that_is_unknown_is_what_the_pipeline_has_without_one(first_and_last):
    """Its latents and mask as with no last image; tokens, which it cannot do without, as with a grey one."""
    pipe, folder = first_and_last
    denoiser, batch = load(Model(base=str(folder), last_frame=False)), clips(1, SHAPE)
    assert denoiser.conditions == ("reference", "pose") and denoiser.form == "first frame"
    run = {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 2, "guidance_scale": 1.0}
    run |= {"latents": noise(denoiser), "prompt_embeds": TEXT, "output_type": "latent"}
    with pytest.raises(RuntimeError), torch.no_grad():
        pipe(picture(batch), **run)  # its network wants tokens of two images
    image = pipe.video_processor.preprocess(picture(batch), height=32, width=32)
    start, condition = pipe.prepare_latents(
        image, 1, 4, 32, 32, 9, torch.float32, torch.device("cpu"), None, noise(denoiser), None
    )
    grey = Image.new("RGB", (32, 32), (GREY,) * 3)
    theirs = calls(pipe.transformer, lambda: pipe(picture(batch), last_image=grey, **run))
    encoded = denoiser.encode(batch)
    ours = seen(denoiser, start, torch.tensor([1.0]), encoded.conditions)
    torch.testing.assert_close(ours["hidden_states"][:, :12], torch.cat([start, condition.float()], dim=1), **CLOSE)
    torch.testing.assert_close(ours["hidden_states"][:, 12:], encoded.conditions["pose"])
    for told in theirs:
        torch.testing.assert_close(ours["encoder_hidden_states_image"], told["encoder_hidden_states_image"], **CLOSE)
    torch.testing.assert_close(ours["timestep"], theirs[0]["timestep"].float(), **CLOSE)


@pytest.mark.parametrize("clip", [True, False], ids=["FLF2V", "2.2 I2V"])
def test_the_last_frame_is_seen_as_the_pipeline_shows_it(clip, first_and_last, tmp_path):
    """In training the clip's own, and so its first one; latents, mask and tokens."""
    pipe, folder = first_and_last if clip else (bases.image_to_video(tmp_path / "i2v", clip=False), tmp_path / "i2v")
    denoiser, batch = load(Model(base=str(folder), last_frame=None if clip else True)), clips(1, SHAPE)
    assert denoiser.form == "first and last frame" and denoiser.last
    theirs = calls(pipe.transformer, lambda: pipe(
        frame(batch, 0), last_image=frame(batch, -1), height=32, width=32, num_frames=9, num_inference_steps=2,
        guidance_scale=1.0, latents=noise(denoiser), prompt_embeds=TEXT, output_type="latent",
    ))  # fmt: skip
    encoded = denoiser.encode(batch)
    for told in theirs:
        noisy, t = told["hidden_states"][:, :4], denoiser.process.t(told["timestep"].float())
        ours = seen(denoiser, noisy, t, encoded.conditions)
        torch.testing.assert_close(ours["hidden_states"][:, :12], told["hidden_states"], **CLOSE)
        torch.testing.assert_close(ours["hidden_states"][:, 12:], encoded.conditions["pose"])
        one, other = ours["encoder_hidden_states_image"], told["encoder_hidden_states_image"]
        assert (one is not None) == clip == (other is not None)
        if clip:
            torch.testing.assert_close(one, other, **CLOSE)
    mask = encoded.conditions["reference"][0, :4, :, 0, 0]
    assert mask.sum() == 5 and mask[:, 0].all() and mask[3, -1] == 1


@pytest.mark.parametrize("clip", [True, False], ids=["FLF2V", "2.2 I2V"])
def test_the_last_frame_is_kept_dropped_and_cached_with_the_first(clip, first_and_last, tmp_path):
    folder = first_and_last[1]
    if not clip:
        folder = tmp_path / "i2v"
        bases.image_to_video(folder, clip=False)
    asked = Model(base=str(folder), last_frame=None if clip else True)
    denoiser, unknown = load(asked), load(asked.model_copy(update={"last_frame": False}))
    batch, t = clips(2, SHAPE), torch.tensor([0.3, 0.8])
    assert cache.key(denoiser, "wan", SHAPE) != cache.key(unknown, "wan", SHAPE)
    denoiser.save(tmp_path / "model", shape=SHAPE)
    unknown.save(tmp_path / "unknown", shape=SHAPE)
    again = load(Model(base=str(tmp_path / "model")))
    assert again.last and cache.key(again, "wan", SHAPE) == cache.key(denoiser, "wan", SHAPE)
    assert not load(Model(base=str(tmp_path / "unknown"))).last, "as it was trained, also by a version of before"
    encoded = denoiser.encode(batch)
    alone = denoiser.encode(batch.part(slice(1, 2)))
    with torch.no_grad():
        both = denoiser.predict(encoded.clean, t, encoded.conditions)
        torch.testing.assert_close(
            denoiser.predict(alone.clean, t[1:], alone.conditions), both[1:], rtol=1e-3, atol=1e-4
        )
        changed = torch.full((2, 32, 32, 3), 200, dtype=torch.uint8)
        other = denoiser.condition(batch.reference, batch.pose, changed)
        assert not torch.equal(denoiser.predict(encoded.clean, t, other), both)
        dropped = [
            dropping.dropped(denoiser, replace(encoded, conditions=shown), Drop(reference=1.0), 0).conditions
            for shown in (encoded.conditions, other)
        ]
        one, two = (denoiser.predict(encoded.clean, t, shown) for shown in dropped)
        assert torch.equal(one, two), "dropped with the reference"
    with pytest.raises(UserError, match="sees the clip's last frame, and none is given"):
        denoiser.condition(batch.reference, batch.pose)


def saved_pipeline(folder):
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(folder), trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
@pytest.mark.parametrize("last", [True, False], ids=["seen", "unknown"])
def test_the_saved_pipeline_takes_a_last_frame_where_it_is_seen_of_one_frame_too(last, first_and_last, tmp_path):
    denoiser = load(Model(base=str(first_and_last[1]), last_frame=last))
    denoiser.save(tmp_path / "model", shape=SHAPE)
    pipe, one = saved_pipeline(tmp_path / "model"), SHAPE.model_copy(update={"frames": 1})
    batch = clips(1, one)
    drawn, end = drawing.draw(batch.pose[0], 32, 32, denoiser.skeleton), torch.full((32, 32, 3), 90, dtype=torch.uint8)
    size = (1, *denoiser.latent_shape(one))
    run = {"latents": noise_like(torch.empty(size), torch.tensor([0]), 5), "num_inference_steps": 2}
    run |= {"output_type": "latent"}
    with pytest.raises(ValueError, match="give last" if last else "without the last frame of clips: leave last out"):
        pipe(batch.reference[0], drawn, last=None if last else end, **run)
    theirs = pipe(batch.reference[0], drawn, **run, **({"last": end} if last else {})).frames
    conditions = denoiser.condition(batch.reference, batch.pose, end[None] if last else None)
    ours = sampling.sample(denoiser, conditions, size, Generate(steps=2, seed=5), [0])
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-3)


def test_a_last_frame_that_has_no_place_is_one_line(given, tmp_path):
    bases.image_to_video(tmp_path / "i2v", clip=True)
    cases = [
        Model(base=str(tmp_path / "i2v"), last_frame=True),
        Model(base=str(given[1]), last_frame=True),
        Model(family="svd", init=TINY["svd"]["init"], vae="none", last_frame=True),
    ]
    for model in cases:
        with pytest.raises(UserError, match=r"^model\.last_frame: .* no place for a last frame") as error:
            models.family(model.family).inspect(model)
        assert "\n" not in str(error.value)


def test_runs_with_a_last_frame_are_told_apart(first_and_last, tmp_path):
    """Of an FLF2V base nothing but the version says that the last frame is seen: an old run, which says nothing of it,
    goes on with `model.last_frame=false` alone, in phases too."""
    shards = type("Shards", (), {"splits": {"held_out": []}, "clips": lambda self, split: 4, "fingerprint": ""})()

    def of(**model):
        return tiny_experiment(model={"init": {}, "base": str(first_and_last[1]), "vae": "auto", **model})

    assert checks.deciding(of(), shards)["model.last_frame"] is True
    assert "model.last_frame" not in checks.deciding(of(last_frame=False), shards)
    assert "model.last_frame" not in checks.deciding(tiny_experiment(), shards)
    for last in (None, False, True):
        phases = of(last_frame=last).model_copy(update={"phases": {"a": {}, "b": {}}})
        parts = {name: (phase, shards) for name, phase in config.phases(phases, tmp_path).items()}
        said = {name: value for name, value in checks.whole_identity(parts).items() if name.endswith("last_frame")}
        whole = {"a: model.last_frame": True} | ({"b: model.last_frame": True} if last else {})
        assert said == ({} if last is False else whole)
    changed = of().model_copy(update={"phases": {"a": {}, "b": {"model": {"last_frame": False}}}})
    parts = {name: (phase, shards) for name, phase in config.phases(changed, tmp_path).items()}
    assert checks.whole_identity(parts)["b: model.last_frame"] is False
    assert fingerprints.held_out(of(), shards) != fingerprints.held_out(of(last_frame=False), shards)


def test_clips_of_a_batch_keep_their_own_first_image(first_and_last, tmp_path):
    _, folder = first_and_last
    denoiser, batch = load(Model(base=str(folder), last_frame=False)), clips(2, SHAPE)
    encoded, t = denoiser.encode(batch), torch.tensor([0.3, 0.8])
    told = seen(denoiser, encoded.clean, t, encoded.conditions)["encoder_hidden_states_image"]
    assert told.shape[0] == 4 and torch.equal(told[1], told[3]) and not torch.equal(told[0], told[2])
    with torch.no_grad():
        both = denoiser.predict(encoded.clean, t, encoded.conditions)
        for row in (0, 1):
            part = encoded.part(slice(row, row + 1))
            alone = denoiser.predict(part.clean, t[row : row + 1], part.conditions)
            torch.testing.assert_close(alone, both[row : row + 1], rtol=1e-3, atol=1e-4)
        dropped = dropping.dropped(denoiser, encoded, Drop(reference=1.0), 0).conditions
        gone = seen(denoiser, encoded.clean, t, dropped)
        assert not gone["encoder_hidden_states_image"][[0, 2]].any()
        denoiser.save(tmp_path / "model", shape=SHAPE)
        again = load(Model(base=str(tmp_path / "model")))
        assert torch.equal(again.image, denoiser.image) and again.form == "first frame"
        torch.testing.assert_close(again.predict(encoded.clean, t, encoded.conditions), both, rtol=1e-4, atol=1e-5)


def test_a_first_and_last_frame_network_of_an_older_version_keeps_its_form(first_and_last, tmp_path):
    """Zeros for mask and both images, the reference in new channels."""
    pipe, folder = first_and_last
    load(Model(base=str(folder))).save(tmp_path / "old", shape=SHAPE)
    old = diffusers.WanTransformer3DModel.from_config({**pipe.transformer.config, "in_channels": 12 + 8})
    old.save_pretrained(tmp_path / "old" / "transformer")
    about = json.loads((tmp_path / "old" / "entprog.json").read_text()) | {"input_channels": [12, 8]}
    (tmp_path / "old" / "entprog.json").write_text(json.dumps(about))
    denoiser = load(Model(base=str(tmp_path / "old")))
    encoded = denoiser.encode(clips(2, SHAPE))
    told = seen(denoiser, encoded.clean, torch.tensor([0.5, 0.5]), encoded.conditions)
    assert denoiser.form == "" and not told["hidden_states"][:, 4:12].any()
    image = told["encoder_hidden_states_image"]
    assert image.shape == (4, 10, 8) and not image.any()


def test_a_base_without_its_encoder_or_reference_is_one_line(first_and_last, tmp_path):
    pipe, folder = first_and_last
    pipe.transformer.save_pretrained(tmp_path / "transformer")
    pipe.vae.save_pretrained(tmp_path / "vae")
    for settings, said in (
        (Model(base=str(tmp_path)), r"has no image_encoder/ and image_processor/"),
        (Model(base=str(folder), conditions=("pose",)), r"add reference to model\.conditions"),
    ):
        with pytest.raises(UserError, match=said) as error:
            inspect(settings)
        assert "\n" not in str(error.value)


# ---- a first frame that is given


def test_tokens_of_the_first_frame_are_the_picture_at_timestep_0(given):
    pipe, folder = given
    denoiser, batch = load(Model(base=str(folder))), clips(1, SHAPE)
    assert denoiser.conditions == ("reference", "pose") and denoiser.form == "given frame"
    assert denoiser.network.config.in_channels == 4 + 4
    pipe.scheduler = sampler(denoiser.process, UNIPC)
    made = []
    theirs = calls(pipe.transformer, lambda: made.append(pipe(
        frame(batch, 0), height=32, width=32, num_frames=9, num_inference_steps=3, guidance_scale=1.0,
        latents=noise(denoiser), prompt_embeds=TEXT, output_type="latent",
    ).frames))  # fmt: skip
    encoded = denoiser.encode(batch)
    assert len(theirs) == 3
    for told in theirs:
        (t,) = told["timestep"].amax(1, keepdim=False).unique() / 1000
        ours = seen(denoiser, told["hidden_states"], t.reshape(1), encoded.conditions)
        torch.testing.assert_close(ours["hidden_states"][:, :4], told["hidden_states"], **CLOSE)
        torch.testing.assert_close(ours["timestep"], told["timestep"].float(), **CLOSE)
        assert not ours["timestep"][:, :4].any() and ours["timestep"][:, 4:].all(), "2x2 tokens a frame"
    settings = Generate(steps=3, seed=5, sampler=UNIPC)
    size = (1, *denoiser.latent_shape(SHAPE))
    ours = sampling.sample(denoiser, encoded.conditions, size, settings, [0])
    torch.testing.assert_close(ours, made[0].float(), rtol=1e-3, atol=1e-3)


def test_without_a_reference_the_first_frame_is_as_any(given):
    """As the same base's text-to-video pipeline has it."""
    pipe, folder = given
    denoiser, batch = load(Model(base=str(folder))), clips(1, SHAPE)
    text_to_video = diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, vae=pipe.vae, transformer=pipe.transformer, scheduler=pipe.scheduler,
        expand_timesteps=True,
    )  # fmt: skip
    told, *_ = calls(pipe.transformer, lambda: text_to_video(
        height=32, width=32, num_frames=9, num_inference_steps=2, guidance_scale=1.0, latents=noise(denoiser),
        prompt_embeds=TEXT, output_type="latent",
    ))  # fmt: skip
    dropped = dropping.dropped(denoiser, denoiser.encode(batch), Drop(reference=1.0), 0).conditions
    ours = seen(denoiser, noise(denoiser), told["timestep"].float()[0, :1] / 1000, dropped)
    torch.testing.assert_close(ours["hidden_states"][:, :4], told["hidden_states"], **CLOSE)
    torch.testing.assert_close(ours["timestep"], told["timestep"].float(), **CLOSE)
    alone = load(Model(base=str(folder), conditions=("pose",)))
    assert alone.conditions == ("pose",) and alone.form == ""


def test_loss_is_on_the_other_frames_alone(given):
    _, folder = given
    denoiser, batch = load(Model(base=str(folder))), clips(2, SHAPE)
    encoded = denoiser.encode(batch)
    clean = encoded.clean.clone()
    clean[:, :, 0] += 3
    other = replace(encoded, clean=clean)
    loss = lambda batch, **drop: losses.training_loss(denoiser, batch, Train(steps=1, drop=Drop(**drop))).item()  # noqa: E731
    with torch.no_grad():
        assert loss(encoded) == loss(other)
        assert loss(encoded, reference=1.0) != loss(other, reference=1.0)
        one, two = (losses.held_out_loss(denoiser, [part], 2, 0) for part in (encoded, other))
    assert one == two
    found = blocks(denoiser.network)
    for kind in ("loss_increase", "fisher", "cei"):
        settings = Priority(kind=kind, conditions=2, draws=4)
        one, two = (priorities.score(denoiser, found, [part], settings).scores() for part in (encoded, other))
        assert one == two and len(set(one.values())) == len(found), kind


def test_what_is_given_stays_through_guidance_and_long_clips(given):
    _, folder = given
    denoiser, batch = load(Model(base=str(folder))), clips(2, SHAPE)
    conditions = denoiser.condition(batch.reference, batch.pose)
    size = (2, *denoiser.latent_shape(SHAPE))
    first = conditions["reference"][:, 1:, :1]
    for window, guidance, name in ((None, {}, None), (2, {}, None), (None, {"reference_guidance": 3.0}, UNIPC)):
        settings = Generate(steps=3, sampler=name, **guidance)
        made = sampling.sample(denoiser, conditions, size, settings, [0, 1], window=window)
        torch.testing.assert_close(made[:, :, :1], first, rtol=1e-3, atol=1e-3)
        assert made.isfinite().all()


def test_step_0_is_the_base_and_a_saved_network_the_same(given, tmp_path):
    _, folder = given
    denoiser, batch = load(Model(base=str(folder))), clips(2, SHAPE)
    encoded, t = denoiser.encode(batch), torch.tensor([0.3, 0.8])
    with torch.no_grad():
        got = denoiser.predict(encoded.clean, t, encoded.conditions)
        base = load(Model(base=str(folder), conditions=("reference",)))
        assert torch.equal(got, base.predict(encoded.clean, t, encoded.conditions)), "pose's channels are zero at first"
        denoiser.save(tmp_path / "model", shape=SHAPE)
        again = load(Model(base=str(tmp_path / "model")))
        assert again.form == denoiser.form and again.conditions == denoiser.conditions
        torch.testing.assert_close(again.predict(encoded.clean, t, encoded.conditions), got, rtol=1e-4, atol=1e-5)
    assert cache.key(again, "wan", SHAPE) == cache.key(denoiser, "wan", SHAPE)
    with pytest.raises(
        UserError, match=r"^model\.conditions: .* was trained with reference, pose; add reference to it$"
    ):
        inspect(Model(base=str(tmp_path / "model"), conditions=("pose",)))
    load(Model(base=str(folder), conditions=("pose",))).save(tmp_path / "pose", shape=SHAPE)
    assert inspect(Model(base=str(tmp_path / "pose"))).conditions == ("reference", "pose"), "it can still be added"
    assert load(Model(base=str(tmp_path / "pose"))).form == "given frame"


def test_an_older_network_with_the_reference_in_new_channels_keeps_it(given, tmp_path):
    _, folder = given
    before, of_pose = fingerprints.base(Model(base=str(folder))), Model(base=str(folder), conditions=("pose",))
    before_of_pose = fingerprints.base(of_pose)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"expand_timesteps": False}))
    try:
        old = load(Model(base=str(folder)))  # as a version that did not look there
        assert fingerprints.base(Model(base=str(folder))) != before
        assert fingerprints.base(of_pose) == before_of_pose, "without the reference it decides nothing: old runs go on"
    finally:
        (folder / "model_index.json").write_text(json.dumps(index))
    assert old.form == "" and old.network.config.in_channels == 12
    old.save(tmp_path / "model", shape=SHAPE)
    again = load(Model(base=str(tmp_path / "model")))
    assert again.form == "" and cache.key(again, "wan", SHAPE) != cache.key(load(Model(base=str(folder))), "wan", SHAPE)
    assert load(Model(init=TINY["wan"]["init"], vae="none")).form == ""


def test_held_out_losses_of_other_frames_are_kept_apart(given, tmp_path):
    """A loss without the first frame is another one; all others' hashes are as they were."""
    _, folder = given
    shards = type("Shards", (), {"splits": {"held_out": []}, "clips": lambda self, split: 4})()

    def mark(folder=folder, conditions=("reference", "pose"), **model):
        base = {"init": {}, "base": str(folder), "vae": "auto", "conditions": conditions}
        return fingerprints.held_out(tiny_experiment(model=base | model), shards)

    other = fingerprints.held_out(tiny_experiment(), shards)
    plain = shutil.copytree(folder, tmp_path / "plain")
    (plain / "model_index.json").unlink()
    assert mark(conditions=("pose",)) == mark(plain) == other
    assert mark() == mark(conditions=("reference",)) != other
    load(Model(base=str(folder))).save(tmp_path / "saved", shape=SHAPE)
    assert mark(tmp_path / "saved") == mark()


def test_clips_of_the_given_frame_alone_are_refused(given):
    _, folder = given
    one = SHAPE.model_copy(update={"frames": 1})
    model, network = Model(base=str(folder)), load(Model(base=str(folder)))
    for work in (lambda: inspect(model, one), lambda: network.check(one)):
        with pytest.raises(UserError, match=r"^data\.shape\.frames: 1 frames are one latent frame, .* take 5 or more"):
            work()
    inspect(Model(base=str(folder), conditions=("pose",)), one)


def test_a_last_timestep_of_0_is_no_division_by_0(given, tmp_path):
    """Solvers round their timesteps: of many steps the last is 0."""
    _, folder = given
    denoiser, batch = load(Model(base=str(folder))), clips(1, SHAPE)
    settings = Generate(steps=50, seed=5, sampler=UNIPC, shift=0.02)
    conditions = denoiser.condition(batch.reference, batch.pose)
    ours = sampling.sample(denoiser, conditions, (1, *denoiser.latent_shape(SHAPE)), settings, [0])
    assert ours.isfinite().all() and torch.equal(ours[:, :, :1], conditions["reference"][:, 1:, :1])
    denoiser.save(tmp_path / "model", shape=SHAPE)
    pipe = saved_pipeline(tmp_path / "model")
    pipe.scheduler = sampler(denoiser.process, UNIPC, 0.02)
    theirs = pipe(
        batch.reference[0], draw(batch.pose[0], 32, 32), latents=noise(denoiser), num_inference_steps=50,
        output_type="latent",
    ).frames  # fmt: skip
    assert int(pipe.scheduler.timesteps[-1]) == 0
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-3)
