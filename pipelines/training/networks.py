"""A worker's network: loaded, with adapters, as it is to be held; and at the end as it is to be saved."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from entprog import models
from entprog.blocks import blocks, full_state, leave_out, let_wait, round_frozen, store_frozen
from entprog.config import Experiment, Model
from entprog.diffusion.denoiser import Denoiser
from entprog.distributed import agree, fsdp
from entprog.errors import UserError
from entprog.models import adapters, fingerprints, lora
from entprog.models.finite import not_finite
from entprog.schedule.freezing import outside
from entprog.schedule.state import RunState
from entprog.training import averages
from entprog.training.fit import DivergedError


def check_start(model: Model, weights: str) -> None:
    """Raises UserError unless what a training starts from (network, VAE, adapter) is on this machine what the driver
    found, `fingerprints.base`: ranks that start from others average gradients of unlike networks."""
    if fingerprints.base(model) != weights:
        given = {name: value for name in ("base", "weights", "vae", "adapter") if (value := getattr(model, name))}
        places = ", ".join(f"model.{name}={value}" for name, value in given.items() if value not in ("auto", "none"))
        raise UserError(
            f"{places or 'model.init'}: these files are not what this command found when it began, so workers would "
            "train unlike networks: give all machines the same, or, where they were replaced meanwhile, begin anew"
        )


def load(experiment: Experiment, device: torch.device) -> Denoiser:
    """The network to be trained, with adapters if it is trained through any, every block frozen: the device never holds
    all of it in float32. Sharded, no rank ever holds all of it (`loading.load` says of which it does)."""

    def prepare(network: nn.Module) -> None:
        if experiment.stores_frozen:
            store_frozen(blocks(network), experiment.frozen_form, device)
            let_wait(blocks(network), experiment.model.swap_blocks, device)
        if experiment.rounds_base:
            leave_out(blocks(network))

    return _loaded(experiment, device, prepare, rounded=experiment.rounds_base)


def _loaded(
    experiment: Experiment,
    device: str | torch.device,
    prepare: Callable[[nn.Module], None] = lambda network: None,
    *,
    rounded: bool = False,
) -> Denoiser:
    model, settings = experiment.model, experiment.train.lora
    encoder = None if experiment.data.text == "fixed" else model.text_encoder or model.base
    model = model.model_copy(update={"text_encoder": encoder})  # what texts were encoded with is what is saved
    source = None
    if settings and model.adapter:  # then an adapter to start from is not merged: it goes on
        source = models.family(model.family).inspect(model)  # as the adapter has seen clips
        shown = {"skeleton": source.skeleton, "last_frame": source.last, "first_frame": source.first}
        model = model.model_copy(update={"adapter": None, **shown})

    def adapt(network: nn.Module) -> None:
        if settings:
            with lora.as_if_there(network):
                lora.add(network, blocks(network), settings, experiment.train.seed)
        if rounded:
            round_frozen(blocks(network))

    def prepared(network: nn.Module) -> None:
        if settings and experiment.model.adapter:
            started = adapters.read(experiment.model.adapter, "model.adapter")
            adapters.go_on(started, network, settings, "model.adapter")
        prepare(network)

    sharded = experiment.train.replicas if experiment.train.parallel == "fsdp" else 0
    family = models.family(model.family)
    loaded = family.load(model, device, experiment.train.seed, prepared, adapt=adapt, sharded=sharded)
    return loaded if source is None else replace(loaded, native=source.native)


def final(denoiser: Denoiser, experiment: Experiment, state: RunState) -> Denoiser:
    """The denoiser with averaged weights, where there are any.

    Raises DivergedError on every rank if it is not finite.
    """
    network = denoiser.network
    averages.put_in(network, state.ema, state.ema_gaps)
    mine = next((name for name, tensor in full_state(network) if not_finite({name: tensor})), None)
    if odd := [name for name in agree.gathered(mine) if name]:
        raise DivergedError(f"the trained network is not finite ({odd[0]}) after step {state.step}: no model is saved")
    return denoiser


def merged(denoiser: Denoiser, experiment: Experiment, weights: str) -> Denoiser:
    """The denoiser with its adapters merged into its weights; where the device holds those packed, or rounded alone,
    into the base's own, which are read again: on the host, or sharded.

    weights: `fingerprints.base` of what the training started from. Of a sharded network every rank calls it. Raises
    UserError if that is no longer there.
    """
    network = denoiser.network
    if experiment.frozen_form != "bfloat16" or experiment.rounds_base:
        made = lambda: fingerprints.base(experiment.model)  # noqa: E731
        if (agree.of_first(made) if fsdp.is_sharded(network) else made()) != weights:
            raise UserError(
                f"model.base: {experiment.model.base} changed while it was trained, so no model is saved: merge the "
                "adapter that was (adapter/ in the output) into the weights it was trained on, with `adapter merge`"
            )
        plain = _loaded(experiment, denoiser.device if experiment.rounds_base else "cpu").network
        plain.load_state_dict(network.state_dict(), strict=False)  # all but what the base has in full
        network = plain
    lora.merge(network)
    return replace(denoiser, network=network)


def leave_adapter(denoiser: Denoiser, experiment: Experiment, folder: Path, points: int) -> dict[str, str]:
    """All that tells the network from its base, also what an adapter that it started from brought. points: of the poses
    that it was trained on. Of a sharded network every rank calls it. Returns what the provenance of the network that it
    is merged into says of it, on rank 0."""
    whole, brought = {*outside(denoiser, experiment)}, {}
    if given := experiment.model.adapter:
        brought = adapters.read(given, "model.adapter").outside
        there = denoiser.network.state_dict(keep_vars=True).keys()  # all but what is packed, which never changed
        named = denoiser.network.named_parameters()
        whole |= {p for name, p in named if adapters.plain_name(name) in brought and name in there}
    about = {
        "family": denoiser.FAMILY,
        "conditions": denoiser.conditions,
        "skeleton": denoiser.skeleton,
        "points": points,
        "base": experiment.model.base,
        "shape": experiment.data.shape.model_dump(),
        "dtype": experiment.model.dtype,
        **({"last_frame": True} if denoiser.last else {}),
        **({"first_frame": True} if denoiser.first else {}),
        **({"native": True} if denoiser.native else {}),
        **({"texts": denoiser.texts.model_dump()} if denoiser.texts else {}),
        **({"expert": denoiser.expert.name} if denoiser.expert else {}),
    }
    lora.save(denoiser.network, experiment.train.lora, whole, folder, denoiser.PART, about, brought)
    if agree.world()[0] != 0:
        return {}
    denoiser.save_text(folder)
    left = adapters.read(str(folder), "train.lora")
    return {adapters.DIGEST: adapters.digest(left, denoiser.expert and denoiser.expert.name)}
