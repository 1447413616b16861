"""The study's units of work: each one training (or scoring), through the project's own `fit`, and its record.

A record is a function of its unit, the scale and the code: nothing here knows what other units found, but for the base
that all start from, the budget that all have, and the learning rate that tuning chose.
"""

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from benchmarks import study_routing
from benchmarks.study_arms import ARMS, TASKS, Scale, experiment, pretraining
from entprog import config, models
from entprog.blocks import Block, blocks
from entprog.config import ClipShape, Experiment
from entprog.data import clip_stream, shards
from entprog.data.clips import Latents
from entprog.diffusion import losses
from entprog.diffusion.denoiser import Denoiser
from entprog.errors import UserError
from entprog.models import lora
from entprog.quality import figures as quality_figures
from entprog.quality.card import ProtocolCard
from entprog.quality.metrics import METRICS, Meter
from entprog.schedule import plans
from entprog.schedule.freezing import Freeze
from entprog.schedule.plans import Plan
from entprog.schedule.prices import Prices
from entprog.schedule.state import RunState
from entprog.scoring import cei, priorities
from entprog.training import checkpoint
from entprog.training.fit import fit, start
from entprog.training.steps import Step
from pipelines.generating import rendering

Kind = Literal["clips", "base", "budget", "scores", "tune", "run", "hindsight"]
DECODED_AT_ONCE, JUDGED_AT_ONCE = 32, 24
MOST_WAITED = 1.1
"""Charged seconds over those of the processor, of one thread: beyond it the clock has measured what others do."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One piece of work; its record is its own file."""

    kind: Kind
    task: str
    arm: str = "full"
    seed: int = 0
    rate: float | None = None
    """Kind `tune`: the learning rate that is tried."""
    batch: int | None = None
    """Kind `tune`: with batches of so many clips."""
    stage: int = 0
    """Kind `hindsight`: the stage whose choice is looked at."""

    @property
    def file(self) -> str:
        """Its record's path inside the work folder."""
        ending = {"tune": f"-{self.rate}-{self.batch}", "hindsight": f"-stage{self.stage}"}.get(self.kind, "")
        return f"units/{self.task}/{self.kind}/{self.arm}-seed{self.seed}{ending}.json"


Cut = Callable[[ClipShape], Latents]
"""All training clips at a clip shape."""


@dataclass(frozen=True)
class Material:
    """A task's clips as its networks see them, on the study's device."""

    train: Cut
    search: list[Latents]
    """Batches of held-out clips that a run itself may look at."""
    tune: list[Latents]
    """That learning rates are judged by."""
    test: list[Latents]
    """That arms are judged by."""
    motions: list[rendering.Motion]
    """Some of the same clips, to be generated."""
    dataset: shards.Dataset


@dataclass(frozen=True, eq=False)
class Bench:
    """Where the study works, and at which scale."""

    scale: Scale
    work: Path
    device: torch.device
    kept: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Records that the result file holds of earlier sittings, by their files, whose folder may be gone."""
    busy: bool = False
    """Whether others work on the machine, so that seconds say nothing."""

    def base(self, family: str) -> str:
        return str(self.work / "bases" / family)

    def shards(self, target: str) -> Path:
        return self.work / "mocap" / target if target in ("source", "target") else self.work / target

    def spent(self, step: Step) -> float:
        """In the scale's clock."""
        return step.flops if self.scale.clock == "flops" else step.charged_s


@dataclass(frozen=True)
class Training:
    """A run that is ready to begin."""

    experiment: Experiment
    denoiser: Denoiser
    found: list[Block]
    table: priorities.ScoreTable | None
    state: RunState
    steps: Iterator[Step]


# ---- clips ----


@cache
def material(bench: Bench, task: str) -> Material:
    """A task's clips, decoded and encoded once a process."""
    scale, of = bench.scale, TASKS[task]
    dataset = shards.read_dataset(bench.shards("target" if of.target == "rendered" else of.target))
    network = models.family(of.family).load(
        config.Model(family=of.family, base=bench.base(of.family), vae="none"), bench.device, 0
    )
    first, last = scale.search_clips, scale.search_clips + (scale.tune_clips if of.tuned else 0)
    held_out = min(last + scale.test_clips, dataset.clips("held_out"))
    parts = [
        _batches(encoded(network, dataset, "held_out", numbers, scale.shape), JUDGED_AT_ONCE) if len(numbers) else []
        for numbers in np.split(np.arange(held_out), (first, last))
    ]
    shown = np.arange(last, min(last + scale.quality_clips, held_out))
    made = clip_stream.to_clips({**clip_stream.decode(dataset, "held_out", shown), "position": shown - last}).resized(
        scale.shape
    )
    motions = rendering.motions_of(made, [f"held-out {number}" for number in shown])
    train = partial(encoded, network, dataset, "train", np.arange(dataset.clips("train")))
    return Material(cache(train), *parts, motions, dataset)


def encoded(denoiser: Denoiser, dataset: shards.Dataset, split: str, numbers: np.ndarray, shape: ClipShape) -> Latents:
    """Clips of a split, cut to a shape, as latents; positions count from 0. What repeats over frames is kept once."""
    parts = []
    for some in np.split(numbers, range(DECODED_AT_ONCE, len(numbers), DECODED_AT_ONCE)):
        decoded = clip_stream.to_clips({**clip_stream.decode(dataset, split, some), "position": some})
        batch = denoiser.encode(decoded.resized(shape))
        once = {name: value[:, :, :1] if name == "reference" else value for name, value in batch.conditions.items()}
        parts.append(Latents(batch.clean, once, batch.position))
    frames = parts[0].clean.shape[2]
    conditions = {name: torch.cat([part.conditions[name] for part in parts]) for name in parts[0].conditions}
    conditions = {name: value.expand(-1, -1, frames, -1, -1) for name, value in conditions.items()}
    return Latents(torch.cat([part.clean for part in parts]), conditions, torch.arange(len(numbers)))


def rows(of: Latents, numbers: np.ndarray, position: np.ndarray, device: torch.device) -> Latents:
    """Some clips, at some positions of a run."""
    picked = torch.from_numpy(numbers).to(of.clean.device)
    conditions = {name: value[picked].to(device) for name, value in of.conditions.items()}
    return Latents(of.clean[picked].to(device), conditions, torch.from_numpy(position))


def _batches(of: Latents, size: int) -> list[Latents]:
    return [of.part(slice(first, first + size)) for first in range(0, len(of.position), size)]


def _to(batches: Sequence[Latents], device: torch.device) -> list[Latents]:
    return [rows(b, np.arange(len(b.position)), b.position.numpy(), device) for b in batches]


def stream(train: Cut, wanted: Experiment, seed: int, device: torch.device):
    """Batches for `fit`: the seed alone decides their order (`entprog.data.clip_stream`), so all arms see the same."""

    def open_at(shape, position):
        of, size = train(shape), wanted.batch_size_at(shape)
        while True:
            positions = position + np.arange(size)
            yield rows(of, clip_stream.clips_at(positions, len(of.position), seed), positions, device)
            position += size

    return open_at


# ---- trainings ----


def opened(bench: Bench, wanted: Experiment, train: Cut, search: Sequence[Latents], seed: int) -> Training:
    """A run at its beginning: network loaded, blocks scored."""
    device = bench.device
    denoiser = models.family(wanted.model.family).load(wanted.model, device, seed)
    if wanted.train.lora:
        lora.add(denoiser.network, blocks(denoiser.network), wanted.train.lora, seed)
    size, whole = wanted.data.batch_size, train(wanted.data.shape)
    (sample,) = _to([whole.part(slice(0, size))], device)
    found = cei.blocks_in_order(blocks(denoiser.network), denoiser.predict, sample.part(slice(0, 1)))
    table = None
    if wanted.schedule.needs_scores:
        needed = 0 if wanted.priority.kind in priorities.WITHOUT_DATA else wanted.priority.conditions
        conditions = _to(_batches(whole.part(slice(0, needed)), size), device) if needed else []
        table = priorities.score(denoiser, found, conditions, wanted.priority, seed=seed)
    state = start(denoiser.network, wanted)
    source = stream(train, wanted, seed, device)
    steps = fit(denoiser, found, source, _to(search, device), sample, table, wanted, state)
    return Training(wanted, denoiser, found, table, state, steps)


def work(bench: Bench, unit: Unit, budget: float, rate: float, batch: int) -> dict[str, Any]:
    """Do a unit; its record. budget: of a run, in the clock; rate: learning rate; batch: clips of a step. None of them
    counts for other kinds."""
    if unit.kind == "base":
        return _base(bench, unit)
    if unit.kind == "budget":
        return _budget(bench, unit)
    if unit.kind == "scores":
        return _scores(bench, unit)
    if unit.kind == "hindsight":
        return _hindsight(bench, unit, budget, rate, batch)
    share = bench.scale.tune_share if unit.kind == "tune" else 1.0
    return _run(bench, unit, share * budget, rate, batch)


def _base(bench: Bench, unit: Unit) -> dict[str, Any]:
    """Pre-train a family on the source, without pose, and leave it in its folder."""
    family = TASKS[unit.task].family
    wanted = pretraining(bench.scale, family)
    dataset = shards.read_dataset(bench.shards("source"))
    network = models.family(family).load(wanted.model, bench.device, 0)
    shape, few = bench.scale.shape, min(16, dataset.clips("held_out"))
    train = encoded(network, dataset, "train", np.arange(dataset.clips("train")), shape)
    held_out = encoded(network, dataset, "held_out", np.arange(few), shape)
    run = opened(bench, wanted, lambda _: train, _batches(held_out, wanted.data.batch_size), 0)
    curve = [(step.step, step.loss) for step in run.steps]
    run.denoiser.save(bench.base(family), shape=shape)
    loss = losses.held_out_loss(run.denoiser, _to(_batches(held_out, 4), bench.device), bench.scale.draws, 0)
    return {
        "held_out_loss": loss,
        "first_loss": float(np.mean([value for _, value in curve[:20]])),
        "last_loss": float(np.mean([value for _, value in curve[-20:]])),
        "steps": len(curve),
        "parameters": sum(p.numel() for p in run.denoiser.network.parameters()),
        "blocks": len(run.found),
        "seconds": run.state.seconds.total,
    }


def _budget(bench: Bench, unit: Unit) -> dict[str, Any]:
    """What full training's steps take in the clock: counted, or the median of some timed steps."""
    scale = bench.scale
    limit = {"flops": 1e30, "seconds": 1e9}[scale.clock]
    given = {"seed": 0, "rate": scale.rates[0], "batch": scale.batch_size, "budget": limit}
    wanted = experiment(scale, unit.task, "full", base=_base_of(bench, unit), **given)
    goods = material(bench, unit.task)
    run = opened(bench, wanted, goods.train, goods.search, 0)
    if scale.clock == "flops":
        (sample,) = _to([goods.train(scale.shape).part(slice(0, scale.batch_size))], bench.device)
        prices = Prices(run.denoiser, run.found, sample, Freeze(run.denoiser, run.found, wanted), wanted, {})
        step = prices.step_flops(prices.full)
    else:
        timed = [each.seconds for each, _ in zip(run.steps, range(30), strict=False)]
        step = float(np.median(timed[10:]))
    return {"step": step, "budget": step * scale.full_steps, "clock": scale.clock}


def _base_of(bench: Bench, unit: Unit) -> str:
    return bench.base(TASKS[unit.task].family)


def _scores(bench: Bench, unit: Unit) -> dict[str, Any]:
    """The base's blocks scored at leisure: CEI beside the loss increase on skip, on the task's own clips."""
    goods = material(bench, unit.task)
    given = {"seed": unit.seed, "rate": 1e-3, "batch": bench.scale.batch_size, "budget": 1e30}
    wanted = experiment(bench.scale, unit.task, "paper", base=_base_of(bench, unit), **given)
    many = {
        "conditions": min(4 * wanted.priority.conditions, len(goods.train(bench.scale.shape).position)),
        "draws": 2 * wanted.priority.draws,
    }
    wanted = wanted.model_copy(update={"priority": wanted.priority.model_copy(update=many)})
    table = opened(bench, wanted, goods.train, goods.search, unit.seed).table.as_json()
    return {name: value for name, value in table.items() if name != "per_condition"}


def _run(bench: Bench, unit: Unit, budget: float, rate: float, batch: int) -> dict[str, Any]:
    """One training of an arm, judged along the way on clips that neither it nor tuning saw."""
    scale, goods = bench.scale, material(bench, unit.task)
    tuning = unit.kind == "tune"
    given = {"seed": unit.seed, "rate": rate, "batch": batch, "budget": budget, "tuning": tuning}
    wanted = experiment(scale, unit.task, unit.arm, base=_base_of(bench, unit), **given)
    for shape in plans.ladder(wanted.schedule, wanted.data.shape, last=False):
        goods.train(shape)  # kept: the first run at a shape would pay for decoding, alone of all
    began = time.perf_counter()
    cpu = time.process_time()
    run = opened(bench, wanted, goods.train, goods.search, unit.seed)
    if routed := ARMS[unit.arm].routed:
        stages = len(plans.rows(wanted.schedule))
        study_routing.route(run.found, routed, unit.seed, lambda: run.state.stage < stages - 1)
    cpu_s = (run.table is not None and time.process_time() - cpu) or 0.0
    judged = _to(goods.tune if tuning else goods.test, bench.device)
    marks = budget * np.arange(1, scale.points + 1) / scale.points
    if tuning:
        marks = marks[-1:]
    curve, figures, last = [], [], None
    if not tuning:
        curve.append({"step": 0, "spent": 0.0, "seconds": 0.0, "cpu_s": 0.0, "loss": _loss(run, judged, scale)})
    while True:
        cpu = time.process_time()
        step = next(run.steps, None)
        if step is None:
            break
        cpu_s += time.process_time() - cpu
        last = step
        spent = bench.spent(step)
        if spent >= marks[0] or step.last:
            marks = marks[marks > spent] if not step.last else marks[-1:]
            loss = _loss(run, judged, scale)
            curve.append({"step": step.step, "spent": spent, "seconds": step.charged_s, "cpu_s": cpu_s, "loss": loss})
    if not tuning:
        figures = quality(bench, run.denoiser, goods)
    if last is None:
        raise RuntimeError(f"{unit.file}: scoring alone took the budget")
    state = run.state
    if scale.clock == "seconds" and bench.device.type == "cpu":
        check_had_a_core(unit, state.seconds.total, cpu_s)
    return {
        "rate": wanted.train.learning_rate,
        "batch": batch,
        "curve": curve,
        "held_out_loss": curve[-1]["loss"],
        "steps": state.step,
        "seconds": state.seconds.total,
        "cpu_s": cpu_s,
        "wall_s": time.perf_counter() - began,
        "flops": vars(state.flops),
        "overhead": _overhead(bench, state),
        "peak_memory_bytes": state.peak_memory_bytes,
        "trained_blocks": [decision.plan.m for decision in state.decisions],
        "decisions": [_in_short(decision) for decision in state.decisions],
        "quality": figures,
        "loss_tau": run.table.loss_tau if run.table else {},
    }


def check_had_a_core(unit: Unit, charged_s: float, cpu_s: float) -> None:
    """Raises UserError where what was charged is not what the unit's own work took of a processor."""
    if charged_s > MOST_WAITED * cpu_s:
        raise UserError(
            f"{unit.file}: {charged_s:.0f} s were charged, in which this process had {cpu_s:.0f} s of a processor: "
            "others work here; give it an idle core and repeat the command, which does this unit again"
        )


def _loss(run: Training, judged: Sequence[Latents], scale: Scale) -> float:
    return losses.held_out_loss(run.denoiser, judged, scale.draws, 0)


def _overhead(bench: Bench, state: RunState) -> float:
    """Share of what was spent that went into search and scoring."""
    spent = state.flops if bench.scale.clock == "flops" else state.seconds
    return (spent.search + spent.score) / spent.total


def _in_short(decision) -> dict[str, Any]:
    return {
        "stage": decision.stage,
        "m": decision.plan.m,
        "backward": decision.plan.backward,
        "shape": str(decision.plan.shape),
        "trained": list(decision.plan.trainable),
        "reason": decision.reason,
        "efficiencies": [
            {
                "m": plan.m,
                "backward": plan.backward,
                "shape": str(plan.shape),
                "value": e.value,
                "low": e.low,
                "high": e.high,
                "steps": e.steps,
            }
            for plan, e in zip(decision.candidates, decision.efficiencies, strict=False)
        ],
    }


SECONDS = ("unit_s", "wall_s", "cpu_s", "seconds")


def without_seconds(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a unit, and its curve, with None for all seconds."""
    bare = {**record, **{name: None for name in SECONDS if name in record}}
    return bare | {"curve": [without_seconds(point) for point in record["curve"]]} if "curve" in record else bare


# ---- hindsight ----


def _hindsight(bench: Bench, unit: Unit, budget: float, rate: float, batch: int) -> dict[str, Any]:
    """Every candidate of a stage's search, each from the same weights for the rest of the stage's budget."""
    goods, scale = material(bench, unit.task), bench.scale
    given = {"seed": unit.seed, "rate": rate, "batch": batch, "budget": budget}
    wanted = experiment(scale, unit.task, unit.arm, base=_base_of(bench, unit), **given)
    run = opened(bench, wanted, goods.train, goods.search, unit.seed)
    judged = _to(goods.test, bench.device)
    step = next((s for s in run.steps if s.decision and s.decision.stage == unit.stage and not run.state.waits), None)
    if step is None:
        return {"candidates": []}
    decision, end = run.state.decisions[-1], budget * (unit.stage + 1) / wanted.schedule.stages
    folder = Path(tempfile.mkdtemp(dir=bench.work))
    try:
        checkpoint.save(folder, run.denoiser.network, run.state, "hindsight", keep=1)
        full_step = decision.full_step_cost or decision.step_cost
        same_steps = max(1, int((end - bench.spent(step)) / full_step))
        found = [
            _branch(bench, wanted, goods, judged, folder, plan, end, same_steps) | {"chosen": plan == decision.plan}
            for plan in decision.candidates
        ]
    finally:
        shutil.rmtree(folder)
    return {
        "loss_before": _loss(run, judged, scale),
        "searched": bool(decision.efficiencies),
        "same_steps": same_steps,
        "candidates": found,
    }


def _branch(
    bench: Bench, wanted: Experiment, goods: Material, judged, folder: Path, plan: Plan, end: float, same_steps: int
) -> dict[str, Any]:
    """One candidate's training from a checkpoint on, whatever the search said."""
    seed = wanted.train.seed
    given = wanted.model_copy(update={"schedule": wanted.schedule.model_copy(update={"kind": "full"})})
    run = opened(bench, given, goods.train, goods.search, seed)
    state = run.state
    checkpoint.load(folder, checkpoint.newest(folder), run.denoiser.network, state, "hindsight")
    state.plan = plan
    state.decisions[-1] = replace(state.decisions[-1], plan=plan)
    state.begun = {name: step for name, step in state.begun.items() if name in plan.trainable}
    first, at_same_steps = state.step, None
    for step in run.steps:
        if step.step - first == same_steps:
            at_same_steps = _loss(run, judged, bench.scale)
        if bench.spent(step) >= end:
            break
    return {
        "m": plan.m,
        "backward": plan.backward,
        "shape": str(plan.shape),
        "trained": list(plan.trainable),
        "steps": state.step - first,
        "loss": _loss(run, judged, bench.scale),
        "loss_at_same_steps": at_same_steps,
    }


# ---- quality ----


@cache
def _meter(names: tuple[str, ...], device: str) -> Meter:
    return Meter(names, config.Evaluate(), device)


def quality(bench: Bench, denoiser: Denoiser, goods: Material) -> list[dict[str, Any]]:
    """Figures of generated clips against the truth, each with its card."""
    scale, shape = bench.scale, bench.scale.shape
    meter = _meter(scale.metrics, str(bench.device))
    settings = config.Generate(steps=scale.quality_steps, batch_size=len(goods.motions))
    made = rendering.make(denoiser, goods.motions, shape, settings)
    found = [
        meter.measure(result, motion.video, motion.reference, motion.pose)
        for result, motion in zip(made, goods.motions, strict=True)
    ]
    out = []
    for name in scale.metrics:
        if METRICS[name].of == "set":
            real, results = zip(*(each.features[name] for each in found), strict=True)
            figure = quality_figures.frechet_figure(real, results, 200, 0.95, 0)
        else:
            figure = quality_figures.mean_figure([each.values[name] for each in found], 200, 0.95, 0)
        network, sha256, resize = meter.judge(name)
        card = ProtocolCard(
            metric=name, better=METRICS[name].better, network=network, weights_sha256=sha256, resize=resize,
            frames=shape.frames, height=shape.height, width=shape.width, fps=shape.fps,
            codec="truth h264 4:2:0, result none", clips=len(found), split="held_out",
            dataset=goods.dataset.fingerprint, sampler=type(denoiser.scheduler()).__name__, steps=settings.steps,
            guidance="none", seed=settings.seed,
        )  # fmt: skip
        out.append({"metric": name, **vars(figure), "card": {**vars(card), "id": card.id}})
    return out
