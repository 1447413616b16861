import pytest
import torch

from entprog.config import Timesteps
from entprog.diffusion import objectives
from entprog.diffusion.processes import Diffusion, Edm, Flow
from entprog.errors import UserError


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
    middle = objectives.timesteps(positions, 0, Timesteps("logit_normal", -0.5, 0.7))
    assert torch.logit(middle.double()).mean() == pytest.approx(-0.5, abs=0.02)
    assert torch.logit(middle.double()).std() == pytest.approx(0.7, abs=0.02)
    noise = objectives.noise_like(torch.empty(50, 3, 10, 10), torch.arange(50), 0)
    assert noise.mean().abs() < 0.03 and noise.std() == pytest.approx(1, abs=0.03)
    assert torch.corrcoef(noise.flatten(1)).fill_diagonal_(0).abs().max() < 0.3


def test_shift_moves_towards_noise_as_the_scheduler_does():
    from diffusers import FlowMatchEulerDiscreteScheduler

    positions = torch.arange(9)
    plain, shifted = objectives.timesteps(positions, 0), objectives.timesteps(positions, 0, Timesteps(shift=5.0))
    assert (shifted > plain).all()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    scheduler.set_timesteps(sigmas=plain.tolist())
    torch.testing.assert_close(scheduler.sigmas[:-1], shifted)


LAWS = [
    Timesteps(),
    Timesteps(shift=3.0),
    Timesteps("logit_normal", 0.4, 0.8),
    Timesteps("logit_normal", shift=2.0),
    Timesteps("mode", spread=1.29),
    Timesteps("mode", spread=1.75, shift=0.5),
]


@pytest.mark.parametrize("law", LAWS)
def test_quantiles_are_those_of_the_draws_and_rise(law):
    drawn = objectives.timesteps(torch.arange(20_000), 1, law).double().sort().values
    even = objectives.quantiles((torch.arange(20_000) + 0.5) / 20_000, law).double()
    assert (even.diff() >= 0).all() and even[0] >= 0 and even[-1] <= 1
    assert (drawn - even).abs().max() < 0.03
    ends = objectives.quantiles(torch.tensor([0.0, 1.0]), law)
    torch.testing.assert_close(ends.double(), torch.tensor([0.0, 1.0], dtype=torch.float64))


@pytest.mark.parametrize("between", [(0.9, 1.0), (0.0, 0.875), (0.3, 0.6)])
@pytest.mark.parametrize("law", LAWS)
def test_a_law_that_is_cut_leaves_out_what_lies_outside(law, between):
    whole = objectives.timesteps(torch.arange(40_000), 1, law).double().sort().values
    inside = whole[(whole >= between[0]) & (whole <= between[1])]
    cut = objectives.timesteps(torch.arange(len(inside)), 2, law, between=between).double().sort().values
    even = objectives.quantiles((torch.arange(len(inside)) + 0.5) / len(inside), law, between)
    assert between[0] - 1e-6 <= cut[0] and cut[-1] <= between[1] + 1e-6 and (even.diff() >= 0).all()
    for drawn in (inside, cut):
        assert (drawn - even).abs().max() < 0.06 * (between[1] - between[0])
    share = objectives.share_below(between[1], law) - objectives.share_below(between[0], law)
    assert share == pytest.approx(len(inside) / 40_000, abs=0.01)


def test_a_law_that_is_not_cut_keeps_its_bits():
    for law in LAWS:
        shares = torch.rand(50, dtype=torch.float64)
        assert torch.equal(objectives.quantiles(shares, law), objectives.quantiles(shares, law, (0.0, 1.0)))


def test_laws_are_those_of_diffusers_trainers():
    """Same quantiles of 40,000 draws."""
    from diffusers.training_utils import compute_density_for_timestep_sampling

    n, q = 40_000, torch.linspace(0.02, 0.98, 25)
    for scheme, law in (
        ("logit_normal", Timesteps("logit_normal", 0.3, 0.9)),
        ("mode", Timesteps("mode", spread=1.29)),
    ):
        generator = torch.Generator().manual_seed(0)
        theirs = compute_density_for_timestep_sampling(scheme, n, 0.3, 0.9, 1.29, "cpu", generator)
        torch.testing.assert_close(theirs.quantile(q), objectives.quantiles(q, law).float(), atol=0.015, rtol=0)


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weights_are_those_of_the_paper(gamma):
    """ε: min(snr, γ)/snr; v: min(snr, γ)/(snr + 1), with snr as diffusers computes it."""
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr

    t = torch.linspace(0.05, 0.95, 19)
    for prediction, over in (("epsilon", 0), ("v_prediction", 1)):
        scheduler = DDPMScheduler(prediction_type=prediction)
        process = Diffusion.of(scheduler.config | {"_class_name": "DDPMScheduler"})
        snr = compute_snr(scheduler, process.timestep(t)).double()
        torch.testing.assert_close(process.min_snr(t, gamma), snr.clamp(max=gamma) / (snr + over), rtol=1e-5, atol=0)
    edm = Edm.of({"_class_name": "EulerDiscreteScheduler", "prediction_type": "v_prediction",
                  "timestep_type": "continuous", "sigma_min": 0.002, "sigma_max": 700.0})  # fmt: skip
    snr = edm.sigma(t) ** -2
    torch.testing.assert_close(edm.min_snr(t, gamma), snr.clamp(max=gamma) / (snr + 1))
    nothing_left = Diffusion.of({"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True})
    assert nothing_left.min_snr(torch.tensor([1.0]), gamma).tolist() == [1.0]
    with pytest.raises(UserError, match="min_snr=5 weights losses of ε or v"):
        Flow().min_snr(t, 5.0)


def test_loss_is_a_mean_per_clip():
    prediction, target = torch.zeros(2, 3, 4), torch.stack([torch.ones(3, 4), 2 * torch.ones(3, 4)])
    assert objectives.loss(prediction.bfloat16(), target).tolist() == [1.0, 4.0]
    assert objectives.loss(prediction, target, torch.tensor([0.5, 2.0])).tolist() == [0.5, 8.0]
