"""fit(): stages outside, steps inside. Yields one Step per update; whoever runs it reports and saves.

A stage of Ent-Prog begins with a search (trial steps of nested candidates, `supernet`) and goes on with the plan that
the search chose. Plain training is the same code with one plan. What the next step does is a function of the RunState
alone, so that a run resumed from any step goes on as if it had not been interrupted.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from entprog import costs, distributed, objectives, optimizer, plans, supernet
from entprog.blocks import Block, unfreeze
from entprog.cei import ScoreTable
from entprog.clips import Latents
from entprog.config import ClipShape, Experiment
from entprog.models import Denoiser
from entprog.plans import Plan
from entprog.state import RunState
from entprog.supernet import Decision, Trial

Batches = Callable[[ClipShape, int], Iterator[Latents]]
"""(shape, position) → this rank's batches from that position of the run's sequence of clips on."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One update, as it is reported."""

    step: int
    """1-based."""
    stage: int
    phase: str
    """`search` or `train`."""
    plan: Plan
    loss: float
    """Mean over all ranks' clips."""
    learning_rate: float
    gradient_norm: float
    seconds: float
    """The update, slowest rank, waiting for data not included."""
    wait_s: float
    """Waiting for data, slowest rank."""
    charged_s: float
    """Charged so far: training, search, scoring."""
    flops: float
    """Counted so far."""
    clips: int
    """Clips of this update, all ranks."""
    memory_bytes: int
    """Peak so far: allocated on the GPU; counted (weights, gradients, moments, activations) on a CPU."""
    held_out_loss: float | None = None
    decision: Decision | None = None
    """The stage's decision, on the step after which it was taken."""
    last: bool = False


def start(network: nn.Module, experiment: Experiment) -> RunState:
    """The state of a run that has not begun."""
    return RunState(optimizer=optimizer.adamw(network, experiment.train))


def fit(
    denoiser: Denoiser,
    found: Sequence[Block],
    batches: Batches,
    held_out: Sequence[Latents],
    sample: Latents,
    scores: ScoreTable | None,
    experiment: Experiment,
    state: RunState,
) -> Iterator[Step]:
    """Train until `train.steps` or `train.seconds`; yields after every update, with `state` at the step's end.

    held_out: this rank's share of the held-out batches, which may be empty. sample: any batch, to count and time plans
    on. scores: needed for every schedule but `full`.
    """
    if not is_over(experiment, state):
        yield from _Fit(denoiser, found, batches, held_out, sample, scores, experiment, state).run()


def progress(experiment: Experiment, state: RunState) -> float:
    """Share of the run's budget that is used up, 0..1."""
    train = experiment.train
    by_steps = state.step / train.steps if train.steps else 0.0
    by_seconds = state.seconds.total / train.seconds if train.seconds else 0.0
    return max(by_steps, by_seconds)


def is_over(experiment: Experiment, state: RunState) -> bool:
    return progress(experiment, state) >= 1


def held_out_loss(denoiser: Denoiser, held_out: Sequence[Latents], draws: int, seed: int) -> float:
    """ℓ: mean loss over all ranks' held-out clips at fixed timesteps and noise.

    Timesteps are spread evenly over 0..1: `draws` strata per clip, shifted from clip to clip by the golden ratio.
    """
    total = torch.zeros(2, dtype=torch.float64)
    with torch.no_grad():
        for batch in held_out:
            for draw in range(draws):
                numbers = batch.position * 1009 + draw
                t = ((draw + (batch.position * 0.6180339887) % 1) / draws).clamp(0.02, 0.98)
                losses = _losses(denoiser, batch, numbers, t, seed)
                total += torch.tensor([losses.double().sum().item(), len(losses)], dtype=torch.float64)
    parts = distributed.gathered(total.tolist())
    return sum(part[0] for part in parts) / sum(part[1] for part in parts)


def _losses(denoiser: Denoiser, batch: Latents, numbers: torch.Tensor, t: torch.Tensor, seed: int) -> torch.Tensor:
    """Loss of each clip, [B], at timesteps t with the noise that (numbers, seed) stand for."""
    t = t.to(batch.clean.device, torch.float32)
    noise = objectives.noise_like(batch.clean, numbers, seed)
    noisy, target = objectives.flow_pair(batch.clean, noise, t)
    return objectives.loss(denoiser.predict(noisy, t, batch.conditions), target)


class _Fit:
    """What `fit`'s steps share; lives as long as one call of it."""

    def __init__(self, denoiser, found, batches, held_out, sample, scores, experiment, state):
        self.denoiser: Denoiser = denoiser
        self.found: list[Block] = list(found)
        self.open_batches: Batches = batches
        self.held_out: Sequence[Latents] = held_out
        self.sample: Latents = sample
        self.experiment: Experiment = experiment
        self.state: RunState = state
        self.names = [block.name for block in self.found]
        schedule = experiment.schedule
        if scores is None and schedule.kind != "full":
            raise ValueError(f"schedule {schedule.kind} needs a score table")
        self.priority = scores.priority(experiment.priority.sign) if scores else dict.fromkeys(self.names, 0.0)
        if scores and state.step == 0:
            state.seconds.score = scores.seconds
            state.flops.score = float(scores.flops)
        groups = denoiser.outside()
        self.outside = {
            "always": [p for group in groups.values() for p in group],
            "conditions": groups["conditions"],
            "never": [],
        }[schedule.outside]
        self.device = next(denoiser.network.parameters()).device
        self.rank, self.world = distributed.world()
        self.in_force: Plan | None = None
        self.trained: list[nn.Parameter] = []
        self.costs: dict[Plan, costs.Cost] = {}
        self.news: Decision | None = None
        """A decision that no Step has carried yet."""
        self.stream: tuple[ClipShape, Iterator[Latents]] | None = None
        self.clips_per_step = experiment.data.batch_size * self.world

    def run(self) -> Iterator[Step]:
        try:
            while not is_over(self.experiment, self.state):
                yield self.search_step() if self.searching() else self.train_step()
        finally:
            if self.stream is not None and hasattr(self.stream[1], "close"):
                self.stream[1].close()

    # -- stages

    def searching(self) -> bool:
        """Begin a new stage if it is time; True while its search goes on."""
        state, schedule = self.state, self.experiment.schedule
        stage = min(int(progress(self.experiment, state) * schedule.stages), schedule.stages - 1)
        if stage > state.stage:
            started, before = self.now(), state.plan
            state.stage, state.plan, state.trials, state.search_cost, state.loss_now = stage, None, [], 0.0, None
            state.candidates = tuple(
                plans.candidates(self.names, self.priority, schedule, self.experiment.data.shape, stage, before)
            )
            if len(state.candidates) == 1:
                self.decide("schedule")
            elif not self.another_round():
                self.decide()
            if schedule.kind == "entprog":  # counting and timing candidates is part of the search
                self.charge("search", distributed.slowest(self.now() - started, self.device), 0.0)
        return state.plan is None

    def decide(self, reason: str | None = None) -> None:
        """Take the stage's decision; the same on every rank or an error on every rank."""
        state = self.state
        decision = supernet.choose(
            state.candidates,
            state.trials,
            self.experiment.schedule,
            stage=state.stage,
            seed=self.experiment.train.seed,
            search_cost=state.search_cost,
        )
        if reason:
            decision = Decision(**{**vars(decision), "reason": reason})
        distributed.agree(f"the decision of stage {state.stage}", decision.as_json())
        state.decisions.append(decision)
        state.plan = decision.plan
        self.put_in_force(state.plan)
        optimizer.follow(state.optimizer, self.trained)
        self.news = decision

    def another_round(self) -> bool:
        """Whether the search's share of the stage's budget carries one more step of every candidate."""
        state, schedule = self.state, self.experiment.schedule
        rounds, inside = divmod(len(state.trials), len(state.candidates))
        if inside:
            return True
        if rounds >= schedule.search_steps:
            return False
        return state.search_cost + self.round_cost() <= schedule.search_share * self.stage_budget()

    def round_cost(self) -> float:
        """Expected cost of one step of every candidate with its evaluations, in the schedule's clock."""
        state = self.state
        if self.experiment.schedule.clock == "seconds" and state.trials:
            return state.search_cost / len(state.trials) * len(state.candidates)
        flops = sum(self.step_flops(plan) + self.evaluation_flops() for plan in state.candidates)
        return self.in_clock(flops)

    def stage_budget(self) -> float:
        """What one stage may cost, in the schedule's clock; by steps, as if all were full training."""
        train, stages = self.experiment.train, self.experiment.schedule.stages
        budgets = []
        if train.seconds:
            budgets.append(train.seconds / stages)
        if train.steps:
            full = plans.full(self.names, self.experiment.data.shape)
            budgets.append(self.in_clock(train.steps / stages * self.step_flops(full)))
        return min(budgets)

    def in_clock(self, flops: float) -> float:
        """Counted FLOPs in the schedule's clock: themselves, or seconds at this run's measured rate."""
        if self.experiment.schedule.clock == "flops":
            return flops
        if self.state.seconds_per_flop is None:
            self.state.seconds_per_flop = self.measured_rate()
        return flops * self.state.seconds_per_flop

    def measured_rate(self) -> float:
        """Seconds per FLOP of one full forward and backward pass, after one to warm up; changes no weight."""
        full = plans.full(self.names, self.experiment.data.shape)
        self.put_in_force(full)
        batch = self.sample
        for _ in range(2):
            started = self.now()
            self.one_loss(batch).backward()
            self.state.optimizer.zero_grad(set_to_none=True)
            seconds = distributed.slowest(self.now() - started, self.device)
        return seconds / (self.cost(full).step_flops(len(batch.position)) * self.world)

    # -- steps

    def train_step(self) -> Step:
        state = self.state
        self.put_in_force(state.plan)
        loss, rate, norm, seconds, wait_s = self.update()
        self.charge("train", seconds + wait_s, self.step_flops(state.plan))
        return self.step("train", state.plan, loss, rate, norm, seconds, wait_s)

    def search_step(self) -> Step:
        state, experiment = self.state, self.experiment
        started = self.now()
        flops = 0.0
        if state.loss_now is None:
            state.loss_now = self.search_loss()
            flops += self.evaluation_flops()
        number = supernet.turn(len(state.trials), len(state.candidates), state.stage, experiment.train.seed)
        plan = state.candidates[number]
        self.put_in_force(plan)
        step_flops = self.step_flops(plan)
        loss, rate, norm, seconds, wait_s = self.update()
        before, state.loss_now = state.loss_now, self.search_loss()
        flops += step_flops + self.evaluation_flops()
        elapsed = distributed.slowest(self.now() - started, self.device)
        by_flops = experiment.schedule.clock == "flops"
        cost = step_flops if by_flops else seconds
        state.trials.append(Trial(candidate=number, loss_before=before, loss=state.loss_now, cost=cost))
        self.charge("search", elapsed, flops)
        state.search_cost += flops if by_flops else elapsed
        if not self.another_round():
            self.decide()
        return self.step("search", plan, loss, rate, norm, seconds, wait_s)

    def step(self, phase, plan, loss, rate, norm, seconds, wait_s) -> Step:
        state, train = self.state, self.experiment.train
        decision, self.news = self.news, None
        memory = self.cost(plan).memory_bytes(self.experiment.data.batch_size)
        if self.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(self.device)
        state.peak_memory_bytes = max(state.peak_memory_bytes, memory)
        last = is_over(self.experiment, state)
        evaluate = last or state.step == 1 or state.step % train.held_out_every == 0
        return Step(
            step=state.step,
            stage=state.stage,
            phase=phase,
            plan=plan,
            loss=loss,
            learning_rate=rate,
            gradient_norm=norm,
            seconds=seconds,
            wait_s=wait_s,
            charged_s=state.seconds.total,
            flops=state.flops.total,
            clips=self.clips_per_step,
            memory_bytes=state.peak_memory_bytes,
            held_out_loss=self.record_loss() if evaluate else None,
            decision=decision,
            last=last,
        )

    def update(self) -> tuple[float, float, float, float, float]:
        """One update under the plan in force: (loss, learning rate, gradient norm, seconds, seconds waited)."""
        state, train = self.state, self.experiment.train
        waiting = self.now()
        batch = self.next_batch()
        started = self.now()
        rate = optimizer.set_learning_rate(state.optimizer, train, state.step)
        loss = self.one_loss(batch)
        loss.backward()
        distributed.reduce_gradients(self.trained)
        limit = train.gradient_clip or math.inf
        norm = nn.utils.clip_grad_norm_([p for p in self.trained if p.grad is not None], limit)
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        if train.ema_decay:
            optimizer.update_ema(state.ema, self.denoiser.network, train.ema_decay)
        values = torch.stack([loss.detach().double(), norm.detach().double()]).tolist()
        ended = self.now()
        state.step += 1
        state.position += self.clips_per_step
        seconds = distributed.slowest(ended - started, self.device)
        wait_s = distributed.slowest(started - waiting, self.device)
        return distributed.mean(values[0], self.device), rate, values[1], seconds, wait_s

    def one_loss(self, batch: Latents) -> torch.Tensor:
        train = self.experiment.train
        t = objectives.timesteps(batch.position, train.seed, shift=train.timestep_shift)
        return _losses(self.denoiser, batch, batch.position, t, train.seed).mean()

    def next_batch(self) -> Latents:
        shape = self.in_force.shape
        if self.stream is None or self.stream[0] != shape:
            if self.stream is not None and hasattr(self.stream[1], "close"):
                self.stream[1].close()
            self.stream = shape, iter(self.open_batches(shape, self.state.position))
        return next(self.stream[1])

    def put_in_force(self, plan: Plan) -> None:
        if plan == self.in_force:
            return
        distributed.agree(f"what to train at step {self.state.step}", plan.as_json())
        self.trained = unfreeze(
            self.denoiser.network,
            self.found,
            plan.trainable,
            self.outside,
            plan.backward,
            self.experiment.model.gradient_checkpointing,
        )
        self.in_force = plan

    # -- cost and loss

    def charge(self, purpose: str, seconds: float, flops: float) -> None:
        self.state.seconds.add(purpose, seconds)
        self.state.flops.add(purpose, flops)

    def cost(self, plan: Plan) -> costs.Cost:
        """Counted once per plan on the real network, with one clip."""
        if plan not in self.costs:
            in_force = self.in_force
            self.put_in_force(plan)
            clip = self.sample.part(slice(0, 1))
            self.costs[plan] = costs.count(self.denoiser.network, self.trained, lambda: self.one_loss(clip))
            if in_force is not None:
                self.put_in_force(in_force)
        return self.costs[plan]

    def step_flops(self, plan: Plan) -> float:
        return float(self.cost(plan).step_flops(self.clips_per_step))

    def evaluation_flops(self) -> float:
        """One search evaluation: a forward pass per clip, a third of full training's."""
        full = self.cost(plans.full(self.names, self.experiment.data.shape))
        return full.flops / 3 * self.experiment.data.held_out_clips

    def search_loss(self) -> float:
        return held_out_loss(self.denoiser, self.held_out, 1, self.experiment.train.seed)

    def record_loss(self) -> float:
        data = self.experiment.data
        return held_out_loss(self.denoiser, self.held_out, data.held_out_draws, self.experiment.train.seed)

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
