"""Folders of a run, on a disk or behind s3:// or gs://: what checkpoints need of either, by pyarrow."""

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pyarrow import NativeFile, fs

from entprog import files
from entprog.errors import UserError
from entprog.masking import bare, has_credentials, masked, one_line

GIVE_UP_S = 20
"""Google's client tries for a quarter of an hour, which is right for a run and too long for a check before it."""


def quickly(where: str) -> str:
    """The address with options that make its client give up soon."""
    if not where.startswith(("gs://", "gcs://")) or "retry_limit_seconds" in where:
        return where
    return f"{where}{'&' if '?' in where else '?'}retry_limit_seconds={GIVE_UP_S}"


@dataclass(frozen=True)
class Place:
    """A folder. Local ones (NFS too) have atomic renames; an object store's are complete once a last file says so."""

    system: fs.FileSystem
    root: str

    @staticmethod
    def at(where: str | Path) -> "Place":
        """A path, or an address like s3://bucket/runs/7 (its settings as pyarrow has them: ?region=…,
        ?endpoint_override=…; credentials come from the environment).

        Raises UserError for an address of no known kind.
        """
        where = str(where)
        if has_credentials(where):
            raise UserError(
                f"checkpoints: {masked(where)} holds a user or password: give credentials in the environment"
            )
        if "://" not in where:
            return Place(fs.LocalFileSystem(), str(Path(where).absolute()))
        try:
            system, root = fs.FileSystem.from_uri(where)
        except (ValueError, OSError) as error:
            reason = one_line(error, where)
            raise UserError(
                f"{bare(where)} is no place for checkpoints: {reason}; use a folder, s3:// or gs://"
            ) from None
        return Place(system, root.rstrip("/"))

    def check(self) -> None:
        """Write a file and remove it. Raises UserError where that fails: before a run, not after hours of it."""
        probe = f"{self.root}/.probe-{uuid.uuid4().hex[:8]}"
        try:
            self.make()
            with self.system.open_output_stream(probe) as stream:
                stream.write(b"can this be written?")
            self.system.delete_file(probe)
        except OSError as error:
            reason = one_line(error)
            raise UserError(
                f"checkpoints cannot be written to {self}: {reason}; look at its name and at the credentials in the "
                "environment"
            ) from None

    @property
    def local(self) -> Path | None:
        """The folder, where it is one of a file system that this machine mounts."""
        return Path(self.root) if isinstance(self.system, fs.LocalFileSystem) else None

    def __truediv__(self, name: str) -> "Place":
        return Place(self.system, f"{self.root}/{name}")

    @property
    def name(self) -> str:
        return self.root.rpartition("/")[2]

    def __str__(self) -> str:
        return self.root if self.local else f"{self.system.type_name}://{self.root}"

    def folders(self) -> list[str]:
        """Names of the folders in it."""
        inside = self.system.get_file_info(fs.FileSelector(self.root, allow_not_found=True))
        return sorted(info.base_name for info in inside if info.type == fs.FileType.Directory)

    def files(self) -> dict[str, int]:
        """{name: bytes} of the files in it."""
        inside = self.system.get_file_info(fs.FileSelector(self.root, allow_not_found=True))
        return {info.base_name: info.size for info in inside if info.type == fs.FileType.File}

    def size(self, name: str) -> int:
        """Bytes of a file of it. Raises OSError."""
        with self.open(name) as file:
            return file.size()

    def open(self, name: str) -> NativeFile:
        """A file of it, to read any part of. Raises OSError."""
        return self.system.open_input_file(f"{self.root}/{name}")

    def read_json(self, name: str) -> Any:
        """Raises FileNotFoundError, OSError or ValueError."""
        with self.system.open_input_stream(f"{self.root}/{name}") as stream:
            return json.loads(stream.read())

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
        elif self.system.get_file_info(self.root).type != fs.FileType.NotFound:
            self.system.delete_dir(self.root)

    def delete(self, name: str) -> None:
        """A file of it."""
        self.system.delete_file(f"{self.root}/{name}")

    def upload(self, folder: Path) -> None:
        """Every file of a local folder."""
        fs.copy_files(
            str(folder), self.root, source_filesystem=fs.LocalFileSystem(), destination_filesystem=self.system
        )
