"""Low-rank adapters as files: in the keys of diffusers, of ComfyUI and of peft, merged into a network, and extracted.

An adapter's folder:
  pytorch_lora_weights.safetensors   what `pipe.load_lora_weights(FOLDER)` of diffusers takes
  comfyui.safetensors                the same for ComfyUI (Wan alone), without face_adapter
  adapter_model.safetensors          the same for peft, with adapter_config.json
  outside.safetensors                whole weights that lie in no adapted layer: none of those three load them
  prompt_embeds.safetensors          the text that training showed, where it was not zeros
  entprog.json, README.md            what it belongs to, and how to use it
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from entprog.blocks import Block
from entprog.config import Lora
from entprog.distributed import fsdp
from entprog.errors import UserError
from entprog.files import from_json
from entprog.masking import bare, cut, one_line
from entprog.models import folders
from entprog.models.finite import not_finite
from entprog.storage import answered

DIFFUSERS, COMFYUI, PEFT = "pytorch_lora_weights.safetensors", "comfyui.safetensors", "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
OUTSIDE = "outside.safetensors"
ABOUT = folders.ABOUT
FORMAT = "entprog-adapter-1"
METADATA = "lora_adapter_metadata"
"""Where diffusers keeps rank and alpha, in the metadata of its file."""
DIGEST = "adapter_digest"
"""Where a saved network's provenance has the `digest` of the adapter that was merged into it."""
PREFIXES = ("transformer.", "unet.", "base_model.model.", "diffusion_model.")
"""Before the names of layers: diffusers' two, peft's, and ComfyUI's."""
_LONGEST = 300
"""Characters of a layer's name, or of an expression for some."""
ENDS = {"lora_A.weight": 0, "lora_down.weight": 0, "lora_B.weight": 1, "lora_up.weight": 1}
TO_COMFYUI = (
    (".attn1.to_out.0", ".self_attn.o"), (".attn2.to_out.0", ".cross_attn.o"), (".attn1.to_", ".self_attn."),
    (".attn2.add_k_proj", ".cross_attn.k_img"), (".attn2.add_v_proj", ".cross_attn.v_img"),
    (".attn2.to_", ".cross_attn."), (".ffn.net.0.proj", ".ffn.0"), (".ffn.net.2", ".ffn.2"),
)  # fmt: skip
"""Wan's layers in diffusers, and in its original code, which ComfyUI's names follow; longer ones first."""
NOT_BY_DIFFUSERS = ("latte", "svd")
"""Families whose pipelines in diffusers load no adapters."""
COMFYUI_FAMILIES = ("wan", "wan_animate")
NOT_IN_COMFYUI = "face_adapter."
"""Before the names of layers that ComfyUI's file leaves out: the original has their keys and values in one layer."""


@dataclass(frozen=True)
class Pair:
    """One layer's adapter: what it adds to the weight is alpha / rank · up @ down."""

    down: torch.Tensor
    """A [rank, in]."""
    up: torch.Tensor
    """B [out, rank]."""
    alpha: float

    @property
    def rank(self) -> int:
        return len(self.down)

    def delta(self) -> torch.Tensor:
        """What it adds to the weight [out, in]."""
        return (self.up @ self.down) * (self.alpha / self.rank)


@dataclass(frozen=True)
class Adapter:
    """Everything that tells a fine-tuned network from its base."""

    pairs: Mapping[str, Pair]
    """By the name of the layer in diffusers' class."""
    outside: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Whole weights, by the name of the parameter."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """`family`, `conditions`, `base`, `shape`, `expert` of two; {} for an adapter that others made."""


def write(folder: Path, adapter: Adapter, part: str) -> None:
    """Write an adapter's folder, whole or not at all. part: the network's folder in a pipeline, the prefix of keys."""
    ranks = {name: pair.rank for name, pair in adapter.pairs.items()}
    alphas = {name: pair.alpha for name, pair in adapter.pairs.items()}
    most_rank, most_alpha = _most(ranks.values()), _most(alphas.values())
    config = {
        "r": most_rank,
        "lora_alpha": most_alpha,
        "target_modules": sorted(adapter.pairs),
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != most_rank},
        "alpha_pattern": {name: alpha for name, alpha in alphas.items() if alpha != most_alpha},
    }
    prefixed = {f"{part}.{name}": value for name, value in config.items()}
    with folders.replacing(folder) as scratch:
        metadata = {"format": "pt", METADATA: json.dumps(prefixed, sort_keys=True)}
        save_file(_tensors(adapter, f"{part}."), scratch / DIFFUSERS, metadata=metadata)
        save_file(_tensors(adapter, "base_model.model."), scratch / PEFT)
        peft = {"peft_type": "LORA", "lora_dropout": 0.0, "bias": "none", "inference_mode": True, **config}
        (scratch / PEFT_CONFIG).write_text(json.dumps(peft, indent=2) + "\n")
        if kept := _in_comfyui(adapter):
            named = {to_comfyui(name): pair for name, pair in kept.items()}
            tensors = _tensors(Adapter(named), "diffusion_model.")
            tensors |= {f"diffusion_model.{name}.alpha": torch.tensor(pair.alpha) for name, pair in named.items()}
            save_file(tensors, scratch / COMFYUI)
        if adapter.outside:
            whole = {name: tensor.detach().cpu().contiguous() for name, tensor in adapter.outside.items()}
            save_file(whole, scratch / OUTSIDE)
        about = {"format": FORMAT, **adapter.about, "outside": sorted(adapter.outside)}
        (scratch / ABOUT).write_text(json.dumps(about, indent=2) + "\n")
        (scratch / folders.CARD).write_text(_readme(adapter, config))


def _most(values: Iterable[Any]) -> Any:
    values = list(values)
    return max(sorted(set(values)), key=values.count)


def _tensors(adapter: Adapter, prefix: str) -> dict[str, torch.Tensor]:
    out = {}
    for name, pair in adapter.pairs.items():
        out[f"{prefix}{name}.lora_A.weight"] = pair.down.detach().cpu().contiguous()
        out[f"{prefix}{name}.lora_B.weight"] = pair.up.detach().cpu().contiguous()
    return out


def _readme(adapter: Adapter, config: Mapping[str, Any]) -> str:
    base, expert = adapter.about.get("base"), adapter.about.get("expert")
    second = ", load_into_transformer_2=True" if expert == "low" else ""
    of = f" It is the {expert} expert's, one of the base's two networks." if expert else ""
    lines = [
        "# A low-rank adapter\n",
        f"Rank {config['r']}, alpha {config['lora_alpha']:g}, {len(adapter.pairs)} layers of a "
        f"{adapter.about.get('family', '')} network{f', over {Path(bare(str(base))).name}' if base else ''}.{of}\n",
        f"- peft: `PeftModel.from_pretrained(network, FOLDER)` takes {PEFT}",
    ]
    if adapter.about.get("family") not in NOT_BY_DIFFUSERS:
        lines.append(f'- diffusers: `pipe.load_lora_weights("THIS FOLDER"{second})` takes {DIFFUSERS}')
    if kept := _in_comfyui(adapter):
        left_out = [name for name in adapter.pairs if name not in kept]
        without = f", without {len(left_out)} layers that its network has in another form: {_some(left_out)}"
        lines.append(f"- ComfyUI: {COMFYUI}{without if left_out else ''}")
    lines.append("- merged into its base: `entprog adapter merge --adapter FOLDER --base BASE --output MODEL`\n")
    if adapter.outside:
        lines.append(
            f"**It is half of what was trained.** {OUTSIDE} holds {len(adapter.outside)} weights that lie in no "
            f"adapted layer ({_some(adapter.outside)}). diffusers, peft and ComfyUI do not load them: put them into "
            "the network with `network.load_state_dict(load_file(FILE), strict=False)`, or merge the adapter.\n"
        )
    return "\n".join(lines)


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "")


def _in_comfyui(adapter: Adapter) -> dict[str, Pair]:
    """The pairs that have a place in ComfyUI's network; {} for a family that it has not."""
    if adapter.about.get("family") not in COMFYUI_FAMILIES:
        return {}
    return {name: pair for name, pair in adapter.pairs.items() if not name.startswith(NOT_IN_COMFYUI)}


def to_comfyui(name: str) -> str:
    for ours, theirs in TO_COMFYUI:
        name = name.replace(ours, theirs)
    return name


def from_comfyui(name: str) -> str:
    for ours, theirs in TO_COMFYUI:
        name = re.sub(rf"{re.escape(theirs)}(?={'' if theirs[-1] == '.' else '$'})", ours, name)
    return name


def located(given: str, setting: str) -> Path:
    """An adapter's folder or file here, or the copy of one in a bucket. Raises UserError if it cannot be fetched."""
    return folders.located_files(given, setting, (DIFFUSERS, PEFT, PEFT_CONFIG, OUTSIDE, ABOUT, folders.PROMPT))


def path_of(path: Path, given: str, setting: str) -> Path:
    """The file of an adapter's pairs, given or in a folder of them. Raises UserError if there is none."""
    if path.is_dir():
        inside = [path / name for name in (DIFFUSERS, PEFT) if (path / name).is_file()]
        if not inside:
            raise UserError(f"{setting}: no adapter in {bare(given)}: neither {DIFFUSERS} nor {PEFT}")
        return inside[0]
    if not path.is_file():
        raise UserError(f"{setting}: no such file or folder: {given}")
    return path


def files(given: str, setting: str) -> list[Path]:
    """What `read` reads: a file alone is its pairs alone, but for peft's, whose scale is said beside them."""
    there = located(given, setting)
    path, whole = path_of(there, given, setting), there.is_dir()
    names = (OUTSIDE, ABOUT, PEFT_CONFIG) if whole else (PEFT_CONFIG,) if path.name == PEFT else ()
    return [path, *(each for each in map(path.with_name, names) if each.is_file())]


def read(given: str, setting: str) -> Adapter:
    """An adapter's folder, ours or another's, or a file of pairs in diffusers', peft's or ComfyUI's keys.

    Raises UserError, naming `setting`, for a file that is damaged, in other keys or not finite.
    """
    path, *beside = files(given, setting)
    tensors, metadata = _load(path, setting)
    halves: dict[str, list[torch.Tensor | None]] = {}
    alphas: dict[str, float] = {}
    for key, tensor in tensors.items():
        prefix = next((prefix for prefix in PREFIXES if key.startswith(prefix)), "")
        name, end = key.removeprefix(prefix), next((end for end in ENDS if key.endswith(f".{end}")), "alpha")
        layer = name.removesuffix(f".{end}")
        if layer == name or (end != "alpha" and tensor.ndim != 2):
            raise UserError(f"{setting}: {path} holds {key}, which is no part of a low-rank adapter of linear layers")
        layer = from_comfyui(layer) if prefix == "diffusion_model." else layer
        if not tensor.numel() or (end == "alpha" and tensor.numel() != 1):
            raise UserError(f"{setting}: {path} is damaged: its {key} has shape {list(tensor.shape)}")
        if end == "alpha":
            alphas[layer] = float(tensor)
        else:
            halves.setdefault(layer, [None, None])[ENDS[end]] = tensor.float()
    if lone := [layer for layer, pair in halves.items() if None in pair]:
        raise UserError(f"{setting}: {path} holds half of an adapter's pair for {min(lone)}")
    if not halves:
        raise UserError(f"{setting}: {path} holds no low-rank adapter: keys ending in lora_A.weight and lora_B.weight")
    told = _alphas(path, metadata, beside, halves, setting)
    pairs = {layer: Pair(*pair, alphas.get(layer, told[layer])) for layer, pair in halves.items()}
    for layer, pair in pairs.items():
        if not math.isfinite(pair.alpha) or not_finite({"A": pair.down, "B": pair.up}):
            raise UserError(f"{setting}: {path} is no trained adapter: its {layer} is not finite")
    outside, about = {}, {}
    for each in beside:
        if each.name == OUTSIDE:
            outside = _load(each, setting)[0]
            if name := not_finite(outside):
                raise UserError(f"{setting}: {each} is no part of a trained adapter: {name} is not finite")
        if each.name == ABOUT:
            about = folders.read_json(each)
            if about.get("format") != FORMAT:
                raise UserError(f"{setting}: {each} has format {about.get('format')!r}, this version reads {FORMAT!r}")
    return Adapter(pairs, outside, about)


def digest(adapter: Adapter, expert: str | None = None) -> str:
    """Short hash of an adapter's pairs, equal in whatever keys they lie. expert: which of two networks they adapt."""
    out = hashlib.sha256((expert or "").encode())
    for name, pair in sorted(adapter.pairs.items()):
        out.update(f"{name} {list(pair.down.shape)} {list(pair.up.shape)}".encode())
        for tensor in (pair.down, pair.up, torch.tensor(pair.alpha)):  # alpha in float32, as ComfyUI's file has it
            out.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return out.hexdigest()[:16]


def merged_in(provenance: object) -> set[str]:
    """Digests of the adapters in a saved network's weights, its bases' too, of which single files replaced none.
    provenance: of its `entprog.json`."""
    out = set()
    while isinstance(provenance, Mapping):
        if DIGEST in provenance:
            out.add(str(provenance[DIGEST]))
        provenance = None if provenance.get("weights") else provenance.get("of_base")
    return out


def _load(path: Path, setting: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        answered(path, error)
        raise UserError(f"{setting}: cannot read {path}: {one_line(error)}") from None


def _alphas(
    path: Path, metadata: Mapping[str, str], beside: Iterable[Path], halves: Mapping[str, Any], setting: str
) -> dict[str, float]:
    """Alpha of every layer as the file's metadata or peft's configuration has it; the rank where neither says."""
    config: dict[str, Any] = {}
    try:
        for each in beside:
            if each.name == PEFT_CONFIG and path.name == PEFT:
                config = folders.read_json(each)
        for key, value in from_json(metadata.get(METADATA, "{}")).items():
            config[next((key.removeprefix(prefix) for prefix in PREFIXES if key.startswith(prefix)), key)] = value
        patterns = {_compiled(key): value for key, value in (config.get("alpha_pattern") or {}).items()}
        common, by_root = config.get("lora_alpha"), bool(config.get("use_rslora"))

        def alpha(layer: str, rank: int) -> float:
            if len(layer) > _LONGEST:
                raise ValueError(f"a layer's name has {len(layer)} characters")
            own = next((value for key, value in patterns.items() if key.fullmatch(layer)), common)
            value = float(rank if own is None else own)
            return value * math.sqrt(rank) if by_root else value  # rsLoRA's scale is alpha / √rank

        return {layer: alpha(layer, len(pair[0])) for layer, pair in halves.items()}
    except (ValueError, TypeError, AttributeError, ArithmeticError, RecursionError, re.error) as error:
        raise UserError(f"{setting}: {path} says its alpha in no known way: {one_line(error)}") from None


def _compiled(key: str) -> re.Pattern:
    """peft's `alpha_pattern`: an expression for ends of layers' names. Raises ValueError for one that could take for
    ever: a group that is repeated, or more than two repetitions."""
    if len(key) > _LONGEST or re.search(r"\)[*+{]", key) or len(re.findall(r"[*+{]", key)) > 2:
        raise ValueError(f"the expression {cut(key, 60)!r} is too intricate")
    return re.compile(rf"(?:.*\.)?(?:{key})")


def check(adapter: Adapter, network: nn.Module, setting: str) -> None:
    """Raises UserError unless every pair fits a linear layer, and every whole weight is there."""
    for name, pair in adapter.pairs.items():
        try:
            layer = network.get_submodule(name)
        except AttributeError:
            layer = None
        if not isinstance(layer, nn.Linear):
            raise UserError(
                f"{setting}: a {type(network).__name__} has no linear layer {name}, which the adapter adapts"
            )
        given = (pair.up.shape[0], pair.down.shape[1])
        if given != tuple(layer.weight.shape) or pair.up.shape[1] != pair.rank:
            raise UserError(
                f"{setting}: the adapter's {name} is for a weight of {list(given)}, this network's is "
                f"{list(layer.weight.shape)}: it is another base's"
            )
    there = {name for name, _ in network.named_parameters()}
    if unknown := set(adapter.outside) - there:
        raise UserError(f"{setting}: a {type(network).__name__} has no weight {min(unknown)}, which the adapter brings")


@torch.no_grad()
def merge(adapter: Adapter, network: nn.Module, setting: str) -> None:
    """Add an adapter to a network's weights, and put its whole weights in. Raises UserError where they do not fit."""
    check(adapter, network, setting)
    _put_outside(adapter, network, setting)
    for name, pair in adapter.pairs.items():
        weight = network.get_submodule(name).weight
        own = fsdp.held(weight)
        own += fsdp.part_of(pair.delta(), weight).to(own)


@torch.no_grad()
def go_on(adapter: Adapter, network: nn.Module, settings: Lora, setting: str) -> None:
    """Begin a network's own adapters (`lora.add`) where this one ended. Raises UserError where they do not fit."""
    check_goes_on(adapter, settings, setting)
    _put_outside(adapter, network, setting)
    parameters = dict(network.named_parameters())
    own = {name.partition(".lora_")[0] for name in parameters if ".lora_" in name}
    if own != set(adapter.pairs):
        other = min(own ^ set(adapter.pairs))
        raise UserError(f"{setting}: {other} is adapted by only one of the adapter and train.lora.targets")
    for name, pair in adapter.pairs.items():
        for kind, tensor in (("A", pair.down), ("B", pair.up)):
            parameter = parameters[f"{name}.lora_{kind}.default.weight"]
            fsdp.held(parameter).copy_(fsdp.part_of(tensor, parameter))


def check_goes_on(adapter: Adapter, settings: Lora, setting: str) -> None:
    """Raises UserError unless rank and alpha are those of the settings."""
    for name, pair in adapter.pairs.items():
        if (pair.rank, pair.alpha) != (settings.rank, settings.alpha):
            raise UserError(
                f"{setting}: its {name} has rank {pair.rank} and alpha {pair.alpha:g}, train.lora rank {settings.rank} "
                f"and alpha {settings.alpha:g}: set train.lora to the adapter's, or train.lora=null to merge it first"
            )


def plain_name(name: str) -> str:
    """A parameter's name in a network without adapters; peft keeps the layer that it adapts as its `base_layer`."""
    return name.replace(".base_layer.", ".")


def _put_outside(adapter: Adapter, network: nn.Module, setting: str) -> None:
    parameters = {plain_name(name): parameter for name, parameter in network.named_parameters()}
    for name, tensor in adapter.outside.items():
        if name not in parameters or parameters[name].shape != tensor.shape:
            there = list(parameters[name].shape) if name in parameters else "not there"
            raise UserError(
                f"{setting}: the adapter's {name} has shape {list(tensor.shape)}, the network's is {there}: set "
                "model.conditions to those that it was trained with"
            )
        fsdp.held(parameters[name]).copy_(fsdp.part_of(tensor, parameters[name]))


@torch.no_grad()
def extract(
    before: nn.Module, after: nn.Module, found: Iterable[Block], rank: int, about: Mapping[str, Any]
) -> tuple[Adapter, float]:
    """(what `after` adds to `before` as an adapter of a rank, the share of the adapted change that it lacks, 0..1).

    found: blocks of `after`, whose linear layers are adapted by the best approximation of the change (its largest
    singular values). Whatever else changed is kept whole.
    """
    old, linear = dict(before.named_parameters()), set()
    for block in found:
        linear |= {f"{block.name}.{n}.weight" for n, m in block.module.named_modules() if isinstance(m, nn.Linear)}
    pairs, outside, lost, whole = {}, {}, 0.0, 0.0
    for name, weight in after.named_parameters():
        if name in old and old[name].shape == weight.shape and torch.equal(old[name], weight):
            continue
        if name not in linear or name not in old or old[name].shape != weight.shape:
            outside[name] = weight
            continue
        delta = weight.double() - old[name].double()
        u, s, v = torch.linalg.svd(delta, full_matrices=False)
        kept = min(rank, len(s))
        root = s[:kept].sqrt()
        pairs[name.removesuffix(".weight")] = Pair(
            (root[:, None] * v[:kept]).float(), (u[:, :kept] * root).float(), float(kept)
        )
        lost, whole = lost + s[kept:].square().sum().item(), whole + s.square().sum().item()
    return Adapter(pairs, outside, about), (lost / whole) ** 0.5 if whole else 0.0
