"""How runs are run, in words that are equal where they are run alike: what changes nothing but a step's seconds."""

import json
from collections.abc import Mapping
from typing import Any

from entprog import config

DEFAULTS = config.settings(config.Experiment(train=config.Train(steps=1)))
"""What a run had that was made before a setting came to be."""
SPEED = (
    "train.accumulate", "train.parallel", "train.replicas", "data.decode", "data.decode_cpus", "model.swap_blocks",
)  # fmt: skip
"""Settings that change nothing but the seconds of a step: not what a method gains. Workers are told apart from them
(tag `entprog.workers`): an elastic run changes their number by itself."""
PLAIN = "as by default"


def way(settings: Mapping[str, Any]) -> str:
    """A run's settings of SPEED that are not the default. settings: by dotted name, as `config.settings` has them."""
    values = {name: text(settings.get(name, DEFAULTS[name])) for name in SPEED}
    return ", ".join(f"{name} {value}" for name, value in values.items() if value != text(DEFAULTS[name])) or PLAIN


def text(value: Any, digits: int = 6) -> str:
    """A setting's value for people, numbers to so many significant digits."""
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:.{digits}g}"
    if isinstance(value, list | tuple) and value and not any(isinstance(v, dict | list) for v in value):
        return "/".join(text(v, digits) for v in value)
    return json.dumps(value, default=str)
