"""Optimizer state follows the freeze: kept, moved or dropped; bytes counted; warm-up of blocks that begin."""

import pytest
import torch

from entprog.blocks import blocks, unfreeze
from entprog.config import Train
from entprog.training import optimizer
from helpers.networks import tiny_denoiser, tiny_experiment

ALL = [f"blocks.{i}" for i in range(6)]


class Trainee:
    """A tiny network and its AdamW, with a step that needs no data."""

    def __init__(self, **train):
        self.settings = Train(steps=1, learning_rate=1e-2, **train)
        self.network = tiny_denoiser(tiny_experiment()).network
        self.optimizer = optimizer.adamw(self.network, self.settings)
        self.found = blocks(self.network)

    def step(self, names):
        trained = unfreeze(self.network, self.found, names, [])
        for parameter in trained:
            parameter.grad = torch.ones_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return trained

    def block_bytes(self, names):
        """Two moments and a step count for every tensor."""
        some = [p for block in self.found if block.name in names for p in block.module.parameters()]
        return sum(2 * p.nbytes + 4 for p in some)


CPU = torch.device("cpu")


def test_there_is_no_state_before_a_block_is_trained():
    run = Trainee()
    assert optimizer.state_bytes(run.optimizer, CPU) == 0
    run.step(ALL[:2])
    assert optimizer.state_bytes(run.optimizer, CPU) == run.block_bytes(ALL[:2])


@pytest.mark.parametrize(("frozen_state", "left"), [("host", ALL[:3]), ("keep", ALL[:3]), ("drop", ALL[2:3])])
def test_state_of_blocks_that_leave(frozen_state, left):
    run = Trainee(frozen_state=frozen_state)
    run.step(ALL[:3])
    moments = {p: run.optimizer.state[p]["exp_avg"].clone() for p in run.optimizer.state}
    trained = unfreeze(run.network, run.found, ALL[2:4], [])
    optimizer.follow(run.optimizer, trained, frozen_state)
    assert optimizer.state_bytes(run.optimizer, CPU) == run.block_bytes(left)
    for parameter, state in run.optimizer.state.items():
        assert torch.equal(state["exp_avg"], moments[parameter])
    run.step(ALL[2:4])
    assert optimizer.state_bytes(run.optimizer, CPU) == run.block_bytes({*left, ALL[3]})


def test_a_block_that_begins_warms_up_alone():
    run = Trainee(block_warmup_steps=4, warmup_steps=2)
    begun = {"blocks.1": 0, "blocks.3": 10}
    rates = {}
    for step in (0, 1, 9, 10, 11, 13, 14):
        assert optimizer.set_learning_rate(run.optimizer, run.settings, step, begun) == pytest.approx(
            1e-2 * min(1, (step + 1) / 2)
        )
        rates[step] = {group["block"]: group["lr"] for group in run.optimizer.param_groups}
    assert rates[0][optimizer.OUTSIDE] == pytest.approx(0.5e-2)
    assert rates[0]["blocks.1"] == pytest.approx(0.5e-2 / 4)
    assert rates[9]["blocks.1"] == rates[9][optimizer.OUTSIDE] == 1e-2
    assert [rates[step]["blocks.3"] for step in (10, 11, 13, 14)] == pytest.approx([0.25e-2, 0.5e-2, 1e-2, 1e-2])


def test_every_parameter_is_in_one_group():
    run = Trainee()
    grouped = [p for group in run.optimizer.param_groups for p in group["params"]]
    assert len(grouped) == len(set(grouped)) and set(grouped) == set(run.network.parameters())
