"""Conditional Entropy Inflation: how much a prediction's entropy grows when a block is skipped (Ent-Prog §3.2).

    π(b) = mean over c of log( σ_skip(b)(ε̂) / σ(ε̂) )          (Gaussian approximation of ΔH(b, c))

σ is taken per condition c, over the elements of ε̂ and draws of (τ, ε); the draws are the same for every block.
A second estimator, the diagonal-Gaussian entropy (mean over elements of log σ per element), and the loss increase
on skip come out of the same passes.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from entprog.blocks import Block, bypass, execution_order, replaced, skipped
from entprog.config import Priority, Timesteps
from entprog.data.clips import Latents
from entprog.diffusion import objectives
from entprog.diffusion.denoiser import Denoiser
from entprog.scoring import tables
from entprog.scoring.tables import Predict, Row, ScoreTable


def cei(
    denoiser: Denoiser,
    blocks: Sequence[Block],
    conditions: Sequence[Latents],
    settings: Priority,
    *,
    key: str = "",
    seed: int = 0,
    law: Timesteps = Timesteps(),
    replay: bool = True,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> ScoreTable:
    """Score every block once, by π or (`settings.kind` "loss_increase") by the loss increase on skip.

    conditions: batches of clips; every clip is one condition c, its clean latents
    the x_0 of its draws, which run in batches as large as the first of these. With several ranks each scores its share
    of the conditions and all get the whole table. law: of the timesteps drawn, as in training.
    replay: the full forward records each block's output; a skip pass returns the recorded ones for the blocks before b
    and computes only what follows: equal bits, about half the forwards' cost.

    Raises ValueError if there are fewer clips than `settings.conditions`.
    """
    score = partial(
        _score_condition, denoiser, blocks, settings=settings, seed=seed, law=law,
        at_once=len(conditions[0].position), replay=replay,
    )  # fmt: skip
    measure = "loss" if settings.kind == "loss_increase" else settings.estimator
    found = tables.measured(score, conditions, settings, measure, progress)
    per_condition = {name: np.stack([row[name][-1] for row in found.rows]) for name in ("std", "elementwise", "loss")}
    means = {name: values.mean(0) for name, values in per_condition.items()}
    loss_error = tables.std_error(per_condition["loss"])
    pi, losses = means[settings.estimator], means["loss"]
    return tables.table(
        blocks,
        found,
        settings,
        measure,
        key=key,
        others=lambda i: {
            "pi_std": float(means["std"][i]),
            "pi_elementwise": float(means["elementwise"][i]),
            "loss_increase": float(losses[i]),
            "loss_std_error": float(loss_error[i]),
        },
        signed_absolute_tau=tables.tau(pi, np.abs(pi)),
        loss_tau={"signed": tables.tau(pi, losses), "absolute": tables.tau(np.abs(pi), losses)},
    )


@dataclass(frozen=True)
class Draws:
    """Some draws of one condition: inputs and target of the network."""

    noisy: torch.Tensor
    """x_τ, float [B, C, F', H', W']."""
    t: torch.Tensor
    """τ, float [B]."""
    conditions: dict[str, torch.Tensor]
    target: torch.Tensor
    """What the network should predict, float [B, C, F', H', W']."""
    weights: torch.Tensor | None
    """What each draw's loss counts, float [B]; None: all alike."""


def draws(
    denoiser: Denoiser,
    clip: Latents,
    number: int,
    count: int,
    settings: Priority,
    seed: int,
    law: Timesteps,
    at_once: int,
) -> Iterator[Draws]:
    """The first `count` draws of condition `number`, in batches of `at_once` at most.

    Draws are numbered over all conditions, so that adding conditions changes none of the earlier ones.
    """
    begin, end = denoiser.time_range
    low, high = max(settings.timestep_range[0], begin), min(settings.timestep_range[1], end)
    process = denoiser.process
    draw_seed = seed * 1_000_003 + settings.seed
    for numbers in (torch.arange(count) + number * settings.draws).split(at_once):
        clean = clip.clean.expand(len(numbers), *clip.clean.shape[1:])
        drawn = objectives.timesteps(numbers, draw_seed, law, between=(begin, end)).to(clean.device)
        t = low + (high - low) * ((drawn - begin) / (end - begin))
        noisy, target = process.pair(clean, objectives.noise_like(clean, numbers, draw_seed), t)
        conditions = {name: value.expand(len(numbers), *value.shape[1:]) for name, value in clip.conditions.items()}
        yield Draws(noisy, t, conditions, target, objectives.weights(process, t, law))


class _Moments:
    """Sums over draws: of ε̂ and its square per element, and of the loss."""

    def __init__(self):
        self.n, self.sum, self.squares, self.loss = 0, 0.0, 0.0, 0.0

    def add(self, prediction: torch.Tensor, loss: torch.Tensor) -> None:
        """Add one draw's prediction and loss."""
        x = prediction.double()
        self.n += 1
        self.sum = self.sum + x
        self.squares = self.squares + x.square()
        self.loss = self.loss + loss.double()

    def measures(self) -> torch.Tensor:
        """[3]: log σ over all elements and draws, mean over elements of log σ over draws, mean loss."""
        mean, square = self.sum / self.n, self.squares / self.n
        std = 0.5 * torch.log(square.mean() - mean.mean() ** 2)
        elementwise = 0.5 * torch.log((square - mean**2).clamp_min(1e-20)).mean()
        return torch.stack([std, elementwise, self.loss / self.n])


@torch.no_grad()
def _score_condition(
    denoiser: Denoiser,
    blocks: Sequence[Block],
    clip: Latents,
    number: int,
    marks: Sequence[int],
    *,
    settings: Priority,
    seed: int,
    law: Timesteps,
    at_once: int,
    replay: bool,
) -> Row:
    """Log-ratios of both estimators and loss increases of one condition, each [mark, block]."""
    moments = [_Moments() for _ in range(len(blocks) + 1)]  # the whole network's first
    noted: dict[int, list[torch.Tensor]] = {mark: [] for mark in marks}
    for batch in draws(denoiser, clip, number, marks[-1], settings, seed, law, at_once):
        passes = _skip_passes(lambda b=batch: denoiser.predict(b.noisy, b.t, b.conditions), blocks, replay)
        for kept, predictions in zip(moments, passes, strict=True):
            losses = objectives.loss(predictions, batch.target, batch.weights, denoiser.given(batch.conditions))
            for prediction, loss in zip(predictions, losses, strict=True):
                kept.add(prediction, loss)
                if kept.n in noted:
                    noted[kept.n].append(kept.measures())
    table = torch.stack([torch.stack(noted[mark]) for mark in marks]).cpu().numpy()  # [mark, 1 + block, measure]
    ratios = table[:, 1:] - table[:, :1]
    return {name: ratios[..., i] for i, name in enumerate(("std", "elementwise", "loss"))}


def _skip_passes(run: Callable[[], torch.Tensor], blocks: Sequence[Block], replay: bool) -> Iterator[torch.Tensor]:
    """ε̂ of the whole network, then of the network without each block in turn."""
    if not replay:
        yield run()
        for block in blocks:
            with skipped(block):
                yield run()
        return
    recorded: dict[nn.Module, Any] = {}

    def recording(module: nn.Module):
        original = module.forward

        def forward(*args, **kwargs):
            recorded[module] = original(*args, **kwargs)
            return recorded[module]

        return forward

    with replaced({block.module: recording(block.module) for block in blocks}):
        yield run()
    order = list(recorded)  # as they ran
    for block in blocks:
        before = order[: order.index(block.module)]
        stand_ins = {m: (lambda *args, m=m, **kwargs: recorded[m]) for m in before}
        stand_ins[block.module] = lambda *args, m=block.module, **kwargs: bypass(m, *args, **kwargs)
        with replaced(stand_ins):
            yield run()


def blocks_in_order(blocks: Sequence[Block], predict: Predict, clip: Latents) -> list[Block]:
    """The blocks in execution order, found by one forward pass."""
    t = torch.full((len(clip.position),), 0.5, device=clip.clean.device)
    return execution_order(blocks, lambda: predict(clip.clean, t, clip.conditions))
