"""A file in a bucket as a stream, of which some parts are held in memory."""

import io
from collections.abc import Iterable
from typing import TYPE_CHECKING

from entprog.storage.tensors import ranged

if TYPE_CHECKING:
    from pyarrow import NativeFile

GAP_BYTES = 1 << 16
"""Ranges no further apart are asked for as one: an answer takes as long as a few of these."""


class Ranged(io.RawIOBase):
    """Reads what is held from memory, and the rest from the bucket, an answer for every call."""

    def __init__(self, file: "NativeFile", size: int, held: Iterable[tuple[int, bytes]] = ()):
        """held: (place in the file, content)."""
        self.file, self.size, self.held, self.at = file, size, [*held], 0

    def hold(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Fetch what lies from begin to end of each. Raises OSError."""
        for begin, end in merged(ranges):
            self.held.append((begin, ranged(self.file, begin, end)))

    def readinto(self, into) -> int:
        view = memoryview(into).cast("B")
        count = max(min(len(view), self.size - self.at), 0)
        if not count:
            return 0
        for begin, content in self.held:
            if begin <= self.at and self.at + count <= begin + len(content):
                view[:count] = memoryview(content)[self.at - begin : self.at - begin + count]
                break
        else:
            view[:count] = ranged(self.file, self.at, self.at + count)
        self.at += count
        return count

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.size}[whence]
        return self.at

    def tell(self) -> int:
        return self.at

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


def merged(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """In order, those that touch or nearly do as one."""
    out: list[tuple[int, int]] = []
    for begin, end in sorted(ranges):
        if out and begin - out[-1][1] <= GAP_BYTES:
            out[-1] = out[-1][0], max(end, out[-1][1])
        else:
            out.append((begin, end))
    return out
