"""The groups' figures as a table to paste into a paper: CSV for programs, LaTeX (booktabs) for people."""

import csv
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.comparison.verdict import Estimate, Verdict, over_seeds

LOPSIDED = ("speed-up", "seconds to target")
"""Columns whose intervals are of logarithms."""
SPECIAL = re.compile(r"[\\&%$#_{}~^]")
WRITTEN = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}


def estimates(verdict: Verdict, evaluations: Mapping[str, Mapping[str, Any]]) -> dict[str, list[Estimate | None]]:
    """Column → a value a group. evaluations: {run id: its evaluation.json}, whose metrics are columns too."""
    judged = verdict.judged
    columns = {
        "held-out loss": [j.loss for j in judged],
        "seconds to target": [j.seconds_to_target for j in judged],
        "speed-up": [j.ratio for j in judged],
        "charged seconds": [_alone(j.seconds, len(j.group.counted)) for j in judged],
        "steps": [_alone(j.steps, len(j.group.counted)) for j in judged],
        "FLOPs": [_alone(j.flops, len(j.group.counted)) for j in judged],
        "peak memory, bytes": [_alone(j.peak_memory_bytes, len(j.group.counted)) for j in judged],
    }
    for metric in dict.fromkeys(name for e in evaluations.values() for name in e["figures"]):
        columns[metric] = []
        for j in judged:
            having = [r for r in j.group.counted if metric in evaluations.get(r.run_id, {"figures": {}})["figures"]]
            values = [evaluations[run.run_id]["figures"][metric]["value"] for run in having]
            columns[metric].append(over_seeds(having, values, verdict.confidence))
    return columns


def _alone(value: float | None, seeds: int) -> Estimate | None:
    return None if value is None else Estimate(value, None, None, seeds)


def as_csv(verdict: Verdict, evaluations: Mapping[str, Mapping[str, Any]]) -> str:
    """A line a group; of every column its value and the ends of its interval, empty where there is none."""
    columns = estimates(verdict, evaluations)
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    table.writerow(["group", "runs", *(f"{name}{end}" for name in columns for end in ("", " low", " high"))])
    for place, judged in enumerate(verdict.judged):
        cells = []
        for values in columns.values():
            found = values[place]
            cells += ["", "", ""] if found is None else [_number(v) for v in (found.value, found.low, found.high)]
        table.writerow([_inert(judged.group.label), len(judged.group.counted), *cells])
    return out.getvalue()


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _inert(label: str) -> str:
    """A text that no spreadsheet takes for a formula."""
    return f"'{label}" if label[:1] in ("=", "+", "-", "@") else label


def as_latex(verdict: Verdict, evaluations: Mapping[str, Mapping[str, Any]]) -> str:
    """A booktabs table of the columns that any group has a value in, with half widths of intervals after ±; of ratios
    and times to the target, whose intervals are lopsided, both ends."""
    columns = {name: v for name, v in estimates(verdict, evaluations).items() if any(each is not None for each in v)}
    rows = [["Group", *columns]]
    rows += [
        [judged.group.label, *(_with_interval(values[place], name in LOPSIDED) for name, values in columns.items())]
        for place, judged in enumerate(verdict.judged)
    ]
    head, *body = [" & ".join(cell if i and n else _escaped(cell) for i, cell in enumerate(row)) + r" \\"
                   for n, row in enumerate(rows)]  # fmt: skip
    level, of_ratios = (f"{100 * share:.3g} \\%" for share in (verdict.confidence, verdict.level))
    other = f", of the speed-up's {of_ratios}" if of_ratios != level else ""
    note = f"% ± half the width of {level} intervals over seeds{other}; needs \\usepackage{{booktabs}}"
    lines = [note, rf"\begin{{tabular}}{{l{'r' * len(columns)}}}", r"\toprule", head, r"\midrule", *body]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _with_interval(found: Estimate | None, lopsided: bool) -> str:
    if found is None:
        return "--"
    if lopsided and found.low is not None:
        return f"${_plain(found.value, 4)}$ [${_plain(found.low, 3)}$, ${_plain(found.high, 3)}$]"
    half = "" if found.low is None else rf" \pm {_plain((found.high - found.low) / 2, 2)}"
    return f"${_plain(found.value, 4)}{half}$"


def _plain(value: float, digits: int) -> str:
    """A number in LaTeX's mathematics: 1.2e+09 is 1.2 \\times 10^{9}."""
    mantissa, _, exponent = f"{value:.{digits}g}".partition("e")
    return rf"{mantissa} \times 10^{{{int(exponent)}}}" if exponent else mantissa


def _escaped(text: str) -> str:
    return SPECIAL.sub(lambda found: WRITTEN.get(found[0], "\\" + found[0]), text)


def downloads(verdict: Verdict, evaluations: Mapping[str, Mapping[str, Any]]) -> Sequence[tuple[str, str]]:
    """(file name, content) of both."""
    return [("comparison.csv", as_csv(verdict, evaluations)), ("comparison.tex", as_latex(verdict, evaluations))]
