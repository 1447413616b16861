"""Measures a network's cost model: every kind of block once, inside one forward pass, with the inputs it gets there."""

import contextlib
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from entprog import blocks, optimizers
from entprog.blocks import Block
from entprog.config import FrozenPrecision, OptimizerKind
from entprog.cost import counting
from entprog.cost.holding import frozen_sizes
from entprog.cost.model import BlockCost, CostModel
from entprog.distributed import agree, fsdp

REPEATS = 3
"""Timed runs of a pass after one to warm up; the quickest counts: whatever else runs only ever adds time."""
TWINS = 2
"""Blocks of one kind that are measured; the others cost the same."""


@dataclass(frozen=True)
class Meter:
    """How a pass is measured."""

    seconds: bool
    """Timed; otherwise FLOPs are counted."""
    device: torch.device

    def __call__(self, run: Callable[[], Any]) -> float:
        if not self.seconds:
            with counting.flop_counter() as counter:
                run()
            return float(counter.get_total_flops())
        run()
        return min(self.once(run) for _ in range(REPEATS))

    def once(self, run: Callable[[], Any]) -> float:
        # Autocast keeps converted weights over a whole forward pass; a training step converts them anew.
        torch.clear_autocast_cache()
        started = self.now()
        run()
        return self.now() - started

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def measure(
    network: nn.Module,
    found: Sequence[Block],
    outside: Sequence[nn.Parameter],
    loss: Callable[[], torch.Tensor],
    *,
    clips: int,
    seconds: bool,
    checkpointing: blocks.Checkpointing = False,
    frozen_precision: FrozenPrecision = "full",
    optimizer: OptimizerKind = "adamw",
    swap_blocks: int = 0,
) -> CostModel:
    """Measure every kind of block inside one forward pass of the network; weights and gradients stay as they are.

    found: blocks in execution order. outside: trained parameters outside blocks. loss() → the mean loss of `clips`
    clips. Every rank must call it. Gradients are cleared, every block is left frozen: put a plan in force after it.
    Of a sharded network the bytes are those of whole weights, and bringing those together is part of what lies outside.
    """
    meter = Meter(seconds, next(network.parameters()).device)
    fsdp.in_parts(network)
    blocks.unfreeze(network, found, (), outside, swap_blocks=swap_blocks)
    probe = Probe(meter, network, checkpointing, frozen_precision)
    with blocks.replaced({block.module: probe.watching(block) for block in found}):
        loss()
    with fsdp.noting_whole(network) as brought:
        outside_cost, outside_saved = _outside(found, outside, loss, meter, probe.weights, brought)
    fsdp.in_parts(network)
    passes = probe.passes()
    frozen_bytes, unpacking_bytes = stored_bytes(network), blocks.unpacking_bytes(network)
    model = CostModel(
        clips=clips,
        outside=max(outside_cost - sum(bypass for _, bypass in passes), 0.0),
        outside_bytes=sum(outside_saved.activations.values()),
        outside_copied_bytes=sum(outside_saved.copies.values()),
        outside_parameter_bytes=sum(p.nbytes for p in outside),
        common_bytes=sum(probe.common.values()),
        through_common=probe.through_common,
        below=probe.below,
        weight_bytes=frozen_bytes + sum(cost.spared_bytes for cost, _ in passes),
        moments=optimizers.MOMENTS[optimizer],
        update_per_byte=_update_per_byte(found[0], meter, optimizer) if seconds else 0.0,
        swap_blocks=swap_blocks,
        unpacking_bytes=unpacking_bytes,
        blocks=tuple(cost for cost, _ in passes),
    )
    network.zero_grad(set_to_none=True)
    return _slowest(model, meter.device)


class Probe:
    """Measures blocks where the network calls them, with the inputs that they get there."""

    def __init__(
        self,
        meter: Meter,
        network: nn.Module,
        checkpointing: blocks.Checkpointing,
        frozen_precision: FrozenPrecision,
    ):
        self.meter, self.network, self.checkpointing = meter, network, checkpointing
        self.frozen_precision = frozen_precision
        self.kinds: dict[str, Any] = {}
        """Name → kind of block, in execution order."""
        self.measured: dict[Any, list[tuple[BlockCost, float]]] = {}
        """Kind → passes of its first blocks, and what their bypass costs."""
        self.common: dict[int, int] = {}
        self.through_common = False
        self.below = False

    @property
    def weights(self) -> Collection[int]:
        """Addresses of all weights as they are now: a block that is stored in bfloat16 has others when it thaws."""
        return counting.storages(self.network.parameters()).keys()

    def watching(self, block: Block) -> Callable:
        def forward(*args, **kwargs):
            if block.name not in self.kinds:
                self.look_at(block, args, kwargs)
            # The gradient goes on along the bypass, so that later blocks see which of their inputs need one.
            return blocks.along_bypass(block.module, *args, **kwargs)

        return forward

    def look_at(self, block: Block, args: tuple, kwargs: dict) -> None:
        inputs = [(tuple(t.shape), t.dtype, t.requires_grad) for t in counting.tensors_in(args, kwargs)]
        weights = [tuple(p.shape) for p in block.module.parameters()]
        kind = type(block.module), str(inputs), str(weights)
        self.kinds[block.name] = kind
        twins = self.measured.setdefault(kind, [])
        if len(twins) < TWINS:
            twins.append(self.measure(block, args, kwargs))

    def passes(self) -> list[tuple[BlockCost, float]]:
        """Every block's passes and the cost of its bypass: the mean of its twins, whose differences are noise."""
        means = {kind: _mean(twins) for kind, twins in self.measured.items()}
        return [(replace(means[kind][0], name=name), means[kind][1]) for name, kind in self.kinds.items()]

    def measure(self, block: Block, args: tuple, kwargs: dict) -> tuple[BlockCost, float]:
        """The block's passes, and what its bypass costs with its backward."""
        module, tensors = block.module, counting.tensors_in(args, kwargs)
        stream = _stream(module, args, kwargs)
        self.below = self.below or (
            not self.kinds.keys() - {block.name} and any(tensors[i].requires_grad for i in stream)
        )
        asked = {i for i, t in enumerate(tensors) if t.requires_grad}

        def leaves(wanted: Collection[int]) -> tuple[tuple, dict]:
            numbers = iter(range(len(tensors)))
            return tree_map_only(
                torch.Tensor, lambda t: t.detach().requires_grad_(next(numbers) in wanted), (args, kwargs)
            )

        def cost(body: Callable, wanted: Collection[int], trained: bool) -> float:
            blocks.train_block(module, trained)

            def run() -> None:
                module.zero_grad(set_to_none=True)
                given, named = leaves(wanted)
                with torch.enable_grad():
                    _backward(counting.tensors_in(body(*given, **named)))

            return self.meter(run)

        def kept(wanted: Collection[int], trained: bool) -> tuple[int, int, int, int, bool]:
            """Bytes kept, bytes recomputed, of those what waits on the host until then, bytes of weights' copies, and
            whether common inputs are kept. Compiled code may keep copies too, which count among the others: nothing
            sees it make them."""
            blocks.train_block(module, trained)
            shared = counting.storages(t for i, t in enumerate(tensors) if i not in stream)
            given, named = leaves(wanted)
            keeping = body.keeping() if self.checkpointing else contextlib.nullcontext()
            weights = self.weights
            noting = contextlib.nullcontext(()) if compiled else counting.WeightCopies(weights)
            torch.clear_autocast_cache()  # of copies that were made before
            with torch.enable_grad(), keeping, noting as copies, counting.saving(weights, copies=copies) as noted:
                output = own(*given, **named)
            del output
            saved, copied = noted.activations, sum(noted.copies.values())
            seen = {address: size for address, size in shared.items() if self.checkpointing or address in saved}
            self.common |= seen
            inside = sum(size for address, size in saved.items() if address not in shared)
            if not self.checkpointing:
                return inside, 0, 0, copied, bool(seen)
            inputs = counting.storages(tensors[i] for i in stream)
            away, beside = (counting.storages(some) for some in (body.away(args, kwargs), keeping.tensors))
            here = shared.keys() | inputs.keys() | beside.keys()
            again = sum(size for address, size in saved.items() if address not in here)
            brought = sum(away.values())
            stays = sum(inputs.values()) + sum(beside.values()) - brought
            return stays, again + brought, brought, copied, bool(seen)

        own, compiled = blocks.own_forward(module), blocks.variants(module).compiled
        body = blocks.checkpointed(module, self.checkpointing) if self.checkpointing else own
        with torch.no_grad():
            given, named = leaves(())  # a counter of FLOPs takes no views of tensors that require gradient
            forward = self.meter(lambda: own(*given, **named))
            low, twin_bytes = self.in_twin(module, given, named) if self.frozen_precision == "fp8" else (forward, 0)
        around = cost(lambda *a, **k: blocks.bypass(module, *a, **k), asked | stream, trained=False)
        trained_bytes, recomputed_bytes, away_bytes, copied_bytes, _ = kept(asked | stream, trained=True)
        edge_bytes, *_ = kept(asked - stream, trained=True)
        spared_bytes = spared(module)
        parameter_bytes = sum(4 * p.numel() for p in blocks.trainable(module))
        movable_trained_bytes = blocks.movable_bytes(module)
        crossed = kept(asked | stream, trained=False)
        through_bytes, through_recomputed_bytes, _, through_copied_bytes, through_common = crossed
        movable_bytes = blocks.movable_bytes(module)
        self.through_common = self.through_common or through_common
        measured = BlockCost(
            name=block.name,
            forward=forward,
            trained=cost(body, asked | stream, trained=True),
            edge=cost(body, asked - stream, trained=True),
            through=cost(body, asked | stream, trained=False),
            along=low + around,
            trained_bytes=trained_bytes,
            edge_bytes=edge_bytes,
            through_bytes=through_bytes,
            recomputed_bytes=recomputed_bytes,
            through_recomputed_bytes=through_recomputed_bytes,
            away_bytes=away_bytes,
            copied_bytes=copied_bytes,
            through_copied_bytes=through_copied_bytes,
            parameter_bytes=parameter_bytes,
            spared_bytes=spared_bytes,
            movable_bytes=movable_bytes,
            movable_trained_bytes=movable_trained_bytes,
            twin_bytes=twin_bytes,
        )
        module.zero_grad(set_to_none=True)
        blocks.train_block(module, False)
        return measured, around

    def in_twin(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[float, int]:
        """Cost of the block's forward in fp8, and what its twin holds."""
        blocks.make_twin(module)
        try:
            run = blocks.variants(module).twin_forward
            with torch.no_grad():
                return self.meter(lambda: run(*args, **kwargs)), blocks.twin_bytes(module)
        finally:
            blocks.drop_twin(module)


def stored_bytes(module: nn.Module) -> int:
    """What weights take wherever they are, on the device or waiting on the host."""
    return sum(p.nbytes for p in module.parameters()) + blocks.packed_bytes(module) + blocks.waiting_bytes(module)


def spared(module: nn.Module) -> int:
    """What less a block's weights take while it is frozen than while it is trained, as it is now: counted, for one that
    is brought together is the same in both."""
    stored = blocks.variants(module).stored
    if stored is None or blocks.is_adapted(module):
        return 0
    return sum(4 * p.numel() - size for p, (size, _) in frozen_sizes(module, (), stored.form).items())


def _stream(module: nn.Module, args: tuple, kwargs: dict) -> set[int]:
    """Which of a block's tensors (by their order in its arguments) its bypass hands on."""
    leaves: list[torch.Tensor] = []

    def leaf(tensor: torch.Tensor) -> torch.Tensor:
        leaves.append(tensor.detach().requires_grad_(tensor.is_floating_point()))
        return leaves[-1]

    with torch.enable_grad():
        given, named = tree_map_only(torch.Tensor, leaf, (args, kwargs))
        outputs = counting.tensors_in(blocks.bypass(module, *given, **named))
        outputs = [output for output in outputs if output.requires_grad]
        if not outputs:  # a branch whose shortcut is not its own
            return set()
        asked = [i for i, t in enumerate(leaves) if t.requires_grad]
        gradients = torch.autograd.grad(
            outputs, [leaves[i] for i in asked], [torch.ones_like(o) for o in outputs], allow_unused=True
        )
    return {i for i, gradient in zip(asked, gradients, strict=True) if gradient is not None}


def _backward(outputs: Sequence[torch.Tensor]) -> None:
    outputs = [output for output in outputs if output.requires_grad]
    if outputs:
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])


def _outside(
    found, outside, loss, meter: Meter, weights: Collection[int], brought: Collection[int]
) -> tuple[float, counting.Saved]:
    """(cost, what is kept) of a forward and backward pass with every block skipped."""

    def entering(module: nn.Module) -> Callable:
        def forward(*args, **kwargs):
            # Where nothing before a block is trained, the gradient still has to come down to the last block.
            return tree_map_only(
                torch.Tensor,
                lambda t: t if t.requires_grad else t.detach().requires_grad_(),
                blocks.bypass(module, *args, **kwargs),
            )

        return forward

    def run() -> None:
        for parameter in outside:
            parameter.grad = None
        loss().backward()

    with blocks.replaced({block.module: entering(block.module) for block in found}):
        with counting.WeightCopies(weights, brought) as copies, counting.saving(weights, brought, copies) as saved:
            kept = loss()
        del kept
        return meter(run), saved


def _update_per_byte(block: Block, meter: Meter, kind: OptimizerKind) -> float:
    """Seconds of clipping and of the optimizer for each byte of weights, on a copy of a block's."""
    copies = [nn.Parameter(fsdp.held(p).detach().float().clone()) for p in blocks.trainable(block.module)]
    for copy in copies:
        copy.grad = torch.zeros_like(copy)
    optimizer = optimizers.make(kind, copies, learning_rate=1e-3)

    def run() -> None:
        nn.utils.clip_grad_norm_(copies, 1.0)
        optimizer.step()

    return meter(run) / sum(copy.nbytes for copy in copies)


def _mean(twins: Sequence[tuple[BlockCost, float]]) -> tuple[BlockCost, float]:
    first = twins[0][0]
    passes = ("forward", "trained", "edge", "through", "along")
    means = {name: sum(getattr(cost, name) for cost, _ in twins) / len(twins) for name in passes}
    return replace(first, **means), sum(bypass for _, bypass in twins) / len(twins)


def _slowest(model: CostModel, device: torch.device) -> CostModel:
    """The model that all ranks share: every figure is the largest of any rank's."""
    leaves, form = tree_flatten(model.as_json())
    largest = iter(agree.largest_of([leaf for leaf in leaves if isinstance(leaf, bool | int | float)], device))
    shared = (type(leaf)(next(largest)) if isinstance(leaf, bool | int | float) else leaf for leaf in leaves)
    return CostModel.from_json(tree_unflatten(list(shared), form))
