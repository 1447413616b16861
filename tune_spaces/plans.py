"""What kind progressive trains: on which clips, which blocks, and how gradient crosses the others."""

from ray import tune

SPACE = {
    # Plain training; half the height and width for half of the budget, and for nearly all of it (the largest gains so
    # far); half the blocks besides; a quarter of them, drawn again and again (the least memory).
    "schedule.table": tune.choice(
        [
            "[{until: 1}]",
            "[{until: 0.5, shrink: 2}, {until: 1}]",
            "[{until: 0.9, shrink: 2}, {until: 1}]",
            "[{until: 0.5, shrink: 2, share: 0.5, backward: residual}, {until: 1}]",
            "[{until: 0.67, shrink: 2, share: 0.25, backward: residual, choose: random, redraw_every: 20},"
            " {until: 1, share: 0.25, backward: residual, choose: random, redraw_every: 20}]",
        ]
    ),
    # Small clips make small steps, which cost more time than FLOPs: larger batches of them, or quicker steps.
    "schedule.tokens": tune.choice(["fewer", "constant"]),
    # The same noise hides less of a small clip.
    "schedule.timestep_shift": tune.choice(["fixed", "auto"]),
    # Moments of blocks that leave: kept for their return, or forgotten because they would be stale.
    "train.frozen_state": tune.choice(["host", "drop"]),
    # Parameters outside blocks train always, or only the input layer of the conditions.
    "schedule.outside": tune.choice(["always", "conditions"]),
}
