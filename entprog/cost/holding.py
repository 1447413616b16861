"""What a device holds under a plan whatever the clips are, counted on shapes alone: weights, gradients, moments,
averages."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from entprog import optimizers
from entprog.blocks import Block, packed, trainable, who_waits
from entprog.blocks.packed import Form
from entprog.blocks.stored import HALF, is_adapted, layer_weights, linear_weights
from entprog.blocks.swap import pinned_bytes, rooms_bytes
from entprog.config import Experiment


@dataclass(frozen=True)
class Held:
    """Bytes on one device, and on its host."""

    weights: int
    gradients: int
    moments: int
    host: int
    """Full weights of frozen layers, at most (where rounding changed them), and weights that wait, in pinned memory
    unless `train.gpus` is no."""
    copied: int = 0
    """Weights that are copied to the device in a forward and backward pass, at most."""
    unpacking: int = 0
    """The largest packed weight while it is used; of a sharded network two blocks and what lies outside blocks, which
    are whole while a pass goes on, under bfloat16 autocast blocks' layers in that."""
    averages: int = 0
    """Averaged weights (`train.ema_decay`) of all that was ever trained, at most."""

    @property
    def device(self) -> int:
        return self.weights + self.gradients + self.moments + self.averages


def held(
    network: nn.Module,
    found: Sequence[Block],
    trained: Collection[str],
    outside: Iterable[nn.Parameter],
    experiment: Experiment,
    ever: Collection[str] = (),
) -> Held:
    """What a plan that trains the named blocks and `outside` holds. network: may be on the meta device; what it trains
    at present does not matter. ever: blocks that may have been trained before."""
    parameters, form, rounded = set(outside), experiment.frozen_form, experiment.rounds_base
    whole, host, movable, unpacking = {}, 0, {}, 0
    together: dict[str, int] = {}
    """Of a block while it is whole for a pass of a sharded network."""
    along = 0
    """Of blocks' norms and the like, where they are whole together with what lies outside blocks (`fsdp.shard`)."""
    for block in found:
        own = set(trainable(block.module)) if block.name in trained else set()
        parameters |= own
        sizes = frozen_sizes(block.module, own, form) if experiment.stores_frozen or rounded else {}
        spared = sum(4 * p.numel() - size for p, (size, _) in sizes.items())
        full = 4 * sum(p.numel() for p in block.module.parameters())
        together[block.name] = whole[block.name] = full - spared
        if experiment.gathers_half:
            layers = sum(p.numel() for _, p in layer_weights(block.module))
            together[block.name] = HALF.itemsize * layers
            along += full - 4 * layers
        packed_alone = form != "bfloat16" and is_adapted(block.module)
        if not rounded:
            host += sum(4 * p.numel() for p, (_, is_matrix) in sizes.items() if not (is_matrix and packed_alone))
        shapes = [p.shape for p, (_, is_matrix) in sizes.items() if is_matrix and packed.fits(p.shape, form)]
        unpacking = max([unpacking, *(packed.unpacking_bytes(shape, form) for shape in shapes)])
        movable[block.name] = sum(size for size, is_matrix in sizes.values() if is_matrix)
    waiting = [movable[name] for name in who_waits(found, trained, experiment.model.swap_blocks)]
    gradients = 4 * sum(p.numel() for p in parameters)
    before = {p for block in found if block.name in ever for p in trainable(block.module)}
    averages = 4 * sum(p.numel() for p in parameters | before) if experiment.train.ema_decay else 0
    inside = {p for block in found for p in block.module.parameters()}
    beside = 4 * sum(p.numel() for p in network.parameters() if p not in inside)
    shares = experiment.train.workers // experiment.train.replicas if experiment.train.parallel == "fsdp" else 1
    if experiment.train.parallel == "fsdp":
        unpacking = beside + along + 2 * max(together.values())
    crossed = "exact" in experiment.schedule.backwards or any(is_adapted(block.module) for block in found)
    return Held(
        weights=-(-(beside + sum(whole.values()) - sum(waiting) + rooms_bytes(waiting)) // shares),
        gradients=-(-gradients // shares),
        moments=-(-int(gradients * optimizers.MOMENTS[experiment.train.optimizer]) // shares),
        host=-(-host // shares) + sum(waiting if experiment.train.gpus == "no" else map(pinned_bytes, waiting)),
        copied=sum(waiting) * (2 if crossed else 1),
        unpacking=unpacking,
        averages=-(-averages // shares),
    )


def frozen_sizes(
    module: nn.Module, trained: Collection[nn.Parameter], form: Form
) -> dict[nn.Parameter, tuple[int, bool]]:
    """Weights of a block that are stored in a form, or bfloat16, while they are frozen → (bytes, whether it is a
    linear layer's, which may wait)."""
    matrices = {parameter for _, parameter in linear_weights(module)}
    out = {}
    for _, p in layer_weights(module):
        if p not in trained:
            is_packed = p in matrices and packed.fits(p.shape, form)
            plain = packed.PLAIN.get(form, HALF).itemsize * p.numel()
            out[p] = packed.nbytes(p.shape, form) if is_packed else plain, p in matrices
    return out
