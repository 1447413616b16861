"""Which timesteps are drawn, and what each counts: one law for training, scoring and held-out loss."""

from dataclasses import dataclass
from typing import Literal

Law = Literal["uniform", "logit_normal", "mode"]

SPREADS: dict[Law, float] = {"uniform": 1.0, "logit_normal": 1.0, "mode": 1.29}
"""Spread of each law where none is given: Stable Diffusion 3's (arXiv 2403.03206)."""
WIDEST_MODE = 1.75
"""Spread of `mode` from which on its timesteps would no longer rise with their quantile (2 / (π - 2))."""
KNOWN_SHIFT, KNOWN_PIXELS = 3.0, 81 * 480 * 832
"""A timestep shift that is known to suit clips of so many pixels: Wan's at 480p."""


@dataclass(frozen=True)
class Timesteps:
    """A law of timesteps t in 0..1, and weights of their losses."""

    law: Law = "uniform"
    mean: float = 0.0
    """Of logit(t), for `logit_normal`."""
    spread: float = 1.0
    """Standard deviation of logit(t) for `logit_normal`, scale s for `mode`."""
    shift: float = 1.0
    """Moves t towards noise (> 1) or away from it, after the law."""
    min_snr: float | None = None
    """γ of min-SNR weights; None: every timestep counts alike."""
