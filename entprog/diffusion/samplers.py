"""Which of diffusers' schedulers walks a noise process back: the checkpoint's own, or another that fits it.

A scheduler fits when its sample is what the network was trained on, and its model output what the network predicts:

    Flow        FlowMatchEuler and FlowMatchHeun, and solvers that take `use_flow_sigmas` (UniPC, DPM-Solver++, DEIS …)
    Diffusion   those that diffusers itself counts as compatible with the checkpoint's, if what they take of its
                configuration leads to the same ᾱ
    Edm         Euler, and EDM's own with σ_data = 1
"""

import inspect
from collections.abc import Mapping
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SchedulerMixin
from diffusers.utils import logging

from entprog.config import close_to
from entprog.diffusion.processes import Diffusion, Edm, Process
from entprog.errors import UserError

FLOW_MATCHING = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
EDM_SAMPLERS = ("EDMDPMSolverMultistepScheduler", "EDMEulerScheduler", "EulerDiscreteScheduler")
KEPT_WITHIN = 1e-4
"""Most by which a scheduler's ᾱ may differ from its process's."""


def sampler(process: Process, name: str | None, shift: float | None = None) -> SchedulerMixin:
    """A scheduler with no steps set. name: a diffusers class, None: the checkpoint's own.

    Raises UserError for a name that is none of diffusers' schedulers, or one that does not fit the process.
    """
    own = process.scheduler(shift)
    if name is None or name == type(own).__name__:
        return own
    kind = getattr(diffusers, name, None)
    if not _fits(process, kind):
        fitting = samplers(process)
        known = isinstance(kind, type) and issubclass(kind, SchedulerMixin)
        what = "does not fit this checkpoint's noise" if known else "is no scheduler of diffusers"
        raise UserError(f"generate.sampler: {name} {what}{close_to(name, fitting)}; fitting: {', '.join(fitting)}")
    return _build(process, kind, shift)


def samplers(process: Process) -> list[str]:
    """Names of the diffusers classes that fit a process."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # what diffusers would say of those that do not fit
    try:
        return [
            name for name in dir(diffusers) if name.endswith("Scheduler") and _fits(process, getattr(diffusers, name))
        ]
    finally:
        logging.set_verbosity(verbosity)


def _fits(process: Process, kind: Any) -> bool:
    if not _steps_plainly(kind):
        return False
    if isinstance(process, Edm):
        return kind.__name__ in EDM_SAMPLERS
    if isinstance(process, Diffusion):
        own = process.scheduler()
        return kind in (type(own), *own.compatibles) and _keeps(_build(process, kind), process.kept)
    if kind.__name__ in FLOW_MATCHING:
        return True
    return "use_flow_sigmas" in _parameters(kind.__init__) and _ends_clean(_build(process, kind))


def _build(process: Process, kind: type[SchedulerMixin], shift: float | None = None) -> SchedulerMixin:
    if isinstance(process, Diffusion):
        # Without the entries that this class does not have, of which diffusers would speak.
        configuration = {k: v for k, v in process.scheduler().config.items() if k in _parameters(kind.__init__)}
        return kind.from_config(configuration)
    if isinstance(process, Edm):
        low, high = process.sigma_range
        return kind(prediction_type="v_prediction", sigma_data=1.0, sigma_min=low, sigma_max=high)
    shift = process.shift if shift is None else shift
    if kind.__name__ in FLOW_MATCHING:
        return kind(shift=shift)
    return kind(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)


def _keeps(scheduler: SchedulerMixin, kept: torch.Tensor) -> bool:
    """Whether its ᾱ are those of a process: a class that lacks entries of the configuration (CogVideoX'
    `snr_shift_scale`, `rescale_betas_zero_snr`) walks another one. Some lift an ᾱ of 0 by less than KEPT_WITHIN."""
    found = getattr(scheduler, "alphas_cumprod", None)
    return found is not None and found.shape == kept.shape and bool((found - kept).abs().max() <= KEPT_WITHIN)


def _ends_clean(scheduler: SchedulerMixin) -> bool:
    """Whether the last step leads to the clip: some stop a step before it in flow matching, or go towards noise."""
    scheduler.set_timesteps(4)
    return float(scheduler.sigmas[-1]) == 0


def set_steps(scheduler: SchedulerMixin, steps: int, device: torch.device) -> None:
    """Flow matching's own Euler spaces steps evenly in t from 1 to 0, before the shift; others as they do."""
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), device=device)
    else:
        scheduler.set_timesteps(steps, device=device)
    # Timesteps in whole numbers may begin with equal ones, of which diffusers would take the second.
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)


def _steps_plainly(kind: Any) -> bool:
    """Whether it is a scheduler that is there, and one step needs a prediction, its timestep and the sample alone."""
    if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin) and hasattr(kind, "step")):
        return False
    needed = [n for n, p in _parameters(kind.step).items() if p.default is inspect.Parameter.empty and n != "self"]
    return needed == ["model_output", "timestep", "sample"]


def _parameters(function: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters
