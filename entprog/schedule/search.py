"""The search at a stage's start: which plans are tried, for how long, and the decision (Ent-Prog §3.4)."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from entprog.config import Experiment
from entprog.distributed import agree
from entprog.schedule import efficiency, plans
from entprog.schedule.efficiency import Decision, Trial
from entprog.schedule.plans import Plan
from entprog.schedule.prices import Prices
from entprog.schedule.state import RunState

MOST_DRAWS = 1000
"""So many draws of a row's blocks are foreseen: what none of them needs, hardly a later one does."""


class Search:
    """A stage's search over `state.candidates`; all that it remembers is in the RunState."""

    def __init__(
        self,
        names: Sequence[str],
        priority: Mapping[str, float],
        prices: Prices,
        experiment: Experiment,
        state: RunState,
    ):
        self.names, self.priority, self.prices = list(names), priority, prices
        self.others = len(prices.found) - len(self.names)
        """Number of blocks that are never trained."""
        self.experiment, self.state = experiment, state
        self.schedule = experiment.schedule

    def foresee(self) -> None:
        """Count what a step of each stage costs, for `flops_left`, once in a run; of those that train as many blocks on
        clips of one shape a step of the first. Nothing where searches decide. Raises UserError if no plan fits the
        memory budget."""
        state, schedule, train = self.state, self.schedule, self.experiment.train
        if state.stage < 0:
            self.check_memory()
        if not train.steps or schedule.kind == "entprog" or state.stage_flops:
            return
        shape, alike = self.experiment.data.shape, {}
        for stage in range(len(plans.rows(schedule))):
            plan = plans.fixed(self.names, self.priority, schedule, shape, stage, seed=train.seed, others=self.others)
            first = alike.setdefault((plan.m, plan.backward, plan.shape), plan)
            state.stage_flops = (*state.stage_flops, self.prices.step_flops(first))

    def flops_left(self, now: Plan) -> float | None:
        """Counted FLOPs of the updates until `train.steps`, all ranks; None where that is no budget. now: what the
        stage trains, and where searches decide every stage after it."""
        state, steps = self.state, self.experiment.train.steps
        if not steps:
            return None
        left, done, now_flops = 0.0, float(state.step), self.prices.step_flops(now)
        for stage, row in enumerate(plans.rows(self.schedule)):
            if stage >= state.stage and (end := row.until * steps) > done:
                foreseen = state.stage_flops and stage != state.stage
                left, done = left + (end - done) * (state.stage_flops[stage] if foreseen else now_flops), end
        return left

    def open(self, stage: int) -> None:
        """Begin a stage: its candidates, and what foresees their costs. Raises UserError if no plan fits the memory
        budget."""
        state, schedule, shape = self.state, self.schedule, self.experiment.data.shape
        before = next((each.plan for each in reversed(state.decisions) if each.stage < stage), None)
        if stage != state.stage:
            state.search_cost, state.stage_step, state.draw = 0.0, state.step, 0
        state.stage, state.plan, state.trials, state.loss_now, state.waits = stage, None, [], None, False
        models = {}
        if schedule.kind == "entprog":
            last = stage == schedule.stages - 1
            models = {each: self.prices.model(each) for each in plans.ladder(schedule, shape, last)}
        found = plans.candidates(
            self.names, self.priority, schedule, shape, stage, before, models, self.experiment.train.seed, self.others
        )
        found, state.fitting = plans.fitting(found, self.prices.memory, schedule.memory_budget_bytes)
        state.candidates = tuple(found)
        if schedule.kind == "entprog" and len(found) > 1:
            self.round_cost()  # counts candidates: it is kept

    def begin(self) -> Decision | None:
        """The decision of a stage that was opened, if there is nothing to search, or nothing to search yet: while the
        learning rate warms up every step raises the loss, whoever makes it."""
        state = self.state
        state.opening_cost = state.search_cost
        self.note_overhead()  # the blocks may have been scored again
        if len(state.candidates) == 1:
            return self.decide("schedule")
        if state.step < self.experiment.train.warmup_steps:
            state.waits = True
            return self.decide("begins with the cheapest candidate: the search waits for the end of the warm-up")
        return None if self.another_round() else self.decide()

    def check_memory(self) -> None:
        """Raises UserError if a plan of a schedule without a search does not fit the memory budget: now, not once it is
        that plan's turn. Of a row that draws blocks anew that is every draw that `train.steps` leaves room for, up to
        MOST_DRAWS; each with the averages that the plans before it leave."""
        if self.schedule.kind == "entprog" or self.schedule.memory_budget_bytes is None:
            return
        needs, before = {}, set()
        for plan in self.foreseen():
            needs[plan] = self.prices.memory(plan, before)
            before.update(plan.trainable)
        most = max(needs, key=needs.get)
        plans.fitting([most], needs.get, self.schedule.memory_budget_bytes)

    def foreseen(self) -> Iterator[Plan]:
        """The plans of a schedule without a search, in their order."""
        schedule, shape, train = self.schedule, self.experiment.data.shape, self.experiment.train
        begun = 0.0
        for stage, row in enumerate(plans.rows(schedule)):
            steps = (row.until - begun) * (train.steps or math.inf) if row.redraw_every else 1
            draws = math.ceil(min(steps / (row.redraw_every or 1), MOST_DRAWS))
            for draw in range(draws):
                yield plans.fixed(self.names, self.priority, schedule, shape, stage, draw, train.seed, self.others)
            begun = row.until

    def redraw(self) -> bool:
        """Draw the stage's blocks anew if it is time (`Row.redraw_every`); whether it was."""
        state, schedule = self.state, self.schedule
        every = plans.rows(schedule)[state.stage].redraw_every
        draw = (state.step - state.stage_step) // every if every else 0
        if draw == state.draw:
            return False
        shape, seed = self.experiment.data.shape, self.experiment.train.seed
        state.draw = draw
        state.plan = plans.fixed(self.names, self.priority, schedule, shape, state.stage, draw, seed, self.others)
        return True

    def turn(self) -> tuple[int, Plan]:
        """The candidate of the next trial step: (its number, its plan)."""
        state = self.state
        number = efficiency.turn(len(state.trials), len(state.candidates), state.stage, self.experiment.train.seed)
        return number, state.candidates[number]

    def note(self, trial: Trial, spent: float) -> Decision | None:
        """Take down a trial and what it cost in all; the decision, if that was the last."""
        self.state.trials.append(trial)
        self.state.search_cost += spent
        self.note_overhead()
        return None if self.another_round() else self.decide()

    def another_round(self) -> bool:
        """Whether there is to be one more step of every candidate: while there are fewer than `search_steps`, or the
        best is not clear; and never more than the search's share of the stage's budget pays for."""
        state, schedule = self.state, self.schedule
        rounds, inside = divmod(len(state.trials), len(state.candidates))
        if inside:
            return True
        if rounds >= schedule.search_steps and not (schedule.search_until_clear and self.unclear()):
            return False
        return state.search_cost + self.round_cost() <= schedule.search_share * self.stage_budget()

    def unclear(self) -> bool:
        found = efficiency.efficiencies(self.state.candidates, self.state.trials, self.schedule)
        return efficiency.overlap(found)

    def round_cost(self) -> float:
        """Expected cost of one step of every candidate with its evaluations, in the schedule's clock."""
        state = self.state
        if self.schedule.clock == "seconds" and state.trials:
            return (state.search_cost - state.opening_cost) / len(state.trials) * len(state.candidates)
        return sum(self.prices.step(plan) + self.prices.evaluation() for plan in state.candidates)

    def stage_budget(self) -> float:
        """What one stage may cost, in the schedule's clock; by steps, as if all were full training."""
        train, stages = self.experiment.train, self.schedule.stages
        budgets = []
        if train.seconds:
            budgets.append(train.seconds / stages)
        if train.flops:
            budgets.append(train.flops / stages)
        if train.steps:
            budgets.append(train.steps / stages * self.prices.step(self.prices.full))
        return min(budgets)

    def decide(self, reason: str | None = None) -> Decision:
        """Take the stage's decision; the same on every rank or an error on every rank."""
        state = self.state
        decision = efficiency.choose(
            state.candidates,
            state.trials,
            self.schedule,
            stage=state.stage,
            search_cost=state.search_cost,
            cheapest=min(state.candidates, key=self.clip_cost) if len(state.candidates) > 1 else state.candidates[0],
        )
        decision = replace(
            decision, reason="; ".join(line for line in (reason or decision.reason, state.fitting) if line)
        )
        if self.schedule.kind == "entprog":
            decision = self.with_forecast(decision)
        agree.agree(f"the decision of stage {state.stage}", decision.as_json())
        state.decisions.append(decision)
        state.plan = decision.plan
        return decision

    def clip_cost(self, plan: Plan) -> float:
        """What training on a clip costs under a plan, in the schedule's clock."""
        return self.prices.step(plan) / self.experiment.batch_size_at(plan.shape)

    def with_forecast(self, decision: Decision) -> Decision:
        """The decision with what its plan is expected to cost and to save."""
        state, full = self.state, self.prices.full
        step_cost, full_cost = (self.expected_cost(plan, decision) for plan in (decision.plan, full))
        saving, open_cost = full_cost - step_cost, self.overhead() - state.saved_cost
        pays = saving > 0 and decision.plan != full
        return replace(
            decision,
            step_cost=step_cost,
            full_step_cost=full_cost,
            memory_bytes=self.prices.memory(decision.plan),
            break_even_step=state.step + math.ceil(max(open_cost, 0.0) / saving) if pays else None,
        )

    def expected_cost(self, plan: Plan, decision: Decision) -> float:
        """Cost of a step by the decision's trials, in the schedule's clock: the plan's own mean; of one that was not
        tried as predicted, and more by as much as the trials cost more than that."""
        tried = {p: e.mean_cost for p, e in zip(decision.candidates, decision.efficiencies, strict=False)}
        if plan in tried:
            return tried[plan]
        off = sum(tried.values()) / sum(map(self.prices.step, tried)) if tried else 1.0
        return off * self.prices.step(plan)

    def overhead(self) -> float:
        """Search and scoring so far, in the schedule's clock."""
        charged = self.state.seconds if self.schedule.clock == "seconds" else self.state.flops
        return charged.search + charged.score

    def note_saving(self, decision: Decision, cost: float) -> None:
        """Take down a training step's cost: what it saved against full training, and whether that has paid off."""
        state = self.state
        if decision.full_step_cost is None:
            return
        state.saved_cost += decision.full_step_cost - cost
        self.note_overhead()
        if state.break_even_step is None and state.saved_cost >= self.overhead():
            state.break_even_step = state.step

    def note_overhead(self) -> None:
        """Take back that savings have paid off where they do not pay for all search and scoring up to now."""
        if self.state.saved_cost < self.overhead():
            self.state.break_even_step = None
