import torch
from torch import nn

from entprog import sampling
from entprog.config import Model
from entprog.models.wan import load
from entprog.processes import Flow
from tests.test_wan import NETWORK


class Straight:
    """A denoiser that knows the answer: velocity (x_t - c) / t leads to c, the condition (0 when it is zeroed)."""

    process = Flow()
    scheduler = staticmethod(process.scheduler)

    def __init__(self):
        self.network = nn.Linear(1, 1)
        self.times = []

    def predict(self, noisy, t, conditions):
        self.times.append(float(t[0]))
        return (noisy - conditions["pose"]) / t.view(-1, 1, 1, 1, 1)


SHAPE = (2, 3, 4, 8, 8)
POSE = {"pose": torch.full(SHAPE, 0.5)}


def test_straight_flow_ends_at_its_condition():
    denoiser = Straight()
    latents = sampling.sample(denoiser, POSE, SHAPE, steps=5, seed=0)
    torch.testing.assert_close(latents, POSE["pose"])
    torch.testing.assert_close(torch.tensor(denoiser.times), torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2]))


def test_shift_spends_steps_on_noise():
    denoiser = Straight()
    sampling.sample(denoiser, POSE, SHAPE, steps=4, seed=0, shift=3.0)
    expected = [3 * t / (1 + 2 * t) for t in (1.0, 0.75, 0.5, 0.25)]
    torch.testing.assert_close(torch.tensor(denoiser.times), torch.tensor(expected))


def test_guidance_goes_past_the_condition():
    latents = sampling.sample(Straight(), POSE, SHAPE, steps=3, seed=0, guidance=2.0)
    torch.testing.assert_close(latents, torch.full(SHAPE, 1.0))


def test_sampling_is_fixed_by_seed_and_independent_of_the_batch():
    denoiser = load(Model(init=NETWORK, vae="none"))
    shape = (2, 3, 2, 16, 16)
    conditions = {name: torch.randn(shape) for name in ("reference", "pose")}
    first = sampling.sample(denoiser, conditions, shape, steps=3, seed=4)
    assert torch.equal(first, sampling.sample(denoiser, conditions, shape, steps=3, seed=4))
    assert not torch.equal(first, sampling.sample(denoiser, conditions, shape, steps=3, seed=5))
    part = {name: value[:1] for name, value in conditions.items()}
    alone = sampling.sample(denoiser, part, (1, *shape[1:]), steps=3, seed=4)
    torch.testing.assert_close(alone, first[:1], rtol=1e-4, atol=1e-4)
    assert not first.requires_grad
