"""What decides how training grows, and for how long each stage lasts: the table, or stages and a search."""

from ray import tune

SPACE = {
    # A table (`schedule.table`), blocks in equal steps, or the paper's search: the last has yet to beat the first.
    "schedule.kind": tune.choice(["progressive", "linear", "entprog"]),
    # One stage chooses once and for all; more than six leave each too little time to pay for its search.
    "schedule.stages": tune.randint(1, 7),
    # Coarse, even, or leaning to few blocks; all end at the whole network, so that no schedule is bound to lose.
    "schedule.candidates": tune.choice(["[0.5, 1.0]", "[0.25, 0.5, 0.75, 1.0]", "[0.125, 0.25, 0.5, 1.0]"]),
    # Below 1 % hardly a candidate gets a step; above 10 % no choice has earned its search back.
    "schedule.search_share": tune.uniform(0.01, 0.1),
    # Two steps are the fewest that give a spread; beyond eight the share above ends the search first.
    "schedule.search_steps": tune.randint(2, 9),
    # Searching on while the best two cannot be told apart spends the share; ending at once trusts few steps.
    "schedule.search_until_clear": tune.choice([True, False]),
    # The paper only grows; free choice may go back to few blocks.
    "schedule.monotone": tune.choice([True, False]),
    # A candidate's own drop, or the paper's sum, which mixes in what the others did in between.
    "schedule.efficiency": tune.choice(["paired", "paper"]),
}
