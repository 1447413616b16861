"""Clips by their place in a run: shards → decoded clips in an order that the seed fixes.

A run has one endless sequence of clips. Position p lies in epoch p // n of the n clips of a split, each epoch a
shuffle of its own, and update k sees positions k·G … (k+1)·G - 1, with G clips an update. Every worker reads its own
share of each update, so the clips of step k depend on the seed and on G alone, a resume is a start position, also with
other workers, and no state of an iterator has to be saved.
"""

import functools
import itertools
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import av
import numpy as np

from entprog import files
from entprog.config import ClipShape
from entprog.data import shards
from entprog.errors import UserError
from entprog.masking import one_line
from entprog.media import h264, masks, video

# torch and entprog.clips are imported where tensors are made: decode tasks run in processes of their own that never
# need them, and importing torch would cost each of them seconds.

# Of arrays from the object store, which nobody writes to.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable", category=UserWarning)

COLUMNS = ("reference", "pose", "video")
Arrays = dict[str, np.ndarray]
"""A batch as numpy arrays, rows first."""
Read = Callable[[np.ndarray], Arrays]
"""Numbers of a split's clips → those clips."""


# ---- which clip is where ----


@functools.lru_cache(maxsize=4)
def permutation(clips: int, seed: int, epoch: int) -> np.ndarray:
    """Order of an epoch: int64 [clips], each clip once; depends on nothing but the arguments."""
    order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(clips)
    order.flags.writeable = False  # one array for all who ask
    return order


def clips_at(positions: np.ndarray, clips: int, seed: int) -> np.ndarray:
    """The clip (0..clips-1) at each position of the endless sequence."""
    epochs, places = np.divmod(positions, clips)
    out = np.empty_like(positions)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        out[here] = permutation(clips, seed, int(epoch))[places[here]]
    return out


def rank_positions(
    rows: np.ndarray, start_position: int, batch_size: int, rank: int, world: int, batches: int | None = None
) -> np.ndarray:
    """Position of a rank's rows 0, 1, … when its first batch belongs to the update at `start_position`.

    An update sees `batches` batches (None: one a rank). Rank r takes number r, r + world, … of each, so that updates
    see the same clips however many ranks share them.
    """
    batches = batches or world
    mine = len(range(rank, batches, world))
    batch, place = np.divmod(rows, batch_size)
    update, turn = np.divmod(batch, mine)
    return start_position + (update * batches + turn * world + rank) * batch_size + place


# ---- decoding: shared by all that read clips ----


def check_shape(dataset: shards.Dataset, shape: ClipShape) -> None:
    """Raises UserError if the shards hold clips of another shape than the settings say."""
    if dataset.shape != shape:
        raise UserError(
            f"shards {dataset.folder} hold clips of {dataset.shape}, the settings (data.shape) ask for {shape}: "
            "prepare shards of that shape, or change data.shape"
        )


def columns_of(dataset: shards.Dataset) -> tuple[str, ...]:
    """What is read of its clips."""
    return (*COLUMNS, shards.MASK.name) if dataset.masks else COLUMNS


def read(dataset: shards.Dataset, split: str, clips: np.ndarray, columns: tuple[str, ...] | None = None) -> Arrays:
    """Clips of a split by their number, as they are stored: `video` and `reference` object [B] of bytes, `pose` float32
    [B, frames, 33 or 133, 3], `clip` int64 [B] the numbers, of a dataset with masks `mask` object [B], bytes or None.
    columns: of these, those that are read, `pose` among them; None: all.

    Raises DamagedShardError naming the shard and the row of a clip that cannot be read.
    """
    columns = columns or columns_of(dataset)
    pose = np.empty((len(clips), dataset.shape.frames, dataset.points, 3), np.float32)
    out = {name: pose if name == "pose" else np.empty(len(clips), object) for name in columns}
    ends = _ends(dataset, split)
    files = np.searchsorted(ends, clips, side="right")

    def stored(file: int) -> tuple[np.ndarray, list]:
        info, places = dataset.splits[split][file], np.flatnonzero(files == file)
        rows = (clips[places] - (ends[file] - info.clips)).tolist()
        return places, shards.read_rows(dataset.folder / info.file, rows, columns, info.bytes)

    with shards.at_once(dataset.folder) as apply:
        for places, rows in apply(stored, np.unique(files)):  # each shard is opened once
            for place, row in zip(places, rows, strict=True):
                with _named(dataset, split, clips[place]):
                    for name in columns:
                        out[name][place] = _same_shape(row["pose"], pose[place]) if name == "pose" else row[name]
    return {**out, "clip": clips}


def poses(dataset: shards.Dataset, split: str, clips: np.ndarray, frames: int) -> np.ndarray:
    """Poses of clips of a split, float32 [B, frames, points, 3], of the frames in their middle; nothing is decoded."""
    wanted = middle(dataset.shape.frames, frames)
    return read(dataset, split, clips, ("pose",))["pose"][:, wanted.start : wanted.stop]


def _fresh(shape: tuple[int, ...]) -> np.ndarray:
    return np.empty(shape, np.uint8)


def decoded(
    stored: Arrays,
    dataset: shards.Dataset,
    split: str,
    frames: int | None = None,
    apply: Callable[..., Iterable] = map,
    room: Callable[[tuple[int, ...]], np.ndarray] = _fresh,
) -> Arrays:
    """What `read` gave, decoded: `video` uint8 [B, F, H*3/2, W] planes, `reference` uint8 [B, H, W, 3] RGB, `pose`
    float32 [B, F, 33 or 133, 3], of a dataset with masks `mask` uint8 [B, F, H, W], 0 or 1, all 0 where there is none.

    frames: F, those in the middle of each clip; the others are not decoded. None: all. apply: a pool's `map`, to
    decode several clips at once. room: gives the uint8 arrays of a shape that all but poses are written to.
    Raises DamagedShardError naming the shard and the row of a clip that cannot be decoded.
    """
    shape, count = dataset.shape, len(stored["clip"])
    wanted = middle(shape.frames, frames or shape.frames)
    out = {
        "video": room((count, len(wanted), shape.height * 3 // 2, shape.width)),
        "reference": room((count, shape.height, shape.width, 3)),
        "pose": stored["pose"][:, wanted.start : wanted.stop],
    }
    if dataset.masks:
        out["mask"] = room((count, len(wanted), shape.height, shape.width))

    def one(place: int) -> None:
        with _named(dataset, split, stored["clip"][place]):
            h264.decode_yuv(stored["video"][place], _only(wanted, shape.frames), out["video"][place])
            image = _decode_png(stored["reference"][place], shape.height * shape.width)
            out["reference"][place] = _same_shape(image, out["reference"][place])
            if dataset.masks:
                bits = stored["mask"][place]
                whole = masks.unpacked(bits, shape.frames, shape.height, shape.width) if bits else None
                out["mask"][place] = 0 if whole is None else whole[wanted.start : wanted.stop]

    for _ in apply(one, range(count)):
        pass
    return out


def decode(dataset: shards.Dataset, split: str, clips: np.ndarray, frames: int | None = None, room=_fresh) -> Arrays:
    """Clips of a split by their number, decoded here: `decoded` of `read`."""
    return decoded(read(dataset, split, clips), dataset, split, frames, room=room)


@functools.lru_cache(maxsize=3)
def reused(shape: tuple[int, ...]) -> np.ndarray:
    """`room` for a process that is done with a batch before it decodes the next: always the same, of three shapes.

    Arrays of more than 32 MB are new memory from the system every time, and touching that for the first time may cost
    as much as decoding into it.
    """
    return _fresh(shape)


def _ends(dataset: shards.Dataset, split: str) -> np.ndarray:
    """Number of clips up to each shard's end, int [shards]."""
    return np.cumsum([info.clips for info in dataset.splits[split]])


@contextmanager
def _named(dataset: shards.Dataset, split: str, clip: int):
    """What goes wrong with a clip inside is raised with its shard and its row there."""
    try:
        yield
    except (video.VideoError, av.error.FFmpegError, OSError, ValueError, MemoryError) as error:
        if files.may_pass(error) and not isinstance(error, av.error.FFmpegError):  # whose numbers speak of the video
            raise
        ends = _ends(dataset, split)
        file = int(np.searchsorted(ends, clip, side="right"))
        info = dataset.splits[split][file]
        place = f"{dataset.folder / info.file}, row {clip - (ends[file] - info.clips)}"
        raise shards.DamagedShardError(
            f"damaged shard {place}: {one_line(error)}; "
            "check it against dataset.json's sha256 and restore or prepare it again"
        ) from None


def middle(of: int, frames: int) -> range:
    """Which of `of` frames the `frames` in the middle are (as `entprog.data.clips.Clips.resized` takes them)."""
    first = (of - frames) // 2
    return range(first, first + frames)


def _only(wanted: range, of: int) -> range | None:
    """None where all are wanted: a clip that holds more than it should is then found out."""
    return None if len(wanted) == of else wanted


def _decode_png(data: bytes, pixels: int) -> np.ndarray:
    """A reference image, uint8 [H, W, 3], decoded by FFmpeg (faster than Pillow) unless it claims far more pixels."""
    decoder = av.CodecContext.create("png", "r")
    decoder.options = {"max_pixels": str(2 * pixels + (1 << 14))}  # FFmpeg counts padding
    (frame,) = [*decoder.decode(av.Packet(data)), *decoder.decode(None)]
    return frame.to_ndarray(format="rgb24")


def _same_shape(found: np.ndarray, due: np.ndarray) -> np.ndarray:
    """Without this numpy would broadcast a short clip over a whole one."""
    if found.shape != due.shape:
        raise ValueError(f"it decodes to {found.shape} where the dataset's shape gives {due.shape}")
    return found


def to_clips(batch: Arrays, device="cpu"):
    """Arrays of `decode` plus `position` → Clips on a device (position stays on the CPU).

    On a CPU the pixels are those of the arrays, also where these are read-only, as arrays from the object store are:
    whatever is computed begins by making other numbers of them, and nobody may write to them.
    """
    import torch

    from entprog.data.clips import Clips

    video, reference = (to_device(batch[name], device, share=True) for name in ("video", "reference"))
    mask = to_device(batch["mask"], device, share=True).bool() if "mask" in batch else None
    return Clips(video, reference, to_device(batch["pose"], device), torch.tensor(batch["position"]), mask)


def to_device(array: np.ndarray, device="cpu", share: bool = False):
    """The array as a tensor on the device; on a CPU over the same memory, but a copy of what is read-only, unless it
    is to be shared."""
    import torch

    value = torch.from_numpy(array)
    device = torch.device(device)
    if device.type != "cuda":
        return (value if share or array.flags.writeable else value.clone()).to(device)
    # A stream of its own: on the default one the copy would wait for the step that is being computed.
    with torch.cuda.stream(_copying(device)):
        copied = value.pin_memory().to(device, non_blocking=True)
        torch.cuda.current_stream(device).synchronize()
    copied.record_stream(torch.cuda.default_stream(device))
    return copied


@functools.cache
def _copying(device):
    import torch

    return torch.cuda.Stream(device)


# ---- streams ----


class Stream:
    """An endless iterator of batches that counts seconds. Close it when its shape is done with."""

    def __init__(self, batches: Iterator):
        """batches: (batch, seconds that copying it took)."""
        self._batches = batches
        self.wait_s = 0.0
        """Spent in `next` so far."""
        self.copy_s = 0.0
        """Spent copying batches to tensors on the device, most of it while their reader was at work."""

    def __iter__(self) -> "Stream":
        return self

    def __next__(self):
        started = time.perf_counter()
        try:
            batch, copy_s = next(self._batches)
            self.copy_s += copy_s
            return batch
        finally:
            self.wait_s += time.perf_counter() - started

    def close(self) -> None:
        """Stop decoding and free its CPUs. Safe to call twice."""
        self._batches.close()


def timed(collate: Callable[[Arrays], object], arrays: Arrays) -> tuple[object, float]:
    """What `collate` makes of a batch, and the seconds it took."""
    started = time.perf_counter()
    batch = collate(arrays)
    return batch, time.perf_counter() - started


def local_stream(
    dataset: shards.Dataset,
    split: str,
    shape: ClipShape,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    start_position: int = 0,
    seed: int = 0,
    device="cpu",
    frames: int | None = None,
    batches: int | None = None,
) -> Stream:
    """Clips decoded in this process without Ray, bit for bit those of `pipelines.stream.feed.stream`."""
    check_shape(dataset, shape)
    read = functools.partial(decode, dataset, split, frames=frames)
    rows = (np.arange(batch_size) + first for first in itertools.count(0, batch_size))
    positions = (rank_positions(r, start_position, batch_size, rank, world, batches) for r in rows)
    collate = functools.partial(to_clips, device=device)
    return Stream(timed(collate, at_positions(read, p, dataset.clips(split), seed)) for p in positions)


def at_positions(read: Read, positions: np.ndarray, clips: int, seed: int) -> Arrays:
    """The clips at some positions of the sequence, with their `position`. clips: how many the split has."""
    return {**read(clips_at(positions, clips, seed)), "position": positions}


def held_out(dataset: shards.Dataset, count: int, batch_size: int, rank: int = 0, world: int = 1, device="cpu") -> list:
    """This rank's part of the first `count` held-out Clips (fewer if the split has fewer): every world-th one. Of more
    ranks than clips several have the same clip, and share its draws (`held_out_share`).

    They are spread evenly over the split, whose clips lie in order of source, so that every source shows. `position` is
    the place among them (0..count-1).
    """
    clips = dataset.clips("held_out")
    if not clips:
        raise UserError(f"shards {dataset.folder} have no held-out clips: prepare them with a held-out source")
    count = min(count, clips)
    mine = np.array(held_out_share(count, rank, world)[0])
    parts = [mine[first : first + batch_size] for first in range(0, len(mine), batch_size)]
    return [
        to_clips({**decode(dataset, "held_out", held_out_numbers(dataset, count, part)), "position": part}, device)
        for part in parts
    ]


def held_out_numbers(dataset: shards.Dataset, count: int, positions: np.ndarray) -> np.ndarray:
    """Numbers in the split of clips of `held_out`, whose places among those `count` are given."""
    clips = dataset.clips("held_out")
    return positions * clips // min(count, clips)


def held_out_share(count: int, rank: int, world: int) -> tuple[range, slice]:
    """Which of `count` held-out clips a rank has, and which draws of them: all, unless there are more ranks than
    clips."""
    return range(rank % count, count, world), slice(rank // count, None, len(range(rank % count, world, count)))
