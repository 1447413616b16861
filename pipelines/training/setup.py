"""What one Ray Train worker has at hand before its first step: the network, its blocks, and the data."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from entprog import config
from entprog.blocks import Block, blocks, compile_blocks, fp8, overlooked
from entprog.config import ClipShape, Experiment
from entprog.cost import counting, twins
from entprog.cost.measuring import Meter
from entprog.data import clip_stream, latents, shards
from entprog.data.clips import Latents
from entprog.diffusion.denoiser import Denoiser
from entprog.distributed import agree, fsdp
from entprog.errors import UserError
from entprog.models import attention, captions
from entprog.schedule import plans
from entprog.scoring import cei
from pipelines.cluster import capacity, session
from pipelines.stream.batches import caches
from pipelines.training import expectation, networks
from pipelines.training.startup import Startup


@dataclass(frozen=True)
class Setup:
    """What a worker has at hand once its network and data are open."""

    experiment: Experiment
    device: torch.device
    denoiser: Denoiser
    dataset: shards.Dataset
    held_out: list[Latents]
    """This rank's share."""
    held_out_draws: slice
    """Which of their draws are this rank's."""
    sample: Latents
    """A batch to find, count and time things on: the same on every rank."""
    blocks: list[Block]
    texts: captions.Texts | None
    """Where clips do not see a fixed text."""
    caches: dict[ClipShape, latents.Cache]
    """Latents of training clips that need not be encoded again."""
    post: Callable[[dict[str, Any]], None]
    """Tell the driver (rank 0; nothing on the others)."""
    clock: Startup
    """Parts of the start-up that are over."""


def opened(settings: dict[str, Any], post: Callable[[dict[str, Any]], None], clock: Startup) -> Setup:
    """Load the network and the data of a run's settings. Raises UserError for what a person has to put right."""
    import ray.train
    import ray.train.torch

    experiment = config.build(settings["experiment"])
    if experiment.train.parallel == "fsdp":
        fsdp.begin(experiment.train.replicas, ray.train.torch.get_device())
    with agree.mistakes_of_all():
        dataset = shards.read_dataset(experiment.data.shards)
        if dataset.fingerprint != settings["data"]:
            raise UserError(
                f"data.shards: {experiment.data.shards} has got other clips since this command began: the positions of "
                "the run's clips, and which are held out, would change under way; give a copy as it was, or begin anew"
            )
        if ray.train.get_context().get_local_rank() == 0:  # once a machine: there may be many gigabytes to read
            networks.check_start(experiment.model, settings["weights"])
        if experiment.data.text == "empty":  # every clip has it already: there is none to drop
            experiment = config.build(config.merge(experiment.model_dump(), {"train": {"drop": {"text": 0.0}}}))
        device = ray.train.torch.get_device()
        # For a GPU too, where Ray gives it one: the host rounds its weights, and looks through what is saved.
        here = ray.train.get_context().get_local_world_size()
        torch.set_num_threads(experiment.train.threads or capacity.threads(session.cores(), here))
        if experiment.in_fp8:
            fp8.check_device(device)
        attention.check_device(experiment.model, device)
    texts = None
    if experiment.data.text != "fixed":  # before the network is loaded: the text encoder may be as large

        def encoded(done: int, of: int) -> None:
            post({"texts": done, "of": of})

        texts = captions.prepared(experiment.model, dataset, experiment.data.text, device, encoded)
        shown = {text for of_split in texts.captions.values() for text in of_split}
        for line in filter(None, (texts.unused, captions.unmended(experiment.model.family, shown))):
            post({"warning": line})
        clock.over("texts")
    # Passes of a sharded network come after it, in which ranks wait for each other.
    with agree.mistakes_of_all():
        denoiser = networks.load(experiment, device)
        denoiser = replace(denoiser, no_text={}, texts=None) if texts is None else texts.given_to(denoiser)
        dataset = replace(dataset, masks=dataset.masks and denoiser.replaces)  # others are not read
        clock.over("weights")
        for shape in plans.ladder(experiment.schedule, experiment.data.shape, last=False):
            denoiser.check(shape)
        rank, world = agree.world()
        data = experiment.data
        held_out = [
            _seen(denoiser, dataset, data, batch, data.held_out_clips, texts)
            for batch in clip_stream.held_out(dataset, data.held_out_clips, data.batch_size, rank, world, device)
        ]
        _, draws = clip_stream.held_out_share(min(data.held_out_clips, dataset.clips("held_out")), rank, world)
        (first,) = clip_stream.held_out(dataset, data.batch_size, data.batch_size, device=device)
        with counting.flop_counter() as encoding:
            sample = _seen(denoiser, dataset, data, first, data.batch_size, texts)
    one = sample.part(slice(0, 1))
    with counting.flop_counter() as forward:
        found = cei.blocks_in_order(blocks(denoiser.network), denoiser.predict, one)
    if rank == 0 or fsdp.is_sharded(denoiser.network):
        clips = (one, replace(one, clean=one.clean.roll(1, -1)))
        runs = [functools.partial(cei.blocks_in_order, [], denoiser.predict, clip) for clip in clips]
        missed = overlooked(denoiser.network, *runs)
        for kind, name in missed.items():
            post({"warning": f"{kind} ({name}) seems to be a block without a bypass: it is never scored or frozen"})
    if experiment.in_fp8:
        if experiment.model.compile_blocks:
            compile_blocks(found[:1])
        whole = functools.partial(cei.blocks_in_order, [], denoiser.predict, sample)
        if line := expectation.twins(twins.share(found[0], whole, Meter(True, device))):
            post({"warning": line})
    with agree.mistakes_of_all():
        cached = caches(experiment, dataset, denoiser, lambda line: post({"warning": line}))
    seen = agree.common(cached)  # one that is finished just now some may not see yet, and what a step costs hangs on it
    for shape in cached.keys() - seen:
        post({"warning": f"latents of clips of {shape} are not seen by every machine: they are encoded anew"})
    cached = {shape: cache for shape, cache in cached.items() if shape in seen}
    if denoiser.vae is not None and data.shape not in cached:
        costs = encoding.get_total_flops() / len(sample.position), forward.get_total_flops()
        if line := expectation.encoding(experiment, dataset.clips("train"), *costs):
            post({"warning": line})
    clock.over("held_out_clips")
    return Setup(experiment, device, denoiser, dataset, held_out, draws, sample, found, texts, cached, post, clock)


def _seen(denoiser, dataset: shards.Dataset, data: config.Data, batch, count: int, texts) -> Latents:
    """Held-out clips as the network sees them. count: as given to `clip_stream.held_out`."""
    out = latents.encode(denoiser, batch.resized(data.shape))
    numbers = clip_stream.held_out_numbers(dataset, count, batch.position.numpy())
    return out if texts is None else texts.beside(out, "held_out", numbers)
