"""Conditions that clips are shown without: in training some of the time, in guidance for comparison."""

from collections.abc import Collection
from dataclasses import replace

import torch

from entprog.config import Drop
from entprog.data.clips import Latents
from entprog.diffusion import objectives
from entprog.diffusion.denoiser import Denoiser

DRAWS = {"text": 2, "reference": 3, "pose": 4}
"""Number of each condition's draw for a clip (`objectives.uniform`)."""
BELONGS = {"image": "reference", "pooled": "text", "face": "pose"}
"""Conditions that are there exactly where another one is: image tokens of the reference, a caption's pooled text, what
a face does beside the pose."""

ALWAYS = ("text", "background")
"""Conditions that are never zeroed: without a text a clip sees what stands for none (`textless`), and what lies around
a person that is replaced is what all predictions are of."""


def dropped(denoiser: Denoiser, batch: Latents, drop: Drop, seed: int) -> Latents:
    """The batch with each condition withheld from a share of its clips, independently of the other conditions.

    Which clips those are is a function of (seed, position). The same batch where every share is 0.
    """
    conditions = dict(batch.conditions)
    for name, draw in DRAWS.items():
        rate = getattr(drop, name)
        if rate == 0 or (name != "text" and name not in conditions):
            continue
        whole = conditions[name] if name in conditions else denoiser.text.expand(len(batch.position), -1, -1)
        none = denoiser.no_text if name == "text" else {}
        nothing = none[name].to(whole) if name in none else torch.zeros_like(whole)
        hidden = objectives.uniform(batch.position, seed, draw) < rate
        hidden = hidden.to(whole.device).view(-1, *[1] * (whole.ndim - 1))
        conditions[name] = torch.where(hidden, nothing, whole)
        for part in [part for part, whose in BELONGS.items() if whose == name and part in conditions]:
            seen = conditions[part]
            gone = none[part].to(seen) if part in none else seen.new_zeros(1)
            conditions[part] = torch.where(hidden.view(-1, *[1] * (seen.ndim - 1)), gone, seen)
    return replace(batch, conditions=conditions)


def without(conditions: dict[str, torch.Tensor], shown: Collection[str]) -> dict[str, torch.Tensor]:
    """The conditions as they are seen where only those named in `shown` are given, and those of ALWAYS: the others are
    zeros, as in `dropped`."""
    kept = {name for name in conditions if BELONGS.get(name, name) in (*shown, *ALWAYS)}
    return {name: value if name in kept else torch.zeros_like(value) for name, value in conditions.items()}


def textless(denoiser: Denoiser, conditions: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The conditions with what stands for no text in place of a text, as in `dropped`."""
    return {**conditions, "text": torch.zeros_like(denoiser.text), **denoiser.no_text}


def named(conditions: dict[str, torch.Tensor]) -> tuple[str, ...]:
    """The conditions beside the text that guidance has a strength for."""
    return tuple(name for name in conditions if name not in (*ALWAYS, *BELONGS))
