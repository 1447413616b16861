"""Low-rank adapters inside blocks (LoRA, arXiv 2106.09685), through peft: y = W x + alpha/rank · B A x.

Every block gets adapters; which of them train is the plan's to say, as it is of a block's own weights without adapters
(`blocks.trainable`). B starts at zero, so that an adapter that never trained changes nothing, to the bit.
"""

import importlib.util
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from entprog.blocks import ADAPTER, Block, blocks, full_weights, in_full
from entprog.config import Lora
from entprog.distributed import agree, fsdp
from entprog.errors import UserError, install
from entprog.models import adapters


def check(network: nn.Module, found: Iterable[Block], settings: Lora) -> None:
    """Raises UserError without peft, or for a target that no linear layer of a block is."""
    if importlib.util.find_spec("peft") is None:
        raise UserError(f"train.lora needs peft: {install('lora')}, or set train.lora=null")
    linear = [n for block in found for n, m in block.module.named_modules() if isinstance(m, nn.Linear)]
    for target in settings.targets:
        if not any(re.fullmatch(_ending(target), name) for name in linear):
            known = ", ".join(sorted({name.removeprefix("attn1.").removeprefix("attn2.") for name in linear}))
            raise UserError(
                f"train.lora.targets: no linear layer of a {type(network).__name__}'s block ends in {target}; "
                f"there are: {known}"
            )


def add(network: nn.Module, found: Iterable[Block], settings: Lora, seed: int) -> None:
    """Add adapters to every block, A drawn from the seed. Raises UserError as `check` does."""
    found = list(found)
    check(network, found, settings)
    from peft import inject_adapter_in_model

    inside = "|".join(re.escape(block.name) for block in found)
    wanted = rf"(?:{inside})\.(?:{'|'.join(map(_ending, settings.targets))})"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(_config(settings, wanted), network)


@contextmanager
def as_if_there(network: nn.Module) -> Iterator[None]:
    """Linear layers without memory have a weight of a single number inside: peft puts adapters where their layer is."""
    layers = [module for module in network.modules() if isinstance(module, nn.Linear) and module.weight.is_meta]
    weights = [layer.weight for layer in layers]
    for layer, weight in zip(layers, weights, strict=True):
        layer.weight = nn.Parameter(torch.zeros(1, dtype=weight.dtype).expand(weight.shape))
    try:
        yield
    finally:
        for layer, weight in zip(layers, weights, strict=True):
            layer.weight = weight


def save(
    network: nn.Module,
    settings: Lora,
    outside: Iterable[nn.Parameter],
    folder: Path,
    part: str = "transformer",
    about: Mapping[str, Any] | None = None,
    brought: Mapping[str, torch.Tensor] = MappingProxyType({}),
) -> None:
    """Write the adapters, and what was trained `outside`, as `adapters.write` does. Of a sharded network every rank
    calls it, and rank 0 writes.

    part: the network's folder in a pipeline. about: `family`, `conditions`, `base` and `shape`, kept beside. brought:
    whole weights of the adapter that it went on from, kept where the network does not have its own.
    """
    names = {parameter: name for name, parameter in network.named_parameters()}
    halves = {name.replace(".default", ""): tensor for tensor, name in names.items() if ADAPTER in name}
    layers = dict.fromkeys(name.partition(ADAPTER)[0] for name in halves)
    pairs = {
        layer: adapters.Pair(*(fsdp.whole(halves[f"{layer}{ADAPTER}{half}.weight"]) for half in "AB"), settings.alpha)
        for layer in layers
    }
    kept = {names[parameter]: parameter.detach() for parameter in outside}
    kept |= full_weights(network, kept)
    # In one order on every rank.
    rest = {adapters.plain_name(name): fsdp.whole(kept[name]) for name in names.values() if name in kept}
    if agree.world()[0] == 0:
        adapters.write(folder, adapters.Adapter(pairs, {**brought, **rest}, about or {}), part)


def merge(network: nn.Module) -> None:
    """Add every adapter to the weight it adapts and take it away: the network is of its own class again. Of a sharded
    network every rank calls it."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for block in blocks(network):
        with in_full(block.module):
            for name, module in list(block.module.named_modules()):
                if isinstance(module, BaseTunerLayer):
                    if fsdp.is_sharded(network):
                        _add_rows(module)
                    else:
                        module.merge()
                    block.module.set_submodule(name, module.get_base_layer())


@torch.no_grad()
def _add_rows(layer: nn.Module) -> None:
    """Add an adapter to a weight of which every rank has some rows: those that it has of B, too."""
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    own = fsdp.held(layer.get_base_layer().weight)
    own += (fsdp.held(up) @ fsdp.whole(down) * layer.scaling["default"]).to(own)


def _ending(target: str) -> str:
    return rf"(?:.*\.)?{re.escape(target)}"


def _config(settings: Lora, targets: str):
    from peft import LoraConfig

    return LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=targets, lora_dropout=0.0)
