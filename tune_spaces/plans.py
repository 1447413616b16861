"""What a stage may train: how gradient crosses frozen blocks, which sets of blocks, at which clip shape."""

from ray import tune

SPACE = {
    # Exact is the paper's; residual costs less with a biased gradient; with both the search decides.
    "schedule.backward": tune.choice(["exact", "residual", "[exact, residual]"]),
    # Top-m blocks; top-m among the last ones, which ends an exact backward early; the best set within a budget.
    "schedule.generators": tune.choice(["[count]", "[count, suffix]", "[count, budget]"]),
    # Of the generator `budget`: cheap steps alone, or up to nearly full training's cost.
    "schedule.budgets": tune.choice(["[0.5]", "[0.5, 0.7, 0.85]"]),
    # Whole clips, or also half as high and wide in all stages but the last: a quarter of the tokens.
    "schedule.shapes": tune.choice(["[]", "[{shrink: 2}]"]),
    # Parameters outside blocks train always, or only the input layer of the conditions.
    "schedule.outside": tune.choice(["always", "conditions"]),
}
