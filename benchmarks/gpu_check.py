"""Everything that needs a GPU, by one command and within a time.

    python -m benchmarks.gpu_check --seconds 400    # called again, it goes on where it stopped
    python -m benchmarks.gpu_check --tiny           # all of it on the CPU with tiny networks: some minutes

Needs torch, diffusers, pydantic, pyyaml and typer; Ray, MLflow, pyarrow and av for the parts `train …` alone; torchao
and peft for rows in fp8, with 8-bit moments and LoRA. What is not installed is skipped, with a line that says so.

Parts (`benchmarks.gpu_parts`) run one after another, the most important first, in a process beside this one. A part has
120 seconds; one that takes longer, runs out of memory or crashes is a result too, and the next one goes on in a new
process. Every row is kept as it comes, in benchmarks/results/gpu_check.json (--tiny: gpu_check_tiny.json). A part that
is tried again keeps the rows it had until the new ones are all there, or at least as many where it was never done.
That file is of one device, set of versions and source code: for others it is begun anew, and the one before is kept as
gpu_check.1.json, gpu_check.2.json, ….

Rows of steps are those of `benchmarks.step_cost`, with the share of the card's own rate of bfloat16 matrix products.
FLOPs are counted, checkpointing's second forward among them.
"""

import gc
import itertools
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Annotated, Any

import torch
import typer

from benchmarks import common
from benchmarks.gpu_common import REPEATS, Row, SkippedError
from benchmarks.gpu_parts import first_line, not_installed, parts
from benchmarks.step_cost import is_out_of_memory, label, shown
from pipelines import terminal
from pipelines.command import usage

app = usage.app("Everything that needs a GPU, within a time.")

PART_S = 120.0
"""Longest time for a part."""
LEAST_S = 15.0
"""A part is not begun with less time than this left."""
START_S = 90.0
"""Longest time in which the process beside this one imports what it needs."""
OWN = ("device", "versions", "source")
"""What a file of results belongs to."""
DONE = "done"
SKIPPED, SLOW = "skipped", "too slow"
"""How parts end that the next call tries again, after all that it has not tried: a package may be there then, and
torch keeps what it has compiled."""


class StartError(Exception):
    """The process that measures does not start; the message says how that ended."""


@app.command()
def main(
    seconds: Annotated[float, typer.Option(min=1, help="Time for this call; what is left is for the next.")] = 400.0,
    tiny: Annotated[bool, typer.Option("--tiny", help="On the CPU, with tiny networks.")] = False,
    part: Annotated[list[str] | None, typer.Option(help="Only this part, measured anew. May be repeated.")] = None,
) -> None:
    """Measure what has not been measured yet; print and keep the results."""
    deadline = time.monotonic() + seconds
    if not tiny and not torch.cuda.is_available():
        raise typer.BadParameter("torch sees no GPU here: --tiny tries all of it on the CPU")
    names = [each.name for each in parts(tiny)]
    if unknown := sorted(set(part or ()) - set(names)):
        raise typer.BadParameter(f"no part is called {unknown[0]!r}; there are: {'; '.join(names)}")
    kept = Kept(tiny, again=part or ())
    todo = sorted((name for name in part or names if name not in kept.settled), key=kept.parts.__contains__)
    terminal.console.print(f"{len(todo)} of {len(names)} parts to do in {seconds:.0f} s")
    try:
        for name, row, end in events(todo, tiny, deadline):
            if row is not None:
                kept.add(name, row)
            if end is not None:
                stays = "; what was measured before stays" if kept.end(name, end) else ""
                status = f"{end['status']}{': ' + end['note'] if end['note'] else ''}"
                terminal.console.print(f"{name}: {status} ({end['seconds']:.0f} s){stays}")
    except StartError as error:
        terminal.complain("failed", f"the process that measures does not start: {error}; no part is marked for that")
        raise typer.Exit(1) from None
    kept.show()
    left = [name for name in names if name not in kept.parts]
    if kept.path.exists():
        terminal.console.print(f"Results: {kept.path}")
    if left:
        terminal.console.print(f"{len(left)} parts are left ({left[0]}, …): the same command goes on")


# ---- what is kept ----


class Kept:
    """The file of results: rows, and how each part ended."""

    def __init__(self, tiny: bool, again: Sequence[str]):
        name, self.device = ("gpu_check_tiny", "cpu") if tiny else ("gpu_check", "cuda")
        self.path = common.RESULTS / f"{name}.json"
        self.again = set(again)
        self.rows: dict[str, list[Row]] = {}
        """Part → the best that was measured of it."""
        self.parts: dict[str, Row] = {}
        self.trying: dict[str, list[Row]] = {}
        """Part → rows of this call's try."""
        self.about = common.about(self.device) | {"source": common.source()}
        before = self._before()
        self.others = [name for name in OWN if before is not None and before.get(name) != self.about[name]]
        if before is not None and not self.others:
            self.about["commit"] = before["commit"]  # of the same source
            self.parts = before["parts"]
            for row in before["figures"]:
                self.rows.setdefault(row["part"], []).append(row)

    @property
    def settled(self) -> set[str]:
        """Parts that need not be tried again."""
        return {name for name, end in self.parts.items() if end["status"] not in (SKIPPED, SLOW)} - self.again

    def add(self, part: str, row: Row) -> None:
        """Keep a row; a step's with its share of the card's own rate. Those of an earlier try go as soon as this one
        has as many; of a part that was done, not before this one is."""
        if row.get("tflops_per_s") and (rate := self._matmul_rate()):
            row["share_of_matmul"] = row["tflops_per_s"] / rate
        rows = self.trying.setdefault(part, [])
        rows.append({"part": part, **row})
        if not self._is_done(part) and len(rows) >= len(self.rows.get(part, ())):
            self.rows[part] = rows
        self.write()

    def end(self, part: str, end: Row) -> bool:
        """Keep how a part ended. True where it was done before and now is not: then what it had stays, and the file
        says beside that how this try ended."""
        rows = self.trying.pop(part, [])
        stays = self._is_done(part) and end["status"] != DONE
        if end["status"] == DONE:
            self.rows[part] = rows
        self.parts[part] = {**self.parts[part], "again": end} if stays else end
        self.write()
        return stays

    def write(self) -> None:
        if self.others:
            names = (self.path.with_suffix(f".{number}.json") for number in itertools.count(1))
            aside = next(path for path in names if not path.exists())
            self.path.rename(aside)
            terminal.console.print(f"{self.path.name} was of another {' and '.join(self.others)}: kept as {aside.name}")
            self.others = []
        more = {**self.about, "parts": self.parts}
        common.write(self.path.stem, self._all(), device=self.device, repeats=REPEATS, more=more)

    def show(self) -> None:
        """Every row in a line; of the numbers those that are not equal."""
        compared = [row["equal"] for row in self._all() if "equal" in row]
        terminal.console.print(f"numbers: {sum(compared)} of {len(compared)} rows equal to the CPU's within tolerance")
        for row in self._all():
            if not row.get("equal"):
                terminal.console.print(line(row))

    def _all(self) -> list[Row]:
        return [row for rows in self.rows.values() for row in rows]

    def _is_done(self, part: str) -> bool:
        return part in self.parts and self.parts[part]["status"] == DONE

    def _matmul_rate(self) -> float | None:
        return next((row["matmul_tflops_per_s"] for row in self._all() if "matmul_tflops_per_s" in row), None)

    def _before(self) -> dict[str, Any] | None:
        """The file of an earlier call; an empty one stands for what cannot be read."""
        if not self.path.exists():
            return None
        try:
            before = json.loads(self.path.read_text())
        except ValueError:
            return {}
        return before if isinstance(before, dict) else {}


STEP = {
    "step_s": "s", "tflops_per_s": "TFLOP/s", "share_of_matmul": "of the card's matmul", "speedup": "times as fast",
    "memory_bytes": "bytes", "memory_ratio": "of full training's memory",
    "predicted_over_measured_time": "foreseen over measured time", "predicted_over_measured_memory": "and memory",
}  # fmt: skip
"""Figures of a step's line, and what is said after each."""


def line(row: Row) -> str:
    """A row in words."""
    if "plan" in row:
        figures = [f"{shown(row[name])} {words}" for name, words in STEP.items() if row.get(name) is not None]
        blocks = f" ({row['blocks']} of {row['of_blocks']} blocks)" if "of_blocks" in row else ""
        return f"{row['part']}{blocks}: {label(row['plan'])}: {', '.join([*figures, row['note']]).rstrip(', ')}"
    return f"{row['part']}: " + ", ".join(
        f"{name} {shown(value)}" for name, value in row.items() if name != "part" and value != ""
    )


# ---- the process beside this one ----

Event = tuple[str, Row | None, Row | None]
"""A part's name with a row of it, or with how it ended."""


def events(todo: Sequence[str], tiny: bool, deadline: float) -> Iterator[Event]:
    """What comes of some parts until the deadline (s of time.monotonic). A part that it cuts short has no end; one
    that fails ends the process it ran in. Raises StartError where no process starts."""
    todo = list(todo)

    def left_s() -> float:
        return max(deadline - time.monotonic(), 0)

    def is_time() -> bool:
        return bool(todo) and left_s() > LEAST_S

    while is_time():
        with beside(tiny) as (process, pipe):
            if not is_ready(pipe, min(START_S, left_s())):
                process.join(1)  # one that ended on its own says with what
                if process.exitcode is not None:
                    raise StartError(f"it ended with {process.exitcode}")
                if left_s():
                    raise StartError(f"not ready after {START_S:.0f} s")
                return
            while is_time():
                status = yield from of_part(todo.pop(0), process, pipe, deadline)
                # One that cannot clean up after a part is replaced like one whose part failed.
                if status not in (DONE, SKIPPED) or not (is_time() and is_ready(pipe, min(START_S, left_s()))):
                    break


def is_ready(pipe: Connection, wait_s: float) -> bool:
    """Whether the process that measures says so in time."""
    try:
        return pipe.poll(wait_s) and bool(pipe.recv())
    except (EOFError, OSError):
        return False


def of_part(name: str, process, pipe: Connection, deadline: float) -> Generator[Event, None, str | None]:
    """One part's rows and its end, whose status is returned; None where the deadline comes first."""
    started = time.monotonic()
    limit = min(started + PART_S, deadline)
    try:
        pipe.send(name)
        while pipe.poll(max(limit - time.monotonic(), 0)):
            status, note = pipe.recv()
            if status != "row":
                break
            yield name, note, None
        else:
            if limit == deadline:
                return None
            status, note = SLOW, f"more than {PART_S:.0f} s"
    except (EOFError, OSError):
        process.join(10)
        status, note = "crashed", f"the process ended with {process.exitcode}"
    yield name, None, {"status": status, "note": note, "seconds": round(time.monotonic() - started, 1)}
    return status


@contextmanager
def beside(tiny: bool):
    """(process, pipe): a process that measures parts; on leaving it is gone with all that it started."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=measure, args=(theirs, tiny))
    try:
        process.start()
    except OSError as error:
        raise StartError(str(error)) from error
    theirs.close()
    try:
        yield process, ours
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except OSError:  # it leads no group yet
            process.kill()
        process.join()
        ours.close()


def measure(pipe: Connection, tiny: bool) -> None:
    """Program of that process: says that it is ready, takes a part's name, sends ("row", row) and then how it ended
    (status, note)."""
    os.setpgid(0, 0)
    threading.Thread(target=end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    if tiny:
        torch.set_num_threads(1)
        torch.compiler.set_stance("force_eager")
    rows = {part.name: part.rows for part in parts(tiny)}
    while True:
        pipe.send("ready")
        name = pipe.recv()
        try:
            for row in rows[name]():
                pipe.send(("row", row))
            end = (DONE, "")
        except Exception as error:
            end = end_of(error)
        pipe.send(end)
        torch.compiler.reset()
        gc.collect()  # a network's blocks hold themselves, and its memory would count in the next part's peak
        if not tiny:
            torch.cuda.empty_cache()


def end_of(error: Exception) -> tuple[str, str]:
    """How a part ended that raised: (status, note)."""
    if isinstance(error, SkippedError):
        return SKIPPED, str(error)
    if package := not_installed(str(error)):
        return SKIPPED, f"{package} is not installed"
    # A result like any other; what it leaves behind ends with its process.
    status = "out of memory" if is_out_of_memory(error) else "failed"
    return status, f"{type(error).__name__}: {first_line(error)}"


def end_with(parent) -> None:
    """End this process and all that it started as soon as its parent is gone."""
    parent.join()
    os.killpg(os.getpgid(0), signal.SIGKILL)


if __name__ == "__main__":
    app()
