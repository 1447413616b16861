"""The blocks worth most that a step budget pays for: max Σ π_b subject to a predicted step cost, exactly."""

from collections.abc import Mapping, Sequence

from entprog.config import Backward
from entprog.cost.model import CostModel

ROUNDING = 1e-9
"""Share of a budget by which sums of floats may miss it."""


def best_set(
    priority: Mapping[str, float], eligible: Sequence[str], model: CostModel, limit: float, backward: Backward
) -> tuple[str, ...]:
    """The set of eligible blocks with the largest Σ worth whose step costs at most `limit`, in the network's order;
    () if the limit pays for no block.

    worth_b = π_b; where priorities are negative, π_b - min π: a sum of negative ones says that every block trained is
    one too many, which is not what they mean. Among equals the cheaper set wins.

    Given the first trained block, a step's cost is a constant and one price for each further block, so for every
    choice of the first block the rest is a knapsack. Where the gradient crosses the first block anyway, the constant
    does not depend on it and one knapsack does.
    """
    lowest = min(0.0, *(priority[name] for name in eligible)) if eligible else 0.0
    worth = {name: priority[name] - lowest for name in eligible}
    known = {block.name: block for block in model.blocks}
    order = list(known)
    found: list[tuple[float, float, tuple[str, ...]]] = []
    for first in order:
        if first not in worth:
            continue
        base = model.step((first,), backward)
        after = [name for name in order[order.index(first) + 1 :] if name in worth]
        prices = [model.price(known[name], backward) for name in after]
        room = limit * (1 + ROUNDING) - base
        if room < 0:
            continue
        value, cost, chosen = knapsack([worth[name] for name in after], prices, room)
        found.append((value + worth[first], -(base + cost), (first, *(after[i] for i in chosen))))
    return max(found, default=(0.0, 0.0, ()))[2]


def knapsack(values: Sequence[float], prices: Sequence[float], room: float) -> tuple[float, float, tuple[int, ...]]:
    """(value, cost, items) of the most valuable items whose prices sum to at most `room`; exact.

    Keeps every partial choice that no other beats in both value and cost (Nemhauser & Ullmann 1969): few where items
    share prices, as the equal blocks of a transformer do. values, prices and room are not negative.
    """
    front: list[tuple[float, float, tuple[int, ...]]] = [(0.0, 0.0, ())]  # (cost, value, items), both rising
    for item, (value, price) in enumerate(zip(values, prices, strict=True)):
        if value <= 0:
            continue
        grown = [(c + price, v + value, (*items, item)) for c, v, items in front if c + price <= room]
        front = _undominated(sorted(front + grown, key=lambda choice: (choice[0], -choice[1])))
    cost, value, items = front[-1]
    return value, cost, items


def _undominated(choices):
    kept = []
    for choice in choices:
        if not kept or choice[1] > kept[-1][1]:
            kept.append(choice)
    return kept
