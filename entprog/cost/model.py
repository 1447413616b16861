"""What a step of any plan costs, foreseen from the cost of each block's passes (Ent-Prog §3.4; method.md §5).

A block's pass is one of five, and a plan's step is their sum, the rest of the network and the optimizer:

    trained   forward, gradient to activations and to weights       F + A + W
    edge      the same where nothing before the block needs a gradient
    through   frozen, gradient crosses it exactly                    F + A
    forward   frozen, nothing before it needs a gradient             F
    along     frozen, gradient crosses on its bypass (residual)      F + bypass; F in fp8 if frozen blocks are

Costs are FLOPs (counted, all clips) or seconds; `measuring.measure` finds them. Bytes are what autograd keeps.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from entprog.blocks.swap import chosen, rooms_bytes
from entprog.config import Backward
from entprog.cost import counting
from entprog.records import Record

Cost = int | float
"""FLOPs, which are counted, or seconds, which are measured."""


@dataclass(frozen=True, kw_only=True)
class BlockCost:
    """Passes of one block with all clips of a rank's batch."""

    name: str
    forward: Cost
    trained: Cost
    edge: Cost
    through: Cost
    along: Cost
    trained_bytes: int
    """Kept for the backward pass when trained (with gradient checkpointing: its inputs)."""
    edge_bytes: int
    through_bytes: int
    """Kept when frozen and crossed exactly."""
    recomputed_bytes: int
    """What checkpointing brings back in the backward pass of a trained block; 0 without."""
    through_recomputed_bytes: int
    """Bytes recomputed at once for a frozen block that the exact backward crosses."""
    away_bytes: int = 0
    """Of that, inputs that wait on the host: they come back while the block after it runs again."""
    copied_bytes: int = 0
    """Copies of its weights that autocast makes, for any number of clips, when trained: kept beside `trained_bytes`, or
    with checkpointing beside `recomputed_bytes`."""
    through_copied_bytes: int = 0
    """The same when frozen and crossed exactly: weights that are stored in float32."""
    parameter_bytes: int
    """What of it is trained when it is, in float32."""
    spared_bytes: int = 0
    """What less its weights take while it is frozen (`entprog.blocks.stored`)."""
    movable_bytes: int = 0
    """What of them may wait on the host while it is frozen (`entprog.blocks.swap`)."""
    movable_trained_bytes: int = 0
    """The same while it is trained: of a block whose adapters alone are."""
    twin_bytes: int = 0
    """What the block's fp8 twin adds while it is frozen along its bypass; 0 where there are none."""


@dataclass(frozen=True, kw_only=True)
class CostModel(Record):
    """Predicts the cost of a step and its peak memory. Equal on all ranks: the slowest one's."""

    clips: int
    """Clips of the batch that everything stands for (one rank's)."""
    outside: Cost
    """Forward and backward of what lies outside blocks, the objective included."""
    outside_bytes: int
    outside_copied_bytes: int = 0
    """Copies of weights outside blocks that autocast makes."""
    outside_parameter_bytes: int
    """Bytes of the trained parameters outside blocks."""
    common_bytes: int
    """Inputs that all blocks share (embedded timestep and text, positions): kept once if any block keeps them."""
    through_common: bool
    """Whether blocks that are crossed exactly keep the common inputs too."""
    below: bool
    """Whether the first block's input needs a gradient: something before the blocks is trained."""
    weight_bytes: int
    """All weights, as they are while every block is trained."""
    moments: float = 2.0
    """Bytes of the optimizer's moments for each byte of trained weights."""
    update_per_byte: Cost
    """Optimizer, clipping and gradient reset for each byte of trained weights; 0 FLOPs."""
    swap_blocks: int = 0
    """Blocks that wait on the host while they may."""
    parts: int = 1
    """Ranks that share every weight, gradient and moment: of those bytes, which are given whole, each holds a part."""
    unpacking_bytes: int = 0
    """The largest packed weight while it is used."""
    blocks: tuple[BlockCost, ...]
    """Cost of each block, in execution order."""

    def passes(self, trainable: Collection[str], backward: Backward) -> list[tuple[BlockCost, str]]:
        """Each block with the name of its pass."""
        out = []
        needed = self.below
        for block in self.blocks:
            if block.name in trainable:
                kind = "trained" if needed else "edge"
                needed = True
            elif needed:
                kind = "through" if backward == "exact" else "along"
            else:  # a twin stands in for a frozen block wherever it lies
                kind = "along" if backward == "residual" and block.twin_bytes else "forward"
            out.append((block, kind))
        return out

    def step(self, trainable: Collection[str], backward: Backward) -> float:
        """Cost of one update of one rank, in the model's unit."""
        return sum(getattr(block, kind) for block, kind in self.passes(trainable, backward)) + self.fixed(trainable)

    def price(self, block: BlockCost, backward: Backward) -> float:
        """What training a block adds to a step in which the gradient crosses it anyway."""
        crossed = block.through if backward == "exact" else block.along
        return block.trained - crossed + self.update_per_byte * self.part(block.parameter_bytes)

    def fixed(self, trainable: Collection[str]) -> float:
        """What lies outside blocks, and the optimizer's share."""
        return self.outside + self.update_per_byte * self.trained_bytes(trainable)

    def trained_bytes(self, trainable: Collection[str]) -> int:
        """Bytes of trained weights on one rank."""
        inside = sum(block.parameter_bytes for block in self.blocks if block.name in trainable)
        return self.part(self.outside_parameter_bytes + inside)

    def part(self, whole_bytes: int) -> int:
        """What one rank holds of weights."""
        return -(-whole_bytes // self.parts)

    def memory(self, trainable: Collection[str], backward: Backward) -> int:
        """Peak bytes of an update (`costs.peak_bytes`)."""
        kept, recomputed, common, weights = self.outside_bytes + self.outside_copied_bytes, 0, False, self.weight_bytes
        weights = self.part(weights - sum(block.spared_bytes for block in self.blocks if block.name not in trainable))
        before = 0  # inputs that wait, of the block before
        for block, kind in self.passes(trainable, backward):
            again = copied = 0
            if kind in ("trained", "edge"):
                kept += block.trained_bytes if kind == "trained" else block.edge_bytes
                again, copied, common = block.recomputed_bytes, block.copied_bytes, True
            elif kind == "through":
                kept += block.through_bytes
                again, copied = block.through_recomputed_bytes, block.through_copied_bytes
                common = common or self.through_common
            elif kind == "along":
                weights += block.twin_bytes
            if again:
                recomputed = max(recomputed, again + copied + before)
                before = block.away_bytes
            else:
                kept += copied
        may = {b.name: b.movable_bytes for b in self.blocks if b.name not in trainable or b.movable_trained_bytes}
        waiting = [may[name] for name in chosen([block.name for block in self.blocks], may, self.swap_blocks)]
        weights += rooms_bytes(waiting) - sum(waiting)
        kept += self.common_bytes if common else 0
        trained, unpacked = self.trained_bytes(trainable), self.unpacking_bytes if may else 0
        return counting.peak_bytes(weights, trained, int(trained * self.moments), kept + recomputed + unpacked)


def scaled(model: CostModel, clips: int) -> CostModel:
    """The model of a batch of another size: passes and activations in proportion."""
    ratio = clips / model.clips

    def grown(value: Any, name: str) -> Any:
        return type(value)(value * ratio) if name not in FIXED and isinstance(value, int | float) else value

    def part(values: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value if isinstance(value, bool) else grown(value, name) for name, value in values.items()}

    values = model.as_json()
    return CostModel.from_json(part(values) | {"clips": clips, "blocks": tuple(part(b) for b in values["blocks"])})


FIXED = (
    "weight_bytes", "outside_parameter_bytes", "parameter_bytes", "spared_bytes", "movable_bytes",
    "movable_trained_bytes", "swap_blocks", "parts", "unpacking_bytes", "twin_bytes", "update_per_byte", "moments",
    "copied_bytes", "through_copied_bytes", "outside_copied_bytes",
)  # fmt: skip
"""What does not depend on the number of clips."""
