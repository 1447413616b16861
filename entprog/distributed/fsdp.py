"""Sharded training (FSDP2): every rank keeps its part of each weight, gradient and moment.

A block's weights are brought together for its forward and its backward pass alone. What is trained may change at any
step: parameters are frozen and thawed while they are in parts, only trained ones' gradients are reduced, and a block
that the residual backward goes around is not brought together a second time. Everything here leaves a network that is
not sharded as it is.
"""

from collections.abc import Collection, Iterable
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from entprog.blocks import Block
from entprog.config import Backward


def shard(network: nn.Module, found: Iterable[Block]) -> None:
    """Split every parameter over all ranks, block by block, in place; the network has new parameter objects then.

    Every rank must hold the same whole weights when it calls this.
    """
    for block in found:
        fully_shard(block.module, reshard_after_forward=True)
    fully_shard(network, reshard_after_forward=True)


def is_sharded(network: nn.Module) -> bool:
    return isinstance(network, FSDPModule)


def _parts(network: nn.Module) -> list[FSDPModule]:
    return [module for module in network.modules() if isinstance(module, FSDPModule)]


def in_parts(network: nn.Module) -> None:
    """Give up weights that a forward pass without gradients left together."""
    for part in _parts(network):
        part.reshard()


def spare_frozen(found: Iterable[Block], trainable: Collection[str], backward: Backward) -> None:
    """Leave blocks in parts in the backward pass where it has no use for their weights."""
    for block in found:
        if isinstance(block.module, FSDPModule):
            block.module.set_unshard_in_backward(block.name in trainable or backward == "exact")


@contextmanager
def gathered(network: nn.Module):
    """Whole weights on every rank for as long as the block lasts: inside, ranks may run different numbers of forward
    passes. All ranks enter and leave together; nothing may be frozen, thawed or updated inside."""
    if not is_sharded(network):
        yield
        return
    try:
        network.set_reshard_after_forward(False)
        for part in _parts(network):
            part.unshard()
        yield
    finally:
        network.set_reshard_after_forward(True)
        in_parts(network)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor that may be in parts; every rank must ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def held(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor that may be in parts."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
