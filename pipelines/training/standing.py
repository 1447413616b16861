"""Where a training stands, read from the files that it leaves: while it runs, after it, or after it was cut short."""

import contextlib
import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from entprog import files, masking
from entprog.errors import UserError
from entprog.storage import Where
from pipelines import terminal
from pipelines.cluster import stalls
from pipelines.outputs import claim
from pipelines.training import steplog

SILENT_S = 120.0
"""Seconds without a step after which a training is no longer said to run, unless its steps take longer."""
RECENT_STEPS = 50
"""Steps from which pace and time left are foretold."""
BUDGETS = {"train.steps": "step", "train.seconds": "charged_s", "train.flops": "flops"}
"""The settings that end a training, and the entry of a step that counts towards each."""
BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Standing:
    """A training at one moment."""

    state: Literal["running", "silent", "finished", "failed", "refused", "interrupted"]
    steps: list[dict[str, Any]]
    """The lines of steps.jsonl."""
    share: float | None
    """Part of the budget that is spent, 0..1; None where the budget is not known."""
    left_s: float | None
    """Wall seconds until the end at the recent pace; None where it cannot be foretold."""
    age_s: float
    """Seconds since the last step; before the first since anything was written there."""
    trouble: str
    """What ended it before its end, as result.json or the last line of error.log says it, or ''."""
    warnings: list[dict[str, Any]]
    """The lines of warnings.jsonl."""
    previews: list[dict[str, Any]]
    """The lines of previews/previews.jsonl."""
    now_s: float

    @property
    def held_out(self) -> list[float]:
        """Held-out losses that are finite, in order."""
        return [s["held_out_loss"] for s in self.steps if s["held_out_loss"] is not None]


def read(output: Where, now_s: float | None = None) -> Standing:
    """The standing of the training in a folder. Raises UserError if there is none, OSError where it cannot be read."""
    if not any((output / name).exists() for name in ("steps.jsonl", "cei.json")):
        if not claim.is_of(output, "train"):
            raise UserError(f"{output} holds no training: give the --output of a train command that has begun")
        if phases := _identity(output).get("phases"):
            raise UserError(
                f"{output} holds a training in phases, each in a folder of its own: give {output / phases[0]}"
            )
    now_s = time.time() if now_s is None else now_s
    steps = _lines(output / "steps.jsonl", "step", "time", "held_out_loss", *BUDGETS.values())
    written_ns = _written_ns(output)
    newest_s = max(written_ns.values(), default=0) / 1e9
    age_s = max(now_s - (steps[-1]["time"] if steps else newest_s), 0.0)
    ended, why = _ended(output, written_ns)
    trouble = why or _last_line(output / "error.log")
    finished = (output / "finished.json").exists()  # after its last step a run still saves its network
    share, left_s = (1.0, 0.0) if finished else ahead(steps, _budgets(output))
    pace_s = _pace_s(steps)
    state: Literal["running", "silent", "finished", "failed", "refused", "interrupted"]
    if finished:
        state = "finished"
    elif ended:
        state = ended if ended in ("refused", "interrupted") else "failed"
    elif age_s > max(SILENT_S, 5 * (pace_s or 0.0)):
        state = "failed" if trouble else "silent"
    else:
        state = "running"
    told, shown = (_lines(output / name) for name in (steplog.WARNINGS, steplog.PREVIEWS))
    return Standing(state, steps, share, left_s, age_s, trouble, told, shown, now_s)


def _lines(path: Where, *entries: str) -> list[dict[str, Any]]:
    """The whole lines of a file of JSON lines, each with such entries. Raises UserError for a damaged one."""
    try:
        lines = steplog.lines_of(path)
    except ValueError as error:
        raise UserError(f"{path} is damaged: {masking.one_line(error)}") from None
    for number, line in enumerate(lines, 1):
        if not isinstance(line, dict) or (entries and not set(entries) <= line.keys()):
            raise UserError(f"{path} is damaged: line {number} is not one that a training writes")
    return lines


def _written_ns(output: Where) -> dict[str, int]:
    """Names of what lies in the folder → when it was written."""
    if not isinstance(output, Path):
        return output.written_ns()
    found = {}
    for path in output.iterdir():
        with contextlib.suppress(FileNotFoundError):  # a scratch file that took its place since
            found[path.name] = path.lstat().st_mtime_ns
    return found


def _ended(output: Where, written_ns: dict[str, int]) -> tuple[str, str]:
    """(how the last attempt ended before its end: failed, interrupted, refused; why), as result.json says; empty where
    it does not say so, or the folder was claimed by another attempt since."""
    try:
        if written_ns["result.json"] < written_ns[claim.MARK]:
            return "", ""
        record = files.from_json((output / "result.json").read_text())
        return (record["status"], record["error"]) if record["status"] != "done" else ("", "")
    except (OSError, ValueError, KeyError, TypeError):
        return "", ""


def _identity(output: Where) -> dict[str, Any]:
    """What the folder's mark says that the training is; {} without one."""
    try:
        return files.from_json((output / claim.MARK).read_text())["identity"]
    except (OSError, ValueError, KeyError):
        return {}


def _budgets(output: Where) -> dict[str, float]:
    """The budget of the run by the entry that counts towards it, from the folder's mark."""
    settings = _identity(output)
    return {entry: float(settings[name]) for name, entry in BUDGETS.items() if settings.get(name)}


def ahead(steps: Sequence[dict[str, Any]], budgets: Mapping[str, float]) -> tuple[float | None, float | None]:
    """(share of the budget spent, wall seconds left); the budget that is nearest to its end counts. budgets: by the
    entry of a step that counts towards each.

    Steps of one stage cost another's many times over: what is left of a budget of steps is their counted FLOPs.
    """
    if not steps or not budgets:
        return None, None
    first, last = steps[-RECENT_STEPS:][0], steps[-1]
    shares, lefts = [], []
    for entry, budget in budgets.items():
        shares.append(min(last[entry] / budget, 1.0))
        counted = last.get("flops_left") if entry == "step" else None  # older runs' steps have none
        by, left = (entry, max(budget - last[entry], 0.0)) if counted is None else ("flops", counted)
        if (gained := last[by] - first[by]) > 0:
            lefts.append(left * (last["time"] - first["time"]) / gained)
    return max(shares), min(lefts, default=None)


def _pace_s(steps: Sequence[dict[str, Any]]) -> float | None:
    recent = steps[-RECENT_STEPS:]
    return (recent[-1]["time"] - recent[0]["time"]) / (len(recent) - 1) if len(recent) > 1 else None


def _last_line(path: Where) -> str:
    try:
        lines = path.read_bytes().decode(errors="replace").strip().splitlines()
    except OSError:
        return ""
    return lines[-1].strip() if lines else ""


def sparkline(values: Sequence[float], width: int = 48) -> str:
    """Values as a row of bars, lowest to highest; means where there are more of them than `width`."""
    if not values:
        return ""
    count = min(len(values), width)
    edges = [round(i * len(values) / count) for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((mean - low) * scale)] for mean in means)


def rows(standing: Standing) -> list[tuple[str, str]]:
    """The standing as (figure, value) for people."""
    out = [("state", _state(standing))]
    if not standing.steps:
        doing = ": workers start, or blocks are scored" if standing.state in ("running", "silent") else ""
        return [*out, ("step", f"none yet{doing}"), *_told(standing)]
    last, steps = standing.steps[-1], standing.steps
    share = "" if standing.share is None else f", {standing.share:.0%} of the budget"
    out.append(("step", f"{last['step']}{share}, {last['charged_s']:.0f} charged seconds"))
    if standing.state == "running" and standing.left_s is not None:
        out.append(("time left", terminal.duration(standing.left_s)))
    losses = [s["loss"] for s in steps if s["loss"] is not None]
    if losses:
        out.append(("loss", f"{sparkline(losses)}  {losses[0]:.4g} → {losses[-1]:.4g}"))
    if held_out := standing.held_out:
        best = min(held_out)
        out.append(
            ("held-out loss", f"{sparkline(held_out)}  {held_out[0]:.5g} → {held_out[-1]:.5g}, lowest {best:.5g}")
        )
    doing = {"search": "searching", "train": "training"}[last["phase"]]
    out.append(("stage", f"{last['stage'] + 1}, {doing} {len(last['trained'])} blocks, {last['backward']} backward"))
    out.append(("trained blocks", compact(last["trained"])))
    out.append(("clips", f"{last['shape']}, {clips_per_s(steps):.2f} clips/s"))
    lost = stalls.of(steps)
    parts = {
        "updates": lost.compute_s,
        "waiting for clips": lost.wait_s,
        "encoding": lost.encode_s,
        "streams": lost.open_s,
    }
    out.append(("time goes to", ", ".join(f"{name} {lost.share(s):.0%}" for name, s in parts.items())))
    out.append(("peak memory", f"{max(s['memory_bytes'] for s in steps) / 2**20:.0f} MiB"))
    return [*out, *_told(standing)]


def _told(standing: Standing) -> list[tuple[str, str]]:
    """The last preview and the last warning, where there are any."""
    out = []
    if standing.previews:
        last = standing.previews[-1]
        others = f", {len(standing.previews)} in all" if len(standing.previews) > 1 else ""
        figures = "".join(f", {name} {value:.4g}" for name, value in last.get("figures", {}).items())
        out.append(("last preview", f"step {last['step']}: {', '.join(last['videos'])}{figures}{others}"))
    if standing.warnings:
        last = standing.warnings[-1]
        ago = terminal.duration(max(standing.now_s - last["time"], 0.0))
        others = f", {len(standing.warnings)} in all" if len(standing.warnings) > 1 else ""
        out.append(("last warning", f"{last['warning']} ({ago} ago{others})"))
    return out


def compact(names: Sequence[str]) -> str:
    """Names of blocks in the order of their numbers, neighbours as one: `blocks.0-3, blocks.7`."""
    out: list[tuple[str, int | None, int | None]] = []
    for name in sorted(names, key=files.natural):
        stem, dot, end = name.rpartition(".")
        number = int(end) if dot and end.isdecimal() else None
        if number is not None and out and out[-1][0] == stem and out[-1][2] == number - 1:
            out[-1] = (stem, out[-1][1], number)
        else:
            out.append((name, None, None) if number is None else (stem, number, number))
    return ", ".join(
        stem if low is None else f"{stem}.{low}" if low == high else f"{stem}.{low}-{high}" for stem, low, high in out
    )


def _state(standing: Standing) -> str:
    if standing.state in ("running", "finished"):
        return standing.state
    trouble = f": {standing.trouble}" if standing.trouble else ""
    if standing.state == "refused":
        return f"refused{trouble}"
    if standing.state == "interrupted":  # in its own words, which say how it goes on
        return f"{standing.trouble}; no step for {terminal.duration(standing.age_s)}"
    return f"{standing.state}, no step for {terminal.duration(standing.age_s)}{trouble} (the same command resumes it)"


def clips_per_s(steps: Sequence[dict[str, Any]]) -> float:
    """The recent pace."""
    recent = steps[-RECENT_STEPS:]
    return sum(s["clips"] for s in recent) / max(sum(s["seconds"] + s["wait_s"] for s in recent), 1e-9)
