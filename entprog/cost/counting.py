"""What a plan's step costs: FLOPs and bytes, counted on the real network with one clip."""

import weakref
from collections.abc import Callable, Collection, Container, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count, shape_wrapper

from entprog import optimizers
from entprog.blocks import Block, is_checkpointed, own_forward, packed_bytes, room_bytes, twin_bytes, unpacking_bytes
from entprog.config import OptimizerKind
from entprog.distributed import fsdp

aten = torch.ops.aten


@dataclass(frozen=True)
class Cost:
    """Cost of one update per clip, and what the update holds in memory whatever the number of clips."""

    flops: int
    """Forward and backward of one clip."""
    forward_flops: int
    """Of them the forward pass."""
    saved_bytes: int
    """Activations kept for the backward pass of one clip on the device; with gradient checkpointing, the inputs of its
    blocks, and attention's outputs where these are kept."""
    recomputed_bytes: int
    """Activations of one clip that checkpointing brings back in the backward pass, for the largest block; of inputs
    that wait on the host also the next block's."""
    copied_bytes: int
    """Copies of weights that autocast makes and autograd keeps, with checkpointing those of the largest block."""
    weight_bytes: int
    """All weights that one device holds, frozen ones and their fp8 twins too."""
    gradient_bytes: int
    """Gradients of trained weights."""
    moment_bytes: int
    """The optimizer's moments of trained weights."""
    unpacking_bytes: int = 0
    """The largest packed weight while it is used."""

    def step_flops(self, clips: int) -> int:
        return self.flops * clips

    def memory_bytes(self, clips: int) -> int:
        """Counted peak of a training step, as `peak_bytes` says."""
        activations = (self.saved_bytes + self.recomputed_bytes) * clips + self.copied_bytes + self.unpacking_bytes
        return peak_bytes(self.weight_bytes, self.gradient_bytes, self.moment_bytes, activations)


def peak_bytes(weights: int, gradients: int, moments: int, activations: int) -> int:
    """Peak of a training step: weights, moments of trained weights, and what is largest of activations (at the start of
    the backward pass) and gradients (at its end): one shrinks as the other grows."""
    return weights + moments + max(activations, gradients)


# torch counts the GPU attention kernels; the CPU one is the same arithmetic.
def _cpu_attention(query, key, value, *args, **kwargs):
    return sdpa_flop_count(query, key, value)


def _cpu_attention_backward(grad_out, query, key, value, *args, **kwargs):
    # As for the GPU kernels: scores once more, then the gradients of value, probabilities, query and key.
    return 5 * sdpa_flop_count(query, key, value) // 2


CPU_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward,
}


FORMULAS = flop_registry | {kernel: shape_wrapper(formula) for kernel, formula in CPU_ATTENTION.items()}
"""FLOPs of a kernel, by its arguments and its output."""


class FlopCounter(TorchDispatchMode):
    """Counts what torch's `FlopCounterMode` counts. That one also finds out which module each kernel belongs to, which
    takes longer than all else."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def get_total_flops(self) -> int:
        return self.flops

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        formula = FORMULAS.get(getattr(func, "overloadpacket", None))
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=output)
        return output


@contextmanager
def flop_counter():
    """Counts what runs inside: `counter.get_total_flops()`."""
    with torch.compiler.set_stance("force_eager"), FlopCounter() as counter:
        yield counter


def tensors_in(*values: Any) -> list[torch.Tensor]:
    """The tensors in nested arguments."""
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def forms(found: Sequence[Block], forward: Callable[[], Any]) -> dict[str, tuple]:
    """What decides a block's costs, by the block's name: its class, its weights' shapes, and the shapes of what one
    forward pass gives it. Blocks of equal form cost the same."""
    given: dict[str, list[torch.Size]] = {}

    def note(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            given.setdefault(name, [tensor.shape for tensor in tensors_in(args, kwargs)])

        return hook

    hooks = [block.module.register_forward_pre_hook(note(block.name), with_kwargs=True) for block in found]
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    weights = {block.name: [(name, p.shape) for name, p in block.module.named_parameters()] for block in found}
    return {b.name: (type(b.module), tuple(weights[b.name]), tuple(given.get(b.name, ()))) for b in found}


def storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """{address: bytes} of the memory behind some tensors, each storage once."""
    found = [fsdp.held(tensor).untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in found}


class WeightCopies(TorchDispatchMode):
    """Notes copies of weights in another type, which autocast makes: as many for any number of clips. Code that was
    compiled does not run as such inside."""

    def __init__(self, weights: Collection[int], brought: Collection[int] = ()):
        """weights: addresses; brought: as `saving` takes it."""
        super().__init__()
        self.weights, self.brought = weights, brought
        self.alive: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if func is aten._to_copy.default:
            given, made = args[0].untyped_storage(), output.untyped_storage()
            if id(given) in self.brought or given.data_ptr() in self.weights:
                self.alive[id(made)] = weakref.ref(made)
        return output

    def __contains__(self, storage: torch.UntypedStorage) -> bool:
        noted = self.alive.get(id(storage))
        return noted is not None and noted() is storage


@dataclass(frozen=True)
class Saved:
    """What autograd keeps for the backward pass, weights apart: {address: bytes}."""

    activations: dict[int, int] = field(default_factory=dict)
    copies: dict[int, int] = field(default_factory=dict)
    """Of weights."""


@contextmanager
def saving(weights: Collection[int], brought: Collection[int] = (), copies: Container[torch.UntypedStorage] = ()):
    """Notes what autograd keeps for the backward pass. `weights` are addresses that do not count, nor does memory that
    is `brought` together of a sharded network's weights (`fsdp.noting_whole`); copies: `WeightCopies` of them."""
    saved = Saved()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in brought:
            (saved.copies if storage in copies else saved.activations).update(storages([tensor]))
        return tensor.detach()  # an operation's own output would hold the operation, which holds it: for ever

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved
    for address in weights:
        saved.activations.pop(address, None)


class _Checkpointed:
    """What gradient checkpointing keeps, which no hook of autograd's sees: the inputs of every recomputed block, but
    for those that wait on the host, and what else it keeps; and what the recomputation of the largest one brings
    back, with the inputs that wait of the block before it."""

    def __init__(self, network: nn.Module, weights: Collection[int], counter: FlopCounter, copies: WeightCopies):
        self.weights, self.counter, self.copies = weights, counter, copies
        self.inputs: dict[int, int] = {}
        self.recomputed_bytes = 0
        self.copied_bytes = 0
        self.extra_flops = 0
        self.kept_bytes = 0
        """Beside inputs."""
        self.before_bytes = 0
        """Of the block that ran before, inputs that wait on the host."""
        self.kinds: dict[tuple, tuple[int, int]] = {}
        """Of blocks that were recomputed once → what is kept of one, and recomputed: the counter keeps what it saw
        until it is left, so not all are."""
        self.hooks = [
            module.register_forward_hook(self.note, with_kwargs=True)
            for module in network.modules()
            if is_checkpointed(module)
        ]

    def note(self, module: nn.Module, args, kwargs, output) -> None:
        if not any(t.requires_grad for t in tensors_in(output)):
            return  # no graph, nothing kept
        inputs = storages(tensors_in(args, kwargs))
        away = storages(module.forward.away(args, kwargs))
        self.inputs |= {address: size for address, size in inputs.items() if address not in away}
        tensors = (*tensors_in(args, kwargs), *module.parameters())
        kind = type(module), *((tuple(t.shape), t.dtype, t.requires_grad) for t in tensors)
        if kind not in self.kinds:
            self.kinds[kind] = self.recompute(module, args, kwargs, {*self.weights, *inputs})
        kept, again = self.kinds[kind]
        waiting = sum(away.values())
        self.kept_bytes += kept
        self.recomputed_bytes = max(self.recomputed_bytes, again + waiting + self.before_bytes)
        self.before_bytes = waiting

    def recompute(self, module: nn.Module, args, kwargs, known: set[int]) -> tuple[int, int]:
        """Bytes that are kept of a block beside its inputs, and that are recomputed. known: addresses that do not
        count."""
        before = self.counter.get_total_flops()
        keeping = module.forward.keeping()
        with fsdp.together(module), keeping:
            weights = {*known, *storages(module.parameters())}  # once they are together
            with saving(weights, copies=self.copies) as saved:
                output = own_forward(module)(*args, **kwargs)
                del output
        self.extra_flops += self.counter.get_total_flops() - before
        kept = storages(keeping.tensors)
        again = sum(size for address, size in saved.activations.items() if address not in kept)
        self.copied_bytes = max(self.copied_bytes, sum(saved.copies.values()))
        return sum(kept.values()), again

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


def count(
    network: nn.Module, trained: Sequence[nn.Parameter], loss_of_one_clip, optimizer: OptimizerKind = "adamw"
) -> Cost:
    """Cost of a plan that is in force (`blocks.unfreeze` was called): runs forward and backward once, changes nothing.

    loss_of_one_clip() → scalar loss of a single clip.
    """
    gradients = [p.grad for p in trained]
    for parameter in trained:
        parameter.grad = None
    with fsdp.noting_whole(network) as brought, flop_counter() as counter:
        weights = storages(network.parameters()).keys()
        with WeightCopies(weights, brought) as copies, saving(weights, brought, copies) as saved:
            checkpointed = _Checkpointed(network, weights, counter, copies)
            loss = loss_of_one_clip()
        checkpointed.remove()
        forward_flops = counter.get_total_flops() - checkpointed.extra_flops
        if trained:
            loss.backward()
    for parameter, gradient in zip(trained, gradients, strict=True):
        parameter.grad = gradient
    gradient_bytes = sum(fsdp.held(p).nbytes for p in trained)
    return Cost(
        flops=counter.get_total_flops() - checkpointed.extra_flops,
        forward_flops=forward_flops,
        saved_bytes=sum((saved.activations | checkpointed.inputs).values()) + checkpointed.kept_bytes,
        recomputed_bytes=checkpointed.recomputed_bytes,
        copied_bytes=sum(saved.copies.values()) + checkpointed.copied_bytes,
        weight_bytes=sum(fsdp.held(p).nbytes for p in network.parameters())
        + packed_bytes(network)
        + room_bytes(network)
        + sum(map(twin_bytes, network.modules())),
        gradient_bytes=gradient_bytes,
        moment_bytes=int(gradient_bytes * optimizers.MOMENTS[optimizer]),
        unpacking_bytes=unpacking_bytes(network),
    )
