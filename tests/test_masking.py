"""No secret of an address is shown, whatever is shown of it."""

import string
import sys
from types import SimpleNamespace
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from entprog import config, masking
from entprog.errors import UserError
from entprog.storage import Place
from pipelines import cli, train
from pipelines.outputs import claim

SECRET = "hUsh/9+Q=="
"""As cloud keys are: with signs that mean something in an address."""
ADDRESSES = [
    f"https://me:{SECRET}@host/a.mp4",
    f"https://me:{quote(SECRET, safe='')}@host:8443/a.mp4",
    f"https://{quote(SECRET, safe='')}@host/a.mp4",
    f"https://host/a.mp4?X-Amz-Signature={SECRET}&x=1",
    f"https://host/a.mp4#{SECRET}",
    f"s3://AKIAEXAMPLE:{SECRET}@bucket/runs",
    f"postgresql://me:{SECRET}@host:5432/db?password={SECRET}",
    f"simplecache::https://me:{SECRET}@host/a.mp4",
]
ODD = [
    f"https://me:it's {SECRET}@host/a.mp4",
    f'https://me:"<{SECRET}>`@host/a.mp4',
    f"https://me:7'{SECRET}@host/a.mp4",
    f"s3://AKIAEXAMPLE:'{SECRET}@bucket/runs",
    f"https://it's{SECRET.replace('/', '')}@host/a.mp4",
]
"""With signs that end an address elsewhere."""


@pytest.mark.parametrize("address", ADDRESSES)
def test_a_secret_is_shown_nowhere(address):
    quoted = quote(SECRET, safe="")
    for shown in (
        masking.masked(address),
        masking.bare(address),
        masking.masked(f"cannot read {address}: gone"),
        masking.masked(f"GET url='{address}' and \"{address}\", <{address}>"),
        masking.reason(ValueError(f"no access for {SECRET} or {quoted} ({address})"), address),
    ):
        assert SECRET not in shown and quoted not in shown and "hUsh" not in shown, shown


def test_a_long_run_of_letters_is_read_once():
    """Read again from each of its letters it takes minutes."""
    text = "a" * 400_000
    assert masking.masked(text) == text
    assert masking.masked(f"{text}https://me:{SECRET}@host/a.mp4") == f"{text}https://***@host/a.mp4"


@pytest.mark.parametrize("address", ODD)
def test_a_password_does_not_end_at_a_quote_or_a_space(address):
    for text in (address, f"cannot read {address}: gone", f"MLflow at {address} and {ADDRESSES[0]}", f"<{address}>"):
        shown = masking.masked(text) + masking.masked(repr(text)) + masking.reason(ValueError(text), address)
        assert "hUsh" not in shown and "***@" in shown, shown


@pytest.mark.parametrize("length", [1, 5, 40, 199, 200, 201, 230])
def test_what_is_cut_is_masked_before(length):
    long = "x" * length
    for address in ADDRESSES:
        assert "hUsh" not in masking.one_line(f"{long} {address}") + masking.reason(OSError(f"{long}{address}"))


@given(st.text(string.ascii_letters + string.digits + "/+=%:?#&!~'\"<>` ", min_size=6).filter(lambda p: p[0] != " "))
def test_any_password_is_masked(password):
    shown = masking.masked(f"read s3://key:{password}@bucket/name of it")
    assert shown == "read s3://***@bucket/name of it"


@given(st.text(string.printable.replace("@", ""), min_size=6), st.sampled_from(["s3", "gs"]))
def test_of_one_address_any_password_is_masked(password, protocol):
    assert masking.shown(f"{protocol}://key:{password}@bucket/name") == f"{protocol}://***@bucket/name"


@pytest.mark.parametrize(
    "plain",
    [
        "sqlite:////a/b.db",
        "https://host:8080/a@b/c.mp4",
        "http://[::1]:80/a",
        "s3://bucket/a@b.mp4",
        "/a?b/c",
        "a: b@c",
    ],
)
def test_what_has_no_secret_is_left_as_it_is(plain):
    assert masking.masked(f"see {plain} there") == f"see {plain} there" and masking.bare(plain) == plain


@pytest.mark.parametrize(
    "text",
    [
        "'https://host:8080' or <me@x>",
        "https://host:8080: gone, ask me@x",
        "https://host, or me@x",
        "s3://bucket: no such key, ask me@x",
        "sqlite:///a 'b@c'",
        "https://a/b:c d@e",
    ],
)
def test_words_after_an_address_are_not_taken_for_its_password(text):
    assert masking.masked(f"see {text} there") == f"see {text} there"


def test_words_of_an_address_are_not_taken_for_secrets_inside_other_words():
    assert masking.masked("some message for me", "https://me@host/a?page=1&n=1") == "some message for ***"


def test_a_stored_command_has_no_secret(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", "--input", ADDRESSES[0], "--set", f"train.checkpoints={ADDRESSES[5]}"])
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(__spec__=SimpleNamespace(name="pipelines.x")))
    assert cli.command() == (
        "python -m pipelines.x --input 'https://***@host/a.mp4' --set 'train.checkpoints=s3://***@bucket/runs'"
    )


@pytest.mark.parametrize("address", [f"s3://AK:{SECRET}@b/x", f"s3://AK:7/{SECRET}@b/x", "gs://me@b/x"])
def test_credentials_among_settings_are_refused(address, tmp_path):
    arguments = ["--preset", "demo", "--shards", "x", "--set", f"train.checkpoints={address}", "--dry-run"]
    done = CliRunner().invoke(train.app, [*arguments, "--output", str(tmp_path / "out")])
    assert done.exit_code == 2 and "hUsh" not in done.output and not (tmp_path / "out").exists()
    (line,) = done.output.splitlines()
    assert "train.checkpoints: must not hold a user or password" in line
    with pytest.raises(UserError, match="holds a user or password") as error:
        Place.at(address)
    assert "hUsh" not in str(error.value)


def test_a_rejected_value_is_shown_without_its_secret():
    with pytest.raises(UserError) as error:
        config.build({"train": {"steps": ADDRESSES[0]}})
    assert "hUsh" not in str(error.value) and "https://***@host/a.mp4" in str(error.value)


@pytest.mark.parametrize("address", ADDRESSES)
def test_what_is_stored_of_settings_and_figures_has_no_secret(address, tmp_path):
    settings = {"model.base": address, "list": [f"of {address}", {"deep": (address, 1, None)}], "n": 0.5}

    def work():
        claim.take(tmp_path, "prepare", settings)
        return {"settings": settings}

    cli.run("prepare", tmp_path, work)
    for name in (claim.MARK, "result.json"):
        text = (tmp_path / name).read_text()
        assert "hUsh" not in text and "0.5" in text, text
    claim.check(tmp_path, "prepare", {**settings, "model.base": address.replace("hUsh", "nEw")})
    with pytest.raises(UserError, match="other settings"):
        claim.check(tmp_path, "prepare", {**settings, "model.base": address.replace("//", "//x/")})
