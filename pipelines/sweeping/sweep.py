"""A sweep's trials by Ray Tune: search, early stopping, what runs at once, resuming, and the terminal meanwhile."""

import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.callback import Callback
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler
from ray.tune.search import BasicVariantGenerator, ConcurrencyLimiter
from ray.tune.search.optuna import OptunaSearch

from entprog import storage
from entprog.config import Experiment, Tune
from entprog.errors import UserError
from entprog.storage import Where
from pipelines import terminal
from pipelines.cluster import joining, ray_internals, room
from pipelines.sweeping import keeping, spaces
from pipelines.sweeping.trial import Report, Spec, folder_of, reports, trainable, waiting

NAME = "tune"
"""Ray Tune's own folder in that of the sweep's state."""
STATE_EVERY_S = 2
"""Between two states that a killed driver can be resumed from."""
WAITING_EVERY_S = 30
"""Between looks at whether trials wait for MLflow or a bucket."""
NEXT_TO_NOTHING = {"memory": 1}
"""What a trial's own process holds (a byte): a CPU of it would be missing from decoding, and none at all is refused."""
STARTUP_S = 20.0
"""What a trial takes beside its charged seconds (start of workers, evaluations, samples), roughly."""


@dataclass(frozen=True)
class Share:
    """What each of the trials that run at once gets."""

    concurrent: int
    decode_cpus: float
    """Logical CPUs for decoding, per worker."""
    threads: int
    """torch threads per worker."""


def trial_cpus(experiment: Experiment) -> float:
    """Logical CPUs of one trial: one a worker, and those for decoding."""
    workers = experiment.train.workers
    return workers + (workers * experiment.data.decode_cpus if experiment.data.decode_cpus else room.CPUS_FOR_DATA)


def needs(experiment: Experiment, settings: Tune, gpus: bool) -> dict[str, int]:
    """The least resources, on whatever nodes, that `share` takes: all trials that are to run at once, or one."""
    trials = min(settings.concurrent or 1, settings.trials)
    cpus = math.ceil(trials * trial_cpus(experiment))
    return {"CPU": cpus} | ({"GPU": trials * experiment.train.workers} if gpus else {})


def share(experiment: Experiment, settings: Tune, resources: Mapping[str, float], cores: int) -> Share:
    """How many trials run at once so that each holds all its workers and its decoding: none waits for another's.

    resources: of the cluster. cores: of this machine, for CPU threads. Raises UserError if not even one trial fits,
    or fewer than asked for.
    """
    workers = experiment.train.workers
    cpus, gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
    each = trial_cpus(experiment)
    fits = int(cpus // each)
    if experiment.train.gpus != "no" and gpus:
        fits = min(fits, gpus // workers)
    if fits < 1:
        raise UserError(
            f"a trial needs {workers} workers and {each - workers:g} CPUs for decoding, {joining.has()} {cpus} "
            f"CPUs and {gpus} GPUs: lower train.workers or join a larger cluster"
        )
    if settings.concurrent and min(settings.concurrent, settings.trials) > fits:
        raise UserError(f"tune.concurrent={settings.concurrent}, but the cluster holds {fits} trials at once")
    concurrent = min(settings.concurrent or fits, settings.trials)
    left = (cpus - concurrent * workers) / (concurrent * workers)
    threads = experiment.train.threads or max(1, cores // (concurrent * workers) - 1)
    return Share(concurrent, experiment.data.decode_cpus or max((each - workers) / workers, left), threads)


def estimate_s(settings: Tune, budget_s: float, concurrent: int) -> tuple[float, float]:
    """(least, most) wall seconds of the sweep: all trials ended at the first decision, or none before its end."""
    most = math.ceil(settings.trials / concurrent) * settings.seeds * (budget_s + STARTUP_S)
    if not stops_early(settings):
        return most, most
    least = math.ceil(settings.trials / concurrent) * (budget_s / settings.reduction**settings.rungs + STARTUP_S)
    return min(least, most), most


def stops_early(settings: Tune) -> bool:
    """Whether bad trials are ended: only the one objective held_out_loss can be judged in mid-trial."""
    return settings.early_stop and settings.objectives == ("held_out_loss",)


def searcher(settings: Tune, space: spaces.Space, first: dict[str, Any], concurrent: int):
    """Where the next values come from. first: values of the first trial ({}: none)."""
    points = [first] if first else None
    if settings.search == "grid":
        grid = spaces.grid(space, settings.grid_points)
        return BasicVariantGenerator(points_to_evaluate=grid, max_concurrent=concurrent)
    if settings.search == "random":
        return BasicVariantGenerator(points_to_evaluate=points, max_concurrent=concurrent, random_state=settings.seed)
    objectives = list(settings.objectives)
    metric, mode = (objectives[0], "min") if len(objectives) == 1 else (objectives, ["min"] * len(objectives))
    return ConcurrencyLimiter(
        OptunaSearch(
            OptunaSearch.convert_search_space(space),
            metric=metric,
            mode=mode,
            points_to_evaluate=points,
            seed=settings.seed,
        ),
        max_concurrent=concurrent,
    )


@dataclass(frozen=True)
class _Heard:
    """All that ASHA asks of a trial."""

    trial_id: str


def scheduler(settings: Tune, before: Sequence[Report] = ()):
    """ASHA on held-out loss at equal shares of the charged seconds, or none.

    before: reports of an earlier start. Ray Tune restores its search, not its scheduler: this one judges as if it had
    heard them itself, and what was decided on them stays decided.
    """
    if not stops_early(settings):
        return FIFOScheduler()
    asha = ASHAScheduler(
        time_attr="tick",
        metric="held_out_loss",
        mode="min",
        grace_period=1,
        max_t=settings.reduction**settings.rungs,
        reduction_factor=settings.reduction,
        stop_last_trials=False,
    )
    heard = {name: _Heard(name) for name, _ in before}
    for trial in heard.values():
        asha.on_trial_add(None, trial)
    for name, result in before:
        asha.on_trial_result(None, heard[name], result)
    for trial in heard.values():
        asha.on_trial_remove(None, trial)
    return asha


def run(
    spec: Spec,
    settings: Tune,
    space: spaces.Space,
    first: dict[str, Any],
    concurrent: int,
    state: Path,
    *,
    verbose: bool = False,
) -> dict[str, str]:
    """All trials, those of an earlier start included; {trial id: Ray Tune's last word of it}.

    state: folder that Tune keeps its state in, and unpickles it from. Raises KeyboardInterrupt when a person ended it:
    the same again goes on.
    """
    import ray

    for name, value in {"RAY_CHDIR_TO_TRIAL_DIR": "0", "TUNE_GLOBAL_CHECKPOINT_S": str(STATE_EVERY_S),
                        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "RAY_AIR_NEW_OUTPUT": "0",
                        "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0"}.items():  # fmt: skip
        os.environ.setdefault(name, value)
    if not verbose:
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
        logging.getLogger("optuna").setLevel(logging.ERROR)
    if not keeping.mend(state / NAME):
        terminal.console.print("Note: the sweep was ended as its first state was written; it begins anew.")
    resume = any((state / NAME).glob("experiment_state-*.json"))
    samples = len(spaces.grid(space, settings.grid_points)) if settings.search == "grid" else settings.trials
    output = storage.at(spec.output, "the output")
    with Watch(samples, settings.objectives[0], output, state / NAME) as watch:
        analysis = tune.run(
            tune.with_resources(trainable(spec), NEXT_TO_NOTHING),
            name=NAME,
            storage_path=str(state),
            config=None if settings.search == "optuna" else dict(space),
            num_samples=samples,
            search_alg=searcher(settings, space, first, concurrent),
            scheduler=scheduler(settings, reports(output) if resume else ()),
            resume_config=tune.ResumeConfig() if resume else None,
            sync_config=tune.SyncConfig(sync_period=STATE_EVERY_S),
            max_failures=settings.retries,
            raise_on_failed_trial=False,
            # A process that imports anew costs seconds a trial; one whose trial was ended early is still busy with it.
            reuse_actors=not stops_early(settings),
            callbacks=[watch],
            trial_dirname_creator=lambda one: one.trial_id,
            verbose=0,
        )
        watch.keep(state / NAME)  # the last one: nothing is written any more
    ray.get(ray.put(None))  # a lost cluster is told here, not by what comes after
    statuses = {trial.trial_id: trial.status for trial in analysis.trials}
    if any(status not in ("TERMINATED", "ERROR") for status in statuses.values()):
        raise KeyboardInterrupt
    return statuses


class Watch(Callback):
    """The terminal: a bar, and a line whenever a trial ends. What the trial's process may have left is given back, and
    Ray Tune's state in a folder is kept (`keeping`)."""

    def __init__(self, trials: int, objective: str, output: Where, state: Path):
        self.trials, self.objective, self.output = trials, objective, output
        self.keeper = keeping.Keeper(state)
        self.looked_s = 0.0
        """When it was last looked at what trials wait for, on a clock of its own."""
        self.waited: set[tuple[str, str]] = set()
        """Trials, and what they were last seen to wait for."""
        self.best = math.inf
        self.ended: dict[str, int] = {"done": 0, "stopped": 0, "failed": 0}
        self.running: set[str] = set()
        self.started = time.time()
        self.before: int | None = None
        """Trials that an earlier start has ended; None until the first one of this start begins."""
        self.bar = terminal.progress_bar()
        self.task = self.bar.add_task("trials", total=trials)

    def __enter__(self) -> "Watch":
        self.bar.start()
        return self

    def __exit__(self, *_) -> None:
        self.bar.stop()

    def setup(self, **_) -> None:
        self.started = time.time()

    def on_step_end(self, iteration: int, trials: Sequence[Any], **_) -> None:
        if trials:
            self.keep(ray_internals.state_of_tune(trials[0]) or self.keeper.folder)
        if time.monotonic() - self.looked_s > WAITING_EVERY_S:
            self.looked_s = time.monotonic()
            self._tell_waiting()

    def keep(self, written: Path) -> None:
        """Keep Ray Tune's state as it lies there."""
        with suppress(OSError):  # as it was before: the next one may be kept
            self.keeper.keep(written)

    def _tell_waiting(self) -> None:
        try:
            now = {(name, why) for name in self.running if (why := waiting(folder_of(self.output, name)))}
        except OSError:  # a bucket that is away: all trials would wait while each record is tried
            return
        for name, why in sorted(now - self.waited):
            self.bar.console.print(f"trial {name} waits, and is tried again: {why}", soft_wrap=True)
        self.waited = now

    def on_trial_start(self, iteration: int, trials: Sequence[Any], trial: Any, **_) -> None:
        self.running.add(trial.trial_id)
        if self.before is None:
            self.before = sum(one.status in ("TERMINATED", "ERROR") for one in trials)
        self._show(trials)

    def on_trial_result(self, iteration: int, trials: Sequence[Any], trial: Any, result: dict[str, Any], **_) -> None:
        self.best = min(self.best, result.get(self.objective, math.inf))
        self._show(trials)

    def on_trial_complete(self, iteration: int, trials: Sequence[Any], trial: Any, **_) -> None:
        last = trial.last_result or {}
        value = last.get(self.objective, math.inf)
        if not math.isfinite(value):
            self._ended(trials, trial, "failed")
        else:
            whole = any(name in last for name in ("peak_memory_bytes",))
            self._ended(trials, trial, "done" if whole else "stopped", f"{self.objective} {value:.5g}")

    def on_trial_error(self, iteration: int, trials: Sequence[Any], trial: Any, **_) -> None:
        self._ended(trials, trial, "failed")

    def _ended(self, trials: Sequence[Any], trial: Any, how: str, figure: str = "") -> None:
        room.forget(folder_of(self.output, trial.trial_id))
        self.running.discard(trial.trial_id)
        self.ended[how] += 1
        values = ", ".join(f"{k.rsplit('.', 1)[-1]}={_short(v)}" for k, v in trial.config.items())
        self.bar.console.print(f"trial {trial.trial_id} {how:8} {figure}  {values}{self._where()}", soft_wrap=True)
        self._show(trials)

    def _where(self) -> str:
        here = sum(self.ended.values())
        before = self.before or 0
        left = self.trials - before - here
        eta_s = (time.time() - self.started) / max(here, 1) * left
        counts = ", ".join(f"{count} {how}" for how, count in self.ended.items() if count)
        kept = f" ({before} from before)" if before else ""
        return f"  [{here + before}/{self.trials}{kept}: {counts}; ETA {terminal.duration(eta_s)}]"

    def _show(self, trials: Sequence[Any]) -> None:
        over = sum(trial.status in ("TERMINATED", "ERROR") for trial in trials)
        best = f", best {self.objective} {self.best:.5g}" if math.isfinite(self.best) else ""
        failed = f", {self.ended['failed']} failed" if self.ended["failed"] else ""
        self.bar.update(self.task, completed=over, description=f"{len(self.running)} trials running{failed}{best}")


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
