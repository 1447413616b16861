"""What benchmarks have in common: interleaved timing, one result file each, one table on the terminal."""

import functools
import importlib.metadata
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from entprog import config, files
from pipelines import cli, terminal

RESULTS = Path(__file__).parent / "results"
VERSIONS = ("torch", "diffusers")


@dataclass(frozen=True)
class Measured:
    """One arm's repetitions, in the order in which they ran."""

    seconds: tuple[float, ...]
    cpu_seconds: tuple[float, ...]
    """This process's CPU time, over all threads: other load on the machine hardly moves it."""
    peak_bytes: int
    """Largest memory allocated on the GPU over the repetitions; 0 on a CPU."""

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread_s(self) -> tuple[float, float]:
        """Fastest and slowest."""
        return min(self.seconds), max(self.seconds)


def interleaved(
    arms: Mapping[str, Callable[[], Any]],
    repeats: int,
    device: torch.device | str,
    warm_up: int = 1,
    prepare: Callable[[str], Any] | None = None,
) -> dict[str, Measured]:
    """Run all arms once, `repeats` times over, after `warm_up` rounds that do not count.

    prepare(arm) runs before every turn of an arm and counts in neither time nor memory.

    What drifts (other load, clocks, temperature) then meets all arms alike. Every round begins with another arm. Time
    includes what the arm left to do on the GPU.
    """
    device = torch.device(device)
    names = list(arms)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in names}
    peak = dict.fromkeys(names, 0)
    for number in range(warm_up + repeats):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            if prepare is not None:
                prepare(name)
            elapsed, cpu, peak_bytes = _timed(arms[name], device)
            if number >= warm_up:
                seconds[name].append(elapsed)
                cpu_seconds[name].append(cpu)
                peak[name] = max(peak[name], peak_bytes)
    return {name: Measured(tuple(seconds[name]), tuple(cpu_seconds[name]), peak[name]) for name in names}


def _timed(arm: Callable[[], Any], device: torch.device) -> tuple[float, float, int]:
    """(seconds, CPU seconds, peak bytes on the GPU) of one run."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    started, cpu_started = time.perf_counter(), time.process_time()
    arm()
    if on_gpu:
        torch.cuda.synchronize(device)
    elapsed, cpu = time.perf_counter() - started, time.process_time() - cpu_started
    return elapsed, cpu, torch.cuda.max_memory_allocated(device) if on_gpu else 0


def ratio(of: Measured, to: Measured, clock: str = "seconds") -> tuple[float, float, float]:
    """(median, smallest, largest) over rounds of one arm's `clock` over the other's in the same round.

    clock: `seconds`, or `cpu_seconds`.
    """
    ratios = [a / b for a, b in zip(getattr(of, clock), getattr(to, clock), strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def cpu_seconds(pid: int | None = None) -> float:
    """What a process (None: this one) and all that it started have taken, those that have ended too."""
    import psutil  # a bare image, where parts of gpu_check run, may have none

    total, parent = 0.0, psutil.Process(pid)
    for process in (parent, *parent.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            total += sum(process.cpu_times()[:4])
    return total


def processes() -> set[int]:
    """Ids of this process and of all that it started and that run."""
    import psutil

    return {os.getpid(), *(process.pid for process in psutil.Process().children(recursive=True))}


def default_device() -> str:
    """A GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def describe(device: torch.device | str) -> str:
    """The device in words."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {platform.processor() or platform.machine()}, {torch.get_num_threads()} thread(s)"


def write(
    name: str,
    figures: Sequence[Mapping[str, Any]],
    *,
    device: torch.device | str,
    repeats: int,
    more: Mapping[str, Any] | None = None,
) -> Path:
    """Leave benchmarks/results/NAME.json: the figures, and what they were measured on and with; `more` beside them."""
    path = RESULTS / f"{name}.json"
    record = {"repeats": repeats, "load_average": os.getloadavg()[0], "figures": list(figures)}
    files.write_json(path, about(device) | record | dict(more or {}))
    return path


def about(device: torch.device | str) -> dict[str, Any]:
    """What figures are measured on and with."""
    return {
        "device": describe(device),
        "versions": {"python": platform.python_version()}
        | {package: importlib.metadata.version(package) for package in VERSIONS}
        | ({"cuda": torch.version.cuda} if torch.device(device).type == "cuda" else {}),
        "commit": commit(),
        "command": shlex.join(_command()),
    }


@functools.cache
def commit() -> str:
    """Of the code that this process runs: as it was when first asked, whatever the checkout becomes meanwhile."""
    return cli.commit()


def source() -> str:
    """Hash of the method's code and the benchmarks', whatever commit they are of."""
    root = Path(__file__).resolve().parents[1]
    paths = sorted(path for part in ("entprog", "benchmarks") for path in (root / part).rglob("*.py"))
    return config.digest([(str(path.relative_to(root)), files.sha256(path)) for path in paths])


def _command() -> list[str]:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return ["python", *(["-m", spec.name] if spec else sys.argv[:1]), *sys.argv[1:]]


def show(title: str, figures: Sequence[Mapping[str, Any]]) -> None:
    """The figures as a table; columns are the first row's names."""
    columns = tuple(figures[0])
    terminal.show(title, [tuple(row[column] for column in columns) for row in figures], columns)
