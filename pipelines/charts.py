"""Charts of a run, from its records to PNG files, in the Okabe-Ito colours that colour-blind people tell apart."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#E69F00", "#009E73", "#E4E4E4"
LINES = (BLUE, "#D55E00", GREEN, "#CC79A7", ORANGE, "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":")
MARKERS = "os^Dv<>"
ROW_INCHES = 0.3


def cei_chart(table: Mapping[str, Any], path: Path) -> Path:
    """A score table (`ScoreTable.as_json`) → π of every block with its 95 % interval, loss increase on skip beside it.

    Blocks in the network's order from the top. Each bar carries the block's place by π and by |π|.
    """
    rows = table["blocks"]
    used, other = ("pi_std", "pi_elementwise") if table["estimator"] == "std" else ("pi_elementwise", "pi_std")
    pi = np.array([row[used] for row in rows])
    places = np.arange(len(rows))
    signed, absolute = _ranks(pi), _ranks(np.abs(pi))
    figure, (left, right) = _figure(1, 2, (9.5, 1.9 + ROW_INCHES * len(rows)), sharey=True, width_ratios=(3, 2))
    errors = 1.96 * np.array([row["std_error"] for row in rows])
    left.barh(places, pi, color=np.where(pi < 0, ORANGE, BLUE), height=0.7)
    left.errorbar(pi, places, xerr=errors, fmt="none", ecolor="black", elinewidth=1, capsize=2.5)
    left.plot(
        [row[other] for row in rows], places, "D", color="white", markeredgecolor="black", markersize=4,
        label=f"{'elementwise' if other == 'pi_elementwise' else 'std'} estimator",
    )  # fmt: skip
    left.axvline(0, color="black", linewidth=0.8)
    left.set_yticks(places, [row["name"] for row in rows])
    left.invert_yaxis()
    left.set_xlabel(f"π: mean log-ratio of σ when skipped ({table['estimator']} estimator), 95 % interval")
    left.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=1, frameon=False, fontsize=8)
    for place, by_pi, by_absolute in zip(places, signed, absolute, strict=True):
        left.annotate(
            f"{by_pi} / {by_absolute}", (1, place), xycoords=("axes fraction", "data"), xytext=(-4, 0),
            textcoords="offset points", ha="right", va="center", fontsize=8,
            bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
        )  # fmt: skip
    left.annotate(
        "place by π / |π|", (1, 1), xycoords="axes fraction", xytext=(-4, 4), textcoords="offset points", ha="right",
        fontsize=8,
    )  # fmt: skip
    low, high = left.get_xlim()
    left.set_xlim(low, high + 0.16 * (high - low))  # room for the places
    right.barh(places, [row["loss_increase"] for row in rows], color=GREEN, height=0.7)
    right.axvline(0, color="black", linewidth=0.8)
    right.set_xlabel("loss increase when skipped")
    draws = table["conditions"] * table["draws"]
    figure.suptitle(
        f"Conditional Entropy Inflation of {len(rows)} blocks ({draws} draws; Kendall's τ between halves "
        f"{table['halves_tau']:.2f}, π to |π| {table['signed_absolute_tau']:.2f})",
        fontsize=11,
    )
    return _save(figure, path)


def _ranks(values: np.ndarray) -> np.ndarray:
    """1 for the largest."""
    ranks = np.empty(len(values), int)
    ranks[np.argsort(-values, kind="stable")] = np.arange(1, len(values) + 1)
    return ranks


def schedule_chart(steps: Sequence[Mapping[str, Any]], path: Path, blocks: Sequence[str] | None = None) -> Path:
    """Step records (steps.jsonl) → which blocks were trained when, over charged seconds.

    blocks: the network's block names in order. None: those that were ever trained, in natural order.
    """
    from matplotlib.patches import Patch

    names = list(blocks) if blocks else sorted({name for step in steps for name in step["trained"]}, key=_natural)
    # What was charged before the first step and its wait for data is scoring.
    first_s = max(0.0, steps[0]["charged_s"] - steps[0]["seconds"] - steps[0]["wait_s"]) if steps else 0.0
    scored = bool(steps) and first_s > 1e-3 * steps[-1]["charged_s"]
    edges, columns, stages = [first_s], [], []
    for (stage, phase, trained), run in itertools.groupby(
        steps, lambda s: (s["stage"], s["phase"], tuple(s["trained"]))
    ):
        if not stages or stages[-1][0] != stage:
            stages.append((stage, edges[-1]))
        edges.append(max(step["charged_s"] for step in run))
        columns.append([(2 if phase == "search" else 1) if name in trained else 0 for name in names])
    figure, axes = _figure(1, 1, (9.5, 1.7 + ROW_INCHES * max(len(names), 2)))
    colours = (GREY, BLUE, ORANGE)
    if columns:
        from matplotlib.colors import ListedColormap

        lines = np.arange(len(names) + 1) - 0.5
        axes.pcolormesh(edges, lines, np.array(columns).T, cmap=ListedColormap(colours), vmin=0, vmax=2)
        for line in lines[1:-1]:
            axes.axhline(line, color="white", linewidth=2)
    if scored:
        axes.axvspan(0, first_s, facecolor="white", edgecolor="#999999", hatch="//", linewidth=0.5)
    for stage, start_s in stages:
        axes.axvline(start_s, color="black", linewidth=1)
        axes.annotate(f"stage {stage + 1}", (start_s, 1), xycoords=("data", "axes fraction"), xytext=(3, 4),
                      textcoords="offset points", fontsize=8)  # fmt: skip
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, edges[-1] or 1)
    axes.set_xlabel("charged seconds (training, search, scoring)")
    keys = [Patch(color=BLUE, label="trained"), Patch(color=ORANGE, label="trained by a candidate (search)")]
    keys += [Patch(color=GREY, label="frozen")]
    if scored:
        keys.append(Patch(facecolor="white", edgecolor="#999999", hatch="//", label="scoring"))
    figure.legend(handles=keys, loc="outside lower center", ncols=len(keys), frameon=False, fontsize=8)
    figure.suptitle("Trained blocks over time", fontsize=11)
    return _save(figure, path)


def _natural(name: str) -> list:
    """blocks.2 before blocks.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def loss_chart(arms: Mapping[str, Sequence[tuple[float, int, float]]], path: Path) -> Path:
    """{arm: [(charged seconds, step, held-out loss)]} → held-out loss against seconds and against steps."""
    figure, axes = _figure(1, 2, (9.5, 3.8), sharey=True)
    for panel, place, label in zip(axes, (0, 1), ("charged seconds", "steps"), strict=True):
        for i, (arm, points) in enumerate(arms.items()):
            panel.plot(
                [point[place] for point in points], [point[2] for point in points], label=arm, markersize=4,
                color=LINES[i % len(LINES)], linestyle=STYLES[i % len(STYLES)], marker=MARKERS[i % len(MARKERS)],
            )  # fmt: skip
        panel.set_xlabel(label)
        panel.grid(color=GREY, linewidth=0.8)
        panel.set_axisbelow(True)
    axes[0].set_ylabel("held-out loss")
    if len(arms) > 1:
        axes[1].legend(frameon=False)
    figure.suptitle("Held-out loss", fontsize=11)
    return _save(figure, path)


def _figure(rows: int, columns: int, size_inches: tuple[float, float], **options):
    """A figure and its axes, drawn without a display and without pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size_inches, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, **options)
    for one in np.ravel(axes):
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure, path: Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path
