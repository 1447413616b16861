"""What hostile names may do to who looks at them: nothing. Terminal, ledger, tables."""

import csv
import json
import os

import pytest
import typer

from entprog.errors import UserError
from entprog.names import cell, plain
from entprog.preparing import inputs, ledger
from pipelines import cli, terminal, tune
from pipelines.outputs import claim

STEERING = {
    "title": ("\x1b]0;owned\x07", r"\x1b]0;owned\x07"),
    "clear": ("\x1b[2J\x1b[H", r"\x1b[2J\x1b[H"),
    "link": ("\x1b]8;;http://x\x1b\\y", r"\x1b]8;;http://x\x1b\y"),
    "c1": ("\x9b31m\x9d0;x\x9c", r"\x9b31m\x9d0;x\x9c"),
    "over": ("ok\rno\b\b", r"ok\rno\x08\x08"),
    "turned": ("gpj\u202e.exe\u2066", r"gpj\u202e.exe\u2066"),
    "not-utf8": (os.fsdecode(b"\xff"), r"\udcff"),
}
MARKUP = ("[/red]", "[bold", "[link=http://x]y", "[]", ":bomb:", "$x^2$")


def steers(text: str) -> bool:
    return any((ord(c) < 32 and c not in "\n\t") or 0x7F <= ord(c) < 0xA0 or c in "\u202e\u2066\udcff" for c in text)


@pytest.mark.parametrize("name, shown", STEERING.values(), ids=STEERING)
def test_what_steers_a_terminal_is_shown_as_its_escape(name, shown, capfd):
    terminal.console.print(f"Reads {name}.")
    terminal.show(f"title {name}", [(name, 1.0)], ("file", name))
    terminal.complain("error", f"cannot read {name}")
    out, err = capfd.readouterr()
    assert f"Reads {shown}." in out and f"title {shown}" in out
    assert err == f"error: cannot read {shown}\n"
    assert not steers(out + err)


@pytest.mark.parametrize("name", MARKUP)
def test_what_looks_like_markup_is_shown_as_it_is(name, capsys):
    terminal.console.print(f"Reads {name}.")
    terminal.console.print(f"Reads {name} again.", style="bold")
    terminal.show(f"title {name}", [(name, 1.0)], ("file", name))
    terminal.complain("error", f"cannot read {name}")
    out, err = capsys.readouterr()
    assert f"Reads {name}." in out and f"Reads {name} again." in out and out.count(name) == 5
    assert err == f"error: cannot read {name}\n"


@pytest.mark.parametrize("name", [*(name for name, _ in STEERING.values()), *MARKUP])
def test_a_job_that_fails_over_a_name_says_so_in_one_line(name, tmp_path, capfd):
    def work():
        claim.take(tmp_path, "prepare", {})
        raise OSError(f"cannot decode {name}\nsecond line")

    with pytest.raises(typer.Exit):
        cli.run("prepare", tmp_path, work)
    out, err = capfd.readouterr()
    assert len(err.splitlines()) == 1 and not out and not steers(err)
    assert not steers((tmp_path / "error.log").read_text())
    assert json.loads((tmp_path / "result.json").read_text())["status"] == "failed"


def test_one_name_in_the_ledger_for_every_file_and_none_that_steers(tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    files = [f"{name.replace('/', '-')}.mp4" for name, _ in STEERING.values()]
    files += ["a\nb.mp4", "a\\nb.mp4", "a\\\\nb.mp4"]  # three names that a careless escape would make one
    for name in files:
        (folder / name).touch()
    rows = inputs.find(folder).rows
    assert len({row["file"] for row in rows}) == len(files)
    assert {os.fsdecode(row["path"]) for row in rows} == {str(folder / name) for name in files}
    verdicts = [ledger.rejected({**row, "sha256": ""}, "probe", "corrupt", f"cannot open {files}") for row in rows]
    ledger.write(tmp_path / "ledger.parquet", [ledger.line(row) for row in verdicts])
    for row in ledger.read(tmp_path / "ledger.parquet"):
        assert not any(steers(value) or {*value} & {*"\n\t"} for value in row.values() if isinstance(value, str))
    given = folder / files[0]
    (one,) = inputs.find(given).rows
    assert not steers(one["file"]) and os.fsdecode(one["path"]) == str(given)


def test_a_manifest_may_name_such_files(tmp_path):
    name = "\x1b[2J.mp4"
    (tmp_path / name).touch()
    (tmp_path / "list.jsonl").write_text(json.dumps({"path": name}) + "\n")
    (row,) = inputs.find(tmp_path / "list.jsonl").rows
    assert row["file"] == r"\x1b[2J.mp4" and os.fsdecode(row["path"]).endswith(name)


def test_held_out_is_named_as_the_ledger_has_it():
    from pipelines import prepare

    assert prepare.named([plain("\x1b[2J.mp4")], [r"\x1b[2J.mp4"]) == {r"\x1b[2J.mp4"}
    with pytest.raises(UserError):
        prepare.named([plain("\x1b[2J.mp4")], ["other.mp4"])


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", " =1", '=HYPERLINK("http://x")'])
def test_a_spreadsheet_runs_nothing_of_the_table(text, tmp_path):
    rows = [{"id": text, "status": "failed", "settings": {"a": text, "b": -0.5}, "reason": f"{text}\x1b[2J"}]
    tune._write_table(rows, {"a": None, "b": None}, tmp_path / "trials.csv")
    with (tmp_path / "trials.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    for name in ("id", "a", "reason"):
        assert row[name].startswith("'") and not steers(row[name])
    assert float(row["b"]) == -0.5, "a negative number is no formula"


def test_ordinary_texts_stay_as_they_are():
    for text in ("walk.mp4", "ünï – 人 👩‍🔬.mp4", "C:\\videos\\a.mp4", "a=b"):
        assert plain(text) == text == cell(text)
    assert plain("a\nb\x1b", keep="\n") == "a\nb\\x1b"
    assert cell(None) is None and cell(3) == 3
