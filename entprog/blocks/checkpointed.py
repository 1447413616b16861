"""Gradient checkpointing of a block: only its inputs are kept for the backward pass, which runs it again.

The inputs that blocks hand on, of which each keeps its own, can wait in host memory: of a long clip they are most of
what is kept (Wan 14B: 0.8 GB a block at 75,000 tokens). Those that all blocks share stay on the device. While a block
runs again, what the one before it was given comes back on a stream of its own.

Or self-attention's output is kept beside the inputs: it is as large as one of them, and of a long clip most of what
would be computed again.
"""

import functools
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten
from torch.utils.checkpoint import checkpoint

Checkpointing = bool | Literal["on_host", "keep_attention"]
"""Whether activations are recomputed in the backward pass; "on_host": and blocks' inputs wait on the host for it;
"keep_attention": all but self-attention's output."""
KERNELS = (
    "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_fused_attention_overrideable",
    "_scaled_dot_product_flash_attention_for_cpu",
)  # fmt: skip
"""What torch's attention runs, each in one piece; where it runs none of them attention is recomputed like all else."""
ATTENTION = {getattr(torch.ops.aten, name).default for name in KERNELS if hasattr(torch.ops.aten, name)}


def _is_kept(operation: Any, args: Sequence) -> bool:
    """Whether an operation is attention that costs as much for each number it gives as self-attention does: over as
    many keys as queries [..., tokens, width]."""
    return operation in ATTENTION and args[1].shape[-2] >= args[0].shape[-2]


class Keeping(TorchDispatchMode):
    """Notes what a block's own forward, run inside, gives that is kept beside its inputs."""

    def __init__(self, keeps_attention: bool):
        super().__init__()
        self.keeps_attention = keeps_attention
        self.outputs: deque = deque()
        """Of attention, in the order it ran."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if self.keeps_attention and _is_kept(function, args):
            self.outputs.append(tree_map_only(torch.Tensor, torch.Tensor.detach, out))
        return out

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [leaf for leaf in tree_leaves(list(self.outputs)) if isinstance(leaf, torch.Tensor)]


class _Giving(TorchDispatchMode):
    """Gives what was kept to the block that runs again, and lets it go."""

    def __init__(self, kept: Keeping):
        super().__init__()
        self.kept = kept

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return self.kept.outputs.popleft() if _is_kept(function, args) else function(*args, **(kwargs or {}))


def _with_attention_kept() -> tuple[Keeping, _Giving]:
    """What a block's forward pass and its second one run inside. Of attention alone: torch's own selective contexts
    want all operations to be the same in both, but weights that wait are copied when they are not there
    (`entprog.blocks.swap`)."""
    keeping = Keeping(keeps_attention=True)
    return keeping, _Giving(keeping)


@dataclass(frozen=True)
class CheckpointedForward:
    """Runs a block and keeps only its inputs for the backward pass, which runs it again."""

    original: Callable
    module: nn.Module | None = None
    """The block, where the inputs that its bypass hands on as they are wait on the host. None: all stay."""
    bypass: Callable | None = None
    line: "Line" = field(default_factory=lambda: Line())
    """Shared by the blocks of a network."""
    keeps_attention: bool = False
    known: list[tuple[Any, list[int]]] = field(default_factory=list)
    """(how arguments are laid out, which of them wait), of those that were met: asked once, not at every step."""

    def __call__(self, *args, **kwargs):
        if not torch.is_grad_enabled():
            return self.original(*args, **kwargs)
        if self.keeps_attention:
            return checkpoint(self.original, *args, use_reentrant=False, context_fn=_with_attention_kept, **kwargs)
        if self.module is None:
            return checkpoint(self.original, *args, use_reentrant=False, **kwargs)
        leaves, layout = tree_flatten((args, kwargs))
        places = self._places(args, kwargs)
        if not places or not self._has_a_graph(leaves):
            return checkpoint(self.original, *args, use_reentrant=False, **kwargs)
        away = _Away([leaves[place] for place in places], self.line)
        here = [None if place in places else leaf for place, leaf in enumerate(leaves)]

        def run(*here):
            given = list(here)
            for place, tensor in zip(places, away.brought(), strict=True):
                given[place] = tensor
            again, named = tree_unflatten(given, layout)
            return self.original(*again, **named)

        return checkpoint(run, *here, use_reentrant=False)

    def keeping(self) -> Keeping:
        return Keeping(self.keeps_attention)

    def away(self, args: tuple, kwargs: dict) -> list[torch.Tensor]:
        """Those of the block's arguments that wait on the host."""
        leaves, _ = tree_flatten((args, kwargs))
        return [leaves[place] for place in self._places(args, kwargs)]

    def _places(self, args: tuple, kwargs: dict) -> list[int]:
        """The arguments that its bypass returns as they are, by their order among the leaves."""
        if self.module is None:
            return []
        leaves, layout = tree_flatten((args, kwargs))
        for seen, places in self.known:
            if seen == layout:
                return places
        with torch.no_grad():
            out, _ = tree_flatten(self.bypass(self.module, *args, **kwargs))
        returned = {id(value) for value in out if isinstance(value, torch.Tensor)}
        places = [place for place, leaf in enumerate(leaves) if id(leaf) in returned]
        self.known.append((layout, places))
        return places

    def _has_a_graph(self, leaves: list) -> bool:
        """Whether a backward pass will come here."""
        given = (leaf for leaf in leaves if isinstance(leaf, torch.Tensor))
        return any(t.requires_grad for t in given) or any(p.requires_grad for p in self.module.parameters())


@dataclass(eq=False)
class Line:
    """Inputs that wait, in the order in which their blocks ran: a backward pass wants them from the last to the first.
    They live as long as their graph."""

    last: Callable[[], "_Away | None"] = lambda: None
    """Of the block that ran last, while its graph is there."""
    coming: Callable[[], "_Away | None"] = lambda: None
    """Whose inputs are on their way: one block's at a time."""
    late: int = 0
    """Inputs so far that were not on their way when they were wanted: of each backward pass the first."""


class _Away:
    """Tensors that are used at once, and again in the backward pass: until then they lie on the host."""

    back: list[torch.Tensor] | None = None
    """On the device again, or on their way, and not used yet."""
    ready: torch.cuda.Event | None = None
    """Recorded behind the copy back."""

    def __init__(self, tensors: list[torch.Tensor], line: Line):
        self.first: list[torch.Tensor] | None = tensors
        self.asked = [tensor.requires_grad for tensor in tensors]
        self.device = tensors[0].device
        self.host = self._taken_away(tensors)
        self.line, self.before, line.last = line, line.last, weakref.ref(self)

    def brought(self) -> list[torch.Tensor]:
        """The tensors themselves the first time; copies after that."""
        if self.first is not None:
            first, self.first = self.first, None
            return first
        if self.back is None:
            self.line.late += 1
            self._bring()
        back, self.back = self.back, None
        if self.ready is not None:
            torch.cuda.current_stream(self.device).wait_event(self.ready)
        if (before := self.before()) is not None and before.back is None:
            before._bring()
        return [tensor.requires_grad_(asked) for tensor, asked in zip(back, self.asked, strict=True)]

    def _bring(self) -> None:
        """Begin to copy them to the device."""
        if (other := self.line.coming()) is not None:
            other._forget()
        self.line.coming = weakref.ref(self)
        if self.device.type != "cuda":
            self.back = [tensor.clone() for tensor in self.host]
            return
        # Of the computing stream's memory, which is free again once that is done with it: what another stream lent
        # would be new memory for as long as the host is ahead of the device.
        self.back = [torch.empty_like(tensor, device=self.device) for tensor in self.host]
        side, self.computing = _beside(self.device), torch.cuda.current_stream(self.device)
        side.wait_stream(self.computing)  # whatever used that memory before is done by then
        with torch.cuda.stream(side):  # behind the copy to the host
            for tensor, kept in zip(self.back, self.host, strict=True):
                tensor.copy_(kept, non_blocking=True)
            self.ready = side.record_event()

    def _forget(self) -> None:
        """Nobody came for what is on its way: its memory is free behind the copy."""
        if self.back is not None and self.ready is not None:
            self.computing.wait_event(self.ready)
        self.back = None

    __del__ = _forget

    def _taken_away(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        if self.device.type != "cuda":
            return [tensor.detach().clone() for tensor in tensors]
        side = _beside(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):  # while the block computes
            host = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors]
            for kept, tensor in zip(host, tensors, strict=True):
                kept.copy_(tensor.detach(), non_blocking=True)
                tensor.record_stream(side)
        return host


@functools.cache
def _beside(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
