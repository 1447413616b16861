"""What text cross-attention sees: fixed embeddings out of a file, or zeros."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from entprog import config
from entprog.errors import UserError
from entprog.models import adapters, folders
from entprog.storage import answered

NAME = "prompt_embeds"


def embeddings(settings: config.Model, root: Path | None, width: int, tokens: int = 1) -> torch.Tensor:
    """`model.prompt_embeds`, or those kept beside adapter or base, or zeros: float32 [1, tokens, width].

    Attention over equal tokens alone does not depend on how many they are: where text has an attention of its own, one
    zero token does what many would. Raises UserError for a file that is wrong.
    """
    path = file_of(settings, root)
    return torch.zeros(1, tokens, width) if path is None else _read(path, width)


def fixed(settings: config.Model, root: Path | None, name: str, width: int) -> torch.Tensor:
    """A further tensor of the text, such as the pooled one, out of the same file: float32 [1, width]; zeros where there
    is no file. Raises UserError for a file without it, or of another width."""
    path = file_of(settings, root)
    if path is None:
        return torch.zeros(1, width)
    value = _tensors(path, name)[name].float()
    if value.numel() != width:
        raise UserError(f"model.prompt_embeds: {name} of {path} has shape {list(value.shape)}, needed is [{width}]")
    return value.reshape(1, width)


def file_of(settings: config.Model, root: Path | None) -> Path | None:
    """The file of `model.prompt_embeds`, or the one beside the adapter or the base; None: zeros."""
    if settings.prompt_embeds:
        return folders.located_files(settings.prompt_embeds, "model.prompt_embeds", ())
    trained = [adapters.located(settings.adapter, "model.adapter")] if settings.adapter else []
    beside = [folder / folders.PROMPT for folder in (*trained, *([] if root is None else [root]))]
    return next((file for file in beside if file.is_file()), None)


def trained(settings: config.Model, root: Path | None, about: Mapping[str, Any]) -> folders.Texts | None:
    """Which texts the network was trained with whose text `file_of` is; None: one fixed text. about: `entprog.json` of
    the adapter, or of the base, that it lies beside."""
    kept = about.get("texts")
    return config.build(kept, folders.Texts) if kept and not settings.prompt_embeds else None


def padded(embeds: torch.Tensor, tokens: int) -> torch.Tensor:
    """Zeros after the embeddings, up to a number of tokens that the network counts on: [1, tokens, width].

    Raises UserError if there are more.
    """
    if embeds.shape[1] > tokens:
        raise UserError(f"model.prompt_embeds: {embeds.shape[1]} tokens, this network takes {tokens}")
    return torch.nn.functional.pad(embeds, (0, 0, 0, tokens - embeds.shape[1]))


def used(text: torch.Tensor) -> torch.Tensor:
    """Which tokens of texts [B, tokens, width] are not the zeros that fill them up: bool [B, tokens]. Text that is all
    zeros is none, and seen as it is."""
    own = text.any(dim=2)
    return own | ~own.any(dim=1, keepdim=True)


def spread(text: torch.Tensor, rows: int) -> torch.Tensor:
    """Embeddings of all clips [1, tokens, width], or of each [B, tokens, width], as `rows` rows of a network's batch;
    where it has several rows a clip (frames), those of a clip follow each other."""
    return text.expand(rows, -1, -1) if len(text) == 1 else text.repeat_interleave(rows // len(text), dim=0)


def save(embeds: torch.Tensor, folder: Path, others: Mapping[str, torch.Tensor] = MappingProxyType({})) -> None:
    """Keep embeddings [1, tokens, width] beside a checkpoint, and further tensors of the text by name, each [1, …].
    Zeros need no file."""
    tensors = {NAME: embeds, **others}
    if any(value.any() for value in tensors.values()):
        save_file({name: value[0].cpu().contiguous() for name, value in tensors.items()}, folder / folders.PROMPT)


def _tensors(path: Path, name: str) -> dict[str, torch.Tensor]:
    """The tensors of a file that has one of that name."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        answered(path, error)
        raise UserError(f"model.prompt_embeds: cannot read {path}: {' '.join(str(error).split())}") from None
    if name not in tensors:
        raise UserError(f"model.prompt_embeds: {path} has no tensor named {name}, only {', '.join(tensors)}")
    return tensors


def _read(path: Path, width: int) -> torch.Tensor:
    embeds = _tensors(path, NAME)[NAME].float()
    if embeds.ndim == 2:
        embeds = embeds[None]
    if embeds.ndim != 3 or embeds.shape[0] != 1 or not embeds.shape[1] or embeds.shape[2] != width:
        raise UserError(f"model.prompt_embeds: {path} has shape {list(embeds.shape)}, needed is [tokens, {width}]")
    return embeds
