"""The card of a trained pipeline, README.md in its folder: what it is, from what, on what, and how to run it."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from entprog import files
from entprog.config import Experiment
from entprog.errors import UserError
from entprog.masking import bare, masked, reason
from entprog.models import folders, whole
from entprog.names import plain
from entprog.storage import Where

UNKNOWN = "not stated in its folder"

TEMPLATE = """\
---
{front}---

# {title}

A {family} network, fine-tuned{conditions}. Trained on {clip}, whose data set has the fingerprint `{data}`.

{figures}
## Use

```python
{code}```

It needs torch, diffusers, transformers and safetensors, and for the mp4 imageio with imageio-ffmpeg.
`trust_remote_code` runs pipeline.py of this folder: look at it first. The clips that it makes well are those of the
shape that it was trained on.{begins}
{poses}
## Where it comes from

Base: {base}. Licence of the base: {licence}. Whoever publishes this is bound by it, and by what the people in the
training clips agreed to.
"""

CODE = """\
from diffusers import DiffusionPipeline
from diffusers.utils import export_to_video
from PIL import Image, ImageOps

folder = "."  # or where this lies
pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
clip = pipe({given}num_inference_steps=20).frames[0]
export_to_video(clip, "clip.mp4", fps={fps:g})
"""

POSES = """
`pose` is a list of drawn frames: pictures, uint8 [F, H, W, 3], or float [F, 3, H, W] in -1..1. `draw` of skeleton.py
makes them of {points}: x and y in 0..1 of the picture, visibility):

```python
from skeleton import draw

frames = draw(points, {height}, {width})
```
"""

BEGINS = " Its reference was each clip's own first frame: begin the motion in the picture's pose."

WHOLE = "whole-body points, float [F, 133, 3] (COCO-WholeBody's 133"
POINTS = {
    "limbs": "body points, float [F, 33, 3] (BlazePose's 33",
    "dwpose": WHOLE,
    "wan_animate": WHOLE,
}
"""What a skeleton is drawn of."""


def write(
    folder: Where, title: str, experiment: Experiment | None = None, result: Mapping[str, Any] | None = None
) -> None:
    """Leave the card in a saved folder. experiment, result: of the training, where they are known."""
    about = folders.saved(folder)
    licence = licence_of(experiment.model.base if experiment else about["provenance"].get("base"))
    files.write_text(folder / folders.CARD, masked(card(about, licence, folder, title, experiment, result or {})))


def tried(folder: Where, *about_it: Any) -> str | None:
    """As `write`; what went wrong, in words: a run of hours does not fail for its card."""
    try:
        write(folder, *about_it)
    except Exception as error:
        return f"{folder / folders.CARD} could not be written: {reason(error)}"
    return None


def card(
    about: Mapping[str, Any],
    licence: Mapping[str, str],
    folder: Where,
    title: str,
    experiment: Experiment | None,
    result: Mapping[str, Any],
) -> str:
    """The card's text. about: the content of entprog.json; licence: of the base, as `licence_of` gives it."""
    base, shape, conditions = about["provenance"].get("base"), about["shape"] or {}, about["conditions"]
    hub = base and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", base) and not Path(base).exists()
    front = {"library_name": "diffusers", "pipeline_tag": "image-to-video", "tags": ["diffusers", "pose-to-video"]}
    front |= {"base_model": base} if hub else {}
    size = "{frames} frames of {width}x{height} at {fps:g} fps".format(**shape) if shape else "clips of unknown shape"
    picture = 'ImageOps.exif_transpose(Image.open("{}"))'  # phones store pictures on their side
    if shape:  # ordinary pictures have other sizes
        picture = f"ImageOps.fit({picture}, ({shape['width']}, {shape['height']}))"
    given = {"reference": f"reference={picture.format('person.png')}, ", "pose": "pose=frames, "}
    standard = isinstance(whole.index_of(folder).get("_class_name"), str)
    shown = "".join(given[name] for name in conditions) + (
        f"last={picture.format('end.png')}, " if about.get("last_frame") else ""
    )
    code = CODE.format(given=shown, fps=shape.get("fps", 8))
    points = POINTS[about.get("skeleton", "limbs")]
    if standard:
        code = code.replace(", custom_pipeline=folder, trust_remote_code=True", "")
    return TEMPLATE.format(
        front=yaml.safe_dump(front | dict(licence), sort_keys=False),
        title=plain(title),
        family=about["family"],
        conditions=f" to follow {' and '.join(conditions)}" if conditions else "",
        clip=size,
        data=result.get("data", "unknown"),
        figures=_figures(experiment, result),
        code=code,
        begins=BEGINS if about.get("first_frame") else "",
        poses=POSES.format(**shape, points=points) if "pose" in conditions and shape else "",
        base=f"[{base}](https://huggingface.co/{base})" if hub else _base(base),
        licence=licence.get("license_name", licence.get("license", UNKNOWN)),
    )


def _base(base: str | None) -> str:
    if base is None:
        return "new weights"
    where = "in a bucket" if "://" in base else "of the machine that trained"
    return f"a folder {where}, `{plain(Path(bare(base)).name)}`"


def _figures(experiment: Experiment | None, result: Mapping[str, Any]) -> str:
    """What training came to, as a table; nothing where it is not known."""
    if experiment is None or not result:
        return ""
    schedule, train = experiment.schedule, experiment.train
    blocks = ", ".join(str(len(decision["plan"]["trainable"])) for decision in result["decisions"])
    rows = {
        "held-out loss": f"{result['held_out_loss']:.5g}",
        "steps": result["steps"],
        "charged seconds": f"{result['seconds']:.0f}",
        "FLOPs": f"{result['flops']:.3g}",
        "schedule": f"{schedule.kind}, blocks trained by stage: {blocks or 'all'}",
        "learning rate, whole clips a step": f"{train.learning_rate:g}, {experiment.clips_at(experiment.data.shape)}",
    }
    return "| figure | value |\n|---|---|\n" + "".join(f"| {name} | {value} |\n" for name, value in rows.items())


def licence_of(base: str | None) -> dict[str, str]:
    """The licence that a base's own card states (`license`, `license_name`, `license_link`); {} if it states none. No
    weights are fetched for it."""
    try:
        path = folders.locate(base, "model.base", parts=()) / folders.CARD if base else None
        text = path.read_text(errors="replace") if path and path.is_file() else ""
        found = re.match(r"---\n(.*?)\n---\s", text, re.S)
        values = yaml.load(found[1], yaml.BaseLoader) if found else {}
    except (UserError, OSError, ValueError, RecursionError, yaml.YAMLError):  # others wrote it
        return {}
    names = ("license", "license_name", "license_link")
    kept = values if isinstance(values, dict) else {}
    return {name: plain(kept[name]) for name in names if isinstance(kept.get(name), str)}
