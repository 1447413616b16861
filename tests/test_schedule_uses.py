"""Which settings a schedule makes use of (`Schedule.uses`), held against what is trained under it."""

import pytest

from entprog.config import KINDS, Schedule
from entprog.config.schedule import USED
from entprog.schedule import plans
from helpers.networks import TINY, tiny_experiment
from helpers.runs import Run, comparable

BASE = {
    "table": [{"until": 0.5, "frames": 1, "share": 0.5}, {"until": 1, "share": 0.5}],
    "shapes": [{"frames": 1}],
    "generators": ["count", "suffix", "budget"],
    "cei_threshold": -10.0,
    "search_share": 1.0,
    "search_until_clear": False,
}
OTHER = {
    "table": [{"until": 1, "share": 0.5}],
    "stages": 3,
    "lisa_share": 0.5,
    "candidates": [0.5, 1.0],
    "generators": ["count", "budget"],
    "suffixes": [0.34],
    "budgets": [0.6],
    "shapes": [],
    "tokens": "constant",
    "timestep_shift": "auto",
    "search_steps": 1,
    "search_until_clear": True,
    "search_clips": 1,
    "search_share": 0.0,
    "efficiency": "paper",
    "backward": "residual",
    "cei_threshold": 10.0,
    "monotone": True,
}
"""Of every setting that not all schedules make use of another value than BASE's."""


IN_THE_SEARCH = ("budgets", "search_steps", "search_until_clear", "search_clips", "search_share", "efficiency")
"""Settings of what happens within a search, of kind entprog alone: tests of the search see what they do."""


def experiment(kind: str, *changed: str):
    """With other values of some settings."""
    schedule = {"kind": kind, **BASE, **{name: OTHER[name] for name in changed}}
    network = {"init": {**TINY, "num_layers": 4}}
    return tiny_experiment(model=network, train={"steps": 4, "held_out_every": 4}, schedule=schedule)


def trained(kind: str, *changed: str) -> list:
    """What a tiny run computes, step by step."""
    return [comparable(step) for step in Run(experiment(kind, *changed)).steps()]


def planned(kind: str, *changed: str) -> list:
    """What each stage may train, on how many clips, at which shift of timesteps."""
    one = experiment(kind, *changed)
    schedule = one.schedule.model_copy(update={"generators": tuple(set(one.schedule.generators) - {"budget"})})
    names = [f"blocks.{number}" for number in range(8)]
    priority, now, out = {name: float(number % 3) for number, name in enumerate(names)}, None, []
    for stage in range(len(plans.rows(schedule))):
        found = plans.candidates(names, priority, schedule, one.data.shape, stage, now)
        now = found[-1]
        out.append([(plan, one.batch_size_at(plan.shape), one.timestep_shift_at(plan.shape)) for plan in found])
    return out


def test_the_table_is_of_settings():
    assert set(OTHER) == set(USED) <= set(Schedule.model_fields)
    assert all(experiment("entprog").schedule.uses(name) for name in set(Schedule.model_fields) - set(USED))


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_schedule_makes_no_use_of_changes_nothing(kind):
    idle = [name for name in USED if not experiment(kind).schedule.uses(name)]
    assert idle and trained(kind, *idle) == trained(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_schedule_makes_use_of_changes_something(kind):
    used = {name for name in USED if experiment(kind).schedule.uses(name)}
    assert used.issuperset(IN_THE_SEARCH) == (kind == "entprog") == (not used.isdisjoint(IN_THE_SEARCH))
    assert [name for name in used.difference(IN_THE_SEARCH) if planned(kind, name) == planned(kind)] == []


def test_some_settings_wait_for_another_one():
    schedule = tiny_experiment(schedule={"stages": 1, "shapes": [{"frames": 1}]}).schedule
    assert not any(schedule.uses(name) for name in ("suffixes", "budgets", "shapes", "tokens", "monotone"))
    assert schedule.uses("backward") and not tiny_experiment(schedule={"kind": "full"}).schedule.uses("backward")
    assert tiny_experiment(schedule={"kind": "full", "blocks": "spatial"}).schedule.uses("backward")
