"""Where a run's seconds went beside computing, and what to do: waiting, encoding, copying, the object store."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import ceil
from typing import Any

from pipelines.cluster import joining
from pipelines.cluster.ray_internals import Store, object_store

WORTH_TELLING = 0.1
"""Share of the time from which something is done about it."""
LOOK_EVERY_S = 30.0
"""Between two looks at Ray's object store: the driver's, never a worker's."""
NEARLY_FULL = 0.9


@dataclass(frozen=True)
class Stalls:
    """Seconds of a run's steps, slowest rank."""

    wait_s: float
    """Waiting for clips, streams being started not included."""
    open_s: float
    """Starting streams."""
    encode_s: float
    """Encoding clips to latents."""
    copy_s: float
    """Copying to the device: most of it while the step before was computed, so no part of `total_s`."""
    compute_s: float
    """Updates."""

    @property
    def total_s(self) -> float:
        return max(self.wait_s + self.open_s + self.encode_s + self.compute_s, 1e-9)

    def share(self, seconds: float) -> float:
        return seconds / self.total_s


def of(steps: Sequence[Mapping[str, Any]]) -> Stalls:
    """What the lines of steps.jsonl say."""
    wait_s, open_s, encode_s, copy_s, compute_s = (
        float(sum(step.get(name, 0.0) for step in steps))
        for name in ("wait_s", "open_s", "encode_s", "copy_s", "seconds")
    )
    return Stalls(max(wait_s - open_s - encode_s, 0.0), open_s, encode_s, copy_s, compute_s)


def advice(stalls: Stalls, decode_cpus: float, workers: int, vae: bool, caching: str) -> list[str]:
    """What a person should do, a sentence each; [] where computing is what takes the time.

    decode_cpus: of each worker. vae: whether the network works on latents: where it does and no second went into
    encoding all of them were cached, and nothing was decoded. caching: the command that encodes clips once.
    """
    encodes = vae and stalls.encode_s > 0
    out, cache = [], f"`{caching}` encodes all clips once"
    running_s = max(stalls.total_s - stalls.open_s, 1e-9)
    waiting = stalls.wait_s / running_s
    if waiting >= WORTH_TELLING and vae and not encodes:
        out.append(
            f"reading-bound: waiting {waiting:.0%} of the time for cached latents: keep the shards, where they lie, on "
            "faster storage (a disk of the machine that trains)"
        )
    elif waiting >= WORTH_TELLING:
        # Decoding took all of the time, and may take only what is not waited: so many more hands are needed.
        more = max(decode_cpus * stalls.wait_s / max(running_s - stalls.wait_s, 1e-9), 0.0)
        message = f"decode-bound: waiting {waiting:.0%} of the time: give decoding about {ceil(more)} more CPUs"
        each = " per worker" if workers > 1 else ""
        message += (
            f"{each} (data.decode_cpus={ceil(decode_cpus + more)}; nodes without GPUs decode where there are any)"
        )
        out.append(message + (f", or cache latents: {cache}" if encodes else ""))
    if encodes and stalls.share(stalls.encode_s) >= WORTH_TELLING:
        out.append(f"encode-bound: {stalls.share(stalls.encode_s):.0%} of the time in the VAE: {cache}")
    if waiting >= WORTH_TELLING and stalls.copy_s > stalls.compute_s:
        out.append(
            "copy-bound: copying clips to the device takes longer than computing on them: smaller clips or batches"
        )
    return out


# ---- the object store ----


class Watch:
    """What has been seen of the object store while somebody watched."""

    def __init__(self, warn: Callable[[str], None]):
        self.warn = warn
        self.first: Store | None = None
        self.peak_used_share: float | None = None
        self.spilled_bytes: int | None = None
        """None until the store was seen."""
        self.reported: set[str] = set()

    def see(self, store: Store) -> None:
        self.first = self.first or store
        used_share = store.used / max(store.capacity, 1)
        self.peak_used_share = max(self.peak_used_share or 0.0, used_share)
        self.spilled_bytes = store.spilled - self.first.spilled
        setting = "ray start --object-store-memory BYTES" if joining.address() else "ENTPROG_OBJECT_STORE_BYTES"
        remedy = f"give Ray a larger object store ({setting}), or use smaller batches"
        if self.spilled_bytes:
            message = f"Ray has spilled {self.spilled_bytes / 1e9:.2g} GB to disk, which slows the stream"
            self._once("spill", f"{message}: {remedy}")
        elif used_share >= NEARLY_FULL:
            message = f"Ray's object store ({store.capacity / 1e9:.2g} GB) is {used_share:.0%} full, about to spill"
            self._once("full", f"{message}: {remedy}")

    def _once(self, what: str, line: str) -> None:
        if what not in self.reported:
            self.reported.add(what)
            self.warn(line)

    def figures(self) -> dict[str, float | None]:
        """None for what could not be measured."""
        peak = self.peak_used_share
        return {
            "object_store_peak_share": peak if peak is None else round(peak, 4),
            "spilled_bytes": self.spilled_bytes,
        }


@contextmanager
def watched(warn: Callable[[str], None], every_s: float = LOOK_EVERY_S) -> Iterator[Watch]:
    """Look at the connected Ray's object store from a thread, now and then and once at the end; `warn` gets lines."""
    watch, over = Watch(warn), threading.Event()

    def see() -> None:
        with suppress(Exception):  # a cluster that does not answer is not what is looked for here
            watch.see(object_store())

    def work() -> None:
        see()
        while not over.wait(every_s):
            see()

    thread = threading.Thread(target=work, name="object-store", daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        over.set()
        thread.join(timeout=5)
        see()
