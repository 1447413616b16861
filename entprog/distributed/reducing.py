"""Gradients averaged over ranks while the backward pass still computes the others."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch import nn

from entprog.distributed.agree import world

BUCKET_BYTES = 64 << 20
UNDER_WAY_BYTES = 256 << 20
"""Of buckets on their way at once, but for one that is larger: each is a copy of its gradients. Where the network is
slower than the backward pass the others wait: on a GPU for the oldest, on a CPU for the pass to end."""


def room_bytes(trained_bytes: int) -> int:
    """What copies of gradients of so many bytes take at once."""
    return min(trained_bytes, UNDER_WAY_BYTES)


class Reducer:
    """Averages the gradients of parameters over ranks, in flattened buckets of one type.

    Correct for a trained set that changes at any step, where DistributedDataParallel wrapped once is not: made anew for
    each set, only the trained parameters' bytes go over the wire. A bucket is sent once the backward pass has all of
    its gradients, in the same order on every rank, as all of them train the same parameters (see `agree`); how many
    before the pass ends is each rank's own affair, so that no rank may ask for anything else between `begin` and
    `finish`. In a single process it does nothing.

    A GPU is asked for the whole pass long before it has done it, and so for its buckets: what has to be waited for, its
    stream waits for, not this process.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], bucket_bytes: int = BUCKET_BYTES):
        """parameters: in the order in which the forward pass uses them, as far as it is known: those that come last are
        sent first."""
        self.ranks = world()[1]
        self.buckets = list(_buckets(reversed(parameters), bucket_bytes)) if self.ranks > 1 else []
        self.lacking: list[int] = []
        """Gradients that each bucket waits for; empty: the backward pass is not an update's last one."""
        self.sent = 0
        self.on_their_way: deque[tuple[list[torch.Tensor], torch.Tensor, dist.Work]] = deque()
        self.waits: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        """Of the GPU's stream for buckets, since `begin`: from, to."""
        self.hooks = [
            parameter.register_post_accumulate_grad_hook(partial(self._there, number))
            for number, bucket in enumerate(self.buckets)
            for parameter in bucket
        ]

    def begin(self) -> None:
        """The next backward pass is the last one before `finish`."""
        self.lacking, self.sent, self.waits = [len(bucket) for bucket in self.buckets], 0, []

    def flush(self) -> None:
        """The backward pass is over: send what is not sent yet, as far as there is room without a wait for others."""
        while self.sent < len(self.buckets) and self._has_room():
            self._send()

    @property
    def waited_s(self) -> float:
        """What the GPU's stream has waited for other ranks since `begin`; it has to have come so far."""
        return sum(begun.elapsed_time(ended) for begun, ended in self.waits) / 1e3

    def finish(self) -> None:
        """Send what is not sent yet, and wait for all: every gradient that exists is the mean over ranks then."""
        while self.sent < len(self.buckets):
            while not self._fits():
                self._take()
            self._send()
        while self.on_their_way:
            self._take()
        self.lacking, self.sent = [], 0

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def _there(self, number: int, parameter: nn.Parameter) -> None:
        if not self.lacking:
            return
        self.lacking[number] -= 1
        while self.sent < len(self.buckets) and self.lacking[self.sent] == 0 and self._has_room():
            self._send()

    def _has_room(self) -> bool:
        """Never waits: how long this rank computes must not depend on the others (see `agree.pace`)."""
        while self.on_their_way and self._is_due():
            self._take()
        return self._fits()

    def _is_due(self) -> bool:
        """Whether to take the oldest. That a GPU has done it is seen too late for the ones after it."""
        _, flat, work = self.on_their_way[0]
        return not self._fits() if in_stream(flat) else work.is_completed()

    def _fits(self) -> bool:
        under_way = sum(flat.nbytes for _, flat, _ in self.on_their_way)
        return not under_way or under_way + sum(p.nbytes for p in self.buckets[self.sent]) <= UNDER_WAY_BYTES

    def _send(self) -> None:
        gradients = [p.grad for p in self.buckets[self.sent] if p.grad is not None]
        self.sent += 1
        if gradients:
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            self.on_their_way.append((gradients, flat, dist.all_reduce(flat, async_op=True)))

    def _take(self) -> None:
        gradients, flat, work = self.on_their_way.popleft()
        with self._timed(flat):
            work.wait()
        flat.div_(self.ranks)
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    @contextmanager
    def _timed(self, flat: torch.Tensor) -> Iterator[None]:
        """Keep what a GPU's stream waits inside."""
        if not flat.is_cuda:
            yield
            return
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        yield
        ended.record()
        self.waits.append((begun, ended))


def in_stream(flat: torch.Tensor) -> bool:
    """Whether to wait for a bucket is its device's affair, and returns at once: as NCCL's `Work.wait` does."""
    return flat.is_cuda


def _buckets(parameters: Iterable[nn.Parameter], limit_bytes: int) -> Iterator[list[nn.Parameter]]:
    """Runs of parameters of one type, each within the limit (or one parameter)."""
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        if bucket and (size + parameter.nbytes > limit_bytes or parameter.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += parameter.nbytes
    if bucket:
        yield bucket
