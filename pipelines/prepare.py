"""Videos → shards of clips with pose, a ledger of everything found, and a contact sheet.

Operators of Ray Data, one row a source: list → probe → track (pose; an actor for each network) → cut (windows, person
crop, reference frame, encode, write a part) → pack (parts into shards). A finished part is never done again: after a
kill the same command goes on where it was. `dataset.json` is written last: a folder without it is no dataset.
"""

import hashlib
import io
import itertools
import json
import math
import os
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from entprog import config
from entprog.config import Preparation
from entprog.errors import UserError
from entprog.media import cutting, ledger, pose, shards, sheet, video
from entprog.media.cutting import Row
from entprog.media.shards import ShardInfo
from pipelines import jobs

SHEET_SOURCES = 24
"""Sources on the contact sheet at most, spread evenly."""
SPLIT_SETTINGS = ("held_out", "held_out_ratio", "seed", "clips_per_shard")
"""Settings that decide where clips go, not what they are: finished parts do not depend on them."""

app = jobs.app("Cut videos of people into shards of clips with pose, ready for training.")


@app.command()
def main(
    input: Annotated[Path, typer.Option(help="Folder of videos, searched with its subfolders; never modified.")],
    output: Annotated[Path, typer.Option(help="Folder for the shards.")],
    frames: Annotated[int | None, typer.Option(help="Frames in a clip (data.shape.frames; 8).")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels, even (data.shape.height; 96).")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels, even (data.shape.width; 64).")] = None,
    fps: Annotated[float | None, typer.Option(help="Frames per second (data.shape.fps; 12).")] = None,
    stride: Annotated[
        int | None, typer.Option(metavar="FRAMES", help="Clip frames from one clip's start to the next (half a clip).")
    ] = None,
    held_out: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Source to hold out of training; may be repeated.")
    ] = None,
    held_out_ratio: Annotated[float | None, typer.Option(help="Share of the sources to hold out (0.1).")] = None,
    seed: Annotated[int | None, typer.Option(help="Decides which sources are held out (0).")] = None,
    min_visibility: Annotated[
        float | None, typer.Option(help="Smallest share of body points visible in a clip (0.7).")
    ] = None,
    clips_per_shard: Annotated[int | None, typer.Option(help="Clips in one file (256).")] = None,
    preset: jobs.Preset = None,
    config_file: jobs.ConfigFile = None,
    set: jobs.Set = None,
    dry_run: jobs.DryRun = False,
    verbose: jobs.Verbose = False,
) -> None:
    """Cut videos of people into shards of clips with pose, ready for training.

    Settings are named data.shape.* and prepare.*; --set takes those without an option of their own too
    (prepare.margin, prepare.min_scale, prepare.crf, …; --dry-run shows all). A preset gives its clip shape.
    Running the same command again resumes.
    """

    def work() -> dict[str, Any]:
        if held_out and held_out_ratio is not None:
            raise UserError("both --held-out and --held-out-ratio were given: name the sources, or give a ratio")
        own = {"stride": stride, "held_out": held_out, "held_out_ratio": held_out_ratio, "seed": seed}
        own |= {"min_visibility": min_visibility, "clips_per_shard": clips_per_shard}
        shape = {"frames": frames, "height": height, "width": width, "fps": fps}
        settings = preparation(preset, config_file, set, shape, own)
        return plan(input, output, settings) if dry_run else run(input, output, settings, verbose=verbose)

    jobs.run("prepare", None if dry_run else output, work, verbose=verbose)


def preparation(
    preset: str | None, files: Sequence[Path] | None, pairs: Sequence[str] | None, shape: Row, own: Row
) -> Preparation:
    """The settings that the command line asks for: preset < config files < options < --set.

    A preset or a config file may describe a whole experiment: of it only `data.shape` and `prepare` count here.
    `shape` and `own` are the command's own options; None values are left out.
    Raises UserError for any wrong name or value.
    """
    values = config.read_preset(preset, jobs.PRESETS) if preset else {}
    for path in files or []:
        values = config.merge(values, config.read_yaml(path))
    of_data = {"shape": (values.get("data") or {}).get("shape") or {}}
    values = {name: part for name, part in values.items() if name not in config.Experiment.model_fields}
    given = {"data": {"shape": _given(shape)}, "prepare": _given(own)}
    values = config.merge({**values, "data": of_data}, given)
    return config.build(config.merge(values, config.parse_overrides(pairs or [])), Preparation)


def _given(options: Row) -> Row:
    return {name: value for name, value in options.items() if value is not None}


# ---- what there is to do ----


def list_sources(folder: Path, leave_out: Path | None = None) -> list[Row]:
    """Every file in a folder and its subfolders but hidden ones, by name: rows as `cutting.probe` takes them.

    Links are followed, each folder is entered once. Raises UserError if there is no folder or no file.
    """
    if not folder.is_dir():
        wrong = "is not a folder" if folder.exists() else "does not exist"
        raise UserError(f"input {folder} {wrong}: give --input a folder of videos")
    rows, entered = [], set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = Path(parent).resolve()
        if real in entered or (leave_out is not None and real == leave_out.resolve()):
            folders.clear()
            continue
        entered.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        rows += [cutting.source_row(folder, Path(parent, name)) for name in files if not name.startswith(".")]
    if not rows:
        raise UserError(f"input folder {folder} has no files: give --input a folder of videos")
    return sorted(rows, key=lambda row: row["path"])


def named(sources: Sequence[Row], names: Iterable[str]) -> set[str]:
    """The sources that `--held-out` names. Raises UserError for a name that no source has."""
    called = defaultdict(set)
    for file in (row["file"] for row in sources):
        for name in (file, Path(file).name, Path(file).stem):
            called[name].add(file)
    unknown = [name for name in names if name not in called]
    if unknown:
        raise UserError(f"--held-out {unknown[0]!r}: the input has no such file{config.close_to(unknown[0], called)}")
    return set().union(*(called[name] for name in names))


def split(kept: Sequence[str], named: set[str], ratio: float, seed: int) -> dict[str, str]:
    """Each kept source's split: {file: 'train' or 'held_out'}.

    Held out are the named ones, or else the `ratio` of sources whose seeded hash is smallest: at least one where
    there are two, never all. Raises UserError if the named ones leave nothing to train on, or were not kept.
    """
    held = set(kept) & named
    if named and not held:
        raise UserError(f"no clip was kept of any held-out source ({', '.join(sorted(named)[:3])}): name another")
    if named and held == set(kept):
        raise UserError(f"all {len(kept)} usable sources are held out: name fewer, so that some are left to train on")
    if not named and ratio > 0 and len(kept) > 1:
        by_hash = sorted(kept, key=lambda file: hashlib.sha256(f"{seed} {file}".encode()).digest())
        held = set(by_hash[: min(len(kept) - 1, max(1, round(ratio * len(kept))))])
    return {file: "held_out" if file in held else "train" for file in kept}


def part_key(row: Row, settings: Preparation) -> str:
    """Name of a source's part: changes with the file and with every setting that its clips depend on."""
    return config.digest(row["file"], row["bytes"], row["changed_ns"], cut_settings(settings), shards.FORMAT)


def cut_settings(settings: Preparation) -> Row:
    """Settings that clips depend on."""
    return settings.model_copy(
        update={"prepare": settings.prepare.model_copy(update=dict.fromkeys(SPLIT_SETTINGS))}
    ).model_dump(mode="json", warnings=False)


def plan(folder: Path, output: Path, settings: Preparation) -> dict[str, Any]:
    """What would be done, printed (--dry-run)."""
    sources = list_sources(folder, output)
    held = named(sources, settings.prepare.held_out)
    tried = [row for row in sources if Path(row["file"]).suffix.lower() in cutting.SUFFIXES]
    jobs.show("settings", list(config.flat(settings.model_dump(mode="json")).items()), ("setting", "value"))
    size = sum(row["bytes"] for row in tried)
    jobs.console.print(f"{len(sources)} files in {folder}, {len(tried)} of them videos by name ({size / 1e6:.1f} MB)")
    clips = f"clips of {settings.data.shape}, one every {cutting.stride(settings)} frames"
    jobs.console.print(f"to be written to {output}: {clips}")
    ratio = f"{settings.prepare.held_out_ratio:g} of the sources kept"
    jobs.console.print(f"held out of training: {', '.join(sorted(held)) or ratio}", markup=False)
    return {"sources": len(sources)}


# ---- doing it ----


def run(folder: Path, output: Path, settings: Preparation, *, verbose: bool = False) -> dict[str, Any]:
    """Prepare a folder of videos; the job's figures. Running it again resumes, or finds that all is done."""
    sources = list_sources(folder, output)
    held = named(sources, settings.prepare.held_out)
    if (output / "dataset.json").exists():
        return _again(sources, output, settings)
    _claim(output, settings)
    keys = {row["file"]: part_key(row, settings) for row in sources}
    parts = output / "parts"
    parts.mkdir(exist_ok=True)
    to_do = [row for row in sources if _part(parts, keys[row["file"]]) is None]
    if len(to_do) < len(sources):
        jobs.console.print(f"resuming: {len(sources) - len(to_do)} of {len(sources)} sources are done already")
    with jobs.stderr_into(output / "prepare.log", verbose=verbose):
        pose.PoseEstimator()  # what is missing is said here, once, and not by every worker
        with jobs.ray_cluster(cpus=2, verbose=verbose) as ray:
            _cut_all(ray, to_do, parts, keys, settings)
            rows, figures = _account(output, parts, keys)
            kept = [row["file"] for row in rows if row["kind"] == "input" and row["kept"]]
            splits = split(kept, held, settings.prepare.held_out_ratio, settings.prepare.seed)
            plans = shard_plans(rows, splits, keys, settings.prepare.clips_per_shard)
            written = _pack_all(ray, plans, output, settings)
    ledger.check(rows, keys, sum(shard.clips for infos in written.values() for shard in infos))
    _sheet(output, plans)
    prepared = {"prepare": settings.prepare.model_dump(mode="json"), "inputs": _stamp(sources)}
    shards.write_dataset(output, settings.data.shape, written, prepared)
    shutil.rmtree(parts)
    return _report(output, figures)


def _account(output: Path, parts: Path, keys: dict[str, str]) -> tuple[list[Row], Row]:
    """Write the ledger out of all parts: (its rows, its figures). Raises UserError if nothing was kept at all."""
    records = {file: _part(parts, key) for file, key in sorted(keys.items())}
    rows = [row for record in records.values() if record for row in record["ledger"]]
    ledger.check(rows, keys)
    ledger.write(output / "ledger.parquet", rows)
    figures = ledger.summary(rows)
    if not figures["clips"]["kept"]:
        _show(figures)
        told = ", ".join(f"{reason} {count}" for reason, count in list(figures["inputs"]["rejected"].items())[:3])
        raise UserError(f"no clip could be kept of {len(keys)} files ({told}): see {output / 'ledger.parquet'}")
    return rows, figures


def _claim(output: Path, settings: Preparation) -> None:
    """Mark the folder as these settings' own. Raises UserError if other settings' work lies in it."""
    mark = output / "prepare.json"
    mine = cut_settings(settings)
    if mark.exists() and (theirs := json.loads(mark.read_text())) != mine:
        _refuse(output, theirs, mine)
    jobs.write_json(mark, mine)


def _refuse(output: Path, theirs: Row, mine: Row) -> None:
    theirs, mine = config.flat(theirs), config.flat(mine)
    name = next(name for name in {**mine, **theirs} if theirs.get(name) != mine.get(name))
    told = f"{name} was {theirs.get(name)}, now {mine.get(name)}"
    raise UserError(f"{output} was prepared with other settings ({told}): choose another --output, or delete it")


def _again(sources: list[Row], output: Path, settings: Preparation) -> dict[str, Any]:
    """A finished dataset: the same figures once more if input and settings are the same, else UserError."""
    dataset = shards.read_dataset(output)
    theirs = {"data": {"shape": dataset.shape.model_dump(mode="json")}, "prepare": dataset.settings.get("prepare", {})}
    mine = settings.model_dump(mode="json")
    if theirs != mine:
        _refuse(output, theirs, mine)
    rows = ledger.read(output / "ledger.parquet")
    if dataset.settings.get("inputs") != _stamp(sources):  # another time stamp alone is no change
        before = {row["file"]: row["sha256"] for row in rows if row["kind"] == "input"}
        now = {row["file"]: cutting.probe(row)["sha256"] for row in sources}
        new, gone = len(now.keys() - before.keys()), len(before.keys() - now.keys())
        changed = sum(before[file] != now[file] for file in before.keys() & now.keys())
        if new or gone or changed:
            told = f"{new} new files, {gone} gone, {changed} changed"
            raise UserError(f"the input is not what {output} was prepared from ({told}): choose another --output")
    shards.verify(dataset, "size")
    shutil.rmtree(output / "parts", ignore_errors=True)
    jobs.console.print(f"nothing to do: {output} is finished, with the same input and settings", markup=False)
    return _report(output, ledger.summary(rows))


def _stamp(sources: list[Row]) -> str:
    """Names, sizes and times of all inputs."""
    return config.digest([(row["file"], row["bytes"], row["changed_ns"]) for row in sources])


def _part(parts: Path, key: str) -> Row | None:
    """A finished part's record, or None if it is not there as it was written."""
    try:
        record = json.loads((parts / f"{key}.json").read_text())
        if record["clips"] and shards.sha256(parts / f"{key}.parquet") != record["sha256"]:
            return None
    except (OSError, ValueError, KeyError):
        return None
    return record


def _cut_all(ray, to_do: list[Row], parts: Path, keys: dict[str, str], settings: Preparation) -> None:
    """Probe, track and cut sources; a progress bar with rate and ETA. Their parts lie in `parts` afterwards."""
    if not to_do:
        return
    parts = parts.resolve()  # workers have their own working folder
    cutting.forget_crashes(parts)
    cpus = int(ray.cluster_resources().get("CPU", 0))
    if cpus < 2:
        raise UserError(f"the Ray cluster has {cpus} CPU, preparing needs 2: give it another")
    # Tracking costs more than probing and cutting together; what the actors hold, the other two cannot have.
    actors = min(len(to_do), cpus - 1, max(1, round(0.6 * cpus)))
    rows = [{**row, "key": keys[row["file"]]} for row in to_do]
    sources = ray.data.from_items(rows, override_num_blocks=min(len(rows), 100 * cpus))
    done = (
        sources.map(partial(cutting.probe, parts=parts))
        .map(
            cutting.Track,
            fn_constructor_args=(settings, parts),
            compute=ray.data.ActorPoolStrategy(size=actors),
            num_cpus=1,
        )
        .map(partial(cutting.cut, settings=settings, parts=parts))
    )
    bar = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[clips]} clips"), TimeElapsedColumn())
    eta = (TextColumn("ETA"), TimeRemainingColumn(), TextColumn("{task.fields[rate]}"))
    with Progress(TextColumn("videos"), *bar, *eta, console=jobs.console) as progress:
        task = progress.add_task("", total=len(rows), clips=0, rate="")
        clips = 0
        for row in done.iter_rows():
            clips += row["clips"]
            seconds = progress.tasks[0].elapsed or 1e-9
            progress.update(task, advance=1, clips=clips, rate=f"{clips / seconds:.1f} clips/s")


def shard_plans(rows: Sequence[Row], splits: dict[str, str], keys: dict[str, str], clips_per_shard: int) -> list[Row]:
    """Which clips go into which shard: {file, split, clips: [(clip, source, part key, row in the part)]}.

    Clips in order of source and time; a split's shards are as even as they can be.
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
        for i, (start, stop) in enumerate(itertools.pairwise(edges)):
            plans.append({"file": f"{name}/{i:05d}.parquet", "split": name, "clips": clips[start:stop]})
    return plans


def pack(row: Row, folder: str, settings: Preparation) -> Row:
    """Operator: write one shard out of parts."""
    shard, clips = json.loads(row["plan"]), []
    by_part = defaultdict(list)
    for _, _, key, at in shard["clips"]:
        by_part[key].append(at)
    for key, wanted in by_part.items():
        clips += shards.read_rows(Path(folder, "parts", f"{key}.parquet"), wanted)
    clips = [{**clip, "split": shard["split"]} for clip in clips]
    info = shards.write_shard(Path(folder), shard["file"], clips, settings.data.shape)
    return {"split": shard["split"], "file": info.file, "clips": info.clips, "bytes": info.bytes, "sha256": info.sha256}


def _pack_all(ray, plans: list[Row], output: Path, settings: Preparation) -> dict[str, list[ShardInfo]]:
    """Write all shards; those by split."""
    planned = {plan["file"] for plan in plans}
    for name in shards.SPLITS:  # left by an attempt with another split, killed before it was finished
        for path in (output / name).glob("*.parquet"):
            if re.fullmatch(r"\d{5}\.parquet", path.name) and f"{name}/{path.name}" not in planned:
                path.unlink()
    rows = [{"plan": json.dumps(plan)} for plan in plans]
    packed = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        partial(pack, folder=str(output.resolve()), settings=settings)
    )
    written = defaultdict(list)
    for row in sorted(packed.iter_rows(), key=lambda row: row["file"]):
        written[row.pop("split")].append(ShardInfo(**row))
    return {name: written[name] for name in shards.SPLITS}


# ---- what a person sees ----


def _sheet(output: Path, plans: list[Row]) -> None:
    """Two clips of every kept source: the reference image, then frames with the pose over them."""
    of_source = defaultdict(list)
    for plan in plans:
        for row, (_, source, *_) in enumerate(plan["clips"]):
            of_source[source].append((plan["split"], plan["file"], row))
    names = sorted(of_source)
    names = [names[i] for i in np.unique(np.linspace(0, len(names) - 1, SHEET_SOURCES).round().astype(int))]
    rows = []
    for name in names:
        clips = of_source[name]
        for split_name, file, at in [clips[i] for i in sorted({len(clips) // 4, 3 * len(clips) // 4})]:
            (clip,) = shards.read_rows(output / file, [at], ["video", "reference", "pose", "start_s", "source"])
            rows.append((f"{name}   {clip['start_s']:.2f} s   {split_name}   reference | clip", _strip(clip)))
    sheet.contact_sheet(rows, output / "contact_sheet.png", columns=9)


def _strip(clip: Row) -> np.ndarray:
    """uint8 RGB [1 + n, H, W, 3], enlarged to be looked at: the reference, then frames with their pose."""
    frames = video.decode_rgb(clip["video"])
    reference = np.asarray(Image.open(io.BytesIO(clip["reference"])).convert("RGB"))
    some = np.unique(np.linspace(0, len(frames) - 1, 8).round().astype(int))
    height, width = frames.shape[1:3]
    times = max(1.0, 192 / height)
    size = round(height * times), round(width * times)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # pictures this small only wait for each other's threads, up to 50 times as long
    shown = sheet.overlay(np.stack([video.scale(frames[i], size) for i in some]), clip["pose"][some])
    torch.set_num_threads(threads)
    return np.concatenate([video.scale(reference, size)[None], shown])


def _report(output: Path, figures: Row) -> Row:
    """Print the summary; the job's figures."""
    dataset = shards.read_dataset(output)
    _show(figures)
    splits = {}
    for name, infos in dataset.splits.items():
        size = sum(shard.bytes for shard in infos)
        splits[name] = {"clips": dataset.clips(name), "shards": len(infos), "bytes": size}
        jobs.console.print(f"{name}: {dataset.clips(name)} clips in {len(infos)} shards, {size / 1e6:.2f} MB")
    if not dataset.clips("held_out"):
        jobs.console.print("[yellow]nothing is held out[/yellow]: training has no clips to measure its loss on")
    jobs.console.print(f"look at {output / 'contact_sheet.png'}; every decision is in {output / 'ledger.parquet'}")
    shape = dataset.shape.model_dump()
    return {**figures, "splits": splits, "shape": shape, "fingerprint": dataset.fingerprint, "output": str(output)}


def _show(figures: Row) -> None:
    """The table of what was found, kept and rejected."""
    rows = [(what, figures["inputs"][what], figures["clips"][what]) for what in ("found", "kept")]
    for reason in {**figures["inputs"]["rejected"], **figures["clips"]["rejected"]}:
        counts = (figures[kind]["rejected"].get(reason, 0) for kind in ("inputs", "clips"))
        rows.append((f"rejected: {reason}", *counts))
    jobs.show("prepared", rows, ("", "files", "clips"))


if __name__ == "__main__":
    app()
