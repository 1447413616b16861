"""Which commit a run says that it was made by."""

import importlib.metadata
import subprocess

import pytest

from pipelines import cli

WAYS = ("own", "own, changed", "own, with a result", "inside another", "ignored by another", "root of another", "none")


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
    if way == "own, with a result":
        for name in ("benchmarks/results", "docs"):
            (root / name).mkdir(parents=True)
            (root / name / "study.json").write_text("")
    monkeypatch.setattr(cli, "__file__", str(place))
    if way.startswith("own"):
        monkeypatch.setenv("ENTPROG_COMMIT", "of an image")  # a checkout knows better
    mine = _git(root, "rev-parse", "HEAD") if way.startswith("own") else f"v{importlib.metadata.version('entprog')}"
    assert cli.commit() == mine + ("+" if way == "own, changed" else "")


@pytest.mark.parametrize("way", ["no git", "no repository", "git refuses"])
def test_a_commit_that_nothing_tells_is_unknown(way, tmp_path, monkeypatch):
    """On a bare image the code is a copy of the files: not installed, and without git or a repository of one's own."""
    place = tmp_path / "pipelines" / "cli.py"
    place.parent.mkdir()
    place.write_text("")
    if way == "git refuses":  # as a folder of somebody else's, to which it answers "dubious ownership"
        _git(tmp_path, "init", "-q")
        _git(tmp_path, "add", ".")
        _git(tmp_path, "commit", "-qm", "one")
        for name in ("GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM"):
            monkeypatch.setenv(name, "/dev/null")
        monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    if way == "no git":
        monkeypatch.setenv("PATH", str(tmp_path))

    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(cli, "__file__", str(place))
    assert cli.commit() == "unknown"
    monkeypatch.setenv("ENTPROG_COMMIT", "")  # an image that was built without saying it
    assert cli.commit() == "unknown"
    monkeypatch.setenv("ENTPROG_COMMIT", "abc123")
    assert cli.commit() == "abc123"
