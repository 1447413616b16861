"""Score tables kept by what they were made of: scored once, shared by every run and every trial."""

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import torch
from filelock import FileLock

from entprog import files
from entprog.blocks import Block
from entprog.config import Experiment, Timesteps
from entprog.data import clip_stream, latents, shards
from entprog.data.clips import Latents
from entprog.diffusion import beside
from entprog.diffusion.denoiser import Denoiser
from entprog.distributed import agree
from entprog.media import styles
from entprog.models.captions import Texts
from entprog.scoring import priorities
from entprog.scoring.tables import ScoreTable, table_key
from entprog.storage import Where


def table(
    denoiser: Denoiser,
    blocks: Sequence[Block],
    dataset: shards.Dataset,
    experiment: Experiment,
    weights: str,
    folder: Where,
    progress: Callable[[int, int], None] = lambda done, of: None,
    texts: Texts | None = None,
) -> ScoreTable:
    """The table of a network that nothing has trained since it was loaded: the one in the folder if it was ever scored,
    else made and kept there. Every rank calls it.

    weights: `fingerprints.base` of the model, which the driver knows: hashing what lies on a GPU takes seconds.
    progress: gets (conditions scored, conditions). texts: of the clips, where they have texts of their own.
    """
    priority = experiment.priority
    key = _key(denoiser, dataset, experiment, weights, texts)
    kept = folder / f"{key}.json"
    rank, world = agree.world()
    with _alone(kept) if rank == 0 else nullcontext():  # trials that start together want the same table
        # Rank 0 alone looks, so that ranks cannot differ in what they find.
        known = agree.of_first(lambda: json.loads(kept.read_text()) if kept.exists() else None)
        if known is not None:
            found = ScoreTable.from_json(known)
            seconds = found.seconds * found.ranks / world  # as it would take these ranks
            return replace(found, kind=priority.kind, seconds=seconds, ranks=world)  # CEI and its reverse share a table
        conditions, train = clips(denoiser, dataset, experiment, texts), experiment.train
        how = {"key": key, "seed": train.seed, "law": experiment.timesteps, "progress": progress}
        made = replace(priorities.score(denoiser, blocks, conditions, priority, **how), ranks=world)
        if rank == 0:
            files.write_json(kept, made.as_json())
    return made


class _Made(Sequence[Latents]):
    """Batches that are made when they are first asked for: a rank makes those of its own conditions."""

    def __init__(self, count: int, make: Callable[[int], Latents]):
        self.count, self.make = count, functools.cache(make)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Latents:
        return self.make(range(self.count)[number])


def clips(
    denoiser: Denoiser, dataset: shards.Dataset, experiment: Experiment, texts: Texts | None = None
) -> Sequence[Latents]:
    """The training clips that `priorities.score` takes as conditions, the same on every rank; none for a priority that
    looks at no data. Each batch is read and encoded when it is asked for."""
    data, wanted = experiment.data, experiment.priority.conditions
    if experiment.priority.kind in priorities.WITHOUT_DATA:
        return []
    device = next(denoiser.network.parameters()).device
    size, seed = data.batch_size, experiment.train.seed

    def make(number: int) -> Latents:
        source = clip_stream.local_stream(
            dataset, "train", dataset.shape, size, start_position=number * size, seed=seed, device=device
        )
        with beside.at_hand(denoiser):
            out = latents.encode(denoiser, next(source).resized(data.shape))
        if texts is None:
            return out
        numbers = clip_stream.clips_at(out.position.numpy(), dataset.clips("train"), seed)
        return texts.beside(out, "train", numbers)

    return _Made(-(-wanted // size), make)


def _key(
    denoiser: Denoiser, dataset: shards.Dataset, experiment: Experiment, weights: str, texts: Texts | None = None
) -> str:
    """Hash of all that a table depends on: the VAE and the text as well as the network; and the kind of device, by
    which draws differ, and what a run is charged for the table."""
    model, shape, train, law = experiment.model, experiment.data.shape, experiment.train, experiment.timesteps
    rest = [model.family, str(denoiser.process), model.conditions, model.dtype, str(shape)]
    rest += [train.seed, law.shift, *([model.vae_dtype] if model.vae_dtype != "float32" else [])]
    rest += styles.version(denoiser.skeleton) if "pose" in model.conditions else []
    rest += [asdict(law)] if replace(law, shift=1.0) != Timesteps() else []
    rest += [train.lora.model_dump(mode="json")] if train.lora else []
    rest += ["of adapters"] * (train.lora is not None and experiment.priority.kind in ("gradient", "fisher"))
    rest += [experiment.frozen_form] if experiment.frozen_form != "bfloat16" else []  # predictions are others then
    rest += [model.attention] if model.attention != "native" else []
    rest += [experiment.data.text, texts.folder.name] if texts else []
    rest += ["last frame"] * denoiser.last + ["native"] * denoiser.native
    rest += ["own first frame"] * denoiser.first + [denoiser.trained_with] * bool(denoiser.trained_with)
    device = next(denoiser.network.parameters()).device
    rest += [torch.cuda.get_device_name(device)] if device.type == "cuda" else []
    return table_key(weights, dataset.fingerprint, experiment.priority, rest)


@contextmanager
def _alone(kept: Where) -> Iterator[None]:
    """One process at a time looks for a table and makes it: a second one waits, and finds it. In a bucket, which has no
    locks, both make it, the same."""
    if not isinstance(kept, Path):
        yield
        return
    kept.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(kept.with_suffix(".lock")):
        yield
