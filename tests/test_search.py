"""The search in a run: until it is clear, never beyond its share, never far behind plain training; every setting
survives a resume to the bit."""

import functools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from entprog import blocks, config
from entprog.schedule import efficiency, plans
from entprog.schedule.efficiency import Efficiency, Trial, overlap
from entprog.schedule.search import Search
from entprog.schedule.state import RunState
from entprog.training import checkpoint, optimizer
from helpers.networks import TINY, tiny_experiment
from helpers.runs import Run, comparable, course, differing

WIDE = {
    "generators": ["count", "suffix", "budget"],
    "backward": ["exact", "residual"],
    "shapes": [{"frames": 1}],
    "search_steps": 1,
    "search_share": 1.0,
    "search_until_clear": False,
}


def interval(value, low=None, high=None):
    return Efficiency(m=1, value=value, low=low, high=high, steps=4, mean_cost=1.0)


def test_overlap_is_between_the_best_two():
    best = interval(3, 2.5, 3.5)
    assert overlap([interval(2, 1.5, 2.6), best])
    assert not overlap([interval(2, 1.5, 2.4), best, interval(1, 0, 9)])
    assert overlap([interval(2), interval(3)]) and overlap([interval(None), best])


def test_the_search_begins_cheaply_and_probes_after_the_warm_up():
    schedule = WIDE | {"search_share": 0.5, "backward": "residual", "generators": ["count"]}
    run = Run(tiny_experiment(train={"steps": 60, "warmup_steps": 7}, schedule=schedule))
    steps = list(run.steps())
    early, first, last = run.state.decisions
    assert (early.stage, first.stage, last.stage) == (0, 0, 1)
    assert "warm-up" in early.reason and early.plan.m == 2 and early.plan.shape.frames == 1 and not early.efficiencies
    phases = [step.phase for step in steps]
    assert phases[:7] == ["train"] * 7 and phases[7] == "search", "every candidate is tried at the full learning rate"
    assert all(step.learning_rate == steps[-1].learning_rate for step in steps if step.phase == "search")
    assert len(first.efficiencies) == len(first.candidates)
    assert run.state.flops.search <= 0.5 * run.state.flops.total


def test_a_share_that_pays_for_no_round_trains_the_cheapest():
    run = Run(tiny_experiment(train={"steps": 12}, schedule={"search_share": 0.01, "backward": "residual"}))
    steps = list(run.steps())
    assert {step.phase for step in steps} == {"train"} and run.state.flops.search == 0
    assert all("not searched" in d.reason and d.plan.m == 2 for d in run.state.decisions)


def test_what_foresees_costs_is_a_part_of_what_a_search_costs():
    run = Run(tiny_experiment(train={"steps": 12}, schedule={"clock": "seconds"}))
    next(run.steps())
    (decision,) = run.state.decisions
    assert decision.search_cost == run.state.seconds.search > 0
    assert "not searched" in decision.reason, "timing plans takes longer than twelve steps"


@pytest.mark.parametrize("clear_after", [2, 4])
def test_the_search_goes_on_until_the_best_is_clear(monkeypatch, clear_after):
    rounds = []
    monkeypatch.setattr(efficiency, "overlap", lambda found: rounds.append(found[0].steps) or rounds[-1] < clear_after)
    run = Run(tiny_experiment(schedule={"stages": 1, "search_steps": 2, "search_share": 1.0}))
    steps = list(run.steps())
    assert sum(s.phase == "search" for s in steps) == 2 * clear_after


def test_an_unclear_search_still_keeps_to_its_share(monkeypatch):
    monkeypatch.setattr(efficiency, "overlap", lambda found: True)
    run = Run(tiny_experiment(train={"steps": 40}, schedule={"stages": 1, "search_steps": 1, "search_share": 0.4}))
    list(run.steps())
    (decision,) = run.state.decisions
    assert decision.efficiencies[0].steps > 1
    assert decision.search_cost <= 0.4 * 40 * decision.full_step_cost


def test_plans_of_every_kind_are_tried_and_trained():
    run = Run(tiny_experiment(train={"steps": 40, "held_out_every": 5}, schedule=WIDE))
    steps = list(run.steps())
    first, last = run.state.decisions
    assert {plan.shape.frames for plan in first.candidates} == {1, 2}
    assert {plan.shape.frames for plan in last.candidates} == {2}
    assert {plan.backward for plan in first.candidates} == {"exact", "residual"}
    tried = {step.plan for step in steps if step.phase == "search"}
    assert tried == {*first.candidates, *last.candidates}
    assert steps[-1].held_out_loss < steps[0].held_out_loss


STOPS = (3, 17, 30)
"""In either search, and where a block's warm-up is over."""


@pytest.fixture(scope="module", params=["host", "keep", "drop"])
def uninterrupted(request, tmp_path_factory):
    """(experiment, steps, run, its checkpoints) of a run with everything that a stage's change can touch."""
    folder = tmp_path_factory.mktemp("stops")
    experiment = tiny_experiment(
        train={"steps": 32, "frozen_state": request.param, "block_warmup_steps": 6, "ema_decay": 0.9},
        schedule=WIDE | {"candidates": [0.34]},
    )
    run = Run(experiment)
    return experiment, course(run, {stop: folder / str(stop) for stop in STOPS}), run, folder


@pytest.mark.parametrize("stop_at", STOPS)
def test_resume_equals_no_interruption_under_every_setting(stop_at, uninterrupted):
    experiment, expected, whole, folder = uninterrupted
    second = Run(experiment, folder / str(stop_at))
    assert [comparable(step) for step in second.steps()] == expected[stop_at:]
    assert not differing(whole.weights(), second.weights())
    assert second.state.begun == whole.state.begun and second.state.saved_cost == whole.state.saved_cost


def test_a_block_s_warm_up_goes_on_where_counting_left_its_plan_in_force(tmp_path):
    """The search waits for the warm-up, and what it begins with is the plan that was counted last."""
    experiment = tiny_experiment(
        train={"steps": 15, "held_out_every": 4, "warmup_steps": 3, "block_warmup_steps": 3, "ema_decay": 0.9},
        schedule={"stages": 3, "backward": ["residual", "exact"], "search_share": 0.9, "outside": "never"},
    )
    whole = Run(experiment)
    for step in whole.steps():
        if step.step == 2:
            checkpoint.save(tmp_path, whole.denoiser.network, whole.state, "id", keep=1)
            assert whole.state.begun == dict.fromkeys(step.plan.trainable, 0)
    again = Run(experiment, tmp_path)
    assert list(again.steps())[-1].step == 15 and again.state.begun == whole.state.begun
    assert not differing(whole.weights(), again.weights())


def test_a_search_that_begins_where_a_run_resumes_brings_moments_and_averages_along(tmp_path, monkeypatch):
    """Its first trial is of the plan that was counted last. Moments are loaded on the host, where a GPU has no use for
    them."""
    experiment = tiny_experiment(
        train={"steps": 12, "held_out_every": 12, "ema_decay": 0.9},
        schedule={"stages": 3, "search_share": 0.9, "search_steps": 1, "search_until_clear": False},
    )
    whole = Run(experiment)
    steps = whole.steps()
    assert [next(steps).step for _ in range(8)][-1] == 8
    checkpoint.save(tmp_path, whole.denoiser.network, whole.state, "id", keep=1)
    again, brought, ready = Run(experiment, tmp_path), set(), []
    follow = optimizer.follow
    monkeypatch.setattr(
        optimizer, "follow", lambda of, trained, *rest: (brought.update(trained), follow(of, trained, *rest))
    )
    again.state.optimizer.register_step_pre_hook(lambda of, *_: ready.append(brought.issuperset(again.trained())))
    expected, got = next(steps), next(again.steps())
    assert got.stage == 2 and got.phase == "search" and got.plan == expected.plan and ready == [True]
    assert again.state.ema_gaps == whole.state.ema_gaps
    assert all(torch.equal(average, again.state.ema[name]) for name, average in whole.state.ema.items())


def test_a_search_that_finds_full_training_best_is_never_far_behind(monkeypatch):
    """At equal FLOPs less its search and scoring, Ent-Prog that goes on with m = L is where plain training is."""
    plain = Run(tiny_experiment(train={"steps": 60, "held_out_every": 1}, schedule={"kind": "full"}))
    course = [(step.flops, step.held_out_loss) for step in plain.steps()]

    def largest(candidates, trials, schedule, **about):
        values = {"efficiencies": (), "reason": "as if full training were best", "plan": candidates[-1]}
        return efficiency.Decision(
            candidates=tuple(candidates), stage=about["stage"], search_cost=about["search_cost"], **values
        )

    monkeypatch.setattr(efficiency, "choose", largest)
    run = Run(tiny_experiment(train={"steps": 60, "held_out_every": 1}, schedule={"search_share": 0.2}))
    steps = list(run.steps())
    assert {step.plan.m for step in steps if step.phase == "train"} == {6}
    assert run.state.flops.search > 0 and run.state.break_even_step is None
    overhead = run.state.flops.search + run.state.flops.score
    affordable = [loss for flops, loss in course if flops <= run.state.flops.total - overhead]
    assert len(affordable) < 60
    assert steps[-1].held_out_loss <= affordable[-1] * 1.01


def test_the_break_even_step_is_where_savings_have_paid():
    experiment = tiny_experiment(
        train={"steps": 200, "held_out_every": 200},
        schedule={"stages": 1, "candidates": [0.17], "backward": "residual", "search_steps": 1, "search_share": 0.5},
    )
    run = Run(experiment)
    run.table = type(run.table)(**{**vars(run.table), "flops": 3_000_000})
    steps = list(run.steps())
    (decision,) = run.state.decisions
    assert decision.plan.m < 6, "one candidate is tried, of one block"
    assert decision.step_cost < decision.full_step_cost
    reached = run.state.break_even_step
    assert reached is not None and abs(reached - decision.break_even_step) <= 1
    saved = sum(decision.full_step_cost - decision.step_cost for s in steps if s.phase == "train" and s.step <= reached)
    assert saved >= run.state.flops.search + run.state.flops.score


def search_between_two(**schedule):
    """A search between four of eight blocks and all of them, at costs that are given; and its state."""
    experiment = config.build({"train": {"seconds": 300}, "schedule": {"kind": "entprog", "stages": 3} | schedule})
    names = [f"b{i}" for i in range(8)]
    half, full = (plans.full(names[:m], experiment.data.shape) for m in (4, 8))
    prices = SimpleNamespace(
        found=names,
        step=lambda plan: plan.m / 8,
        evaluation=lambda: 0.5,
        full=full,
        memory=lambda plan: plan.m,
        model=lambda shape: None,
    )
    state = RunState(optimizer=None, stage=0, candidates=(half, full))
    return Search(names, dict.fromkeys(names, 0.0), prices, experiment, state), state


def test_a_later_search_or_scoring_is_to_be_paid_back_too():
    search, state = search_between_two()
    state.seconds.score = 1.0
    decision = search.decide()

    def train(steps):
        for _ in range(steps):
            state.step += 1
            search.note_saving(decision, 0.5)  # half of a step of all blocks
            yield state.break_even_step

    assert [*train(3)] == [None, 2, 2]
    state.seconds.score += 1.0
    search.begin()
    assert state.break_even_step is None and [*train(2)] == [4, 4]
    state.step += 1
    state.seconds.search += 1.5
    search.note(Trial(candidate=0, loss_before=1.0, loss=0.9, cost=0.5), 1.5)
    assert state.break_even_step is None, "a run may end here"
    assert [*train(3)] == [None, 8, 8]


def test_plans_do_not_shrink_after_a_search_that_its_stage_cut_off():
    """No plan is in force then: what binds is what the stage before it trained. A plan that a stage waits with binds it
    to nothing."""
    search, state = search_between_two(monotone=True)

    def sizes(stage):
        search.open(stage)
        return [plan.m for plan in state.candidates]

    assert sizes(0) == [2, 4, 6, 8]
    state.decisions.append(replace(search.decide(), plan=state.candidates[1]))
    assert sizes(0) == [2, 4, 6, 8], "after the warm-up"
    assert sizes(1) == [4, 6, 8] and state.plan is None
    assert sizes(2) == [4, 6, 8]


@pytest.mark.parametrize(("m", "full_cost"), [(8, 3.0), (6, 2.0)])
def test_what_a_plan_saves_is_forecast_by_the_trials_alone(m, full_cost):
    """Those of a half cost twice what is predicted, and those of all blocks three times; three quarters, twice."""
    search, state = search_between_two()
    half, full = state.candidates
    other = replace(full, trainable=full.trainable[:m])
    state.candidates, state.seconds.score = (half, other), 10.0
    costs = {half: 1.0, other: 3.0 if m == 8 else 1.5}
    for number, plan in enumerate(state.candidates):
        state.trials.append(Trial(candidate=number, loss_before=1.0, loss=1.0 - 1 / (1 + plan.m), cost=costs[plan]))
    decision = search.decide()
    assert (decision.plan, decision.step_cost, decision.full_step_cost) == (half, 1.0, pytest.approx(full_cost))
    assert decision.break_even_step == 10 / (full_cost - 1)


@pytest.mark.parametrize("opening_s", [0.0, 30.0])
def test_a_search_takes_as_many_rounds_as_its_share_pays_for_whatever_timing_plans_took(opening_s):
    """One round of an evaluation and a step of each takes 2.5 s; timing plans is paid once."""
    search, state = search_between_two(search_steps=9, search_share=0.5)
    state.search_cost = opening_s
    decision = search.begin()
    while decision is None:
        number, plan = search.turn()
        trial = Trial(candidate=number, loss_before=1.0, loss=0.9, cost=search.prices.step(plan))
        decision = search.note(trial, trial.cost + search.prices.evaluation())
    assert [found.steps for found in decision.efficiencies] == [8 if opening_s else 9] * 2
    assert decision.search_cost == opening_s + 2.5 * len(state.trials) / 2 <= 50


def test_a_state_of_an_earlier_version_is_read():
    state = search_between_two()[1]
    saved = state.as_json()
    del saved["opening_cost"], saved["stage_flops"]
    state.update(saved)
    assert state.opening_cost == 0 and state.stage_flops == () and state.stage == 0


def test_compiled_blocks_train_alike(monkeypatch):
    # Inductor, the default, gives the same but takes minutes to compile on two cores; each block takes half a second.
    monkeypatch.setattr(blocks, "compile_blocks", functools.partial(blocks.compile_blocks, backend="eager"))
    settings = {"train": {"steps": 8}, "schedule": {"backward": "residual", "search_steps": 1, "stages": 1}}
    few = {"init": {**TINY, "num_layers": 2}}
    plain, compiled = (Run(tiny_experiment(**settings, model=few | {"compile_blocks": each})) for each in (False, True))
    for a, b in zip(plain.steps(), compiled.steps(), strict=True):
        assert a.plan == b.plan and a.loss == pytest.approx(b.loss, rel=1e-4), a.step


def test_every_step_says_what_moments_are_on_the_device(monkeypatch):
    """Also the step that ends a search: its plan may be the one that is trained from then on, and what the others'
    trials left goes to the host. Which moments those are is noted here, where host and device are one."""
    away, follow, count = set(), optimizer.follow, optimizer.state_bytes

    def following(adamw, trained, frozen_state="host"):
        trained = set(trained)
        away.difference_update(trained)
        if frozen_state == "host":
            away.update(set(adamw.state) - trained)
        follow(adamw, trained, frozen_state)

    def on_device(adamw, device):
        there = SimpleNamespace(state={p: state for p, state in adamw.state.items() if p not in away})
        return count(there, device)

    monkeypatch.setattr(optimizer, "follow", following)
    monkeypatch.setattr(optimizer, "state_bytes", on_device)
    for seed in range(3):
        away.clear()
        schedule = {"stages": 3, "memory_budget_bytes": 10**9 if seed == 2 else None}
        run = Run(tiny_experiment(schedule=schedule, train={"steps": 24, "seed": seed}))
        ends = 0
        for step in run.steps():
            if seed == 2:
                foreseen = 2 * run.state.models[step.plan.shape].trained_bytes(step.plan.trainable)
                assert step.optimizer_bytes == pytest.approx(foreseen, rel=0.01) or step.decision, "one plan's alone"
            ends += step.phase == "search" and step.decision is not None and step.plan == step.decision.plan
            assert step.optimizer_bytes == on_device(run.state.optimizer, run.denoiser.device)
    assert ends
