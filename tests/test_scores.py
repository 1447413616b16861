"""Score tables: stability, rounds, prefixes of draws, keys; the same on every rank and never made twice."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from entprog.blocks import blocks
from entprog.config import Priority, Timesteps
from entprog.data import hashing
from entprog.diffusion import losses
from entprog.errors import UserError
from entprog.scoring import cache, cei, priorities, tables
from helpers.networks import latents, tiny_denoiser, tiny_experiment
from pipelines import score


@pytest.fixture
def table(denoiser, found, experiment):
    return cei.cei(denoiser, found, [latents(range(2))], experiment.priority)


def score_with(values, settings):
    """A table of made-up scores: values(condition, draws) → [block]."""

    def one(number):
        return {"made up": np.stack([np.asarray(values(number, mark), float) for mark in tables.marks(settings)])}

    found = tables.measured(lambda: (0, lambda numbers: [one(n) for n in numbers]), settings, "made up")
    names = [SimpleNamespace(name=f"blocks.{i}") for i in range(found.rows[0]["made up"].shape[1])]
    return tables.table(names, found, settings, "made up", key="k")


def test_table_survives_json(table):
    assert tables.ScoreTable.from_json(json.loads(json.dumps(table.as_json(), allow_nan=False))) == table


def test_priorities(table):
    pi = table.scores()
    assert table.priority("signed") == pi
    assert table.priority("absolute") == {name: abs(value) for name, value in pi.items()}
    backwards = replace(table, kind="reverse_cei")
    for sign in ("signed", "absolute"):
        assert backwards.priority(sign) == {name: -value for name, value in table.priority(sign).items()}
    assert replace(table, kind="gradient").priority("absolute") == pi


def test_warnings_say_when_not_to_trust(table):
    assert len(replace(table, signed_absolute_tau=-0.5, halves_tau=0.1).warnings("signed")) == 2
    assert replace(table, signed_absolute_tau=1.0, halves_tau=0.9).warnings("signed") == []
    assert replace(table, signed_absolute_tau=None, halves_tau=0.9).warnings("signed") == []


def test_tau():
    assert tables.tau([1, 2, 3, 4, 5, 6], [1, 20, 30, 40, 50, 60]) == 1
    assert tables.tau([1, 2, 3], [3, 2, 1]) == -1
    assert tables.tau([1, 2, 3], [1, 3, 2]) == pytest.approx(1 / 3)
    assert tables.tau([1.0], [2.0]) == 1 and tables.tau([0, 0], [1, 2]) == 0


def test_drift_is_between_the_rankings_in_use(table):
    blocks = table.blocks
    flipped = replace(table, blocks=tuple(replace(b, score=-b.score) for b in blocks))
    assert tables.drift(table, table, "signed") == 1
    assert tables.drift(table, flipped, "signed") == -1
    assert tables.drift(table, flipped, "absolute") == 1


def test_halves_are_even_and_odd_conditions():
    opposite = score_with(lambda number, _: [1, 2, 3] if number % 2 else [3, 2, 1], Priority(conditions=6, draws=4))
    alike = score_with(lambda number, _: [1, 2, 3 + number], Priority(conditions=6, draws=4))
    assert opposite.halves_tau == -1 and alike.halves_tau == 1


def test_scoring_goes_on_until_the_ranking_is_stable():
    """Odd conditions say the opposite until the 9th: 4 and 8 are too few, 16 are enough of 40."""
    settings = Priority(conditions=40, draws=4, until_stable=0.9)
    values = lambda number, _: [3, 2, 1] if number % 2 and number < 8 else [1, 4, 9]  # noqa: E731
    table = score_with(values, settings)
    assert table.conditions == 16 and table.halves_tau >= 0.9
    assert score_with(values, settings.model_copy(update={"until_stable": None})).conditions == 40


def test_the_draws_given_are_the_most():
    table = score_with(
        lambda number, _: [1, 2, 3] if number % 2 else [3, 2, 1], Priority(conditions=11, draws=4, until_stable=1)
    )
    assert table.conditions == 11


def test_rounds():
    assert tables.rounds(Priority(conditions=40, until_stable=0.8)) == [4, 8, 16, 32, 40]
    assert tables.rounds(Priority(conditions=4, until_stable=0.8)) == [4]
    assert tables.rounds(Priority(conditions=40)) == [40]


@pytest.mark.parametrize(
    ("draws", "conditions", "spread"),
    [(100, 8, (8, 12)), (100, 125, (25, 4)), (1000, 8, (8, 125)), (300, 25, (25, 12)), (100, 2, (2, 50))],
)
def test_draws_are_spread_over_conditions(draws, conditions, spread):
    assert tables.spread(draws, conditions) == spread


def test_tau_at_is_from_a_prefix_of_the_draws_of_every_condition():
    """The ranking turns round at the 13th draw of a condition: with 8 conditions 100 draws are 12 each, 300 are 37."""
    values = lambda _, draws: [1, 2, 3] if draws <= 12 else [3, 2, 1]  # noqa: E731
    assert score_with(values, Priority(conditions=8, draws=125)).tau_at == {"100": -1, "300": 1, "1000": 1}
    assert score_with(values, Priority(conditions=8, draws=12)).tau_at == {}
    stopped = score_with(values, Priority(conditions=100, draws=30, until_stable=0.5))
    assert stopped.conditions == 4 and stopped.tau_at == {"100": 1}


def test_measures_after_some_draws_are_those_of_scoring_with_that_many(denoiser, found, monkeypatch):
    many = Priority(conditions=4, draws=30)
    few = Priority(conditions=4, draws=25)
    assert tables.marks(few) == [25] and tables.marks(many) == [25, 30]
    ranked = []
    monkeypatch.setattr(tables, "table", lambda blocks, found, *_, **__: ranked.append(found.rows[0]))
    for settings in (few, many):
        cei.cei(denoiser, found, [latents(range(4))], settings)
    row, noted = ranked
    for name in row:
        np.testing.assert_allclose(noted[name][0], row[name][0], rtol=0, atol=1e-6)
        assert not np.allclose(noted[name][1], row[name][0], rtol=0, atol=1e-6)


def test_too_few_clips_are_refused(denoiser, found):
    with pytest.raises(ValueError, match=r"priority.conditions is 8, but only 2 clips"):
        cei.cei(denoiser, found, [latents(range(2))], Priority(conditions=8))


def test_key_changes_with_weights_data_and_settings():
    experiment = tiny_experiment()
    a, b = (hashing.content_hash(tiny_denoiser(experiment, seed).network) for seed in (0, 1))
    settings = experiment.priority
    key = tables.table_key(a, "data", settings)
    assert key == tables.table_key(hashing.content_hash(tiny_denoiser(experiment).network), "data", settings)
    for same in ({"sign": "absolute"}, {"rescore": True}, {"kind": "reverse_cei"}):
        assert key == tables.table_key(a, "data", settings.model_copy(update=same))
    others = {tables.table_key(b, "data", settings), tables.table_key(a, "other", settings)}
    others |= {tables.table_key(a, "data", settings, ["bfloat16"])}
    for changed in ({"draws": 16}, {"kind": "gradient"}, {"until_stable": 0.8}, {"estimator": "elementwise"}):
        others |= {tables.table_key(a, "data", settings.model_copy(update=changed))}
    assert key not in others and len(others) == 7


def test_content_hash_tells_apart_what_moved_between_tensors():
    zeros, ones = torch.zeros(2), torch.ones(2)
    assert hashing.content_hash(zeros, ones) != hashing.content_hash(ones, zeros)
    assert hashing.content_hash(zeros) != hashing.content_hash(zeros.bfloat16(), torch.zeros(2, dtype=torch.bfloat16))


def table_of(folder, seed=0, **parts):
    """The kept table, or a new one, of a tiny network, with clips made up."""
    experiment = tiny_experiment(**parts)
    denoiser, dataset = tiny_denoiser(experiment, seed), SimpleNamespace(fingerprint="some clips")
    weights = hashing.content_hash(denoiser.network)
    return cache.table(denoiser, blocks(denoiser.network), dataset, experiment, weights, folder)


@pytest.fixture
def counted(monkeypatch):
    """How often blocks were really scored."""
    calls = []
    score = priorities.score
    monkeypatch.setattr(priorities, "score", lambda *args, **kw: calls.append(args[3].kind) or score(*args, **kw))
    monkeypatch.setattr(cache, "clips", lambda denoiser, dataset, experiment, texts: [latents(range(2))])
    return calls


def test_the_same_weights_are_never_scored_twice(tmp_path, counted):
    first = table_of(tmp_path)
    # Another run, process and schedule: all that decides the scores is the same.
    again = table_of(tmp_path, schedule={"stages": 3}, train={"learning_rate": 0.5})
    assert counted == ["cei"] and again == first
    reverse = table_of(tmp_path, priority={"kind": "reverse_cei"})
    assert counted == ["cei"] and reverse == replace(first, kind="reverse_cei")
    lora = {"train": {"lora": {"rank": 2}}}
    models = ({"model": {"dtype": "bfloat16"}}, {"model": {"attention": "_native_math"}})
    for other in ({"priority": {"kind": "gradient"}}, *models, {"train": {"seed": 1}}, lora):
        table_of(tmp_path, **other)
    table_of(tmp_path, seed=1)
    assert counted == ["cei", "gradient", "cei", "cei", "cei", "cei", "cei"]


def test_draws_until_stable_is_an_option_of_the_score_job(monkeypatch):
    asked = []
    monkeypatch.setattr(score, "explain", lambda experiment, output: asked.append(experiment.priority) or {})
    common = ["--preset", "demo", "--dry-run", "--set", "priority.conditions=125"]
    assert CliRunner().invoke(score.app, [*common, "--draws-until-stable", "0.8"]).exit_code == 0
    assert CliRunner().invoke(score.app, common).exit_code == 0
    assert [(p.conditions, p.until_stable) for p in asked] == [(125, 0.8), (125, None)]
    assert CliRunner().invoke(score.app, [*common, "--draws-until-stable", "1.5"]).exit_code == 2


def test_a_priority_without_data_reads_no_clips():
    experiment = tiny_experiment(priority={"kind": "random"})
    assert cache.clips(tiny_denoiser(experiment), None, experiment) == []


# -- scores that nothing can be ranked by


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        *((kind, "a weight that is not finite") for kind in ("cei", "loss_increase", "gradient", "fisher")),
        ("cei", "a prediction that is the same everywhere"),
    ],
)
def test_scores_that_are_not_finite_are_refused(kind, what):
    denoiser = tiny_denoiser(tiny_experiment())
    if what.startswith("a weight"):
        next(denoiser.network.blocks[2].parameters()).data.fill_(float("inf"))
    else:
        torch.nn.init.zeros_(denoiser.network.proj_out.weight)
        torch.nn.init.zeros_(denoiser.network.proj_out.bias)
    settings = Priority(kind=kind, conditions=2, draws=4)
    with pytest.raises(UserError, match="not finite") as refused:
        priorities.score(denoiser, blocks(denoiser.network), [latents(range(2))], settings)
    assert "priority.kind random" in str(refused.value)


def test_a_kept_table_that_is_not_finite_is_refused(table):
    values = json.loads(json.dumps(table.as_json()))
    values["blocks"][1]["score"] = float("nan")
    with pytest.raises(ValueError, match=r"1 of \d+ blocks are not finite"):
        tables.ScoreTable.from_json(values)


@pytest.mark.parametrize("wrong", [[0.9, 0.1], [-3, 7], [0.5, 0.5], [0.0, 1.5], [float("nan"), 1.0]])
def test_a_range_of_timesteps_that_is_none(wrong):
    with pytest.raises(UserError, match="timestep_range"):
        tiny_experiment(priority={"timestep_range": wrong})


# -- one law of timesteps


LAWS = [
    ({"timestep_shift": 5.0}, 5 * 0.5 / (1 + 4 * 0.5)),
    ({"timesteps": "logit_normal", "timesteps_mean": 1.0, "timesteps_spread": 0.5}, 1 / (1 + np.exp(-1))),
    ({"timesteps": "mode", "timestep_shift": 2.0}, 2 * 0.5 / (1 + 1 * 0.5)),
]


@pytest.mark.parametrize(("train", "middle"), LAWS)
def test_blocks_are_ranked_and_losses_measured_on_the_timesteps_that_are_trained_on(monkeypatch, train, middle):
    """The same quantiles of t, whoever draws them."""
    denoiser, seen = tiny_denoiser(tiny_experiment()), []
    pair = type(denoiser.process).pair
    monkeypatch.setattr(
        type(denoiser.process),
        "pair",
        lambda self, clean, noise, t: (seen.extend(t.tolist()), pair(self, clean, noise, t))[1],
    )
    median, wanted = {}, tiny_experiment(train=train)
    law = wanted.timesteps
    clips = latents(range(64))

    def drawn(work):
        seen.clear()
        with torch.no_grad():
            work()
        return float(np.median(seen))

    median["trained"] = drawn(lambda: losses.training_loss(denoiser, clips, wanted.train, law))
    median["held out"] = drawn(lambda: losses.held_out_loss(denoiser, [clips], 4, 0, law))
    settings = Priority(conditions=16, draws=8)
    median["scored"] = drawn(lambda: list(map(list, (
        cei.draws(denoiser, clips.part(slice(i, i + 1)), i, range(8), settings, 0, law, 8) for i in range(16)
    ))))  # fmt: skip
    for name, value in median.items():
        assert value == pytest.approx(middle, abs=0.06), (name, value)


def test_a_table_belongs_to_its_shift(denoiser, found):
    settings = Priority(conditions=2, draws=4)
    even, shifted = (
        priorities.score(denoiser, found, [latents(range(2))], settings, law=Timesteps(shift=shift)).scores()
        for shift in (1.0, 5.0)
    )
    assert even != shifted


@pytest.mark.parametrize("end", [[], ["--set", "train.seconds=9"], ["--set", "train=3"]])
def test_scoring_asks_for_no_end(end, tmp_path):
    """It trains nothing; what is wrong is said of what was given."""
    done = CliRunner().invoke(score.app, ["--shards", str(tmp_path / "none"), *end, "--dry-run"])
    said = " ".join(done.output.split())
    assert done.exit_code == 2 and "an end" not in said and ("setting train" if "train=3" in end else "none") in said
