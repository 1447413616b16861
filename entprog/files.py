"""Files: written whole or not at all, as strict JSON, told apart by their content, sorted as people number them."""

import errno
import hashlib
import json
import math
import os
import re
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

PASSING = frozenset(
    {errno.EAGAIN, errno.EBUSY, errno.ECONNRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.EIO, errno.EMFILE}
    | {errno.ENETDOWN, errno.ENETUNREACH, errno.ENFILE, errno.ENOMEM, errno.ENOTCONN, errno.ESTALE, errno.ETIMEDOUT}
)
"""Errors of a file system that say nothing of the file itself."""


def may_pass(error: BaseException) -> bool:
    """Whether a file was not read for what another try may mend: a network disk that is away, too many open files."""
    return isinstance(error, OSError) and error.errno in PASSING


def cause(error: BaseException, path: Path) -> BaseException:
    """What kept a file from being opened, as the system has it: safetensors calls all of that a FileNotFoundError, and
    gives no number. Any other error as it is."""
    if not isinstance(error, FileNotFoundError) or error.errno is not None:
        return error
    try:
        path.open("rb").close()
    except OSError as own:
        return own
    return OSError(errno.EAGAIN, "could not be opened, and can be a moment later", str(path))


def home(path: str | Path) -> Path:
    """The path, with the home folder for a `~` at its start: a shell leaves that as it is in quotes and after `=`."""
    try:
        return Path(path).expanduser()
    except RuntimeError:  # of nobody known: a folder may be called so
        return Path(path)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A scratch path beside `path` to write to; it takes the place of `path` when the block ends without an exception.

    A reader never sees half a file, not even after a power cut, and two writers never share a scratch file, on whatever
    machines. The folder is made. A path of a bucket (`storage.Place`) gets its content when the block ends.
    """
    if not isinstance(path, Path):
        with tempfile.TemporaryDirectory(prefix="entprog-") as folder:
            scratch = Path(folder) / path.name
            yield scratch
            path.put(scratch)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        yield scratch
        with scratch.open("rb") as written:
            os.fsync(written.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with whole(path) as scratch:
        scratch.write_text(text)


def write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    """Write strict JSON whole or not at all: what is not finite becomes null, what JSON lacks its text."""
    write_text(path, strict_json(value, indent) + "\n")


def strict_json(value: Any, indent: int | None = None) -> str:
    """JSON that every reader takes: numbers that are not finite become null, what JSON has no word for its text."""
    return json.dumps(_finite(value), indent=indent, default=str, allow_nan=False)


def from_json(text: str | bytes) -> Any:
    """What a JSON text says. Raises ValueError where it is none, also where it is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def opened(path: Path, mode: str) -> IO[Any]:
    """Open a file of this machine to write to, and no link: what it points to is another's. Raises OSError."""
    return open(path, mode, opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o666))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces. Raises OSError where it cannot be read."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def lies_in(path: Path, folder: Path) -> bool:
    """Whether a file of a folder, which may be a link, lies in that folder itself; or is what the hub's cache keeps of
    a snapshot: a link into the `blobs` beside its `snapshots`."""
    real, root = Path(os.path.realpath(path)), Path(os.path.realpath(folder))  # a link in a circle raises nothing
    cache = next((above.parent for above in root.parents if above.name == "snapshots"), None)
    return real.is_relative_to(root) or (cache is not None and real.is_relative_to(cache / "blobs"))


def natural(name: str) -> list[tuple[int, str]]:
    """A sort key under which `blocks.2` comes before `blocks.10`."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]
