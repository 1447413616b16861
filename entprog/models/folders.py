"""Folders of pipelines in diffusers' format, ours (`entprog.json` beside) and others': located, fetched, what they say
of themselves, replaced whole. Their weights: `weight_files`."""

import glob
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from entprog import config, files
from entprog.errors import UnreachableError, UserError
from entprog.masking import bare, one_line
from entprog.media import assets
from entprog.storage import Where, address, answered, at, fetched, quickly

FORMAT = "entprog-model-1"
ABOUT = "entprog.json"
INDEX = "model_index.json"
CARD = "README.md"
PROMPT = "prompt_embeds.safetensors"
NETWORKS = ("transformer", "unet")
"""A pipeline's folders that may hold its network."""
SECOND = "transformer_2"
"""Folder of a pipeline's second network (`entprog.models.experts`)."""
BESIDE = ("vae/", "scheduler/")
"""A pipeline's other folders that every family reads."""
STEM = "diffusion_pytorch_model"
"""How diffusers begins the names of files of weights."""
RECORDS = ("mlflow_run.json", "result.json")
"""Of the job whose output holds a checkpoint: they are fetched with it."""
PARTS = (STEM, *(f"{name}/" for name in (*NETWORKS, SECOND)), *BESIDE)
"""How the names of files begin that are fetched of a base on the hub."""


class Elsewhere(config.Part):
    """A part of a pipeline that does not lie in its folder."""

    name: str
    """Hub name, or a folder of the machine that trained."""
    revision: str | None
    """Commit on the hub; None: a folder."""
    subfolder: str
    library: str
    kind: str
    """Its class in that library."""


class Inputs(config.Part):
    """What one of two networks sees."""

    conditions: tuple[Literal["reference", "pose"], ...]
    input_channels: tuple[int, ...]


class Texts(config.Part):
    """The texts of an encoder that a network was shown in training, where that was not one fixed text."""

    shown: Literal["empty", "caption"]
    """`data.text`."""
    key: str = Field(pattern="^[0-9a-f]{16}$")
    """Folder of the encoded ones in `texts/` of the shards (`entprog.models.captions`)."""


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
    skeleton: config.Skeleton = "limbs"
    """How poses are drawn for it."""
    points: Literal[33, 133] = 33
    """Points of the poses that it was trained on."""
    last_frame: bool = False
    """Whether it sees the clip's last frame beside its first one."""
    first_frame: bool = False
    """Whether its reference was in training each clip's own first frame."""
    native: bool = False
    """Whether it sees all that its base's pipeline shows it, where an earlier version left something out."""
    texts: Texts | None = None
    """What it was shown as text, if not one fixed text: the empty one lies in the folder (PROMPT)."""
    provenance: dict[str, Any]
    elsewhere: dict[str, Elsewhere] = Field(default_factory=dict)
    """Parts of the pipeline that are not in this folder, by name."""
    expert: Literal["high", "low"] | None = None
    """Which of two networks was trained last; what stands above is of that one."""
    experts: dict[Literal["high", "low"], Inputs] = Field(default_factory=dict)
    """Inputs of both."""


def locate(
    name: str,
    setting: str,
    trust_pickle: bool = False,
    revision: str | None = None,
    parts: Sequence[str] = PARTS,
) -> Path:
    """The folder of a checkpoint, given or fetched from the hub or a bucket (safetensors and JSON; `.bin` only where
    trusted).

    revision, parts: of what is fetched: a commit, and the beginnings of the files' names.

    For a train job's output that is `model/` in it, for a network's folder in a checkpoint the checkpoint itself.
    Raises UserError, naming `setting`, if there is none.
    """
    folder = here(name)
    if folder and folder.is_dir():
        return _meant(folder)
    if folder and folder.is_file():
        raise UserError(
            f"{setting}: {name} is a file, wanted is a folder in diffusers' format: give a single file of a network's "
            "weights as model.weights, beside the base that it belongs to; of others make a folder with their class's "
            "from_single_file(FILE).save_pretrained(FOLDER)"
        )
    endings = (".safetensors", ".json", *[".bin"] * trust_pickle)
    patterns = [f"{p}*{ending}" for p in parts for ending in endings]
    patterns += [*(f"{name}/config.json" for name in (*NETWORKS, SECOND)), "config.json", ABOUT, INDEX, PROMPT, CARD]
    return _fetched(name, setting, patterns, revision)


def _meant(folder: Where) -> Where:
    """The checkpoint that a folder is, belongs to, or holds as a train job's output."""
    above = folder.resolve().parent
    if folder.resolve().name in NETWORKS and any((above / f).is_file() for f in (ABOUT, INDEX)):
        return above
    inside = folder / "model"
    networks = any(part(folder, name) for name in NETWORKS)
    return inside if (inside / ABOUT).is_file() and not networks else folder


def hub_errors() -> tuple[type[BaseException], ...]:
    """What the hub's client raises where the hub refuses or does not answer. The errors of the HTTP library beneath it
    are OSErrors in some of its versions, in others they are not."""
    from huggingface_hub import errors

    return OSError, ValueError, getattr(errors, "HTTPError", OSError)


def _fetched(name: str, setting: str, patterns: list[str], revision: str | None = None) -> Path:
    """The folder of a hub name, or of an address in a bucket, the files of it that the patterns name. Raises UserError,
    naming `setting`: UnreachableError where there was no answer."""
    folder = here(name)
    if folder is None:
        return _of_bucket(name, setting, patterns)
    # `out/base` looks like a hub name too: where `out` is a folder here, a local one was meant.
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) or folder.parent.is_dir() or folder.exists():
        raise UserError(f"{setting}: no such folder: {name}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except hub_errors() as error:
        reason = one_line(str(error).strip().partition("\n")[0], most=160)
        kind = UserError if _refuses(error) else UnreachableError
        raise kind(f"{setting}: {name} is neither a folder here nor could it be fetched: {reason}") from None


def _refuses(error: BaseException) -> bool:
    """Whether the hub has answered: that it has no such model, or none for us."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return isinstance(error, ValueError) or (status is not None and status < 500 and status != 429)


def here(name: str) -> Path | None:
    """The file or folder of this machine that a path, or an address file://, names; None for one in a bucket."""
    if name.startswith("file://"):
        return at(name, "what is read")
    return None if "://" in name else Path(name).expanduser()


def located_files(name: str, setting: str, names: Sequence[str]) -> Path:
    """A file, or a folder with those files of these names that are there: itself, or a copy of what lies in a bucket.

    Raises UserError, naming `setting`, for what is not in its bucket or cannot be fetched; what is not on this machine
    is the caller's to see.
    """
    return here(name) or _of_bucket(name, setting, names)


def _of_bucket(name: str, setting: str, patterns: Sequence[str]) -> Path:
    """A copy of a folder in a bucket, or of a file, kept in the cache as it lies there: `model` in a folder with the
    records of the job that left it, a file in its folder. What has not changed since is not fetched again. Raises
    UserError, naming `setting`: UnreachableError where there was no answer."""
    try:
        if not at(quickly(name), setting).exists():
            raise FileNotFoundError
        given = at(name, setting)
        alone = given.is_file()
        folder = given.parent if alone else _meant(given)
        kept = assets.cache_folder() / "fetched" / config.digest(address(folder.parent))
        fetched(folder, [glob.escape(given.name)] if alone else patterns, kept / folder.name)
        for record in RECORDS if folder.name == "model" and not alone else ():
            with suppress(FileNotFoundError):
                (folder.parent / record).get(kept / record)
        return kept / folder.name / given.name if alone else kept / folder.name
    except FileNotFoundError:
        raise UserError(f"{setting}: no such folder: {bare(name)}") from None
    except OSError as error:
        raise UnreachableError(f"{setting}: {bare(name)} could not be fetched: {one_line(error, name)}") from None


def located_text(name: str, setting: str, parts: Sequence[str], revision: str | None = None) -> Path:
    """The folder that holds a pipeline's text encoders and tokenizers, given or fetched from the hub (safetensors, JSON
    and the tokenizers' own files), of a commit if one is named. parts: their folders' names. Raises UserError, naming
    `setting`, if there is none."""
    if (there := here(name)) and there.exists():
        return locate(name, setting)
    ends = {"tokenizer": ("json", "txt", "model"), "text": ("json", "safetensors")}  # never Python
    wanted = [f"{part}/*.{end}" for part in parts for kind in ends if part.startswith(kind) for end in ends[kind]]
    return _fetched(name, setting, wanted, revision)


def missing_text(root: Path, parts: Sequence[str]) -> str:
    """Which of those folders are not there, in words; empty where all are."""
    there = [(root / part / "config.json").is_file() or part.startswith("tokenizer") for part in parts]
    lost = [f"{part}/" for part, sound in zip(parts, there, strict=True) if not sound or not (root / part).is_dir()]
    return " and ".join(lost)


def part(root: Where, name: str) -> Where | None:
    """A pipeline's part (`transformer`, `unet`, `vae`), or the folder itself where it is one; None if neither is."""
    return next((folder for folder in (root / name, root) if (folder / "config.json").is_file()), None)


def read_json(path: Where) -> dict[str, Any]:
    """A JSON object. Raises UserError if it is not one, UnreachableError where a bucket or a disk does not answer."""
    try:
        values = files.from_json(path.read_text())
    except (OSError, ValueError) as error:
        answered(path, error)
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged: it does not hold a JSON object")
    return values


def of_transformers(folder: Path) -> dict[str, Any]:
    """The configuration of a network of transformers. Raises UserError for one that would have it quantised, or fetch
    kernels by their address: transformers does what its configuration says."""
    path = folder / "config.json"
    config = read_json(path)
    kernels = [config.get(name) for name in ("attn_implementation", "_attn_implementation")]
    if config.get("quantization_config") is not None or any(name and "/" in str(name) for name in kernels):
        raise UserError(f"{path} asks for a quantised network or foreign kernels: give one of plain weights")
    return config


def saved(folder: str | Where) -> dict[str, Any]:
    """A saved checkpoint's `entprog.json`; {} for a foreign one. Raises UserError if it is damaged."""
    path = at(folder, "the checkpoint") / ABOUT
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
