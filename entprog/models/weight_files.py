"""A network's weights in a diffusers folder or a single file: found, checked by their headers, read.

Weights are read from safetensors. Others run pickle's own little programs: they are read only where a person trusts
them (`model.trust_pickle`), and even then nothing but tensors comes out of them (torch's `weights_only`).
"""

import io
import logging as python_logging
import pickle
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.utils import logging
from safetensors import SafetensorError, safe_open
from torch import nn

from entprog.errors import UserError
from entprog.masking import one_line
from entprog.models.folders import STEM, located_files, read_json
from entprog.models.quiet import quiet
from entprog.storage import answered

OLDER = re.compile(r"\.(query|key|value|proj_attn)\.(weight|bias)$")
"""How older names of weights end, which diffusers changes as it reads them."""
UNFIT = (TypeError, ValueError, RuntimeError, ArithmeticError, LookupError, AssertionError, AttributeError)
"""What diffusers raises for a configuration that is none of the class's, by the entry that is wrong."""
VARIANTS = ("", "fp32", "bf16", "fp16")
"""Variants of the same weights, the most exact first; others come after them."""


@dataclass(frozen=True)
class Weights:
    """The files that diffusers reads a network's weights from."""

    files: tuple[Path, ...]
    """All of them, the index of several before those that it names."""
    variant: str | None
    safetensors: bool
    """Whether diffusers is to look for safetensors, or for `.bin`."""


def of(folder: Path, setting: str, trust_pickle: bool = False) -> Weights:
    """What a network's weights are read from, looked at as far as can be without reading them.

    The full weights if there are any, otherwise a variant (`….fp16.safetensors`); an index before a single file, as in
    diffusers. Raises UserError, naming `setting`, for weights that are missing, damaged, or no safetensors and not
    trusted.
    """
    names = {path.name for path in folder.iterdir()}
    for ending in ("safetensors", "bin"):
        single = re.compile(rf"{STEM}(?:\.(\w+))?\.{ending}")
        several = re.compile(rf"{STEM}\.{ending}\.index(?:\.(\w+))?\.json")
        there = {found[1] or "": name for name in sorted(names) if (found := single.fullmatch(name))}
        there |= {found[1] or "": name for name in sorted(names) if (found := several.fullmatch(name))}
        if there:
            break
    else:
        raise UserError(
            f"{setting}: {folder} has no weights that diffusers reads ({STEM}.safetensors, a variant of it, or an "
            "index of several)"
        )
    best = next((variant for variant in VARIANTS if variant in there), min(there))
    path = folder / there[best]
    index = (path,) if path.suffix == ".json" else ()
    files = _named(path, setting) if index else [path]
    for file in files:
        check_file(file, setting, trust_pickle)
    return Weights((*index, *files), best or None, ending == "safetensors")


def _named(index: Path, setting: str) -> list[Path]:
    """The files that an index names, each in its own folder. Raises UserError for one that is not there."""
    values = read_json(index)
    names = values.get("weight_map")
    if not isinstance(values.get("metadata"), dict) or not isinstance(names, dict) or not names:
        raise UserError(f"{setting}: {index} is damaged: an index has metadata, and a weight_map of weights to files")
    files = sorted({str(name) for name in names.values()})
    for name in files:
        if Path(name).name != name:
            raise UserError(f"{setting}: {index} names {name!r}: weights lie beside their index")
        if not (index.parent / name).is_file():
            raise UserError(f"{setting}: {index.parent} lacks {name}, which {index.name} names: copy or fetch it again")
    return [index.parent / name for name in files]


def check_file(path: Path, setting: str, trust_pickle: bool = False) -> None:
    """Raises UserError for a file of weights that is damaged, or no safetensors and not trusted, UnreachableError where
    a disk does not answer."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt"):
                return
        if path.suffix != ".bin":
            raise UserError(f"{setting}: {path} is no file of weights: known are .safetensors and .bin")
        if not trust_pickle:
            raise UserError(
                f"{setting}: {path} is a pickle, which may run what its maker wanted: convert it to safetensors, or "
                "set model.trust_pickle=yes if you trust where it came from"
            )
        torch.load(path, map_location="meta", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        if isinstance(error, UserError):
            raise
        answered(path, error)
        raise UserError(f"{setting}: cannot read {path}: {one_line(error)}") from None


def check_fits(network: nn.Module, found: Weights, setting: str) -> None:
    """Raises UserError unless a network's weights are in its files, in its shapes, and no others; of safetensors, whose
    headers alone are read. network: on the meta device. What has older names, diffusers renames (`pretrained`)."""
    shapes: dict[str, list[int]] = {}
    for path in found.files:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                shapes |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - no mapping
    if not shapes or any(OLDER.search(name) for name in shapes):
        return
    wanted = network.state_dict()
    _check_names(type(network), found.files[0].parent, setting, wanted.keys() - shapes, unexpected(network, shapes))
    for name, tensor in wanted.items():
        if shapes[name] != list(tensor.shape):
            raise UserError(
                f"{setting}: {name} in {found.files[0].parent} has shape {shapes[name]}, by its config.json it should "
                f"have {list(tensor.shape)}: copy or fetch config.json and weights again, from one place"
            )


def unexpected(network: nn.Module, names: Iterable[str]) -> set[str]:
    """Which names of weights have no place in a network; without those that diffusers passes over, as of weights that
    published files hold and nothing uses."""
    ignored = getattr(network, "_keys_to_ignore_on_load_unexpected", None) or ()
    others = set(names) - network.state_dict().keys()
    return {name for name in others if not any(re.search(each, name) for each in ignored)}


def _check_names(cls: type, folder: Path, setting: str, missing: Collection[str], unexpected: Collection[str]) -> None:
    for wrong, problem in ((missing, "are missing from"), (unexpected, "have no place in")):
        if wrong:
            raise UserError(
                f"{setting}: {len(wrong)} weights {problem} the {cls.__name__} in {folder}, e.g. {min(wrong)}"
            )


def pretrained(cls: type, folder: Path, setting: str, trust_pickle: bool = False):
    """A diffusers model of a folder, in float32. Raises UserError unless every weight is there and fits."""
    found = of(folder, setting, trust_pickle)
    try:
        with quiet(logging):  # what it would say of the weights is an error here
            model, info = cls.from_pretrained(
                folder,
                use_safetensors=found.safetensors,
                variant=found.variant,
                local_files_only=True,
                torch_dtype=torch.float32,
                output_loading_info=True,
            )
    except (OSError, SafetensorError, *UNFIT) as error:
        cause = _first_cause(error)
        answered(found.files[-1], cause)
        said, _, _ = str(cause).partition(" If you want to instead")  # what one who programs might pass
        reason = one_line(said or cause)
        raise UserError(f"{setting}: cannot load {cls.__name__} from {folder}: {reason}") from None
    _check_names(cls, folder, setting, info["missing_keys"], info["unexpected_keys"])
    return model


def part_of_network(folder: Path, part: str, setting: str) -> dict[str, torch.Tensor]:
    """Weights of one part of a network, float32, by their names in that part; the others' are not read. Raises
    UserError for weights that are no safetensors, or where none are of that part."""
    found, out = of(folder, setting), {}
    for path in found.files:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                names = [name for name in file.keys() if name.startswith(f"{part}.")]  # noqa: SIM118 - no mapping
                out |= {name.removeprefix(f"{part}."): file.get_tensor(name).float() for name in names}
    if not out:
        raise UserError(f"{setting}: {folder} has no weights of {part} in safetensors: it is no whole network")
    return out


def check_single_file(cls: type, given: str, setting: str) -> Path:
    """The file of a network's weights in its original format. Raises UserError for one that diffusers cannot read."""
    if not hasattr(cls, "from_single_file"):
        raise UserError(f"{setting}: diffusers reads no single file of a {cls.__name__}: give a folder as model.base")
    path = located_files(given, setting, ())
    if not path.is_file():
        raise UserError(f"{setting}: no such file: {given}")
    if path.suffix != ".safetensors":
        raise UserError(f"{setting}: {path} is no safetensors: others are pickles or programs; convert it first")
    check_file(path, setting, trust_pickle=False)
    return path


def from_single_file(cls: type, path: Path, configuration: Path, setting: str):
    """A diffusers model of a file in its original format, in float32. Raises UserError unless every weight fits.

    configuration: the folder with the model's config.json.
    """
    said = io.StringIO()
    handler, logger = (
        python_logging.StreamHandler(said),
        python_logging.getLogger("diffusers.loaders.single_file_model"),
    )
    logger.addHandler(handler)
    try:
        model = cls.from_single_file(
            str(path), config=str(configuration), local_files_only=True, torch_dtype=torch.float32
        )
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, SafetensorError) as error:
        cause = _first_cause(error)
        answered(path, cause)
        if "meta tensor" in str(cause):  # what no weight was found for
            raise UserError(
                f"{setting}: {path} lacks weights that the {cls.__name__} of model.base has: it is another base's, or "
                "a part of a network"
            ) from None
        raise UserError(f"{setting}: cannot load {cls.__name__} from {path}: {one_line(cause)}") from None
    finally:
        logger.removeHandler(handler)
    if "were not used" in said.getvalue():
        raise UserError(f"{setting}: {path} holds weights that have no place in the {cls.__name__} of model.base")
    return model


def _first_cause(error: BaseException) -> BaseException:
    """diffusers wraps what went wrong in up to three errors that say less."""
    while error.__context__ is not None:
        error = error.__context__
    return error
