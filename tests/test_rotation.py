"""Blocks by lot: only the drawn ones move, drawn anew in time; batches that grow; runs that end by counted FLOPs."""

import itertools

import pytest
import torch

from entprog import config
from entprog.blocks import blocks
from entprog.errors import UserError
from entprog.schedule import rotation
from entprog.training.fit import fit, start
from helpers.networks import batches, latents, tiny_denoiser, tiny_experiment
from helpers.runs import Run, comparable, course, differing


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
    laps = [[rotation.badam(names, schedule, lap * 6 + i, seed=3)[0] for i in range(6)] for lap in range(3)]
    assert all(sorted(lap) == names for lap in laps) and len({tuple(lap) for lap in laps}) > 1
    drawn = [tuple(sorted(rotation.lisa(names, schedule, stage, seed=0))) for stage in range(200)]
    assert drawn == [tuple(sorted(rotation.lisa(names, schedule, stage, seed=0))) for stage in range(200)]
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


ROTATING = {
    "kind": "progressive", "tokens": "constant", "backward": "residual", "outside": "conditions",
    "table": [
        {"until": 0.5, "frames": 1, "share": 0.34, "choose": "random", "redraw_every": 3},
        {"until": 0.8, "share": 0.5, "choose": "weighted", "redraw_every": 2},
        {"until": 1.0},
    ],
}  # fmt: skip
"""A row of small clips, then of whole ones, with blocks by lot; then plain training."""


def test_blocks_are_drawn_anew_and_batches_grow_as_clips_shrink():
    random_alone = {**ROTATING, "table": [ROTATING["table"][0], {"until": 1.0}]}
    steps, state = run(tiny_experiment(schedule=random_alone, train={"steps": 20, "weight_decay": 0.1}))
    plans = [step.plan for step, _ in steps]
    assert [plan.shape.frames for plan in plans] == [1] * 10 + [2] * 10
    assert [step.clips for step, _ in steps] == [4] * 10 + [2] * 10
    assert state.position == 4 * 10 + 2 * 10
    drawn = [plan.trainable for plan in plans[:10]]
    assert all(len(set(drawn[first : first + 3])) == 1 for first in range(0, 10, 3)), "one draw lasts three steps"
    assert len(set(drawn)) > 1 and {len(names) for names in drawn} == {2}
    assert plans[-1].m == 6
    for step, moved in steps:
        assert moved and all(
            name.startswith(("patch_embedding", *(f"{b}." for b in step.plan.trainable))) for name in moved
        )
    flops = [b.flops - a.flops for (a, _), (b, _) in itertools.pairwise(steps)]
    assert state.flops.search == state.flops.score == 0 and max(flops[:9]) < min(flops[9:])


def test_every_step_sees_the_next_clips_whatever_their_shape():
    experiment, seen = tiny_experiment(schedule={**ROTATING, "table": [ROTATING["table"][0], {"until": 1}]}), []
    source = batches(experiment)

    def noted(shape, position):
        for batch in source(shape, position):
            seen.extend(batch.position.tolist())
            yield batch

    denoiser = tiny_denoiser(experiment)
    state = start(denoiser.network, experiment)
    list(fit(denoiser, blocks(denoiser.network), noted, [latents(range(4))], latents([0, 1]), None, experiment, state))
    assert seen == list(range(state.position))


@pytest.mark.parametrize(("frozen_state", "stops"), [("host", (4, 15)), ("drop", (12, 22))])
def test_resume_from_the_middle_of_a_row_equals_no_interruption(tmp_path, frozen_state, stops):
    experiment = tiny_experiment(schedule=ROTATING, train={"frozen_state": frozen_state, "block_warmup_steps": 2})
    whole = Run(experiment)
    expected = course(whole, {stop: tmp_path / str(stop) for stop in stops})
    for stop in stops:
        second = Run(experiment, tmp_path / str(stop))
        assert [comparable(step) for step in second.steps()] == expected[stop:]
        assert not differing(whole.weights(), second.weights())


def test_blocks_that_were_scored_again_are_drawn_by_the_new_scores_after_a_resume_too(tmp_path):
    rows = [{"until": until, "share": 0.34, "choose": "weighted", "redraw_every": 2} for until in (0.5, 1)]
    experiment = tiny_experiment(schedule={"kind": "progressive", "table": rows}, priority={"rescore": True})
    whole = Run(experiment)
    expected = course(whole, {14: tmp_path})
    assert whole.state.priority and whole.state.priority != whole.table.priority("signed")
    again = Run(experiment, tmp_path)
    got = [comparable(step) for step in again.steps()]
    assert [step["plan"].trainable for step in got] == [step["plan"].trainable for step in expected[14:]]
    assert got == expected[14:]


@pytest.mark.parametrize("decay", [None, 0.9])
def test_a_later_draw_that_does_not_fit_the_memory_is_refused_before_the_first_step(decay):
    """Gradient crosses more blocks where an early one is drawn; averages of blocks that were drawn before stay."""

    def with_budget(budget):
        row = {"until": 1, "share": 0.34, "choose": "random", "redraw_every": 2}
        schedule = {"kind": "progressive", "table": [row], "outside": "never", "memory_budget_bytes": budget}
        run = Run(tiny_experiment(train={"steps": 7, "ema_decay": decay}, schedule=schedule))
        return [step.predicted_memory_bytes for step in run.steps()]

    needs = with_budget(10**9)
    assert needs[0] < max(needs) and with_budget(max(needs)) == needs
    with pytest.raises(UserError, match="no plan fits"):
        with_budget(max(needs) - 1)


def test_a_row_that_does_not_fit_the_memory_is_refused_before_the_first_step():
    table = [{"until": 0.5, "share": 0.34, "frames": 1, "choose": "random"}, {"until": 1}]
    small = tiny_experiment(schedule={**ROTATING, "tokens": "fewer", "table": table})
    steps, _ = run(small)
    between = (steps[0][0].plan_memory_bytes + steps[-1][0].plan_memory_bytes) // 2
    with pytest.raises(UserError, match="no plan fits"):
        run(config.build(config.merge(small.model_dump(), {"schedule": {"memory_budget_bytes": between}})))
