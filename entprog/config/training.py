"""Settings of the training itself: how long, how fast, through what, on how much hardware."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from entprog.config.part import Part
from entprog.config.timesteps import WIDEST_MODE, Law
from entprog.masking import has_credentials


def _without_credentials(place: str) -> str:
    """Settings are shown, stored and logged: no secret may be one."""
    if has_credentials(place):
        raise ValueError("must not hold a user or password; give credentials in the environment, or a profile's file")
    return place


Place = Annotated[str, AfterValidator(_without_credentials)]
"""A path, or an address without credentials in it."""


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
    (4 bytes); `adamw_8bit`: in 8 bits, through torchao (2 bytes; extra `fp8`). Trained weights stay in float32."""
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
    """Exponential moving average of trained weights, over all updates: a frozen block's goes on towards its weights,
    which stand still. The averages are what is saved, what previews draw and what held-out loss is of; in a search it
    is of the weights themselves. None: none."""
    frozen_state: Literal["host", "keep", "drop"] = "host"
    """Optimizer moments of blocks that a stage freezes: moved to host memory, kept on the device, or forgotten."""
    block_warmup_steps: int = Field(default=0, ge=0)
    """Linear learning-rate warm-up of each block from the step at which it begins to be trained: short beside the steps
    between two draws where a row of `schedule.table` draws blocks anew (`redraw_every`)."""
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
    seed: int = Field(default=0, ge=0, lt=2**63)
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
    moments are split over the workers (FSDP2), and no worker ever holds all weights, neither on its device nor on its
    host."""
    replicas: int = Field(default=1, ge=1)
    """fsdp: copies of the network, each split over train.workers / train.replicas workers that follow each other: those
    of one machine, say, between which there is more to send. Gradients are averaged over all workers."""
    gpus: Literal["auto", "yes", "no"] = "auto"
    """`auto`: GPUs if the cluster has any now; `yes`: a cluster without is waited for."""
    threads: int | None = Field(default=None, ge=1)
    """torch CPU threads per worker. None: the cores of its machine, shared evenly by the workers there, one of each
    share left for decoding."""
    held_out_every: int = Field(default=50, ge=1)
    """Steps between held-out losses."""
    held_out_shares: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = ()
    """Shares of the budget at which a held-out loss is to be known too, however few steps they take: one is measured
    before each and one after. Uncharged; `tune` adds those at which trials are judged."""
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
    """What OUTPUT/model holds beside the network: `whole`: the VAE, and those of the base's text and image encoders
    that lie here (of a base on the hub what was fetched to encode with; of `model.text_encoder` where texts were
    encoded with that), copied; `light`: both named by hub name and commit, or by folder, and loaded from there."""
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
    """Restarts of the worker group after a crash, each from the newest checkpoint, one at most where a GPU had no room;
    counted anew once a run has got further than before."""

    @property
    def weighs_parts(self) -> bool:
        """Whether the loss counts more, or less, at faces or hands."""
        return (self.face_weight, self.hand_weight) != (1.0, 1.0)

    @model_validator(mode="after")
    def _has_an_end(self):
        if self.steps is None and self.seconds is None and self.flops is None:
            raise ValueError("a run needs an end: set train.steps or train.seconds, as in --set train.steps=1000")
        if self.timesteps != "logit_normal" and self.timesteps_mean != 0:
            raise ValueError(f"train.timesteps_mean is of logit_normal, given train.timesteps={self.timesteps}")
        if self.timesteps == "uniform" and self.timesteps_spread is not None:
            raise ValueError("train.timesteps_spread is of logit_normal and mode, given train.timesteps=uniform")
        if self.timesteps == "mode" and (self.timesteps_spread or 0) > WIDEST_MODE:
            raise ValueError(
                f"train.timesteps_spread of mode is at most {WIDEST_MODE}, given {self.timesteps_spread:g}"
            )
        if self.replicas > 1 and self.parallel != "fsdp":
            raise ValueError(
                f"train.replicas={self.replicas} is of train.parallel=fsdp: with {self.parallel} each worker has a copy"
            )
        if self.workers % self.replicas:
            raise ValueError(
                f"train.replicas={self.replicas} copies are split over as many workers each, which "
                f"train.workers={self.workers} does not give: set one of them to fit the other"
            )
        if self.replicas > 1 and self.min_workers is not None:
            raise ValueError(
                f"train.replicas={self.replicas} needs a number of workers that does not change: leave out "
                "train.min_workers"
            )
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"train.min_workers={self.min_workers} is more than train.workers={self.workers}")
        return self
