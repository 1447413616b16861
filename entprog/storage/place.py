"""Folders and files on a disk or behind s3:// and gs://: what of either is needed, by pyarrow."""

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO, Literal
from urllib.parse import quote

from entprog import files
from entprog.errors import UnreachableError, UserError
from entprog.masking import bare, has_credentials, masked, one_line, query

if TYPE_CHECKING:
    from pyarrow import NativeFile, fs

PROBE = ".probe-"
"""Beginning of the names of files by which it is tried whether a folder can be written."""
BUFFER_BYTES = 8 << 20
"""Of a file that is read from start to end: an answer each."""
GIVE_UP_S = 20
"""Google's client tries for a quarter of an hour, which is right for a run and too long for a check before it."""


def quickly(where: str) -> str:
    """The address with options that make its client give up soon."""
    if not where.startswith(("gs://", "gcs://")) or "retry_limit_seconds" in where:
        return where
    return f"{where}{'&' if '?' in where else '?'}retry_limit_seconds={GIVE_UP_S}"


def at(where: "str | Where", what: str) -> "Where":
    """A folder of this machine as its path, one behind an address as a Place. what: lies there, for messages.

    Raises UserError for an address of no known kind.
    """
    if isinstance(where, str) and "://" in where:
        place = Place.at(where, what)
        return place.local or place  # file:// names a folder of this machine
    return where if isinstance(where, Place) else files.home(where)


def address(where: "Where") -> str:
    """What `at` makes the same of."""
    return where.address if isinstance(where, Place) else str(where)


def within(where: str, name: str) -> str:
    """Path or address of what is called so in the folder at `where`, whose settings it keeps. Asks no bucket."""
    before, mark, settings = where.partition("?") if "://" in where else (where, "", "")
    return f"{before.rstrip('/')}/{name}{mark}{settings}"


def inside(folder: "Where", name: str) -> bool:
    """Whether a name in a folder's own record is one of a file inside it."""
    if isinstance(folder, Place):
        return not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts
    root = folder.resolve()
    return (root / name).resolve().is_relative_to(root)


def _arrow():
    """pyarrow's file systems, imported where one is used: networks alone need none."""
    from pyarrow import fs

    return fs


@dataclass(frozen=True)
class Place:
    """A folder, or a file in one. Local folders (NFS too) have atomic renames; an object store's are complete once a
    last file says so. Processes pass places on to each other; credentials do not go with them."""

    system: "fs.FileSystem" = field(compare=False)
    root: str
    form: tuple[str, str] = ("", "")
    """What stands before and after `root` in its address."""

    @staticmethod
    def at(where: "str | Where", what: str = "checkpoints") -> "Place":
        """A path, or an address like s3://bucket/runs/7 (its settings as pyarrow has them: ?region=…,
        ?endpoint_override=…; credentials come from the environment). A Place is itself. what: is to lie there.

        Raises UserError for an address of no known kind.
        """
        if isinstance(where, Place):  # what it is shown as has no settings
            return where
        where = str(where)
        if has_credentials(where):
            raise UserError(f"{what}: {masked(where)} holds a user or password: give credentials in the environment")
        if "://" not in where:
            return Place(_arrow().LocalFileSystem(), str(files.home(where).absolute()))
        try:
            system, root = _arrow().FileSystem.from_uri(where)
        except (ValueError, OSError) as error:
            reason = one_line(error, where)
            raise UserError(f"{bare(where)} is no place for {what}: {reason}; use a folder, s3:// or gs://") from None
        if not root.strip("/") and not isinstance(system, _arrow().LocalFileSystem):
            raise UserError(f"{bare(where)} names no bucket for {what}: give s3://BUCKET/FOLDER or gs://BUCKET/FOLDER")
        scheme, _, rest = where.partition("://")
        user = "anonymous@" if rest.startswith("anonymous@") else ""
        return Place(system, root.rstrip("/"), (f"{scheme}://{user}", query(where)))

    def check(self, what: str = "checkpoints") -> None:
        """Write a file and remove it. Raises UserError where that fails: before a run, not after hours of it."""
        probe = f"{self.root}/{PROBE}{uuid.uuid4().hex[:8]}"
        try:
            self.make()
            with self.system.open_output_stream(probe) as stream:
                stream.write(b"can this be written?")
            self.system.delete_file(probe)
        except OSError as error:
            reason = one_line(error)
            raise UserError(
                f"{what} cannot be written to {self}: {reason}; look at its name and at the credentials in the "
                "environment"
            ) from None

    @property
    def local(self) -> Path | None:
        """The folder, where it is one of a file system that this machine mounts."""
        return Path(self.root) if isinstance(self.system, _arrow().LocalFileSystem) else None

    def __truediv__(self, name: str) -> "Place":
        return replace(self, root=f"{self.root}/{name}")

    @property
    def name(self) -> str:
        return self.root.rpartition("/")[2]

    @property
    def parent(self) -> "Place":
        return replace(self, root=self.root.rpartition("/")[0])

    @property
    def address(self) -> str:
        """What `at` makes this place of. Not to be shown: it holds the settings that were given."""
        before, after = self.form
        return f"{before}{quote(self.root)}{'?' + after if after else ''}" if before else self.root

    def __str__(self) -> str:
        return self.root if self.local else f"{self.form[0].partition(':')[0] or self.system.type_name}://{self.root}"

    def folders(self) -> list[str]:
        """Names of the folders in it."""
        return sorted(name for name, size in self._inside().items() if size is None)

    def files(self) -> dict[str, int]:
        """{name: bytes} of the files in it."""
        return {name: size for name, size in self._inside().items() if size is not None}

    def _inside(self) -> dict[str, int | None]:
        """{name: bytes, None of a folder} of what is in it; nothing where it is not there. Raises OSError."""
        if self.system.type_name == "gcs":  # whose client lists no folder that is one by the names of files alone
            parts = ((name.partition("/"), size) for name, size in self.below().items())
            return {first: None if rest else size for (first, _, rest), size in parts}
        inside = self.system.get_file_info(_arrow().FileSelector(self.root, allow_not_found=True))
        return {info.base_name: info.size if info.type == _arrow().FileType.File else None for info in inside}

    def written_ns(self) -> dict[str, int]:
        """Names of files in it → when they were written; 0 where the store does not say. Raises OSError."""
        found = self.system.get_file_info([f"{self.root}/{name}" for name in self.files()])
        return {info.base_name: info.mtime_ns or 0 for info in found}

    def size(self, name: str) -> int:
        """Bytes of a file of it. Raises OSError."""
        with (self / name).ranges() as file:
            return file.size()

    # ---- as a Path is asked ----

    def resolve(self) -> "Place":
        """Itself: an address is the same in every folder."""
        return self

    def exists(self) -> bool:
        """Raises OSError."""
        return self.system.get_file_info(self.root).type != _arrow().FileType.NotFound

    def is_dir(self) -> bool:
        """Raises OSError."""
        return self.system.get_file_info(self.root).type == _arrow().FileType.Directory

    def is_file(self) -> bool:
        """Raises OSError."""
        return self.system.get_file_info(self.root).type == _arrow().FileType.File

    def mkdir(self, **_) -> None:
        """Nothing: a bucket's folders are there with the first file in them."""

    def iterdir(self) -> Iterator["Place"]:
        """What is in it; nothing where it is not there. Raises OSError."""
        return (self / name for name in self._inside())

    def glob(self, pattern: str) -> Iterator["Place"]:
        """Files and folders in it whose names fit."""
        return (path for path in self.iterdir() if fnmatchcase(path.name, pattern))

    def open(self, mode: Literal["rb"] = "rb") -> "NativeFile":
        """The file that it is, to read from its start to its end. Raises OSError."""
        return self.system.open_input_stream(self.root, buffer_size=BUFFER_BYTES)

    def read_bytes(self) -> bytes:
        """Of the file that it is. Raises OSError."""
        with self.system.open_input_stream(self.root) as stream:
            return stream.read()

    def read_text(self) -> str:
        return self.read_bytes().decode()

    def write_bytes(self, content: bytes) -> None:
        """As the file that it is, whole or not at all. Raises OSError."""
        with self.system.open_output_stream(self.root) as stream:
            stream.write(content)

    def write_text(self, text: str) -> None:
        self.write_bytes(text.encode())

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove the file that it is."""
        try:
            self.system.delete_file(self.root)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def rmdir(self) -> None:
        """Remove the folder that it is; OSError if something is in it."""
        if any(True for _ in self.iterdir()):
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(self))
        self.remove()

    def replace(self, target: "Place") -> "Place":
        """Move the file that it is to `target`, over what is there: a copy that is whole or not there, then removed."""
        self.system.copy_file(self.root, target.root)
        self.unlink()
        return target

    def put(self, path: Path) -> None:
        """A local file's content as the file that it is, whole or not at all. Raises OSError."""
        _arrow().copy_files(
            str(path), self.root, source_filesystem=_arrow().LocalFileSystem(), destination_filesystem=self.system
        )

    def get(self, path: Path) -> None:
        """The file that it is as a local one, which gets its time of change; left as it is where it has that and the
        size already. Raises OSError."""
        info = self.system.get_file_info(self.root)
        if path.is_file() and (path.stat().st_size, path.stat().st_mtime_ns) == (info.size, info.mtime_ns):
            return
        with files.whole(path) as scratch:
            _arrow().copy_files(
                self.root,
                str(scratch),
                source_filesystem=self.system,
                destination_filesystem=_arrow().LocalFileSystem(),
            )
            if info.mtime_ns is not None:
                os.utime(scratch, ns=(info.mtime_ns, info.mtime_ns))

    # ---- as neither is ----

    def below(self) -> dict[str, int]:
        """{path inside it: bytes} of the files in it and in the folders below it. Raises OSError."""
        inside = self.system.get_file_info(_arrow().FileSelector(self.root, allow_not_found=True, recursive=True))
        start = len(self.root) + 1
        return {info.path[start:]: info.size for info in inside if info.type == _arrow().FileType.File}

    def ranges(self) -> "NativeFile":
        """The file that it is, to read any part of. Raises OSError."""
        return self.system.open_input_file(self.root)

    def read_json(self, name: str) -> Any:
        """Raises FileNotFoundError, OSError or ValueError."""
        with self.system.open_input_stream(f"{self.root}/{name}") as stream:
            return files.from_json(stream.read())

    @contextmanager
    def create(self, name: str) -> Iterator[BinaryIO]:
        """A stream that becomes a file of it; on a disk it lies there when this ends."""
        if self.local is None:
            with self.system.open_output_stream(f"{self.root}/{name}") as stream:
                yield stream
            return
        with (self.local / name).open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())

    def write_json(self, name: str, value: Any) -> None:
        with self.create(name) as stream:
            stream.write(files.strict_json(value).encode())

    def make(self) -> None:
        """Make the folder, where folders are made."""
        if self.local:
            self.local.mkdir(parents=True, exist_ok=True)

    def remove(self) -> None:
        if self.local:
            shutil.rmtree(self.local, ignore_errors=True)
        elif self.system.get_file_info(self.root).type != _arrow().FileType.NotFound:
            with suppress(FileNotFoundError):  # Google's: of what stands for the folder alone, when all in it has gone
                self.system.delete_dir(self.root)

    def delete(self, name: str) -> None:
        """A file of it."""
        self.system.delete_file(f"{self.root}/{name}")

    def upload(self, folder: Path) -> None:
        """Every file of a local folder."""
        _arrow().copy_files(
            str(folder), self.root, source_filesystem=_arrow().LocalFileSystem(), destination_filesystem=self.system
        )


Where = Path | Place
"""A folder or file of this machine, or one in a bucket, which answers as a Path does as far as it is asked."""


def answered(path: Where, error: BaseException) -> None:
    """Raises UnreachableError for an error that leaves open whether a file is there and what is in it: such a file is
    neither missing nor damaged."""
    away = isinstance(path, Place) and isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
    error = files.cause(error, path) if isinstance(path, Path) else error
    if away or files.may_pass(error):
        raise UnreachableError(f"cannot read {path}: {one_line(error)}") from None
