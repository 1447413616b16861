"""CEI: replay equals the naive pass to the bit, both estimators are what they claim, the table survives JSON."""

import json

import numpy as np
import pytest
import torch
from conftest import latents, tiny_denoiser, tiny_experiment

from entprog import cei, objectives
from entprog.blocks import skipped
from entprog.config import Priority


@pytest.fixture
def table(denoiser, found, experiment):
    return cei.cei(denoiser.predict, found, [latents(range(2))], experiment.priority)


def test_replayed_scores_equal_naive_scores(denoiser, found, experiment):
    batch = [latents(range(2))]
    replayed = cei.cei(denoiser.predict, found, batch, experiment.priority)
    naive = cei.cei(denoiser.predict, found, batch, experiment.priority, replay=False)
    assert replayed.blocks == naive.blocks
    assert replayed.per_condition == naive.per_condition


def test_replayed_predictions_equal_naive_predictions_and_run_each_block_less(denoiser, found):
    batch = latents(range(2))
    ran = []
    for block in found:
        block.module.ffn.register_forward_hook(lambda *_: ran.append(1))
    t = torch.tensor([0.3, 0.6])

    def passes(replay):
        ran.clear()
        with torch.no_grad():
            run = lambda: denoiser.predict(batch.clean, t, batch.conditions)  # noqa: E731
            return list(cei._skip_passes(run, found, replay)), len(ran)

    (replayed, fewer), (naive, more) = passes(True), passes(False)
    assert all(torch.equal(a, b) for a, b in zip(replayed, naive, strict=True))
    blocks = len(found)
    assert more == blocks * blocks and fewer == blocks + blocks * (blocks - 1) // 2


def test_score_is_the_papers_formula(denoiser, found, experiment, table):
    """One block, from scratch: π = mean over c of log σ_skip(b) / σ, σ over elements and draws."""
    settings = experiment.priority
    low, high = settings.timestep_range
    logs, losses = [], []
    for condition in range(2):
        clip = latents([condition])
        numbers = torch.arange(settings.draws) + condition * settings.draws
        t = low + (high - low) * objectives.timesteps(numbers, settings.seed)
        clean = clip.clean.expand(settings.draws, -1, -1, -1, -1)
        noisy, target = objectives.flow_pair(clean, objectives.noise_like(clean, numbers, settings.seed), t)
        given = {k: v.expand(settings.draws, -1, -1, -1, -1) for k, v in clip.conditions.items()}
        with torch.no_grad():
            whole = denoiser.predict(noisy, t, given).double()
            with skipped(found[2]):
                without = denoiser.predict(noisy, t, given).double()
        logs.append(np.log(without.std(correction=0) / whole.std(correction=0)))
        losses.append(((without - target) ** 2).mean() - ((whole - target) ** 2).mean())
    assert table.blocks[2].pi_std == pytest.approx(float(np.mean(logs)), abs=1e-6)
    assert table.blocks[2].loss_increase == pytest.approx(float(np.mean(losses)), abs=1e-6)


def test_elementwise_estimator(denoiser, found, experiment):
    settings = experiment.priority.model_copy(update={"estimator": "elementwise"})
    table = cei.cei(denoiser.predict, found, [latents(range(2))], settings)
    assert table.pi() == {b.name: b.pi_elementwise for b in table.blocks}


def test_more_conditions_do_not_change_the_earlier_ones(denoiser, found, experiment):
    few = cei.cei(denoiser.predict, found, [latents(range(2))], experiment.priority)
    more = cei.cei(
        denoiser.predict, found, [latents(range(4))], experiment.priority.model_copy(update={"conditions": 4})
    )
    assert more.per_condition[:2] == few.per_condition


def test_scoring_leaves_the_network_as_it_was(denoiser, found, experiment):
    before = cei.weights_hash(denoiser.network)
    cei.cei(denoiser.predict, found, [latents(range(2))], experiment.priority)
    assert cei.weights_hash(denoiser.network) == before
    assert all("forward" not in b.module.__dict__ for b in found)


def test_table_survives_json(table):
    assert cei.ScoreTable.from_json(json.loads(json.dumps(table.as_json()))) == table


def test_absolute_priority(table):
    assert table.priority("absolute") == {name: abs(value) for name, value in table.pi().items()}


def test_key_changes_with_weights_data_and_settings():
    experiment = tiny_experiment()
    a, b = tiny_denoiser(experiment), tiny_denoiser(experiment, seed=1)
    settings = experiment.priority
    key = cei.table_key(a.network, "data", settings)
    assert key == cei.table_key(a.network, "data", settings)
    assert key == cei.table_key(a.network, "data", settings.model_copy(update={"sign": "absolute"}))
    others = {
        cei.table_key(b.network, "data", settings),
        cei.table_key(a.network, "other", settings),
        cei.table_key(a.network, "data", Priority(draws=16)),
    }
    assert key not in others and len(others) == 3


def test_warnings_say_when_not_to_trust(table):
    bad = cei.ScoreTable(**{**vars(table), "signed_absolute_tau": -0.5, "halves_tau": 0.1})
    assert len(bad.warnings("signed")) == 2
    good = cei.ScoreTable(**{**vars(table), "signed_absolute_tau": 1.0, "halves_tau": 0.9})
    assert good.warnings("signed") == []
