"""prepare on real clips through the real command: every file and clip accounted for, resumed after a kill."""

import contextlib
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import av
import numpy as np
import pytest
from typer.testing import CliRunner

from entprog import config
from entprog.data import shards
from entprog.errors import UserError
from entprog.media import assets, h264, video
from entprog.preparing import attempts, cutting, inputs, ledger, probing
from pipelines import cli, prepare
from pipelines.preparing import packing

ARGUMENTS = ["--frames", "6", "--height", "48", "--width", "32", "--fps", "10", "--stride", "3", "--held-out", "cam04"]


def command(*arguments) -> list[str]:
    return [sys.executable, "-m", "pipelines.prepare", *map(str, arguments)]


def run(*arguments):
    return CliRunner().invoke(prepare.app, list(map(str, arguments)), env={"COLUMNS": "200"})


@contextlib.contextmanager
def said_by_libraries():
    """What C++ libraries write to this process's standard error meanwhile, in a list of lines once it is over."""
    lines: list[str] = []
    before = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield lines
        finally:
            os.dup2(before, 2)
            os.close(before)
            file.seek(0)
            lines += [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]


def hashes(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def sound_only(path: Path) -> None:
    """A file with an audio stream alone."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame) + stream.encode(None))


def shortened(name: str, path: Path, seconds: float, height: int) -> None:
    """The first part of a real clip, smaller."""
    info = video.probe(assets.clip(name))
    size = height, round(height * info.width / info.height)
    frames = video.iter_frames(assets.clip(name), fps=20, end_s=seconds, size=size)
    h264.write(path, (frame for _, frame in frames), fps=20)


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """Real people, nobody, and much that is no usable video."""
    folder = tmp_path_factory.mktemp("videos")
    (folder / "more clips").mkdir()
    shortened("cam01", folder / "cam01.mp4", 1.6, 640)
    shortened("cam04", folder / "more clips" / "cam04 – 'held'.mp4", 1.6, 640)
    shortened("cam04", folder / "cam04.mp4", 1.6, 640)
    shortened("no_face", folder / "no_face.mp4", 4, 360)
    shortened("cam02", folder / "brief.mov", 0.3, 640)
    (folder / "damaged.mp4").write_bytes(assets.clip("cam01").read_bytes()[:100_000])
    (folder / "empty.mp4").touch()
    (folder / "notes.txt").write_text("not a video")
    (folder / ".hidden.mp4").write_text("left out")
    (folder / "gone.mp4").symlink_to(folder / "nowhere.mp4")
    (folder / "loop").symlink_to(folder, target_is_directory=True)
    sound_only(folder / "sound.mp4")
    return folder


EXPECTED = {
    "brief.mov": "too_short",
    "cam01.mp4": "",
    "cam04.mp4": "",
    "damaged.mp4": "corrupt",
    "empty.mp4": "empty",
    "gone.mp4": "unreadable",
    "more clips/cam04 – 'held'.mp4": "",
    "no_face.mp4": "nobody",
    "notes.txt": "not_a_video",
    "sound.mp4": "no_video_stream",
}


@pytest.fixture(scope="module")
def prepared(videos, tmp_path_factory, local_ray):
    """(output folder, hashes of the input before)."""
    output = tmp_path_factory.mktemp("prepared")
    before = hashes(videos)
    with said_by_libraries() as noise:
        done = run("--input", videos, "--output", output, *ARGUMENTS)
    assert done.exit_code == 0, done.output
    assert "rejected: corrupt" in done.stdout and not done.stderr.strip(), done.stderr
    assert not noise, noise
    return output, before


def test_every_file_and_every_clip_is_accounted_for(prepared, videos):
    output, before = prepared
    rows = ledger.read(output / "ledger.parquet")
    assert {row["file"]: row["reason"] for row in rows if row["kind"] == "input"} == EXPECTED
    kept = {row["file"]: (row["split"], row["message"]) for row in rows if row["kind"] == "input" and row["kept"]}
    assert kept == {  # a copy of what is held out by its name is held out too
        "cam01.mp4": ("train", ""),
        "cam04.mp4": ("held_out", "the same content as more clips/cam04 – 'held'.mp4"),
        "more clips/cam04 – 'held'.mp4": ("held_out", "the same content as cam04.mp4"),
    }
    result = json.loads((output / "result.json").read_text())
    assert result["status"] == "done" and result["job"] == "prepare"
    for kind in ("inputs", "clips"):
        figures = result[kind]
        assert figures["kept"] + sum(figures["rejected"].values()) == figures["found"]
    assert result["inputs"]["found"] == len(EXPECTED) and result["inputs"]["kept"] == 3
    dataset = shards.read_dataset(output)
    shards.verify(dataset)
    clips = [row for row in rows if row["kind"] == "clip" and row["kept"]]
    assert len(clips) == result["clips"]["kept"] == dataset.clips("train") + dataset.clips("held_out")
    assert before == hashes(videos), "the input was modified"
    assert not (output / "parts").exists() and (output / "contact_sheet.png").stat().st_size > 10_000


def test_clips_are_what_their_columns_say(prepared):
    output, _ = prepared
    dataset = shards.read_dataset(output)
    rows = {row["clip"]: row for row in ledger.read(output / "ledger.parquet")}
    seen = set()
    for split, source in (("train", "cam01.mp4"), ("held_out", "cam04.mp4")):
        assert dataset.clips(split) >= 2
        clips = [shards.read_rows(output / file, [row])[0] for file, row in shards.index(dataset, split)]
        assert source in {clip["source"] for clip in clips}
        for clip in clips:
            assert clip["split"] == split and clip["clip_id"] not in seen
            seen.add(clip["clip_id"])
            frames = h264.decode_rgb(clip["video"])
            assert frames.shape == (6, 48, 32, 3) and frames.std() > 10
            assert clip["reference"].startswith(b"\x89PNG")
            assert clip["pose"].shape == (6, 33, 3) and np.isfinite(clip["pose"]).all()
            assert -0.1 < clip["pose"][..., :2].mean() < 1.1
            assert clip["reference_s"] not in video.clip_times(clip["start_s"], 6, 10.0)
            assert hashlib.sha256(clip["video"]).hexdigest() == rows[clip["clip_id"]]["sha256"]
    assert not {clip for clip in seen if clip.startswith(("no_face", "brief"))}


def test_running_it_again_does_nothing_and_other_settings_are_refused(prepared, videos, tmp_path):
    output, _ = prepared
    before = hashes(output)
    figures = json.loads((output / "result.json").read_text())
    again = run("--input", videos, "--output", output, *ARGUMENTS)
    assert again.exit_code == 0 and "nothing to do" in again.output
    now = json.loads((output / "result.json").read_text())
    assert {name: now[name] for name in ("inputs", "clips", "fingerprint")} == {
        name: figures[name] for name in ("inputs", "clips", "fingerprint")
    }
    before.pop("result.json")
    assert before == {name: value for name, value in hashes(output).items() if name != "result.json"}
    other = run("--input", videos, "--output", output, *ARGUMENTS, "--set", "prepare.margin=0.3")
    assert other.exit_code == 2 and "prepare.margin was 0.15, now 0.3" in other.output
    copy = tmp_path / "copy"
    shutil.copytree(videos, copy, symlinks=True, ignore=shutil.ignore_patterns("notes.txt", "loop"))
    fewer = run("--input", copy, "--output", output, *ARGUMENTS)
    assert fewer.exit_code == 0
    assert "1 input of before not there any more (notes.txt): 0 clips of them in the dataset" in fewer.output
    (copy / "cam01.mp4").write_bytes((copy / "cam04.mp4").read_bytes())
    changed = run("--input", copy, "--output", output, *ARGUMENTS)
    assert changed.exit_code == 2 and "of inputs that have changed: the content of 1 input" in changed.output
    assert "(cam01.mp4)" in changed.output


@pytest.mark.slow
def test_after_a_kill_the_same_command_ends_with_the_same_clips(prepared, videos, tmp_path, local_ray):
    whole = shards.read_dataset(prepared[0])
    job = subprocess.Popen(
        command("--input", videos, "--output", tmp_path, *ARGUMENTS), stdout=subprocess.DEVNULL, start_new_session=True
    )
    try:
        while not list(tmp_path.glob("parts/*.json")):
            assert job.poll() is None, "it ended before it could be killed"
            time.sleep(0.05)
    finally:
        os.killpg(job.pid, signal.SIGKILL)
        job.wait()
    with pytest.raises(UserError, match="not a finished dataset"):
        shards.read_dataset(tmp_path)
    finished = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("parts/*.json")}
    done = run("--input", videos, "--output", tmp_path, *ARGUMENTS)
    assert done.exit_code == 0, done.output
    assert f"resuming: {len(finished)} of {len(EXPECTED)}" in done.stdout
    resumed = shards.read_dataset(tmp_path)
    assert resumed.fingerprint == whole.fingerprint and resumed.splits == whole.splits


# ---- without Ray ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "no/such/folder"], "no/such/folder does not exist"),
        (["--input", "EMPTY"], "has no files"),
        (["--height", "97"], "data.shape.height"),
        (["--fps", "inf"], "data.shape.fps"),
        (["--input", "ftp://me:hush@host/a.mp4"], "ftp://***@host/a.mp4: protocol 'ftp' is not read"),
        (["--input", "https://me:hush@[::1/a.mp4?sig=hush"], "is malformed"),
        (["--frames", "0"], "data.shape.frames"),
        (["--held-out", "cam05"], "no such file (did you mean cam0"),
        (["--held-out", "cam04", "--held-out-ratio", "0.5"], "both --held-out and --held-out-ratio"),
        (["--set", "prepare.margn=1"], "unknown setting prepare.margn (did you mean prepare.margin?)"),
        (["--set", "train.steps=1"], "unknown setting train"),
        (["--preset", "dem"], "unknown preset 'dem' (did you mean demo?)"),
        (["--output", "/proc/no/such"], "cannot write to output folder"),
    ],
)
def test_wrong_arguments_get_one_line_and_status_2(arguments, message, videos, tmp_path):
    (tmp_path / "EMPTY").mkdir()
    given = [str(tmp_path / a) if a == "EMPTY" else a for a in arguments]
    if "--input" not in given:
        given += ["--input", str(videos)]
    if "--output" not in given:
        given += ["--output", str(tmp_path / "out")]
    if "--preset" not in given:
        given += ["--preset", "demo"]
    done = run(*given)
    assert done.exit_code == 2, done.output
    assert message in done.output
    assert len(done.output.strip().splitlines()) == 1


def test_dry_run_writes_nothing(videos, tmp_path):
    done = run("--input", videos, "--output", tmp_path / "out", "--preset", "demo", "--stride", "2", "--dry-run")
    assert done.exit_code == 0, done.output
    assert "10 files" in done.output and "5 frames of 48x64 at 12 fps" in done.output
    assert "of the manifest" not in done.output, "there is none"
    assert not (tmp_path / "out").exists()


def test_settings_come_from_preset_then_files_then_options_then_set(tmp_path):
    (tmp_path / "a.yaml").write_text("{data: {shape: {frames: 5, fps: 8}, batch_size: 2}, prepare: {margin: 0.3}}")
    files, pairs = [tmp_path / "a.yaml"], ["data.shape.fps=6"]
    settings = cli.settings(
        config.Preparation, "demo", files, pairs, data={"shape": {"fps": 7, "width": None}}, prepare={"stride": 2}
    )
    assert settings.data.shape.model_dump() == {"frames": 5, "height": 64, "width": 48, "fps": 6}
    assert settings.prepare.margin == 0.3 and settings.prepare.stride == 2


def test_split_by_seed_keeps_a_source_on_each_side():
    files = [f"{i}.mp4" for i in range(20)]
    parts = packing.split(files, set(), 0.2, seed=0)
    assert list(parts.values()).count("held_out") == 4
    assert parts == packing.split(files[::-1], set(), 0.2, seed=0) != packing.split(files, set(), 0.2, seed=1)
    assert sorted(packing.split(files[:2], set(), 0.01, 0).values()) == ["held_out", "train"]
    assert sorted(packing.split(files[:2], set(), 0.99, 0).values()) == ["held_out", "train"]
    assert packing.split(files[:1], set(), 0.5, 0) == {"0.mp4": "train"}
    with pytest.raises(UserError, match=r"0.mp4 is the only usable source, .*: give another one too, or leave out"):
        packing.split(files[:1], {"0.mp4"}, 0.1, 0)
    with pytest.raises(UserError, match="all 2 usable sources are held out"):
        packing.split(files[:2], set(files), 0.1, 0)
    with pytest.raises(UserError, match=r"no clip was kept of any held-out source \(bad\.mp4\)"):
        packing.split(files, {"bad.mp4"}, 0.1, 0)


def test_shards_are_even_and_hold_each_clip_once():
    rows = [
        {"kind": "clip", "kept": i % 3 > 0, "clip": f"{file}#{i}", "file": file} for file in "abc" for i in range(10)
    ]
    plans = packing.shard_plans(rows, {"a": "train", "b": "held_out", "c": "train"}, {f: f for f in "abc"}, 5)
    assert [(p["file"], len(p["clips"])) for p in plans] == [
        ("train/00000.parquet", 4),
        ("train/00001.parquet", 4),
        ("train/00002.parquet", 4),
        ("held_out/00000.parquet", 3),
        ("held_out/00001.parquet", 3),
    ]
    clips = [clip for plan in plans for clip, *_ in plan["clips"]]
    assert sorted(clips) == sorted(row["clip"] for row in rows if row["kept"])


def test_the_ledger_notices_what_does_not_add_up():
    row = {"kind": "input", "file": "a", "clip": "", "kept": False, "reason": "empty"}
    ledger.check([row], ["a"], 0)
    clip = {"kind": "clip", "file": "a", "clip": "a#0", "kept": False, "reason": "nobody"}
    for rows, files, kept, message in (
        ([row], ["a", "b"], 0, "one row for each input"),
        ([row, row], ["a"], 0, "one row for each input"),
        ([row, clip, clip], ["a"], 0, "twice"),
        ([{**row, "reason": ""}], ["a"], 0, "neither kept nor rejected"),
        ([{**row, "kept": True, "reason": ""}], ["a"], 0, "no clip is kept of"),
        ([row], ["a"], 1, "the shards hold 1"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ledger.check(rows, files, kept)


def test_a_name_that_no_file_can_have_is_a_verdict(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"path": "a\\u0000b.mp4"}')
    (row,) = inputs.find(tmp_path / "m.jsonl").rows
    assert probing.probe(row, config.Preparation())["reason"] == "unreadable"


def test_a_file_that_vanishes_or_is_no_file_is_a_verdict(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "here.mp4").write_bytes(b"x")
    (tmp_path / "grows.mp4").write_bytes(b"x")
    rows = inputs.find(tmp_path).rows
    (tmp_path / "here.mp4").unlink()
    (tmp_path / "grows.mp4").write_bytes(b"xy")
    probed = [probing.probe(row, config.Preparation()) for row in rows]
    assert {row["file"]: row["reason"] for row in probed} == {
        "grows.mp4": "changed",
        "here.mp4": "unreadable",
        "pipe.mp4": "unreadable",
    }


def source(folder: Path, name: str) -> dict:
    (row,) = (row for row in inputs.find(folder).rows if row["file"] == name)
    return row


def test_a_source_that_crashes_its_process_again_and_again_is_left_alone(videos, tmp_path):
    settings = config.Preparation()
    row = {**source(videos, "cam01.mp4"), "key": "k"}
    probed = probing.probe(row, settings, tmp_path)
    assert probed["reason"] == "" and not list(tmp_path.iterdir())
    mark, here = tmp_path / "k.cut.tried", f"{platform.node()}\n"
    for lost in ("one\n", "one\ntwo\n" + here):  # nodes that were taken while they read it
        mark.write_text(lost)
        with attempts.attempt(tmp_path, "k", "cut", 60) as may_try:
            assert may_try and mark.read_text() == lost + here
    mark.write_text("one\ntwo\nthree\nfour\n")
    with attempts.attempt(tmp_path, "k", "cut", 60) as may_try:
        assert not may_try, "nor is it tried on ever more nodes"
    mark.write_text(2 * here)  # as two crashed processes leave it
    assert cutting.cut({**probed, "track": b"", "cuts": b"", "others": b""}, settings, tmp_path)["clips"] == 0
    (line,) = json.loads((tmp_path / "k.json").read_text())["ledger"]
    assert (line["kept"], line["reason"], line["stage"]) == (False, "crashed", "cut")
    mark.write_text(here)
    attempts.forget(tmp_path)
    assert not mark.exists()


def test_equal_input_gives_equal_clips_and_nothing_else(videos, tmp_path):
    settings = cli.settings(
        config.Preparation, None, None, None, data={"shape": {"frames": 6, "height": 48, "width": 32, "fps": 10}}
    )
    row = probing.cut_shots(probing.probe(source(videos, "cam01.mp4"), settings), settings)
    tracked = cutting.Track(settings)(row)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        counts = cutting.cut({**tracked, "key": "k"}, settings, tmp_path / name)
        assert counts["clips"] > 1
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")
