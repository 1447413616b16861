"""Videos → shards of clips with pose, a ledger of everything found, and a contact sheet.

Operators of Ray Data, one row a source: probe → shots (where it cuts) → track (pose; an actor for each network) → cut
(windows, person crop, quality, reference frame, encode, write a part), and at the end pack (parts into shards). A
finished part is never done again: after a kill the same command goes on where it was. `dataset.json` is written last: a
folder without it is no dataset. Run again when there are new videos, the command adds shards of theirs.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from entprog import config
from entprog.config import ClipShape, Preparation
from entprog.data import shards
from entprog.errors import UserError
from entprog.masking import masked
from entprog.media import pose
from entprog.names import counted
from entprog.preparing import attempts, beside, cutting, inputs, ledger, probing
from entprog.preparing.inputs import Inputs
from entprog.preparing.rows import Line, Source, is_video
from entprog.storage import Where
from pipelines import cli, terminal
from pipelines.cluster import joining, room, session
from pipelines.command import usage
from pipelines.outputs import claim
from pipelines.preparing import additions, packing, progress

Row = dict[str, Any]

LOOK_BYTES, TRACK_BYTES, CUT_BYTES = 200 * 2**20, 300 * 2**20, 250 * 2**20
"""Memory that a process of each stage takes with videos in 1080p."""
BLOCKS_PER_CPU = 100
ROWS_PER_BLOCK = 10
"""Sources in one task of Ray Data at most: what a crash makes it do again."""


def _explain_latents() -> None:
    from pipelines.preparing import latents  # here: clips are prepared without a network

    cli.explain_settings("Settings with --latents", config.Encoding, latents.OF_MODEL)


HelpSettings = cli.help_settings(config.Preparation, also=_explain_latents)

app = usage.app("Cut videos of people into shards of clips with pose, ready for training.")


@app.command()
def main(
    input: Annotated[
        str | None,
        typer.Option(
            help="Folder (searched with its subfolders), glob, manifest (.csv, .tsv, .parquet, .json, .jsonl), list of "
            "videos (.txt), folder of numbered images, or video; also s3://, gs://, https://. Never modified."
        ),
    ] = None,
    *,
    output: Annotated[str, typer.Option(help="Folder for the shards; also s3://BUCKET/FOLDER, gs://BUCKET/FOLDER.")],
    frames: Annotated[int | None, typer.Option(help="Frames in a clip (data.shape.frames).")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels, even (data.shape.height).")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels, even (data.shape.width).")] = None,
    fps: Annotated[float | None, typer.Option(help="Frames per second (data.shape.fps).")] = None,
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
    max_rejected: Annotated[
        float | None, typer.Option(help="Stop when a larger share of the videos is rejected (1: never).")
    ] = None,
    latents: Annotated[
        bool, typer.Option("--latents", help="Also encode the clips with the base's VAE; without --input, only that.")
    ] = False,
    base: Annotated[
        str | None, typer.Option(help="With --latents: diffusers folder or hub name of the VAE (model.base).")
    ] = None,
    preset: cli.Preset = None,
    config_file: cli.ConfigFile = None,
    set: cli.Set = None,
    dry_run: cli.DryRun = False,
    verbose: cli.Verbose = False,
    help_settings: HelpSettings = False,
) -> None:
    """Cut videos of people into shards of clips with pose, ready for training.

    Settings are named data.shape.* and prepare.*; --set takes those without an option of their own too
    (prepare.margin, prepare.min_motion, prepare.people, …; --help-settings explains all). A preset gives its clip
    shape; without one --frames, --height, --width and --fps do. Running the same command again resumes; with new
    videos in the input it adds them.

    --latents encodes the training clips with the base's VAE into OUTPUT/latents, where training finds them.
    """

    def work() -> dict[str, Any]:
        folder = cli.output_of(output)
        if held_out and held_out_ratio is not None:
            raise UserError("both --held-out and --held-out-ratio were given: name the sources, or give a ratio")
        own = {"stride": stride, "held_out": held_out, "held_out_ratio": held_out_ratio, "seed": seed}
        own |= {"min_visibility": min_visibility, "clips_per_shard": clips_per_shard, "max_rejected": max_rejected}
        shape = {"frames": frames, "height": height, "width": width, "fps": fps}
        if latents:
            from pipelines.preparing import latents as caching  # here: clips are prepared without a network
        ours, of_model = caching.mine(set) if latents else (set, [])
        encoding = (
            cli.settings(config.Encoding, preset, config_file, of_model, model={"base": base}) if latents else None
        )
        settings = cli.settings(Preparation, preset, config_file, ours, data={"shape": shape}, prepare=own)
        if input is None and not latents:
            raise UserError("no input given: --input FOLDER, glob, manifest or list of videos")
        figures: dict[str, Any] = {}
        if input is not None:
            check_shape(settings.data.shape)
            if latents:  # before clips are cut for hours
                shapes = caching.check_model(encoding, settings.data.shape)
                encoding = caching.decided(encoding)
            figures = plan(input, folder, settings) if dry_run else run(input, folder, settings, verbose=verbose)
        if latents and dry_run and input is not None and not (folder / "dataset.json").exists():
            terminal.console.print(caching.wanted(encoding, shapes))
            terminal.console.print("then latents: their size and time can be said once there are clips to measure on")
        elif latents:
            figures |= {"latents": caching.run(folder, encoding=encoding, dry_run=dry_run, verbose=verbose)}
        return figures

    cli.run("prepare", None if dry_run else output, work, verbose=verbose)


# ---- what there is to do ----


def check_shape(shape: ClipShape) -> None:
    """Raises UserError unless somebody has said all of it: clips of a default nobody chose would be cut for hours."""
    missing = [f"--{name}" for name in ClipShape.model_fields if name not in shape.model_fields_set]
    if len(missing) == len(ClipShape.model_fields):
        raise UserError(f"no clip shape: give --preset NAME or {' '.join(missing)}")
    if missing:
        raise UserError(f"the clip shape lacks {' '.join(missing)}: give what is missing, or --preset NAME")


def named(files: Iterable[str], names: Iterable[str]) -> set[str]:
    """The sources that `--held-out` names. Raises UserError for a name that no source has."""
    called = defaultdict(set)
    for file in files:
        for name in (file, Path(file).name, Path(file).stem):
            called[name].add(file)
    unknown = [name for name in names if name not in called]
    if unknown:
        raise UserError(f"--held-out {unknown[0]!r}: the input has no such file{config.close_to(unknown[0], called)}")
    return set().union(*(called[name] for name in names))


@dataclass(frozen=True)
class Work:
    """What a command is about to do."""

    found: Inputs
    before: additions.Before | None
    to_do: list[Source]
    """Sources that no dataset in the output has."""
    held: set[str]
    """Sources that --held-out names."""


def look(given: str | Path, output: Where, settings: Preparation) -> Work:
    """List the input and compare it with what is in the output. Raises UserError where they do not go together, and
    where nothing could come of it."""
    joining.check_form()
    found = inputs.find(given, settings.prepare, output)
    before = additions.read(output)
    if before is None and (gone := inputs.all_gone(found) or inputs.no_videos(found)):
        raise UserError(gone)
    claim.check(output, "prepare", packing.identity(settings), earlier=_is_earlier(output, settings, before))
    files = {row["file"] for row in found.rows} | (before.inputs().keys() if before else set())
    held = named(files, settings.prepare.held_out)
    if before is None:
        _check_estimator(found.rows, settings)
        return Work(found, None, found.rows, held)
    additions.check_settings(before, output, settings, held)
    shards.verify(before.dataset, "size")
    to_do = additions.to_do(before, found.rows, output, settings)
    _check_estimator(to_do, settings)
    return Work(found, before, to_do, held)


def _check_estimator(rows: Iterable[Source], settings: Preparation) -> None:
    if needs_estimator(rows):
        pose.check_installed(settings.prepare)


def _is_earlier(output: Where, settings: Preparation, before: additions.Before | None) -> bool:
    """Whether a version that left no marks has worked here: a dataset is finished, or begun with the same settings."""
    try:
        return before is not None or json.loads((output / "prepare.json").read_text()) == packing.cut_settings(settings)
    except (OSError, ValueError):
        return False


def plan(given: str | Path, output: Where, settings: Preparation) -> dict[str, Any]:
    """What would be done, printed (--dry-run)."""
    settings = inputs.trusting(settings, given)
    work = look(given, output, settings)
    rows = work.found.rows
    cli.show_settings("Settings", settings)
    tried = [row for row in rows if is_video(row)]
    size = f"{sum(row['bytes'] for row in tried) / 1e6:.1f} MB where their size is known"

    def say(text: str) -> None:
        terminal.console.print(text)

    say(f"input: {work.found.kind} {masked(str(given))}")
    say(f"{len(rows)} files, {len(tried)} of them videos by name ({size})")
    folders = sum(bool(row["frames_fps"]) for row in rows)
    if folders:
        rate = f"{settings.prepare.frames_fps:g} frames per second unless a manifest says otherwise"
        say(f"{folders} of them folders of numbered images: {rate}")
    said = {name: sum(bool(row[name]) for row in rows) for name in ("caption", "split", "crop")}
    if work.found.kind == "manifest" and any(said.values()):
        say("of the manifest: " + ", ".join(f"{count} {name}s" for name, count in said.items() if count))
    for note in (*work.found.notes, *beside.bad_poses(rows, settings.prepare)):
        say(note)
    if work.before is not None:
        say(f"{output} is a finished dataset: {counted(len(work.to_do), 'input')} would be added to it")
    clips = f"clips of {settings.data.shape}, one every {cutting.stride(settings)} frames"
    say(f"to be written to {output}: {clips}")
    ratio = f"{settings.prepare.held_out_ratio:g} of the sources kept"
    say(f"held out of training: {', '.join(sorted(work.held)) or ratio}")
    return {"sources": len(rows)}


# ---- doing it ----


def run(given: str | Path, output: Where, settings: Preparation, *, verbose: bool = False) -> dict[str, Any]:
    """Prepare the videos that an input names; the job's figures. Running it again resumes, adds, or does nothing."""
    from pipelines.preparing import contact_sheet  # here: it draws with torch, whose import takes seconds

    settings = inputs.trusting(settings, given)
    work = look(given, output, settings)
    claim.take(output, "prepare", packing.identity(settings), earlier=_is_earlier(output, settings, work.before))
    for note in work.found.notes:
        terminal.console.print(note)
    additions.mend(output, work.before)
    if work.before is not None and not work.to_do:
        if (output / "parts").exists():  # killed after the dataset was finished
            contact_sheet.of_dataset(output, work.before.dataset)
            packing.remove_parts(output / "parts")
        terminal.console.print(f"nothing to do: {output} is finished, with the same input and settings")
        return _report(output, work.before.lines)
    if work.before is not None:
        terminal.console.print(f"adding {counted(len(work.to_do), 'input')} to the dataset in {output}")
    keys = packing.part_keys(work.to_do, settings)
    parts = output / "parts"
    done = packing.finished(parts, work.to_do, keys, settings)
    left = [row for row in work.to_do if row["file"] not in done]
    if done:
        terminal.console.print(f"resuming: {len(done)} of {len(work.to_do)} sources are done already")
    tally = progress.Tally(sum(is_video(row) for row in work.to_do), settings.prepare.max_rejected)
    with terminal.stderr_into(output / "prepare.log", verbose=verbose):
        try:
            for file, record in done.items():
                tally.count(file, record["ledger"][0]["reason"])
            if needs_estimator(left):
                pose.estimator(settings.prepare)  # what is missing is said here, once, and not by every worker
            with session.ray_cluster(cpus=2, verbose=verbose) as ray:
                parts.mkdir(exist_ok=True)
                _cut_all(ray, left, parts, keys, settings, tally)
                written, lines, *found = _pack(ray, work, output, parts, keys, settings)
        except progress.TooManyRejectedError as error:
            path = output / "ledger.partial.parquet"
            ledger.write(path, [line for part in _records(parts, keys).values() for line in part["ledger"]])
            raise UserError(f"{error}: see {path}; what is done is kept, a larger --max-rejected goes on") from None
    dataset = additions.finish(output, settings, lines, written, *found)
    (output / "ledger.partial.parquet").unlink(missing_ok=True)
    contact_sheet.of_dataset(output, dataset)
    packing.remove_parts(parts)
    return _report(output, lines)


def needs_estimator(rows: Iterable[Source]) -> bool:
    """Whether any of the sources is a video, by its name, without poses beside it."""
    return any(is_video(row) and not row["poses"] for row in rows)


def _cut_all(
    ray, left: list[Source], parts: Where, keys: dict[str, str], settings: Preparation, tally: progress.Tally
) -> None:
    """Take sources through all stages; a progress bar with rate and ETA. Their parts lie in `parts` afterwards."""
    if not left:
        return
    parts = parts.resolve()  # workers have their own working folder
    attempts.forget(parts)
    cpus = room.cpus(2, terminal.console.print)
    with progress.bar(len(left)) as advance:
        wave = ROWS_PER_BLOCK * BLOCKS_PER_CPU * cpus
        for some in (left[i : i + wave] for i in range(0, len(left), wave)):
            rows = [{**row, "key": keys[row["file"]]} for row in some]
            for row in _stages(ray, rows, parts, settings, cpus).iter_rows():
                advance(row["clips"])
                tally.count(row["file"], row["reason"])


def _stages(ray, rows: list[Source], parts: Where, settings: Preparation, cpus: int):
    """The Dataset of sources done: probe and shots, which share a task, → track → cut.

    Each takes a CPU and has memory of its own: operators that ask for the same are made one by Ray Data, and then
    everything would wait in the tracking actors while the other CPUs had nothing to do.
    """
    # Tracking costs more than all else together; what its actors hold, the others cannot have.
    actors = min(len(rows), cpus - 1, max(1, round(0.6 * cpus)))
    stage = {"settings": settings, "parts": parts}
    return (
        ray.data.from_items(rows, override_num_blocks=min(len(rows), BLOCKS_PER_CPU * cpus))
        .map(partial(probing.probe, **stage), num_cpus=1, memory=LOOK_BYTES)
        .map(partial(probing.cut_shots, **stage), num_cpus=1, memory=LOOK_BYTES)
        .map(
            cutting.Track,
            fn_constructor_args=(settings, parts),
            compute=ray.data.ActorPoolStrategy(size=actors),
            num_cpus=1,
            num_gpus=settings.prepare.track_gpus or None,
            memory=TRACK_BYTES,
        )
        .map(partial(cutting.cut, **stage), num_cpus=1, memory=CUT_BYTES)
    )


def _records(parts: Where, keys: dict[str, str]) -> dict[str, Row]:
    """The finished parts' records by source, in the order of the sources."""
    files = sorted(keys)
    found = packing.read_parts(parts, [keys[file] for file in files])
    return {file: record for file, record in zip(files, found, strict=True) if record is not None}


def _pack(ray, work: Work, output: Where, parts: Where, keys: dict[str, str], settings: Preparation):
    """(shards by split, the ledger's lines, points of a pose, whether clips have masks, where poses come from) of the
    whole dataset.

    Raises UserError if nothing was kept at all.
    """
    records = _records(parts, keys)
    new = [line for record in records.values() for line in record["ledger"]]
    ledger.check(new, keys)
    before = work.before
    old = [line for line in before.lines if line["file"] not in keys] if before else []
    kept = [line["file"] for line in new if line["kind"] == "input" and line["kept"]]
    if not kept and before is None:
        ledger.write(output / "ledger.parquet", new)
        figures = _show(new)
        message = ", ".join(f"{reason} {count}" for reason, count in list(figures["inputs"]["rejected"].items())[:3])
        raise UserError(f"no clip could be kept of {len(keys)} files ({message}): see {output / 'ledger.parquet'}")
    asked = {row["file"]: row["split"] for row in work.to_do if row["split"]}
    ratio, seed = settings.prepare.held_out_ratio, settings.prepare.seed
    content = {line["file"]: line["sha256"] for line in (*old, *new) if line["kind"] == "input" and line["kept"]}
    splits = packing.split(kept, work.held, ratio, seed, asked, before.splits() if before else {}, content)
    new = [{**line, "split": splits[line["file"]] if line["kept"] else ""} for line in new]
    new = packing.with_twins(new, old)
    if twins := sum(line["kept"] and bool(line["message"]) for line in new):
        terminal.console.print(
            f"{counted(twins, 'input')} with the content of another one, as the ledger's messages say"
        )
    listed = before.dataset.splits if before else {}
    first = {name: 1 + max((int(Path(info.file).stem) for info in infos), default=-1) for name, infos in listed.items()}
    of_kept = [records[file] for file in kept]
    most = packing.points_of(of_kept)
    points = before.dataset.points if before else most
    if bare := packing.without_parts(of_kept, points):
        terminal.console.print(bare)
    if points < most:
        terminal.console.print(
            f"faces and hands of the new videos are left out: the dataset has poses of {points} points"
        )
    for wrong in (packing.other_versions(of_kept), packing.slower(of_kept, settings.data.shape.fps)):
        if wrong:
            terminal.console.print(wrong, style="yellow")
    masks = packing.masked(of_kept)
    plans = packing.shard_plans(new, splits, keys, settings.prepare.clips_per_shard, first, points, masks)
    written = packing.pack_all(ray, plans, output, settings.data.shape, listed)
    lines = sorted([*old, *new], key=lambda line: line["file"])
    files = {line["file"] for line in old if line["kind"] == "input"} | keys.keys()
    ledger.check(lines, files, sum(info.clips for infos in written.values() for info in infos))
    made_by = packing.made_by(of_kept, before.dataset.settings.get("poses", [settings.prepare.pose]) if before else ())
    return written, lines, points, masks or bool(before and before.dataset.masks), made_by


# ---- what a person sees ----


def _report(output: Where, lines: Sequence[Line]) -> Row:
    """Print the summary; the job's figures."""
    dataset = shards.read_dataset(output)
    figures = _show(lines)
    splits = {}
    for name, infos in dataset.splits.items():
        size = sum(shard.bytes for shard in infos)
        splits[name] = {"clips": dataset.clips(name), "shards": len(infos), "bytes": size}
        there = f"{counted(dataset.clips(name), 'clip')} in {counted(len(infos), 'shard')}"
        terminal.console.print(f"{name}: {there}, {size / 1e6:.2f} MB")
    if not dataset.clips("held_out"):
        alone = "; one source alone cannot be both, add another" if figures["inputs"]["kept"] == 1 else ""
        terminal.console.print(
            f"nothing is held out: training has no clips to measure its loss on{alone}", style="yellow"
        )
    terminal.console.print(f"look at {output / 'contact_sheet.png'}; every decision is in {output / 'ledger.parquet'}")
    shape = dataset.shape.model_dump()
    return {**figures, "splits": splits, "shape": shape, "fingerprint": dataset.fingerprint, "output": str(output)}


def _show(lines: Sequence[Line]) -> Row:
    """Print what was found, kept and rejected, with examples; the figures of `ledger.summary`."""
    figures = ledger.summary(lines)
    rows = [(what, figures["inputs"][what], figures["clips"][what]) for what in ("found", "kept")]
    for reason in {**figures["inputs"]["rejected"], **figures["clips"]["rejected"]}:
        counts = (figures[kind]["rejected"].get(reason, 0) for kind in ("inputs", "clips"))
        rows.append((f"rejected: {reason}", *counts))
    terminal.show("prepared", rows, ("", "files", "clips"))
    for example in ledger.examples(lines):
        terminal.console.print(example)
    return figures


if __name__ == "__main__":
    app()
