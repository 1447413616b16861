"""A step of a network of Wan 14B's width in a part of a card's memory: what `benchmarks.gpu_check` measures of it."""

import copy
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from benchmarks import step_cost
from benchmarks.gpu_common import QUARTER, REPEATS, Row, SkippedError, step_experiment
from benchmarks.step_cost import FULL, Bench, Setting
from entprog import config, models
from entprog.blocks import Block, blocks, store_frozen, variants
from entprog.blocks.swap import Swap, spread
from entprog.config import Experiment
from entprog.cost.holding import held
from entprog.models import lora
from entprog.schedule import plans

LIMITS_GB = (24, 48, 80)
SHARE_HELD = 0.8
"""Part of a limit that weights, gradients and moments may take where the network is made to fit it."""
WIDE = {
    "num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824, "text_dim": 4096, "freq_dim": 256,
    "cross_attn_norm": True, "out_channels": step_cost.CHANNELS, "patch_size": [1, 2, 2],
}  # fmt: skip
"""Wan 14B's width."""
DEPTH = 40
NARROW = {**WIDE, "num_attention_heads": 1, "attention_head_dim": 64, "ffn_dim": 128, "text_dim": 16, "freq_dim": 64}
ADAPTERS: Row = {"train": {"lora": {"rank": 16}}, "schedule": {"outside": "conditions"}}
WAYS: dict[str, tuple[str, Row]] = {
    "LoRA": (FULL, ADAPTERS),
    "a quarter, 8-bit moments": ("residual", {"train": {"optimizer": "adamw_8bit"}}),
    "a quarter": ("residual", {"train": {"optimizer": "adamw_bf16"}}),
    "LoRA, base in nf4": (FULL, config.merge(ADAPTERS, {"schedule": {"frozen_precision": "nf4"}})),
    "LoRA, base in fp8": (FULL, config.merge(ADAPTERS, {"schedule": {"frozen_precision": "fp8_alone"}})),
    "LoRA, 24 blocks wait": (FULL, config.merge(ADAPTERS, {"model": {"swap_blocks": 24}})),
}
"""What trains a large network → the end of its plan's name, and its settings."""
SMALL_ONLY = ("LoRA, base in nf4", "LoRA, base in fp8", "LoRA, 24 blocks wait")
"""Ways that are for the smallest card."""
NEEDS = {"lora": "peft", "adamw_8bit": "torchao"}
"""Settings → the package that they need."""


def parts() -> list[tuple[int, str]]:
    """(GB, way) of each, the most important first."""
    every = [(gb, way) for gb in LIMITS_GB for way in WAYS if way not in SMALL_ONLY]
    return [*((LIMITS_GB[0], way) for way in SMALL_ONLY), *every]


def large_rows(limit_gb: int, way: str, device: str) -> Iterator[Row]:
    """A step of a Wan of 14B's width with checkpointing, in a part of the card's memory. Where weights, gradients and
    moments do not leave room, as many blocks as do; the row says how many of the 40 those are."""
    _, changes = WAYS[way]
    for setting, package in NEEDS.items():
        if setting in str(changes) and importlib.util.find_spec(package) is None:
            raise SkippedError(f"{package} is not installed")
    on_gpu = device != "cpu"
    if on_gpu:
        total = torch.cuda.get_device_properties(device).total_memory
        if limit_gb * 1e9 > total:
            raise SkippedError(f"the card has {total / 1e9:.0f} GB")
        torch.cuda.set_per_process_memory_fraction(limit_gb * 1e9 / total)
    try:
        depth = fitting(way, limit_gb * 1e9, device)
        whole, here = (held_by(blocks, way, device) for blocks in (DEPTH, depth))
        row = {"way": way, "limit_gb": limit_gb, "blocks": depth, "of_blocks": DEPTH}
        row |= {"held_foreseen_bytes": here, "held_foreseen_whole_bytes": whole}
        yield row | large_step(depth, way, device)
    finally:
        if on_gpu:
            torch.cuda.set_per_process_memory_fraction(1.0)


def large_experiment(depth: int, way: str, device: str) -> Experiment:
    network = {**(NARROW if device == "cpu" else WIDE), "num_layers": depth}
    one = {"data": {"batch_size": 1}}
    return step_experiment(network, 3_200, device, **config.merge(WAYS[way][1], one))


def held_by(depth: int, way: str, device: str) -> int:
    """Bytes of weights, gradients and moments of a network so deep, counted without weights."""
    experiment = large_experiment(depth, way, device)
    source = models.family("wan").inspect(experiment.model)
    found, groups = blocks(source.network), source.outside()
    outside, trained = [p for group in groups.values() for p in group], plans.count(QUARTER, depth)
    if experiment.train.lora:
        lora.add(source.network, found, experiment.train.lora, seed=0)
        outside, trained = groups["conditions"], depth
    return held(source.network, found, [block.name for block in found[:trained]], outside, experiment).device


def fitting(way: str, limit: float, device: str) -> int:
    """Blocks of the deepest network that leaves room in a limit of bytes: a multiple of 4, at least 4."""
    if device == "cpu":
        return 4
    if held_by(DEPTH, way, device) <= SHARE_HELD * limit:
        return DEPTH
    four, eight = (held_by(depth, way, device) for depth in (4, 8))
    more = int((SHARE_HELD * limit - four) // (eight - four))
    return min(4 * (1 + max(more, 0)), DEPTH)


def large_step(depth: int, way: str, device: str) -> Row:
    """`benchmarks.step_cost`'s row of one plan."""
    experiment, (plan, _) = large_experiment(1, way, device), WAYS[way]
    with default_dtype(torch.bfloat16):  # float32 weights of all blocks at once would not fit
        prepare = partial(deepened, depth=depth, experiment=experiment, device=torch.device(device))
        bench = Bench(experiment, "scattered", device, fractions=(QUARTER,), prepare=prepare)
    setting = Setting(checkpointing=True, compile=False, fp8=False)
    name = next(name for name in bench.plans(("residual",)) if name.endswith(plan))
    (row,) = bench.figures(setting, REPEATS if device != "cpu" else 1, only=[name])
    return row


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def deepened(network: nn.Module, depth: int, experiment: Experiment, device: torch.device) -> None:
    """A bfloat16 network of one block gets so many, all alike, and is stored as training would store it. Beside what is
    stored, never more than one block is on the device in bfloat16, and one in float32."""
    if experiment.train.lora:
        lora.add(network, blocks(network), experiment.train.lora, seed=0)
    first, swap = network.blocks[0], Swap(device)
    waiting = spread([str(number) for number in range(depth)], experiment.model.swap_blocks)
    for number in (*range(1, depth), 0):
        if number:
            network.blocks.append(copy.deepcopy(first))
        module = network.blocks[number].float()
        store_frozen([Block(f"blocks.{number}", module)], experiment.frozen_form)
        if str(number) in waiting:
            variants(module).stored.wait(module, swap)
    network.register_to_config(num_layers=depth)
    inside = {parameter for block in blocks(network) for parameter in block.module.parameters()}
    for parameter in network.parameters():
        if parameter not in inside:
            parameter.data = parameter.data.float()
