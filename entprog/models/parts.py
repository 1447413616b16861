"""Networks of which every rank holds a part from the first moment: neither a device nor a host holds the whole.

A network is made without memory (its few buffers with), split while it has none (`fsdp.shard`), and then filled: of a
base each rank reads the rows that are its own from the safetensors files; the weights of a new network are drawn one
tensor after another, in the order and with the bits in which one process draws them, and each rank keeps its rows.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from entprog.blocks import blocks
from entprog.distributed import fsdp
from entprog.models import adapters, inputs, weight_files
from entprog.storage import Place, slices


def of_base(
    kind: type[nn.Module],
    configuration: Mapping[str, Any],
    files: Sequence[Path],
    layer: str,
    splits: Sequence[int],
    device: str | torch.device,
    replicas: int,
    adapt: Callable[[nn.Module], None] = lambda network: None,
    half: bool = False,
) -> nn.Module | None:
    """The network of a base, split over the ranks. None: its files are no safetensors, or hold other names or shapes
    than the network has, so that it has to be read whole.

    files: with the weights, all in one folder; layer: that takes the network's inputs; splits: its channels in groups,
    those that the base lacks with zero weights; replicas, half: as of `fsdp.shard`; adapt: as of `loading.load`.
    Raises OSError where a file cannot be read.
    """
    if any(path.suffix != slices.SUFFIX for path in files):
        return None
    place = Place.at(files[0].parent)
    try:
        reader = slices.Reader(place, slices.chunks(place, [path.name for path in files]))
    except slices.BAD:  # a header that is damaged, or names a type of its own: who reads it whole says so
        return None
    kept = {name: about.size for name, about in reader.metadata.state_dict_metadata.items()}
    from accelerate import init_empty_weights

    with init_empty_weights():
        network = kind.from_config(configuration)
    wanted = {name: tensor.shape for name, tensor in network.state_dict().items()}
    if wanted != {name: kept.get(name) for name in wanted} or weight_files.unexpected(network, kept):
        return None
    _split(network.eval(), layer, splits, device, replicas, adapt, half)
    weights = {adapters.plain_name(name): tensor.detach() for name, tensor in network.state_dict().items()}
    tensors = {name: tensor for name, tensor in weights.items() if name in kept}
    widened, has = tensors[f"{layer}.weight"], kept[f"{layer}.weight"]
    narrow = torch.zeros(has)
    if widened.shape != has:
        tensors[f"{layer}.weight"] = narrow
    with slices.bare():
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    if widened.shape != has:  # a small layer, which every rank reads whole
        new = torch.zeros(widened.shape)
        new[:, : has[1]] = narrow
        fsdp.held(widened).copy_(fsdp.part_of(new, widened))
    return network


def drawn(
    kind: type[nn.Module],
    configuration: Mapping[str, Any],
    initialise: Callable[[nn.Module], None],
    device: str | torch.device,
    replicas: int,
    adapt: Callable[[nn.Module], None] = lambda network: None,
    half: bool = False,
) -> nn.Module | None:
    """A new network, split over the ranks, with the weights that torch's random state gives to one that is made whole.
    None: its weights are made in a way that has to have several of them whole; the random state is another one then.

    initialise: as of a denoiser; replicas, half: as of `fsdp.shard`; adapt: as of `loading.load`.
    """
    from accelerate import init_empty_weights  # here: of networks that are whole nothing needs it

    before = torch.random.get_rng_state()
    with init_empty_weights(), _Drawing() as counting:
        network = kind.from_config(configuration)
    torch.random.set_rng_state(before)
    names = {counting.numbers.get(id(p.untyped_storage())): name for name, p in network.named_parameters()}
    if None in names or len(names) < sum(1 for _ in network.parameters()):
        return None
    _split(network.eval(), "", (), device, replicas, adapt, half)
    parameters = {adapters.plain_name(name): parameter for name, parameter in network.named_parameters()}
    own = {number: fsdp.held(parameters[name].detach()) for number, name in names.items()}
    part, of = fsdp.place(replicas)
    drawing = _Drawing(own, lambda whole: fsdp.rows(whole, part, of))
    try:
        with torch.no_grad(), init_empty_weights(), drawing:
            again = kind.from_config(configuration)  # of which the values alone are wanted
            initialise(again)
            drawing.close()
    except Exception:  # what torch may have wrapped
        if drawing.lost:
            return None
        raise
    buffers = dict(again.named_buffers())
    for name, buffer in network.named_buffers():
        buffer.copy_(buffers[name])
    return network


def _split(
    network: nn.Module,
    layer: str,
    splits: Sequence[int],
    device: str | torch.device,
    replicas: int,
    adapt: Callable[[nn.Module], None],
    half: bool,
) -> None:
    """Split a network that has no memory, and give each rank's part its own; what the parts hold is to be filled in."""
    if len(splits) > 1:
        inputs.widen(network, layer, splits)
    adapt(network)
    fsdp.shard(network, blocks(network), replicas, half, device)
    held = {name: fsdp.held(tensor) for name, tensor in _tensors(network)}
    there = {name: tensor.clone() for name, tensor in held.items() if not tensor.is_meta}
    network.to_empty(device=device)
    for name, tensor in _tensors(network):
        if name in there:
            fsdp.held(tensor).copy_(there[name])


def _tensors(network: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from ((name, parameter.detach()) for name, parameter in network.named_parameters())
    yield from network.named_buffers()


aten = torch.ops.aten
OVERWRITING = (aten.uniform_, aten.normal_, aten.zero_, aten.fill_, aten.copy_)
"""What leaves nothing of a tensor's former values."""


class _Drawing(TorchDispatchMode):
    """Numbers the parameters without memory that are made inside, and does to real memory what is done to them: one
    parameter at a time, of which a part is kept once the next one is begun. Random numbers are drawn as if all of it
    were real."""

    def __init__(
        self,
        kept: Mapping[int, torch.Tensor] | None = None,
        part: Callable[[torch.Tensor], torch.Tensor] = lambda whole: whole,
    ):
        """kept: number of a parameter → memory of the part of it that `part` gives; None: they are numbered alone."""
        super().__init__()
        self.kept, self.part = kept, part
        self.numbers: dict[int, int] = {}
        """Storage of a parameter → its number, in the order in which they are made."""
        self.shapes: dict[int, torch.Size] = {}
        """Of parameters, whatever view of them is written to."""
        self.copies: dict[int, torch.Tensor] = {}
        """Parts of copies of parameters."""
        self.key: int | None = None
        """Storage of the parameter that is real now."""
        self.real: torch.Tensor | None = None
        """All of it, flat."""
        self.lost = False
        """Whether a weight is made of others."""
        self.alive: list[torch.UntypedStorage] = []
        """So that no two storages have one key."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        if not isinstance(out, torch.Tensor) or not out.is_meta:
            return out
        if function is aten._to_copy.default and not args[0].is_meta:  # a parameter comes to be
            self.numbers[self.remember(out)] = len(self.numbers)
            if self.kept is not None:
                self.begin(out, args[0].detach().clone())
        elif self.kept is None:
            pass
        elif function in (aten.clone.default, aten.copy_.default) and args[-1].is_meta:
            self.copy(args[-1], out)
        elif function.overloadpacket.__name__.endswith("_") and args[0].is_meta:  # in place
            whole = out.numel() * out.element_size() == args[0].untyped_storage().nbytes()
            if whole and function.overloadpacket in OVERWRITING:
                self.begin(args[0])
            real = {"args": args, "kwargs": kwargs}
            real = tree_map_only(torch.Tensor, lambda t: self.twin(t) if t.is_meta else t, real)
            function(*real["args"], **real["kwargs"])
        return out

    def remember(self, tensor: torch.Tensor) -> int:
        """The key of a tensor's storage."""
        storage = tensor.untyped_storage()
        if id(storage) not in self.shapes:
            self.alive.append(storage)
            self.shapes[id(storage)] = tensor.shape
        return id(storage)

    def begin(self, tensor: torch.Tensor, content: torch.Tensor | None = None) -> None:
        """Make a parameter the one that is real; without a content it is about to be written all over."""
        key = self.remember(tensor)
        if content is None and self.key == key:
            return
        self.close()
        self.key = key
        made = torch.empty(self.shapes[key], dtype=tensor.dtype) if content is None else content
        self.real = made.flatten()

    def twin(self, tensor: torch.Tensor) -> torch.Tensor:
        """Real memory of a view of the parameter that is real."""
        if id(tensor.untyped_storage()) != self.key:
            self.lost = True
            raise RuntimeError("a weight is made of others")
        return self.real.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def copy(self, tensor: torch.Tensor, to: torch.Tensor) -> None:
        """Make another parameter, or a copy, of one."""
        self.close()
        key, own = id(tensor.untyped_storage()), self.remember(to)
        source = self.copies.get(key, self.kept.get(self.numbers.get(key)))
        if source is None or not tensor.shape == self.shapes[key] == to.shape == self.shapes[own]:
            self.lost = True
            raise RuntimeError("a weight is made of a part of another")
        self.keep(own, source)

    def keep(self, key: int, part: torch.Tensor) -> None:
        if key not in self.numbers:
            self.copies[key] = part.clone()
        elif self.numbers[key] in self.kept:
            self.kept[self.numbers[key]].copy_(part)

    def close(self) -> None:
        """Keep a part of the parameter that is real."""
        if self.key is not None:
            self.keep(self.key, self.part(self.real.view(self.shapes[self.key])))
        self.key = self.real = None
