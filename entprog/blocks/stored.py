"""Frozen weights in bfloat16: what bfloat16 autocast makes of them at every use, made once.

Under bfloat16 autocast a linear or convolution layer reads its float32 weights through their rounding alone. While such
a layer is frozen its block's device therefore holds the rounding, which gives equal bits in both directions; the
float32 bits lie in host memory, or nowhere where rounding lost none (a bfloat16 checkpoint's weights before they are
first trained). A layer that thaws has its float32 bits back.

Whoever asks for a block's state (`state_dict`), or sets it (`load_state_dict`), sees float32 throughout.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

HALF = torch.bfloat16
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Classes whose every parameter autocast rounds; one derived from them may do other things with its own."""
ADAPTER = ".lora_"
"""Part of the name of every low-rank adapter's parameter (`entprog.models.lora`)."""


def keep_rounded(module: nn.Module) -> None:
    """Hold a block that is never trained or saved in bfloat16 where autocast rounds it anyway; its float32 bits go."""
    for _, parameter in layer_weights(module):
        parameter.data = parameter.data.to(HALF)


@dataclass
class Stored:
    """The frozen weights of one block that are stored in bfloat16."""

    masters: dict[str, torch.Tensor | None] = field(default_factory=dict)
    """Name in the block → float32 bits on the host; None where bfloat16 holds them all."""

    def settle(self, module: nn.Module) -> None:
        """Store what is frozen, give back what is not: to be called whenever the block froze or thawed."""
        rounded = dict(layer_weights(module))
        for name, parameter in rounded.items():
            if not parameter.requires_grad and parameter.dtype == torch.float32:
                half = parameter.data.to(HALF)
                self.masters[name] = _master(parameter.data, half)
                parameter.data = half
        for name in [name for name in self.masters if rounded[name].requires_grad]:
            self._restore(rounded[name], self.masters.pop(name))

    def restore(self, module: nn.Module) -> None:
        """Give back everything, frozen or not."""
        parameters = dict(module.named_parameters())
        for name in list(self.masters):
            self._restore(parameters[name], self.masters.pop(name))

    @staticmethod
    def _restore(parameter: nn.Parameter, master: torch.Tensor | None) -> None:
        parameter.data = parameter.data.float() if master is None else master.to(parameter.device)

    def watch(self, module: nn.Module) -> None:
        """Let the block's state be in float32 for all who ask for it or set it."""

        def shown(module: nn.Module, state: dict, prefix: str, metadata: dict) -> None:
            for name, master in self.masters.items():
                if prefix + name in state:  # on the host: a device may have no room for all of it
                    full = state[prefix + name].cpu().float() if master is None else master
                    state[prefix + name] = full

        def given(module: nn.Module, state: dict, prefix: str, *others) -> None:
            for name in self.masters:
                if (full := state.get(prefix + name)) is not None:
                    full = full.detach().float()
                    self.masters[name] = _master(full, full.to(HALF))

        module.register_state_dict_post_hook(shown)
        module.register_load_state_dict_pre_hook(given)


def layer_weights(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of the layers that autocast rounds, low-rank adapters left out: they are small, and peft's own
    casts go by their type."""
    for layer_name, layer in module.named_modules():
        if type(layer) in LAYERS and ADAPTER not in f".{layer_name}":
            yield from layer.named_parameters(layer_name, recurse=False)


def _master(full: torch.Tensor, half: torch.Tensor) -> torch.Tensor | None:
    """The float32 bits on the host, memory of their own; None where the rounding holds them."""
    return None if torch.equal(half.float(), full) else full.to("cpu", copy=True)
