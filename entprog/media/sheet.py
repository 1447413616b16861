"""Pictures for people: contact sheets and videos side by side."""

from collections.abc import Collection, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from entprog import files
from entprog.media import drawing
from entprog.storage import Where

GAP = 6
"""Pixels between frames."""
PAPER = (24, 24, 28)
INK = (235, 235, 235)


COLUMNS = 8
"""Frames of a clip on a contact sheet."""


def spread(count: int, columns: int = COLUMNS) -> list[int]:
    """At most `columns` of `count` frames, evenly, first and last among them."""
    return np.unique(np.linspace(0, count - 1, min(columns, count)).round().astype(int)).tolist()


def contact_sheet(
    rows: Sequence[tuple[str, np.ndarray]], path: Where, columns: int = COLUMNS, frame_height: int = 192
) -> Where:
    """Write a PNG: a row per (label, uint8 RGB [F, H, W, 3]), at most `columns` frames spread evenly over the clip.

    Frames are scaled to `frame_height`, label above. Atomic.
    """
    if not rows:
        raise ValueError("a contact sheet needs at least one row")
    font = _font(16)
    label_height = 26
    strips = []
    for label, frames in rows:
        images = [_scale_to_height(frames[i], frame_height) for i in spread(len(frames), columns)]
        strips.append((_legible(label), images))
    width = max(sum(image.width + GAP for image in images) for _, images in strips) + GAP
    width = max(width, *(int(font.getlength(label)) + 2 * GAP for label, _ in strips), 1)
    sheet = Image.new("RGB", (width, len(strips) * (label_height + frame_height) + GAP), PAPER)
    pen = ImageDraw.Draw(sheet)
    y = 0
    for label, images in strips:
        pen.text((GAP, y + 4), label, INK, font)
        x = GAP
        for image in images:
            sheet.paste(image, (x, y + label_height))
            x += image.width + GAP
        y += label_height + frame_height
    with files.whole(path) as scratch:
        sheet.save(scratch, "PNG")
    return path


def side_by_side(parts: Sequence[tuple[str, np.ndarray]], min_height: int = 384) -> np.ndarray:
    """Clips next to each other under their titles: uint8 RGB [F, H', W', 3], even sizes.

    All clips [F, H, W, 3] of one F; scaled to the tallest one's height, or to `min_height` if that is more.
    """
    parts = [(_legible(title), frames) for title, frames in parts]
    lengths = {len(frames) for _, frames in parts}
    if len(lengths) != 1:
        raise ValueError(f"clips side by side need one length, given {sorted(lengths)}")
    height = max(min_height, *(frames.shape[1] for _, frames in parts))
    font = _font(max(14, height // 24))
    title_height = int(font.size * 1.6)
    images = [[_scale_to_height(image, height) for image in frames] for _, frames in parts]
    widths = [
        max(clip[0].width, int(font.getlength(title)) + GAP) for clip, (title, _) in zip(images, parts, strict=True)
    ]
    size = np.array([sum(widths) + GAP * (len(parts) + 1), title_height + height + GAP])
    canvas = Image.new("RGB", tuple(int(s) for s in size + size % 2), PAPER)
    pen = ImageDraw.Draw(canvas)
    lefts = [GAP + sum(widths[:i]) + GAP * i for i in range(len(parts))]
    for left, (title, _) in zip(lefts, parts, strict=True):
        pen.text((left, title_height * 0.15), title, INK, font)
    out = np.empty((lengths.pop(), canvas.height, canvas.width, 3), np.uint8)
    for i in range(len(out)):
        for left, clip in zip(lefts, images, strict=True):
            canvas.paste(clip[i], (left, title_height))
        out[i] = np.asarray(canvas)
    return out


def overlay(frames: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Skeletons (float [F, 33 or 133, 3]) drawn over uint8 RGB [F, H, W, 3] → uint8 RGB, same shape."""
    out = np.empty_like(frames)
    for i, (frame, pose) in enumerate(zip(frames, points, strict=True)):
        drawn = drawing.draw(torch.from_numpy(np.ascontiguousarray(pose)), *frame.shape[:2])
        limbs = ((drawn + 1) * 127.5).permute(1, 2, 0).numpy()
        cover = limbs.max(-1, keepdims=True) / 255
        out[i] = np.rint(frame * (1 - cover) + limbs * cover)
    return out


@cache
def _font_file() -> str:
    """DejaVu Sans of matplotlib, which takes its time to import: Latin, Greek, Cyrillic and Arabic letters."""
    import matplotlib

    return str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")


def _font(size: int):
    return ImageFont.truetype(_font_file(), size)


@cache
def _drawable() -> Collection[int]:
    """Code points of its letters."""
    from matplotlib.ft2font import FT2Font

    return FT2Font(_font_file()).get_charmap().keys()


def _legible(text: str) -> str:
    """With letters that the font lacks as Python escapes them: names of files must not look alike."""
    return "".join(c if ord(c) in _drawable() else c.encode("unicode_escape").decode() for c in text)


def _scale_to_height(image: np.ndarray, height: int) -> Image.Image:
    """Sharp pixels when a tiny frame is enlarged several times, smooth otherwise."""
    width = max(1, round(image.shape[1] * height / image.shape[0]))
    kernel = Image.Resampling.NEAREST if height >= 8 * image.shape[0] else Image.Resampling.BICUBIC
    return Image.fromarray(np.ascontiguousarray(image)).resize((width, height), kernel)
