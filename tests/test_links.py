"""A job writes through no link in its output, and takes no text that a link leads to from outside its input."""

import pytest

from entprog import files
from entprog.errors import UserError
from entprog.preparing import inputs
from pipelines import cli, terminal
from pipelines.outputs import claim
from pipelines.training import steplog

PRECIOUS = "precious\n"


@pytest.fixture
def place(tmp_path):
    """An output of a training, and a file of somebody else's."""
    claim.take(tmp_path / "out", "train", {})
    (tmp_path / "precious").write_text(PRECIOUS)
    return tmp_path


@pytest.mark.parametrize("name", ["steps.jsonl", "warnings.jsonl", "error.log", claim.LOCK])
def test_an_output_with_links_to_files_is_refused(name, place):
    (place / "out" / name).symlink_to(place / "precious")
    with pytest.raises(UserError, match=rf"holds links \({name}\)"), claim.alone():
        claim.take(place / "out", "train", {})
    assert (place / "precious").read_text() == PRECIOUS


def test_links_to_folders_are_a_persons(place):
    (place / "large").mkdir()
    (place / "out" / "checkpoints").symlink_to(place / "large")
    claim.take(place / "out", "train", {})


def test_nothing_is_written_through_a_link(place):
    out, theirs = place / "out", place / "precious"
    for name in ("steps.jsonl", "warnings.jsonl", "error.log", "prepare.log"):
        (out / name).symlink_to(theirs)
    with pytest.raises(OSError, match="symbolic links"):
        steplog.StepLog(out / "steps.jsonl", 0)
    steplog.warn(out, "a disk is nearly full")
    with pytest.raises(OSError, match="symbolic links"), terminal.stderr_into(out / "prepare.log"):
        pass
    with pytest.raises(cli.typer.Exit):
        cli.run("train", out, lambda: 1 // 0)
    assert theirs.read_text() == PRECIOUS
    assert "ZeroDivisionError" in (out / "error.log").read_text() and not (out / "error.log").is_symlink()


def test_a_log_shows_control_characters(place):
    with pytest.raises(OSError), terminal.stderr_into(place / "out" / "prepare.log"):
        cli.os.write(2, b"\x1b]0;evil\x07 of https://me:hUsh@host/a\n")
        raise OSError("failed")
    text = (place / "out" / "prepare.log").read_text()
    assert "\x1b" not in text and "\x07" not in text and "hUsh" not in text and text.endswith("\n")


def test_captions_and_poses_outside_the_input_are_not_read(place):
    videos = place / "videos"
    (videos / "texts").mkdir(parents=True)
    for name in ("a", "b", "c"):
        (videos / f"{name}.mp4").write_bytes(b"x")
    (videos / "a.txt").symlink_to(place / "precious")
    (videos / "a.pose.npz").symlink_to(place / "precious")
    (videos / "texts" / "b.words").write_text("dances")
    (videos / "b.txt").symlink_to("texts/b.words")
    (videos / "c.txt").symlink_to("c.txt")
    for given in (videos, f"{videos}/*"):
        found = inputs.find(given)
        captions = {row["file"]: row["caption"] for row in found.rows if row["caption"]}
        assert captions == {"b.mp4": "dances"} and not any(row["poses"] for row in found.rows)
        assert any("2 .txt files" in note and "a link out of the input" in note for note in found.notes), found.notes
        assert any("a.pose.npz): not read" in note for note in found.notes), found.notes


def test_names_are_sorted_whatever_figures_are_in_them():
    assert sorted(["1²2", "a10", "a²", "a9"], key=files.natural) == ["1²2", "a9", "a10", "a²"]
