"""Folders of networks in diffusers' format, ours (`entprog.json` beside) and others': found, checked, read, written.

Weights are read from safetensors. Others run pickle's own little programs: they are read only where a person trusts
them (`model.trust_pickle`), and even then nothing but tensors comes out of them (torch's `weights_only`).
"""

import io
import json
import logging as python_logging
import pickle
import re
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.utils import logging
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import nn

from entprog import config
from entprog.errors import UserError
from entprog.masking import bare, one_line
from entprog.media import assets
from entprog.storage import Where, address, at, fetched, quickly

FORMAT = "entprog-model-1"
ABOUT = "entprog.json"
INDEX = "model_index.json"
CARD = "README.md"
PROMPT = "prompt_embeds.safetensors"
NETWORKS = ("transformer", "unet")
"""A pipeline's folders that may hold its network."""
SECOND = "transformer_2"
"""Folder of a pipeline's second network (`entprog.models.experts`)."""
BESIDE = ("vae/", "scheduler/")
"""A pipeline's other folders that every family reads."""
STEM = "diffusion_pytorch_model"
"""How diffusers begins the names of files of weights."""
RECORDS = ("mlflow_run.json", "result.json")
"""Of the job whose output holds a checkpoint: they are fetched with it."""
PARTS = (STEM, *(f"{name}/" for name in (*NETWORKS, SECOND)), *BESIDE)
"""How the names of files begin that are fetched of a base on the hub."""
OLDER = re.compile(r"\.(query|key|value|proj_attn)\.(weight|bias)$")
"""How older names of weights end, which diffusers changes as it reads them."""
VARIANTS = ("", "fp32", "bf16", "fp16")
"""Variants of the same weights, the most exact first; others come after them."""


class Elsewhere(config.Part):
    """A part of a pipeline that does not lie in its folder."""

    name: str
    """Hub name, or a folder of the machine that trained."""
    revision: str | None
    """Commit on the hub; None: a folder."""
    subfolder: str
    library: str
    kind: str
    """Its class in that library."""


class Inputs(config.Part):
    """What one of two networks sees."""

    conditions: tuple[Literal["reference", "pose"], ...]
    input_channels: tuple[int, ...]


class Record(config.Part):
    """What `entprog.json` holds."""

    format: str
    family: str
    conditions: tuple[Literal["reference", "pose"], ...]
    """Conditions that the network sees, in the order of its input channels."""
    latent_channels: int
    input_channels: tuple[int, ...]
    """Input channels of the input layer, in the groups that are summed apart."""
    vae: bool
    shape: config.ClipShape | None
    """Clips it was trained on."""
    shift: float = Field(gt=0)
    """Timestep shift for sampling."""
    skeleton: config.Skeleton = "limbs"
    """How poses are drawn for it."""
    points: Literal[33, 133] = 33
    """Points of the poses that it was trained on."""
    last_frame: bool = False
    """Whether it sees the clip's last frame beside its first one."""
    native: bool = False
    """Whether it sees all that its base's pipeline shows it, where an earlier version left something out."""
    provenance: dict[str, Any]
    elsewhere: dict[str, Elsewhere] = Field(default_factory=dict)
    """Parts of the pipeline that are not in this folder, by name."""
    expert: Literal["high", "low"] | None = None
    """Which of two networks was trained last; what stands above is of that one."""
    experts: dict[Literal["high", "low"], Inputs] = Field(default_factory=dict)
    """Inputs of both."""


def locate(
    name: str,
    setting: str,
    trust_pickle: bool = False,
    revision: str | None = None,
    parts: Sequence[str] = PARTS,
) -> Path:
    """The folder of a checkpoint, given or fetched from the hub or a bucket (safetensors and JSON; `.bin` only where
    trusted).

    revision, parts: of what is fetched: a commit, and the beginnings of the files' names.

    For a train job's output that is `model/` in it, for a network's folder in a checkpoint the checkpoint itself.
    Raises UserError, naming `setting`, if there is none.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _meant(folder)
    if folder.is_file():
        raise UserError(
            f"{setting}: {name} is a file, wanted is a folder in diffusers' format: give a single file of a network's "
            "weights as model.weights, beside the base that it belongs to; of others make a folder with their class's "
            "from_single_file(FILE).save_pretrained(FOLDER)"
        )
    endings = (".safetensors", ".json", *[".bin"] * trust_pickle)
    patterns = [f"{p}*{ending}" for p in parts for ending in endings]
    patterns += [*(f"{name}/config.json" for name in (*NETWORKS, SECOND)), "config.json", ABOUT, INDEX, PROMPT, CARD]
    return _fetched(name, setting, patterns, revision)


def _meant(folder: Where) -> Where:
    """The checkpoint that a folder is, belongs to, or holds as a train job's output."""
    above = folder.resolve().parent
    if folder.resolve().name in NETWORKS and any((above / f).is_file() for f in (ABOUT, INDEX)):
        return above
    inside = folder / "model"
    networks = any(part(folder, name) for name in NETWORKS)
    return inside if (inside / ABOUT).is_file() and not networks else folder


def hub_errors() -> tuple[type[BaseException], ...]:
    """What the hub's client raises where the hub refuses or does not answer. The errors of the HTTP library beneath it
    are OSErrors in some of its versions, in others they are not."""
    from huggingface_hub import errors

    return OSError, ValueError, getattr(errors, "HTTPError", OSError)


def _fetched(name: str, setting: str, patterns: list[str], revision: str | None = None) -> Path:
    """The folder of a hub name, or of an address in a bucket, the files of it that the patterns name. Raises UserError,
    naming `setting`."""
    if "://" in name:
        return _of_bucket(name, setting, patterns)
    folder = Path(name).expanduser()
    # `out/base` looks like a hub name too: where `out` is a folder here, a local one was meant.
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) or folder.parent.is_dir() or folder.exists():
        raise UserError(f"{setting}: no such folder: {name}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except hub_errors() as error:
        reason = one_line(str(error).strip().partition("\n")[0], most=160)
        raise UserError(f"{setting}: {name} is neither a folder here nor could it be fetched: {reason}") from None


def _of_bucket(name: str, setting: str, patterns: list[str]) -> Path:
    """A copy of a folder in a bucket, kept in the cache as it lies there: `model` in a folder with the records of the
    job that left it. What has not changed since is not fetched again. Raises UserError, naming `setting`."""
    try:
        if not at(quickly(name), setting).exists():
            raise FileNotFoundError
        folder = _meant(at(name, setting))
        kept = assets.cache_folder() / "fetched" / config.digest(address(folder.parent))
        fetched(folder, patterns, kept / folder.name)
        for record in RECORDS if folder.name == "model" else ():
            with suppress(FileNotFoundError):
                (folder.parent / record).get(kept / record)
        return kept / folder.name
    except FileNotFoundError:
        raise UserError(f"{setting}: no such folder: {bare(name)}") from None
    except OSError as error:
        raise UserError(f"{setting}: {bare(name)} could not be fetched: {one_line(error, name)}") from None


def located_text(name: str, setting: str, parts: Sequence[str], revision: str | None = None) -> Path:
    """The folder that holds a pipeline's text encoders and tokenizers, given or fetched from the hub (safetensors, JSON
    and the tokenizers' own files), of a commit if one is named. parts: their folders' names. Raises UserError, naming
    `setting`, if there is none."""
    if Path(name).expanduser().exists():
        return locate(name, setting)
    wanted = [f"{part}/*" for part in parts if part.startswith("tokenizer")]
    wanted += [f"{part}/*.{end}" for part in parts if part.startswith("text") for end in ("safetensors", "json")]
    return _fetched(name, setting, wanted, revision)


def missing_text(root: Path, parts: Sequence[str]) -> str:
    """Which of those folders are not there, in words; empty where all are."""
    there = [(root / part / "config.json").is_file() or part.startswith("tokenizer") for part in parts]
    lost = [f"{part}/" for part, sound in zip(parts, there, strict=True) if not sound or not (root / part).is_dir()]
    return " and ".join(lost)


def part(root: Where, name: str) -> Where | None:
    """A pipeline's part (`transformer`, `unet`, `vae`), or the folder itself where it is one; None if neither is."""
    return next((folder for folder in (root / name, root) if (folder / "config.json").is_file()), None)


def read_json(path: Where) -> dict[str, Any]:
    """A JSON object. Raises UserError if it is not one."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged: it does not hold a JSON object")
    return values


def saved(folder: str | Where) -> dict[str, Any]:
    """A saved checkpoint's `entprog.json`; {} for a foreign one. Raises UserError if it is damaged."""
    path = at(folder, "the checkpoint") / ABOUT
    if not path.is_file():
        return {}
    about = read_json(path)
    if about.get("format") != FORMAT:
        raise UserError(f"{path} has format {about.get('format')!r}, this version reads {FORMAT!r}")
    try:
        config.build(about, Record)
    except UserError as error:
        raise UserError(f"{path} is damaged: {error}") from None
    return about


@dataclass(frozen=True)
class Weights:
    """The files that diffusers reads a network's weights from."""

    files: tuple[Path, ...]
    """All of them, the index of several before those that it names."""
    variant: str | None
    safetensors: bool
    """Whether diffusers is to look for safetensors, or for `.bin`."""


def weights(folder: Path, setting: str, trust_pickle: bool = False) -> Weights:
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
        _check_file(file, setting, trust_pickle)
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


def _check_file(path: Path, setting: str, trust_pickle: bool) -> None:
    """Raises UserError for a file of weights that is damaged, or no safetensors and not trusted."""
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
    wanted, ignored = network.state_dict(), getattr(network, "_keys_to_ignore_on_load_unexpected", None) or ()
    unexpected = [name for name in shapes.keys() - wanted if not any(re.search(each, name) for each in ignored)]
    _check_names(type(network), found.files[0].parent, setting, wanted.keys() - shapes, unexpected)
    for name, tensor in wanted.items():
        if shapes[name] != list(tensor.shape):
            raise UserError(
                f"{setting}: {name} in {found.files[0].parent} has shape {shapes[name]}, by its config.json it should "
                f"have {list(tensor.shape)}: copy or fetch config.json and weights again, from one place"
            )


def _check_names(cls: type, folder: Path, setting: str, missing: Collection[str], unexpected: Collection[str]) -> None:
    for wrong, problem in ((missing, "are missing from"), (unexpected, "have no place in")):
        if wrong:
            raise UserError(
                f"{setting}: {len(wrong)} weights {problem} the {cls.__name__} in {folder}, e.g. {min(wrong)}"
            )


def pretrained(cls: type, folder: Path, setting: str, trust_pickle: bool = False):
    """A diffusers model of a folder, in float32. Raises UserError unless every weight is there and fits."""
    found = weights(folder, setting, trust_pickle)
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # what it would say of the weights is an error here
    try:
        model, info = cls.from_pretrained(
            folder,
            use_safetensors=found.safetensors,
            variant=found.variant,
            local_files_only=True,
            torch_dtype=torch.float32,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, SafetensorError) as error:
        said, _, _ = str(_first_cause(error)).partition(" If you want to instead")  # what one who programs might pass
        reason = one_line(said or _first_cause(error))
        raise UserError(f"{setting}: cannot load {cls.__name__} from {folder}: {reason}") from None
    finally:
        logging.set_verbosity(verbosity)
    _check_names(cls, folder, setting, info["missing_keys"], info["unexpected_keys"])
    return model


def part_of_network(folder: Path, part: str, setting: str) -> dict[str, torch.Tensor]:
    """Weights of one part of a network, float32, by their names in that part; the others' are not read. Raises
    UserError for weights that are no safetensors, or where none are of that part."""
    found, out = weights(folder, setting), {}
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
    path = Path(given).expanduser()
    if not hasattr(cls, "from_single_file"):
        raise UserError(f"{setting}: diffusers reads no single file of a {cls.__name__}: give a folder as model.base")
    if not path.is_file():
        raise UserError(f"{setting}: no such file: {given}")
    if path.suffix != ".safetensors":
        raise UserError(f"{setting}: {path} is no safetensors: others are pickles or programs; convert it first")
    _check_file(path, setting, trust_pickle=False)
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


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A scratch folder that becomes `folder` on leaving, replacing what was there: whole, or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as around:
        scratch = Path(around, "new")
        scratch.mkdir()  # with the permissions that a person's folders have
        yield scratch
        if folder.exists():
            folder.rename(Path(around, "old"))
        scratch.rename(folder)
