"""Averages of weights (`train.ema_decay`): those of every update, whichever blocks a plan leaves frozen."""

from contextlib import ExitStack

import pytest
import torch

from entprog import config
from entprog.blocks import full_weights
from entprog.blocks.held import all_held
from entprog.diffusion import losses
from entprog.training import averages, checkpoint
from helpers.memory import Peak
from helpers.networks import tiny_denoiser, tiny_experiment
from helpers.runs import Run, differing
from pipelines.training import networks

DECAY = 0.8
TABLE = [{"until": 1.0, "share": 0.34, "choose": "random", "redraw_every": 4}]


def rotating(**parts):
    """Two of six blocks at a time, by lot, so that some were trained last long before the end."""
    values = {
        "train": {"steps": 16, "ema_decay": DECAY, "held_out_every": 16},
        "schedule": {"kind": "progressive", "table": TABLE},
    }
    return tiny_experiment(**config.merge(values, parts))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(a rotating run at its end, its averages by the formula, its checkpoints, its last held-out loss)"""
    run, folder = Run(rotating()), tmp_path_factory.mktemp("checkpoints")
    expected = {name: weight.detach().clone() for name, weight in run.denoiser.network.named_parameters()}
    for step in run.steps():
        for name, weight in run.denoiser.network.named_parameters():
            expected[name] = DECAY * expected[name] + (1 - DECAY) * weight.detach()
        if step.step in (7, 16):
            checkpoint.save(folder, run.denoiser.network, run.state, "id", keep=2)
    return run, expected, folder, step.held_out_loss


def assert_close(network, expected):
    for name, weight in network.named_parameters():
        if name in expected:
            torch.testing.assert_close(weight.detach(), expected[name], rtol=1e-5, atol=1e-6)


def test_what_is_drawn_published_and_saved_is_the_average_of_every_update(trained):
    run, expected, folder, _ = trained
    network, state = run.denoiser.network, run.state
    behind = [name for name in state.ema if not torch.allclose(state.ema[name], expected[name], rtol=1e-5, atol=1e-6)]
    assert behind and min(state.ema_gaps.values()) < DECAY**4, "blocks stand still for longer than a draw"
    weights = run.weights()
    with averages.averaged(network, state.ema, state.ema_gaps):
        assert_close(network, expected)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in run.weights().items())
    published = tiny_denoiser(run.experiment, seed=1).network
    checkpoint.load_weights(folder, "step-00000016", published)
    assert_close(published, expected)
    saved = Run(run.experiment, folder)
    assert_close(networks.final(saved.denoiser, saved.experiment, saved.state).network, expected)


def test_the_held_out_loss_is_that_of_the_averages_which_are_saved(trained):
    run, _, folder, last = trained

    def loss(denoiser):
        data = run.experiment.data
        return losses.held_out_loss(denoiser, run.held_out, data.held_out_draws, data.held_out_seed)

    saved = Run(run.experiment, folder)
    assert loss(networks.final(saved.denoiser, saved.experiment, saved.state)) == pytest.approx(last, rel=1e-6)
    assert loss(run.denoiser) != pytest.approx(last, rel=1e-3), "that of the weights which go on being trained"


@pytest.mark.parametrize("form", [{}, {"swap_blocks": 3}, {"frozen_precision": "nf4"}])
def test_no_second_network_is_made_of_what_is_stored_and_the_loss_is_that_of_what_is_saved(form, monkeypatch):
    """Rounded, waiting on the host, packed."""
    monkeypatch.setattr("helpers.runs.tiny_denoiser", lambda experiment: networks.load(experiment, torch.device("cpu")))
    model = {"dtype": "bfloat16", "swap_blocks": form.get("swap_blocks", 0)}
    schedule = {"frozen_precision": form.get("frozen_precision", "auto"), "table": [{**TABLE[0], "redraw_every": 2}]}
    run = Run(rotating(model=model, train={"steps": 12}, schedule=schedule))
    list(run.steps())
    network, state, before = run.denoiser.network, run.state, run.weights()
    stored = [average.nbytes for n, average in state.ema.items() if network.get_parameter(n).dtype == torch.bfloat16]
    trained = sum(average.nbytes for average in state.ema.values()) - sum(stored)
    little = 3 * max(average.nbytes for average in state.ema.values())
    assert sum(stored) > 2 * little, "a second network would be seen"

    def loss():
        return losses.held_out_loss(run.denoiser, run.held_out, 1, 0)

    there = [part for held in all_held(network) for part in held.parts()]
    there += [*network.parameters(), *network.buffers(), *state.ema.values()]
    there += full_weights(network, dict(network.named_parameters())).values()
    with ExitStack() as stack:
        with Peak(there) as peak:
            stack.enter_context(averages.averaged(network, state.ema, state.ema_gaps))
            assert peak.live() <= trained, "copies of what lies in float32 on the device alone"
        assert peak.bytes < trained + little
        seen = loss()
    assert not differing(before, run.weights()) and loss() != seen
    with Peak(there) as peak:
        networks.final(run.denoiser, run.experiment, state)
    assert peak.bytes < sum(stored) + little, "in place of the float32 numbers that the host kept"
    assert loss() == seen


def test_measuring_them_changes_nothing_that_is_trained(trained):
    run, *_ = trained
    train = run.experiment.train.model_copy(update={"held_out_every": 3})
    often = Run(run.experiment.model_copy(update={"train": train}))
    assert len([step for step in often.steps() if step.held_out_loss is not None]) == 7
    assert not differing(run.weights(), often.weights())
    assert all(torch.equal(average, often.state.ema[name]) for name, average in run.state.ema.items())


def test_a_resumed_run_has_the_same_averages_to_the_bit(trained, tmp_path):
    run, _, folder, _ = trained
    (folder / "step-00000007").rename(tmp_path / "step-00000007")
    again = Run(run.experiment, tmp_path)
    assert again.state.step == 7 and again.state.ema_gaps
    list(again.steps())
    assert again.state.ema_gaps == run.state.ema_gaps
    assert all(torch.equal(average, run.state.ema[name]) for name, average in again.state.ema.items())


def test_a_trained_block_has_no_gap():
    gaps = {}
    averages.widen(gaps, ["blocks.1"], DECAY)
    averages.widen(gaps, ["blocks.2", "blocks.10"], DECAY)
    assert gaps == {"blocks.1": DECAY, "blocks.2": 1.0, "blocks.10": 1.0}
    assert [averages.gap_of(name, gaps) for name in ("blocks.1.a", "blocks.10.a", "proj_out")] == [DECAY, 1.0, 1.0]
