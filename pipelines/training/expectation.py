"""What a long run can be expected to gain over plain training, told before it starts.

Two sources, each named: what a step and the scoring must cost at least, counted, and what the study (`docs/study.md`)
measured for the nearest of its arms. Neither knows your data.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entprog import models
from entprog.blocks import blocks
from entprog.config import Experiment, Model
from entprog.scoring import priorities
from pipelines import cli

TABLE = Path(__file__).parent / "gains.json"
"""What the study found, in short; `python -m benchmarks.study` writes it."""
LONG_STEPS, LONG_S = 1000, 600.0
"""A run of so many steps, or seconds, is long."""
FEWEST_SEEDS = 3
"""With fewer the study's interval says nothing."""


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
    """Print what a run can be expected to gain, if it is long and not plain training.

    model: with as many blocks as the experiment's, where that is not there yet (a later phase's).
    """
    network = models.family(experiment.model.family).inspect(model or experiment.model, experiment.data.shape).network
    for line in lines(experiment, len(blocks(network))):
        cli.console.print(line)


def lines(experiment: Experiment, blocks: int, table: Mapping[str, Any] | None = None) -> list[str]:
    """What to tell a person; nothing for plain training, or for a short run. blocks: of the network; table: TABLE's."""
    train, schedule = experiment.train, experiment.schedule
    long = (train.steps or 0) >= LONG_STEPS or (train.seconds or 0) >= LONG_S or train.flops is not None
    if not long or (schedule.kind == "full" and train.lora is None):
        return []
    out = []
    if schedule.kind != "full":
        found = limit(experiment, blocks)
        parts = [f"a step costs {found.step:.2f} of full training's at least"]
        if found.scoring_steps:
            parts.append(f"scoring takes {found.scoring_steps:.0f} steps of it")
        if schedule.kind == "entprog":
            parts.append(f"search up to {schedule.search_share:.0%} of the run")
        if found.sooner is not None:
            parts.append(f"so at most {found.sooner:.2f}x as soon as plain training at as many steps")
        out.append(f"Expected gain, counted: {', '.join(parts)}.")
    return [*out, measured(experiment, table or json.loads(TABLE.read_text()))]


def limit(experiment: Experiment, blocks: int) -> Limit:
    """The least cost of the run's plans, by the counting of a network of equal blocks (F·[forward + gradients])."""
    train, schedule = experiment.train, experiment.schedule
    checkpointing = experiment.model.gradient_checkpointing
    shares = {"lisa": schedule.lisa_share, "badam": 1 / blocks, "linear": 1 / schedule.stages}
    share = shares.get(schedule.kind, min(schedule.candidates))
    costs = []
    for backward in schedule.backwards if schedule.kind == "entprog" else schedule.backwards[:1]:
        through = 1.0 if backward == "exact" else share  # of the blocks that gradient runs through
        if backward == "exact" and schedule.outside == "never" and "suffix" in schedule.generators:
            through = max(min(schedule.suffixes), share)
        recomputed = through if checkpointing else 0.0
        costs.append((1 + through + share + recomputed) / (4 if checkpointing else 3))
    clips = experiment.data.batch_size * train.workers * train.accumulate
    scoring = scoring_forwards(experiment, blocks) / ((4 if checkpointing else 3) * clips)
    sooner = None
    if train.steps:
        spent = train.steps * min(costs) + scoring
        sooner = train.steps / spent
    return Limit(min(costs), scoring, sooner)


def scoring_forwards(experiment: Experiment, blocks: int) -> float:
    """Forward passes of one clip that scoring takes: the whole network, and with replay half of one a block."""
    priority = experiment.priority
    if not experiment.schedule.needs_scores or priority.kind in priorities.WITHOUT_DATA:
        return 0.0
    passes = 3.0 if priority.kind in ("gradient", "fisher") else 1 + blocks / 2
    rounds = experiment.schedule.stages if priority.rescore else 1
    return priority.conditions * priority.draws * passes * rounds


def arm_of(experiment: Experiment) -> str:
    """The study's arm that is nearest to an experiment."""
    schedule, lora = experiment.schedule, experiment.train.lora
    if lora is not None:
        return "lora_small" if lora.rank < 8 else "lora_large"
    if schedule.kind in ("lisa", "badam"):
        return schedule.kind
    if schedule.kind == "linear":
        return "past_linear"
    return "past" if "residual" in schedule.backwards else "paper"


def measured(experiment: Experiment, table: Mapping[str, Any]) -> str:
    """What the study says of the nearest arm, and who wins there."""
    arm, about = arm_of(experiment), table["about"]
    families = table["families"]
    family = experiment.model.family if arm in families.get(experiment.model.family, {}) else "wan"
    found = families.get(family, {}).get(arm)
    if found is None:
        return f"Expected gain, measured: the study has no figure for arm {arm} yet; --schedule full is plain training."
    where = (
        f"{family}, {about['parameters'][family] / 1e6:.3g} M parameters, {about['steps']} steps of full training, "
        f"{found['seeds']} seeds, {about['device'].split(',')[0]}"
    )
    said = f"{found['median']:.2f}x as soon as plain training [{found['low']:.2f}, {found['high']:.2f}], all costs paid"
    if found["seeds"] < FEWEST_SEEDS:
        verdict = "too few seeds to tell"
    elif found["high"] < 1:
        verdict = "plain training won there: consider --schedule full"
    elif found["low"] > 1 and found["by_cpu_time"] < 1:
        verdict = "it paid there in FLOPs and not in time: --schedule full is the simpler choice"
    elif found["low"] > 1:
        verdict = "it paid there"
    else:
        verdict = "not told apart from plain training there: --schedule full is the simpler choice"
    return f"Expected gain, measured in docs/study.md ({where}; arm {arm}): {said}; {verdict}."
