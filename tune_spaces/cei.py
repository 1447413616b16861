"""Which blocks come first: how Conditional Entropy Inflation is measured and read."""

from ray import tune

SPACE = {
    # π is a log-ratio of spreads: 0 is a block without effect, at 0.5 skipping it spreads the prediction by 65 %. Above
    # that hardly any block is left to train before the last stage.
    "schedule.cei_threshold": tune.uniform(0.0, 0.5),
    # The paper ranks by π; where skipping shrinks the prediction |π| ranks the other way round.
    "priority.sign": tune.choice(["signed", "absolute"]),
    # One σ over everything (the paper), or one per element: they differ where an element's mean moves.
    "priority.estimator": tune.choice(["std", "elementwise"]),
    # Draws per condition cost seconds in proportion, and the ranking settles as their root.
    "priority.draws": tune.choice([4, 8, 16, 32]),
    # All timesteps, the clean half, the noisy half: what a block does depends on the noise it sees.
    "priority.timestep_range": tune.choice(["[0.02, 0.98]", "[0.02, 0.5]", "[0.5, 0.98]"]),
}
