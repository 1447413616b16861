"""What a plan's step costs: FLOPs and bytes, counted on the real network with one clip."""

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

aten = torch.ops.aten


@dataclass(frozen=True)
class Cost:
    """Cost of one update per clip, and what the update holds in memory whatever the number of clips."""

    flops: int
    """Forward and backward of one clip."""
    saved_bytes: int
    """Activations kept for the backward pass of one clip."""
    weight_bytes: int
    """All weights, frozen ones too."""
    gradient_bytes: int
    """Gradients of trained weights."""

    def step_flops(self, clips: int) -> int:
        return self.flops * clips

    def memory_bytes(self, clips: int) -> int:
        """Counted peak of a training step: weights, gradients, AdamW's two moments, saved activations."""
        return self.weight_bytes + 3 * self.gradient_bytes + self.saved_bytes * clips


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


@contextmanager
def flop_counter():
    """Counts what runs inside: `counter.get_total_flops()`."""
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as mode:
        yield mode


def count(network: nn.Module, trained: Sequence[nn.Parameter], loss_of_one_clip) -> Cost:
    """Cost of a plan that is in force (`blocks.unfreeze` was called): runs forward and backward once, changes nothing.

    loss_of_one_clip() → scalar loss of a single clip.
    """
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    gradients = [p.grad for p in trained]
    for parameter in trained:
        parameter.grad = None
    with flop_counter() as counter:
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = loss_of_one_clip()
        if trained:
            loss.backward()
    for parameter, gradient in zip(trained, gradients, strict=True):
        parameter.grad = gradient
    return Cost(
        flops=counter.get_total_flops(),
        saved_bytes=sum(saved.values()),
        weight_bytes=sum(p.nbytes for p in network.parameters()),
        gradient_bytes=sum(p.nbytes for p in trained),
    )
