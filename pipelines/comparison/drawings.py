"""Charts as inline SVG whose colours are the page's own (CSS variables), so that they are right in light and dark."""

import io
import itertools
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines import charts
from pipelines.comparison.groups import Group
from pipelines.comparison.verdict import Verdict, mean_curve

WIDTH, HEIGHT = 4.6, 3.1
"""Inches of 72 units: half a desktop's page, and a phone's."""
SHAPES = 0.6
"""Height in inches of what shows clip shapes."""
COLOURS = 7
"""Groups with a colour of their own; further ones are grey."""
STYLES = ("-", (0, (5, 2)), (0, (5, 1.5, 1, 1.5)), (0, (1, 1.2)))
ROLES = ("ink", "muted", "grid", "frozen", "searched", "surface", "other", *(f"series-{i}" for i in range(COLOURS)))


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """One chart of the page."""

    title: str
    svg: str
    alt: str
    """What it shows, for who cannot see it."""
    hover: dict[str, Any] | None = None
    """What a pointer over it tells: axes in the SVG's units, series with their points."""


def colour(role: str) -> str:
    """A colour that stands for a CSS variable until the SVG is written."""
    return f"#fe{ROLES.index(role):02x}ab"


def series(place: int) -> str:
    """Role of the group at a place."""
    return f"series-{place}" if place < COLOURS else "other"


UNITS = {"charged_s": "charged seconds", "step": "steps", "wall_s": "seconds on the clock"}
"""What a curve may be drawn over, and what it is called."""


def curves(verdict: Verdict, axis: str) -> Drawing:
    """Held-out loss of every run (thin) and every group's mean (thick), over one of UNITS."""
    figure, axes = _figure(WIDTH, HEIGHT)
    lines, losses = [], []
    for place, judged in enumerate(verdict.judged):
        style = {"color": colour(series(place)), "linestyle": STYLES[place % len(STYLES)]}
        many = len(judged.group.counted) > 1
        for run in judged.group.runs:
            points = [p for p in run.curve if math.isfinite(p.loss)]
            losses += [p.loss for p in points]
            thin = {"linewidth": 0.9, "alpha": 0.4} if many or not run.counts else {"linewidth": 2}
            axes.plot([getattr(p, axis) for p in points], [p.loss for p in points], **style, **thin)
            if points and not run.counts:  # where it stopped
                axes.plot(getattr(points[-1], axis), points[-1].loss, "x", color=style["color"], markersize=6)
        places, means = mean_curve(judged.group.counted, axis)
        if many:
            axes.plot(places, means, linewidth=2.2, **style)
        if len(places):
            lines.append({"name": judged.group.label, "role": series(place), "x": places, "y": means})
    if losses and max(losses) > 4 * min(losses) > 0:
        axes.set_yscale("log")
    axes.axhline(verdict.target_loss, color=colour("muted"), linewidth=1, linestyle=(0, (3, 3)))
    axes.annotate("target", (0, verdict.target_loss), xycoords=("axes fraction", "data"), xytext=(4, 3),
                  textcoords="offset points", size=9, color=colour("muted"))  # fmt: skip
    unit = UNITS[axis]
    axes.set_xlabel(unit)
    axes.set_ylabel("held-out loss")
    axes.set_xlim(left=0)
    axes.grid(color=colour("grid"), linewidth=0.7)
    _plain_numbers(axes)
    ends = ", ".join(f"{line['name']} ends at {line['y'][-1]:.4g}" for line in lines)
    return _drawing(
        figure, f"Held-out loss against {unit}", f"Held-out loss against {unit}: {ends}.", axes, lines, unit
    )


@dataclass(frozen=True)
class Arm:
    """A group as a point of cost and quality."""

    label: str
    place: int
    cost_s: float
    """Mean charged seconds of its runs."""
    quality: float
    low: float | None
    high: float | None


ALIKE = 1.01
"""Costs within this factor count as equal: runs of one budget end a fraction of a step apart."""


def front(arms: Sequence[Arm], higher: bool = False) -> list[Arm]:
    """The arms that no other one beats in quality at equal or lower cost, cheapest first (the Pareto front)."""

    def beats(one: Arm, other: Arm) -> bool:
        if one.quality == other.quality:
            return one.cost_s * ALIKE < other.cost_s
        return (one.quality > other.quality) == higher and one.cost_s <= other.cost_s * ALIKE

    return sorted((a for a in arms if not any(beats(b, a) for b in arms)), key=lambda arm: arm.cost_s)


def pareto(arms: Sequence[Arm], quality: str, higher: bool = False) -> Drawing | None:
    """What each group cost and how good it came out, with the Pareto front; None for fewer than two groups."""
    if len(arms) < 2:
        return None
    figure, axes = _figure(WIDTH, HEIGHT)
    best = front(arms, higher)
    axes.step([arm.cost_s for arm in best], [arm.quality for arm in best], where="post", color=colour("muted"),
              linewidth=1, linestyle=(0, (3, 3)))  # fmt: skip
    for arm in arms:
        ink = colour(series(arm.place))
        if arm.low is not None:
            axes.plot([arm.cost_s] * 2, [arm.low, arm.high], color=ink, linewidth=2, solid_capstyle="butt")
        axes.plot(arm.cost_s, arm.quality, "o" if arm in best else "s", color=ink, markersize=8,
                  markerfacecolor=ink if arm in best else "none")  # fmt: skip
        axes.annotate(_short(arm.label, 24), (arm.cost_s, arm.quality), xytext=(0, 9), textcoords="offset points",
                      ha="center", size=9, color=colour("ink"))  # fmt: skip
    axes.margins(0.18)
    axes.set_xlim(0, 1.2 * max(arm.cost_s for arm in arms))  # or runs of equal cost would seem far apart
    axes.set_xlabel("charged seconds, mean of the runs")
    axes.set_ylabel(quality)
    axes.grid(color=colour("grid"), linewidth=0.7)
    better = "higher" if higher else "lower"
    title = f"Cost and {quality} ({better} is better)"
    return _drawing(figure, title, f"{title}; on the Pareto front: {', '.join(arm.label for arm in best)}.")


def ratios(verdict: Verdict) -> Drawing | None:
    """Every group's net speed-up with its interval and its seeds' own; None where no group has one."""
    rows = [(place, j) for place, j in enumerate(verdict.judged) if j.ratio is not None]
    if not rows:
        return None
    figure, axes = _figure(WIDTH, 1.0 + 0.46 * len(rows))
    for row, (place, judged) in enumerate(rows):
        found, ink = judged.ratio, colour(series(place))
        if found.low is not None:
            axes.plot([found.low, found.high], [row, row], color=ink, linewidth=2.5, solid_capstyle="butt")
        axes.plot(found.value, row, "o", color=ink, markersize=8)
        axes.annotate(f"{found.value:.2f}×", (found.value, row), xytext=(0, 8), textcoords="offset points",
                      ha="center", color=colour("ink"))  # fmt: skip
    axes.axvline(1, color=colour("muted"), linewidth=1, linestyle=(0, (3, 3)))
    axes.set_yticks(range(len(rows)), [textwrap.fill(j.group.label, 24) for _, j in rows])
    axes.set_ylim(len(rows) - 0.4, -0.7)
    axes.set_xscale("log")
    ends = [v for _, j in rows for v in (j.ratio.value, j.ratio.low, j.ratio.high) if v is not None]
    low, high = min(*ends, 1 / 1.1), max(*ends, 1.1)
    axes.set_xlim(max(low / 1.15, 0.02), min(high * 1.15, 50))
    axes.set_xlabel(textwrap.fill(f"times sooner at the target than {verdict.baseline.group.label}", 48))
    axes.grid(axis="x", color=colour("grid"), linewidth=0.7)
    _plain_numbers(axes)
    message = "; ".join(f"{j.group.label} {j.ratio.value:.2f}" for _, j in rows)
    return _drawing(figure, "Net speed-up to the target loss", f"Net speed-up to the target loss: {message}.")


def schedule(
    group: Group, place: int, steps: Sequence[Mapping[str, Any]], blocks: Sequence[str], until_s: float
) -> Drawing:
    """Which blocks a run trained when, over its charged seconds until `until_s`, and on which clips where their shape
    changes. steps: lines of steps.jsonl."""
    names = list(blocks)
    height = 0.95 + max(0.16 * len(names), 0.5)
    spans: dict[tuple[str, str], list[tuple[float, float]]] = {}
    first_s = charts.scored_s(steps)
    shapes = charts.shape_spans(steps, first_s)
    changes = len({shape for *_, shape in shapes}) > 1
    if changes:
        figure, (top, axes) = _figure(WIDTH, height + SHAPES, rows=(SHAPES, height))
        charts.draw_shapes(top, shapes, colour("grid"))
        top.yaxis.label.set_color(colour("ink"))
        for text in top.texts:
            text.set_color(colour("ink"))
    else:
        figure, axes = _figure(WIDTH, height)
    begun = first_s
    runs = itertools.groupby(steps, lambda s: (s["stage"], s["phase"], tuple(s["trained"])))
    stages: dict[int, float] = {}
    for (stage, phase, trained), part in runs:
        end = max(step["charged_s"] for step in part)
        stages.setdefault(stage, begun)
        for name in trained:
            spans.setdefault((name, phase), []).append((begun, end - begun))
        begun = end
    for row, name in enumerate(names):
        axes.broken_barh([(first_s, begun - first_s)], (row - 0.42, 0.84), color=colour("frozen"), linewidth=0)
        for phase, ink in (("train", colour(series(place))), ("search", colour("searched"))):
            if (name, phase) in spans:
                axes.broken_barh(_merged(spans[name, phase]), (row - 0.42, 0.84), color=ink, linewidth=0)
    for start_s in list(stages.values())[1:]:
        axes.axvline(start_s, color=colour("ink"), linewidth=0.8)
    step = max(1, -(-len(names) // 16))
    axes.set_yticks(range(0, len(names), step), [_short(n) for n in names[::step]])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, until_s)
    axes.set_xlabel("charged seconds")
    mean = sum(len(s["trained"]) for s in steps) / len(steps)
    alt = f"Blocks trained by {group.label}: {mean:.1f} of {len(names)} on average over {len(stages)} stages."
    if changes:
        alt += f" Clips: {', then '.join(dict.fromkeys(shape for *_, shape in shapes))}."
    return _drawing(figure, group.label, alt)


def scores(table: Mapping[str, Any], title: str) -> Drawing:
    """A score table (cei.json): every block's score with its 95 % interval, and its loss increase on skip."""
    rows = table["blocks"]
    names = [row["name"] for row in rows]
    both = all(row.get("loss_increase") is not None for row in rows)
    figure, axes = _figure(WIDTH, 1.0 + max(0.19 * len(rows), 0.5), 2 if both else 1)
    panels = [(axes[0] if both else axes, "score", "std_error", "series-0")]
    panels += [(axes[1], "loss_increase", "loss_std_error", "series-2")] if both else []
    labels = {
        "score": "π" if table["kind"] in ("cei", "reverse_cei") else table["kind"],
        "loss_increase": "loss increase on skip",
    }
    for panel, value, error, role in panels:
        values, errors = (np.array([row.get(key) or 0.0 for row in rows]) for key in (value, error))
        panel.barh(range(len(rows)), values, height=0.7, color=colour(role), linewidth=0)
        panel.errorbar(
            values, range(len(rows)), xerr=1.96 * errors, fmt="none", ecolor=colour("ink"), elinewidth=0.9, capsize=2
        )
        panel.axvline(0, color=colour("ink"), linewidth=0.7)
        panel.set_xlabel(labels[value])
        panel.set_ylim(len(rows) - 0.4, -0.6)
        panel.locator_params(axis="x", nbins=4)
    step = max(1, -(-len(names) // 16))
    panels[0][0].set_yticks(range(0, len(names), step), [_short(n) for n in names[::step]])
    top = max(rows, key=lambda row: row["score"])["name"]
    return _drawing(figure, title, f"Block scores of {len(rows)} blocks; the highest is {top}.")


# ---- inside ----


def _figure(width: float, height: float, panels: int = 1, rows: Sequence[float] = (1.0,)):
    """panels: side by side; rows: one above the other, with these heights."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_visible(False)
    above = len(rows) > 1
    axes = figure.subplots(len(rows), panels, sharey=not above, sharex=above, height_ratios=rows)
    for one in np.ravel(axes):
        one.patch.set_visible(False)
        one.spines[["top", "right"]].set_visible(False)
        one.spines[["bottom", "left"]].set_color(colour("muted"))
        one.tick_params(colors=colour("muted"), labelcolor=colour("ink"), labelsize=9, length=3)
        one.xaxis.label.set(color=colour("ink"), size=9.5)
        one.yaxis.label.set(color=colour("ink"), size=9.5)
        one.set_axisbelow(True)
    return figure, axes


def _drawing(figure, title: str, alt: str, axes=None, lines: Sequence[dict] = (), unit: str = "") -> Drawing:
    import matplotlib

    for text in figure.findobj(matplotlib.text.Text):
        text.set_parse_math(False)  # a run's name may hold a $
    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": alt}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    hover = None
    if axes is not None and lines:
        width, height = figure.get_size_inches() * 72
        box = axes.get_position()
        hover = {
            "left": box.x0 * width, "right": box.x1 * width, "top": (1 - box.y1) * height,
            "bottom": (1 - box.y0) * height, "width": width, "from": axes.get_xlim()[0], "to": axes.get_xlim()[1],
            "low": axes.get_ylim()[0], "high": axes.get_ylim()[1], "log": axes.get_yscale() == "log", "unit": unit,
            "lines": [
                {"name": line["name"], "role": line["role"], "points": _thinned(line["x"], line["y"])} for line in lines
            ],
        }  # fmt: skip
    return Drawing(title=title, svg=_themed(out.getvalue()), alt=alt, hover=hover)


def _themed(svg: str) -> str:
    """The <svg> element alone, its colours CSS variables, its ids its own, its fonts the page's."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>", "", svg, flags=re.S)
    svg = re.sub(r"<g id=\"[^\"]*\"", "<g", svg)
    for role in ROLES:
        svg = svg.replace(colour(role), f"var(--{role})")
    svg = re.sub(r"font: ([0-9.]+px) [^;\"]+", r"font: \1 var(--sans)", svg)
    svg = re.sub(r' xmlns:xlink="[^"]+"', "", svg.replace("xlink:href", "href"))
    svg = re.sub(r' (width|height)="[0-9.]+pt"', "", svg, count=2)
    return re.sub(r"\s*\n\s*", "\n", svg).strip()


def _thinned(x: np.ndarray, y: np.ndarray, most: int = 200) -> list[list[float]]:
    keep = np.unique(np.linspace(0, len(x) - 1, min(most, len(x))).round().astype(int))
    return [[round(float(x[i]), 3), float(f"{y[i]:.5g}")] for i in keep]


def _merged(spans: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Neighbouring (start, length) as one."""
    out: list[tuple[float, float]] = []
    for start, length in spans:
        if out and math.isclose(sum(out[-1]), start):
            out[-1] = (out[-1][0], start + length - out[-1][0])
        else:
            out.append((start, length))
    return out


def _plain_numbers(axes) -> None:
    """Ticks of a logarithmic axis as people write numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() == "log":
            axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())


def _short(label: str, most: int = 16) -> str:
    return label if len(label) <= most else f"{label[: most // 2 - 1]}…{label[-(most // 2) :]}"
