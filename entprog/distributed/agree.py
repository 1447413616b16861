"""The few things ranks must agree on, over torch.distributed; all are the identity in a single process."""

import functools
import json
import platform
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from entprog.config import digest
from entprog.errors import UnreachableError, UserError

T = TypeVar("T")


def world() -> tuple[int, int]:
    """(rank, number of ranks)."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def means_of(values: torch.Tensor) -> torch.Tensor:
    """The mean over ranks of each, in one exchange; the same bits on every rank. They stay on their device: nobody
    waits for it here."""
    ranks = world()[1]
    if ranks > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values / ranks


def largest_of(values: Sequence[float], device: torch.device | str = "cpu") -> list[float]:
    """The largest over ranks of each, in one exchange."""
    return _reduced(values, device, dist.ReduceOp.MAX) if world()[1] > 1 else list(values)


def slowest(seconds: float, device: torch.device | str = "cpu") -> float:
    """The largest over ranks: a step takes as long as its slowest rank."""
    return largest_of([seconds], device)[0]


@dataclass(frozen=True)
class Pace:
    """How long each rank took for its own part of a step."""

    median_s: float
    slowest_s: float
    slowest_rank: int


def pace(seconds: float, device: torch.device | str = "cpu") -> Pace | None:
    """Median and slowest of all ranks' seconds, on rank 0; None on the others: were every rank told all of them, each
    step, what goes over the wire would grow with the square of ranks."""
    rank, ranks = world()
    values = [seconds]
    if ranks > 1:
        mine = torch.tensor([seconds], dtype=torch.float64, device=device)
        each = [torch.zeros_like(mine) for _ in range(ranks)] if rank == 0 else None
        dist.gather(mine, each)
        if each is None:
            return None
        values = torch.cat(each).tolist()
    slowest = max(range(ranks), key=values.__getitem__)
    return Pace(statistics.median(values), values[slowest], slowest)


def _reduced(values: Sequence[float], device: torch.device | str, how) -> list[float]:
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=how)
    return tensor.tolist()


PATIENCE = timedelta(days=30)
"""Time-out where ranks wait for one that works alone. A rank that dies ends the wait at once: its connections close."""


@functools.lru_cache(maxsize=1)
def _patient_group(training: dist.ProcessGroup) -> dist.ProcessGroup:
    """A group of the same ranks beside the one that trains, whose time-out is meant for gradients and would end a run
    while one rank waits for a lock, uploads or encodes."""
    return dist.new_group(backend="gloo", timeout=PATIENCE)


def gathered(value: Any) -> list[Any]:
    """Every rank's value, in order of rank (our own ranks' plain data, never anything from outside). Ranks may come to
    this at any time, however far apart."""
    _, ranks = world()
    if ranks == 1:
        return [value]
    out: list[Any] = [None] * ranks
    dist.all_gather_object(out, value, group=_patient_group(dist.group.WORLD))
    return out


def for_first(value: Any) -> list[Any] | None:
    """Every rank's value on rank 0, in order of rank; None on the others. Ranks may come to this at any time, as to
    `gathered`, which tells every rank of every other: what all say grows with the square of ranks there."""
    rank, ranks = world()
    if ranks == 1:
        return [value]
    out = [None] * ranks if rank == 0 else None
    dist.gather_object(value, out, group=_patient_group(dist.group.WORLD))
    return out


def of_first(make: Callable[[], T]) -> T:
    """What rank 0 makes (plain data), on every rank: what one alone reads is read once. Whatever it raises is raised on
    all of them."""
    rank, ranks = world()
    if ranks == 1:
        return make()
    made: list[Any] = [None, None]
    if rank == 0:
        try:
            made[0] = make()
        except Exception as error:
            made[1] = error
    dist.broadcast_object_list(made, src=0, group=_patient_group(dist.group.WORLD))
    if made[1] is not None:
        raise made[1]
    return made[0]


class _EverybodysError(UserError):
    """A mistake that every rank has been told of."""


@contextmanager
def mistakes_of_all() -> Iterator[None]:
    """A person's mistake (UserError) that one rank meets inside is raised on every rank, once all of them have come to
    the end; where machines without it are among them its message names one that has it. What does not answer
    (UnreachableError) is none, and ends its own rank at once.

    These may lie in each other: a rank that fails before an inner one meets the others there, and its mistake goes
    through all outer ones. Any other exchange needs one that ends before it: who fails does not come to it."""
    mistake = None
    try:
        yield
    except (UnreachableError, _EverybodysError):
        raise
    except UserError as error:
        mistake = str(error)
    every = gathered((platform.node(), mistake))
    if met := [(machine, line) for machine, line in every if line]:
        machine, line = met[0]
        # Of a machine some ranks may not have looked.
        elsewhere = {each for each, _ in every} - {each for each, _ in met}
        raise _EverybodysError(f"{line} (on {machine})" if elsewhere else line)


def common(own: Iterable[T]) -> set[T]:
    """Those of a rank's values (plain data) that every rank has."""
    return set.intersection(*map(set, gathered([*own])))


def filled_by_first(tensors: Iterable[torch.Tensor], fill: Callable[[], None]) -> None:
    """Rank 0 fills the tensors, which each rank has alike, and the others get their values. What `fill` raises is
    raised on every rank."""
    of_first(fill)
    rank, ranks = world()
    if ranks == 1:
        return
    for tensor in tensors:
        sent = tensor.detach().cpu().contiguous()
        dist.broadcast(sent.flatten().view(torch.uint8), src=0, group=_patient_group(dist.group.WORLD))
        if rank != 0:
            tensor.detach().copy_(sent)


def send(tensor: torch.Tensor, to: int) -> None:
    """Give another rank a tensor, which it waits for by `received`: they may come to this at any time."""
    dist.send(tensor.cpu().contiguous(), to, group=_patient_group(dist.group.WORLD))


def received(like: torch.Tensor, sender: int) -> torch.Tensor:
    """The tensor that another rank sends: of the same shape, type and device as `like`."""
    out = torch.empty(like.shape, dtype=like.dtype)
    dist.recv(out, sender, group=_patient_group(dist.group.WORLD))
    return out.to(like.device)


def total(values: Sequence[float]) -> list[float]:
    """Sums over ranks, the same bits on every rank. They may come to this at any time, as to `gathered`."""
    if world()[1] == 1:
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor, group=_patient_group(dist.group.WORLD))
    return tensor.tolist()


def wait_for_all() -> None:
    """Until every rank has come here, at whatever time."""
    if world()[1] > 1:
        dist.barrier(group=_patient_group(dist.group.WORLD))


class DisagreementError(RuntimeError):
    """Ranks hold different values of what must be one decision; raised on all of them, so that none waits."""


def agree(what: str, value: Any) -> None:
    """Raises DisagreementError on every rank if any rank holds another value, or decides something else: before ranks
    drift apart or hang. Its message tells which ranks hold what; it is the same on every rank. While they agree two
    numbers are all that a rank says, however many there are."""
    if _equal(int(digest(what, value)[:15], 16)):
        return
    seen = gathered((what, digest(value)))
    held = _differing(gathered(json.loads(json.dumps(value, default=str))))
    groups = {each: [rank for rank, own in enumerate(seen) if own == each] for each in dict.fromkeys(seen)}
    message = [f"{_ranks(ranks)}: {each[0]} = {_short(json.dumps(held[ranks[0]]))}" for each, ranks in groups.items()]
    raise DisagreementError(f"ranks disagree on {what}: " + "; ".join(message))


def _equal(number: int) -> bool:
    """Whether every rank holds this number, of less than 63 bits."""
    if world()[1] == 1:
        return True
    ends = torch.tensor([number, -number])
    dist.all_reduce(ends, op=dist.ReduceOp.MAX, group=_patient_group(dist.group.WORLD))
    return ends[0].item() == -ends[1].item()


def _differing(values: list[Any]) -> list[Any]:
    """The values, mappings reduced to the entries in which they differ."""
    if not all(isinstance(value, dict) for value in values):
        return values
    names = [name for name in values[0] if any(value.get(name) != values[0][name] for value in values)]
    return [{name: value.get(name) for name in names} or value for value in values]


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:8]))}{', …' * (len(ranks) > 8)}"


def _short(text: str, limit: int = 600) -> str:
    return text if len(text) <= limit else text[:limit] + "…"
