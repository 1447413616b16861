"""Blocks: residual units that can be skipped, frozen or trained as one.

*A block is a module that we know how to bypass.* `bypass` is at once the rule by which blocks are found, the
skip itself and the extension point: a model family registers its block classes, nothing else.

    @bypass.register
    def _(module: WanTransformerBlock, hidden_states, *args, **kwargs):
        return hidden_states
"""

import functools
import inspect
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from entprog.blocks import fp8
from entprog.blocks.checkpointed import CheckpointedForward, Checkpointing, Line
from entprog.blocks.packed import Form
from entprog.blocks.split import is_split
from entprog.blocks.stored import ADAPTER, Stored, is_adapted
from entprog.blocks.swap import Swap, chosen
from entprog.config import Backward, FrozenPrecision
from entprog.errors import UserError

Kind = Literal["spatial", "temporal", "both", "control"]
COMPILES = (2, 12)
"""First torch whose compiled code may be used where frozen weights are stored in another type."""
GRAPHS = 32
"""Forms of one block's code that torch may compile; it runs what is beyond that uncompiled, without a word. A block is
trained or frozen (then in another type), with a gradient to its input or without, of one shape of clips or of any, in
training or not; its fp8 twin too."""


@dataclass(frozen=True)
class Block:
    """A residual unit and its name in the network."""

    name: str
    module: nn.Module
    kind: Kind = "both"
    """Whether it mixes positions within a frame, frames at one position, or both; `control`: both, in a branch beside
    the network's own blocks, which what is to be followed enters through."""


@functools.singledispatch
def bypass(module: nn.Module, *args, **kwargs):
    """What the network would see if the block were not there: its input, or its shortcut's output.

    Takes what the block's forward takes and returns what it returns (a tensor, or a tuple of streams).
    Register one function per block class.
    """
    raise TypeError(
        f"{type(module).__name__} is not a block: register a bypass for it with @entprog.blocks.bypass.register"
    )


@functools.singledispatch
def bypass_layers(module: nn.Module) -> tuple[nn.Module | None, ...]:
    """Layers of a block that its bypass runs through, such as a shortcut's convolution: where ranks hold the block in
    parts the residual backward wants its weights too. Register one function per block class that has any."""
    return ()


@functools.singledispatch
def kind(network: nn.Module, name: str) -> Kind:
    """What the block of that name mixes. Register one function per network class that has blocks of several kinds."""
    return "both"


def is_block(module: nn.Module) -> bool:
    """Whether a bypass is registered for the module's class."""
    return bypass.dispatch(type(module)) is not bypass.dispatch(object)


def blocks(network: nn.Module) -> list[Block]:
    """The outermost modules that have a bypass, in order of definition. Raises UserError if there is none."""
    found: list[Block] = []

    def walk(name: str, module: nn.Module) -> None:
        if is_block(module):
            found.append(Block(name, module, kind(network, name)))
            return
        for child_name, child in module.named_children():
            walk(f"{name}.{child_name}" if name else child_name, child)

    walk("", network)
    if not found:
        candidates = sorted({type(m).__name__ for m in network.modules() if isinstance(m, nn.ModuleList) for m in m})
        raise UserError(
            f"no block of {type(network).__name__} is known: register what is seen where one is skipped with "
            f"@entprog.blocks.bypass.register for its class, perhaps {' or '.join(candidates[:4]) or 'one of its own'} "
            "(docs/families.md)"
        )
    return found


def execution_order(found: Iterable[Block], run: Callable[[], Any]) -> list[Block]:
    """The blocks in the order in which `run` first calls them (definition order is not execution order in a UNet)."""
    order: list[Block] = []

    def noting(block: Block):
        original = block.module.forward

        def forward(*args, **kwargs):
            if block not in order:
                order.append(block)
            return original(*args, **kwargs)

        return forward

    with replaced({block.module: noting(block) for block in found}), torch.no_grad():
        run()
    return order


@contextmanager
def replaced(forwards: dict[nn.Module, Callable]):
    """Other forward functions for some modules; on leaving, everything is as it was."""
    nothing = object()
    before = {module: module.__dict__.get("forward", nothing) for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, forward in before.items():
            if forward is nothing:
                module.__dict__.pop("forward", None)
            else:
                module.forward = forward


@contextmanager
def skipped(*some: Block):
    """The network as if the blocks were not there (skip(b), Ent-Prog §3.2); restored bit for bit on leaving."""
    with replaced({block.module: functools.partial(bypass, block.module) for block in some}):
        yield


class _AlongBypass(torch.autograd.Function):
    """y = x + stop_grad(f(x)) with the forward's exact bits: runs the block without a graph, keeps nothing for it,
    and hands the gradient of its output to its bypass."""

    @staticmethod
    def forward(ctx, run: Callable[[], Any], *shortcuts: torch.Tensor):
        return run()  # grad mode is off here: no graph, no saved activations

    @staticmethod
    def backward(ctx, *gradients):
        return None, *gradients


def along_bypass(module: nn.Module, *args, **kwargs):
    """What the block gives, to the bit; gradient crosses it on its bypass alone, and nothing is kept for that.

    Where a gradient is wanted, the block's fp8 twin runs in its place if it has one; evaluation sees the block itself.
    """
    if not torch.is_grad_enabled():
        return own_forward(module)(*args, **kwargs)
    given, named = tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs))
    run = functools.partial(variants(module).twin_forward or own_forward(module), *given, **named)
    shortcut = bypass(module, *args, **kwargs)
    if isinstance(shortcut, tuple):
        return _AlongBypass.apply(run, *shortcut)
    return _AlongBypass.apply(run, shortcut)


def checkpointed(module: nn.Module, how: Checkpointing, line: Line | None = None) -> CheckpointedForward:
    """A block's own forward under gradient checkpointing. line: of the network's blocks whose inputs wait on the host;
    None: one of its own."""
    waits = {"module": module, "bypass": bypass, "line": line or Line()} if how == "on_host" else {}
    return CheckpointedForward(own_forward(module), **waits, keeps_attention=how == "keep_attention")


def is_checkpointed(module: nn.Module) -> bool:
    """Whether `unfreeze` put the module under gradient checkpointing."""
    return isinstance(module.__dict__.get("forward"), CheckpointedForward)


@dataclass
class Variants:
    """Other forms of a block's own forward. They lie on its module as the attribute `entprog`, the one that this
    package adds to a module beside what stands in for its `forward`."""

    compiler: Callable[[Callable], Callable] | None = None
    compiled: Callable | None = None
    """The block's own forward, by `compiler`."""
    twin: nn.Module | None = None
    """The block in fp8 (`entprog.blocks.fp8`), while it is frozen."""
    twin_forward: Callable | None = None
    """The twin's forward, by `compiler` where there is one."""
    stored: Stored | None = None
    """Which of the block's weights are stored in bfloat16 or less (`entprog.blocks.stored`); None: none ever are."""


def variants(module: nn.Module) -> Variants:
    """The forms that a block has beside its own; none at first."""
    return module.__dict__.get("entprog") or Variants()


def own_forward(module: nn.Module) -> Callable:
    """The block's forward as its class defines it (compiled, if it was), whatever stands in for it now."""
    return variants(module).compiled or type(module).forward.__get__(module)


def make_twin(module: nn.Module) -> None:
    """Give a block an fp8 twin of its weights as they are; compiled if the block is."""
    known, twin = variants(module), fp8.twin(module)
    forward = type(twin).forward.__get__(twin)
    module.entprog = replace(known, twin=twin, twin_forward=known.compiler(forward) if known.compiler else forward)


def drop_twin(module: nn.Module) -> None:
    """Forget it; before the block's weights change."""
    kept = replace(variants(module), twin=None, twin_forward=None)
    module.__dict__.pop("entprog", None)
    if kept.compiled or kept.stored:
        module.entprog = kept


def twin_bytes(module: nn.Module) -> int:
    """What a block's fp8 twin adds to its weights; 0 without one."""
    twin = variants(module).twin
    return 0 if twin is None else fp8.nbytes(twin)


def check_compiles() -> None:
    """Raises UserError where torch runs code that it compiled for weights of another type: until 2.12 it may not look
    at a weight's type again (pytorch's issue 163064), and what freezes or thaws changes its own."""
    version = torch.__version__
    if tuple(map(int, version.split(".")[:2])) < COMPILES:
        raise UserError(
            f"model.compile_blocks: torch {version} may run compiled code on weights of another type than it was "
            f"compiled for; install torch {'.'.join(map(str, COMPILES))} or later, or leave it out"
        )


def compile_blocks(found: Iterable[Block], backend: str = "inductor") -> None:
    """Compile each block's own forward (equal blocks share their code); takes effect with the next `unfreeze`.

    Only the block's body is compiled: the ways around it (skip, residual backward, checkpointing) stay outside, so
    what is trained may change at any time.
    """
    compiler = functools.partial(torch.compile, backend=backend, **_limit())
    for block in found:
        compiled = compiler(type(block.module).forward.__get__(block.module))
        block.module.entprog = replace(variants(block.module), compiler=compiler, compiled=compiled)


def _limit() -> dict[str, int]:
    """What `torch.compile` takes to make so many graphs; before torch 2.13 a setting of the process."""
    config = torch._dynamo.config
    graphs = max(GRAPHS, config.recompile_limit)
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        return {"recompile_limit": graphs}
    config.recompile_limit = graphs
    return {}


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """What of a block is trained when it is: its adapters, if it has any, or all its parameters."""
    adapters = [parameter for name, parameter in module.named_parameters() if ADAPTER in name]
    return adapters or list(module.parameters())


def train_block(module: nn.Module, trained: bool) -> None:
    """Unfreeze a block, or freeze it."""
    module.requires_grad_(False)
    for parameter in trainable(module):
        parameter.requires_grad_(trained)
    if stored := variants(module).stored:
        stored.settle(module)


def store_frozen(found: Iterable[Block], form: Form = "bfloat16", device: torch.device | None = None) -> None:
    """Freeze every block, and from now on store in bfloat16 what of them is frozen: equal bits under bfloat16 autocast
    (`entprog.blocks.stored`). A block of which that is true already stays as it is.

    form: of linear layers' weights, which may be less (`entprog.blocks.packed`); device: where those go, one after the
    other. None: they stay where they are.
    """
    for block in found:
        if variants(block.module).stored is None:
            stored = Stored(form, in_parts=any(map(is_split, block.module.parameters())))
            block.module.entprog = replace(variants(block.module), stored=stored)
            stored.watch(block.module)
            block.module.requires_grad_(False)
            stored.settle(block.module, device)


def let_wait(found: Sequence[Block], number: int, device: torch.device) -> None:
    """Let the frozen weights of so many blocks wait on the host (`entprog.blocks.swap`); all are stored already, and
    frozen. device: where they are used."""
    swap, waiting = swap_of(found) or Swap(device), who_waits(found, (), number)
    for block in found:
        if block.name in waiting:
            variants(block.module).stored.wait(block.module, swap)


def form_of(found: Iterable[Block]) -> Form:
    """What frozen linear layers' weights are stored in."""
    stored = (variants(block.module).stored for block in found)
    return next((each.form for each in stored if each), "bfloat16")


def who_waits(found: Sequence[Block], trainable: Collection[str], number: int) -> set[str]:
    """Names of the blocks that wait while some are trained: of a block whose adapters alone are trained, all else may
    wait."""
    may = {block.name for block in found if block.name not in trainable or is_adapted(block.module)}
    return chosen([block.name for block in found], may, number)


def swap_of(found: Iterable[Block]) -> Swap | None:
    """What lets blocks wait; None while none does."""
    stored = (variants(block.module).stored for block in found)
    return next((each.waiting.swap for each in stored if each and each.waiting), None)


def movable_bytes(module: nn.Module) -> int:
    """What of a block's weights waits or may wait on the host, as it is trained or frozen now."""
    stored = variants(module).stored
    return stored.movable_bytes(module) if stored else 0


@contextmanager
def in_full(module: nn.Module):
    """The block's weights in float32 for as long as it lasts, whatever is stored before and after it."""
    stored = variants(module).stored
    waiting = stored and stored.waiting
    if stored:
        stored.restore(module)
    try:
        yield
    finally:
        if stored:
            stored.settle(module)
        if waiting:
            stored.wait(module, waiting.swap)


def unfreeze(
    network: nn.Module,
    found: Iterable[Block],
    trainable: Collection[str],
    outside: Iterable[nn.Parameter],
    backward: Backward = "exact",
    checkpointing: Checkpointing = False,
    frozen_precision: FrozenPrecision = "full",
    swap_blocks: int = 0,
) -> list[nn.Parameter]:
    """Train the named blocks and the `outside` parameters, freeze everything else; returns what is trained.

    backward: how gradient crosses a frozen block. "exact": through it. "residual": along its bypass alone,
    ∂y/∂x := ∂bypass/∂x, so that the block's branch runs without a graph and keeps no activations (cf. DropBP,
    arXiv 2402.17812).
    checkpointing: recompute activations in the backward pass; frozen blocks in residual mode have none to recompute.
    frozen_precision: of frozen blocks' branches that run without a graph (residual mode). "fp8": in twins
    (`entprog.blocks.fp8`), made anew whenever a block freezes.
    swap_blocks: so many blocks' frozen weights wait on the host; they are stored already (`store_frozen`).

    Raises KeyError for a name that is not a block.
    """
    found = list(found)
    unknown = set(trainable) - {block.name for block in found}
    if unknown:
        raise KeyError(f"not blocks of this network: {sorted(unknown)}")
    waiting, swap = who_waits(found, trainable, swap_blocks), swap_of(found)
    if waiting and swap is None:
        swap = Swap(next(network.parameters()).device)
    found.sort(key=lambda b: (b.name in trainable, b.name not in waiting))  # room is made before it is taken
    network.requires_grad_(False)
    line = Line()
    for block in found:
        block.module.__dict__.pop("forward", None)
        trained = block.name in trainable
        train_block(block.module, trained)
        if block.name in waiting:
            variants(block.module).stored.wait(block.module, swap)
        elif stored := variants(block.module).stored:
            stored.stay()
        along = not trained and backward == "residual"
        if not (along and frozen_precision == "fp8"):
            drop_twin(block.module)
        elif variants(block.module).twin is None:
            make_twin(block.module)
        if along:
            block.module.forward = functools.partial(along_bypass, block.module)
        elif checkpointing:
            block.module.forward = checkpointed(block.module, checkpointing, line)
        elif variants(block.module).compiled:
            block.module.forward = own_forward(block.module)
    for parameter in outside:
        parameter.requires_grad_(True)
    return [parameter for parameter in network.parameters() if parameter.requires_grad]
