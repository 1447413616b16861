"""processes.py against diffusers' own schedulers."""

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entprog.diffusion.processes import Diffusion, Edm, Flow
from entprog.errors import UserError

SVD = {
    "_class_name": "EulerDiscreteScheduler",
    "prediction_type": "v_prediction",
    "timestep_type": "continuous",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "use_karras_sigmas": True,
    "sigma_min": 0.002,
    "sigma_max": 700.0,
}
COGVIDEOX = {
    "_class_name": "CogVideoXDDIMScheduler",
    "prediction_type": "v_prediction",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}
WAN = {
    "_class_name": "UniPCMultistepScheduler",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
}
DDPM = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "clip_sample": False,
}
PROCESSES = {
    "flow": Flow(3.0),
    "solver": Flow.of(WAN),
    "epsilon": Diffusion.of(DDPM),
    "v": Diffusion.of(COGVIDEOX),
    "edm": Edm.of(SVD),
}
TIMES = torch.tensor([0.02, 0.3, 0.77, 0.98])


def pair():
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(4, 3, 2, 4, 4, generator=generator) for _ in range(2))


def test_flow_ends_at_clean_and_noise():
    clean, noise = pair()
    noisy, target = Flow().pair(clean, noise, torch.tensor([0.0, 0.25, 0.5, 1.0]))
    assert torch.equal(noisy[0], clean[0]) and torch.equal(noisy[3], noise[3])
    torch.testing.assert_close(noisy[1], 0.75 * clean[1] + 0.25 * noise[1])
    torch.testing.assert_close(noisy[1] + 0.75 * target[1], noise[1])  # x_1 = x_t + (1 - t)·v


@pytest.mark.parametrize("configuration", [DDPM, {**DDPM, "prediction_type": "v_prediction"}, COGVIDEOX])
def test_discrete_steps_mix_as_the_scheduler_does(configuration):
    process = Diffusion.of(configuration)
    scheduler = process.scheduler()
    clean, noise = pair()
    steps = process.timestep(TIMES)
    noisy, target = process.pair(clean, noise, TIMES)
    torch.testing.assert_close(noisy, scheduler.add_noise(clean, noise, steps))
    v = configuration.get("prediction_type") == "v_prediction"
    torch.testing.assert_close(target, scheduler.get_velocity(clean, noise, steps) if v else noise)
    # torch's uniform integers and our uniform times are the same steps, each as often
    t = (torch.arange(5000) + 0.5) / 5000
    assert process.timestep(t).bincount().tolist() == [5] * 1000


def test_edm_s_loss_is_the_weighted_loss_on_the_clip():
    process = PROCESSES["edm"]
    clean, noise = (x.double() for x in pair())
    sigma = process.sigma(TIMES).view(-1, 1, 1, 1, 1)
    noisy, target = process.pair(clean, noise, TIMES)
    raw = noisy * (1 + sigma**2).sqrt()  # EDM's x_0 + σ·ε
    torch.testing.assert_close(raw, clean + sigma * noise)
    torch.testing.assert_close(process.timestep(TIMES).double(), sigma.flatten().log() / 4, rtol=1e-6, atol=1e-6)
    other = target + torch.randn_like(target)
    denoised = raw / (sigma**2 + 1) - other * sigma / (sigma**2 + 1).sqrt()  # c_skip·x + c_out·F, σ_data = 1
    weighted = (denoised - clean) ** 2 * (sigma**2 + 1) / sigma**2
    torch.testing.assert_close(weighted, (other - target) ** 2, rtol=1e-6, atol=1e-9)
    t = (torch.arange(20_000) + 0.5) / 20_000
    logs = process.sigma(t).log()
    assert logs.mean() == pytest.approx(0.7, abs=1e-3) and logs.std() == pytest.approx(1.6, rel=1e-3)


@pytest.mark.parametrize("name", PROCESSES)
@given(t=st.floats(0.001, 0.999))
@settings(max_examples=30, deadline=None)
def test_what_the_network_is_told_leads_back_to_t(name, t):
    process, t = PROCESSES[name], torch.tensor([t])
    again = process.t(process.timestep(t))
    assert torch.allclose(process.timestep(again).double(), process.timestep(t).double(), rtol=1e-5, atol=1e-5)
    assert again.item() == pytest.approx(t.item(), abs=1e-5 if name in ("flow", "edm") else 0.5e-3 + 1e-6)


@pytest.mark.parametrize("name", PROCESSES)
def test_the_scheduler_walks_back_along_the_process(name):
    """With the true target at every step a scheduler ends at the clip, from wherever `pair` says its noise is."""
    process = PROCESSES[name]
    clean, noise = (x[:1] for x in pair())
    scheduler = process.scheduler()
    scheduler.set_timesteps(50)
    sample = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    for timestep in scheduler.timesteps:
        t = process.t(timestep)
        conditioned = process.timestep(t.view(1))
        assert torch.allclose(conditioned.double(), timestep.double(), atol=1e-3), (conditioned, timestep)
        seen = scheduler.scale_model_input(sample, timestep) if hasattr(scheduler, "scale_model_input") else sample
        a, s = (x.flatten()[0] for x in coefficients(process, t.view(1)))
        # the noise that leads from the clip to where the sample is, and the target it stands for
        implied = (seen - a * clean) / s
        target = process.pair(clean, implied, t.view(1))[1]
        sample = scheduler.step(target, timestep, sample, return_dict=False)[0]
    torch.testing.assert_close(sample, clean, rtol=1e-2, atol=2e-2)


def coefficients(process, t):
    """How much of clip and of noise there is at t."""
    one = torch.ones(1, 1, 1, 1, 1)
    return process.pair(one, 0 * one, t)[0], process.pair(0 * one, one, t)[0]


def test_a_saved_scheduler_gives_the_process_again(tmp_path):
    for process in PROCESSES.values():
        process.scheduler().save_pretrained(tmp_path)
        again = type(process).of(type(process.scheduler()).load_config(tmp_path))
        assert again == process and torch.equal(again.timestep(TIMES), process.timestep(TIMES))


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (Diffusion, {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "no discrete steps"),
        (Diffusion, {"_class_name": "Evil"}, "no discrete steps"),
        (Diffusion, {}, "of unknown class"),
        (Diffusion, {**DDPM, "prediction_type": "sample"}, "epsilon or v_prediction"),
        (Flow, {"shift": [1]}, r"the scheduler's shift is \[1\]: it must be a number above 0"),
        (Flow, {"flow_shift": -3.0}, "must be a number above 0"),
        (Flow, {**WAN, "solver_order": "x", "solver_type": "y"}, "scheduler UniPCMultistepScheduler cannot be made"),
        (Edm, DDPM, "trains on EulerDiscreteScheduler, v_prediction, continuous"),
    ],
)
def test_a_foreign_scheduler_is_one_line(kind, values, message):
    with pytest.raises(UserError, match=message):
        kind.of(values)


def test_only_flow_matching_has_a_shift():
    for other in ({"prediction_type": "epsilon"}, {"num_train_timesteps": 100}, {"use_flow_sigmas": False}):
        assert Flow.of({**WAN, **other}) == Flow(3.0)
    assert str(Flow.of(WAN)) == str(Flow(3.0)), "by which score tables are found"
    of_noise = diffusers.UniPCMultistepScheduler(flow_shift=5.0)  # its sigmas are not a flow's
    assert Flow.of(dict(of_noise.config)) == Flow(5.0) and Flow(5.0).scheduler().config.shift == 5.0
    assert Flow().scheduler(3.0).config.shift == 3.0
    for name in ("epsilon", "edm"):
        PROCESSES[name].scheduler(1.0)
        with pytest.raises(UserError, match="shift of 3 was given"):
            PROCESSES[name].scheduler(3.0)
