"""A source's bytes on this machine, for as long as a stage works on them.

Local sources are read where they are. Remote ones (s3://, gs://, https://, http://, by fsspec) are copied into a
scratch folder, within the size limit, and are gone with the stage: a data set can be larger than a disk.
"""

import hashlib
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from entprog.config import Prepare, digest
from entprog.masking import reason
from entprog.media import frames
from entprog.media.video import VideoError
from entprog.names import plain
from entprog.preparing import addresses, attempts
from entprog.preparing.addresses import AddressError
from entprog.preparing.attempts import MachineError
from entprog.preparing.rows import Source, ending

PIECE_BYTES = 1 << 20


@contextmanager
def fetched(row: Source, prepare: Prepare, heartbeats=lambda pieces: pieces) -> Iterator[Path]:
    """A source's path on this machine. `heartbeats` goes over the pieces of a remote file as they come in.

    Raises VideoError: `bad_address`, `unreadable` (missing, not permitted, not a plain file, not answered),
    `too_large`, `changed`: a local source is not what was listed, before or after it was read; a remote one is not what
    the first stage has hashed.
    """
    check(row, prepare)
    path = os.fsdecode(row["path"])
    if not addresses.is_remote(path):
        yield _local(Path(path), row, prepare.max_bytes)
        _local(Path(path), row, prepare.max_bytes)  # else what was read may be in part, or all, of another content
        return
    with attempts.scratch(tempfile.TemporaryDirectory) as scratch:
        try:
            copy = _copy(path, Path(scratch), row, prepare, heartbeats)
            if row.get("sha256", "") not in ("", sha256(copy, heartbeats)):
                raise changed(row["file"])
            yield copy
        except _RemoteError as error:
            refused = addresses.cause(error.reason)
            if refused is not None:
                raise VideoError("bad_address", f"{row['file']}: {refused}") from None
            raise VideoError("unreadable", f"{row['file']}: {reason(error.reason, path)}") from None


def check(row: Source, prepare: Prepare) -> None:
    """Raises VideoError `bad_address` for a source whose address is not read."""
    path = os.fsdecode(row["path"])
    if path.startswith("file://"):  # listed files of this machine are paths
        raise VideoError("bad_address", f"{row['file']}: a manifest on another machine cannot name files of this one")
    if addresses.is_remote(path):
        try:
            addresses.check(path, prepare.hosts)
        except AddressError as error:
            raise VideoError("bad_address", str(error)) from None


class _RemoteError(Exception):
    def __init__(self, reason: Exception):
        super().__init__(str(reason))
        self.reason = reason


def _local(path: Path, row: Source, max_bytes: int) -> Path:
    try:
        known = path.stat()
    except (OSError, ValueError) as error:  # gone, not permitted; a name that no file can have
        raise VideoError("unreadable", f"{row['file']}: {getattr(error, 'strerror', error)}") from None
    if row["frames_fps"]:
        if not stat.S_ISDIR(known.st_mode):
            raise VideoError("unreadable", f"{row['file']}: not a folder of numbered images")
        if row["bytes"] > max_bytes:
            raise VideoError("too_large", f"{row['file']}: {row['bytes']} bytes, more than {max_bytes} are not read")
        now = _images_stamp(path)
        if "" not in (row["stamp"], now) and row["stamp"] != now:
            raise changed(row["file"])
        return path
    if not stat.S_ISREG(known.st_mode):  # a pipe would be waited for without end
        raise VideoError("unreadable", f"{row['file']}: not a plain file")
    if row["stamp"] not in ("", stamp(known)):
        raise changed(row["file"])
    if known.st_size > max_bytes:
        raise VideoError("too_large", f"{row['file']}: {known.st_size} bytes, more than {max_bytes} are not read")
    return path


def stamp(known: os.stat_result) -> str:
    """What tells a local file from a changed one without reading it."""
    return f"{known.st_size}-{known.st_mtime_ns}"


def images(folder: Path, names: Iterable[str]) -> tuple[int, str]:
    """(bytes of all, the same) of a folder of numbered images; the stamp is empty where one of them is gone."""
    try:
        known = [(name, (folder / name).stat()) for name in names]
    except OSError:
        return 0, ""
    return sum(each.st_size for _, each in known), digest([(plain(name), stamp(each)) for name, each in known])


def _images_stamp(folder: Path) -> str:
    try:
        return images(folder, [path.name for path in frames.paths(folder)])[1]
    except VideoError:  # it is no such folder now: whoever reads it says so
        return ""


def sha256(path: Path, heartbeats=lambda pieces: pieces) -> str:
    """Hash of a source's content: of a file, or of a folder of numbered images. `heartbeats`: over its pieces."""
    if path.is_dir():
        return frames.sha256(path, heartbeats)
    whole = hashlib.sha256()
    with path.open("rb") as stream:  # in pieces, as it may take long
        for piece in heartbeats(iter(lambda: stream.read(PIECE_BYTES), b"")):
            whole.update(piece)
    return whole.hexdigest()


def changed(name: str) -> VideoError:
    """The verdict on a file of this name whose content is not what was listed."""
    return VideoError("changed", f"{name}: it was changed after it was listed; run the command again")


def _copy(address: str, scratch: Path, row: Source, prepare: Prepare, heartbeats) -> Path:
    try:
        files, path = addresses.filesystem(address, prepare.hosts)
        if not row["frames_fps"]:
            target = scratch / f"source{ending(address)}"
            download(files, path, target, prepare.max_bytes, row["file"], heartbeats)
            return target
        left = prepare.max_bytes
        lister, _ = addresses.filesystem(address, prepare.hosts, listing=True)
        names = {item.rstrip("/").rpartition("/")[2]: item for item in lister.ls(path, detail=False)}
        for name in frames.numbered(list(names)):
            left -= download(files, names[name], scratch / name, left, row["file"], heartbeats)
        return scratch
    except (VideoError, MachineError):
        raise
    except Exception as error:  # each filesystem's library has exceptions of its own
        raise _RemoteError(error) from None


def download(files, path: str, target: Path, max_bytes: int, name: str, heartbeats=lambda pieces: pieces) -> int:
    """Copy a file of an fsspec filesystem to `target`; its size in bytes.

    Raises VideoError `too_large`, MachineError where it cannot be written, and what the filesystem raises.
    """
    got = 0
    with files.open(path, "rb") as stream, target.open("wb") as out:
        for piece in heartbeats(iter(lambda: stream.read(PIECE_BYTES), b"")):
            got += len(piece)
            if got > max_bytes:
                raise VideoError("too_large", f"{name}: more than {max_bytes} bytes are not read")
            try:
                out.write(piece)
            except OSError as error:
                raise MachineError(f"cannot write to the scratch folder {target.parent}: {error.strerror}") from None
    return got
