"""Charts of a run, from its records to PNG files, in the Okabe-Ito colours that colour-blind people tell apart."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from entprog import files
from entprog.storage import Where

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#E69F00", "#009E73", "#E4E4E4"
LINES = (BLUE, "#D55E00", GREEN, "#CC79A7", ORANGE, "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":")
MARKERS = "os^Dv<>"
ROW_INCHES = 0.3
SHAPES_INCHES = 0.8
"""Height of the panel that shows clip shapes."""


KINDS = {
    "cei": "Conditional Entropy Inflation",
    "reverse_cei": "Reverse Conditional Entropy Inflation",
    "loss_increase": "Loss increase on skip",
    "gradient": "Gradient norm",
    "fisher": "Fisher information",
    "random": "Random order",
    "depth_first": "First blocks first",
    "depth_last": "Last blocks first",
}
"""`priority.kind` in words."""


def cei_chart(table: Mapping[str, Any], path: Where) -> Where:
    """A score table (`ScoreTable.as_json`) → block scores with their 95 % intervals, loss increase on skip beside.

    Blocks in the network's order from the top. For CEI the score is π, and each bar carries the block's place by π and
    by |π|; a control gets the panel of its scores alone.
    """
    rows, kind = table["blocks"], table["kind"]
    is_pi = kind in ("cei", "reverse_cei")
    scores = np.array([row["score"] for row in rows])
    places = np.arange(len(rows))
    size = (9.5 if is_pi else 6.5, 1.9 + ROW_INCHES * len(rows))
    if is_pi:
        figure, (left, right) = figure_and_axes(1, 2, size, sharey=True, width_ratios=(3, 2))
        increase, error = ([row[name] for row in rows] for name in ("loss_increase", "loss_std_error"))
        _bars(right, places, np.array(increase), np.array(error), GREEN, GREEN)
        right.locator_params(axis="x", nbins=3)  # long labels
        right.set_xlabel("loss increase when skipped, 95 % interval")
    else:
        figure, left = figure_and_axes(1, 1, size)
    _bars(left, places, scores, np.array([row["std_error"] for row in rows]), BLUE, ORANGE)
    left.set_yticks(places, [row["name"] for row in rows])
    left.invert_yaxis()
    if is_pi:
        _beside_pi(left, rows, places, table["estimator"])
        left.set_xlabel(f"π: mean log-ratio of σ when skipped ({table['estimator']} estimator), 95 % interval")
    else:
        left.set_xlabel(f"{KINDS[kind]}, 95 % interval" if table["conditions"] else "score")
    facts = [f"{table['conditions'] * table['draws']} draws"] if table["conditions"] else []
    facts += [f"Kendall's τ between halves {table['halves_tau']:.2f}"] if facts else []
    facts += [f"π to |π| {table['signed_absolute_tau']:.2f}"] if is_pi else []
    about = f" ({', '.join(facts)})" if facts else ""
    figure.suptitle(f"{KINDS[kind]} of {len(rows)} blocks{about}", fontsize=11)
    return save(figure, path)


def _bars(axes, places: np.ndarray, values: np.ndarray, std_error: np.ndarray, positive: str, negative: str) -> None:
    """A horizontal bar a value with its 95 % interval."""
    axes.barh(places, values, color=np.where(values < 0, negative, positive), height=0.7)
    if std_error.any():
        axes.errorbar(
            values, places, xerr=1.96 * std_error, fmt="none", ecolor="black", elinewidth=1, capsize=2.5
        )  # fmt: skip
    axes.axvline(0, color="black", linewidth=0.8)


def _beside_pi(axes, rows: Sequence[Mapping[str, Any]], places: np.ndarray, estimator: str) -> None:
    """π by the other estimator, and each block's place by π and by |π|."""
    other = "elementwise" if estimator == "std" else "std"
    axes.plot(
        [row[f"pi_{other}"] for row in rows], places, "D", color="white", markeredgecolor="black", markersize=4,
        label=f"{other} estimator",
    )  # fmt: skip
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=1, frameon=False, fontsize=8)
    pi = np.array([row[f"pi_{estimator}"] for row in rows])
    for place, by_pi, by_absolute in zip(places, _ranks(pi), _ranks(np.abs(pi)), strict=True):
        axes.annotate(
            f"{by_pi} / {by_absolute}", (1, place), xycoords=("axes fraction", "data"), xytext=(-4, 0),
            textcoords="offset points", ha="right", va="center", fontsize=8,
            bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
        )  # fmt: skip
    axes.annotate(
        "place by π / |π|", (1, 1), xycoords="axes fraction", xytext=(-4, 4), textcoords="offset points", ha="right",
        fontsize=8,
    )  # fmt: skip
    low, high = axes.get_xlim()
    axes.set_xlim(low, high + 0.16 * (high - low))  # room for the places


def _ranks(values: np.ndarray) -> np.ndarray:
    """1 for the largest."""
    ranks = np.empty(len(values), int)
    ranks[np.argsort(-values, kind="stable")] = np.arange(1, len(values) + 1)
    return ranks


def scored_s(steps: Sequence[Mapping[str, Any]]) -> float:
    """Charged seconds of scoring before the first step."""
    if not steps:
        return 0.0
    first = steps[0]
    # Lines of an earlier version do not say: there it is all that was charged before the step and its wait for clips.
    return first.get("score_s", max(0.0, first["charged_s"] - first["seconds"] - first["wait_s"]))


def schedule_chart(steps: Sequence[Mapping[str, Any]], path: Where, blocks: Sequence[str] | None = None) -> Where:
    """Step records (steps.jsonl) → which blocks were trained when, over charged seconds.

    blocks: the network's block names in order. None: those that were ever trained, in natural order.
    """
    from matplotlib.patches import Patch

    names = list(blocks) if blocks else sorted({name for step in steps for name in step["trained"]}, key=files.natural)
    first_s = scored_s(steps)
    scored = bool(steps) and first_s > 1e-3 * steps[-1]["charged_s"]
    edges, columns, stages = [first_s], [], []
    for (stage, phase, trained), run in itertools.groupby(
        steps, lambda s: (s["stage"], s["phase"], tuple(s["trained"]))
    ):
        if not stages or stages[-1][0] != stage:
            stages.append((stage, edges[-1]))
        edges.append(max(step["charged_s"] for step in run))
        columns.append([(2 if phase == "search" else 1) if name in trained else 0 for name in names])
    shapes = shape_spans(steps, first_s)
    height = 1.7 + ROW_INCHES * max(len(names), 2)
    if len({shape for *_, shape in shapes}) > 1:
        sizes = {"height_ratios": (SHAPES_INCHES, height), "sharex": True}
        figure, (top, axes) = figure_and_axes(2, 1, (9.5, height + SHAPES_INCHES), **sizes)
        draw_shapes(top, shapes, GREEN)
    else:
        figure, axes = figure_and_axes(1, 1, (9.5, height))
        top = axes
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
        top.annotate(f"stage {stage + 1}", (start_s, 1), xycoords=("data", "axes fraction"), xytext=(3, 4),
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
    title = "Trained blocks over time" if top is axes else "Clip shape and trained blocks over time"
    figure.suptitle(title, fontsize=11)
    return save(figure, path)


def shape_spans(steps: Sequence[Mapping[str, Any]], first_s: float) -> list[tuple[float, float, float, str]]:
    """Step records → (from, until, share, shape): charged seconds in a row on clips of one shape, and the share of the
    largest clips' pixels that these have. first_s: when the first step began. Empty where records do not say."""
    largest = max((step.get("pixels", 0) for step in steps), default=0)
    out, begun = [], first_s
    for shape, run in itertools.groupby(steps if largest else (), lambda step: step["shape"]):
        last = list(run)[-1]
        out.append((begun, last["charged_s"], last["pixels"] / largest, shape))
        begun = last["charged_s"]
    return out


def draw_shapes(axes, spans: Sequence[tuple[float, float, float, str]], ink: str) -> None:
    """Clip shape over time, as high as its share of the largest clips' pixels; named where there is room."""
    for begun, until, share, shape in spans:
        axes.bar(begun, share, until - begun, align="edge", color=ink, linewidth=0)
        if until - begun > 0.25 * (spans[-1][1] - spans[0][0]):
            axes.annotate(shape.split(" at ")[0], ((begun + until) / 2, share), xytext=(0, -2 if share > 0.5 else 2),
                          textcoords="offset points", ha="center", va="top" if share > 0.5 else "bottom",
                          fontsize=8)  # fmt: skip
    axes.set_ylim(0, 1)
    axes.set_yticks([0, 1], ["0", "all"])
    axes.set_ylabel("pixels", fontsize=8)


def loss_chart(arms: Mapping[str, Sequence[tuple[float, int, float]]], path: Where) -> Where:
    """{arm: [(charged seconds, step, held-out loss)]} → held-out loss against seconds and against steps."""
    figure, axes = figure_and_axes(1, 2, (9.5, 3.8), sharey=True)
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
    return save(figure, path)


def figure_and_axes(rows: int, columns: int, size_inches: tuple[float, float], **options):
    """A figure and its axes, drawn without a display and without pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size_inches, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, **options)
    for one in np.ravel(axes):
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure, path: Where) -> Where:
    with files.whole(path) as scratch:
        figure.savefig(scratch, dpi=120, format=path.name.rpartition(".")[2])
    return path
