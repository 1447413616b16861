"""What an evaluation leaves: values of clips, figures with intervals and cards, also those of an earlier command on the
same clips.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from entprog import config, files, storage
from entprog.config import ClipShape, Evaluate
from entprog.media import sheet as sheets
from entprog.media import video as videos
from entprog.quality.card import ProtocolCard
from entprog.quality.figures import Figure, frechet_figure, mean_figure
from entprog.quality.metrics import METRICS
from entprog.storage import Where
from pipelines import terminal
from pipelines.generating import judging, motions

EVALUATION = "evaluation.json"
CLIPS = "clips.json"
SHOWN = 6
"""Clips on the contact sheet."""
SAME_FPS = 0.05
"""Frames a second by which a clip's rate and its truth's differ at most: files round them."""

Rows = Mapping[str, Mapping[str, Any]]
"""{clip id: what `judging.judge` found}, in the clips' order."""


def figures(rows: Rows, sources: Sequence[str], names: Sequence[str], chosen: Evaluate) -> dict[str, Figure]:
    """{metric: Figure}, without those that no clip has. sources: of the clips of `rows`."""
    drawn = {"confidence": chosen.confidence, "seed": chosen.bootstrap_seed, "sources": sources}
    found = {}
    for name in names:
        if METRICS[name].of == "set":
            real, made = ([row[f"{side}/{name}"] for row in rows.values()] for side in ("real", "made"))
            # A distance of thousands of features takes seconds, and so each replicate.
            with terminal.advancing(f"interval of {name}", chosen.frechet_bootstrap, "replicates") as advance:
                found[name] = frechet_figure(real, made, chosen.frechet_bootstrap, **drawn, advance=advance)
            continue
        values = [float(row[f"value/{name}"]) for row in rows.values()]
        if any(map(math.isfinite, values)):
            found[name] = mean_figure(values, chosen.bootstrap, **drawn)
    return found


def values(rows: Rows, places: Sequence[judging.Place]) -> list[dict[str, Any]]:
    """Every clip's own values, and the hash of the frames that they are of."""
    out = []
    for place in places:
        row = rows[place.clip_id]
        own = {name.removeprefix("value/"): float(v) for name, v in row.items() if name.startswith("value/")}
        known = {name: value if math.isfinite(value) else None for name, value in own.items()}
        out.append({"clip": place.clip_id, "file": str(place.clip), "sha256": str(row["sha256"]), **known})
    return out


@dataclass(frozen=True)
class Earlier:
    """What an earlier command left of the clips that are judged now."""

    evaluation: Mapping[str, Any]
    clips: Mapping[str, Mapping[str, Any]]
    """{clip id: its values} of clips that are as they were."""
    gone: tuple[str, ...] = ()
    """Metrics whose figures are of other clips."""


def earlier(output: Where, clips: Sequence[Mapping[str, Any]]) -> Earlier:
    """What lies in `output` of the clips of `values`. A file that is not there, or damaged, says nothing. Raises
    OSError where a bucket does not answer."""
    own = {row["clip"]: row["sha256"] for row in clips}
    before = _read(output / CLIPS, list)
    same = {
        row["clip"]: row for row in before if isinstance(row, dict) and own.get(row.get("clip")) == row.get("sha256")
    }
    evaluation = _read(output / EVALUATION, dict)
    there = tuple(evaluation.get("figures", ()))
    return Earlier(evaluation, same) if evaluation.get("clips") == key(clips) else Earlier({}, same, there)


def key(clips: Sequence[Mapping[str, Any]]) -> str:
    """Hash of the clips of `values`: figures of another one are of other clips, or of other frames."""
    return config.digest({row["clip"]: row["sha256"] for row in clips})


def _read(path: Where, kind: type) -> Any:
    if not path.is_file():
        return kind()
    try:
        found = files.from_json(path.read_text())
    except ValueError:
        return kind()
    return found if isinstance(found, kind) else kind()


def evaluation(
    found: Mapping[str, Figure],
    cards: Mapping[str, ProtocolCard],
    key: str,
    before: Mapping[str, Any],
    chosen: Evaluate,
) -> dict[str, Any]:
    """Content of evaluation.json. before: that of an earlier command on the same clips, whose figures stay where a
    metric was not measured now; chosen: how the intervals of those that were are drawn, which it may have had else."""

    def interval(name: str) -> dict[str, Any]:
        replicates = chosen.frechet_bootstrap if METRICS[name].of == "set" else chosen.bootstrap
        return {"confidence": chosen.confidence, "replicates": replicates, "seed": chosen.bootstrap_seed}

    new = {name: asdict(figure) | {"card": cards[name].id, "interval": interval(name)}
           for name, figure in found.items()}  # fmt: skip
    every = {**before.get("figures", {}), **new}
    known = {**before.get("cards", {}), **{card.id: asdict(card) for card in cards.values()}}
    kept = {name: every[name] for name in METRICS if name in every}
    return {"figures": kept, "cards": {f["card"]: known[f["card"]] for f in kept.values()}, "clips": key}


def other_rate(clip: Path, shape: ClipShape) -> str:
    """That a generated clip has another frame rate than its truth, in words; empty where it has the same."""
    rate = videos.probe(clip).fps
    same = abs(rate - shape.fps) <= SAME_FPS
    return "" if same else f"has {rate:g} frames a second, its truth {shape.fps:g}: they are compared frame by frame"


def sheet(places: Sequence[judging.Place], shape: ClipShape, output: Where) -> Where:
    """Picture of some clips, truth over result."""
    rows = []
    for place in places[:: -(-len(places) // SHOWN)]:
        truth = motions.from_row(storage.at(place.shard, "shards"), place.row, shape).video
        rows += [(f"{place.clip_id}: truth", truth), ("result", judging.read_result(place.clip, truth.shape))]
    return sheets.contact_sheet(rows, output / "sheet.png")


def show(evaluation: Mapping[str, Any], clips: int) -> None:
    """Print the figures."""

    def interval(figure: Mapping[str, Any]) -> str:
        if figure["low"] is None:
            return ""
        drawn = figure.get("interval")  # of an earlier version not known
        share = f" ({100 * drawn['confidence']:.4g} %)" if drawn else ""
        return f"{figure['low']:.4g} … {figure['high']:.4g}{share}"

    rows = [
        (
            name,
            figure["value"],
            interval(figure),
            evaluation["cards"][figure["card"]]["better"],
            figure["clips"],
            figure["sources"],
        )
        for name, figure in evaluation["figures"].items()
    ]
    terminal.show(
        f"{clips} clips against their truth", rows, ("metric", "value", "interval", "better", "clips", "sources")
    )
