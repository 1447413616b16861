"""Search spaces: every key is a setting, every value builds an experiment, wrong ones are one line."""

import numpy as np
import pytest
from ray import tune

from entprog import config
from entprog.errors import UserError
from helpers.networks import tiny_experiment
from pipelines.sweeping import spaces

BASE = tiny_experiment(data={"shape": {"frames": 4, "height": 32, "width": 32}})
MOMENTS = {"train.frozen_state": tune.choice(["host", "drop"])}
BY_LOT = tiny_experiment(priority={"kind": "random"})
TABLED = config.build(config.merge(BASE.model_dump(), {"schedule": {"kind": "progressive"}}))


@pytest.mark.parametrize("name", spaces.names())
def test_keys_are_settings_and_values_build_experiments(name):
    space = spaces.read(name)
    known = {setting for setting, *_ in config.settings_help()}
    assert set(space) <= known
    assert len(spaces.check(space, TABLED if name == "plans" else BASE)) >= 2 * len(space)
    rng = np.random.RandomState(0)
    for _ in range(20):
        drawn = {setting: domain.sample(random_state=rng) for setting, domain in space.items()}
        flat = config.settings(spaces.applied(BASE, drawn))
        for setting, value in drawn.items():
            wanted = config.settings(spaces.applied(BASE, {setting: value}))[setting]
            assert flat[setting] == wanted
            if not isinstance(value, str):
                assert flat[setting] == pytest.approx(value)


def test_a_setting_that_nobody_uses_is_not_searched():
    of_kind = r"^--space: {} changes nothing here: it is of schedule.kind={}, and that is {}: set it, or leave it out$"
    for space, base, said in [
        ("cei", TABLED, of_kind.format("schedule.cei_threshold", "entprog", "progressive")),
        ("plans", BASE, of_kind.format("schedule.table", "progressive", "entprog")),
        ("candidates", TABLED, of_kind.format("schedule.backward", "entprog or linear or lisa or badam", "prog.*")),
        ({"priority.draws": tune.choice([4])}, TABLED, of_kind.format("priority.draws", "entprog or linear", "prog.*")),
        ({"schedule.budgets": tune.choice(["[0.5]"])}, BASE, "schedule.budgets changes nothing here: train --help-"),
        (MOMENTS, TABLED, of_kind.format("train.frozen_state", "entprog or lisa or badam", "progressive")),
        ("cei", BY_LOT, "^--space: priority.sign changes nothing here: it is of priority.kind=cei or reverse_cei, and "
         "that is random: set it, or leave it out$"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=said):
            spaces.check(spaces.read(space) if isinstance(space, str) else space, base)
    spaces.check(spaces.read("cei,convergence,plans"), TABLED)  # which tries kinds that use them
    spaces.check(spaces.read("convergence,candidates"), TABLED)  # budgets, by a kind and generators that are drawn
    kinds = {"priority.kind": tune.choice(["random", "cei"]), "schedule.kind": tune.choice(["full", "linear"])}
    drawn = {"priority.rescore": tune.choice([False, True]), **MOMENTS}
    spaces.check(kinds | drawn, spaces.applied(BY_LOT, {"schedule.kind": "full", "schedule.stages": 3}))


ROWS = {
    "[{until: 1}]": False,
    "[{until: 0.5, share: 0.5}, {until: 1}]": False,
    "[{until: 0.2, share: 0.3}, {until: 0.5, share: 0.5}, {until: 1, share: 0.5}]": False,
    "[{until: 0.5}, {until: 1, share: 0.5}]": True,
    "[{until: 0.5, share: 0.5, choose: random}, {until: 1, share: 0.5}]": True,
    "[{until: 1, share: 0.5, choose: random, redraw_every: 3}]": True,
    "[{until: 1, choose: random, redraw_every: 3}]": False,
}


@pytest.mark.parametrize(("values", "freezes"), [
    *(({"schedule.kind": "progressive", "schedule.table": table}, freezes) for table, freezes in ROWS.items()),
    ({"schedule.kind": "progressive", "schedule.table": list(ROWS)[2], "priority.rescore": True}, True),
    ({"schedule.kind": "full"}, False), ({"schedule.kind": "lisa"}, True), ({"schedule.kind": "badam"}, True),
    ({"schedule.kind": "lisa", "schedule.stages": 1}, False),
    ({"schedule.kind": "linear", "schedule.stages": 3}, False),
    ({"schedule.kind": "linear", "schedule.stages": 3, "priority.rescore": True}, True),
    ({"schedule.kind": "entprog"}, True), ({"schedule.kind": "entprog", "schedule.candidates": "[1.0]"}, False),
    ({"schedule.kind": "entprog", "schedule.candidates": "[1.0]", "schedule.generators": "[suffix]"}, True),
])  # fmt: skip
def test_moments_of_frozen_blocks_are_of_use_where_a_block_freezes(values, freezes):
    assert spaces.applied(BASE, values).uses("train.frozen_state") == freezes
    assert spaces.applied(BASE, values).uses("train.learning_rate")


def test_what_is_read_of_a_priority_is_what_its_function_takes():
    from entprog.config.experiment import BY_CLIPS, PRIORITY_KINDS, READ_BY
    from entprog.scoring import priorities

    assert set(priorities.KINDS) == set(PRIORITY_KINDS) == {*BY_CLIPS, *priorities.WITHOUT_DATA}
    assert {"kind", *READ_BY} == set(config.Priority.model_fields)


def test_there_are_the_five_and_they_join():
    assert set(spaces.names()) == {"candidates", "cei", "convergence", "optimizer", "plans"}
    joined = spaces.read("cei, convergence,plans,optimizer,candidates")
    assert len(joined) == sum(len(spaces.read(name)) for name in spaces.names())


def test_a_space_of_ones_own(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        "schedule.cei_threshold: {uniform: [0, 0.3]}\ntrain.learning_rate: {loguniform: [1e-5, 1e-3]}\n"
        "schedule.candidates: {choice: [[0.5, 1.0], [1.0]]}\ntrain.gradient_clip: {choice: [1.0, null]}\n"
        "schedule.stages: {randint: [1, 4]}\n"
    )
    space = spaces.read(str(mine))
    assert spaces.in_words(space["train.learning_rate"]) == "1e-05 … 0.001, even over the logarithm"
    assert spaces.applied(
        BASE, {"schedule.candidates": space["schedule.candidates"].categories[0]}
    ).schedule.candidates == (0.5, 1.0)
    assert spaces.ends(space["schedule.stages"]) == [1, 3]
    assert spaces.spread(space["schedule.stages"], 5) == [1, 2, 3]
    assert spaces.spread(space["train.learning_rate"], 3) == pytest.approx([1e-5, 1e-4, 1e-3])
    assert len(spaces.grid(space, 3)) == 3 * 3 * 2 * 2 * 3
    spaces.check(space, BASE)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("schedule.cei_treshold: {uniform: [0, 1]}", "did you mean schedule.cei_threshold"),
        ("schedule.stages: {choice: [0, 2]}", "schedule.stages"),
        ("schedule.stages: {gaussian: [0, 2]}", "schedule.stages needs one of uniform"),
        ("schedule.stages: 3", "schedule.stages needs one of uniform"),
        ("train.learning_rate: {loguniform: [0, 1]}", "train.learning_rate"),
        ("- a", "not a mapping"),
        ("schedule.stages: {uniform: [1, 4]}", "schedule.stages.* a value between 1 and 4.* takes randint"),
        ("schedule.stages: {loguniform: [1, 4]}", "takes randint"),
        ("schedule.stages: {quniform: [1, 4, 0.5]}", "takes randint"),
        ("data.batch_size: {uniform: [2, 8]}", "takes randint"),
        ("schedule.stages: {choice: []}", "needs a list of values"),
        ("schedule.stages: {choice: abc}", "needs a list of values, given 'abc'"),
        ("schedule.stages: {uniform:}", "needs a list of values, given None"),
        ("schedule.cei_threshold: {uniform: [0.3, 0]}", "lowest value first"),
        ("schedule.cei_threshold: {uniform: [0.3, 0.3]}", "lowest value first"),
        ("schedule.stages: {randint: [4, 1]}", "lowest value first"),
        ("schedule.stages: {randint: [1, 4.5]}", "2 whole numbers"),
        ("schedule.stages: {randint: [1]}", "2 whole numbers"),
        ("schedule.cei_threshold: {uniform: [0, 1, 2]}", "2 numbers"),
        ("schedule.cei_threshold: {quniform: [0, 1]}", "3 numbers"),
        ("schedule.cei_threshold: {quniform: [0, 1, 2]}", "step above 0 that fits"),
        ("schedule.cei_threshold: {quniform: [0, 1, 0]}", "step above 0 that fits"),
        ("schedule.cei_threshold: {uniform: [0, .inf]}", "2 numbers"),
        ("schedule.cei_threshold: {uniform: [.nan, 1]}", "2 numbers"),
        ("schedule.cei_threshold: {uniform: [0, yes]}", "2 numbers"),
        ("train.learning_rate: {loguniform: [-1, 1]}", "above 0"),
        ("train.seconds: {choice: [5, 10]}", "train.seconds cannot be searched: trials are compared at equal seconds"),
        ("train.steps: {randint: [5, 10]}", "train.steps cannot be searched"),
        ("train.workers: {choice: [2, 64]}", "train.workers cannot be searched: it says how a trial runs, not what it"),
        ("train.threads: {randint: [1, 9]}", "train.threads cannot be searched"),
        ("data.decode_cpus: {uniform: [1, 9]}", "data.decode_cpus cannot be searched"),
        ("tracking.run_name: {choice: [a, b]}", "tracking.run_name cannot be searched"),
        ("schedule.stages: {randint: [1, 4]}\n\nschedule.stages: {choice: [2]}", "in line 1 and again in line 3"),
    ],
)
def test_wrong_files_are_one_line(tmp_path, text, says):
    mine = tmp_path / "mine.yaml"
    mine.write_text(text)
    with pytest.raises(UserError, match=says) as caught:
        spaces.check(spaces.read(str(mine)), BASE)
    assert "\n" not in str(caught.value)


def test_python_spaces_are_checked_alike():
    for space, says in [
        ({"schedule.stages": tune.uniform(1, 4)}, "takes randint"),
        ({"schedule.stages": tune.choice([])}, "no value to choose from"),
        ({"schedule.cei_threshold": tune.uniform(1, 0)}, "no value to choose from"),
        ({"train.flops": tune.choice([1e9])}, "equal seconds"),
    ]:
        with pytest.raises(UserError, match=says):
            spaces.check(space, BASE)


def test_words_of_a_choice_stay_words(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        "model.prompt_embeds: {choice: [no, auto]}\nmodel.text_encoder: {choice: [010, 2024]}\n"
        "schedule.stages: {quniform: [1, 4, 1]}\nschedule.monotone: {choice: [true, false]}\n"
    )
    space = spaces.read(str(mine))
    assert space["model.prompt_embeds"].categories == ["no", "auto"]
    assert space["model.text_encoder"].categories == ["010", "2024"]
    assert space["schedule.monotone"].categories == [True, False]
    tried = spaces.check(space, BASE)
    assert {one.model.text_encoder for _, one in tried} >= {"010", "2024"}


def test_wrong_names_are_one_line(tmp_path):
    for given, says in {
        "ceii": "did you mean cei",
        "nothing.yaml": "no such settings file",
        "cei,cei": r"schedule\.cei_threshold is in cei and in cei",
        " , ": "names no space",
        "mine.py": "YAML file",
    }.items():
        with pytest.raises(UserError, match=says):
            spaces.read(given)


def test_the_experiments_own_values_are_a_point_of_the_space_or_none():
    space = {"schedule.stages": tune.randint(1, 5), "schedule.candidates": tune.choice(["[0.34, 1.0]", "[1.0]"])}
    assert spaces.own_values(space, BASE) == {"schedule.stages": 2, "schedule.candidates": "[0.34, 1.0]"}
    assert spaces.own_values({**space, "schedule.cei_threshold": tune.uniform(0, 1)}, BASE) == {}, "it is None"


def test_values_of_a_range_in_steps_are_multiples():
    domain = tune.quniform(0, 0.4, 0.1)
    assert spaces.spread(domain, 4) == [0.0, 0.1, 0.3, 0.4] and spaces.spread(domain, 15) == [0, 0.1, 0.2, 0.3, 0.4]
    assert all(value in (0.0, 0.1, 0.2, 0.3, 0.4) for value in spaces.spread(tune.qloguniform(0.1, 0.4, 0.1), 5))
    name = "train.weight_decay"
    own = [spaces.own_values({name: domain}, spaces.applied(BASE, {name: value})) for value in (0.05, 0.3)]
    assert own == [{}, {name: 0.3}]
