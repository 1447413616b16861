"""What can be known of a base, or of a new network, before its weights are read (`loading`)."""

import contextlib
import inspect as python_inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from entprog import config
from entprog.blocks import blocks
from entprog.config import ClipShape, close_to
from entprog.diffusion.processes import Process
from entprog.errors import UserError
from entprog.masking import one_line
from entprog.media import styles, wholebody
from entprog.models import (
    adapters,
    attention,
    experts,
    finite,
    folders,
    inputs,
    places,
    texts,
    vaes,
    weight_files,
    whole,
)
from entprog.models.denoising import GIVEN_FRAME, SCHEDULER_FILE, VideoDenoiser, process_of

LORA = re.compile(r"\.lora_(A|B|down|up)\b")
"""In the names of a low-rank adapter's weights."""


@dataclass(frozen=True)
class Source:
    """What `inspect` found: everything about a denoiser but its weights."""

    root: Path | None
    """Folder of the base; None: a new network."""
    part: Path | None
    """The network's own folder."""
    about: dict[str, Any]
    """The base's `entprog.json`; {} if it has none."""
    network: nn.Module
    """The base or new network on the meta device, not yet widened: its configuration without its weights."""
    vae: nn.Module | None
    """On the meta device; None: pixels."""
    vae_folder: Path | None
    vae_setting: str
    """Setting that named the VAE, for messages."""
    conditions: tuple[str, ...]
    """Conditions in the order of the input channels."""
    splits: tuple[int, ...]
    """Input channels, in the groups that are summed apart."""
    form: str
    """As a denoiser's."""
    tensors: dict[str, torch.Tensor | None]
    filled: bool
    """Whether zeros were put after the tokens of `model.prompt_embeds`."""
    texts: folders.Texts | None
    """As a denoiser's."""
    more: dict[str, Path]
    """Further folders of the base's pipeline that the network needs, by name."""
    process: Process
    skeleton: config.Skeleton
    """How poses are drawn for the network."""
    points: int
    """Points of the poses that it was trained on here: 33 of a base of others."""
    last: bool
    """Whether it sees the clip's last frame."""
    first: bool
    """As a denoiser's."""
    native: bool
    """As a denoiser's."""
    trained_with: str
    """As a denoiser's."""
    faces: bool
    """As a denoiser's."""
    replaces: bool
    """As a denoiser's."""
    expert: experts.Expert | None
    """Which of the base's two networks this is; None: it has one."""
    outside: Callable[[], dict[str, list[nn.Parameter]]]
    """As a denoiser's, of the network here."""
    stream: Callable[[ClipShape], tuple[int, int] | None]
    """Tokens of a clip and their width, as blocks hand them on; None: they hand on other things."""


def inspect(
    cls: type[VideoDenoiser], settings: config.Model, shape: ClipShape | None = None, *, weights: bool = True
) -> Source:
    """Everything that can be known before weights are read.

    weights: whether the network's are wanted; where they are not, none are fetched, looked for or asked of an expert.

    Raises UserError for a folder that is missing, damaged or of another family, a VAE that is missing or does not
    fit, a scheduler of another process, conditions or prompt that do not fit, wrong names or values in `model.init`,
    and clips that do not fit.
    """
    if settings.base and settings.init:
        raise UserError("model.base and model.init are both given: a base has its own configuration, drop model.init")
    if settings.weights and not settings.base:
        raise UserError(
            "model.weights is given without model.base: set that to the folder or hub name of the file's diffusers "
            "pipeline, such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers, for its configuration, VAE and scheduler"
        )
    if not settings.base and not settings.init:
        raise UserError("no network: set model.base (a checkpoint's folder or hub name) or model.init (a new one)")
    root = places.base(cls, settings, weights)
    about = folders.saved(root) if root else {}
    name = experts.chosen(settings, root, about, cls.EXPERTS)
    part = places.network(cls, settings, root, about, name, weights) if root else None
    vae_folder, setting = places.vae(settings, root, about)
    vae = None
    if vae_folder is not None:
        vae = _vae(cls, vae_folder, setting)
        weight_files.check_fits(vae, weight_files.of(vae_folder, setting, settings.trust_pickle), setting)
    channels = 3 if vae is None else vaes.channels(vae)
    own_weights = None
    if part:
        if weights and settings.weights:
            _check_single_file(cls, settings.weights)
        elif weights:
            own_weights = weight_files.of(part, "model.base", settings.trust_pickle)
        values = folders.read_json(part / "config.json")
        cls.check_values(values, str(settings.base))
    else:
        values = _new_configuration(cls, settings, channels)
    network = _on_meta(cls.NETWORK, values, "model.base" if root else "model.init")
    cls.check_network(network.config)
    attention.check(network, settings.attention, cls.FAMILY, cls.MASKS)
    if own_weights is not None:
        weight_files.check_fits(network, own_weights, "model.base")
    blocks(network)
    experts_of = about.get("experts", {})
    if channels not in cls.predicted(network.config):
        outputs = network.config.out_channels or network.config.in_channels
        has = f"this VAE has {channels} latent channels" if vae is not None else "pixels have 3 channels"
        raise UserError(f"the network has {outputs} output channels, {has}: give its own VAE as model.vae=FOLDER")
    own, index = about | experts_of.get(name, {}), whole.index_of(root)
    conditions, splits = cls.planned_inputs(network.config, own, channels, settings, index)
    form = cls.form_of(splits, channels, conditions)
    geometry = cls.geometry(network.config, vae)
    if shape is not None:
        geometry.check(shape, given=form == GIVEN_FRAME)
    of_adapter: Mapping[str, Any] = {}
    if settings.adapter:
        adapter = adapters.read(settings.adapter, "model.adapter")
        _check_adapter(cls, adapter, network, settings, name, splits)
        there = set() if settings.weights else adapters.merged_in(about.get("provenance"))
        if adapters.digest(adapter, name) in there:
            raise UserError(
                f"model.adapter: {settings.adapter} is in the weights of {settings.base} already: give the base that "
                "it was trained on, or leave the adapter out"
            )
        of_adapter = adapter.about
    skeleton = settings.skeleton or _remembered(about, of_adapter) or (cls.skeleton_of(form) if root else styles.LIMBS)
    if skeleton not in styles.STYLES:
        raise UserError(f"model.adapter: {settings.adapter} was trained with skeleton {skeleton!r}, unknown here")
    points = of_adapter.get("points", about.get("points", len(wholebody.BLAZEPOSE)))
    if points not in wholebody.LAYOUTS.values():
        raise UserError(f"model.adapter: {settings.adapter} was trained on poses of {points!r} points, unknown here")
    tensors = cls.tensors(network.config, settings, root)
    filled = cls.FILLED and _is_new_text(settings, root, of_adapter or about)
    if filled:
        tokens = tensors["text"].shape[1]
        tensors["text"] = texts.padded(tensors["text"], cls.text_tokens(network.config))
        filled = tensors["text"].shape[1] > tokens
    more, native = {}, False
    if root is not None:
        there = [name for name in cls.MORE if name in whole.parts(index) or (root / name).is_dir()]
        native = cls.sees_native(network.config, {**about, **of_adapter}, settings, there)
        more = places.more(cls.needs(network.config, form, native), settings, root, about)
    last = cls.sees_last(network.config, of_adapter or about, form, settings)
    first = _first(cls.begins(form, native, last), of_adapter or about, settings)
    process = process_of(cls, root, about)
    expert = None
    if name and weights:
        expert = _expert(cls, settings, root, about, name, conditions, channels, skeleton, last, first)
    rest = {"vae": vae, "conditions": conditions, "process": process, **tensors}
    outside = cls(network=network, autocast=None, shape=None, **rest).outside
    return Source(
        root, part, about, network, vae, vae_folder, setting, conditions, splits, form, tensors,
        filled, texts.trained(settings, root, of_adapter or about), more, process,
        skeleton, points, last, first, native, cls.TRAINED_WITH if native else "",
        native and cls.FACES, cls.sees_around(native, vae is not None), expert,
        outside, partial(geometry.stream, network.get_submodule(cls.INPUT)),
    )  # fmt: skip


def remembered_skeleton(cls: type[VideoDenoiser], settings: config.Model) -> config.Skeleton | None:
    """How poses were drawn for the adapter or the folder that a network starts from; None: neither was trained here."""
    about = folders.saved(places.base(cls, settings)) if settings.base else {}
    of_adapter = adapters.read(settings.adapter, "model.adapter").about if settings.adapter else {}
    return _remembered(about, of_adapter)


def _remembered(about: Mapping[str, Any], of_adapter: Mapping[str, Any]) -> config.Skeleton | None:
    """How poses were drawn for what was trained here, the adapter before the folder. None: neither was. What does not
    say it is older than other drawings than `limbs`."""
    trained = of_adapter or about
    return trained.get("skeleton", styles.LIMBS) if trained else None


def _is_new_text(settings: config.Model, root: Path | None, trained: Mapping[str, Any]) -> bool:
    """Whether there is a file of the text, and the network was not trained here with what lies in it. trained:
    `entprog.json` of the adapter or the base."""
    return texts.file_of(settings, root) is not None and (settings.prompt_embeds is not None or not trained)


def _first(usual: bool | None, trained: Mapping[str, Any], settings: config.Model) -> bool:
    """Whether in training the reference is each clip's own first frame. usual: as `begins` says; trained:
    `entprog.json` of the adapter or the base, {} where neither was trained here. Raises UserError where that is wanted
    of a network that does not take the reference for it."""
    if usual is None and settings.first_frame:
        raise UserError(
            f"model.first_frame: {settings.base or 'a new network'} does not take the reference for what a clip begins "
            "with: leave it out; Wan's image-to-video and Fun-Control bases, CogVideoX's image-to-video ones and SVD "
            "do, with reference in model.conditions"
        )
    if usual is None or settings.first_frame is not None:
        return bool(settings.first_frame)
    return trained.get("first_frame", False) if "reference" in trained.get("conditions", ()) else usual


def _expert(
    cls: type[VideoDenoiser],
    settings: config.Model,
    root: Path,
    about: dict[str, Any],
    name: str,
    conditions: tuple[str, ...],
    channels: int,
    skeleton: config.Skeleton,
    last: bool,
    first: bool,
) -> experts.Expert:
    """The expert that is trained, with what is known of the other one. conditions: that it sees; channels: of latents;
    skeleton: how poses are drawn for it; last, first: as its source's.

    Raises UserError if the other one cannot be loaded, by plain diffusers too, sees what this one does not, or is shown
    poses, the first or the last frame otherwise."""
    other = experts.OTHER[name]
    folder = places.network(cls, settings, root, about, other)
    found = weight_files.of(folder, "model.base", settings.trust_pickle)
    if found.variant or not found.safetensors:
        raise UserError(
            f"model.base: {folder} has no plain safetensors, which the {other} expert is saved and sampled from: "
            "save it anew with save_pretrained"
        )
    network = _on_meta(cls.NETWORK, folders.read_json(folder / "config.json"), "model.base")
    weight_files.check_fits(network, found, "model.base")
    network = network.config
    kept = about.get("experts", {}).get(other, {})
    seen = tuple(kept.get("conditions", cls.other_sees(network, channels, conditions)))
    if lost := [one for one in seen if one not in conditions]:
        raise UserError(
            f"model.conditions: the {other} expert of {settings.base} sees {', '.join(seen)}; add {', '.join(lost)} to "
            "model.conditions"
        )
    if "pose" in seen and (drawn := _remembered(about, {})) not in (None, skeleton):
        raise UserError(
            f"model.skeleton: the {other} expert of {settings.base} was trained with {drawn}, this one is to have "
            f"{skeleton}: both are shown the same, set model.skeleton={drawn}"
        )
    for setting, own in (("last_frame", last), ("first_frame", first)):
        if about and "reference" in seen and (shown := about.get(setting, False)) != own:
            raise UserError(
                f"model.{setting}: {settings.base} was trained with {str(shown).lower()}, this expert is to have "
                f"{str(own).lower()}: both are shown the same, set model.{setting}={str(shown).lower()}"
            )
    splits = tuple(kept.get("input_channels", (network.in_channels,)))
    return experts.Expert(name, experts.boundary(root, str(settings.base)), folder, seen, splits, settings.attention)


def _check_single_file(cls: type[VideoDenoiser], given: str) -> None:
    """Raises UserError for a file that cannot be this family's network, saying what it is where that can be seen."""
    names: list[str] = []
    with (
        contextlib.suppress(OSError, SafetensorError),
        safe_open(folders.located_files(given, "model.weights", ()), "pt") as file,
    ):
        names = list(file.keys())
    if any(LORA.search(name) for name in names):
        raise UserError(f"model.weights: {given} is a low-rank adapter: give it as model.adapter")
    if posenet := [name for name in names if name.startswith(("pose_net.", "posenet."))]:
        raise UserError(
            f"model.weights: {given} is MimicMotion's, whose PoseNet ({len(posenet)} weights) no family has: here the "
            "pose enters family svd through input channels; take its UNet alone, in diffusers' format, as model.base"
        )
    weight_files.check_single_file(cls.NETWORK, given, "model.weights")


def _check_adapter(
    cls: type[VideoDenoiser],
    adapter: adapters.Adapter,
    network: nn.Module,
    settings: config.Model,
    expert: str | None,
    splits: tuple[int, ...],
) -> None:
    """Raises UserError for an adapter of another network or expert, one of conditions that this one is not to have, or
    one whose whole weights are of other sizes. network: not yet widened; expert: which of two it is."""
    adapters.check(adapter, network, "model.adapter")
    given, about = settings.adapter, adapter.about
    if expert and about.get("expert", expert) != expert:
        raise UserError(
            f"model.adapter: {given} was trained for the {about['expert']} expert, this is the {expert} one: set "
            f"model.expert={about['expert']}, or give the adapter of the {expert} one"
        )
    if lost := [name for name in about.get("conditions", ()) if name not in settings.conditions]:
        names = ", ".join(lost)
        raise UserError(f"model.adapter: {given} was trained with {names}: add that to model.conditions")
    layer, said, own = f"{cls.INPUT}.weight", about.get("conditions", ()), network.config.in_channels
    sizes = {name: list(parameter.shape) for name, parameter in network.named_parameters()}
    sizes[layer] = inputs.weight_shape(network, cls.INPUT, splits)
    if layer in adapter.outside and len(splits) > 1 and set(said) != set(settings.conditions):
        raise UserError(
            f"model.adapter: the input layer of {given} was trained with {' and '.join(said) or 'no condition'} alone: "
            f"set model.conditions=[{','.join(said)}]"
        )
    for name, tensor in adapter.outside.items():
        if list(tensor.shape) == sizes[name]:
            continue
        which = f"model.adapter: the {name} of {given} has shape {list(tensor.shape)}, this network's {sizes[name]}"
        latents = (network.config.out_channels or own) * len(said)
        if name == layer and list(tensor.shape) == inputs.weight_shape(network, cls.INPUT, (own, latents)):
            raise UserError(
                f"{which}: it is of an earlier form, every condition in new channels, and this base now sees the "
                "reference as its own pipeline does: train it anew, or merge it by the version that made it and give "
                "that model as model.base"
            )
        raise UserError(f"{which}: it is another base's")


def check_saved(cls: type[VideoDenoiser], root: Path, setting: str) -> None:
    """Raises UserError, naming `setting`, unless what lies in a saved pipeline's folder can be read, and networks and
    VAE are of their configurations and finite. What lies elsewhere is not looked at."""
    for name in (cls.PART, folders.SECOND, "vae"):
        if (folder := root / name).is_dir():
            values = folders.read_json(folder / "config.json")
            part = _vae(cls, folder, setting) if name == "vae" else _on_meta(cls.NETWORK, values, setting)
            weight_files.check_fits(part, weight_files.of(folder, setting), setting)
            finite.check(folder, setting)
    for name in whole.ENCODERS:
        for path in sorted((root / name).glob("*.safetensors")):
            weight_files.check_file(path, setting)


def files(cls: type[VideoDenoiser], settings: config.Model) -> dict[str, Path]:
    """Every file that `load` reads, by its part and name: equal names wherever a checkpoint lies.

    Raises UserError for a folder that is missing, and for weights that are missing or damaged.
    """
    out: dict[str, Path] = {}

    def network(name: str, folder: Path, setting: str) -> None:
        for path in (folder / "config.json", *weight_files.of(folder, setting, settings.trust_pickle).files):
            out[f"{name}/{path.name}"] = path

    root = places.base(cls, settings)
    about = folders.saved(root) if root else {}
    if root is not None:
        name = experts.chosen(settings, root, about, cls.EXPERTS)
        part = places.network(cls, settings, root, about, name)
        if name:
            network("other network", places.network(cls, settings, root, about, experts.OTHER[name]), "model.base")
        if settings.weights:
            file = weight_files.check_single_file(cls.NETWORK, settings.weights, "model.weights")
            out |= {"network/config.json": part / "config.json", "network/weights.safetensors": file}
        else:
            network("network", part, "model.base")
        if whole.deciding(root) and (name or inspect(cls, settings).form == GIVEN_FRAME):
            out[folders.INDEX] = root / folders.INDEX
        for name in ("entprog.json", SCHEDULER_FILE):
            if (root / name).is_file():
                out[name] = root / name
    vae, setting = places.vae(settings, root, about)
    if vae is not None:
        network("vae", vae, setting)
    there = root is not None and any((root / name).is_dir() or name in about.get("elsewhere", {}) for name in cls.MORE)
    for name, folder in inspect(cls, settings).more.items() if there else ():
        for path in sorted(folder.iterdir()):
            if path.suffix in (".json", ".safetensors"):
                out[f"{name}/{path.name}"] = path
    if prompt := texts.file_of(settings, root):
        out[folders.PROMPT] = prompt
    if settings.adapter:
        out |= {f"adapter/{path.name}": path for path in adapters.files(settings.adapter, "model.adapter")}
    return out


def _vae(cls: type[VideoDenoiser], folder: Path, setting: str) -> nn.Module:
    """The VAE of a folder on the meta device, its class checked."""
    values = folders.read_json(folder / "config.json")
    kind = next((kind for kind in cls.VAES if kind.__name__ == values.get("_class_name")), None)
    if kind is None:
        needed = " or ".join(kind.__name__ for kind in cls.VAES)
        raise UserError(f"{setting}: {folder} holds {values.get('_class_name')}, {cls.FAMILY} needs {needed}")
    return _on_meta(kind, values, setting)


def _new_configuration(cls: type[VideoDenoiser], settings: config.Model, channels: int) -> dict[str, Any]:
    known = [name for name in python_inspect.signature(cls.NETWORK.__init__).parameters if name != "self"]
    computed = cls.new_inputs(channels, settings.conditions)
    for name in settings.init:
        if name in computed:
            raise UserError(f"model.init.{name} is computed from the latents and conditions: leave it out")
        if name not in known:
            raise UserError(f"unknown setting model.init.{name}{close_to(name, known)}")
    return {"out_channels": channels, **settings.init, **computed}


def _on_meta(cls: type, values: dict[str, Any], setting: str):
    """A network of a configuration without weights: shows whether it is one, and fills in defaults."""
    try:
        with torch.device("meta"):
            return cls.from_config(values)
    except weight_files.UNFIT as error:
        reason = one_line(error)
        raise UserError(f"{setting} does not describe a {cls.__name__}: {type(error).__name__}: {reason}") from None
