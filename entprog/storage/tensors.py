"""Safetensors files in parts, wherever they lie: what a file holds and where, and the bytes of some of it."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from entprog import files

if TYPE_CHECKING:
    from pyarrow import NativeFile

WIDTHS = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Bytes of a number, by the format's name of its type."""
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000
"""As safetensors itself has it."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    dtype: str
    """By the format's name: a key of WIDTHS."""
    shape: tuple[int, ...]
    begin: int
    """Bytes from the file's start."""
    end: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one index of the first dimension; of a single number, its own."""
        return math.prod(self.shape[1:]) * WIDTHS[self.dtype]


def header(file: "NativeFile") -> tuple[dict[str, Stored], dict[str, str]]:
    """(the file's tensors by name, the texts that its writer added); no tensor is read.

    Raises ValueError where this is not a file of the format, OSError where it cannot be read.
    """
    size = file.size()
    if size < _LENGTH_BYTES:
        raise ValueError("it is too short")
    length = int.from_bytes(ranged(file, 0, _LENGTH_BYTES), "little")
    start = _LENGTH_BYTES + length
    if length > _MAX_HEADER_BYTES or start > size:
        raise ValueError("its header is damaged")
    try:
        entries = files.from_json(ranged(file, _LENGTH_BYTES, start))
        texts = entries.pop("__metadata__", {})
        if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
            raise TypeError
        found = {name: _stored(entry, start) for name, entry in entries.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"its header is damaged ({type(error).__name__})") from None
    for name, tensor in found.items():
        if not start <= tensor.begin <= tensor.end <= size or tensor.end - tensor.begin != _bytes(tensor):
            raise ValueError(f"its header is damaged ({name!r})")
    return found, texts


def header_of(tensors: Sequence[tuple[str, str, Sequence[int]]], texts: Mapping[str, str]) -> bytes:
    """The header of a file that holds tensors (name, type, shape) one after another in this order.

    Numbers of wider types belong first: then all lie where their width divides their place.
    """
    entries: dict[str, Any] = {"__metadata__": dict(texts)}
    at = 0
    for name, dtype, shape in tensors:
        end = at + math.prod(shape) * WIDTHS[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def _stored(entry: dict, start: int) -> Stored:
    """Raises KeyError or TypeError for an entry that is none of the format's."""
    (begin, end), shape = entry["data_offsets"], entry["shape"]
    if not isinstance(shape, list) or any(type(number) is not int or number < 0 for number in (begin, end, *shape)):
        raise TypeError
    if entry["dtype"] not in WIDTHS:  # a TypeError where it is a list
        raise KeyError
    return Stored(entry["dtype"], tuple(shape), start + begin, start + end)


def _bytes(tensor: Stored) -> int:
    return math.prod(tensor.shape) * WIDTHS[tensor.dtype]


def ranged(file: "NativeFile", begin: int, end: int) -> bytes:
    """The bytes from begin to end. Threads may ask at once. Raises OSError where there are fewer."""
    found = file.read_at(end - begin, begin)
    if len(found) != end - begin:
        raise OSError(f"{len(found)} of {end - begin} bytes could be read")
    return found
