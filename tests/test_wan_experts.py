"""Wan 2.2's two experts: each is trained on its own timesteps, and they sample as their pipeline has them do."""

import json
import re
import shutil
from functools import partial

import diffusers
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from entprog import config
from entprog.blocks import blocks
from entprog.blocks.stored import linear_weights
from entprog.blocks.swap import pinned_bytes
from entprog.config import ClipShape, Generate, Model, Priority, Timesteps, Train
from entprog.data import latents as cache
from entprog.diffusion import losses, sampling
from entprog.diffusion.objectives import noise_like
from entprog.diffusion.samplers import sampler
from entprog.errors import UserError
from entprog.media.skeleton import draw
from entprog.models import experts, fingerprints
from entprog.models.wan import inspect, load
from entprog.scoring import cei
from helpers import bases, real_clips
from helpers.families import clips
from helpers.networks import tiny_experiment
from helpers.recording import calls
from pipelines import train
from pipelines.training import footprint, outline

SHAPE = ClipShape(frames=9, height=32, width=32, fps=12)
UNIPC = "UniPCMultistepScheduler"
PARTS = {"high": "transformer", "low": "transformer_2"}


@pytest.fixture(scope="module", params=[True, False], ids=["i2v", "t2v"])
def made(request, tmp_path_factory):
    """(pipeline, its folder, whether it has a first frame)"""
    folder = tmp_path_factory.mktemp("experts")
    return bases.two_experts(folder, request.param), folder, request.param


def changed(denoiser, seed):
    """The denoiser after something like training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in denoiser.network.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return denoiser


def sampled(denoiser, batch, name=None, **settings):
    shape = (1, *denoiser.latent_shape(SHAPE))
    conditions = denoiser.condition(batch.reference, batch.pose)
    return sampling.sample(denoiser, conditions, shape, Generate(steps=6, seed=5, sampler=name, **settings), [0])


@pytest.mark.parametrize("name", ["high", "low"])
def test_samples_change_over_where_the_pipeline_does(made, name):
    pipe, folder, first_frame = made
    denoiser, batch = load(Model(base=str(folder), expert=name)), clips(1, SHAPE)
    assert denoiser.conditions == ("reference", "pose") and not denoiser.expert.loaded, "the other one waits"
    noise = noise_like(torch.empty(1, *denoiser.latent_shape(SHAPE)), torch.tensor([0]), 5)
    pipe.scheduler = sampler(denoiser.process, UNIPC)
    given = {"image": Image.fromarray(batch.reference[0].numpy())} if first_frame else {}
    theirs, made_ = {}, []

    def work():
        made_.append(pipe(
            **given, height=32, width=32, num_frames=9, num_inference_steps=6, guidance_scale=1.0, latents=noise,
            prompt_embeds=torch.zeros(1, 512, 8), output_type="latent",
        ).frames)  # fmt: skip

    theirs["high"] = calls(pipe.transformer, lambda: theirs.update(low=calls(pipe.transformer_2, work)))
    assert len(theirs["high"]) == 2 and len(theirs["low"]) == 4
    other = denoiser.expert.other(denoiser)
    networks = {name: denoiser.network, experts.OTHER[name]: other.network}
    ours, latents = {}, []
    ours["high"] = calls(networks["high"], lambda: ours.update(
        low=calls(networks["low"], lambda: latents.append(sampled(denoiser, batch, UNIPC)))
    ))  # fmt: skip
    for expert, each in theirs.items():
        assert len(each) == len(ours[expert])
        for told, seen in zip(each, ours[expert], strict=True):
            width = told["hidden_states"].shape[1]
            close = {"rtol": 1e-4, "atol": 1e-4}
            torch.testing.assert_close(seen["hidden_states"][:, :width], told["hidden_states"], **close)
            torch.testing.assert_close(seen["timestep"], told["timestep"].float(), **close)
            assert (seen["timestep"] >= 900).all() == (expert == "high")
            more = seen["hidden_states"].shape[1] - width
            assert bool(more) == (expert == name), "the other one sees what it was made for"
    torch.testing.assert_close(latents[0], made_[0].float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["high", "low"])
def test_one_of_the_two_is_on_the_device_at_a_time(made, monkeypatch, name):
    _, folder, _ = made
    denoiser = load(Model(base=str(folder), expert=name))
    networks = {name: denoiser.network, experts.OTHER[name]: denoiser.expert.other(denoiser).network}
    places, before = {name: "gpu", experts.OTHER[name]: "cpu"}, {name: "gpu", experts.OTHER[name]: "cpu"}

    def moved(which, device):
        places[which] = device
        assert list(places.values()).count("gpu") <= 1

    monkeypatch.setattr(type(denoiser), "device", property(lambda self: "gpu"))
    for which, network in networks.items():
        monkeypatch.setattr(network, "to", partial(moved, which))
    with denoiser.sampling() as expert_at:
        for timestep, charge in ((1000, "high"), (900, "high"), (899, "low"), (10, "low"), (950, "high"), (10, "low")):
            assert expert_at(torch.tensor(float(timestep))).network is networks[charge]
            assert places == {charge: "gpu", experts.OTHER[charge]: "cpu"}
    assert places == before


@pytest.mark.parametrize("name", ["high", "low"])
def test_timesteps_are_the_expert_s_alone(made, name):
    _, folder, _ = made
    denoiser, batch = load(Model(base=str(folder), expert=name)), clips(2, SHAPE)
    low, high = {"high": (0.9, 1.0), "low": (0.0, 0.9)}[name]
    encoded = denoiser.encode(batch)

    def drawn(work):
        with torch.no_grad():
            seen = calls(denoiser.network, work)
        return torch.cat([call["timestep"] for call in seen]) / 1000

    def scored(law):
        for one in cei.draws(
            denoiser, encoded.part(slice(0, 1)), 0, range(4), Priority(conditions=2, draws=4), 0, law, 2
        ):
            denoiser.predict(one.noisy, one.t, one.conditions)

    works = {
        "training": lambda law: losses.training_loss(denoiser, encoded, Train(steps=1), law),
        "held out": lambda law: losses.held_out_loss(denoiser, [encoded], 4, 0, law),
        "scoring": scored,
    }
    for law in (Timesteps(), Timesteps("logit_normal", -1.0, shift=3.0)):
        for what, work in works.items():
            t = drawn(partial(work, law))
            assert (t >= low - 1e-6).all() and (t <= high + 1e-6).all(), (what, t)
            assert t.unique().numel() == t.numel(), "none of them is cut off"


def test_both_are_saved_and_trained_one_after_the_other(made, tmp_path):
    """As two phases do it: each starts from the folder that the one before left."""
    _, folder, first_frame = made
    batch, networks = clips(1, SHAPE), {}
    start = str(folder)
    for seed, name in enumerate(("high", "low")):
        denoiser = changed(load(Model(base=start, expert=name)), seed)
        networks[name] = denoiser.network.state_dict()
        start = str(tmp_path / name)
        denoiser.save(start, shape=SHAPE)
        again = load(Model(base=start))
        assert again.expert.name == name, "the one that was trained last"
        assert inspect(Model(base=start, expert="high")).expert.time_range == (0.9, 1.0)
        torch.testing.assert_close(sampled(again, batch), sampled(denoiser, batch), rtol=1e-4, atol=1e-5)
    for name, state in networks.items():
        plain = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "low" / PARTS[name])
        assert plain.config.in_channels == (16 if first_frame else 12)
        assert all(torch.equal(value, state[key]) for key, value in plain.state_dict().items())
    about = json.loads((tmp_path / "low" / "entprog.json").read_text())
    assert about["expert"] == "low" and {len(each["conditions"]) for each in about["experts"].values()} == {2}


@pytest.mark.parametrize(("name", "parts"), [("high", "light"), ("low", "whole"), ("low", "light")])
def test_plain_diffusers_runs_both(made, name, parts, tmp_path):
    _, folder, _ = made
    denoiser, batch = changed(load(Model(base=str(folder), expert=name)), 3), clips(1, SHAPE)
    denoiser.save(tmp_path / "model", shape=SHAPE, parts=parts)
    assert (tmp_path / "model" / PARTS[experts.OTHER[name]]).is_dir() == (parts == "whole")
    pipe = diffusers.DiffusionPipeline.from_pretrained(
        tmp_path / "model", custom_pipeline=str(tmp_path / "model"), trust_remote_code=True
    )
    pipe.set_progress_bar_config(disable=True)
    noise = noise_like(torch.empty(1, *denoiser.latent_shape(SHAPE)), torch.tensor([0]), 5)
    for guidance in ({}, {"reference_guidance": 2.0, "pose_guidance": 3.0}):
        theirs = pipe(
            batch.reference[0], draw(batch.pose[0], 32, 32), latents=noise, num_inference_steps=6, output_type="latent",
            **guidance,
        ).frames  # fmt: skip
        torch.testing.assert_close(theirs, sampled(denoiser, batch, **guidance), rtol=1e-3, atol=1e-3)
    again = load(Model(base=str(tmp_path / "model")))
    torch.testing.assert_close(sampled(again, batch), sampled(denoiser, batch), rtol=1e-4, atol=1e-5)


def test_a_run_starts_from_both(made, tmp_path):
    """The other one's weights, and the boundary, decide what is sampled."""
    _, folder, _ = made
    marks = {fingerprints.base(Model(base=str(folder), expert=name)) for name in ("high", "low")}
    here = tmp_path / "base"
    shutil.copytree(folder, here)
    high = Model(base=str(here), expert="high")
    assert fingerprints.base(high) in marks and len(marks) == 2
    index = json.loads((here / "model_index.json").read_text())
    (here / "model_index.json").write_text(json.dumps(index | {"boundary_ratio": 0.8}))
    marks.add(fingerprints.base(high))
    shutil.copy(here / "transformer" / "diffusion_pytorch_model.safetensors", here / "transformer_2")
    marks.add(fingerprints.base(high))
    assert len(marks) == 4


def test_held_out_losses_of_experts_are_kept_apart(made):
    _, folder, _ = made
    shards = type("Shards", (), {"splits": {"held_out": []}, "clips": lambda self, split: 4})()
    experiment = lambda name: tiny_experiment(model={"init": {}, "base": str(folder), "vae": "auto", "expert": name})  # noqa: E731
    assert len({fingerprints.held_out(experiment(name), shards) for name in ("high", "low")}) == 2


def test_cached_latents_are_of_both(made):
    _, folder, _ = made
    keys = {cache.key(load(Model(base=str(folder), expert=name)), "wan", SHAPE) for name in ("high", "low")}
    assert len(keys) == 1
    encoding = config.build({"model": {"base": str(folder), "expert": "both"}}, config.Encoding)
    assert inspect(encoding.model).conditions == ("reference", "pose")


def test_both_are_two_phases(tmp_path):
    experiment = tiny_experiment(model={"init": {}, "base": "somewhere", "expert": "both"})
    parts = config.phases(experiment, tmp_path)
    assert {name: phase.model.expert for name, phase in parts.items()} == {"high": "high", "low": "low"}
    assert parts["low"].model.base == str(tmp_path / "high" / "model") and parts["high"].model.base == "somewhere"


def test_a_dry_run_says_the_expert(made):
    _, folder, first_frame = made
    sees = "which sees reference" if first_frame else "which sees no condition"
    said = outline.expert(inspect(Model(base=str(folder), expert="low")))
    assert said == (
        f"Expert low (transformer_2/): timesteps 0 to 0.9 alone. The other one, {sees}, samples above them."
    )


@pytest.mark.parametrize(
    ("dtype", "parallel", "where"),
    [("float32", "ddp", "or host"), ("float32", "fsdp", "beside"), ("bfloat16", "fsdp", "beside")],
)
def test_a_dry_run_says_what_the_other_one_takes(made, dtype, parallel, where):
    model = {"init": {}, "base": str(made[1]), "vae": "auto", "expert": "low", "dtype": dtype}
    experiment = tiny_experiment(model=model, train={"parallel": parallel})
    denoiser = load(experiment.model)
    other = denoiser.expert.other(denoiser).network
    held = sum(p.nbytes for p in other.parameters())
    said = footprint.other_expert(experiment, inspect(experiment.model))
    if parallel == "fsdp":  # its linear layers wait on the host
        waiting = [sum(p.nbytes for _, p in linear_weights(block.module)) for block in blocks(other)]
        held += 2 * max(waiting) - sum(waiting)
        assert f"{footprint.written(sum(map(pinned_bytes, waiting)))} on its host and" in said
    assert f"whole: {footprint.written(held)} on its device" in said and where in said
    assert footprint.other_expert(tiny_experiment(model=model, train={"samples": 0}), inspect(experiment.model)) is None


# ---- bad input


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with shards and bases in it."""
    place = tmp_path_factory.mktemp("place")
    rows = {split: [[real_clips.row("cam01", split, 0.0, SHAPE)]] for split in ("train", "held_out")}
    real_clips.write(place / "shards", rows, SHAPE)
    bases.two_experts(place / "two", first_frame=False)
    bases.image_to_video(place / "one", clip=False)
    bases.two_experts(place / "seeing", first_frame=True)
    bases.vace(place / "vace")
    changed(load(Model(base=str(place / "two"), expert="high")), 0).save(place / "tuned", shape=SHAPE)

    def broken(name, change):
        shutil.copytree(place / "two", place / name)
        change(place / name)

    broken("endless", lambda folder: edit(folder / "model_index.json", boundary_ratio=None))
    broken("odd", lambda folder: edit(folder / "model_index.json", boundary_ratio=7))
    broken("half", lambda folder: next((folder / "transformer_2").glob("*.safetensors")).unlink())
    return place


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


CONTROL = ("--set", "schedule.blocks=control")
WRONG = {
    "not said which": ("two", {}, "two has two networks, one for much noise and one for little: set model.expert to"),
    "one network": ("one", {"expert": "low"}, "model.expert=low: .*one has one network, no transformer_2/"),
    "one network, both": ("one", {"expert": "both"}, "phase high: model.expert=high: .*one has one network"),
    "another family": ("vace", {"expert": "high", "family": "wan_vace"}, "vace has one network"),
    "no boundary": ("endless", {"expert": "low"}, "no boundary_ratio between 0 and 1 .given None."),
    "a boundary that is none": ("odd", {"expert": "low"}, "no boundary_ratio between 0 and 1 .given 7."),
    "the other one lacks its weights": ("half", {"expert": "high"}, "transformer_2 has no weights"),
    "less than the other one sees": (
        "tuned", {"expert": "low", "conditions": "[reference]"},
        "the high expert of .*tuned sees reference, pose; add pose to model.conditions",
    ),
    "no control branch": ("one", {}, "schedule.blocks=control: this network has no control branch .VACE bases,"),
    "no word for it": ("two", {"expert": "middle"}, "setting model.expert: .*given 'middle'"),
}  # fmt: skip


def command(place, base, settings, *more):
    given = ["--shards", place / "shards", "--output", place / "out", "--base", place / base, "--dry-run"]
    values = {"train.steps": 2} | {f"model.{name}": value for name, value in settings.items()}
    values |= {f"data.shape.{name}": value for name, value in SHAPE.model_dump().items()}
    for name, value in values.items():
        given += ["--set", f"{name}={value}"]
    return CliRunner().invoke(train.app, [str(value) for value in (*given, *more)])


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_one_line(place, wrong):
    base, settings, said = WRONG[wrong]
    done = command(place, base, settings, *(CONTROL if "control" in wrong else ()))
    line = " ".join(done.output.split())
    assert done.exit_code == 2 and line.startswith("error: ") and "Traceback" not in line, done.output
    assert re.search(said, line), line


def test_scores_of_timesteps_that_an_expert_has_not_are_refused(place):
    done = command(place, "two", {"expert": "high"}, "--set", "priority.timestep_range=[0.1,0.5]")
    line = " ".join(done.output.split())
    assert done.exit_code == 2 and "the high expert of" in line and "has timesteps 0.9 to 1 alone" in line, line


def test_phases_and_both_are_one_or_the_other(place):
    done = command(place, "two", {"expert": "both"}, "--set", "phases.one.train.steps=1")
    assert done.exit_code == 2 and "model.expert=both is two phases" in " ".join(done.output.split())


def test_a_dry_run_of_both_shows_both(place):
    done = command(place, "two", {"expert": "both"})
    assert done.exit_code == 0, done.output
    line = " ".join(done.output.split())
    assert "Expert high (transformer/)" in line and "Expert low (transformer_2/)" in line


PHASES = {
    "high": {"expert": "high", "skeleton": "dwpose"},
    "low": {"expert": "low", "skeleton": "limbs"},
    "again": {"expert": "high", "skeleton": "dwpose"},
}


@pytest.mark.parametrize(
    ("base", "of", "said"),
    [
        ("two", {"high": {}, "low": {}}, r"phase low: model\.skeleton=limbs, and phase high leaves a model of dwpose"),
        ("two", {"high": {"conditions": "[reference]"}, "low": {}}, ""),
        ("two", {"high": {"conditions": "[reference]"}, "low": {}, "again": {}}, r"phase again: .* whose low expert"),
        ("seeing", {"high": {"skeleton": "null", "last_frame": True}, "low": {"skeleton": "null"}}, ""),
        (
            "seeing",
            {"high": {"skeleton": "null"}, "low": {"skeleton": "null", "last_frame": True}},
            r"phase low: model\.last_frame=true, and phase high leaves a model of false, .* model\.last_frame=false",
        ),
    ],
)
def test_experts_of_phases_that_are_shown_other_things_are_refused_before_anything_starts(place, base, of, said):
    values = {
        f"phases.{name}.model.{key}": value for name, own in of.items() for key, value in (PHASES[name] | own).items()
    }
    done = command(place, base, {}, *(word for key, value in values.items() for word in ("--set", f"{key}={value}")))
    line = " ".join(done.output.split())
    assert done.exit_code == (2 if said else 0), line
    assert re.search(said, line), line


def test_a_dry_run_says_how_many_blocks_are_of_the_control_branch(place):
    done = command(place, "vace", {"family": "wan_vace"}, *CONTROL, "--set", "schedule.kind=full")
    assert done.exit_code == 0, done.output
    line = " ".join(done.output.split())
    assert "Blocks that may be trained: 2 of 5 (schedule.blocks=control)." in line, line


def test_both_is_not_one_network(made):
    with pytest.raises(UserError, match=r"^model\.expert=both is for train"):
        inspect(Model(base=str(made[1]), expert="both"))


@pytest.mark.parametrize("name", ["high", "low"])
def test_both_are_shown_poses_of_one_drawing(made, name, tmp_path):
    _, folder, _ = made
    other = experts.OTHER[name]
    load(Model(base=str(folder), expert=other, skeleton="dwpose")).save(tmp_path / "model", shape=SHAPE)
    assert inspect(Model(base=str(tmp_path / "model"), expert=name)).skeleton == "dwpose"
    with pytest.raises(
        UserError, match=rf"^model\.skeleton: the {other} expert of .* trained with dwpose, this one is"
    ) as e:
        inspect(Model(base=str(tmp_path / "model"), expert=name, skeleton="limbs"))
    assert "\n" not in str(e.value)
    assert inspect(Model(base=str(folder), expert=name, skeleton="dwpose")).skeleton == "dwpose", "it has seen none"
