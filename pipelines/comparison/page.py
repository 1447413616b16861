"""One self-contained HTML page out of a verdict: nothing is loaded from anywhere."""

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from entprog import files
from entprog.names import plain
from pipelines.comparison import drawings, samples, tables, words
from pipelines.comparison.groups import Difference, Group
from pipelines.comparison.runs import Training
from pipelines.comparison.verdict import Estimate, Judged, Verdict, over_seeds
from pipelines.tracking.ways import text

FOLDER = Path(__file__).parent / "page"
PARETO_METRICS = 3
"""Quality metrics that are drawn against cost, beside the held-out loss."""
DASHES = ("", "6 3", "6 2 1 2", "1 2")
"""Dashes of each group's line in chart keys, as `drawings.STYLES` draws it."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the page says about itself."""

    experiment: str
    store: str
    """Address of the MLflow store, secrets masked."""
    command: str
    commit: str
    made_s: float
    """Seconds since 1970."""


def render(
    verdict: Verdict,
    forced: Sequence[Difference],
    evaluations: Mapping[str, Mapping[str, Any]],
    clips: Sequence[samples.Row],
    previews: Sequence[samples.Row],
    facts: Facts,
) -> str:
    """The page. evaluations: {run id: its evaluation.json}."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script, style = ((FOLDER / name).read_text() for name in ("page.js", "page.css"))
    groups = [judged.group for judged in verdict.judged]
    schedules = [*_schedules(groups[: drawings.COLOURS])]  # before the warnings: a damaged file is one
    scores = [*_scores(groups[: drawings.COLOURS])]
    html = environment.get_template("page.html").render(
        facts=facts,
        made=datetime.fromtimestamp(facts.made_s).astimezone().strftime("%-d %B %Y, %H:%M %Z"),
        headline=words.headline(verdict),
        remarks=words.remarks(verdict),
        warnings=words.warnings(verdict),
        forced=forced,
        keys=[_key(group, place) for place, group in enumerate(groups)],
        tiles=tiles(verdict),
        summary=summary(verdict),
        charts=[*filter(None, _charts(verdict, evaluations))],
        downloads=[(name, content, base64.b64encode(content.encode()).decode())
                   for name, content in tables.downloads(verdict, evaluations)],
        schedules=schedules,
        scores=scores,
        undrawn=max(0, len(groups) - drawings.COLOURS),
        quality=quality(groups, evaluations, verdict.confidence),
        cards=_cards(evaluations),
        clips=clips,
        previews=previews,
        runs=runs_table(groups, facts.made_s),
        settings=settings_table(groups),
        about=about(verdict, groups),
        verdict=verdict,
        style=style,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )  # fmt: skip
    return plain(html, keep="\n\t")  # names of runs and settings are what someone typed


def _key(group: Group, place: int) -> dict[str, str]:
    return {"label": group.label, "role": drawings.series(place), "dash": DASHES[place % len(DASHES)]}


# ---- figures ----


def tiles(verdict: Verdict) -> list[dict[str, str]]:
    """The few figures that people ask for first: the best group's beside the baseline's."""
    best, base = verdict.best, verdict.baseline
    if best is None:
        return []
    ratio, said = best.ratio, []
    if ratio is not None:
        detail = words.span(ratio, words.times, verdict.level)
        said.append({"name": "Net speed-up to the target", "value": words.times(ratio.value), "detail": detail})
    elif best.ratio_at_most is not None:
        value = f"< {words.times(best.ratio_at_most)}"
        said.append({"name": "Net speed-up to the target", "value": value, "detail": "not every run reached it"})
    if best.equal_seconds_loss_difference is not None and base.equal_seconds_loss is not None:
        value, scale = best.equal_seconds_loss_difference, base.equal_seconds_loss.value
        shown = words.change(value.value / scale)
        detail = words.span(value, lambda v: words.change(v / scale), verdict.level)
        name = f"Held-out loss after {words.seconds(verdict.equal_s)}"
        said.append({"name": name, "value": shown, "detail": detail})
    if best.peak_memory_bytes and base.peak_memory_bytes:
        value = words.change(best.peak_memory_bytes / base.peak_memory_bytes - 1, 0)
        detail = f"{words.memory(best.peak_memory_bytes)}, {base.group.label} {words.memory(base.peak_memory_bytes)}"
        said.append({"name": "Peak memory", "value": value, "detail": detail})
    if best.overhead is not None:
        paid = "not paid back" if best.break_even_s is None else f"paid back after {words.seconds(best.break_even_s)}"
        said.append(
            {"name": "Search and scoring", "value": words.percent(best.overhead), "detail": f"of its time, {paid}"}
        )
    return said


def summary(verdict: Verdict) -> dict[str, Any]:
    """The table of groups: `columns` (name, explanation), `rows`."""
    budgets_differ = any(j.seconds and j.seconds > 1.05 * verdict.equal_s for j in verdict.judged)
    columns = [("Runs", "finished of all"), ("Held-out loss", "at the end, mean over seeds")]
    columns += [(f"Loss after {words.seconds(verdict.equal_s)}", "equal charged seconds")] if budgets_differ else []
    columns += [
        ("Time to target", "charged seconds"),
        ("Net speed-up", "search and scoring charged"),
        ("Break-even", "mean loss below the baseline's for good"),
        ("Paid back at step", "by cheaper steps alone"),
        ("Search, scoring", "share of charged seconds"),
        ("Charged", "mean of the runs"),
        ("Steps", "mean"),
        ("Compute", "counted FLOPs, mean"),
        ("Peak memory", ", ".join(["highest", *_memory_is(verdict)])),
    ]
    rows = []
    for place, judged in enumerate(verdict.judged):
        cells = [f"{len(judged.group.counted)} of {len(judged.group.runs)}", words.interval(judged.loss, words.loss)]
        cells += [words.interval(judged.equal_seconds_loss, words.loss)] if budgets_differ else []
        cells += [
            _time_to_target(judged), _ratio(judged, verdict), _break_even(judged, verdict),
            "–" if judged.break_even_step is None else f"{judged.break_even_step:.0f}",
            "–" if judged.overhead is None else words.percent(judged.overhead),
            words.seconds(judged.seconds), "–" if judged.steps is None else f"{judged.steps:.0f}",
            words.flops(judged.flops), words.memory(judged.peak_memory_bytes),
        ]  # fmt: skip
        rows.append({"key": _key(judged.group, place), "cells": cells})
    return {"columns": columns, "rows": rows}


def _memory_is(verdict: Verdict) -> list[str]:
    """Whether memory was counted or measured."""
    runs = [run for judged in verdict.judged for run in judged.group.counted]
    return list(dict.fromkeys(run.tags["entprog.memory_is"] for run in runs if "entprog.memory_is" in run.tags))


def _time_to_target(judged: Judged) -> str:
    if judged.seconds_to_target is not None:
        return words.interval(judged.seconds_to_target, words.seconds)
    runs = len(judged.group.counted)
    return f"reached by {judged.reached} of {runs}" if runs else "–"


def _ratio(judged: Judged, verdict: Verdict) -> str:
    if judged is verdict.baseline:
        return "baseline"
    if judged.ratio is not None:
        return words.interval(judged.ratio, words.times)
    return f"below {words.times(judged.ratio_at_most)}" if judged.ratio_at_most is not None else "–"


def _break_even(judged: Judged, verdict: Verdict) -> str:
    if judged is verdict.baseline or not judged.group.counted:
        return "–"
    return "not reached" if judged.break_even_s is None else words.seconds(judged.break_even_s)


def quality(groups: Sequence[Group], evaluations: Mapping[str, Mapping[str, Any]], confidence: float) -> dict[str, Any]:
    """The table of quality metrics: `metrics` (name, what is better), `rows`; a run alone has its own interval over
    clips."""
    metrics = list(dict.fromkeys(name for e in evaluations.values() for name in e["figures"]))
    rows = []
    for place, group in enumerate(groups):
        cells = []
        for metric in metrics:
            having = [r for r in group.counted if metric in evaluations.get(r.run_id, {"figures": {}})["figures"]]
            found = [evaluations[run.run_id]["figures"][metric] for run in having]
            if len(found) == 1 and found[0].get("low") is not None:
                value, low, high = (f"{found[0][key]:.4g}" for key in ("value", "low", "high"))
                cells.append(f"{value} ({low} to {high} over clips)")
            else:
                cells.append(words.interval(over_seeds(having, [figure["value"] for figure in found], confidence)))
        rows.append({"key": _key(group, place), "cells": cells})
    better = {
        name: e["cards"][figure["card"]].get("better")
        for e in evaluations.values()
        for name, figure in e["figures"].items()
    }
    named = [(name, f"{better[name]} is better" if better[name] else "") for name in metrics]
    return {"metrics": named, "rows": rows if metrics else []}


def _cards(evaluations: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[tuple[str, str]]]]:
    cards = {key: card for e in evaluations.values() for key, card in e.get("cards", {}).items()}
    return [(key, [(name, text(value)) for name, value in card.items()]) for key, card in cards.items()]


def runs_table(groups: Sequence[Group], now_s: float) -> list[dict[str, Any]]:
    """Every run, whether it counts or not."""
    return [
        {
            "key": _key(group, place), "name": run.name, "id": run.run_id, "status": run.status, "seed": run.seed,
            "loss": words.loss(run.figures.get("held_out_loss")), "seconds": words.seconds(run.figures.get("seconds")),
            "steps": f"{run.figures['steps']:.0f}" if "steps" in run.figures else "–",
            "memory": words.memory(run.figures.get("peak_memory_bytes")), "counts": run.counts,
            "commit": run.tags.get("entprog.commit", "–")[:9], "note": run.note(now_s),
        }
        for place, group in enumerate(groups)
        for run in group.runs
    ]  # fmt: skip


def settings_table(groups: Sequence[Group]) -> dict[str, Any]:
    """The settings in which groups differ: `names`, `rows`."""
    names = list(groups[0].settings)
    rows = [
        {"key": _key(group, place), "cells": [text(group.settings[name]) for name in names]}
        for place, group in enumerate(groups)
    ]
    return {"names": names, "rows": rows if names else []}


def about(verdict: Verdict, groups: Sequence[Group]) -> list[tuple[str, str]]:
    """What all runs have in common, and with what they were made."""

    def tag(name: str) -> str:
        return ", ".join(dict.fromkeys(run.tags.get(name, "not recorded") for group in groups for run in group.runs))

    tags = {
        "Data": "data",
        "Held-out set": "held_out",
        "Base": "base",
        "Device": "device",
        "Code of the runs": "commit",
    }
    return [
        ("Target loss", f"{verdict.target_loss:.6g}: {verdict.target_is}"),
        ("Baseline", verdict.baseline.group.label),
        *((name, tag(f"entprog.{key}")) for name, key in tags.items()),
        *((name, tag(f"version.{name}")) for name in ("torch", "ray", "diffusers")),
    ]


# ---- pictures ----


def _charts(verdict: Verdict, evaluations: Mapping[str, Mapping[str, Any]]):
    """Learning curves, cost and quality, speed-ups; None for one that there is nothing to draw for."""
    for axis in drawings.UNITS:
        places = [getattr(point, axis) for judged in verdict.judged for run in judged.group.runs for point in run.curve]
        if not places or all(map(math.isfinite, places)):
            yield drawings.curves(verdict, axis)
    columns = tables.estimates(verdict, evaluations)
    yield drawings.pareto(_arms(verdict, columns["held-out loss"]), "held-out loss")
    better = {}
    for evaluation in evaluations.values():
        better |= {name: evaluation["cards"][f["card"]].get("better") for name, f in evaluation["figures"].items()}
    for metric, direction in list(better.items())[:PARETO_METRICS]:
        if direction in ("higher", "lower"):
            yield drawings.pareto(_arms(verdict, columns[metric]), metric, direction == "higher")
    yield drawings.ratios(verdict)


def _arms(verdict: Verdict, qualities: Sequence[Estimate | None]) -> list[drawings.Arm]:
    pairs = enumerate(zip(verdict.judged, qualities, strict=True))
    return [
        drawings.Arm(judged.group.label, place, judged.seconds, found.value, found.low, found.high)
        for place, (judged, found) in pairs
        if found is not None and judged.seconds and math.isfinite(found.value)
    ]


def _schedules(groups: Sequence[Group]):
    found = [(place, group, group.typical.steps()) for place, group in enumerate(groups) if group.typical]
    found = [(place, group, steps) for place, group, steps in found if steps]
    until_s = max((steps[-1]["charged_s"] for _, _, steps in found), default=0)
    for place, group, steps in found:
        yield drawings.schedule(group, place, steps, _blocks(groups, steps), until_s)


def _blocks(groups: Sequence[Group], steps: Sequence[Mapping[str, Any]]) -> list[str]:
    """The network's blocks, in the order of a score table where there is one: plain training has none of its own."""
    for group in groups:
        table = group.typical and group.typical.scores()
        if table:
            return [row["name"] for row in table["blocks"]]
    return sorted({name for step in steps for name in step["trained"]}, key=files.natural)


def _scores(groups: Sequence[Group]):
    """A chart a table, once however many groups share it."""
    tables: dict[str, tuple[Mapping[str, Any], list[str]]] = {}
    for group in groups:
        run: Training | None = group.typical
        table = run.scores() if run else None
        if table:
            tables.setdefault(table["key"], (table, []))[1].append(group.label)
    for table, labels in tables.values():
        alone = len(tables) == 1 and len(labels) > 1
        yield drawings.scores(table, "all groups" if alone else ", ".join(labels))
