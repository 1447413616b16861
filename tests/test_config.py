"""Settings: one spelling, merged part by part, wrong ones refused with the close match."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from entprog import config
from entprog.errors import UserError
from pipelines import cli

names = st.sampled_from(["a", "b", "c"])
nested = st.recursive(st.integers(), lambda inner: st.dictionaries(names, inner, max_size=3), max_leaves=8)
mappings = st.dictionaries(names, nested, max_size=3)


@given(mappings, mappings)
def test_merging_keeps_what_is_not_named_and_takes_what_is(base, over):
    merged = config.flat(config.merge(base, over))
    for name, value in config.flat(over).items():
        assert merged[name] == value
    assert config.merge(base, {}) == base and config.merge(base, base) == base


def test_an_empty_part_takes_nothing_away():
    assert config.merge({"data": {"shape": {"frames": 5}}}, {"data": {"shape": {}}}) == {
        "data": {"shape": {"frames": 5}}
    }


def test_model_init_is_one_value():
    assert config.merge({"model": {"init": {"a": 1}}}, {"model": {"init": {}}}) == {"model": {"init": {}}}


@pytest.mark.parametrize("name", config.presets(cli.PRESETS))
def test_every_preset_builds_and_survives_its_own_json(name):
    experiment = cli.experiment(name, None, None)
    assert experiment.name == name
    assert config.build(experiment.model_dump(mode="json")) == experiment


def test_order_of_precedence(tmp_path):
    (tmp_path / "a.yaml").write_text("train: {steps: 7, learning_rate: 1e-3}")
    experiment = cli.experiment("demo", [tmp_path / "a.yaml"], ["train.steps=9"], train={"steps": 8, "seed": 3})
    assert (experiment.train.steps, experiment.train.seed, experiment.train.learning_rate) == (9, 3, 1e-3)


def test_every_setting_is_explained():
    assert all(meaning for _, _, _, meaning in config.settings_help())


@pytest.mark.parametrize(
    ("pairs", "told"),
    [
        (["train.step=4"], "did you mean train.steps"),
        (["cei_threshold=4"], "did you mean schedule.cei_threshold"),
        (["train.steps"], "has no value"),
        (["train.steps=[1"], "not a YAML value"),
        (["train.steps=many"], "setting train.steps"),
        (["train=4", "train.steps=4"], "already given"),
        (["schedule.candidates=[0.5,2]"], "setting schedule.candidates"),
    ],
)
def test_wrong_settings_are_one_line(pairs, told):
    with pytest.raises(UserError) as error:
        cli.experiment("demo", None, pairs)
    assert told in str(error.value) and "\n" not in str(error.value)
