"""The files of a part of a pipeline that its library reads: no others are copied, whatever else its folder holds.

A checkpoint is not trusted, and may name any folder of this machine as one of its parts, or hold links: what is no part
must not come into what is saved, and be published with it.
"""

import re
from pathlib import Path

from entprog.errors import UserError
from entprog.files import lies_in
from entprog.models import folders

WITHOUT_WEIGHTS = ("scheduler", "tokenizer", "tokenizer_2", "image_processor", "feature_extractor")
"""Parts that are settings alone."""
STEMS = ("model", folders.STEM)
"""How transformers and diffusers begin the names of files of weights."""
WORDS = (
    "tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model", "chat_template.json",
    "config.json",
)  # fmt: skip
PICTURES = ("preprocessor_config.json", "processor_config.json", "config.json")
KINDS = {
    "scheduler": (("scheduler_config.json",), ("_class_name",), r"\w+Scheduler"),
    "tokenizer": (WORDS, ("tokenizer_class",), r"\w*Token\w+"),
    "tokenizer_2": (WORDS, ("tokenizer_class",), r"\w*Token\w+"),
    "image_processor": (PICTURES, ("image_processor_type", "feature_extractor_type"), r"\w+(Processor\w*|Extractor)"),
    "feature_extractor": (PICTURES, ("image_processor_type", "feature_extractor_type"), r"\w+(Processor\w*|Extractor)"),
}
"""{part without weights: (its files, of which the first is its configuration; the entries of that which may name its
class; what such a class is called)}."""
NETWORK = (("config.json", "generation_config.json"), ("_class_name", "architectures"), r"\w+")
"""The same of a part with weights."""


def of(folder: Path, part: str) -> list[Path]:
    """The files of a part if plain diffusers loads it from them; [] if not: its own configuration must name a class of
    its sort. Variants (`model.fp16.safetensors`) are loaded where they are asked for alone, and pickles are not
    copied. Settings that are links out of the folder, but for those of the hub's cache, are not the part's."""
    names, *_ = KINDS.get(part, NETWORK)
    if kind(folder, part) is None:
        return []
    files = [folder / name for name in names if (folder / name).is_file()]
    if not all(lies_in(path, folder) for path in files):
        return []
    if part in WITHOUT_WEIGHTS:
        return files
    weights = next(filter(None, (_weights(folder, stem) for stem in STEMS)), [])
    return files + weights if weights else []


def kind(folder: Path, part: str) -> str | None:
    """The class of a part as its own configuration names it; None if that names none of its sort."""
    names, entries, sort = KINDS.get(part, NETWORK)
    path = folder / names[0]
    try:
        values = folders.read_json(path) if path.is_file() else {}
    except UserError:  # no part is read from it
        return None
    named = [word for entry in entries for word in (values.get(entry), *_listed(values.get(entry)))]
    return next((word for word in named if isinstance(word, str) and re.fullmatch(sort, word)), None)


def _weights(folder: Path, stem: str) -> list[Path]:
    """A part's files of weights, whole, and their index if there is one; [] if any is missing."""
    if (folder / f"{stem}.safetensors").is_file():
        return [folder / f"{stem}.safetensors"]
    index = folder / f"{stem}.safetensors.index.json"
    named = folders.read_json(index).get("weight_map") if index.is_file() and lies_in(index, folder) else None
    if not isinstance(named, dict) or not named:
        return []
    names = sorted({str(name) for name in named.values()})
    sound = all(re.fullmatch(r"[\w.-]+\.safetensors", name) and (folder / name).is_file() for name in names)
    return [index, *(folder / name for name in names)] if sound else []


def _listed(value: object) -> list:
    return value if isinstance(value, list) else []
