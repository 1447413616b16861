"""LISA and BAdam: only the drawn blocks move; and runs that end by counted FLOPs."""

import pytest
import torch

from entprog import config
from entprog.blocks import blocks
from entprog.errors import UserError
from entprog.schedule import lisa_badam
from entprog.training.fit import fit, start
from helpers.networks import batches, latents, tiny_denoiser, tiny_experiment


def run(experiment):
    """(steps, their networks' weights before and after, state) of a tiny run without scores."""
    denoiser = tiny_denoiser(experiment)
    found, state = blocks(denoiser.network), start(denoiser.network, experiment)
    held_out = [latents(range(4), experiment.model.conditions)]
    before, out = {k: v.clone() for k, v in denoiser.network.state_dict().items()}, []
    for step in fit(denoiser, found, batches(experiment), held_out, latents([0, 1]), None, experiment, state):
        after = {k: v.clone() for k, v in denoiser.network.state_dict().items()}
        out.append((step, {name for name in after if not torch.equal(after[name], before[name])}))
        before = after
    return out, state


@pytest.mark.parametrize(("kind", "count"), [("lisa", 2), ("badam", 1)])
@pytest.mark.parametrize("backward", ["exact", "residual"])
def test_only_the_drawn_blocks_move(kind, count, backward):
    schedule = {"kind": kind, "stages": 8, "lisa_share": 0.34, "backward": backward, "outside": "conditions"}
    train = {"weight_decay": 0.1, "frozen_state": "drop"}
    steps, state = run(tiny_experiment(schedule=schedule, train=train))
    for step, moved in steps:
        assert step.plan.m == count and step.plan.backward == backward
        allowed = ("patch_embedding", *(block + "." for block in step.plan.trainable))
        assert moved and all(name.startswith(allowed) for name in moved)
        assert any(name.startswith(allowed[1:]) for name in moved)
    assert state.stage == 7 and state.flops.search == state.flops.score == 0
    assert len({step.plan.trainable for step, _ in steps}) > 2
    last = steps[-1][0].plan.trainable
    groups = {
        group["block"] for group in state.optimizer.param_groups for p in group["params"] if p in state.optimizer.state
    }
    assert groups == {"", *last}  # the moments of frozen blocks are forgotten


def test_badam_takes_every_block_once_a_round_and_lisa_is_seeded():
    names = [f"blocks.{i}" for i in range(6)]
    schedule = config.Schedule(kind="badam")
    laps = [[lisa_badam.badam(names, schedule, lap * 6 + i, seed=3)[0] for i in range(6)] for lap in range(3)]
    assert all(sorted(lap) == names for lap in laps) and len({tuple(lap) for lap in laps}) > 1
    drawn = [tuple(sorted(lisa_badam.lisa(names, schedule, stage, seed=0))) for stage in range(200)]
    assert drawn == [tuple(sorted(lisa_badam.lisa(names, schedule, stage, seed=0))) for stage in range(200)]
    share = sum("blocks.0" in chosen for chosen in drawn) / len(drawn)
    assert all(len(set(chosen)) == 2 for chosen in drawn) and share == pytest.approx(1 / 3, abs=0.1)


def test_a_run_ends_by_counted_flops():
    full = {"schedule": {"kind": "full", "clock": "flops"}}
    steps, _ = run(tiny_experiment(**full))
    per_step = steps[0][0].flops
    budget = {"steps": None, "flops": 9.5 * per_step}
    again, _ = run(tiny_experiment(**full, train=budget))
    assert [step.last for step, _ in again] == [False] * 9 + [True]
    residual = {"kind": "lisa", "stages": 4, "lisa_share": 0.34, "backward": "residual"}
    cheaper, state = run(tiny_experiment(schedule=residual, train=budget))
    assert len(cheaper) > 13 and state.flops.total >= 9.5 * per_step
    with pytest.raises(UserError, match=r"train\.flops ends runs that count them"):
        tiny_experiment(schedule={"clock": "seconds"}, train=budget)
