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
from torch.utils._pytree import tree_leaves

from entprog.blocks import Block, bypass, execution_order, replaced
from entprog.config import Priority, Timesteps
from entprog.cost import counting
from entprog.data.clips import Latents
from entprog.diffusion import objectives
from entprog.diffusion.denoiser import Denoiser
from entprog.diffusion.idle import idle_pass
from entprog.distributed import agree, fsdp
from entprog.scoring import split, tables
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
    the x_0 of its draws, which run in batches as large as the first of these. Ranks share conditions, draws and blocks
    (`split`), and all get the whole table, with the same bits however many they are. law: of the timesteps drawn, as in
    training. replay: one forward records each block's output; a skip pass returns the recorded ones for the blocks
    before b and computes only what follows: equal bits, about half the forwards' cost; not where a rank's GPU has no
    room for so many outputs, where the FLOPs of replayed passes are counted all the same. progress: gets (conditions
    that this rank's share of the work amounts to so far, conditions).

    Raises ValueError if there are fewer clips than `settings.conditions`.
    """
    measure = "loss" if settings.kind == "loss_increase" else settings.estimator
    clip, at_once = tables.one_by_one(conditions, settings), len(conditions[0].position)

    def begin():
        passes = counted(denoiser, blocks, clip(0), settings, seed, law)
        replays = replay and _fits(min(at_once, settings.draws) * passes.outputs_bytes, clip(0).clean.device)
        score = partial(
            _score, denoiser, blocks, passes, clip, settings=settings, seed=seed, law=law, at_once=at_once,
            replay=replays, progress=progress,
        )  # fmt: skip
        return passes.flops(replay), score  # a budget of FLOPs must not hang on what a GPU has free

    found = tables.measured(begin, settings, measure, clip(0).clean.device)
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
    wanted: range,
    settings: Priority,
    seed: int,
    law: Timesteps,
    at_once: int,
) -> Iterator[Draws]:
    """Some of the draws of condition `number`, in batches of `at_once` at most.

    Draws are numbered over all conditions, so that adding conditions changes none of the earlier ones.
    """
    begin, end = denoiser.time_range
    low, high = max(settings.timestep_range[0], begin), min(settings.timestep_range[1], end)
    process = denoiser.process
    draw_seed = seed * 1_000_003 + settings.seed
    for numbers in (torch.arange(wanted.start, wanted.stop) + number * settings.draws).split(at_once):
        clean = clip.clean.expand(len(numbers), *clip.clean.shape[1:])
        drawn = objectives.timesteps(numbers, draw_seed, law, between=(begin, end)).to(clean.device)
        t = low + (high - low) * ((drawn - begin) / (end - begin))
        noisy, target = process.pair(clean, objectives.noise_like(clean, numbers, draw_seed), t)
        conditions = {name: value.expand(len(numbers), *value.shape[1:]) for name, value in clip.conditions.items()}
        yield Draws(noisy, t, conditions, target, objectives.weights(process, t, law))


@dataclass(frozen=True)
class Passes:
    """What a network's passes run, and their FLOPs for one draw."""

    order: list[Block]
    """Blocks as they are run."""
    costs: split.Costs
    bypasses: int
    """FLOPs of all blocks' bypasses: shortcuts that compute."""
    outputs_bytes: int
    """Of what all blocks give for one draw."""

    def flops(self, replay: bool) -> int:
        """Of all passes of a draw."""
        blocks, outside = self.costs.blocks, self.costs.outside
        if replay:
            return self.costs.of(range(len(blocks) + 1)) + self.bypasses
        return len(blocks) * (outside + sum(blocks)) + outside + self.bypasses


def counted(
    denoiser: Denoiser, blocks: Sequence[Block], clip: Latents, settings: Priority, seed: int, law: Timesteps
) -> Passes:
    """By one forward of one draw: FLOPs are the same for every draw. The same on every rank."""
    own: dict[str, int] = {}
    bypasses = outputs_bytes = 0

    def counting_its(block: Block):
        original = block.module.forward

        def forward(*args, **kwargs):
            nonlocal bypasses, outputs_bytes
            before = counter.get_total_flops()
            out = original(*args, **kwargs)
            between = counter.get_total_flops()
            bypass(block.module, *args, **kwargs)
            outputs_bytes += sum(leaf.nbytes for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor))
            own[block.name] = own.get(block.name, 0) + between - before
            bypasses += counter.get_total_flops() - between
            return out

        return forward

    (one,) = draws(denoiser, clip, 0, range(1), settings, seed, law, at_once=1)
    forwards = {block.module: counting_its(block) for block in blocks}
    with torch.no_grad(), counting.flop_counter() as counter, replaced(forwards):
        denoiser.predict(one.noisy, one.t, one.conditions)
    outside = counter.get_total_flops() - bypasses - sum(own.values())
    named = {block.name: block for block in blocks}
    costs, outside = agree.of_first(lambda: (list(own.values()), outside))  # no rank may cut elsewhere than the others
    return Passes([named[name] for name in own], split.Costs(tuple(costs), outside), bypasses, outputs_bytes)


def _fits(outputs_bytes: int, device: torch.device) -> bool:
    """Whether every rank's device has room for them, and a third of that for what a forward pass takes beside."""
    free = free_bytes(device)
    return free is None or not agree.total([float(outputs_bytes * 4 > free * 3)])[0]


def free_bytes(device: torch.device) -> int | None:
    """What a GPU has left for this process; None: it is a CPU, whose outputs lie beside all else."""
    if device.type != "cuda":
        return None
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


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

    def join(self, later: "_Moments") -> None:
        """Add the sums over the draws that follow."""
        self.n += later.n
        self.sum, self.squares = self.sum + later.sum, self.squares + later.squares
        self.loss = self.loss + later.loss

    def measures(self) -> torch.Tensor:
        """[3]: log σ over all elements and draws, mean over elements of log σ over draws, mean loss."""
        mean, square = self.sum / self.n, self.squares / self.n
        std = 0.5 * torch.log(square.mean() - mean.mean() ** 2)
        elementwise = 0.5 * torch.log((square - mean**2).clamp_min(1e-20)).mean()
        return torch.stack([std, elementwise, self.loss / self.n])

    def packed(self) -> torch.Tensor:
        """All sums in one tensor, float64."""
        return torch.cat([self.sum.flatten(), self.squares.flatten(), self.loss.flatten()])

    def unpacked(self, packed: torch.Tensor, n: int) -> "_Moments":
        """Those of n draws, of the same shape as these, that `packed` gave."""
        out, elements = _Moments(), self.sum.numel()
        out.n, out.loss = n, packed[-1].view_as(self.loss)
        out.sum, out.squares = (part.view_as(self.sum) for part in packed[:-1].split(elements))
        return out


@torch.no_grad()
def _score(
    denoiser: Denoiser,
    blocks: Sequence[Block],
    passes: Passes,
    clip: Callable[[int], Latents],
    numbers: range,
    *,
    settings: Priority,
    seed: int,
    law: Timesteps,
    at_once: int,
    replay: bool,
    progress: Callable[[int, int], None],
) -> list[Row]:
    """Log-ratios of both estimators and loss increases of some conditions, each [mark, block]; the same on every rank.

    Sums over draws are those over a piece's draws, added up in the order of pieces: by the rank that has the first
    piece, which gets those of the others.
    """
    rank, ranks = agree.world()
    marks = tables.marks(settings)
    cut = split.pieces(settings.draws, at_once, marks)
    parts = split.shared(numbers, cut, passes.costs, ranks)
    sums: dict[tuple[int, int], _Moments] = {}
    """(condition, place of a pass) → sums so far, where this rank has the first piece."""
    others: dict[tuple[int, int, int], torch.Tensor] = {}
    """(condition, place, piece) → sums of a piece, packed, for the rank that has the first."""
    noted: dict[tuple[int, int], list[torch.Tensor]] = {}

    def take(condition: int, place: int, piece: int, moments: _Moments) -> None:
        key = condition, place
        if piece == 0:
            sums[key] = moments
        else:
            sums[key].join(moments)
        if cut[piece].stop in marks:
            noted.setdefault(key, []).append(sums[key].measures())
        if cut[piece].stop == settings.draws:
            del sums[key]

    todo, done = sum(part.forwards for part in parts[rank]), 0
    for part in parts[rank]:
        given = clip(part.condition)
        found = {place: _Moments() for place in part.places}
        for batch in draws(denoiser, given, part.condition, part.draws, settings, seed, law, at_once):
            run = partial(denoiser.predict, batch.noisy, batch.t, batch.conditions)
            for place, predictions in _skip_passes(run, passes.order, part.places, replay):
                losses = objectives.loss(predictions, batch.target, batch.weights, denoiser.given(batch.conditions))
                for prediction, loss in zip(predictions, losses, strict=True):
                    found[place].add(prediction, loss)
        for place, moments in found.items():
            if part.piece == 0 or (part.condition, place) in sums:  # none before it lies elsewhere
                take(part.condition, place, part.piece, moments)
            else:
                others[part.condition, place, part.piece] = moments.packed().cpu()
        done += part.forwards
        progress(numbers.start + len(numbers) * done // todo, settings.conditions)
    if fsdp.is_sharded(denoiser.network):  # every pass brings weights together: all ranks take part in each
        passed = [sum(len(part.places) * -(-len(part.draws) // at_once) for part in own) for own in parts]
        for _ in range(max(passed) - passed[rank]):
            idle_pass(denoiser, clip(0))
        fsdp.in_parts(denoiser.network)

    for condition, place, piece, holder, owner in split.handed_over(parts):
        if rank == holder:
            agree.send(others.pop((condition, place, piece)), owner)
        elif rank == owner:
            so_far = sums[condition, place]
            packed = agree.received(so_far.packed(), holder)
            take(condition, place, piece, so_far.unpacked(packed, len(cut[piece])))
    mine = {key: torch.stack(measures).cpu().numpy() for key, measures in noted.items()}
    everyone = {key: values for part in agree.gathered(mine) for key, values in part.items()}
    places = [passes.order.index(block) for block in blocks]
    return [_row(everyone, condition, places, len(passes.order)) for condition in numbers]


def _row(measures: dict[tuple[int, int], np.ndarray], condition: int, places: Sequence[int], whole: int) -> Row:
    """A condition's row, of every pass's [mark, measure]; places: of the table's blocks."""
    table = np.stack([measures[condition, place] for place in places], axis=1) - measures[condition, whole][:, None]
    return {name: table[..., i] for i, name in enumerate(("std", "elementwise", "loss"))}


def _skip_passes(
    run: Callable[[], torch.Tensor], order: Sequence[Block], places: range, replay: bool
) -> Iterator[tuple[int, torch.Tensor]]:
    """(place, ε̂) of the network without the block at each place, or of the whole network at the last of all.

    order: blocks as they are run. The last place comes first: its pass runs all blocks before, whose outputs are what
    the passes of earlier places need.
    """
    recorded: dict[nn.Module, Any] = {}

    def recording(module: nn.Module):
        original = module.forward

        def forward(*args, **kwargs):
            recorded[module] = original(*args, **kwargs)
            return recorded[module]

        return forward

    for place in reversed(places):
        before = [block.module for block in order[:place]] if replay else []
        if place == places[-1]:
            stand_ins = {module: recording(module) for module in before}
        else:
            stand_ins = {module: (lambda *args, m=module, **kwargs: recorded[m]) for module in before}
        if place < len(order):
            stand_ins[order[place].module] = partial(bypass, order[place].module)
        with replaced(stand_ins):
            yield place, run()


def blocks_in_order(blocks: Sequence[Block], predict: Predict, clip: Latents) -> list[Block]:
    """The blocks in execution order, found by one forward pass."""
    t = torch.full((len(clip.position),), 0.5, device=clip.clean.device)
    return execution_order(blocks, lambda: predict(clip.clean, t, clip.conditions))
