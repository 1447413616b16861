"""Folders of networks in diffusers' format, ours (`entprog.json` beside) and others': found, checked, read, written.

Weights are read from safetensors alone: nothing is ever unpickled.
"""

import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.utils import logging
from pydantic import Field
from safetensors import SafetensorError, safe_open

from entprog import config
from entprog.errors import UserError
from entprog.masking import one_line

FORMAT = "entprog-model-1"
INDEX = "model_index.json"
PROMPT = "prompt_embeds.safetensors"
NETWORKS = ("transformer", "unet")
"""A pipeline's folders that may hold its network."""


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
    provenance: dict[str, Any]


def locate(name: str, setting: str) -> Path:
    """The folder of a checkpoint, given or fetched from the hub (safetensors and JSON only).

    For a train job's output that is `model/` in it, for a network's folder in a checkpoint the checkpoint itself.
    Raises UserError, naming `setting`, if there is none.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        above = folder.resolve().parent
        if folder.resolve().name in NETWORKS and any((above / f).is_file() for f in ("entprog.json", INDEX)):
            return above
        inside = folder / "model"
        networks = any(part(folder, name) for name in NETWORKS)
        return inside if (inside / "entprog.json").is_file() and not networks else folder
    # `out/base` looks like a hub name too: where `out` is a folder here, a local one was meant.
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) or folder.parent.is_dir() or folder.exists():
        raise UserError(f"{setting}: no such folder: {name}")
    from huggingface_hub import snapshot_download

    parts = ("diffusion_pytorch_model", *(f"{name}/" for name in NETWORKS), "vae/", "scheduler/")
    files = [f"{p}*{ending}" for p in parts for ending in (".safetensors", ".json")]
    try:
        return Path(snapshot_download(name, allow_patterns=[*files, "config.json", "entprog.json", INDEX, PROMPT]))
    except (OSError, ValueError) as error:
        reason = one_line(str(error).strip().partition("\n")[0], most=160)
        raise UserError(f"{setting}: {name} is neither a folder here nor could it be fetched: {reason}") from None


def part(root: Path, name: str) -> Path | None:
    """A pipeline's part (`transformer`, `unet`, `vae`), or the folder itself where it is one; None if neither is."""
    return next((folder for folder in (root / name, root) if (folder / "config.json").is_file()), None)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError if it is not one."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged: it does not hold a JSON object")
    return values


def saved(folder: str | Path) -> dict[str, Any]:
    """A saved checkpoint's `entprog.json`; {} for a foreign one. Raises UserError if it is damaged."""
    path = Path(folder) / "entprog.json"
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


def check_weights(folder: Path, setting: str) -> None:
    """Raises UserError if the folder's weights are missing or no safetensors; reads only headers."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{setting}: {folder} has no weights (*.safetensors; other formats are not read)")
    for path in files:
        try:
            with safe_open(path, "pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise UserError(f"{setting}: cannot read {path}: {' '.join(str(error).split())}") from None


def pretrained(cls: type, folder: Path, setting: str):
    """A diffusers model of a folder, in float32. Raises UserError unless every weight is there and fits."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # what it would say of the weights is an error here
    try:
        model, info = cls.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, torch_dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, SafetensorError) as error:
        reason = one_line(_first_cause(error))
        raise UserError(f"{setting}: cannot load {cls.__name__} from {folder}: {reason}") from None
    finally:
        logging.set_verbosity(verbosity)
    for keys, problem in (("missing_keys", "are missing from"), ("unexpected_keys", "have no place in")):
        if wrong := info[keys]:
            raise UserError(
                f"{setting}: {len(wrong)} weights {problem} the {cls.__name__} in {folder}, e.g. {min(wrong)}"
            )
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
