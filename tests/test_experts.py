"""Wan 2.2's two experts beside the rest of a run: sharded training, memory, light saves, hashes, adapters."""

import re
import shutil

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from entprog.blocks import blocks, let_wait, packed_bytes, room_bytes, store_frozen, waiting_bytes
from entprog.blocks.stored import linear_weights
from entprog.config import ClipShape, Generate, Lora, Model
from entprog.data import shards
from entprog.diffusion import sampling
from entprog.distributed import fsdp
from entprog.errors import UserError
from entprog.models import adapters, experts, fingerprints, folders, lora, weight_files
from entprog.models.wan import inspect, load
from helpers import bases, real_clips
from helpers.families import clips
from helpers.networks import tiny_experiment
from helpers.processes import join, leave
from pipelines import adapter as adapter_job
from pipelines.training import worker
from pipelines.training.setup import Setup
from pipelines.training.startup import Startup

SHAPE = ClipShape(frames=9, height=32, width=32, fps=12)
PARTS = {"high": "transformer", "low": "transformer_2"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A text-to-video base with two networks."""
    folder = tmp_path_factory.mktemp("two")
    bases.two_experts(folder, first_frame=False)
    return folder


def two(base, name, **settings):
    return load(Model(base=str(base), expert=name, **settings))


def sampled(denoiser, steps=4):
    batch = clips(1, SHAPE)
    conditions = denoiser.condition(batch.reference, batch.pose)
    return sampling.sample(denoiser, conditions, (1, *denoiser.latent_shape(SHAPE)), Generate(steps=steps), [0])


# ---- sharded


def test_a_sharded_network_stays_in_parts_while_one_rank_samples(base, tmp_path):
    """Every pass brings its weights together again, and all ranks take part in each."""
    join(0, 1, tmp_path)
    for name in ("high", "low"):
        denoiser = two(base, name)
        fsdp.shard(denoiser.network, blocks(denoiser.network))
        in_parts = []
        with denoiser.sampling() as expert_at:
            for timestep in (1000.0, 10.0, 950.0, 20.0):
                expert_at(torch.tensor(timestep))
                in_parts.append(all(hasattr(p, "full_tensor") for p in denoiser.network.parameters()))
        in_parts.append(all(hasattr(p, "full_tensor") for p in denoiser.network.parameters()))
        assert in_parts == [True] * 5, (name, in_parts)
    leave()


@pytest.mark.parametrize(("dtype", "size"), [("bfloat16", 2), ("float32", 4)])
def test_beside_a_sharded_network_the_other_one_waits_on_the_host(base, tmp_path, dtype, size):
    """Two blocks of it are on the device at a time; the very bits."""
    whole = sampled(two(base, "high", dtype=dtype))
    join(0, 1, tmp_path)
    denoiser = two(base, "high", dtype=dtype)
    fsdp.shard(denoiser.network, blocks(denoiser.network), half=dtype == "bfloat16")
    assert torch.equal(sampled(denoiser), whole)
    other = denoiser.expert.other(denoiser).network
    layers = [[p.numel() for _, p in linear_weights(b.module)] for b in blocks(denoiser.network)]
    assert waiting_bytes(other) == size * sum(map(sum, layers)) > 0
    padded = 256 * max(map(len, layers))
    assert 0 < room_bytes(other) <= 2 * (size * max(map(sum, layers)) + padded)
    leave()


# ---- memory


@pytest.mark.parametrize("name", ["high", "low"])
def test_the_other_one_is_held_as_autocast_rounds_it(base, name):
    half, full = two(base, name, dtype="bfloat16"), two(base, name, dtype="bfloat16")
    network = half.expert.other(half).network
    layers = [p for block in blocks(network) for p in block.module.parameters() if p.ndim == 2]
    assert layers and {p.dtype for p in layers} == {torch.bfloat16}
    full.expert.loaded["network"] = weight_files.pretrained(full.NETWORK, base / PARTS[experts.OTHER[name]], "it")
    assert torch.equal(sampled(half), sampled(full)), "equal to the bit"
    plain = two(base, name)
    assert {p.dtype for p in plain.expert.other(plain).network.parameters()} == {torch.float32}


@pytest.mark.parametrize("form", ["fp8", "nf4"])
def test_the_other_one_is_packed_where_the_trained_one_is(base, form):
    small, half = two(base, "high", dtype="bfloat16"), two(base, "high", dtype="bfloat16")
    store_frozen(blocks(small.network), form)
    network = small.expert.other(small).network
    assert packed_bytes(network) == packed_bytes(small.network) > 0
    near, exact = sampled(small), sampled(half)
    assert near.isfinite().all() and 0 < (near - exact).norm() < 0.3 * exact.norm()
    assert packed_bytes(network) == packed_bytes(small.network) > 0, "they took turns"


@pytest.mark.parametrize("form", ["bfloat16", "nf4"])
def test_blocks_of_the_other_one_wait_where_the_trained_ones_do(base, form):
    seen = []
    for number in (0, 2):
        half = two(base, "high", dtype="bfloat16")
        found = blocks(half.network)
        store_frozen(found, form)
        let_wait(found, number, half.device)
        seen.append([sampled(half), sampled(half)])
        other = half.expert.other(half).network
        assert waiting_bytes(other) == waiting_bytes(half.network) and bool(waiting_bytes(other)) == bool(number)
        assert room_bytes(other) == room_bytes(half.network)
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True)), "the same bits"


@pytest.mark.parametrize("fault", ["memory", "disk"])
def test_samples_that_fail_at_the_end_are_a_warning(base, fault, tmp_path):
    rows = {split: [[real_clips.row("cam01", split, 0.0, SHAPE)]] for split in ("train", "held_out")}
    real_clips.write(tmp_path / "shards", rows, SHAPE)
    denoiser, told = two(base, "high"), []
    experiment = tiny_experiment(
        model={"init": {}, "base": str(base), "vae": "auto", "expert": "high"},
        data={"shape": SHAPE.model_dump(), "shards": str(tmp_path / "shards")}, train={"samples": 1},
    )  # fmt: skip

    def full(*given):
        raise torch.OutOfMemoryError("no room")

    if fault == "memory":
        denoiser.expert.other(denoiser).network.register_forward_pre_hook(full)
    else:
        (tmp_path / "samples").write_text("in the way")
    dataset = shards.read_dataset(tmp_path / "shards")
    setup = Setup(
        experiment, torch.device("cpu"), denoiser, dataset, [], slice(None), None, [], None, {}, told.append, Startup()
    )
    worker._leave_samples(setup, tmp_path / "samples", None)
    (said,) = told
    assert said["warning"].startswith("the samples failed: ") and "generate makes them" in said["warning"]
    assert ("no room" in said["warning"]) == (fault == "memory")


# ---- saved light


def test_a_light_save_holds_what_was_trained_here(base, tmp_path):
    """Wherever the folder is moved, and whatever becomes of the phase before."""
    start = base
    for name in ("high", "low"):
        denoiser = two(start, name)
        with torch.no_grad():
            for parameter in denoiser.network.parameters():
                parameter += 0.01
        start = tmp_path / name / "model"
        denoiser.save(start, shape=SHAPE, parts="light")
    assert set(folders.saved(tmp_path / "high" / "model")["elsewhere"]) == {"vae", "transformer_2"}
    assert set(folders.saved(start)["elsewhere"]) == {"vae"}, "the base is untouched, the high expert is not"
    expected = sampled(denoiser)
    shutil.rmtree(tmp_path / "high")
    shutil.move(start, tmp_path / "moved")
    torch.testing.assert_close(sampled(load(Model(base=str(tmp_path / "moved")))), expected, rtol=1e-4, atol=1e-5)
    again = two(tmp_path / "moved", "high")
    again.save(tmp_path / "third", parts="light")
    assert set(folders.saved(tmp_path / "third")["elsewhere"]) == {"vae"}


# ---- both are shown the same


@pytest.mark.parametrize(("first", "second", "which"), [("high", "low", "last"), ("low", "high", "first")])
def test_experts_that_are_trained_one_after_the_other_see_the_same_frames(first, second, which, tmp_path):
    bases.two_experts(tmp_path / "base", first_frame=True)
    for shown in (True, False):
        two(tmp_path / "base", first, **{f"{which}_frame": shown}).save(tmp_path / str(shown), shape=SHAPE)
        of = {"base": str(tmp_path / str(shown)), "expert": second}
        for more in ({}, {f"{which}_frame": shown}):
            assert getattr(inspect(Model(**of, **more)), which) is shown
        with pytest.raises(UserError, match=rf"^model\.{which}_frame: .* both are shown the same, set") as error:
            inspect(Model(**of, **{f"{which}_frame": not shown}))
        assert f"set model.{which}_frame={str(shown).lower()}" in str(error.value) and "\n" not in str(error.value)


# ---- hashes


def test_a_folder_that_implies_its_expert_is_judged_as_one_that_is_told(base, tmp_path):
    given = type("Shards", (), {"splits": {"held_out": []}, "clips": lambda self, split: 4})()

    def mark(folder, name):
        model = {"init": {}, "base": str(folder), "vae": "auto", "expert": name}
        return fingerprints.held_out(tiny_experiment(model=model), given)

    for name in ("high", "low"):
        two(base, name).save(tmp_path / name, shape=SHAPE)
        assert mark(tmp_path / name, None) == mark(tmp_path / name, name) == mark(base, name)
        assert mark(tmp_path / name, None) != mark(tmp_path / name, experts.OTHER[name])


# ---- adapters


LORA = Lora(rank=2, alpha=2, targets=("to_q",))


def adapter_of(base, folder, name=None, conditions=("reference", "pose")):
    """An adapter with the input layer beside it, as a training of it leaves one; returns the network."""
    denoiser = load(Model(base=str(base), expert=name, conditions=conditions))
    lora.add(denoiser.network, blocks(denoiser.network), LORA, 0)
    with torch.no_grad():
        for parameter in denoiser.network.parameters():
            parameter += 0.01
    about = {"family": "wan", "conditions": denoiser.conditions, "base": str(base)}
    about |= {"expert": name} if name else {}
    lora.save(denoiser.network, LORA, denoiser.outside()["conditions"], folder, about=about)
    return denoiser.network


@pytest.mark.parametrize("name", ["high", "low"])
def test_an_adapter_is_one_expert_s_alone(base, name, tmp_path):
    adapter_of(base, tmp_path / "adapter", name)
    model = Model(base=str(base), expert=name, adapter=str(tmp_path / "adapter"))
    assert inspect(model).expert.name == name
    other = experts.OTHER[name]
    with pytest.raises(UserError, match=rf"was trained for the {name} expert, .*set model\.expert={name}, or") as error:
        inspect(model.model_copy(update={"expert": other}))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["high", "low"])
def test_the_card_s_call_loads_it_into_its_expert(base, name, tmp_path):
    trained = adapter_of(base, tmp_path / "adapter", name)
    card = (tmp_path / "adapter" / "README.md").read_text()
    (call,) = re.findall(r"`pipe\.(load_lora_weights\(.*?\))`", card)
    pipe = diffusers.WanPipeline.from_pretrained(base, tokenizer=None, text_encoder=None)
    eval(f"pipe.{call}".replace("THIS FOLDER", str(tmp_path / "adapter")), {"pipe": pipe})
    ours = {key: tensor for key, tensor in trained.state_dict().items() if ".lora_" in key}
    for part in PARTS.values():
        theirs = {key: tensor for key, tensor in getattr(pipe, part).state_dict().items() if ".lora_" in key}
        assert bool(theirs) == (part == PARTS[name])
        assert all(torch.equal(a, b) for a, b in zip(theirs.values(), ours.values(), strict=False))


def command(*given):
    done = CliRunner().invoke(adapter_job.app, [str(each) for each in given])
    return done.exit_code, " ".join(done.output.split())


@pytest.mark.parametrize("first_frame", [True, False], ids=["i2v", "t2v"])
def test_an_adapter_of_others_is_merged_into_the_expert_that_is_named(first_frame, tmp_path):
    bases.two_experts(tmp_path / "base", first_frame)
    adapter_of(tmp_path / "base", tmp_path / "adapter", "low")
    foreign = tmp_path / "adapter" / adapters.DIFFUSERS  # a file alone says nothing but its pairs
    given = ["merge", "--adapter", foreign, "--base", tmp_path / "base", "--output", tmp_path / "out"]
    status, said = command(*given)
    assert status == 2 and said.startswith("error: --expert: ") and "give --expert high or --expert low" in said
    assert not (tmp_path / "out").exists()
    status, said = command(*given, "--expert", "low")
    assert status == 0, said
    merged = tmp_path / "out" / "model"
    assert folders.saved(merged)["conditions"] == (["reference"] if first_frame else [])
    for name, part in PARTS.items():
        before, after = (next((root / part).glob("*.safetensors")) for root in (tmp_path / "base", merged))
        before, after = load_file(before), load_file(after)
        changed = {key for key in before if not torch.equal(before[key], after[key])}
        assert bool(changed) == (name == "low") and all("to_q.weight" in key for key in changed)
    status, said = command("merge", *given[1:-1], tmp_path / "again", "--expert", "high", "--dry-run")
    assert status == 0 and "Would merge" in said
    given[2] = tmp_path / "adapter"
    status, said = command(*given[:-1], tmp_path / "third", "--expert", "high")
    assert status == 2 and "was trained for the low expert, given high: leave it out" in said
    given[4] = merged
    given[2] = foreign
    status, said = command(*given[:-1], tmp_path / "fourth")
    assert status == 2 and "give --expert high or --expert low" in said, "not the one that was trained last"


def test_each_expert_s_change_is_extracted(base, tmp_path):
    start = base
    for amount, name in enumerate(("high", "low"), 1):
        denoiser = two(start, name)
        with torch.no_grad():
            denoiser.network.blocks[0].attn1.to_q.weight += 0.1 * amount
        start = tmp_path / name
        denoiser.save(start, shape=SHAPE)
    given = ["extract", "--before", base, "--after", start, "--rank", 1]
    for more, name, amount in (
        ([], "low", 0.2),
        (["--expert", "high"], "high", 0.1),
        (["--expert", "low"], "low", 0.2),
    ):
        output = tmp_path / f"out {' '.join(more)}"
        status, said = command(*given, *more, "--output", output)
        assert status == 0, said
        assert f"Of the {name} expert. What changed in the other one: --expert {experts.OTHER[name]}." in said
        found = adapters.read(str(output / "adapter"), "it")
        (pair,) = found.pairs.values()
        assert found.about["expert"] == name
        torch.testing.assert_close(pair.delta(), torch.full_like(pair.delta(), amount), rtol=1e-3, atol=1e-4)


def earlier(folder, make):
    """(a base, the folder that a version without first frames trains an adapter of)"""
    make(folder / "base")
    old = shutil.copytree(folder / "base", folder / "old")
    (old / "model_index.json").unlink()
    return folder / "base", old


@pytest.mark.parametrize("conditions", [("reference", "pose"), ("reference",)])
def test_an_adapter_of_an_earlier_form_is_refused_before_weights_are_read(conditions, tmp_path):
    """Its input layer has the reference in new channels, where the base now has it as its first frame."""
    now, old = earlier(tmp_path, bases.given_frame)
    adapter_of(old, tmp_path / "adapter", conditions=conditions)
    model = Model(base=str(now), adapter=str(tmp_path / "adapter"))
    with pytest.raises(UserError) as error:
        inspect(model.model_copy(update={"conditions": conditions}))
    said = str(error.value)
    assert "it is of an earlier form" in said and "train it anew, or merge it by the version" in said
    assert "\n" not in said
    inspect(model.model_copy(update={"base": str(old), "conditions": conditions}))
    if conditions == ("reference",):  # as many channels as pose has now: they would be taken for pose's
        with pytest.raises(UserError, match=r"was trained with reference alone: set model\.conditions=\[reference\]$"):
            inspect(model)


def test_earlier_adapters_of_first_and_last_frame_are_refused(tmp_path):
    bases.image_to_video(tmp_path / "base", clip=True, last=True)
    adapter_of(tmp_path / "base", tmp_path / "adapter")
    model = Model(base=str(tmp_path / "base"), adapter=str(tmp_path / "adapter"))
    inspect(model)
    path = tmp_path / "adapter" / adapters.OUTSIDE
    whole = load_file(path)
    for channels, said in ((12 + 8, "earlier form"), (12 + 2, "it is another base's")):
        weight = whole["patch_embedding.weight"]
        save_file(whole | {"patch_embedding.weight": weight.new_zeros(weight.shape[0], channels, 1, 2, 2)}, path)
        with pytest.raises(UserError, match=said):
            inspect(model)
