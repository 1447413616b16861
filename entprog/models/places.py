"""Where the parts of a base lie: in its folder, on the hub, or in another checkpoint that it was saved beside."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from entprog import config
from entprog.errors import UserError, install
from entprog.models import HOW_TO_ADD, experts, families, family, folders, whole
from entprog.models.denoising import VideoDenoiser


def base(cls: type[VideoDenoiser], settings: config.Model, weights: bool = True) -> Path | None:
    """The base's folder; of one on the hub, no weights of the network are fetched that `model.weights` replaces, and
    none at all where they are not wanted."""
    if not settings.base:
        return None
    other = experts.FOLDERS.get(experts.OTHER.get(settings.expert)) if weights else None
    parts = folders.PARTS if weights and not settings.weights else folders.BESIDE
    parts = (*parts, *([f"{other}/"] if other and settings.weights else []))
    parts = (*parts, *(f"{name}/" for name in cls.MORE))
    return folders.locate(settings.base, "model.base", settings.trust_pickle, parts=parts)


def more(needed: tuple[str, ...], settings: config.Model, root: Path, about: dict[str, Any]) -> dict[str, Path]:
    """Further folders that a network needs: in the base, or where it says they lie. Raises UserError if one is not
    there, or the library that reads them is not."""
    if needed and find_spec("transformers") is None:
        raise UserError(f"model.base: the image encoder of {settings.base} needs transformers: {install('text')}")
    out = {name: root / name for name in needed if (root / name).is_dir()}
    places = {name: place for name, place in about.get("elsewhere", {}).items() if name in needed and name not in out}
    if missing := [f"{name}/" for name in needed if name not in {**out, **places}]:
        if about:
            remedy = whole.remedy(root)
        elif whole.is_cached(str(settings.base), root):
            remedy = "it was fetched without, and the hub gives nothing now: run this once where the hub can be reached"
        else:
            remedy = "give its pipeline's whole folder, or its name on the hub"
        raise UserError(
            f"model.base: {settings.base} has no {' and '.join(missing)}, which this network was trained with: {remedy}"
        )
    return out | {name: elsewhere(settings, name, place) for name, place in places.items()}


def network(
    cls: type[VideoDenoiser],
    settings: config.Model,
    root: Path,
    about: dict[str, Any],
    expert: str | None,
    weights: bool = True,
) -> Path:
    """The folder with the network's config.json, its class checked. expert: which one of two networks; weights: whether
    they are wanted, where the folder is on the hub."""
    given, name = str(settings.base), experts.FOLDERS[expert] if expert else cls.PART
    if expert and not (root / name / "config.json").is_file() and (place := about.get("elsewhere", {}).get(name)):
        return elsewhere(settings, f"{expert} expert", place, weights)
    folder = folders.part(root, name)
    other = None if folder else next((part for part in folders.NETWORKS if folders.part(root, part)), None)
    if folder is None and other is None:
        raise UserError(f"model.base: no diffusers checkpoint in {given}: neither config.json nor {name}/config.json")
    folder = folder or folders.part(root, other)
    found = folders.read_json(folder / "config.json").get("_class_name")
    if found != cls.NETWORK.__name__:
        known = families()
        other = next((name for name in known if found == family(name).CLASS), None)
        hint = f"set model.family={other}" if other else f"families there are: {', '.join(known)}; {HOW_TO_ADD}"
        wanted = cls.NETWORK.__name__
        raise UserError(f"model.base: {given} holds a {found or 'network of unknown class'}, not a {wanted}; {hint}")
    return folder


def vae(settings: config.Model, root: Path | None, about: dict[str, Any]) -> tuple[Path | None, str]:
    """The VAE's folder that `model.vae` asks for (None: pixels), and the setting that named it."""
    setting = "model.base" if settings.vae == "auto" else "model.vae"
    if settings.vae == "none":
        return None, setting
    if settings.vae == "auto":
        folder = root / "vae" if root and (root / "vae" / "config.json").is_file() else None
        if folder is None and about.get("vae"):
            if place := about.get("elsewhere", {}).get("vae"):
                return elsewhere(settings, "VAE", place), setting
            raise UserError(
                f"model.base: {settings.base} was saved with a VAE, its vae/config.json is missing: "
                f"{whole.remedy(root)}"
            )
        return folder, setting
    of_vae = ("vae/", folders.STEM)  # of a pipeline on the hub its VAE alone
    folder = folders.part(folders.locate(settings.vae, "model.vae", settings.trust_pickle, parts=of_vae), "vae")
    if folder is None:
        raise UserError(f"model.vae: no VAE in {settings.vae}: neither config.json nor vae/config.json")
    return folder, setting


def elsewhere(settings: config.Model, part: str, place: dict[str, Any], weights: bool = True) -> Path:
    """The folder of a part of a checkpoint that does not hold it. Raises UserError if it is not there any more."""
    name, revision, inside = place["name"], place["revision"], place["subfolder"]
    setting = f"model.base: the {part} of {settings.base}, saved light"
    parts = [f"{inside}/" if inside else folders.STEM] if weights else []  # configurations come anyway
    folder = folders.locate(name, setting, revision=revision, parts=parts) / inside
    if not any(folder.glob("*config.json")):
        raise UserError(f"{setting}: no config.json in {folder}: put it back there")
    return folder
