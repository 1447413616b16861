"""Plans past the paper: suffixes, budgets, both backwards, smaller clips, memory; and the exact optimum."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from entprog.config import ClipShape, Schedule, Smaller
from entprog.cost.model import BlockCost, CostModel
from entprog.errors import UserError
from entprog.schedule.budget import best_set
from entprog.schedule.plans import candidates, fitting, full, labels

SHAPE = ClipShape()
SEARCH = Schedule(kind="entprog")


def model(passes, below: bool = True, update: float = 0.0) -> CostModel:
    """A cost model from (forward, to activations, to weights) of each block."""
    return CostModel(
        clips=1,
        outside=1.0,
        outside_bytes=0,
        outside_parameter_bytes=0,
        common_bytes=0,
        through_common=False,
        below=below,
        weight_bytes=0,
        update_per_byte=update,
        blocks=tuple(
            BlockCost(
                name=f"b{i}", forward=f, trained=f + a + w, edge=f + w, through=f + a, along=f,
                trained_bytes=3, edge_bytes=3, through_bytes=1, recomputed_bytes=0, through_recomputed_bytes=0,
                parameter_bytes=8,
            )
            for i, (f, a, w) in enumerate(passes)
        ),
    )  # fmt: skip


costs_of_a_block = st.tuples(*[st.floats(0.1, 4)] * 3)
priorities = st.one_of(st.floats(-2, 2), st.sampled_from([-1.0, 0.5, 1.0]))
networks = st.lists(st.tuples(costs_of_a_block, priorities), min_size=1, max_size=8)


@settings(max_examples=150, deadline=None)
@given(networks, st.floats(0.2, 1), st.sampled_from(["exact", "residual"]), st.booleans(), st.sampled_from([0.0, 0.1]))
def test_the_budget_optimum_is_brute_forces(network, share, backward, below, update):
    costs = model([passes for passes, _ in network], below, update)
    priority = {f"b{i}": value for i, (_, value) in enumerate(network)}
    limit = share * costs.step(list(priority), "exact")
    lowest = min(0.0, *priority.values())

    def worth(chosen):
        return sum(priority[name] - lowest for name in chosen)

    sets = [c for m in range(1, len(priority) + 1) for c in itertools.combinations(priority, m)]
    affordable = [c for c in sets if costs.step(c, backward) <= limit * (1 + 1e-9)]
    got = best_set(priority, list(priority), costs, limit, backward)
    if not affordable:
        assert got == ()
        return
    assert costs.step(got, backward) <= limit * (1 + 1e-8)
    assert worth(got) == pytest.approx(max(map(worth, affordable)))


def test_a_deep_network_of_equal_blocks_is_solved_at_once():
    costs = model([(1.0, 1.0, 1.0)] * 60)
    priority = {f"b{i}": ((i * 37) % 61) / 61 + 0.001 * i for i in range(60)}
    chosen = best_set(priority, list(priority), costs, 0.75 * costs.step(list(priority), "exact"), "exact")
    assert set(chosen) == set(sorted(priority, key=lambda n: -priority[n])[: len(chosen)]) and len(chosen) == 14


names = [f"b{i}" for i in range(8)]
scores = {name: float((i * 5) % 8) for i, name in enumerate(names)}


def test_a_suffix_holds_only_the_last_blocks():
    schedule = Schedule(kind="entprog", generators=("suffix",), suffixes=(0.25, 0.5), candidates=(0.125, 0.25))
    *narrow, whole = candidates(names, scores, schedule, SHAPE, 0)
    assert whole == full(names, SHAPE)
    assert {plan.trainable for plan in narrow} == {("b6",), ("b6", "b7"), ("b4", "b6")}


@given(
    st.lists(st.sampled_from(["count", "suffix", "budget"]), min_size=1, max_size=3, unique=True).map(tuple),
    st.sampled_from(["exact", "residual", ("exact", "residual")]),
    st.booleans(),
    st.integers(0, 1),
)
def test_candidates_are_distinct_and_full_training_is_the_last(generators, backward, smaller, stage):
    shapes = (Smaller(frames=4), Smaller(shrink=2)) if smaller else ()
    schedule = Schedule(kind="entprog", generators=generators, backward=backward, stages=2, shapes=shapes)
    ladder = [SHAPE, *(step.of(SHAPE) for step in shapes)]
    models = {shape: model([(1.0, 1.0, 1.0)] * 8) for shape in ladder}
    found = candidates(names, scores, schedule, SHAPE, stage, models=models)
    assert len(set(found)) == len(found) == len(set(labels(found)))
    assert found[-1] == full(names, SHAPE)
    assert {plan.shape for plan in found} == (set(ladder) if stage == 0 else {SHAPE})
    if "count" in generators and backward != "exact":
        assert any(plan.backward == "residual" for plan in found)


@pytest.mark.parametrize("narrow", [{"generators": ["suffix"], "suffixes": [0.25]}, {"generators": ["budget"]}])
def test_where_generators_make_nothing_of_blocks_above_the_threshold_the_highest_is_tried(narrow):
    schedule = Schedule(kind="entprog", stages=2, cei_threshold=7, budgets=[0.05], backward="residual", **narrow)
    models = {SHAPE: model([(1.0, 1.0, 1.0)] * 8)}
    early, late = ([p.trainable for p in candidates(names, scores, schedule, SHAPE, s, models=models)] for s in (0, 1))
    assert early == [("b3",)] and late[-1] == tuple(names)


def test_labels_are_the_number_of_blocks_where_that_says_it_all():
    assert labels(candidates(names, scores, SEARCH, SHAPE, 0)) == ["m2", "m4", "m6", "m8"]


def test_a_memory_budget_keeps_what_fits_and_says_what_it_is():
    found = candidates(names, scores, SEARCH, SHAPE, 0)
    fit, line = fitting(found, lambda plan: plan.m * 10**9, 6 * 10**9)
    assert [plan.m for plan in fit] == [2, 4, 6]
    assert "3 of 4 plans fit 6 GB" in line and "6 of 8 blocks" in line
    with pytest.raises(UserError, match=r"trains 2 block\(s\) and needs 2 GB"):
        fitting(found, lambda plan: plan.m * 10**9, 10**9)
    assert fitting(found, lambda plan: 1 / 0, None) == (found, "")


@pytest.mark.parametrize("step", [Smaller(frames=99), Smaller(shrink=5), Smaller(shrink=32)])
def test_a_ladder_that_does_not_fit_the_clips(step):
    with pytest.raises(UserError, match=r"schedule\.shapes"):
        step.of(SHAPE)


def test_the_command_line_takes_a_memory_budget(tmp_path):
    from typer.testing import CliRunner

    from pipelines import train

    settings = ["--set", "train.steps=1", "--shards", str(tmp_path), "--dry-run"]
    wrong = CliRunner().invoke(train.app, ["--memory-budget", "12 elephants", *settings])
    assert wrong.exit_code == 2 and "setting schedule.memory_budget_bytes:" in wrong.output
    right = CliRunner().invoke(train.app, ["--memory-budget", "24GB", *settings])
    assert (
        right.exit_code == 2 and "setting schedule.memory_budget_bytes:" not in right.output
    )  # on to the next mistake: no shards here
