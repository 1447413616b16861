"""What the study compares, and at which scale: arms and scales as settings, nothing that runs."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from entprog import config
from entprog.config import ClipShape, Experiment


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train."""

    title: str
    settings: Mapping[str, Any]
    """Over the scale's own."""
    rate_factor: float = 1.0
    """Its learning rates are the scale's times this: adapters want larger ones."""
    tuned_as: str | None = None
    """The arm whose learning rate and batch it takes; None: it tunes its own."""
    routed: float | None = None
    """Share of the tokens that frozen blocks see until the last stage (`benchmarks.study_routing`); None: all."""


PAPER = {
    "priority": {"kind": "cei", "sign": "signed"},
    "schedule": {
        "kind": "entprog", "generators": ["count"], "candidates": [0.25, 0.5, 0.75, 1.0], "backward": "exact",
        "efficiency": "paper", "search_until_clear": False,
    },
}  # fmt: skip
ABSOLUTE = {"priority": {"kind": "cei", "sign": "absolute"}}
PAST = {
    **ABSOLUTE,
    "schedule": {
        "kind": "entprog", "generators": ["count", "budget"], "candidates": [0.25, 0.5], "budgets": [0.6],
        "backward": ["residual", "exact"], "efficiency": "paired", "search_until_clear": True,
    },
}  # fmt: skip


def _past(**parts: Mapping[str, Any]) -> dict[str, Any]:
    return config.merge(PAST, parts)


def _lora(rank: int) -> dict[str, Any]:
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    lora = {"rank": rank, "alpha": rank, "targets": targets}
    return {"schedule": {"kind": "full", "outside": "always"}, "train": {"lora": lora}}


HALF = {"shrink": 2}
"""Half the height and width."""
BY_LOT = {"share": 0.25, "backward": "residual", "choose": "random", "redraw_every": 20}
"""A quarter of the blocks, others every 20 steps."""


def _table(*rows: Mapping[str, Any], **others: Any) -> dict[str, Any]:
    return {"schedule": {"kind": "progressive", "table": list(rows), **others}}


HALF_BLOCKS = _table({"until": 0.5, **HALF, "share": 0.5, "backward": "residual"}, {"until": 1})
ROTATING = _table({"until": 0.67, **HALF, **BY_LOT}, {"until": 1, **BY_LOT})
ARMS = {
    "full": Arm(title="full training", settings={"schedule": {"kind": "full"}}),
    "paper": Arm(title="Ent-Prog as in the paper", settings=PAPER),
    "progressive": Arm(
        title="half resolution for half of the budget, then whole clips",
        settings=_table({"until": 0.5, **HALF}, {"until": 1}),
    ),
    "progressive_long": Arm(
        title="… for nine tenths of the budget", settings=_table({"until": 0.9, **HALF}, {"until": 1})
    ),
    "progressive_tokens": Arm(
        title="… with larger batches of small clips",
        settings=_table({"until": 0.5, **HALF}, {"until": 1}, tokens="constant"),
    ),
    "progressive_shift": Arm(
        title="… with a timestep shift that follows the shape",
        settings=_table({"until": 0.5, **HALF}, {"until": 1}, timestep_shift="auto"),
        tuned_as="progressive",
    ),
    "progressive_frames": Arm(
        title="two frames of a clip for half of the budget, then whole clips",
        settings=_table({"until": 0.5, "frames": 2}, {"until": 1}),
        tuned_as="progressive",
    ),
    "progressive_blocks": Arm(
        title="half resolution and half of the blocks, those of high CEI, for half of the budget, then all",
        settings=HALF_BLOCKS | ABSOLUTE,
        tuned_as="progressive",
    ),
    "progressive_blocks_random": Arm(
        title="… a random half of the blocks",
        settings=HALF_BLOCKS | {"priority": {"kind": "random"}},
        tuned_as="progressive",
    ),
    "progressive_blocks_reverse": Arm(
        title="… those of low CEI",
        settings=HALF_BLOCKS | {"priority": {"kind": "reverse_cei", "sign": "absolute"}},
        tuned_as="progressive",
    ),
    "rotating": Arm(
        title="half resolution for two thirds, a quarter of the blocks by lot",
        settings=ROTATING,
    ),
    "rotating_tokens": Arm(
        title="half resolution for two thirds, a quarter of the blocks by lot, larger batches of small clips",
        settings=_table({"until": 0.67, **HALF, **BY_LOT}, {"until": 1, **BY_LOT}, tokens="constant"),
    ),
    "rotating_weighted": Arm(
        title="… by lot in proportion to CEI",
        settings=_table(
            {"until": 0.67, **HALF, **BY_LOT, "choose": "weighted"}, {"until": 1, **BY_LOT, "choose": "weighted"}
        )
        | ABSOLUTE,
    ),
    "rotating_routed": Arm(
        title="… frozen blocks see half of the tokens while clips are small",
        settings=ROTATING,
        tuned_as="rotating",
        routed=0.5,
    ),
    "rotating_routed_quarter": Arm(
        title="… frozen blocks see a quarter of them", settings=ROTATING, tuned_as="rotating", routed=0.25
    ),
    "rotation": Arm(title="a quarter of the blocks by lot, whole clips", settings=_table({"until": 1, **BY_LOT})),
    "search": Arm(
        title="a search over clip shapes and blocks",
        settings={
            "schedule": {
                "kind": "entprog",
                "stages": 4,
                "generators": ["count"],
                "candidates": [0.5, 1.0],
                "shapes": [HALF],
                "backward": "residual",
                "search_share": 0.05,
            },
        }
        | ABSOLUTE,
        tuned_as="progressive",
    ),
    "past": Arm(title="Ent-Prog past the paper", settings=PAST),
    "past_random": Arm(title="… random order instead of CEI", settings=_past(priority={"kind": "random"})),
    "past_linear": Arm(
        title="… linear instead of adaptive", settings=_past(schedule={"kind": "linear", "backward": "residual"})
    ),
    "past_exact": Arm(title="… exact backward only", settings=_past(schedule={"backward": "exact"})),
    "past_count": Arm(title="… counts only", settings=_past(schedule={"generators": ["count"]})),
    "past_unpaired": Arm(title="… the paper's estimator", settings=_past(schedule={"efficiency": "paper"})),
    "past_signed": Arm(title="… signed CEI", settings=_past(priority={"sign": "signed"})),
    "past_reverse": Arm(title="… reverse CEI", settings=_past(priority={"kind": "reverse_cei"})),
    "past_gradient": Arm(title="… gradient norm", settings=_past(priority={"kind": "gradient"})),
    "past_last": Arm(title="… last blocks first (last-m)", settings=_past(priority={"kind": "depth_last"})),
    "lora_small": Arm(title="LoRA, rank 4", settings=_lora(4), rate_factor=3.0),
    "lora_large": Arm(title="LoRA, rank 16", settings=_lora(16), rate_factor=3.0),
    "lisa": Arm(
        title="LISA", settings={"schedule": {"kind": "lisa", "stages": 16, "lisa_share": 0.25, "backward": "exact"}}
    ),
    "badam": Arm(
        title="BAdam",
        settings={
            "schedule": {"kind": "badam", "stages": 16, "backward": "exact"},
            "train": {"frozen_state": "drop"},
        },
    ),
}
"""Name → arm. Full training is what the others are measured against."""
FEW = ("full", "paper", "progressive", "rotating")
"""Arms of the tasks beside the first."""
LARGER_BATCHES = ("progressive_tokens", "rotating_tokens")
SEARCHED = ("paper", "past", "search")
"""Arms whose choices are looked at in hindsight."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A network and what it is fine-tuned on."""

    family: str
    target: str
    """`rendered` or `real`."""
    arms: tuple[str, ...]
    tuned: bool = True
    """Whether it tunes its own learning rates and batches; otherwise those of the first task count."""


TASKS = {
    "wan_rendered": Task(family="wan", target="rendered", arms=tuple(ARMS)),
    "latte_rendered": Task(family="latte", target="rendered", arms=FEW),
    "wan_real": Task(family="wan", target="real", arms=(*FEW, *LARGER_BATCHES), tuned=False),
}
"""In the order in which they run."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How large all of it is."""

    rendered: ClipShape
    """Of the shards."""
    shape: ClipShape
    """Of the clips that are trained on, cut out of them."""
    source_clips: int
    target_clips: int
    networks: Mapping[str, Mapping[str, Any]]
    """Family → configuration of its new network."""
    batch_size: int
    """Clips of a step of the budget's, and of the base's training."""
    full_steps: int
    """The budget: what full training takes for so many steps of `batch_size` clips, in the clock."""
    base_steps: int
    """Of pre-training without pose."""
    base_rate: float
    rates: tuple[float, ...]
    """Learning rates tried by every arm, each with each of `batches`."""
    batches: tuple[int, ...]
    """Batch sizes tried."""
    tune_share: float
    """Share of the budget that each of these tries takes."""
    seeds: tuple[int, ...] = (0, 1, 2)
    tune_seed: int = 100
    clock: str = "flops"
    points: int = 12
    """Evaluations of a run, spread evenly over its budget."""
    held_out_clips: int = 64
    """Rendered held-out clips: the first for searches, the next for tuning, the next again for judging arms."""
    search_clips: int = 4
    tune_clips: int = 12
    test_clips: int = 24
    draws: int = 2
    """Noise draws of a judged clip."""
    quality_clips: int = 4
    quality_steps: int = 10
    metrics: tuple[str, ...] = ("psnr", "ssim", "stlpips")
    hindsight_stages: tuple[int, ...] = (0, 1)
    tasks: tuple[str, ...] = tuple(TASKS)
    arms: tuple[str, ...] = tuple(ARMS)
    common: Mapping[str, Any] = field(default_factory=dict)
    """Settings of every experiment."""


WAN = {
    "patch_size": [2, 4, 4], "attention_head_dim": 32, "text_dim": 16, "freq_dim": 64, "cross_attn_norm": True,
    "rope_max_seq_len": 64, "out_channels": 3,
}  # fmt: skip
LATTE = {
    "patch_size": 4, "attention_head_dim": 32, "caption_channels": 16, "sample_size": 32, "out_channels": 3,
    "activation_fn": "gelu-approximate", "norm_type": "ada_norm_single", "norm_elementwise_affine": False,
    "attention_bias": True, "num_embeds_ada_norm": 1000,
}  # fmt: skip
COMMON = {
    "model": {"vae": "none"},
    "train": {"warmup_steps": 10, "samples": 0, "threads": 1},
    "priority": {"conditions": 4, "draws": 4},
    "schedule": {"stages": 4, "search_steps": 2},
}
CPU = Scale(
    rendered=ClipShape(frames=4, height=64, width=48, fps=12),
    shape=ClipShape(frames=4, height=64, width=48, fps=12),
    source_clips=2000,
    target_clips=512,
    networks={
        "wan": {**WAN, "num_attention_heads": 3, "num_layers": 8, "ffn_dim": 192},
        "latte": {**LATTE, "num_attention_heads": 2, "num_layers": 4, "cross_attention_dim": 64, "video_length": 4},
    },
    batch_size=4,
    full_steps=240,
    base_steps=700,
    base_rate=2e-3,
    rates=(1e-4, 2e-4, 5e-4, 1e-3),
    batches=(1, 2, 4),
    tune_share=0.5,
    seeds=(0, 1, 2, 3, 4),
    points=16,
    tune_clips=12,
    test_clips=40,
    tasks=("wan_rendered", "wan_real"),
    common=COMMON,
)
"""Long on one core: `--only` and `--sitting-s` cut it into parts."""
CPU_SECONDS = replace(
    CPU,
    clock="seconds",
    rates=(1e-4, 2e-4, 5e-4),
    batches=(1, 2, 4),
    tune_share=0.8,
    points=12,
    hindsight_stages=(),
    arms=("full", "progressive", "rotating", *LARGER_BATCHES),
)
"""The scale `cpu` with another clock: whoever pays for seconds tunes batches by seconds, which count what a small step
costs beside its arithmetic. Tries are nearly as long as the runs: by tries of two fifths plain training chose a rate
whose loss rises again before the end. Needs an idle core."""
SMALL = Scale(
    rendered=ClipShape(frames=4, height=48, width=32, fps=12),
    shape=ClipShape(frames=4, height=48, width=32, fps=12),
    source_clips=1000,
    target_clips=512,
    networks={"wan": {**WAN, "num_attention_heads": 2, "num_layers": 8, "ffn_dim": 128}},
    batch_size=4,
    full_steps=120,
    base_steps=700,
    base_rate=2e-3,
    rates=(2e-4, 5e-4, 1.2e-3),
    batches=(1, 4),
    tune_share=0.5,
    points=12,
    search_clips=4,
    tune_clips=12,
    test_clips=40,
    quality_steps=8,
    hindsight_stages=(),
    tasks=("wan_rendered",),
    arms=("full", "paper", "past_linear", "progressive", "progressive_tokens", "rotating"),
    common=COMMON,
)
"""The least that tells arms apart, for one core."""
SMOKE = Scale(
    rendered=ClipShape(frames=2, height=32, width=16, fps=12),
    shape=ClipShape(frames=2, height=32, width=16, fps=12),
    source_clips=8,
    target_clips=8,
    networks={
        "wan": {**WAN, "patch_size": [1, 8, 8], "num_attention_heads": 1, "num_layers": 4, "ffn_dim": 32},
        "latte": {**LATTE, "num_attention_heads": 1, "num_layers": 2, "cross_attention_dim": 32, "video_length": 2},
    },
    batch_size=2,
    full_steps=24,
    base_steps=6,
    base_rate=2e-3,
    rates=(1e-3, 3e-3),
    batches=(2,),
    tune_share=0.25,
    seeds=(0, 1),
    points=4,
    held_out_clips=12,
    search_clips=2,
    tune_clips=2,
    quality_clips=2,
    quality_steps=2,
    metrics=("psnr", "ssim"),
    hindsight_stages=(0,),
    tasks=("wan_rendered", "latte_rendered"),
    arms=("full", "past", "lora_small", "badam"),
    common=config.merge(
        COMMON,
        {
            "priority": {"conditions": 2},
            "schedule": {"stages": 2, "search_share": 0.9},
            "train": {"warmup_steps": 0},  # a search waits for its end
        },
    ),
)
GPU = Scale(
    rendered=ClipShape(frames=8, height=128, width=96, fps=12),
    shape=ClipShape(frames=8, height=128, width=96, fps=12),
    source_clips=1024,
    target_clips=512,
    networks={
        "wan": {
            **WAN, "patch_size": [1, 8, 8], "num_attention_heads": 12, "attention_head_dim": 64, "num_layers": 12,
            "ffn_dim": 3072, "text_dim": 64, "freq_dim": 256, "rope_max_seq_len": 1024,
        },
    },
    batch_size=16,
    full_steps=200,
    base_steps=450,
    base_rate=5e-4,
    rates=(2e-4, 6e-4),
    batches=(8, 16),
    tune_share=0.3,
    clock="seconds",
    seeds=(0, 1, 2, 3, 4),
    points=12,
    tune_clips=12,
    test_clips=40,
    metrics=("psnr", "ssim"),
    hindsight_stages=(),
    tasks=("wan_rendered",),
    arms=("full", "progressive", "rotating", "progressive_tokens", "paper"),
    common=config.merge(COMMON, {"model": {"dtype": "bfloat16"}}),
)  # fmt: skip
"""Over 100 M parameters, in minutes of one card. Its clock is seconds, of a machine that nobody shares."""
SCALES = {"small": SMALL, "cpu": CPU, "cpu_seconds": CPU_SECONDS, "gpu": GPU, "smoke": SMOKE}


def experiment(
    scale: Scale,
    task: str,
    arm: str,
    *,
    base: str,
    seed: int,
    rate: float,
    batch: int,
    budget: float,
    tuning: bool = False,
) -> Experiment:
    """Settings of one run of an arm. batch: clips of a step; budget: in the scale's clock; tuning: it is a share of a
    whole run's.

    Raises UserError for settings that do not fit.
    """
    of_all = {
        "name": f"study-{task}-{arm}",
        "model": {"family": TASKS[task].family, "base": base, "conditions": ["reference", "pose"]},
        "data": {
            "shape": scale.shape.model_dump(), "batch_size": batch, "held_out_clips": scale.search_clips,
            "held_out_draws": 1,
        },
        "train": {
            scale.clock: budget, "learning_rate": rate * ARMS[arm].rate_factor, "seed": seed,
            "held_out_every": 1_000_000,  # judged from outside, on other clips
        },
        "schedule": {"clock": scale.clock, "search_clips": scale.search_clips},
    }  # fmt: skip
    values = config.merge(config.merge(scale.common, of_all), ARMS[arm].settings)
    if tuning and values["schedule"]["kind"] == "entprog":  # stages of so short a run could not pay for a search
        values = config.merge(values, {"schedule": {"stages": 1}})
    return config.build(values)


def pretraining(scale: Scale, family: str) -> Experiment:
    """How a base is made: plain training on the source's clips alone, as a text-to-video model is."""
    values = {
        "name": f"study-base-{family}",
        "model": {"family": family, "init": dict(scale.networks[family]), "conditions": []},
        "data": {"shape": scale.shape.model_dump(), "batch_size": scale.batch_size, "held_out_draws": 1},
        "train": {
            "steps": scale.base_steps, "learning_rate": scale.base_rate, "cooldown_share": 0.3,
            "held_out_every": 1_000_000,
        },
        "schedule": {"kind": "full"},
    }  # fmt: skip
    return config.build(config.merge(scale.common, values))
