"""What a denoiser has beside its network: the VAE, encoders of conditions. Where nobody needs them they wait on the
host."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from entprog.diffusion.denoiser import Denoiser


def modules(denoiser: Denoiser) -> list[nn.Module]:
    """VAE and encoders."""
    return [value for name, value in vars(denoiser).items() if name != "network" and isinstance(value, nn.Module)]


def device_bytes(denoiser: Denoiser) -> int:
    """What of them lies on the network's device."""
    device = _device(denoiser.network)
    tensors = (tensor for module in modules(denoiser) for tensor in (*module.parameters(), *module.buffers()))
    return sum(tensor.nbytes for tensor in tensors if tensor.device == device)


def rest(denoiser: Denoiser) -> None:
    """Let them wait on the host, until `at_hand` brings them."""
    for module in modules(denoiser):
        module.to("cpu")
    if _device(denoiser.network).type == "cuda":
        torch.cuda.empty_cache()  # what held them is in pieces of their sizes


@contextmanager
def at_hand(denoiser: Denoiser) -> Iterator[None]:
    """While it lasts they lie on the network's device; then each is where it was before."""
    device = _device(denoiser.network)
    away = [(module, where) for module in modules(denoiser) if (where := _device(module)) != device]
    try:
        for module, _ in away:
            module.to(device)
        yield
    finally:
        for module, where in away:
            module.to(where)


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
