"""Shards of real clips, as prepare writes them, made in a second and without a pose network."""

import io

import numpy as np
from PIL import Image

from entprog.config import ClipShape
from entprog.data import shards
from entprog.media import assets, h264, video


def row(source: str, split: str, start_s: float, shape: ClipShape) -> dict:
    """A clip of a real video as prepare writes it; its pose is random."""
    times = video.clip_times(start_s, shape.frames, shape.fps)
    frames, _ = video.read_frames(assets.clip(source), times, size=(shape.height, shape.width))
    png = io.BytesIO()
    Image.fromarray(frames[0]).save(png, "PNG")
    sizes = {"height": shape.height, "width": shape.width}
    rng = np.random.default_rng(int(start_s * 1000))
    return {
        "clip_id": f"{source}-{start_s:.3f}", "source": f"{source}.mp4", "source_sha256": "0" * 64, "split": split,
        "caption": "", "start_s": start_s, "fps": shape.fps, "frames": shape.frames, **sizes,
        **{f"source_{k}": v for k, v in sizes.items()}, **{f"crop_{k}": v for k, v in sizes.items()},
        "crop_left": 0, "crop_top": 0, "visibility": 1.0, "reference_s": start_s, "reference": png.getvalue(),
        "pose": rng.random((shape.frames, shards.POINTS, 3), np.float32), "video": h264.encode(frames, shape.fps),
    }  # fmt: skip


def write(folder, splits: dict[str, list[list[dict]]], shape: ClipShape) -> shards.Dataset:
    """splits: {split: [[row, …] for each shard]}."""
    infos = {
        split: [shards.write_shard(folder, f"{split}/{i:05d}.parquet", rows, shape) for i, rows in enumerate(files)]
        for split, files in splits.items()
    }
    return shards.write_dataset(folder, shape, infos, {})
