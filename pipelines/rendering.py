"""Clips made by a network, beside what they were made from: mp4s and a contact sheet."""

import itertools
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from entprog import sampling
from entprog.clips import Clips
from entprog.config import ClipShape, Generate
from entprog.media import color, sheet, skeleton
from entprog.media import video as videos
from entprog.models import Denoiser
from pipelines import jobs
from pipelines.motions import Motion


def motions_of(clips: Clips, names: Sequence[str]) -> list[Motion]:
    """A batch of clips as motions whose truth is known."""
    truth = pixels(color.yuv420_to_rgb(clips.video))
    rows = zip(names, clips.reference.cpu().numpy(), clips.pose.cpu().numpy(), truth, strict=True)
    return [Motion(*row, place=place) for place, row in enumerate(rows)]


def make(
    denoiser: Denoiser, motions: Sequence[Motion], shape: ClipShape, settings: Generate, without: str | None = None
) -> np.ndarray:
    """The motions' clips: uint8 RGB [B, F, H, W, 3]. All have poses of one length.

    shape: of the clips that the network was trained on; longer poses are made in windows of it. without: a condition
    that is zeroed.
    """
    conditions = denoiser.condition(
        torch.from_numpy(np.stack([motion.reference for motion in motions])),
        torch.from_numpy(np.stack([motion.pose for motion in motions])),
    )
    if without:
        conditions[without] = torch.zeros_like(conditions[without])
    whole = shape.model_copy(update={"frames": motions[0].pose.shape[0]})
    size = (len(motions), *denoiser.latent_shape(whole))
    places = [motion.place for motion in motions]
    latents = sampling.sample(denoiser, conditions, size, settings, places, sampling.window_of(denoiser, shape))
    return pixels(denoiser.decode(latents))


def fitting(denoiser: Denoiser, motion: Motion, shape: ClipShape) -> Motion:
    """The motion cut to a number of frames that the VAE's groups of frames make up."""

    def latent_frames(frames: int) -> int:
        return denoiser.latent_shape(shape.model_copy(update={"frames": frames}))[1]

    frames = len(motion.pose)
    while frames > shape.frames and latent_frames(frames) == latent_frames(frames - 1):
        frames -= 1
    video = None if motion.video is None else motion.video[:frames]
    return replace(motion, pose=motion.pose[:frames], video=video)


def render(
    denoiser: Denoiser,
    motions: Sequence[Motion],
    shape: ClipShape,
    output: Path,
    settings: Generate,
    without: str | None = None,
) -> tuple[list[dict[str, Any]], Path]:
    """Sample every motion and write it: a record each (`clip`, `video` side by side, `result` alone), contact sheet.

    Pose and truth lie beside the result on their own too, for other runs' results to be shown with. without: a
    condition; each clip is made a second time with it zeroed and shown beside, `difference` being the largest one of
    the two in levels of 0..255.
    """
    motions = [fitting(denoiser, motion, shape) for motion in motions]
    records, rows = [], []
    started = time.time()
    for batch in _batches(motions, settings.batch_size):
        made = make(denoiser, batch, shape, settings)
        bare = made if without is None else make(denoiser, batch, shape, settings, without)
        for motion, result, other in zip(batch, made, bare, strict=True):
            drawn = pixels(skeleton.draw(torch.from_numpy(motion.pose), shape.height, shape.width))
            still = np.broadcast_to(motion.reference, result.shape)
            parts = [("reference", still), ("pose", drawn), ("result", result)]
            if without is not None:
                parts.append((f"without {without}", other))
            if motion.video is not None:
                parts.append((motion.video_title, motion.video))
            record = _write(output / "videos", len(records), motion, parts, shape.fps)
            if without is not None:
                record["difference"] = int(np.abs(result.astype(int) - other).max())
            records.append(record)
            rows += [(f"{motion.name}: {title}", frames) for title, frames in parts[1:]]
        rate = len(records) / (time.time() - started)
        left = (len(motions) - len(records)) / rate
        jobs.console.print(f"{len(records)}/{len(motions)} clips, {rate:.2f} clips/s, ETA {left:.0f} s")
    return records, sheet.contact_sheet(rows, output / "sheet.png")


def _batches(motions: Sequence[Motion], size: int) -> Iterator[list[Motion]]:
    """Neighbours of one length, at most `size` at once."""
    for _, group in itertools.groupby(motions, lambda motion: len(motion.pose)):
        of_length = list(group)
        for first in range(0, len(of_length), size):
            yield of_length[first : first + size]


def _write(folder: Path, number: int, motion: Motion, parts, fps: float) -> dict[str, Any]:
    name = f"{number:03d}_{re.sub(r'[^A-Za-z0-9.-]+', '_', motion.name)[:80]}"
    beside = videos.write_mp4(folder / f"{name}.mp4", sheet.side_by_side(parts), fps)
    shown = dict(parts)
    alone = {"pose": shown["pose"], "result": shown["result"]}
    alone |= {} if motion.video is None else {"truth": motion.video}
    paths = {part: videos.write_mp4(folder / f"{name}_{part}.mp4", v, fps) for part, v in alone.items()}
    return {"clip": motion.name, "video": str(beside), "result": str(paths["result"])}


def pixels(video) -> np.ndarray:
    """float [..., F, 3, H, W] in -1..1 → uint8 RGB [..., F, H, W, 3]."""
    return ((video.clamp(-1, 1) + 1) * 127.5).round().byte().movedim(-3, -1).cpu().numpy()
