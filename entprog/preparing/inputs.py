"""What there is to prepare: a folder, a glob, a manifest, a list of videos, a folder of numbered images, one video.

All of them on this machine or on any fsspec filesystem, and all of them become the same rows: one source each, as the
first stage takes them. Listing opens no source.
"""

import glob
import os
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from entprog.config import digest
from entprog.errors import UserError
from entprog.media import frames
from entprog.names import plain
from entprog.preparing import fetching, manifest

Row = dict[str, Any]

SUFFIXES = frozenset(
    {".3g2", ".3gp", ".asf", ".avi", ".divx", ".dv", ".f4v", ".flv", ".gif", ".h264", ".hevc", ".ivf", ".m2ts", ".m2v"}
    | {".m4v", ".mj2", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".mxf", ".ogm", ".ogv", ".qt", ".rm", ".rmvb"}
    | {".ts", ".vob", ".webm", ".wmv", ".y4m"}
)
"""Endings of file names that are tried as videos. Others are not opened: FFmpeg takes even plain text for a video."""


@dataclass(frozen=True)
class Inputs:
    """What `--input` names."""

    kind: str
    """What the input is, for people: folder, glob, manifest, …"""
    rows: list[Row]
    """Sources by name. `file`: name for people and the ledger, unique; `path`: bytes of the path or URI; `bytes`: size,
    0 if not known; `stamp`: changes with the content, empty if not known; `frames_fps`: of a folder of images, 0 for a
    video; `caption`, `split`, `crop`: as `manifest.Entry` has them."""
    notes: tuple[str, ...] = ()
    """What a person should know."""


def find(given: str | Path, frames_fps: float, leave_out: Path | None = None) -> Inputs:
    """All sources that an input names. `leave_out`: a folder that is not searched (the output).

    Raises UserError if there are none, or if a manifest is wrong.
    """
    text = str(given)
    if text.startswith("file://"):
        text = unquote(urlsplit(text).path)
    found = (_remote if fetching.is_remote(text) else _local)(text, frames_fps, leave_out)
    if not found.rows:
        raise UserError(f"input {found.kind} {fetching.without_secrets(text)} has no files: give --input videos")
    return Inputs(found.kind, sorted(found.rows, key=lambda row: (row["file"], row["path"])), found.notes)


def is_video(row: Row) -> bool:
    """Whether a source is tried as a video, by its name."""
    return bool(row["frames_fps"]) or suffix(row) in SUFFIXES


def suffix(row: Row) -> str:
    """Ending of a source's name, in small letters."""
    path = os.fsdecode(row["path"])
    return Path(urlsplit(path).path if fetching.is_remote(path) else path).suffix.lower()


def _row(file: str, path: str, **known: Any) -> Row:
    blank = {"bytes": 0, "stamp": "", "frames_fps": 0.0, "caption": "", "split": "", "crop": ""}
    return {"file": plain(file), "path": os.fsencode(path), **blank, **known}


# ---- on this machine ----


def _local(text: str, frames_fps: float, leave_out: Path | None) -> Inputs:
    path = Path(text)
    if path.is_dir():
        rows = list(_walk(path, frames_fps, leave_out))
        return Inputs("frame folder" if len(rows) == 1 and rows[0]["frames_fps"] else "folder", rows)
    if path.is_file():
        if path.suffix.lower() in (*manifest.TABLES, *manifest.LISTS):
            return _manifest(path, text, str(path.parent), frames_fps)
        return Inputs("video", [_file(path.name, path)])
    if glob.has_magic(text):
        root = Path(*Path(text).parts[: next(i for i, p in enumerate(Path(text).parts) if glob.has_magic(p))])
        found = sorted({Path(match) for match in glob.iglob(text, recursive=True)})  # noqa: PTH207 (a path of any form)
        rows = [_entry_at(_name(match, root), match, frames_fps) for match in found]
        return Inputs("glob", [row for row in rows if row["frames_fps"] or not Path(os.fsdecode(row["path"])).is_dir()])
    wrong = "is neither a file nor a folder" if path.exists() else "does not exist"
    raise UserError(f"input {text} {wrong}: give --input a folder, a glob, a manifest or a list of videos")


def _name(path: Path, root: Path) -> str:
    """A file's name for people: inside the input, as UTF-8 whatever its bytes; no two files have the same."""
    return os.fsencode(path.relative_to(root)).replace(b"\\", b"\\\\").decode("utf-8", "backslashreplace")


def _entry_at(file: str, path: Path, frames_fps: float) -> Row:
    """A path that may be a folder of numbered images."""
    listable = path.is_dir() and os.access(path, os.R_OK | os.X_OK)
    names = frames.numbered([entry.name for entry in path.iterdir()]) if listable else []
    return _images(file, path, names, frames_fps) if names else _file(file, path)


def _file(file: str, path: Path) -> Row:
    try:
        known = path.stat()
    except (OSError, ValueError):  # a link to nowhere, or gone since it was listed: the first stage says so
        return _row(file, str(path))
    return _row(file, str(path), bytes=known.st_size, stamp=fetching.stamp(known))


def _images(file: str, folder: Path, names: Iterable[str], fps: float) -> Row:
    rows = [_file(name, folder / name) for name in names]
    told = digest([(row["file"], row["stamp"]) for row in rows])
    return _row(file, str(folder), bytes=sum(row["bytes"] for row in rows), stamp=told, frames_fps=fps)


def _walk(folder: Path, frames_fps: float, leave_out: Path | None) -> Iterator[Row]:
    """Every file in a folder and its subfolders but hidden ones; a sequence of numbered images is one source.

    Links are followed, each folder is entered once.
    """
    entered = set() if leave_out is None else {leave_out.resolve()}
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = Path(parent).resolve()
        if real in entered:
            folders.clear()
            continue
        entered.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files = [name for name in files if not name.startswith(".")]
        images = [name for name in frames.numbered(files) if Path(parent, name).is_file()]
        if images:
            here = Path(parent)
            yield _images(_name(here, folder) if here != folder else here.resolve().name, here, images, frames_fps)
        for name in sorted(set(files) - set(images)):
            yield _file(_name(Path(parent, name), folder), Path(parent, name))


# ---- elsewhere ----


def _remote(uri: str, frames_fps: float, leave_out: Path | None) -> Inputs:
    files, path = fetching.filesystem(uri)
    ending = Path(urlsplit(uri).path).suffix.lower()
    try:
        if ending in (*manifest.TABLES, *manifest.LISTS):
            with tempfile.TemporaryDirectory() as scratch:
                copy = Path(scratch, f"manifest{ending}")
                copy.write_bytes(files.cat_file(path))
                return _manifest(copy, fetching.without_secrets(uri), uri.rpartition("/")[0], frames_fps)
        if glob.has_magic(path) and files.protocol not in ("http", "https"):
            kind, found = "glob", files.glob(path, detail=True)
        elif ending in SUFFIXES:
            return Inputs("video", [_row(fetching.without_secrets(uri).rpartition("/")[2], uri)])
        else:
            kind, found = "folder", files.find(path, detail=True, on_error="raise")
    except UserError:
        raise
    except Exception as error:  # each filesystem's library has exceptions of its own
        told = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        told = told.replace(uri, fetching.without_secrets(uri))
        raise UserError(f"cannot read input {fetching.without_secrets(uri)} ({told})") from None
    return Inputs(f"{kind} on {uri.partition('://')[0]}", list(_remote_rows(files, path, found, frames_fps)))


def _remote_rows(files, root: str, found: dict[str, Row], frames_fps: float) -> Iterator[Row]:
    """Sources among a listing {path: what is known of it}."""
    root = root.rstrip("/")
    while glob.has_magic(root):
        root = root.rpartition("/")[0]
    of_folder = defaultdict(list)
    for path, known in found.items():
        folder, _, name = path.rpartition("/")
        if known.get("type") != "directory" and not any(p.startswith(".") for p in path[len(root) :].split("/")):
            of_folder[folder].append(name)
    for folder, names in of_folder.items():
        images = frames.numbered(names)
        if images:
            known = [found[f"{folder}/{name}"] for name in images]
            size = sum(item.get("size") or 0 for item in known)
            name = fetching.without_secrets(folder[len(root) + 1 :] or folder.rpartition("/")[2])
            told = digest([(name, _version(item)) for name, item in zip(images, known, strict=True)])
            yield _row(name, files.unstrip_protocol(folder), bytes=size, stamp=told, frames_fps=frames_fps)
        for name in set(names) - set(images):
            path = f"{folder}/{name}"
            known = found[path]
            size = known.get("size") or 0
            yield _row(path[len(root) + 1 :], files.unstrip_protocol(path), bytes=size, stamp=_version(known))


def _version(known: Row) -> str:
    """What a filesystem says that changes with a file's content; empty if it says nothing but the size."""
    for name in ("ETag", "etag", "md5Hash", "content_md5", "LastModified", "last_modified", "updated", "mtime"):
        if known.get(name):
            return f"{known.get('size')}-{known[name]}"
    return ""


# ---- manifests ----


def _manifest(path: Path, name: str, base: str, frames_fps: float) -> Inputs:
    entries, unread = manifest.read(path, name)
    kind = "video list" if path.suffix.lower() in manifest.LISTS else "manifest"
    rows, row_of = [], {}
    for number, entry in enumerate(entries, 1):
        row = _entry_row(entry, base, frames_fps)
        before = row_of.setdefault(row["file"], number)
        if before != number:
            raise UserError(f"{kind} {name}: rows {before} and {number} are both {row['file']!r}; leave one out")
        rows.append(row)
    notes = (f"columns of {name} that are not read: {', '.join(unread)}",) if unread else ()
    return Inputs(kind, rows, notes)


def _entry_row(entry: manifest.Entry, base: str, frames_fps: float) -> Row:
    """A manifest's entry as a source. Its name is the path as it is written, without secrets, and its crop."""
    text = entry.path
    if text.startswith("file://"):
        text = unquote(urlsplit(text).path)
    path = text if fetching.is_remote(text) else f"{base}/{text}" if fetching.is_remote(base) else Path(base, text)
    path = str(path)
    told = {"caption": entry.caption, "split": entry.split, "crop": entry.crop}
    file = text + (f"@{entry.crop}" if entry.crop else "")
    if fetching.is_remote(path):
        fetching.filesystem(path)  # said now, not once for each row of a long job
        file = fetching.without_secrets(text) + (f"@{entry.crop}" if entry.crop else "")
        query = urlsplit(text).query
        file += f"?{digest(query)[:8]}" if query else ""
        is_folder = entry.fps or not (Path(urlsplit(path).path).suffix or path.startswith("http"))
        return _row(file, path, frames_fps=(entry.fps or frames_fps) if is_folder else 0.0) | told
    row = _entry_at(file, Path(path), entry.fps or frames_fps)
    return row | told | ({"frames_fps": entry.fps} if entry.fps else {})
