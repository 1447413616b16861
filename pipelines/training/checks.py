"""What a training is, and whether it can be: checked before Ray, MLflow or a GPU is touched."""

from collections.abc import Mapping
from typing import Any

import torch

from entprog import config, models, storage
from entprog.blocks import blocks, check_compiles, fp8
from entprog.config import ClipShape, Experiment
from entprog.data import latents, shards
from entprog.diffusion.processes import Flow
from entprog.errors import UserError
from entprog.masking import one_line
from entprog.media import styles, wholebody
from entprog.models import adapters, attention, captions, experts, fingerprints, lora, sources
from entprog.optimizers import eight_bit
from entprog.schedule import plans
from entprog.storage import Place, Where
from entprog.training import checkpoint
from pipelines.cluster import capacity, joining
from pipelines.outputs import claim
from pipelines.stream import batches
from pipelines.tracking import store
from pipelines.training import footprint

SHOWN = ("model.skeleton", "model.last_frame", "model.first_frame")
"""Settings that are younger than what they set, which a base or an adapter may say too."""
IDLE = {
    name: name != "cei"  # tables, which are found by what they are of, whoever made them
    for name in ("mlflow_run.json", "mlflow_pending.jsonl", "warnings.jsonl", "error.log", "ray", "cei.json", "cei")
}
"""What a training leaves before its first step, and whether it goes with its command (`claim.check`)."""
Parts = dict[str, tuple[Experiment, shards.Dataset]]
"""A training's phases by name, each with its data; of a training without phases the one part ''."""


def check(experiment: Experiment, known: shards.Dataset | None = None, later: bool = False) -> shards.Dataset:
    """What can be checked before anything starts. Raises UserError; returns the data set.

    known: the data set, where its shards were checked already: none of them is looked at again. later: whether another
    phase trains the base before this one does.
    """
    joining.check_form()
    data = experiment.data
    if experiment.in_fp8:
        fp8.check_installed()
    if experiment.model.compile_blocks and experiment.stores_frozen and not experiment.gathers_half:
        check_compiles()
    if experiment.train.optimizer == "adamw_8bit":
        eight_bit.check_installed()
    if not data.shards:
        raise UserError("no shards given: --shards FOLDER (pipelines.prepare makes one)")
    dataset = known or shards.read_dataset(storage.quickly(data.shards))
    if not data.shape.is_cut_of(dataset.shape):
        raise UserError(
            f"shards {data.shards} hold clips of {dataset.shape} (width x height), the experiment wants {data.shape}: "
            "prepare them anew, or train on theirs (or on fewer frames, height and width divided by a whole number): "
            f"--set '{_setting(dataset.shape)}'"
        )
    for split in ("train", "held_out"):
        if dataset.clips(split) == 0:
            raise UserError(f"shards {data.shards} have no clips in split {split}: prepare two videos or more")
    if experiment.train.weighs_parts and dataset.points != wholebody.POINTS:
        raise UserError(
            f"train.face_weight and hand_weight: shards {data.shards} hold poses of {dataset.points} points, without "
            "face and hands: prepare them anew with prepare.pose=rtmlib, or with files of poses beside the videos"
        )
    if experiment.train.checkpoints:
        Place.at(experiment.train.checkpoints)
    if known is None:
        shards.verify(dataset, data.verify)
    for shape in plans.ladder(experiment.schedule, data.shape, last=False):
        source = models.family(experiment.model.family).inspect(experiment.model, shape)
    found = blocks(source.network)
    plans.eligible(found, experiment.schedule.blocks)
    if (wanted := experiment.model.swap_blocks) > (there := len(found)):
        raise UserError(f"model.swap_blocks is {wanted}, the network has {there} blocks: give {there} or fewer")
    begun = later or experiment.model.adapter is not None
    if experiment.outside == "never" and not begun and sum(source.splits) > source.network.config.in_channels:
        raise UserError(
            f"schedule.outside=never: {experiment.model.base} has no input yet for all of "
            f"{', '.join(source.conditions)}, and the one that it is given starts with zeros, which only training "
            "changes: set it to conditions or always"
        )
    if data.text != "fixed":
        captions.source(experiment.model)
        captions.wanted(dataset, data.text)
    if experiment.train.min_snr is not None:
        source.process.min_snr(torch.tensor([0.5]), experiment.train.min_snr)
    if experiment.train.timestep_shift == "auto" and not isinstance(source.process, Flow):
        raise UserError("train.timestep_shift=auto is of flow-matching networks: leave it out for this one")
    if source.expert is not None:
        (low, high), (begin, end) = experiment.priority.timestep_range, source.expert.time_range
        if low >= end or high <= begin:
            raise UserError(
                f"priority.timestep_range is {low:g} to {high:g}, the {source.expert.name} expert of "
                f"{experiment.model.base} has timesteps {begin:g} to {end:g} alone: give a range that meets them"
            )
    if wanted := experiment.train.preview_metrics:
        from pipelines.training import previews  # here: it takes what draws with it

        previews.meter(wanted, data.shape, experiment.train.preview_clips, dataset.points)
    if experiment.train.lora:
        lora.check(source.network, found, experiment.train.lora)
        if given := experiment.model.adapter:
            started = adapters.read(given, "model.adapter")
            adapters.check_goes_on(started, experiment.train.lora, "model.adapter")
    if data.latents == "require":
        _check_latents(experiment, dataset)
    footprint.check_budget(experiment, source)
    return dataset


def _setting(shape: ClipShape) -> str:
    """The setting that says a clip shape, to be pasted."""
    sizes = {name: int(value) if value == int(value) else value for name, value in shape}
    return f"data.shape={{{', '.join(f'{name}: {value}' for name, value in sizes.items())}}}"


def _check_latents(experiment: Experiment, dataset: shards.Dataset) -> None:
    """Raises UserError where latents that a run requires are not there: as the workers do, by the VAE's weights."""
    if (dataset.folder / latents.FOLDER).exists():
        denoiser = models.family(experiment.model.family).encoder(experiment.model)
        quick = {"data": experiment.data.model_copy(update={"verify": "size"})}  # rank 0 reads every byte
        batches.caches(experiment.model_copy(update=quick), dataset, denoiser)
    else:
        raise UserError(
            f"data.latents=require, but shards {dataset.folder} hold no latents: make them with "
            f"`{batches.caching(experiment)}`, or use data.latents=auto"
        )


def parts(experiment: Experiment, output: Where) -> Parts:
    """What is to be trained, each part checked as far as can be before the one before it has run. Raises UserError."""
    store.tracking_uri()
    inputs = {"data.shards": experiment.data.shards, "model.base": experiment.model.base}
    claim.check_outside(output, inputs)
    if not experiment.parts:
        return {"": (experiment, check(experiment))}
    found = config.phases(experiment, output)
    first = next(iter(found.values()))
    out = {}
    for name, phase in found.items():
        network = stand_in(phase, first)
        # Of shards every byte is read once.
        data = phase.data.model_copy(update={"verify": "size"} if phase is not first else {})
        try:
            out[name] = (
                phase,
                check(phase.model_copy(update={"model": network, "data": data}), later=phase is not first),
            )
        except UserError as error:
            raise UserError(f"phase {name}: {error}") from None
    _shown_alike(found)
    return out


def _shown_alike(phases: Mapping[str, Experiment]) -> None:
    """Raises UserError where a base's two experts would be shown poses, the first or the last frame otherwise than each
    other: of a folder that is there `sources.inspect` does, the one that a phase starts from is not there yet."""
    first, before = next(iter(phases.values())), ""
    source = models.family(first.model.family).inspect(first.model)
    if source.expert is None:
        return
    expert = source.expert.name
    shown = {"skeleton": source.skeleton, "last_frame": source.last, "first_frame": source.first}
    saw = {experts.OTHER[expert]: source.expert.conditions}
    for name, phase in phases.items():
        own, expert = phase.model, phase.model.expert or expert
        other = experts.OTHER[expert]
        for setting, known in shown.items():
            condition, wanted = "pose" if setting == "skeleton" else "reference", getattr(own, setting)
            if before and wanted not in (None, known) and condition in saw[other]:
                value = str(known).lower()
                raise UserError(
                    f"phase {name}: model.{setting}={str(wanted).lower()}, and phase {before} leaves a model of "
                    f"{value}, whose {other} expert sees the {condition} too: both are shown the same, set "
                    f"model.{setting}={value} in both"
                )
        shown |= {setting: value for setting in shown if (value := getattr(own, setting)) is not None}
        saw[expert], before = own.conditions, name


def stand_in(phase: Experiment, first: Experiment) -> config.Model:
    """The network of a phase whose base is not there yet: it will be the first phase's, widened."""
    own = ("conditions", "text_encoder", "expert", "skeleton", "last_frame", "first_frame", "attention")
    return first.model.model_copy(update={name: getattr(phase.model, name) for name in own})


def check_room(parts: Parts) -> None:
    """Raises UserError where the Ray that would start on this machine could not hold the workers, or gives them no
    device for their arithmetic. One that is joined is asked once it is."""
    for experiment, _ in parts.values():
        if capacity.gpus_here(experiment) is False:
            check_cpus(experiment)


def check_cpus(experiment: Experiment) -> None:
    """Raises UserError where CPUs cannot train as the settings say."""
    if experiment.in_fp8:
        fp8.check_device(torch.device("cpu"))
    attention.check_device(experiment.model, torch.device("cpu"))


def check_reach(parts: Parts) -> None:
    """Raises UserError where MLflow's server or the place of checkpoints does not answer, or that place is another
    training's. Nothing is written to either."""
    store.check_answers()
    experiment, dataset = next(iter(parts.values()))  # of later phases the weights may not be there yet
    if there := experiment.train.checkpoints:
        try:
            checkpoint.check_owner(storage.quickly(there), identity(experiment, dataset))
        except OSError as error:
            raise UserError(
                f"train.checkpoints: cannot look at {Place.at(there)}: {one_line(error)}; look at its name and at the "
                "credentials in the environment"
            ) from None


def deciding(experiment: Experiment, dataset: shards.Dataset, *, after: Experiment | None = None) -> dict[str, Any]:
    """By name all that decides what a training computes: settings, and the content of what they name.

    after: the phase before, whose weights, which it starts from, may not be there yet.
    """
    model, train = experiment.model, experiment.train
    values = config.deciding(experiment)
    if values["schedule.frozen_precision"] == "auto":  # the same to the bit
        values["schedule.frozen_precision"] = "full"
    source = models.family(model.family).inspect(model) if after is None else None
    values = {name: value for name, value in values.items() if name not in SHOWN}
    values |= _shown_after(model, after.model) if source is None else _shown(model, source)
    if source and source.native:
        values["inputs of model.base"] = f"all, {source.trained_with}" if source.trained_with else "all"
    if experiment.data.text != "fixed":
        values["text encoder"] = captions.source(model).key
    return values | {
        "train.workers × train.accumulate": train.workers * train.accumulate,
        "model.vae": model.vae if model.vae in ("auto", "none") else "a folder",
        "weights of model.base": fingerprints.base(model) if after is None else "those of the phase before",
        "clips of data.shards": dataset.fingerprint,
    }


def _shown(model: config.Model, source: sources.Source) -> dict[str, Any]:
    """By name what SHOWN is for a network, whether a setting, its base or an adapter says so; nothing where it is as in
    runs of before those settings, which are resumed: poses as then, neither the first nor the last frame shown."""
    remembered = sources.remembered_skeleton(models.family(model.family).DENOISER, model)
    skeleton = model.skeleton or (None if remembered else source.skeleton)
    as_before = skeleton == styles.LIMBS == (remembered or styles.LIMBS)
    return _given(None if as_before else skeleton, source.last or None, source.first or None)


def _shown_after(model: config.Model, before: config.Model) -> dict[str, Any]:
    """As `_shown`, of a phase whose base is not there yet: as far as its settings and those of the phase before say."""
    as_before = model.skeleton == before.skeleton == styles.LIMBS
    frames = [
        None if own is was is False else own
        for own, was in ((model.last_frame, before.last_frame), (model.first_frame, before.first_frame))
    ]
    return _given(None if as_before else model.skeleton, *frames)


def _given(*values: Any) -> dict[str, Any]:
    return {name: value for name, value in zip(SHOWN, values, strict=True) if value is not None}


def identity(experiment: Experiment, dataset: shards.Dataset) -> str:
    """Hash of all that decides what is computed: a checkpoint belongs to it."""
    return config.digest(deciding(experiment, dataset))


def whole_identity(parts: Parts) -> dict[str, Any]:
    """By name all that decides what a training leaves, over all its phases."""
    before: Experiment | None = None
    out: dict[str, Any] = {"phases": [name for name in parts if name]}
    for name, (experiment, dataset) in parts.items():
        values = deciding(experiment, dataset, after=before)
        out |= {f"{name}: {key}" if name else key: value for key, value in values.items()}
        before = experiment
    return out
