"""Wan VACE: the network sees at training what its diffusers pipeline shows it at inference."""

import json
from dataclasses import replace
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from entprog import config, models
from entprog.blocks import blocks
from entprog.config import ClipShape, Drop, Generate, Model
from entprog.diffusion import dropping, losses, sampling
from entprog.diffusion.objectives import noise_like
from entprog.diffusion.samplers import sampler
from entprog.errors import UserError
from entprog.media import h264, styles
from entprog.media.color import yuv420_to_rgb
from entprog.media.skeleton import draw
from entprog.models import adapters, lora
from entprog.models.reference_frame import _fixed_noise
from entprog.models.wan_vace import inspect, load
from entprog.schedule import plans
from entprog.schedule.freezing import Freeze
from helpers import bases, wholebodies
from helpers.families import clips
from helpers.networks import tiny_experiment
from helpers.recording import calls
from pipelines import adapter, cli, generate
from pipelines.generating import motions
from pipelines.training import checks, networks

SHAPE = ClipShape(frames=9, height=32, width=32, fps=12)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(a pipeline, its folder)"""
    folder = tmp_path_factory.mktemp("vace")
    return bases.vace(folder), folder


@pytest.mark.parametrize("conditions", [("reference", "pose"), ("pose",)])
def test_inputs_at_training_are_those_of_the_pipeline(made, conditions):
    pipe, folder = made
    denoiser = load(Model(family="wan_vace", base=str(folder), conditions=conditions, skeleton="limbs"))
    assert denoiser.conditions == conditions
    batch = clips(1, SHAPE)
    encoded = denoiser.encode(batch)
    assert set(encoded.conditions) == set(conditions)
    noise = noise_like(torch.empty(1, *denoiser.latent_shape(SHAPE)), torch.tensor([0]), 5)
    start, own = noise, 0
    if "reference" in conditions:  # whose frame has one noise for all clips
        own = 1
        first = noise_like(torch.empty(1, 4, 1, 4, 4), torch.tensor([0]), 0)
        start = torch.cat([first, noise], dim=2)
    picture = Image.fromarray(batch.reference[0].numpy())
    theirs = calls(pipe.transformer, lambda: pipe(
        video=draw(batch.pose, 32, 32) / 2 + 0.5, reference_images=picture if own else None, height=32, width=32,
        num_frames=9, num_inference_steps=3, guidance_scale=1.0, latents=start, prompt_embeds=torch.zeros(1, 512, 8),
        output_type="latent",
    ))  # fmt: skip
    assert len(theirs) == 3
    for number, told in enumerate(theirs):
        noisy = told["hidden_states"][:, :, own:]
        t = denoiser.process.t(told["timestep"].float())
        (ours,) = calls(denoiser.network, lambda n=noisy, t=t: denoiser.predict(n, t, encoded.conditions))
        close = {"rtol": 1e-4, "atol": 1e-4}
        seen = slice(own if number else 0, None)  # later on that frame is where the network's own prediction put it
        assert ours["hidden_states"].shape == told["hidden_states"].shape
        torch.testing.assert_close(ours["hidden_states"][:, :, seen], told["hidden_states"][:, :, seen], **close)
        torch.testing.assert_close(ours["control_hidden_states"], told["control_hidden_states"], **close)
        torch.testing.assert_close(ours["timestep"], told["timestep"].float(), **close)
        assert told["control_hidden_states_scale"].eq(1).all(), "as a network has it that is given none"
        assert torch.equal(ours["encoder_hidden_states"], torch.zeros(1, 1, 8))  # as many zeros as one


@pytest.mark.parametrize("name", ["high", "low"])
def test_two_experts_sample_as_their_pipeline_has_them_do(name, tmp_path):
    """VACE-Fun of Wan 2.2: both see the control video; saved, they do as well, by plain diffusers too."""
    pipe = bases.vace(tmp_path / "two", boundary=0.9)
    with pytest.raises(UserError, match=r"has two networks, one for much noise and one for little: set model\.expert"):
        inspect(Model(family="wan_vace", base=str(tmp_path / "two")))
    own = {"family": "wan_vace", "conditions": ("pose",), "skeleton": "limbs"}
    denoiser, batch = load(Model(base=str(tmp_path / "two"), expert=name, **own)), clips(1, SHAPE)
    assert denoiser.time_range == {"high": (0.9, 1.0), "low": (0.0, 0.9)}[name]
    assert denoiser.expert.conditions == ("pose",) and denoiser.network.config.vace_layers == [0, 2]
    with_both = load(Model(base=str(tmp_path / "two"), family="wan_vace", expert=name))
    assert with_both.expert.conditions == ("reference", "pose")
    noise = noise_like(torch.empty(1, *denoiser.latent_shape(SHAPE)), torch.tensor([0]), 5)
    pipe.scheduler = sampler(denoiser.process, "UniPCMultistepScheduler")
    drawn, theirs = draw(batch.pose, 32, 32), []
    seen = calls(pipe.transformer, lambda: theirs.append(pipe(
        video=drawn / 2 + 0.5, height=32, width=32, num_frames=9, num_inference_steps=6, guidance_scale=1.0,
        latents=noise, prompt_embeds=torch.zeros(1, 512, 8), output_type="latent",
    ).frames))  # fmt: skip
    assert len(seen) == 2
    shape, conditions = (1, *denoiser.latent_shape(SHAPE)), denoiser.condition(batch.reference, batch.pose)
    settings = Generate(steps=6, seed=5, sampler="UniPCMultistepScheduler")
    ours = sampling.sample(denoiser, conditions, shape, settings, [0])
    torch.testing.assert_close(ours, theirs[0], rtol=1e-3, atol=1e-3)
    denoiser.save(tmp_path / "model", shape=SHAPE)
    again = load(Model(base=str(tmp_path / "model"), **own))
    assert again.expert.name == name and again.expert.conditions == ("pose",)
    torch.testing.assert_close(sampling.sample(again, conditions, shape, settings, [0]), ours, rtol=1e-4, atol=1e-5)
    saved = diffusers.DiffusionPipeline.from_pretrained(
        tmp_path / "model", custom_pipeline=str(tmp_path / "model"), trust_remote_code=True
    )
    saved.set_progress_bar_config(disable=True)
    saved.scheduler = pipe.scheduler
    plain = saved(pose=drawn[0], latents=noise, num_inference_steps=6, output_type="latent").frames
    torch.testing.assert_close(plain, ours, rtol=1e-3, atol=1e-3)


def test_the_reference_s_frame_is_where_the_clip_is(made):
    """Noised with the clip: the reference itself at t = 0, one noise at t = 1, whatever the clip."""
    _, folder = made
    denoiser = load(Model(family="wan_vace", base=str(folder)))
    encoded = denoiser.encode(clips(2, SHAPE))
    for t in (0.0, 1.0):
        times = torch.full((2,), t)
        (ours,) = calls(denoiser.network, lambda t=times: denoiser.predict(encoded.clean, t, encoded.conditions))
        first, reference = ours["hidden_states"][:, :, :1], encoded.conditions["reference"][:, :, :1]
        assert torch.equal(first, reference) == (t == 0) and torch.equal(first[0], first[1]) == (t == 1)


@pytest.mark.parametrize("name", ["pose", "reference"])
def test_what_is_withheld_is_as_in_the_pipeline_without_it(made, name, tmp_path):
    """A network of an earlier version sees zeros there."""
    pipe, folder = made
    denoiser, batch = load(Model(family="wan_vace", base=str(folder), skeleton="limbs")), clips(1, SHAPE)
    given = {"video": draw(batch.pose, 32, 32) / 2 + 0.5} if name == "reference" else {}
    given |= {"reference_images": Image.fromarray(batch.reference[0].numpy())} if name == "pose" else {}
    (told,) = calls(pipe.transformer, lambda: pipe(
        **given, height=32, width=32, num_frames=9, num_inference_steps=1, guidance_scale=1.0, output_type="latent",
        prompt_embeds=torch.zeros(1, 512, 8),
    ))  # fmt: skip
    encoded = denoiser.encode(batch)
    dropped = dropping.dropped(denoiser, encoded, Drop(**{name: 1.0}), 0).conditions
    seen = lambda one: calls(one.network, lambda: one.predict(encoded.clean, torch.ones(1), dropped))[0]  # noqa: E731
    ours = seen(denoiser)
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(ours["control_hidden_states"], told["control_hidden_states"], **close)
    assert ours["hidden_states"].shape == told["hidden_states"].shape
    denoiser.save(tmp_path, shape=SHAPE)
    again = seen(load(Model(family="wan_vace", base=str(tmp_path))))
    torch.testing.assert_close(again["control_hidden_states"], told["control_hidden_states"], **close)
    about = json.loads((tmp_path / "entprog.json").read_text())
    assert about.pop("native") is True
    (tmp_path / "entprog.json").write_text(json.dumps(about))
    old = seen(load(Model(family="wan_vace", base=str(tmp_path))))
    control = old["control_hidden_states"]
    assert old["hidden_states"].shape[2] == 4
    assert not (control[:, 4:8] if name == "pose" else control[:, :, 0]).any()


def test_the_control_branch_alone_is_trained(made):
    denoiser = load(Model(family="wan_vace", base=str(made[1])))
    found = blocks(denoiser.network)
    names = plans.eligible(found, "control")
    assert names == [name for name in (block.name for block in found) if name.startswith("vace_blocks.")] and names
    experiment = tiny_experiment(schedule={"blocks": "control", "outside": "never"})
    Freeze(denoiser, found, experiment).put(plans.full(names, SHAPE))
    losses.training_loss(denoiser, denoiser.encode(clips(1, SHAPE)), experiment.train).backward()
    reached = {name for name, parameter in denoiser.network.named_parameters() if parameter.grad is not None}
    assert reached == {name for name, _ in denoiser.network.named_parameters() if name.startswith("vace_blocks.")}
    assert all(block.proj_out.weight.grad.any() for block in denoiser.network.vace_blocks)


WRONG = [
    (
        {"conditions": ("reference",)},
        r"^model\.conditions: a VACE network's control video is the drawn pose; add pose$",
    ),
    ({"conditions": ()}, r"^model\.conditions: a VACE network's control video is the drawn pose; add pose$"),
    ({"vae": "none"}, r"the network has 4 output channels, pixels have 3 channels"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_what_is_missing_is_one_line(made, changes, message):
    with pytest.raises(UserError, match=message) as error:
        inspect(Model(**{"family": "wan_vace", "base": str(made[1]), **changes}))
    assert "\n" not in str(error.value)


def test_a_control_of_another_width_is_refused(made, tmp_path):
    pipe, folder = made
    other = diffusers.WanVACETransformer3DModel(**{**pipe.transformer.config, "vace_in_channels": 4 * 2 + 16})
    other.save_pretrained(tmp_path / "transformer")
    with pytest.raises(UserError, match=r"vace_in_channels must be 72 .*, given 24"):
        inspect(Model(family="wan_vace", base=str(tmp_path), vae=str(folder)))


def test_what_was_trained_with_a_reference_keeps_it(made, tmp_path):
    load(Model(family="wan_vace", base=str(made[1]))).save(tmp_path / "model", shape=SHAPE)
    with pytest.raises(UserError, match=r"was trained with reference too; add that"):
        inspect(Model(family="wan_vace", base=str(tmp_path / "model"), conditions=("pose",)))


def test_an_adapter_of_others_is_merged_with_the_conditions_that_the_base_has(made, tmp_path):
    pipe, folder = made
    name = next(name for name, module in pipe.transformer.named_modules() if name.endswith("attn1.to_q"))
    rows, columns = pipe.transformer.get_submodule(name).weight.shape
    pair = {"lora_A.weight": torch.ones(2, columns), "lora_B.weight": torch.ones(rows, 2)}
    save_file({f"transformer.{name}.{half}": tensor for half, tensor in pair.items()}, tmp_path / "lora.safetensors")
    given = ["--adapter", tmp_path / "lora.safetensors", "--base", folder, "--family", "wan_vace", "--output"]
    done = CliRunner().invoke(adapter.app, ["merge", *map(str, given), str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert inspect(Model(family="wan_vace", base=str(tmp_path / "out" / "model"))).conditions == ("reference", "pose")


def test_the_reference_s_noise_comes_of_no_device_s_own_generator():
    """Generators of CPUs and GPUs differ: a network trained on one would see another noise on the other."""
    here = _fixed_noise(torch.zeros(2, 3, 1, 4, 4))
    assert torch.equal(here[0], here[1]) and here[0].std() > 0.5
    assert _fixed_noise(torch.zeros(2, 3, 1, 4, 4, device="meta")).shape == here.shape  # which has no generator at all


@pytest.mark.parametrize("native", [True, False])
def test_an_adapter_goes_on_as_it_has_seen_what_is_withheld(native, made, tmp_path):
    """One of before has no mark, and has seen zeros."""
    model = {"family": "wan_vace", "base": str(made[1]), "conditions": ("reference", "pose"), "init": {}, "vae": "auto"}
    wanted = tiny_experiment(model=model | {"adapter": str(tmp_path / "a")}, train={"lora": {"rank": 2}})
    denoiser = load(Model(**model))
    lora.add(denoiser.network, blocks(denoiser.network), wanted.train.lora, 0)
    about = {"family": "wan_vace", "conditions": denoiser.conditions} | ({"native": True} if native else {})
    lora.save(denoiser.network, wanted.train.lora, [], tmp_path / "a", "transformer", about)
    assert networks.load(wanted, torch.device("cpu")).native == native


def test_poses_are_drawn_as_the_setting_says_then_adapter_then_folder_then_the_published_networks(made, tmp_path):
    """As for Wan-Animate, whose presets have no drawing of their own either."""
    of = {"family": "wan_vace", "base": str(made[1])}
    published = load(Model(**of))
    assert published.skeleton == "dwpose" and load(Model(**of, skeleton="limbs")).skeleton == "limbs"
    name = next(name for name, module in made[0].transformer.named_modules() if name.endswith("attn1.to_q"))
    rows, columns = made[0].transformer.get_submodule(name).weight.shape
    pair, own = adapters.Pair(torch.zeros(1, columns), torch.zeros(rows, 1), 1.0), {}
    for style in styles.STYLES:
        load(Model(**of, skeleton=style)).save(tmp_path / style, shape=SHAPE)
        assert inspect(Model(**of | {"base": str(tmp_path / style)})).skeleton == style
        about = {"family": "wan_vace", "conditions": ["reference", "pose"], "skeleton": style}
        adapters.write(tmp_path / f"of {style}", adapters.Adapter({name: pair}, {}, about), "transformer")
        own[style] = str(tmp_path / f"of {style}")
    for style in styles.STYLES:
        for base in (made[1], tmp_path / "limbs", tmp_path / "dwpose"):
            asked = of | {"base": str(base), "adapter": own[style]}
            assert inspect(Model(**asked)).skeleton == style
            assert inspect(Model(**asked, skeleton="limbs")).skeleton == "limbs"
    adapters.write(tmp_path / "others", adapters.Adapter({name: pair}, {}, {}), "transformer")
    (tmp_path / "others" / adapters.ABOUT).unlink()
    assert inspect(Model(**of, adapter=str(tmp_path / "others"))).skeleton == "dwpose"
    init = {name: value for name, value in made[0].transformer.config.items() if name[0] != "_"}
    init = {name: value for name, value in init.items() if "in_channels" not in name}
    assert inspect(Model(family="wan_vace", init=init, vae=str(made[1]))).skeleton == "limbs"

    def decides(**model):
        experiment = tiny_experiment(model={"init": {}, "vae": "auto", **of, **model})
        return checks.deciding(experiment, SimpleNamespace(fingerprint="")).get("model.skeleton")

    assert decides() == decides(skeleton="dwpose") == "dwpose", "as in runs that the preset of before began"
    assert decides(skeleton="limbs") is None, "as in runs of before the setting"
    assert decides(skeleton="limbs", base=str(tmp_path / "dwpose")) == "limbs", "which is another one there"
    remembered = [
        {"base": str(tmp_path / "dwpose")},
        {"adapter": own["dwpose"]},
        {"skeleton": None, "base": str(tmp_path / "limbs")},
    ]
    assert [decides(**model) for model in remembered] == [None] * 3
    for preset, style in {"wan21_vace_1_3b": "dwpose", "wan_animate_14b": "wan_animate"}.items():
        experiment = cli.settings(config.Experiment, preset, None, None)
        assert experiment.model.skeleton is None
        assert style == models.family(experiment.model.family).DENOISER.SKELETON


# ---- a video that is kept around the person, and several pictures ----


def scene(count=1):
    """A video that a person is put into, uint8 [B, F, 32, 32, 3], and where, bool [B, F, 32, 32]."""
    person = torch.zeros(count, SHAPE.frames, 32, 32, dtype=torch.bool)
    for frame in range(SHAPE.frames):
        person[:, frame, 5:27, 2 + frame : 15 + frame] = True
    video = torch.randint(0, 256, (*person.shape, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return video, person


def scribbles(count):
    """Reference pictures of the clip's size, uint8 [1, count, 32, 32, 3]."""
    return torch.randint(0, 256, (1, count, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


def pictures(video):
    """uint8 [F, H, W, 3] as PIL pictures."""
    return [Image.fromarray(frame.numpy()) for frame in video]


@torch.no_grad()
@pytest.mark.parametrize("more", [0, 2])
def test_masks_and_several_references_are_those_of_the_pipeline(made, monkeypatch, more):
    """The pipeline's video has the pose drawn into it where its mask is white."""
    pipe, folder = made
    rounded = lambda *given: (draw(*given) * 127.5 + 127.5).round() / 127.5 - 1  # noqa: E731
    monkeypatch.setattr("entprog.media.drawing.draw", lambda pose, height, width, style: rounded(pose, height, width))
    denoiser, batch = load(Model(family="wan_vace", base=str(folder), skeleton="limbs")), clips(1, SHAPE)
    video, person = scene()
    conditions = denoiser.condition(batch.reference, batch.pose) | denoiser.background(video, person, batch.pose)
    others = scribbles(more)
    if more:
        conditions["reference"] = denoiser.with_others(conditions["reference"], others)
    drawn = ((rounded(batch.pose, 32, 32)[0] + 1) * 127.5).round().byte().movedim(1, -1)
    composed = torch.where(person[0, ..., None], drawn, video[0])
    noise = noise_like(torch.empty(1, *denoiser.latent_shape(SHAPE)), torch.tensor([0]), 5)
    first = _fixed_noise(noise[:, :, : 1 + more])
    (told,) = calls(pipe.transformer, lambda: pipe(
        video=pictures(composed), mask=pictures(person[0, ..., None].expand(-1, -1, -1, 3).byte() * 255),
        reference_images=pictures(torch.cat([batch.reference, others[0]])), height=32, width=32, num_frames=9,
        num_inference_steps=1, guidance_scale=1.0, latents=torch.cat([first, noise], dim=2),
        prompt_embeds=torch.zeros(1, 512, 8), output_type="latent",
    ))  # fmt: skip
    t = denoiser.process.t(told["timestep"].float())
    (ours,) = calls(denoiser.network, lambda: denoiser.predict(noise, t, conditions))
    assert told["hidden_states"].shape[2] == 1 + more + 3
    for name in ("hidden_states", "control_hidden_states", "timestep"):
        torch.testing.assert_close(ours[name], told[name].float(), rtol=1e-4, atol=1e-4)
    assert dropping.named(conditions) == ("reference", "pose")
    assert torch.equal(dropping.without(conditions, [])["background"], conditions["background"])


@torch.no_grad()
def test_a_clip_with_a_mask_is_trained_on_so_and_one_without_as_before(made):
    denoiser, batch = load(Model(family="wan_vace", base=str(made[1]))), clips(2, SHAPE)
    _, person = scene(2)
    person[1] = False
    seen = denoiser.encode(replace(batch, mask=person)).conditions
    frames = ((yuv420_to_rgb(batch.video) + 1) * 127.5).round().byte().movedim(2, -1)
    due = denoiser.background(frames * ~person[..., None], person, batch.pose)
    assert all(torch.equal(seen[name], due[name]) for name in ("background", "pose"))
    plain = denoiser.encode(batch).conditions
    noise, t = torch.randn(2, *denoiser.latent_shape(SHAPE)), torch.tensor([0.4, 0.7])
    ours, before = denoiser.predict(noise, t, seen), denoiser.predict(noise, t, plain)
    torch.testing.assert_close(ours[1], before[1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ours[0], before[0], atol=1e-3)


@torch.no_grad()
def test_the_saved_pipeline_takes_them_too(made, tmp_path):
    denoiser, batch = load(Model(family="wan_vace", base=str(made[1]), skeleton="limbs")), clips(1, SHAPE)
    video, person = scene()
    conditions = denoiser.condition(batch.reference, batch.pose) | denoiser.background(video, person, batch.pose)
    conditions["reference"] = denoiser.with_others(conditions["reference"], scribbles(1))
    size, settings = (
        (1, *denoiser.latent_shape(SHAPE)),
        Generate(steps=2, seed=5, reference_guidance=3.0, pose_guidance=2.0),
    )
    ours = sampling.sample(denoiser, conditions, size, settings, [0])
    assert sampling.sample(denoiser, conditions, size, settings, [0], window=2).isfinite().all()
    denoiser.save(tmp_path / "model", shape=SHAPE)
    pipe = diffusers.DiffusionPipeline.from_pretrained(
        tmp_path / "model", custom_pipeline=str(tmp_path / "model"), trust_remote_code=True
    )
    pipe.set_progress_bar_config(disable=True)
    noise = noise_like(torch.empty(size), torch.tensor([0]), 5)
    run = {"pose": draw(batch.pose, 32, 32)[0], "latents": noise, "num_inference_steps": 2}
    run |= {"reference_guidance": 3.0, "pose_guidance": 2.0}
    run |= {"background": video[0], "mask": person[0], "output_type": "latent"}
    both = [batch.reference[0], scribbles(1)[0, 0]]
    torch.testing.assert_close(pipe(reference=both, **run).frames, ours, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(pipe(reference=both[0], **run).frames, ours, atol=1e-3)


def test_generate_takes_several_pictures_and_a_mask(made, tmp_path):
    load(Model(family="wan_vace", base=str(made[1]))).save(tmp_path / "model", shape=SHAPE)
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "pose.npz", pose=wholebodies.moving(9))
    for name, size in {"me": (32, 32, 3), "wide": (16, 64, 3)}.items():
        Image.fromarray(rng.integers(0, 256, size, np.uint8)).save(tmp_path / f"{name}.png")
    video, person = scene()
    h264.write(tmp_path / "plate.mp4", video[0].numpy(), SHAPE.fps)
    h264.write(tmp_path / "mask.mp4", person[0, ..., None].numpy().repeat(3, -1).astype(np.uint8) * 255, SHAPE.fps)
    own = ["--checkpoint", tmp_path / "model", "--pose", tmp_path / "pose.npz", "--steps", 1]
    own += ["--reference", tmp_path / "me.png"]

    def generated(name, *options):
        given = [*own, *options, "--output", tmp_path / name]
        done = CliRunner().invoke(generate.app, list(map(str, given)))
        assert done.exit_code == 0, done.output
        return h264.decode_rgb(next((tmp_path / name / "videos").glob("*_result.mp4")).read_bytes()).astype(int)

    plain = generated("plain")
    for name, options in {
        "two": ("--reference", tmp_path / "wide.png"),
        "into": ("--mask", tmp_path / "mask.mp4", "--background", tmp_path / "plate.mp4"),
    }.items():
        assert np.abs(generated(name, *options) - plain).mean() > 0.5, name
    more = motions.other_pictures([tmp_path / "wide.png"], SHAPE, config.Prepare())
    assert (more[0, :12] == 255).all() and (more[0, 20:] == 255).all() and not (more[0, 12:20] == 255).all()
    given = [*own, "--reference", tmp_path / "none.png", "--output", tmp_path / "out"]
    done = CliRunner().invoke(generate.app, list(map(str, given)))
    assert done.exit_code == 2 and "--reference: no such file:" in done.output
    lone = Model(family="wan_vace", base=str(made[1]), conditions=("pose",))
    load(lone).save(tmp_path / "lone", shape=SHAPE)
    with pytest.raises(UserError, match=r"--reference was given 2 times, .* takes one picture: of a folder"):
        generate.run(
            tmp_path / "lone", tmp_path / "out", reference=tmp_path / "me.png", others=[tmp_path / "wide.png"],
            pose=tmp_path / "pose.npz",
        )  # fmt: skip


def test_conditions_enter_through_the_controls_embedding_alone(made):
    """`schedule.outside=conditions` trains that, and nothing that the clip itself goes through."""
    denoiser = load(Model(family="wan_vace", base=str(made[1])))
    groups = denoiser.outside()
    embedding = denoiser.network.vace_patch_embedding
    assert {id(p) for p in groups["conditions"]} == {id(p) for p in embedding.parameters()}
    inside = {id(p) for block in blocks(denoiser.network) for p in block.module.parameters()}
    every = [id(p) for group in groups.values() for p in group]
    assert sorted(every) == sorted(id(p) for p in denoiser.network.parameters() if id(p) not in inside)
