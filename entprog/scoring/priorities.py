"""Other priorities behind CEI's signature: what CEI has to beat at equal cost.

loss_increase   how much the loss grows when the block is skipped (CEI's own passes)
reverse_cei     CEI, lowest first
gradient        norm of the loss's gradient to what of the block may be trained: its weights, or its adapters
fisher          diagonal of the empirical Fisher information: mean squared gradient of single draws
random          a seeded order
depth_first     the network's first blocks first; depth_last: its last blocks first
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import nn

from entprog.blocks import Block, replaced, trainable
from entprog.config import Priority, Timesteps
from entprog.cost import counting
from entprog.data.clips import Latents
from entprog.diffusion import objectives
from entprog.diffusion.denoiser import Denoiser
from entprog.distributed import agree, fsdp
from entprog.scoring import tables
from entprog.scoring.cei import cei, draws
from entprog.scoring.tables import BlockScore, Row, ScoreTable


class PriorityFunction(Protocol):
    """What every `priority.kind` is: the same on every rank, and for the same arguments."""

    def __call__(
        self,
        denoiser: Denoiser,
        blocks: Sequence[Block],
        conditions: Sequence[Latents],
        settings: Priority,
        *,
        key: str = "",
        seed: int = 0,
        law: Timesteps = Timesteps(),
        progress: Callable[[int, int], None] = lambda done, of: None,
    ) -> ScoreTable: ...


def score(
    denoiser: Denoiser,
    blocks: Sequence[Block],
    conditions: Sequence[Latents],
    settings: Priority,
    *,
    key: str = "",
    seed: int = 0,
    law: Timesteps = Timesteps(),
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> ScoreTable:
    """Score the blocks (in the network's order) by `settings.kind`; leaves the network as it was.

    Arguments as of `cei.cei`. conditions may be empty for the kinds that look at no data (`WITHOUT_DATA`).
    """
    return KINDS[settings.kind](denoiser, blocks, conditions, settings, key=key, seed=seed, law=law, progress=progress)


def gradient(
    denoiser: Denoiser,
    blocks: Sequence[Block],
    conditions: Sequence[Latents],
    settings: Priority,
    *,
    key: str = "",
    seed: int = 0,
    law: Timesteps = Timesteps(),
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> ScoreTable:
    """Mean over conditions of ‖∂ℓ_c/∂ω_b‖, or (`settings.kind` "fisher") the mean over draws and weights of (∂ℓ/∂w)².
    Of a block with adapters ω_b is these alone.

    ℓ_c is the mean loss over a condition's draws. Gradient crosses every block exactly, whatever is frozen now. Each
    rank takes its share of the conditions, and all get the mean over all of them: what is summed over a condition's
    draws is as large as the network, so draws are not shared. Of a sharded network every rank goes through every
    condition, and holds its part of the gradients alone.
    """
    measure = settings.kind
    clip = tables.one_by_one(conditions, settings)
    one = partial(_gradients_of_condition, denoiser, blocks, settings=settings, seed=seed, law=law, measure=measure)

    def score(numbers: range) -> list[Row]:
        rank, ranks = agree.world()
        if fsdp.is_sharded(denoiser.network):
            rows = []
            for number in numbers:
                rows.append(one(clip(number), number, tables.marks(settings)))
                progress(number + 1, settings.conditions)
            return rows
        mine = {}
        for number in numbers[rank::ranks]:
            mine[number] = one(clip(number), number, tables.marks(settings))
            progress(number + 1, settings.conditions)
        everyone = {number: row for part in agree.gathered(mine) for number, row in part.items()}
        return [everyone[number] for number in numbers]

    def begin():
        with counting.flop_counter() as counter:  # FLOPs are the same for every draw: one is counted
            one(clip(0), 0, [1])
        return counter.get_total_flops(), score

    with _differentiable(denoiser.network, blocks):
        found = tables.measured(begin, settings, measure, clip(0).clean.device)
    return tables.table(blocks, found, settings, measure, key=key)


@contextmanager
def _differentiable(network: nn.Module, blocks: Sequence[Block]) -> Iterator[None]:
    """Every block with its own forward and what is trained of it requiring gradient, of a sharded network nothing else;
    on leaving, everything is as it was, but blocks in parts are brought together in every backward pass until a plan is
    put in force."""
    fsdp.in_parts(network)
    before = [(p, p.requires_grad) for block in blocks for p in block.module.parameters()]
    if fsdp.is_sharded(network):
        before = [(p, p.requires_grad) for p in network.parameters()]
        network.requires_grad_(False)
        fsdp.spare_frozen(blocks, [block.name for block in blocks], "exact")
    own = {block.module: type(block.module).forward.__get__(block.module) for block in blocks}
    try:
        for parameter in (p for block in blocks for p in trainable(block.module)):
            parameter.requires_grad_(True)
        fsdp.notice_thawed(blocks)
        with replaced(own), torch.enable_grad():
            yield
    finally:
        fsdp.in_parts(network)
        for parameter, required in before:
            parameter.requires_grad_(required)


def _gradients_of_condition(
    denoiser: Denoiser,
    blocks: Sequence[Block],
    clip: Latents,
    number: int,
    marks: Sequence[int],
    *,
    settings: Priority,
    seed: int,
    law: Timesteps,
    measure: str,
) -> Row:
    """One condition's gradient norms, or its mean squared gradients, [mark, block]. One draw at a time."""
    weights = [trainable(block.module) for block in blocks]
    sizes = torch.tensor([sum(p.numel() for p in group) for group in weights], dtype=torch.float64)
    summed: list[torch.Tensor | None] = [None] * sum(map(len, weights))
    squares = torch.zeros(len(blocks), dtype=torch.float64)
    noted = {}
    for done, draw in enumerate(draws(denoiser, clip, number, range(marks[-1]), settings, seed, law, at_once=1), 1):
        prediction, given = denoiser.predict(draw.noisy, draw.t, draw.conditions), denoiser.given(draw.conditions)
        loss = objectives.loss(prediction, draw.target, draw.weights, given).sum()
        gradients = _gradients(loss, [p for group in weights for p in group], fsdp.is_sharded(denoiser.network))
        gradients = [None if g is None else g.float() for g in gradients]  # of weights stored in bfloat16
        if measure == "fisher":
            squares += _squares(gradients, weights, denoiser.network)
        else:
            summed = [a if b is None else b if a is None else a + b for a, b in zip(summed, gradients, strict=True)]
        if done in marks and measure == "fisher":
            noted[done] = squares / sizes / done
        elif done in marks:
            noted[done] = _squares(summed, weights, denoiser.network).sqrt() / done
    return {measure: torch.stack([noted[mark] for mark in marks]).numpy()}


def _gradients(loss: torch.Tensor, weights: Sequence[torch.Tensor], sharded: bool) -> Sequence[torch.Tensor | None]:
    """The loss's gradient to each of the weights; None where it does not depend on them. sharded: this rank's parts of
    the mean over ranks, which all have the same loss."""
    if not sharded:
        return torch.autograd.grad(loss, weights, allow_unused=True)
    loss.backward()
    gradients = [None if weight.grad is None else fsdp.held(weight.grad) for weight in weights]
    for weight in weights:
        weight.grad = None
    return gradients


def _squares(
    gradients: Sequence[torch.Tensor | None], weights: Sequence[Sequence[torch.Tensor]], network: nn.Module
) -> torch.Tensor:
    """Sum of squares of each block's gradients, float64 [block] on the CPU; None is zero. Of a sharded network they are
    given in parts."""
    rest = iter(gradients)
    sums = []
    for group in weights:
        norms = [torch.linalg.vector_norm(g, dtype=torch.float64) for g in (next(rest) for _ in group) if g is not None]
        sums.append(torch.stack(norms).square().sum() if norms else torch.zeros((), dtype=torch.float64))
    values = torch.stack([value.cpu() for value in sums])
    if not fsdp.is_sharded(network):
        return values
    return torch.tensor(agree.total(values.tolist()), dtype=torch.float64) / fsdp.replicas(network)


def _ordered(order: Callable[[int, int], np.ndarray]) -> PriorityFunction:
    """A priority that looks at no data: order(number of blocks, seed) → their scores."""

    def scored(denoiser, blocks, conditions, settings, *, key="", seed=0, law=None, progress=None) -> ScoreTable:
        values = order(len(blocks), seed * 1_000_003 + settings.seed)
        return ScoreTable(
            key=key,
            kind=settings.kind,
            estimator=settings.estimator,
            blocks=tuple(
                BlockScore(name=block.name, score=float(value), std_error=0.0)
                for block, value in zip(blocks, values, strict=True)
            ),
            conditions=0,
            draws=0,
            halves_tau=1.0,
            tau_at={},
        )

    return scored


KINDS: dict[str, PriorityFunction] = {
    "cei": cei,
    "reverse_cei": cei,
    "loss_increase": cei,
    "gradient": gradient,
    "fisher": gradient,
    "random": _ordered(lambda n, seed: 1 + np.random.default_rng(seed).permutation(n)),
    "depth_first": _ordered(lambda n, seed: np.arange(n, 0, -1)),
    "depth_last": _ordered(lambda n, seed: np.arange(1, n + 1)),
}
"""`priority.kind` → its function."""

WITHOUT_DATA = ("random", "depth_first", "depth_last")
"""Kinds that need no conditions."""
