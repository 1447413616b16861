"""Blocks that ranks hold in parts under bfloat16 autocast: frozen ones are stored, and all are brought together, in
bfloat16; what comes out has the very bits of a single process."""

import dataclasses
import functools
from collections import defaultdict

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import scaling_forecast
from entprog.blocks import blocks, layer_weights, store_frozen, unfreeze, variants
from entprog.config import Priority
from entprog.cost import counting, measuring
from entprog.cost.holding import held
from entprog.diffusion.losses import training_loss
from entprog.distributed import agree, fsdp
from entprog.errors import UserError
from entprog.models import saving
from entprog.schedule import plans
from entprog.schedule.freezing import Freeze, outside
from entprog.schedule.prices import Prices
from entprog.scoring import cei, priorities
from entprog.training import checkpoint
from entprog.training.fit import fit, start
from helpers import families
from helpers.networks import SHAPE, batches, latents, tiny_experiment
from helpers.processes import join, leave, run_ranks
from pipelines.training import networks

WIDE = {
    "patch_size": [1, 4, 4], "num_attention_heads": 2, "attention_head_dim": 32, "out_channels": 3, "text_dim": 8,
    "freq_dim": 16, "ffn_dim": 256, "num_layers": 4, "rope_max_seq_len": 32, "cross_attn_norm": True,
}  # fmt: skip
STEPS, SAVED = 7, 4
ANEW = [{"until": 0.7, "share": 0.5, "choose": "random", "redraw_every": 2}, {"until": 1, "share": 0.75}]
SCHEDULES = {
    "residual": {"kind": "progressive", "table": ANEW, "backward": "residual"},
    "searched": {"kind": "entprog", "stages": 2, "search_steps": 1, "candidates": [0.5, 1.0]},
}
FAMILIES = ("wan_vace", "motion_unet", "hunyuan_video")
"""Whose blocks differ most: bypasses with layers, convolutions, two streams."""
HELD = ["blocks.0", "blocks.2"]
"""Trained where bytes are counted."""


def experiment(world, way, schedule):
    """Nothing is clipped: the norm of gradients in parts is summed in another order."""
    train = {"steps": STEPS, "ema_decay": 0.9, "gradient_clip": None}
    return tiny_experiment(
        model={"init": WIDE, "dtype": "bfloat16"},
        train=train | {"parallel": way, "workers": world, "accumulate": 2 // world},
        schedule=SCHEDULES[schedule],
    )


def trained(settings, folder, rank, world, resumed=False):
    """A run from loading, or from a checkpoint, to saving: what it comes to."""
    denoiser = networks.load(settings, torch.device("cpu"))
    network, out = denoiser.network, {"losses": [], "plans": [], "held_out": [], "held": []}
    found = cei.blocks_in_order(blocks(network), denoiser.predict, latents([0]))
    table = cei.cei(denoiser, found, [latents(range(2))], settings.priority)
    state, free = start(network, settings), outside(denoiser, settings)
    out["scores"] = table.scores()
    if resumed:
        checkpoint.load(folder, checkpoint.newest(folder), network, state, "id")
    held_out = [latents(range(2))] if rank == 0 else []
    for step in fit(denoiser, found, batches(settings, rank, world), held_out, latents([0, 1]), table, settings, state):
        out["losses"].append(step.loss)
        out["plans"].append(step.plan.as_json())
        out["held_out"].append(step.held_out_loss)
        foreseen = held(network, found, step.plan.trainable, free, settings).weights
        if step.phase == "train":
            out["held"].append((sum(fsdp.held(p).nbytes for p in network.parameters()), foreseen))
        if step.step == SAVED and not resumed:
            checkpoint.save(folder, network, state, "id", keep=1)
    out["tensors"] = {n: fsdp.whole(t.float()).clone() for n, t in checkpoint.contents(network, state).items()}
    final = networks.final(denoiser, settings, state)
    if rank == 0:
        saving.save(final.network, folder / "model")
    else:
        saving.lend(final.network)
    return out


def same(got, expected):
    """Whether two of them are equal to the bit, but for steps that one of them has not made."""
    made = len(got["losses"])
    assert all(got[name] == expected[name][-made:] for name in ("losses", "plans", "held_out"))
    assert got["tensors"].keys() == expected["tensors"].keys()
    return [n for n, tensor in expected["tensors"].items() if not torch.equal(tensor, got["tensors"][n])] == []


def seen(name, half):
    """Outputs and gradients of one batch, the same on all ranks, while blocks freeze and thaw."""
    denoiser, batch = families.load(name, dtype="bfloat16"), latents([0, 1])
    found, network = families.ordered(denoiser, batch), denoiser.network
    fsdp.shard(network, found, half=half)
    if half:
        store_frozen(found)
    out = []
    for first, backward, checkpointing in ((1, "exact", False), (2, "residual", False), (1, "exact", True)):
        chosen = [block.name for block in found[first::3]]
        fsdp.in_parts(network)
        unfreeze(network, found, chosen, denoiser.outside()["conditions"], backward, checkpointing)
        fsdp.notice_thawed(block for block in found if block.name in chosen)
        fsdp.spare_frozen(found, chosen, backward)
        output = families.predict(denoiser, batch)
        output.square().mean().backward()
        out.append(output.detach().clone())
        out += [fsdp.held(p.grad).clone() for p in network.parameters() if p.grad is not None]
        network.zero_grad(set_to_none=True)
    return out


class Wire(TorchDispatchMode):
    """Bytes of everything that is brought together, by type, and the most that is there at once."""

    def __init__(self, noted):
        super().__init__()
        self.noted, self.sizes, self.most = noted, defaultdict(list), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.most = max(self.most, sum(storage.nbytes() for storage in self.noted.values()))
        if "allgather" in str(function):
            self.sizes[str(args[0].dtype)].append(args[0].nbytes)
        return out


def gradients(denoiser, found):
    """Scores by gradients of all blocks, some of them stored."""
    out = {}
    for kind in ("gradient", "fisher"):
        settings = Priority(kind=kind, conditions=2, draws=4)
        out[kind] = priorities.score(denoiser, found, [latents([0]), latents([1])], settings).scores()
    return out


def counted(settings):
    """Bytes of a step that trains two of four blocks, and what was foreseen."""
    denoiser = networks.load(settings, torch.device("cpu"))
    network, found = denoiser.network, blocks(denoiser.network)
    freeze = Freeze(denoiser, found, settings)
    loss = functools.partial(training_loss, denoiser, latents([0]), settings.train)
    model = measuring.measure(network, found, freeze.outside, loss, clips=1, seconds=False)
    freeze.put(plans.of_set(HELD, [b.name for b in found], "exact", SHAPE))
    cost = counting.count(network, freeze.trained, loss)
    with fsdp.noting_whole(network) as noted, Wire(noted) as wire:
        loss().backward()
    types, ranks = {str(p.grad.dtype) for p in freeze.trained}, settings.train.workers
    return {
        "scores": gradients(denoiser, found),
        "together": wire.most,
        "foreseen": vars(held(network, found, HELD, freeze.outside, settings)),
        "wire": dict(wire.sizes),
        "memory": (dataclasses.replace(model, parts=ranks).memory(HELD, "exact"), cost.memory_bytes(1)),
        "flops": (model.step(HELD, "exact"), cost.flops),
        "gradients": types,
        "masters": sum(m.nbytes for b in found for m in variants(b.module).stored.masters.values() if m is not None),
    }


def _half_rank(rank, world, folder):
    join(rank, world, folder)
    for schedule in SCHEDULES:
        out = trained(experiment(world, "fsdp", schedule), folder / schedule, rank, world)
        torch.save(out, folder / f"{schedule} {rank}.pt")
    agree.wait_for_all()
    again = trained(experiment(world, "fsdp", "residual"), folder / "residual", rank, world, resumed=True)
    assert len(again["losses"]) == STEPS - SAVED
    assert same(again, torch.load(folder / f"residual {rank}.pt", weights_only=True))
    torch.save(counted(experiment(world, "fsdp", "searched")), folder / f"counted {rank}.pt")
    leave()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two ranks left."""
    folder = tmp_path_factory.mktemp("half")
    run_ranks(_half_rank, 2, folder)
    return folder


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_all_bits_are_those_of_a_single_process(folder, schedule, tmp_path):
    """Scores, losses, weights, moments and averages of a run that freezes and thaws, and the saved model."""
    settings = experiment(1, "ddp", schedule)
    alone = trained(settings, tmp_path, 0, 1)
    assert len({str(plan["trainable"]) for plan in alone["plans"]}) > 1, "it froze and thawed"
    for rank in range(2):
        got = torch.load(folder / f"{schedule} {rank}.pt", weights_only=True)
        assert got["scores"] == alone["scores"] and same(got, alone)
        assert got["held"] and all(held == pytest.approx(foreseen, rel=0.02) for held, foreseen in got["held"])
    saved = [
        load_file(where / "model" / "diffusion_pytorch_model.safetensors") for where in (folder / schedule, tmp_path)
    ]
    assert saved[0].keys() == saved[1].keys() and all(torch.equal(t, saved[1][n]) for n, t in saved[0].items())
    if schedule == "residual":  # and it goes on from where two ranks were
        assert same(trained(settings, folder / schedule, 0, 1, resumed=True), alone)


def _families_rank(rank, world, folder):
    join(rank, world, folder)
    for name in FAMILIES:
        half, full = (seen(name, half) for half in (True, False))
        assert len(half) == len(full) > 6
        assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(half, full, strict=True)), name
    leave()


def test_every_familys_outputs_and_gradients_have_the_bits_of_float32_parts(tmp_path):
    run_ranks(_families_rank, 2, tmp_path)


def test_bytes_are_counted(folder):
    alone = counted(experiment(1, "ddp", "searched"))
    network = networks.load(experiment(1, "ddp", "searched"), torch.device("cpu")).network
    layers = sum(p.numel() for _, p in layer_weights(network.blocks[0]))
    foreseen = scaling_forecast.gathered(network, blocks(network), 2)
    for rank in range(2):
        got = torch.load(folder / f"counted {rank}.pt", weights_only=True)
        assert got["gradients"] == {"torch.float32"}
        assert set(got["wire"]) == {"torch.bfloat16", "torch.float32"}
        assert set(got["wire"]["torch.bfloat16"]) == {2 * layers} and len(got["wire"]["torch.bfloat16"]) == 8
        assert len(got["wire"]["torch.float32"]) == 2, "what lies outside, with norms: once forward, once backward"
        assert all(1 <= size / foreseen[""] < 1.05 for size in got["wire"]["torch.float32"]), (
            "rows are filled up to even"
        )
        assert {foreseen[block.name] for block in blocks(network)} == set(got["wire"]["torch.bfloat16"])
        assert 0 < got["together"] <= got["foreseen"]["unpacking"]
        for part in ("weights", "gradients", "moments", "host"):
            assert got["foreseen"][part] == pytest.approx(alone["foreseen"][part] / 2, abs=4)
        assert got["memory"][0] == pytest.approx(got["memory"][1], rel=0.05)
        assert got["flops"][0] == pytest.approx(got["flops"][1], rel=0.02) and got["flops"][1] == alone["flops"][1]
        assert (
            got["masters"] == pytest.approx(alone["masters"] / 2, rel=0.02)
            and got["masters"] <= got["foreseen"]["host"]
        )
        for kind, scores in alone["scores"].items():
            assert got["scores"][kind] == pytest.approx(scores, rel=1e-5), kind


def _fewer_rank(rank, world, folder, where):
    join(rank, world, folder)
    settings = experiment(2, "fsdp", "searched")
    denoiser = networks.load(settings, torch.device("cpu"))
    found, state = blocks(denoiser.network), start(denoiser.network, settings)
    checkpoint.load(where, checkpoint.newest(where), denoiser.network, state, "id")
    given = denoiser, found, latents([0, 1]), Freeze(denoiser, found, settings), settings
    kept, anew = (Prices(*given, models, state.ema) for models in (state.models, {}))
    assert state.models and kept.memory(kept.full) == anew.memory(kept.full)
    old = state.as_json()
    for _, model in old["models"]:
        del model["parts"]
    state.update(old)
    assert not state.models, "of a checkpoint before that was noted: they are measured anew"
    leave()


def test_fewer_ranks_that_go_on_foresee_their_own_memory(folder, tmp_path):
    run_ranks(_fewer_rank, 1, tmp_path, folder / "searched")


def test_what_does_not_go_together_is_refused():
    half = {"model": {"dtype": "bfloat16"}, "train": {"parallel": "fsdp", "lora": {}}}
    with pytest.raises(UserError, match=r"priority\.kind=fisher .* schedule\.frozen_precision=full"):
        tiny_experiment(**half, priority={"kind": "fisher"})
    tiny_experiment(**half, priority={"kind": "fisher"}, schedule={"frozen_precision": "full"})
