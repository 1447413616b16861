"""Residual units of a network that nobody registered as blocks."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from entprog.blocks.block import is_block


@torch.no_grad()
def overlooked(network: nn.Module, run: Callable[[], Any], otherwise: Callable[[], Any]) -> dict[str, str]:
    """Residual units on the noisy clip's way, in lists of modules, that are no blocks: {class: name of the first}.

    run, otherwise: call the network with two noisy clips, all else being equal. A unit counts as residual if it gives
    its first input back once all its weights are zero. It is neither scored nor skipped nor frozen: a class whose
    bypass was forgotten, most likely.
    """
    known = {id(m) for module in network.modules() if is_block(module) for m in module.modules()}
    holding = {id(m) for m in network.modules() if any(is_block(part) for part in m.modules())}
    units = {
        module: f"{name}.{i}"
        for name, part in network.named_modules()
        if isinstance(part, nn.ModuleList)
        for i, module in enumerate(part)
        if id(module) not in known | holding and any(True for _ in module.parameters())
    }
    looked_at: set[str] = set()
    saw: dict[nn.Module, torch.Tensor] = {}
    """Residual units of the first call, the first of each class, with their inputs."""
    found: dict[str, str] = {}

    def note(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        kind = type(module).__name__
        first = next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None)
        if module in saw:
            if not torch.equal(first, saw.pop(module)):
                found[kind] = units[module]
            return
        out = output[0] if isinstance(output, tuple) else output
        alike = isinstance(out, torch.Tensor) and first is not None and out.shape == first.shape
        if kind not in looked_at and alike and first.any():
            looked_at.add(kind)  # before its hook runs again
            nothing = {name: torch.zeros_like(value) for name, value in module.named_parameters()}
            bare = torch.func.functional_call(module, nothing, args, kwargs)
            bare = bare[0] if isinstance(bare, tuple) else bare
            if torch.allclose(bare.float(), first.float(), rtol=1e-3, atol=1e-5):
                saw[module] = first.clone()

    hooks = [module.register_forward_hook(note, with_kwargs=True) for module in units]
    try:
        run()
        if saw:
            otherwise()
    finally:
        for hook in hooks:
            hook.remove()
    return found
