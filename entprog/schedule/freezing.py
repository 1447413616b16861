"""Which plan is in force on a network, and the change from one to the next."""

from collections.abc import Sequence
from contextlib import contextmanager

from torch import nn

from entprog import blocks
from entprog.blocks import Block
from entprog.config import Experiment
from entprog.diffusion.denoiser import Denoiser
from entprog.distributed import agree, fsdp
from entprog.schedule.plans import Plan


def outside(denoiser: Denoiser, experiment: Experiment) -> list[nn.Parameter]:
    """Parameters outside blocks that every plan trains (`schedule.outside`)."""
    groups = denoiser.outside()
    return {
        "always": [p for group in groups.values() for p in group],
        "conditions": groups["conditions"],
        "never": [],
    }[experiment.outside]


class Freeze:
    """Freezes and unfreezes a network's parameters, plan by plan."""

    def __init__(self, denoiser: Denoiser, found: Sequence[Block], experiment: Experiment):
        self.outside: list[nn.Parameter] = outside(denoiser, experiment)
        self.network = denoiser.network
        self.found = list(found)
        self.checkpointing = experiment.model.gradient_checkpointing
        self.frozen_precision = experiment.schedule.frozen_precision
        self.swap_blocks = experiment.model.swap_blocks
        self.gathers_half = experiment.gathers_half
        self.plan: Plan | None = None
        """The plan in force; None before the first."""
        self.trained: list[nn.Parameter] = []
        if experiment.stores_frozen:
            blocks.store_frozen(self.found, experiment.frozen_form)
        if experiment.model.compile_blocks:
            blocks.compile_blocks(self.found)

    def put(self, plan: Plan) -> bool:
        """Apply a plan, which must be equal on every rank; returns whether that changed anything."""
        if plan == self.plan:
            return False
        agree.agree("what to train", plan.as_json())
        fsdp.in_parts(self.network)
        before = () if self.plan is None else self.plan.trainable
        self.trained = blocks.unfreeze(
            self.network,
            self.found,
            plan.trainable,
            self.outside,
            plan.backward,
            self.checkpointing,
            self.frozen_precision,
            self.swap_blocks,
        )
        if self.gathers_half:
            thawed = set(plan.trainable).difference(before)
            fsdp.notice_thawed(block for block in self.found if block.name in thawed)
        fsdp.spare_frozen(self.found, plan.trainable, plan.backward)
        self.plan = plan
        return True

    @contextmanager
    def trying(self, plan: Plan):
        """A plan for the length of a block; then the one before."""
        before = self.plan
        self.put(plan)
        try:
            yield
        finally:
            self.put_back(before)

    @contextmanager
    def lifted(self):
        """No plan is in force inside; afterwards the one before is."""
        before, self.plan = self.plan, None
        try:
            yield
        finally:
            self.put_back(before)

    def put_back(self, before: Plan | None) -> None:
        """The plan that was in force; where none was, none is: moments and averages do not follow one that was only
        tried, so that it must not seem to be in force when it is trained."""
        if before is None:
            self.plan = None
        else:
            self.put(before)
