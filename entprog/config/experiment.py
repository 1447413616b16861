"""An experiment and its parts: typed, frozen, checked before anything starts."""

import math
from typing import Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from entprog.config.model import Model
from entprog.config.part import Part
from entprog.config.schedule import Outside, Schedule
from entprog.config.shapes import ClipShape
from entprog.config.timesteps import KNOWN_PIXELS, KNOWN_SHIFT, SPREADS, Timesteps
from entprog.config.training import Place, Train

PACKED: dict[str, Literal["fp8", "nf4"]] = {"fp8_alone": "fp8", "nf4": "nf4"}
"""`schedule.frozen_precision` → what linear layers' weights are held in, where that is less than bfloat16."""
MOST_PIXELS = 1.1
"""Of a step of whole clips, in one of smaller clips (`schedule.tokens=constant`): its memory is hardly larger."""


class Data(Part):
    """The clips: where they are and how they reach the device."""

    shards: Place | None = None
    """Folder written by `pipelines.prepare`, also one that lies at s3://BUCKET/FOLDER or gs://BUCKET/FOLDER."""
    shape: ClipShape = ClipShape()
    """Clip shape: the shards' own, or one cut out of it: the frames in the middle, height and width divided by a whole
    number."""
    batch_size: int = Field(default=4, ge=1)
    """Clips per worker and step."""
    held_out_clips: int = Field(default=8, ge=1)
    """Clips of the held-out split on which held-out loss is measured."""
    held_out_draws: int = Field(default=4, ge=1)
    """Fixed (timestep, noise) draws per held-out clip."""
    held_out_seed: int = Field(default=0, ge=0)
    """Seeds those draws; apart from `train.seed`, so that runs of different seeds are measured alike."""
    decode: Literal["auto", "worker", "cluster"] = "auto"
    """Where clips are decoded: `worker`, in threads of the worker that trains on them; `cluster`, by Ray Data's tasks
    on any node, whose frames then travel through the object store; `auto`, by such tasks on the cluster's nodes without
    GPUs that hold no worker, where there are any, else by the workers. The same batches everywhere, bit for bit."""
    decode_cpus: float | None = Field(default=None, gt=0)
    """CPUs for decoding per worker: threads of it, or logical CPUs of tasks, that Ray keeps from others (but in trials
    of a sweep). None: those of the nodes that decode when it begins, shared evenly, but for one of each worker's own;
    threads reserve none then."""
    latents: Literal["auto", "never", "require"] = "auto"
    """Latents cached by `pipelines.prepare --latents`: used where they are of this VAE, these conditions and this
    shape; never; or a run without them is refused. The same batches either way, bit for bit."""
    text: Literal["fixed", "empty", "caption"] = "fixed"
    """What text cross-attention sees: `fixed`, `model.prompt_embeds` or zeros; `empty`, the empty text as the base's
    encoder has it; `caption`, each clip's caption, encoded once and kept in SHARDS/texts. The two need extra `text`."""
    verify: Literal["auto", "sha256", "size"] = "auto"
    """How shards are checked before anything starts: every byte, or only sizes (for very large sets). `auto`: every
    byte of a folder, sizes of a bucket, where the checksum of what is read is looked at as it is read."""


PriorityKind = Literal[
    "cei", "reverse_cei", "gradient", "fisher", "loss_increase", "random", "depth_first", "depth_last"
]
PRIORITY_KINDS: tuple[PriorityKind, ...] = get_args(PriorityKind)
BY_CEI: tuple[PriorityKind, ...] = ("cei", "reverse_cei")
BY_CLIPS: tuple[PriorityKind, ...] = (*BY_CEI, "gradient", "fisher", "loss_increase")
"""Those that measure on clips."""
READ_BY: dict[str, tuple[PriorityKind, ...]] = {
    "sign": BY_CEI, "estimator": BY_CEI, "seed": (*BY_CLIPS, "random"),
    **dict.fromkeys(("conditions", "draws", "timestep_range", "until_stable", "rescore"), BY_CLIPS),
}  # fmt: skip
"""Setting of `priority` → the kinds that make use of it."""


class Priority(Part):
    """Which blocks matter first (method: Conditional Entropy Inflation, Ent-Prog §3.2)."""

    kind: PriorityKind = "cei"
    """What blocks are ranked by; all but `cei` are controls (`entprog/scoring/priorities.py`)."""
    sign: Literal["signed", "absolute"] = "signed"
    """`signed` ranks by π (the paper), `absolute` by |π|. Both are reported. Of no effect on the other controls."""
    estimator: Literal["std", "elementwise"] = "std"
    """σ over all elements and draws of a condition (the paper), or mean log σ per element (diagonal Gaussian)."""
    conditions: int = Field(default=8, ge=2)
    """Clips whose reference and pose condition the prediction; intervals and halves need two."""
    draws: int = Field(default=8, ge=4)
    """(timestep, noise) draws per condition; the paper's 1,000 draws are conditions × draws."""
    timestep_range: tuple[float, float] = (0.02, 0.98)
    """Timesteps drawn, 0 clean, 1 noise: two rising numbers within them. In between they follow training's law
    (`train.timesteps`, `train.timestep_shift`); of an expert's own (`model.expert`) those that lie within."""
    until_stable: float | None = Field(default=None, gt=0, le=1)
    """End scoring once Kendall's τ between the rankings from two halves of the draws has reached this, looked at after
    4, 8, 16, … conditions; at most `conditions`. None: all conditions."""
    rescore: bool = False
    """Score again at the start of every stage that ranks blocks, but the first, and rank by the new table; charged to
    the run."""
    seed: int = Field(default=0, ge=0)
    """Seed of the draws, and of the random order."""

    @field_validator("timestep_range")
    @classmethod
    def _rises(cls, given: tuple[float, float]) -> tuple[float, float]:
        low, high = given
        if not 0 <= low < high <= 1:
            raise ValueError("needs two rising numbers within 0 and 1")
        return given


class Tracking(Part):
    """MLflow."""

    experiment: str = "entprog"
    """Experiment name."""
    run_name: str | None = None
    """Run name. None: that of the output folder."""
    model_name: str | None = None
    """Name in MLflow's model registry under which the result becomes a new version. None: not registered."""
    system_every_s: float | None = Field(default=10.0, gt=0)
    """Seconds between two looks at rank 0's machine (CPU, memory, disk, network, GPU). None: none."""


class Experiment(Part):
    """Everything a run depends on, beside the code."""

    name: str = "experiment"
    """Name of the preset it started from."""
    model: Model = Model()
    data: Data = Data()
    train: Train
    priority: Priority = Priority()
    schedule: Schedule = Schedule()
    tracking: Tracking = Tracking()
    phases: dict[str, dict[str, Any]] = {}
    """Trainings one after another, each from the last one's weights: name → its settings over the common ones, e.g.
    `phases.pose.train.steps=200`. Empty: one training."""

    @property
    def parts(self) -> dict[str, dict[str, Any]]:
        """Trainings one after another, by name, each as its settings over the common ones: `phases`, or a base's two
        experts. Empty: one training."""
        both = {expert: {"model": {"expert": expert}} for expert in ("high", "low")}
        return both if self.model.expert == "both" else self.phases

    @property
    def outside(self) -> Outside:
        """What is trained of what lies outside blocks: `schedule.outside`, or its default."""
        return self.schedule.outside or ("always" if self.train.lora is None else "conditions")

    def uses(self, setting: str) -> bool:
        """Whether this training would be another one with another value of a setting, by its dotted name; False only
        where it is known that it would not."""
        part, _, name = setting.partition(".")
        if part == "schedule":
            return self.schedule.uses(name)
        if part == "priority":
            return self.schedule.needs_scores and self.priority.kind in READ_BY.get(name, PRIORITY_KINDS)
        return setting != "train.frozen_state" or self.schedule.freezes(self.priority.rescore)

    def batch_size_at(self, shape: ClipShape) -> int:
        """Clips of a worker's batch at a clip shape (`schedule.tokens`)."""
        if self.schedule.tokens == "fewer":
            return self.data.batch_size
        clips = self.data.batch_size * self.data.shape.pixels / shape.pixels
        return min(round(clips), int(MOST_PIXELS * clips))

    def clips_at(self, shape: ClipShape) -> int:
        """Clips of a step at a clip shape, of all workers and batches."""
        return self.batch_size_at(shape) * self.train.workers * self.train.accumulate

    def timestep_shift_at(self, shape: ClipShape) -> float:
        """Shift of timesteps at a clip shape, which `auto` takes from a shape where it is known to another by the root
        of the number of pixels (Stable Diffusion 3, arXiv 2403.03206, eq. 23)."""
        if self.train.timestep_shift == "auto":
            return KNOWN_SHIFT * math.sqrt(shape.pixels / KNOWN_PIXELS)
        share = shape.pixels / self.data.shape.pixels if self.schedule.timestep_shift == "auto" else 1.0
        return self.train.timestep_shift * math.sqrt(share)

    def timesteps_at(self, shape: ClipShape) -> Timesteps:
        """The law of timesteps at a clip shape."""
        train = self.train
        spread = SPREADS[train.timesteps] if train.timesteps_spread is None else train.timesteps_spread
        shift = self.timestep_shift_at(shape)
        return Timesteps(train.timesteps, train.timesteps_mean, spread, shift, train.min_snr)

    @property
    def timesteps(self) -> Timesteps:
        """The law of timesteps on whole clips, by which blocks are scored and held-out loss is measured."""
        return self.timesteps_at(self.data.shape)

    @model_validator(mode="after")
    def _experts_are_phases(self):
        if self.phases and self.model.expert == "both":
            raise ValueError(
                "model.expert=both is two phases, and phases are given: set phases.NAME.model.expert to high or low"
            )
        return self

    @model_validator(mode="after")
    def _has_one_text(self):
        if self.data.text != "fixed" and self.model.prompt_embeds:
            raise ValueError(f"model.prompt_embeds is a fixed text, given data.text={self.data.text}: drop one of them")
        return self

    @model_validator(mode="after")
    def _clock_is_repeatable(self):
        if self.schedule.clock == "flops" and self.train.seconds is not None:
            raise ValueError(
                "train.seconds cannot end a run whose schedule.clock is flops: set train.steps, and train.seconds=null"
            )
        if self.schedule.clock == "seconds" and self.train.flops is not None:
            raise ValueError("train.flops ends runs that count them: set schedule.clock=flops")
        return self

    @property
    def stores_frozen(self) -> bool:
        """Whether frozen weights are stored in bfloat16 or less, and have their float32 bits back when they thaw: where
        something is ever frozen. Under adapters that are sharded `rounds_base` says so."""
        schedule = self.schedule
        half = self.model.dtype == "bfloat16" and schedule.frozen_precision != "full" and not self.rounds_base
        return half and (schedule.kind != "full" or self.train.lora is not None or schedule.blocks != "all")

    @property
    def gathers_half(self) -> bool:
        """Whether blocks that are split over workers are brought together as bfloat16, trained ones too."""
        return self.model.dtype == "bfloat16" and self.train.parallel == "fsdp" and self.train.lora is None

    @property
    def rounds_base(self) -> bool:
        """Whether what adapters adapt is split over workers in bfloat16: nothing keeps its float32 bits meanwhile."""
        half = self.model.dtype == "bfloat16" and self.schedule.frozen_precision != "full"
        return half and self.train.parallel == "fsdp" and self.train.lora is not None

    @property
    def frozen_form(self) -> Literal["bfloat16", "fp8", "nf4"]:
        """What frozen linear layers' weights are stored in, where they are."""
        return PACKED.get(self.schedule.frozen_precision, "bfloat16")

    @model_validator(mode="after")
    def _frozen_weights_are_elsewhere(self):
        """What packed weights and those that wait on the host need."""
        schedule, train, precision = self.schedule, self.train, self.schedule.frozen_precision
        given = [f"schedule.frozen_precision={precision}"] if precision in PACKED else []
        if self.model.swap_blocks:
            given.append(f"model.swap_blocks={self.model.swap_blocks}")
            if precision in ("full", "fp8"):
                raise ValueError(
                    f"{given[-1]} moves weights that are stored while they are frozen: set schedule.frozen_precision "
                    f"to auto, fp8_alone or nf4, given {precision}"
                )
            if self.model.compile_blocks:
                raise ValueError(f"{given[-1]} does not go with model.compile_blocks: leave one of them out")
        for setting in given:
            if self.model.dtype != "bfloat16":
                raise ValueError(f"{setting} needs model.dtype=bfloat16, given {self.model.dtype}")
            if train.parallel == "fsdp":
                raise ValueError(f"{setting} is of whole blocks, which train.parallel=fsdp splits: set it to ddp")
            if not self.stores_frozen:
                raise ValueError(f"{setting}: no block is ever frozen here: set train.lora, or another schedule.kind")
            if schedule.needs_scores and self.priority.kind in ("gradient", "fisher"):
                raise ValueError(
                    f"{setting}: priority.kind={self.priority.kind} needs gradients through all blocks, with their "
                    "weights on the device: set it to cei, or another one"
                )
        if precision in PACKED and self.model.compile_blocks and not self.model.gradient_checkpointing:
            raise ValueError(
                f"{given[0]} saves nothing under model.compile_blocks, whose code keeps unpacked weights for the "
                "backward pass: set model.gradient_checkpointing=true, or leave model.compile_blocks out"
            )
        if precision in PACKED and schedule.kind == "entprog" and train.lora is None:
            raise ValueError(
                f"{given[0]}: a search (schedule.kind=entprog) would compare losses of networks that are rounded "
                "otherwise: set train.lora, another schedule.kind, or schedule.frozen_precision=auto"
            )
        return self

    @model_validator(mode="after")
    def _gradients_are_of_one_type(self):
        if self.rounds_base and self.schedule.needs_scores and self.priority.kind in ("gradient", "fisher"):
            raise ValueError(
                f"priority.kind={self.priority.kind} needs gradients in one type, and train.lora with "
                "train.parallel=fsdp and model.dtype=bfloat16 holds weights in two: set it to cei, or another one, or "
                "schedule.frozen_precision=full"
            )
        return self

    @model_validator(mode="after")
    def _moments_are_whole(self):
        if self.train.parallel == "fsdp" and self.train.optimizer == "adamw_8bit":
            raise ValueError(
                "train.optimizer=adamw_8bit needs every worker to hold whole moments: train.parallel=fsdp does not go "
                "with it: set train.optimizer=adamw_bf16, or train.parallel=ddp"
            )
        return self

    @model_validator(mode="after")
    def _moments_are_foreseen(self):
        if self.schedule.memory_budget_bytes and self.train.frozen_state == "keep" and self.uses("train.frozen_state"):
            raise ValueError(
                "train.frozen_state=keep leaves moments of frozen blocks on the device, which are in no plan's memory: "
                "with schedule.memory_budget_bytes set it to host or drop"
            )
        return self

    @model_validator(mode="after")
    def _attention_can_be_kept(self):
        if self.model.gradient_checkpointing == "keep_attention" and self.model.compile_blocks:
            raise ValueError(
                "model.gradient_checkpointing=keep_attention looks at each operation of a block, which "
                "model.compile_blocks runs as one: set it to true, or leave model.compile_blocks out"
            )
        return self

    @property
    def in_fp8(self) -> bool:
        """Whether frozen blocks run in fp8."""
        return self.schedule.frozen_precision == "fp8" and self.schedule.kind != "full"

    @model_validator(mode="after")
    def _fp8_has_a_place(self):
        schedule = self.schedule
        if self.in_fp8:
            if "residual" not in schedule.backwards:
                raise ValueError(
                    "schedule.frozen_precision=fp8 is for frozen blocks under residual backward: set "
                    "schedule.backward=residual, or frozen_precision=auto"
                )
            if self.model.dtype != "bfloat16":
                raise ValueError(
                    f"schedule.frozen_precision=fp8 needs model.dtype=bfloat16, given {self.model.dtype}: fp8 layers "
                    "give bfloat16"
                )
            if self.train.parallel == "fsdp":
                raise ValueError(
                    "schedule.frozen_precision=fp8 keeps twins of whole blocks, train.parallel=fsdp splits them: "
                    "set train.parallel=ddp, or frozen_precision=auto"
                )
        return self
