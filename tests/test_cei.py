"""CEI: replay equals the naive pass to the bit, both estimators are what they claim, whatever type and compiler."""

import numpy as np
import pytest
import torch

from entprog.blocks import blocks, skipped
from entprog.config import Priority
from entprog.cost import counting
from entprog.data import hashing
from entprog.diffusion import objectives
from entprog.scoring import cei, tables
from helpers.networks import TINY, latents, tiny_denoiser, tiny_experiment


@pytest.fixture
def table(denoiser, found, experiment):
    return cei.cei(denoiser, found, [latents(range(2))], experiment.priority)


def test_replayed_scores_equal_naive_scores(denoiser, found, experiment):
    batch = [latents(range(2))]
    replayed = cei.cei(denoiser, found, batch, experiment.priority)
    naive = cei.cei(denoiser, found, batch, experiment.priority, replay=False)
    assert replayed.blocks == naive.blocks
    assert replayed.per_condition == naive.per_condition


def test_where_blocks_outputs_do_not_fit_scoring_is_naive(denoiser, found, experiment, monkeypatch):
    """Those of a batch of two draws: bytes that were seen, three quarters of what is free."""
    batch, seen = [latents(range(2))], []
    forward = found[0].module.register_forward_hook(lambda module, args, out: seen.append(out.nbytes // len(out)))
    cei.cei(denoiser, found, batch, experiment.priority)
    forward.remove()
    needed = 2 * seen[0] * len(found)
    ran = []
    found[0].module.ffn.register_forward_hook(lambda *_: ran.append(1))

    def runs(**how):
        ran.clear()
        table = cei.cei(denoiser, found, batch, experiment.priority, **how)
        return table.blocks, table.flops, len(ran)

    (*replayed, fewer), (_, flops, more) = runs(), runs(replay=False)
    for free, times in ((needed * 4 // 3, fewer), (needed * 4 // 3 - 2, more)):
        monkeypatch.setattr(cei, "free_bytes", lambda device, free=free: free)
        assert runs() == (*replayed, times), "what is free changes neither scores nor counted FLOPs"
    assert fewer < more and replayed[1] < flops


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
            return dict(cei._skip_passes(run, found, range(len(found) + 1), replay)), len(ran)

    (replayed, fewer), (naive, more) = passes(True), passes(False)
    assert replayed.keys() == naive.keys() and all(torch.equal(replayed[place], naive[place]) for place in naive)
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
        noisy, target = denoiser.process.pair(clean, objectives.noise_like(clean, numbers, settings.seed), t)
        given = {k: v.expand(settings.draws, -1, -1, -1, -1) for k, v in clip.conditions.items()}
        with torch.no_grad():
            whole = denoiser.predict(noisy, t, given).double()
            with skipped(found[2]):
                without = denoiser.predict(noisy, t, given).double()
        logs.append(np.log(without.std(correction=0) / whole.std(correction=0)))
        losses.append(((without - target) ** 2).mean() - ((whole - target) ** 2).mean())
    assert table.blocks[2].pi_std == pytest.approx(float(np.mean(logs)), abs=1e-6)
    assert table.blocks[2].loss_increase == pytest.approx(float(np.mean(losses)), abs=1e-6)


def test_the_estimator_in_use_decides_the_score(denoiser, found, experiment, table):
    settings = experiment.priority.model_copy(update={"estimator": "elementwise"})
    other = cei.cei(denoiser, found, [latents(range(2))], settings)
    assert table.scores() == {b.name: b.pi_std for b in table.blocks}
    assert other.scores() == {b.name: b.pi_elementwise for b in table.blocks}
    assert other.per_condition != table.per_condition


def test_elementwise_estimator_is_the_mean_log_sigma_of_elements():
    moments = cei._Moments()
    predictions = torch.randn(7, 3, 4, generator=torch.Generator().manual_seed(0))
    for prediction in predictions:
        moments.add(prediction, prediction.square().mean())
    std, elementwise, loss = moments.measures().tolist()
    assert std == pytest.approx(predictions.std(correction=0).log().item(), abs=1e-6)
    assert elementwise == pytest.approx(predictions.std(0, correction=0).log().mean().item(), abs=1e-6)
    assert loss == pytest.approx(predictions.square().mean().item())


def test_more_conditions_do_not_change_the_earlier_ones(denoiser, found, experiment):
    few = cei.cei(denoiser, found, [latents(range(2))], experiment.priority)
    more = cei.cei(denoiser, found, [latents(range(4))], experiment.priority.model_copy(update={"conditions": 4}))
    # batches of other sizes: some processors sum them in another order
    np.testing.assert_allclose(more.per_condition[:2], few.per_condition, atol=1e-6)


def test_scoring_leaves_the_network_as_it_was(denoiser, found, experiment):
    before = hashing.content_hash(denoiser.network)
    cei.cei(denoiser, found, [latents(range(2))], experiment.priority)
    assert hashing.content_hash(denoiser.network) == before
    assert all("forward" not in b.module.__dict__ for b in found)


def test_errors_are_those_of_the_mean_over_conditions(denoiser, found):
    table = cei.cei(denoiser, found, [latents(range(5))], Priority(conditions=5, draws=4))
    values = np.array(table.per_condition)
    assert values.shape == (5, 6)
    assert [b.score for b in table.blocks] == pytest.approx(values.mean(0).tolist())
    assert [b.std_error for b in table.blocks] == pytest.approx((values.std(0, ddof=1) / 5**0.5).tolist())


@pytest.mark.parametrize("replay", [True, False])
def test_flops_are_those_of_the_whole_scoring(denoiser, found, experiment, replay):
    run = lambda: cei.cei(denoiser, found, [latents(range(2))], experiment.priority, replay=replay)  # noqa: E731
    with counting.flop_counter() as counter:
        table = run()
    with counting.flop_counter() as forward, torch.no_grad():  # was counted first, apart
        denoiser.predict(latents([0]).clean, torch.tensor([0.5]), latents([0]).conditions)
    assert table.flops > 0 and counter.get_total_flops() == table.flops + forward.get_total_flops()


def test_replay_takes_less_than_six_tenths_of_naive_flops():
    experiment = tiny_experiment(model={"init": {**TINY, "num_layers": 12}})
    denoiser = tiny_denoiser(experiment)
    flops = {
        replay: cei.cei(
            denoiser, blocks(denoiser.network), [latents(range(2))], experiment.priority, replay=replay
        ).flops
        for replay in (True, False)
    }
    assert 0.5 < flops[True] / flops[False] < 0.6


def test_scoring_compiles_nothing_and_scores_compiled_blocks_alike(found, denoiser, experiment, table):
    torch.compiler.reset()  # what other tests of this process have compiled counts towards a limit of torch's
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    for block in found:
        block.module.compile(backend=backend)
    batch = [latents(range(2))]
    again = cei.cei(denoiser, found, batch, experiment.priority)
    assert not compiled and again.per_condition == table.per_condition
    with torch.no_grad():
        denoiser.predict(batch[0].clean, torch.tensor([0.5, 0.5]), batch[0].conditions)
    assert compiled, "the blocks were not compiled: the test shows nothing"


def test_bfloat16_ranks_as_float32_does():
    """Untrained blocks differ by less than bfloat16 can tell: give each another weight."""
    made = []
    for dtype in ("float32", "bfloat16"):
        experiment = tiny_experiment(model={"dtype": dtype})
        denoiser = tiny_denoiser(experiment)
        found = blocks(denoiser.network)
        with torch.no_grad():
            for scale, block in zip((4, 1, 9, 3, 13, 6), found, strict=True):
                block.module.ffn.net[2].weight.mul_(scale)
        made.append(cei.cei(denoiser, found, [latents(range(2))], experiment.priority))
    full, half = made
    assert np.isfinite(half.per_condition).all() and half.per_condition != full.per_condition
    assert tables.drift(full, half, "signed") >= 0.7
