"""What plans cost in a run: counted on the network, foreseen by the cost model, in the schedule's clock."""

from collections import Counter
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import torch

from entprog.blocks import Block
from entprog.config import ClipShape, Experiment
from entprog.cost import counting, measuring
from entprog.cost.model import CostModel, scaled
from entprog.data.clips import Latents
from entprog.diffusion import beside, losses
from entprog.diffusion.denoiser import Denoiser
from entprog.distributed import agree, fsdp, reducing
from entprog.schedule import plans
from entprog.schedule.freezing import Freeze
from entprog.schedule.plans import Plan


class Prices:
    """Costs of plans, each found when it is first asked for."""

    def __init__(
        self,
        denoiser: Denoiser,
        found: Sequence[Block],
        sample: Latents,
        freeze: Freeze,
        experiment: Experiment,
        models: dict[ClipShape, CostModel],
        averages: Mapping[str, torch.Tensor] = MappingProxyType({}),
        held_out_clips: int | None = None,
    ):
        """sample: clips of `data.shape`. models: of the run's state, so that they are measured once; how many blocks
        wait, and how many ranks share the weights, a resume may change. averages: of the run's state, by parameter.
        held_out_clips: that there are, on all ranks; None: as many as the experiment asks for."""
        self.denoiser = denoiser
        self.found = list(found)
        self.sample = sample
        self.freeze = freeze
        self.experiment = experiment
        self.models = models
        self.averages = averages
        there = experiment.data.held_out_clips if held_out_clips is None else held_out_clips
        self.search_clips = min(experiment.schedule.search_clips, there)
        """Clips of a search evaluation."""
        for known, model in models.items():
            models[known] = replace(model, swap_blocks=experiment.model.swap_blocks, parts=self.shares)
        self.counts: dict[Plan, counting.Cost] = {}
        self.forms: dict[ClipShape, dict[str, tuple]] = {}
        """Of blocks, by their names (`counting.forms`)."""
        shape = experiment.data.shape
        self.full = plans.full(plans.eligible(self.found, experiment.schedule.blocks), shape)
        """Plain training: every block that may be trained."""
        self.whole = plans.full([block.name for block in self.found], shape)
        """Every block there is."""
        self.by_seconds = experiment.schedule.clock == "seconds"
        self.beside_bytes = beside.device_bytes(denoiser)
        """Of VAE and encoders, where they stay on the device."""

    def counted(self, plan: Plan) -> counting.Cost:
        """Counted on the real network with one clip; once for all plans that cost the same, as draws of blocks do."""
        if plan not in self.counts:
            alike = next((other for other in self.counts if self.are_alike(plan, other)), None)
            if alike is not None:
                self.counts[plan] = self.counts[alike]
                return self.counts[plan]
            with self.freeze.trying(plan):
                self.counts[plan] = counting.count(
                    self.denoiser.network,
                    self.freeze.trained,
                    lambda: self.loss(self.sample_of(plan.shape, 1)),
                    self.experiment.train.optimizer,
                )
        return self.counts[plan]

    def are_alike(self, plan: Plan, other: Plan) -> bool:
        """Whether two plans cost the same; a forward pass for each clip shape in which two might."""
        same = (plan.shape, plan.backward, plan.m) == (other.shape, other.backward, other.m)
        return same and self.likeness(plan) == self.likeness(other)

    def likeness(self, plan: Plan) -> Hashable:
        """Equal for plans of equal cost: those that train as many blocks of each form and, where the exact gradient
        crosses all that comes after, begin at the same place. Which blocks wait on the host is up to their order."""
        if self.experiment.model.swap_blocks:
            return plan
        if plan.shape not in self.forms:
            clip = self.sample_of(plan.shape, 1)
            self.forms[plan.shape] = counting.forms(self.found, lambda: self.loss(clip))
        forms = self.forms[plan.shape]
        first = [block.name for block in self.found].index(plan.trainable[0]) if plan.backward == "exact" else None
        trained = Counter(forms[name] for name in plan.trainable)
        return plan.shape, plan.backward, first, frozenset(trained.items())

    def loss(self, clip: Latents) -> torch.Tensor:
        return losses.training_loss(self.denoiser, clip, self.experiment.train)

    def step_flops(self, plan: Plan) -> float:
        """FLOPs of one update, all ranks."""
        return float(self.counted(plan).step_flops(self.experiment.clips_at(plan.shape)))

    def evaluation_flops(self) -> float:
        """One search evaluation: a forward pass per clip."""
        return float(self.counted(self.whole).forward_flops * self.search_clips)

    def model(self, shape: ClipShape) -> CostModel:
        """The cost model for a rank's batch of clips of a shape; FLOPs are counted on one clip, seconds on them all."""
        if shape not in self.models:
            train, clips = self.experiment.train, self.experiment.batch_size_at(shape)
            batch = self.sample_of(shape, clips if self.by_seconds else 1)
            with self.freeze.lifted():
                measured = measuring.measure(
                    self.denoiser.network,
                    self.found,
                    self.freeze.outside,
                    lambda: self.loss(batch),
                    clips=len(batch.position),
                    seconds=self.by_seconds,
                    checkpointing=self.experiment.model.gradient_checkpointing,
                    frozen_precision=self.experiment.schedule.frozen_precision,
                    optimizer=train.optimizer,
                    swap_blocks=self.experiment.model.swap_blocks,
                )
            self.models[shape] = replace(scaled(measured, clips), parts=self.shares)
        return self.models[shape]

    def step(self, plan: Plan) -> float:
        """Cost of one update in the schedule's clock: counted FLOPs of all ranks, or predicted seconds."""
        if self.by_seconds:
            clips = self.experiment.batch_size_at(plan.shape) * self.rounds
            return scaled(self.model(plan.shape), clips).step(plan.trainable, plan.backward)
        return self.step_flops(plan)

    @property
    def rounds(self) -> int:
        """Batches of an update that the rank with the most of them takes: where fewer ranks are there than
        `train.workers`, each takes more than `train.accumulate`."""
        train = self.experiment.train
        return -(-train.workers * train.accumulate // agree.world()[1])

    def evaluation(self) -> float:
        """Expected cost of one search evaluation in the schedule's clock."""
        flops = self.evaluation_flops()
        return flops * self.step(self.full) / self.step_flops(self.full) if self.by_seconds else flops

    def memory(self, plan: Plan, before: Collection[str] | None = None) -> int:
        """Predicted peak bytes of an update on one device, VAE and encoders among them. before: blocks that have
        been trained by then; None: those that have averages now."""
        model = self.model(plan.shape)
        trained = model.trained_bytes(plan.trainable)
        averaged = 0
        if self.experiment.train.ema_decay:
            others = None if before is None else model.trained_bytes({*before, *plan.trainable}) - trained
            averaged = trained + (self.kept_bytes(plan) if others is None else others)
        others = self.under_way_bytes(trained) + self.beside_bytes
        return model.memory(plan.trainable, plan.backward) + averaged + others

    def under_way_bytes(self, trained_bytes: int) -> int:
        """What gradients on their way to other workers take beside themselves."""
        train = self.experiment.train
        return reducing.room_bytes(trained_bytes) if train.workers > 1 and train.parallel != "fsdp" else 0

    def kept_bytes(self, plan: Plan) -> int:
        """Bytes of averages of blocks that the plan does not train; of sharded ones the share that every rank foresees,
        for no rank may see another plan as fitting than the others do."""
        others = tuple(f"{block.name}." for block in self.found if block.name not in plan.trainable)
        sizes = (t.numel() * t.element_size() for name, t in self.averages.items() if name.startswith(others))
        return -(-sum(sizes) // self.shares)

    @property
    def shares(self) -> int:
        """Ranks that each weight is split over."""
        train = self.experiment.train
        return fsdp.shares(train.replicas) if train.parallel == "fsdp" else 1

    def sample_of(self, shape: ClipShape, clips: int) -> Latents:
        """Some clips of a shape: a corner of the sample's latents, of which only the size matters here; the same ones
        again where the sample has fewer."""
        _, frames, height, width = self.denoiser.latent_shape(shape)
        part = self.sample.part(torch.arange(clips) % len(self.sample.position))
        cut = {  # tokens have no places to be cut at
            name: value[..., :frames, :height, :width] if value.ndim == 5 else value
            for name, value in part.conditions.items()
        }
        return Latents(part.clean[..., :frames, :height, :width], cut, part.position)
