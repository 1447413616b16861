"""A cluster that is not there: one line, soon, and nothing is left."""

import contextlib
import socket
import tempfile
import threading

import psutil
import pytest

from entprog.errors import UserError
from pipelines.cluster import joining, session


@contextlib.contextmanager
def listening(answer: bytes | None):
    """A port of this machine that accepts, and says nothing or something that is not Ray's."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        kept = []

        def accept():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    kept.append(connection)
                    if answer:
                        connection.sendall(answer)
                        connection.close()

        threading.Thread(target=accept, daemon=True).start()
        yield server.getsockname()[1]
        for connection in kept:
            connection.close()


def refused(monkeypatch, address, match):
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError, match=match) as error, session.ray_cluster(1):
        pass
    assert "\n" not in str(error.value) and address in str(error.value)


@pytest.mark.parametrize(
    ("address", "match"),
    [
        ("http://127.0.0.1:8265", r"a dashboard's address: .*ray job submit --address http://127.0.0.1:8265"),
        ("https://ray.example.org", "a dashboard's address"),
        ("ray://127.0.0.1:10001", "HOST:PORT"),
        ("127.0.0.1", "is no address of a cluster"),
        ("127.0.0.1:port", "is no address of a cluster"),
        ("127.0.0.1:99999", "is no address of a cluster"),
        ("127.0.0.1:1", "no Ray cluster answers at .*refused"),
        ("[::1]:1", "no Ray cluster answers at"),
        ("no-such-host.invalid:6379", "no Ray cluster answers at"),
    ],
)
def test_an_address_where_nothing_listens_is_a_line_at_once(monkeypatch, address, match):
    monkeypatch.setattr(joining, "ANSWER_S", 0.0)  # nobody is asked
    refused(monkeypatch, address, match)


def test_a_port_that_never_answers_is_given_up_and_nobody_goes_on_asking(monkeypatch):
    monkeypatch.setattr(joining, "ANSWER_S", 8.0)
    before = set(psutil.Process().children(recursive=True))
    with listening(None) as port:
        refused(monkeypatch, f"127.0.0.1:{port}", r"no Ray cluster answers at .*silent for 8 s")
    assert not set(psutil.Process().children(recursive=True)) - before


def test_the_limits_keep_within_a_minute():
    assert joining.REACH_S + joining.ANSWER_S < 60


def test_a_folder_too_long_for_sockets_is_a_line(monkeypatch, tmp_path):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    long = tmp_path / ("x" * 60) / ("y" * 60)
    long.mkdir(parents=True)
    monkeypatch.setenv("TMPDIR", str(long))
    monkeypatch.setattr(tempfile, "tempdir", None)  # what this process has found out before
    with pytest.raises(UserError, match=r"too long a name .*set RAY_TMPDIR") as error, session.ray_cluster(1):
        pass
    assert "\n" not in str(error.value) and str(long) in str(error.value)
    assert not [p for p in psutil.Process().children(recursive=True) if str(long) in " ".join(p.cmdline())]
