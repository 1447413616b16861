"""Does it pay? Ent-Prog against its controls at equal cost, several seeds, all costs charged.

    python -m benchmarks.study --scale small                     # the least of them; a kill costs one unit
    python -m benchmarks.study --scale cpu                       # all arms, larger clips, five seeds
    python -m benchmarks.study --scale gpu --sitting-s 500       # one GPU, in sittings: the same command goes on
    python -m benchmarks.study --scale cpu --report              # docs/study.md and its charts anew, from the JSON

Makes the clips (benchmarks.mocap; real ones by pipelines.prepare), pre-trains a base without pose for each family,
tunes every arm's learning rate and batch with the same share of the budget, and trains every arm with every seed to
the same budget.
Each of these is a unit with a record of its own under WORK; finished ones are never done again. Leaves
benchmarks/results/study_SCALE.json, docs/study.md and docs/study/*.png. That file keeps the records: where WORK is
gone, a sitting makes clips and base anew and adds to what the file holds.
"""

import fcntl
import json
import math
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks import common, mocap, study_figures, study_page
from benchmarks.study_arms import ARMS, FEW, SCALES, SEARCHED, TASKS, Scale
from benchmarks.study_units import Bench, Unit, without_seconds
from benchmarks.study_work import work
from entprog import config, files
from entprog.errors import UserError
from entprog.media import assets
from pipelines import cli, prepare, terminal
from pipelines.cluster import session
from pipelines.command import usage
from pipelines.outputs import claim

WAIT_S = 2.0
"""Between two looks for a unit that can be done."""
SAME_BASE = 1e-3
"""Relative difference of held-out loss up to which a base made anew is the same: other processors round otherwise."""

app = usage.app("The study: Ent-Prog against its controls at equal cost.")


@app.command()
def main(
    scale: Annotated[str, typer.Option(help=f"How large: {', '.join(SCALES)}.")] = "cpu",
    work_folder: Annotated[
        Path | None, typer.Option("--work", help="Folder of clips, bases and records. Default: out/study-SCALE.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: cuda for the scale gpu, else cpu.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="torch's CPU threads.")] = 1,
    sitting_s: Annotated[
        float | None, typer.Option(min=0, help="Begin no unit after so many seconds; the same command goes on.")
    ] = None,
    only: Annotated[
        str | None, typer.Option(help="Arms, with commas between them: others wait for another sitting.")
    ] = None,
    busy: Annotated[
        bool, typer.Option("--busy", help="Others work on this machine: records keep FLOPs and no seconds.")
    ] = False,
    report: Annotated[bool, typer.Option("--report", help="Only write documents and charts, from the JSON.")] = False,
    dry_run: cli.DryRun = False,
) -> None:
    """Run what is not done yet, then write figures, charts and the document."""
    try:
        if scale not in SCALES:
            raise UserError(f"no scale {scale!r}{config.close_to(scale, SCALES)}; there are: {', '.join(SCALES)}")
        device = device or ("cuda" if scale == "gpu" else "cpu")
        if device == "cuda" and not torch.cuda.is_available():
            raise UserError("torch sees no GPU here: --scale cpu, or --device cpu")
        torch.set_num_threads(threads)
        name = f"study_{scale}"
        if busy and SCALES[scale].clock == "seconds":
            raise UserError(f"--busy: the clock of the scale {scale} is seconds, which others' work changes")
        kept = earlier(name).get("records", {})
        bench = Bench(SCALES[scale], work_folder or Path(f"out/study-{scale}"), torch.device(device), kept, busy)
        if dry_run:
            explain(bench)
            return
        if not report:
            claim.writable(bench.work)
            common.commit()  # now: the checkout may move on while units run
            done = run(bench, sitting_s, chosen(only))
            write(name, bench, scale, done)
        study_page.leave(common.RESULTS)
    except UserError as error:
        terminal.complain("error", str(error))
        raise typer.Exit(2) from None


def units(scale: Scale) -> list[Unit]:
    """All there is to do, in an order in which every unit's own needs come first, and every arm's first seed before any
    arm's second: whenever it is stopped, arms have been treated alike."""
    out: list[Unit] = []
    first = scale.tasks[0]
    for task in scale.tasks:
        arms = [arm for arm in TASKS[task].arms if arm in scale.arms]
        known = [TASKS[unit.task] for unit in out]
        if TASKS[task].target not in {each.target for each in known}:
            out.append(Unit(kind="clips", task=task))
        if TASKS[task].family not in {each.family for each in known}:
            out.append(Unit(kind="base", task=task))
        out.append(Unit(kind="budget", task=task))
        if TASKS[task].tuned:
            out += [
                Unit(kind="tune", task=task, arm=arm, seed=scale.tune_seed, rate=rate, batch=batch)
                for arm in arms
                if ARMS[arm].tuned_as is None
                for rate in scale.rates
                for batch in scale.batches
            ]
        for seed in scale.seeds:
            out += [Unit(kind="run", task=task, arm=arm, seed=seed) for arm in arms]
        out += [Unit(kind="scores", task=task, seed=seed) for seed in scale.seeds]
        if task == first:
            out += [
                Unit(kind="hindsight", task=task, arm=arm, seed=seed, stage=stage)
                for stage in scale.hindsight_stages
                for seed in scale.seeds
                for arm in SEARCHED
                if arm in arms
            ]
    return out


def clips(bench: Bench, target: str) -> dict[str, Any]:
    """Render or prepare a target's clips, with the source's. Raises UserError where a package or asset is missing."""
    scale = bench.scale
    with session.ray_cluster(2):
        if target == "rendered":
            counts = {"source": scale.source_clips, "target": scale.target_clips}
            return {
                name: mocap.run(bench.shards(name), name, count, scale.held_out_clips, scale.rendered, seed=0)
                for name, count in counts.items()
            }
        cut = {"held_out": ["cam04"], "stride": 1}
        settings = config.build({"data": {"shape": scale.rendered.model_dump()}, "prepare": cut}, config.Preparation)
        return prepare.run(str(assets.demo_videos(bench.work / "videos")), bench.shards(target), settings)


PREPARED = {
    "budget": lambda own, other: own == other,
    "base": lambda own, other: TASKS[own].family == TASKS[other].family,
    "clips": lambda own, other: TASKS[own].target == TASKS[other].target,
}
"""Kinds of units that others need → whether what one task made serves another. Each needs those after it."""


@dataclass(frozen=True)
class Done:
    """Finished units' records."""

    records: dict[Unit, dict[str, Any]]
    left: list[Unit]
    """What is still to be done here: also what has a record, but left clips or a base in a folder that is gone."""

    def of(self, kind: str, task: str, arm: str | None = None) -> dict[Unit, dict[str, Any]]:
        """The records of one kind and task, and arm if given."""
        return {u: r for u, r in self.records.items() if (u.kind, u.task) == (kind, task) and arm in (None, u.arm)}

    def is_ready(self, scale: Scale, unit: Unit) -> bool:
        """Whether what a unit needs is there: its clips, its base, its budget, its learning rate and batch."""
        kinds = list(PREPARED)
        needed = kinds[kinds.index(unit.kind) + 1 :] if unit.kind in PREPARED else kinds
        here = [u for u in self.records if u not in self.left]
        if not all(any(u.kind == kind and PREPARED[kind](u.task, unit.task) for u in here) for kind in needed):
            return False
        if unit.kind not in ("run", "hindsight"):
            return True
        task, arm = _tuned_on(scale, unit)
        ran, tried = self.of("run", task, arm), self.of("tune", task, arm)
        return bool(ran) or len(tried) == len(scale.rates) * len(scale.batches)

    def tuned(self, scale: Scale, unit: Unit) -> tuple[float, int]:
        """The learning rate (before its arm's factor) and the batch that a unit trains with: its own, that of the
        arm's earlier runs, or the best that were tried."""
        if unit.kind not in ("run", "hindsight"):
            return unit.rate or scale.rates[0], unit.batch or scale.batch_size
        task, arm = _tuned_on(scale, unit)
        if ran := list(self.of("run", task, arm).values()):
            return ran[0]["rate"] / ARMS[arm].rate_factor, ran[0]["batch"]
        tried = {(u.rate, u.batch): r["held_out_loss"] for u, r in self.of("tune", task, arm).items()}
        return min(tried, key=lambda each: math.inf if tried[each] is None else tried[each])  # None: not finite

    def budget(self, unit: Unit) -> float:
        """Of a run of its task, in the clock; 0 where it is not known yet."""
        return next((record["budget"] for record in self.of("budget", unit.task).values()), 0.0)

    def asked(self, only: Collection[str]) -> list[Unit]:
        """What is left of some arms, with what that needs."""
        tuned = {*only, *(ARMS[arm].tuned_as for arm in only)}
        arms = {"tune": tuned, **dict.fromkeys(PREPARED, ())}
        found = {unit for unit in self.left if unit.arm in arms.get(unit.kind, only)}
        for kind, serves in PREPARED.items():
            found |= {u for u in self.left if u.kind == kind and any(serves(u.task, o.task) for o in found)}
        return [unit for unit in self.left if unit in found]


def _tuned_on(scale: Scale, unit: Unit) -> tuple[str, str]:
    """The task and the arm whose tuning counts for a unit."""
    return unit.task if TASKS[unit.task].tuned else scale.tasks[0], ARMS[unit.arm].tuned_as or unit.arm


def earlier(name: str) -> dict[str, Any]:
    """The result file as earlier sittings left it; empty before the first."""
    path = common.RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def read(bench: Bench) -> Done:
    """What is finished so far."""
    wanted = units(bench.scale)
    here = {unit: json.loads(path.read_text()) for unit in wanted if (path := bench.work / unit.file).exists()}
    found = {unit: bench.kept[unit.file] for unit in wanted if unit.file in bench.kept} | here
    has_run = {(unit.task, unit.arm) for unit in found if unit.kind == "run"}

    def is_left(unit: Unit) -> bool:
        if unit.kind in ("clips", "base"):
            return unit not in here
        return unit not in found and not (unit.kind == "tune" and (unit.task, unit.arm) in has_run)

    return Done({unit: found[unit] for unit in wanted if unit in found}, [unit for unit in wanted if is_left(unit)])


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether this process alone has the unit of that record; another one's claim ends with it, however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield not path.exists()


def chosen(only: str | None) -> tuple[str, ...]:
    """The arms of a sitting. Raises UserError for a wrong name."""
    names = tuple(only.split(",")) if only else tuple(ARMS)
    for name in names:
        if name not in ARMS:
            raise UserError(f"no arm {name!r}{config.close_to(name, ARMS)}; there are: {', '.join(ARMS)}")
    return names


def run(bench: Bench, sitting_s: float | None, only: Collection[str] = tuple(ARMS)) -> Done:
    """Do what is left of some arms, until it is done or the sitting is over. Several processes may share a folder."""
    started, costs = time.time(), []
    with terminal.progress_bar() as bar:
        shown = bar.add_task("study", total=len(units(bench.scale)))
        while (done := read(bench)).left and (sitting_s is None or time.time() - started < sitting_s):
            bar.update(shown, completed=len(done.records))
            mine = done.asked(only)
            if not mine:
                break
            unit = next((u for u in mine if done.is_ready(bench.scale, u) and do(bench, u, done)), None)
            if unit is None:  # others are at all that can be done now
                time.sleep(WAIT_S)
                continue
            costs.append((time.time() - started) / (len(costs) + 1))
            left = len(mine) - 1
            line = f"{unit.kind} {unit.task} {unit.arm} seed {unit.seed}"
            bar.update(shown, description=line)
            terminal.console.print(f"{len(done.records) + 1} done, {left} left: {line}, ETA {left * costs[-1]:.0f} s")
    return read(bench)


def do(bench: Bench, unit: Unit, done: Done) -> bool:
    """Do a unit and keep its record, unless another process has it; whether it was done here."""
    path = bench.work / unit.file
    with claimed(path) as mine:
        if not mine:
            return False
        begun = time.time()
        if unit.kind == "clips":
            record = clips(bench, TASKS[unit.task].target)
        else:
            record = work(bench, unit, done.budget(unit), *done.tuned(bench.scale, unit))
        check_same(unit, record, bench.kept.get(unit.file, record))
        record = {"commit": common.commit(), "unit_s": time.time() - begun, **record}
        files.write_json(path, without_seconds(record) if bench.busy else record)
        return True


def check_same(unit: Unit, record: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    """Raises UserError for clips or a base made anew that are not those of earlier sittings' runs."""
    again = "they cannot be compared; take the older --work folder, or move the result file away and begin again"
    if unit.kind == "base":
        now, then = record["held_out_loss"], before["held_out_loss"]
        if not math.isclose(now, then, rel_tol=SAME_BASE):
            raise UserError(
                f"the base made anew has a held-out loss of {now:.5f}, the one of the result file's runs {then:.5f}: "
                f"{again}"
            )
    if unit.kind == "clips" and (changed := {*_fingerprints(record)} ^ {*_fingerprints(before)}):
        raise UserError(
            f"the {TASKS[unit.task].target} clips made anew are not those of the result file's runs (fingerprints "
            f"{', '.join(sorted(changed))}): {again}"
        )


def _fingerprints(record: Mapping[str, Any]) -> Iterator[str]:
    """Of all data sets that a record of clips tells of."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _fingerprints(value)
        elif name == "fingerprint":
            yield value


def explain(bench: Bench) -> None:
    """Print the plan of work."""
    wanted, done = units(bench.scale), read(bench)
    kinds = dict.fromkeys(unit.kind for unit in wanted)
    rows = [(kind, sum(u.kind == kind for u in wanted), sum(u.kind == kind for u in done.records)) for kind in kinds]
    terminal.show("Units of the study", rows, ("kind", "all", "done"))
    scale = bench.scale
    terminal.console.print(
        f"Budget of a run: {scale.full_steps} steps of full training, in {scale.clock}; {len(scale.arms)} arms "
        f"({', '.join(ARMS[arm].title for arm in scale.arms)}) on {scale.tasks[0]}, {len(FEW)} on the others; "
        f"{len(scale.seeds)} seeds; clips {scale.shape}. Work folder {bench.work}."
    )


def write(name: str, bench: Bench, scale: str, done: Done) -> Path:
    """The result file, out of the records."""
    figures, more = study_figures.summary(bench.scale, done.records)
    left = sum(unit not in done.records for unit in done.left)
    if not figures:
        raise UserError(f"nothing to report yet: {left} units are left, none of them a finished run")
    before = earlier(name)
    for part in ("cei", "tuning", "tuning_batches"):  # a file of before records were kept has figures alone
        more[part] = config.merge(before.get(part, {}), more[part])
    path = common.write(
        name,
        figures,
        device=bench.device,
        repeats=len(bench.scale.seeds),
        more={"scale": scale, "units_left": left, **more, "records": {u.file: r for u, r in done.records.items()}},
    )
    common.show("The study", [{k: row[k] for k in study_figures.SHOWN} for row in figures])
    terminal.console.print(f"Wrote {path}" + (f"; {left} units are left" if left else ""))
    return path


if __name__ == "__main__":
    app()
