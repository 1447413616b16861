"""Evaluation's work on a Ray cluster: clips are generated, then judged, by actors that hold the networks.

Every clip is a row that names a place in the shards; what was generated lies in a folder, a file a clip, so that what
is there is not generated again.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np

import pipelines
from entprog import config, storage
from entprog.config import Evaluation
from entprog.data import shards
from entprog.errors import UserError
from entprog.media import h264, limits
from entprog.media import video as videos
from entprog.storage import Where
from pipelines import terminal
from pipelines.cluster import failures
from pipelines.generating import checkpoints, motions

if TYPE_CHECKING:
    from entprog.models.captions import Texts

LONGEST_NAME = 229
"""Characters of a clip's file without its ending: disks take 255 bytes, and scratch files 26 of them."""
WEIGHTS = ("inception", "i3d", "resnet3d")
"""Settings that name files."""
LEAST_PIXELS = 1 << 21
"""A generated clip's frames may be larger than its truth's, which is reported, up to this many pixels."""


@dataclass(frozen=True)
class Place:
    """A clip of a split, and the file that holds (or is to hold) what was generated for it."""

    clip_id: str
    source: str
    """The video that it was cut from."""
    shard: str
    """Path of the shard file."""
    row: int
    """Row of the clip in its shard."""
    number: int
    """Inside the split: seeds the clip's noise, so that it does not depend on which others are made."""
    file: str
    """Path or address of the generated clip."""

    @property
    def clip(self) -> Where:
        return storage.at(self.file, "generated clips")


def file_name(clip_id: str) -> str:
    """A clip's file: its id with all but letters, digits and `_.-~` as %XX, and of a long one the first of these and a
    hash. No two ids share one."""
    name = quote(clip_id, safe="")
    if len(name) > LONGEST_NAME:
        begins = re.sub("%.?$", "", name[: LONGEST_NAME - 17])  # with no half of a %XX
        name = f"{begins}~{config.digest(clip_id)}"
    return f"{name}.mp4"


def places(dataset: shards.Dataset, split: str, count: int | None, folder: Where) -> list[Place]:
    """The clips of a split, or `count` of them spread evenly. Raises UserError for a split without clips."""
    total = dataset.clips(split)
    if not total:
        there = ", ".join(f"{name} ({dataset.clips(name)} clips)" for name in dataset.splits)
        raise UserError(f"no clips in split {split!r} of {dataset.folder}; there are: {there}")
    picked = np.unique(np.linspace(0, total - 1, min(count or total, total)).round().astype(int)).tolist()
    index = shards.index(dataset, split)
    named: dict[int, tuple[str, str]] = {}
    for file in dict.fromkeys(index[i][0] for i in picked):
        mine = [i for i in picked if index[i][0] == file]
        path = dataset.folder / file
        rows = shards.read_rows(path, [index[i][1] for i in mine], ["clip_id", "source"])
        named |= {i: (row["clip_id"], row["source"]) for i, row in zip(mine, rows, strict=True)}
    root, made = dataset.folder.resolve(), folder.resolve()  # actors work in another directory
    files = {i: storage.address(made / file_name(named[i][0])) for i in picked}
    return [Place(*named[i], storage.address(root / index[i][0]), index[i][1], i, files[i]) for i in picked]


# ---- actors ----


class Generator:
    """Samples clips and writes each as an mp4."""

    def __init__(self, checkpoint: checkpoints.Checkpoint, settings: config.Generate, texts: "Texts | None"):
        self._checkpoint, self._settings, self._texts = checkpoint, settings, texts
        with pipelines.importing():
            self._denoiser = checkpoints.load(checkpoint, settings)

    def __call__(self, rows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        from pipelines.generating.rendering import make

        batch = [
            motions.from_row(storage.at(path, "shards"), int(row), self._checkpoint.shape, int(number)).captioned(
                self._texts
            )
            for path, row, number in zip(rows["shard"], rows["row"], rows["number"], strict=True)
        ]
        made = make(self._denoiser, batch, self._checkpoint.shape, self._settings)
        for file, frames in zip(rows["file"], made, strict=True):
            h264.write(storage.at(file, "generated clips"), frames, self._checkpoint.shape.fps)
        return {"clip_id": rows["clip_id"]}


class Judge:
    """Measures clips against their truth."""

    def __init__(self, names: Sequence[str], shape: config.ClipShape, settings: config.Evaluate, device: str):
        with pipelines.importing():
            from entprog.quality.metrics import Meter

        self._names, self._shape = names, shape
        self._meter = Meter(names, settings, device)

    def __call__(self, rows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        found, hashes = [], []
        for path, row, file in zip(rows["shard"], rows["row"], rows["file"], strict=True):
            motion = motions.from_row(storage.at(path, "shards"), int(row), self._shape)
            result = read_result(storage.at(file, "generated clips"), motion.video.shape)
            hashes.append(hashlib.sha256(result).hexdigest())
            found.append(self._meter.measure(result, motion.video, motion.reference, motion.pose))
        out = {"clip_id": rows["clip_id"], "sha256": np.array(hashes)}
        for name in found[0].values:
            out[f"value/{name}"] = np.array([m.values[name] for m in found])
        for name in found[0].features:
            for side, which in enumerate(("real", "made")):
                out[f"{which}/{name}"] = np.stack([m.features[name][side] for m in found])
        return out


def read_result(path: Where, shape: tuple[int, ...]) -> np.ndarray:
    """A generated clip: uint8 RGB [F, H, W, 3]. Raises UserError if it cannot be read or has another shape."""
    bounds = replace(limits.LIMITS, max_pixels=max(LEAST_PIXELS, shape[1] * shape[2]))
    try:
        # One more than are due is enough to tell.
        with storage.local_copy(path) as file:
            frames = np.stack([frame for _, frame in islice(videos.iter_frames(file, limits=bounds), shape[0] + 1)])
    except videos.VideoError as error:
        raise UserError(f"generated clip cannot be read: {str(error).replace(str(file), str(path))}") from None
    if frames.shape != shape:
        more = " or more" if len(frames) > shape[0] else ""
        raise UserError(f"generated clip {path} is {_size(frames.shape)}{more}, its truth {_size(shape)}")
    return frames


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[0]} frames of {shape[2]}x{shape[1]}"


# ---- running them ----


def generate(
    todo: Sequence[Place],
    checkpoint: checkpoints.Checkpoint,
    settings: Evaluation,
    workers: int,
    gpus: bool,
    texts: "Texts | None" = None,
) -> None:
    """Write the clips of all places. texts: their captions, encoded. Raises UserError for damaged shards or texts."""
    absolute = replace(checkpoint, root=checkpoint.root.resolve())  # actors work in another directory
    asked = settings.generate.model_copy(update={"gpus": "yes" if gpus else "no"})  # one without may see the machine's
    arguments = {"checkpoint": absolute, "settings": asked}
    arguments |= {"texts": texts and replace(texts, folder=texts.folder.resolve())}
    made = _over(todo, Generator, arguments, settings.generate.batch_size, workers, gpus)
    for _ in _counted("generating", made, len(todo)):
        pass


def judge(
    todo: Sequence[Place], names: Sequence[str], shape: config.ClipShape, settings: Evaluation, workers: int, gpus: bool
) -> dict[str, dict[str, Any]]:
    """{clip id: {`sha256` of its frames, `value/METRIC`, `real/METRIC`, `made/METRIC`}} of all places."""
    paths = {name: value for name in WEIGHTS if (value := getattr(settings.evaluate, name)) is not None}
    absolute = {name: str(Path(value).expanduser().resolve()) for name, value in paths.items()}
    chosen = settings.evaluate.model_copy(update=absolute)
    arguments = {"names": tuple(names), "shape": shape, "settings": chosen, "device": "cuda" if gpus else "cpu"}
    found = _over(todo, Judge, arguments, 1, workers, gpus)
    return {row["clip_id"]: row for row in _counted("judging", found, len(todo))}


def _over(
    todo: Sequence[Place], actor: type, arguments: dict[str, Any], batch_size: int, workers: int, gpus: bool
) -> Iterator[dict[str, Any]]:
    """Rows that actors make of the places, as they come."""
    import ray.data

    blocks = -(-len(todo) // batch_size)
    data = ray.data.from_items([vars(place) for place in todo], override_num_blocks=blocks).map_batches(
        actor,
        fn_constructor_kwargs=arguments,
        batch_size=batch_size,
        concurrency=min(workers, blocks),
        num_cpus=1,
        num_gpus=1 if gpus else 0,
    )
    data.context.enable_progress_bars = False
    with failures.plainly():
        yield from data.iter_rows()


def _counted(what: str, rows: Iterable[dict[str, Any]], total: int) -> Iterator[dict[str, Any]]:
    """The rows, while progress is shown."""
    with terminal.advancing(what, total) as advance:
        for row in rows:
            yield row
            advance(1)
