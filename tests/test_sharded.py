"""Sharded runs: no rank ever holds the whole network, and all comes out as in a single process."""

import contextlib
import dataclasses
import functools
import itertools
import json
import shutil
import time

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from entprog import config, models
from entprog.blocks import blocks, unfreeze
from entprog.config import Model
from entprog.cost import counting, measuring
from entprog.diffusion import losses, sampling
from entprog.diffusion.idle import idle_pass
from entprog.distributed import agree, fsdp
from entprog.errors import UserError
from entprog.models import adapters, parts, saving
from entprog.models.adapters import Adapter, Pair
from entprog.schedule import plans
from entprog.schedule.freezing import Freeze
from entprog.scoring import cei, priorities
from entprog.training import checkpoint
from entprog.training.fit import fit, start
from helpers.families import NAMES, load, settings
from helpers.memory import Peak
from helpers.networks import SHAPE, TINY, batches, latents, tiny_denoiser, tiny_experiment
from helpers.processes import join, leave, run_ranks
from pipelines.training import networks

WIDE = {
    "patch_size": [1, 4, 4], "num_attention_heads": 2, "attention_head_dim": 32, "out_channels": 3, "text_dim": 8,
    "freq_dim": 16, "ffn_dim": 1024, "num_layers": 6, "rope_max_seq_len": 32,
}  # fmt: skip
"""A Wan network most of whose weights lie in its equal blocks."""
NATIVE = ("wan_animate", "wan_vace")
"""Families whose bases have conditions of their own."""
MADE = ("wan", "wan_animate", "latte", "svd")
"""Families whose new networks are made in different ways."""


def loaded(model: Model, sharded: int, seed=3):
    return models.family(model.family).load(model, "cpu", seed, sharded=sharded)


def differing(model: Model, replicas: int) -> list[str]:
    """What differs between a network that is loaded whole and one that is loaded in parts."""
    before = torch.random.get_rng_state()
    whole, split = loaded(model, 0), loaded(model, replicas)
    assert torch.equal(before, torch.random.get_rng_state())
    assert fsdp.is_sharded(split.network) and dict(whole.network.config) == dict(split.network.config)
    assert whole.input_channels == split.input_channels and whole.conditions == split.conditions
    assert [m.training for m in split.network.modules()] == [m.training for m in whole.network.modules()]
    wanted = dict(whole.network.named_parameters()) | dict(whole.network.named_buffers())
    got = {name: fsdp.whole(p) for name, p in split.network.named_parameters()} | dict(split.network.named_buffers())
    assert got.keys() == wanted.keys() and len(got) > 5
    return [name for name in wanted if not torch.equal(got[name], wanted[name])]


def _load_rank(rank, world, folder, given, replicas):
    join(rank, world, folder)
    in_parts, out = [], {}
    for name, values in json.loads(given).items():
        for function in ("of_base", "drawn"):

            def watched(*args, own=getattr(parts, function), **kwargs):
                network = own(*args, **kwargs)
                in_parts.append(network is not None)
                return network

            setattr(parts, function, watched)
        out[name] = differing(Model(**values), replicas), in_parts[-1:]
        in_parts.clear()
    (folder / f"{rank}.json").write_text(json.dumps(out))
    leave()


@pytest.mark.parametrize(("world", "replicas", "names"), [(3, 1, NAMES), (4, 2, ["wan"])])
def test_a_network_that_is_loaded_in_parts_has_the_bits_of_one_that_is_loaded_whole(tmp_path, world, replicas, names):
    """Bases of every family, their input layers widened; with several files, in half precision, with weights that
    diffusers passes over, with an adapter; new networks."""
    cases = {f"new {name}": settings(name) for name in names if name in MADE}
    for name in names:
        folder = tmp_path / name
        load(name, **({} if name in NATIVE else {"conditions": ()})).save(folder)
        cases[name] = settings(name, init={}, base=str(folder))
    for half in (torch.bfloat16, torch.float16):
        network = load("wan", conditions=()).network.to(half)
        network.save_pretrained(tmp_path / str(half), max_shard_size="20KB")
        assert len(list((tmp_path / str(half)).glob("*.safetensors"))) > 2
        cases[str(half)] = settings("wan", init={}, base=str(tmp_path / str(half)))
    shutil.copytree(tmp_path / "wan", tmp_path / "published")  # as Wan 2.1's image-to-video files are
    published = tmp_path / "published" / "transformer" / "diffusion_pytorch_model.safetensors"
    unused = {"blocks.0.attn2.norm_added_q.weight": torch.ones(8)}
    save_file(load_file(published) | unused, published, metadata={"format": "pt"})
    cases["published"] = settings("wan", init={}, base=str(tmp_path / "published"))
    network = load("wan", conditions=()).network
    width = network.blocks[0].attn1.to_q.in_features
    pairs = {"blocks.0.attn1.to_q": Pair(torch.randn(2, width), torch.randn(width, 2), 3.0)}
    outside = {"proj_out.weight": torch.randn_like(network.proj_out.weight)}
    adapters.write(tmp_path / "adapter", Adapter(pairs, outside, {"family": "wan"}), "transformer")
    cases["adapter"] = cases["wan"].model_copy(update={"adapter": str(tmp_path / "adapter")})
    values = {name: model.model_dump(mode="json", exclude_unset=True) for name, model in cases.items()}
    run_ranks(_load_rank, world, tmp_path, json.dumps(values), replicas)
    for rank in range(world):
        out = json.loads((tmp_path / f"{rank}.json").read_text())
        assert out == {name: [[], [True]] for name in cases}


def _peak_rank(rank, world, folder, given):
    join(rank, world, folder)
    out = {}
    for name, values in json.loads(given).items():
        with Peak() as peak:
            denoiser = loaded(Model(**values), 1)
        held = sum(fsdp.held(p).nbytes for p in denoiser.network.parameters())
        out[name] = peak.bytes, held, peak.live()
    (folder / f"{rank}.json").write_text(json.dumps(out))
    leave()


def test_loading_never_takes_more_than_a_rank_keeps_and_a_block(tmp_path):
    model = Model(family="wan", init=WIDE, vae="none")
    whole = loaded(model, 0)
    whole.save(tmp_path / "base")
    cases = {"new": model, "base": model.model_copy(update={"init": {}, "base": str(tmp_path / "base")})}
    values = {name: each.model_dump(mode="json", exclude_unset=True) for name, each in cases.items()}
    run_ranks(_peak_rank, 2, tmp_path, json.dumps(values))
    weights = sum(p.nbytes for p in whole.network.parameters())
    block = sum(p.nbytes for p in whole.network.blocks[0].parameters())
    for rank in range(2):
        for name, (peak, held, live) in json.loads((tmp_path / f"{rank}.json").read_text()).items():
            assert held == pytest.approx(weights / 2, rel=0.02), name
            assert held <= live and peak < weights / 2 + block, (name, peak / weights)


# ---- before, during and after training


def counted(denoiser, found, experiment):
    """What is counted on a network: plans' costs with either backward and with checkpointing, and a cost model."""
    out, clip = {}, latents([0])
    for backward, checkpointing in (("residual", False), ("exact", True)):
        model = {"gradient_checkpointing": checkpointing}
        freeze = Freeze(denoiser, found, config.build(config.merge(experiment.model_dump(), {"model": model})))
        plan = dataclasses.replace(plans.full(["blocks.0", "blocks.5"], SHAPE), backward=backward)
        with freeze.trying(plan):
            loss = functools.partial(losses.training_loss, denoiser, clip, experiment.train)
            cost = counting.count(denoiser.network, freeze.trained, loss)
        out[f"{backward} {checkpointing}"] = cost.flops, cost.saved_bytes, cost.recomputed_bytes
        outside = freeze.outside
        model = measuring.measure(
            denoiser.network, found, outside, loss, clips=1, seconds=False, checkpointing=checkpointing
        )
        out[f"model {backward} {checkpointing}"] = model.as_json() | {"outside": None}
        out[f"outside {backward} {checkpointing}"] = model.outside
    unfreeze(denoiser.network, found, (), ())
    return out


def priced(denoiser, found, experiment):
    """Scores by passes and by gradients; ranks have odd numbers of conditions."""
    conditions, out = [latents(range(2)), latents(range(2, 4))], {}
    for kind in ("cei", "gradient", "fisher"):
        settings = config.Priority(kind=kind, conditions=3 if kind == "cei" else 2, draws=4)
        table = priorities.score(denoiser, found, conditions, settings)
        out[kind] = table.scores() | {"flops": table.flops}
    return out


def sampled(denoiser, found):
    """Drawn by rank 0, after a try that failed between two passes."""
    one = latents([1])
    size = (1, *denoiser.latent_shape(SHAPE))

    def failing():
        denoiser.predict(one.clean, torch.tensor([0.5]), one.conditions)
        with contextlib.suppress(OSError):
            raise OSError("disk full")

    def draw():
        return sampling.sample(denoiser, one.conditions, size, config.Generate(steps=3), [0])

    along = functools.partial(idle_pass, denoiser, latents([0]))
    fsdp.led(denoiser.network, found, failing, along)
    drawn = fsdp.led(denoiser.network, found, draw, along)
    fsdp.in_parts(denoiser.network)
    return drawn


def wide(way, workers, accumulate):
    return tiny_experiment(
        model={"init": WIDE},
        train={"steps": 6, "parallel": way, "workers": workers, "accumulate": accumulate, "ema_decay": 0.9},
        schedule={"stages": 2, "search_steps": 1},
        priority={"rescore": True},
    )


class Together(TorchDispatchMode):
    """The most bytes of weights that are brought together at once, in forward and backward passes."""

    def __init__(self, noted):
        super().__init__()
        self.noted, self.bytes = noted, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.bytes = max(self.bytes, sum(storage.nbytes() for storage in self.noted.values()))
        return out


def _lending_rank(rank, world, folder):
    join(rank, world, folder)
    network = networks.load(tiny_experiment(train={"parallel": "fsdp", "workers": world}), torch.device("cpu")).network
    whole, asked, ahead = fsdp.whole, itertools.count(), []

    def noted(tensor):
        number = next(asked)
        (folder / f"{rank}-{number}").touch()
        out = whole(tensor)
        if rank == 0 and number < 3:  # a slow disk
            time.sleep(0.5)
            ahead.extend(folder.glob(f"1-{number + 1}"))
        return out

    fsdp.whole = noted
    if rank == 0:
        saving.save(network, folder / "transformer")
    else:
        saving.lend(network)
    assert not ahead and next(asked) > 10
    leave()


def test_no_rank_asks_for_a_tensor_of_the_model_before_it_is_written(tmp_path):
    """Ranks that wait in a collective for the one that writes to a slow disk give up on it in the end."""
    run_ranks(_lending_rank, 2, tmp_path)


def whole_run(experiment, rank, world, folder):
    """A run from loading to saving: what it comes to, and the most memory it had in it, phase by phase."""
    out, held_out = {}, [latents(range(3))] if rank == 0 else []
    with Peak() as peak:
        denoiser = networks.load(experiment, torch.device("cpu"))
        network, peak.bytes = denoiser.network, 0
        found = cei.blocks_in_order(blocks(network), denoiser.predict, latents([0]))
        conditions = [latents(range(1)), latents(range(1, 2))]
        table = cei.cei(denoiser, found, conditions, experiment.priority)
        before = losses.held_out_loss(denoiser, held_out, 2, 0, spare=latents([0]))
        fsdp.in_parts(network)
    out["peak"] = peak.bytes
    out["counted"] = counted(denoiser, found, experiment)
    out["scores"] = priced(denoiser, found, experiment) | {"first": table.scores()}
    state = start(network, experiment)
    given = batches(experiment, rank, world), held_out, latents([0, 1]), table, experiment, state, conditions
    with fsdp.noting_whole(network) as noted, Together(noted) as together:
        steps = list(fit(denoiser, found, *given))
    out["together"] = together.bytes
    drawn = sampled(denoiser, found)
    final = networks.final(denoiser, experiment, state)
    tensors = {name: fsdp.whole(tensor).clone() for name, tensor in network.state_dict().items()}
    with Peak() as peak:
        if rank == 0:
            saving.save(final.network, folder / "transformer", max_file_bytes=2_000_000)
        else:
            saving.lend(final.network, max_file_bytes=2_000_000)
    out["saving"] = peak.bytes
    return out | {
        "held": sum(fsdp.held(p).nbytes for p in network.parameters()),
        "held_out": [before, *(step.held_out_loss for step in steps if step.held_out_loss is not None)],
        "losses": [step.loss for step in steps],
        "plans": [step.plan.as_json() for step in steps],
        "drift": [step.drift for step in steps],
        "drawn": drawn,
        "tensors": tensors,
    }


def _whole_rank(rank, world, folder):
    join(rank, world, folder)
    torch.save(whole_run(wide("fsdp", world, 2), rank, world, folder), folder / f"{rank}.pt")
    leave()


def test_no_rank_holds_the_network_and_all_comes_out_as_in_a_single_process(tmp_path):
    run_ranks(_whole_rank, 2, tmp_path)
    alone = whole_run(wide("ddp", 1, 4), 0, 1, tmp_path / "alone")
    weights, plain = alone["held"], tiny_denoiser(wide("ddp", 1, 4)).network
    block = sum(p.nbytes for p in plain.blocks[0].parameters())
    outside = weights - block * len(plain.blocks)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for rank in ranks:
        assert rank["held"] == pytest.approx(weights / 2, rel=0.02)
        activations = alone["peak"] - weights
        assert rank["peak"] - activations < rank["held"] + 2 * (block + outside), "order, scores, held-out loss"
        assert 0 < rank["together"] < 2 * block + outside, "whichever blocks are trained"
        assert rank["saving"] < 2 * block
        assert rank["plans"] == alone["plans"]
        for name, counts in alone["counted"].items():
            if name.startswith("outside"):  # gradients of zero, of what skipped blocks were given, are counted too
                assert counts <= rank["counted"][name] < 1.1 * counts
            else:
                assert rank["counted"][name] == counts, name
        for name in ("held_out", "losses"):
            assert rank[name] == pytest.approx(alone[name], rel=1e-3), name
        assert rank["drift"] == alone["drift"] and any(rank["drift"])
        for kind, scores in alone["scores"].items():
            assert rank["scores"][kind] == pytest.approx(scores, rel=1e-4), kind
            assert rank["scores"][kind] == ranks[0]["scores"][kind]
    torch.testing.assert_close(ranks[0]["drawn"], alone["drawn"], rtol=2e-2, atol=2e-3)
    assert ranks[1]["drawn"] is None
    saved = WanTransformer3DModel.from_pretrained(tmp_path / "transformer")
    plain.load_state_dict(ranks[0]["tensors"])
    plain.save_pretrained(tmp_path / "plain", max_shard_size=2_000_000)
    for name, tensor in saved.state_dict().items():
        assert torch.equal(tensor, ranks[0]["tensors"][name]), name
        torch.testing.assert_close(tensor, alone["tensors"][name], rtol=2e-2, atol=2e-4)
    names = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert sorted(path.name for path in (tmp_path / "transformer").iterdir()) == names and len(names) > 3
    for name in names:
        own, theirs = tmp_path / "transformer" / name, tmp_path / "plain" / name
        if name.endswith(".json"):
            assert own.read_text() == theirs.read_text(), name
        else:
            own, theirs = load_file(own), load_file(theirs)
            assert own.keys() == theirs.keys() and all(torch.equal(own[key], theirs[key]) for key in own)


# ---- copies


def in_copies(world, replicas):
    return tiny_experiment(
        model={"init": {**TINY, "num_layers": 3}},
        train={
            "steps": 4, "parallel": "fsdp" if replicas else "ddp", "workers": world, "replicas": max(replicas, 1),
            "accumulate": 4 // world, "ema_decay": 0.9, "optimizer": "adamw_bf16",
        },
        schedule={"stages": 2, "search_steps": 1},
    )  # fmt: skip


def trained(experiment, rank, world, folder):
    """A run in two halves, with a checkpoint between them."""
    out = {"losses": [], "norms": []}
    for _ in range(2):
        denoiser = networks.load(experiment, torch.device("cpu"))
        network = denoiser.network
        found, conditions = blocks(network), [latents(range(2))]
        table = cei.cei(denoiser, found, conditions, experiment.priority)
        gradients = priorities.score(
            denoiser, found, conditions, config.Priority(kind="gradient", conditions=2, draws=4)
        )
        state = start(network, experiment)
        if newest := agree.of_first(lambda: checkpoint.newest(folder)):
            checkpoint.load(folder, newest, network, state, "id")
        given = batches(experiment, rank, world), [], latents([0]), table, experiment, state
        held_out = [latents(range(2))] if rank == 0 else []
        for step in fit(denoiser, found, given[0], held_out, *given[2:]):
            out["losses"].append(step.loss)
            out["norms"].append(step.gradient_norm)
            if step.step == 2 and not newest:
                break
        checkpoint.save(folder, network, state, "id", keep=1)
    return out | {
        "scores": table.scores(),
        "gradients": gradients.scores(),
        "held": sum(fsdp.held(p).nbytes for p in network.parameters()),
        "tensors": {name: fsdp.whole(t).clone() for name, t in checkpoint.contents(network, state).items()},
    }


def _replica_rank(rank, world, folder):
    join(rank, world, folder)
    torch.save(trained(in_copies(world, 2), rank, world, folder / "checkpoints"), folder / f"{rank}.pt")
    leave()


@pytest.mark.parametrize("world", [2, 4])
def test_copies_that_are_each_split_over_some_ranks_are_one_network(tmp_path, world):
    run_ranks(_replica_rank, world, tmp_path)
    alone = trained(in_copies(1, 0), 0, 1, tmp_path / "alone")
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(world)]
    for got in ranks:
        assert got["held"] == pytest.approx(alone["held"] * 2 / world, rel=0.1)
        for name in ("losses", "norms"):
            assert len(got[name]) == 4 and got[name] == pytest.approx(alone[name], rel=1e-3), name
        assert got["scores"] == pytest.approx(alone["scores"], rel=1e-4)
        assert got["gradients"] == pytest.approx(alone["gradients"], rel=1e-4)
        assert got["tensors"].keys() == alone["tensors"].keys()
        for name, tensor in got["tensors"].items():
            assert torch.equal(tensor, ranks[0]["tensors"][name]), "copies stay equal"
            torch.testing.assert_close(tensor, alone["tensors"][name], rtol=5e-2, atol=5e-4)
    (kept,) = checkpoint.found(tmp_path / "checkpoints")
    (whole,) = checkpoint.found(tmp_path / "alone")
    sizes = [sum(path.stat().st_size for path in (tmp_path / folder / name).glob("*.safetensors"))
             for folder, name in (("checkpoints", kept), ("alone", whole))]  # fmt: skip
    assert sizes[0] == pytest.approx(sizes[1], rel=0.1), "every weight is written once"


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ({"replicas": 2, "workers": 2}, "train.parallel=fsdp"),
        ({"replicas": 2, "workers": 3, "parallel": "fsdp"}, "train.workers=3"),
        ({"replicas": 2, "workers": 4, "parallel": "fsdp", "min_workers": 2}, "train.min_workers"),
    ],
)
def test_copies_that_workers_cannot_share_are_a_mistake_in_the_settings(train, said):
    with pytest.raises(UserError, match=rf"train\.replicas=2.*{said}"):
        tiny_experiment(train=train)


@pytest.mark.parametrize("half", [False, True])
def test_a_run_on_cpus_is_split_there_where_torch_sees_an_accelerator(half, tmp_path, monkeypatch):
    join(0, 1, tmp_path)
    network = tiny_denoiser(tiny_experiment()).network
    with monkeypatch.context() as patch:
        patch.setattr(torch._C, "_get_accelerator", lambda *_: torch.device("cuda"))
        patch.setattr(torch.accelerator, "current_accelerator", lambda *_: torch.device("cuda"))
        fsdp.begin(1, "cpu")
        fsdp.shard(network, blocks(network), half=half)
    assert {parameter.device_mesh.device_type for parameter in network.parameters()} == {"cpu"}
    leave()


class Apart(torch.nn.Module):
    """Weights of which one is made of another, or changed after others were drawn."""

    def __init__(self, how):
        super().__init__()
        self.first, self.second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
        with torch.no_grad():
            if how == "later":
                self.first.weight.mul_(2)
            elif how == "of a part":
                self.second.weight[:2].copy_(self.first.weight[2:])
            elif how == "of all":
                self.second.weight.copy_(self.first.weight)

    @classmethod
    def from_config(cls, how):
        return cls(how)


def _apart_rank(rank, world, folder):
    join(rank, world, folder)
    parts.blocks, out = lambda network: [], {}
    for how in ("later", "of a part", "of all", "apart"):
        torch.manual_seed(5)
        made = parts.drawn(Apart, how, lambda network: None, "cpu", 1)
        torch.manual_seed(5)
        whole = Apart(how)
        pairs = zip(made.parameters(), whole.parameters(), strict=True) if made else ()
        out[how] = made and [torch.equal(fsdp.whole(p), q) for p, q in pairs]
    (folder / f"{rank}.json").write_text(json.dumps(out))
    leave()


def test_what_cannot_be_drawn_in_parts_is_never_drawn_wrongly(tmp_path):
    """It is made whole instead."""
    run_ranks(_apart_rank, 2, tmp_path)
    for rank in range(2):
        out = json.loads((tmp_path / f"{rank}.json").read_text())
        assert out == {"later": None, "of a part": None, "of all": [True] * 4, "apart": [True] * 4}
