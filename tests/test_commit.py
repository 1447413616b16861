"""Which commit a run says that it was made by."""

import importlib.metadata
import subprocess

import pytest

from pipelines import cli

WAYS = ("own", "own, changed", "inside another", "ignored by another", "root of another", "none")


def _git(folder, *words):
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.run(
        ["git", "-C", folder, *who, *words], check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.mark.parametrize("way", WAYS)
def test_the_commit_is_that_of_the_projects_own_checkout(way, tmp_path, monkeypatch):
    """Never that of a repository that an installed package happens to lie in."""
    root = tmp_path / "repository"
    home = root / "lib" / "site-packages" if way in ("inside another", "ignored by another") else root
    (home / "pipelines").mkdir(parents=True)
    place = home / "pipelines" / "cli.py"
    place.write_text("")
    if way != "none":
        _git(root, "init", "-q")
        (root / "theirs.txt").write_text("")
        (root / ".gitignore").write_text("lib\n" if way == "ignored by another" else "")
        _git(root, "add", "theirs.txt" if way == "root of another" else ".")
        _git(root, "commit", "-qm", "one")
    if way == "own, changed":
        (root / "more.txt").write_text("")
    monkeypatch.setattr(cli, "__file__", str(place))
    mine = _git(root, "rev-parse", "HEAD") if way.startswith("own") else f"v{importlib.metadata.version('entprog')}"
    assert cli.commit() == mine + ("+" if way == "own, changed" else "")
