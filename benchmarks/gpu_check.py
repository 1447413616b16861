"""Everything that needs a GPU, by one command and within a time.

    python -m benchmarks.gpu_check --seconds 400    # called again, it goes on where it stopped
    python -m benchmarks.gpu_check --tiny           # all of it on the CPU with tiny networks: two minutes

Needs torch, diffusers, pydantic, pyyaml and typer; Ray, MLflow, pyarrow and av for the part `train` alone; torchao and
peft for rows in fp8, with 8-bit moments and LoRA. What is not installed is skipped, with a line that says so.

Parts (`benchmarks.gpu_parts`) run one after another, the most important first, in a process beside this one. A part has
120 seconds; one that takes longer, runs out of memory or crashes is a result too, and the next one goes on in a new
process. Every row is kept as it comes, in benchmarks/results/gpu_check.json (--tiny: gpu_check_tiny.json). That file is
of one device, set of versions and source code: for others it is begun anew.

Rows of steps are those of `benchmarks.step_cost`, with the share of the card's own rate of bfloat16 matrix products.
FLOPs are counted, checkpointing's second forward among them.
"""

import gc
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
from benchmarks.gpu_parts import REPEATS, Row, SkippedError, first_line, parts
from benchmarks.step_cost import is_out_of_memory, label, shown
from pipelines import cli

app = cli.app("Everything that needs a GPU, within a time.")

PART_S = 120.0
"""Longest time for a part."""
LEAST_S = 15.0
"""A part is not begun with less time than this left."""
START_S = 90.0
"""Longest time in which the process beside this one imports what it needs."""
OWN = ("device", "versions", "source")
"""What a file of results belongs to."""
SKIPPED, SLOW = "skipped", "too slow"
"""How parts end that the next call tries again, after all that it has not tried: a package may be there then, and
torch keeps what it has compiled."""


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
    todo = sorted((name for name in part or names if name not in kept.done), key=kept.parts.__contains__)
    cli.console.print(f"{len(todo)} of {len(names)} parts to do in {seconds:.0f} s")
    for name, row, end in events(todo, tiny, deadline):
        if row is not None:
            kept.add(name, row)
        if end is not None:
            kept.end(name, end)
            status = f"{end['status']}{': ' + end['note'] if end['note'] else ''}"
            cli.console.print(f"{name}: {status} ({end['seconds']:.0f} s)")
    kept.show()
    left = [name for name in names if name not in kept.parts]
    cli.console.print(f"Wrote {kept.write()}")
    if left:
        cli.console.print(f"{len(left)} parts are left ({left[0]}, …): the same command goes on")


# ---- what is kept ----


class Kept:
    """The file of results: rows, and how each part ended."""

    def __init__(self, tiny: bool, again: Sequence[str]):
        self.name, self.device = ("gpu_check_tiny", "cpu") if tiny else ("gpu_check", "cuda")
        self.rows: list[Row] = []
        self.parts: dict[str, Row] = {}
        self.about = common.about(self.device) | {"source": common.source()}
        before = self._before()
        if before is not None:
            self.about["commit"] = before["commit"]  # of the same source
            self.parts = {name: end for name, end in before["parts"].items() if name not in again}
            # Rows of a part that a kill has ended are measured anew.
            self.rows = [row for row in before["figures"] if row["part"] in self.parts]

    @property
    def done(self) -> set[str]:
        """Parts that need not be tried again."""
        return {name for name, end in self.parts.items() if end["status"] not in (SKIPPED, SLOW)}

    def add(self, part: str, row: Row) -> None:
        """Keep a row; a step's with its share of the card's own rate. Those of an earlier try of the part go."""
        if part in self.parts:
            del self.parts[part]
            self.rows = [row for row in self.rows if row["part"] != part]
        if row.get("tflops_per_s") and (rate := self._matmul_rate()):
            row["share_of_matmul"] = row["tflops_per_s"] / rate
        self.rows.append({"part": part, **row})
        self.write()

    def end(self, part: str, end: Row) -> None:
        self.parts[part] = end
        self.write()

    def write(self):
        more = {**self.about, "parts": self.parts}
        return common.write(self.name, self.rows, device=self.device, repeats=REPEATS, more=more)

    def show(self) -> None:
        """Every row in a line; of the numbers those that are not equal."""
        compared = [row["equal"] for row in self.rows if "equal" in row]
        cli.console.print(f"numbers: {sum(compared)} of {len(compared)} rows equal to the CPU's within tolerance")
        for row in self.rows:
            if not row.get("equal"):
                cli.console.print(line(row))

    def _matmul_rate(self) -> float | None:
        return next((row["matmul_tflops_per_s"] for row in self.rows if "matmul_tflops_per_s" in row), None)

    def _before(self) -> dict[str, Any] | None:
        """The file of an earlier call, if it is of this commit, device and these versions."""
        path = common.RESULTS / f"{self.name}.json"
        try:
            before = json.loads(path.read_text())
        except (OSError, ValueError):
            return None
        if other := [name for name in OWN if before.get(name) != self.about[name]]:
            cli.console.print(f"{path.name} is of another {' and '.join(other)}: begun anew")
            return None
        return before


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
    that fails ends the process it ran in."""
    todo = list(todo)

    def is_time() -> bool:
        return bool(todo) and deadline - time.monotonic() > LEAST_S

    while is_time():
        with beside(tiny) as (process, pipe):
            if not pipe.poll(START_S):
                raise RuntimeError(f"nothing was imported within {START_S:.0f} s")
            while is_time():
                status = yield from of_part(todo.pop(0), process, pipe, deadline)
                if status not in ("done", SKIPPED):
                    break


def of_part(name: str, process, pipe: Connection, deadline: float) -> Generator[Event, None, str | None]:
    """One part's rows and its end, whose status is returned; None where the deadline comes first."""
    started = time.monotonic()
    limit = min(started + PART_S, deadline)
    try:
        pipe.recv()  # it is ready
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
    process.start()
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
            end = ("done", "")
        except SkippedError as reason:
            end = (SKIPPED, str(reason))
        except Exception as error:  # a result like any other; what it leaves behind ends with this process
            status = "out of memory" if is_out_of_memory(error) else "failed"
            end = (status, f"{type(error).__name__}: {first_line(error)}")
        pipe.send(end)
        torch.compiler.reset()
        gc.collect()  # a network's blocks hold themselves, and its memory would count in the next part's peak
        if not tiny:
            torch.cuda.empty_cache()


def end_with(parent) -> None:
    """End this process and all that it started as soon as its parent is gone."""
    parent.join()
    os.killpg(os.getpgid(0), signal.SIGKILL)


if __name__ == "__main__":
    app()
