"""A network's state in float32, whatever its blocks store (`entprog.blocks.stored`)."""

from collections.abc import Collection, Iterator

import torch
from torch import nn

from entprog.blocks.block import blocks, variants
from entprog.blocks.stored import Stored, is_adapted, layer_weights


def never_trained(network: nn.Module) -> set[str]:
    """Names of the weights that adapters adapt. Checkpoints lack them: whoever loads the network has them."""
    adapted = (block for block in blocks(network) if is_adapted(block.module))
    return {f"{block.name}.{name}" for block in adapted for name, _ in layer_weights(block.module)}


def full_state(network: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of each weight and buffer but for those that are `never_trained`, in float32, one after the other:
    the network's own memory, or on the host what is stored in less, made when it is its turn where nothing holds it."""
    as_loaded, stored = never_trained(network), _stored(network)
    for name, tensor in network.state_dict(keep_vars=True).items():
        if name in as_loaded:
            continue
        of_block, own = stored.get(name, (None, name))
        yield name, of_block.full(own, tensor) if of_block else tensor.detach()


def full_weights(network: nn.Module, names: Collection[str]) -> dict[str, torch.Tensor]:
    """Those of the named weights that are stored in bfloat16 or less, and may be trained: in float32, on the host."""
    stored = _stored(network).items() if names else ()
    return {name: block.full(own, network.get_parameter(name)) for name, (block, own) in stored if name in names}


def _stored(network: nn.Module) -> dict[str, tuple[Stored, str]]:
    """Name of each weight that is stored in less than float32, and may be trained → its block's, and its name there."""
    found = ((block.name, stored) for block in blocks(network) if (stored := variants(block.module).stored))
    return {f"{block}.{name}": (stored, name) for block, stored in found for name in stored.masters}
