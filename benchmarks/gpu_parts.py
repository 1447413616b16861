"""What `benchmarks.gpu_check` measures, part by part, the most important first. A part gives its rows as they come.

Tiny parts do the same on the CPU with tiny networks, and run what is compiled as it is written.
"""

import importlib.util
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import cei_cost, common, gpu_large, gpu_train, step_cost
from benchmarks.gpu_common import FP8_WAN, QUARTER, REPEATS, Row, SkippedError, step_experiment
from benchmarks.gpu_large import large_rows
from benchmarks.step_cost import Bench, Setting
from benchmarks.tiny_families import TINY
from entprog import config, models
from entprog.blocks import blocks, check_compiles, fp8
from entprog.data.clips import Latents
from entprog.diffusion import objectives
from entprog.errors import UserError
from entprog.models import lora
from entprog.schedule import plans
from entprog.schedule.freezing import Freeze
from entprog.schedule.plans import Plan
from entprog.scoring import cei
from entprog.training import optimizer


@dataclass(frozen=True)
class Part:
    """Something to measure."""

    name: str
    rows: Callable[[], Iterator[Row]]


def parts(tiny: bool) -> list[Part]:
    """All of them, in the order in which they are worth their time. tiny: on the CPU, with tiny networks."""
    device = "cpu" if tiny else "cuda"
    settings = [
        (tokens, Setting(checkpointing=checkpointing, compile=compiled, fp8=low))
        for tokens, compiled in ((20_000, True), (20_000, False), (3_200, True), (3_200, False))
        for low in (False, True)
        for checkpointing in (True, False)
    ]
    steps = [Part(named(*each), partial(step_rows, *each, device)) for each in settings]
    large = [Part(f"14B, {way}, {gb} GB", partial(large_rows, gb, way, device)) for gb, way in gpu_large.parts()]
    return [
        Part("card", partial(card_rows, device)),
        Part("numbers", partial(number_rows, device, compiled=False)),
        Part("numbers in fp8", partial(fp8_number_rows, device, compiled=False)),
        Part("numbers of frozen weights elsewhere", partial(elsewhere_number_rows, device)),
        *steps[:4],
        Part("train", partial(gpu_train.train_rows, device)),
        Part("train in other ways", partial(gpu_train.other_rows, device)),
        Part("blocks drawn anew", partial(redraw_rows, device)),
        *large,
        Part("train 1.3B's shape", partial(gpu_train.large_rows, device)),
        Part("scoring", partial(scoring_rows, device)),
        Part("numbers, compiled", partial(number_rows, device, compiled=True)),
        Part("numbers in fp8, compiled", partial(fp8_number_rows, device, compiled=True)),
        *steps[4:],
    ]


def named(tokens: int, setting: Setting) -> str:
    """A part of the step table in words."""
    on = [("compiled", setting.compile), ("checkpointing", setting.checkpointing), ("fp8", setting.fp8)]
    return ", ".join([f"step of {tokens} tokens", *(word for word, is_on in on if is_on)])


# ---- what the card can do ----


def card_rows(device: str) -> Iterator[Row]:
    """The card's own rate of products of bfloat16 matrices, and of attention: the ceilings of all others."""
    size, tokens = (256, 64) if device == "cpu" else (8192, 8192)
    one = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    heads = [torch.randn(1, 12, tokens, 128, device=device, dtype=torch.bfloat16) for _ in range(3)]
    arms = {
        "matmul": (lambda: one @ one, 2 * size**3),
        "attention": (lambda: functional.scaled_dot_product_attention(*heads), 4 * 12 * 128 * tokens**2),
    }
    times = 10
    measured = common.interleaved(
        {name: partial(repeated, run, times) for name, (run, _) in arms.items()}, REPEATS, device
    )
    rates = {name: flops * times / min(measured[name].seconds) / 1e12 for name, (_, flops) in arms.items()}
    yield {f"{name}_tflops_per_s": rate for name, rate in rates.items()} | {"matmul": f"{size} x {size}, bfloat16"}


def repeated(run: Callable[[], Any], times: int) -> None:
    for _ in range(times):
        run()


# ---- numbers ----

TOLERANCES = {"float32": 1e-3, "bfloat16": 5e-2, "fp8": 1e-1}
ELSEWHERE: dict[str, Row] = {
    "fp8_alone": {"schedule": {"frozen_precision": "fp8_alone"}},
    "nf4": {"schedule": {"frozen_precision": "nf4"}},
    "bfloat16, blocks wait": {"model": {"swap_blocks": 3}},
    "nf4, blocks wait": {"model": {"swap_blocks": 3}, "schedule": {"frozen_precision": "nf4"}},
    "bfloat16, inputs wait": {"model": {"gradient_checkpointing": "on_host"}},
    "bfloat16, attention kept": {"model": {"gradient_checkpointing": "keep_attention"}},
}
"""How a base lies under adapters, and what blocks keep → settings."""
TOLERANCES |= dict.fromkeys(ELSEWHERE, TOLERANCES["bfloat16"])
"""Largest relative difference between two devices, of loss and gradient."""
COMPILED = ("wan", "cogvideox", "hunyuan_video", "svd")
DEEP_WAN = {**FP8_WAN, "num_layers": 6}
"""So deep that some blocks can wait."""
WIDE_LAYERS = {"attention_head_dim": 128, "ffn_dim": 8192}
"""A block's copy, of 130 MB in bfloat16, takes longer than its few tokens."""
PASSES = 3
"""The first two learn which block comes after which."""


def number_rows(device: str, compiled: bool) -> Iterator[Row]:
    """Loss and gradient of a plan of every other block on the device against the CPU's, at equal weights and noise."""
    if compiled:
        needs_compiled()
    for name in COMPILED if compiled else TINY:
        for dtype in ("float32", "bfloat16"):
            if name == "svd" and dtype == "bfloat16":
                continue  # its temporal convolutions do not take it
            for backward in ("exact", "residual"):
                yield compared(name, dtype, backward, device, compiled)


def fp8_number_rows(device: str, compiled: bool) -> Iterator[Row]:
    """The same of a network whose frozen blocks are in fp8, against one where they are in full precision: not every
    CPU's torch multiplies in fp8."""
    needs_fp8(device)
    if compiled:
        needs_compiled()
    yield compared("wan", "fp8", "residual", device, compiled)


def elsewhere_number_rows(device: str) -> Iterator[Row]:
    """The same of adapters in every block of a network whose own weights are packed, or wait on the host; the latter
    also against a network of which none wait."""
    if importlib.util.find_spec("peft") is None:
        raise SkippedError("peft is not installed")
    for how in ELSEWHERE:
        yield compared("wan", how, "exact", device, compiled=False)
    for how, changes in ELSEWHERE.items():
        if "swap_blocks" in changes.get("model", {}):
            yield overlapped(how, device)


def overlapped(how: str, device: str) -> Row:
    """Whether blocks that wait give the bits of blocks that do not, on the same device, once their order is known and
    each is copied while the one before it runs. Layers are so large on a GPU that a copy outlasts a block."""
    large = {} if device == "cpu" else {"model": {"init": {"num_attention_heads": 16, **WIDE_LAYERS}}}
    ways = (large, config.merge(large, {"model": {"swap_blocks": 0}}))
    with sdpa_kernel(SDPBackend.MATH):  # others add up a gradient in any order
        (loss, gradient), (loss_there, gradient_there) = (
            loss_and_gradient("wan", how, "exact", device, compiled=False, changes=way, passes=PASSES) for way in ways
        )
    differences = {
        "loss_difference": abs(loss / loss_there - 1),
        "gradient_difference": float((gradient - gradient_there).abs().max()),
    }
    equal = loss == loss_there and torch.equal(gradient, gradient_there) and bool(gradient.isfinite().all())
    row = {"family": "wan", "dtype": f"{how}, against none", "backward": "exact", "compiled": False, "tolerance": 0.0}
    return row | differences | {"equal": equal, "note": ""}


def has_fp8(device: str) -> bool:
    return device == "cpu" or torch.cuda.get_device_capability() >= fp8.CAPABILITY


def compared(name: str, dtype: str, backward: config.Backward, device: str, compiled: bool) -> Row:
    """One family's row. An error is in its note: the other families go on.

    Raises RuntimeError after an error that leaves the GPU unusable in this process: no other family could go on in it.
    """
    row = {"family": name, "dtype": dtype, "backward": backward, "compiled": compiled, "tolerance": TOLERANCES[dtype]}
    try:
        loss, gradient = loss_and_gradient(name, dtype, backward, device, compiled, in_fp8=dtype == "fp8")
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        note = f"{type(error).__name__}: {first_line(error)}"
        try:
            if torch.device(device).type == "cuda":
                torch.cuda.synchronize()
        except RuntimeError as after:
            raise RuntimeError(f"{name}, {dtype}, {backward} left the GPU unusable: {note}") from after
        return row | {"equal": False, "note": note}
    loss_there, gradient_there = loss_and_gradient(name, dtype, backward, "cpu", compiled=False)
    differences = {
        "loss_difference": abs(loss / loss_there - 1),
        "gradient_difference": float((gradient - gradient_there).norm() / gradient_there.norm()),
    }
    return row | differences | {"equal": all(value <= TOLERANCES[dtype] for value in differences.values()), "note": ""}


def loss_and_gradient(
    name: str,
    dtype: str,
    backward: config.Backward,
    device: str,
    compiled: bool,
    in_fp8: bool = False,
    changes: Row | None = None,
    passes: int = 1,
) -> tuple[float, torch.Tensor]:
    """Loss, and the gradient of all that is trained [parameters], in float32 on the host: the last of so many passes.

    changes: settings over those that are meant by the names.
    """
    init = FP8_WAN if dtype == "fp8" else DEEP_WAN if dtype in ELSEWHERE else TINY[name]["init"]
    model = {"family": TINY[name]["family"], "init": init, "vae": "none", "compile_blocks": compiled}
    values = {
        "model": {**model, "dtype": "float32" if dtype == "float32" else "bfloat16"},
        "data": {"shape": {"frames": 2, "height": 16, "width": 16}},
        "train": {"steps": 1, "lora": {"rank": 4} if dtype in ELSEWHERE else None},
        "schedule": {"backward": backward, "frozen_precision": "fp8" if in_fp8 else "auto"},
    }
    experiment = config.build(config.merge(config.merge(values, ELSEWHERE.get(dtype, {})), changes or {}))

    def prepare(network: nn.Module) -> None:
        if experiment.train.lora:
            lora.add(network, blocks(network), experiment.train.lora, seed=0)

    load = models.family(experiment.model.family).load
    denoiser = load(experiment.model, device, seed=0, prepare=prepare)  # drawn on the host
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(2, 3, 2, 16, 16, generator=generator).to(device) for _ in range(2))
    batch = Latents(clean, {c: clean.roll(i + 1, -1) for i, c in enumerate(denoiser.conditions)}, torch.arange(2))
    t = torch.tensor([0.3, 0.7], device=device)
    found = cei.blocks_in_order(blocks(denoiser.network), denoiser.predict, batch)
    freeze = Freeze(denoiser, found, experiment)
    freeze.put(Plan(trainable=tuple(b.name for b in found[::2]), backward=backward, shape=experiment.data.shape))
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        noisy, target = denoiser.process.pair(batch.clean, noise, t)
        for _ in range(passes):
            denoiser.network.zero_grad(set_to_none=True)
            loss = objectives.loss(denoiser.predict(noisy, t, batch.conditions), target).mean()
            loss.backward()
    parts = [p.grad.flatten() for p in freeze.trained if p.grad is not None]
    return loss.item(), torch.cat(parts).float().cpu()


# ---- steps ----


def step_rows(tokens: int, setting: Setting, device: str) -> Iterator[Row]:
    """Full training and a quarter of the blocks with both backwards, of a Wan of 1.3B's shape: `benchmarks.step_cost`'s
    rows."""
    if setting.fp8:
        needs_fp8(device)
    if setting.compile:
        needs_compiled()
    on_gpu = device != "cpu"
    network = step_cost.network_of(30, 12, True) if on_gpu else step_cost.network_of(4, 1, False)
    bench = Bench(step_experiment(network, tokens, device), "scattered", device, (QUARTER,), prepare=rounded)
    yield from bench.figures(setting, REPEATS if on_gpu else 1)


def redraw_rows(device: str) -> Iterator[Row]:
    """What it takes to freeze a quarter of the blocks and thaw another one, of a Wan of 1.3B's shape whose weights
    bfloat16 does not hold: moments and float32 weights go to the host and come from there."""
    network = step_cost.network_of(*((4, 1, False) if device == "cpu" else (30, 12, True)))
    experiment = step_experiment(network, 3_200, device)
    bench = Bench(experiment, "scattered", device, (QUARTER,))
    freeze = Freeze(bench.denoiser, bench.found, experiment)
    shape = experiment.data.shape
    quarters = [plans.of_set(bench.names[first::4], bench.names, "residual", shape) for first in range(2)]

    def draw(plan: Plan) -> None:
        freeze.put(plan)
        bench.trained = freeze.trained
        optimizer.follow(bench.optimizer, bench.trained, experiment.train.frozen_state)

    def both() -> None:
        for plan in quarters:
            draw(plan)

    for plan in quarters:  # moments come with a first step
        draw(plan)
        bench.turn("", {})
    measured = common.interleaved({"both": both}, REPEATS, device)["both"]
    drawn = [block for block in bench.found if block.name in quarters[0].trainable]
    moved = sum(p.numel() for block in drawn for p in block.module.parameters())
    yield {"redraw_s": measured.median_s / len(quarters), "blocks": len(drawn), "parameters": moved}


def rounded(network: nn.Module) -> None:
    """Weights become numbers that bfloat16 has, as a published checkpoint's are: none wait on the host while they are
    frozen, and plans change quickly."""
    for parameter in network.parameters():
        parameter.data = parameter.data.bfloat16().float()


def needs_compiled() -> None:
    """Raises SkippedError where this torch may not compile what changes its type."""
    try:
        check_compiles()
    except UserError as error:
        raise SkippedError(str(error)) from None


def needs_fp8(device: str) -> None:
    """Raises SkippedError where there is none."""
    if importlib.util.find_spec("torchao") is None:
        raise SkippedError("torchao is not installed")
    if not has_fp8(device):
        raise SkippedError(f"a {common.describe(device)} has no fp8")


# ---- scoring ----


def scoring_rows(device: str) -> Iterator[Row]:
    """CEI scoring with replay and without: `benchmarks.cei_cost`'s row."""
    yield cei_cost.figures_of(30 if device != "cpu" else 3, draws=4, repeats=1, device=device)


def not_installed(message: str) -> str | None:
    """The package that an error's message says is not there, in this process or in a command's; None where it says
    nothing of the kind, or names a module of this project: that is a fault and no lack."""
    found = re.search(r"No module named '(\w+)", message)
    return found[1] if found and found[1] not in ("benchmarks", "entprog", "pipelines") else None


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:1600]
