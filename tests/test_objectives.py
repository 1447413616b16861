import pytest
import torch

from entprog.diffusion import objectives


def test_draws_depend_on_seed_and_position_alone():
    positions = torch.tensor([0, 5, 2**40, 7])
    clean = torch.zeros(4, 3, 2, 5, 7)
    before = torch.get_rng_state()
    t, noise = objectives.timesteps(positions, 3), objectives.noise_like(clean, positions, 3)
    assert torch.equal(before, torch.get_rng_state())
    for split in ([1, 3], [2, 2], [1, 1, 1, 1]):
        parts = list(zip(clean.split(split), positions.split(split), strict=True))
        assert torch.equal(t, torch.cat([objectives.timesteps(p, 3) for _, p in parts]))
        assert torch.equal(noise, torch.cat([objectives.noise_like(c, p, 3) for c, p in parts]))
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(noise[order], objectives.noise_like(clean, positions[order], 3))
    assert not torch.equal(noise, objectives.noise_like(clean, positions, 4))
    assert not torch.equal(t, objectives.timesteps(positions, 4))
    assert len({float(x) for x in t}) == 4 and not torch.equal(noise[0], noise[1])


def test_noise_ignores_how_clean_lies_in_memory():
    positions = torch.arange(2)
    clean = torch.zeros(2, 4, 3, 6, 6).transpose(1, 2)
    noise = objectives.noise_like(clean, positions, 0)
    assert torch.equal(noise, objectives.noise_like(clean.contiguous(), positions, 0))


def test_draws_are_spread_as_they_should_be():
    positions = torch.arange(20_000)
    t = objectives.timesteps(positions, 0)
    assert t.dtype == torch.float32 and t.min() > 0 and t.max() < 1
    assert t.double().sort().values.sub((positions + 0.5) / 20_000).abs().max() < 0.015  # Kolmogorov-Smirnov
    assert abs(torch.corrcoef(torch.stack([t[:-1], t[1:]]))[0, 1]) < 0.02
    middle = objectives.timesteps(positions, 0, distribution="logit-normal")
    assert torch.logit(middle.double()).std() == pytest.approx(1, abs=0.02)
    noise = objectives.noise_like(torch.empty(50, 3, 10, 10), torch.arange(50), 0)
    assert noise.mean().abs() < 0.03 and noise.std() == pytest.approx(1, abs=0.03)
    assert torch.corrcoef(noise.flatten(1)).fill_diagonal_(0).abs().max() < 0.3


def test_shift_moves_towards_noise_as_the_scheduler_does():
    from diffusers import FlowMatchEulerDiscreteScheduler

    positions = torch.arange(9)
    plain, shifted = objectives.timesteps(positions, 0), objectives.timesteps(positions, 0, shift=5.0)
    assert (shifted > plain).all()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    scheduler.set_timesteps(sigmas=plain.tolist())
    torch.testing.assert_close(scheduler.sigmas[:-1], shifted)


def test_unknown_distribution():
    with pytest.raises(ValueError, match="uniform or logit-normal"):
        objectives.timesteps(torch.arange(2), 0, distribution="beta")


def test_loss_is_a_mean_per_clip():
    prediction, target = torch.zeros(2, 3, 4), torch.stack([torch.ones(3, 4), 2 * torch.ones(3, 4)])
    assert objectives.loss(prediction.bfloat16(), target).tolist() == [1.0, 4.0]
