"""Where the frames of an mp4 lie, read from its tables without a demuxer.

FFmpeg's demuxer decodes a clip's first frame before it says what the file holds, and asks for its bytes by calls into
Python, which counts where clips are small. What `h264.encode` writes needs none: one track of H.264, frame
after frame, at a constant rate. Only that is read here.
"""

import struct
from dataclasses import dataclass

import numpy as np

_ENTRY_BYTES = 86
"""Of a description of video, before the boxes in it."""
_SCALE_AT = 12
"""Where a movie's or a track's header says how many units of time make a second."""


@dataclass(frozen=True)
class Samples:
    """A track's frames, in the order in which they are stored, decoded and shown."""

    extradata: bytes
    """The decoder's configuration (`avcC`)."""
    begins: np.ndarray
    """int64 [F + 1]: place in the file of each frame's first byte, and of the last one's end."""
    keys: np.ndarray
    """int64, ascending from 0: frames that are decoded without one before them."""

    def __len__(self) -> int:
        return len(self.begins) - 1

    def key(self, frame: int) -> int:
        """The key frame at or before a frame."""
        return int(self.keys[np.searchsorted(self.keys, frame, side="right") - 1])


def of(mp4: bytes) -> Samples | None:
    """The frames of a file that is as `h264.encode` writes it; None for any other."""
    try:
        return _samples(memoryview(mp4))
    except (ValueError, LookupError, struct.error):
        return None


def _samples(mp4: memoryview) -> Samples:
    movie = _boxes(_boxes(mp4, "ftyp free mdat moov")["moov"], "mvhd trak udta")
    track = _boxes(movie["trak"], "tkhd edts mdia")
    media = _boxes(track["mdia"], "mdhd hdlr minf")
    tables = _boxes(_boxes(media["minf"], "vmhd dinf stbl")["stbl"], "stsd stts stss stsc stsz stco")
    _due(media["hdlr"][8:12] == b"vide")

    constant, count = struct.unpack_from(">4xII", tables["stsz"])
    sizes = _numbers(tables["stsz"], 12, count)
    ((lasting, each),) = _table(tables["stts"], 2)
    _due(constant == 0 and lasting == count > 0 and (sizes > 0).all())
    if "edts" in track:  # all of it is shown, from its beginning on
        ((shown, begin, rate),) = _table(_boxes(track["edts"], "elst")["elst"], 3)
        whole = (count - 0.5) * each * _scale(movie["mvhd"])
        _due(begin == 0 and rate == 1 << 16 and shown * _scale(media["mdhd"]) > whole)

    chunks, runs = _table(tables["stco"], 1)[:, 0], _table(tables["stsc"], 3)
    in_chunks = np.repeat(runs[:, 1], np.diff(np.append(runs[:, 0] - 1, len(chunks))))
    begins = chunks[0] + np.append(0, np.cumsum(sizes))
    _due(runs[0, 0] == 1 and in_chunks.sum() == count and begins[-1] <= len(mp4))
    _due((begins[np.cumsum(in_chunks) - in_chunks] == chunks).all())  # one behind the other

    keys = _table(tables["stss"], 1)[:, 0] - 1 if "stss" in tables else np.arange(count)
    _due(keys[0] == 0 and (np.diff(keys) > 0).all())
    return Samples(_configuration(tables["stsd"]), begins, keys)


def _configuration(description: memoryview) -> bytes:
    count, size, codec = struct.unpack_from(">4xII4s", description)
    _due(count == 1 and codec == b"avc1" and size == len(description) - 8)
    return bytes(_boxes(description[8 + _ENTRY_BYTES :], "avcC pasp colr btrt fiel")["avcC"])


def _boxes(part: memoryview, names: str) -> dict[str, memoryview]:
    """Content of the boxes in a part of a file, which are of these names and there once each. Raises ValueError."""
    known, found, at = names.split(), {}, 0
    while at < len(part):
        size, code = struct.unpack_from(">I4s", part, at)
        name = code.decode("latin1")
        _due(name in known and name not in found and 8 <= size <= len(part) - at)
        found[name] = part[at + 8 : at + size]
        at += size
    return found


def _table(box: memoryview, columns: int) -> np.ndarray:
    """int64 [entries, columns] of a box that begins with their number."""
    (count,) = struct.unpack_from(">4xI", box)
    return _numbers(box, 8, count * columns).reshape(count, columns)


def _numbers(box: memoryview, at: int, count: int) -> np.ndarray:
    """int64 [count] of numbers of 32 bits in a box of the oldest version."""
    _due(box[0] == 0)
    return np.frombuffer(box, ">u4", count, at).astype(np.int64)


def _scale(header: memoryview) -> int:
    return int(_numbers(header, _SCALE_AT, 1)[0])


def _due(holds: bool) -> None:
    if not holds:
        raise ValueError("not as `h264.encode` writes it")
