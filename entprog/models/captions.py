"""Captions as a network sees them: each encoded once by the base's own text encoder, kept beside the shards.

SHARDS/texts/KEY/AB/ABCD….safetensors   of one text, named by its sha256: `prompt_embeds` [tokens, width] in the
                                        encoder's own type, without the zeros that fill it up at its end; further
                                        tensors of the text [width] by their names (`VideoDenoiser.FIXED`)

KEY is a hash of all that embeddings depend on: the files of encoders and tokenizers, how the family uses them, whether
ftfy mends texts before that, and the number of tokens that the network takes. Encoders are loaded only while something
is left to encode.
"""

import hashlib
import inspect as python_inspect
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from diffusers.utils import is_ftfy_available
from safetensors import SafetensorError
from safetensors.torch import load, save_file

from entprog import config, files, models
from entprog.config import digest
from entprog.data.clips import Latents
from entprog.distributed import agree
from entprog.errors import UserError, install
from entprog.masking import one_line
from entprog.models import fingerprints, folders, texts
from entprog.models.denoising import VideoDenoiser
from entprog.models.quiet import quiet
from entprog.storage import answered

if TYPE_CHECKING:
    from entprog.data import shards  # pyarrow with it, which networks alone do not need
    from entprog.storage import Where

FORMAT = "entprog-texts-1"
FOLDER = "texts"
AT_ONCE = 8
"""Texts encoded at once: what a kill may cost."""
KEPT_BYTES = 512 << 20
"""Texts that a process keeps in memory, those that were shown last: of 512 tokens of 4096 numbers each has 4 MB."""
ENCODERS = ("CLIPTextModel", "LlamaModel", "T5EncoderModel", "UMT5EncoderModel")
"""Classes of transformers that a base's text encoder may be of."""


@dataclass(frozen=True)
class Source:
    """Where texts are encoded, and how."""

    family: type[VideoDenoiser]
    parts: dict[str, Path]
    """Folders of tokenizers and encoders, by their names in the pipeline."""
    key: str
    """Hash of all that embeddings depend on but the network's number of tokens."""

    def key_for(self, network) -> str:
        """KEY of the texts of a network. network: its configuration."""
        return digest(self.key, self.family.text_tokens(network))


def source(settings: config.Model, key: str | None = None) -> Source:
    """The text encoder that a family's captions are meant for. Nothing is loaded. key: where somebody has hashed its
    files already.

    Raises UserError, in one line, for a family without captions, and for what is missing.
    """
    family = models.family(settings.family).DENOISER
    if family.TEXT_PIPELINE is None:
        raise UserError(f"data.text: family {settings.family} takes no captions: use data.text=fixed")
    name = settings.text_encoder or settings.base
    setting = "model.text_encoder" if settings.text_encoder else "model.base"
    if not name:
        raise UserError("data.text: a new network has no text encoder: set model.text_encoder, or data.text=fixed")
    root = folders.located_text(name, setting, family.TEXT_PARTS)
    if missing := folders.missing_text(root, family.TEXT_PARTS):
        raise UserError(
            f"{setting}: {name} has no {missing}: give a folder or hub name that has as model.text_encoder, or use "
            "data.text=fixed"
        )
    parts = {part: root / part for part in family.TEXT_PARTS}
    for part, folder in parts.items():
        if part.startswith("text_encoder"):
            _kind(folder)
    return Source(family, parts, key or _key(family, parts))


def _key(family: type[VideoDenoiser], parts: dict[str, Path]) -> str:
    read = sorted(path for folder in parts.values() for path in folder.iterdir() if path.is_file())
    hashes = {f"{path.parent.name}/{path.name}": fingerprints.file(path) for path in read}
    mended = ["ftfy"] if family.TEXT_MENDED and is_ftfy_available() else []
    return digest(FORMAT, family.TEXT_PIPELINE, hashes, *mended)


def unmended(family: str, some: Iterable[str]) -> str:
    """How many of some texts are not mended, as the makers of a family's bases did, in words; empty where none has to
    be. Of plain ASCII ftfy leaves the words as they are."""
    left = sum(not text.isascii() for text in {*some})
    if not left or is_ftfy_available() or not models.family(family).DENOISER.TEXT_MENDED:
        return ""
    return (
        f"texts of more than ASCII (typographic quotes and the like), {left} here, are encoded as they stand: the "
        f"base's makers mended such by ftfy, which is not there: {install('text')}"
    )


def of_clips(dataset: "shards.Dataset", split: str) -> list[str]:
    """The caption of every clip of a split, in the order of their numbers; '' for a clip without one."""
    from entprog.data import shards

    def of(shard: shards.ShardInfo) -> list[str]:
        rows = shards.read_rows(dataset.folder / shard.file, range(shard.clips), ("caption",), shard.bytes)
        return [row["caption"].strip() for row in rows]

    with shards.at_once(dataset.folder) as apply:
        return [caption for some in apply(of, dataset.splits.get(split, ())) for caption in some]


def wanted(dataset: "shards.Dataset", mode: str) -> list[str]:
    """Every text that a run of `data.text=mode` shows, once, the empty one first.

    Raises UserError where captions are wanted and no clip has one.
    """
    return _distinct(_of_splits(dataset, mode), dataset)


def _of_splits(dataset: "shards.Dataset", mode: str) -> dict[str, list[str]]:
    """The captions of each split that a run of `data.text=mode` shows."""
    from entprog.data import shards

    return {split: of_clips(dataset, split) for split in shards.SPLITS} if mode == "caption" else {}


def _distinct(of_splits: dict[str, list[str]], dataset: "shards.Dataset") -> list[str]:
    """`wanted` of the captions of each split; of none, the empty text."""
    captions = [caption for some in of_splits.values() for caption in some]
    if of_splits and not any(captions):
        raise UserError(
            f"data.text=caption, but no clip of {dataset.folder} has a caption: prepare with .txt files beside the "
            "videos or a manifest with a column caption, or use data.text=empty"
        )
    return ["", *sorted({caption for caption in captions if caption})]


@dataclass(frozen=True)
class Texts:
    """Embeddings that are all there."""

    folder: "Where"
    """Of KEY."""
    tokens: int
    """What they are filled up to with zeros."""
    captions: dict[str, list[str]]
    """Caption of every clip, by split; empty: all clips have the empty text."""
    names: dict[str, str]
    """Tensors of a text as a denoiser's fields → as they are called in files."""
    anew: bool = False
    """Whether this rank had some to encode."""

    @property
    def unused(self) -> str:
        """What lies beside texts that had to be encoded, in words; empty where nothing does, or none had to."""
        beside = others(self.folder) if self.anew else 0
        what = f"folders of texts beside {self.folder} are of other encoders or numbers of tokens"
        return f"texts are encoded anew: {beside} {what}, and not used" if beside else ""

    def given_to(self, denoiser: VideoDenoiser) -> VideoDenoiser:
        """The denoiser, to be trained with them: clips without a text, or whose text is withheld, have the empty one.
        Raises UserError and OSError as `of` does."""
        empty = {field: value.to(denoiser.device) for field, value in self.of("").items()}
        record = folders.Texts(shown="caption" if self.captions else "empty", key=self.folder.name)
        return replace(denoiser, **empty, no_text=empty, texts=record)

    def of(self, text: str) -> dict[str, torch.Tensor]:
        """One text as a denoiser's fields, float32: `text` [1, tokens, width], others [1, width]. Raises UserError for
        a file that is damaged, OSError where a bucket or a disk does not answer."""
        path = self.folder / _file(text)
        try:
            stored = _KEPT.of(path)
            fields = {field: stored[name].float()[None] for field, name in self.names.items()}
            return fields | {"text": texts.padded(fields["text"], self.tokens)}
        except (OSError, SafetensorError, KeyError) as error:
            unanswered = isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
            if files.may_pass(error) or (unanswered and not isinstance(path, Path)):  # it may answer the next time
                raise
            reason = one_line(error)
            raise UserError(f"damaged text {path} ({reason}): delete it and run the same command again") from None

    def of_clip(self, split: str, clip: int) -> dict[str, torch.Tensor] | None:
        """The text of a clip of its own, whose number in the split is given, as `of` gives it; None: all have the empty
        one."""
        return self.of(self.captions[split][clip]) if self.captions else None

    def beside(self, batch: Latents, split: str, clips: np.ndarray) -> Latents:
        """The batch with the texts of its clips, whose numbers in the split are given, as condition `text` and what
        belongs to it."""
        if not self.captions:
            return batch
        from entprog.data import shards

        of_clips = [self.captions[split][clip] for clip in clips.tolist()]
        with shards.at_once(self.folder) as apply:
            of = dict(zip(dict.fromkeys(of_clips), apply(self.of, dict.fromkeys(of_clips)), strict=True))
        each = [of[text] for text in of_clips]
        rows = {field: torch.cat([fields[field] for fields in each]).to(batch.clean.device) for field in self.names}
        return replace(batch, conditions={**batch.conditions, **rows})


class _Kept:
    """Texts' tensors, as stored, up to KEPT_BYTES: no step reads again what an earlier one has read."""

    def __init__(self):
        self.tensors: OrderedDict[Where, dict[str, torch.Tensor]] = OrderedDict()
        self.bytes = 0
        self.one = threading.Lock()

    def of(self, path: "Where") -> dict[str, torch.Tensor]:
        """Raises OSError or SafetensorError."""
        with self.one:
            if (known := self.tensors.get(path)) is not None:
                self.tensors.move_to_end(path)
                return known
        found = load(path.read_bytes())
        with self.one:
            if path not in self.tensors:
                self.bytes += _bytes(found)
            self.tensors[path] = found
            while self.bytes > KEPT_BYTES:
                _, oldest = self.tensors.popitem(last=False)
                self.bytes -= _bytes(oldest)
        return found


def _bytes(tensors: dict[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


_KEPT = _Kept()


def prepared(
    settings: config.Model,
    dataset: "shards.Dataset",
    mode: str,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Texts:
    """Encode what is not encoded yet, every rank its share, and wait for the others. Every rank calls it.

    mode: of `data.text`, not `fixed`. Raises UserError as `source`, `wanted` and `encoder` do, on every rank where one
    of them cannot go on.
    """
    # Rank 0 looks for all: the clips of a bucket may be very many, and the encoder's files have gigabytes.
    captions, key = agree.of_first(lambda: (_of_splits(dataset, mode), source(settings).key))
    with agree.mistakes_of_all():  # waits for all
        return _share(settings, dataset, captions, key, device, progress)


def _share(
    settings: config.Model,
    dataset: "shards.Dataset",
    captions: dict[str, list[str]],
    key: str,
    device: torch.device | str,
    progress: Callable[[int, int], None],
) -> Texts:
    """Encode this rank's share of what is not encoded yet. key: of the encoder's files."""
    found, rank, world = source(settings, key), *agree.world()
    network = models.family(settings.family).inspect(settings).network.config
    folder = folder_of(dataset.folder, found.key_for(network))
    due = _distinct(captions, dataset)[rank::world]  # what others have written by now decides no share
    due = missing(due, folder)
    names = found.family.text_names()
    if due:
        if source(settings).key != key:  # its files are about to be read here anyway
            name = settings.text_encoder or settings.base
            raise UserError(
                f"model.text_encoder: text encoder or tokenizer of {name}, or whether ftfy is there, is not here as "
                "it is where rank 0 works: texts would be of two encoders; make all machines alike"
            )
        encode = encoder(found, network, device)
        for first in range(0, len(due), AT_ONCE):
            part = due[first : first + AT_ONCE]
            fields = encode(part)
            for row, text in enumerate(part):
                _write(folder, text, {names[field]: value[row] for field, value in fields.items()})
            progress(first + len(part), len(due))
        del encode  # and with it the encoders
        if torch.device(device).type == "cuda":
            torch.cuda.empty_cache()
    return Texts(folder, found.family.text_tokens(network), captions, names, anew=bool(due))


def one(found: Source, network, text: str, device: torch.device | str) -> dict[str, torch.Tensor]:
    """A text as a denoiser's fields, as `Texts.of` has it. network: the base's configuration."""
    fields = {field: value.float() for field, value in encoder(found, network, device)([text]).items()}
    return fields | {"text": texts.padded(fields["text"], found.family.text_tokens(network))}


def there(folder: "Where", family: type[VideoDenoiser], network, some: Iterable[str]) -> Texts | None:
    """Texts that lie encoded in a folder for a network; None unless some, and the empty one, are all there. network:
    its configuration."""
    if missing(["", *dict.fromkeys(some)], folder):
        return None
    return Texts(folder, family.text_tokens(network), {}, family.text_names())


def folder_of(shards: "Where", key: str) -> "Where":
    """Where embeddings of texts lie in a folder of shards."""
    return shards / FOLDER / key


def others(folder: "Where") -> int:
    """How many folders of texts there are beside one that cannot be used for its network."""
    if not isinstance(folder, Path):
        return len({*folder.parent.folders()} - {folder.name})
    there = folder.parent.iterdir() if folder.parent.is_dir() else ()
    return sum(path.is_dir() and path != folder for path in there)


def missing(wanted: Sequence[str], folder: "Where") -> list[str]:
    """Texts that are not encoded yet."""
    if isinstance(folder, Path):
        return [text for text in wanted if not (folder / _file(text)).is_file()]
    there = folder.below()
    return [text for text in wanted if _file(text) not in there]


def encoder(found: Source, network, device: torch.device | str) -> Callable[[list[str]], dict[str, torch.Tensor]]:
    """Texts → a denoiser's fields, [texts, …] each, on the CPU, as the base's own pipeline of diffusers has them
    (`VideoDenoiser.encode_text`). network: the base's configuration. Raises UserError for an encoder or tokenizer that
    cannot be loaded."""
    import diffusers
    import transformers
    from transformers.utils import logging

    def loaded(part: str, folder: Path):
        try:
            if part.startswith("tokenizer"):
                # Not given, transformers asks on the terminal whether a folder's own Python may run.
                own = {"local_files_only": True, "trust_remote_code": False}
                return transformers.AutoTokenizer.from_pretrained(folder, **own)
            kind = getattr(transformers, _kind(folder))
            network = kind.from_pretrained(folder, use_safetensors=True, local_files_only=True).eval()
        except (UserError, MemoryError):
            raise
        except Exception as error:  # files that are damaged, or not of each other, make transformers raise anything
            answered(folder, error)
            what = "tokenizer" if part.startswith("tokenizer") else "text encoder"
            unfit = "its weights are not those of its config.json" if "mismatched" in str(error) else error
            raise UserError(f"cannot load the {what} {folder}: {one_line(unfit)}") from None
        return network.to(device)

    pipeline = getattr(diffusers, found.family.TEXT_PIPELINE)
    parameters = python_inspect.signature(pipeline).parameters.values()
    nothing = {one.name: None for one in parameters if one.default is one.empty}
    with quiet(logging):
        pipe = pipeline(**nothing | {part: loaded(part, folder) for part, folder in found.parts.items()})

    @torch.no_grad()
    def encode(some: list[str]) -> dict[str, torch.Tensor]:
        fields = found.family.encode_text(network, pipe, some, torch.device(device))
        return {field: value.cpu() for field, value in fields.items()}

    return encode


def _kind(encoder: Path) -> str:
    """The encoder's class. Raises UserError for one that is not known here, or without transformers."""
    try:
        import transformers  # noqa: F401
    except ImportError:
        raise UserError(f"texts are encoded by transformers, which is not there: {install('text')}") from None
    names = folders.of_transformers(encoder).get("architectures")
    name = names[0] if isinstance(names, list) and names else "network of unknown class"
    if name not in ENCODERS:
        raise UserError(f"text encoder {encoder} is a {name}: known are {', '.join(ENCODERS)}")
    return name


def _file(text: str) -> str:
    name = hashlib.sha256(text.encode()).hexdigest()
    return f"{name[:2]}/{name}.safetensors"


def _write(folder: "Where", text: str, tensors: dict[str, torch.Tensor]) -> None:
    embedding = tensors[texts.NAME]
    used = int(embedding.any(dim=1).nonzero().max()) + 1 if embedding.any() else 1
    kept = {name: value.contiguous() for name, value in {**tensors, texts.NAME: embedding[:used]}.items()}
    path = folder / _file(text)
    with files.whole(path) as scratch:
        save_file(kept, scratch, metadata={"format": FORMAT})
