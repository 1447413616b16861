"""The contact sheet of a dataset: what was kept, with the pose drawn on it, for a person to look at."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from entprog.config import ClipShape
from entprog.data import shards
from entprog.errors import UserError
from entprog.media import h264, masks, pictures, sheet, video
from entprog.media.errors import VideoError
from entprog.media.limits import LIMITS
from entprog.storage import Where

Row = dict[str, Any]

SHEET_SOURCES = 24
"""Sources on the contact sheet at most, spread evenly."""
SHEET_SHARDS = 48
"""Shards that they are looked for in."""


def of_dataset(output: Where, dataset: shards.Dataset) -> None:
    """Two clips of every kept source, of up to SHEET_SOURCES: the reference, then frames with the pose over them, dark
    where a mask says that the person is not."""
    files = [(name, info.file, info.clips) for name, infos in dataset.splits.items() for info in infos]
    of_source = defaultdict(list)
    for name, file, clips in _some(files, SHEET_SHARDS):
        for row, clip in enumerate(shards.read_rows(output / file, range(clips), ["source"])):
            of_source[clip["source"]].append((name, file, row))
    rows = []
    for source in _some(sorted(of_source), SHEET_SOURCES):
        its = of_source[source]
        for split_name, file, at in [its[i] for i in sorted({len(its) // 4, 3 * len(its) // 4})]:
            (clip,) = shards.read_rows(output / file, [at], ["video", "reference", "pose", "start_s", "mask"])
            try:
                strip = _strip(clip, dataset.shape)
            except VideoError as error:
                raise UserError(f"{output / file}, clip {at} is damaged: {error}") from None
            rows.append((f"{source}   {clip['start_s']:.2f} s   {split_name}   reference | clip", strip))
    sheet.contact_sheet(rows, output / "contact_sheet.png", columns=9)


def _some(of: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of them, spread evenly."""
    return [of[i] for i in np.unique(np.linspace(0, len(of) - 1, count).round().astype(int))] if of else []


def _strip(clip: Row, shape: ClipShape) -> np.ndarray:
    """uint8 RGB [1 + n, H, W, 3], enlarged to be looked at: the reference, then frames with their pose."""
    some = np.unique(np.linspace(0, shape.frames - 1, 8).round().astype(int))
    height, width = shape.height, shape.width
    frames = h264.decode_rgb(clip["video"], some.tolist(), (height, width))
    if clip["mask"]:
        shown = masks.unpacked(clip["mask"], shape.frames, height, width)[some]
        frames = np.where(shown[..., None], frames, frames // 3)
    reference = pictures.read(clip["reference"], replace(LIMITS, max_pixels=height * width))
    times = max(1.0, 192 / height)
    size = round(height * times), round(width * times)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # pictures this small only wait for each other's threads, up to 50 times as long
    shown = sheet.overlay(np.stack([video.scale(frame, size) for frame in frames]), clip["pose"][some])
    torch.set_num_threads(threads)
    return np.concatenate([video.scale(reference, size)[None], shown])
