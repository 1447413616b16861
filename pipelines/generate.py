"""Generate: checkpoint + reference image + motion → videos side by side, and a contact sheet.

python -m pipelines.generate --checkpoint out/run/model --reference me.jpg --video dance.mp4 --output out/clips
python -m pipelines.generate --checkpoint out/run/model --shards out/demo/real/shards --count 4 --output out/clips
python -m pipelines.generate --checkpoint out/run/model --reference people/ --video dances/ --seconds inf --output out/x

The motion is a driving video (its pose is estimated), a pose sequence (.npz with `pose` float [F, 33 or 133,
3]: x, y in 0..1 of the picture, visibility 0..1; and `fps`, where that is not the checkpoint's), or clips out of
shards, for which the true video is known.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from entprog import config, storage
from entprog.config import Generate, Generation, Prepare
from entprog.data import shards as datasets
from entprog.errors import UserError
from entprog.masking import bare
from entprog.storage import Where
from pipelines import cli, terminal
from pipelines.command import usage
from pipelines.generating import captioned, checkpoints, driving, motions, protocol, replacing, retargeting
from pipelines.generating.checkpoints import Checkpoint
from pipelines.outputs import claim

DECIDING = ("generate", "prepare.margin", "prepare.point_visibility", "prepare.pose")
"""Settings, and parts of them, that an output belongs to."""
FREE = ("generate.batch_size", "generate.gpus", "generate.max_bytes")
"""Of them those that a resumed command may change."""
ADDED = {
    "generate.text": None, "generate.text_encoder": None, "generate.text_guidance": 1.0, "prepare.pose": Prepare().pose,
}  # fmt: skip
"""Of them those that outputs of earlier versions do not name, and what these were made with."""

SCENE = 2
"""Videos beside the motion's where a person is replaced: mask and background."""

app = usage.app("Generate clips from a checkpoint, a reference image and a motion.")


@app.command()
def main(
    checkpoint: Annotated[
        str, typer.Option(help="Folder that pipelines.train wrote (its output, or model/ in it), also s3:// or gs://.")
    ],
    output: Annotated[
        str,
        typer.Option(
            help="Folder for the videos, sheet.png and result.json, also s3:// or gs://; the same command again "
            "resumes it."
        ),
    ],
    reference: Annotated[
        list[Path] | None,
        typer.Option(help="Picture of the person to animate, or a folder of them; again: further ones (VACE)."),
    ] = None,
    last: Annotated[
        Path | None, typer.Option(help="Picture of the last frame, of networks that see it (model.last_frame).")
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(help="Put the person into the driving video: a video that is white where (Wan-Animate, VACE)."),
    ] = None,
    background: Annotated[
        Path | None, typer.Option(help="With --mask: the video to put the person into; unless given the driving video.")
    ] = None,
    pose: Annotated[Path | None, typer.Option(help="Pose sequence, .npz or .npy, or a folder of them.")] = None,
    video: Annotated[Path | None, typer.Option(help="Driving video of one person, or a folder of them.")] = None,
    shards: Annotated[str | None, typer.Option(help="Folder of pipelines.prepare: take motions out of it.")] = None,
    clip: Annotated[list[str] | None, typer.Option(metavar="ID", help="Clip of the shards; may be repeated.")] = None,
    split: Annotated[str | None, typer.Option(help="Take --count clips of this split; unless given held_out.")] = None,
    count: Annotated[int | None, typer.Option(help="Clips of the split (generate.count).")] = None,
    start: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Start in the video or pose sequence (generate.start_s).")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(help="Length; longer than a clip: overlapping windows; inf: all (generate.seconds).")
    ] = None,
    sampler: Annotated[
        str | None,
        typer.Option(metavar="CLASS", help="diffusers scheduler, UniPCMultistepScheduler … (generate.sampler)."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the sampler (generate.steps).")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the noise (generate.seed).")] = None,
    reference_guidance: Annotated[
        float | None, typer.Option(help="Strength of the reference image (generate.reference_guidance).")
    ] = None,
    pose_guidance: Annotated[float | None, typer.Option(help="Strength of the pose (generate.pose_guidance).")] = None,
    text: Annotated[str | None, typer.Option(help="Text that the network is shown (generate.text).")] = None,
    text_guidance: Annotated[float | None, typer.Option(help="Strength of the text (generate.text_guidance).")] = None,
    without: Annotated[
        str | None, typer.Option(metavar="CONDITION", help="Show each clip without pose (or reference) beside.")
    ] = None,
    retarget: Annotated[
        bool, typer.Option("--retarget", help="Give the motion the reference person's proportions; see retarget.png.")
    ] = False,
    config_file: cli.ConfigFile = None,
    set_: cli.Set = None,
    dry_run: cli.DryRun = False,
    verbose: cli.Verbose = False,
    help_settings: cli.help_settings(Generation) = False,
) -> None:
    """Generate clips from a checkpoint, a reference image and a motion: give one of --video, --pose or --shards."""

    def work() -> dict[str, Any]:
        own = {"steps": steps, "seed": seed, "count": count, "start_s": start, "seconds": seconds, "sampler": sampler}
        own |= {"reference_guidance": reference_guidance, "pose_guidance": pose_guidance}
        own |= {"text": text, "text_guidance": text_guidance}
        given = {"reference": reference[0] if reference else None, "others": (reference or [])[1:], "pose": pose}
        given |= {"video": video, "shards": shards, "clip": clip, "split": split}
        given |= {"without": without, "retarget": retarget, "last": last, "mask": mask, "background": background}
        chosen = cli.settings(Generation, None, config_file, set_, generate=own)
        return run(checkpoint, cli.output_of(output), chosen, dry_run=dry_run, **given)

    cli.run("generate", None if dry_run else output, work, verbose=verbose)


def run(
    checkpoint: Path | str,
    output: str | Where,
    settings: Generation | None = None,
    *,
    reference: Path | None = None,
    pose: Path | None = None,
    video: Path | None = None,
    shards: str | Path | None = None,
    clip: Sequence[str] | None = None,
    split: str | None = None,
    without: str | None = None,
    retarget: bool = False,
    last: Path | None = None,
    mask: Path | None = None,
    background: Path | None = None,
    others: Sequence[Path] = (),
    dry_run: bool = False,
) -> dict[str, Any]:
    """Generate and write the clips; returns the figures of result.json: `videos` (side by side), `clips` (one record
    each), `left_out` (files of a folder that could not be used, with the reason), `sheet`, with retarget its `preview`.
    Clips that an earlier call has finished are kept.

    Exactly one of pose, video and shards says how the person moves; `reference` says who it is (with shards: instead
    of each clip's own). Each may be a folder: every motion is made with every reference. retarget: motions take the
    proportions of their references (`entprog.media.retarget`). last: the last frame of every clip, for networks that
    see it (of shards' clips their own, where it is not given). mask, background: of a video that the person is put into
    (`pipelines.generating.replacing`). others: further reference pictures, for networks that take several. Raises
    UserError for anything wrong with them, and for an output that holds clips of another checkpoint or other settings.
    """
    settings, output = settings or Generation(), storage.at(output, "the output")
    _check_options(reference, pose, video, shards, clip, split, settings.generate)
    found = checkpoints.find(str(checkpoint), settings.generate)
    shape, sees = found.shape, ", ".join(found.conditions) or "none"
    if without is not None and without not in found.conditions:
        raise UserError(f"--without: {without} is no condition of {checkpoint}; its conditions: {sees}")
    if last is not None and not found.last:
        raise UserError(f"--last: {checkpoint} sees no last frame (model.last_frame at training): leave it out")
    if others and not found.several:
        raise UserError(
            f"--reference was given {1 + len(others)} times, {checkpoint} takes one picture: of a folder of pictures "
            "each makes clips of its own; VACE networks that see a reference take several together"
        )
    scene = replacing.scene(mask, background, found, pose or video, video is not None)
    how = protocol.how_sampled(found, settings.generate, checkpoints.gpu_here(settings.generate))
    if video is not None or retarget:
        settings = motions.estimating(settings, found)
    asked = {"reference": reference, "pose": pose, "video": video, "shards": shards}
    identity = {"weights of --checkpoint": how["checkpoint"], "--without": without}
    identity |= {f"--{name}": path and _named(path) for name, path in asked.items()}
    identity |= {"--clip": list(clip or ()), "--split": split, **({"--retarget": True} if retarget else {})}
    beside = {"--last": last, "--mask": mask, "--background": background}
    beside |= {f"--reference {number}": path for number, path in enumerate(others, 2)}
    identity |= {name: str(Path(path).resolve()) for name, path in beside.items() if path is not None}
    identity |= {name: value for name, value in _flat(settings).items() if config.is_part_of(name, DECIDING)}
    identity["generate.dtype"] = how["dtype"]
    for name in FREE:
        del identity[name]
    for name, before in ADDED.items():
        if identity[name] == before:
            del identity[name]
    claim.check(output, "generate", identity)
    left_out = {}
    if shards is not None:
        made = motions.motions_from_shards(shards, clip, split or "held_out", settings, shape)
        folder = storage.at(str(shards), "shards")
        text = captioned.shown(found, settings.generate, folder, [motion.caption for motion in made])
        checkpoints.check_text_guidance(found, settings.generate, str(checkpoint), text.texts is not None)
        made = [motion.captioned(text.texts) for motion in made]
        how |= {"texts": text.name} if text.name else {}
        if text.line:
            terminal.console.print(text.line)
        if reference is not None:
            who = motions.reference_image(reference, shape, settings.prepare)
            made = [replace(motion, reference=who, video_title="driving clip") for motion in made]
    else:
        checkpoints.check_text_guidance(found, settings.generate, str(checkpoint))
        made, left_out, own = _from_files(reference, pose, video, settings, found, retarget, scene)
        made = _whole(made, found)
    if last is not None:
        end = motions.reference_image(last, shape, settings.prepare, "--last")
        made = [replace(motion, last=end) for motion in made]
    if others:
        more = motions.other_pictures(others, shape, settings.prepare)
        made = [replace(motion, others=more) for motion in made]
    if found.last and any(motion.last_frame is None for motion in made):
        raise UserError(
            f"{checkpoint} was trained with the last frame of each clip: give --last PICTURE, how it is to end"
        )
    if "pose" not in found.conditions:
        terminal.console.print(
            f"{checkpoint} sees no pose (its conditions: {sees}): of the motions it takes the length alone"
        )
    if "reference" not in found.conditions and reference is not None:
        terminal.console.print(
            f"{checkpoint} sees no reference (its conditions: {sees}): clips do not show who is in --reference"
        )
    for points in sorted({len(motion.pose[0]) for motion in made}):
        if unlike := found.unlike(points):
            terminal.console.print(unlike)
    for line in (found.faceless(made), found.begins(made), found.unmended(settings.generate.text)):
        if line:
            terminal.console.print(line)
    if retarget:
        if shards is not None and reference is not None:
            own = [retargeting.own_pose(reference, shape, settings.prepare)] * len(made)
        elif shards is not None:
            own = retargeting.own_poses(made, settings.prepare)
        driving, made = made, retargeting.retargeted(made, own)
    if dry_run:
        names = ", ".join(motion.name for motion in made)
        longest = max(len(motion.pose) for motion in made)
        long = f", the longest of {longest} frames in windows" if longest > shape.frames else ""
        terminal.console.print(
            f"Would generate {len(made)} clip(s) of {shape}{long} with {settings.generate.steps} steps from "
            f"{found.root} (conditions: {sees}): {names}",
        )
        return {"settings": _flat(settings)}
    claim.take(output, "generate", identity)
    how |= {"overlap": settings.generate.overlap, "without": without}
    instead = {"reference": reference, "proportions": retarget or None, "last frame": last}
    if shards is not None and any(instead.values()):
        how["instead of the split's"] = [name for name, given in instead.items() if given]
    shown = {}
    if retarget:
        shown["preview"] = str(retargeting.preview(driving, made, own, output / "retarget.png"))
        terminal.console.print(f"Retargeted motions beside the driving ones: {shown['preview']}")
    said = how
    if shards is not None:
        dataset = datasets.read_dataset(storage.quickly(str(shards)))
        truth = {"first": reference is None, "last": last is None}
        said = protocol.of_shards(how, found, dataset, None if clip else split or "held_out", **truth)
    given = {"checkpoint": bare(str(checkpoint))} if "://" in str(checkpoint) else {}  # not where it was fetched to
    return _generate(found, made, output, settings, how, said) | {"left_out": left_out, **given, **shown}


def _flat(settings: Generation) -> dict[str, Any]:
    return config.flat(settings.model_dump(mode="json"))


def _from_files(
    reference: Path,
    pose: Path | None,
    video: Path | None,
    settings: Generation,
    maker: Checkpoint,
    retarget: bool,
    scene: replacing.Scene | None,
) -> tuple[list[motions.Motion], dict[str, str], list[np.ndarray]]:
    """Every pose sequence or driving video with every reference picture, what was left out, and to retarget motions the
    pose of each one's reference."""
    start_s, crop, shape = settings.generate.start_s, settings.prepare, maker.shape
    wanted, room = motions.wanted_frames(settings.generate, shape, maker), motions.Room(settings.generate, shape)
    pictures, others = motions.files(reference, motions.PICTURES, "--reference")
    own, around = {}, {}
    span = {"shape": shape, "crop": crop, "start_s": start_s}

    def pictured(path: Path) -> np.ndarray:
        if retarget:
            own[path] = retargeting.own_pose(path, shape, crop)
        return motions.reference_image(path, shape, crop)

    who, without = motions.read_all(pictures, pictured, "--reference")

    def posed(path: Path) -> tuple[np.ndarray, None]:
        own = motions.Room(settings.generate, shape)
        points = motions.read_pose(path, shape, crop, start_s, own.limited(wanted, path))
        own.take(len(points), wanted, path)
        if scene is not None:
            room.check(SCENE * len(points), str(scene.mask))
            around.update(scene.around(points, None, None, **span))
        return points, None

    def driven(path: Path) -> tuple[np.ndarray, np.ndarray]:
        followed = driving.followed(path, most=room.limited(wanted, path), **span)
        points, frames = followed.pose, driving.cut_out(path, followed, **span)
        room.take(len(points), wanted, path)
        if scene is not None:
            room.check(SCENE * len(points), str(scene.mask))
            around.update(scene.around(points, followed, frames, **span))
        return points, frames

    given, endings, option, read = (
        (video, motions.VIDEOS, "--video", driven) if pose is None else (pose, motions.POSES, "--pose", posed)
    )
    paths, more = motions.files(given, endings, option)
    clips, bad = motions.read_all(paths, read, option)
    called = motions.names(clips)
    moving = [(called[path], *clip) for path, clip in clips.items()]
    of_each = [own[path] for _ in moving for path in who] if retarget else []
    made = [replace(motion, **around) for motion in motions.pairs(who, moving)]
    return made, others | more | without | bad, of_each


def _whole(made: list[motions.Motion], maker: Checkpoint) -> list[motions.Motion]:
    """The motions, cut to as many frames as the checkpoint can make; prints what is left out."""
    from pipelines.generating.rendering import fitting

    cut = [fitting(maker.geometry, motion, maker.shape) for motion in made]
    lengths = Counter((len(motion.pose), len(whole.pose)) for motion, whole in zip(made, cut, strict=True))
    for (given, kept), clips in sorted(lengths.items()):
        if kept < given:
            terminal.console.print(
                f"{clips} clip(s) of {kept} of the motion's {given} frames: {maker.root} makes {maker.geometry.step}n+1"
            )
    return cut


def _named(path: str | Path) -> str:
    """A file or folder as the output's identity has it."""
    return bare(str(path)) if "://" in str(path) else str(Path(path).resolve())


def _check_options(reference, pose, video, shards, clip, split, settings: Generate) -> None:
    ways = {"--pose": pose, "--video": video, "--shards": shards}
    given = [name for name, value in ways.items() if value is not None]
    if len(given) != 1:
        message = f"{' and '.join(given)} were given" if given else "none was given"
        raise UserError(f"one of --video, --pose and --shards says how the person moves; {message}")
    if shards is None and reference is None:
        raise UserError(f"{given[0]} needs --reference too: a picture of the person to animate")
    if shards is None and (clip or split):
        raise UserError(f"--clip and --split choose among --shards, which was not given ({given[0]} was)")
    if clip and split:
        raise UserError("both --clip and --split were given: name the clips, or take some of a split")
    asked = {name for name in settings.model_fields_set if getattr(settings, name)}
    if shards is not None and (span := asked & {"start_s", "seconds"}):
        names = " and ".join(f"generate.{name}" for name in sorted(span))
        raise UserError(
            f"{names}: a part of a --video or --pose; clips of --shards are taken whole, as they lie there: leave "
            "--start and --seconds out"
        )
    if "count" in asked and (shards is None or clip):
        instead = f"{given[0]} was given" if shards is None else "--clip names them"
        raise UserError(f"--count (generate.count) takes clips of a split of --shards; {instead}: leave it out")


def _generate(
    checkpoint: Checkpoint,
    made: list[motions.Motion],
    output: Where,
    settings: Generation,
    how: dict[str, Any],
    said: dict[str, Any],
) -> dict[str, Any]:
    """how: decides, beside the motions, what the clips look like; said: what the folder says of them."""
    from pipelines.generating.rendering import render

    def load():
        denoiser = checkpoints.load(checkpoint, settings.generate)
        protocol.leave(output, said)  # after all that may be refused, before the first clip
        return denoiser

    without = how["without"]
    records, picture = render(load, made, checkpoint.shape, output, settings.generate, without, config.digest(how))
    columns = ("clip", "video", *(["difference"] if without else []))
    terminal.show("Generated", [tuple(record[name] for name in columns) for record in records], columns)
    if without:
        largest = max(record["difference"] for record in records)
        message = "identical: it has no influence yet" if largest == 0 else f"up to {largest} of 255 levels apart"
        terminal.console.print(f"With and without {without}: {message}")
    terminal.console.print(f"At a glance: {picture}")
    return {
        "checkpoint": str(checkpoint.root),
        "shape": checkpoint.shape.model_dump(),
        "settings": _flat(settings),
        "sampler": checkpoints.sampler_name(checkpoint, settings.generate),
        "shift": settings.generate.shift or checkpoint.about["shift"],
        "videos": [record["video"] for record in records],
        "clips": records,
        "sheet": str(picture),
    }


if __name__ == "__main__":
    app()
