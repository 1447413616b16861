"""Where a run stands: everything a resume needs beside the weights."""

from dataclasses import dataclass, field
from typing import Any

import torch

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


@dataclass
class RunState:
    """Changes at every update; saved whole at step boundaries (`entprog.training.fit.checkpoint`)."""

    optimizer: torch.optim.Optimizer
    ema: dict[str, torch.Tensor] = field(default_factory=dict)
    """Name → averaged weight of every parameter trained so far."""
    step: int = 0
    """Updates done."""
    position: int = 0
    """Clips consumed, over all ranks."""
    stage: int = -1
    """Stage in progress, 0-based; -1 before the first."""
    plan: Plan | None = None
    """The stage's plan; None while its search goes on."""
    candidates: tuple[Plan, ...] = ()
    trials: list[Trial] = field(default_factory=list)
    """The stage's search steps so far."""
    loss_now: float | None = None
    """Search loss of the weights as they are, if just measured."""
    search_cost: float = 0.0
    """Cost of the stage's search so far, in the schedule's clock."""
    decisions: list[Decision] = field(default_factory=list)
    seconds: Charged = field(default_factory=Charged)
    """Slowest rank's seconds."""
    flops: Charged = field(default_factory=Charged)
    """Counted FLOPs of all ranks."""
    fitting: str = ""
    """Which of the stage's plans fit the memory budget, in words."""
    models: dict[ClipShape, CostModel] = field(default_factory=dict)
    """Measured before the first search."""
    begun: dict[str, int] = field(default_factory=dict)
    """Trained block → step at which it began to be trained."""
    saved_cost: float = 0.0
    """What training steps have saved against full training, in the schedule's clock."""
    break_even_step: int | None = None
    """Step at which that had paid for search and scoring; None: not yet."""
    peak_memory_bytes: int = 0
    """Largest so far, per device (counted on the CPU)."""

    PLAIN = (
        "step", "position", "stage", "loss_now", "search_cost", "fitting", "begun", "saved_cost", "break_even_step",
        "peak_memory_bytes",
    )  # fmt: skip

    def as_json(self) -> dict[str, Any]:
        """Everything but tensors. Floats survive JSON to the bit."""
        return {name: getattr(self, name) for name in self.PLAIN} | {
            "plan": self.plan and self.plan.as_json(),
            "candidates": [plan.as_json() for plan in self.candidates],
            "trials": [vars(trial) for trial in self.trials],
            "decisions": [decision.as_json() for decision in self.decisions],
            "models": [[shape.model_dump(), model.as_json()] for shape, model in self.models.items()],
            "seconds": vars(self.seconds),
            "flops": vars(self.flops),
        }

    def update(self, values: dict[str, Any]) -> None:
        """Take back what `as_json` gave."""
        for name in self.PLAIN:
            setattr(self, name, values[name])
        self.plan = values["plan"] and Plan.from_json(values["plan"])
        self.candidates = tuple(Plan.from_json(plan) for plan in values["candidates"])
        self.trials = [Trial(**trial) for trial in values["trials"]]
        self.decisions = [Decision.from_json(decision) for decision in values["decisions"]]
        self.models = {ClipShape(**shape): CostModel.from_json(model) for shape, model in values["models"]}
        self.seconds = Charged(**values["seconds"])
        self.flops = Charged(**values["flops"])
