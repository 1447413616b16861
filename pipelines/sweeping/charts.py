"""Charts of a sweep, in the manner of `charts`: trials over time, importance, responses, Pareto front."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ray.tune.search.sample import Categorical

from entprog.storage import Where
from pipelines.charts import BLUE, GREY, LINES, ROW_INCHES, figure_and_axes, save
from pipelines.sweeping import spaces
from pipelines.sweeping.findings import Evidence
from pipelines.sweeping.spaces import Space

RED = LINES[1]
NAMES = {
    "held_out_loss": "held-out loss",
    "seconds_to_target": "charged seconds to the target loss",
    "peak_memory_bytes": "peak memory (MiB)",
}


def trials_chart(rows: Sequence[Mapping[str, Any]], best: str, path: Where) -> Where:
    """Every trial's held-out loss (first seed) over charged seconds; stopped ones end in a cross."""
    figure, axes = figure_and_axes(1, 1, (7.5, 4.2))
    drawn = sorted((row for row in rows if row.get("seeds")), key=lambda row: row["id"] == best)
    for row in drawn:
        curve = row["seeds"][0]["curve"]
        mine = row["id"] == best
        axes.plot(
            [x for x, _ in curve], [y for _, y in curve], color=BLUE if mine else "#999999",
            marker="o", markersize=3.5 if mine else 2.5,
            linewidth=2 if mine else 1, label=f"best: {best}" if mine else None, zorder=3 if mine else 2,
        )  # fmt: skip
        if row["status"] == "stopped":
            axes.plot(*curve[-1], "x", color=RED, markersize=6, zorder=4)
    counts = Counter(row["status"] for row in rows)
    outcomes = ", ".join(f"{counts[how]} {how}" for how in ("finished", "stopped", "failed") if counts[how])
    losses = [y for row in drawn for _, y in row["seeds"][0]["curve"]]
    if losses and min(losses) > 0 and max(losses) / min(losses) > 5:
        axes.set_yscale("log")
    axes.set_xlabel("charged seconds (training, search, scoring)")
    axes.set_ylabel("held-out loss")
    axes.grid(color=GREY, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(frameon=False)
    ends = "; × stopped early" if counts["stopped"] else ""
    figure.suptitle(f"Trials over time ({outcomes}{ends})", fontsize=11)
    return save(figure, path)


def importance_chart(importance: Mapping[str, float], label: str, path: Where) -> Where:
    """Bars, the most important setting on top."""
    figure, axes = figure_and_axes(1, 1, (7.5, 1.3 + ROW_INCHES * len(importance)))
    names = list(importance)
    bars = axes.barh(range(len(names)), [importance[name] for name in names], color=BLUE, height=0.7)
    axes.bar_label(bars, fmt="{:.0%}", padding=4)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.08)  # room for the numbers
    axes.set_xlabel("share of the variance explained (fANOVA)")
    figure.suptitle(f"Which settings matter: {label}", fontsize=11)
    return save(figure, path)


def response_chart(
    evidence: Evidence, responses: Mapping[str, Mapping[str, Any]], space: Space, path: Where, columns: int = 3
) -> Where:
    """A panel a setting: the trials, the mean response with its 90 % interval, the values alike the best shaded."""
    columns = min(columns, len(responses))
    lines = math.ceil(len(responses) / columns)
    figure, panels = figure_and_axes(lines, columns, (3.6 * columns, 2.7 * lines + 0.5), sharey=True, squeeze=False)
    for number, (name, response) in enumerate(responses.items()):
        panel = panels[number // columns][number % columns]
        values, domain = response["values"], space[name]
        choice = isinstance(domain, Categorical)
        place = {value: i for i, value in enumerate(domain.categories)} if choice else {}
        xs = [place.get(value, value) for value in values]
        seen = [place.get(row[name], row[name]) for row in evidence.settings]
        panel.plot(seen, evidence.losses, "o", color="#777777", markersize=3.5, alpha=0.8, zorder=2)
        if lost := [place.get(row[name], row[name]) for row in evidence.failed]:
            top = panel.get_xaxis_transform()
            panel.plot(lost, [0.96] * len(lost), "x", color=RED, markersize=4, transform=top, zorder=2)
        if choice:
            error = [[m - lo for m, lo in zip(response["mean"], response["low"], strict=True)],
                     [hi - m for m, hi in zip(response["mean"], response["high"], strict=True)]]  # fmt: skip
            panel.errorbar(xs, response["mean"], yerr=error, fmt="s", color=BLUE, capsize=4, zorder=3)
            names = [str(value) for value in place]
            panel.set_xticks(range(len(names)), names, fontsize=7, rotation=0 if len(names) < 3 else 20)
            panel.set_xlim(-0.5, len(names) - 0.5)
            bands = [(place[value] - 0.5, place[value] + 0.5) for value in response["alike"]]
        else:
            panel.fill_between(xs, response["low"], response["high"], color=BLUE, alpha=0.2, linewidth=0)
            panel.plot(xs, response["mean"], color=BLUE, linewidth=2, zorder=3)
            alike = [x for x in xs if x in response["alike"]]
            bands = [(min(alike), max(alike))]
            if spaces.is_log(domain):
                panel.set_xscale("log")
        if len(response["alike"]) < len(values):  # shading everything would say nothing
            for low, high in bands:
                panel.axvspan(low, high, color="#009E73", alpha=0.12, linewidth=0, zorder=1)
        panel.set_title(name, fontsize=9)
        panel.grid(color=GREY, linewidth=0.6)
        panel.set_axisbelow(True)
    for number in range(len(responses), lines * columns):
        panels[number // columns][number % columns].set_axis_off()
    for line in panels:
        line[0].set_ylabel("held-out loss", fontsize=9)
    figure.suptitle(
        f"Response of the {evidence.label}\npoints: trials; blue: mean with 90 % interval; green: cannot be told from "
        f"the best{'; red crosses: trials that failed' if evidence.failed else ''}",
        fontsize=10,
    )
    return save(figure, path)


def pareto_chart(
    finished: Sequence[Mapping[str, Any]], front: Sequence[Mapping[str, Any]], objectives: Sequence[str], path: Where
) -> Where:
    """The first objective against each other one; the front is named."""
    others = objectives[1:]
    figure, panels = figure_and_axes(1, len(others), (4.8 * len(others), 4), squeeze=False, sharey=True)
    scale = {"peak_memory_bytes": 2**20}
    for panel, other in zip(panels[0], others, strict=True):

        def at(row: Mapping[str, Any], x: str = other) -> tuple[float | None, float | None]:
            return tuple(None if row[n] is None else row[n] / scale.get(n, 1) for n in (x, objectives[0]))

        shown = [row for row in finished if None not in at(row)]
        best = sorted((at(row), row["id"]) for row in front if None not in at(row))
        panel.plot([at(row)[0] for row in shown], [at(row)[1] for row in shown], "o", color="#777777", markersize=5)
        panel.plot([x for (x, _), _ in best], [y for (_, y), _ in best], "D", color=BLUE, markersize=6)
        for point, name in best:
            panel.annotate(name, point, xytext=(5, 4), textcoords="offset points", fontsize=7)
        panel.margins(x=0.2)  # room for the names
        panel.set_xlabel(NAMES[other])
        panel.grid(color=GREY, linewidth=0.8)
        panel.set_axisbelow(True)
        if len(shown) < len(finished):
            panel.set_title(f"{len(finished) - len(shown)} trials never reached the target", fontsize=8)
    panels[0][0].set_ylabel(NAMES[objectives[0]])
    figure.suptitle(f"Pareto front: none beats {len(front)} of {len(finished)} trials (blue)", fontsize=11)
    return save(figure, path)
