"""The cost model against counting on the network, for every plan; and where its predictions go."""

import gc
import itertools
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from entprog.blocks import blocks, unfreeze
from entprog.cost import counting, measuring
from entprog.cost.model import CostModel, scaled
from entprog.diffusion.losses import training_loss
from entprog.errors import UserError
from helpers.networks import TINY, latents, tiny_denoiser, tiny_experiment


class Tiny:
    """A tiny network with its cost model in FLOPs."""

    def __init__(self, outside="always", checkpointing=False, seconds=False, clips=1, **parts):
        experiment = tiny_experiment(**parts)
        self.denoiser = tiny_denoiser(experiment)
        self.found = blocks(self.denoiser.network)
        self.names = [block.name for block in self.found]
        groups = self.denoiser.outside()
        self.outside = {
            "always": [p for group in groups.values() for p in group],
            "conditions": groups["conditions"],
            "never": [],
        }[outside]
        self.checkpointing = checkpointing
        batch = latents(range(clips))
        self.loss = lambda: training_loss(self.denoiser, batch, experiment.train)
        self.model = measuring.measure(
            self.denoiser.network, self.found, self.outside, self.loss,
            clips=clips, seconds=seconds, checkpointing=checkpointing,
        )  # fmt: skip

    def count(self, trainable, backward) -> counting.Cost:
        trained = unfreeze(self.denoiser.network, self.found, trainable, self.outside, backward, self.checkpointing)
        return counting.count(self.denoiser.network, trained, self.loss)


def sets(names):
    some = [c for m in range(1, len(names) + 1) for c in itertools.combinations(names, m)]
    return [*some[::5], some[-1]]


@pytest.mark.parametrize(
    ("outside", "checkpointing"),
    [
        *itertools.product(["always", "conditions", "never"], [False, True, "on_host"]),
        ("always", "keep_attention"),
    ],
)
@pytest.mark.parametrize("backward", ["exact", "residual"])
def test_predictions_are_the_counts(outside, checkpointing, backward):
    tiny = Tiny(outside, checkpointing)
    for trainable in sets(tiny.names):
        counted = tiny.count(trainable, backward)
        assert tiny.model.step(trainable, backward) == pytest.approx(counted.flops, rel=0.01), trainable
        assert tiny.model.memory(trainable, backward) == pytest.approx(counted.memory_bytes(1), rel=0.05), trainable
        gradients = tiny.model.trained_bytes(trainable)
        assert gradients == counted.gradient_bytes


def test_predictions_hold_under_autocast():
    tiny = Tiny(model={"dtype": "bfloat16"})
    for backward in ("exact", "residual"):
        for trainable in sets(tiny.names):
            counted = tiny.count(trainable, backward)
            assert tiny.model.step(trainable, backward) == pytest.approx(counted.flops, rel=0.02)
            assert tiny.model.memory(trainable, backward) == pytest.approx(counted.memory_bytes(1), rel=0.1)


@pytest.mark.parametrize("checkpointing", [False, True, "on_host"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_batch_costs_its_clips_and_its_weights_once(dtype, checkpointing):
    """And once what autocast makes of weights."""
    wide = {"dtype": dtype, "init": {**TINY, "ffn_dim": 1024, "num_layers": 3}}
    one, many = (Tiny(clips=clips, checkpointing=checkpointing, model=wide) for clips in (1, 8))
    grown = scaled(one.model, 8)
    assert grown.clips == 8 and grown.weight_bytes == many.model.weight_bytes
    for trainable in sets(one.names):
        foreseen = many.model.memory(trainable, "exact")
        assert grown.step(trainable, "exact") == pytest.approx(many.model.step(trainable, "exact"), rel=0.01)
        assert grown.memory(trainable, "exact") == pytest.approx(foreseen, rel=0.01)
        assert one.count(trainable, "exact").memory_bytes(8) == pytest.approx(foreseen, rel=0.02)


def test_measuring_changes_no_weight_and_leaves_no_gradient():
    tiny = Tiny()
    before = {n: p.clone() for n, p in tiny.denoiser.network.named_parameters()}
    timed = Tiny(seconds=True)
    for name, parameter in timed.denoiser.network.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.grad is None, name
    assert all("forward" not in block.module.__dict__ for block in timed.found)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("work", ["measured", "counted"])
def test_nothing_of_a_measured_network_stays(work, checkpointing):
    """Neither activations while it is there nor the network once it is gone."""

    def live_bytes() -> int:
        gc.collect()
        return sum(each.nbytes for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter))

    gc.freeze()  # what is there already would be gone through again and again
    tiny = Tiny(checkpointing=checkpointing)  # what is made once stays
    before = live_bytes()
    if work == "measured":
        measuring.measure(tiny.denoiser.network, tiny.found, tiny.outside, tiny.loss, clips=1, seconds=False)
    else:
        tiny.count(tiny.names[::2], "exact")
        tiny.denoiser.network.zero_grad(set_to_none=True)
    assert live_bytes() == before
    parameters = [weakref.ref(parameter) for parameter in tiny.denoiser.network.parameters()]
    del tiny
    gc.collect()
    assert not any(parameter() is not None for parameter in parameters)


def test_counting_a_checkpointed_network_keeps_one_block_of_a_kind(monkeypatch):
    """What the counter of FLOPs saw stays until it is left: with the activations of all, a network would not fit that
    checkpointing makes fit."""
    tiny, runs = Tiny(checkpointing=True), []
    kind = type(tiny.found[0].module)
    assert len(tiny.found) > 2 and all(type(block.module) is kind for block in tiny.found)
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda *args, **kwargs: runs.append(1) or forward(*args, **kwargs))
    tiny.count(tiny.names, "exact")
    assert len(runs) == 2 * len(tiny.found) + 1  # forward, again in the backward, and the one that is looked at


def test_measured_seconds_order_plans_as_their_flops_do():
    tiny = Tiny(seconds=True, clips=4)
    model = tiny.model
    few, all_ = tiny.names[2:3], tiny.names
    assert 0 < model.step(few, "residual") < model.step(all_, "exact")
    assert model.update_per_byte > 0
    assert CostModel.from_json(model.as_json()) == model


def test_twins_cost_the_same():
    one, *others = Tiny(seconds=True).model.blocks
    assert all(other.trained == one.trained and other.forward == one.forward for other in others)


def residual_limits(checkpointing):
    """(m/L, FLOPs of the blocks' share over full training's, kept bytes of blocks over full training's)."""
    tiny = Tiny("conditions", checkpointing)
    names, out = tiny.names, []
    # What is left when no block is trained or run: the rest of the network.
    rest, rest_bytes = tiny.model.outside, tiny.model.outside_bytes + tiny.model.common_bytes
    whole = tiny.count(names, "exact")
    for m in (1, 2, 3, 6):
        cost = tiny.count(names[:: len(names) // m][:m], "residual" if m < 6 else "exact")
        share = (cost.flops - rest) / (whole.flops - rest)
        out.append((m / len(names), share, (cost.saved_bytes - rest_bytes) / (whole.saved_bytes - rest_bytes)))
    return out


def test_residual_backward_costs_what_the_formula_says():
    """F·(1 + 2m/L) of 3F. Attention's backward is 2.5 forwards where a matrix product's is 2, so the ratio is held
    against the block's own: (F + (A + W)·m/L) / (F + A + W), and against the formula where that is 2 F."""
    block = Tiny("conditions").model.blocks[0]
    own = (block.trained - block.forward) / block.forward
    for share, flops, saved in residual_limits(checkpointing=False):
        assert flops == pytest.approx((1 + own * share) / (1 + own), rel=0.001)
        assert flops == pytest.approx((1 + 2 * share) / 3, rel=0.02)
        assert saved == pytest.approx(share, rel=0.02)


def test_residual_backward_under_checkpointing():
    """F·(1 + 3m/L) of 4F, and only the trained blocks' inputs are kept."""
    for share, flops, saved in residual_limits(checkpointing=True):
        assert flops == pytest.approx((1 + 3 * share) / 4, rel=0.02)
        assert saved == pytest.approx(share, rel=0.02)


def test_checkpointing_keeps_inputs_and_recomputes_one_block():
    plain, checkpointed = Tiny(), Tiny(checkpointing=True)
    counted = [tiny.count(tiny.names, "exact") for tiny in (plain, checkpointed)]
    assert counted[1].saved_bytes < 0.2 * counted[0].saved_bytes
    assert 0 < counted[1].recomputed_bytes < counted[0].saved_bytes / 5
    assert counted[0].recomputed_bytes == 0
    assert counted[1].flops > 1.2 * counted[0].flops


def test_of_what_waits_on_the_host_two_blocks_are_counted():
    here, away = (Tiny(checkpointing=how) for how in (True, "on_host"))
    kept, left = (tiny.count(tiny.names, "exact") for tiny in (here, away))
    of_one = (left.recomputed_bytes - kept.recomputed_bytes) // 2
    assert kept.saved_bytes - left.saved_bytes == of_one * len(here.names) > 0
    assert left.flops == kept.flops


def test_kept_attention_is_counted_and_not_computed_again():
    """Of self-attention alone: its forward is a step's FLOPs less, its output with what its backward needs is kept."""
    networks = [Tiny(checkpointing=how) for how in (False, True, "keep_attention")]
    plain, again, kept = (tiny.count(tiny.names, "exact") for tiny in networks)
    (queries, heads, width), blocks = attention_of(networks[0]), len(networks[0].names)
    assert again.flops - kept.flops == blocks * 4 * heads * queries**2 * width
    output_and_sums = 4 * heads * queries * (width + 1)
    assert kept.saved_bytes - again.saved_bytes == blocks * output_and_sums
    assert again.recomputed_bytes - kept.recomputed_bytes == output_and_sums
    assert plain.flops < kept.flops


def attention_of(tiny):
    """(tokens, heads, width of a head) of the self-attention of a network's blocks."""
    seen = []

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "attention" in function.name() and args[0].shape == args[1].shape:
                seen.append(args[0].shape)
            return function(*args, **(kwargs or {}))

    with Shapes(), torch.no_grad():
        tiny.loss()
    _, heads, tokens, width = seen[0]
    assert set(seen) == {seen[0]}
    return tokens, heads, width


def test_every_step_and_decision_carries_what_was_foreseen():
    from helpers.runs import Run

    run = Run(tiny_experiment(train={"steps": 12}, schedule={"clock": "seconds"}))
    steps = list(run.steps())
    assert all(step.predicted_s > 0 and step.seconds > 0 for step in steps)
    for step in steps:
        assert step.predicted_memory_bytes == pytest.approx(step.plan_memory_bytes, rel=0.1)
    for decision in run.state.decisions:
        assert decision.step_cost > 0 and decision.full_step_cost > 0 and decision.memory_bytes > 0
    counted = Run(tiny_experiment(train={"steps": 12}))
    assert all(step.predicted_s is None for step in counted.steps())
    for decision in counted.state.decisions:
        assert decision.step_cost == counted_flops(counted, decision.plan)


def test_averages_are_foreseen():
    """Of all that was trained so far, whatever is trained now."""
    from helpers.runs import Run

    table = [{"until": 0.7, "share": 0.34, "choose": "random", "redraw_every": 2}, {"until": 1, "share": 0.5}]
    schedule = {"kind": "progressive", "table": table, "memory_budget_bytes": 10**9}
    plain, averaged = (
        Run(tiny_experiment(train={"steps": 8, "ema_decay": decay}, schedule=schedule)) for decay in (None, 0.9)
    )
    for without, step in zip(plain.steps(), averaged.steps(), strict=True):
        held = sum(tensor.nbytes for tensor in averaged.state.ema.values())
        assert step.plan_memory_bytes - without.plan_memory_bytes == held > 0
        assert step.predicted_memory_bytes - without.predicted_memory_bytes == held
    assert len({block.split(".")[1] for block in averaged.state.ema if block.startswith("blocks.")}) > 3


def counted_flops(run, plan):
    from entprog.schedule.freezing import Freeze
    from entprog.schedule.prices import Prices

    freeze = Freeze(run.denoiser, run.found, run.experiment)
    return Prices(run.denoiser, run.found, latents([0]), freeze, run.experiment, {}).step_flops(plan)


@pytest.mark.parametrize(
    "parts", [{"model": {"gradient_checkpointing": True}}, {"train": {"lora": {"rank": 2, "alpha": 2}}}]
)
def test_an_evaluation_is_a_forward_pass_whatever_the_backward_pass_computes(parts):
    from entprog.schedule.freezing import Freeze
    from entprog.schedule.prices import Prices
    from pipelines.training import networks

    experiment = tiny_experiment(**parts)
    denoiser = networks.load(experiment, torch.device("cpu"))
    found = blocks(denoiser.network)
    with torch.no_grad(), counting.flop_counter() as forward:
        training_loss(denoiser, latents([0]), experiment.train)
    prices = Prices(denoiser, found, latents([0]), Freeze(denoiser, found, experiment), experiment, {})
    assert prices.evaluation_flops() == forward.get_total_flops() * prices.search_clips > 0


def test_a_smaller_group_foresees_the_seconds_of_the_batches_that_it_takes():
    """An update of fewer ranks than `train.workers` is more batches for each: as many as if it added them up."""
    from entprog.schedule.freezing import Freeze
    from entprog.schedule.prices import Prices
    from helpers.runs import Run

    foreseen, models = [], {}
    for train in ({"workers": 1, "accumulate": 6}, {"workers": 6}, {"workers": 3, "accumulate": 2}, {}):
        run = Run(tiny_experiment(train=train, schedule={"clock": "seconds"}))
        freeze = Freeze(run.denoiser, run.found, run.experiment)
        prices = Prices(run.denoiser, run.found, latents([0, 1]), freeze, run.experiment, models)
        foreseen.append((prices.step(prices.full), prices.evaluation()))
    several, *others, once = foreseen
    assert others == [several, several]
    assert several[0] > once[0] and several[1] < once[1] * 1.001, "an evaluation is no more for that"


def test_a_memory_budget_decides_what_is_tried():
    from helpers.runs import Run

    free = Run(tiny_experiment(train={"steps": 6}))
    list(free.steps())
    needs = {plan: free_memory(free, plan) for plan in free.state.candidates}
    small, large = sorted(needs.values())
    tight = Run(tiny_experiment(train={"steps": 6}, schedule={"memory_budget_bytes": (small + large) // 2}))
    list(tight.steps())
    for decision in tight.state.decisions:
        assert len(decision.candidates) == 1 and "1 of 2 plans fit" in decision.reason
    none = Run(tiny_experiment(train={"steps": 6}, schedule={"memory_budget_bytes": small // 2}))
    with pytest.raises(UserError, match="no plan fits"):
        list(none.steps())


def free_memory(run, plan):
    return run.state.models[plan.shape].memory(plan.trainable, plan.backward)
