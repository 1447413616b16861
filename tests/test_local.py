"""Ray's token and folder are for their owner alone before a Ray starts (tests/test_deployment.py: what listens)."""

import errno
import os
import stat
from pathlib import Path

import pytest
import typer

from entprog.errors import UserError
from pipelines import cli
from pipelines.cluster import local, session


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """An empty home folder, and a temporary one in it."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_token_is_made_for_its_owner_alone(home):
    before = os.umask(0)
    try:
        made = local.token()
    finally:
        os.umask(before)
    assert made == home / ".ray" / "auth_token"
    assert (mode(made), mode(made.parent)) == (0o600, 0o700)
    text = made.read_text()
    assert len(text) == 64
    assert local.token() == made and made.read_text() == text
    assert [path.name for path in made.parent.iterdir()] == ["auth_token"]


@pytest.mark.parametrize("of_file", [0o644, 0o666, 0o640, 0o604])
@pytest.mark.parametrize("of_folder", [0o755, 0o777, 0o700])
def test_a_token_that_others_may_read_is_mended(home, of_file, of_folder):
    path = home / ".ray" / "auth_token"
    path.parent.mkdir()
    path.write_text("as Ray makes it")
    path.chmod(of_file)
    path.parent.chmod(of_folder)
    local.token()
    assert (mode(path), mode(path.parent), path.read_text()) == (0o600, 0o700, "as Ray makes it")


def test_a_token_elsewhere_is_mended_and_its_folder_left_alone(home, monkeypatch):
    path = home / "secrets" / "token"
    path.parent.mkdir(mode=0o755)
    path.write_text("x")
    path.chmod(0o644)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    assert local.token() == path
    assert (mode(path), mode(path.parent)) == (0o600, 0o755)
    assert not (home / ".ray").exists()


@pytest.mark.parametrize("name, value", [("RAY_AUTH_TOKEN", "x" * 64), ("RAY_AUTH_MODE", "disabled")])
def test_no_file_is_made_where_none_is_read(home, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert local.token() is None
    assert not (home / ".ray").exists()


def refused(capsys) -> str:
    """The one line with which a job ends before it starts a Ray."""

    def work():
        with session.ray_cluster(2):
            raise AssertionError("a Ray was started")

    with pytest.raises(typer.Exit) as ended:
        cli.run("prepare", None, work)
    assert ended.value.exit_code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("what", ["folder", "file", "link"])
def test_a_token_of_another_owner_is_refused(home, monkeypatch, capsys, what):
    path = home / ".ray" / "auth_token"
    if what == "link":  # to a folder of ours: whoever made the link can lead it elsewhere
        (home / "mine").mkdir()
        (home / ".ray").symlink_to("mine")
        path.write_text("x")
    else:
        path.parent.mkdir()
        path.write_text("x")
    foreign = {"folder": home / ".ray", "file": path, "link": home / ".ray"}[what]
    if os.getuid() == 0:
        os.chown(foreign, 4242, 4242, follow_symlinks=what != "link")
    else:
        monkeypatch.setattr(os, "getuid", lambda: 4242)
    assert f"{foreign} belongs to another user" in refused(capsys)


def test_a_token_that_cannot_be_written_is_refused(home, monkeypatch, capsys):
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/proc/self/token")
    assert "cannot write Ray's token to /proc/self/token" in refused(capsys)


def test_a_token_on_a_read_only_file_system_is_refused(home, monkeypatch, capsys):
    path = home / ".ray" / "auth_token"
    path.parent.mkdir(mode=0o700)
    path.write_text("x")
    path.chmod(0o644)

    def chmod(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "chmod", chmod)
    assert f"cannot keep {path} from other users (Read-only file system)" in refused(capsys)


def test_a_folder_for_the_token_that_cannot_be_made_is_refused(home, capsys):
    (home / ".ray").touch()
    assert f"cannot keep {home / '.ray'} from other users" in refused(capsys)


def test_a_folder_for_ray_that_another_user_made_first_is_refused(home, capsys):
    if os.getuid() != 0:
        pytest.skip("only root can give a folder away")
    planted = home / f"entprog-{os.getuid()}"
    planted.symlink_to(home)
    os.chown(planted, 4242, 4242, follow_symlinks=False)
    assert f"{planted} belongs to another user" in refused(capsys)


@pytest.mark.parametrize("given", ["lots", "-1", "1e9", "0", "1000"])
def test_an_object_store_that_cannot_be_is_refused_in_a_line(monkeypatch, given):
    monkeypatch.setenv("ENTPROG_OBJECT_STORE_BYTES", given)
    with pytest.raises(UserError, match=f"^ENTPROG_OBJECT_STORE_BYTES={given}: give it a whole number of bytes"):
        session.object_store_bytes()
    monkeypatch.setenv("ENTPROG_OBJECT_STORE_BYTES", str(session.LEAST_STORE_BYTES))
    assert session.object_store_bytes() == session.LEAST_STORE_BYTES
    monkeypatch.delenv("ENTPROG_OBJECT_STORE_BYTES")
    assert session.object_store_bytes() is None
