"""Frozen weights in bfloat16, what bfloat16 autocast makes of them at every use, made once; or in less.

Under bfloat16 autocast a linear or convolution layer reads its float32 weights through their rounding alone. While such
a layer is frozen its block's device therefore holds the rounding, which gives equal bits in both directions; the
float32 bits lie in host memory, or nowhere where rounding lost none (a bfloat16 checkpoint's weights before they are
first trained). A layer that thaws has its float32 bits back.

Linear layers' weights may be packed beyond that (`entprog.blocks.packed`), or wait on the host (`entprog.blocks.swap`).

Of a network that ranks hold in parts (`entprog.blocks.split`) a rank stores its own parts so. While a block is whole,
for a pass, its parts stay as they are.

Whoever asks for a block's state (`state_dict`), or sets it (`load_state_dict`), sees float32 throughout; with
`keep_vars` the parameters themselves, as they are stored. Packed weights
that are never trained, such as those under low-rank adapters, are in no state: whoever loads the network has them.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn

from entprog.blocks import packed, split
from entprog.blocks.held import Held, HeldLinear
from entprog.blocks.packed import Form
from entprog.blocks.swap import Swap, Waiting

if TYPE_CHECKING:
    from entprog.blocks.block import Block

HALF = torch.bfloat16
LAYERS = (nn.Linear, HeldLinear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Classes whose every parameter autocast rounds; one derived from them may do other things with its own."""
ADAPTER = ".lora_"
"""Part of the name of every low-rank adapter's parameter (`entprog.models.lora`)."""


@torch.no_grad()
def keep_rounded(
    module: nn.Module, form: Form = "bfloat16", device: torch.device | None = None, swap: Swap | None = None
) -> None:
    """Hold a block that is never trained or saved in bfloat16 where autocast rounds it anyway, its linear layers'
    weights in a form; their float32 bits go, but of form "float32", which rounds nothing. device: which packs, None:
    where they are. swap: lets linear layers' weights wait on the host; None: they do not."""
    plain: Form = "float32" if form == "float32" else "bfloat16"
    some = []
    for name, parameter in list(layer_weights(module)):
        layer = _linear(module, name)
        if form != plain and layer and packed.fits(parameter.shape, form):
            parts = packed.pack(parameter.data.to(device or parameter.device), form)
            some.append(Held(layer, [part.to(parameter.device) for part in parts], form))
        elif layer and swap:
            some.append(Held(layer, packed.pack(parameter.data, plain), plain))
        else:
            parameter.data = parameter.data.to(packed.PLAIN[plain])
    if swap and some:
        swap.wait(some)


def round_frozen(found: Iterable["Block"]) -> None:
    """Freeze blocks, and hold in bfloat16 what autocast rounds anyway of what their adapters adapt; the float32 bits
    go. The blocks may have no memory yet."""
    for block in found:
        block.module.requires_grad_(False)
        keep_rounded(block.module)


def leave_out(found: Iterable["Block"]) -> None:
    """Leave out of blocks' state what `round_frozen` rounded: whoever loads the network has it in full."""
    for block in found:
        _leave_out(block.module, [name for name, _ in layer_weights(block.module)])


def _leave_out(module: nn.Module, names: Sequence[str]) -> None:
    def shown(module: nn.Module, state: dict, prefix: str, metadata: dict) -> None:
        for name in names:
            state.pop(prefix + name, None)

    def given(module: nn.Module, state: dict, prefix: str, *others) -> None:
        for name in names:
            state[prefix + name] = module.get_parameter(name).detach()

    module.register_state_dict_post_hook(shown)
    module.register_load_state_dict_pre_hook(given)


@dataclass
class Stored:
    """The frozen weights of one block that are stored in bfloat16 or less."""

    form: Form = "bfloat16"
    """Of linear layers' weights."""
    in_parts: bool = False
    """Whether ranks hold the block in parts: `masters` are of this rank's."""
    masters: dict[str, torch.Tensor | None] = field(default_factory=dict)
    """Name in the block → its numbers on the host, in float32 or, where that loses nothing, in bfloat16; None where
    what is stored is in bfloat16 and loses nothing. Other numbers come in other memory: who reads some may go on."""
    held: dict[str, Held] = field(default_factory=dict)
    """Name in the block → weight that does not lie in its parameter. One without a master is never trained."""
    waiting: Waiting | None = None
    """The block's memory on the host, while its linear layers' weights wait there."""

    def settle(self, module: nn.Module, device: torch.device | None = None) -> None:
        """Store what is frozen, give back what is not: to be called whenever the block froze or thawed. device: where
        weights are packed; None: where they are."""
        rounded, adapted, before = dict(layer_weights(module)), is_adapted(module), set(self.masters)
        if self.in_parts and not all(map(split.is_split, rounded.values())):
            return
        for name, parameter in rounded.items():
            if parameter.requires_grad or parameter.dtype != torch.float32:
                continue
            full = split.part(parameter.detach())
            if self.form != "bfloat16" and (layer := _linear(module, name)) and packed.fits(full.shape, self.form):
                if not adapted:
                    self.masters[name] = _least(full)
                self.held[name] = Held(layer, packed.pack(full.to(device or full.device), self.form), self.form)
            else:
                half = full.to(HALF)
                self.masters[name] = _master(full, half)
                split.put(parameter, half)
        if thawed := [name for name in self.masters if rounded[name].requires_grad]:
            self._give_back(thawed, rounded)
        if self.in_parts and set(self.masters) != before:
            split.notice(module)

    def restore(self, module: nn.Module) -> None:
        """Give back everything, frozen or not. Raises ValueError for packed weights that are never trained: they have
        no float32 numbers."""
        if self.held.keys() - self.masters.keys():
            raise ValueError("packed weights without masters cannot be given back")
        self._give_back(list(self.masters), dict(module.named_parameters()))

    def _give_back(self, names: Iterable[str], parameters: Mapping[str, nn.Parameter]) -> None:
        for name in names:
            parameter, master, held = parameters[name], self.masters.pop(name), self.held.pop(name, None)
            kept = master if master is not None else held.parts()[0] if held else split.part(parameter.detach())
            split.put(parameter, kept.to(parameter.device, torch.float32, copy=True))
            if held:
                held.release()
        if self.waiting and not self.held:
            self.waiting.swap.drop(self.waiting)
            self.waiting = None

    def wait(self, module: nn.Module, swap: Swap) -> None:
        """Let the linear layers' frozen weights wait on the host."""
        if self.waiting:
            return
        for name, parameter in layer_weights(module):
            if name in self.masters and name not in self.held and (layer := _linear(module, name)):
                self.held[name] = Held(layer, (parameter.data,), "bfloat16")
        if self.held:
            self.waiting = swap.wait(list(self.held.values()))

    def stay(self) -> None:
        """Let them lie on the device again."""
        if not self.waiting:
            return
        swap = self.waiting.swap
        for name, held in list(self.held.items()):
            parts = [part.to(swap.device, copy=True) for part in held.parts()]
            if held.form == self.form != "bfloat16":
                held.stay(parts)
            else:
                held.release()
                held.layer.weight.data = parts[0]
                del self.held[name]
        swap.drop(self.waiting)
        self.waiting = None

    def movable_bytes(self, module: nn.Module) -> int:
        """What of the block's weights, as they are now, waits or may wait on the host."""
        here = (p for name, p in linear_weights(module) if name in self.masters and name not in self.held)
        return sum(held.nbytes for held in self.held.values()) + sum(p.nbytes for p in here)

    def full(self, name: str, parameter: torch.Tensor) -> torch.Tensor:
        """A stored weight that may be trained, in float32 on the host: a device may have no room for all of it."""
        return split.of_part(parameter, self._numbers(name, parameter).cpu().float())

    def least(self, name: str, parameter: torch.Tensor) -> torch.Tensor:
        """The same where and as it is kept: on the host, or in bfloat16 on the device."""
        return split.of_part(parameter, self._numbers(name, parameter))

    def _numbers(self, name: str, parameter: torch.Tensor) -> torch.Tensor:
        master = self.masters[name]
        if master is not None:
            return master
        return self.held[name].parts()[0] if name in self.held else split.part(parameter.detach())

    def keep(self, name: str, full: torch.Tensor) -> None:
        """Other float32 numbers of a stored weight that may be trained, this rank's part: on the host alone."""
        packs = name in self.held and self.held[name].form != "bfloat16"
        self.masters[name] = _least(full) if packs else _master(full, full.to(HALF))

    def watch(self, module: nn.Module) -> None:
        """Let the block's state be in float32 for all who ask for it or set it."""

        def shown(module: nn.Module, state: dict, prefix: str, metadata: dict) -> None:
            for name in self.masters:
                kept = state.get(prefix + name)
                if kept is not None and not isinstance(kept, nn.Parameter):  # which `keep_vars` asks for
                    state[prefix + name] = self.full(name, kept)
            for name in self.held.keys() - self.masters.keys():
                state.pop(prefix + name, None)

        def given(module: nn.Module, state: dict, prefix: str, *others) -> None:
            for name in self.masters.keys() | self.held.keys():
                held, full = self.held.get(name), state.get(prefix + name)
                if full is not None:
                    full = full.detach().float()
                    if name in self.masters:
                        self.keep(name, split.part(full))
                    if held:
                        held.put(full)
                if held and (full is not None or name not in self.masters):
                    state[prefix + name] = held.layer.weight.data

        module.register_state_dict_post_hook(shown)
        module.register_load_state_dict_pre_hook(given)


def is_adapted(module: nn.Module) -> bool:
    """Whether a block is trained through low-rank adapters alone."""
    return any(ADAPTER in name for name, _ in module.named_parameters())


def layer_weights(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of the layers that autocast rounds, low-rank adapters left out: they are small, and peft's own
    casts go by their type."""
    for layer_name, layer in module.named_modules():
        if type(layer) in LAYERS and ADAPTER not in f".{layer_name}":
            yield from layer.named_parameters(layer_name, recurse=False)


def linear_weights(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Those of them that can be packed, and can wait."""
    return ((name, parameter) for name, parameter in layer_weights(module) if _linear(module, name))


def _linear(module: nn.Module, name: str) -> nn.Linear | None:
    """The layer whose weight a parameter is, if it is a linear one."""
    layer_name, _, kind = name.rpartition(".")
    layer = module.get_submodule(layer_name)
    return layer if type(layer) in (nn.Linear, HeldLinear) and kind == "weight" else None


def _master(full: torch.Tensor, half: torch.Tensor) -> torch.Tensor | None:
    """The float32 bits on the host, memory of their own; None where the rounding holds them."""
    return None if torch.equal(half.float(), full) else full.to("cpu", copy=True)


def _least(full: torch.Tensor) -> torch.Tensor:
    """The numbers on the host, memory of their own: in bfloat16 where that holds them all."""
    half = full.to(HALF)
    return half.cpu() if torch.equal(half.float(), full) else full.to("cpu", copy=True)
