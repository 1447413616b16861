"""Which runs may be compared, and which are one thing tried with several seeds."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from entprog import config
from entprog.config import close_to
from entprog.errors import UserError
from entprog.quality import card
from pipelines.comparison.runs import SHORTEST_ID, Training
from pipelines.tracking import ways
from pipelines.tracking.ways import DEFAULTS, text

SEEDS = ("train.seed", "priority.seed")
INCIDENTAL = (
    *config.FREE, *config.PATHS, "name", "data.shards", "train.samples", "train.checkpoint_every",
)  # fmt: skip
"""Settings that do not touch what is learned, or that a tag holds by their content."""
UNKNOWN = "not recorded"
LABEL = 48
"""Longest label that is made of settings, in characters."""


def _held_out(run: Training) -> str:
    settings = {**DEFAULTS, **run.settings}
    clips, draws, seed = (settings[f"data.held_out_{name}"] for name in ("clips", "draws", "seed"))
    return run.tags.get("entprog.held_out", f"{clips} clips × {draws} draws of seed {seed}")


def _ran(run: Training) -> str:
    """All the numbers of workers that it had, and all the ways in which it ran, one after another, which tags hold;
    of an earlier version's the last one."""
    workers = run.tags.get("entprog.workers") or text({**DEFAULTS, **run.settings}["train.workers"])
    way = run.tags.get("entprog.way") or ways.way(run.settings)
    said = [f"train.workers {workers}"] * (workers != "1") + [way] * (way != ways.PLAIN)
    return ", ".join(said) or "one worker"


FIELDS: dict[str, Callable[[Training], str]] = {
    "data": lambda run: run.tags.get("entprog.data", UNKNOWN),
    "held-out set": _held_out,
    "base": lambda run: run.tags.get("entprog.base", UNKNOWN),
    "device": lambda run: run.tags.get("entprog.device", UNKNOWN),
    "way of running": _ran,
    "latents": lambda run: run.tags.get("entprog.latents", UNKNOWN),
}
"""What runs must have in common to be compared."""


@dataclass(frozen=True)
class Difference:
    """Why two runs are unlike."""

    field: str
    a: str
    b: str
    run_a: str
    run_b: str

    def __str__(self) -> str:
        return f"{self.field} differs: {self.a} in {self.run_a}, {self.b} in {self.run_b}"


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs that differ in nothing but their seed."""

    label: str
    settings: dict[str, Any]
    """The settings in which the groups differ."""
    runs: tuple[Training, ...]

    @property
    def is_named(self) -> bool:
        """Whether its label is a mere name, which does not say its settings."""
        return not any(all(text(value, digits) in self.label for value in self.settings.values()) for digits in (3, 6))

    @property
    def counted(self) -> tuple[Training, ...]:
        """The runs whose figures count."""
        return tuple(run for run in self.runs if run.counts)

    @property
    def typical(self) -> Training | None:
        """The run of median final loss, which stands for the group in pictures; None where no run counts."""
        ranked = sorted(self.counted, key=lambda run: run.curve[-1].loss)
        return ranked[(len(ranked) - 1) // 2] if ranked else None


def differences(trainings: Sequence[Training], cards: Mapping[str, Mapping[str, Any]]) -> list[Difference]:
    """The fields in which runs are unlike, each with the first pair of runs that shows it.

    cards: {run id: {metric: protocol card}}.
    """
    found = []
    for field, of in FIELDS.items():
        # Without a held-out loss there is nothing to compare; and what failed early says nothing yet of its device.
        known = [run for run in trainings if run.curve and (run.counts or of(run) != UNKNOWN)]
        other = next((run for run in known[1:] if of(run) != of(known[0])), None)
        if other is not None:
            found.append(Difference(field, of(known[0]), of(other), known[0].title, other.title))
    return found + _unlike_cards(trainings, cards)


def _unlike_cards(trainings: Sequence[Training], cards: Mapping[str, Mapping[str, Any]]) -> list[Difference]:
    found = []
    measured = [run for run in trainings if cards.get(run.run_id)]
    for metric in dict.fromkeys(metric for run in measured for metric in cards[run.run_id]):
        having = [run for run in measured if metric in cards[run.run_id]]
        first = cards[having[0].run_id][metric]
        for run in having[1:]:
            other = cards[run.run_id][metric]
            name = card.unlike(first, other)
            if name is not None:
                values = (text(one.get(name)) for one in (first, other))
                found.append(Difference(f"metric card of {metric}, {name},", *values, having[0].title, run.title))
                break
    return found


def grouped(
    trainings: Sequence[Training], baseline: str | None = None, unlike: Sequence[Difference] = ()
) -> list[Group]:
    """Groups of runs that differ only in their seed; the baseline first, the others as they were begun.

    baseline: a group's label, or a run's name or id (`SHORTEST_ID` characters of it, or more), sought in this order.
    None: plain training of all weights if there is any with a held-out loss, else the oldest group that has one.
    unlike: differences that are compared by force; they set groups apart too.
    Raises UserError if no group answers to `baseline`, or several do.
    """
    apart = {field: of for field, of in FIELDS.items() if field in {difference.field for difference in unlike}}
    settings = [{**DEFAULTS, **run.settings, **{f: of(run) for f, of in apart.items()}} for run in trainings]
    names = [n for n in dict.fromkeys(n for s in settings for n in s) if not _ignored(n)]
    differing = [n for n in names if len({_key(s.get(n)) for s in settings}) > 1]
    members: dict[tuple, list[int]] = {}
    for place, values in enumerate(settings):
        members.setdefault(tuple(_key(values.get(n)) for n in differing), []).append(place)
    parts = [
        ({n: settings[places[0]].get(n) for n in differing}, tuple(trainings[p] for p in places))
        for places in members.values()
    ]
    labels = _labels(parts)
    groups = [Group(label=label, settings=s, runs=runs) for label, (s, runs) in zip(labels, parts, strict=True)]
    first = _baseline(groups, baseline)
    return [first, *(group for group in groups if group is not first)]


def _baseline(groups: Sequence[Group], wanted: str | None) -> Group:
    if wanted is None:
        measured = [group for group in groups if any(run.curve for run in group.runs)] or list(groups)
        plain = (group for group in measured if _is_plain(group.runs[0].settings))
        return next(plain, measured[0])
    ways: tuple[Callable[[Group], bool], ...] = (
        lambda group: group.label == wanted,
        lambda group: any(run.name == wanted for run in group.runs),
        lambda group: len(wanted) >= SHORTEST_ID and any(run.run_id.startswith(wanted) for run in group.runs),
    )
    for fits in ways:
        fitting = [group for group in groups if fits(group)]
        if len(fitting) > 1:
            labels = ", ".join(repr(group.label) for group in fitting)
            raise UserError(
                f"{wanted!r} to be the baseline fits runs of several groups: give one of their labels, {labels}"
            )
        if fitting:
            return fitting[0]
    known = [group.label for group in groups] + [run.name for group in groups for run in group.runs]
    raise UserError(
        f"no run or group {wanted!r} to be the baseline{close_to(wanted, known)}; there are: "
        f"{', '.join(dict.fromkeys(known))}"
    )


def _is_plain(settings: Mapping[str, Any]) -> bool:
    """Whether all blocks are trained all the time, and their own weights."""
    low_rank = any(config.is_part_of(name, ["train.lora"]) and value is not None for name, value in settings.items())
    return settings.get("schedule.kind") == "full" and not low_rank


def _labels(parts: Sequence[tuple[dict[str, Any], tuple[Training, ...]]]) -> list[str]:
    """A short name a group, no two alike: the settings that differ, else the runs' own name, else a number."""
    names = list(parts[0][0])
    words = all(isinstance(s[n], str) for s, _ in parts for n in names)
    leaves = [name.rsplit(".", 1)[-1] for name in names]
    shown = [leaf if leaves.count(leaf) == 1 else name for name, leaf in zip(names, leaves, strict=True)]
    if len(names) == 1 and words:
        labels = [str(s[names[0]]) for s, _ in parts]
    else:
        pairs = list(zip(shown, names, strict=True))
        for digits in (3, 6):  # no more than it takes to tell them apart
            labels = [", ".join(f"{n} {text(s[name], digits)}" for n, name in pairs) for s, _ in parts]
            if len(set(labels)) == len(labels):
                break
    own = [{run.name for run in runs} for _, runs in parts]
    for i, (label, mine) in enumerate(zip(labels, own, strict=True)):
        if not label or len(label) > LABEL:
            (name, *more) = sorted(mine)
            alone = not more and all(name not in other for j, other in enumerate(own) if j != i)
            labels[i] = name if alone else f"group {i + 1}" if names else "all runs"
    return labels


def _ignored(name: str) -> bool:
    return name in SEEDS or config.is_part_of(name, INCIDENTAL)


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
