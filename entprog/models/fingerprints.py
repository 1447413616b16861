"""Short hashes of what a run starts from and is judged on: equal for equal content, wherever it lies."""

import contextlib
import json
import platform
from pathlib import Path
from typing import Any

import torch

from entprog import files
from entprog.config import Experiment, Model, digest
from entprog.data.shards import Dataset
from entprog.errors import UserError
from entprog.media import assets
from entprog.models import folders

UNREAD = ("text_encoder", "tokenizer")
"""Beginnings of a pipeline's parts that are never loaded: they may be larger than all else."""
ORIGIN = ("provenance", "_name_or_path")
"""What a configuration says of where it came from."""


def base(model: Model) -> str:
    """Hash of the weights and configurations that a run starts from; `new-…` for a network from `model.init`.

    Raises UserError for a folder that is missing.
    """
    parts: dict[str, Any] = {}
    if model.base:
        parts["base"] = folder(folders.locate(model.base, "model.base"))
    else:
        parts["init"] = model.init
    if model.vae not in ("auto", "none"):
        parts["vae"] = folder(folders.locate(model.vae, "model.vae"))
    if model.prompt_embeds:
        parts["prompt"] = file(Path(model.prompt_embeds).expanduser())
    return digest(parts) if model.base else f"new-{digest(parts)}"


def held_out(experiment: Experiment, dataset: Dataset) -> str:
    """Hash of what the held-out loss is measured on: two runs' losses may be compared only where it is equal."""
    data = experiment.data
    clips = min(data.held_out_clips, dataset.clips("held_out"))
    return digest(
        [shard.sha256 for shard in dataset.splits["held_out"]],
        clips,
        data.held_out_draws,
        data.held_out_seed,
        str(data.shape),
    )


def folder(root: Path) -> str:
    """Hash of a checkpoint's safetensors and JSON files; not of where it lies, nor of where it came from."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if name.startswith((*UNREAD, ".")):
            continue
        if path.suffix == ".safetensors":
            found[name] = file(path)
        elif path.suffix == ".json":
            found[name] = {k: v for k, v in folders.read_json(path).items() if k not in ORIGIN}
    return digest(found)


def file(path: Path) -> str:
    """sha256 of a file, remembered by its size and time of change: large weights are read once."""
    try:
        about = path.stat()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    now = {"path": str(path.resolve()), "bytes": about.st_size, "changed_ns": about.st_mtime_ns}
    memory = assets.cache_folder() / "hashes" / f"{digest(now['path'])}.json"
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(memory.read_text())
        if {name: known.get(name) for name in now} == now:
            return known["sha256"]
    found = files.sha256(path)
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time alone
        files.write_json(memory, {**now, "sha256": found})
    return found


def device_name(device: torch.device) -> str:
    """The GPU's or the CPU's own name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
