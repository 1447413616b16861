"""Clips made by a network, beside what they were made from: mp4s and a contact sheet."""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from entprog import sampling
from entprog.clips import Clips
from entprog.config import ClipShape, Generate
from entprog.media import color, sheet, skeleton
from entprog.media import video as videos
from entprog.models import Denoiser
from pipelines import jobs


@dataclass(frozen=True)
class Motion:
    """What one clip is to show, at the checkpoint's clip shape."""

    name: str
    reference: np.ndarray
    """uint8 RGB [H, W, 3]: who."""
    pose: np.ndarray
    """float32 [F, 33, 3]: how they move."""
    video: np.ndarray | None
    """uint8 RGB [F, H, W, 3]: the clip that the pose was taken from, if there is one."""
    video_title: str = "ground truth"


def motions_of(clips: Clips, names: Sequence[str]) -> list[Motion]:
    """A batch of clips as motions whose truth is known."""
    truth = pixels(color.yuv420_to_rgb(clips.video))
    rows = zip(names, clips.reference.cpu().numpy(), clips.pose.cpu().numpy(), truth, strict=True)
    return [Motion(*row) for row in rows]


def render(
    denoiser: Denoiser,
    motions: Sequence[Motion],
    shape: ClipShape,
    output: Path,
    settings: Generate,
    shift: float | None,
) -> tuple[list[dict[str, str]], Path]:
    """Sample every motion and write it: a record each (`clip`, `video` side by side, `result` alone), contact sheet.

    Pose and truth lie beside the result on their own too, for other runs' results to be shown with.
    """
    folder = output / "videos"
    records, rows = [], []
    started = time.time()
    for first in range(0, len(motions), settings.batch_size):
        batch = motions[first : first + settings.batch_size]
        conditions = denoiser.condition(
            torch.from_numpy(np.stack([motion.reference for motion in batch])),
            torch.from_numpy(np.stack([motion.pose for motion in batch])),
        )
        size = (len(batch), *denoiser.latent_shape(shape))
        latents = sampling.sample(
            denoiser, conditions, size, settings.steps, settings.seed, settings.guidance, shift, first=first
        )
        made = pixels(denoiser.decode(latents))
        for i, (motion, result) in enumerate(zip(batch, made, strict=True), first):
            drawn = pixels(skeleton.draw(torch.from_numpy(motion.pose), shape.height, shape.width))
            still = np.broadcast_to(motion.reference, result.shape)
            parts = [("reference", still), ("pose", drawn), ("result", result)]
            if motion.video is not None:
                parts.append((motion.video_title, motion.video))
            name = f"{i:03d}_{re.sub(r'[^A-Za-z0-9.-]+', '_', motion.name)[:80]}"
            beside = videos.write_mp4(folder / f"{name}.mp4", sheet.side_by_side(parts), shape.fps)
            alone = {"pose": drawn, "result": result} | ({} if motion.video is None else {"truth": motion.video})
            paths = {part: videos.write_mp4(folder / f"{name}_{part}.mp4", v, shape.fps) for part, v in alone.items()}
            records.append({"clip": motion.name, "video": str(beside), "result": str(paths["result"])})
            rows += [(f"{motion.name}: {title}", frames) for title, frames in parts[1:]]
        done = first + len(batch)
        rate = done / (time.time() - started)
        jobs.console.print(f"{done}/{len(motions)} clips, {rate:.2f} clips/s, ETA {(len(motions) - done) / rate:.0f} s")
    return records, sheet.contact_sheet(rows, output / "sheet.png")


def pixels(video) -> np.ndarray:
    """float [..., F, 3, H, W] in -1..1 → uint8 RGB [..., F, H, W, 3]."""
    return ((video.clamp(-1, 1) + 1) * 127.5).round().byte().movedim(-3, -1).cpu().numpy()
