"""Blocks that wait on the host: the same bits, two of them on the device at a time, whatever order they run in."""

import dataclasses
import itertools
import re

import pytest
import torch

from entprog import blocks, config
from entprog.blocks import let_wait, packed, store_frozen, swap_of, unfreeze
from entprog.blocks.held import Held, HeldLinear, all_held
from entprog.blocks.swap import Swap, chosen, spread
from entprog.cost import counting, measuring
from entprog.diffusion.losses import training_loss
from entprog.errors import UserError
from entprog.models import lora
from entprog.training import checkpoint
from helpers.families import NAMES, load, ordered, predict
from helpers.networks import latents, tiny_denoiser, tiny_experiment
from helpers.runs import Run, comparable
from pipelines.training import networks

CPU = torch.device("cpu")
HALF = {"model": {"dtype": "bfloat16"}}
FAMILIES = [name for name in NAMES if name not in ("svd",)]
ANEW = [{"until": 0.7, "share": 0.34, "choose": "random", "redraw_every": 2}, {"until": 1, "share": 0.5}]
MEMORY = ("memory_bytes", "plan_memory_bytes", "predicted_memory_bytes", "decision")


def settings(waiting, precision="auto", **parts):
    values = {
        "model": {"dtype": "bfloat16", "swap_blocks": waiting},
        "train": {"steps": 7, "ema_decay": 0.9},
        "schedule": {"kind": "progressive", "table": ANEW, "frozen_precision": precision},
    }
    return tiny_experiment(**config.merge(values, parts))


def as_a_worker_loads_it(experiment, seed=0):
    denoiser = tiny_denoiser(experiment, seed)
    found = blocks.blocks(denoiser.network)
    if experiment.train.lora:
        lora.add(denoiser.network, found, experiment.train.lora, experiment.train.seed)
    store_frozen(found, experiment.frozen_form)
    let_wait(found, experiment.model.swap_blocks, CPU)
    return denoiser


def test_a_worker_loads_its_network_as_it_is_to_be_held():
    experiment = settings(4, "nf4", train={"lora": {"rank": 4}})
    loaded, wanted = networks.load(experiment, CPU).network, as_a_worker_loads_it(experiment).network
    assert len(swap_of(blocks.blocks(loaded)).waiting) == 4 and all_held(loaded)
    here, there = loaded.state_dict(), wanted.state_dict()
    assert here.keys() == there.keys() and all(torch.equal(here[name], there[name]) for name in here)
    assert on_device(loaded) == on_device(wanted) < blocks.waiting_bytes(loaded)


@pytest.fixture(autouse=True)
def _loaded(monkeypatch):
    monkeypatch.setattr("helpers.runs.tiny_denoiser", as_a_worker_loads_it)


def on_device(network):
    """Bytes of blocks' linear weights that are on the device, rooms of waiting blocks included."""
    found = blocks.blocks(network)
    here = sum(blocks.movable_bytes(b.module) for b in found if not any(h.waiting for h in all_held(b.module)))
    return here + blocks.room_bytes(network)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("form", ["bfloat16", "nf4"])
def test_every_familys_outputs_and_gradients_have_equal_bits(name, form):
    seen, batch = [], latents([0, 1])
    for waiting in (0, 3):
        denoiser = load(name, dtype="bfloat16")
        found = ordered(denoiser, batch)
        store_frozen(found, form)
        chosen, of_this = [found[0].name], []
        for backward, checkpointing in (("exact", False), ("residual", False), ("exact", True)):
            network, free = denoiser.network, denoiser.outside()["conditions"]
            unfreeze(network, found, chosen, free, backward, checkpointing, swap_blocks=waiting)
            output = predict(denoiser, batch)
            output.square().mean().backward()
            of_this += [output.detach(), *(p.grad.clone() for p in network.parameters() if p.grad is not None)]
            network.zero_grad(set_to_none=True)
        seen.append(of_this)
    assert (swap_of(found) is not None) == (len(found) > 1)
    assert len(seen[0]) == len(seen[1]) > 6
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(*seen, strict=True))


def record(step):
    return {name: value for name, value in comparable(step).items() if name not in MEMORY}


@pytest.mark.parametrize(
    ("backward", "parts", "precision"),
    [
        ("exact", {"train": {"lora": {"rank": 4}}}, "auto"),
        ("residual", {"train": {"lora": {"rank": 4}}}, "nf4"),
        ("exact", {"model": {"gradient_checkpointing": "keep_attention"}}, "auto"),
        ("residual", {}, "fp8_alone"),
    ],
)
def test_a_training_has_the_bits_of_one_without(backward, parts, precision, tmp_path):
    """Steps, checkpoints, moments and averages; taken up by either."""
    parts = config.merge({"schedule": {"backward": backward}}, parts)
    steps, state = {}, {}
    for waiting in (0, 4):
        run = Run(settings(waiting, precision, **parts))
        steps[waiting] = []
        for step in run.steps():
            steps[waiting].append(record(step))
            waits = [b.name for b in run.found if any(held.waiting for held in all_held(b.module))]
            adapted = "lora" in parts.get("train", {})
            may = len(run.found) if adapted else len(run.found) - len(step.plan.trainable)
            assert len(waits) == min(waiting, may) and (adapted or not {*waits} & {*step.plan.trainable})
            if step.step == 4:
                checkpoint.save(tmp_path / str(waiting), run.denoiser.network, run.state, "id", keep=1)
        state[waiting] = checkpoint.contents(run.denoiser.network, run.state)
    assert steps[4] == steps[0]
    assert state[4].keys() == state[0].keys() and all(torch.equal(state[4][n], state[0][n]) for n in state[0])
    again = Run(settings(4, precision, **parts), tmp_path / "0")
    assert [record(step) for step in again.steps()] == steps[0][4:]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_of_the_blocks_that_wait_are_on_the_device_and_the_next_is_there_in_time(checkpointing):
    experiment = settings(5, train={"lora": {"rank": 4}})
    denoiser = as_a_worker_loads_it(experiment)
    found = blocks.blocks(denoiser.network)
    free = denoiser.outside()["conditions"]
    unfreeze(denoiser.network, found, [b.name for b in found], free, "exact", checkpointing, swap_blocks=5)
    swap, sizes = swap_of(found), [blocks.movable_bytes(block.module) for block in found]
    assert len(swap.waiting) == 5 and on_device(denoiser.network) == sizes[0], (
        "nothing waits on the device before it runs"
    )
    most, brought = [], []

    def look(*_):
        most.append(on_device(denoiser.network))
        brought.append(sum(slot.holds is not None for slot in swap.slots))

    for layer in denoiser.network.modules():
        if isinstance(layer, HeldLinear):
            layer.register_forward_hook(look)
            layer.register_full_backward_hook(look)
    late = []
    for _ in range(3):
        begun, copied = swap.late, swap.fetched_bytes
        training_loss(denoiser, latents([0, 1]), experiment.train).backward()
        late.append(swap.late - begun)
        copied = swap.fetched_bytes - copied
    aligned = max(waiting.host.nbytes for waiting in swap.waiting)
    assert max(most) <= sizes[0] + 2 * aligned and max(brought) == 2
    assert late[0] >= 5 and max(late[1:]) <= 1, (
        "the first pass learns the order; later a step begins with one that is late"
    )
    assert copied <= 2 * sum(waiting.host.nbytes for waiting in swap.waiting)


@pytest.mark.parametrize("form", ["bfloat16", "nf4"])
def test_what_waits_is_on_the_host_whatever_device_is_in_force(form):
    layer = torch.nn.Linear(64, 8)
    parts = packed.pack(layer.weight.data, form)
    with torch.device("meta"):
        held = Held(layer, parts, form)
        Swap(CPU).wait([held])
    assert {part.device.type for part in held.parts()} == {"cpu"}
    assert all(torch.equal(a, b) for a, b in zip(held.parts(), parts, strict=True))


def test_a_resume_with_another_number_foresees_its_own_memory(tmp_path):
    parts = {"train": {"lora": {"rank": 4}}, "schedule": {"memory_budget_bytes": 10**9}}
    run = Run(settings(4, **parts))
    for step in run.steps():
        if step.step == 2:
            checkpoint.save(tmp_path, run.denoiser.network, run.state, "id", keep=1)
            break
    again, trained = Run(settings(0, **parts), tmp_path), [block.name for block in run.found]
    next(again.steps())
    (with_four,), (without,) = (each.state.models.values() for each in (run, again))
    assert with_four.memory(trained, "exact") < without.memory(trained, "exact")
    assert dataclasses.replace(without, swap_blocks=4) == with_four


def test_a_network_that_goes_to_the_host_and_back_computes_the_same(tmp_path):
    denoiser = as_a_worker_loads_it(settings(4, "nf4", train={"lora": {"rank": 4}}))
    batch = latents([0, 1])
    before = predict(denoiser, batch)
    denoiser.network.to("cpu")
    assert torch.equal(predict(denoiser, batch), before)


def test_adapters_are_merged_block_by_block_and_blocks_wait_again():
    experiment = settings(4, train={"lora": {"rank": 4, "alpha": 8}})
    merged = []
    for waiting in (0, 4):
        run = Run(settings(waiting, train={"lora": {"rank": 4, "alpha": 8}}))
        list(run.steps())
        lora.merge(run.denoiser.network)
        merged.append(run.denoiser.network.state_dict())
        assert len(getattr(swap_of(run.found), "waiting", ())) == waiting
    assert experiment.stores_frozen and all(torch.equal(merged[1][n], t) for n, t in merged[0].items())


@pytest.mark.parametrize("backward", ["exact", "residual"])
@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("form", ["bfloat16", "fp8"])
def test_memory_is_foreseen(form, adapters, backward):
    experiment = settings(4, train={"lora": {"rank": 4} if adapters else None})
    denoiser = tiny_denoiser(experiment)
    found, free = blocks.blocks(denoiser.network), denoiser.outside()["conditions"]
    if adapters:
        lora.add(denoiser.network, found, experiment.train.lora, 0)
    loss = lambda: training_loss(denoiser, latents([0]), experiment.train)  # noqa: E731
    store_frozen(found, form)
    let_wait(found, 4, CPU)
    model = measuring.measure(denoiser.network, found, free, loss, clips=1, seconds=False, swap_blocks=4)
    for trainable in (["blocks.1"], ["blocks.0", "blocks.4"], [block.name for block in found]):
        trained = unfreeze(denoiser.network, found, trainable, free, backward, swap_blocks=4)
        counted = counting.count(denoiser.network, trained, loss)
        assert model.step(trainable, backward) == pytest.approx(counted.flops, rel=0.02)
        assert model.memory(trainable, backward) == pytest.approx(counted.memory_bytes(1), rel=0.05)


def test_who_waits_is_spread_over_the_blocks():
    names = [str(n) for n in range(10)]
    assert spread(names, 3) == {"1", "5", "8"} and spread(names, 0) == set()
    assert spread(names, 10) == spread(names, 99) == set(names)
    for number in range(1, 10):
        assert len(spread(names, number)) == number
    assert Swap(CPU).device_bytes == 0


@pytest.mark.parametrize("number", [3, 9, 12, 18])
def test_few_blocks_move_when_one_thaws(number):
    names = [f"blocks.{n}" for n in range(24)]
    before = chosen(names, names, number)
    assert before == spread(names, number)
    may = dict.fromkeys(names)
    for thawed in names[5:]:
        del may[thawed]
        after = chosen(names, may, number)
        assert len(after) == min(number, len(may)) and after <= may.keys()
        assert len(after - before) <= 1 and len(before - after) <= 1
        before = after


def test_blocks_that_take_the_place_of_others_are_spread_too():
    names = [str(n) for n in range(32)]
    first = spread(names, 8)
    others = [n for n in names if n not in first]
    places = sorted(others.index(n) for n in chosen(names, others, 8))
    assert len(places) == 8 and max(b - a for a, b in itertools.pairwise(places)) <= 6


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"model": {"swap_blocks": 2}}, "0, or 3 and more"),
        ({"model": {"dtype": "float32"}}, "model.dtype=bfloat16"),
        ({"model": {"compile_blocks": True}}, "model.compile_blocks"),
        ({"train": {"parallel": "fsdp"}}, "train.parallel=fsdp"),
        ({"schedule": {"kind": "full"}}, "no block is ever frozen"),
        ({"schedule": {"frozen_precision": "full"}}, "auto, fp8_alone or nf4"),
        ({"schedule": {"frozen_precision": "fp8", "backward": "residual"}}, "auto, fp8_alone or nf4"),
        ({"priority": {"kind": "gradient"}}, "priority.kind=gradient"),
    ],
)
def test_it_is_refused_in_a_line_where_it_has_no_place(parts, said):
    with pytest.raises(UserError, match=re.escape(said)) as error:
        settings(4, **config.merge({"schedule": {"table": [{"until": 1, "share": 0.5}]}}, parts))
    assert "swap_blocks" in str(error.value) and "\n" not in str(error.value)


def test_it_makes_no_other_training():
    of = [config.deciding(settings(waiting)) for waiting in (0, 4)]
    assert of[0] == of[1]
