"""Blocks: found by type, skipped and restored to the bit, frozen for good, gradients as the formulas say."""

import copy
import weakref

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from entprog.blocks import (
    Block,
    Variants,
    blocks,
    bypass,
    check_compiles,
    compile_blocks,
    execution_order,
    overlooked,
    skipped,
    store_frozen,
    unfreeze,
    variants,
)
from entprog.cost import counting
from entprog.diffusion import objectives
from entprog.errors import UserError
from helpers.networks import latents


def predict(denoiser, n=2):
    batch = latents(range(n))
    return denoiser.predict(batch.clean, torch.linspace(0.2, 0.8, n), batch.conditions)


def test_blocks_are_the_transformer_blocks_in_order(found):
    assert [b.name for b in found] == [f"blocks.{i}" for i in range(6)]


def test_unknown_network_says_how_to_register():
    with pytest.raises(UserError, match=r"bypass.register for its class, perhaps Linear .docs.families"):
        blocks(nn.Sequential(nn.ModuleList([nn.Linear(2, 2)])))


@torch.no_grad()
def test_every_skip_changes_the_output_and_restoring_is_bit_exact(denoiser, found):
    before = predict(denoiser)
    for block in found:
        with skipped(block):
            assert not torch.equal(predict(denoiser), before), block.name
        assert torch.equal(predict(denoiser), before), block.name
        assert "forward" not in block.module.__dict__


@torch.no_grad()
def test_skipping_equals_deleting_the_blocks(denoiser, found):
    shorter = copy.deepcopy(denoiser.network)
    del shorter.blocks[1], shorter.blocks[3]  # 1, and what was 4
    with skipped(found[1], found[4]):
        got = predict(denoiser)
    denoiser.network.blocks = shorter.blocks
    assert torch.equal(got, predict(denoiser))


def test_a_skip_inside_a_residual_freeze_is_undone_too(denoiser, found):
    unfreeze(denoiser.network, found, ["blocks.5"], [], "residual")
    before = found[0].module.forward
    with torch.no_grad(), skipped(found[0]):
        predict(denoiser)
    assert found[0].module.forward is before


def test_unfreeze_refuses_a_name_that_is_no_block(denoiser, found):
    with pytest.raises(KeyError, match=r"blocks\.60"):
        unfreeze(denoiser.network, found, ["blocks.60"], [])


@pytest.mark.parametrize("backward", ["exact", "residual"])
@pytest.mark.parametrize("checkpointing", [False, True, "on_host", "keep_attention"])
def test_forward_bits_do_not_depend_on_what_is_trained(denoiser, found, backward, checkpointing):
    with torch.no_grad():
        before = predict(denoiser)
    unfreeze(denoiser.network, found, ["blocks.1", "blocks.4"], [], backward, checkpointing)
    assert torch.equal(predict(denoiser).detach(), before)


@pytest.mark.parametrize("checkpointing", [False, True, "on_host", "keep_attention"])
def test_exact_gradient_of_trained_blocks_is_full_trainings(denoiser, found, checkpointing):
    predict(denoiser).square().mean().backward()
    expected = {n: p.grad.clone() for n, p in denoiser.network.named_parameters() if p.grad is not None}
    denoiser.network.zero_grad(set_to_none=True)
    unfreeze(denoiser.network, found, ["blocks.1", "blocks.4"], [], "exact", checkpointing)
    predict(denoiser).square().mean().backward()
    got = {n: p.grad for n, p in denoiser.network.named_parameters() if p.grad is not None}
    assert got and all(n.startswith(("blocks.1.", "blocks.4.")) for n in got)
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-8)


def test_what_waits_on_the_host_is_freed_until_the_backward_pass(denoiser, found):
    alive = {}
    for how in (True, "on_host"):
        unfreeze(denoiser.network, found, [b.name for b in found], denoiser.outside()["conditions"], "exact", how)
        given = []

        def note(module, args, given=given):
            given.append(weakref.ref(args[0]))

        hooks = [block.module.register_forward_pre_hook(note) for block in found]
        out = predict(denoiser)
        alive[how] = [tensor() is not None for tensor in given]
        out.mean().backward()
        for hook in hooks:
            hook.remove()
    assert all(alive[True]) and not any(alive["on_host"])


def test_what_waits_on_the_host_is_on_its_way_when_it_is_wanted(denoiser, found):
    """But for the first of a backward pass; one block's at a time. It goes with its graph, whether that had a backward
    pass or not, and of two graphs each has its own."""
    passes, waiting, ahead = {}, [], []

    def look(*_):
        ahead.append(sum(away() is not None and away().back is not None for away in waiting))

    def gradients(loss, **kwargs):
        loss.backward(**kwargs)
        out = {n: p.grad for n, p in denoiser.network.named_parameters() if p.grad is not None}
        denoiser.network.zero_grad(set_to_none=True)
        return out, line.late

    for block in found:
        block.module.attn1.register_forward_hook(look)
    for how in (True, "on_host"):
        unfreeze(denoiser.network, found, [b.name for b in found], denoiser.outside()["conditions"], "exact", how)
        line = found[0].module.forward.line
        one, two, third = (predict(denoiser, n).square().mean() for n in (1, 2, 1))
        away = line.last()
        while away is not None:
            waiting.append(weakref.ref(away))
            away = away.before()
        passes[how] = gradients(third), gradients(one, retain_graph=True), gradients(two), gradients(one)
    assert [late for _, late in passes["on_host"]] == [1, 2, 3, 3] and max(ahead) == 1
    del one, two, third
    assert len(waiting) == 3 * len(found) and not any(away() for away in waiting)
    for (got, _), (expected, _) in zip(passes["on_host"], passes[True], strict=True):
        assert got.keys() == expected.keys() and all(torch.equal(got[n], expected[n]) for n in got)


@pytest.mark.parametrize("checkpointing", [False, True, "on_host", "keep_attention"])
def test_residual_gradient_is_the_formulas(denoiser, found, checkpointing):
    """Reference: y = x + (f(x) - x).detach() written into the network by hand."""
    trained = ["blocks.1", "blocks.4"]
    outside = denoiser.outside()["conditions"]
    unfreeze(denoiser.network, found, trained, outside, "residual", checkpointing)
    predict(denoiser).square().mean().backward()
    got = {n: p.grad.clone() for n, p in denoiser.network.named_parameters() if p.grad is not None}
    denoiser.network.zero_grad(set_to_none=True)

    unfreeze(denoiser.network, found, trained, outside, "exact")
    for block in found:
        if block.name not in trained:
            own = type(block.module).forward.__get__(block.module)
            block.module.forward = lambda x, *a, own=own, **k: x + (own(x, *a, **k) - x).detach()
    predict(denoiser).square().mean().backward()
    expected = {n: p.grad for n, p in denoiser.network.named_parameters() if p.grad is not None}
    assert got.keys() == expected.keys()
    for name in got:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-7)


def test_tuple_blocks_and_execution_order():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x, y):
            return x + self.a(y), y + self.b(x)

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.second, self.first = Pair(), Pair()

        def forward(self, x):
            return sum(self.second(*self.first(x, 2 * x)))

    bypass.register(Pair, lambda module, x, y: (x, y))
    network, x = Network(), torch.randn(2, 3, requires_grad=True)
    found = blocks(network)
    assert [b.name for b in execution_order(found, lambda: network(x))] == ["first", "second"]
    with torch.no_grad(), skipped(*found):
        assert torch.equal(network(x), x + 2 * x)
    plain = network(x).detach()
    unfreeze(network, found, ["first"], [], "residual")
    out = network(x)
    assert torch.equal(out.detach(), plain)
    out.sum().backward()
    assert network.second.a.weight.grad is None and network.first.a.weight.grad is not None


def flops_and_bytes(denoiser, found, trained, backward):
    parameters = unfreeze(denoiser.network, found, trained, [], backward)
    batch = latents([0])
    t = torch.tensor([0.5])

    def loss():
        return objectives.loss(denoiser.predict(batch.clean, t, batch.conditions), batch.clean).mean()

    return counting.count(denoiser.network, parameters, loss)


def test_residual_step_costs_what_the_formula_says(denoiser, found):
    """Blocks' share of the FLOPs: F·(1 + 2m/L) against full training's 3F, and saved bytes in proportion."""
    names = [b.name for b in found]
    full = flops_and_bytes(denoiser, found, names, "exact")
    none = flops_and_bytes(denoiser, found, [], "exact")
    for m in (1, 2, 3):
        scattered = names[:: len(names) // m][:m]
        cost = flops_and_bytes(denoiser, found, scattered, "residual")
        # What lies outside blocks costs its forward in every plan; the head passes gradient back in the trained ones.
        share = (cost.flops - none.flops) / (full.flops - none.flops)
        assert share == pytest.approx(m / len(names), rel=0.1)
        assert cost.saved_bytes < full.saved_bytes * (m / len(names) + 0.25)


def test_cost_counting_leaves_gradients_alone(denoiser, found):
    predict(denoiser).mean().backward()
    before = {n: p.grad.clone() for n, p in denoiser.network.named_parameters() if p.grad is not None}
    flops_and_bytes(denoiser, found, ["blocks.0"], "exact")
    for name, parameter in denoiser.network.named_parameters():
        if name in before and parameter.grad is not None:
            assert torch.equal(parameter.grad, before[name])


def test_block_is_found_once_when_nested():
    class Inner(nn.Module):
        def forward(self, x):
            return x

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Inner()

        def forward(self, x):
            return self.inner(x)

    bypass.register(Inner, lambda module, x: x)
    bypass.register(Outer, lambda module, x: x)
    outer = Outer()
    assert blocks(nn.ModuleDict({"o": outer})) == [Block("o", outer)]


def test_what_is_put_on_a_block_is_one_visible_object(denoiser, found):
    """Beside the forward that stands in; nothing of it is left once it is of no use, or reaches the saved weights."""
    module, keys = found[0].module, denoiser.network.state_dict().keys()
    before = set(module.__dict__)
    compile_blocks(found, backend="eager")
    unfreeze(denoiser.network, found, ["blocks.5"], [], "residual")
    assert set(module.__dict__) - before == {"forward", "entprog"} and variants(module).compiled
    assert denoiser.network.state_dict().keys() == keys
    assert variants(found[0].module.ffn) == Variants(), "blocks alone have one"


class Unit(nn.Module):
    """Its input is float32, its output what autocast makes of it."""

    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(self.norm(x))


def test_every_form_of_a_block_runs_compiled():
    """Trained or frozen, with a gradient to its input or without, in training or not, of one shape or of any."""

    class Own(Unit):
        pass

    bypass.register(Own, lambda module, x: x)
    network = nn.ModuleDict({"it": Own()})
    found = blocks(network)
    torch.compiler.reset()
    counters.clear()
    store_frozen(found)
    compile_blocks(found, backend="eager")
    for rows in (2, 3):
        for trained in ([], ["it"]):
            unfreeze(network, found, trained, [])
            for graph, crossed in ((False, False), (True, False), (True, True)):
                with torch.set_grad_enabled(graph), torch.autocast("cpu", torch.bfloat16):
                    network["it"](torch.ones(rows, 4, requires_grad=crossed))
    assert counters["stats"]["unique_graphs"] > 8, "torch's own limit"
    assert counters["frames"]["total"] == counters["frames"]["ok"]


def test_units_of_another_type_than_their_input_are_looked_at_too():
    network = nn.Module()
    network.units = nn.ModuleList([Unit()])

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            network.units[0](torch.ones(1, 4))

    assert overlooked(network, run, run) == {}


@pytest.mark.parametrize(
    ("version", "fits"), [("2.11.0+cu130", False), ("2.6.0", False), ("2.12.1", True), ("3.0", True)]
)
def test_a_torch_whose_compiled_code_may_miss_a_weight_s_type_is_refused(monkeypatch, version, fits):
    monkeypatch.setattr(torch, "__version__", version)
    if fits:
        check_compiles()
    else:
        with pytest.raises(UserError, match=r"model\.compile_blocks: torch .* install torch 2\.12"):
            check_compiles()
