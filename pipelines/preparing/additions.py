"""What a finished dataset has of the inputs already: new videos are added in new shards, old shards never change."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.progress import track

from entprog import config, files
from entprog.config import Preparation
from entprog.data import shards
from entprog.data.shards import Dataset
from entprog.errors import UserError
from entprog.media.video import VideoError
from entprog.names import counted
from entprog.preparing import again, ledger, probing
from entprog.preparing.rows import Line, Source
from entprog.storage import Where
from pipelines import terminal
from pipelines.preparing import packing

NEXT_LEDGER = "ledger.next.parquet"


@dataclass(frozen=True)
class Before:
    """What a finished run has left."""

    dataset: Dataset
    lines: list[Line]
    """Rows of the dataset's ledger."""

    def inputs(self) -> dict[str, Line]:
        """The ledger's line of each input."""
        return {line["file"]: line for line in self.lines if line["kind"] == "input"}

    def splits(self) -> dict[str, str]:
        """Split of each source that clips were kept of."""
        return {file: line["split"] for file, line in self.inputs().items() if line["kept"]}


def read(output: Where) -> Before | None:
    """A finished dataset in the output folder, or None. Raises UserError if it is damaged."""
    if not (output / "dataset.json").exists():
        return None
    dataset = shards.read_dataset(output)
    return Before(dataset, ledger.read(output / (NEXT_LEDGER if _is_due(output, dataset) else "ledger.parquet")))


def mend(output: Where, before: Before | None) -> None:
    """End what a kill between the two renames of `finish` has left undone."""
    coming = output / NEXT_LEDGER
    if before is not None and _is_due(output, before.dataset):
        coming.replace(output / "ledger.parquet")
    coming.unlink(missing_ok=True)


def _is_due(output: Where, dataset: Dataset) -> bool:
    """Whether the next ledger is the one that belongs to dataset.json."""
    coming = output / NEXT_LEDGER
    return coming.exists() and files.sha256(coming) == dataset.settings.get("ledger")


def finish(
    output: Where,
    settings: Preparation,
    lines: Sequence[Line],
    written,
    points: int,
    masks: bool,
    made_by: Sequence[str],
) -> Dataset:
    """Write ledger and dataset.json so that they belong together after a kill at any moment. masks: whether clips have
    any; made_by: where poses come from (`packing.made_by`)."""
    coming = output / NEXT_LEDGER
    ledger.write(coming, lines)
    prepared = {"prepare": settings.prepare.model_dump(mode="json"), "ledger": files.sha256(coming)}
    prepared |= {"poses": list(made_by)}
    dataset = shards.write_dataset(output, settings.data.shape, written, prepared, points, masks)
    coming.replace(output / "ledger.parquet")
    return dataset


def check_settings(before: Before, output: Where, settings: Preparation, held: set[str]) -> None:
    """Raises UserError if the dataset was prepared with settings that give other clips, or another split.

    `held`: sources that --held-out names; new ones among them are no change.
    """
    theirs = {
        "data": {"shape": before.dataset.shape.model_dump(mode="json")},
        "prepare": dict(before.dataset.settings.get("prepare", {})),
    }
    mine = settings.model_dump(mode="json")
    splits, lines = before.splits(), before.inputs()
    content = {lines[file]["sha256"] for file in held & splits.keys()}  # what is held out with the named ones
    also = {file for file in splits if lines[file]["sha256"] in content}
    if mine["prepare"]["held_out"] and {file for file in splits if splits[file] == "held_out"} == also:
        theirs["prepare"]["held_out"] = mine["prepare"]["held_out"]
    for name in packing.JOB_SETTINGS:
        theirs["prepare"][name] = mine["prepare"][name]
    if theirs != mine:
        refuse(output, theirs, mine)


def refuse(output: Where, theirs: dict[str, Any], mine: dict[str, Any]) -> None:
    """Raises UserError naming the first setting that differs."""
    theirs, mine = config.flat(theirs), config.flat(mine)
    name = next(name for name in {**mine, **theirs} if theirs.get(name) != mine.get(name))
    message = f"{name} was {theirs.get(name)}, now {mine.get(name)}"
    raise UserError(f"{output} was prepared with other settings ({message}): choose another --output, or delete it")


def to_do(before: Before, sources: Sequence[Source], output: Where, settings: Preparation) -> list[Source]:
    """Sources that the dataset does not have: new ones, and of those of which it has no clip the changed ones and those
    that another try may take (`again`).

    A file whose time stamp alone is another is read to see whether it has changed. Prints what it found.
    Raises UserError for changed sources that clips were kept of: these lie in shards, which never change.
    """
    lines = before.inputs()
    new = [row for row in sources if row["file"] not in lines]
    other = [row for row in sources if row["file"] in lines and not _as_listed(row, lines[row["file"]])]
    looks = track(other, "files touched since", console=terminal.console, disable=len(other) < 100, transient=True)
    what = {row["file"]: _change(row, lines[row["file"]], settings) for row in looks}
    changed = [row for row in other if what[row["file"]]]
    kept = {row["file"]: what[row["file"]] for row in changed if lines[row["file"]]["kept"]}
    if kept:
        news = [f"the {name} of {counted(count, 'input')}" for name, count in Counter(kept.values()).items()]
        raise UserError(
            f"{output} holds clips, which never change, of inputs that have changed: {', '.join(news)} "
            f"({', '.join([*kept][:3])}): restore that, give these inputs other names, or choose another --output"
        )
    then = again.limits(before.dataset.settings.get("prepare", {}))
    passed = [
        row
        for row in sources
        if row["file"] in lines and again.may_mend(row, lines[row["file"]], then, settings.prepare)
    ]
    once_more = {row["file"]: row for row in [*changed, *passed]}
    gone = lines.keys() - {row["file"] for row in sources}
    clips = sum(line["kept"] for line in before.lines if line["kind"] == "clip" and line["file"] in gone)
    if gone:
        terminal.console.print(
            f"{counted(len(gone), 'input')} of before not there any more ({', '.join(sorted(gone)[:3])}): "
            f"{counted(clips, 'clip')} of them in the dataset",
        )
    asked = {row["file"]: row["split"] for row in sources if row["split"]}
    moved = [file for file, name in before.splits().items() if asked.get(file, name) != name]
    if moved:
        raise UserError(
            f"the manifest asks for another split of {len(moved)} sources that are prepared already "
            f"({', '.join(sorted(moved)[:3])}): choose another --output"
        )
    if once_more:
        terminal.console.print(f"tried again: {counted(len(once_more), 'input')} that gave no clip before")
    return [*new, *once_more.values()]


def _as_listed(row: Source, line: Line) -> bool:
    """Whether a source looks as it did. Ledgers of earlier versions do not say where one lay that has no stamp."""
    now, then = ledger.stamp(row), line["stamp"]
    return now == then or (not row["stamp"] and then.startswith(" ") and now.endswith(then))


def _change(row: Source, line: Line, settings: Preparation) -> str:
    """What of a source is not as it was, in words; empty: nothing is."""
    then = line["stamp"].rpartition(" ")[2]
    if then != ledger.stamp(row).rpartition(" ")[2]:  # of all that belongs to it, which is known by a hash
        without = {"caption": {"caption": ""}, "poses": {"poses": b""}, "mask": {"mask": b""}}
        added = (name for name, less in without.items() if ledger.stamp({**row, **less}).rpartition(" ")[2] == then)
        return next(added, "caption, poses, mask, crop or rate")
    try:
        return "" if probing.content_sha256(row, settings) == line["sha256"] else "content"
    except (VideoError, OSError):  # gone, or not to be read: the stages will say so
        return "content"
