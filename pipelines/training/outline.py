"""What a run will train when, as far as its settings alone say: the table that `train --dry-run` draws."""

from dataclasses import replace
from math import ceil

import torch

from entprog import models
from entprog.config import Experiment, Model, Row, Schedule, Timesteps
from entprog.data.shards import SPLITS, Dataset
from entprog.errors import UserError
from entprog.media import styles, wholebody
from entprog.models import captions, whole
from entprog.models.sources import Source
from entprog.schedule import plans
from entprog.storage import Place, Where
from pipelines.cluster import joining

COLUMNS = (
    "stage",
    "budget",
    "clips (frames x width x height)",
    "clips a step",
    "trained blocks",
    "gradient through the others",
)
CAPTIONS_OF = 32
"""Shards, spread over all, whose captions are looked at where they are not shown."""
UNEVEN = 0.1
"""Share of a step's tokens from which on a difference is told."""


def rows(experiment: Experiment, blocks: int, others: int = 0) -> list[tuple[str, ...]]:
    """A line of COLUMNS for each stage. blocks: how many may be trained (`plans.eligible`); others: how many never."""
    schedule = experiment.schedule
    out, begun = [], 0.0
    for number, row in enumerate(plans.rows(schedule), 1):
        shapes = [row.of(experiment.data.shape)]
        if schedule.kind == "entprog":
            last = number == schedule.stages
            shapes = plans.ladder(schedule, experiment.data.shape, last)
        clips = [experiment.clips_at(shape) for shape in shapes]
        backwards = schedule.backwards if schedule.kind == "entprog" else [row.backward or schedule.backwards[0]]
        whole = schedule.kind not in ("entprog", "lisa", "badam") and plans.count(row.share, blocks) == blocks
        out.append(
            (
                str(number),
                f"{begun:.0%} to {row.until:.0%}",
                " or ".join(f"{shape.frames}x{shape.width}x{shape.height}" for shape in shapes),
                " or ".join(str(number) for number in dict.fromkeys(clips)),
                trained(experiment, row, blocks),
                "" if whole and not others else " or ".join(backwards),
            )
        )
        begun = row.until
    return out


def chosen(schedule: Schedule, eligible: int, blocks: int) -> str | None:
    """How many of the network's blocks may be trained, in words; None where no kind of them is asked for."""
    if schedule.blocks == "all":
        return None
    return f"Blocks that may be trained: {eligible} of {blocks} (schedule.blocks={schedule.blocks})."


def withheld(experiment: Experiment, source: Source) -> str | None:
    """Which conditions some clips are shown without, in words; None where clips are always whole."""
    model, drop = experiment.model, experiment.train.drop
    there = (*(["text"] if _has_text(experiment, source) else []), *model.conditions)
    shares = [f"{name} of {share:.3g}" for name, share in drop if share and name in there]
    return f"Without a condition (share of the clips): {', '.join(shares)}." if shares else None


def begins(experiment: Experiment, source: Source) -> str | None:
    """Which picture a network gets that takes the reference for what a clip begins with, in words; None of others."""
    family = models.family(experiment.model.family).DENOISER
    if family.begins(source.form, source.native, source.last) is None:
        return None
    which = "each clip's own first frame" if source.first else "another frame of the video than the clip's first"
    return f"The reference is in training {which} (model.first_frame={str(source.first).lower()})."


def notes(experiment: Experiment, dataset: Dataset, source: Source) -> list[str]:
    """Settings that will not do what they say, each in words."""
    data, train, out = experiment.data, experiment.train, []
    there = dataset.clips("train")
    clips = max(map(experiment.clips_at, plans.ladder(experiment.schedule, data.shape, last=False)))
    if clips > there:
        out.append(f"a step takes {clips} clips, the shards have {there} to train on: some come twice in a step")
    if data.held_out_clips > (held_out := dataset.clips("held_out")):
        out.append(
            f"data.held_out_clips is {data.held_out_clips}, the shards hold out {held_out}: all of them are used"
        )
    if train.steps is not None and train.warmup_steps >= train.steps:
        out.append(
            f"train.warmup_steps is {train.warmup_steps}, the run ends after {train.steps} steps: the learning rate "
            "never comes to train.learning_rate"
        )
    redraws = [row.redraw_every for row in plans.rows(experiment.schedule) if row.redraw_every]
    if redraws and train.block_warmup_steps >= min(redraws):
        out.append(
            f"train.block_warmup_steps is {train.block_warmup_steps}, schedule.table draws blocks anew every "
            f"{min(redraws)} steps: most never come to train.learning_rate"
        )
    if experiment.schedule.kind == "entprog" and train.block_warmup_steps:
        out.append(
            f"train.block_warmup_steps is {train.block_warmup_steps}: a search tries blocks that are new at a part of "
            "the learning rate, beside those of the plan before at all of it, so that they look worse than they are"
        )
    if train.drop.text and not _has_text(experiment, source):
        out.append(f"train.drop.text={train.drop.text:g} withholds nothing: data.text={data.text} shows no text")
    if experiment.in_fp8 and not experiment.model.compile_blocks:
        out.append(
            "schedule.frozen_precision=fp8 without model.compile_blocks was slower than bfloat16 on an H200 (0.41 of "
            "its speed, 0.55 with gradient checkpointing), and saves no memory: leave it out, or time both"
        )
    out += _uneven(experiment, source)
    lost = source.root and models.family(experiment.model.family).DENOISER.left_out(source.native)
    out += [f"{experiment.model.base} {lost}"] if lost else []
    if train.save == "whole" and source.root is not None:
        named = whole.named_folders(source.root, source.about).items()
        out += [f"{part} is copied from {folder}, as the base's entprog.json says" for part, folder in named]
    return [f"Note: {line}." for line in out]


def _uneven(experiment: Experiment, source: Source) -> list[str]:
    """Where steps of smaller clips are far from the tokens of whole clips' that `schedule.tokens=constant` asks for:
    clips are whole, and it is pixels that are counted, whatever number of frames a VAE makes one of."""
    data, out = experiment.data, []
    if experiment.schedule.tokens == "fewer" or (whole := source.stream(data.shape)) is None:
        return out
    for shape in plans.ladder(experiment.schedule, data.shape, last=False):
        tokens = experiment.batch_size_at(shape) * source.stream(shape)[0]
        if abs((share := tokens / (data.batch_size * whole[0])) - 1) > UNEVEN:
            what = f"schedule.tokens=constant: a step of {shape} has {share:.2f} of the tokens of one of whole clips"
            out.append(f"{what}{', and memory alike' if share > 1 else ': a larger data.batch_size comes nearer'}")
    return out


def lacks_gpu(experiment: Experiment) -> str | None:
    """That training here is refused for want of a GPU, in words; None where it is not, or a cluster decides."""
    if experiment.train.gpus != "yes" or joining.address() or torch.cuda.is_available():
        return None
    return (
        "Note: train.gpus=yes, and neither this machine has a GPU nor RAY_ADDRESS names a cluster: the "
        "rest is checked, the same command without --dry-run begins where there is one."
    )


def not_looked_at(experiment: Experiment, output: Where) -> str:
    """What a dry run leaves to the run itself, in words: nothing is written, and no cluster, store or GPU is used."""
    train, written = experiment.train, ["MLflow's store"]
    if train.checkpoints:
        written.append("train.checkpoints")
    if isinstance(output, Place):
        written.append("the output's bucket")
    out = [f"whether {' and '.join(written)} can be written"]
    if joining.address():
        out.append("whether the cluster has room for the workers, now or ever")
    out.append("what clips take of a device's memory")
    return f"Not looked at: {'; '.join(out)}."


def _has_text(experiment: Experiment, source: Source) -> bool:
    """Whether clips are shown a text of which something is left to withhold."""
    text = experiment.data.text
    return text == "caption" or (text == "fixed" and bool(source.tensors["text"].any()))


def texts(experiment: Experiment, dataset: Dataset, model: Model) -> str | None:
    """Which texts clips are shown with, or which are there and not shown, in words. model: that names the text encoder,
    and the network."""
    if experiment.data.text == "fixed":
        return captions_left_out(experiment, dataset)
    wanted = captions.wanted(dataset, experiment.data.text)
    network = models.family(model.family).inspect(model).network.config
    folder = captions.folder_of(dataset.folder, captions.source(model).key_for(network))
    left = len(captions.missing(wanted, folder))
    others = captions.others(folder) if left else 0
    unused = f"; not used: {others} beside it, of other encoders or numbers of tokens"
    where = f"{folder}{unused if others else ''}"
    if experiment.data.text == "empty":
        return f"Texts: the empty one, {'to be encoded' if left else 'encoded already'} ({where})."
    of_clips = [text for split in SPLITS for text in captions.of_clips(dataset, split)]
    unmended = captions.unmended(model.family, wanted)
    return (
        f"Texts: {sum(map(bool, of_clips))} of {len(of_clips)} clips have a caption, {len(wanted) - 1} different ones; "
        f"{left} texts are to be encoded ({where}).{unmended and f' Note: {unmended}.'}"
    )


def captions_left_out(experiment: Experiment, dataset: Dataset) -> str | None:
    """That training clips have captions which a network that takes them is not shown, in words; None where it is shown
    them, none are there, or another text was asked for."""
    model, shards_there = experiment.model, dataset.splits.get("train", ())
    takes = models.family(model.family).DENOISER.TEXT_PIPELINE
    if experiment.data.text != "fixed" or model.prompt_embeds or not takes:
        return None
    some = shards_there[:: ceil(len(shards_there) / CAPTIONS_OF) or 1]
    try:
        of_clips = captions.of_clips(replace(dataset, splits={"train": some}), "train")
    except (UserError, OSError):  # what reads the clips themselves says so
        return None
    if not (have := sum(map(bool, of_clips))):
        return None
    looked_at = "" if len(some) == len(shards_there) else " looked at"
    return (
        f"Captions: {have} of {len(of_clips)} training clips{looked_at} have one, and none is shown: data.text=caption "
        "shows them (data.text=fixed is the same text for all clips)."
    )


def timesteps(experiment: Experiment) -> str | None:
    """Which timesteps are trained on, in words; None for uniform ones that count alike."""
    law = experiment.timesteps
    if law == Timesteps():
        return None
    of = {"uniform": "", "logit_normal": f" of mean {law.mean:g}, spread {law.spread:g}", "mode": f" of {law.spread:g}"}
    weights = f", losses weighted by min-SNR {law.min_snr:g}" if law.min_snr else ""
    return f"Timesteps: {law.law}{of[law.law]}, shift {law.shift:.3g} on whole clips{weights}."


def expert(source: Source) -> str | None:
    """Which of a base's two networks is trained, in words; None for a base with one."""
    found = source.expert
    if found is None:
        return None
    low, high = found.time_range
    sees = f"which sees {' and '.join(found.conditions) or 'no condition'}"
    where = "below" if found.name == "high" else "above"
    return (
        f"Expert {found.name} ({source.part.name}/): timesteps {low:g} to {high:g} alone. The other one, {sees}, "
        f"samples {where} them."
    )


def poses(dataset: Dataset, source: Source) -> str | None:
    """What a network that sees face and hands lacks in the shards' poses, or what it has not seen of them, in words."""
    if source.skeleton == styles.LIMBS or "pose" not in source.conditions:
        return None
    if dataset.points != wholebody.POINTS:
        return (
            f"Poses: the shards' have {dataset.points} points, without face and hands: model.skeleton="
            f"{source.skeleton} draws the body alone{', and no face is shown' if source.faces else ''} "
            "(prepare.pose=rtmlib, or files of poses beside the videos, has them)."
        )
    unlike = source.about and styles.unlike(source.skeleton, source.points, dataset.points)
    return f"Poses: {unlike}." if unlike else None


def masks(dataset: Dataset, source: Source) -> str | None:
    """What a network is shown of clips with masks, in words; None where the shards hold none."""
    if not dataset.masks:
        return None
    if not source.replaces:
        return "Masks: the shards' are not shown: networks of Wan-Animate and VACE alone have a place for them."
    return "Masks: clips that have one are shown with what lies around their person, as one that is to be replaced."


def trained(experiment: Experiment, row: Row, blocks: int) -> str:
    """Which blocks a row trains, in words."""
    schedule, count = experiment.schedule, plans.count(row.share, blocks)
    if schedule.kind == "entprog":
        return f"the search decides: {', '.join(str(plans.count(share, blocks)) for share in schedule.candidates)}"
    if schedule.kind == "badam":
        return f"1 of {blocks}, in turns"
    if count == blocks:
        return f"all {blocks}"
    if schedule.kind == "lisa":
        return f"{count} of {blocks} at random"
    by = {
        "top": f"by {experiment.priority.kind}",
        "random": "at random",
        "weighted": f"by lot, more often by {experiment.priority.kind}",
    }
    again = f", anew every {row.redraw_every} steps" if row.redraw_every else ""
    return f"{count} of {blocks} {by[row.choose]}{again}"
