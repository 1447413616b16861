"""What a device holds under a plan whatever the clips are, counted on shapes alone: weights, gradients, moments."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from entprog import optimizers
from entprog.blocks import Block, trainable
from entprog.blocks.stored import HALF, layer_weights
from entprog.config import Experiment


@dataclass(frozen=True)
class Held:
    """Bytes on one device, and on its host."""

    weights: int
    gradients: int
    moments: int
    host: int
    """float32 weights of frozen layers, at most: those that rounding to bfloat16 changed."""

    @property
    def device(self) -> int:
        return self.weights + self.gradients + self.moments


def held(
    network: nn.Module,
    found: Sequence[Block],
    trained: Collection[str],
    outside: Iterable[nn.Parameter],
    experiment: Experiment,
) -> Held:
    """What a plan that trains the named blocks and `outside` holds. network: may be on the meta device; what it trains
    at present does not matter."""
    parameters = set(outside)
    frozen: set[nn.Parameter] = set()
    for block in found:
        own = set(trainable(block.module)) if block.name in trained else set()
        parameters |= own
        if experiment.stores_frozen:
            frozen |= {parameter for _, parameter in layer_weights(block.module)} - own
    spared = sum(p.numel() * (4 - HALF.itemsize) for p in frozen)
    gradients = 4 * sum(p.numel() for p in parameters)
    whole = 4 * sum(p.numel() for p in network.parameters())
    shares = experiment.train.workers if experiment.train.parallel == "fsdp" else 1
    return Held(
        weights=-(-(whole - spared) // shares),
        gradients=-(-gradients // shares),
        moments=-(-int(gradients * optimizers.MOMENTS[experiment.train.optimizer]) // shares),
        host=4 * sum(p.numel() for p in frozen),
    )
