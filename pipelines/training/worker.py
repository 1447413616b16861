"""What one Ray Train worker does once all is open (`setup`): score, fit, report, save. Also runs again after a crash,
from where it was."""

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from dataclasses import replace
from typing import Any

from entprog import config, files, storage
from entprog.data import clip_stream
from entprog.diffusion import beside, losses
from entprog.diffusion.idle import idle_pass
from entprog.diffusion.processes import Flow
from entprog.distributed import agree, fsdp
from entprog.errors import UnreachableError, UserError
from entprog.masking import reason
from entprog.models import fingerprints, folders, saving
from entprog.schedule.state import RunState
from entprog.scoring import cache
from entprog.scoring.tables import ScoreTable
from entprog.storage import Where
from entprog.training import averages, checkpoint
from entprog.training.fit import DivergedError, fit, start
from entprog.training.steps import Step
from pipelines.cluster import gauges
from pipelines.cluster.message_board import GOES_ON, GROWS, MACHINE_ENDS
from pipelines.cluster.stopping import LeavingError, Notices
from pipelines.generating import rendering
from pipelines.generating.motions import Motion
from pipelines.stream import decoding
from pipelines.stream.batches import Batches, all_cached
from pipelines.tracking import system_metrics, ways
from pipelines.tracking.tracker import Tracker
from pipelines.training import figures, networks, steplog
from pipelines.training import previews as previewing
from pipelines.training.setup import Setup, opened
from pipelines.training.startup import Startup


def train(settings: dict[str, Any]) -> None:
    """Train loop of `pipelines.train`."""
    _reporting_mistakes(settings, _train)


def score(settings: dict[str, Any]) -> None:
    """Train loop of `pipelines.score`: the table of scores alone."""
    _reporting_mistakes(settings, lambda setup, settings: {"result": scores(setup, settings).as_json()})


def _reporting_mistakes(settings: dict[str, Any], work: Callable[[Setup, dict[str, Any]], Any]) -> None:
    """A person's mistake is told to the driver in one line; anything else is a crash and is retried."""
    import ray

    rank, world = agree.world()
    board, clock = settings["board"], Startup()
    clock.over("workers")

    def post(item: dict[str, Any]) -> None:
        if rank == 0:
            board.post.remote(item)

    try:
        with agree.mistakes_of_all():
            setup = opened(settings, post, clock)
    except UnreachableError:  # no mistake: another try may be luckier
        raise
    except UserError as error:
        post({"user_error": str(error)})
        return
    try:
        result = work(setup, settings)
    except (agree.DisagreementError, DivergedError) as error:  # all ranks have it; another try would end alike
        ray.get(board.post.remote({"failure": str(error)}))
        return
    except UnreachableError:
        raise
    except UserError as error:  # such as a damaged clip: this rank alone may have met it
        ray.get(board.post.remote({"user_error": str(error)}))
        if world > 1:
            raise  # ends the other ranks, which wait for this one
        return
    if rank == 0:
        ray.get(board.post.remote(result))


def scores(setup: Setup, settings: dict[str, Any]) -> ScoreTable:
    """The score table of the network as it is now, from the folder of tables if it was ever made."""

    def progress(done: int, of: int) -> None:
        setup.post({"scored": done, "of": of})

    folder = storage.at(settings["tables"], "score tables")
    of = setup.denoiser, setup.blocks, setup.dataset, setup.experiment, settings["weights"], folder
    made = cache.table(*of, progress, setup.texts)
    setup.clock.over("scores")
    return made


def _train(setup: Setup, settings: dict[str, Any]) -> dict[str, Any]:
    experiment, denoiser = setup.experiment, setup.denoiser
    output = storage.at(settings["output"], "the output")
    rank, _ = agree.world()
    table = scores(setup, settings) if experiment.schedule.needs_scores else None
    cached = all_cached(experiment, setup.caches)
    if cached:
        beside.rest(denoiser)  # until a picture is drawn, or blocks are ranked anew
    state = start(denoiser.network, experiment)
    warn = lambda line: setup.post({"warning": line})  # noqa: E731
    saver = _take_up(setup, settings, state, warn)
    _note_how(setup, state, cached)
    notices = Notices(settings["board"], setup.device)
    dials = gauges.Gauges(lambda line: setup.post({"warning": line, "about": {"entprog.straggler": line}}))
    log = steplog.StepLog(output / "steps.jsonl", state.step, warn) if rank == 0 else None
    tracker = Tracker.attach(settings["tracking"], warn) if rank == 0 else None
    decoded = decoding.of_this_worker(experiment)
    if rank == 0:
        if log.last < state.step:
            warn(
                f"steps {log.last + 1} to {state.step} are not in {output / 'steps.jsonl'}: they were made in another "
                "output with these train.checkpoints, or lost; curves, charts and the MLflow run are without them"
            )
        previewing.cut(output, state.step, warn)
        if not cached:
            setup.post({"decoding": str(decoded), "about": {"entprog.decode": decoded.where}})
        if table is not None:
            setup.post({"about": {"entprog.scores": table.key}})
        if experiment.tracking.system_every_s:
            system_metrics.watch(tracker, experiment.tracking.system_every_s, lambda: state.step)
    for line in table.warnings(experiment.priority.sign) if table else ():
        warn(line)
    if rank == 0 and table is not None:
        files.write_json(output / "cei.json", table.as_json())
    previews = _previews(setup, output, tracker, warn)
    final_loss, starting = None, True
    setup.clock.over("checkpoint")
    data = setup.dataset, denoiser, setup.device, decoded, setup.caches, setup.texts
    with closing(Batches(experiment, *data)) as batches, log or nullcontext():
        rescored = table is not None and experiment.priority.rescore
        conditions = cache.clips(denoiser, setup.dataset, experiment, setup.texts) if rescored else ()
        given = batches, setup.held_out, setup.sample, table, experiment, state, conditions, setup.held_out_draws
        steps = fit(denoiser, setup.blocks, *given)
        for step in _saved_though_it_diverges(steps, saver):
            dials.show(step)
            if rank == 0:
                record = figures.as_record(step)
                record["logged_s"] = log.later_s(record["time"])
                log.add(record)
                tracker.metrics(step.step, figures.metrics(step), record["logged_s"])
                if step.decision is not None:
                    log.keep()  # who listens reads the stage before
                if step.held_out_loss is not None:
                    tracker.flush()  # who listens may end the run on this loss
                started = {}
                if starting:
                    setup.clock.over("first_step")
                    started = {"started": setup.clock.marks, "waited_s": batches.spent.wait_s}
                setup.post({"step": record} | started)
                starting = False
            if step.skipped and state.skipped_in_a_row == 1:
                warn(
                    f"step {step.step}: loss or gradient is not finite, update skipped ({step.skipped_updates} so far)"
                )
            if step.last:
                final_loss = step.held_out_loss
            looked_at = previews is not None and step.step % experiment.train.preview_every == 0
            if looked_at and not previews.show(step.step, step.charged_s, state.ema, state.ema_gaps):
                previews = None
            notice = GOES_ON if step.last else notices.newest()
            if step.last or notice or step.step % experiment.train.checkpoint_every == 0:
                if rank == 0:
                    log.keep()
                    tracker.flush()
                saver.save(denoiser.network, state)
            if notice:
                saver.wait()
                if notice == MACHINE_ENDS:
                    raise LeavingError(
                        f"a worker's machine is about to end (SIGTERM, or Ray drains it) after step {step.step}"
                    )
                return {"grows" if notice == GROWS else "stopped": step.step}
    if state.step == 0:
        raise UserError(
            f"scoring took {state.seconds.score:.1f} s and {state.flops.score:.3g} FLOPs, the whole budget: raise "
            "train.seconds (train.flops), or lower priority.conditions × priority.draws"
        )
    saver.close()
    if final_loss is None:  # its last step was taken before this start: what it came to is measured again
        law, spare = experiment.timesteps, setup.sample
        how = experiment.data.held_out_draws, experiment.data.held_out_seed, law, setup.held_out_draws, spare
        with averages.averaged(denoiser.network, state.ema, state.ema_gaps):
            final_loss = losses.held_out_loss(denoiser, setup.held_out, *how)
    if not math.isfinite(final_loss):
        raise DivergedError(f"the held-out loss after step {state.step} is {final_loss}: no model is saved")
    setup = replace(setup, denoiser=networks.final(denoiser, experiment, state))
    denoiser = setup.denoiser
    shift, merged = _sampling_shift(setup), {}
    # Rank 0 works alone: nobody waits for it, but for who has parts of a sharded network.
    if experiment.train.lora and (rank == 0 or fsdp.is_sharded(denoiser.network)):
        with storage.scratch_for(output / "adapter") if rank == 0 else nullcontext() as folder:
            merged = networks.leave_adapter(denoiser, experiment, folder, setup.dataset.points)
        denoiser = networks.merged(denoiser, experiment, settings["weights"])
    if rank == 0:
        kept = {"parts": experiment.train.save, "points": setup.dataset.points, **merged}
        kept["dtype"] = experiment.model.dtype
        with storage.scratch_for(output / "model", last=folders.ABOUT) as folder:
            denoiser.save(folder, shape=experiment.data.shape, shift=shift, **kept)
    else:
        saving.lend(denoiser.network)
    if experiment.train.samples:
        draw = functools.partial(_leave_samples, setup, output, shift)
        fsdp.led(setup.denoiser.network, setup.blocks, draw, lambda: idle_pass(setup.denoiser, setup.sample))
    if rank == 0:
        log.close()
        tracker.close()
    named = {"blocks": [block.name for block in setup.blocks], "held_out_loss": final_loss}
    named |= {"decode": decoded.where, "decode_cpus": decoded.cpus}
    return {"result": figures.final(experiment, state) | named}


def _saved_though_it_diverges(steps: Iterator[Step], saver: checkpoint.Saver) -> Iterator[Step]:
    """The steps; where all ranks give up together, a checkpoint that was begun is completed first."""
    try:
        yield from steps
    except DivergedError:
        saver.close()
        raise


def _take_up(setup: Setup, settings: dict[str, Any], state: RunState, warn: Callable[[str], None]) -> checkpoint.Saver:
    """Load the newest complete checkpoint, if any, into network and state, which then has the workers that go on;
    returns what saves the next checkpoints."""
    train = setup.experiment.train
    folder = train.checkpoints or storage.address(storage.at(settings["output"], "the output") / "checkpoints")
    rank, workers = agree.world()
    if rank == 0:
        for name in checkpoint.damaged(folder):
            warn(f"checkpoint {name} in {folder} was cut short: not used")
    newest = agree.of_first(lambda: checkpoint.newest(folder))  # a shared disk may show others less
    setup.post({"workers": workers})
    if newest is not None:
        checkpoint.load(folder, newest, setup.denoiser.network, state, settings["identity"])
        setup.post({"resumed": state.step})
    state.goes_on(workers=workers)
    setup.post({"about": {"entprog.workers": ", ".join(map(str, state.workers))}})
    return checkpoint.Saver(folder, settings["identity"], train.keep_checkpoints, warn)


def _note_how(setup: Setup, state: RunState, cached: bool) -> None:
    """Take down on what and how the run goes on, as rank 0 has it. Seconds that were measured on another device foresee
    none of this one's. cached: whether no training step encodes clips."""
    experiment = setup.experiment
    latents = "pixels" if setup.denoiser.vae is None else "cached" if cached else "encoded at every step"
    device, latents = agree.of_first(lambda: (fingerprints.device_name(setup.device), latents))
    if experiment.schedule.clock == "seconds" and state.devices[-1:] not in ((), (device,)):
        state.models = {}
    state.goes_on(devices=device, latents=latents, ways=ways.way(config.settings(experiment)))
    had = {"device": ", ".join(state.devices), "latents": ", ".join(state.latents), "way": "; then ".join(state.ways)}
    setup.post({"about": {f"entprog.{name}": told for name, told in had.items()}})


def _leave_samples(setup: Setup, output: Where, shift: float | None) -> None:
    """A look at what was learned: held-out motions by the final weights. What goes wrong is a warning."""
    data, count = setup.experiment.data, setup.experiment.train.samples
    settings = config.Generate(batch_size=data.batch_size, shift=shift)
    try:
        if not fsdp.is_sharded(setup.denoiser.network):
            setup.denoiser.network.to(setup.device)
        with storage.scratch_for(output / "samples") as folder:
            rendering.render(lambda: setup.denoiser, _held_out_motions(setup, count), data.shape, folder, settings)
    except Exception as error:  # memory, disk, codec: the model is saved already
        setup.post({"warning": f"the samples failed: {reason(error)}; generate makes them of the saved model"})


def _held_out_motions(setup: Setup, count: int) -> list[Motion]:
    """The first held-out clips, each with its own caption where the network is trained with those."""
    data, out = setup.experiment.data, []
    for batch in clip_stream.held_out(setup.dataset, count, data.batch_size):
        names = [f"held-out clip {n}" for n in batch.position.tolist()]
        made = rendering.motions_of(batch.resized(data.shape), names)
        if setup.texts is not None:
            numbers = clip_stream.held_out_numbers(setup.dataset, count, batch.position.numpy()).tolist()
            texts = [setup.texts.of_clip("held_out", number) for number in numbers]
            made = [replace(motion, text=text) for motion, text in zip(made, texts, strict=True)]
        out += made
    return out


def _previews(
    setup: Setup, output: Where, tracker: Tracker | None, warn: Callable[[str], None]
) -> previewing.Previews | None:
    """Those that are asked for; None: none. Every rank draws the same motions, or waits for who does."""
    experiment = setup.experiment
    if not experiment.train.preview_every:
        return None
    left_out = agree.of_first(lambda: previewing.unfinished(output))
    if left_out:
        warn(previewing.told(output, left_out))
    if len(left_out) >= previewing.MOST_UNFINISHED:
        return None
    data = experiment.data
    settings = config.Generate(batch_size=data.batch_size, shift=_sampling_shift(setup))
    motions = _held_out_motions(setup, experiment.train.preview_clips) if tracker else []
    keep = tracker.artifact if tracker else lambda path, folder: None
    measures, log = {}, {}
    if tracker and (names := experiment.train.preview_metrics):
        measures = {"meter": previewing.meter(names, data.shape, experiment.train.preview_clips, setup.dataset.points)}
        log = {"log": tracker.metrics}
    compiled = experiment.model.compile_blocks
    return previewing.Previews(
        setup.denoiser, motions, data.shape, output, settings, keep, warn, compiled, blocks=setup.blocks,
        spare=setup.sample, left_out=left_out, **measures, **log,
    )  # fmt: skip


def _sampling_shift(setup: Setup) -> float | None:
    """A base keeps its own sampling shift; new weights know only the one they were trained with."""
    new = isinstance(setup.denoiser.process, Flow) and not setup.experiment.model.base
    return setup.experiment.timesteps.shift if new else None
