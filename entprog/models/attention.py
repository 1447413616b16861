"""Which kernels a network's attention runs (`model.attention`): of diffusers' those that torch brings.

They have a backward pass, and torch counts their FLOPs. Of the others sage and FlashAttention 3 give no gradients, and
kernels from the hub are code that would be fetched and run.
"""

import torch
from diffusers.models.attention_dispatch import attention_backend, dispatch_attention_fn
from diffusers.utils import logging
from torch import nn

from entprog.config import Attention, Model
from entprog.errors import UserError
from entprog.masking import one_line
from entprog.models.quiet import quiet

TRIED = (1, 64, 1, 64)
"""Clips, tokens, heads and width of a head that kernels are tried with."""


def check(network: nn.Module, name: Attention, family: str, masks: bool) -> None:
    """Raises UserError unless a network's attention takes kernels by their name. masks: whether it is given a mask."""
    if name == "native":
        return
    processors = (getattr(module, "processor", None) for module in network.modules())
    if not any(hasattr(processor, "_attention_backend") for processor in processors):
        raise UserError(
            f"model.attention={name}: diffusers has one kind of attention for networks of family {family}: leave it out"
        )
    if masks and name == "_native_flash":
        raise UserError(
            f"model.attention=_native_flash takes no mask, which attention of family {family} is given: leave it out, "
            "or set _native_cudnn"
        )


def check_device(settings: Model, device: torch.device) -> None:
    """Raises UserError unless a device runs the kernels, there and back, in the type of the forward pass."""
    name = settings.attention
    if name == "native":
        return
    given = torch.zeros(TRIED, dtype=getattr(torch, settings.dtype), device=device, requires_grad=True)
    try:
        dispatch_attention_fn(given, given, given, backend=name).sum().backward()
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"model.attention={name} does not run in {settings.dtype} on a "
            f"{device.type.upper()} here, torch says: {one_line(error)}; leave it out, and torch chooses"
        ) from None


def choose(network: nn.Module, name: Attention) -> None:
    """Let a network's attention run those kernels, whatever DIFFUSERS_ATTN_BACKEND in the environment says."""
    with quiet(logging), attention_backend():  # the method sets it for all of the process as well: that ends here
        network.set_attention_backend(name)
