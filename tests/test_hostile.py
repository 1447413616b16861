"""The real command over hundreds of hostile files: each one accounted for, the sound ones kept, memory bounded."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from entprog.data import shards
from entprog.preparing import inputs, ledger
from helpers import hostile

ARGUMENTS = ["--frames", "4", "--height", "48", "--width", "32", "--fps", "10", "--stride", "4"]
WORKER_BYTES = 600 * 2**20
"""Most memory of its own that a process of the job may take: one 16000x16000 picture alone would be a gigabyte."""
FLEETING = 12


class Watch(threading.Thread):
    """Measures a process and all its children until it ends: `peak_bytes` of the largest, by its title."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self.root, self.peak_bytes, self.who = psutil.Process(pid), 0, ""

    def run(self):
        while self.root.is_running() and self.root.status() != psutil.STATUS_ZOMBIE:
            for process in [self.root, *self.root.children(recursive=True)]:
                with suppress(psutil.Error):
                    known = process.memory_info()
                    if known.rss - known.shared > self.peak_bytes:  # the object store is shared by all
                        self.peak_bytes, self.who = known.rss - known.shared, " ".join(process.cmdline())[:80]
            time.sleep(0.05)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """(corpus, output, names of sound files, process, its output, Watch) after one run, in which files vanish and a
    worker is killed.
    """
    corpus, output = tmp_path_factory.mktemp("corpus"), tmp_path_factory.mktemp("prepared")
    good = hostile.corpus(corpus, seed=0)
    fleeting = [corpus / "fleeting" / f"{i:02d}.mp4" for i in range(FLEETING)]
    fleeting[0].parent.mkdir()
    for path in fleeting:
        path.write_bytes((corpus / "formats" / "plain.mp4").read_bytes())
    command = [sys.executable, "-m", "pipelines.prepare", "--input", str(corpus), "--output", str(output), *ARGUMENTS]
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    watch = Watch(job.pid)
    watch.start()
    try:
        while not list(output.glob("parts/*.json")) and job.poll() is None:
            time.sleep(0.02)
        for path in fleeting[: FLEETING // 2]:
            path.unlink()
        for path in fleeting[FLEETING // 2 :]:
            path.write_bytes(path.read_bytes()[:5000])
        tracker = next((p for p in psutil.Process(job.pid).children(recursive=True) if "Track" in p.name()), None)
        if tracker is not None:  # as the system does when memory runs out
            tracker.kill()
        message, _ = job.communicate(timeout=400)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
    return corpus, output, good, job, message, watch, tracker


@pytest.mark.slow
def test_every_file_is_accounted_for_and_the_sound_ones_are_kept(ran):
    corpus, output, good, job, message, _, tracker = ran
    assert job.returncode == 0, message
    assert tracker is not None, "no tracking process was there to be killed"
    rows = ledger.read(output / "ledger.parquet")
    verdict = {row["file"]: row for row in rows if row["kind"] == "input"}
    fleeting = {f"fleeting/{i:02d}.mp4" for i in range(FLEETING)}
    assert verdict.keys() == {row["file"] for row in inputs.find(corpus).rows} | fleeting
    assert len(verdict) >= 500
    result = json.loads((output / "result.json").read_text())
    for kind in ("inputs", "clips"):
        assert result[kind]["kept"] + sum(result[kind]["rejected"].values()) == result[kind]["found"]
    lost = {file: (verdict[file]["reason"], verdict[file]["message"]) for file in good if not verdict[file]["kept"]}
    assert not lost, lost
    unforeseen = {file: row["message"] for file, row in verdict.items() if row["reason"] in ("error", "crashed")}
    assert not unforeseen
    dataset = shards.read_dataset(output)
    shards.verify(dataset)
    assert sum(row["kept"] for row in rows if row["kind"] == "clip") == dataset.clips("train") + dataset.clips(
        "held_out"
    )


@pytest.mark.slow
def test_reasons_are_the_right_ones(ran):
    _, output, *_ = ran
    reason = {row["file"]: row["reason"] for row in ledger.read(output / "ledger.parquet") if row["kind"] == "input"}
    for file, due in {
        "zero/empty.mp4": "empty",
        "zero/zeros.mp4": "corrupt",
        "wrong/video.txt": "not_a_video",
        "wrong/page.mp4": "corrupt",
        "sound/sound.mp4": "no_video_stream",
        "lies/playlist.mp4": "corrupt",  # it names a sound video beside it: nothing may be read through it
        "lies/concat.mp4": "corrupt",
        "lies/a-year.mkv": "too_long",
        "lies/an-hour.mp4": "corrupt",
        "lies/one-frame.mp4": "too_short",
        "lies/slanted.mp4": "unsupported",
        "lies/ictcp.mkv": "unsupported",
        "lies/black.mp4": "nobody",
        "lies/really-60000.gif": "corrupt",
        "nowhere.mp4": "unreadable",
        "circle.mp4": "unreadable",
        "pipe.mp4": "unreadable",
    }.items():
        assert reason[file] == due, file
    assert {reason[f"fleeting/{i:02d}.mp4"] for i in range(FLEETING)} <= {
        "",
        "unreadable",
        "changed",
        "corrupt",
        "no_frames",
    }


@pytest.mark.slow
def test_memory_is_bounded(ran):
    *_, watch, _ = ran
    print(f"most memory: {watch.peak_bytes / 2**20:.0f} MiB in {watch.who}")
    assert 0 < watch.peak_bytes < WORKER_BYTES, f"{watch.peak_bytes / 2**20:.0f} MiB in {watch.who}"


@pytest.mark.skipif(not hasattr(os, "sched_getscheduler"), reason="Linux's way to ask")
@pytest.mark.slow
def test_making_the_corpus_leaves_this_process_its_priority(ran):
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


def test_the_corpus_is_seeded(tmp_path, monkeypatch):
    frames = hostile.people(0.4)
    few = {f"plain.{kind}": hostile.encoded(frames, "mpeg4", kind) for kind in ("mp4", "avi")}
    monkeypatch.setattr(hostile, "_encoded", lambda: (frames, few, {}, {}, few))  # all of them take ten seconds

    def content(folder: Path, seed: int) -> dict[str, bytes]:
        folder.mkdir()
        hostile.corpus(folder, seed, size=120)
        return {str(p.relative_to(folder)): p.read_bytes() for p in folder.glob("damaged/*")}

    one = content(tmp_path / "one", 1)
    assert len(one) > 10
    assert one == content(tmp_path / "again", 1) != content(tmp_path / "two", 2)
