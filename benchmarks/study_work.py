"""What a unit of the study does, by its kind: its record."""

from typing import Any

import numpy as np

from benchmarks.study_arms import TASKS, experiment, pretraining
from benchmarks.study_hindsight import hindsight
from benchmarks.study_material import batches, encoded, material, to_device
from benchmarks.study_trainings import judged, opened
from benchmarks.study_units import Bench, Unit
from entprog import models
from entprog.data import shards
from entprog.diffusion import losses
from entprog.schedule.freezing import Freeze
from entprog.schedule.prices import Prices


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
        return hindsight(bench, unit, budget, rate, batch)
    share = bench.scale.tune_share if unit.kind == "tune" else 1.0
    return judged(bench, unit, share * budget, rate, batch)


def _base(bench: Bench, unit: Unit) -> dict[str, Any]:
    """Pre-train a family on the source, without pose, and leave it in its folder."""
    family = TASKS[unit.task].family
    wanted = pretraining(bench.scale, family)
    dataset = shards.read_dataset(bench.shards("source"))
    network = models.family(family).load(wanted.model, bench.device, 0)
    shape, few = bench.scale.shape, min(16, dataset.clips("held_out"))
    train = encoded(network, dataset, "train", np.arange(dataset.clips("train")), shape)
    held_out = encoded(network, dataset, "held_out", np.arange(few), shape)
    run = opened(bench, wanted, lambda _: train, batches(held_out, wanted.data.batch_size), 0)
    curve = [(step.step, step.loss) for step in run.steps]
    run.denoiser.save(bench.base(family), shape=shape)
    loss = losses.held_out_loss(run.denoiser, to_device(batches(held_out, 4), bench.device), bench.scale.draws, 0)
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
    wanted = experiment(scale, unit.task, "full", base=bench.base_of(unit), **given)
    goods = material(bench, unit.task)
    run = opened(bench, wanted, goods.train, goods.search, 0)
    if scale.clock == "flops":
        (sample,) = to_device([goods.train(scale.shape).part(slice(0, scale.batch_size))], bench.device)
        prices = Prices(run.denoiser, run.found, sample, Freeze(run.denoiser, run.found, wanted), wanted, {})
        step = prices.step_flops(prices.full)
    else:
        timed = [each.seconds for each, _ in zip(run.steps, range(30), strict=False)]
        step = float(np.median(timed[10:]))
    return {"step": step, "budget": step * scale.full_steps, "clock": scale.clock}


def _scores(bench: Bench, unit: Unit) -> dict[str, Any]:
    """The base's blocks scored at leisure: CEI beside the loss increase on skip, on the task's own clips."""
    goods = material(bench, unit.task)
    given = {"seed": unit.seed, "rate": 1e-3, "batch": bench.scale.batch_size, "budget": 1e30}
    wanted = experiment(bench.scale, unit.task, "paper", base=bench.base_of(unit), **given)
    many = {
        "conditions": min(4 * wanted.priority.conditions, len(goods.train(bench.scale.shape).position)),
        "draws": 2 * wanted.priority.draws,
    }
    wanted = wanted.model_copy(update={"priority": wanted.priority.model_copy(update=many)})
    table = opened(bench, wanted, goods.train, goods.search, unit.seed).table.as_json()
    return {name: value for name, value in table.items() if name != "per_condition"}
