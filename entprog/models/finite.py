"""Whether weights are numbers: what holds one that is not finite is no model."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from entprog.distributed import fsdp
from entprog.errors import UserError
from entprog.masking import one_line


def not_finite(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """Name of a tensor that holds NaN or an infinity, in this rank's part of it; None if there is none."""
    for name, tensor in tensors.items():
        mine = fsdp.held(tensor)
        if mine.is_floating_point() and not bool(mine.isfinite().all()):
            return name
    return None


def not_finite_in(folder: Path) -> str | None:
    """The same of the safetensors files in a folder, a tensor at a time. Raises SafetensorError or OSError."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  (no mapping)
                if not_finite({name: file.get_tensor(name)}):
                    return name
    return None


def check(folder: Path, setting: str) -> None:
    """Raises UserError, naming `setting`, where those files cannot be read, or hold what is not finite."""
    try:
        name = not_finite_in(folder)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{setting}: cannot read {folder}: {one_line(error)}") from None
    if name:
        raise UserError(f"{setting}: {folder} is no trained network: {name} is not finite; train it again")
