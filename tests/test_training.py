"""fit(): frozen parameters never move, a resumed run equals an uninterrupted one, the search keeps to its share."""

import dataclasses
import itertools
import math
import time
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode

from entprog import config
from entprog.errors import UserError
from entprog.schedule.prices import Prices
from entprog.schedule.state import TENSORS, RunState
from entprog.training import checkpoint
from entprog.training.fit import DivergedError, fit
from helpers.networks import batches, latents, tiny_experiment
from helpers.runs import Run, comparable, course, differing
from pipelines.training import expectation


@pytest.mark.parametrize("backward", ["exact", "residual"])
def test_frozen_parameters_never_move(backward):
    run = Run(tiny_experiment(schedule={"backward": backward, "outside": "conditions"}, train={"weight_decay": 0.1}))
    before = run.weights()
    narrow = 0
    for step in run.steps():
        after = run.weights()
        for name in after:
            moved = not torch.equal(after[name], before[name])
            trained = name.startswith(("patch_embedding", *(b + "." for b in step.plan.trainable)))
            assert trained or not moved, (step.step, name)
        narrow += step.plan.m < len(run.found)
        before = after
    assert narrow > 0


STOPS = (1, 3, 5, 12, 20)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """(experiment, steps, run, its checkpoints)"""
    folder = tmp_path_factory.mktemp("stops")
    experiment = tiny_experiment(
        train={"ema_decay": 0.9, "held_out_shares": [0.23]}, model={"gradient_checkpointing": True},
        schedule={"memory_budget_bytes": 10**9},
    )  # fmt: skip
    whole = Run(experiment)
    return experiment, course(whole, {stop: folder / str(stop) for stop in STOPS}), whole, folder


@pytest.mark.parametrize("stop_at", STOPS)
def test_resume_equals_no_interruption(stop_at, uninterrupted):
    experiment, expected, whole, folder = uninterrupted
    second = Run(experiment, folder / str(stop_at))
    assert [comparable(step) for step in second.steps()] == expected[stop_at:]
    assert not differing(whole.weights(), second.weights())
    for name, tensor in whole.state.ema.items():
        assert torch.equal(tensor, second.state.ema[name]), name


def test_the_loss_at_a_share_of_the_budget_is_known(uninterrupted):
    """Before and after it: step 5 ends at 0.21 of the budget, step 6 at 0.25."""
    assert [step["step"] for step in uninterrupted[1] if step["held_out_loss"] is not None] == [1, 5, 6, 8, 16, 24]


def test_two_runs_are_bit_identical_on_the_flops_clock():
    a, b = Run(tiny_experiment()), Run(tiny_experiment())
    assert [comparable(s) for s in a.steps()] == [comparable(s) for s in b.steps()]


def test_every_stage_decides_and_all_costs_are_charged():
    run = Run(tiny_experiment(schedule={"search_until_clear": False}))
    steps = list(run.steps())
    decisions = [s.decision for s in steps if s.decision]
    assert [d.stage for d in decisions] == [0, 1] == [d.stage for d in run.state.decisions]
    searched = [s for s in steps if s.phase == "search"]
    assert len(searched) == 2 * 2 * 2  # stages × candidates × search steps
    for stage in (0, 1):
        trained = {s.plan for s in steps if s.stage == stage and s.phase == "train"}
        assert trained == {decisions[stage].plan}
    seconds = run.state.seconds
    assert seconds.score == 0.5 and seconds.search > 0 and seconds.train > 0
    assert steps[-1].charged_s == seconds.total >= sum(s.seconds for s in steps) + 0.5
    assert run.state.flops.search > sum(d.search_cost for d in decisions) * 0.99


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5])
def test_search_keeps_to_its_share(share):
    run = Run(tiny_experiment(schedule={"search_share": share, "search_steps": 50}, train={"steps": 60}))
    steps = list(run.steps())
    full = run.state.flops.train + run.state.flops.search
    assert run.state.flops.search <= share * full * 1.6 + 1e-9  # the budget is of full training, plans are cheaper
    for decision in run.state.decisions:
        budget = share * 30 * _full_step_flops(run)
        assert decision.search_cost <= budget
    assert steps[-1].step == 60


def _full_step_flops(run):
    """FLOPs of one full update, from a plain run of one step."""
    plain = Run(
        config.build(config.merge(run.experiment.model_dump(), {"train": {"steps": 1}, "schedule": {"kind": "full"}}))
    )
    list(plain.steps())
    return plain.state.flops.train


def test_what_is_left_of_a_budget_of_steps_is_counted_over_stages_of_any_cost(tmp_path, monkeypatch):
    table = [{"until": 0.5, "frames": 1, "share": 0.34}, {"until": 0.75, "share": 0.34}, {"until": 1}]
    experiment = tiny_experiment(schedule={"kind": "progressive", "table": table}, train={"steps": 8})
    run, left = Run(experiment), []
    for step in run.steps():
        left.append((step.flops, step.flops_left))
        if step.step == 5:
            checkpoint.save(tmp_path, run.denoiser.network, run.state, "id", keep=1)
    costs = [b - a for (a, _), (b, _) in itertools.pairwise(left)]
    assert 2 * costs[0] < costs[4] < costs[6], "no stage costs as much as another"
    assert [all_ for all_, _ in left] == pytest.approx([left[-1][0] - rest for _, rest in left]) and left[-1][1] == 0
    again = Run(experiment, tmp_path)
    counted, count = [], Prices.counted
    monkeypatch.setattr(Prices, "counted", lambda prices, plan: counted.append(plan.shape) or count(prices, plan))
    resumed = [(step.flops, step.flops_left, set(counted)) for step in again.steps()]
    assert resumed[0][2] == {again.state.decisions[1].plan.shape}, "of other stages it is known"
    assert [step[:2] for step in resumed] == left[5:]
    (by_flops,) = Run(tiny_experiment(train={"steps": None, "flops": 1.0}, schedule={"kind": "full"})).steps()
    assert by_flops.flops_left is None


def test_plain_training_is_the_same_path_without_search():
    experiment = tiny_experiment(schedule={"kind": "full"})
    run = Run(experiment)
    steps = list(run.steps())
    assert {s.plan.m for s in steps} == {6} and {s.phase for s in steps} == {"train"}
    assert steps[-1].held_out_loss < steps[0].held_out_loss


def test_linear_schedule_grows():
    run = Run(tiny_experiment(schedule={"kind": "linear", "stages": 3}))
    steps = list(run.steps())
    assert [d.plan.m for d in (s.decision for s in steps) if d] == [2, 4, 6]
    moments = [next(s.optimizer_bytes for s in steps if s.plan.m == m) for m in (2, 4, 6)]
    two_blocks = sum(2 * p.nbytes + 4 for block in run.found[:2] for p in block.module.parameters())
    assert moments[1] - moments[0] == moments[2] - moments[1] == two_blocks


def test_a_seconds_budget_ends_the_run():
    experiment = tiny_experiment(train={"steps": None, "seconds": 1.5}, schedule={"clock": "seconds"})
    run = Run(experiment)
    steps = list(run.steps())
    assert steps[-1].last and run.state.seconds.total >= 1.5
    assert all(step.charged_s < 1.5 for step in steps[:-1]), "the first step past the budget is the last"


@pytest.mark.parametrize("schedule", [{}, {"kind": "linear", "stages": 3}], ids=["search", "linear"])
def test_rescoring_at_a_stages_start_is_charged_and_its_drift_told(schedule):
    """The last stage of three trains all blocks: nothing is ranked for it."""
    experiment = tiny_experiment(priority={"rescore": True}, schedule=schedule)
    assert expectation.scoring_forwards(experiment, 6) == 2 * expectation.scoring_forwards(tiny_experiment(), 6) > 0
    run = Run(experiment)
    steps = list(run.steps())
    message = [(s.stage, s.drift) for s in steps if s.drift is not None]
    assert [stage for stage, _ in message] == [1] and -1 <= message[0][1] <= 1
    assert run.state.flops.score == pytest.approx(2 * run.table.flops)
    assert run.state.seconds.score > run.table.seconds


def test_learning_rate_warms_up_and_cools_down():
    experiment = tiny_experiment(train={"warmup_steps": 4, "cooldown_share": 0.5}, schedule={"kind": "full"})
    rates = [step.learning_rate for step in Run(experiment).steps()]
    assert rates[:4] == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3])
    assert rates[12:] == pytest.approx([1e-3 * (24 - i) / 12 for i in range(12, 24)])


def test_a_finished_run_yields_nothing(tmp_path):
    run = Run(tiny_experiment(train={"steps": 2}))
    list(run.steps())
    checkpoint.save(tmp_path, run.denoiser.network, run.state, "id", keep=1)
    assert list(Run(run.experiment, tmp_path).steps()) == []


def test_loss_is_finite_in_bfloat16_with_checkpointing():
    experiment = tiny_experiment(
        model={"dtype": "bfloat16", "gradient_checkpointing": True}, schedule={"backward": "residual"}
    )
    assert all(math.isfinite(s.loss) for s in Run(experiment).steps())


class Odd:
    """The run's clips, those of some updates (0-based) spoilt."""

    def __init__(self, experiment, updates, what):
        self.source, self.updates, self.what = batches(experiment), updates, what
        self.size = experiment.data.batch_size

    def __call__(self, shape, position):
        for batch in self.source(shape, position):
            if int(batch.position[0]) // self.size in self.updates:
                where = batch.conditions["pose"] if self.what == "condition" else batch.clean
                where[0, 0, 0, 0, 0] = {"nan": math.nan, "inf": math.inf, "huge": 1e30}.get(self.what, math.nan)
            yield batch


def odd_steps(run, updates, what="nan"):
    source, sample = Odd(run.experiment, updates, what), latents([0, 1])
    return fit(run.denoiser, run.found, source, run.held_out, sample, run.table, run.experiment, run.state)


@pytest.mark.parametrize("what", ["nan", "inf", "huge", "condition"])
def test_an_update_that_is_not_finite_changes_nothing_and_is_counted(what):
    """The first update is a step of a search, the eleventh of training."""
    run = Run(tiny_experiment(train={"ema_decay": 0.9, "steps": 14}))

    def everything():
        return {name: tensor.clone() for name, tensor in checkpoint.contents(run.denoiser.network, run.state).items()}

    before, skipped, phases = everything(), [], set()
    for step in odd_steps(run, {0, 10}, what):
        after = everything()
        if step.skipped:
            skipped.append((step.step, step.skipped_updates))
            phases.add(step.phase)
            same = after.keys() == before.keys() and all(torch.equal(after[n], before[n]) for n in before)
            assert same and not (math.isfinite(step.loss) and math.isfinite(step.gradient_norm))
        assert all(tensor.isfinite().all() for tensor in after.values())
        before = after
    assert skipped == [(1, 1), (11, 2)] and phases == {"search", "train"}
    assert math.isfinite(step.loss) and math.isfinite(step.held_out_loss) and run.state.skipped == 2


def test_updates_in_a_row_that_are_not_finite_end_the_run(tmp_path):
    experiment = tiny_experiment(train={"max_nonfinite": 3}, schedule={"kind": "full"})
    run, done = Run(experiment), []
    with pytest.raises(DivergedError, match=r"3 updates in a row, up to step 7 .train\.max_nonfinite=3"):
        done.extend(step.skipped for step in odd_steps(run, {1, 2, 4, 5, 6}))
    assert done == [False, True, True, False, True, True, True], "a good one in between counts anew"
    checkpoint.save(tmp_path, run.denoiser.network, run.state, "id", keep=1)
    with pytest.raises(DivergedError, match="step 7"):
        next(Run(experiment, tmp_path).steps())
    more = tiny_experiment(train={"max_nonfinite": 4}, schedule={"kind": "full"})
    assert next(Run(more, tmp_path).steps()).step == 8


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay", "timestep_shift", "seconds", "gradient_clip"])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_settings_are_finite(name, value):
    with pytest.raises(UserError, match=rf"train\.{name}.*finite"):
        tiny_experiment(train={name: value}, schedule={"clock": "seconds"})


def test_every_field_of_the_state_is_saved_and_comes_back_the_same(tmp_path):
    """In the middle of a search and after it; a value that is not finite too."""
    run = Run(tiny_experiment(schedule={"backward": ["exact", "residual"]}))
    for step in odd_steps(run, {2}):
        if step.step in (3, 20):
            run.state.loss_now = -math.inf
            checkpoint.save(tmp_path, run.denoiser.network, run.state, "id", keep=1)
            again = Run(run.experiment, tmp_path).state
            for name in {field.name for field in dataclasses.fields(RunState)} - {*TENSORS}:
                assert getattr(again, name) == getattr(run.state, name), name
            assert again.skipped == 1 and again.trials and again.models and again.as_json() == run.state.as_json()
            run.state.loss_now = None


def test_flops_clock_and_seconds_budget_do_not_mix():
    with pytest.raises(UserError, match=r"schedule\.clock"):
        config.build({"train": {"seconds": 5}, "schedule": {"clock": "flops"}})


def test_runs_of_other_seeds_are_measured_alike():
    def first(**parts):
        still = {"learning_rate": 1e-12, "steps": 1}  # what is measured is the network as it was loaded
        experiment = tiny_experiment(**config.merge({"train": still, "schedule": {"kind": "full"}}, parts))
        return next(iter(Run(experiment).steps())).held_out_loss

    assert first(train={"seed": 1}) == pytest.approx(first(), rel=1e-6)
    assert first(data={"held_out_seed": 1}) != pytest.approx(first(), rel=1e-6)


def test_moving_moments_from_draw_to_draw_is_charged(monkeypatch):
    from entprog.training import fit as fit_module
    from entprog.training import optimizer

    late, follow = [0.0], optimizer.follow

    def slowly(*given):
        late[0] += 1000.0
        follow(*given)

    monkeypatch.setattr(optimizer, "follow", slowly)
    monkeypatch.setattr(fit_module, "time", SimpleNamespace(perf_counter=lambda: time.perf_counter() + late[0]))
    row = {"until": 1, "share": 0.34, "choose": "random", "redraw_every": 2, "backward": "residual"}
    run = Run(tiny_experiment(train={"steps": 6}, schedule={"kind": "progressive", "table": [row]}))
    steps = list(run.steps())
    assert len({step.plan for step in steps}) == 3
    assert late[0] <= run.state.seconds.train < late[0] + 1000.0 and max(step.seconds for step in steps) < 1000.0


def test_an_evaluation_costs_the_clips_that_are_there():
    """Four, of as many as are asked for."""

    def searched(asked):
        schedule = {"search_clips": 64, "search_share": 0.9}
        run = Run(tiny_experiment(data={"held_out_clips": asked}, train={"steps": 12}, schedule=schedule))
        list(run.steps())
        return run.state.flops.search

    assert searched(64) == searched(4) > 0


def test_counting_a_plan_is_no_part_of_its_first_update(monkeypatch):
    from entprog.schedule.prices import Prices
    from entprog.training import fit as fit_module

    late, counted = [0.0], Prices.counted

    def slowly(prices, plan):
        late[0] += 1000.0 * (plan not in prices.counts)
        return counted(prices, plan)

    monkeypatch.setattr(Prices, "counted", slowly)
    monkeypatch.setattr(fit_module, "time", SimpleNamespace(perf_counter=lambda: time.perf_counter() + late[0]))
    run = Run(tiny_experiment(train={"steps": 2}, schedule={"kind": "full"}))
    assert max(step.seconds for step in run.steps()) < 1000.0 <= late[0]


class Looks(TorchFunctionMode):
    """How often the host reads what was computed, and waits for a device; whole numbers (positions) lie on the host."""

    def __init__(self):
        super().__init__()
        self.read = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        names = ("item", "tolist", "__float__", "__int__", "__bool__")
        if getattr(function, "__name__", "") in names:
            self.read += args[0].is_floating_point()
        return function(*args, **(kwargs or {}))


def test_a_step_and_a_held_out_loss_are_each_read_once(monkeypatch):
    """However many clips are held out, and finite or not; the run's clock, which waits as well, is asked five times."""
    from entprog.training.fit import _Fit

    asked, now = [], _Fit.now
    monkeypatch.setattr(_Fit, "now", lambda run: asked.append(1) or now(run))
    run = Run(tiny_experiment(train={"steps": 9, "held_out_every": 4}, schedule={"kind": "full"}))
    run.held_out = run.held_out * 5
    reads, clocks = [], []
    steps = run.steps()
    for _ in range(9):
        asked.clear()
        with Looks() as looks:
            next(steps)
        reads.append(looks.read)
        clocks.append(len(asked))
    assert reads[1:] == [1, 1, 2, 1, 1, 1, 2, 2]
    assert clocks[2:] == [5] * 7
