"""Publish: what train left → a folder, a bucket or a hub, as a whole pipeline that plain diffusers runs.

python -m pipelines.publish --checkpoint out/run --to hf://me/dancer
python -m pipelines.publish --checkpoint out/run --to s3://bucket/dancer
"""

import glob
import re
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from entprog import files, storage
from entprog.errors import UserError
from entprog.masking import bare, has_credentials, reason
from entprog.storage import Where
from pipelines import cli, terminal
from pipelines.command import usage

HUB = "hf://"
REPOSITORY = r"[\w-][\w.-]*/[\w.-]+"
"""OWNER/NAME on a hub."""
MADE = ("model_index.json", "pipeline.py", "skeleton.py", "README.md")
"""Files that can be made of the others."""
DEEPEST = 3
"""How far below the output of a job its models lie, at most: of a sweep OUTPUT/trials/ID/model."""

app = usage.app("Put a trained pipeline where others find it: a folder, a bucket, or a hub.")


@app.command()
def main(
    checkpoint: Annotated[
        str, typer.Option(help="Folder that pipelines.train wrote (its output, or model/ in it), also s3:// or gs://.")
    ],
    to: Annotated[str, typer.Option(help="A folder, s3://BUCKET/FOLDER, gs://BUCKET/FOLDER, or hf://OWNER/NAME.")],
    step: Annotated[
        int | None, typer.Option(min=1, help="With the weights of the checkpoint after this step, not the last ones.")
    ] = None,
    checkpoints: Annotated[
        str | None,
        typer.Option(help="With --step: where checkpoints lie, if train.checkpoints said so; also s3:// or gs://."),
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="A new repository on the hub is open to everyone.")] = False,
    dry_run: cli.DryRun = False,
    verbose: cli.Verbose = False,
) -> None:
    """Copy the pipeline, whole: what a folder of an older version lacks is made, what cannot be made is named."""

    def work() -> dict[str, Any]:
        return run(checkpoint, to, step=step, checkpoints=checkpoints, public=public, dry_run=dry_run)

    cli.run("publish", None, work, verbose=verbose)


def run(
    checkpoint: str,
    to: str,
    *,
    step: int | None = None,
    checkpoints: str | None = None,
    public: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Publish; returns `{"files": {name: bytes}, "to": where}`. step: of the checkpoint in the training's own folder,
    beside `model/`, or in `checkpoints`, whose weights are taken. An earlier publication there is replaced; files of
    others stay on a hub or in a bucket, and a folder that holds any is refused.

    Raises UserError for a folder that is not whole and cannot be made so, weights that are damaged or not finite, a
    place that is no place, or one that does not take it.
    """
    from entprog import models
    from entprog.models import folders, sources, whole
    from entprog.training import checkpoint as training

    if checkpoints is not None and step is None:
        raise UserError("--checkpoints: says where the checkpoint of --step lies, give that too")
    where = _place(to)
    kept = checkpoints or (_checkpoints(checkpoint) if step is not None else None)
    fetched = folders.here(checkpoint) is None
    if kept is not None and fetched:  # before it is
        training.check_weights(kept, _of_step(step))
    root = folders.locate(checkpoint, "--checkpoint")
    about = folders.saved(root)
    if not about:
        raise UserError(f"--checkpoint: {checkpoint} was not written by pipelines.train (it has no entprog.json)")
    lost = [name for name in whole.missing(root) if name not in MADE]
    if lost:
        raise UserError(f"--checkpoint: {root} is not whole, it lacks {', '.join(lost)}: {whole.remedy(root)}")
    _check(to, where, root, about)
    _check_links(root)
    sources.check_saved(models.family(about["family"]).DENOISER, root, "--checkpoint")
    if kept is not None and not fetched:
        training.check_weights(kept, _of_step(step))
    if re.fullmatch(REPOSITORY, to) and not Path(to).parent.exists():
        terminal.console.print(f"Note: --to {to} is a folder of this machine; on the hub it is {HUB}{to}.")
    with tempfile.TemporaryDirectory(prefix="publish-") as scratch:
        folder = _complete(root, about, Path(scratch) / "model", _title(checkpoint), step, kept)
        sizes = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
        total = sum(sizes.values())
        done = "Would publish" if dry_run else "Published"
        if not dry_run:
            _put(folder, to, where, public)
        terminal.console.print(
            f"{done} {root} ({len(sizes)} files, {total / 2**20:.1f} MiB) to {bare(to)}: {', '.join(sizes)}"
        )
    return {"to": bare(to), "files": sizes}


def _place(to: str) -> Where | None:
    """Where it is to lie: a folder of this machine, by its own path where `to` is a link to it, or one in a bucket.
    None: on the hub. Raises UserError for an address that is none of these."""
    if has_credentials(to):
        raise UserError(f"--to: {bare(to)} holds a user or password: give credentials in the environment")
    if not to.startswith(HUB):
        return storage.at(to, "a pipeline").resolve()
    if not re.fullmatch(REPOSITORY, to.removeprefix(HUB)):
        raise UserError(f"--to: a repository on the hub is named hf://OWNER/NAME, given {to}")
    return None


def _check(to: str, where: Where | None, root: Path, about: dict[str, Any]) -> None:
    """Raises UserError for a place that nothing can be published to, before anything is read."""
    from entprog.models import folders, whole

    if where is not None:
        _check_no_output(to, where)
    if isinstance(where, Path):
        if where == root.resolve():
            raise UserError(f"--to: {to} is the checkpoint itself: choose another folder")
        if where.exists() and not where.is_dir():
            raise UserError(f"--to: {to} is a file, wanted is a folder")
        there = _files(where)
        strange = [name for name in there if not whole.is_own(name) and not (root / name).is_file()]
        if strange or (there and folders.ABOUT not in there):
            named = ", ".join((strange or there)[:5]) + (", …" if len(strange or there) > 5 else "")
            raise UserError(
                f"--to: {to} would be replaced, and holds files that are no published pipeline's ({named}): choose a "
                "new or an empty folder, or move them away"
            )
    here = [f"{name} ({place['name']})" for name, place in about.get("elsewhere", {}).items() if not place["revision"]]
    if here and not isinstance(where, Path):
        raise UserError(
            f"--checkpoint: saved light, its {', '.join(here)} lies on this machine alone: train with train.save=whole"
        )


def _check_no_output(to: str, place: Where) -> None:
    """Raises UserError for a folder among what a job has left: its weights are not to be replaced."""
    from pipelines.outputs import claim

    for _ in range(DEEPEST):
        place = place.parent
        if place.name and (place / claim.MARK).exists():
            raise UserError(f"--to: {bare(to)} lies in the output of another command, {place}: choose another folder")


def _check_links(root: Path) -> None:
    """Raises UserError for what would bring files from outside a pipeline's folder into what is published."""
    strange = [name for name in _files(root) if not (root / name).is_file() or not files.lies_in(root / name, root)]
    if strange:
        named = ", ".join(strange[:5]) + (", …" if len(strange) > 5 else "")
        raise UserError(
            f"--checkpoint: {root} holds links to other folders, or what is no file ({named}), which are not "
            "published: put files in their place, or remove them"
        )


def _files(folder: Path) -> list[str]:
    """The names of the files and links in a folder and those below it; [] if there is none."""
    there = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(path.relative_to(folder).as_posix() for path in there)


def _checkpoints(checkpoint: str) -> str:
    """The folder of a training's checkpoints, beside its model."""
    from entprog.storage import Place, address

    if "://" not in checkpoint:
        given = files.home(checkpoint)
        model = given / "model" if (given / "model").is_dir() else given
        return str(model.resolve().parent / "checkpoints")  # of a training in phases model/ is a link to the last one's
    place = Place.at(checkpoint)
    return address((place.parent if place.name == "model" else place) / "checkpoints")


def _of_step(step: int) -> str:
    """The name of the checkpoint after a step."""
    return f"step-{step:08d}"


def _title(checkpoint: str) -> str:
    """What a person calls the folder of a training, or a repository of the hub."""
    folder = Path(bare(checkpoint)).expanduser().resolve()
    return folder.parent.name if folder.name == "model" else folder.name


def _complete(root: Path, about: dict[str, Any], folder: Path, title: str, step: int | None, kept: str | None) -> Path:
    """A copy with all that can be made of the rest, and perhaps the weights of an earlier step. kept: the training's
    checkpoints."""
    from entprog import config, models
    from entprog.models import folders, whole
    from entprog.training import checkpoint
    from pipelines.training import model_card

    if whole.missing(root) or step is not None:
        for part, place in whole.named_folders(root, about).items():
            terminal.console.print(f"Note: {part} is copied from {place}, as the checkpoint's entprog.json says.")
        chosen = config.Model(family=about["family"], base=str(root), conditions=tuple(about["conditions"]))
        denoiser = models.family(about["family"]).load(chosen)
        if step is not None:
            checkpoint.load_weights(kept, _of_step(step), denoiser.network)
        origin = about["provenance"]  # the training's: this folder is not its base
        for part in filter(None, (denoiser.network, denoiser.vae)):
            part.register_to_config(_name_or_path=origin.get("base") or "")
        replace(denoiser, provenance=origin).save(folder, **({} if step is None else {"step": step}))
        for name in _files(root):  # what a person put there, and the card of these weights
            theirs = not whole.is_own(name) or (name == folders.CARD and step is None)
            if theirs and (root / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(root / name, folder / name)
    else:
        shutil.copytree(root, folder)
    if not (folder / folders.CARD).is_file():
        model_card.write(folder, title)
    return folder


def _put(folder: Path, to: str, where: Where | None, public: bool) -> None:
    """Raises UserError if the place does not take it."""
    from entprog.models import folders

    try:
        if where is None:
            _to_hub(folder, to.removeprefix(HUB), public)
        elif isinstance(where, Path):
            with folders.replacing(where) as scratch:
                shutil.copytree(folder, scratch, dirs_exist_ok=True)
        else:
            _to_bucket(folder, where)
    except folders.hub_errors() as error:  # disk and bucket raise OSErrors and ValueErrors
        raise UserError(f"--to: {bare(to)} does not take it: {reason(error)}") from None


def _to_bucket(folder: Path, place: storage.Place) -> None:
    from entprog.models import whole

    there = [*place.files(), *(f"{part}/{name}" for part in whole.FOLDERS for name in (place / part).files())]
    place.upload(folder)
    for name in whole.stale(there, _files(folder)):
        place.delete(name)


def _to_hub(folder: Path, name: str, public: bool) -> None:
    from huggingface_hub import HfApi

    from entprog.models import whole

    hub = HfApi()
    hub.create_repo(name, private=not public, exist_ok=True)
    stale = whole.stale(hub.list_repo_files(name), _files(folder))
    patterns = [glob.escape(name) for name in stale] or None
    hub.upload_folder(repo_id=name, folder_path=folder, commit_message="Trained pipeline", delete_patterns=patterns)


if __name__ == "__main__":
    app()
