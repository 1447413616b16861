"""How the passes of a scoring are shared out over ranks: a function of its arguments alone, the same on every rank.

A *piece* is some of a condition's draws, in a row. Which there are depends on the settings alone: what is summed over
draws is summed in the same order however many ranks there are. Each piece of each condition takes L + 1 *passes*: one
without each of the L blocks, and one of the whole network. A pass goes by its place: that of the block it leaves out,
in execution order, and L for the whole network. Ranks take passes in a row, ordered by condition, piece, place.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

PIECES = 8
"""A condition's draws are cut into so many pieces, and once more wherever its measures are noted: the sums over a piece
are as large as a prediction for every pass, and wait in memory where ranks share a condition."""


@dataclass(frozen=True)
class Costs:
    """What a pass of one draw costs, in any unit."""

    blocks: tuple[int, ...]
    """Of each block, in execution order."""
    outside: int
    """Of all else in a pass."""

    def of(self, places: range) -> int:
        """Passes at these places, for which the last one runs all that lies before its block, and is recorded; the
        others run what follows theirs."""
        return self.beginning(places.start) + sum(map(self.going_on, places)) if places else 0

    def beginning(self, place: int) -> int:
        """What it costs beyond `going_on` to begin a piece there and not at its first pass."""
        return sum(self.blocks[: max(place - 1, 0)])

    def going_on(self, place: int) -> int:
        """What the pass at a place costs after that of the place before it."""
        before = self.blocks[place - 1] if place else 0
        return self.outside + sum(self.blocks[place + 1 :]) + before


@dataclass(frozen=True)
class Part:
    """Passes of one piece of one condition."""

    condition: int
    piece: int
    """Its number among the condition's pieces."""
    draws: range
    """Draws of the piece, 0-based within the condition."""
    places: range

    @property
    def forwards(self) -> int:
        """Passes of one draw, replayed ones included."""
        return len(self.places) * len(self.draws)


def pieces(draws: int, at_once: int, marks: Sequence[int]) -> list[range]:
    """A condition's draws in pieces, none of them across one of the marks; at_once: draws of a forward."""
    size = at_once * -(-draws // (at_once * PIECES))
    edges = sorted({*range(0, draws, size), *(mark for mark in marks if mark < draws), draws})
    return [range(first, end) for first, end in pairwise(edges)]


def shared(conditions: range, cut: Sequence[range], costs: Costs, ranks: int) -> list[list[Part]]:
    """Every rank's parts, of all passes of these conditions; cut: each condition's `pieces`.

    No rank has much more to do than the others: the largest is as small as whole passes in a row allow, but for little.
    """
    cells = [(condition, number) for condition in conditions for number in range(len(cut))]
    places = range(len(costs.blocks) + 1)
    going_on, beginning = [costs.going_on(p) for p in places], [costs.beginning(p) for p in places]
    weights = [len(cut[number]) * cost for _, number in cells for cost in going_on]
    extra = [len(cut[number]) * cost for _, number in cells for cost in beginning]
    cuts = _cuts([0, *accumulate(weights)], [*extra, 0], ranks)
    return [_parts(first, end, cells, cut, len(places)) for first, end in pairwise(cuts)]


def handed_over(parts: Sequence[Sequence[Part]]) -> Iterator[tuple[int, int, int, int, int]]:
    """(condition, place, piece, its rank, rank of the first piece) wherever the two are not one: sums over draws that
    go to the rank of the first piece. In an order that all ranks go by, so that none waits for one that waits for it.
    """
    owners: dict[tuple[int, int], int] = {}
    for rank, part in ((rank, part) for rank, own in enumerate(parts) for part in own):
        for place in part.places:
            owner = owners.setdefault((part.condition, place), rank)
            if owner != rank:
                yield part.condition, place, part.piece, rank, owner


def _parts(first: int, end: int, cells: Sequence[tuple[int, int]], cut: Sequence[range], places: int) -> list[Part]:
    """Passes first … end - 1 of the order."""
    out = []
    for cell in range(first // places, -(-end // places) if first < end else 0):
        condition, piece = cells[cell]
        own = range(max(first - cell * places, 0), min(end - cell * places, places))
        out.append(Part(condition, piece, cut[piece], own))
    return out


def _cuts(ends: Sequence[int], extra: Sequence[int], ranks: int) -> list[int]:
    """Where each rank's passes begin, and the end: those of the least limit to a rank's cost that is seen to do."""
    low, high = -(-ends[-1] // ranks), ends[-1] + max(extra)
    best = _within(high, ends, extra, ranks)
    while low < high:
        limit = (low + high) // 2
        found = _within(limit, ends, extra, ranks)
        if found is None:
            low = limit + 1
        else:
            best, high = found, limit
    return best


def _within(limit: int, ends: Sequence[int], extra: Sequence[int], ranks: int) -> list[int] | None:
    """Cuts by which every rank takes an even share of what is left, and no more than the limit; None: something is
    left over. ends: costs up to each pass; extra: what it costs to begin there."""
    cuts, last = [0], len(ends) - 1
    for left in range(ranks, 0, -1):
        first = cuts[-1]
        even = bisect_left(ends, ends[first] - (ends[first] - ends[-1]) // left)
        most = bisect_right(ends, ends[first] + limit - extra[first]) - 1
        cuts.append(max(first, min(even, most)))
    return cuts if cuts[-1] == last else None
