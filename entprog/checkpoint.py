"""Checkpoints: a folder with everything a resume needs, written whole or not at all, never pickled from outside.

step-00000040/
  network.safetensors   every weight and buffer
  optimizer.pt          optimizer state (read with weights_only=True)
  ema.safetensors       averaged weights
  state.json            RunState, and the hash of the experiment it belongs to
"""

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from entprog.errors import UserError
from entprog.state import RunState

STATE = "state.json"


def save(folder: Path, network: nn.Module, state: RunState, experiment_hash: str, keep: int) -> Path:
    """Write `folder/step-N` from a scratch folder by one rename; remove all but the newest `keep`."""
    target = folder / f"step-{state.step:08d}"
    scratch = folder / f".{target.name}.partial"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    save_file({k: v.contiguous() for k, v in network.state_dict().items()}, scratch / "network.safetensors")
    torch.save(state.optimizer.state_dict(), scratch / "optimizer.pt")
    save_file({k: v.contiguous() for k, v in state.ema.items()}, scratch / "ema.safetensors")
    (scratch / STATE).write_text(json.dumps({"experiment": experiment_hash, **state.as_json()}))
    for file in scratch.iterdir():  # a rename must not be on disk before what it names
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    shutil.rmtree(target, ignore_errors=True)
    scratch.rename(target)
    for old in found(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def found(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / STATE).exists())


def newest(folder: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    return (found(folder) or [None])[-1]


def load(path: Path, network: nn.Module, state: RunState, experiment_hash: str) -> None:
    """Put a checkpoint into the network and the state, on the network's device.

    Raises UserError if it belongs to another experiment or is damaged.
    """
    device = next(network.parameters()).device
    try:
        values = json.loads((path / STATE).read_text())
        weights = load_file(path / "network.safetensors", device=str(device))
        moments = torch.load(path / "optimizer.pt", map_location=device, weights_only=True)
        ema = load_file(path / "ema.safetensors", device=str(device))
    except (OSError, ValueError, SafetensorError, RuntimeError) as error:
        raise UserError(f"checkpoint {path} is damaged ({type(error).__name__}): delete it to resume earlier") from None
    if values.pop("experiment") != experiment_hash:
        raise UserError(
            f"checkpoint {path} belongs to other settings or other data: choose another --output, or delete it"
        )
    network.load_state_dict(weights)
    state.optimizer.load_state_dict(moments)
    state.ema = ema
    state.update(values)
