"""What the parts of `benchmarks.gpu_check` share: clips, settings of a step, and what cannot be measured here."""

from typing import Any

from benchmarks.tiny_families import WAN
from entprog import config
from entprog.config import ClipShape, Experiment

Row = dict[str, Any]
REPEATS = 3
"""Timed steps of each plan, interleaved."""
FP8_WAN = {**WAN, "attention_head_dim": 16}
"""Sizes that fp8 kernels take."""
QUARTER = 0.25
"""m/L of the plans beside full training."""
CLIPS = {3_200: (2, ClipShape(frames=5, height=64, width=40)), 20_000: (1, ClipShape(frames=25, height=64, width=50))}
"""Tokens of a clip → clips of a step and their shape in pixels, four of which are a token."""
TINY_CLIPS = {
    3_200: (2, ClipShape(frames=1, height=16, width=16)),
    20_000: (1, ClipShape(frames=2, height=16, width=16)),
}


class SkippedError(Exception):
    """A part that cannot be measured here; the message says why."""


def step_experiment(network: Row, tokens: int, device: str, **parts: Row) -> Experiment:
    """Settings of a step on random clips of so many tokens; `parts` are nested settings over that."""
    clips, shape = (TINY_CLIPS if device == "cpu" else CLIPS)[tokens]
    values = {
        "model": {"init": network, "vae": "none", "dtype": "bfloat16"},
        "data": {"shape": shape.model_dump(), "batch_size": clips},
        "train": {"steps": 1, "learning_rate": 1e-30},  # too small to move a weight: see `rounded`
    }
    return config.build(config.merge(values, parts))
