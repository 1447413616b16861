"""What is trained when: clip shapes, blocks and how gradient crosses the others, over a run's budget."""

import itertools
from collections.abc import Callable
from typing import Annotated, Literal, get_args

from pydantic import ByteSize, Field, model_validator

from entprog.config.part import Part
from entprog.config.shapes import Smaller

Fraction = Annotated[float, Field(gt=0, le=1)]
Backward = Literal["exact", "residual"]
FrozenPrecision = Literal["auto", "full", "fp8", "fp8_alone", "nf4"]
Outside = Literal["always", "conditions", "never"]
Choose = Literal["top", "random", "weighted"]
Kind = Literal["full", "progressive", "entprog", "linear", "lisa", "badam"]
KINDS: tuple[Kind, ...] = get_args(Kind)


class Row(Smaller):
    """A row of `schedule.table`: what is trained until a share of the budget is used up."""

    until: Fraction
    """Share of the budget at which the row ends, in the budget's own unit (of several, of the one that is ahead); the
    last row's is 1. Half of `train.steps` on small clips is far less than half of the FLOPs or seconds."""
    share: Fraction = 1.0
    """Share of the blocks that is trained."""
    backward: Backward | None = None
    """How gradient crosses the others. None: as `schedule.backward` says."""
    choose: Choose = "top"
    """Which blocks: those of highest priority, any, or any in proportion to their priority."""
    redraw_every: int | None = Field(default=None, ge=1)
    """Steps after which `random` and `weighted` draw again. None: one draw for the row."""

    @model_validator(mode="after")
    def _draws_what_can_be_drawn(self):
        if self.redraw_every is not None and self.choose == "top":
            raise ValueError("redraw_every needs blocks that are drawn: set choose to random or weighted")
        return self

    @property
    def ranks(self) -> bool:
        """Whether it needs to know which blocks matter most."""
        return self.share < 1 and self.choose != "random"


class Schedule(Part):
    """What is trained when (Ent-Prog §3.3-3.4)."""

    kind: Kind = "progressive"
    """`full`: all blocks always, on whole clips; `progressive`: as `table` says; `entprog`: the search decides;
    `linear`: top-m grows evenly with stages; `lisa`: a random share of the blocks, another one each stage; `badam`: one
    block a stage, in turns (`entprog/schedule/rotation.py`)."""
    table: tuple[Row, ...] = (Row(until=0.5, shrink=2), Row(until=1.0))
    """Kind `progressive`: rows in their order, each with `until` (share of the budget at which it ends, the last one's
    is 1), `frames` and `shrink` (clip shape, as in `shapes`; the last row's is `data.shape`), `share` of the blocks,
    `backward`, `choose` (top, random or weighted by priority) and `redraw_every` (steps between two draws)."""
    stages: int = Field(default=3, ge=1)
    """K, stages of equal budget, of every kind but `full` and `progressive`."""
    lisa_share: Fraction = 0.25
    """Kind `lisa`: share of the blocks that a stage trains."""
    candidates: tuple[Fraction, ...] = (0.25, 0.5, 0.75, 1.0)
    """Numbers of trained blocks to choose from, as fractions of L."""
    generators: tuple[Literal["count", "suffix", "budget"], ...] = ("count",)
    """Where candidates come from: top-m blocks (the paper); top-m among the last blocks alone, so that exact backward
    ends early; or the largest sum of priorities that a step budget pays for (`budgets`)."""
    suffixes: tuple[Fraction, ...] = (0.5,)
    """Generator `suffix`: shares of the blocks, counted from the last, that top-m is taken among."""
    budgets: tuple[Fraction, ...] = (0.5, 0.7, 0.85)
    """Generator `budget`: what a step may cost, as fractions of full training's."""
    shapes: tuple[Smaller, ...] = ()
    """Smaller clips, smallest first. Kind `entprog`: all stages but the last may also train on them; `linear`, `lisa`
    and `badam`: stages go through them evenly, the last on whole clips. Held-out loss is always at `data.shape`."""
    tokens: Literal["fewer", "constant"] = "fewer"
    """What smaller clips change: `fewer` tokens a step, of `data.batch_size` clips; or tokens stay `constant` and a
    batch holds the number of clips that comes nearest to as many pixels, with at most a tenth more."""
    timestep_shift: Literal["fixed", "auto"] = "fixed"
    """Of smaller clips: `fixed`, that of whole clips, or `auto`: times the root of their share of the pixels, since the
    same noise hides less of what fewer pixels show. With `train.timestep_shift=auto` it is always that."""
    memory_budget_bytes: ByteSize | None = Field(default=None, gt=0)
    """Bytes, or like 24GB or 22.5GiB. Plans whose predicted peak memory per device is above this are left out."""
    search_steps: int = Field(default=4, ge=1)
    """S, steps per candidate in a stage's search."""
    search_until_clear: bool = True
    """Search beyond `search_steps` while the intervals of the best two overlap and `search_share` allows."""
    search_clips: int = Field(default=8, ge=1)
    """Held-out clips of a search's evaluations, at most `data.held_out_clips`; each at one timestep, so that few
    see little of the law of timesteps."""
    search_share: float = Field(default=0.05, ge=0, le=1)
    """Largest share of a stage's budget spent on its search."""
    efficiency: Literal["paired", "paper"] = "paired"
    """Loss drop credited to a candidate: across its own step, or the paper's telescoping sum, which needs two steps of
    each."""
    backward: Backward | tuple[Backward, ...] = "exact"
    """How gradient crosses a frozen block: `exact` through it, `residual` along its skip connection alone; both in a
    list: candidates of each."""
    frozen_precision: FrozenPrecision = "auto"
    """What frozen blocks are held and computed in. `auto`: with model.dtype=bfloat16 their layers' weights are stored
    in bfloat16, to which they are rounded at every use anyway (equal bits), and the float32 ones of those that training
    changed wait in host memory; `full`: in float32 on the device; `fp8`: as `auto`, and under residual backward linear
    layers compute in 8 bits through torchao (GPUs of compute capability 8.9 and later), while evaluation, and blocks
    that gradient crosses exactly, stay full. `fp8_alone`, `nf4`: linear layers' weights are held in 1 or in 0.53 bytes
    a number and nothing beside that on the device, and used in bfloat16; float32 ones of blocks that may thaw wait in
    host memory, those under adapters nowhere. With train.parallel=fsdp `auto` and `full` alone, of a worker's parts."""
    cei_threshold: float | None = None
    """Blocks with priority below this stay frozen until the last stage."""
    monotone: bool = False
    """Candidates never shrink from one stage to the next."""
    blocks: Literal["all", "spatial", "temporal", "control"] = "all"
    """Which blocks may be trained: all; those that mix positions within a frame, or those that mix frames (a network
    without any of that kind trains all); or those of a VACE base's control branch, as its makers fine-tune it (another
    base is refused)."""
    outside: Outside | None = None
    """Parameters outside blocks: `always`, all are trained; `conditions`, only the layer through which conditions enter
    (of VACE the control's embedding, not the clip's); `never`, none. None: `conditions` with `train.lora`, else
    `always`."""
    clock: Literal["seconds", "flops"] = "seconds"
    """What a step costs the search: measured seconds, or counted FLOPs (repeatable to the bit)."""

    @property
    def searches_shapes(self) -> bool:
        """Whether a search tries several clip shapes."""
        return self.kind == "entprog" and bool(self.shapes)

    @property
    def needs_scores(self) -> bool:
        """Whether blocks are ranked."""
        if self.kind == "progressive":
            return any(row.ranks for row in self.table)
        if self.kind == "linear":
            return self.stages > 1
        some = min(self.candidates) < 1 or "budget" in self.generators or self.cei_threshold is not None
        return self.kind == "entprog" and some

    def uses(self, setting: str) -> bool:
        """Whether this schedule would be another one with another value of a setting of this class, by its name."""
        return USED.get(setting, lambda schedule: True)(self)

    def freezes(self, rescored: bool) -> bool:
        """Whether a block may be frozen after it was trained. rescored: whether blocks are ranked anew in every stage
        (`priority.rescore`)."""
        if self.kind == "progressive":
            redrawn = any(row.redraw_every is not None and row.share < 1 for row in self.table)
            return redrawn or any(_drops(*pair, rescored) for pair in itertools.pairwise(self.table))
        if self.kind == "linear":  # which only grows, and ends with all
            return rescored and self.stages > 2
        if self.kind == "entprog" and "suffix" in self.generators:
            return True
        return self.needs_scores or (self.kind in ("lisa", "badam") and self.stages > 1)

    @property
    def has_smaller_clips(self) -> bool:
        """Whether it trains on clips smaller than `data.shape`."""
        if self.kind == "progressive":
            return any(row.frames is not None or row.shrink > 1 for row in self.table)
        return self.kind != "full" and self.stages > 1 and bool(self.shapes)

    @property
    def backwards(self) -> tuple[Backward, ...]:
        """`backward` as a tuple."""
        return (self.backward,) if isinstance(self.backward, str) else self.backward

    @model_validator(mode="after")
    def _has_candidates(self):
        if not self.generators or not self.backwards:
            raise ValueError("schedule.generators and schedule.backward need at least one entry each")
        return self

    @model_validator(mode="after")
    def _estimator_has_enough(self):
        if self.kind == "entprog" and self.efficiency == "paper" and self.search_steps < 2:
            raise ValueError(
                "schedule.efficiency=paper compares steps of a candidate: set schedule.search_steps to 2 or more"
            )
        return self

    @model_validator(mode="after")
    def _table_is_whole(self):
        ends = [row.until for row in self.table]
        if not ends or ends[-1] != 1 or any(b <= a for a, b in itertools.pairwise(ends)):
            raise ValueError(f"schedule.table: until has to grow from row to row and end at 1, given {ends}")
        if self.table[-1].frames is not None or self.table[-1].shrink != 1:
            raise ValueError(
                "schedule.table: the last row trains on whole clips (data.shape): leave its frames and shrink out"
            )
        return self


def _drops(row: Row, after: Row, rescored: bool) -> bool:
    """Whether a row may train a block that the one after it does not."""
    nested = row.choose == after.choose == "top" and row.share <= after.share and not rescored
    return after.share < 1 and not nested


def _searches(schedule: Schedule) -> bool:
    return schedule.kind == "entprog"


def _leaves_backward_open(schedule: Schedule) -> bool:
    some = schedule.blocks != "all"
    if schedule.kind == "progressive":
        return any(row.backward is None and (row.share < 1 or some) for row in schedule.table)
    return some or schedule.kind in ("entprog", "lisa", "badam") or (schedule.kind == "linear" and schedule.stages > 1)


USED: dict[str, Callable[[Schedule], bool]] = {
    "table": lambda schedule: schedule.kind == "progressive",
    "stages": lambda schedule: schedule.kind not in ("full", "progressive"),
    "lisa_share": lambda schedule: schedule.kind == "lisa",
    "candidates": lambda schedule: _searches(schedule) and set(schedule.generators) != {"budget"},
    "generators": _searches,
    "suffixes": lambda schedule: _searches(schedule) and "suffix" in schedule.generators,
    "budgets": lambda schedule: _searches(schedule) and "budget" in schedule.generators,
    "shapes": lambda schedule: schedule.kind not in ("full", "progressive") and schedule.stages > 1,
    "tokens": lambda schedule: schedule.has_smaller_clips,
    "timestep_shift": lambda schedule: schedule.has_smaller_clips,
    "search_steps": _searches,
    "search_until_clear": _searches,
    "search_clips": _searches,
    "search_share": _searches,
    "efficiency": _searches,
    "backward": _leaves_backward_open,
    "cei_threshold": lambda schedule: _searches(schedule) and schedule.stages > 1,
    "monotone": lambda schedule: _searches(schedule) and schedule.stages > 1,
}
"""Setting of a schedule → whether one makes use of it; settings that all do are not in it."""
