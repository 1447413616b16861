"""Losses of a denoiser on batches of latents: what a step minimises, and what held-out clips say."""

from collections.abc import Sequence

import torch

from entprog.config import Timesteps, Train
from entprog.data.clips import Latents
from entprog.diffusion import dropping, objectives, regions
from entprog.diffusion.denoiser import Denoiser
from entprog.diffusion.idle import idle_pass
from entprog.distributed import agree, fsdp


def training_loss(denoiser: Denoiser, batch: Latents, train: Train, law: Timesteps = Timesteps()) -> torch.Tensor:
    """Mean loss of a batch, scalar, at the timesteps and noise that its clips' positions stand for, some of the clips
    without a condition (`train.drop`), faces and hands counting as `train` says. law: of the timesteps
    (`Experiment.timesteps_at`).
    """
    t = objectives.timesteps(batch.position, train.seed, law, between=denoiser.time_range)
    shown = dropping.dropped(denoiser, batch, train.drop, train.seed)
    within = regions.weights(batch, train)
    return clip_losses(denoiser, shown, batch.position, t, train.seed, law, within).mean()


def held_out_loss(
    denoiser: Denoiser,
    held_out: Sequence[Latents],
    draws: int,
    seed: int,
    law: Timesteps = Timesteps(),
    own: slice = slice(None),
    spare: Latents | None = None,
) -> float:
    """ℓ: mean loss over all ranks' held-out clips at fixed timesteps and noise.

    Timesteps are quantiles of training's law: `draws` strata per clip, moved on from clip to clip by the golden ratio.
    The first clip has the lower end of each, so that their mean is below the law's: less, the more draws and clips
    there are, and the same for all runs. What counts is the loss that training minimises, without weights of faces
    and hands. own: which of a clip's draws are this rank's. spare: any batch, where the network is sharded and ranks
    may have no held-out clip: all of them take part in every forward pass, each in equally many.
    """
    summed, clips, between = 0.0, 0, denoiser.time_range
    begin, end = between
    margin = 0.02 * (end - begin)  # at the very ends a prediction says little
    turns = [(batch, draw) for batch in held_out for draw in range(draws)[own]]
    sharded, idle_turns = fsdp.is_sharded(denoiser.network), 0
    if sharded:
        idle_turns = int(agree.largest_of([len(turns)], spare.clean.device)[0]) - len(turns)
    with torch.no_grad():
        for batch, draw in turns:
            numbers = batch.position * 1009 + draw
            even = (draw + (batch.position * 0.6180339887) % 1) / draws
            t = objectives.quantiles(even, law, between).clamp(begin + margin, end - margin)
            losses = clip_losses(denoiser, batch, numbers, t, seed, law)
            summed += losses.double().sum()  # read once, at the end: the device is not waited for at every pass
            clips += len(losses)
        for _ in range(idle_turns):
            idle_pass(denoiser, spare)
    if sharded:
        fsdp.in_parts(denoiser.network)
    losses, clips = agree.total([float(summed), float(clips)])
    return losses / clips


def clip_losses(
    denoiser: Denoiser,
    batch: Latents,
    numbers: torch.Tensor,
    t: torch.Tensor,
    seed: int,
    law: Timesteps = Timesteps(),
    within: torch.Tensor | None = None,
) -> torch.Tensor:
    """Loss of each clip, [B], at timesteps t with the noise that (numbers, seed) stand for, weighted by the law.

    within: what each latent counts (`regions.weights`)."""
    t = t.to(batch.clean.device, torch.float32)
    noise = objectives.noise_like(batch.clean, numbers, seed)
    noisy, target = denoiser.process.pair(batch.clean, noise, t)
    prediction = denoiser.predict(noisy, t, batch.conditions)
    given = denoiser.given(batch.conditions)
    return objectives.loss(prediction, target, objectives.weights(denoiser.process, t, law), given, within)
