"""How generated clips were made: what a folder of them says, and what goes onto the cards of their figures."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entprog import files
from entprog.config import Evaluation, Generate
from entprog.data.shards import Dataset
from entprog.errors import UserError
from entprog.media import h264
from entprog.media import video as videos
from entprog.preparing.cutting import FILES
from entprog.quality.card import ProtocolCard
from entprog.storage import Where
from pipelines.generating import checkpoints
from pipelines.generating.checkpoints import Checkpoint

if TYPE_CHECKING:
    from entprog.quality.metrics import Meter

# torch is imported where it is needed: `generate` tells wrong arguments at once, not after seconds.

FILE = "protocol.json"
"""The file in a folder of generated clips that records how they were made."""


def how_sampled(maker: Checkpoint, chosen: Generate, gpu: bool) -> dict[str, Any]:
    """All that decides what a checkpoint makes of a motion, on a GPU or without."""
    from entprog.models import fingerprints

    text = {}
    if chosen.text is not None:
        text = {"text": chosen.text, "text encoder": checkpoints.text_source(maker, chosen).key}
    of_text = "" if chosen.text_guidance == 1 else f", text {chosen.text_guidance:g} over {maker.no_text}"
    return text | {
        "checkpoint": fingerprints.base(maker.model()),
        "sampler": checkpoints.sampler_name(maker, chosen),
        "steps": chosen.steps,
        "guidance": f"reference {chosen.reference_guidance:g}, pose {chosen.pose_guidance:g}{of_text}",
        "seed": chosen.seed,
        "dtype": checkpoints.dtype_of(maker, chosen, gpu),
    }


def how_made(maker: Checkpoint, settings: Evaluation, dataset: Dataset, texts: str = "") -> dict[str, Any]:
    """All that decides what a checkpoint's clips of a split look like. settings: with `generate.dtype` spelled out
    where they are made on GPUs; texts: `captioned.Shown.name`."""
    made = how_sampled(maker, settings.generate, gpu=False) | ({"texts": texts} if texts else {})
    return of_shards(made, maker, dataset, settings.evaluate.split)


def of_shards(
    made: dict[str, Any],
    maker: Checkpoint,
    dataset: Dataset,
    split: str | None,
    *,
    first: bool = True,
    last: bool = True,
) -> dict[str, Any]:
    """How clips of shards are made: `how_sampled`, which shards, and what of each clip's truth the network is shown.
    split: None for clips that were named; first, last: whether a network that was trained with each clip's first frame
    as reference, or sees the last one, is shown the truth's."""
    made = made | {"dataset": dataset.fingerprint, "split": split}
    if dataset.masks and maker.replaces:  # what is drawn is then no whole clip
        made["guidance"] += ", put into clips with masks"
    if frames := ["the first frame"] * (first and maker.first) + ["the last frame"] * (last and maker.last):
        made["of the truth"] = " and ".join(frames)
    return made


def how_given(folder: Where) -> dict[str, Any]:
    """What a folder of clips says of how they were made; {} if nothing."""
    return read_json(folder / FILE) if (folder / FILE).is_file() else {}


def leave(folder: Where, made: dict[str, Any]) -> None:
    """Say in a folder how its clips are made."""
    files.write_json(folder / FILE, made)


def card(
    name: str, meter: "Meter", settings: Evaluation, dataset: Dataset, clips: int, made: dict[str, Any], file: Path
) -> ProtocolCard:
    """The card of one metric's figure. made: of `how_made` or `how_given`; file: one of the clips."""
    from entprog.quality.metrics import METRICS

    network, sha256, resize = meter.judge(name)
    shape = dataset.shape
    prepared = dataset.settings.get("prepare", {})
    crf = prepared.get("crf")
    truth = "h264" if crf is None else f"h264 crf {crf}"
    how_judged = judged(name, settings, prepared, dataset.settings.get("poses", ()))
    result = f"{videos.probe(file).codec}{f' crf {h264.CRF}' if 'checkpoint' in made else ''}"
    return ProtocolCard(
        metric=name,
        better=METRICS[name].better,
        network=network,
        weights_sha256=sha256,
        resize=resize,
        frames=shape.frames,
        height=shape.height,
        width=shape.width,
        fps=shape.fps,
        codec=f"truth {truth}, result {result}, 4:2:0",
        clips=clips,
        split=settings.evaluate.split,
        dataset=dataset.fingerprint,
        sampler=made.get("sampler"),
        steps=made.get("steps"),
        guidance=made.get("guidance"),
        seed=made.get("seed"),
        details=", ".join(word for word in (how_judged, *shown(made)) if word),
    )


def shown(made: dict[str, Any]) -> list[str]:
    """What decides a clip beside sampler, steps, guidance and seed, where it is not the usual: in words."""
    out = []
    if made.get("text") is not None:
        out.append(f"text {json.dumps(made['text'], ensure_ascii=False)}")
    if made.get("texts"):
        out.append(f"shown {made['texts']}")
    if made.get("of the truth"):
        out.append(f"shown {made['of the truth']} of the truth")
    if made.get("dtype", "float32") != "float32":
        out.append(f"network in {made['dtype']}")
    if instead := made.get("instead of the split's"):
        out.append(f"not the split's own: {', '.join(instead)}")
    return out


def judged(name: str, settings: Evaluation, prepared: dict[str, Any], made_by: Sequence[str]) -> str:
    """What a metric's figure depends on beside its network, in words. made_by: where the shards' poses come from;
    datasets of earlier versions do not say it."""
    from entprog.quality.metrics import METRICS

    if METRICS[name].windowed and settings.evaluate.window_frames:
        return f"every {settings.evaluate.window_frames} frames in a row a sample"
    if METRICS[name].network == "rtmw":
        known = made_by or ["rtmlib" if prepared.get("pose") == "rtmlib" else FILES]
        return f"wanted pose by {' and '.join(known)}"
    if METRICS[name].network != "blazepose":
        return ""
    within = f"within {settings.evaluate.pck_threshold:g}, " if name == "pck" else ""
    return f"{within}wanted pose by {' and '.join(made_by or [prepared.get('pose', 'blazepose')])}"


def read_json(path: Where) -> dict[str, Any]:
    """A JSON object; {} for other JSON. Raises UserError if it cannot be read."""
    try:
        found = files.from_json(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    return found if isinstance(found, dict) else {}
