"""Frozen blocks in fp8: how near the numbers are, that thawing is to the bit, what it costs, whom it is refused to."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from entprog import blocks, config, models
from entprog.blocks import fp8, unfreeze
from entprog.cost import counting, measuring, twins
from entprog.errors import UserError
from helpers.networks import latents, tiny_experiment
from helpers.runs import Run
from pipelines.training import expectation, outline

FP8 = {"model": {"dtype": "bfloat16"}, "schedule": {"backward": "residual", "frozen_precision": "fp8"}}
TRAINED = ["blocks.1", "blocks.4"]


@pytest.fixture
def experiment():
    return tiny_experiment(**FP8)


def test_a_linear_layer_is_its_rounded_self():
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 48), torch.randn(4, 10, 64) * torch.logspace(-3, 3, 10)[:, None]
    got, expected = fp8.Fp8Linear(linear)(x).float(), linear(x)
    assert not fp8.Fp8Linear(linear)(torch.zeros(1, 64)).isnan().any()
    # Three bits of mantissa, a scale per row: rows a million times apart are equally near.
    error = (got - expected).norm(dim=(0, 2)) / expected.norm(dim=(0, 2))
    assert got.shape == expected.shape and 0.005 < error.max() < 0.06


def prediction(denoiser, grad=True):
    batch = latents(range(2))
    with torch.set_grad_enabled(grad):
        return denoiser.predict(batch.clean, torch.tensor([0.2, 0.8]), batch.conditions)


def test_only_steps_run_in_twins_and_evaluation_does_not(denoiser, found):
    plain = prediction(denoiser, grad=False)
    unfreeze(denoiser.network, found, TRAINED, [], "residual", frozen_precision="fp8")
    assert torch.equal(prediction(denoiser, grad=False), plain)
    stepped = prediction(denoiser).detach()
    assert 0 < (stepped - plain).norm() < 0.1 * plain.norm()
    unfreeze(denoiser.network, found, TRAINED, [], "residual")
    assert torch.equal(prediction(denoiser).detach(), plain)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_near_those_of_full_precision(denoiser, found, checkpointing):
    grads = {}
    for precision in ("full", "fp8"):
        trained = unfreeze(denoiser.network, found, TRAINED, [], "residual", checkpointing, precision)
        prediction(denoiser).square().mean().backward()
        grads[precision] = torch.cat([p.grad.flatten() for p in trained])
        denoiser.network.zero_grad(set_to_none=True)
    near = torch.nn.functional.cosine_similarity(grads["fp8"], grads["full"], dim=0)
    assert near > 0.98 and not torch.equal(grads["fp8"], grads["full"])


def test_thawing_is_to_the_bit_and_a_twin_is_of_the_weights_as_they_froze(denoiser, found):
    network = denoiser.network
    before = {n: p.clone() for n, p in network.state_dict().items()}
    first = found[0].module
    for trainable in ([], TRAINED, ["blocks.0"], []):
        unfreeze(network, found, trainable, [], "residual", frozen_precision="fp8")
        assert {b.name for b in found if blocks.variants(b.module).twin} == {b.name for b in found} - {*trainable}
        prediction(denoiser)
        assert network.state_dict().keys() == before.keys()
        assert all(torch.equal(p, before[n]) for n, p in network.state_dict().items())
        assert all(p.dtype == torch.float32 for p in network.parameters())
    old = blocks.variants(first).twin
    unfreeze(network, found, ["blocks.0"], [], "residual", frozen_precision="fp8")
    with torch.no_grad():
        first.ffn.net[2].weight.mul_(2)
    unfreeze(network, found, TRAINED, [], "residual", frozen_precision="fp8")
    new = blocks.variants(first).twin
    doubled = [t.ffn.net[2].weight.dequantize().float() for t in (old, new)]
    torch.testing.assert_close(doubled[1], 2 * doubled[0], rtol=0.02, atol=0)
    unfreeze(network, found, TRAINED, [], "exact", frozen_precision="fp8")
    assert not any(blocks.variants(b.module).twin for b in found)


def test_compiled_blocks_have_compiled_twins(denoiser, found):
    unfreeze(denoiser.network, found, TRAINED, [], "residual", frozen_precision="fp8")
    expected = prediction(denoiser).detach()
    blocks.compile_blocks(found[:1], backend="aot_eager")  # seconds each
    unfreeze(denoiser.network, found, [], [], "exact")  # twins are made anew
    unfreeze(denoiser.network, found, TRAINED, [], "residual", frozen_precision="fp8")
    torch.testing.assert_close(prediction(denoiser).detach(), expected, rtol=0.05, atol=0.02)


def test_costs_are_those_of_full_precision_with_the_twins_bytes(denoiser, found, experiment):
    from entprog.diffusion.losses import training_loss

    outside = denoiser.outside()["conditions"]
    loss = lambda: training_loss(denoiser, latents([0]), experiment.train)  # noqa: E731
    model = measuring.measure(denoiser.network, found, outside, loss, clips=1, seconds=False, frozen_precision="fp8")
    assert not any(blocks.variants(b.module).twin for b in found)
    counted = {}
    for precision in ("full", "fp8"):
        trained = unfreeze(denoiser.network, found, TRAINED, outside, "residual", frozen_precision=precision)
        counted[precision] = counting.count(denoiser.network, trained, loss)
    low, full = counted["fp8"], counted["full"]
    assert low.flops == full.flops and low.saved_bytes == full.saved_bytes
    linear = sum(p.numel() for b in found[2:4] for p in b.module.parameters() if p.ndim == 2)
    assert linear * 2 < low.weight_bytes - full.weight_bytes < 1.3 * linear * 2  # four frozen blocks, a byte a weight
    assert model.step(TRAINED, "residual") == pytest.approx(low.flops, rel=0.01)
    assert model.memory(TRAINED, "residual") == pytest.approx(low.memory_bytes(1), rel=0.05)


def test_a_run_with_frozen_blocks_in_fp8_learns_and_freezes_what_it_should():
    run = Run(tiny_experiment(**FP8, train={"steps": 24, "held_out_every": 24}))
    before, narrow = run.weights(), 0
    losses = []
    for step in run.steps():
        after = run.weights()
        for name in after:
            trained = not name.startswith("blocks.") or name.startswith(tuple(b + "." for b in step.plan.trainable))
            assert trained or torch.equal(after[name], before[name]), (step.step, name)
        narrow += step.plan.backward == "residual"
        before = after
        losses.append(step.held_out_loss)
    assert narrow > 0 and losses[-1] < losses[0]


def test_both_ways_of_a_frozen_block_are_timed_where_it_gets_its_inputs(denoiser, found):
    seconds, outputs = iter((3.0, 2.0)), []

    def meter(run):
        outputs.append(run()[0])
        return next(seconds)

    assert twins.share(found[2], lambda: prediction(denoiser, grad=False), meter) == 1.5
    low, high = outputs
    assert 0 < (low - high).norm() < 0.1 * high.norm(), "in fp8, and as it is"
    assert blocks.variants(found[2].module).twin is None
    assert "takes 1.5 times as long" in expectation.twins(1.5) and expectation.twins(0.8) is None


def test_blocks_that_are_not_compiled_are_noted():
    def notes(**model):
        experiment = tiny_experiment(**config.merge(FP8, {"model": {"dtype": "bfloat16", **model}}))
        there = SimpleNamespace(clips=lambda split: 100)
        return outline.notes(experiment, there, models.family("wan").inspect(experiment.model))

    assert "without model.compile_blocks was slower" in notes()[0] and not notes(compile_blocks=True)


def test_it_is_refused_where_it_has_no_place(monkeypatch):
    with pytest.raises(UserError, match=r"schedule\.backward=residual"):
        tiny_experiment(**config.merge(FP8, {"schedule": {"backward": "exact"}}))
    with pytest.raises(UserError, match=r"model\.dtype=bfloat16"):
        tiny_experiment(**config.merge(FP8, {"model": {"dtype": "float32"}}))
    tiny_experiment(**config.merge(FP8, {"schedule": {"kind": "full"}, "model": {"dtype": "float32"}}))
    with pytest.raises(UserError, match="compute capability"):
        fp8.check_device(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(UserError, match="A100"):
        fp8.check_device(torch.device("cuda"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install '\.\[fp8\]'"):
        fp8.check_installed()
