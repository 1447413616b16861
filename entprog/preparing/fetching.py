"""A source's bytes on this machine, for as long as a stage works on them.

Local sources are read where they are. Remote ones (any fsspec filesystem: s3://, gs://, https://, …) are copied into a
scratch folder, within the size limit, and are gone with the stage: a data set can be larger than a disk.
"""

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from entprog.errors import UserError
from entprog.media import frames
from entprog.media.video import VideoError
from entprog.preparing.attempts import MachineError

PIECE_BYTES = 1 << 20


def is_remote(path: str) -> bool:
    """Whether a path is a URI of another filesystem than this machine's."""
    return "://" in path and not path.startswith("file://")


def filesystem(uri: str):
    """(fsspec filesystem, path in it). Raises UserError for a protocol that is not known or not installed."""
    import fsspec

    if "::" in uri:  # chains fetch, unpack and cache by rules of their own
        raise UserError(f"{without_secrets(uri)}: chained addresses ('::') are not read; give the file's own address")
    try:
        return fsspec.core.url_to_fs(uri)
    except (ImportError, ValueError) as error:  # s3fs is not installed; no such protocol
        raise UserError(f"cannot read {without_secrets(uri)}: {' '.join(str(error).split())[:200]}") from None


def without_secrets(uri: str) -> str:
    """An address for people and logs: without user, password and query, in which signatures and tokens stand."""
    if not is_remote(uri):
        return uri
    parts = urlsplit(uri)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


@contextmanager
def fetched(row: dict[str, Any], max_bytes: int, heard=lambda pieces: pieces) -> Iterator[Path]:
    """A source's path on this machine. `heard` goes over the pieces of a remote file as they come in.

    Raises VideoError: `unreadable` (missing, not permitted, not a plain file, not answered), `too_large`,
    `changed` (a local file that is not what was listed).
    """
    path = os.fsdecode(row["path"])
    if not is_remote(path):
        yield _local(Path(path), row, max_bytes)
        return
    with tempfile.TemporaryDirectory(prefix="entprog-") as scratch:
        try:
            yield _copy(path, Path(scratch), row, max_bytes, heard)
        except _RemoteError as error:
            told = f"{row['file']}: {type(error.reason).__name__}: {' '.join(str(error.reason).split())[:200]}"
            raise VideoError("unreadable", told.replace(path, without_secrets(path))) from None


class _RemoteError(Exception):
    def __init__(self, reason: Exception):
        super().__init__(str(reason))
        self.reason = reason


def _local(path: Path, row: dict[str, Any], max_bytes: int) -> Path:
    try:
        known = path.stat()
    except OSError as error:
        raise VideoError("unreadable", f"{row['file']}: {error.strerror}") from None
    if row["frames_fps"]:
        if not stat.S_ISDIR(known.st_mode):
            raise VideoError("unreadable", f"{row['file']}: not a folder of numbered images")
        if row["bytes"] > max_bytes:
            raise VideoError("too_large", f"{row['file']}: {row['bytes']} bytes, more than {max_bytes} are not read")
        return path
    if not stat.S_ISREG(known.st_mode):  # a pipe would be waited for without end
        raise VideoError("unreadable", f"{row['file']}: not a plain file")
    if row["stamp"] and row["stamp"] != stamp(known):
        raise VideoError("changed", f"{row['file']}: it was changed after it was listed; run the command again")
    if known.st_size > max_bytes:
        raise VideoError("too_large", f"{row['file']}: {known.st_size} bytes, more than {max_bytes} are not read")
    return path


def stamp(known: os.stat_result) -> str:
    """What tells a local file from a changed one without reading it."""
    return f"{known.st_size}-{known.st_mtime_ns}"


def _copy(uri: str, scratch: Path, row: dict[str, Any], max_bytes: int, heard) -> Path:
    try:
        files, path = filesystem(uri)
        if not row["frames_fps"]:
            target = scratch / f"source{Path(path).suffix}"
            _download(files, path, target, max_bytes, row, heard)
            return target
        left = max_bytes
        names = {item.rstrip("/").rpartition("/")[2]: item for item in files.ls(path, detail=False)}
        for name in frames.numbered(list(names)):
            left -= _download(files, names[name], scratch / name, left, row, heard)
        return scratch
    except (VideoError, MachineError):
        raise
    except Exception as error:  # each filesystem's library has exceptions of its own
        raise _RemoteError(error) from None


def _download(files, path: str, target: Path, max_bytes: int, row: dict[str, Any], heard) -> int:
    got = 0
    with files.open(path, "rb") as stream, target.open("wb") as out:
        for piece in heard(iter(lambda: stream.read(PIECE_BYTES), b"")):
            got += len(piece)
            if got > max_bytes:
                raise VideoError("too_large", f"{row['file']}: more than {max_bytes} bytes are not read")
            try:
                out.write(piece)
            except OSError as error:
                raise MachineError(f"cannot write to the scratch folder {target.parent}: {error.strerror}") from None
    return got
