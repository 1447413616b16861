"""fit(): stages outside, steps inside. Yields one Step per update; whoever runs it reports and saves.

A run goes through stages, each with a plan: what the schedule's table says, or what a search at the stage's start chose
(trial steps of nested candidates, `efficiency`). Plain training is one stage. What the next step does is a function of
the RunState alone, so that a run resumed from any step goes on as if it had not been interrupted.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from entprog import config
from entprog.blocks import Block
from entprog.config import ClipShape, Experiment
from entprog.data.clips import Latents, Spent
from entprog.diffusion import losses
from entprog.diffusion.denoiser import Denoiser
from entprog.distributed import agree, fsdp
from entprog.distributed.reducing import Reducer
from entprog.schedule import plans
from entprog.schedule.efficiency import Decision, Trial
from entprog.schedule.freezing import Freeze
from entprog.schedule.plans import Plan
from entprog.schedule.prices import Prices
from entprog.schedule.search import Search
from entprog.schedule.state import RunState
from entprog.scoring import priorities
from entprog.scoring.tables import ScoreTable, drift
from entprog.training import averages, optimizer
from entprog.training.steps import Step, Update

Batches = Callable[[ClipShape, int], Iterator[Latents]]
"""(shape, position) → this rank's batches from that position of the run's sequence of clips on. May have an attribute
`spent` (`clips.Spent`): what they have cost so far."""


class DivergedError(RuntimeError):
    """Loss or gradient was not finite in `train.max_nonfinite` updates in a row; raised on every rank."""


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
    conditions: Sequence[Latents] = (),
    held_out_draws: slice = slice(None),
) -> Iterator[Step]:
    """Train until the budget (`train.steps`, `seconds`, `flops`) is used up; yields after every update, with `state` at
    the step's end.

    held_out: this rank's share of the held-out batches, which may be empty; their position is their place among all
    held-out clips. sample: any batch, to count and time plans on. scores: needed where blocks are ranked. conditions:
    clips to score on, the same on every rank, where `priority.rescore` asks for it. held_out_draws: which draws of its
    held-out clips are this rank's, where several have them.

    Raises DivergedError on every rank once `train.max_nonfinite` updates in a row had to be skipped.
    """
    if not is_over(experiment, state):
        given = batches, held_out, held_out_draws, sample, scores, experiment, state, conditions
        yield from _Fit(denoiser, found, *given).run()


def progress(experiment: Experiment, state: RunState) -> float:
    """Share of the run's budget that is used up, 0..1."""
    train = experiment.train
    by_steps = state.step / train.steps if train.steps else 0.0
    by_seconds = state.seconds.total / train.seconds if train.seconds else 0.0
    by_flops = state.flops.total / train.flops if train.flops else 0.0
    return max(by_steps, by_seconds, by_flops)


def is_over(experiment: Experiment, state: RunState) -> bool:
    return progress(experiment, state) >= 1


class _Fit:
    """What `fit`'s steps share; lives as long as one call of it."""

    def __init__(
        self, denoiser, found, batches, held_out, held_out_draws, sample, scores, experiment, state, conditions
    ):
        self.denoiser: Denoiser = denoiser
        self.found: list[Block] = list(found)
        self.open_batches: Batches = batches
        self.held_out: Sequence[Latents] = held_out
        self.held_out_draws: slice = held_out_draws
        few = [(batch, int((batch.position < experiment.schedule.search_clips).sum())) for batch in held_out]
        self.search_held_out = [batch.part(slice(0, clips)) for batch, clips in few if clips]
        self.sample: Latents = sample
        self.experiment: Experiment = experiment
        self.state: RunState = state
        self.names = plans.eligible(self.found, experiment.schedule.blocks)
        schedule = experiment.schedule
        if scores is None and schedule.needs_scores:
            raise ValueError(f"schedule {schedule.kind} needs a score table")
        self.scores: ScoreTable | None = scores
        self.conditions: Sequence[Latents] = conditions
        priority = scores.priority(experiment.priority.sign) if scores else dict.fromkeys(self.names, 0.0)
        if scores and schedule.needs_scores and state.step == 0:
            state.seconds.score = scores.seconds
            state.flops.score = float(scores.flops)
        self.device = next(denoiser.network.parameters()).device
        self.rank, self.world = agree.world()
        if self.world > experiment.train.workers * experiment.train.accumulate:
            raise ValueError(f"{self.world} ranks, but train.workers · train.accumulate is smaller")
        agree.agree("the settings", config.settings(experiment))
        agree.agree("the blocks' priorities", priority)
        agree.agree("where the run stands", state.as_json())
        self.freeze = Freeze(denoiser, self.found, experiment)
        last = max((int(batch.position.max()) for batch in held_out), default=-1)
        clips = int(agree.largest_of([last + 1], self.device)[0])
        self.prices = Prices(denoiser, self.found, sample, self.freeze, experiment, state.models, state.ema, clips)
        self.search = Search(self.names, state.priority or priority, self.prices, experiment, state)
        self.reducer, self.reduced = Reducer([]), []
        """Averages the gradients of what is trained; idle where weights are sharded. And the list of that."""
        self.news: Decision | None = None
        """A decision that no Step has carried yet."""
        self.pace: agree.Pace | None = None
        """Pace of the last update."""
        self.drift: float | None = None
        """Drift of a new score table that no Step has carried yet."""
        self.moments: tuple[tuple[Plan, int] | None, int] = None, 0
        """Bytes of moments on the device, and where they were counted: a plan, and how many have any."""
        self.stream: tuple[ClipShape, Iterator[Latents]] | None = None
        self.before = 0.0
        """Progress at the end of the step before."""
        self.startup_s = 0.0
        """Until every rank's first batch was there: the same for every schedule and repeated by every resume, so that
        no budget pays for it."""
        self.reported = self.spent()
        """Of what the batches have cost, what Steps have carried."""
        total = experiment.train.workers * experiment.train.accumulate
        self.batches_per_update = total
        """Over all ranks."""
        self.batches_per_step = len(range(self.rank, total, self.world))
        """This rank's share of an update's batches."""
        self.rounds = self.batches_per_step
        """Forward and backward passes of an update."""
        if fsdp.is_sharded(denoiser.network):  # every pass brings weights together: all ranks take part in each
            self.rounds = self.prices.rounds
        self.weight = self.world / total
        """Of each of them: what ranks then average is the mean over all."""

    def run(self) -> Iterator[Step]:
        try:
            self.search.foresee()
            while not is_over(self.experiment, self.state):
                agree.wait_for_all()  # what one did alone since the last step, a checkpoint or a log, is in no budget
                self.before = progress(self.experiment, self.state)
                self.check_it_goes_on()
                self.begin_stage()
                yield self.search_step() if self.state.plan is None else self.train_step()
        finally:
            self.reducer.close()
            if self.stream is not None and hasattr(self.stream[1], "close"):
                self.stream[1].close()

    def check_it_goes_on(self) -> None:
        row, most = self.state.skipped_in_a_row, self.experiment.train.max_nonfinite
        if row >= most:
            raise DivergedError(
                f"loss or gradient was not finite in {row} updates in a row, up to step {self.state.step} "
                f"(train.max_nonfinite={most}): lower train.learning_rate, or look at the clips"
            )

    # -- stages

    def begin_stage(self) -> None:
        """Begin the next stage, or draw blocks anew, if it is time. While a search goes on there is no plan."""
        state, schedule = self.state, self.experiment.schedule
        stage = plans.stage_at(schedule, progress(self.experiment, state))
        if stage == state.stage and self.search.redraw():
            self.train_plan(state.plan)
        if stage > state.stage or (state.waits and state.step >= self.experiment.train.warmup_steps):
            if stage > max(0, state.stage) and self.experiment.priority.rescore and plans.ranks(schedule, stage):
                self.rescore(stage)
            started = self.now()
            self.search.open(stage)
            if schedule.kind == "entprog":  # counting and timing candidates is part of the search
                elapsed = agree.slowest(self.now() - started, self.device)
                self.charge("search", elapsed, 0.0)
                state.search_cost += self.in_clock(elapsed, 0.0)
            decision = self.search.begin()
            if decision is not None:
                self.carry_out(decision)

    def rescore(self, stage: int) -> None:
        """Rank the blocks by the weights as they are now; charged as scoring."""
        priority, seed = self.experiment.priority, self.experiment.train.seed
        new = priorities.score(
            self.denoiser,
            self.found,
            self.conditions,
            priority,
            key=f"stage {stage}",
            seed=seed,
            law=self.experiment.timesteps,
        )
        if (plan := self.freeze.plan) is not None:  # gradients cross every block as scores are made
            fsdp.spare_frozen(self.found, plan.trainable, plan.backward)
        self.search.priority = self.state.priority = new.priority(priority.sign)
        self.drift = drift(self.scores, new, priority.sign)
        self.charge("score", new.seconds, float(new.flops))

    def carry_out(self, decision: Decision) -> None:
        """Train what was decided."""
        self.train_plan(decision.plan)
        self.news = decision

    def train_plan(self, plan: Plan) -> None:
        """Freeze what a plan leaves out, its optimizer state with it, which is charged: it may be gigabytes to move."""
        state, started = self.state, self.now()
        self.put_in_force(plan)
        state.begun = {name: step for name, step in state.begun.items() if name in plan.trainable}
        optimizer.follow(state.optimizer, self.freeze.trained, self.experiment.train.frozen_state)
        self.charge("train", agree.slowest(self.now() - started, self.device), 0.0)

    # -- steps

    def train_step(self) -> Step:
        state = self.state
        if self.put_in_force(state.plan):  # a resumed run has moments where it loaded them
            optimizer.follow(state.optimizer, self.freeze.trained, self.experiment.train.frozen_state)
        update = self.update()
        flops = self.prices.step_flops(state.plan)
        self.charge("train", update.seconds + update.wait_s, flops)
        self.search.note_saving(state.decisions[-1], self.in_clock(update.seconds, flops))
        return self.step("train", state.plan, update)

    def search_step(self) -> Step:
        state = self.state
        started = self.now()
        flops = 0.0
        if state.loss_now is None:
            state.loss_now = self.search_loss()
            flops += self.prices.evaluation_flops()
        number, plan = self.search.turn()
        self.put_in_force(plan)
        step_flops = self.prices.step_flops(plan)
        update = self.update()
        before, state.loss_now = state.loss_now, self.search_loss()
        flops += step_flops + self.prices.evaluation_flops()
        elapsed = agree.slowest(self.now() - started, self.device)
        self.charge("search", elapsed, flops)
        cost = self.in_clock(update.seconds, step_flops)
        trial = Trial(candidate=number, loss_before=before, loss=state.loss_now, cost=cost)
        decision = self.search.note(trial, self.in_clock(elapsed, flops))
        if decision is not None:
            self.carry_out(decision)
        return self.step("search", plan, update)

    def in_clock(self, seconds: float, flops: float) -> float:
        return seconds if self.experiment.schedule.clock == "seconds" else flops

    def step(self, phase: str, plan: Plan, update: Update) -> Step:
        state, train = self.state, self.experiment.train
        decision, self.news = self.news, None
        drifted, self.drift = self.drift, None
        model = state.models.get(plan.shape)
        last, now = is_over(self.experiment, state), progress(self.experiment, state)
        next_one = now + (now - self.before)  # where the next step will end, if it takes as long
        at_share = any(self.before < share <= next_one for share in train.held_out_shares)
        state.peak_memory_bytes = max(state.peak_memory_bytes, update.plan_memory_bytes)
        evaluate = last or state.step == 1 or state.step % train.held_out_every == 0 or at_share
        if self.moments[0] != (at := (plan, len(state.optimizer.state))):  # they come with a plan's first step
            self.moments = at, optimizer.state_bytes(state.optimizer, self.device)
        return Step(
            step=state.step,
            stage=state.stage,
            phase=phase,
            plan=plan,
            **vars(update),
            skipped_updates=state.skipped,
            charged_s=state.seconds.total,
            search_s=state.seconds.search,
            score_s=state.seconds.score,
            flops=state.flops.total,
            flops_left=self.search.flops_left(plan),
            clips=self.clips_per_step(plan),
            memory_bytes=state.peak_memory_bytes,
            optimizer_bytes=self.moments[1],
            predicted_s=self.prices.step(plan) if model and self.prices.by_seconds else None,
            predicted_memory_bytes=self.prices.memory(plan) if model else None,
            held_out_loss=self.record_loss() if evaluate else None,
            decision=decision,
            pace=self.pace,
            drift=drifted,
            last=last,
        )

    def update(self) -> Update:
        """One update under the plan in force; skipped, on all ranks alike, where loss or gradient is not finite."""
        state, train = self.state, self.experiment.train
        rate = optimizer.set_learning_rate(
            state.optimizer, train, state.step, state.begun, progress(self.experiment, state)
        )
        law = self.experiment.timesteps_at(self.freeze.plan.shape)
        reducer = self.reducing()
        begun, waited_s, loss = self.now(), 0.0, 0.0
        for turn in range(self.rounds):
            weight = 0.0  # a pass for the other ranks' sake, over the batch before
            if turn < self.batches_per_step:
                waiting, weight = self.now(), self.weight
                batch = self.next_batch()
                waited_s += self.now() - waiting
            part = losses.training_loss(self.denoiser, batch, train, law) * weight
            if turn == self.rounds - 1:
                reducer.begin()
            part.backward()
            loss += part.detach().double()
        reducer.flush()  # before the clock waits for the GPU, which has gradients to send meanwhile
        passes_s = self.now() - begun - waited_s - reducer.waited_s
        reducer.finish()
        self.pace = agree.pace(passes_s, self.device)
        limit = train.gradient_clip or math.inf
        norm = fsdp.whole(nn.utils.clip_grad_norm_([p for p in self.freeze.trained if p.grad is not None], limit))
        norm = norm.detach().double()
        odd = ~(loss.isfinite() & norm.isfinite())
        means = agree.means_of(torch.stack([loss, odd.double()]))
        mean_loss, skipped, norm = torch.cat([means, norm.view(1)]).tolist()  # the step's one look at the device
        if not skipped:
            if train.ema_decay:
                averages.start(state.ema, self.denoiser.network)
            state.optimizer.step()
            if train.ema_decay:
                averages.update(state.ema, self.denoiser.network, train.ema_decay)
                averages.widen(state.ema_gaps, self.freeze.plan.trainable, train.ema_decay)
        state.optimizer.zero_grad(set_to_none=True)
        took_s = self.now() - begun  # before its memory is counted
        fed, self.reported = self.spent().since(self.reported), self.spent()
        mine = [took_s, waited_s, fed.open_s, fed.copy_s, fed.encode_s, float(self.memory(self.freeze.plan))]
        # One rank's wait for its clips is the others' wait for its gradients: it is not to count twice.
        all_s, wait_s, open_s, copy_s, encode_s, memory = agree.largest_of(mine, self.device)
        state.step += 1
        state.position += self.clips_per_step(self.freeze.plan)
        state.skipped += int(skipped)
        state.skipped_in_a_row = state.skipped_in_a_row + 1 if skipped else 0
        return Update(
            loss=mean_loss,
            learning_rate=rate,
            gradient_norm=norm,
            skipped=bool(skipped),
            seconds=all_s - wait_s,
            wait_s=wait_s,
            open_s=open_s,
            encode_s=encode_s,
            copy_s=copy_s,
            plan_memory_bytes=int(memory),
        )

    def reducing(self) -> Reducer:
        """What averages the gradients of the parameters that are trained now."""
        if not fsdp.is_sharded(self.denoiser.network) and self.reduced is not self.freeze.trained:
            self.reducer.close()
            turn = {p: number for number, block in enumerate(self.found, 1) for p in block.module.parameters()}
            in_order = sorted(self.freeze.trained, key=lambda p: turn.get(p, 0))
            self.reducer, self.reduced = Reducer(in_order), self.freeze.trained
        return self.reducer  # sharded gradients come out of the backward pass averaged

    def clips_per_step(self, plan: Plan) -> int:
        """Clips of an update, all ranks."""
        return self.experiment.batch_size_at(plan.shape) * self.batches_per_update

    def next_batch(self) -> Latents:
        shape, starting = self.freeze.plan.shape, self.stream is None
        if starting or self.stream[0] != shape:
            if not starting and hasattr(self.stream[1], "close"):
                self.stream[1].close()
            self.stream = shape, iter(self.open_batches(shape, self.state.position))
        if not starting:
            return next(self.stream[1])
        began = self.now()
        batch = next(self.stream[1])
        agree.wait_for_all()  # the slowest rank's, on all of them
        self.startup_s = self.now() - began
        self.reported = self.spent()
        return batch

    def spent(self) -> Spent:
        """What batches have cost so far; nothing where their source does not say."""
        return getattr(self.open_batches, "spent", Spent())

    def put_in_force(self, plan: Plan) -> bool:
        """Whether that changed anything."""
        if not self.freeze.put(plan):
            return False
        for name in plan.trainable:
            self.state.begun.setdefault(name, self.state.step)
        # A block may have been frozen for stages: its moments have to be where it is before the next update. Under a
        # memory budget those of others make room: each candidate of a search was found to fit alone.
        others = "host" if self.experiment.schedule.memory_budget_bytes else "keep"
        optimizer.follow(self.state.optimizer, self.freeze.trained, others)
        averages.catch_up(self.state.ema, self.state.ema_gaps, self.denoiser.network, plan.trainable)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        return True

    # -- cost and loss

    def charge(self, purpose: str, seconds: float, flops: float) -> None:
        self.state.seconds.add(purpose, seconds)
        self.state.flops.add(purpose, flops)

    def memory(self, plan: Plan) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        averaged = sum(fsdp.held(tensor).nbytes for tensor in self.state.ema.values())
        counted = self.prices.counted(plan)
        beside = self.prices.under_way_bytes(counted.gradient_bytes) + self.prices.beside_bytes
        return counted.memory_bytes(self.experiment.batch_size_at(plan.shape)) + averaged + beside

    def search_loss(self) -> float:
        return self.held_out_loss(self.search_held_out, 1)

    def record_loss(self) -> float:
        """Of the averages where there are any: they are what is saved."""
        with averages.averaged(self.denoiser.network, self.state.ema, self.state.ema_gaps):
            return self.held_out_loss(self.held_out, self.experiment.data.held_out_draws)

    def held_out_loss(self, held_out: Sequence[Latents], draws: int) -> float:
        seed, law = self.experiment.data.held_out_seed, self.experiment.timesteps
        return losses.held_out_loss(self.denoiser, held_out, draws, seed, law, self.held_out_draws, self.sample)

    def now(self) -> float:
        """The run's clock: it stands still while the ranks' first batches are waited for. On a GPU what was asked of it
        is done by then, but for gradients on their way to other ranks."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        return time.perf_counter() - self.startup_s
