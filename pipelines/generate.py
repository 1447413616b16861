"""Generate: checkpoint + reference image + motion → videos side by side, and a contact sheet.

python -m pipelines.generate --checkpoint out/run/model --reference me.jpg --video dance.mp4 --output out/clips
python -m pipelines.generate --checkpoint out/run/model --shards out/demo/shards --count 4 --output out/clips

The motion is a driving video (its pose is estimated), a pose sequence (.npz with `pose` float [F, 33, 3]: x, y in
0..1 of the picture, visibility 0..1), or clips out of shards, for which the true video is known.
"""

import io
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image, ImageOps

from entprog import config
from entprog.config import ClipShape, Generation, Prepare
from entprog.errors import UserError
from entprog.media import pose as poses
from entprog.media import shards as datasets
from entprog.media import video as videos
from entprog.media import windows
from pipelines import jobs
from pipelines.rendering import Motion, render

# torch and diffusers are imported where they are needed: wrong arguments are told at once, not after seconds.

app = jobs.app("Generate clips from a checkpoint, a reference image and a motion.")


@app.command()
def main(
    checkpoint: Annotated[Path, typer.Option(help="Folder that pipelines.train wrote (its output, or model/ in it).")],
    output: Annotated[Path, typer.Option(help="Folder for the videos, sheet.png and result.json.")],
    reference: Annotated[Path | None, typer.Option(help="Picture of the person to animate.")] = None,
    pose: Annotated[Path | None, typer.Option(help="Pose sequence, .npz.")] = None,
    video: Annotated[Path | None, typer.Option(help="Driving video of one person.")] = None,
    shards: Annotated[Path | None, typer.Option(help="Folder of pipelines.prepare: take motions out of it.")] = None,
    clip: Annotated[list[str] | None, typer.Option(metavar="ID", help="Clip of the shards; may be repeated.")] = None,
    split: Annotated[str | None, typer.Option(help="Take --count clips of this split [held_out].")] = None,
    count: Annotated[int | None, typer.Option(help="Clips of the split (generate.count).")] = None,
    start: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Start in the video or pose sequence (generate.start_s).")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Euler steps (generate.steps).")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the noise (generate.seed).")] = None,
    guidance: Annotated[float | None, typer.Option(help="Classifier-free guidance (generate.guidance).")] = None,
    config_file: jobs.ConfigFile = None,
    set_: jobs.Set = None,
    dry_run: jobs.DryRun = False,
    verbose: jobs.Verbose = False,
) -> None:
    """Generate clips from a checkpoint, a reference image and a motion: give one of --video, --pose or --shards."""

    def work() -> dict[str, Any]:
        own = {"steps": steps, "seed": seed, "guidance": guidance, "count": count, "start_s": start}
        given = {"reference": reference, "pose": pose, "video": video, "shards": shards, "clip": clip, "split": split}
        return run(checkpoint, output, settings(config_file, set_, own), dry_run=dry_run, **given)

    jobs.run("generate", None if dry_run else output, work, verbose=verbose)


def settings(files: Sequence[Path] | None, pairs: Sequence[str] | None, own: dict[str, Any]) -> Generation:
    """Config files < the command's own options (None: not given) < --set. Of a whole experiment's file only the parts
    that matter here count. Raises UserError for any wrong name or value."""
    values: dict[str, Any] = {}
    for path in files or []:
        values = config.merge(values, config.read_yaml(path))
    values = {name: part for name, part in values.items() if name not in config.Experiment.model_fields}
    values = config.merge(values, {"generate": {name: value for name, value in own.items() if value is not None}})
    return config.build(config.merge(values, config.parse_overrides(pairs or [])), Generation)


def run(
    checkpoint: Path | str,
    output: Path,
    settings: Generation | None = None,
    *,
    reference: Path | None = None,
    pose: Path | None = None,
    video: Path | None = None,
    shards: Path | None = None,
    clip: Sequence[str] | None = None,
    split: str | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Generate and write the clips; returns the figures of result.json: `videos` (side by side), `clips` (one record
    each), `sheet`.

    Exactly one of pose, video and shards says how the person moves; `reference` says who it is (with shards: instead
    of each clip's own). Raises UserError for anything wrong with them.
    """
    settings = settings or Generation()
    _check_options(reference, pose, video, shards, clip, split)
    root, about, shape = _checkpoint(str(checkpoint))
    if shards is not None:
        motions = motions_from_shards(shards, clip, split or "held_out", settings, shape)
        if reference is not None:
            who = reference_image(reference, shape, settings.prepare)
            motions = [Motion(m.name, who, m.pose, m.video, "driving clip") for m in motions]
    else:
        who = reference_image(reference, shape, settings.prepare)
        start_s = settings.generate.start_s
        if pose is not None:
            motions = [Motion(pose.stem, who, read_pose(pose, shape, start_s), None)]
        else:
            points, frames = driving_clip(video, shape, settings.prepare, start_s)
            motions = [Motion(video.stem, who, points, frames, "driving video")]
    if dry_run:
        names = ", ".join(motion.name for motion in motions)
        jobs.console.print(
            f"Would generate {len(motions)} clip(s) of {shape} with {settings.generate.steps} steps from {root} "
            f"(conditions: {', '.join(about['conditions']) or 'none'}): {names}",
            markup=False,
        )
        return {"settings": config.flat(settings.model_dump(mode="json"))}
    return _generate(root, about, shape, motions, Path(output), settings)


# ---- what is to be shown ----


def _checkpoint(given: str) -> tuple[Path, dict[str, Any], ClipShape]:
    """(folder, its entprog.json, clip shape), checked as far as it can be without reading weights."""
    from entprog import folders, models

    root = folders.locate(given, "--checkpoint")
    about = folders.saved(root)
    if not about:
        raise UserError(f"--checkpoint: {given} was not written by pipelines.train (it has no entprog.json)")
    if not about["shape"]:
        raise UserError(f"--checkpoint: {given} does not say which clips it was trained on (shape in entprog.json)")
    shape = config.build(about["shape"], ClipShape)
    models.family(about["family"]).inspect(_model(root, about), shape)
    return root, about, shape


def _model(root: Path, about: dict[str, Any], dtype: str = "float32") -> config.Model:
    return config.Model(family=about["family"], base=str(root), conditions=about["conditions"], dtype=dtype)


def _check_options(reference, pose, video, shards, clip, split) -> None:
    motions = {"--pose": pose, "--video": video, "--shards": shards}
    given = [name for name, value in motions.items() if value is not None]
    if len(given) != 1:
        told = f"{' and '.join(given)} were given" if given else "none was given"
        raise UserError(f"one of --video, --pose and --shards says how the person moves; {told}")
    if shards is None and reference is None:
        raise UserError(f"{given[0]} needs --reference too: a picture of the person to animate")
    if shards is None and (clip or split):
        raise UserError(f"--clip and --split choose among --shards, which was not given ({given[0]} was)")
    if clip and split:
        raise UserError("both --clip and --split were given: name the clips, or take some of a split")


def motions_from_shards(
    folder: Path, wanted: Sequence[str] | None, split: str, settings: Generation, shape: ClipShape
) -> list[Motion]:
    """The clips named, or some of a split."""
    dataset = datasets.read_dataset(folder)
    if dataset.shape != shape:
        raise UserError(f"shards {folder} hold clips of {dataset.shape}, the checkpoint makes {shape}: prepare anew")
    datasets.verify(dataset, "size")
    if wanted:
        known = {name: place for part in dataset.splits for name, place in _clip_ids(dataset, part).items()}
        for name in wanted:
            if name not in known:
                raise UserError(f"no clip {name!r} in {folder}{config.close_to(name, known)}")
        places = [known[name] for name in wanted]
    else:
        total = dataset.clips(split)
        if not total:
            there = ", ".join(f"{name} ({dataset.clips(name)} clips)" for name in dataset.splits)
            raise UserError(f"no clips in split {split!r} of {folder}; there are: {there}")
        picked = np.unique(np.linspace(0, total - 1, min(settings.generate.count, total)).round().astype(int))
        index = datasets.index(dataset, split)
        places = [index[i] for i in picked]
    return [_from_row(dataset.folder / file, row) for file, row in places]


def _clip_ids(dataset: datasets.Dataset, split: str) -> dict[str, tuple[str, int]]:
    return {
        columns["clip_id"]: (shard.file, row)
        for shard in dataset.splits[split]
        for row, columns in enumerate(
            datasets.read_rows(dataset.folder / shard.file, range(shard.clips), columns=["clip_id"])
        )
    }


def _from_row(path: Path, row: int) -> Motion:
    (columns,) = datasets.read_rows(path, [row], ["clip_id", "reference", "pose", "video"])
    try:
        with Image.open(io.BytesIO(columns["reference"]), formats=["PNG"]) as image:
            reference = np.asarray(image.convert("RGB"))
        frames = videos.decode_rgb(columns["video"])
    except (videos.VideoError, OSError, ValueError, SyntaxError, zlib.error) as error:
        raise datasets.DamagedShardError(f"damaged shard {path}, row {row}: {_line(error)}; prepare it again") from None
    return Motion(columns["clip_id"], reference, columns["pose"].copy(), frames)


def read_pose(path: Path, shape: ClipShape, start_s: float = 0.0) -> np.ndarray:
    """A pose sequence from an .npz (never unpickled): float32 [F, 33, 3] of the clip's length.

    Raises UserError if it is not one, or too short.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            if isinstance(stored, np.ndarray):
                raise UserError(f"--pose: {path} is a single array (.npy), needed is an .npz with `pose`")
            if "pose" not in stored.files:
                raise UserError(f"--pose: {path} has no array named pose, only {', '.join(stored.files) or 'nothing'}")
            points = stored["pose"]
    except FileNotFoundError:
        raise UserError(f"--pose: no such file: {path}") from None
    except UserError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"--pose: cannot read {path} as .npz: {_line(error)}") from None
    if points.ndim != 3 or points.shape[1:] != (poses.POINTS, 3) or points.dtype.kind not in "fiu":
        raise UserError(
            f"--pose: {path} holds {points.dtype} {list(points.shape)}, needed is float [frames, {poses.POINTS}, 3]"
        )
    first = round(start_s * shape.fps)
    if len(points) < first + shape.frames:
        raise UserError(
            f"--pose: {path} has {len(points)} frames, a clip from {start_s:g} s on needs {first + shape.frames} "
            f"(at {shape.fps:g} fps)"
        )
    return points[first : first + shape.frames].astype(np.float32)


def driving_clip(path: Path, shape: ClipShape, crop: Prepare, start_s: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """The person in a video: (pose float32 [F, 33, 3] in the crop, its frames uint8 RGB [F, H, W, 3]).

    One crop for the whole clip, as `pipelines.prepare` makes it. Raises UserError if there is no such clip in it.
    """
    try:
        info = videos.probe(path)
        end_s = start_s + (shape.frames - 0.5) / shape.fps
        # Pose is tracked frame by frame: a clip of full-size frames would not fit into memory.
        frames = videos.iter_frames(path, fps=shape.fps, start_s=start_s, end_s=end_s, quick=True)
        track = poses.PoseEstimator().track(frame for _, frame in frames)
        if len(track) < shape.frames:
            raise UserError(
                f"--video: {path} has {len(track)} frames from {start_s:g} s on at {shape.fps:g} fps, "
                f"a clip has {shape.frames}"
            )
        found = poses.found(track)
        box = _person(track, info.height, info.width, shape, crop) if found.any() else None
        if box is None:
            raise UserError(f"--video: nobody was found in {path} from {start_s:g} s on")
        if not found.all():
            jobs.console.print(f"warning: the person is lost in {(~found).sum()} of {len(found)} frames of {path}")
        times = videos.clip_times(start_s, shape.frames, shape.fps)
        cut, _ = videos.read_frames(path, times, crop=box, size=(shape.height, shape.width))
    except videos.VideoError as error:
        raise UserError(f"--video: {error}") from None
    return windows.to_crop(track, box, info.height, info.width), cut


def reference_image(path: Path, shape: ClipShape, crop: Prepare) -> np.ndarray:
    """A picture at the clip's size: uint8 RGB [H, W, 3].

    One of that very size is taken as it is; of any other the person is cut out as in training, or the middle if
    nobody is found. Raises UserError if it is not a picture.
    """
    try:
        with Image.open(path) as image:
            picture = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except FileNotFoundError:
        raise UserError(f"--reference: no such file: {path}") from None
    except (OSError, ValueError, SyntaxError, zlib.error, Image.DecompressionBombError) as error:
        raise UserError(f"--reference: cannot read {path} as a picture: {_line(error)}") from None
    height, width = picture.shape[:2]
    if (height, width) == (shape.height, shape.width):
        return picture
    track = poses.PoseEstimator().track([picture])
    box = _person(track, height, width, shape, crop) if poses.found(track).any() else None
    if box is None:
        jobs.console.print(f"warning: nobody was found in {path}: its middle is taken", markup=False)
        high = min(height, round(width * shape.height / shape.width))
        wide = min(width, round(height * shape.width / shape.height))
        box = ((width - wide) // 2, (height - high) // 2, wide, high)
    left, top, wide, high = box
    return videos.scale(picture[top : top + high, left : left + wide], (shape.height, shape.width))


def _person(track: np.ndarray, height: int, width: int, shape: ClipShape, crop: Prepare) -> windows.Box | None:
    return windows.person_box(track, height, width, shape.width / shape.height, crop.margin, crop.point_visibility)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


# ---- making it ----


def _generate(
    root: Path, about: dict[str, Any], shape: ClipShape, motions: list[Motion], output: Path, settings: Generation
) -> dict[str, Any]:
    import torch

    from entprog import models

    chosen = settings.generate
    if chosen.gpus == "yes" and not torch.cuda.is_available():
        raise UserError("generate.gpus=yes, but torch sees no GPU here")
    device = "cuda" if chosen.gpus != "no" and torch.cuda.is_available() else "cpu"
    denoiser = models.family(about["family"]).load(_model(root, about, chosen.dtype), device)
    shift = chosen.shift or about["shift"]
    records, picture = render(denoiser, motions, shape, output, chosen, shift)
    jobs.show("Generated", [(r["clip"], r["video"]) for r in records], ("clip", "video"))
    jobs.console.print(f"At a glance: {picture}", markup=False)
    return {
        "checkpoint": str(root),
        "shape": shape.model_dump(),
        "settings": config.flat(settings.model_dump(mode="json")),
        "shift": shift,
        "videos": [record["video"] for record in records],
        "clips": records,
        "sheet": str(picture),
    }


if __name__ == "__main__":
    app()
