"""Plans: nested, prioritised, within the threshold; tables of rows."""

import re
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from entprog import config
from entprog.config import ClipShape, Row, Schedule
from entprog.errors import UserError
from entprog.models.geometry import Geometry
from entprog.schedule.plans import Plan, candidates, fixed, full, ladder, rows, stage_at, top
from helpers.networks import tiny_experiment
from pipelines import train
from pipelines.training import outline

SHAPE = ClipShape()
scores = st.lists(st.floats(-5, 5, allow_nan=False), min_size=1, max_size=20).map(
    lambda values: {f"blocks.{i}": v for i, v in enumerate(values)}
)
fractions = st.lists(st.floats(0.01, 1), min_size=1, max_size=5).map(tuple)


@given(scores, fractions, st.integers(0, 2))
def test_candidates_are_nested_and_distinct(priority, shares, stage):
    schedule = Schedule(kind="entprog", candidates=shares, stages=3)
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
    schedule = Schedule(kind="entprog", candidates=(1.0,), stages=2, cei_threshold=threshold)
    names = list(priority)
    above = [n for n in names if priority[n] >= threshold]
    (early,) = candidates(names, priority, schedule, SHAPE, 0)
    (last,) = candidates(names, priority, schedule, SHAPE, 1)
    assert set(early.trainable) == set(above or [max(names, key=lambda n: priority[n])])
    assert last == full(names, SHAPE)


def test_monotone_never_shrinks():
    priority = {f"blocks.{i}": float(i) for i in range(8)}
    schedule = Schedule(kind="entprog", candidates=(0.25, 0.5, 1.0), monotone=True)
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


# -- schedules without a search

NAMES = [f"blocks.{i}" for i in range(8)]
RANKED = {name: float(i) for i, name in enumerate(NAMES)}
HALF = ClipShape(frames=SHAPE.frames, height=SHAPE.height // 2, width=SHAPE.width // 2, fps=SHAPE.fps)


def table(*rows, **others) -> Schedule:
    return Schedule(kind="progressive", table=rows, **others)


def test_a_table_says_what_each_stage_trains():
    schedule = table(
        {"until": 0.2, "shrink": 2, "share": 0.25, "backward": "residual"},
        {"until": 0.5, "frames": 4, "share": 0.5},
        {"until": 1.0},
        backward="residual",
    )
    small, short, whole = (fixed(NAMES, RANKED, schedule, SHAPE, stage) for stage in range(3))
    assert small == Plan(trainable=("blocks.6", "blocks.7"), backward="residual", shape=HALF)
    assert short == Plan(trainable=tuple(NAMES[4:]), backward="residual", shape=SHAPE.model_copy(update={"frames": 4}))
    assert whole == full(NAMES, SHAPE)
    assert [stage_at(schedule, share) for share in (0, 0.19, 0.2, 0.499, 0.5, 0.99, 1.0)] == [0, 0, 1, 1, 2, 2, 2]
    assert set(ladder(schedule, SHAPE, last=False)) == {small.shape, short.shape, SHAPE}


@given(st.integers(1, 12), st.integers(0, 500), st.integers(1, 500))
def test_stages_of_equal_budget_begin_where_they_always_did(stages, step, steps):
    progress = min(step / steps, 1.0)
    for kind in ("entprog", "linear", "lisa", "badam"):
        number = stage_at(Schedule(kind=kind, stages=stages), progress)
        assert number == min(int(progress * stages), stages - 1) or abs(progress * stages - number) < 1e-9


def test_blocks_by_lot_are_a_function_of_seed_stage_and_draw():
    schedule = table({"until": 0.5, "share": 0.25, "choose": "random", "redraw_every": 3}, {"until": 1.0})
    draws = [fixed(NAMES, RANKED, schedule, SHAPE, 0, draw, seed=4).trainable for draw in range(100)]
    assert draws == [fixed(NAMES, RANKED, schedule, SHAPE, 0, draw, seed=4).trainable for draw in range(100)]
    assert draws != [fixed(NAMES, RANKED, schedule, SHAPE, 0, draw, seed=5).trainable for draw in range(100)]
    assert all(len(set(names)) == 2 for names in draws)
    times = {name: sum(name in names for names in draws) for name in NAMES}
    assert min(times.values()) > 10 and max(times.values()) < 45


@pytest.mark.parametrize("scores", [RANKED, {name: value - 9 for name, value in RANKED.items()}])
def test_lots_are_drawn_by_worth_and_leave_no_block_out(scores):
    schedule = table({"until": 0.5, "share": 0.25, "choose": "weighted", "redraw_every": 1}, {"until": 1.0})
    draws = [fixed(NAMES, scores, schedule, SHAPE, 0, draw).trainable for draw in range(400)]
    times = [sum(name in names for names in draws) for name in NAMES]
    assert min(times) > 25 and times[-1] > 2 * times[0], times


def test_equal_scores_are_drawn_evenly():
    schedule = table({"until": 0.5, "share": 0.25, "choose": "weighted"}, {"until": 1.0})
    assert fixed(NAMES, dict.fromkeys(NAMES, 0.0), schedule, SHAPE, 0).m == 2


@pytest.mark.parametrize(
    ("stages", "shapes", "shrinks"),
    [(4, [2], [2, 2, 1, 1]), (1, [2], [1]), (3, [4, 2], [4, 2, 1]), (2, [4, 2], [2, 1]), (5, [], [1] * 5)],
)
@pytest.mark.parametrize("kind", ["linear", "lisa", "badam"])
def test_schedules_of_equal_stages_go_through_their_shapes(kind, stages, shapes, shrinks):
    schedule = Schedule(kind=kind, stages=stages, shapes=[{"shrink": shrink} for shrink in shapes])
    heights = [fixed(NAMES, RANKED, schedule, SHAPE, stage).shape.height for stage in range(stages)]
    assert heights == [SHAPE.height // shrink for shrink in shrinks]


@pytest.mark.parametrize(
    ("schedule", "ranks"),
    [
        ({"kind": "full"}, False),
        ({"kind": "lisa"}, False),
        ({"kind": "badam"}, False),
        ({"kind": "linear", "stages": 1}, False),
        ({"kind": "linear", "stages": 2}, True),
        ({"kind": "progressive"}, False),
        ({"kind": "progressive", "table": [{"until": 0.5, "share": 0.5}, {"until": 1}]}, True),
        ({"kind": "progressive", "table": [{"until": 0.5, "share": 0.5, "choose": "weighted"}, {"until": 1}]}, True),
        ({"kind": "progressive", "table": [{"until": 0.5, "share": 0.5, "choose": "random"}, {"until": 1}]}, False),
        ({"kind": "entprog"}, True),
        ({"kind": "entprog", "candidates": [1.0], "shapes": [{"shrink": 2}]}, False),
        ({"kind": "entprog", "candidates": [1.0], "generators": ["count", "budget"]}, True),
        ({"kind": "entprog", "candidates": [1.0], "cei_threshold": 0.1}, True),
    ],
)
def test_blocks_are_scored_only_where_they_are_ranked(schedule, ranks):
    assert Schedule(**schedule).needs_scores is ranks


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([], "end at 1"),
        ([{"until": 0.5}], "end at 1"),
        ([{"until": 0.5}, {"until": 0.5}, {"until": 1}], "grow from row to row"),
        ([{"until": 0.7}, {"until": 0.5}, {"until": 1}], "grow from row to row"),
        ([{"until": 0.0}, {"until": 1}], "table"),
        ([{"until": 1.5}], "table"),
        ([{"until": 0.5}, {"until": 1, "shrink": 2}], "last row"),
        ([{"until": 0.5}, {"until": 1, "frames": 2}], "last row"),
        ([{"until": 1, "redraw_every": 5}], "random or weighted"),
        ([{"until": 1, "choose": "best"}], "table"),
        ([{"until": 1, "share": 0}], "table"),
        ([{"until": 1, "sahre": 0.5}], "schedule.table.0.sahre"),
        ([{"share": 0.5}], "table"),
    ],
)
def test_a_table_that_makes_no_sense_is_refused_in_one_line(rows, says):
    with pytest.raises(UserError, match=says) as refused:
        tiny_experiment(schedule={"kind": "progressive", "table": rows})
    assert "\n" not in str(refused.value)


def test_a_table_of_clips_that_cannot_be_cut():
    with pytest.raises(UserError, match=r"schedule\.table.*divided by 5"):
        ladder(table({"until": 0.5, "shrink": 5}, {"until": 1}), SHAPE, last=False)


@pytest.mark.parametrize(
    ("row", "clips"), [({"shrink": 2}, 12), ({"frames": 4}, 6), ({"frames": 3}, 8), ({"frames": 7}, 3), ({}, 3)]
)
def test_tokens_stay_constant_as_clips_shrink(row, clips):
    whole = {"frames": 8, "height": 96, "width": 64, "fps": 12}
    values = {"train": {"steps": 1}, "data": {"shape": whole, "batch_size": 3}}
    shape = Row(until=0.5, **row).of(ClipShape(**whole))
    assert config.build(values).batch_size_at(shape) == 3
    assert config.build({**values, "schedule": {"tokens": "constant"}}).batch_size_at(shape) == clips


def test_clips_of_latents_keep_a_step_s_tokens_or_it_is_said():
    """Wan makes 4n+1 frames n+1: two clips of 41 frames are 22, one of 81 is 21."""
    whole = {"frames": 81, "height": 480, "width": 832, "fps": 16}
    table = [{"until": end, "frames": frames} for end, frames in ((0.25, 41), (0.5, 49), (0.75, 1), (1.0, None))]
    values = {"train": {"steps": 1}, "data": {"shape": whole}, "schedule": {"tokens": "constant", "table": table}}
    layer = torch.nn.Conv3d(16, 8, (1, 2, 2), (1, 2, 2), device="meta")
    source = SimpleNamespace(stream=partial(Geometry(4, 4, 8, (1, 2, 2)).stream, layer), root=None)
    dataset = SimpleNamespace(clips=lambda split: 1000)

    def said(clips):
        wanted = config.build(config.merge(values, {"data": {"batch_size": clips}}))
        sizes = [wanted.batch_size_at(shape) for shape in ladder(wanted.schedule, wanted.data.shape, last=False)]
        lines = outline.notes(wanted, dataset, source)
        return sizes, [re.search(r"step of (\d+) frames .* has ([\d.]+) of", line).groups() for line in lines]

    assert said(1) == ([2, 1, 81, 1], [("49", "0.62"), ("1", "3.86")])
    assert said(3) == ([6, 5, 243, 3], [("1", "3.86")])


@pytest.mark.parametrize(("warmup", "said"), [(19, 0), (20, 1), (30, 1)])
def test_blocks_that_are_drawn_anew_before_they_have_warmed_up_are_said(warmup, said):
    row = {"until": 1.0, "share": 0.25, "choose": "random", "redraw_every": 20}
    values = {"train": {"steps": 100, "block_warmup_steps": warmup}, "schedule": {"table": [row]}}
    dataset, source = SimpleNamespace(clips=lambda split: 100), SimpleNamespace(root=None)
    lines = outline.notes(config.build(values), dataset, source)
    assert [line.startswith(f"Note: train.block_warmup_steps is {warmup}, ") for line in lines] == [True] * said
    searched = outline.notes(config.build(values | {"schedule": {"kind": "entprog"}}), dataset, source)
    assert ["a search tries blocks that are new" in line for line in searched] == [True]


def test_the_timestep_shift_follows_the_number_of_pixels():
    values = {"train": {"steps": 1, "timestep_shift": 3.0}}
    assert config.build(values).timestep_shift_at(HALF) == 3.0
    follows = config.build({**values, "schedule": {"timestep_shift": "auto"}})
    assert follows.timestep_shift_at(HALF) == 1.5 and follows.timestep_shift_at(SHAPE) == 3.0


def test_the_plan_of_work_is_drawn():
    schedule = {
        "kind": "progressive", "tokens": "constant", "backward": "residual",
        "table": [
            {"until": 0.25, "frames": 1, "share": 0.5, "choose": "random", "redraw_every": 10},
            {"until": 0.75, "share": 0.5}, {"until": 1},
        ],
    }  # fmt: skip
    drawn = outline.rows(tiny_experiment(schedule=schedule), blocks=6)
    assert drawn == [
        ("1", "0% to 25%", "1x16x16", "4", "3 of 6 at random, anew every 10 steps", "residual"),
        ("2", "25% to 75%", "2x16x16", "2", "3 of 6 by cei", "residual"),
        ("3", "75% to 100%", "2x16x16", "2", "all 6", ""),
    ]
    for kind in ("full", "entprog", "linear", "lisa", "badam"):
        wanted = tiny_experiment(schedule={"kind": kind})
        assert len(outline.rows(wanted, 6)) == len(rows(wanted.schedule))


def test_a_wrong_table_on_the_command_line(tmp_path):
    given = ["--set", "train.steps=1", "--set", "schedule.kind=progressive", "--shards", str(tmp_path), "--dry-run"]
    wrong = CliRunner().invoke(train.app, [*given, "--set", "schedule.table=[{until: 0.5, shrink: 2}]"])
    assert wrong.exit_code == 2 and "end at 1" in wrong.output
