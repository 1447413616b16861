"""Sharded training (FSDP2): every rank keeps its part of each weight, gradient and moment.

A block's weights are brought together for its forward and its backward pass alone. What is trained may change at any
step: parameters are frozen and thawed while they are in parts, only trained ones' gradients are reduced, and a block
that the residual backward goes around is not brought together a second time. Everything here leaves a network that is
not sharded as it is.
"""

import copy
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from entprog.blocks import HALF, Block, bypass_layers, is_adapted, layer_weights, replaced, split
from entprog.config import Backward
from entprog.distributed import agree
from entprog.masking import reason

T = TypeVar("T")


def shard(
    network: nn.Module,
    found: Sequence[Block],
    replicas: int = 1,
    half: bool = False,
    device: str | torch.device = "cpu",
) -> None:
    """Split every parameter over all ranks, block by block, in place; the network has new parameter objects then.

    replicas: so many groups of neighbouring ranks have a copy each, split over the group; gradients are averaged over
    all ranks. half: it runs under bfloat16 autocast. Then what that rounds of blocks without adapters is brought
    together as bfloat16, for equal bits, and its gradients are averaged in float32; the rest of such blocks, norms and
    the like, goes with what lies outside blocks. device: where parts lie, and are brought together.
    Every rank must hold the same whole weights when it calls this, or none of them any memory (`entprog.models.parts`).
    """
    split_up = functools.partial(fully_shard, mesh=_mesh(replicas, device), reshard_after_forward=True)
    if not half or any(is_adapted(block.module) for block in found):
        for block in found:
            split_up(block.module)
        split_up(network)
        return
    rounded = {block.name: {p for _, p in layer_weights(block.module)} for block in found}
    policy = MixedPrecisionPolicy(param_dtype=HALF, reduce_dtype=torch.float32, cast_forward_inputs=False)
    # The network first: of a block that was split already nothing would go with what lies outside.
    split_up(network, ignored_params=set().union(*rounded.values()))
    for block in found:
        rest = set(block.module.parameters()) - rounded[block.name]
        split_up(block.module, ignored_params=rest, mp_policy=policy)


def notice_thawed(found: Iterable[Block]) -> None:
    """Let torch see again of which types blocks' parameters are and whether they are trained, which it looks at before
    it brings them together alone: it gathers, and averages gradients, in types that follow from that. Every rank calls
    it for the same blocks; nothing where they are whole."""
    for block in found:
        with together(block.module):
            pass


def begin(replicas: int, device: str | torch.device) -> None:
    """What ranks make together, made before anything can go wrong on one of them alone. Every rank calls it."""
    _mesh(replicas, device)
    agree.wait_for_all()


def _mesh(replicas: int, device: str | torch.device) -> DeviceMesh:
    """Ranks by the copy that they hold a part of. device: what they train on, which need not be what torch takes by
    itself: the accelerator that it sees."""
    return _mesh_of(dist.group.WORLD, replicas, torch.device(device).type)


@functools.lru_cache(maxsize=1)
def _mesh_of(training: dist.ProcessGroup, replicas: int, kind: str) -> DeviceMesh:
    """Made once: it makes groups of ranks."""
    if replicas == 1:
        return init_device_mesh(kind, (shares(1),))
    return init_device_mesh(kind, (replicas, shares(replicas)), mesh_dim_names=("replica", "share"))


def shares(replicas: int) -> int:
    """Ranks that hold one copy of a sharded network. Raises ValueError where ranks cannot be shared out evenly."""
    ranks = agree.world()[1]
    if ranks % replicas:
        raise ValueError(f"{ranks} ranks cannot hold {replicas} copies of a network, as many each")
    return ranks // replicas


def is_sharded(network: nn.Module) -> bool:
    return isinstance(network, FSDPModule)


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module before it was sharded."""
    return next(kind for kind in type(module).__mro__ if not issubclass(kind, FSDPModule))


def _parts(network: nn.Module) -> list[FSDPModule]:
    return [module for module in network.modules() if isinstance(module, FSDPModule)]


def in_parts(network: nn.Module) -> None:
    """Give up weights that a forward pass without gradients left together."""
    for part in _parts(network):
        part.reshard()


def spare_frozen(found: Iterable[Block], trainable: Collection[str], backward: Backward) -> None:
    """Leave blocks in parts in the backward pass where it has no use for their weights."""
    for block in found:
        if isinstance(block.module, FSDPModule):
            wanted = block.name in trainable or backward == "exact" or any(bypass_layers(block.module))
            block.module.set_unshard_in_backward(wanted)


@contextmanager
def together(module: nn.Module) -> Iterator[None]:
    """Whole weights of one block for as long as this lasts; every rank enters."""
    if not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()


@contextmanager
def noting_whole(network: nn.Module) -> Iterator[dict[int, torch.UntypedStorage]]:
    """Notes the memory into which a network's passes bring weights together, by `id`: it is the same each time, and
    empty between two of them. Nothing where weights are whole anyway."""
    noted: dict[int, torch.UntypedStorage] = {}

    def note(module: nn.Module, *_) -> None:
        for parameter in module.parameters():
            if not hasattr(parameter, "to_local"):
                storage = parameter.untyped_storage()
                noted[id(storage)] = storage

    hooks = [part.register_forward_pre_hook(note) for part in _parts(network)]  # after the part's own, which unshards
    try:
        yield noted
    finally:
        for hook in hooks:
            hook.remove()


class PassError(RuntimeError):
    """A pass of a sharded network failed on a rank: its message names the rank and what went wrong there."""


def led(network: nn.Module, found: Sequence[Block], work: Callable[[], T], along: Callable[[], None]) -> T | None:
    """What rank 0 makes of a network that it may call as often as it likes; None on the others, which bring their parts
    of a sharded network's weights for each of its passes. Every rank calls it.

    found: the network's blocks in execution order; along: a pass through the network, of whatever inputs.
    A pass in which a rank fails, for want of memory say, goes on as far as other ranks need it, and is a PassError to
    `work`, which may raise what it likes. Raises RuntimeError where that cannot be done.
    """
    rank, ranks = agree.world()
    if not is_sharded(network) or ranks == 1:
        return work() if rank == 0 else None
    passing = _Pass(network, found)
    try:
        if rank != 0:
            while agree.of_first(lambda: None):
                passing.begin()
                passing.attempt(along)
                with suppress(PassError):  # which rank 0 has, too
                    passing.end()
            return None

        def begins(*_) -> None:
            agree.of_first(lambda: True)
            passing.begin()
            if passing.failure:
                passing.end()

        hooks = (
            network.register_forward_pre_hook(begins, prepend=True),
            network.register_forward_hook(lambda *_: passing.end()),
        )
        try:
            return work()
        finally:
            for hook in hooks:
                hook.remove()
            if passing.under_way:  # of which the rest does not come: this rank has to end, that the others do
                raise RuntimeError("a pass of a sharded network was cut short, in which the other ranks wait")
            agree.of_first(lambda: False)
    finally:
        passing.close()


class _Pass:
    """This rank's part in one pass after another of a sharded network. Where a pass fails here, what is left of it is
    gone through without computing: the other ranks wait in it for this rank's parts of the weights."""

    def __init__(self, network: nn.Module, found: Sequence[Block]):
        self.network, self.parts = network, [network, *(block.module for block in found)]
        self.brought: set[nn.Module] = set()
        """Parts whose weights this pass has brought together."""
        self.under_way = False
        self.failure: str | None = None
        """What went wrong in this pass on this rank."""
        own = network.forward
        self.guarded = ExitStack()
        # Inside the network's own hooks, which leave it as it has to be for the next pass.
        forward = functools.partial(self.attempt, own)
        self.guarded.enter_context(replaced({network: forward}))
        for part in self.parts:  # after the part's own hook, which brings its weights together
            hook = part.register_forward_pre_hook(lambda part, _: self.brought.add(part))
            self.guarded.callback(hook.remove)

    def begin(self) -> None:
        """Every rank begins a pass. What lies outside blocks is brought together at once: where that fails the network
        has not been called yet."""
        self.under_way, self.failure = True, None
        self.brought.clear()
        self.attempt(self.network.unshard)
        self.brought.add(self.network)

    def attempt(self, work: Callable[..., Any], *args, **kwargs) -> Any:
        """What work gives; None once something has failed."""
        if self.failure:
            return None
        try:
            return work(*args, **kwargs)
        except Exception as error:
            self.failure = self.failure or reason(error)
        self._bring_the_rest()  # by now what the pass had made is let go of
        return None

    def end(self) -> None:
        """Every rank has come to the end of a pass. Raises PassError on all of them if it failed on any."""
        if agree.total([float(self.failure is not None)])[0]:
            rank, line = next((rank, line) for rank, line in enumerate(agree.gathered(self.failure)) if line)
            if not hasattr(self.network, "reset_iter_state"):
                raise RuntimeError(
                    f"torch {torch.__version__} does not go on after a failed pass (rank {rank}: {line})"
                )
            self.network.reset_iter_state()  # on every rank: they prefetch by what they remember of passes
            self.under_way = False
            raise PassError(f"on rank {rank}: {line}")
        self.under_way = False

    def close(self) -> None:
        self.guarded.close()

    def _bring_the_rest(self) -> None:
        in_parts(self.network)
        for part in self.parts:
            if part not in self.brought:
                part.unshard()
                part.reshard()
                self.brought.add(part)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor that may be in parts, which may lie on the host; every rank must ask."""
    return tensor.to(tensor.device_mesh.device_type).full_tensor() if split.is_split(tensor) else tensor


def whole_copy(module: nn.Module) -> nn.Module:
    """A copy of a small part of a network that lies outside its blocks; every rank must ask."""
    out = copy.deepcopy(module)
    for part in out.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if hasattr(parameter, "full_tensor"):
                setattr(part, name, nn.Parameter(whole(parameter.detach()), requires_grad=parameter.requires_grad))
    return out


held = split.part


def place(replicas: int) -> tuple[int, int]:
    """(which part of every weight this rank holds, number of parts)."""
    return agree.world()[0] % shares(replicas), shares(replicas)


def replicas(network: nn.Module) -> int:
    """Copies of the network that all ranks hold together; of one that is not sharded, as many as ranks."""
    mesh = getattr(next(network.parameters()), "device_mesh", None)
    return agree.world()[1] if mesh is None else mesh.size() // mesh.size(-1)


def rows(whole: torch.Tensor, part: int, parts: int) -> torch.Tensor:
    """What the rank with that part holds of a whole tensor: a view of its share of rows, as torch shares them out."""
    shares = whole.chunk(parts, dim=0)
    return shares[part] if part < len(shares) else whole[:0]


def part_of(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a whole tensor, if it is in parts as `like` is."""
    mesh = getattr(like, "device_mesh", None)
    return whole if mesh is None else rows(whole, mesh.get_local_rank(mesh.ndim - 1), mesh.size(-1))
