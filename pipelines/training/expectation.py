"""What a long run can gain over plain training at most, and what encoding its clips costs, told before it starts:
counted, not measured.

What was measured, and for which data, stands in `docs/study.md`.
"""

from dataclasses import dataclass

from entprog import models
from entprog.blocks import blocks
from entprog.config import Experiment, Model, Row
from entprog.schedule import plans
from entprog.scoring import priorities
from pipelines import terminal
from pipelines.stream import batches
from pipelines.training import workload

STUDY = "docs/study.md"
LONG_STEPS, LONG_S = 1000, 600.0
"""A run of so many steps, or seconds, is long."""


@dataclass(frozen=True)
class Limit:
    """What counting says."""

    step: float
    """Least that a step may cost, over full training's."""
    scoring_steps: float
    """What scoring takes, in steps of full training."""
    sooner: float | None
    """Times as soon at the same number of steps, at most; None where the budget is not in steps."""


def tell(experiment: Experiment, model: Model | None = None) -> None:
    """Print what a long run computes, and what it can be expected to gain if it is not plain training.

    model: with as many blocks as the experiment's, where that is not there yet (a later phase's).
    """
    source = models.family(experiment.model.family).inspect(model or experiment.model, experiment.data.shape)
    found = blocks(source.network)
    eligible = len(plans.eligible(found, experiment.schedule.blocks))
    work = workload.line(experiment, source) if is_long(experiment) else None
    for line in (*lines(experiment, eligible, len(found) - eligible), work):
        if line:
            terminal.console.print(line)


def lines(experiment: Experiment, blocks: int, others: int = 0) -> list[str]:
    """What to tell a person; nothing for plain training or a short run. blocks: how many may be trained; others: how
    many never (`schedule.blocks`)."""
    schedule = experiment.schedule
    if not is_long(experiment) or schedule.kind == "full":
        return []
    found = limit(experiment, blocks, others)
    parts = [f"a step costs {found.step:.2f} of full training's at least"]
    if found.scoring_steps:
        parts.append(f"scoring takes {found.scoring_steps:.0f} steps of it")
    if schedule.kind == "entprog":
        parts.append(f"search up to {schedule.search_share:.0%} of the run")
    if found.sooner is not None:
        parts.append(f"so at most {found.sooner:.2f}x as soon as plain training at as many steps")
    return [f"Expected gain, counted: {', '.join(parts)}. What it came to in measurements: {STUDY}."]


def is_long(experiment: Experiment) -> bool:
    train = experiment.train
    return (train.steps or 0) >= LONG_STEPS or (train.seconds or 0) >= LONG_S or train.flops is not None


def encoding(experiment: Experiment, clips: int, encoding_flops: float, forward_flops: float) -> str | None:
    """What to tell a person of a run that encodes its clips itself; None for a short run, or one that sees hardly any
    clip twice. clips: to train on; FLOPs: of encoding a clip with its conditions, and of the network's forward pass."""
    train = experiment.train
    if not is_long(experiment) or experiment.data.latents == "never":
        return None
    seen = workload.clips_seen(experiment) if train.steps else 0
    if train.steps and seen < 2 * clips:
        return None
    step_flops = (4 if experiment.model.gradient_checkpointing else 3) * forward_flops
    times = f", {seen / clips:.0f} times each" if train.steps else ""
    return (
        f"no latents are cached: every step encodes its clips{times}, which takes {encoding_flops / 1e12:.3g} TFLOP a "
        f"clip in {experiment.model.vae_dtype}, {encoding_flops / step_flops:.3g} times what full training computes; "
        f"`{batches.caching(experiment)}` encodes each once"
    )


def twins(share: float) -> str | None:
    """What to tell a person of frozen blocks in fp8 that gain nothing. share: `entprog.cost.twins.share`."""
    if share < 1:
        return None
    return (
        f"schedule.frozen_precision=fp8 gains nothing here: a frozen block's forward pass takes {share:.3g} times as "
        "long as in bfloat16; the run goes on with it"
    )


def limit(experiment: Experiment, blocks: int, others: int = 0) -> Limit:
    """The least cost of the run's plans, by the counting of a network of equal blocks (F·[forward + gradients])."""
    train = experiment.train
    passes = 4 if experiment.model.gradient_checkpointing else 3
    costs, begun, spent = [], 0.0, 0.0
    for number, row in enumerate(plans.rows(experiment.schedule)):
        costs.append(least_step(experiment, row, number, blocks, others))
        spent += (row.until - begun) * costs[-1]
        begun = row.until
    clips = experiment.clips_at(experiment.data.shape)
    scoring = scoring_forwards(experiment, blocks + others) / (passes * clips)
    sooner = train.steps / (train.steps * spent + scoring) if train.steps else None
    return Limit(min(costs), scoring, sooner)


def least_step(experiment: Experiment, row: Row, stage: int, blocks: int, others: int = 0) -> float:
    """Least cost of a step of a stage, over that of a step that trains all blocks."""
    schedule, passes = experiment.schedule, 4 if experiment.model.gradient_checkpointing else 3
    shares = {"entprog": min(schedule.candidates), "badam": 1 / blocks}
    share = shares.get(schedule.kind, plans.count(row.share, blocks) / blocks) * blocks / (blocks + others)
    whole, shapes = experiment.data.shape, [row.of(experiment.data.shape)]
    backwards = [row.backward or schedule.backwards[0]]
    if schedule.kind == "entprog":
        shapes, backwards = plans.ladder(schedule, whole, last=stage == schedule.stages - 1), schedule.backwards
    clips = min(shape.pixels * experiment.batch_size_at(shape) for shape in shapes)
    costs = []
    for backward in backwards:
        # Of the blocks that gradient runs through; none before the first that is trained, and those may be the last.
        through = share if backward == "residual" or experiment.outside == "never" else 1.0
        recomputed = through if passes == 4 else 0.0
        costs.append((1 + through + share + recomputed) / passes)
    return min(costs) * clips / (whole.pixels * experiment.data.batch_size)


def scoring_forwards(experiment: Experiment, blocks: int) -> float:
    """Forward passes of one clip that scoring takes: the whole network, and with replay half of one a block."""
    priority, schedule = experiment.priority, experiment.schedule
    if not schedule.needs_scores or priority.kind in priorities.WITHOUT_DATA:
        return 0.0
    passes = 3.0 if priority.kind in ("gradient", "fisher") else 1 + blocks / 2
    later = sum(plans.ranks(schedule, stage) for stage in range(1, len(plans.rows(schedule))))
    rounds = 1 + later if priority.rescore else 1
    return priority.conditions * priority.draws * passes * rounds
