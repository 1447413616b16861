"""Seconds from a command to its first step, by part: what a person waits for before anything is learnt."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import psutil

Mark = tuple[str, float]
"""A part of the start-up, and the time (s since the epoch) at which it was over."""


@dataclass
class Startup:
    """The parts that are over, in their order; the driver's come first, then rank 0's, by its own machine's clock."""

    begun: float = field(default_factory=time.time)
    marks: list[Mark] = field(default_factory=list)

    @classmethod
    def of_process(cls) -> "Startup":
        """From the start of this process on, so that imports count."""
        return cls(psutil.Process().create_time())

    def over(self, part: str) -> None:
        """A part ends now."""
        self.marks.append((part, time.time()))


def beside(work: Callable[[], Any]) -> threading.Thread:
    """Do in a thread what is done anyway, and sooner by then: who needs it meanwhile waits for the rest of it, and who
    comes after one that failed tells of it."""

    def doing() -> None:
        with suppress(Exception):
            work()

    thread = threading.Thread(target=doing, name="beside", daemon=True)
    thread.start()
    return thread


def seconds(begun: float, marks: Sequence[Mark], waited_s: float) -> dict[str, float]:
    """Seconds of each part, and their `total`. waited_s: for the batch of the first step, which is told apart from its
    computing."""
    out, before = {}, begun
    for part, at in marks:
        out[part] = max(at - before, 0.0)  # clocks of two machines differ
        before = max(at, before)
    batch = min(waited_s, out["first_step"])
    out |= {"first_batch": batch, "first_step": out["first_step"] - batch}
    return {part: round(s, 3) for part, s in (out | {"total": sum(out.values())}).items()}


def line(parts: Mapping[str, float]) -> str:
    """One line for the terminal, the longest parts first."""
    longest = sorted((item for item in parts.items() if item[0] != "total"), key=lambda item: -item[1])
    named = ", ".join(f"{part.replace('_', ' ')} {s:.1f}" for part, s in longest if s >= 0.05)
    return f"First step after {parts['total']:.1f} s ({named})."
