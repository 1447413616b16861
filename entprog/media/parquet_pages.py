"""What a Parquet file's pages say of themselves, read before one is unpacked.

The sizes in a file's footer are what its writer claims, and nobody checks them: a page of a few kilobytes may become
gigabytes. The size in a page's own header is the one that memory is taken for, and that unpacking cannot exceed.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import pyarrow.parquet as pq

MAX_PAGES = 100_000
"""Of one column of one row group; writers make pages of about a megabyte."""
_HEADER_BYTES, _MAX_HEADER_BYTES = 1 << 9, 1 << 20
_BINARY, _STRUCT = 8, 12
_DICTIONARY = 2
_HEADER_OF = {0: 5, _DICTIONARY: 7, 3: 8}
"""Field of a page header that holds the header of its kind: of a data page, a dictionary, a data page in version 2."""
_ENCODING_IN = {5: 2, 7: 2, 8: 4}
"""Field of that which says how values are encoded; field 1 is their number."""
_ENTRY_BYTES = 16
"""In memory for every text of a dictionary, beside the text."""
_UNREAD = {6: "DELTA_LENGTH_BYTE_ARRAY", 7: "DELTA_BYTE_ARRAY"}
"""Encodings of texts that hold a count of their own, for which Arrow takes memory before it looks at another."""


@dataclass(frozen=True)
class Page:
    """One page of a column."""

    bytes: int
    """In memory, unpacked."""
    values: int
    """0 for a dictionary."""


def of_column(file: BinaryIO, column: pq.ColumnChunkMetaData) -> Iterator[Page]:
    """The pages of a column of a row group that a reader would unpack. Raises ValueError where they are damaged."""
    at, dictionary = column.data_page_offset, column.dictionary_page_offset
    if column.has_dictionary_page and dictionary and dictionary < at:
        at = dictionary
    end, seen, pages = at + column.total_compressed_size, 0, 0
    while seen < column.num_values and at < end:
        header, length = _header(file, at)
        kind = header.get(1)
        field = _HEADER_OF.get(kind, 0) if isinstance(kind, int) else 0
        of_kind = header.get(field)
        of_kind = of_kind if isinstance(of_kind, dict) else {}
        numbers = (kind, header.get(2), header.get(3), of_kind.get(1) if field else 0)
        written_as = of_kind.get(_ENCODING_IN.get(field), 0)
        if not all(isinstance(number, int) and number >= 0 for number in (*numbers, written_as)):
            raise ValueError("a page's header is damaged")
        _, unpacked, packed, values = numbers
        if encoding := _UNREAD.get(written_as):
            raise ValueError(f"column {column.path_in_schema} is written as {encoding}, which is not read")
        pages += 1
        if pages > MAX_PAGES:
            raise ValueError(f"column {column.path_in_schema} has more than {MAX_PAGES} pages")
        if kind == _DICTIONARY:
            yield Page(max(packed, unpacked, _ENTRY_BYTES * values), 0)
        else:
            yield Page(max(packed, unpacked), values)
            seen += values
        at += length + packed


def _header(file: BinaryIO, at: int) -> tuple[dict[int, Any], int]:
    """(fields of the page header at an offset, its length in bytes)."""
    size = _HEADER_BYTES
    while True:
        file.seek(at)
        text = _Compact(file.read(size))
        try:
            return text.struct(), text.at
        except IndexError:  # cut off
            if len(text.content) < size or size >= _MAX_HEADER_BYTES:
                raise ValueError("a page's header is damaged") from None
            size *= 8


class _Compact:
    """Thrift's compact protocol, as far as page headers need it. Raises IndexError at the end of the content."""

    def __init__(self, content: bytes):
        self.content, self.at = content, 0

    def struct(self, depth: int = 0) -> dict[int, Any]:
        """{field: its value}, of those that are whole numbers or structs; others are passed over."""
        fields: dict[int, Any] = {}
        field = 0
        while kind := self._byte():
            field = field + (kind >> 4) if kind >> 4 else self._number()
            fields[field] = self._value(kind & 15, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (1, 2):  # a truth, which its kind tells
            return None
        if kind == 3:
            return self._byte()
        if kind in (4, 5, 6):
            return self._number()
        if kind in (7, _BINARY):
            self._skip(8 if kind == 7 else self._varint())
            return None
        if kind == _STRUCT and depth < 8:
            return self.struct(depth + 1)
        raise ValueError("a page's header is damaged")  # page headers have no lists

    def _byte(self) -> int:
        self._skip(1)
        return self.content[self.at - 1]

    def _skip(self, length: int) -> None:
        self.at += length
        if self.at > len(self.content):
            raise IndexError

    def _varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError("a page's header is damaged")

    def _number(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)


def footer_bytes(file: BinaryIO) -> int:
    """Length of a file's footer, by its last bytes; 0 if it is too short to have one."""
    size = file.seek(0, os.SEEK_END)
    if size < 12:
        return 0
    file.seek(size - 8)
    return int.from_bytes(file.read(4), "little")
