"""Short hashes of what a run starts from and is judged on: equal for equal content, wherever it lies."""

import contextlib
import json
import platform
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from entprog import files, models
from entprog.config import Experiment, Model, Timesteps, digest
from entprog.diffusion.objectives import ALL
from entprog.errors import UserError
from entprog.media import assets
from entprog.models import folders, weight_files, whole
from entprog.models.denoising import GIVEN_FRAME

if TYPE_CHECKING:
    from entprog.data.shards import Dataset  # pyarrow with it, which networks alone do not need

ORIGIN = ("provenance", "_name_or_path")
"""What a configuration says of where it came from."""


def base(model: Model) -> str:
    """Hash of the weights and configurations that a run starts from, of exactly the files that are read, not of where
    they lie; `new-…` for a network from `model.init`.

    Raises UserError for a folder or weights that are missing.
    """
    found = models.family(model.family).files(model)
    parts = {name: _json(path) if path.suffix == ".json" else file(path) for name, path in found.items()}
    if folders.INDEX in found:
        parts[folders.INDEX] = whole.deciding(found[folders.INDEX].parent)
    if folders.PROMPT in found and models.family(model.family).inspect(model, weights=False).filled:
        parts["text"] = "filled up"
    return digest(parts) if model.base else f"new-{digest(model.init, parts)}"


def vae(model: Model) -> str | None:
    """Hash of the VAE whose latents a network works on: its weights' and its scaling's. None: pixels."""
    folder = models.family(model.family).inspect(model, weights=False).vae_folder
    if folder is None:
        return None
    found = (folder / "config.json", *weight_files.of(folder, "model.vae", model.trust_pickle).files)
    return digest({path.name: _json(path) if path.suffix == ".json" else file(path) for path in found})


def _json(path: Path) -> dict[str, Any]:
    """A configuration, without what it says of where it came from."""
    return {name: value for name, value in folders.read_json(path).items() if name not in ORIGIN}


def _text_encoder(settings: Model) -> str:
    from entprog.models import captions  # which needs this module

    return captions.source(settings).key


def held_out(experiment: Experiment, dataset: "Dataset") -> str:
    """Hash of what the held-out loss is measured on: two runs' losses may be compared only where it is equal."""
    data, law = experiment.data, experiment.timesteps
    source = models.family(experiment.model.family).inspect(experiment.model) if experiment.model.base else None
    between = ALL if source is None or source.expert is None else source.expert.time_range
    clips = min(data.held_out_clips, dataset.clips("held_out"))
    return digest(
        [shard.sha256 for shard in dataset.splits["held_out"]],
        clips,
        data.held_out_draws,
        data.held_out_seed,
        str(data.shape),
        *([data.text, _text_encoder(experiment.model)] if data.text != "fixed" else []),
        *([law.shift] if law.shift != 1 else []),  # losses at other timesteps
        *([asdict(law)] if replace(law, shift=1.0) != Timesteps() else []),
        *([between] if between != ALL else []),
        *([source.form] if source and source.form == GIVEN_FRAME else []),  # losses of fewer frames
        *(["last frame"] if source and source.last else []),
        *(["own first frame"] if source and source.first else []),
        *(["native"] if source and source.native else []),
        *([source.trained_with] if source and source.trained_with else []),
        *([experiment.model.vae_dtype] if experiment.model.vae_dtype != "float32" else []),
    )


def file(path: Path) -> str:
    """sha256 of a file, remembered while the file system says that it is the same one: large weights are read once.

    Of the times it is the inode's change that counts: a content can be replaced under a kept time of modification.
    """
    try:
        about = path.stat()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    now = {"path": str(path.resolve()), "inode": about.st_ino, "bytes": about.st_size, "changed_ns": about.st_ctime_ns}
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
    """The GPU's or the CPU's own name; of a CPU with the threads that torch has of it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = f", {torch.get_num_threads()} thread(s)"
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}{threads}"
    return f"{platform.processor() or platform.machine()}{threads}"
