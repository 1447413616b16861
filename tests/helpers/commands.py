"""Settings of a short training through the real command, and the command itself."""

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from helpers.networks import TINY
from helpers.people import CLIPS

SHAPE = CLIPS.model_dump()


SETTINGS = {
    "model": {"init": {**TINY, "patch_size": [2, 8, 8]}, "vae": "none"},
    "data": {"shape": SHAPE, "batch_size": 2, "held_out_clips": 4, "held_out_draws": 2},
    "train": {
        "steps": 16, "learning_rate": 1e-3, "held_out_every": 8, "checkpoint_every": 4, "threads": 1, "samples": 0,
    },
    "priority": {"conditions": 2, "draws": 4},
    "schedule": {
        "kind": "entprog", "stages": 2, "candidates": [0.34, 1.0], "search_steps": 2, "search_share": 0.9,
        "clock": "flops",
    },
    "tracking": {"system_every_s": 0.5},
}  # fmt: skip


PATIENCE_S = 500
"""Longest wait for what another process does, on a machine that is busy with other things too."""


def when_at(steps_file: Path, lines: int, act) -> threading.Thread:
    """Do something once the run has come that far."""

    def watch():
        deadline = time.time() + PATIENCE_S
        while time.time() < deadline:
            if steps_file.exists() and len(steps_file.read_bytes().splitlines()) >= lines:
                act()
                return
            time.sleep(0.02)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


class Command:
    """`pipelines.train` as a person types it, in a process and a Ray of its own."""

    def __init__(self, place, shards, name):
        self.place, self.output = place, place / name
        self.words = [sys.executable, "-m", "pipelines.train", "--config", "tiny.yaml", "--shards", str(shards)]
        self.words += ["--output", str(self.output)]
        self.env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}

    def killed(self, *settings, **acts):
        """Begin it; do things at steps (`at_7=…`); after the last of them SIGKILL the driver's whole group."""
        words = [*self.words, *itertools.chain(*(("--set", each) for each in settings))]
        process = subprocess.Popen(
            words, env=self.env, cwd=self.place, stdout=subprocess.DEVNULL, start_new_session=True
        )
        for step, act in acts.items():
            when_at(self.output / "steps.jsonl", int(step.removeprefix("at_")), act).join()
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL

    def again(self, *settings):
        """To its end: what it said, and its result.json."""
        words = [*self.words, *itertools.chain(*(("--set", each) for each in settings))]
        done = subprocess.run(words, env=self.env, cwd=self.place, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Traceback" not in done.stdout + done.stderr
        return done.stdout, json.loads((self.output / "result.json").read_text())
