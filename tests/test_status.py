"""Where a training stands, from its files alone."""

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from entprog.errors import UserError
from entprog.storage import Place
from helpers.networks import tiny_experiment
from pipelines import status
from pipelines.training import standing, steplog
from pipelines.training.display import Display

NOW_S = 1_000_000.0


def step(number: int, **over) -> dict:
    """A line of steps.jsonl: one step a second, the last one at NOW_S - 1 for number 20."""
    line = {
        "step": number, "stage": number // 10, "phase": "train", "loss": 1.0 / number, "charged_s": 0.5 * number,
        "flops": 1e9 * number, "seconds": 0.4, "wait_s": 0.1, "open_s": 0.0, "encode_s": 0.05, "copy_s": 0.0,
        "clips": 2, "memory_bytes": 2**20, "held_out_loss": 2.0 / number if number % 10 == 0 else None, "last": False,
        "trained": ["blocks.1"], "backward": "residual", "shape": "8 frames of 32x48 at 12 fps",
        "time": NOW_S - 21 + number,
    }  # fmt: skip
    return line | over


def training(folder, steps, **identity):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "steps.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps))
    if identity:
        (folder / "entprog-job.json").write_text(json.dumps({"job": "train", "identity": identity}))
    return folder


@pytest.mark.parametrize(
    ("budget", "share", "left_s"),
    [
        ({"train.steps": 40}, 0.5, 20.0),
        ({"train.seconds": 20.0}, 0.5, 20.0),
        ({"train.flops": 8e10}, 0.25, 60.0),
        ({"train.steps": 40, "train.seconds": 12.0}, 10 / 12, 4.0),  # the one that ends first
        ({}, None, None),
    ],
)
def test_share_and_time_left_follow_the_budget(tmp_path, budget, share, left_s):
    seen = standing.read(training(tmp_path, map(step, range(1, 21)), **budget), NOW_S)
    assert seen.state == "running" and seen.age_s == 1.0
    assert seen.share == pytest.approx(share) and seen.left_s == pytest.approx(left_s)


def test_the_time_left_knows_that_later_stages_cost_more(tmp_path):
    """Of 40 steps 20 are done, a second each; the others cost five times as much."""
    steps = [step(n, time=NOW_S - 21 + n, flops_left=5e9 * 20 + 1e9 * (20 - n)) for n in range(1, 21)]
    seen = standing.read(training(tmp_path, steps, **{"train.steps": 40}), NOW_S)
    assert seen.share == 0.5 and seen.left_s == pytest.approx(100.0)
    shown = Display(tiny_experiment(train={"steps": 40}))
    shown.show({"workers": 1})
    with shown.bar.console.capture() as said:
        for each in steps:
            shown.show({"step": each})
    first, last = said.get().splitlines()
    assert first.endswith(f"{2 / 0.5:.3g} clips/s, 5 s charged, ETA 1 min 50 s")
    assert last.endswith("10 s charged, ETA 1 min 40 s")
    shown.show({"workers": 1})  # a new group: the time between the two is no step's
    with shown.bar.console.capture() as said:
        shown.show({"step": step(20, time=NOW_S + 999, flops_left=1e11)})
    assert "ETA" not in said.get()


def test_states(tmp_path):
    some = [step(n) for n in range(1, 6)]
    silent = training(tmp_path / "a", some)
    assert standing.read(silent, NOW_S + 500).state == "silent"
    (silent / "error.log").write_text("Traceback …\n  File …\nValueError: the disk went away\n\n")
    failed = standing.read(silent, NOW_S + 500)
    assert failed.state == "failed" and failed.trouble == "ValueError: the disk went away"
    assert dict(standing.rows(failed))["state"].startswith("failed, no step for 8 min")
    done = training(tmp_path / "b", [*some, step(6, last=True)])
    assert standing.read(done, NOW_S).state == "running", "its network is being saved"
    (done / "error.log").write_text("OSError: no space left on device\n")
    assert standing.read(done, NOW_S + 500).state == "failed", "its network was not saved"
    (done / "finished.json").write_text("{}")
    assert standing.read(done, NOW_S + 500).state == "finished"
    slow = training(tmp_path / "c", [step(n, time=NOW_S + 600 * n) for n in range(1, 4)])
    assert standing.read(slow, NOW_S + 1800 + 900).state == "running", "steps of ten minutes are no silence"


def test_a_half_written_line_and_losses_that_are_not_finite_are_no_error(tmp_path):
    folder = training(tmp_path, [step(1), step(2, loss=None), step(3)])
    with (folder / "steps.jsonl").open("a") as file:
        file.write('{"step": 4, "st')
    seen = standing.read(folder, NOW_S)
    assert len(seen.steps) == 3 and "1 → 0.3333" in dict(standing.rows(seen))["loss"]


def test_before_the_first_step(tmp_path):
    folder = training(tmp_path, [], **{"train.steps": 40})
    (folder / "steps.jsonl").unlink()
    assert dict(standing.rows(standing.read(folder)))["state"] == "running"
    assert standing.read(folder, time.time() + 500).state == "silent"


def test_a_training_in_phases_says_where_they_are(tmp_path):
    folder = training(tmp_path, [], phases=["look", "pose"])
    (folder / "steps.jsonl").unlink()
    with pytest.raises(UserError, match=f"in phases.* give {folder / 'look'}"):
        standing.read(folder)


@pytest.mark.parametrize("follow", [[], ["--follow"]])
@pytest.mark.parametrize(
    ("status_is", "shown"),
    [("refused", "refused: no room"), ("failed", "failed, no step for"), ("interrupted", "no room; no step for")],
)
def test_an_attempt_that_ended_before_its_first_step_does_not_run(follow, status_is, shown, tmp_path):
    folder = training(tmp_path, [], **{"train.steps": 40})
    record = {"status": status_is, "error": "no room"}
    (folder / "result.json").write_text(json.dumps(record))
    assert standing.read(Place.at(str(folder))).trouble == "no room"
    done = CliRunner().invoke(status.app, [*follow, str(folder)])
    assert (
        done.exit_code == 0 and shown in done.output and "no room" in done.output and "workers start" not in done.output
    )
    os.utime(folder / "entprog-job.json", (time.time() + 9, time.time() + 9))  # the same command goes on
    assert standing.read(folder).state == standing.read(Place.at(str(folder))).state == "running"


@pytest.mark.parametrize(
    ("values", "line"),
    [([], ""), ([3.0], "▁"), ([1.0, 1.0], "▁▁"), ([0.0, 7.0], "▁█"), ([float(n) for n in range(8)], "▁▂▃▄▅▆▇█")],
)
def test_sparkline(values, line):
    assert standing.sparkline(values) == line


def test_a_long_sparkline_is_means():
    assert standing.sparkline([0.0] * 100 + [1.0] * 100, width=4) == "▁▁██"


def test_the_command(tmp_path):
    shown = CliRunner().invoke(status.app, [str(training(tmp_path, [step(1), step(10)]))])
    assert shown.exit_code == 0 and "residual backward" in shown.output and "held-out loss" in shown.output
    ended = training(tmp_path / "end", [step(1, last=True)])
    (ended / "finished.json").write_text("{}")
    followed = CliRunner().invoke(status.app, ["--follow", str(ended)])
    assert followed.exit_code == 0, "a training that has ended is not waited for"
    nothing = CliRunner().invoke(status.app, [str(tmp_path / "nothing")])
    assert nothing.exit_code == 2 and nothing.output.startswith(f"error: {tmp_path / 'nothing'} holds no training")


def test_what_cannot_be_read_at_the_moment_is_tried_again(tmp_path, monkeypatch):
    folder = training(tmp_path / "run", [step(1), step(10)])
    log, aside = folder / "steps.jsonl", tmp_path / "aside"

    def away():
        log.rename(aside)
        log.mkdir()  # reading it is an OSError

    def back():
        log.rmdir()
        aside.rename(log)
        (folder / "finished.json").write_text("{}")

    def stop():
        raise KeyboardInterrupt

    def followed(*between):
        looks = iter(between)
        monkeypatch.setattr(status, "time", SimpleNamespace(sleep=lambda _: next(looks)()))
        return CliRunner().invoke(status.app, ["--follow", str(folder)])

    stopped = followed(away, stop)
    assert stopped.exit_code == 0 and "residual backward" in stopped.output
    assert "cannot be read at the moment" in stopped.output and "IsADirectoryError" in stopped.output
    once = CliRunner().invoke(status.app, [str(folder)])
    assert once.exit_code == 2 and once.output.startswith(f"error: the training in {folder} cannot be read: IsADir")
    log.rmdir()
    aside.rename(log)
    ended = followed(away, back)
    assert ended.exit_code == 0 and "finished" in ended.output and "cannot be read" not in ended.output


def test_a_scratch_file_that_goes_meanwhile_is_no_error(tmp_path, monkeypatch):
    inside = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda self: [*inside(self), self / ".result.json.0.tmp"])
    assert standing.read(training(tmp_path, [step(1)])).steps


@pytest.mark.parametrize("follow", [[], ["--follow"]])
@pytest.mark.parametrize(
    "content",
    [
        b"[1]\n",
        b"{}\n",
        b"\xff\xfe\n",
        b"{\n",
        json.dumps(step(1, loss="x", time="y")).encode() + b"\n",
        json.dumps(step(1, phase="\x1b[2J")).encode() + b"\n",
        json.dumps(step(1, last=True, clips="x")).encode() + b"\n",
    ],
)
def test_a_damaged_log_is_one_line(content, follow, tmp_path):
    (tmp_path / "steps.jsonl").write_bytes(content)
    done = CliRunner().invoke(status.app, [*follow, str(tmp_path)])
    assert done.exit_code == 2 and len(done.output.splitlines()) == 1 and "\x1b" not in done.output, done.output


@pytest.mark.parametrize("identity", [[1], {"train.steps": "x"}, {"train.steps": [1]}])
def test_a_damaged_mark_is_no_trace(identity, tmp_path):
    training(tmp_path, [step(1)])
    (tmp_path / "entprog-job.json").write_text(json.dumps({"job": "train", "identity": identity}))
    done = CliRunner().invoke(status.app, [str(tmp_path)])
    assert (done.exit_code in (0, 2) and len(done.output.splitlines()) == 1) or "state" in done.output


@pytest.mark.parametrize("follow", [[], ["--follow"]])
def test_what_a_folder_says_steers_nothing(follow, tmp_path):
    name = "\x1b]0;owned\x07[bold]\x9b2J"
    folder = training(tmp_path / name, [step(1, time=0.0, shape=f"[red]{name}", last=bool(follow))])
    (folder / "error.log").write_text(f"boom\n{name}\n")
    shown = CliRunner().invoke(status.app, [*follow, str(folder)])
    assert shown.exit_code == 0 and "[bold]" in shown.output and not {*"\x1b\x07\x9b"} & {*shown.output}


def test_last_preview_and_last_warning(tmp_path):
    folder = training(tmp_path, [step(1)])
    assert "last warning" not in dict(standing.rows(standing.read(folder, NOW_S)))
    steplog.warn(folder, "slow disk")
    steplog.warn(folder, "s3://me:secret@bucket is away")
    (folder / "previews").mkdir()
    with (folder / steplog.PREVIEWS).open("w") as file:
        file.write(json.dumps({"step": 4, "videos": ["previews/step-00000004/a.mp4"]}) + "\n")
    shown = dict(standing.rows(standing.read(folder)))
    assert shown["last warning"].startswith("s3://***@bucket is away (0 s ago, 2 in all)")
    assert shown["last preview"] == "step 4: previews/step-00000004/a.mp4"
    empty = training(tmp_path / "empty", [])
    steplog.warn(empty, "no node has room yet")
    assert "no node has room" in dict(standing.rows(standing.read(empty)))["last warning"]


def test_a_warning_that_cannot_be_kept_ends_nothing(tmp_path):
    steplog.warn(tmp_path / "nowhere", "slow disk")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([], ""),
        (["blocks.1"], "blocks.1"),
        (["blocks.2", "blocks.10", "blocks.1", "blocks.9", "blocks.0"], "blocks.0-2, blocks.9-10"),
        (["down.0.attentions.1", "down.0.attentions.0", "mid"], "down.0.attentions.0-1, mid"),
    ],
)
def test_blocks_in_short(names, said):
    assert standing.compact(names) == said


@pytest.mark.parametrize("name", [steplog.WARNINGS, steplog.PREVIEWS])
@pytest.mark.parametrize("content", ["{\n", "[1]\n", "{}\n"])
def test_damaged_warnings_and_previews_are_one_line(name, content, tmp_path):
    training(tmp_path, [step(1)])
    (tmp_path / "previews").mkdir()
    (tmp_path / name).write_text(content)
    done = CliRunner().invoke(status.app, [str(tmp_path)])
    assert done.exit_code == 2 and len(done.output.splitlines()) == 1, done.output
