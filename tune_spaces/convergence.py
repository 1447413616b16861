"""How many blocks, for how long: the stages and the search at their start."""

from ray import tune

SPACE = {
    # One stage chooses once and for all; more than six leave each too little time to pay for its search.
    "schedule.stages": tune.randint(1, 7),
    # Coarse, even, or leaning to few blocks; all end at the whole network, so that no schedule is bound to lose.
    "schedule.candidates": tune.choice(["[0.5, 1.0]", "[0.25, 0.5, 0.75, 1.0]", "[0.125, 0.25, 0.5, 1.0]"]),
    # Below 2 % hardly a candidate gets two steps; above 30 % the search is the training.
    "schedule.search_share": tune.uniform(0.02, 0.3),
    # Two steps are the fewest that give a spread; beyond eight the share above ends the search first.
    "schedule.search_steps": tune.randint(2, 9),
    # Searching on while the best two cannot be told apart spends the share; ending at once trusts few steps.
    "schedule.search_until_clear": tune.choice([True, False]),
    # The paper only grows; free choice may go back to few blocks.
    "schedule.monotone": tune.choice([True, False]),
    # A candidate's own drop, or the paper's sum, which mixes in what the others did in between.
    "schedule.efficiency": tune.choice(["paired", "paper"]),
}
