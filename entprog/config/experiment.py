"""An experiment and its parts: typed, frozen, checked before anything starts."""

import json
import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from entprog.config.part import Part
from entprog.config.schedule import Schedule
from entprog.config.shapes import ClipShape
from entprog.config.timesteps import KNOWN_PIXELS, KNOWN_SHIFT, SPREADS, WIDEST_MODE, Law, Timesteps
from entprog.masking import has_credentials


def _without_credentials(place: str) -> str:
    """Settings are shown, stored and logged: no secret may be one."""
    if has_credentials(place):
        raise ValueError("must not hold a user or password; give credentials in the environment, or a profile's file")
    return place


Place = Annotated[str, AfterValidator(_without_credentials)]
"""A path, or an address without credentials in it."""


Skeleton = Literal["limbs", "dwpose"]


class Model(Part):
    """Which network is trained, from what, with which conditions."""

    family: str = "wan"
    """Model family: a file of `entprog/models/`."""
    base: str | None = None
    """Folder (or hub name) of the pre-trained checkpoint in diffusers format. None: a new network from `init`."""
    init: dict[str, Any] = {}
    """Configuration of a new network, the diffusers class's own argument names. Only when `base` is None."""
    weights: str | None = None
    """Single safetensors file of the network in its original format or ComfyUI's (families `wan`, `wan_animate`,
    `wan_vace`): `base` then says the network's configuration, VAE and scheduler, its own weights are not read."""
    adapter: str | None = None
    """Low-rank adapter to start from: a folder that `train.lora` or `entprog adapter` left, or a file in diffusers',
    peft's or ComfyUI's keys. With `train.lora`, whose rank and alpha must be its own, it is trained on; otherwise it is
    merged into the weights."""
    trust_pickle: bool = False
    """Read weights of base and VAE that are no safetensors (`.bin`). They are pickles, which may run what their maker
    wanted; torch reads them with `weights_only`, which allows tensors alone. Only where you trust who made them."""
    expert: Literal["high", "low", "both"] | None = None
    """Of a base with two networks (Wan 2.2 A14B) the one that is trained: `high`, for timesteps from its boundary up;
    `low`, for those below; `both`: two trainings one after the other, each with the whole budget. None: bases with one
    network, or the one that a saved folder was trained for."""
    conditions: tuple[Literal["reference", "pose"], ...] = ("reference", "pose")
    """What the network sees beside the noisy clip, as extra input channels. Channels the base lacks start at zero."""
    skeleton: Skeleton | None = None
    """How the network is shown poses: `limbs`, the body's in this project's colours; `dwpose`, body, hands and face as
    DWPose draws them. None: what base or adapter were trained with here, otherwise `limbs`."""
    vae: str = "auto"
    """`auto`: the base's own VAE if it has one; `none`: pixels; otherwise a folder or hub name."""
    vae_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which the VAE encodes clips and conditions. `bfloat16` is quicker; latents are rounded to it and cached
    in half the space. Decoding stays in float32."""
    prompt_embeds: str | None = None
    """safetensors file with `prompt_embeds` [tokens, dim] shown to cross-attention: text, for SVD an image's embedding.
    None: zeros."""
    text_encoder: str | None = None
    """Folder (or hub name) with `text_encoder/` and `tokenizer/`, which encode captions (`data.text`). None: the base's
    own."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Autocast type of the forward pass; weights and optimizer state stay in float32."""
    gradient_checkpointing: bool = False
    """Recompute trained blocks' activations in the backward pass."""
    compile_blocks: bool = False
    """Compile each block with torch.compile: the first step under every plan compiles, later ones are quicker."""
    swap_blocks: int = Field(default=0, ge=0)
    """Blocks whose frozen weights wait in host memory and are on the device while their block runs, two blocks' at a
    time (so 0: none, or 3 and more): the same bits, in less memory and more time. Needs model.dtype=bfloat16."""

    @field_validator("swap_blocks")
    @classmethod
    def _swaps_to_some_avail(cls, given: int) -> int:
        if given in (1, 2):
            raise ValueError("two of the blocks that wait are on the device at any time: give 0, or 3 and more")
        return given

    @field_validator("init")
    @classmethod
    def _is_finite(cls, given: dict[str, Any]) -> dict[str, Any]:
        if "NaN" in (text := json.dumps(given, default=str)) or "Infinity" in text:
            raise ValueError("needs finite numbers")
        return given


class Data(Part):
    """The clips: where they are and how they reach the device."""

    shards: str | None = None
    """Folder written by `pipelines.prepare`."""
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
    decode: Literal["worker", "cluster"] = "worker"
    """Where clips are decoded: in threads of the worker that trains on them, or by Ray Data's tasks on any node, whose
    frames then travel through the object store. The same batches either way, bit for bit."""
    decode_cpus: float | None = Field(default=None, gt=0)
    """CPUs for decoding per worker: threads of it, or logical CPUs of tasks. None: those of its own machine (tasks: of
    the cluster) when it begins, shared evenly, but for one a worker."""
    latents: Literal["auto", "never", "require"] = "auto"
    """Latents cached by `pipelines.prepare --latents`: used where they are of this VAE, these conditions and this
    shape; never; or a run without them is refused. The same batches either way, bit for bit."""
    text: Literal["fixed", "empty", "caption"] = "fixed"
    """What text cross-attention sees: `fixed`, `model.prompt_embeds` or zeros; `empty`, the empty text as the base's
    encoder has it; `caption`, each clip's caption, encoded once and kept in SHARDS/texts. The two need extra `text`."""
    verify: Literal["sha256", "size"] = "sha256"
    """How shards are checked before anything starts: every byte, or only sizes (for very large sets)."""


class Lora(Part):
    """Low-rank adapters (LoRA, arXiv 2106.09685), through peft: y = W x + alpha/rank · B A x, A and B trained."""

    rank: int = Field(default=16, ge=1)
    """Rank of each adapter: rows of A, columns of B."""
    alpha: float = Field(default=16.0, gt=0)
    """Scale of what the adapter adds is alpha/rank."""
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """Linear layers of a block that get an adapter, by the ends of their names."""


class Drop(Part):
    """Shares of training clips that are shown without a condition, so that guidance has something to compare with.
    Which clips those are depends on `train.seed` and their places in the run alone. 0: none."""

    text: float = Field(default=0.0, ge=0, le=1)
    """Share of clips without text: with the empty text where `data.text` is not fixed, with zeros where it is. Of no
    effect where there is none anyway."""
    reference: float = Field(default=0.0, ge=0, le=1)
    """Share of clips without the reference image. Of no effect where the network does not see one."""
    pose: float = Field(default=0.0, ge=0, le=1)
    """Share of clips without the pose. Of no effect where the network does not see one."""


OptimizerKind = Literal["adamw", "adamw_bf16", "adamw_8bit"]
PACKED: dict[str, Literal["fp8", "nf4"]] = {"fp8_alone": "fp8", "nf4": "nf4"}
"""`schedule.frozen_precision` → what linear layers' weights are held in, where that is less than bfloat16."""


class Train(Part):
    """How long, how fast, on how much hardware."""

    steps: int | None = Field(default=None, ge=1)
    """Stop after this many updates."""
    seconds: float | None = Field(default=None, gt=0)
    """Stop after this many charged seconds (training, search and scoring; not evaluation for the record)."""
    flops: float | None = Field(default=None, gt=0)
    """Stop after this many charged FLOPs, of all workers: the same budget where seconds cannot be trusted. Needs
    schedule.clock=flops."""
    optimizer: OptimizerKind = "adamw"
    """AdamW with its two moments in float32 (8 bytes a trained parameter); `adamw_bf16`: in bfloat16, rounded at random
    (4 bytes); `adamw_8bit`: in 8 bits, through torchao (2 bytes; extra `fp8`). Weights stay in float32."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """AdamW learning rate."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW weight decay."""
    warmup_steps: int = Field(default=0, ge=0)
    """Linear learning-rate warm-up from the first step."""
    cooldown_share: float = Field(default=0.0, ge=0, le=1)
    """Share of the run, at its end, over which the learning rate falls linearly to zero."""
    gradient_clip: float | None = Field(default=1.0, gt=0)
    """Largest norm of the trained parameters' gradient; None: no clipping."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Exponential moving average of trained weights; None: none."""
    frozen_state: Literal["host", "keep", "drop"] = "host"
    """Optimizer moments of blocks that a stage freezes: moved to host memory, kept on the device, or forgotten."""
    block_warmup_steps: int = Field(default=0, ge=0)
    """Linear learning-rate warm-up of each block from the step at which it begins to be trained."""
    timestep_shift: Annotated[float, Field(gt=0)] | Literal["auto"] = 1.0
    """Flow-matching shift of timesteps: >1 trains more on noisy ones (Wan at 720p: 5). `auto`: by a clip's pixels over
    all its frames, 3 for 81 frames of 832x480 (Wan's own) and in proportion to their root for others."""
    timesteps: Law = "uniform"
    """Law that timesteps are drawn by, before the shift: `uniform`; `logit_normal`: more in the middle; `mode`: more in
    the middle, the ends kept (both Stable Diffusion 3, arXiv 2403.03206). Blocks are scored, and held-out loss is
    measured, by the same."""
    timesteps_mean: float = 0.0
    """Law `logit_normal`: mean of logit(t); above 0 trains more on noise."""
    timesteps_spread: float | None = Field(default=None, gt=0)
    """Law `logit_normal`: standard deviation of logit(t); law `mode`: its scale s, at most 1.75. None: 1 and 1.29."""
    min_snr: float | None = Field(default=None, gt=0)
    """γ of min-SNR weights (arXiv 2303.09556), 5 as a rule: timesteps with little noise count less. For networks that
    predict ε or v. None: every timestep counts alike."""
    face_weight: float = Field(default=1.0, gt=0, le=100)
    """What the loss counts inside the box around the face, over what it counts elsewhere; a clip's loss is its mean by
    these weights. Needs shards of whole-body points; where a face is not seen nothing counts more. 1: no weights."""
    hand_weight: float = Field(default=1.0, gt=0, le=100)
    """The same inside the boxes around the hands."""
    drop: Drop = Drop()
    """Conditions that some clips are shown without."""
    seed: int = Field(default=0, ge=0)
    """Seeds order, noise, timesteps, candidates, new weights."""
    workers: int = Field(default=1, ge=1)
    """Ray Train workers (one GPU each, or one CPU process each)."""
    min_workers: int | None = Field(default=None, ge=1)
    """Elastic: go on with as few workers as this when machines are gone, from the newest checkpoint, and grow to
    train.workers again when they are back; an update sees the same clips throughout. None: always train.workers."""
    resize_every_s: float = Field(default=60.0, gt=0)
    """Elastic: seconds that fewer workers train at least before they save a checkpoint and start again as more. So long
    without a new machine, and the run begins with the workers that there is room for."""
    accumulate: int = Field(default=1, ge=1)
    """Batches per worker and update: gradients are summed over them, clipped and applied once. An update sees
    data.batch_size · train.workers · train.accumulate clips."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """`ddp`: every worker holds the whole network, trained gradients are averaged; `fsdp`: weights, gradients and
    moments are split over the workers (FSDP2), and weights are whole only for scoring, evaluation and saving."""
    gpus: Literal["auto", "yes", "no"] = "auto"
    """`auto`: GPUs if the cluster has any now; `yes`: a cluster without is waited for."""
    threads: int | None = Field(default=None, ge=1)
    """torch CPU threads per worker. None: the cores of its machine, shared evenly by the workers there, one of each
    share left for decoding."""
    held_out_every: int = Field(default=50, ge=1)
    """Steps between held-out losses."""
    checkpoint_every: int = Field(default=50, ge=1)
    """Steps between checkpoints."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Newest checkpoints kept."""
    checkpoints: Place | None = None
    """Where checkpoints are kept: a folder that all nodes see, s3://BUCKET/FOLDER or gs://BUCKET/FOLDER.
    None: OUTPUT/checkpoints."""
    max_nonfinite: int = Field(default=8, ge=1)
    """Updates in a row whose loss or gradient is not finite, after which the run fails. Until then each is skipped:
    weights, moments and averages stay as they were."""
    lora: Lora | None = None
    """Where it is set (`train.lora.rank=16`) blocks are trained through low-rank adapters, their own weights stay. What
    lies outside blocks is trained as `schedule.outside` says."""
    save: Literal["whole", "light"] = "whole"
    """What OUTPUT/model holds beside the network: `whole`: the VAE, and of a base that lies here its text and image
    encoders too, copied; `light`: both named by hub name and commit, or by folder, and loaded from there."""
    samples: int = Field(default=2, ge=0)
    """Held-out motions generated at the end, for a look (uncharged)."""
    preview_every: int = Field(default=0, ge=0)
    """Steps between previews: held-out motions drawn with the weights as they are then (their averages with
    `ema_decay`), in OUTPUT/previews/index.html and MLflow. Uncharged; training computes the same. 0: none."""
    preview_clips: int = Field(default=2, ge=1)
    """Held-out motions of a preview."""
    preview_metrics: tuple[str, ...] = ()
    """Metrics of a preview's clips against their own frames (`psnr`, `ssim`, `stlpips`, `pck`, …: those of `evaluate`
    that a clip alone has): on the page, and in MLflow as `preview/NAME`."""
    max_failures: int = Field(default=3, ge=0)
    """Restarts of the worker group after a crash, each from the newest checkpoint; counted anew once a run has got
    further than before."""

    @property
    def weighs_parts(self) -> bool:
        """Whether the loss counts more, or less, at faces or hands."""
        return (self.face_weight, self.hand_weight) != (1.0, 1.0)

    @model_validator(mode="after")
    def _has_an_end(self):
        if self.steps is None and self.seconds is None and self.flops is None:
            raise ValueError("a run needs an end: set train.steps or train.seconds")
        if self.timesteps != "logit_normal" and self.timesteps_mean != 0:
            raise ValueError(f"train.timesteps_mean is of logit_normal, given train.timesteps={self.timesteps}")
        if self.timesteps == "uniform" and self.timesteps_spread is not None:
            raise ValueError("train.timesteps_spread is of logit_normal and mode, given train.timesteps=uniform")
        if self.timesteps == "mode" and (self.timesteps_spread or 0) > WIDEST_MODE:
            raise ValueError(
                f"train.timesteps_spread of mode is at most {WIDEST_MODE}, given {self.timesteps_spread:g}"
            )
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"train.min_workers={self.min_workers} is more than train.workers={self.workers}")
        return self


class Priority(Part):
    """Which blocks matter first (method: Conditional Entropy Inflation, Ent-Prog §3.2)."""

    kind: Literal[
        "cei", "reverse_cei", "gradient", "fisher", "loss_increase", "random", "depth_first", "depth_last"
    ] = "cei"
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
    """Score again at the start of every stage but the first and rank by the new table; charged to the run."""
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
    """Run name. None: preset and schedule."""
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

    def batch_size_at(self, shape: ClipShape) -> int:
        """Clips of a worker's batch at a clip shape (`schedule.tokens`)."""
        times = self.data.shape.pixels // shape.pixels if self.schedule.tokens == "constant" else 1
        return self.data.batch_size * times

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

    @model_validator(mode="after")
    def _whole_weights(self):
        if self.train.parallel == "fsdp" and (self.train.lora or self.in_fp8):
            which = "train.lora" if self.train.lora else "schedule.frozen_precision=fp8"
            raise ValueError(
                f"{which} needs every worker to hold whole weights: train.parallel=fsdp does not go with it"
            )
        return self

    @property
    def stores_frozen(self) -> bool:
        """Whether frozen weights are stored in bfloat16 or less: where something is ever frozen."""
        schedule = self.schedule
        half = self.model.dtype == "bfloat16" and self.train.parallel == "ddp" and schedule.frozen_precision != "full"
        return half and (schedule.kind != "full" or self.train.lora is not None or schedule.blocks != "all")

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
                    f"{setting}: priority.kind={self.priority.kind} needs gradients to all weights, at once on the "
                    "device: set it to cei, or another one"
                )
        if precision in PACKED and schedule.kind == "entprog" and train.lora is None:
            raise ValueError(
                f"{given[0]}: a search (schedule.kind=entprog) would compare losses of networks that are rounded "
                "otherwise: set train.lora, another schedule.kind, or schedule.frozen_precision=auto"
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
