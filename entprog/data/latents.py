"""Latents encoded once: what training clips look like to the network, kept beside the shards they were encoded from.

SHARDS/latents/KEY/
  latents.json                           what they are; written last: a folder without it is not finished
  train/00000-000000-000035.safetensors  rows 0 to 34 of shard train/00000.parquet

A file holds `clean` and `conditions.NAME`, float32 [N, C, F', H', W'], dimensions along which a value only repeats
stored once, and `crc32` int64 [N] over a clip's bytes. Of a VAE that encodes in bfloat16 (`model.vae_dtype`) the upper
halves of the float32 numbers are stored, uint16, wherever the lower ones are zero: as read, they are the same.

KEY is a hash of all that encoding depends on: the VAE's weights and configuration, the type it encodes in, the family,
the conditions, the clip shape. A file belongs to one shard by that shard's sha256: a dataset that has grown needs only
its new shards encoded.
"""

import contextlib
import functools
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pyarrow import NativeFile
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from entprog import files, masking, storage
from entprog.config import ClipShape, digest
from entprog.data import shards
from entprog.errors import UserError
from entprog.files import from_json
from entprog.media import styles
from entprog.storage import Place, Where, tensors

if TYPE_CHECKING:
    from entprog.data.clips import Clips, Latents

# torch is imported where tensors are made: tasks that read run in processes of their own that never need it.

FORMAT = "entprog-latents-1"
FOLDER = "latents"
RECORD = "latents.json"
SPLIT = "train"
"""Held-out clips are few, and encoded when a run starts."""
FILE_BYTES = 64 << 20
"""About the size of one file: what a kill may cost, and what Ray passes on at a time."""
OF_SAVING = ("architectures", "dtype", "torch_dtype", "transformers_version")
"""What transformers adds to a configuration when it saves it."""
AGAIN = "delete its folder and run python -m pipelines.prepare --latents again"


class DamagedLatentsError(UserError):
    """Cached latents that are not what was written. The message names the file and what to do."""


@dataclass(frozen=True)
class Piece:
    """Rows of one shard, encoded into one file."""

    shard: str
    """The shard's path inside the dataset's folder."""
    shard_sha256: str
    first: int
    stop: int

    @property
    def file(self) -> str:
        """Path inside the cache's folder."""
        return f"{self.shard.removesuffix('.parquet')}-{self.first:06d}-{self.stop:06d}.safetensors"

    @property
    def clips(self) -> int:
        return self.stop - self.first


@dataclass(frozen=True)
class Written:
    """A finished file, as `latents.json` lists it."""

    piece: Piece
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Cache:
    """A finished cache."""

    folder: Where
    shapes: dict[str, tuple[int, ...]]
    """Tensor → shape of one clip, repeated dimensions in full."""
    files: tuple[Written, ...]
    """The files, in the order of the split's clips."""

    @property
    def clip_bytes(self) -> int:
        """Mean stored bytes of a clip."""
        return sum(file.bytes for file in self.files) // max(sum(file.piece.clips for file in self.files), 1)


# ---- encoding ----


def encode(denoiser, clips: "Clips") -> "Latents":
    """`denoiser.encode`, with a VAE clip by clip: the bits of a convolution may depend on how many clips share a batch,
    and a clip's latents must not, so that a cache, another batch size and other workers give the same ones."""
    import torch

    from entprog.data.clips import Latents

    if denoiser.vae is None:
        return denoiser.encode(clips)
    parts = [denoiser.encode(clips.part(slice(i, i + 1))) for i in range(len(clips.position))]
    conditions = {name: torch.cat([part.conditions[name] for part in parts]) for name in parts[0].conditions}
    return Latents(torch.cat([part.clean for part in parts]), conditions, clips.position, clips.pose)


def key(denoiser, family: str, shape: ClipShape, masks: bool = False) -> str:
    """Hash of all that latents depend on beside the clips. shape: of the clips that are encoded; masks: whether these
    have any."""
    from torch import nn

    from entprog.data.hashing import content_hash

    modules = {field.name: getattr(denoiser, field.name) for field in fields(denoiser) if field.name != "network"}
    hashes = {
        name: [type(module).__name__, content_hash(module), _configuration(module)]
        for name, module in modules.items()
        if isinstance(module, nn.Module)
    }
    form = [denoiser.form] if denoiser.form else []
    form += [denoiser.trained_with] if denoiser.trained_with else []
    form += ["own first frame"] if denoiser.first else []
    form += [str(denoiser.vae_autocast)] if denoiser.vae_autocast else []
    form += styles.version(denoiser.skeleton) if "pose" in denoiser.conditions else []
    form += _processing(getattr(denoiser, "image_processor", None))
    form += ["masks"] if masks and denoiser.replaces else []
    return digest(FORMAT, hashes, family, denoiser.conditions, shape.model_dump(), *form)


def _processing(processor) -> list[dict[str, Any]]:
    """How pictures are brought to what an image encoder sees, where that is not as published bases have it."""
    if processor is None:
        return []
    own, usual = ({k: v for k, v in each.to_dict().items() if v is not None} for each in (processor, type(processor)()))
    differing = {name: own.get(name) for name in {*own, *usual} if own.get(name) != usual.get(name)}
    return [differing] if differing else []


def _configuration(module) -> dict[str, Any]:
    """Without what changes when the same network is saved anew."""
    values = getattr(module, "config", {})
    values = values.to_dict() if hasattr(values, "to_dict") else dict(values)  # transformers', diffusers'
    return {k: v for k, v in values.items() if not k.startswith("_") and k not in OF_SAVING}


# ---- a cache as it is written ----


def folder_of(dataset: shards.Dataset, key: str) -> Where:
    """Where the cache of a key lies, finished or not."""
    return dataset.folder / FOLDER / key


def pieces(dataset: shards.Dataset, clip_bytes: int) -> list[Piece]:
    """How the clips are spread over files. clip_bytes: of one clip's latents."""
    rows = max(FILE_BYTES // clip_bytes, 1)
    return [
        Piece(shard.file, shard.sha256, first, min(first + rows, shard.clips))
        for shard in dataset.splits.get(SPLIT, ())
        for first in range(0, shard.clips, rows)
    ]


def compact(batch: "Latents") -> dict[str, np.ndarray]:
    """Tensors of one clip's latents, as `denoiser.encode` gave them: dimensions that only repeat have length 1."""
    tensors = {"clean": batch.clean} | {f"conditions.{name}": value for name, value in batch.conditions.items()}
    return {name: _once(value.float()).cpu().numpy() for name, value in tensors.items()}


def _once(value):
    for dimension, stride in enumerate(value.stride()):
        if stride == 0:
            value = value.narrow(dimension, 0, 1)
    return value


def write(folder: Where, piece: Piece, clips: Sequence[dict[str, np.ndarray]], *, halves: bool = False) -> Written:
    """Write a file, whole or not at all. clips: of `compact`, in order of row; halves: stored as `stored` says."""
    tensors = stored({name: np.concatenate([clip[name] for clip in clips]) for name in clips[0]}, halves)
    tensors["crc32"] = np.array([_crc32(clip) for clip in clips], np.int64)
    path = folder / piece.file
    with files.whole(path) as scratch:
        save_file(tensors, scratch, metadata={"format": FORMAT, "shard_sha256": piece.shard_sha256})
        return Written(piece, scratch.stat().st_size, files.sha256(scratch))


def stored(tensors: dict[str, np.ndarray], halves: bool) -> dict[str, np.ndarray]:
    """Tensors as a file holds them: with `halves`, those that bfloat16 holds to the bit as its bits, uint16."""
    bits = {name: value.view(np.uint32) for name, value in tensors.items() if halves}
    small = {name: (value >> 16).astype(np.uint16) for name, value in bits.items() if not (value & 0xFFFF).any()}
    return tensors | small


def _in_full(value: np.ndarray) -> np.ndarray:
    """float32, of what `stored` made of it."""
    return value if value.dtype == np.float32 else (value.astype(np.uint32) << 16).view(np.float32)


def _crc32(clip: dict[str, np.ndarray]) -> int:
    out = 0
    for name in sorted(clip):
        out = zlib.crc32(np.ascontiguousarray(clip[name]), out)
    return out


def written(folder: Where, piece: Piece) -> Written | None:
    """A finished file of an earlier attempt, every byte of it looked at; None if there is none. Raises
    `UnreachableError` where a bucket does not answer."""
    path = folder / piece.file
    try:
        with _local(path) as local, safe_open(local, "numpy") as file:
            if (file.metadata() or {}).get("shard_sha256") != piece.shard_sha256:
                return None
            names = [name for name in file.keys() if name != "crc32"]  # noqa: SIM118
            sums = file.get_tensor("crc32")
            tensors = {name: _in_full(file.get_tensor(name)) for name in names}
            whole = len(sums) == piece.clips and all(
                _crc32({name: value[i : i + 1] for name, value in tensors.items()}) == sums[i] for i in range(len(sums))
            )
            return Written(piece, local.stat().st_size, files.sha256(local)) if whole else None
    except (OSError, SafetensorError, KeyError, IndexError) as error:
        storage.answered(path, error)
        return None


@contextlib.contextmanager
def _local(path: Where) -> Iterator[Path]:
    """A file of a cache on this machine, one in a bucket for as long as the block lasts."""
    if isinstance(path, Path):
        yield path
        return
    with tempfile.NamedTemporaryFile(prefix="latents-") as copy:
        copy.write(path.read_bytes())
        copy.flush()
        yield Path(copy.name)


def finish(
    folder: Where, shapes: dict[str, tuple[int, ...]], pieces: Sequence[Written], about: dict[str, Any]
) -> Cache:
    """Write `latents.json`; what else lies in the folder (of shards that are gone) is left alone."""
    record = {"format": FORMAT, "about": about, "tensors": shapes, "files": [asdict(file) for file in pieces]}
    files.write_json(folder / RECORD, record)
    return read_cache(folder)


# ---- a cache as it is read ----


def read_cache(folder: Where) -> Cache:
    """A finished cache's description. Raises DamagedLatentsError, OSError where a bucket or a disk does not answer."""
    try:
        record = from_json((folder / RECORD).read_text())
        if record["format"] != FORMAT:
            raise ValueError(f"format {record['format']!r}")
        pieces = tuple(Written(**{**file, "piece": Piece(**file["piece"])}) for file in record["files"])
        shapes = {name: tuple(shape) for name, shape in record["tensors"].items()}
        for file in pieces:
            if not storage.inside(folder, file.piece.file):
                raise ValueError(f"a file outside the folder: {file.piece.file!r}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if files.may_pass(error) or (isinstance(folder, Place) and isinstance(error, OSError)):
            raise  # it may answer the next time
        reason = masking.reason(error)
        raise DamagedLatentsError(f"{folder}/latents.json is damaged ({reason}): {AGAIN}") from None
    return Cache(folder, shapes, pieces)


def find(dataset: shards.Dataset, key: str) -> Cache | None:
    """The finished cache of all the dataset's training clips as they are now, or None."""
    folder = folder_of(dataset, key)
    if not (folder / RECORD).exists():
        return None
    cache = read_cache(folder)
    covered: dict[tuple[str, str], int] = {}
    for file in cache.files:
        piece = file.piece
        if covered.get((piece.shard, piece.shard_sha256), 0) != piece.first:
            return None
        covered[piece.shard, piece.shard_sha256] = piece.stop
    wanted = {(shard.file, shard.sha256): shard.clips for shard in dataset.splits.get(SPLIT, ())}
    order = list(dict.fromkeys((file.piece.shard, file.piece.shard_sha256) for file in cache.files))
    return cache if covered == wanted and order == list(wanted) else None


def verify(cache: Cache, how: Literal["auto", "sha256", "size"]) -> None:
    """Check every file: its size, and with `sha256` every byte; `auto`: as `shards.verify`. Raises DamagedLatentsError
    naming the first bad one, `UnreachableError` where a bucket does not answer."""
    remote = isinstance(cache.folder, Place)
    if how == "auto":
        how = "size" if remote else "sha256"
    sizes = shards.sizes(cache.folder, (file.piece.file for file in cache.files)) if remote else {}
    for file in cache.files:
        path = cache.folder / file.piece.file
        try:
            size = sizes.get(file.piece.file) if remote else path.stat().st_size
            if size == file.bytes and (how == "size" or files.sha256(path) == file.sha256):
                continue
        except OSError as error:
            storage.answered(path, error)
        raise DamagedLatentsError(f"damaged latents {path}: not what latents.json says; {AGAIN}")


def read(cache: Cache, clips: np.ndarray) -> dict[str, np.ndarray]:
    """Latents of training clips by their number: `clean` and `conditions.NAME`, float32 [B, …], repeated dimensions
    once. Raises DamagedLatentsError naming file and row, OSError where a bucket or a disk does not answer."""
    ends = np.cumsum([file.piece.clips for file in cache.files])
    files = np.searchsorted(ends, clips, side="right")
    found: list[dict[str, np.ndarray] | None] = [None] * len(clips)

    def stored(number: int) -> tuple[Where, np.ndarray, list[int], list]:
        file, places = cache.files[number], np.flatnonzero(files == number)
        path, rows = cache.folder / file.piece.file, (clips[places] - (ends[number] - file.piece.clips)).tolist()
        read_rows = functools.partial(_rows, path) if isinstance(path, Path) else functools.partial(_away, path, file)
        return path, places, rows, [*read_rows(rows, list(cache.shapes))]

    with shards.at_once(cache.folder) as apply:
        for path, places, rows, some in apply(stored, np.unique(files)):  # each file is opened once
            for place, row, clip in zip(places, rows, some, strict=True):
                found[place] = clip
                if clip is None:
                    raise DamagedLatentsError(f"damaged latents {path}, row {row}: {AGAIN}")
    return {name: np.concatenate([clip[name] for clip in found]) for name in cache.shapes}


def _rows(path: Path, rows: Sequence[int], names: Sequence[str]) -> Iterator[dict[str, np.ndarray] | None]:
    """Clips of a file; None for one that cannot be read or whose checksum differs."""
    try:
        with safe_open(path, "numpy") as file:
            sums = file.get_tensor("crc32")
            for row in rows:
                clip = {name: _in_full(file.get_slice(name)[row : row + 1]) for name in names}
                yield clip if _crc32(clip) == sums[row] else None
    except (OSError, SafetensorError, IndexError) as error:
        if files.may_pass(error := files.cause(error, path)):
            raise error from None
        yield from [None] * len(rows)


_NUMBERS = {"F32": np.dtype("<f4"), "U16": np.dtype("<u2"), "I64": np.dtype("<i8")}
"""Types in a file of a cache."""


@functools.lru_cache(maxsize=256)
def _opened(path: Place, about: Written) -> tuple[NativeFile, dict[str, tensors.Stored], np.ndarray] | None:
    """A file in a bucket, what lies where in it, and the checksums of its clips; None where it is not what it was.
    Latents of another shard may have as many bytes, each with its right checksum: the header tells them apart."""
    try:
        file = path.ranges()
        if file.size() != about.bytes:
            return None
        found, texts = tensors.header(file)
        if texts.get("shard_sha256") != about.piece.shard_sha256:
            return None
        sums = found["crc32"]
        return file, found, np.frombuffer(tensors.ranged(file, sums.begin, sums.end), _NUMBERS[sums.dtype])
    except (FileNotFoundError, ValueError, KeyError):
        return None


def _away(path: Place, about: Written, rows: Sequence[int], names: Sequence[str]):
    """`_rows` of a file in a bucket, of which each clip's own bytes are read. Raises OSError."""
    opened = _opened(path, about)
    if opened is None:
        yield from [None] * len(rows)
        return
    file, found, sums = opened
    try:
        for row in rows:
            clip = {name: _in_full(_row(file, found[name], row)) for name in names}
            yield clip if _crc32(clip) == sums[row] else None
    except (KeyError, IndexError):
        yield from [None] * len(rows)


def _row(file: NativeFile, stored: tensors.Stored, row: int) -> np.ndarray:
    begin = stored.begin + row * stored.row_bytes
    content = tensors.ranged(file, begin, begin + stored.row_bytes)
    return np.frombuffer(content, _NUMBERS[stored.dtype]).reshape(1, *stored.shape[1:])


def to_latents(arrays: dict[str, np.ndarray], shapes: dict[str, tuple[int, ...]], to_device) -> "Latents":
    """What `read` gave, with `position` and maybe `pose`, as the stream's latents, value for value. to_device: array →
    tensor."""
    import torch

    from entprog.data.clips import Latents

    whole = {name: to_device(arrays[name]).expand(-1, *shape) for name, shape in shapes.items()}
    conditions = {name.removeprefix("conditions."): value for name, value in whole.items() if name != "clean"}
    pose = to_device(arrays["pose"]) if "pose" in arrays else None
    return Latents(whole["clean"], conditions, torch.tensor(arrays["position"]), pose)


def located(cache: Cache) -> Cache:
    """The cache with an absolute path, for tasks that run in another directory."""
    return replace(cache, folder=cache.folder.resolve())


def free_bytes(folder: Path) -> int:
    """Bytes free on the disk of a folder."""
    return shutil.disk_usage(folder).free
