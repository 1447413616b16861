"""The study's charts."""

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines import charts

HIGHLIGHTED = ("full", "paper", "progressive", "rotating", "rotating_tokens", "past_linear", "past", "lisa")
"""Arms of the first chart."""


def loss_chart(arms: Mapping[str, Any], clock: str, path: Path) -> Path:
    """Held-out loss over the budget, mean over seeds, with each seed faintly."""
    figure, axes = charts.figure_and_axes(1, 1, (8, 4.5))
    shown = [name for name in HIGHLIGHTED if name in arms]
    for color, name in zip(charts.LINES, shown, strict=False):
        curves = arms[name]["curves"]
        for number, curve in enumerate(curves):
            axes.plot(
                [point["spent"] for point in curve], [point["loss"] for point in curve], color=color, alpha=0.6,
                linewidth=1.2, label=arms[name]["title"] if number == 0 else None,
            )  # fmt: skip
    axes.set_xlabel({"flops": "charged FLOPs", "seconds": "charged seconds"}[clock])
    axes.set_ylabel("held-out loss, a line a seed")
    axes.legend(frameon=False, fontsize=8)
    return charts.save(figure, path)


def ratio_chart(arms: Mapping[str, Any], path: Path) -> Path:
    """How much sooner each arm is at full training's loss, with intervals and each seed's value."""
    names = [name for name in arms if name != "full"]
    figure, axes = charts.figure_and_axes(1, 1, (8, 1.5 + charts.ROW_INCHES * len(names)))
    for place, name in enumerate(names):
        ratio = arms[name]["time_to_full_loss_ratio"]
        dots = [value for value in ratio["by_seed"] if value is not None]
        axes.plot([ratio["low"], ratio["high"]], [place, place], color=charts.BLUE, linewidth=2)
        axes.plot(dots, [place] * len(dots), "o", color=charts.ORANGE, markersize=4)
        axes.plot([ratio["median"]], [place], "s", color=charts.BLUE, markersize=6)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(names)), [textwrap.fill(arms[name]["title"], 42) for name in names], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("times as soon at full training's loss (dots: seeds)")
    return charts.save(figure, path)


def cei_chart(found: Mapping[str, Any], path: Path) -> Path:
    """π over the loss increase on skip, a panel a network."""
    figure, panels = charts.figure_and_axes(1, len(found), (4.2 * len(found), 3.6))
    for axes, (name, of) in zip([panels] if len(found) == 1 else panels, found.items(), strict=True):
        axes.plot(of["pi"], of["loss_increase"], "o", color=charts.BLUE, markersize=5)
        for number, point in enumerate(zip(of["pi"], of["loss_increase"], strict=True)):
            axes.annotate(str(number), point, textcoords="offset points", xytext=(4, 3), fontsize=8)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_title(f"{name}: block numbers", fontsize=9)
        axes.set_xlabel("π")
        axes.set_ylabel("loss increase on skip")
    return charts.save(figure, path)
