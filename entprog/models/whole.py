"""A saved folder as a whole pipeline, which plain diffusers runs: its index, its code, the parts that are not trained.

`DiffusionPipeline.from_pretrained(FOLDER, custom_pipeline=FOLDER, trust_remote_code=True)` needs model_index.json and
pipeline.py, which is `shipped/pipeline.py` here. VAE and encoders of the base are copied, or named by where they lie.
"""

import contextlib
import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import diffusers

from entprog.errors import UserError
from entprog.masking import one_line
from entprog.media import drawing
from entprog.models import folders, part_files
from entprog.models.folders import Elsewhere
from entprog.storage import Where

Save = Literal["whole", "light"]
ENCODERS = (
    "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "image_encoder", "image_processor",
    "feature_extractor",
)  # fmt: skip
"""Parts of a base's pipeline that make what cross-attention sees."""
FOLDERS = (*folders.NETWORKS, folders.SECOND, "vae", "scheduler", *ENCODERS)
"""Parts of a saved pipeline that have a folder."""
BOUNDARY, EXPAND = "boundary_ratio", "expand_timesteps"
"""Entries of a pipeline's index: the least time t of the first of two networks; whether the first latent frame can be
given, with a timestep of its own."""
CODE = Path(__file__).parent / "shipped" / "pipeline.py"
CLASS = "ReferencePosePipeline"
COPIED = (".json", ".safetensors", ".model", ".txt")
"""Endings of the files of a saved part: neither pickles nor programs."""
FILES = (folders.ABOUT, folders.INDEX, folders.CARD, folders.PROMPT, CODE.name, "skeleton.py")
"""Files of a saved pipeline that lie in no part's folder."""


@dataclass(frozen=True)
class Origin:
    """Where a part that is not trained comes from."""

    place: Elsewhere
    folder: Path | None
    """On this machine, with weights that are copied; None: nothing like that is here."""
    trained: bool = False
    """Whether it may have been trained here, or lies in a bucket, which diffusers does not read: it is copied."""


def origin(given: str, root: Path, subfolder: str, library: str, kind: str, about: Mapping[str, Any]) -> Origin:
    """The origin of a part of the pipeline in `root`, which a person called `given`. about: its `entprog.json`."""
    folder = root / subfolder if subfolder else root
    kept = about.get("elsewhere", {}).get(subfolder)
    if kept and not folder.is_dir():  # that folder does not hold it either
        place = Elsewhere(**kept)
        return Origin(place, None if place.revision else _loadable(Path(place.name) / place.subfolder, subfolder))
    cached = is_cached(given, root)
    name = given if cached else str(root.resolve())
    place = Elsewhere(
        name=name, revision=root.name if cached else None, subfolder=subfolder, library=library, kind=kind
    )
    return Origin(place, _loadable(folder, subfolder), "://" in given)


def is_cached(given: str, root: Path) -> bool:
    """Whether the pipeline in `root` was fetched from the hub, and given by its name there."""
    return root.parent.name == "snapshots" and not Path(given).expanduser().is_dir()


def encoders(given: str | None, root: Path | None, about: Mapping[str, Any]) -> dict[str, Origin]:
    """The encoders that the pipeline of a base names, but for those that are neither here nor on the hub."""
    named = {name: kinds for name, kinds in parts(index_of(root)).items() if name in ENCODERS}
    named |= {
        name: (kept["library"], kept["kind"]) for name, kept in about.get("elsewhere", {}).items() if name in ENCODERS
    }
    return _there({name: origin(str(given), root, name, *kinds, about) for name, kinds in named.items()})


def text_encoders(given: str, root: Path, wanted: Iterable[str]) -> dict[str, Origin]:
    """Those that texts are encoded with, of a folder that a person called `given`, whether an index names them or not,
    as `encoders`. wanted: their names."""
    named = parts(index_of(root))
    kinds = {name: named.get(name) or ("transformers", part_files.kind(root / name, name)) for name in wanted}
    return _there({name: origin(given, root, name, *of, {}) for name, of in kinds.items() if of[1]})


def _there(origins: Mapping[str, Origin]) -> dict[str, Origin]:
    """Those that are here or on the hub."""
    return {name: o for name, o in origins.items() if o.folder is not None or o.place.revision}


def _loadable(folder: Path, part: str) -> Path | None:
    """The folder of a part if plain diffusers loads the part from it, as it is copied; None if not."""
    return folder if part_files.of(folder, part) else None


def named_folders(root: Path, about: Mapping[str, Any]) -> dict[str, Path]:
    """{part: folder of this machine from which it is copied} of the parts that a checkpoint names instead of holding
    them. about: its `entprog.json`."""
    kept = [(name, Elsewhere(**place)) for name, place in about.get("elsewhere", {}).items()]
    places = {name: Path(place.name) / place.subfolder for name, place in kept if not place.revision}
    return {name: at for name, at in places.items() if not (root / name).is_dir() and _loadable(at, name)}


def index_of(root: Where | None) -> dict[str, Any]:
    """A folder's model_index.json; {} if it has none. Raises UserError if it is damaged."""
    path = root and root / folders.INDEX
    return folders.read_json(path) if path and path.is_file() else {}


def deciding(root: Path) -> dict[str, Any]:
    """What a folder's index says of how its networks are used."""
    index = index_of(root)
    return {name: index[name] for name in (BOUNDARY, EXPAND) if index.get(name)}


def parts(index: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """{name: (library, class)} of the parts that an index names."""
    entries = {name: entry for name, entry in index.items() if name[0] != "_" and name != "conditions"}
    pairs = {name: tuple(entry) for name, entry in entries.items() if isinstance(entry, list) and len(entry) == 2}
    return {name: pair for name, pair in pairs.items() if all(isinstance(word, str) for word in pair)}


def elsewhere(origins: Mapping[str, Origin], save: Save) -> dict[str, Elsewhere]:
    """The parts that a saved folder does not hold: those that are not here, with `light` all that no one trained."""
    light = save == "light"
    return {
        name: o.place
        for name, o in origins.items()
        if (light and not o.trained) or (name != "vae" and o.folder is None)
    }


def copy_others(origins: Mapping[str, Origin], left_out: Mapping[str, Elsewhere], folder: Path) -> None:
    """Copy encoders and the other one of two networks, where they are not left out."""
    for name, where in origins.items():
        if name != "vae" and name not in left_out and where.folder is not None:
            (folder / name).mkdir()
            for path in part_files.of(where.folder, name):
                shutil.copyfile(path, folder / name / path.name)


def leave(
    folder: Path,
    *,
    network: tuple[str, str],
    scheduler: str,
    vae: str | None,
    origins: Mapping[str, Origin],
    about: Mapping[str, Any],
    base: Mapping[str, Any],
    form: str,
    text_shape: tuple[int, ...],
    encodes: tuple[str, int] | None,
    compression: tuple[int, int],
    more: Mapping[str, Any],
) -> None:
    """Write model_index.json, and pipeline.py with its drawing of poses where the network needs them.

    network: its folder and class; scheduler, vae: their classes; about: the content of entprog.json; base: the base's
    own index; form: of the conditions (`VideoDenoiser.form`); encodes: the diffusers pipeline that encodes texts for
    it, and their tokens; more: further entries of the index, `experts` among them: what each of two networks sees. A
    network without conditions keeps its base's pipeline, if all of that is there.
    """
    left_out = about["elsewhere"]
    here = {"scheduler": ["diffusers", scheduler], network[0]: ["diffusers", network[1]]}
    if vae is not None and "vae" not in left_out:
        here["vae"] = ["diffusers", vae]
    copied = {name: o.place for name, o in origins.items() if name != "vae" and name not in left_out}
    here |= {name: [place.library, place.kind] for name, place in copied.items()}
    seen = (about["conditions"], *more.get("experts", {}).values())
    if not any(seen) and parts(base).keys() == here.keys() and isinstance(base.get("_class_name"), str):
        values = {**base, **here}
    else:
        clip = about["shape"] and {name: about["shape"][name] for name in ("frames", "height", "width", "fps")}
        values = {
            "_class_name": [CODE.stem, CLASS],
            "_diffusers_version": diffusers.__version__,
            **here,
            "family": about["family"],
            "conditions": about["conditions"],
            "form": form,
            "latent_channels": about["latent_channels"],
            "compression": compression,
            "text_shape": text_shape,
            "encodes": encodes,
            "prompt": (folder / folders.PROMPT).is_file(),
            "clip": clip,
            "elsewhere": left_out or None,
            **more,
        }
        shutil.copyfile(CODE, folder / CODE.name)
        if "pose" in about["conditions"]:
            (folder / "skeleton.py").write_text(drawing.program(about["skeleton"]))
    (folder / folders.INDEX).write_text(json.dumps(values, indent=2) + "\n")


def missing(root: Path) -> list[str]:
    """The files that a whole pipeline needs and a folder lacks."""
    listed = index_of(root)
    if not listed:
        return [folders.INDEX]
    out = [] if isinstance(listed.get("_class_name"), str) or (root / CODE.name).is_file() else [CODE.name]
    out += [f"{name}/" for name in parts(listed) if _loadable(root / name, name) is None]
    if listed.get("prompt") and not (root / folders.PROMPT).is_file():
        out.append(folders.PROMPT)
    return out


def is_own(name: str) -> bool:
    """Whether a saved pipeline may hold a file of this name (`vae/config.json`), so that a later one replaces it."""
    path = PurePosixPath(name)
    return name in FILES or (str(path.parent) in FOLDERS and path.suffix in COPIED)


def stale(there: Iterable[str], new: Iterable[str]) -> list[str]:
    """The files of an earlier saved pipeline among `there` that a new one lacks, which would act in it. A place without
    a saved pipeline has none: what lies there is another's."""
    there = set(there)
    return sorted(filter(is_own, there - set(new))) if folders.ABOUT in there else []


def remedy(root: Path) -> str:
    """The command that makes a folder whole again, for messages."""
    made = {}
    with contextlib.suppress(UserError):
        made = folders.read_json(root.parent / "result.json") if (root.parent / "result.json").is_file() else {}
    command = made.get("command")
    again = f"it was made by: {one_line(str(command), most=300)}" if command else "python -m pipelines.train makes one"
    return f"copy it there again, or train anew with another --output ({again})"
