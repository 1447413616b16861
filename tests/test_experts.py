"""Wan 2.2's two experts beside the rest of a run: sharded training, memory, light saves, hashes, adapters."""

import shutil

import pytest
import torch

from entprog.blocks import blocks
from entprog.config import ClipShape, Generate, Model
from entprog.data import shards
from entprog.diffusion import sampling
from entprog.distributed import fsdp
from entprog.models import experts, fingerprints, folders
from entprog.models.wan import load
from helpers import bases, real_clips
from helpers.families import clips
from helpers.networks import tiny_experiment
from helpers.processes import join, leave
from pipelines.training import worker
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


def test_a_sharded_network_stays_whole_while_one_rank_samples(base, tmp_path):
    """In parts again, its next forward pass would wait for ranks that draw nothing."""
    join(0, 1, tmp_path)
    for name in ("high", "low"):
        denoiser = two(base, name)
        fsdp.shard(denoiser.network, blocks(denoiser.network))
        whole = []
        with fsdp.gathered(denoiser.network):
            with denoiser.sampling() as expert_at:
                for timestep in (1000.0, 10.0, 950.0, 20.0):
                    expert_at(torch.tensor(timestep))
                    whole.append(not any(hasattr(p, "full_tensor") for p in denoiser.network.parameters()))
            whole.append(not any(hasattr(p, "full_tensor") for p in denoiser.network.parameters()))
        assert whole == [True] * 5, (name, whole)
    leave()


# ---- memory


@pytest.mark.parametrize("name", ["high", "low"])
def test_the_other_one_is_held_as_autocast_rounds_it(base, name):
    half, full = two(base, name, dtype="bfloat16"), two(base, name, dtype="bfloat16")
    network = half.expert.other(half).network
    layers = [p for block in blocks(network) for p in block.module.parameters() if p.ndim == 2]
    assert layers and {p.dtype for p in layers} == {torch.bfloat16}
    full.expert.loaded["network"] = folders.pretrained(full.NETWORK, base / PARTS[experts.OTHER[name]], "it")
    assert torch.equal(sampled(half), sampled(full)), "equal to the bit"
    plain = two(base, name)
    assert {p.dtype for p in plain.expert.other(plain).network.parameters()} == {torch.float32}


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
    setup = worker.Setup(
        experiment, torch.device("cpu"), denoiser, dataset, [], None, [], None, {}, told.append, Startup()
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
