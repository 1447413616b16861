"""Plans: nested, prioritised, within the threshold."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from entprog.config import ClipShape, Schedule
from entprog.schedule.plans import Plan, candidates, full, top

SHAPE = ClipShape()
scores = st.lists(st.floats(-5, 5, allow_nan=False), min_size=1, max_size=20).map(
    lambda values: {f"blocks.{i}": v for i, v in enumerate(values)}
)
fractions = st.lists(st.floats(0.01, 1), min_size=1, max_size=5).map(tuple)


@given(scores, fractions, st.integers(0, 2))
def test_candidates_are_nested_and_distinct(priority, shares, stage):
    schedule = Schedule(candidates=shares, stages=3)
    found = candidates(list(priority), priority, schedule, SHAPE, stage)
    sizes = [plan.m for plan in found]
    assert sizes == sorted(set(sizes)) and sizes[0] >= 1
    for small, large in pairwise(found):
        assert set(small.trainable) < set(large.trainable)


@given(scores, st.integers(1, 20))
def test_top_m_has_the_largest_sum(priority, m):
    names = list(priority)
    plan = top(min(m, len(names)), names, priority, Schedule(), SHAPE)
    chosen = [priority[n] for n in plan.trainable]
    rest = [priority[n] for n in names if n not in plan.trainable]
    assert not rest or min(chosen) >= max(rest)
    assert list(plan.trainable) == [n for n in names if n in plan.trainable]


@given(scores, st.floats(-6, 6))
def test_blocks_below_the_threshold_wait_for_the_last_stage(priority, threshold):
    schedule = Schedule(candidates=(1.0,), stages=2, cei_threshold=threshold)
    names = list(priority)
    above = [n for n in names if priority[n] >= threshold]
    (early,) = candidates(names, priority, schedule, SHAPE, 0)
    (last,) = candidates(names, priority, schedule, SHAPE, 1)
    assert set(early.trainable) == set(above or [max(names, key=lambda n: priority[n])])
    assert last == full(names, SHAPE)


def test_monotone_never_shrinks():
    priority = {f"blocks.{i}": float(i) for i in range(8)}
    schedule = Schedule(candidates=(0.25, 0.5, 1.0), monotone=True)
    now = top(4, list(priority), priority, schedule, SHAPE)
    assert [p.m for p in candidates(list(priority), priority, schedule, SHAPE, 1, now)] == [4, 8]


def test_linear_grows_to_full():
    priority = {f"blocks.{i}": -float(i) for i in range(8)}
    schedule = Schedule(kind="linear", stages=4)
    plans = [candidates(list(priority), priority, schedule, SHAPE, k) for k in range(4)]
    assert [[p.m for p in found] for found in plans] == [[2], [4], [6], [8]]
    assert plans[0][0].trainable == ("blocks.0", "blocks.1")


def test_all_blocks_train_plainly():
    names = ["a", "b"]
    plan = top(2, names, {"a": 1.0, "b": 0.0}, Schedule(backward="residual"), SHAPE)
    assert plan == full(names, SHAPE) and plan.backward == "exact"


@given(st.lists(st.text(min_size=1), max_size=5), st.sampled_from(["exact", "residual"]))
def test_json(names, backward):
    plan = Plan(trainable=tuple(names), backward=backward, shape=SHAPE)
    assert Plan.from_json(plan.as_json()) == plan
