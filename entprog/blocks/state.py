"""A network's state in float32, whatever its blocks store (`entprog.blocks.stored`)."""

from collections.abc import Callable, Collection, Iterable, Iterator

import torch
from torch import nn

from entprog.blocks import split
from entprog.blocks.block import blocks, variants
from entprog.blocks.held import HeldLinear
from entprog.blocks.stored import Stored, is_adapted, layer_weights


def never_trained(network: nn.Module) -> set[str]:
    """Names of the weights that adapters adapt. Checkpoints lack them: whoever loads the network has them."""
    adapted = (block for block in blocks(network) if is_adapted(block.module))
    return {f"{block.name}.{name}" for block in adapted for name, _ in layer_weights(block.module)}


def full_state(network: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of each weight and buffer but for those that are `never_trained`, in float32, one after the other:
    the network's own memory, or on the host what is stored in less, made when it is its turn where nothing holds it."""
    return _state(network, Stored.full)


def least_state(network: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The same with what is stored as and where it is kept: in bfloat16 where that holds its bits."""
    return _state(network, Stored.least)


def _state(network: nn.Module, kept: Callable[[Stored, str, torch.Tensor], torch.Tensor]) -> Iterator:
    as_loaded, stored = never_trained(network), _stored(network)
    for name, tensor in network.state_dict(keep_vars=True).items():
        if name in as_loaded:
            continue
        of_block, own = stored.get(name, (None, name))
        yield name, kept(of_block, own, tensor) if of_block else tensor.detach()


def lasting(network: nn.Module) -> set[str]:
    """Names of the weights of `least_state` that lie in host memory which nothing is written into any more."""
    kept = {name for name, (block, own) in _stored(network).items() if block.masters[own] is not None}
    return kept - never_trained(network)


def full_weights(network: nn.Module, names: Collection[str]) -> dict[str, torch.Tensor]:
    """Those of the named weights that are stored in bfloat16 or less, and may be trained: in float32, on the host; the
    very memory that keeps them there, where there is any."""
    stored = _stored(network).items() if names else ()
    return {name: block.full(own, network.get_parameter(name)) for name, (block, own) in stored if name in names}


@torch.no_grad()
def put_weights(network: nn.Module, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Give weights other float32 numbers, (name, this rank's part), one after the other."""
    stored = _stored(network)
    for name, numbers in weights:
        if name in stored:
            block, own = stored[name]
            block.keep(own, numbers)
        show(network, name, numbers)


@torch.no_grad()
def show(network: nn.Module, name: str, numbers: torch.Tensor) -> None:
    """Let passes read other float32 numbers, this rank's part, of a weight, as it is stored: rounded or packed. The
    network's state stays what it was where float32 numbers are kept on the host."""
    owner, _, kind = name.rpartition(".")
    layer = network.get_submodule(owner)
    if isinstance(layer, HeldLinear) and kind == "weight":
        layer.held.put(numbers)
    else:
        split.part(layer.get_parameter(kind)).copy_(numbers)


def _stored(network: nn.Module) -> dict[str, tuple[Stored, str]]:
    """Name of each weight that is stored in less than float32, and may be trained → its block's, and its name there."""
    found = ((block.name, stored) for block in blocks(network) if (stored := variants(block.module).stored))
    return {f"{block}.{name}": (stored, name) for block, stored in found for name in stored.masters}
