"""A network's folder in diffusers' format, also of a network that nobody holds whole: rank 0 writes it, one tensor at a
time, of which every rank gives its part. Names, sizes and tensors of the files are those that diffusers would write."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import nn

from entprog.distributed import agree, fsdp
from entprog.models import folders
from entprog.storage import Place, slices, tensors

MAX_FILE_BYTES = 10_000_000_000
"""Of a file of weights, as diffusers has it."""


def save(network: nn.Module, folder: Path, max_file_bytes: int = MAX_FILE_BYTES) -> None:
    """Write a network's folder. Of a sharded one rank 0 does so, while the others `lend` their parts."""
    if not fsdp.is_sharded(network):
        network.save_pretrained(folder, max_shard_size=max_file_bytes)
        return
    folder.mkdir(parents=True, exist_ok=True)
    values = json.loads(network.to_json_string()) | {"_class_name": fsdp.plain_class(network).__name__}
    (folder / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    weights, place = network.state_dict(), Place.at(folder)
    files = _files(weights, max_file_bytes)
    for name, inside in files.items():
        about = [(each, slices.NAMES[weights[each].dtype], weights[each].shape) for each in inside]
        with place.create(name) as stream:
            stream.write(tensors.header_of(about, {"format": "pt"}))
            for tensor in _whole(weights, inside):
                stream.write(memoryview(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy()))
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(tensor.numel() * tensor.element_size() for tensor in weights.values())},
            "weight_map": {each: name for name, inside in files.items() for each in inside},
        }
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / f"{folders.STEM}.safetensors.index.json").write_text(text)


def lend(network: nn.Module, max_file_bytes: int = MAX_FILE_BYTES) -> None:
    """What the other ranks do while rank 0 saves a sharded network; nothing where it is whole."""
    if fsdp.is_sharded(network):
        weights = network.state_dict()
        for inside in _files(weights, max_file_bytes).values():
            for _ in _whole(weights, inside):
                pass


def _files(weights: dict[str, torch.Tensor], max_file_bytes: int) -> dict[str, list[str]]:
    """File → names of its tensors in the order in which they lie there."""
    shapes = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in weights.items()}
    pattern = f"{folders.STEM}{{suffix}}.safetensors"
    split = split_torch_state_dict_into_shards(shapes, max_shard_size=max_file_bytes, filename_pattern=pattern)
    return {
        name: sorted(inside, key=lambda each: (-weights[each].itemsize, each))
        for name, inside in split.filename_to_tensors.items()
    }


def _whole(weights: dict[str, torch.Tensor], names: list[str]) -> Iterator[torch.Tensor]:
    """Those tensors, whole, one after another. No rank asks for the next one before all have the last: the others would
    be ahead of the one that writes by all that is left, and give up on it after their group's time-out."""
    for name in names:
        agree.wait_for_all()
        yield fsdp.whole(weights[name])
