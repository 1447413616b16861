"""prepare through the real command: manifests, new videos later, mostly bad input, kills while adding."""

import functools
import hashlib
import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from entprog import masking
from entprog.data import shards
from entprog.media import assets, h264, video
from entprog.preparing import ledger
from pipelines import prepare

SHAPE = ["--frames", "4", "--height", "48", "--width", "32", "--fps", "10", "--stride", "2"]


def run(*arguments):
    return CliRunner().invoke(prepare.app, list(map(str, arguments)), env={"COLUMNS": "200"})


pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture(scope="module")
def frames() -> dict[str, list[np.ndarray]]:
    """A second of two real people."""
    sources = {"one": "cam04", "other": "cam01"}
    size = (480, 272)
    return {
        name: [f for _, f in video.iter_frames(assets.clip(of), fps=10, end_s=1.0, size=size)]
        for name, of in sources.items()
    }


def hashes(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*.parquet")))
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def clips_of(output: Path, columns: list[str]) -> list[dict]:
    """Every clip of a dataset."""
    dataset = shards.read_dataset(output)
    places = [place for split in shards.SPLITS for place in shards.index(dataset, split)]
    return [shards.read_rows(output / file, [row], columns)[0] for file, row in places]


def verdicts(output: Path) -> dict[str, tuple[str, str]]:
    """{input: (reason, split)}"""
    rows = ledger.read(output / "ledger.parquet")
    return {row["file"]: (row["reason"], row["split"]) for row in rows if row["kind"] == "input"}


@pytest.fixture(scope="module")
def grown(frames, tmp_path_factory):
    """A dataset of a folder, and what it was before videos were added: (folder, output, facts of each run)."""
    folder, output = tmp_path_factory.mktemp("videos"), tmp_path_factory.mktemp("shards")
    for i in range(4):
        h264.write(folder / f"{i}.mp4", frames["one"][i : i + 6], fps=10)
    (folder / "late.mp4").write_bytes((folder / "0.mp4").read_bytes()[:3000])  # its copying is not finished
    facts = []
    for step in range(2):
        if step:
            for i in range(4, 8):
                h264.write(folder / f"{i}.mp4", frames["other"][i - 4 : i + 3], fps=10)
            (folder / "late.mp4").write_bytes((folder / "0.mp4").read_bytes())
        done = run("--input", folder, "--output", output, *SHAPE, "--held-out-ratio", "0.25", "--clips-per-shard", "3")
        assert done.exit_code == 0, done.output
        facts.append((done.output, shards.read_dataset(output), hashes(output), verdicts(output)))
    return folder, output, facts


def test_new_videos_are_added_in_new_shards(grown):
    _, output, ((_, before, files, message), (said, after, more, told_after)) = grown
    assert "adding 5 inputs" in said and "tried again: 1 input that gave no clip before" in said
    old_shards = {file: sha for file, sha in files.items() if not file.startswith("ledger")}
    assert old_shards.items() <= more.items() and len(more) > len(files)
    for split in shards.SPLITS:
        assert after.splits[split][: len(before.splits[split])] == before.splits[split]
    assert after.fingerprint != before.fingerprint
    assert message["late.mp4"][0] == "corrupt" and told_after["late.mp4"][0] == ""
    assert {f: v for f, v in message.items() if f != "late.mp4"}.items() <= told_after.items(), "an old clip has moved"
    held = [file for file, (_, split) in told_after.items() if split == "held_out"]
    assert len(told_after) == 9 and len(held) == 2
    clips = clips_of(output, ["clip_id", "split", "source"])
    assert len({clip["clip_id"] for clip in clips}) == len(clips)
    assert all(clip["split"] == told_after[clip["source"]][1] for clip in clips)
    rows = [row["clip"] for row in ledger.read(output / "ledger.parquet") if row["kind"] == "clip" and row["kept"]]
    assert sorted(rows) == sorted(clip["clip_id"] for clip in clips)
    shards.verify(after)


def test_what_is_gone_or_changed_is_said(grown, tmp_path):
    folder, output, _ = grown
    again = ["--output", output, *SHAPE, "--held-out-ratio", "0.25", "--clips-per-shard", "3"]
    before = hashes(output)
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        if path.name != "7.mp4":
            (copy / path.name).write_bytes(path.read_bytes())
    done = run("--input", copy, *again)  # other time stamps alone are no change
    assert done.exit_code == 0 and "nothing to do" in done.output
    assert "1 input of before not there any more (7.mp4)" in done.output
    (copy / "2.mp4").write_bytes((copy / "5.mp4").read_bytes())
    done = run("--input", copy, *again)
    assert done.exit_code == 2 and "the content of 1 input (2.mp4): restore that" in done.output
    (copy / "2.mp4").write_bytes((folder / "2.mp4").read_bytes())
    for name in ("2.txt", "5.txt"):
        (copy / name).write_text("a caption")
    done = run("--input", copy, *again)
    assert done.exit_code == 2 and "the caption of 2 inputs (2.mp4, 5.mp4): restore that" in done.output
    done = run("--input", folder, *again, "--set", "prepare.seed=3")
    assert done.exit_code == 2 and "prepare.seed was 0, now 3" in done.output
    assert hashes(output) == before
    (output / "ledger.next.parquet").write_bytes(b"left by a kill before dataset.json was written")
    assert run("--input", folder, *again).exit_code == 0
    (output / "ledger.parquet").rename(output / "ledger.next.parquet")  # a kill between the two renames
    assert run("--input", folder, *again).exit_code == 0 and hashes(output) == before


def served(folder: Path) -> str:
    """The folder over HTTP on this machine alone, until the tests end: its address."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_address[1]}"


def hashes_of(caption: str, clips: list[dict]) -> list[str]:
    return [hashlib.sha256(clip["video"]).hexdigest() for clip in clips if clip["caption"] == caption]


def test_a_manifest_decides_captions_crops_and_splits(frames, tmp_path):
    both = [np.concatenate(pair, 1) for pair in zip(frames["one"], frames["other"], strict=True)]
    h264.write(tmp_path / "in" / "both.mp4", both, fps=10)
    h264.write(tmp_path / "alone.mp4", frames["one"], fps=10)
    images = tmp_path / "in" / "00001" / "images"
    images.mkdir(parents=True)
    for i, frame in enumerate(frames["one"]):
        Image.fromarray(frame).save(images / f"{i:04d}.png")
    place = served(tmp_path).replace("http://", "http://me:planted-password@")
    signed = "?X-Amz-Signature=planted/signature&x=1"
    entries = [
        {"path": f"{place}/alone.mp4{signed}", "caption": "from afar", "split": "train"},
        {"path": "00001/images", "caption": "images", "split": "train", "fps": 10},
        {"path": "both.mp4", "caption": "on the left", "split": "train", "crop": "0,0,272,480"},
        {"path": "both.mp4", "caption": "on the right", "split": "held_out", "crop": "272,0,272,480"},
        {"path": "both.mp4", "caption": "outside", "split": "", "crop": "300,0,272,480"},
        {"path": "../alone.mp4", "caption": "", "split": "train"},
        {"path": "../../../../../../etc/passwd", "caption": "not ours"},
        {"path": f"{place}/{'x' * 190}.mp4{signed}"},
        {"path": f"ftp://me:planted-password@host/a.mp4{signed}"},
        {"path": f"https://[::1/a.mp4{signed}"},
    ]
    names = [masking.bare(entry["path"]) for entry in entries]
    (tmp_path / "in" / "m.jsonl").write_text("\n".join(map(json.dumps, entries)))
    arguments = ["--input", tmp_path / "in" / "m.jsonl", "--output", tmp_path / "deep" / "out", *SHAPE]
    arguments += ["--set", "prepare.hosts=[127.0.0.1]"]
    dry = run(*arguments, "--dry-run")
    assert "input: manifest " in dry.output and "6 captions, 5 splits, 3 crops" in dry.output.replace("\n", " ")
    done = run(*arguments)
    assert done.exit_code == 0, done.output
    output = tmp_path / "deep" / "out"
    assert verdicts(output) == {
        names[0]: ("", "train"),
        "00001/images": ("", "train"),
        "both.mp4@0,0,272,480": ("", "train"),
        "both.mp4@272,0,272,480": ("", "held_out"),
        "both.mp4@300,0,272,480": ("bad_crop", ""),
        "../alone.mp4": ("", "train"),
        "../../../../../../etc/passwd": ("not_a_video", ""),
        names[7]: ("unreadable", ""),
        "ftp://host/a.mp4": ("bad_address", ""),
        "https://[::1/a.mp4": ("bad_address", ""),
    }
    left = b"".join(path.read_bytes() for path in output.rglob("*") if path.is_file())
    message = (
        dry.output + done.output + repr(ledger.read(output / "ledger.parquet")) + repr(clips_of(output, ["source"]))
    )
    assert b"planted" not in left and "planted" not in message
    columns = ["video", "caption", "source_width", "crop_left", "crop_width", "source"]
    clips = clips_of(output, columns)
    assert {clip["caption"] for clip in clips} == {"on the left", "on the right", "", "images", "from afar"}
    for clip in clips:
        left = 272 if clip["caption"] == "on the right" else 0
        assert left <= clip["crop_left"] and clip["crop_left"] + clip["crop_width"] <= left + 272
        assert clip["source_width"] == (544 if clip["caption"].startswith("on the") else 272)
    assert hashes_of("", clips) == hashes_of("from afar", clips), "the same video, the same clips"
    written = {str(path.relative_to(tmp_path)).split("/")[0] for path in tmp_path.rglob("*")}
    assert written == {"in", "alone.mp4", "deep"}, "something was written outside the output"
    entries[2]["split"] = "held_out"
    (tmp_path / "in" / "m.jsonl").write_text("\n".join(map(json.dumps, entries)))
    moved = run(*arguments)
    assert moved.exit_code == 2 and "asks for another split of 1 sources" in moved.output


def test_mostly_bad_input_is_stopped_with_the_reasons(frames, tmp_path):
    folder = tmp_path / "in"
    h264.write(folder / "good.mp4", frames["one"][:5], fps=10)
    for i in range(3):
        (folder / f"bad{i}.mp4").write_bytes(b"no video at all")
    (folder / "empty.mp4").touch()
    for i in range(5):
        (folder / f"notes{i}.txt").write_text("not counted")
    arguments = ["--input", folder, "--output", tmp_path / "out", *SHAPE]
    done = run(*arguments, "--max-rejected", "0.5")
    assert done.exit_code == 2, done.output
    assert "of 5 videos are rejected, more than prepare.max_rejected=0.5 allows: corrupt" in done.output
    partial = ledger.read(tmp_path / "out" / "ledger.partial.parquet")
    found = ledger.examples(partial)
    assert (
        found[0].startswith("corrupt, such as bad0.mp4: ")
        and found[0].count("bad0") == 1
        and len(found) == len({*found}) <= 3
    )
    assert {row["reason"] for row in partial} >= {"corrupt"} and not (tmp_path / "out" / "dataset.json").exists()
    done = run(*arguments, "--max-rejected", "0.8")
    assert done.exit_code == 0 and "resuming" in done.output, done.output
    assert len(verdicts(tmp_path / "out")) == 10 and not (tmp_path / "out" / "ledger.partial.parquet").exists()


@pytest.mark.slow
def test_killed_while_adding_it_ends_the_same(frames, tmp_path):
    folder, output = tmp_path / "in", tmp_path / "out"
    for i in range(3):
        h264.write(folder / f"{i}.mp4", frames["one"][i : i + 5], fps=10)
    arguments = ["--input", folder, "--output", output, *SHAPE, "--held-out", "0"]
    assert run(*arguments).exit_code == 0
    shutil.copytree(output, tmp_path / "undisturbed")
    before = shards.read_dataset(output)
    for i in range(3, 9):
        h264.write(folder / f"{i}.mp4", frames["other"][i - 3 : i + 2], fps=10)
    command = [sys.executable, "-m", "pipelines.prepare", *map(str, arguments)]
    job = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        while not list(output.glob("parts/*.json")):
            assert job.poll() is None, "it ended before it could be killed"
            time.sleep(0.02)
    finally:
        os.killpg(job.pid, signal.SIGKILL)
        job.wait()
    assert shards.read_dataset(output).fingerprint == before.fingerprint, "half an addition is seen by readers"
    for path in output.glob("parts/*.parquet"):  # and the disk has lost a block
        path.write_bytes(path.read_bytes()[:-100])
    done = run(*arguments)
    assert done.exit_code == 0, done.output
    rows = ledger.read(output / "ledger.parquet")
    ledger.check(
        rows,
        [f"{i}.mp4" for i in range(9)],
        sum(len(shards.index(shards.read_dataset(output), s)) for s in shards.SPLITS),
    )
    assert not (output / "parts").exists()
    dataset = shards.read_dataset(output)
    shards.verify(dataset)
    arguments[3] = tmp_path / "undisturbed"
    assert run(*arguments).exit_code == 0
    assert shards.read_dataset(tmp_path / "undisturbed").fingerprint == dataset.fingerprint != before.fingerprint
