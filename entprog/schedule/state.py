"""Where a run stands: everything a resume needs beside the weights."""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, get_type_hints

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer, create_model

from entprog.config import ClipShape
from entprog.cost.model import CostModel
from entprog.schedule.efficiency import Decision, Trial
from entprog.schedule.plans import Plan


@dataclass
class Charged:
    """What has been spent, by purpose. Evaluation for the record and checkpoints are not charged."""

    train: float = 0.0
    search: float = 0.0
    score: float = 0.0

    @property
    def total(self) -> float:
        return self.train + self.search + self.score

    def add(self, purpose: str, amount: float) -> None:
        setattr(self, purpose, getattr(self, purpose) + amount)


def _read(kept: Any) -> Any:
    """Cost models from JSON. Those of a checkpoint that does not say how many ranks share the weights are of some
    number's parts: they are left out, and measured anew."""
    return {ClipShape(**key): model for key, model in kept if "parts" in model} if isinstance(kept, list) else kept


CostModels = Annotated[
    dict[ClipShape, CostModel],
    PlainSerializer(lambda models: list(models.items()), return_type=list[tuple[ClipShape, CostModel]]),
    BeforeValidator(_read),
]
"""In JSON a list of pairs, whose keys are text alone."""
TENSORS = ("optimizer", "ema")
"""Fields of RunState whose tensors a checkpoint keeps in files of their own."""
ADDED = ("opening_cost", "workers", "devices", "latents", "ways", "stage_flops")
"""Fields that a checkpoint may lack, which was written before there were any: their defaults stand."""


@dataclass
class RunState:
    """Changes at every update; saved whole at step boundaries (`entprog.training.checkpoint`)."""

    optimizer: torch.optim.Optimizer
    ema: dict[str, torch.Tensor] = field(default_factory=dict)
    """Name → averaged weight of every parameter trained so far; of a frozen block as it was when the block froze."""
    ema_gaps: dict[str, float] = field(default_factory=dict)
    """Block trained so far → how much of the way from its weights to its averages is left (`training.averages`)."""
    step: int = 0
    """Updates done, skipped ones included."""
    skipped: int = 0
    """Updates skipped because loss or gradient was not finite."""
    skipped_in_a_row: int = 0
    """Of them, up to the last update without a break."""
    position: int = 0
    """Clips consumed, over all ranks."""
    workers: tuple[int, ...] = ()
    """How many there were, one after another: an elastic run, or a resume, goes on with another number."""
    devices: tuple[str, ...] = ()
    """On what it ran, one after another: rank 0's device."""
    latents: tuple[str, ...] = ()
    """Where clips' latents came from, one after another, in words."""
    ways: tuple[str, ...] = ()
    """How it ran, one after another: settings that change a step's seconds alone, in words."""
    stage: int = -1
    """Stage in progress, 0-based; -1 before the first."""
    stage_step: int = 0
    """Step at which it began."""
    draw: int = 0
    """How often it has drawn its blocks anew."""
    waits: bool = False
    """Whether the stage's search is still to come, after the warm-up."""
    plan: Plan | None = None
    """What is trained; None while the stage's search goes on."""
    candidates: tuple[Plan, ...] = ()
    trials: list[Trial] = field(default_factory=list)
    """The stage's search steps so far."""
    loss_now: float | None = None
    """Search loss of the weights as they are, if just measured."""
    search_cost: float = 0.0
    """Cost of the stage's search so far, in the schedule's clock."""
    opening_cost: float = 0.0
    """The part of it before the first trial: counting and timing candidates, once however many rounds follow."""
    decisions: list[Decision] = field(default_factory=list)
    seconds: Charged = field(default_factory=Charged)
    """Slowest rank's seconds."""
    flops: Charged = field(default_factory=Charged)
    """Counted FLOPs of all ranks."""
    fitting: str = ""
    """Which of the stage's plans fit the memory budget, in words."""
    priority: dict[str, float] = field(default_factory=dict)
    """By which blocks are ranked since they were scored again (`priority.rescore`); empty: by the first table."""
    models: CostModels = field(default_factory=dict)
    """Measured before the first search."""
    stage_flops: tuple[float, ...] = ()
    """Of each stage: counted FLOPs of a step, all ranks; empty where searches decide, or no number of steps is set."""
    begun: dict[str, int] = field(default_factory=dict)
    """Trained block → step at which it began to be trained."""
    saved_cost: float = 0.0
    """What training steps have saved against full training, in the schedule's clock."""
    break_even_step: int | None = None
    """Step from which on that has paid for all search and scoring so far; None: not yet, or not for the last of it."""
    peak_memory_bytes: int = 0
    """Largest so far, per device (counted on the CPU)."""

    def goes_on(self, **now: Any) -> None:
        """Take down with how many workers, on what and how a run goes on, where that is not as it was last."""
        for name, value in now.items():
            had = getattr(self, name)
            if had[-1:] != (value,):
                setattr(self, name, (*had, value))

    def as_json(self) -> dict[str, Any]:
        """Every field but those that hold tensors. Floats survive JSON to the bit, also what is not finite."""
        kept = _saved_fields()
        return json.loads(kept(**{name: getattr(self, name) for name in kept.model_fields}).model_dump_json())

    def update(self, values: Mapping[str, Any]) -> None:
        """Take back what `as_json` gave. Raises ValueError for anything else."""
        kept = _saved_fields().model_validate(values)
        for name in type(kept).model_fields:
            setattr(self, name, getattr(kept, name))


@functools.cache
def _saved_fields() -> type[BaseModel]:
    """The fields of RunState that go into JSON, with their types: a field that is added to it is saved too."""
    kinds = get_type_hints(RunState, include_extras=True)
    kept = [field for field in fields(RunState) if field.name not in TENSORS]
    named = {field.name: (kinds[field.name], field.default if field.name in ADDED else ...) for field in kept}
    settings = ConfigDict(extra="forbid", ser_json_inf_nan="strings")  # strict JSON has no number for them
    return create_model("SavedFields", __config__=settings, **named)
