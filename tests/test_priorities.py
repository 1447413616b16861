"""Controls: each is what its name says, behind CEI's signature, and leaves the network as it was."""

import json

import numpy as np
import pytest
import torch

from entprog.blocks import blocks, trainable, unfreeze
from entprog.config import Lora, Priority
from entprog.cost import counting
from entprog.data import hashing
from entprog.diffusion import objectives
from entprog.models import lora
from entprog.scoring import cei, priorities, tables
from helpers.networks import latents, tiny_denoiser, tiny_experiment
from helpers.processes import join, leave, run_ranks

BATCH = [latents(range(2)), latents(range(2, 4))]


def scored(denoiser, found, kind, **settings):
    given = Priority(**{"conditions": 4, "draws": 4, "kind": kind, **settings})
    return priorities.score(denoiser, found, BATCH, given, key="k")


@pytest.mark.parametrize("kind", priorities.KINDS)
def test_every_kind_gives_a_table_that_ranks_all_blocks(denoiser, found, kind):
    table = scored(denoiser, found, kind)
    again = scored(denoiser, found, kind)
    assert table.kind == kind and table.key == "k"
    assert list(table.priority("signed")) == [block.name for block in found]
    assert len(set(table.priority("signed").values())) == len(found), "no two blocks alike"
    assert table.priority("signed") == again.priority("signed")
    assert tables.ScoreTable.from_json(table.as_json()) == table
    looks_at_data = kind not in priorities.WITHOUT_DATA
    assert bool(table.flops) == bool(table.seconds) == looks_at_data
    assert table.conditions == (4 if looks_at_data else 0)


def test_all_kinds_of_the_settings_are_there():
    assert set(priorities.KINDS) == set(Priority.model_fields["kind"].annotation.__args__)


def losses_of_condition(denoiser, number, settings):
    """Mean loss of each draw of one condition, from scratch."""
    clip = latents([number])
    low, high = settings.timestep_range
    numbers = torch.arange(settings.draws) + number * settings.draws
    t = low + (high - low) * objectives.timesteps(numbers, settings.seed)
    clean = clip.clean.expand(settings.draws, -1, -1, -1, -1)
    noisy, target = denoiser.process.pair(clean, objectives.noise_like(clean, numbers, settings.seed), t)
    given = {name: value.expand(settings.draws, -1, -1, -1, -1) for name, value in clip.conditions.items()}
    return (denoiser.predict(noisy, t, given) - target).square().flatten(1).mean(1)


def gradient_of(loss, denoiser, block):
    denoiser.network.zero_grad(set_to_none=True)
    loss.backward(retain_graph=True)
    used = [p.grad.flatten() for p in block.module.parameters() if p.grad is not None]
    denoiser.network.zero_grad(set_to_none=True)
    return torch.cat(used)


def test_gradient_norm_is_that_of_a_conditions_mean_loss(denoiser, found):
    settings = Priority(conditions=4, draws=4)
    losses = [losses_of_condition(denoiser, number, settings).mean() for number in range(4)]
    norms = [gradient_of(loss, denoiser, found[2]).norm() for loss in losses]
    table = scored(denoiser, found, "gradient")
    assert table.blocks[2].score == pytest.approx(torch.stack(norms).mean().item(), rel=1e-4)


def test_fisher_is_the_mean_squared_gradient_of_single_draws(denoiser, found):
    settings = Priority(conditions=4, draws=4)
    weights = sum(p.numel() for p in found[2].module.parameters())
    losses = torch.cat([losses_of_condition(denoiser, number, settings) for number in range(4)])
    squares = [gradient_of(loss, denoiser, found[2]).square().sum().item() / weights for loss in losses]
    assert scored(denoiser, found, "fisher").blocks[2].score == pytest.approx(np.mean(squares), rel=1e-4)


def test_under_adapters_gradients_are_those_of_the_adapters():
    denoiser = tiny_denoiser(tiny_experiment())
    found, settings = blocks(denoiser.network), Priority(conditions=2, draws=4)
    lora.add(denoiser.network, found, Lora(rank=2), 0)
    own, norms, squares = trainable(found[2].module), [], []
    for number in range(2):
        losses = losses_of_condition(denoiser, number, settings)
        each = [torch.cat([g.flatten() for g in torch.autograd.grad(loss, own, retain_graph=True)]) for loss in losses]
        norms.append(torch.stack(each).mean(0).norm().item())
        squares.append(torch.stack(each).square().mean().item())
    for kind, values in {"gradient": norms, "fisher": squares}.items():
        assert scored(denoiser, found, kind, conditions=2).blocks[2].score == pytest.approx(np.mean(values), rel=1e-4)


def test_loss_increase_is_ceis(denoiser, found):
    increase, pi = (scored(denoiser, found, kind) for kind in ("loss_increase", "cei"))
    assert increase.scores() == {block.name: block.loss_increase for block in pi.blocks}
    assert [b.std_error for b in increase.blocks] == [b.loss_std_error for b in pi.blocks]
    assert increase.priority("absolute") == increase.priority("signed") == increase.scores()


def test_reverse_cei_turns_the_order_round(denoiser, found):
    forwards, backwards = (scored(denoiser, found, kind).priority("signed") for kind in ("cei", "reverse_cei"))
    ranked = lambda priority: sorted(priority, key=lambda name: -priority[name])  # noqa: E731
    assert ranked(backwards) == ranked(forwards)[::-1]


def test_depth_and_random_orders(denoiser, found):
    names = [block.name for block in found]
    ranked = lambda table: [n for n, _ in sorted(table.priority("signed").items(), key=lambda item: -item[1])]  # noqa: E731
    assert ranked(scored(denoiser, found, "depth_first")) == names
    assert ranked(scored(denoiser, found, "depth_last")) == names[::-1]
    orders = [ranked(scored(denoiser, found, "random", seed=seed)) for seed in range(4)]
    assert all(sorted(order) == sorted(names) for order in orders)
    assert len({tuple(order) for order in orders}) > 1
    runs = [priorities.score(denoiser, found, [], Priority(kind="random"), seed=seed) for seed in (0, 1)]
    assert runs[0].scores() != runs[1].scores(), "the run's seed counts too"


@pytest.mark.parametrize("kind", ["gradient", "fisher"])
@pytest.mark.parametrize("backward", ["exact", "residual"])
def test_gradients_of_a_network_in_training_are_the_exact_ones_and_leave_it_alone(denoiser, found, kind, backward):
    expected = scored(denoiser, found, kind)
    trained = unfreeze(denoiser.network, found, ["blocks.4"], denoiser.outside()["conditions"], backward)
    for parameter in trained:
        parameter.grad = torch.full_like(parameter, 7.0)
    before = hashing.content_hash(denoiser.network)
    forwards = [block.module.forward for block in found]
    with torch.no_grad():
        assert scored(denoiser, found, kind).per_condition == expected.per_condition
    assert hashing.content_hash(denoiser.network) == before
    assert [block.module.forward for block in found] == forwards
    assert {id(p) for p in denoiser.network.parameters() if p.requires_grad} == {id(p) for p in trained}
    assert all(p.grad.unique().tolist() == [7.0] for p in trained)


@pytest.mark.parametrize("kind", ["gradient", "fisher"])
def test_flops_of_gradients_are_those_of_forward_and_backward(denoiser, found, kind):
    with counting.flop_counter() as counter:
        table = scored(denoiser, found, kind, conditions=2)
    one_draw = table.flops // (table.conditions * table.draws)
    assert counter.get_total_flops() == table.flops + one_draw


def test_bfloat16_gradients_are_finite():
    denoiser = tiny_denoiser(tiny_experiment(model={"dtype": "bfloat16"}))
    assert np.isfinite(scored(denoiser, blocks(denoiser.network), "gradient").per_condition).all()


def test_cei_is_the_same_through_its_kind(denoiser, found):
    direct = cei.cei(denoiser, found, BATCH, Priority(conditions=4, draws=4), key="k")
    assert scored(denoiser, found, "cei").blocks == direct.blocks


def _scoring_rank(rank, world, folder):
    join(rank, world, folder)
    experiment = tiny_experiment(priority={"conditions": 10, "draws": 4, "until_stable": 0.2})
    denoiser = tiny_denoiser(experiment)
    out = {}
    for kind in ("cei", "gradient", "random"):
        settings = experiment.priority.model_copy(update={"kind": kind})
        table = priorities.score(denoiser, blocks(denoiser.network), [latents(range(10))], settings)
        out[kind] = table.as_json()
    (folder / f"{rank}.json").write_text(json.dumps(out))
    leave()


def test_ranks_get_one_table_equal_to_the_single_process(tmp_path):
    run_ranks(_scoring_rank, 2, tmp_path)
    tables = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert tables[0] == tables[1]
    experiment = tiny_experiment(priority={"conditions": 10, "draws": 4, "until_stable": 0.2})
    denoiser = tiny_denoiser(experiment)
    for kind in ("cei", "gradient", "random"):
        settings = experiment.priority.model_copy(update={"kind": kind})
        table = priorities.score(denoiser, blocks(denoiser.network), [latents(range(10))], settings)
        alone = json.loads(json.dumps(table.as_json()))
        for values in (alone, tables[0][kind]):
            assert values.pop("seconds") >= 0
        assert alone == tables[0][kind]
