"""One update of a run, as it is reported, and what it came to."""

from dataclasses import dataclass

from entprog.distributed import agree
from entprog.schedule.efficiency import Decision
from entprog.schedule.plans import Plan


@dataclass(frozen=True, kw_only=True)
class Step:
    """One update, as it is reported."""

    step: int
    """Number of the update, from 1."""
    stage: int
    phase: str
    """`search` or `train`."""
    plan: Plan
    loss: float
    """Mean over all ranks' clips."""
    learning_rate: float
    gradient_norm: float
    skipped: bool
    """Loss or gradient was not finite: weights, moments and averages stayed as they were."""
    skipped_updates: int
    """Such updates so far."""
    seconds: float
    """The update, slowest rank, waiting for data not included."""
    wait_s: float
    """Until the batch was there, slowest rank."""
    open_s: float
    """The part of `wait_s` spent on starting a stream."""
    encode_s: float
    """The part of `wait_s` spent on encoding clips to latents."""
    copy_s: float
    """Copying clips to the device, slowest rank; most of it during the step before."""
    charged_s: float
    """Charged so far: training, search, scoring."""
    search_s: float
    """The part of it that went into search,"""
    score_s: float
    """and into scoring."""
    flops: float
    """Counted so far."""
    flops_left: float | None
    """Counted of the updates until `train.steps`, later stages' among them; of those that search as this one's. None
    where that is no budget."""
    clips: int
    """Clips of this update, all ranks."""
    memory_bytes: int
    """Peak so far, largest of all ranks: allocated on the GPU; counted (weights, gradients, moments, activations) on a
    CPU."""
    plan_memory_bytes: int
    """Peak memory since this plan came into force."""
    optimizer_bytes: int
    """Optimizer state on the device after this update; what was moved to the host or forgotten is not in it."""
    predicted_s: float | None = None
    """Seconds that the cost model foresees for such a step; None where none were measured."""
    predicted_memory_bytes: int | None = None
    """Peak that it foresees."""
    held_out_loss: float | None = None
    decision: Decision | None = None
    """The stage's decision, on the step after which it was taken."""
    pace: agree.Pace | None = None
    """How long ranks took for forward and backward of their own clips, before they wait for each other; sharded ranks
    wait in there already. Rank 0 alone knows it."""
    drift: float | None = None
    """Kendall's τ of a stage's new scores to the first table's, on the stage's first step (`priority.rescore`)."""
    last: bool = False


@dataclass(frozen=True, kw_only=True)
class Update:
    """What one update came to, the same on every rank; fields as in Step."""

    loss: float
    learning_rate: float
    gradient_norm: float
    skipped: bool
    seconds: float
    wait_s: float
    open_s: float
    encode_s: float
    copy_s: float
    plan_memory_bytes: int
