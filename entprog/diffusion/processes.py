"""Noise processes: what a clip and noise make of each other at time t, what a network predicts there, and the diffusers
scheduler that walks the same way back.

Times t are in 0..1 for every process, 0 clean, 1 noise, and uniform t is what the family was trained on:

    Flow        x_t = (1 - t)·x_0 + t·ε              predicts v = ε - x_0                      (rectified flow: Wan)
    Diffusion   x_t = √ᾱ_i·x_0 + √(1-ᾱ_i)·ε          predicts ε, or v = √ᾱ·ε - √(1-ᾱ)·x_0      (DDPM: step i = ⌊N·t⌋)
    Edm         x_t = (x_0 + σ·ε) / √(1+σ²)          predicts v = (ε - σ·x_0) / √(1+σ²)        (SVD: σ = t-quantile)

Edm is arXiv 2206.00364 with σ_data = 1, in its variance-preserving form: x_t is what the network sees, and the mean
squared error of v is EDM's weighted loss.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol

import diffusers
import torch
from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin

from entprog.errors import UserError
from entprog.masking import cut, one_line

CLASS = "_class_name"
"""Entry of a scheduler's configuration that names its class."""
EULER = "FlowMatchEulerDiscreteScheduler"
SOLVERS = ("UniPCMultistepScheduler", "DPMSolverMultistepScheduler")
"""Of higher order, and walk a flow back where their configuration says so; published Wans have the first."""
STEPS_PLAINLY = {"CogVideoXDPMScheduler": "CogVideoXDDIMScheduler"}
"""Scheduler whose steps take more than a prediction, its timestep and the sample → one that takes no more and has the
same entries and ᾱ."""


class Process(Protocol):
    """Pure functions of (clean, noise, t); nothing here knows a network."""

    shift: float
    """Timestep shift that sampling is to use; 1 where the process has none."""

    def pair(self, clean: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(noisy, target): what the network sees, and what it is to predict. clean, noise [B, ...]; t [B] in 0..1."""

    def timestep(self, t: torch.Tensor) -> torch.Tensor:
        """t [B] → what the network's timestep embedding takes, [B]."""

    def t(self, timestep: torch.Tensor) -> torch.Tensor:
        """Entry of the scheduler's `timesteps` → t. A scheduler's sample is what `predict` sees once
        `scheduler.scale_model_input` has scaled it."""

    def min_snr(self, t: torch.Tensor, most: float) -> torch.Tensor:
        """min-SNR weights (arXiv 2303.09556) of the loss at times t: [B]. most: γ, the signal-to-noise ratio above
        which timesteps count less. Raises UserError for a process whose networks predict neither ε nor v."""

    def scheduler(self, shift: float | None = None) -> SchedulerMixin:
        """A diffusers scheduler of this process, no steps set. shift: instead of its own.

        Raises UserError for a shift where the process has none.
        """


@dataclass(frozen=True)
class Flow:
    """Flow matching (arXiv 2210.02747, 2209.03003)."""

    shift: float = 1.0
    name: str = field(default=EULER, repr=False)
    """diffusers class of the scheduler, EULER or one of SOLVERS: of no matter for anything but sampling."""
    configuration: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """Of one of SOLVERS, but for its shift."""

    STEPS = 1000
    """Network timesteps are t·1000."""

    @classmethod
    def of(cls, configuration: Mapping[str, Any]) -> "Flow":
        """The process that a scheduler's configuration describes. Raises UserError for a shift that is none, and a
        scheduler that diffusers does not make of it."""
        shift = configuration.get("flow_shift") or configuration.get("shift") or 1.0
        if not isinstance(shift, int | float) or not 0 < shift < math.inf:
            raise UserError(f"the scheduler's shift is {cut(repr(shift), 60)}: it must be a number above 0")
        name = configuration.get(CLASS)
        due = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "num_train_timesteps": cls.STEPS}
        said = {"num_train_timesteps": cls.STEPS, **configuration}
        if name not in SOLVERS or any(said.get(entry) != value for entry, value in due.items()):
            return cls(float(shift))
        try:
            own = _settings(cls(float(shift), name, _settings(configuration)).scheduler().config)
        except (TypeError, ValueError, NotImplementedError) as error:
            raise UserError(f"scheduler {name} cannot be made of its configuration: {one_line(error)}") from None
        return cls(float(shift), name, {key: value for key, value in own.items() if key != "flow_shift"})

    def pair(self, clean, noise, t):
        t = _beside(clean, t)
        return (1 - t) * clean + t * noise, noise - clean

    def towards(self, noisy: torch.Tensor, clean: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The velocity at times t [B] that leads to a clean clip; samplers of many steps round the last t to 0."""
        return (noisy - clean) / _beside(clean, t.clamp(min=1e-4))

    def timestep(self, t):
        return t.float() * self.STEPS

    def t(self, timestep):
        return timestep / self.STEPS

    def min_snr(self, t, most):
        raise UserError(f"train.min_snr={most:g} weights losses of ε or v: this network predicts a flow's velocity")

    def scheduler(self, shift=None):
        shift = self.shift if shift is None else shift
        if self.name == EULER:
            return FlowMatchEulerDiscreteScheduler(shift=shift)
        return getattr(diffusers, self.name).from_config({**self.configuration, "flow_shift": shift})


@dataclass(frozen=True)
class Diffusion:
    """Variance-preserving diffusion in N discrete steps (DDPM, arXiv 2006.11239; v: arXiv 2202.00512)."""

    prediction: Literal["epsilon", "v_prediction"]
    name: str
    """diffusers class of the scheduler."""
    configuration: Mapping[str, Any]
    """Configuration of the diffusers scheduler."""

    shift = 1.0

    @classmethod
    def of(cls, configuration: Mapping[str, Any]) -> "Diffusion":
        """The process that a scheduler's configuration describes. Raises UserError if it is of another kind."""
        name = configuration.get(CLASS, "")
        name = STEPS_PLAINLY.get(name, name)
        kind = getattr(diffusers, name, None)
        known = isinstance(kind, type) and issubclass(kind, SchedulerMixin)
        scheduler = kind.from_config(_settings(configuration)) if known else None
        if not hasattr(scheduler, "alphas_cumprod"):
            raise UserError(f"scheduler {name or 'of unknown class'!r} has no discrete steps to train on")
        prediction = scheduler.config.get("prediction_type", "epsilon")
        if prediction not in ("epsilon", "v_prediction"):
            raise UserError(f"scheduler prediction_type {prediction!r} is not known here: epsilon or v_prediction")
        return cls(prediction, name, _settings(scheduler.config))

    def pair(self, clean, noise, t):
        kept = self.kept.to(t.device)[self.timestep(t)]
        a, s = _beside(clean, kept.sqrt()), _beside(clean, (1 - kept).sqrt())
        noisy = a * clean + s * noise
        return noisy, noise if self.prediction == "epsilon" else a * noise - s * clean

    def timestep(self, t):
        return (t.double() * len(self.kept)).long().clamp(0, len(self.kept) - 1)

    def t(self, timestep):
        return (timestep + 0.5) / len(self.kept)

    def min_snr(self, t, most):
        kept = self.kept.to(t.device)[self.timestep(t)]
        return _min_snr(kept / (1 - kept), most, self.prediction)

    def scheduler(self, shift=None):
        _no_shift(shift)
        return getattr(diffusers, self.name).from_config(self.configuration)

    @cached_property
    def kept(self) -> torch.Tensor:
        """ᾱ of every step, float64 [N]."""
        return self.scheduler().alphas_cumprod.double()


@dataclass(frozen=True)
class Edm:
    """EDM over a log-normal σ (Karras et al., arXiv 2206.00364), v-prediction, as Stable Video Diffusion has it."""

    configuration: Mapping[str, Any]
    """Configuration of the EulerDiscreteScheduler."""
    mean: float = 0.7
    """Mean of log σ in training (arXiv 2311.15127, appendix: P_mean 0.7, P_std 1.6)."""
    std: float = 1.6

    shift = 1.0

    @classmethod
    def of(cls, configuration: Mapping[str, Any]) -> "Edm":
        """The process that a scheduler's configuration describes. Raises UserError if it is of another kind."""
        found = EulerDiscreteScheduler.from_config(_settings(configuration)).config
        given = configuration.get(CLASS), found.prediction_type, found.timestep_type
        if given != ("EulerDiscreteScheduler", "v_prediction", "continuous"):
            raise UserError(
                f"scheduler {', '.join(map(str, given))}: this family trains on EulerDiscreteScheduler, v_prediction, "
                "continuous"
            )
        return cls(_settings(found))

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        """σ of t, float64: the t-quantile of the training distribution, within the scheduler's range."""
        return torch.exp(self.mean + self.std * torch.special.ndtri(t.double())).clamp(*self.sigma_range)

    def pair(self, clean, noise, t):
        sigma = self.sigma(t)
        a = (1 + sigma**2).rsqrt()
        a, s = _beside(clean, a), _beside(clean, a * sigma)
        return a * clean + s * noise, a * noise - s * clean

    def timestep(self, t):
        return (self.sigma(t).log() / 4).float()

    def t(self, timestep):
        return torch.special.ndtr((timestep.double() * 4 - self.mean) / self.std)

    def min_snr(self, t, most):
        return _min_snr(self.sigma(t) ** -2, most, "v_prediction")

    def scheduler(self, shift=None):
        _no_shift(shift)
        return EulerDiscreteScheduler.from_config(self.configuration)

    @cached_property
    def sigma_range(self) -> tuple[float, float]:
        """Smallest and largest σ."""
        scheduler = self.scheduler()
        lowest, highest = scheduler.config.sigma_min, scheduler.config.sigma_max
        return lowest or scheduler.sigmas[-2].item(), highest or scheduler.sigmas[0].item()


def _min_snr(ratio: torch.Tensor, most: float, prediction: str) -> torch.Tensor:
    """Weights at signal-to-noise ratios: of ε's loss min(ratio, γ)/ratio, of v's min(ratio, γ)/(ratio + 1)."""
    if prediction == "epsilon":
        return (most / ratio).clamp(max=1)  # no signal at all: 1
    return ratio.clamp(max=most) / (ratio + 1)


def _settings(configuration: Mapping[str, Any]) -> dict[str, Any]:
    """Without the entries that diffusers adds."""
    return {key: value for key, value in configuration.items() if not key.startswith("_")}


def _beside(clean: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Values [B] in clean's type, shaped to stand beside it: [B, 1, ...]."""
    return values.to(clean).view(-1, *[1] * (clean.ndim - 1))


def _no_shift(shift: float | None) -> None:
    if shift is not None and not math.isclose(shift, 1):
        raise UserError(f"a timestep shift of {shift:g} was given: only flow-matching networks sample with one")
