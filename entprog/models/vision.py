"""A base's CLIP image encoder, with what makes its inputs of pixels."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from entprog.errors import UserError
from entprog.masking import one_line
from entprog.models import folders
from entprog.models.quiet import quiet
from entprog.storage import answered

ENCODER = "image_encoder"
"""Its folder in a pipeline; the other one, with what makes its inputs, has a name of each family's own."""


def load(parts: Mapping[str, Path], kinds: Mapping[str, tuple[str, str]]) -> tuple[Any, nn.Module]:
    """(image processor, image encoder in float32) of their folders by name. kinds: their library and classes, as
    `Family.MORE`. Raises UserError if they cannot be loaded."""
    import transformers  # `places.more` has seen that it is there
    from transformers.utils import logging

    loaded = {}
    folders.of_transformers(parts[ENCODER])
    try:
        with quiet(logging):
            for name, (_, kind) in kinds.items():
                own = {"use_safetensors": True} if name == ENCODER else {}
                cls = getattr(transformers, kind)
                loaded[name] = cls.from_pretrained(parts[name], local_files_only=True, **own)
    except MemoryError:
        raise
    except Exception as error:  # files that are damaged, or not of each other, make transformers raise anything
        answered(parts[ENCODER], error)
        raise UserError(f"cannot load the image encoder {parts[ENCODER]}: {one_line(error)}") from None
    encoder = loaded.pop(ENCODER).float().eval()
    return loaded.popitem()[1], encoder
