"""Parts (one source's clips each) → shards: which clip goes into which split and shard, and writing them."""

import contextlib
import hashlib
import itertools
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from entprog import config, files, names, storage
from entprog.config import ClipShape, Preparation
from entprog.data import shards
from entprog.data.shards import ShardInfo
from entprog.errors import UserError
from entprog.media import wholebody
from entprog.preparing import again, cutting, ledger
from entprog.preparing.rows import Line, Source
from entprog.storage import Place, Where

Row = dict[str, Any]

SLOWER = 0.95
"""Share of the clips' frame rate below which a source is slower: 23.976 is 24, 15 is not 16."""
JOB_SETTINGS = ("hosts", "max_decoded_bytes", "max_rejected", "max_work_s", "stall_s", "track_gpus")
"""Settings of the job, that no clip depends on; where a verdict on a source does, it is tried again (`again`)."""
OF_PARTS = re.compile(r"[0-9a-f]{16}\.(json|parquet|\w+\.tried)|(train|held_out)-\d{5,}\.parquet\.done|\..*\.tmp")
"""Names of what preparing writes into the folder of parts."""
SPLIT_SETTINGS = ("held_out", "held_out_ratio", "seed", "clips_per_shard")
"""Settings that decide where clips go, not what they are: finished parts do not depend on them."""


def cut_settings(settings: Preparation) -> Row:
    """Settings that clips depend on."""
    others = dict.fromkeys((*SPLIT_SETTINGS, *JOB_SETTINGS))
    cut = settings.model_copy(update={"prepare": settings.prepare.model_copy(update=others)})
    return cut.model_dump(mode="json", warnings=False)


def identity(settings: Preparation) -> Row:
    """What an output belongs to: the settings that its clips depend on."""
    return config.flat(cut_settings(settings))


def identity_of(dataset: shards.Dataset) -> Row:
    """The same of a finished dataset, as far as it says what it was prepared with."""
    shape = {"data": {"shape": dataset.shape.model_dump()}}
    try:
        return identity(config.build({**shape, "prepare": dataset.settings.get("prepare", {})}, Preparation))
    except UserError:
        return config.flat(shape)


def part_keys(rows: Iterable[Source], settings: Preparation) -> dict[str, str]:
    """Name of each source's part: changes with the source and with every setting that its clips depend on."""
    points = [wholebody.POINTS] if settings.prepare.pose == "rtmlib" else []  # once its parts had 33
    same = config.digest(cut_settings(settings), shards.FORMAT, cutting.READING, *points)
    return {row["file"]: config.digest(row["file"], ledger.stamp(row), same) for row in rows}


def read_part(parts: Where, key: str) -> Row | None:
    """A finished part's record, or None if it is not there as it was written. Raises `UnreachableError` where a
    bucket does not answer."""
    try:
        record = json.loads((parts / f"{key}.json").read_text())
        if record["clips"] and not _is_whole(parts / f"{key}.parquet", record["sha256"]):
            return None
    except (OSError, ValueError, KeyError) as error:
        storage.answered(parts / f"{key}.json", error)
        return None
    return record


def read_parts(parts: Where, keys: Iterable[str]) -> list[Row | None]:
    """`read_part` of each."""
    with shards.at_once(parts) as apply:
        return [*apply(partial(read_part, parts), keys)]


def finished(parts: Where, rows: Sequence[Source], keys: Mapping[str, str], settings: Preparation) -> dict[str, Row]:
    """Records of the sources that need not be done again: their parts are there, and no other verdict is to be hoped
    for (`again`)."""
    found = zip(rows, read_parts(parts, [keys[row["file"]] for row in rows]), strict=True)
    return {row["file"]: record for row, record in found if record is not None and _is_final(row, record, settings)}


def _is_final(row: Source, record: Row, settings: Preparation) -> bool:
    return not again.may_mend(row, record["ledger"][0], record.get("limits", {}), settings.prepare)


def _is_whole(path: Where, sha256: str) -> bool:
    """Whether a file is as it was written; one in a bucket is, or is not there."""
    return path.exists() if isinstance(path, Place) else files.sha256(path) == sha256


def split(
    kept: Sequence[str],
    named: set[str],
    ratio: float,
    seed: int,
    asked: Mapping[str, str] | None = None,
    before: Mapping[str, str] | None = None,
    content: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Each kept source's split: {file: 'train' or 'held_out'}.

    `before`: sources that have theirs already, and keep it. `asked`: what a manifest asks for, which counts before all
    else. Of the rest the named ones are held out, or else those whose seeded hash is smallest, until `ratio` of all
    sources are: at least one where there are two, never all. Sources of one `content` (its hash, where it is known) go
    together, unless a manifest asks otherwise.
    Raises UserError if that leaves nothing to train on, or if a named source was not kept.
    """
    asked, before, content = asked or {}, before or {}, content or {}
    everything = {*kept, *before}
    if named and not everything & named:
        raise UserError(f"no clip was kept of any held-out source ({', '.join(sorted(named)[:3])}): name another")
    alike = defaultdict(set)
    for file in everything:
        alike[content.get(file) or file].add(file)
    held, free = set(), []
    for group in alike.values():
        side = _side(group, before, asked, dict.fromkeys(named, "held_out"))
        held |= {file for file in group if (before.get(file) or asked.get(file) or side) == "held_out"}
        if side is None:
            free.append(group)
    if not named and ratio > 0 and len(everything) > 1:
        wanted = min(len(everything) - 1, max(1, round(ratio * len(everything))))
        for group in sorted(free, key=lambda group: _hash(seed, min(group))):
            if len(held) < wanted and held | group != everything:
                held |= group
    if held == everything:
        if len(alike) == 1:
            raise UserError(
                f"{min(held)} is the only usable source, and cannot be both held out and trained on: give another one "
                "too, or leave out --held-out"
            )
        raise UserError(
            f"all {len(held)} usable sources are held out: hold out fewer, so that some are left to train on"
        )
    return {file: "held_out" if file in held else "train" for file in kept}


def _side(group: set[str], *wishes: Mapping[str, str]) -> str | None:
    """The split of sources of one content, by the first of the wishes that says anything of one of them."""
    for wish in wishes:
        found = {wish[file] for file in group if file in wish}
        if found:
            return "held_out" if found == {"held_out"} else "train"
    return None


def with_twins(lines: Sequence[Line], before: Sequence[Line] = ()) -> list[Line]:
    """The ledger's lines, with a message for kept inputs whose content another kept input has too.

    `before`: lines of earlier runs, which are not given back.
    """
    of_content = defaultdict(list)
    for line in (*before, *lines):
        if line["kind"] == "input" and line["kept"]:
            of_content[line["sha256"]].append(line)
    out = []
    for line in lines:
        others = [other for other in of_content[line["sha256"]] if other["file"] != line["file"]]
        if line["kind"] == "input" and line["kept"] and others:
            message = f"the same content as {others[0]['file']}"
            if any(other["split"] != line["split"] for other in others):
                message += ", which is on the other side of the split"
            line = {**line, "message": message}
        out.append(line)
    return out


def _hash(seed: int, file: str) -> bytes:
    return hashlib.sha256(f"{seed} {file}".encode()).digest()


def shard_plans(
    rows: Sequence[Line],
    splits: Mapping[str, str],
    keys: Mapping[str, str],
    clips_per_shard: int,
    first: Mapping[str, int] | None = None,
    points: int = shards.POINTS,
    masks: bool = False,
) -> list[Row]:
    """Which clips go into which shard: {file, split, points, clips: [(clip, source, part key, row in the part)]}, with
    `masks` where there are any.

    Clips in order of source and time; a split's shards are as even as they can be, numbered from `first[split]` on.
    """
    of_split, counted = defaultdict(list), Counter()
    for row in (row for row in rows if row["kind"] == "clip" and row["kept"]):
        file = row["file"]
        of_split[splits[file]].append((row["clip"], file, keys[file], counted[file]))
        counted[file] += 1
    plans = []
    for name in shards.SPLITS:
        clips = of_split[name]
        pieces = math.ceil(len(clips) / clips_per_shard)
        edges = [round(i * len(clips) / pieces) for i in range(pieces + 1)] if pieces else []
        for i, (start, stop) in enumerate(itertools.pairwise(edges), (first or {}).get(name, 0)):
            plan = {"file": f"{name}/{i:05d}.parquet", "split": name, "points": points, "clips": clips[start:stop]}
            plans.append(plan | ({"masks": True} if masks else {}))
    return plans


def points_of(records: Iterable[Row | None]) -> int:
    """The most points that poses of some finished parts have."""
    return max((record.get("points", shards.POINTS) for record in records if record), default=shards.POINTS)


def without_parts(records: Iterable[Row | None], points: int) -> str:
    """How many clips of some finished parts lack what a dataset's poses of so many points have, in words; empty if none
    does."""
    clips = [(record["clips"], points_of([record]) < points) for record in records if record]
    bare = sum(count for count, lacks in clips if lacks)
    return f"{bare} of {sum(count for count, _ in clips)} clips have no face and hands" if bare else ""


def masked(records: Iterable[Row | None]) -> bool:
    """Whether clips of some finished parts have masks."""
    return any(record["clips"] and record.get("masks") for record in records if record)


def made_by(records: Iterable[Row | None], before: Iterable[str] = ()) -> list[str]:
    """Where the poses of some finished parts come from: estimators, files beside the videos."""
    return sorted({*before, *(record["poses"] for record in records if record and "poses" in record)})


def other_versions(records: Iterable[Row | None]) -> str | None:
    """In words that some finished parts were made with other versions than others; None: all with the same."""
    made_with = [record["versions"] for record in records if record and "versions" in record]
    found = {name: Counter(each.get(name, "none") for each in made_with) for name in cutting.READERS}
    differing = [
        f"{name} {', '.join(f'{version} ({videos} videos)' for version, videos in sorted(counted.items()))}"
        for name, counted in found.items()
        if len(counted) > 1
    ]
    if not differing:
        return None
    return (
        f"clips were cut with different versions: {'; '.join(differing)}: the same video may come out otherwise; give "
        "all nodes one image, and prepare into a new output"
    )


def slower(records: Iterable[Row | None], fps: float) -> str | None:
    """In words that some finished parts are of sources with clearly fewer frames a second than clips have; None: none
    is: of these frames come twice."""
    found = [record for record in records if record and 0 < record.get("source_fps", 0) < SLOWER * fps]
    if not found:
        return None
    least = min(found, key=lambda record: record["source_fps"])
    return (
        f"{names.counted(len(found), 'video')} with fewer frames a second than clips have, {fps:g} "
        f"({least['ledger'][0]['file']} {least['source_fps']:.4g}): frames come twice, and motion stutters; lower the "
        "clips' fps, or leave them out"
    )


def pack_all(
    ray, plans: Sequence[Row], output: Where, shape: ClipShape, before: Mapping[str, Sequence[ShardInfo]]
) -> dict[str, list[ShardInfo]]:
    """Write the planned shards; all of the dataset's by split. Those of `before` are left as they are."""
    listed = {plan["file"] for plan in plans} | {info.file for infos in before.values() for info in infos}
    for name in shards.SPLITS:
        for path in (output / name).glob("*.parquet"):
            file = f"{name}/{path.name}"
            mine = _receipt(output / "parts", file).exists()
            if mine and file not in listed:  # of an attempt with another split, killed before it was finished
                path.unlink()
            elif not mine and any(file == plan["file"] for plan in plans):
                raise UserError(f"{path} is in the way, and not of this job: move it elsewhere")
    written = {name: list(before.get(name, ())) for name in shards.SPLITS}
    if plans:
        rows = [{"plan": json.dumps(plan)} for plan in plans]
        packed = ray.data.from_items(rows, override_num_blocks=min(len(rows), 1000)).map(
            partial(pack, folder=output.resolve(), shape=shape)
        )
        for row in sorted(packed.iter_rows(), key=lambda row: (len(row["file"]), row["file"])):
            written[row.pop("split")].append(ShardInfo(**row))
    return written


def pack(row: Row, folder: Where, shape: ClipShape) -> Row:
    """Operator: write one shard out of parts, if it is not there yet."""
    plan, parts = json.loads(row["plan"]), folder / "parts"
    receipt = _receipt(parts, plan["file"])
    if (info := _packed(receipt, folder / plan["file"], row["plan"])) is not None:
        return info
    by_part, clips = defaultdict(list), []
    for _, _, key, at in plan["clips"]:
        by_part[key].append(at)
    for key, wanted in by_part.items():
        clips += shards.read_rows(parts / f"{key}.parquet", wanted)
    files.write_json(receipt, {"plan": "begun"}, indent=None)  # what lies there from now on is this job's
    clips = [{**clip, "split": plan["split"]} for clip in clips]
    info = shards.write_shard(folder, plan["file"], clips, shape, plan["points"], plan.get("masks", False))
    entry = {"split": plan["split"], "file": info.file, "clips": info.clips, "bytes": info.bytes, "sha256": info.sha256}
    files.write_json(receipt, {"plan": config.digest(row["plan"]), "info": entry}, indent=None)
    return entry


def _receipt(parts: Where, file: str) -> Where:
    """Where it is written down that a shard is this job's, and what is in it."""
    return parts / f"{file.replace('/', '-')}.done"


def remove_parts(parts: Where) -> None:
    """Remove what preparing has left in the folder of parts, and the folder if nothing else is in it."""
    with shards.at_once(parts) as apply:
        for _ in apply(lambda path: path.unlink(), [path for path in parts.iterdir() if OF_PARTS.fullmatch(path.name)]):
            pass
    with contextlib.suppress(OSError):  # somebody else's files stay
        parts.rmdir()


def _packed(receipt: Where, shard: Where, plan: str) -> Row | None:
    """A shard that an attempt killed later has finished: what it wrote down, if the file is still that. Raises
    `UnreachableError` where a bucket does not answer."""
    try:
        entry = json.loads(receipt.read_text())
        whole = entry["plan"] == config.digest(plan) and _is_whole(shard, entry["info"]["sha256"])
    except (OSError, ValueError, KeyError) as error:
        storage.answered(receipt, error)
        return None
    return entry["info"] if whole else None
