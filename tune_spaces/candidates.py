"""What the search of kind entprog chooses from."""

from ray import tune

SPACE = {
    # Exact is the paper's; residual costs less with a biased gradient; with both the search decides.
    "schedule.backward": tune.choice(["exact", "residual", "[exact, residual]"]),
    # Top-m blocks; top-m among the last ones, which ends an exact backward early; the best set within a budget.
    "schedule.generators": tune.choice(["[count]", "[count, suffix]", "[count, budget]"]),
    # Of the generator `budget`: cheap steps alone, or up to nearly full training's cost.
    "schedule.budgets": tune.choice(["[0.5]", "[0.5, 0.7, 0.85]"]),
    # Whole clips alone, or half as high and wide too: a quarter of the tokens.
    "schedule.shapes": tune.choice(["[]", "[{shrink: 2}]"]),
}
