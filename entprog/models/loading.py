"""A base's or a new network's weights into a denoiser, whole or each rank its part, by what `sources.inspect` found."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import nn

from entprog import config
from entprog.blocks import blocks, match_norms
from entprog.config import ClipShape
from entprog.distributed import agree, fsdp
from entprog.errors import UserError
from entprog.masking import bare, one_line
from entprog.models import adapters, attention, experts, folders, inputs, parts, weight_files, whole
from entprog.models.denoising import VideoDenoiser
from entprog.models.sources import Source, inspect
from entprog.storage import answered


def load(
    cls: type[VideoDenoiser],
    settings: config.Model,
    device: str | torch.device = "cpu",
    seed: int = 0,
    prepare: Callable[[nn.Module], None] = lambda network: None,
    *,
    adapt: Callable[[nn.Module], None] = lambda network: None,
    sharded: int = 0,
) -> VideoDenoiser:
    """The base, or a new network from `model.init`, its input layer widened for the conditions it lacks, with its
    adapter merged into it.

    seed: of a new network's weights; torch's own random state is left as it was. adapt: adds to blocks what they are
    trained through, and may change the type of what is not trained; the network is not split yet, and may have no
    memory. prepare: what to do with the network on the host, before the device has to hold it. sharded: copies of the
    network that all ranks hold together: each has a part of every weight (`fsdp.shard`), and loads no more than that;
    but single files, pickles, and bases whose weights have other names are loaded whole on the host of each rank and
    then split. 0: each holds the whole.
    Raises UserError as `inspect` does, and for weights that are missing or do not fit; sharded, on all ranks,
    whichever of them met it.
    """
    # Told on every rank before one of them brings weights together (`completed`), for which it needs the others.
    with agree.mistakes_of_all() if sharded else nullcontext():
        source = inspect(cls, settings)
        network, merged = None, {}
        if sharded:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                network = _in_parts(cls, settings, source, device, sharded, adapt)
        if network is None:
            network = _whole(cls, settings, source, seed)
            adapt(network)
            if sharded:
                fsdp.shard(network, blocks(network), sharded, settings.dtype == "bfloat16", device)
        if settings.adapter:
            adapter = adapters.read(settings.adapter, "model.adapter")
            adapters.merge(adapter, network, "model.adapter")
            merged = {adapters.DIGEST: adapters.digest(adapter, source.expert and source.expert.name)}
        prepare(network)
        if settings.dtype != "float32":
            match_norms(network)
        attention.choose(network, settings.attention)
        denoiser = _with_parts(cls, settings, source, network if sharded else network.to(device), device)
    denoiser = cls.completed(denoiser, source.more)
    denoiser.check_type()
    origins = _origins(cls, settings, source, denoiser.vae)
    return replace(denoiser, origins=origins, provenance=denoiser.provenance | merged)


def _whole(cls: type[VideoDenoiser], settings: config.Model, source: Source, seed: int) -> nn.Module:
    """The network on the host, its input layer widened."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if settings.weights:
            file = weight_files.check_single_file(cls.NETWORK, settings.weights, "model.weights")
            network = weight_files.from_single_file(cls.NETWORK, file, source.part, "model.weights")
            network.register_to_config(_name_or_path=_said(settings.base))
        elif source.part is not None:
            network = weight_files.pretrained(cls.NETWORK, source.part, "model.base", settings.trust_pickle)
            network.register_to_config(_name_or_path=_said(settings.base))  # not this machine's cache
        else:
            network = cls.NETWORK.from_config(source.network.config)
            cls.initialise(network)
            network.eval()  # as from_pretrained gives it
    if len(source.splits) > 1:
        inputs.widen(network, cls.INPUT, source.splits)
    return network


def _in_parts(
    cls: type[VideoDenoiser],
    settings: config.Model,
    source: Source,
    device: str | torch.device,
    replicas: int,
    adapt: Callable[[nn.Module], None],
) -> nn.Module | None:
    """The network, its input layer widened, of which this rank has its part alone; None: it has to be loaded whole."""
    half = settings.dtype == "bfloat16"
    if settings.weights:
        return None
    if source.part is None:
        return parts.drawn(cls.NETWORK, source.network.config, cls.initialise, device, replicas, adapt, half)
    found = weight_files.of(source.part, "model.base", settings.trust_pickle)
    files = [path for path in found.files if path.suffix != ".json"]
    try:
        network = parts.of_base(
            cls.NETWORK, source.network.config, files, cls.INPUT, source.splits, device, replicas, adapt, half
        )
    except OSError as error:
        answered(source.part, error)
        raise UserError(f"model.base: cannot read {source.part}: {one_line(error)}") from None
    if network is not None:
        network.register_to_config(_name_or_path=_said(settings.base))
    return network


def encoder(cls: type[VideoDenoiser], settings: config.Model, device: str | torch.device = "cpu") -> VideoDenoiser:
    """What encodes clips and conditions as `load`'s denoiser does: its network, on the meta device, has a configuration
    and no weights, which are neither fetched nor read. Raises UserError as `load` does, but for the network's weights.
    """
    source = inspect(cls, settings, weights=False)
    if len(source.splits) > 1:
        inputs.widen(source.network, cls.INPUT, source.splits)
    for name, part in cls.encodes_with(source.network.config, source.native).items():
        folder = inspect(cls, settings).part  # with its weights, fetched and looked at
        part.load_state_dict(weight_files.part_of_network(folder, name, "model.base"))
        source.network.set_submodule(name, part)
    return cls.completed(_with_parts(cls, settings, source, source.network, device), source.more)


def _with_parts(
    cls: type[VideoDenoiser], settings: config.Model, source: Source, network: nn.Module, device: str | torch.device
) -> VideoDenoiser:
    """A network's denoiser, with its VAE, on a device; not `completed` yet."""
    vae = None
    if source.vae_folder is not None:  # in float32: video VAEs lose quality in half precision
        vae = weight_files.pretrained(type(source.vae), source.vae_folder, source.vae_setting, settings.trust_pickle)
        vae.register_to_config(_name_or_path=_said(settings.base if settings.vae == "auto" else settings.vae))
        vae.requires_grad_(False).eval().to(device)
    shape = source.about.get("shape")
    provenance = {"base": _said(settings.base), "init": settings.init}
    provenance |= {name: given for name in ("weights", "adapter") if (given := getattr(settings, name))}
    if source.about:
        provenance["of_base"] = source.about.get("provenance")
    tensors = {name: None if tensor is None else tensor.to(device) for name, tensor in source.tensors.items()}
    return cls(
        network=network,
        vae=vae,
        conditions=source.conditions,
        process=source.process,
        skeleton=source.skeleton,
        points=source.points,
        last=source.last,
        first=source.first,
        native=source.native,
        expert=source.expert,
        base_index=whole.index_of(source.root),
        autocast=None if settings.dtype == "float32" else getattr(torch, settings.dtype),
        vae_autocast=None if settings.vae_dtype == "float32" else getattr(torch, settings.vae_dtype),
        shape=ClipShape(**shape) if shape else None,
        provenance=provenance,
        texts=source.texts,
        no_text={name: tensors[name] for name in cls.text_names()} if source.texts else {},
        **tensors,
    )


def _said(name: str | None) -> str | None:
    """Where something came from, as it is saved: of an address in a bucket without the settings of its client."""
    return bare(name) if name and "://" in name else name


def _origins(
    cls: type[VideoDenoiser], settings: config.Model, source: Source, vae: nn.Module | None
) -> dict[str, whole.Origin]:
    """Where the parts come from that no one trains."""
    root, about, vae_folder = source.root, source.about, source.vae_folder
    out = whole.encoders(settings.base, root, about)
    if given := settings.text_encoder:
        folder = folders.located_text(given, "model.text_encoder", cls.TEXT_PARTS)
        out = {name: o for name, o in out.items() if name not in cls.TEXT_PARTS}
        out |= whole.text_encoders(given, folder, cls.TEXT_PARTS)
    if source.expert is not None:
        name = experts.FOLDERS[experts.OTHER[source.expert.name]]
        where = whole.origin(str(settings.base), root, name, "diffusers", cls.NETWORK.__name__, about)
        ours = bool(about) and name not in about.get("elsewhere", {}) and where.place.revision is None
        out[name] = replace(where, trained=ours or where.trained)
    for name in source.more.keys() - out.keys():  # of a base without an index
        out[name] = whole.origin(str(settings.base), root, name, *cls.MORE[name], about)
    if vae is not None:
        kind, given = type(vae).__name__, settings.base if settings.vae == "auto" else settings.vae
        inside = vae_folder.name == "vae"
        place = vae_folder.parent if inside else vae_folder
        if (kept := about.get("elsewhere", {}).get("vae")) and settings.vae == "auto":
            out["vae"] = whole.Origin(folders.Elsewhere(**kept), vae_folder)
        else:
            out["vae"] = whole.origin(given, place, "vae" if inside else "", "diffusers", kind, {})
    return out
