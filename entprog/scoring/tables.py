"""Tables of block scores: how they are measured over conditions and ranks, how far they can be trusted, their keys.

What is scored, and how one condition is scored, is the priority's own business (`cei`, `priorities`). A draw is one
(τ, ε, c); the draws of one condition c are numbered 0, 1, … and every condition gives equally many.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from entprog.blocks import Block
from entprog.config import Priority, digest
from entprog.data.clips import Latents
from entprog.distributed import agree
from entprog.errors import UserError
from entprog.records import Record

Predict = Callable[[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]], torch.Tensor]
"""(noisy, t, conditions) → ε̂."""

Row = Mapping[str, np.ndarray]
"""One condition's measures: name → [mark, block], after each of `marks` draws; the last mark is all draws."""

FORMAT = 2
"""Part of every key: raised when equal settings come to mean other scores."""
MARKS = (100, 300, 1000)
"""Numbers of draws at which the ranking is compared with the final one."""
MIN_DRAWS = 4
"""Fewest draws of a condition from which a σ is taken."""
FIRST_ROUND = 4
"""Conditions in the first round of `until_stable`; later rounds double what there is: few looks, so that a lucky one
seldom ends the scoring."""


@dataclass(frozen=True, kw_only=True)
class BlockScore:
    """One block's row of the table."""

    name: str
    score: float
    """What the kind of priority says: for CEI π of the estimator in use."""
    std_error: float
    """Standard error of the score over conditions."""
    pi_std: float | None = None
    """π by the standard deviation over all elements and draws (the paper); None where no block was skipped."""
    pi_elementwise: float | None = None
    """π by the mean over elements of log σ per element; None where no block was skipped."""
    loss_increase: float | None = None
    """Mean loss with the block skipped minus mean loss; None where no block was skipped."""
    loss_std_error: float | None = None
    """Standard error of the loss increase over conditions."""


@dataclass(frozen=True, kw_only=True)
class ScoreTable(Record):
    """Blocks in the network's order with their scores, and how far the scores can be trusted."""

    key: str
    """Hash of weights, data and settings."""
    kind: str
    """What the score is (`priority.kind`)."""
    estimator: str
    """Estimator of π, where π was measured."""
    blocks: tuple[BlockScore, ...]
    conditions: int
    """Conditions scored; 0 for a priority that looks at no data."""
    draws: int
    """Draws per condition."""
    halves_tau: float
    """Kendall's τ between the rankings from two halves of the draws: those of even and of odd conditions."""
    tau_at: dict[str, float]
    """Number of draws → Kendall's τ of the ranking from that many, spread over conditions, to the final ranking."""
    signed_absolute_tau: float | None = None
    """Kendall's τ between the rankings by π and by |π|."""
    loss_tau: dict[str, float] = field(default_factory=dict)
    """Kendall's τ of the `signed` and of the `absolute` ranking to the loss increase on skip."""
    seconds: float = 0.0
    """Time the scoring took (slowest rank)."""
    ranks: int = 1
    """Ranks that shared it out among them."""
    flops: int = 0
    """Counted FLOPs of the scoring by one rank alone: what ranks do over again for each other is not in them."""
    per_condition: tuple[tuple[float, ...], ...] = field(default=(), repr=False)
    """[condition][block] scores."""

    def __post_init__(self):
        """Raises UserError where there is a score by which nothing can be ranked."""
        wrong = [block.name for block in self.blocks if not math.isfinite(block.score)]
        if wrong:
            raise UserError(
                f"the {self.kind} scores of {len(wrong)} of {len(self.blocks)} blocks are not finite (the first: "
                f"{wrong[0]}): the base's weights are damaged, or it predicts the same everywhere because it was never "
                "trained; priority.kind random, depth_first or depth_last rank without looking at it"
            )

    def scores(self) -> dict[str, float]:
        """Every block's score."""
        return {block.name: block.score for block in self.blocks}

    def priority(self, sign: str) -> dict[str, float]:
        """What blocks are ranked by, highest first: π or |π| (`reverse_cei`: its negative); other kinds: the score."""
        scores = self.scores()
        if self.kind in ("cei", "reverse_cei") and sign == "absolute":
            scores = {name: abs(value) for name, value in scores.items()}
        return {name: -value for name, value in scores.items()} if self.kind == "reverse_cei" else scores

    def warnings(self, sign: str) -> list[str]:
        """What a person should know before trusting the ranking."""
        out = []
        if self.signed_absolute_tau is not None and self.signed_absolute_tau < 0:
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


def tau(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> float:
    """Kendall's τ of two lists of scores; 1 for a single block, 0 where it is undefined (all tied)."""
    if len(a) < 2:
        return 1.0
    from scipy.stats import kendalltau  # here: its import takes half a second

    value = float(kendalltau(a, b).statistic)
    return round(value, 12) if np.isfinite(value) else 0.0  # equal rankings give 1, not 0.9999999999999999


def drift(before: ScoreTable, now: ScoreTable, sign: str) -> float:
    """Kendall's τ between the rankings of two tables of the same blocks: 1 where nothing moved."""
    old, new = before.priority(sign), now.priority(sign)
    return tau([old[name] for name in old], [new[name] for name in old])


def table_key(contents: str, data_fingerprint: str, settings: Priority, rest: Any = None) -> str:
    """Under which a table is kept: equal keys, equal scores.

    contents: hash of all weights that scoring uses. rest: JSON values of whatever else it depends on. What only decides
    how a table is read (the sign, reversing) or when one is made is no part of it.
    """
    values = settings.model_dump(mode="json", exclude={"sign", "rescore"})
    if values["kind"] == "reverse_cei":
        values["kind"] = "cei"
    return digest(FORMAT, contents, data_fingerprint, values, rest)


def rounds(settings: Priority) -> list[int]:
    """Numbers of conditions after which scoring may end, growing; the last is all of them."""
    if settings.until_stable is None:
        return [settings.conditions]
    ends, end = [], FIRST_ROUND
    while end < settings.conditions:
        ends.append(end)
        end *= 2
    return [*ends, settings.conditions]


def spread(draws: int, conditions: int) -> tuple[int, int]:
    """How `draws` draws in all are spread over at most that many conditions: (conditions, draws of each).

    Over as many conditions as leave each MIN_DRAWS; a remainder that does not reach all of them is left out.
    """
    used = max(1, min(conditions, draws // MIN_DRAWS))
    return used, draws // used


def marks(settings: Priority) -> list[int]:
    """Numbers of a condition's draws after which its measures are noted; the last is all its draws."""
    wanted = {
        spread(draws, conditions)[1]
        for conditions in rounds(settings)
        for draws in MARKS
        if draws <= conditions * settings.draws
    }
    return sorted(wanted | {settings.draws})


def halves_tau(rows: Sequence[Row], measure: str) -> float:
    """Kendall's τ between the rankings from even and from odd conditions: from two halves of the draws."""
    final = np.stack([row[measure][-1] for row in rows])
    return tau(final[0::2].mean(0), final[1::2].mean(0))


def is_stable(rows: Sequence[Row], measure: str, settings: Priority) -> bool:
    """Whether there are enough conditions, whatever their number (`priority.until_stable`)."""
    return settings.until_stable is not None and halves_tau(rows, measure) >= settings.until_stable


def tau_at(rows: Sequence[Row], measure: str, settings: Priority) -> dict[str, float]:
    """Kendall's τ of the ranking from the first 100, 300, 1,000 draws (as far as there are) to the final ranking."""
    final = np.stack([row[measure][-1] for row in rows]).mean(0)
    out = {}
    for draws in MARKS:
        if draws <= len(rows) * settings.draws:
            conditions, each = spread(draws, len(rows))
            place = marks(settings).index(each)
            out[str(draws)] = tau(np.stack([row[measure][place] for row in rows[:conditions]]).mean(0), final)
    return out


@dataclass(frozen=True)
class Measured:
    """All conditions' rows, the same on every rank, and what they cost."""

    rows: list[Row]
    seconds: float
    flops: int


Round = Callable[[range], list[Row]]
"""Numbers of conditions → their rows, the same on every rank: each of them takes a share of the work."""


def measured(
    begin: Callable[[], tuple[int, Round]], settings: Priority, measure: str, device: torch.device | str = "cpu"
) -> Measured:
    """Score conditions, round by round, until there are enough.

    begin() → (FLOPs of one draw, counted before anything is scored; what scores a round). With `settings.until_stable`
    scoring ends with the round after which Kendall's τ of `measure` between halves of the draws has reached it. Blocks
    compiled by torch.compile run eagerly: every stand-in for a block would be compiled.
    """
    started = time.perf_counter()
    rows: list[Row] = []
    with torch.compiler.set_stance("force_eager"):
        draw_flops, score = begin()
        for end in rounds(settings):
            rows += score(range(len(rows), end))
            if agree.of_first(partial(is_stable, rows, measure, settings)):  # should ranks' arithmetic ever differ
                break
    seconds = agree.slowest(time.perf_counter() - started, device)
    return Measured(rows, seconds, draw_flops * len(rows) * settings.draws)


def one_by_one(conditions: Sequence[Latents], settings: Priority) -> Callable[[int], Latents]:
    """Number of a condition → its clip. Of the batches, all but the last of one size, those alone are looked at that
    hold what is asked for: a rank need not make the others'.

    Raises ValueError if there are fewer conditions than the settings want.
    """
    at_once = len(conditions[0].position)
    if (most := at_once * len(conditions)) < settings.conditions:
        raise ValueError(f"priority.conditions is {settings.conditions}, but only {most} clips were given")

    def clip(number: int) -> Latents:
        batch, place = divmod(number, at_once)
        if place >= len(conditions[batch].position):
            raise ValueError(f"priority.conditions is {settings.conditions}, but only {number} clips were given")
        return conditions[batch].part(slice(place, place + 1))

    return clip


def table(
    blocks: Sequence[Block],
    found: Measured,
    settings: Priority,
    measure: str,
    *,
    key: str,
    others: Callable[[int], Mapping[str, float]] = lambda block: {},
    **whole: Any,
) -> ScoreTable:
    """The table of one measure. others(number of a block), whole: further fields of its row, and of the table."""
    final = np.stack([row[measure][-1] for row in found.rows])
    mean, error = final.mean(0), std_error(final)
    return ScoreTable(
        key=key,
        kind=settings.kind,
        estimator=settings.estimator,
        blocks=tuple(
            BlockScore(name=block.name, score=float(mean[i]), std_error=float(error[i]), **others(i))
            for i, block in enumerate(blocks)
        ),
        conditions=len(found.rows),
        draws=settings.draws,
        halves_tau=halves_tau(found.rows, measure),
        tau_at=tau_at(found.rows, measure, settings),
        seconds=found.seconds,
        flops=found.flops,
        per_condition=tuple(tuple(map(float, row)) for row in final),
        **whole,
    )


def std_error(per_condition: np.ndarray) -> np.ndarray:
    """Standard error over conditions, [condition, block] → [block]."""
    return per_condition.std(0, ddof=1) / np.sqrt(len(per_condition))
