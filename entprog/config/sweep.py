"""Settings of `tune`: an experiment many times over."""

from typing import Literal, get_args

from pydantic import Field, model_validator

from entprog.config.experiment import Experiment
from entprog.config.part import Part

Objective = Literal["held_out_loss", "seconds_to_target", "peak_memory_bytes"]
OBJECTIVES: tuple[str, ...] = get_args(Objective)


class Tune(Part):
    """How settings are searched for (`pipelines.tune`)."""

    trials: int = Field(default=20, ge=1)
    """Settings tried. With `search` grid: the most that the grid may have."""
    search: Literal["optuna", "random", "grid"] = "optuna"
    """Where the next settings come from: Optuna's TPE, chance, or every combination."""
    seeds: int = Field(default=1, ge=1)
    """Trainings of each trial, with `train.seed`, `train.seed` + 1, …; a trial's figures are their means."""
    objectives: tuple[Objective, ...] = ("held_out_loss",)
    """What is to be small. With several, the settings that no other beats in all of them are kept (Pareto front)."""
    target_loss: float | None = Field(default=None, gt=0)
    """Held-out loss whose reaching `seconds_to_target` times; not reached counts as twice the budget."""
    early_stop: bool = True
    """End trials whose first seed's held-out loss is not among the best at equal charged seconds (ASHA). Needs the one
    objective held_out_loss."""
    reduction: int = Field(default=3, ge=2)
    """The best 1/`reduction` go on at each such decision."""
    rungs: int = Field(default=2, ge=1, le=6)
    """Decisions in a trial: after 1/`reduction`^k of its seconds, k = `rungs` … 1."""
    concurrent: int | None = Field(default=None, ge=1)
    """Trials at once. None: as many as the cluster holds with their decoding."""
    retries: int = Field(default=1, ge=0)
    """Times that a trial which failed is tried again, from its checkpoint, before it is marked."""
    grid_points: int = Field(default=3, ge=2)
    """With `search` grid: evenly spaced values of a range."""
    seed: int = Field(default=0, ge=0)
    """Seed of the search."""

    @property
    def decisions(self) -> tuple[float, ...]:
        """Shares of a trial's seconds after which it is decided whether it goes on, rising."""
        return tuple(self.reduction**-k for k in range(self.rungs, 0, -1))

    @model_validator(mode="after")
    def _is_whole(self):
        if not self.objectives or len(set(self.objectives)) < len(self.objectives):
            raise ValueError("tune.objectives needs at least one objective, each once")
        if "seconds_to_target" in self.objectives and self.target_loss is None:
            raise ValueError("the objective seconds_to_target needs tune.target_loss, a held-out loss to reach")
        return self


class Sweep(Experiment):
    """An experiment and the search over its settings."""

    tune: Tune = Tune()

    def experiment(self) -> Experiment:
        """The experiment that trials vary."""
        return Experiment.model_validate(self.model_dump(exclude={"tune"}))
