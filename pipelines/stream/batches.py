"""A worker's batches of latents, from the best source there is: cached latents, or clips decoded and encoded here."""

import functools
import itertools
import json
import re
import shlex
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from entprog import config
from entprog.config import ClipShape, Experiment
from entprog.data import clip_stream, latents, shards
from entprog.data.clips import Latents, Spent
from entprog.diffusion import beside
from entprog.distributed import agree
from entprog.errors import UserError
from entprog.models.captions import Texts
from entprog.schedule import plans
from pipelines.stream import feed
from pipelines.stream.decoding import Decoding

LASTING = 16
"""Batches of one shape in a row after which it is taken to go on: its own source is opened."""


@dataclass(frozen=True)
class Source:
    """Where batches come from."""

    shape: ClipShape
    """What the stream gives."""
    clips: int
    """Of a batch."""
    cached: bool


class Batches:
    """The run's batches at any shape of the ladder (`training.Batches`).

    While a search changes shapes between two steps they are cut out of one stream of whole clips, so that no change
    opens a stream (but where the number of clips changes too, `schedule.tokens`). Once a shape lasts, only its frames
    are decoded, or its cached latents are read.
    """

    def __init__(
        self,
        experiment: Experiment,
        dataset: shards.Dataset,
        denoiser,
        device: torch.device,
        decoding: Decoding,
        caches: Mapping[ClipShape, latents.Cache],
        texts: Texts | None = None,
    ):
        self.experiment, self.dataset, self.denoiser, self.device = experiment, dataset, denoiser, device
        self.decoding, self.caches, self.texts = decoding, caches, texts
        self.whole = dataset.shape
        self.searches_shapes = experiment.schedule.searches_shapes
        self.rank, self.world = agree.world()
        self.batches = experiment.train.workers * experiment.train.accumulate
        """Batches of an update, over all ranks."""
        self.mine = len(range(self.rank, self.batches, self.world))
        self.stream: clip_stream.Stream | None = None
        self.source: Source | None = None
        self.begun, self.taken = 0, 0
        """Position of the stream's first update, and this rank's batches since."""
        self.spent = Spent()
        """What this rank's batches have cost so far."""

    @property
    def position(self) -> int | None:
        """Position of the next update's first clip; None within an update, where no stream can begin."""
        updates, within = divmod(self.taken, self.mine)
        return None if within else self.begun + updates * self.batches * (self.source.clips if self.source else 0)

    def __call__(self, shape: ClipShape, position: int) -> Iterator[Latents]:
        if self.position != position:
            self.close()
            self.begun, self.taken = position, 0
        for alike in itertools.count(1):
            self._provide(shape, lasting=not self.searches_shapes or alike > LASTING)
            batch = self._next()
            self.taken += 1
            yield self._with_text(batch if isinstance(batch, Latents) else self._encoded(batch.resized(shape)))

    def close(self) -> None:
        if self.stream is not None:
            self.stream.close()
            self.stream = self.source = None

    def _provide(self, shape: ClipShape, lasting: bool) -> None:
        """Open the source that batches of a shape come from, unless one that serves is open."""
        clips = self.experiment.batch_size_at(shape)
        whole = Source(self.whole, clips, cached=False)
        its_frames = Source(self.whole.model_copy(update={"frames": shape.frames}), clips, cached=False)
        cached = Source(shape, clips, cached=True)
        if lasting:
            wanted = cached if shape in self.caches else its_frames
        else:
            wanted = self.source if self.source in (cached, its_frames) else whole
        if self.source != wanted and self.position is not None:
            self.begun, self.taken = self.position, 0
            self.close()
            self.stream, self.source = self._open(wanted, self.begun), wanted

    def _open(self, source: Source, position: int) -> clip_stream.Stream:
        order = (source.clips, self.rank, self.world, position, self.experiment.train.seed)
        how = {"cpus": self.decoding.cpus, "device": self.device, "batches": self.batches}
        if source.cached:
            poses = None
            if self.experiment.train.weighs_parts:
                located = shards.located(self.dataset)
                poses = functools.partial(clip_stream.poses, located, latents.SPLIT, frames=source.shape.frames)
            return feed.latent_stream(self.caches[source.shape], *order, **how, poses=poses)
        how |= {"frames": source.shape.frames, "where": self.decoding.where, "avoid": self.decoding.avoid}
        return feed.stream(self.dataset, latents.SPLIT, self.whole, *order, **how)

    def _next(self):
        stream = self.stream
        opening, wait_s, copy_s = stream.wait_s == 0, stream.wait_s, stream.copy_s
        batch = next(stream)
        waited = stream.wait_s - wait_s
        self.spent = replace(
            self.spent,
            wait_s=self.spent.wait_s + waited,
            open_s=self.spent.open_s + (waited if opening else 0.0),
            copy_s=self.spent.copy_s + stream.copy_s - copy_s,
        )
        return batch

    def _with_text(self, batch: Latents) -> Latents:
        if self.texts is None:
            return batch
        total, seed = self.dataset.clips(latents.SPLIT), self.experiment.train.seed
        return self.texts.beside(batch, latents.SPLIT, clip_stream.clips_at(batch.position.numpy(), total, seed))

    def _encoded(self, batch) -> Latents:
        started = time.perf_counter()
        with beside.at_hand(self.denoiser):
            out = latents.encode(self.denoiser, batch)
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        self.spent = replace(self.spent, encode_s=self.spent.encode_s + time.perf_counter() - started)
        return out


def all_cached(experiment: Experiment, cached: Collection[ClipShape]) -> bool:
    """Whether every batch of a run is read as cached latents; a search over clip shapes cuts its out of whole clips."""
    shapes = plans.ladder(experiment.schedule, experiment.data.shape, last=False)
    return not experiment.schedule.searches_shapes and all(shape in cached for shape in shapes)


def caching(experiment: Experiment) -> str:
    """The command that encodes the clips of a run once, for others to read: its shards, and its settings that latents
    depend on."""
    encoding = config.build(config.only(experiment.model_dump(), config.Encoding), config.Encoding)
    words = ["python", "-m", "pipelines.prepare", "--latents", "--output", str(experiment.data.shards)]
    for name, value in config.flat(encoding.model_dump(mode="json", exclude_defaults=True)).items():
        plain = isinstance(value, str) and re.fullmatch(r"[\w./-]+", value)
        words += ["--set", f"{name}={value if plain else json.dumps(value)}"]
    return shlex.join(words)


def caches(
    experiment: Experiment, dataset: shards.Dataset, denoiser, warn: Callable[[str], None] = lambda line: None
) -> dict[ClipShape, latents.Cache]:
    """The finished caches that `data.latents` lets a run use, by clip shape.

    Every rank looks for itself, rank 0 at every byte if `data.verify` says so. Raises UserError where one is required
    and there is none, or one is damaged.
    """
    found, data = {}, experiment.data
    if data.latents == "never":
        return found
    if denoiser.vae is None:
        if data.latents == "require":
            raise UserError(
                "data.latents=require, but this network works on pixels, it has no VAE: use data.latents=auto"
            )
        return found
    for shape in plans.ladder(experiment.schedule, data.shape, last=False):
        key = latents.key(denoiser, experiment.model.family, shape, dataset.masks)
        cache = latents.find(dataset, key)
        if cache is not None:
            latents.verify(cache, data.verify if agree.world()[0] == 0 else "size")
            found[shape] = cache
        elif data.latents == "require":
            raise UserError(
                f"data.latents=require, but shards {dataset.folder} hold no latents of {shape} by this VAE and these "
                f"conditions: make them with `{caching(experiment)}`, or use data.latents=auto"
            )
        elif latents.folder_of(dataset, key).exists():
            warn(
                f"latents of {shape} are not finished, or of the shards as they were before: not used; make them anew "
                f"with `{caching(experiment)}`"
            )
    return found
