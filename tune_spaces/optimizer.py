"""How the chosen blocks are updated."""

from ray import tune

SPACE = {
    # The paper fine-tunes at 1e-5; small or new networks want up to a hundred times that.
    "train.learning_rate": tune.loguniform(1e-5, 2e-3),
    # None, or enough that Adam's second moments have settled.
    "train.warmup_steps": tune.choice([0, 10, 50]),
    # A fall to zero at the end is worth most where the budget is short; half the run is the most in use.
    "train.cooldown_share": tune.uniform(0.0, 0.5),
    # Newly thawed blocks start without moments: a warm-up of their own spares the rest a jolt. Where they are drawn
    # anew every 20 steps (space `plans`) a longer one would leave them no step at their learning rate.
    "train.block_warmup_steps": tune.choice([0, 5, 10]),
    # Tight, usual, none.
    "train.gradient_clip": tune.choice([0.3, 1.0, None]),
}
