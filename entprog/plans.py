"""Plans: what a stage trains, and how gradient crosses the rest (Ent-Prog §3.3, eq. of ψ_k)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from entprog.blocks import Backward
from entprog.config import ClipShape, Schedule


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one stage trains."""

    trainable: tuple[str, ...]
    """Names of the trained blocks, in the network's order."""
    backward: Backward
    """How gradient crosses the frozen blocks."""
    shape: ClipShape
    """Shape of the clips it trains on."""

    @property
    def m(self) -> int:
        """Number of trained blocks."""
        return len(self.trainable)

    def as_json(self) -> dict:
        """Plain values; `from_json` takes them back."""
        return {"trainable": list(self.trainable), "backward": self.backward, "shape": self.shape.model_dump()}

    @staticmethod
    def from_json(values: Mapping) -> "Plan":
        return Plan(
            trainable=tuple(values["trainable"]), backward=values["backward"], shape=ClipShape(**values["shape"])
        )


def full(names: Sequence[str], shape: ClipShape) -> Plan:
    """Plain training: every block, the exact gradient."""
    return Plan(trainable=tuple(names), backward="exact", shape=shape)


def top(m: int, names: Sequence[str], priority: Mapping[str, float], schedule: Schedule, shape: ClipShape) -> Plan:
    """ψ_k = argmax over |ψ| = m of Σ_{b ∈ ψ} π_b: the m blocks of highest priority; ties go to the earlier block."""
    ranked = sorted(names, key=lambda name: -priority[name])[:m]
    if len(ranked) == len(names):
        return full(names, shape)
    return Plan(trainable=tuple(n for n in names if n in set(ranked)), backward=schedule.backward, shape=shape)


def count(fraction: float, of: int) -> int:
    """A fraction of the blocks, at least one."""
    return max(1, round(fraction * of))


def candidates(
    names: Sequence[str],
    priority: Mapping[str, float],
    schedule: Schedule,
    shape: ClipShape,
    stage: int,
    now: Plan | None = None,
) -> list[Plan]:
    """What stage `stage` (0-based) may choose from: nested top-m sets, smallest first, each once.

    A block below `cei_threshold` is left out until the last stage (if none is above, the highest stays in).
    `monotone` keeps only sets no smaller than `now`. A schedule other than entprog leaves one plan.
    """
    last = stage == schedule.stages - 1
    if schedule.kind == "full":
        return [full(names, shape)]
    if schedule.kind == "linear":
        return [top(count((stage + 1) / schedule.stages, len(names)), names, priority, schedule, shape)]
    eligible = len(names)
    if schedule.cei_threshold is not None and not last:
        eligible = max(1, sum(priority[name] >= schedule.cei_threshold for name in names))
    sizes = sorted({min(count(fraction, len(names)), eligible) for fraction in schedule.candidates})
    if schedule.monotone and now is not None:
        sizes = [m for m in sizes if m >= now.m] or [now.m]
    return [top(m, names, priority, schedule, shape) for m in sizes]
