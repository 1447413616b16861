"""Linear layers whose frozen weight does not lie in their parameter: packed (`entprog.blocks.packed`), or waiting on
the host (`entprog.blocks.swap`).

The layer unpacks its weight when it is used and lets it go; the backward pass unpacks it again. The parameter stays, of
no elements, for those who know the layer by it.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from entprog.blocks import packed
from entprog.blocks.packed import PARTS, Form

if TYPE_CHECKING:
    from entprog.blocks.swap import Waiting


class Held:
    """The weight of one layer. While it is on the layer's device, its tensors are buffers of the layer, which are in no
    state_dict; while it waits, they lie in its block's memory on the host."""

    def __init__(self, layer: nn.Linear, parts: Sequence[torch.Tensor], form: Form):
        """parts: as `packed.pack` gives them; they decide the device."""
        self.layer, self.form, self.shape = layer, form, tuple(layer.weight.shape)
        self.waiting: Waiting | None = None
        self.stay(parts)
        layer.weight.data = torch.empty(0, dtype=torch.bfloat16, device=layer.weight.device)
        layer.held, layer.__class__ = self, HeldLinear

    def parts(self) -> list[torch.Tensor]:
        """Its tensors where they lie."""
        if self.waiting is not None:
            return self.waiting.on_host(self)
        return [getattr(self.layer, name) for name in PARTS[self.form]]

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight, to be used at once and not kept."""
        parts = self.parts() if self.waiting is None else self.waiting.brought(self)
        return packed.unpack(parts, self.form, self.shape, dtype)

    def stay(self, parts: Sequence[torch.Tensor]) -> None:
        """Let its tensors be the layer's buffers."""
        self.waiting = None
        for name, part in zip(PARTS[self.form], parts, strict=True):
            self.layer.register_buffer(name, part, persistent=False)

    def wait(self, waiting: "Waiting") -> None:
        """Its tensors lie in a block's memory on the host from now on."""
        self.waiting = waiting
        self._drop_buffers()

    def put(self, weight: torch.Tensor) -> None:
        """Hold another weight of the same shape, where this one lies."""
        for part, new in zip(self.parts(), packed.pack(weight.to(self.layer.weight.device), self.form), strict=True):
            part.copy_(new)
        if self.waiting is not None:
            self.waiting.swap.forget()

    def release(self) -> None:
        """The layer is as its class has it; its parameter is to be given a weight."""
        if self.waiting is None:
            self._drop_buffers()
        del self.layer.held
        self.layer.__class__ = nn.Linear

    def _drop_buffers(self) -> None:
        for name in PARTS[self.form]:
            delattr(self.layer, name)

    @property
    def nbytes(self) -> int:
        return packed.nbytes(self.shape, self.form)


class _Linear(torch.autograd.Function):
    """x W^T + b of a frozen weight, which is not kept for the backward pass."""

    @staticmethod
    def forward(ctx, input: torch.Tensor, held: Held, bias: torch.Tensor | None):
        ctx.held = held
        return functional.linear(input, held.weight(input.dtype), bias)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return gradient @ ctx.held.weight(gradient.dtype), None, None


class HeldLinear(nn.Linear):
    """The class of a layer for as long as its weight is held. It is the very layer: whoever has it in hand sees no
    other, and compiled blocks share their code, which a forward of each layer's own would not let them."""

    held: Held

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """As nn.Linear's, also under autocast."""
        kind = input.device.type
        if torch.is_autocast_enabled(kind):
            input = input.to(torch.get_autocast_dtype(kind))
        return _Linear.apply(input, self.held, None if self.bias is None else self.bias.to(input.dtype))


def packed_bytes(module: nn.Module) -> int:
    """Bytes that weights beside a module's parameters take on its device."""
    return sum(held.nbytes for held in all_held(module) if not held.waiting)


def waiting_bytes(module: nn.Module) -> int:
    """Bytes of a module's weights that wait on the host."""
    return sum(held.nbytes for held in all_held(module) if held.waiting)


def room_bytes(network: nn.Module) -> int:
    """What the device holds of a network's weights that wait: the rooms of two blocks, once it has run."""
    swaps = {held.waiting.swap for held in all_held(network) if held.waiting}
    return sum(swap.device_bytes for swap in swaps)


def unpacking_bytes(network: nn.Module) -> int:
    """What unpacking the largest of a network's packed weights takes for a moment."""
    return max((packed.unpacking_bytes(held.shape, held.form) for held in all_held(network)), default=0)


def all_held(module: nn.Module) -> list[Held]:
    """The weights of a module's layers that do not lie in their parameters."""
    return [part.held for part in module.modules() if isinstance(part, HeldLinear)]
