"""Conditions that training shows some clips without."""

import dataclasses
import math

import pytest
import torch
from safetensors.torch import save_file

from entprog import config, models
from entprog.diffusion import dropping, losses, objectives, sampling
from entprog.errors import UserError
from helpers.families import NAMES
from helpers.families import load as family
from helpers.networks import TINY, latents, tiny_denoiser, tiny_experiment
from helpers.runs import Run, comparable, course
from pipelines.training import checks, outline

NAMES_OF_CONDITIONS = ("text", "reference", "pose")


class Shown:
    """A denoiser that notes which clips it is shown without a condition."""

    def __init__(self, denoiser):
        self.denoiser, self.process, self.text = denoiser, denoiser.process, torch.ones(1, 3, 8)
        self.hidden, self.time_range, self.no_text = {}, objectives.ALL, {}

    def given(self, conditions):
        return None

    def predict(self, noisy, t, conditions):
        self.hidden = {name: ~value.flatten(1).any(1) for name, value in conditions.items()}
        return noisy


@pytest.fixture(scope="module")
def shown():
    return Shown(tiny_denoiser(tiny_experiment()))


def hidden(shown, positions, **train):
    """{condition: bool [B], whether each clip was shown without it}"""
    losses.training_loss(shown, latents(positions), tiny_experiment(train=train).train)
    return shown.hidden


@pytest.mark.parametrize("name", NAMES_OF_CONDITIONS)
@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_the_rate_is_inside_its_binomial_interval(shown, name, rate):
    n = 2000
    counted = int(hidden(shown, range(n), drop={name: rate})[name].sum())
    assert abs(counted - n * rate) < 4 * math.sqrt(n * rate * (1 - rate))


def test_a_drop_is_a_function_of_seed_and_position(shown):
    drop = dict.fromkeys(NAMES_OF_CONDITIONS, 0.5)
    whole = hidden(shown, range(40), drop=drop)
    for parts in ([range(0, 40, 2), range(1, 40, 2)], [range(7), range(7, 40)], [[p] for p in range(40)]):
        for part in parts:
            got = hidden(shown, part, drop=drop)
            assert all(torch.equal(got[name], whole[name][list(part)]) for name in whole)
    other = hidden(shown, range(40), drop=drop, seed=1)
    assert all(not torch.equal(other[name], whole[name]) for name in whole), "of the seed"
    assert not torch.equal(whole["reference"], whole["pose"]) and not torch.equal(whole["text"], whole["pose"])


def test_without_drops_the_network_sees_the_very_batch():
    denoiser, batch = tiny_denoiser(tiny_experiment()), latents(range(4))
    same = dropping.dropped(denoiser, batch, config.Drop(), 0)
    assert same.conditions.keys() == batch.conditions.keys()
    assert all(same.conditions[name] is batch.conditions[name] for name in batch.conditions)


@pytest.mark.parametrize("family_name", NAMES)
@pytest.mark.parametrize("name", NAMES_OF_CONDITIONS)
def test_a_condition_that_is_always_dropped_does_not_matter(family_name, name):
    denoiser, batch = family(family_name), latents(range(2))
    train = tiny_experiment(train={"drop": {name: 1.0}}).train

    def loss(scale, train=train):
        conditions = {n: value * (scale if n == name else 1) for n, value in batch.conditions.items()}
        if name == "text":
            text = torch.linspace(-1, 1, denoiser.text.numel()).view_as(denoiser.text).expand(2, -1, -1)
            conditions["text"] = scale * text
        changed = type(batch)(batch.clean, conditions, batch.position)
        with torch.no_grad():
            return losses.training_loss(denoiser, changed, train)

    assert torch.equal(loss(1.0), loss(7.0))
    if name in denoiser.conditions:
        assert not torch.equal(loss(1.0, tiny_experiment().train), loss(7.0, tiny_experiment().train))


def test_what_belongs_to_a_text_is_dropped_with_it():
    """HunyuanVideo's pooled text: of clips without text none is seen, of the others it is."""
    denoiser, batch = family("hunyuan_video"), latents(range(2))
    text = torch.linspace(-1, 1, denoiser.text.numel()).view_as(denoiser.text)
    pooled = torch.linspace(-1, 1, denoiser.pooled.numel()).view_as(denoiser.pooled)

    def loss(pooled, **drop):
        with torch.no_grad():
            shown = dataclasses.replace(denoiser, text=text, pooled=pooled)
            return losses.training_loss(shown, batch, tiny_experiment(train={"drop": drop}).train)

    assert torch.equal(loss(pooled, text=1.0), loss(0 * pooled, text=1.0))
    assert not torch.equal(loss(pooled), loss(0 * pooled))


def test_a_run_with_drops_resumes_to_the_bit(tmp_path):
    experiment = tiny_experiment(train={"steps": 6, "drop": {"reference": 0.5, "pose": 0.3}}, schedule={"kind": "full"})
    whole = course(Run(experiment), {3: tmp_path})
    assert [comparable(step) for step in Run(experiment, tmp_path).steps()] == whole[3:]
    plain = tiny_experiment(train={"steps": 6}, schedule={"kind": "full"})
    assert [step.loss for step in Run(plain).steps()] != [step["loss"] for step in whole]


def test_guidance_compares_with_what_training_drops_to():
    conditions = {name: torch.ones(1, 2, 2) for name in ("reference", "pose")}
    batch = type(latents([0]))(torch.ones(1, 2, 2), conditions, torch.zeros(1, dtype=torch.int64))
    for name in conditions:
        dropped = dropping.dropped(None, batch, config.Drop(**{name: 1.0}), 0).conditions
        shown = dropping.without(conditions, [other for other in conditions if other != name])
        assert all(torch.equal(dropped[n], shown[n]) for n in conditions)
    assert sampling.without is dropping.without


@pytest.mark.parametrize("value", [-0.1, 1.5, "nan", "often"])
def test_a_share_is_a_share(value):
    with pytest.raises(UserError, match=r"setting train\.drop\.pose: .*, given"):
        tiny_experiment(train={"drop": {"pose": value}})


def test_settings_younger_than_a_run_leave_it_its_identity(monkeypatch):
    monkeypatch.setattr(checks.fingerprints, "base", lambda model: "base")
    dataset = type("Dataset", (), {"fingerprint": "clips"})
    older = checks.deciding(tiny_experiment(), dataset)
    assert not [name for name in older if name in config.ADDED]
    newer = checks.deciding(tiny_experiment(train={"drop": {"pose": 0.1}}), dataset)
    assert newer == older | {"train.drop.pose": 0.1}
    assert set(config.ADDED) <= {name for name, *_ in config.settings_help()}
    names = config.digest(sorted(older))
    assert names == "9e949a64991d3dd0", (
        "a new setting decides what runs compute: add it to config.ADDED, or runs that were begun before are refused"
    )


def test_a_dry_run_says_what_is_dropped(tmp_path):
    drop = {"text": 0.05, "reference": 0.1, "pose": 0.2}
    save_file({"prompt_embeds": torch.ones(3, TINY["text_dim"])}, tmp_path / "text")

    def withheld(experiment):
        return outline.withheld(experiment, models.family("wan").inspect(experiment.model))

    whole = "Without a condition (share of the clips): text of 0.05, reference of 0.1, pose of 0.2."
    fixed = {"model": {"prompt_embeds": str(tmp_path / "text")}}
    for shown in (fixed, {"data": {"text": "caption"}}):
        assert withheld(tiny_experiment(train={"drop": drop}, **shown)) == whole
    assert withheld(tiny_experiment(train={"drop": drop})) == whole.replace("text of 0.05, ", ""), "it is zeros"
    alone = tiny_experiment(model={"conditions": ["reference"]}, train={"drop": {"pose": 0.2}})
    empty = tiny_experiment(data={"text": "empty"}, train={"drop": {"text": 0.2}})
    nothing = tiny_experiment(train={"drop": {"text": 0.2}})
    assert [withheld(each) for each in (empty, alone, nothing, tiny_experiment())] == [None] * 4
