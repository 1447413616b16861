"""Conditional Entropy Inflation: how much a prediction's entropy grows when a block is skipped (Ent-Prog §3.2).

    π(b) = mean over c of log( σ_skip(b)(ε̂) / σ(ε̂) )          (Gaussian approximation of ΔH(b, c))

σ is taken per condition c, over the elements of ε̂ and draws of (τ, ε); the draws are the same for every block.
A second estimator, the diagonal-Gaussian entropy (mean over elements of log σ per element), and the loss increase
on skip come out of the same passes.
"""

import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.stats import kendalltau
from torch import nn

from entprog import distributed, objectives
from entprog.blocks import Block, bypass, execution_order, replaced, skipped
from entprog.clips import Latents
from entprog.config import Priority, digest

Predict = Callable[[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class BlockScore:
    """One block's row of the table."""

    name: str
    pi_std: float
    """π by the standard deviation over all elements and draws (the paper)."""
    pi_elementwise: float
    """π by the mean over elements of log σ per element."""
    std_error: float
    """Standard error over conditions of the estimator in use."""
    loss_increase: float
    """Mean loss with the block skipped minus mean loss."""


@dataclass(frozen=True, kw_only=True)
class ScoreTable:
    """Blocks in the network's order with their scores, and how far the scores can be trusted."""

    key: str
    """Hash of weights, data and settings."""
    estimator: str
    blocks: tuple[BlockScore, ...]
    conditions: int
    draws: int
    """Draws per condition."""
    halves_tau: float
    """Kendall's τ between the rankings from two halves of the draws."""
    tau_at: dict[str, float]
    """Number of draws → Kendall's τ of the ranking from the first that many to the final ranking."""
    signed_absolute_tau: float
    """Kendall's τ between the signed and the absolute ranking."""
    loss_tau: dict[str, float]
    """Kendall's τ of the signed and of the absolute ranking to the loss increase on skip."""
    seconds: float
    """Time the scoring took (slowest rank)."""
    flops: int = 0
    per_condition: tuple[tuple[float, ...], ...] = field(default=(), repr=False)
    """[condition][block] log-ratios of the estimator in use."""

    def pi(self) -> dict[str, float]:
        """Signed scores of the estimator in use."""
        return {b.name: b.pi_std if self.estimator == "std" else b.pi_elementwise for b in self.blocks}

    def priority(self, sign: str) -> dict[str, float]:
        """What blocks are ranked by: π, or |π|."""
        return {name: abs(value) if sign == "absolute" else value for name, value in self.pi().items()}

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> "ScoreTable":
        rows = tuple(BlockScore(**row) for row in values["blocks"])
        per_condition = tuple(tuple(row) for row in values["per_condition"])
        return ScoreTable(**{**values, "blocks": rows, "per_condition": per_condition})

    def warnings(self, sign: str) -> list[str]:
        """What a person should know before trusting the ranking."""
        out = []
        if self.signed_absolute_tau < 0:
            out.append(
                "signed and absolute CEI rank the blocks in opposite ways "
                f"(Kendall's τ {self.signed_absolute_tau:.2f}): you use {sign}; "
                "look at the loss increase beside them before trusting either"
            )
        if self.halves_tau < 0.5:
            out.append(
                f"the ranking is unstable (Kendall's τ {self.halves_tau:.2f} between halves of "
                f"{self.conditions * self.draws} draws): raise priority.conditions or priority.draws"
            )
        return out


def weights_hash(network: nn.Module) -> str:
    """Hash of every parameter's and buffer's name and bytes."""
    out = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(network.state_dict().items()):
        out.update(name.encode())
        out.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return out.hexdigest()


def table_key(network: nn.Module, data_fingerprint: str, settings: Priority, rest: Any = None) -> str:
    """Under which a table is kept: equal keys, equal scores."""
    return digest(weights_hash(network), data_fingerprint, settings.model_dump(mode="json", exclude={"sign"}), rest)


def cei(
    predict: Predict,
    blocks: Sequence[Block],
    conditions: Sequence[Latents],
    settings: Priority,
    *,
    key: str = "",
    seed: int = 0,
    replay: bool = True,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> ScoreTable:
    """Score every block once.

    predict(noisy, t, conditions) → ε̂. conditions: batches of clips; every clip is one condition c, its clean
    latents the x_0 of its draws. With several ranks each scores its share of the conditions and all get the
    whole table.
    replay: the full forward records each block's output; a skip pass returns the recorded ones for the blocks
    before b and computes only what follows: equal bits, about half the forwards' cost.
    """
    rank, world = distributed.world()
    clips = [batch.part(slice(i, i + 1)) for batch in conditions for i in range(len(batch.position))]
    clips = clips[: settings.conditions]
    started = time.perf_counter()
    mine = {}
    with torch.no_grad():
        for number in range(rank, len(clips), world):
            mine[number] = _score_condition(predict, blocks, clips[number], settings, number, seed, replay)
            progress(len(mine), -(-len(clips) // world))
    seconds = distributed.slowest(time.perf_counter() - started, clips[0].clean.device)
    everyone = {number: row for part in distributed.gathered(mine) for number, row in part.items()}
    rows = [everyone[number] for number in range(len(clips))]
    return _table(blocks, rows, settings, key=key, seconds=seconds)


@dataclass(frozen=True)
class _Condition:
    """Log-ratios of one condition, each [block]; `halves` [2, block] and `prefix` {draws: [block]} of the estimator."""

    std: np.ndarray
    elementwise: np.ndarray
    halves: np.ndarray
    loss_increase: np.ndarray


class _Moments:
    """Sums per element of ε̂ over the draws of one half."""

    def __init__(self):
        self.n, self.sum, self.squares, self.loss = 0, 0.0, 0.0, 0.0

    def add(self, prediction: torch.Tensor, target: torch.Tensor) -> None:
        x = prediction.double()
        self.n += len(x)
        self.sum = self.sum + x.sum(0)
        self.squares = self.squares + x.square().sum(0)
        self.loss += objectives.loss(prediction, target).double().sum().item()

    def __add__(self, other: "_Moments") -> "_Moments":
        out = _Moments()
        out.n, out.sum, out.squares = self.n + other.n, self.sum + other.sum, self.squares + other.squares
        out.loss = self.loss + other.loss
        return out

    def log_sigma(self, estimator: str) -> float:
        """log σ over all elements and draws, or the mean over elements of log σ over draws."""
        if estimator == "std":
            mean = self.sum.mean() / self.n
            return 0.5 * torch.log(self.squares.mean() / self.n - mean**2).item()
        variance = (self.squares / self.n - (self.sum / self.n) ** 2).clamp_min(1e-20)
        return 0.5 * torch.log(variance).mean().item()


def _score_condition(
    predict: Predict, blocks: Sequence[Block], clip: Latents, settings: Priority, number: int, seed: int, replay: bool
) -> _Condition:
    # Draws are numbered over all conditions, so that adding conditions changes none of the earlier ones.
    numbers = torch.arange(settings.draws) + number * settings.draws
    low, high = settings.timestep_range
    halves: list[list[_Moments]] = [[_Moments() for _ in range(len(blocks) + 1)] for _ in range(2)]
    for half in range(2):  # even and odd draws
        chosen = numbers[half::2]
        clean = clip.clean.expand(len(chosen), *clip.clean.shape[1:])
        conditions = {k: v.expand(len(chosen), *v.shape[1:]) for k, v in clip.conditions.items()}
        draw_seed = seed * 1_000_003 + settings.seed
        t = low + (high - low) * objectives.timesteps(chosen, draw_seed, shift=1.0).to(clean.device)
        noisy, target = objectives.flow_pair(clean, objectives.noise_like(clean, chosen, draw_seed), t)
        passes = _skip_passes(lambda n=noisy, t=t, c=conditions: predict(n, t, c), blocks, replay)
        for moments, prediction in zip(halves[half], passes, strict=True):
            moments.add(prediction, target)
    whole = [a + b for a, b in zip(*halves, strict=True)]

    def ratios(moments: list[_Moments], estimator: str) -> np.ndarray:
        logs = np.array([m.log_sigma(estimator) for m in moments])
        return logs[1:] - logs[0]

    losses = np.array([m.loss / m.n for m in whole])
    return _Condition(
        std=ratios(whole, "std"),
        elementwise=ratios(whole, "elementwise"),
        halves=np.stack([ratios(half, settings.estimator) for half in halves]),
        loss_increase=losses[1:] - losses[0],
    )


def _skip_passes(run: Callable[[], torch.Tensor], blocks: Sequence[Block], replay: bool) -> Iterable[torch.Tensor]:
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


def _table(
    blocks: Sequence[Block], rows: list[_Condition], settings: Priority, *, key: str, seconds: float
) -> ScoreTable:
    std = np.stack([row.std for row in rows])
    elementwise = np.stack([row.elementwise for row in rows])
    used = std if settings.estimator == "std" else elementwise
    pi = used.mean(0)
    losses = np.stack([row.loss_increase for row in rows]).mean(0)
    halves = np.stack([row.halves for row in rows]).mean(0)
    error = used.std(0, ddof=1) / np.sqrt(len(rows)) if len(rows) > 1 else np.full(len(blocks), np.nan)
    marks = [n for n in (100, 300, 1000) if n < len(rows) * settings.draws]
    tau_at = {str(n): _tau(used[: max(1, n // settings.draws)].mean(0), pi) for n in marks}
    return ScoreTable(
        key=key,
        estimator=settings.estimator,
        blocks=tuple(
            BlockScore(
                name=block.name,
                pi_std=float(std[:, i].mean()),
                pi_elementwise=float(elementwise[:, i].mean()),
                std_error=float(error[i]),
                loss_increase=float(losses[i]),
            )
            for i, block in enumerate(blocks)
        ),
        conditions=len(rows),
        draws=settings.draws,
        halves_tau=_tau(halves[0], halves[1]),
        tau_at=tau_at,
        signed_absolute_tau=_tau(pi, np.abs(pi)),
        loss_tau={"signed": _tau(pi, losses), "absolute": _tau(np.abs(pi), losses)},
        seconds=seconds,
        per_condition=tuple(tuple(map(float, row)) for row in used),
    )


def _tau(a: np.ndarray, b: np.ndarray) -> float:
    """Kendall's τ; 1 for a single block, 0 where it is undefined (all tied)."""
    if len(a) < 2:
        return 1.0
    value = float(kendalltau(a, b).statistic)
    return value if np.isfinite(value) else 0.0


def blocks_in_order(blocks: Sequence[Block], predict: Predict, clip: Latents) -> list[Block]:
    """The blocks in execution order, found by one forward pass."""
    t = torch.full((len(clip.position),), 0.5, device=clip.clean.device)
    return execution_order(blocks, lambda: predict(clip.clean, t, clip.conditions))
