"""Hashes of networks and tensors by their content."""

import hashlib

import torch
from torch import nn


def content_hash(*parts: nn.Module | torch.Tensor) -> str:
    """Hash of the names and bytes of every parameter and buffer of modules, and of tensors."""
    out = hashlib.blake2b(digest_size=16)
    for number, part in enumerate(parts):
        tensors = part.state_dict() if isinstance(part, nn.Module) else {"": part}
        for name, tensor in sorted(tensors.items()):
            out.update(f"{number}.{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            out.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return out.hexdigest()
