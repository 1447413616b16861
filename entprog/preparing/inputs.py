"""What there is to prepare: a folder, a glob, a manifest, a list of videos, a folder of numbered images, one video.

All of them on this machine or on any fsspec filesystem, and all of them become the same rows: one source each, as the
first stage takes them. Listing opens no source.
"""

import glob
import os
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from entprog.config import Preparation, Prepare, digest
from entprog.errors import UserError
from entprog.files import home, may_pass
from entprog.masking import bare, query, reason, shown
from entprog.media import frames, limits, posefile
from entprog.media.video import VideoError
from entprog.names import plain
from entprog.preparing import addresses, beside, disk, fetching, manifest, sequences
from entprog.preparing.addresses import AddressError
from entprog.preparing.rows import SUFFIXES, Source, ending, is_video, suffix
from entprog.storage import Place, Where


@dataclass(frozen=True)
class Inputs:
    """What `--input` names."""

    kind: str
    """In words: folder, glob, manifest, …"""
    rows: list[Source]
    """By name."""
    notes: tuple[str, ...] = ()
    """What a person should know."""


def find(given: str | Path, prepare: Prepare = Prepare(), leave_out: Where | None = None) -> Inputs:
    """All sources that an input names. `leave_out`: a folder that is not searched (the output), here or in a bucket.

    Raises UserError if there are none, if two have one name, or if a manifest is wrong.
    """
    text = str(given)
    if text.startswith("file://"):
        text = _local_path(text)
    if addresses.is_remote(text):
        found = _remote(text, prepare, leave_out)
        found = _with(found, *beside.elsewhere(found.rows))
    else:
        found = _local(text, prepare, leave_out)
        found = _with(found, *beside.poses(found.rows, _root(text)))
        found = _with(found, *beside.person_masks(found.rows, _root(text)))
    found = _with(found, found.rows, sequences.notes(found.rows))
    if not found.rows:
        raise UserError(f"input {found.kind} {shown(text)} has no files: give --input videos")
    rows = sorted(found.rows, key=lambda row: (row["file"], row["path"]))
    for one, other in pairwise(rows):  # parts and ledger know a source by its name
        if one["file"] == other["file"]:
            paths = " and ".join(shown(plain(os.fsdecode(row["path"]))) for row in (one, other))
            raise UserError(f"input {shown(text)}: {paths} would both be called {one['file']!r}: rename one of them")
    return Inputs(found.kind, rows, found.notes)


def _with(found: Inputs, rows: list[Source], notes: Iterable[str]) -> Inputs:
    """The same with other rows, and further notes."""
    return Inputs(found.kind, rows, (*found.notes, *notes))


def trusting(settings: Preparation, given: str | Path) -> Preparation:
    """The settings with the input's own host among `prepare.hosts`: a person has named it."""
    try:
        host = addresses.host(str(given))
    except AddressError:  # `find` says so
        host = ""
    if not host:
        return settings
    hosts = tuple(dict.fromkeys((*settings.prepare.hosts, host)))
    return settings.model_copy(update={"prepare": settings.prepare.model_copy(update={"hosts": hosts})})


def all_gone(found: Inputs) -> str | None:
    """In words that nothing which a manifest or a list names is there; None: something is, or lies elsewhere."""
    paths = [os.fsdecode(row["path"]) for row in found.rows]
    if found.kind not in ("manifest", "video list") or any(map(addresses.is_remote, paths)):
        return None
    if any(row["stamp"] for row in found.rows):
        return None
    return (
        f"none of the {len(paths)} files that the {found.kind} names is there, such as {plain(paths[0])}: paths are "
        "meant from its own folder"
    )


def no_videos(found: Inputs) -> str | None:
    """In words that nothing in a listing is a video by its name; None: something is."""
    if any(map(is_video, found.rows)):
        return None
    return (
        f"none of the {len(found.rows)} files of the {found.kind} is a video by its name, such as "
        f"{found.rows[0]['file']}: give --input videos ({', '.join(sorted(SUFFIXES))})"
    )


def _local_path(address: str) -> str:
    """The path that a file:// address names."""
    try:
        return unquote(urlsplit(address).path)
    except ValueError as error:
        raise UserError(f"cannot read {address}: {error}") from None


def _row(file: str, path: str, **known: Any) -> Source:
    blank = {"bytes": 0, "stamp": "", "frames_fps": 0.0, "caption": "", "split": "", "crop": ""}
    blank |= {"poses": b"", "poses_stamp": "", "mask": b"", "mask_stamp": ""}
    return {"file": plain(file), "path": os.fsencode(path), **blank, **known}


# ---- on this machine ----


def _local(text: str, prepare: Prepare, leave_out: Where | None) -> Inputs:
    if text.startswith("~"):
        text = str(home(text))
    path, fps = Path(text), prepare.frames_fps
    if disk.is_folder(path):
        if isinstance(leave_out, Path) and leave_out.resolve() == path.resolve():
            raise UserError(f"input and output are the same folder, {text}: give another --output")
        rows = list(_walk(path, fps, leave_out))
        kind = "frame folder" if len(rows) == 1 and rows[0]["frames_fps"] else "folder"
        return _captioned(Inputs(kind, rows, _tables_among(rows)), _root(text))
    if disk.is_file(path):
        if path.suffix.lower() in (*manifest.TABLES, *manifest.LISTS):
            found = _manifest(path, text, str(path.parent), prepare)
            return _captioned(found, _root(text)) if path.suffix.lower() in manifest.LISTS else found
        if path.suffix.lower() not in SUFFIXES:
            raise UserError(
                f"input {text} is no video by its name: give --input a folder, a glob, a manifest, a list of videos or "
                f"a video ({', '.join(sorted(SUFFIXES))})"
            )
        return _captioned(Inputs("video", [_file(path.name, path)]), _root(text))
    if glob.has_magic(text):
        root = _root(text)
        found = disk.once(set(disk.matches(root, path.parts[len(root.parts) :])))
        found = [match for match in found if not text.endswith("/") or disk.is_folder(match)]
        rows = [_entry_at(_name(match, root), match, fps) for match in found]
        rows = [row for row in rows if row["frames_fps"] or not disk.is_folder(Path(os.fsdecode(row["path"])))]
        return _captioned(Inputs("glob", rows), root)
    wrong = "is neither a file nor a folder" if path.exists() else "does not exist"
    raise UserError(f"input {text} {wrong}: give --input a folder, a glob, a manifest or a list of videos")


def _captioned(found: Inputs, root: Path) -> Inputs:
    return _with(found, *beside.captions(found.rows, root))


def _tables_among(rows: Iterable[Source]) -> tuple[str, ...]:
    """A note on files in a folder that could be its manifest."""
    named = [row for row in rows if "/" not in row["file"] and suffix(row) in manifest.TABLES]
    found = [row["file"] for row in named if not row["file"].endswith(posefile.ENDINGS)]
    return (f"{', '.join(found[:3])}: not read; if that is the manifest, give it as --input",) if found else ()


def _root(text: str) -> Path:
    """The folder of an input on this machine: itself, or the one in which what it names lies."""
    path = home(text)
    if path.is_dir() or not glob.has_magic(text):
        return path if path.is_dir() else path.parent
    return Path(*path.parts[: next(i for i, part in enumerate(path.parts) if glob.has_magic(part))])


def _name(path: Path, root: Path) -> str:
    """A file's name for people: inside the input, as UTF-8 whatever its bytes; no two files have the same."""
    return os.fsencode(path.relative_to(root)).replace(b"\\", b"\\\\").decode("utf-8", "backslashreplace")


def _entry_at(file: str, path: Path, frames_fps: float) -> Source:
    """A path that may be a folder of numbered images."""
    names = [name for name in frames.numbered(disk.names(path)) if Path(path, name).is_file()]
    return _images(file, path, names, frames_fps) if names else _file(file, path)


def _file(file: str, path: Path) -> Source:
    try:
        known = path.stat()
    except (OSError, ValueError) as error:  # a link to nowhere, or gone since it was listed: the first stage says so
        if may_pass(error) and path.suffix.lower() not in SUFFIXES:  # perhaps a folder of videos
            disk.refuse(error, path)
        return _row(file, str(path))
    return _row(file, str(path), bytes=known.st_size, stamp=fetching.stamp(known))


def _images(file: str, folder: Path, names: Iterable[str], fps: float) -> Source:
    size, stamp = fetching.images(folder, names)
    return _row(file, str(folder), bytes=size, stamp=stamp, frames_fps=fps)


def _walk(folder: Path, frames_fps: float, leave_out: Where | None) -> Iterator[Source]:
    """Every file in a folder and its subfolders but hidden ones; a sequence of numbered images is one source.

    Links are followed, each folder is entered once. Raises UserError if one cannot be listed: a disk that fails must
    not make a smaller dataset.
    """

    entered = {leave_out.resolve()} if isinstance(leave_out, Path) else set()
    for parent, folders, files in os.walk(
        folder, onerror=lambda error: disk.refuse(error, error.filename), followlinks=True
    ):
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


def _remote(address: str, prepare: Prepare, leave_out: Where | None) -> Inputs:
    try:
        there, path = addresses.filesystem(address, prepare.hosts)
        its_ending = ending(address)
        if its_ending in (*manifest.TABLES, *manifest.LISTS):
            with tempfile.TemporaryDirectory(prefix="entprog-") as scratch:
                copy = Path(scratch, f"manifest{its_ending}")
                fetching.download(there, path, copy, limits.of(prepare).max_decoded_bytes, shown(address))
                base = addresses.split(address)._replace(query="", fragment="").geturl().rpartition("/")[0]
                return _manifest(copy, shown(address), base, prepare)
        # On the web a '?' begins a query, which may be a signature; such an address is one file's.
        pattern = bare(path) if addresses.is_web(address) else path
        lister = addresses.filesystem(address, prepare.hosts, listing=True)[0]
        if glob.has_magic(pattern):
            kind, found = "glob", lister.glob(path, detail=True)
        elif its_ending in SUFFIXES or (addresses.is_web(address) and query(address)):
            return Inputs("video", [_row(bare(address).rpartition("/")[2], address)])
        else:
            kind, found = "folder", lister.find(path, detail=True)
        missing = getattr(lister, "missing", [])
        if missing and not found:
            raise FileNotFoundError(missing[0])
    except UserError:
        raise
    except Exception as error:  # each filesystem's library has exceptions of its own
        message = addresses.cause(error) or (error if isinstance(error, VideoError) else reason(error, address))
        raise UserError(f"cannot read input {shown(address)} ({message})") from None
    if isinstance(leave_out, Place):
        found = _without(found, address.partition("://")[0].lower(), path.rstrip("/"), leave_out)
    rows = _told_apart(list(_remote_rows(there, path, found, prepare.frames_fps)))
    texts = sum(suffix(row) == ".txt" for row in rows)
    notes = [f"{texts} .txt files there are not read as captions: a manifest can hold them"] if texts else []
    if missing:
        notes.append(f"{len(missing)} folders there were not found ({shown(missing[0])})")
    return Inputs(f"{kind} on {address.partition('://')[0]}", rows, tuple(notes))


def _without(found: dict[str, dict[str, Any]], protocol: str, root: str, output: Place) -> dict[str, dict[str, Any]]:
    """A listing of what lies below `root` without what lies in the output; one of a folder of the output in full."""
    inside = f"{output.root}/"
    if output.system.type_name != {"gs": "gcs"}.get(protocol, protocol) or root.startswith(inside):
        return found
    return {path: known for path, known in found.items() if not path.startswith(inside)}


def _remote_rows(there, root: str, found: dict[str, dict[str, Any]], frames_fps: float) -> Iterator[Source]:
    """Sources among a listing {path: what is known of it}. What does not lie in the folder itself is left out."""
    root = root.rstrip("/")
    while glob.has_magic(root):
        root = root.rpartition("/")[0]
    of_folder = defaultdict(list)
    for path, known in found.items():
        folder, _, name = path.rpartition("/")
        inside = path.startswith(f"{root}/") and not any(p.startswith(".") for p in path[len(root) :].split("/"))
        if known.get("type") != "directory" and inside:
            of_folder[folder].append(name)
    for folder, names in of_folder.items():
        images = frames.numbered(names)
        if images:
            known = [found[f"{folder}/{name}"] for name in images]
            size = sum(item.get("size") or 0 for item in known)
            name = bare(folder)[len(bare(root)) + 1 :] or folder.rpartition("/")[2]
            stamp = digest([(name, _version(item)) for name, item in zip(images, known, strict=True)])
            yield _row(name, there.unstrip_protocol(folder), bytes=size, stamp=stamp, frames_fps=frames_fps)
        for name in set(names) - set(images):
            path = f"{folder}/{name}"
            known = found[path]
            size = known.get("size") or 0
            file = bare(path)[len(bare(root)) + 1 :]
            yield _row(file, there.unstrip_protocol(path), bytes=size, stamp=_version(known))


def _told_apart(rows: list[Source]) -> list[Source]:
    """The rows; names that several addresses share, which differ in their queries, get a hash of these.

    A name is no hash of a query where it need not be: an address that is signed anew is the same source.
    """
    counted = Counter(row["file"] for row in rows)
    out = []
    for row in rows:
        hidden = query(os.fsdecode(row["path"])) if counted[row["file"]] > 1 else ""
        out.append(row | {"file": f"{row['file']}?{digest(hidden)[:8]}"} if hidden else row)
    return out


def _version(known: dict[str, Any]) -> str:
    """What a filesystem says that changes with a file's content; empty if it says nothing but the size."""
    for name in ("ETag", "etag", "md5Hash", "content_md5", "LastModified", "last_modified", "updated", "mtime"):
        if known.get(name):
            return f"{known.get('size')}-{known[name]}"
    return ""


# ---- manifests ----


def _manifest(path: Path, name: str, base: str, prepare: Prepare) -> Inputs:
    entries, unread = manifest.read(path, name, limits.of(prepare))
    kind = "video list" if path.suffix.lower() in manifest.LISTS else "manifest"
    rows, row_of = _told_apart([_entry_row(entry, base, prepare.frames_fps) for entry in entries]), {}
    for number, row in enumerate(rows, 1):
        before = row_of.setdefault(row["file"], number)
        if before != number:
            raise UserError(f"{kind} {name}: rows {before} and {number} are both {row['file']!r}; leave one out")
    notes = [f"columns of {name} that are not read: {', '.join(unread)}"] if unread else []
    rates = sum(bool(entry.fps) and not row["frames_fps"] for entry, row in zip(entries, rows, strict=True))
    if rates:
        notes.append(f"fps of {rates} videos of {name} is not used: it is the rate of folders of images")
    bad = [error for row in rows if (error := _refused(row, prepare))]
    if bad:
        notes.append(f"{len(bad)} addresses of {name} are not read ({bad[0]})")
    return Inputs(kind, rows, tuple(notes))


def _refused(row: Source, prepare: Prepare) -> VideoError | None:
    try:
        fetching.check(row, prepare)
    except VideoError as error:
        return error
    return None


def _listed(file: str, path: Path, frames_fps: float) -> Source:
    """A path that a manifest names: what cannot be listed is a row of the ledger as others, which the first stage
    rejects."""
    try:
        return _entry_at(file, path, frames_fps)
    except UserError:
        return _row(file, str(path))


def _entry_row(entry: manifest.Entry, base: str, frames_fps: float) -> Source:
    """A manifest's entry as a source. Its name is the path as it is written, without secrets, and its crop."""
    text, far = entry.path, addresses.is_remote(base)
    wishes = {"caption": entry.caption, "split": entry.split, "crop": entry.crop}
    at = f"@{entry.crop}" if entry.crop else ""
    if text.startswith("file://") and not far:
        text = _local_path(text)
    if "://" not in text and not far:
        path = Path(base, text)
        row = _listed(text + at, path, entry.fps or frames_fps) | wishes
        is_folder = suffix(row) not in SUFFIXES or os.path.isdir(path)  # noqa: PTH112 (of any name)
        return row | ({"frames_fps": entry.fps} if entry.fps and is_folder else {})
    # A manifest on another machine may say file:// too, which the first stage refuses.
    if "://" in text:
        path, name = text, bare(text)
    else:  # in a bucket a path is a name to its end
        path = f"{base}/{text}"
        name = bare(path)[len(bare(base)) + 1 :] if addresses.is_web(base) else text
    is_folder = ending(path) not in SUFFIXES and (entry.fps or not (Path(bare(path)).suffix or addresses.is_web(path)))
    return _row(name + at, path, frames_fps=(entry.fps or frames_fps) if is_folder else 0.0) | wishes
