"""When it is worth a line that nothing has been heard of workers which train."""

from dataclasses import dataclass

QUIET_S = 600.0
"""Seconds of silence that are worth a line, unless there was one of half as long before: an evaluation, a slow disk."""


@dataclass
class Silence:
    """Of one group of workers, since its first step."""

    heard_s: float
    """When something was heard last, on a clock of the caller's."""
    longest_s: float = 0.0
    """The longest silence that ended."""
    told_s: float = 0.0
    """How long this one was when it was told."""

    def heard(self, now_s: float) -> None:
        self.longest_s = max(self.longest_s, now_s - self.heard_s)
        self.heard_s, self.told_s = now_s, 0.0

    def to_tell(self, now_s: float) -> float | None:
        """Its seconds where they are worth a line now: then each time that they have doubled."""
        silent_s = now_s - self.heard_s
        if silent_s < max(QUIET_S, 2 * self.longest_s, 2 * self.told_s):
            return None
        self.told_s = silent_s
        return silent_s


def line(silent_s: float, step: int) -> str:
    """What is said after so many seconds. step: the last one that was heard of."""
    import ray

    free, there = (of.get("CPU", 0.0) for of in (ray.available_resources(), ray.cluster_resources()))
    return (
        f"no word from the workers for {silent_s / 60:.0f} min, since step {step}: they may wait for storage, for one "
        f"another, or for a CPU that clips are read with (of Ray's {there:g} CPUs {free:g} are free)"
    )
