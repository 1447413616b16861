"""What a generated clip is to show: who, from a picture, and how they move, from a video, a pose file or a shard."""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from entprog import config, storage
from entprog.config import ClipShape, Generate, Generation, Prepare
from entprog.data import shards as datasets
from entprog.errors import UserError
from entprog.masking import one_line
from entprog.media import h264, limits, masks, posefile, wholebody
from entprog.media import pictures as images
from entprog.media import pose as poses
from entprog.media import video as videos
from entprog.names import plain
from entprog.preparing.rows import SUFFIXES
from pipelines import terminal
from pipelines.generating import driving
from pipelines.generating.checkpoints import Checkpoint

if TYPE_CHECKING:
    import torch

    from entprog.models.captions import Texts

VIDEOS = SUFFIXES
POSES = frozenset({".npz", ".npy"})
PICTURES = images.SUFFIXES


TRUTH = "ground truth"
"""Title of a motion's video that is the very clip to be made."""


@dataclass(frozen=True)
class Motion:
    """What one clip is to show, at the checkpoint's frame size."""

    name: str
    reference: np.ndarray
    """uint8 RGB [H, W, 3]: who."""
    pose: np.ndarray
    """float32 [F, 33 or 133, 3]: how they move."""
    video: np.ndarray | None
    """uint8 RGB [F, H, W, 3]: the clip that the pose was taken from, if there is one."""
    video_title: str = TRUTH
    place: int = 0
    """Number inside its split, or among the motions of a command: with the seed it decides the noise."""
    driver: np.ndarray | None = None
    """float32 [F, 33 or 133, 3]: the pose of who is in `video`, where `pose` is another one; None: it is `pose`."""
    last: np.ndarray | None = None
    """uint8 RGB [H, W, 3]: the last frame that is asked for. None: the truth's, where that is there."""

    background: np.ndarray | None = None
    """uint8 RGB [F, H, W, 3]: the video that the person is put into. None: there is none."""
    person: np.ndarray | None = None
    """bool [F, H, W]: where in it; None without it."""
    others: np.ndarray | None = None
    """uint8 RGB [pictures, H, W, 3]: further reference pictures; None: there are none."""
    caption: str = ""
    """Of a clip of shards; shown where `text` is its embedding."""
    text: "Mapping[str, torch.Tensor] | None" = None
    """What it is shown as text, as fields of a denoiser, [1, …] each; None: the network's own."""

    @property
    def has_truth(self) -> bool:
        """Whether `video` is the very clip to be made."""
        return self.video is not None and self.video_title == TRUTH

    @property
    def last_frame(self) -> np.ndarray | None:
        """What a network sees that is shown the last frame; None: nothing says it."""
        return self.video[-1] if self.last is None and self.has_truth else self.last

    def seen(self, first: bool) -> "Motion":
        """This one as a network sees it. first: whether its reference was in training each clip's own first frame: it
        is the truth's, where that is there."""
        return replace(self, reference=self.video[0]) if first and self.has_truth else self

    def replacing(self, person: np.ndarray) -> "Motion":
        """This one, put into its own video in place of who is in it: person bool [F, H, W], where that is."""
        return replace(self, person=person, background=np.where(person[..., None], np.uint8(0), self.video))

    def captioned(self, texts: "Texts | None") -> "Motion":
        """This one with its caption as text, which lies among those; as it is without any."""
        return self if texts is None else replace(self, text=texts.of(self.caption))

    @property
    def _scene(self) -> tuple[np.ndarray | None, ...]:
        return self.background, self.person, self.others

    def digest(self) -> str:
        """Hash of everything that decides what the clip shows."""
        found = hashlib.sha256(repr((self.name, self.video_title, self.place)).encode())
        text = () if self.text is None else self.text.values()
        for array in (self.reference, self.pose, self.video, self.driver, self.last, *self._scene, *text):
            if array is not None:
                found.update(repr(array.shape).encode())
                found.update(np.ascontiguousarray(array).data)
        return found.hexdigest()


def estimating(settings: Generation, maker: Checkpoint) -> Generation:
    """The settings, with the estimator that gives the points which a checkpoint was trained on, unless `prepare.pose`
    says which one. Where that one is not installed they stay as they are."""
    whole = maker.points == wholebody.POINTS and maker.unlike(len(wholebody.BLAZEPOSE))
    if not whole or "pose" in settings.prepare.model_fields_set or find_spec("rtmlib") is None:
        return settings
    terminal.console.print("Poses are estimated by rtmlib (prepare.pose): the network was trained on whole-body poses.")
    return settings.model_copy(update={"prepare": settings.prepare.model_copy(update={"pose": "rtmlib"})})


def wanted_frames(settings: Generate, shape: ClipShape, maker: Checkpoint) -> float:
    """Most frames that a result may have: a clip's, or those of `generate.seconds` and what makes the last group whole
    that the VAE takes together; infinity for all of a motion.

    Raises UserError for less than a clip, or more than `generate.max_bytes`.
    """
    seconds = settings.seconds
    frames = math.inf if seconds == math.inf else round((seconds or shape.frames / shape.fps) * shape.fps)
    if frames < shape.frames:
        raise UserError(
            f"generate.seconds: {seconds:g} s are {frames} frames, one clip of this checkpoint has {shape.frames} "
            f"({shape.frames / shape.fps:g} s): take at least that, or leave it out"
        )
    if frames != math.inf:
        frames = maker.geometry.whole_frames(frames + maker.geometry.step - 1)
    Room(settings, shape).check(shape.frames if frames == math.inf else frames, "the result")
    return frames


class Room:
    """How many more frames of a clip shape may be held, of those that `generate.max_bytes` allows."""

    def __init__(self, settings: Generate, shape: ClipShape):
        self.max_bytes, self.shape = settings.max_bytes, shape
        self.left = settings.max_bytes // (3 * shape.height * shape.width)

    def check(self, frames: int, what: str) -> None:
        """Raises UserError unless there is room for the frames."""
        if frames > self.left:
            raise UserError(
                f"{what}: no room for {frames} frames of {self.shape.width}x{self.shape.height}, {self.left} more fit "
                f"into generate.max_bytes={self.max_bytes}: make fewer or shorter clips with one command, or raise it"
            )

    def limited(self, wanted: float, path: Path) -> int:
        """Most frames to read of a motion, of which so many are wanted. Raises UserError if there is no room."""
        self.check(self.shape.frames if wanted == math.inf else int(wanted), str(path))
        return int(min(wanted, self.left))

    def take(self, frames: int, wanted: float, path: Path) -> None:
        """Count what was read; a motion that may go on after it is named."""
        if frames == self.left < wanted:
            seconds = frames / self.shape.fps
            most = f"the most for generate.max_bytes={self.max_bytes}"
            driving.warn(f"{path}: cut to {frames} frames ({seconds:g} s), {most}")
        self.left -= frames


def files(given: Path, endings: frozenset[str], option: str) -> tuple[list[Path], dict[str, str]]:
    """(the file, or a folder's files of that kind in order of name; {file: why it is none of them}).

    Hidden files are passed over. Raises UserError if there is no such file, or none in the folder.
    """
    if not given.is_dir():
        if not given.exists():
            raise UserError(f"{option}: no such file: {given}")
        return [given], {}
    there = sorted(path for path in given.iterdir() if not path.name.startswith("."))
    found = [path for path in there if path.suffix.lower() in endings and not path.is_dir()]
    others = {str(path): "a folder" if path.is_dir() else "of another kind, by its name" for path in there}
    others = {name: why for name, why in others.items() if Path(name) not in found}
    if not found:
        raise UserError(f"{option}: no file in the folder {given} ends in {', '.join(sorted(endings))}")
    if others:
        some = ", ".join(Path(name).name for name in list(others)[:5]) + (", …" if len(others) > 5 else "")
        terminal.console.print(f"{option}: {len(others)} in {given} are left out, as of another kind: {some}")
    return found, others


def names(paths: Iterable[Path]) -> dict[Path, str]:
    """What files are called: without their endings, where that tells them apart."""
    paths = list(paths)
    counted = Counter(path.stem for path in paths)
    return {path: path.stem if counted[path.stem] == 1 else path.name for path in paths}


def read_all(
    paths: Sequence[Path], read: Callable[[Path], object], option: str
) -> tuple[dict[Path, object], dict[str, str]]:
    """What `read` makes of each file, and {file: why it was left out}.

    One file that cannot be used is an error; of several the others are used. Raises UserError if none can.
    """
    good, left_out = {}, {}
    for path in paths:
        try:
            good[path] = read(path)
        except UserError as error:
            if len(paths) == 1:
                raise
            left_out[str(path)] = str(error)
            terminal.console.print(f"left out: {error}")
    if not good:
        raise UserError(f"{option}: none of {len(paths)} files can be used; the first: {next(iter(left_out.values()))}")
    return good, left_out


def pairs(references: dict[Path, np.ndarray], driven: Iterable[tuple[str, np.ndarray, np.ndarray | None]]) -> list:
    """Every motion (name, pose, video) with every reference picture."""
    out, called = [], names(references)
    for name, pose, video in driven:
        for path, who in references.items():
            title = f"{called[path]} as {name}" if len(references) > 1 else name
            out.append(Motion(plain(title), who, pose, video, "driving video", len(out)))
    return out


def motions_from_shards(
    folder: str | Path, wanted: Sequence[str] | None, split: str, settings: Generation, shape: ClipShape
) -> list[Motion]:
    """The clips named, or some of a split; each has the noise that `evaluate` gives it."""
    dataset = datasets.read_dataset(storage.quickly(str(folder)))
    if dataset.shape != shape:
        raise UserError(f"shards {folder} hold clips of {dataset.shape}, the checkpoint makes {shape}: prepare anew")
    datasets.verify(dataset, "size")
    dataset = replace(dataset, folder=storage.at(str(folder), "shards"))  # clips are waited for longer than checks
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
    Room(settings.generate, shape).check(len(places) * shape.frames, f"{len(places)} clips of {folder}")
    numbers = {each: number for part in dataset.splits for number, each in enumerate(datasets.index(dataset, part))}
    return [from_row(dataset.folder / file, row, shape, numbers[file, row]) for file, row in places]


def _clip_ids(dataset: datasets.Dataset, split: str) -> dict[str, tuple[str, int]]:
    return {
        columns["clip_id"]: (shard.file, row)
        for shard in dataset.splits[split]
        for row, columns in enumerate(
            datasets.read_rows(dataset.folder / shard.file, range(shard.clips), columns=["clip_id"])
        )
    }


def from_row(path: Path | storage.Place, row: int, shape: ClipShape, place: int = 0) -> Motion:
    """One clip of a shard whose clips have this shape, put into its own video where it has a mask. Raises
    DamagedShardError naming shard and row."""
    (columns,) = datasets.read_rows(path, [row], ["clip_id", "caption", "reference", "pose", "video", "mask"])
    size = (shape.height, shape.width)
    try:
        reference = images.read(columns["reference"], replace(limits.LIMITS, max_pixels=shape.height * shape.width))
        frames = h264.decode_rgb(columns["video"], range(shape.frames), size)
        if reference.shape[:2] != size or len(columns["pose"]) != shape.frames:
            raise ValueError(f"its reference or its pose is not of {shape}")
        person = columns["mask"] and masks.unpacked(columns["mask"], shape.frames, *size).astype(bool)
    except (videos.VideoError, ValueError) as error:
        why = one_line(error)
        raise datasets.DamagedShardError(f"damaged shard {path}, row {row}: {why}; prepare it again") from None
    told = {"place": place, "caption": columns["caption"].strip()}
    made = Motion(columns["clip_id"], reference, columns["pose"].copy(), frames, **told)
    return made if person is None else made.replacing(person)


def read_pose(
    path: Path, shape: ClipShape, crop: Prepare, start_s: float = 0.0, most: float | None = None
) -> np.ndarray:
    """A pose sequence from an .npz or .npy (never unpickled): float32 [F, 33 or 133, 3], F of the clip's length, or
    up to `most`. Rows are at the clip's rate, unless an .npz says in `fps` how many a second there are.

    Raises UserError if it is not one, too short, or larger than `crop`'s limits.
    """
    alone, bounds = path.suffix.lower() == ".npy", limits.of(crop)
    try:
        points = limits.array(path, None if alone else "pose", bounds)
        rate = (None if alone else posefile.rate(path, bounds)) or shape.fps
    except (UserError, ValueError) as error:
        why = str(error)
        raise UserError(f"--pose: {why if str(path) in why else f'{path}: {why}'}") from None
    layouts = [(count, 3) for count in wholebody.LAYOUTS.values()]
    if points.ndim != 3 or points.shape[1:] not in layouts or points.dtype.kind not in "fiu":
        raise UserError(
            f"--pose: {path} holds {points.dtype} {list(points.shape)}, needed is float [frames, 33 or 133, 3]"
        )
    try:
        posefile.check_places(points.astype(np.float32))
    except ValueError as error:
        raise UserError(f"--pose: {path}: {error}") from None
    first = round(start_s * shape.fps)
    total = math.ceil(min(len(points) * shape.fps / rate - 1e-9, 2**53))
    if total < first + shape.frames:
        raise UserError(
            f"--pose: {path} has {total} frames, a clip from {start_s:g} s on needs {first + shape.frames} "
            f"(at {shape.fps:g} fps)"
        )
    chosen = np.arange(first, min(total, first + int(min(most or shape.frames, total))))
    shown = points[posefile.nearest_rows(chosen, shape.fps, rate).clip(max=len(points) - 1)].astype(np.float32)
    if not ((shown[..., 2] >= wholebody.SURE) & np.isfinite(shown).all(-1)).any():
        raise UserError(
            f"--pose: {path} shows nobody in {len(shown)} frames from {start_s:g} s on: no point is visible"
        )
    return shown


def read_picture(path: Path, crop: Prepare, option: str = "--reference") -> np.ndarray:
    """A picture that an option names, as it is: uint8 RGB [H, W, 3]. Raises UserError if it is none, or larger than the
    limits."""
    if not path.exists():
        raise UserError(f"{option}: no such file: {path}")
    try:
        return images.read(path, limits.of(crop))
    except videos.VideoError as error:
        raise UserError(f"{option}: cannot read {path} as a picture: {one_line(error)}") from None


def other_pictures(paths: Sequence[Path], shape: ClipShape, crop: Prepare) -> np.ndarray | None:
    """Further reference pictures at the clip's size, uint8 RGB [pictures, H, W, 3], each whole and on white, as
    WanVACEPipeline lays them; None: there are none. Raises UserError as `read_picture` does."""
    out = np.full((len(paths), shape.height, shape.width, 3), 255, np.uint8)
    for canvas, path in zip(out, paths, strict=True):
        picture = read_picture(path, crop)
        share = min(shape.height / picture.shape[0], shape.width / picture.shape[1])
        high, wide = (max(1, int(side * share)) for side in picture.shape[:2])
        top, left = (shape.height - high) // 2, (shape.width - wide) // 2
        canvas[top : top + high, left : left + wide] = videos.scale(picture, (high, wide))
    return out if len(paths) else None


def reference_image(path: Path, shape: ClipShape, crop: Prepare, option: str = "--reference") -> np.ndarray:
    """A picture that an option names, at the clip's size: uint8 RGB [H, W, 3].

    One of that very size is taken as it is; of any other the person is cut out as in training, or the middle if
    nobody is found. Raises UserError if it is not a picture, or larger than `crop`'s limits.
    """
    picture = read_picture(path, crop, option)
    height, width = picture.shape[:2]
    if (height, width) == (shape.height, shape.width):
        return picture
    estimator = poses.estimator(crop)
    track = estimator.track([picture])
    box = driving.person_box(track, height, width, shape, crop) if poses.found(track).any() else None
    if box is None:
        driving.warn(f"nobody was found in {path}: its middle is taken")
        high = min(height, round(width * shape.height / shape.width))
        wide = min(width, round(height * shape.width / shape.height))
        box = ((width - wide) // 2, (height - high) // 2, wide, high)
    elif driving.several_in(estimator, picture):
        driving.warn(f"several people are in {path}: the foremost is taken")
    left, top, wide, high = box
    return videos.scale(picture[top : top + high, left : left + wide], (shape.height, shape.width))
