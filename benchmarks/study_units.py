"""The study's units of work, each with a record in a file of its own, and where they are done.

A record is a function of its unit, the scale and the code: nothing in `study_work` knows what other units found, but
for the base that all start from, the budget that all have, and the learning rate that tuning chose.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.study_arms import TASKS, Scale
from entprog.training.steps import Step

Kind = Literal["clips", "base", "budget", "scores", "tune", "run", "hindsight"]


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One piece of work; its record is its own file."""

    kind: Kind
    task: str
    arm: str = "full"
    seed: int = 0
    rate: float | None = None
    """Kind `tune`: the learning rate that is tried."""
    batch: int | None = None
    """Kind `tune`: with batches of so many clips."""
    stage: int = 0
    """Kind `hindsight`: the stage whose choice is looked at."""

    @property
    def file(self) -> str:
        """Its record's path inside the work folder."""
        ending = {"tune": f"-{self.rate}-{self.batch}", "hindsight": f"-stage{self.stage}"}.get(self.kind, "")
        return f"units/{self.task}/{self.kind}/{self.arm}-seed{self.seed}{ending}.json"


@dataclass(frozen=True, eq=False)
class Bench:
    """Where the study works, and at which scale."""

    scale: Scale
    work: Path
    device: torch.device
    kept: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Records that the result file holds of earlier sittings, by their files, whose folder may be gone."""
    busy: bool = False
    """Whether others work on the machine, so that seconds say nothing."""

    def base(self, family: str) -> str:
        return str(self.work / "bases" / family)

    def base_of(self, unit: Unit) -> str:
        return self.base(TASKS[unit.task].family)

    def shards(self, target: str) -> Path:
        return self.work / "mocap" / target if target in ("source", "target") else self.work / target

    def spent(self, step: Step) -> float:
        """In the scale's clock."""
        return step.flops if self.scale.clock == "flops" else step.charged_s


SECONDS = ("unit_s", "wall_s", "cpu_s", "seconds")


def without_seconds(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a unit, and its curve, with None for all seconds."""
    bare = {**record, **{name: None for name in SECONDS if name in record}}
    return bare | {"curve": [without_seconds(point) for point in record["curve"]]} if "curve" in record else bare
