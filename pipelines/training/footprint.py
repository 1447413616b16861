"""What a run needs of a device's memory whatever its clips are, told before it starts: counted on shapes, not measured.

What the clips take comes on top: a run with `schedule.memory_budget_bytes` measures that, and leaves out what does not
fit.
"""

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError, safe_open

from entprog import config
from entprog.blocks import ADAPTER, blocks
from entprog.blocks.swap import pinned_bytes, rooms_bytes
from entprog.config import Experiment, Row
from entprog.cost.holding import Held, frozen_sizes, held
from entprog.errors import UserError
from entprog.masking import one_line
from entprog.models import lora, vision
from entprog.models.sources import Source
from entprog.schedule import plans
from entprog.schedule.freezing import outside
from pipelines.cluster import joining

COLUMNS = ("stage", "weights", "gradients", "moments", "averages", "together", "weights on the host, at most")
WAITING = 0.75
"""Share of the blocks that are proposed to wait on the host."""


def smaller(blocks: int) -> list[dict[str, Any]]:
    """Settings that take less, the first that is enough to be proposed; those with adapters last, which a network keeps
    (`stages`). blocks: that the network has."""
    waiting = {"model.swap_blocks": int(WAITING * blocks)} if WAITING * blocks >= 3 else {}
    adapters = {"train.lora": {}}
    return [
        {"schedule.frozen_precision": "auto"},
        {"train.optimizer": "adamw_bf16"},
        {"train.optimizer": "adamw_8bit"},
        {"schedule.frozen_precision": "fp8_alone"},
        {"train.optimizer": "adamw_8bit", "schedule.frozen_precision": "fp8_alone"},
        {"train.optimizer": "adamw_8bit", "schedule.frozen_precision": "nf4"},
        adapters,
        {**adapters, "schedule.frozen_precision": "fp8_alone"},
        {**adapters, "schedule.frozen_precision": "nf4"},
        {**adapters, "schedule.frozen_precision": "nf4", **waiting},
    ]


def rows(experiment: Experiment, source: Source) -> list[tuple[str, ...]]:
    """A line of COLUMNS for each stage, of one device. On the host lie float32 weights of frozen layers."""
    sizes = ("weights", "gradients", "moments", "averages", "device", "host")
    return [
        (str(number), *(written(getattr(stage, size)) for size in sizes))
        for number, stage in enumerate(stages(experiment, source), 1)
    ]


def advice(experiment: Experiment, source: Source) -> str | None:
    """What to set where the budget, or without one this machine's GPU, does not even hold weights, gradients,
    moments and averages; None where it does."""
    budget, whose = experiment.schedule.memory_budget_bytes, "schedule.memory_budget_bytes is"
    if budget is None:
        budget, whose = card_bytes() if experiment.train.gpus != "no" else None, "this machine's GPU has"
    if budget is None or (needed := largest(experiment, source) + staying_bytes(experiment, source)) <= budget:
        return None
    parts = (
        "weights, gradients, moments and averages" if experiment.train.ema_decay else "weights, gradients and moments"
    )
    parts += _and_beside(staying_bytes(experiment, source))
    said = f"{whose} {written(budget)}, {parts} alone are up to {written(needed)}"
    proposed = _proposal(experiment, source, budget)
    return f"{said}: {proposed}." if proposed else f"{said}: smaller shares of the blocks take less."


def _proposal(experiment: Experiment, source: Source, budget: int) -> str | None:
    """Settings with which every stage's weights, gradients, moments and averages are within a budget, in words; None:
    none of `smaller` is enough."""
    values, given = experiment.model_dump(), config.settings(experiment)
    # What is proposed is tried on another network: one keeps the adapters that `stages` gives it.
    source = replace(source, **copy.deepcopy({"network": source.network, "outside": source.outside}))
    for change in smaller(len(blocks(source.network))):
        kept = {"train.lora"} if experiment.train.lora else set()
        new = {name: value for name, value in change.items() if name not in kept and given.get(name) != value}
        over: dict[str, dict[str, Any]] = {}
        for name, value in new.items():
            part, _, leaf = name.partition(".")
            over.setdefault(part, {})[leaf] = value
        try:
            less = largest(config.build(config.merge(values, over)), source) + staying_bytes(experiment, source)
        except UserError:  # it does not go with the other settings, the network, or what is installed
            continue
        if less <= budget:
            words = " and ".join(f"{name}={value or '{}'}" for name, value in new.items())
            return f"with {words} they would be {written(less)}"
    return None


def check_budget(experiment: Experiment, source: Source) -> None:
    """Raises UserError where `schedule.memory_budget_bytes` is less than weights, gradients and moments of the smallest
    plan that a stage may have, with what is sure to stay beside the network: what clips take comes on top, and is
    measured once they are there."""
    budget = experiment.schedule.memory_budget_bytes
    if budget is None:
        return
    needed = max(held.weights + held.gradients + held.moments for held in stages(experiment, source, smallest=True))
    others = beside_bytes(source) if waits(experiment, source) is False else 0
    needed += others
    if needed > budget:
        given = written(budget) if budget >= 10**6 else f"{budget} bytes (a size has its unit, as in 24GB)"
        raise UserError(
            f"schedule.memory_budget_bytes is {given}: weights, gradients and moments of the smallest plan"
            f"{_and_beside(others)} alone are {written(needed)}; "
            f"{_proposal(experiment, source, budget) or 'raise it'} (docs/memory.md)"
        )


def host_advice(experiment: Experiment, source: Source, there: int | None) -> str | None:
    """What to set where the workers of this machine would hold more on their host than that has, as they train or as
    they load the network; None where it has enough. there: bytes of the machine's memory; None: the workers may be
    elsewhere."""
    each = max(stage.host for stage in stages(experiment, source)) + (inputs_bytes(experiment, source) or 0)
    others = 0 if waits(experiment, source) is False else beside_bytes(source)
    each += others
    loaded = loading_bytes(experiment, source)
    needed = max(each, loaded) * experiment.train.workers
    if there is None or needed <= there:
        return None
    workers = f"This machine has {written(there)} of memory, on the host {experiment.train.workers} worker(s) hold"
    if loaded > each:
        return (
            f"{workers} all of the network in float32 while it is loaded, {written(loaded)} each: fewer workers a "
            "machine, or train.parallel=fsdp, under which each loads its part."
        )
    held = "frozen layers' weights" + (", and blocks' inputs" if inputs_bytes(experiment, source) else "")
    held += _and_beside(others).rstrip(",")
    way_out = (
        "fewer blocks that wait (model.swap_blocks)"
        if experiment.model.swap_blocks
        else ("schedule.frozen_precision=full, which keeps them on the device")
    )
    return f"{workers} up to {written(each)} each of {held}: fewer workers a machine, or {way_out}."


def loading_bytes(experiment: Experiment, source: Source) -> int:
    """What a worker's host holds while the network is loaded: all of it in float32, where it does not read its part
    alone (`entprog.models.loading`)."""
    if experiment.train.parallel == "fsdp" and not experiment.model.weights:
        return 0
    return 4 * sum(p.numel() for name, p in source.network.named_parameters() if ADAPTER not in name)


def loading(experiment: Experiment, source: Source) -> str | None:
    """What loading the network takes on the host, in words; None where each worker reads its part alone."""
    if not (needed := loading_bytes(experiment, source)):
        return None
    again = experiment.train.lora and experiment.frozen_form != "bfloat16"  # `networks.merged`
    end = ", and the first one's once more at the end, when adapters are merged" if again else ""
    return f"While the network is loaded each worker's host holds all of it in float32, {written(needed)}{end}."


def inputs_bytes(experiment: Experiment, source: Source) -> int | None:
    """What a worker's host holds of blocks' inputs with `model.gradient_checkpointing=on_host`, at most: every block's,
    of the largest clips. 0 without it; None where blocks differ in what they are given, as a U-Net's do."""
    if experiment.model.gradient_checkpointing != "on_host":
        return 0
    size, largest = 2 if experiment.model.dtype == "bfloat16" else 4, 0
    for shape in plans.ladder(experiment.schedule, experiment.data.shape, last=False):
        stream = source.stream(shape)
        if stream is None:
            return None
        largest = max(largest, experiment.batch_size_at(shape) * math.prod(stream) * size)
    return len(blocks(source.network)) * (largest if experiment.train.gpus == "no" else pinned_bytes(largest))


def inputs(experiment: Experiment, source: Source) -> str | None:
    """What blocks' inputs take on the host, in words; None where they do not wait there."""
    needed = inputs_bytes(experiment, source)
    if needed is None:
        return "What blocks are given waits on the host: how much is not foreseen for this network."
    return f"What blocks are given waits on the host: up to {written(needed)} a worker." if needed else None


def beside_bytes(source: Source) -> int:
    """VAE and image encoder, in float32."""
    vae = [] if source.vae is None else [*source.vae.parameters(), *source.vae.buffers()]
    numbers = sum(tensor.numel() for tensor in vae)
    if (folder := source.more.get(vision.ENCODER)) is not None:
        for path in folder.glob("*.safetensors"):
            if path.name.count(".") == 1:  # not `model.fp16.safetensors` beside it
                numbers += _numbers(path)
    return 4 * numbers


def _numbers(path: Path) -> int:
    """Of all tensors of a file, by its header. Raises UserError if it has none."""
    try:
        with safe_open(path, "pt") as file:
            return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"model.base: {path} cannot be read ({one_line(error)}): is it whole, and no pointer of Git LFS?"
        ) from None


def waits(experiment: Experiment, source: Source) -> bool | None:
    """Whether VAE and image encoder wait on the host while the network is trained: all clips are read as latents then.
    None: if they are cached, which is not known here."""
    if experiment.train.gpus == "no" or source.vae is None or experiment.schedule.searches_shapes:
        return False
    return {"never": False, "require": True, "auto": None}[experiment.data.latents]


def staying_bytes(experiment: Experiment, source: Source) -> int:
    """What a device holds of them while the network is trained, at most."""
    return 0 if waits(experiment, source) else beside_bytes(source)


def beside(experiment: Experiment, source: Source) -> str | None:
    """What they take, in words; None where there are none."""
    if not (size := beside_bytes(source)):
        return None
    waiting = waits(experiment, source)
    if waiting:
        return f"VAE and image encoder, {written(size)}, wait on the host while no picture is drawn."
    cached = ""
    if waiting is None:
        cached = "; where all clips are cached as latents (data.latents=require sees to it) they wait on the host"
    return f"VAE and image encoder take {written(size)} of a device beside that{cached}."


def _and_beside(size: int) -> str:
    return ", with VAE and image encoder," if size else ""


def machine_bytes() -> int | None:
    """Memory of the machine that all workers run on; None where a cluster is joined."""
    return None if joining.address() else psutil.virtual_memory().total


def card_bytes() -> int | None:
    """Memory of this machine's first GPU; None without one."""
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def copying(experiment: Experiment, source: Source) -> str | None:
    """What blocks that wait on the host cost, in words; None where none do."""
    copied = max(stage.copied for stage in stages(experiment, source))
    return f"Blocks that wait on the host: up to {written(copied)} are copied to the device a step." if copied else None


def other_expert(experiment: Experiment, source: Source) -> str | None:
    """What a base's other network takes on the first worker while pictures are drawn, in words; None where there is
    none, or nothing is drawn."""
    if source.expert is None or not (experiment.train.samples or experiment.train.preview_every):
        return None
    full = 4 * sum(p.numel() for name, p in source.network.named_parameters() if ADAPTER not in name)
    form = experiment.frozen_form if experiment.model.dtype == "bfloat16" else "float32"
    sizes = [frozen_sizes(block.module, (), form) for block in blocks(source.network)]
    held = full - sum(4 * p.numel() - size for of_block in sizes for p, (size, _) in of_block.items())
    waiting = []
    if experiment.train.parallel == "fsdp":
        waiting = [sum(size for size, is_matrix in of_block.values() if is_matrix) for of_block in sizes]
    here = written(held - sum(waiting) + rooms_bytes(waiting))
    where = f"{here} on its device or host"
    if experiment.train.parallel == "fsdp":
        where = f"{here} on its device, beside its share of this one,"
    if waiting:
        where += f" {written(sum(map(pinned_bytes, waiting)))} on its host"
    return (
        f"While pictures are drawn the first worker holds the other expert, whole: {where} and {written(full)} on its "
        "host while that is read."
    )


def largest(experiment: Experiment, source: Source) -> int:
    """Bytes of the largest stage on a device, with room to unpack a weight."""
    return max(stage.device + stage.unpacking for stage in stages(experiment, source))


def stages(experiment: Experiment, source: Source, *, smallest: bool = False) -> list[Held]:
    """What every stage holds at most: with the largest blocks that it may train, and the most of them. smallest: at
    least, with the smallest and the fewest. A network that adapters are trained of has them from then on."""
    network, found = source.network, blocks(source.network)
    if experiment.train.lora and not any(ADAPTER in name for name, _ in network.named_parameters()):
        lora.add(network, found, experiment.train.lora, experiment.train.seed)
    sizes = {block.name: sum(p.numel() for p in block.module.parameters()) for block in found}
    names = sorted(plans.eligible(found, experiment.schedule.blocks), key=lambda name: -sizes[name])
    free = outside(source, experiment)
    if smallest:
        names.reverse()
    many = least if smallest else most
    return [
        held(network, found, names[: many(experiment, row, len(names))], free, experiment, ever=names)
        for row in plans.rows(experiment.schedule)
    ]


def most(experiment: Experiment, row: Row, blocks: int) -> int:
    """Blocks that a stage trains at most."""
    schedule = experiment.schedule
    share = {"entprog": max(schedule.candidates), "badam": 1 / blocks}.get(schedule.kind, row.share)
    return plans.count(share, blocks)


def least(experiment: Experiment, row: Row, blocks: int) -> int:
    """Blocks that a stage trains at least: a search may come to a single one."""
    return 1 if experiment.schedule.kind == "entprog" else most(experiment, row, blocks)


def written(size: int) -> str:
    """Bytes in words."""
    return f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"
