"""How much a run sees and computes, the latter counted from its network's configuration, on the meta device, where
nothing is computed."""

from collections.abc import Iterator
from copy import deepcopy

import torch

from entprog import models
from entprog.config import ClipShape, Experiment
from entprog.cost import counting
from entprog.models import inputs
from entprog.models.denoising import VideoDenoiser
from entprog.models.sources import Source
from entprog.schedule import plans
from pipelines import terminal

GPU, FLOPS_PER_S, SHARE = "H100", 989e12, 0.4
"""A GPU's bfloat16 FLOPs a second, and the share of them that a training of large transformers reaches, as a rule."""


def stages(experiment: Experiment) -> Iterator[tuple[float, ClipShape, int]]:
    """(steps, clip shape, clips a step) of every stage of a run whose budget is in steps. Of a search, which may take
    smaller clips, whole ones."""
    train, begun = experiment.train, 0.0
    for row in plans.rows(experiment.schedule):
        shape = experiment.data.shape if experiment.schedule.kind == "entprog" else row.of(experiment.data.shape)
        yield (row.until - begun) * train.steps, shape, experiment.clips_at(shape)
        begun = row.until


def clips_seen(experiment: Experiment) -> float:
    """Clips that a run whose budget is in steps sees, each as often as it comes."""
    return sum(steps * clips for steps, _, clips in stages(experiment))


def epochs(experiment: Experiment, there: int) -> str | None:
    """How often the run sees each of so many training clips, in words; None where its budget is not in steps."""
    if experiment.train.steps is None:
        return None
    seen = clips_seen(experiment)
    return (
        f"Epochs: {experiment.train.steps} steps see {seen:.0f} clips, so each of the {there} there are "
        f"{seen / there:.3g} times."
    )


def line(experiment: Experiment, source: Source) -> str | None:
    """What the run computes, and what that means on a card, in words; None where its budget is not in steps."""
    if experiment.train.steps is None:
        return None
    by_stage, each = stage_flops(experiment, source), SHARE * FLOPS_PER_S
    flops, workers, shares = sum(by_stage), experiment.train.workers, ""
    if experiment.schedule.kind == "progressive" and experiment.schedule.has_smaller_clips:  # small steps are cheap
        shares = f" ({', '.join(f'{part / flops:.0%}' for part in by_stage)} of it in the table's rows)"
    return (
        f"Work, counted: up to {flops / 1e15:.3g} PFLOP{shares}, all blocks in every step; clips' encoding and what "
        f"ranks or searches comes on top. At {each / 1e12:.0f} TFLOP/s, {SHARE:.0%} of an {GPU}'s in bfloat16, that is "
        f"{terminal.duration(flops / each / workers)}{f' on {workers} of them' if workers > 1 else ''}, elsewhere in "
        "proportion: a forecast, not a measurement."
    )


def stage_flops(experiment: Experiment, source: Source) -> list[float]:
    """FLOPs of all workers in each stage of `train.steps`, all of which train all blocks: two forward passes' worth for
    gradients of what blocks are given and of their weights, which adapters spare, and one for what checkpointing
    recomputes."""
    plain = denoiser(experiment, source)
    passes = 3 + bool(experiment.model.gradient_checkpointing) - (experiment.train.lora is not None)
    return [steps * clips * passes * forward_flops(plain, shape) for steps, shape, clips in stages(experiment)]


def denoiser(experiment: Experiment, source: Source) -> VideoDenoiser:
    """The network that will be trained, widened for its conditions, on the meta device; without image encoders."""
    cls, network = models.family(experiment.model.family).DENOISER, deepcopy(source.network).eval().to("meta")
    if len(source.splits) > 1:
        inputs.widen(network, cls.INPUT, source.splits)
    tensors = {name: None if tensor is None else tensor.to("meta") for name, tensor in source.tensors.items()}
    return cls(
        network=network, vae=source.vae, conditions=source.conditions, process=source.process, autocast=None,
        shape=None, **tensors,
    )  # fmt: skip


@torch.no_grad()
def forward_flops(plain: VideoDenoiser, shape: ClipShape) -> int:
    """FLOPs of a forward pass of one clip."""
    channels, *places = plain.latent_shape(shape)
    with torch.device("meta"):
        noisy, t = torch.empty(1, channels, *places), torch.empty(1)
        shown = {name: torch.empty(1, channels, *places) for name in plain.conditions}
    if plain.form:
        marks = {"first frame": getattr(plain, "mask_channels", 0), "given frame": 1, "control": 0}[plain.form]
        shown["reference"] = torch.empty(1, channels + marks, *places, device="meta")
    plain.predict(noisy, t, shown)  # what is encoded once, of a grey clip, is none of it
    with counting.flop_counter() as counter:
        plain.predict(noisy, t, shown)
    return counter.get_total_flops()
