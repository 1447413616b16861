"""From noise to a clip: every sampler on a network that knows the answer, and on real tiny ones."""

import itertools
import json
from contextlib import nullcontext
from dataclasses import replace

import diffusers
import pytest
import torch
from torch import nn

from entprog.config import ClipShape, Generate, Model
from entprog.diffusion import longclips, sampling
from entprog.diffusion.processes import Diffusion, Edm, Flow
from entprog.diffusion.samplers import sampler, samplers
from entprog.errors import UserError
from entprog.models.cogvideox import CogVideoXDenoiser
from entprog.models.wan import load
from tests.test_wan import NETWORK

SHAPE = (2, 3, 4, 8, 8)
POSE = {"pose": torch.full(SHAPE, 0.5)}
DDIM = {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "set_alpha_to_one": True, "clip_sample": False}
SVD = {
    "_class_name": "EulerDiscreteScheduler",
    "prediction_type": "v_prediction",
    "timestep_type": "continuous",
    "sigma_min": 0.002,
    "sigma_max": 700.0,
    "use_karras_sigmas": True,
}
UNIPC = "UniPCMultistepScheduler"
PROCESSES = {
    "flow": Flow(),
    "shifted": Flow(3.0),
    "epsilon": Diffusion.of(DDIM),
    "v": Diffusion.of({**DDIM, "prediction_type": "v_prediction"}),
    "edm": Edm.of(SVD),
}
STOCHASTIC = ("DDPM", "Ancestral")


class Knowing:
    """A denoiser that knows the answer: it predicts what leads to its condition (0 where that is zeroed)."""

    def __init__(self, process):
        self.network = nn.Linear(1, 1)
        self.process = process
        self.times = []

    def given(self, conditions):
        return None

    def sampling(self):
        return nullcontext(lambda timestep: self)

    def predict(self, noisy, t, conditions):
        self.times.append(float(t[0]))
        clean = conditions["pose"].to(noisy)
        kept, _ = self.process.pair(torch.ones_like(clean), torch.zeros_like(clean), t)
        share, _ = self.process.pair(torch.zeros_like(clean), torch.ones_like(clean), t)
        _, target = self.process.pair(clean, (noisy - kept * clean) / share, t)
        return target


class KnowingLaw(Knowing):
    """A denoiser of data of one law, normal with mean 0.3 and deviation 0.5: it predicts what that leads to."""

    def predict(self, noisy, t, conditions):
        one, none = torch.ones_like(noisy), torch.zeros_like(noisy)
        (kept, _), (share, _) = self.process.pair(one, none, t), self.process.pair(none, one, t)
        off = (noisy - 0.3 * kept) / (0.25 * kept**2 + share**2)
        _, target = self.process.pair(0.3 + 0.25 * kept * off, share * off, t)
        return target


def how(**values) -> Generate:
    return Generate.model_validate(values)


@pytest.mark.parametrize(
    ("process", "name"), [(key, name) for key, process in PROCESSES.items() for name in samplers(process)]
)
def test_every_sampler_ends_at_the_answer(process, name):
    denoiser = Knowing(PROCESSES[process])
    latents = sampling.sample(denoiser, POSE, SHAPE, how(sampler=name, steps=12), (0, 1))
    loose = 0.1 if any(word in name for word in STOCHASTIC) or process in ("epsilon", "v") else 0.02
    torch.testing.assert_close(latents, POSE["pose"], atol=loose, rtol=0)
    again = sampling.sample(denoiser, POSE, SHAPE, how(sampler=name, steps=12), (0, 1))
    assert torch.equal(latents, again)


def test_a_base_is_sampled_by_its_own_solver():
    """Which is nearer to the right spread, at as many steps, than Euler's."""
    shape = (1, 1, 1, 64, 64)

    def spread(process, steps=20):
        latents = sampling.sample(KnowingLaw(process), {"pose": torch.zeros(shape)}, shape, how(steps=steps), (0,))
        return float(latents.std())

    own = Flow.of(
        {"_class_name": UNIPC, "prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    )
    assert type(sampler(own, None)).__name__ == UNIPC
    euler = sampler(own, "FlowMatchEulerDiscreteScheduler")
    assert float(euler.config.shift) == 3.0 and own != Flow(3.0)
    assert spread(Flow(3.0)) < 0.45 < 0.47 < spread(own) < 0.5
    assert spread(own, 50) == pytest.approx(0.5, abs=0.02)
    # Its timesteps are whole numbers: with this shift and so many steps the first two are equal.
    assert spread(replace(own, shift=12.0), 100) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("scale", [3.0, 1.0])
def test_samplers_of_cogvideox_walk_its_own_noise(scale):
    """Most classes have no snr_shift_scale: with 3.0 (CogVideoX-2b) ᾱ of those would differ by up to 0.29."""
    process = Diffusion.of({**CogVideoXDenoiser.SCHEDULER, "snr_shift_scale": scale})
    names = samplers(process)
    assert ("DPMSolverMultistepScheduler" in names) == (scale == 1) and "CogVideoXDDIMScheduler" in names
    for name in names:
        off = (sampler(process, name).alphas_cumprod - process.scheduler().alphas_cumprod).abs().max()
        assert off < 1e-4, (name, off)
    if scale == 3:
        with pytest.raises(UserError, match="DPMSolverMultistepScheduler does not fit this checkpoint's noise"):
            sampler(process, "DPMSolverMultistepScheduler")


def test_a_base_with_cogvideox_dpm_is_sampled_by_its_ddim(tmp_path):
    """CogVideoX-5b's own scheduler, whose steps take what the step before it predicted too."""
    given = {**CogVideoXDenoiser.SCHEDULER, "_class_name": "CogVideoXDPMScheduler", "rescale_betas_zero_snr": False}
    process = Diffusion.of(given)
    published = diffusers.CogVideoXDPMScheduler.from_config(given)
    assert torch.equal(process.scheduler().alphas_cumprod, published.alphas_cumprod)
    latents = sampling.sample(Knowing(process), POSE, SHAPE, how(steps=12), (0, 1))
    torch.testing.assert_close(latents, POSE["pose"], atol=0.1, rtol=0)
    process.scheduler().save_pretrained(tmp_path)
    again = Diffusion.of(json.loads((tmp_path / "scheduler_config.json").read_text()))
    assert again == process
    # Plain diffusers reads it as either.
    for kind in (diffusers.CogVideoXDDIMScheduler, diffusers.CogVideoXDPMScheduler):
        assert torch.equal(kind.from_pretrained(tmp_path).alphas_cumprod, published.alphas_cumprod)


def test_own_sampler_spaces_steps_evenly_and_a_shift_spends_them_on_noise():
    denoiser = Knowing(Flow())
    sampling.sample(denoiser, POSE, SHAPE, how(steps=5), (0, 1))
    torch.testing.assert_close(torch.tensor(denoiser.times), torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2]))
    denoiser = Knowing(Flow())
    sampling.sample(denoiser, POSE, SHAPE, how(steps=4, shift=3.0), (0, 1))
    expected = [3 * t / (1 + 2 * t) for t in (1.0, 0.75, 0.5, 0.25)]
    torch.testing.assert_close(torch.tensor(denoiser.times), torch.tensor(expected))


@pytest.mark.parametrize(
    ("process", "name", "message"),
    [
        ("flow", "UniPCMultistepSchedule", "is no scheduler of diffusers .did you mean UniPCMultistepScheduler"),
        ("flow", "DDIMScheduler", "DDIMScheduler does not fit this checkpoint's noise.*fitting: .*FlowMatchEuler"),
        ("epsilon", "FlowMatchEulerDiscreteScheduler", "does not fit this checkpoint's noise"),
        ("edm", "DDIMScheduler", "does not fit"),
        ("edm", "AutoencoderKLWan", "is no scheduler"),
    ],
)
def test_samplers_that_do_not_fit_are_one_line(process, name, message, caplog):
    diffusers.utils.logging.enable_propagation()
    try:
        with pytest.raises(UserError, match=message) as error:
            sampler(PROCESSES[process], name)
    finally:
        diffusers.utils.logging.disable_propagation()
    assert "\n" not in str(error.value) and not caplog.records, "nor does diffusers speak"


def test_guidance_of_reference_and_pose():
    both = ("reference", "pose")
    text, alone, whole = ("text",), ("text", "reference"), ("text", *both)
    assert sampling.guidance(both, 1, 1) == {whole: 1}
    assert sampling.guidance(both, 3, 3) == {text: -2, whole: 3}
    assert sampling.guidance(both, 2, 5) == {text: -1, alone: -3, whole: 5}
    assert sampling.guidance(("pose", "reference"), 1, 5) == {alone: -4, whole: 5}
    assert sampling.guidance(("reference",), 2, 5) == {text: -1, alone: 2}
    assert sampling.guidance(both, 1, 1, 5) == {whole: 5, both: -4}
    assert sampling.guidance(both, 2, 3, 5) == {text: -1, alone: -1, whole: 7, both: -4}
    assert sampling.guidance((), 1, 1, 5) == {text: 5, (): -4}
    latents = sampling.sample(Knowing(Flow()), POSE, SHAPE, how(steps=3, pose_guidance=2.0), (0, 1))
    torch.testing.assert_close(latents, torch.full(SHAPE, 1.0))


@pytest.fixture(scope="module")
def wan():
    return load(Model(init=NETWORK, vae="none"))


def test_sampling_is_fixed_by_seed_and_place_and_independent_of_the_batch(wan):
    shape = (2, 3, 2, 16, 16)
    conditions = {name: torch.randn(shape) for name in ("reference", "pose")}
    first = sampling.sample(wan, conditions, shape, how(steps=3, seed=4), (7, 9))
    assert torch.equal(first, sampling.sample(wan, conditions, shape, how(steps=3, seed=4), (7, 9)))
    assert not torch.equal(first, sampling.sample(wan, conditions, shape, how(steps=3, seed=5), (7, 9)))
    part = {name: value[1:] for name, value in conditions.items()}
    alone = sampling.sample(wan, part, (1, *shape[1:]), how(steps=3, seed=4), (9,))
    torch.testing.assert_close(alone, first[1:], rtol=1e-4, atol=1e-4)
    assert not first.requires_grad


def test_samplers_of_one_process_agree_on_a_real_network(wan):
    shape = (1, 3, 2, 16, 16)
    conditions = {name: torch.randn(shape) for name in ("reference", "pose")}
    names = ("FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler", "DPMSolverMultistepScheduler")
    made = [sampling.sample(wan, conditions, shape, how(sampler=name, steps=40), (0,)) for name in names]
    for other in made[1:]:
        assert (other - made[0]).abs().mean() < 0.03 * made[0].abs().mean()


def test_a_condition_with_zero_weights_changes_nothing(tmp_path):
    """Step 0 of fine-tuning: the widened network is the base, bit for bit, whatever the pose."""
    base = Model(init=NETWORK, vae="none", conditions=("reference",))
    load(base).save(tmp_path / "base", shape=ClipShape(frames=2, height=16, width=16, fps=8))
    wide = load(Model(base=str(tmp_path / "base"), vae="none", conditions=("reference", "pose")))
    shape = (1, 3, 2, 16, 16)
    conditions = {name: torch.randn(shape) for name in ("reference", "pose")}
    with_pose = sampling.sample(wide, conditions, shape, how(steps=3), (0,))
    reference = {"reference": conditions["reference"]}
    assert torch.equal(with_pose, sampling.sample(load(base), reference, shape, how(steps=3), (0,)))


@pytest.mark.parametrize(("total", "length", "overlap"), [(5, 5, 2), (9, 5, 2), (12, 5, 1), (7, 3, 0), (10, 4, 3)])
def test_windows_cover_every_frame_and_their_weights_sum_to_one(total, length, overlap):
    parts = longclips.windows(total, length, overlap)
    assert parts[0].start == 0 and parts[-1].stop == total and all(p.stop - p.start == length for p in parts)
    assert all(a.stop - b.start >= overlap for a, b in itertools.pairwise(parts))
    sums = torch.zeros(total)
    for part, weight in zip(parts, longclips.weights(parts), strict=True):
        assert (weight > 0).all()
        sums[part] += weight
    torch.testing.assert_close(sums, torch.ones(total))


def test_long_clips_have_no_seams_and_one_window_is_the_plain_clip(wan):
    torch.manual_seed(0)
    still = torch.randn(1, 3, 1, 16, 16).expand(-1, -1, 9, -1, -1)
    conditions = {"reference": still, "pose": still.roll(1, -1)}
    plain = {name: value[:, :, :4] for name, value in conditions.items()}
    settings = how(steps=4, overlap=0.5)
    short = sampling.sample(wan, plain, (1, 3, 4, 16, 16), settings, (0,))
    assert torch.equal(short, sampling.sample(wan, plain, (1, 3, 4, 16, 16), settings, (0,), window=4))
    # The same in every window: where they overlap, what is mixed are predictions of the same frames.
    seen = []
    inner = wan.predict
    long = longclips.blended(lambda x, c: seen.append(x) or inner(x, torch.ones(1), c), length=4, overlap=2)
    noisy = torch.randn(1, 3, 9, 16, 16)
    mixed = long(noisy, conditions)
    parts = longclips.windows(9, 4, 2)
    assert [x.shape[2] for x in seen] == [4] * len(parts)
    alone = [inner(noisy[:, :, p], torch.ones(1), {n: v[:, :, p] for n, v in conditions.items()}) for p in parts]
    low, high = torch.full_like(mixed, torch.inf), torch.full_like(mixed, -torch.inf)
    for part, prediction in zip(parts, alone, strict=True):
        low[:, :, part] = torch.minimum(low[:, :, part], prediction)
        high[:, :, part] = torch.maximum(high[:, :, part], prediction)
    assert (mixed >= low - 1e-5).all() and (mixed <= high + 1e-5).all()
    made = sampling.sample(wan, conditions, (1, 3, 9, 16, 16), settings, (0,), window=4)
    steps = (made[:, :, 1:] - made[:, :, :-1]).abs().mean((0, 1, 3, 4))
    assert made.isfinite().all() and steps.max() < 2 * steps.median()
