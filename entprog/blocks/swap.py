"""Block swap: frozen weights of some blocks wait in host memory and are on the device while their block runs.

Two blocks' weights are on the device at a time: those of the block that runs, and those of the block that ran after it
the last time, which are copied meanwhile on a stream of their own. Whoever uses a weight brings its block, in the
forward pass, in the backward pass and where checkpointing runs a block again: no order of blocks is assumed.

On the CPU the same happens without streams and pinned memory, which tests can look at.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch

from entprog.blocks.held import Held

ALIGNED = 256
"""Bytes that every tensor in a block's memory begins at a multiple of."""


@dataclass(eq=False)
class Waiting:
    """The weights of a block that lie on the host, in one piece of memory."""

    swap: "Swap"
    host: torch.Tensor
    """uint8, pinned where there is a GPU."""
    places: dict[Held, list[tuple[int, torch.dtype, tuple[int, ...]]]]
    """Where each weight's tensors begin, their types and shapes."""

    def views(self, memory: torch.Tensor, held: Held) -> list[torch.Tensor]:
        """A weight's tensors in a copy of the memory."""
        out = []
        for begin, dtype, shape in self.places[held]:
            out.append(memory[begin : begin + math.prod(shape) * dtype.itemsize].view(dtype).view(shape))
        return out

    def on_host(self, held: Held) -> list[torch.Tensor]:
        return self.views(self.host, held)

    def brought(self, held: Held) -> list[torch.Tensor]:
        """A weight's tensors on the device, good until another block is brought."""
        return self.views(self.swap.bring(self).memory, held)


@dataclass(eq=False)
class Slot:
    """Room on the device for one block's weights."""

    memory: torch.Tensor
    holds: Waiting | None = None
    ready: torch.cuda.Event | None = None
    """Recorded behind the copy."""
    left: torch.cuda.Event | None = None
    """Recorded behind the last use."""


@dataclass(eq=False)
class Swap:
    """The blocks that wait, and the two of them that are on the device."""

    device: torch.device
    """Where they are used."""
    waiting: list[Waiting] = field(default_factory=list)
    slots: list[Slot] = field(default_factory=list)
    before: Waiting | None = None
    now: Waiting | None = None
    """The block that is used, and the one before it."""
    after: dict[tuple[Waiting | None, Waiting], Waiting] = field(default_factory=dict)
    """(the block before, the block that is used) → the block that was used next the last time."""
    stream: torch.cuda.Stream | None = None
    fetched_bytes: int = 0
    """Copied to the device so far."""
    late: int = 0
    """Blocks so far that were not there when they were wanted."""

    def wait(self, some: Sequence[Held]) -> Waiting:
        """Let the weights of one block wait on the host."""
        total, places = 0, {}
        parts = {held: held.parts() for held in some}
        for held in some:
            places[held] = []
            for part in parts[held]:
                places[held].append((total, part.dtype, tuple(part.shape)))
                total += -(-part.nbytes // ALIGNED) * ALIGNED
        host = torch.empty(total, dtype=torch.uint8, device="cpu", pin_memory=self.device.type == "cuda")
        waiting = Waiting(self, host, places)
        for held in some:
            for mine, part in zip(waiting.on_host(held), parts[held], strict=True):
                mine.copy_(part)
            held.wait(waiting)
        self.waiting.append(waiting)
        self.forget()
        return waiting

    def drop(self, waiting: Waiting) -> None:
        """A block does not wait any more."""
        self.waiting.remove(waiting)
        self.forget()

    def forget(self) -> None:
        """What is on the device is not what waits any more."""
        if self.slots and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.slots.clear()
        self.after.clear()
        self.before = self.now = None

    def bring(self, wanted: Waiting) -> Slot:
        """The room that a block's weights are in; the block that is likely to be next is on its way."""
        slot = self._holding(wanted)
        if wanted is self.now:
            return slot
        if self.now is not None:
            self.after[self.before, self.now] = wanted
            self._note(self._holding(self.now))
        if slot is None:
            self.late += 1
            slot = self._copy(wanted)
        if slot.ready is not None:
            torch.cuda.current_stream(self.device).wait_event(slot.ready)
        self.before, self.now = self.now, wanted
        ahead = self.after.get((self.before, wanted))
        if ahead is not None and self._holding(ahead) is None:
            self._copy(ahead)
        return slot

    def _holding(self, waiting: Waiting) -> Slot | None:
        return next((slot for slot in self.slots if slot.holds is waiting), None)

    def _note(self, slot: Slot) -> None:
        """Where the device's work with a room ends that was asked for so far."""
        if self.device.type == "cuda":
            slot.left = torch.cuda.Event()
            slot.left.record(torch.cuda.current_stream(self.device))

    def _copy(self, waiting: Waiting) -> Slot:
        """Copy a block into the room that the block that is used does not have."""
        slot = self._room()
        slot.holds, size = waiting, waiting.host.nbytes
        self.fetched_bytes += size
        if self.device.type != "cuda":
            slot.memory[:size].copy_(waiting.host)
            return slot
        self.stream = self.stream or torch.cuda.Stream(self.device)
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(slot.left)
            slot.memory[:size].copy_(waiting.host, non_blocking=True)
            slot.ready = torch.cuda.Event()
            slot.ready.record(self.stream)
        return slot

    def _room(self) -> Slot:
        if len(self.slots) == 2:
            return next(slot for slot in self.slots if slot.holds is not self.now)
        most = max(waiting.host.nbytes for waiting in self.waiting)
        slot = Slot(torch.empty(most, dtype=torch.uint8, device=self.device))
        self._note(slot)  # whatever used that memory before is done by then
        self.slots.append(slot)
        return slot

    @property
    def device_bytes(self) -> int:
        """What the device holds for it."""
        return sum(slot.memory.nbytes for slot in self.slots)


def spread(names: Sequence[str], number: int) -> set[str]:
    """So many of the names, as evenly as can be: between two blocks that wait others run, while one is copied."""
    number = min(number, len(names))
    return {names[(2 * i + 1) * len(names) // (2 * number)] for i in range(number)} if number else set()


def chosen(names: Sequence[str], may: Collection[str], number: int) -> set[str]:
    """So many of the names that may wait: of those that wait while all may, all that may, then others, evenly spread
    too. It depends on what may wait alone, and when one more may not, one other takes its place."""
    first = spread(names, number)
    others = [name for name in names if name not in first]
    digits = len(others).bit_length()
    # By their numbers' digits backwards: halves, then quarters, and so on.
    by_place = sorted(range(len(others)), key=lambda place: f"{place:0{digits}b}"[::-1])
    order = [name for name in names if name in first] + [others[place] for place in by_place]
    return set([name for name in order if name in may][:number])


def pinned_bytes(size: int) -> int:
    """What the host holds for pinned memory of a size: torch takes the next power of two."""
    return 1 << (size - 1).bit_length() if size else 0


def rooms_bytes(sizes: Sequence[int]) -> int:
    """What the device holds of blocks of these sizes that wait: two of the largest."""
    return min(2, len(sizes)) * max(sizes, default=0)
