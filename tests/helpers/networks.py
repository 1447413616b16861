"""Tiny real networks, their settings, and latents for them."""

import itertools

import numpy as np
import torch

from entprog import config, models
from entprog.data import clip_stream
from entprog.data.clips import Latents

TINY = {
    "patch_size": [1, 4, 4],
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "out_channels": 3,
    "text_dim": 8,
    "freq_dim": 16,
    "ffn_dim": 64,
    "num_layers": 6,
    "cross_attn_norm": True,
    "rope_max_seq_len": 32,
}


SHAPE = config.ClipShape(frames=2, height=16, width=16, fps=8)


def tiny_experiment(**parts) -> config.Experiment:
    """A few steps on a tiny Wan network; `parts` are nested settings over that."""
    values = {
        "model": {"init": TINY, "vae": "none"},
        "data": {"shape": SHAPE.model_dump(), "batch_size": 2, "held_out_clips": 4, "held_out_draws": 2},
        "train": {"steps": 24, "learning_rate": 1e-3, "held_out_every": 8, "threads": 1},
        "priority": {"conditions": 2, "draws": 4},
        "schedule": {
            "kind": "entprog",
            "stages": 2,
            "candidates": [0.34, 1.0],
            "search_steps": 2,
            "search_share": 0.9,
            "clock": "flops",
        },
    }
    return config.build(config.merge(values, parts))


def tiny_denoiser(experiment: config.Experiment, seed: int = 0):
    return models.family("wan").load(experiment.model, "cpu", seed)


def bfloat16_base(experiment: config.Experiment, folder) -> None:
    """Leave a base whose float32 numbers bfloat16 holds, as those of published ones."""
    denoiser = tiny_denoiser(experiment)
    with torch.no_grad():
        for parameter in denoiser.network.parameters():
            parameter.copy_(parameter.bfloat16())
    denoiser.save(folder, shape=SHAPE)


def latents(positions, conditions=("reference", "pose"), shape=SHAPE) -> Latents:
    """Latents that are a function of their position, as the stream's are: smooth blobs, moving. shape: of fewer frames
    than SHAPE's, if any."""
    positions = torch.as_tensor(positions)
    clean = []
    for position in positions.tolist():
        g = torch.Generator().manual_seed(position % 7)
        clean.append(torch.nn.functional.interpolate(torch.randn(3, 2, 4, 4, generator=g), size=(16, 16)))
    clean = torch.stack(clean).clamp(-1, 1)[:, :, : shape.frames]
    return Latents(clean, {name: clean.roll(1 + i, -1) for i, name in enumerate(conditions)}, positions)


def batches(experiment: config.Experiment, rank: int = 0, world: int = 1):
    """The run's sequence of clips, cut for one rank."""
    train = experiment.train

    def open_at(shape, position):
        size = experiment.batch_size_at(shape)
        for first in itertools.count(0, size):
            rows = np.arange(first, first + size)
            of_update = train.workers * train.accumulate
            positions = clip_stream.rank_positions(rows, position, size, rank, world, of_update)
            yield latents(positions.tolist(), experiment.model.conditions, shape)

    return open_at
