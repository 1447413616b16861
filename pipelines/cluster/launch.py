"""Run one function on a group of Ray Train workers, with the terminal kept informed."""

import logging
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pipelines
from entprog import files
from entprog.config import Experiment, Model, Train
from entprog.errors import LastingError, UserError
from entprog.storage import Place, Where, remove
from pipelines.cluster import capacity, failures, joining, ray_internals, room
from pipelines.cluster.message_board import GROWS, JOB_ENDS, Listener
from pipelines.cluster.room import Bundle

POLL_S, POLLS_PER_S = 0.2, 80
"""Ray Train asks each of its workers how it is so often, but all of them together at most so many times a second."""
STOP_S = 60.0
"""How long workers that are told to end may take for it."""


def absolute(experiment: Experiment) -> Experiment:
    """The experiment with every local path absolute: workers run in a folder of their own."""
    data, train = experiment.data, experiment.train
    place = train.checkpoints
    return experiment.model_copy(
        update={
            "model": absolute_model(experiment.model),
            "data": data.model_copy(update={"shards": _located(data.shards)}),
            "train": train.model_copy(update={"checkpoints": place and str(Place.at(place).local or place)}),
        }
    )


def absolute_model(model: Model) -> Model:
    """The part of `absolute` that says what is trained."""
    found = {name: _located(getattr(model, name)) for name in ("base", "vae", "prompt_embeds", "text_encoder")}
    # Of a file the name itself counts (its ending), and in the hub's cache that is a link to one without.
    found |= {name: _located(getattr(model, name), follow=False) for name in ("weights", "adapter")}
    return model.model_copy(update=found)


def _located(path: str | None, follow: bool = True) -> str | None:
    if not path or not files.home(path).exists():  # a hub name
        return path
    return str(files.home(path).resolve() if follow else files.home(path).absolute())


def training(settings: dict[str, Any]) -> None:
    """What workers run that train."""
    with pipelines.importing():  # here: their controller unpickles this function, and needs no network for it
        from pipelines.stream import feed

        feed.begin()
        from pipelines.training import worker

    worker.train(settings)


def scoring(settings: dict[str, Any]) -> None:
    """What workers run that score."""
    with pipelines.importing():
        from pipelines.training import worker

    worker.score(settings)


def run_workers(
    worker: Callable[[dict[str, Any]], None],
    settings: dict[str, Any],
    experiment: Experiment,
    storage: Where,
    on_item: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Run `worker(settings)` on every worker of a TorchTrainer; `on_item` gets rank 0's posts; returns the last item.

    A worker posts `{"result": {…}}` when all is done, `{"user_error": line}` for a person's mistake that only it could
    see, `{"failure": line}` for what another try would not mend, `{"stopped": step}` when it was told to end, and
    `{"grows": step}` when there is room for more workers. Whatever else ends the workers, or their trainer, starts them
    again, up to `train.max_failures` times in a row without a step gained; once where a device had no room. While the
    cluster has no room for them it is waited for, and `on_item` gets `{"waiting": line}` now and then. SIGTERM and
    Ctrl-C to this process end that wait, or let the workers save a checkpoint, and raise KeyboardInterrupt; a second
    Ctrl-C, or one before the first step, waits for nothing. Raises UserError, or RuntimeError with the workers' own
    reason in one line: LastingError where another try would end alike.
    """
    each = capacity.each_worker(experiment, capacity.use_gpus(experiment), trial=not ray_internals.is_driver())
    for name in ("ray.train", "ray.data", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)
    listener = Listener(on_item)
    ray_internals.begin_coordinator()
    train, tries, furthest = experiment.train, experiment.train.max_failures, 0
    run = storage.resolve()
    room.forget(run)  # of a trial whose process was lost
    least = train.min_workers or train.workers
    # Nodes of a cluster that starts come one after another: fewer workers begin once they would be left alone for as
    # long as they are to train at least. Later they go on at once, and grow when a node has come.
    settle_s = max(room.SETTLE_S, train.resize_every_s) if joining.address() else room.SETTLE_S
    say = lambda line: on_item({"waiting": line})  # noqa: E731
    try:
        stop = _Stop(listener, say)
        with stop.by_sigterm():
            while True:
                workers = room.workers(least, train.workers, each, say, settle_s=settle_s, stop=stop.asked, run=run)
                settle_s = room.SETTLE_S
                with _leaving_nothing_reserved(), _growing(listener, train, workers, each, run):
                    boarded = {**settings, "board": listener.board}
                    failure = _attempt(worker, boarded, experiment, workers, each, storage, stop)
                listener.read()
                listener.begun.clear()  # that nobody trains while room is waited for is no silence
                last = listener.last
                if last.pop("grows", None) is not None:
                    continue
                if "user_error" in last:
                    raise UserError(last["user_error"])
                if "stopped" in last:
                    raise KeyboardInterrupt
                if "result" in last:
                    return last["result"]
                if "failure" not in last and failure and ray_internals.found_no_room(failure):
                    say("another job took the room first: waiting again")  # no try of ours
                    continue
                reason = last.get("failure") or (
                    failures.reason(failure) if failure else "the workers ended without a result"
                )
                starved = failure is not None and failures.lacks_memory(failure)
                if listener.step > furthest:
                    tries, furthest = train.max_failures, listener.step
                if starved:  # memory of a process that has just ended may not have been free
                    tries = min(tries, 1)
                lasts = "failure" in last or (starved and not tries)
                if lasts or not tries:
                    raise (LastingError if lasts else RuntimeError)(reason) from failure
                tries -= 1
                on_item({"warning": f"{reason}: starting the workers again, from the newest checkpoint"})
    except UserError:
        remove(run)  # Ray's own, from which nobody goes on: it would keep a corrected command out
        raise
    finally:
        listener.close()


@contextmanager
def _growing(listener: Listener, train: Train, workers: int, each: Bundle, run: Where):
    """A group that is smaller than it should be is told when it can grow."""
    import ray

    ray.get(listener.board.anew.remote())
    listener.begun.clear()

    def grow() -> None:
        listener.board.tell.remote(GROWS)

    with room.growing(train.workers - workers, each, listener.begun, train.resize_every_s, grow, run):
        yield


def _attempt(
    worker, settings: dict[str, Any], experiment: Experiment, workers: int, each: Bundle, storage: Where, stop: "_Stop"
) -> Exception | None:
    """One group of workers from its start to its end; why it failed."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig

    from pipelines.cluster import stopping

    trainer = ray_internals.torch_trainer(stop.before)(
        worker,
        train_loop_config={**settings, "experiment": absolute(experiment).model_dump(mode="json")},
        torch_config=ray_internals.torch_config("nccl" if "GPU" in each else "gloo", prepare=stopping.listen),
        scaling_config=ScalingConfig(num_workers=workers, use_gpu="GPU" in each, resources_per_worker=each),
        run_config=RunConfig(
            # A name of its own: Ray must not look for state under it; we resume from our own checkpoints.
            name=f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}",
            **_ray_storage(storage),
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),  # `run_workers` tries again
        ),
    )
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        with _polling(workers):
            trainer.fit()
    except SystemExit:  # how Ray Train ends a process that is told to stop
        raise KeyboardInterrupt from None
    except Exception as error:
        return error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, interrupt)  # Ray Train leaves its own behind, which fails once it is done
    return None


def _ray_storage(folder: Where) -> dict[str, Any]:
    """Where Ray Train keeps what it needs of a group of workers."""
    if isinstance(folder, Place):
        return {"storage_path": folder.root, "storage_filesystem": folder.system}
    return {"storage_path": str(folder.resolve())}


def poll_s(workers: int) -> float:
    """Seconds between two questions of Ray Train's controller to a worker."""
    return max(POLL_S, workers / POLLS_PER_S)


@contextmanager
def _polling(workers: int):
    """A trainer that starts inside asks its workers every `poll_s`, unless a person has set the interval."""
    name = "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"
    if name in os.environ:
        yield
        return
    os.environ[name] = str(poll_s(workers))
    try:
        yield
    finally:
        del os.environ[name]


@contextmanager
def _leaving_nothing_reserved():
    """Afterwards the placement groups made inside are gone: a trainer's controller that was killed leaves its own, and
    with it CPUs and GPUs that would be missing from then on. Trials of a sweep, which share a job, are left to Ray."""
    import ray
    from ray.util import placement_group_table

    if not ray_internals.is_driver():  # inside a trial
        yield
        return
    job = ray.get_runtime_context().get_job_id()

    def reserved() -> set[str]:
        return {key for key, group in placement_group_table().items() if group["state"] != "REMOVED"}

    before = reserved()
    yield
    for key in reserved() - before:
        if key.endswith(job):
            ray_internals.remove_placement_group(key)


class _Stop:
    """How workers are told to save a checkpoint and end. Who sends SIGTERM will not wait for long: if they have not
    within STOP_S, they are ended; a person may press Ctrl-C once more."""

    def __init__(self, listener: Listener, say: Callable[[str], None]):
        self.listener, self.say = listener, say
        self.asked = threading.Event()
        self.timers: list[threading.Timer] = []

    def ask(self) -> None:
        self.asked.set()
        self.listener.board.tell.remote(JOB_ENDS)

    def ask_in_time(self, *_) -> None:
        """What answers SIGTERM."""
        self.ask()
        self.timers.append(threading.Timer(STOP_S, os.kill, (os.getpid(), signal.SIGINT)))
        self.timers[-1].daemon = True
        self.timers[-1].start()

    def before(self, abort: Callable[[int, Any], None]) -> Callable[[int, Any], None]:
        """What answers Ctrl-C while workers are there. abort: ends them at once."""

        def answer(number: int, frame: Any) -> None:
            if self.asked.is_set() or not self.listener.begun.is_set():  # or there is nothing to save yet
                abort(number, frame)
            else:
                self.ask()
                self.say("Ends after this step, with a checkpoint; Ctrl-C once more ends it at once")

        return answer

    @contextmanager
    def by_sigterm(self):
        """Inside, SIGTERM asks. In a trial of a sweep the sweep hears it."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self.ask_in_time)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)
            for timer in self.timers:
                timer.cancel()
