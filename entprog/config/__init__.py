"""Settings: typed, frozen, checked before anything starts.

A setting has one spelling everywhere: `schedule.cei_threshold` in a preset, in
`--set schedule.cei_threshold=0.2`, as a Ray Tune key and as an MLflow parameter. The docstring under
each field is its documentation (`python -m pipelines.train --help-settings` prints them all).
"""

from entprog.config.evaluation import Evaluate, Evaluation
from entprog.config.experiment import PRIORITY_KINDS, Data, Experiment, Priority, Tracking
from entprog.config.jobs import Compare, Comparison, Encoding, Generate, Generation, Ladder, Preparation, Prepare, Shape
from entprog.config.model import Attention, Model, Skeleton
from entprog.config.part import Part
from entprog.config.phases import phases
from entprog.config.reading import (
    ADDED,
    FREE,
    PATHS,
    WHOLE,
    build,
    changed,
    close_to,
    deciding,
    digest,
    explained,
    flat,
    is_part_of,
    merge,
    only,
    parse_overrides,
    presets,
    read_preset,
    read_yaml,
    settings,
    settings_help,
)
from entprog.config.schedule import KINDS, Backward, Choose, Fraction, FrozenPrecision, Row, Schedule
from entprog.config.shapes import ClipShape, Smaller
from entprog.config.sweep import OBJECTIVES, Sweep, Tune
from entprog.config.timesteps import Timesteps
from entprog.config.training import Drop, Lora, OptimizerKind, Train
from entprog.config.written import meaning, suited

__all__ = [
    "ADDED",
    "FREE",
    "KINDS",
    "OBJECTIVES",
    "PATHS",
    "PRIORITY_KINDS",
    "WHOLE",
    "Attention",
    "Backward",
    "Choose",
    "ClipShape",
    "Compare",
    "Comparison",
    "Data",
    "Drop",
    "Encoding",
    "Evaluate",
    "Evaluation",
    "Experiment",
    "Fraction",
    "FrozenPrecision",
    "Generate",
    "Generation",
    "Ladder",
    "Lora",
    "Model",
    "OptimizerKind",
    "Part",
    "Preparation",
    "Prepare",
    "Priority",
    "Row",
    "Schedule",
    "Shape",
    "Skeleton",
    "Smaller",
    "Sweep",
    "Timesteps",
    "Tracking",
    "Train",
    "Tune",
    "build",
    "changed",
    "close_to",
    "deciding",
    "digest",
    "explained",
    "flat",
    "is_part_of",
    "meaning",
    "merge",
    "only",
    "parse_overrides",
    "phases",
    "presets",
    "read_preset",
    "read_yaml",
    "settings",
    "settings_help",
    "suited",
]
