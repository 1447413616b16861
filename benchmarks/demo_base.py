"""The demo's base: a small network that draws people, pre-trained on rendered people.

    pip install '.[study]'
    nice -n 10 python -m benchmarks.demo_base --seconds 3600        # one process, one thread; a kill costs a minute

First a VAE (benchmarks.demo_vae), of rendered frames, of the demo's training clips and of drawn poses. On pixels a
small network spends itself on the noise: its pictures stay mosaics, and minutes of fine-tuning teach it no pose.
Then the network, in its latents. It sees the reference image and no pose, and no clip of the demo's: real footage and
pose are what the demo brings, as published networks meet a person's own clips. Small clips come first, since most is
learnt from them at a fifth of the cost, then whole ones. Leaves the base in pipelines/demo_base (a diffusers folder,
weights in half precision, its record in entprog.json), benchmarks/results/demo_base.json and OUTPUT/samples.png.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks import common, demo_vae, mocap
from entprog import config, files, models
from entprog.blocks import blocks
from entprog.config import ClipShape, Experiment, Generate, Smaller
from entprog.data import clip_stream, latents, shards
from entprog.data.clips import Clips, Latents
from entprog.diffusion import losses
from entprog.diffusion.denoiser import Denoiser
from entprog.media import sheet, skeleton
from entprog.media.color import yuv420_to_rgb
from entprog.models import fingerprints
from entprog.scoring import cei
from entprog.training import checkpoint
from entprog.training.fit import fit, start
from pipelines import cli, demo, terminal
from pipelines.cluster import session
from pipelines.command import usage
from pipelines.generating import rendering
from pipelines.outputs import claim

app = usage.app("Pre-train the demo's base: people in any pose, from a reference image.")

VAE_SHARE = 0.25
"""Of the seconds, those for the VAE; the others are the network's."""
SHOWN_REAL, SHOWN_POSES = 0.3, 0.15
"""Shares of the VAE's clips that are real, and that are drawn poses instead of pictures."""
FRAMES_AT_ONCE = 16
"""In a batch of the VAE's."""
ENCODED_AT_ONCE = 16
SMALL = Smaller(shrink=2)
SMALL_SHARE, SMALL_BATCH, SMALL_COOLDOWN, COOLDOWN = 0.45, 16, 0.1, 0.6
"""Of the seconds, those for small clips; how many in an update; shares of each part over which the rate falls to 0."""
SAVE_EVERY_S = 60.0
CURVE_EVERY = 25
"""Updates whose mean loss is a point of the record's curve."""
JUDGED, SHOWN, SHOWN_STEPS = 24, 6, 30


@dataclass(frozen=True)
class Part:
    """Training on clips of one shape."""

    name: str
    experiment: Experiment
    folder: Path
    """Of its checkpoints, its curve and its network."""


@dataclass(frozen=True)
class Material:
    """Decoded clips, in memory."""

    train: Clips
    held_out: Clips
    """A motion and bodies of their own."""
    real: Clips
    """The demo's training clips: the VAE sees them, the network does not."""
    fingerprint: str
    """Of the datasets."""


@app.command()
def main(
    output: Annotated[Path, typer.Option(help="Folder for clips and checkpoints; the same command goes on.")] = Path(
        "out/demo_base"
    ),
    folder: Annotated[Path, typer.Option(help="Where the base is left.")] = demo.BASE,
    seconds: Annotated[
        float, typer.Option(min=1, help="Of training; a longer one goes on, with the VAE it has.")
    ] = 3600.0,
    rendered: Annotated[int, typer.Option(min=8, help="Rendered clips to train on.")] = 2048,
    held_out: Annotated[int, typer.Option(min=4, help="Rendered clips to judge by.")] = 64,
    threads: Annotated[int, typer.Option(min=1, help="torch's CPU threads.")] = 1,
    config_file: cli.ConfigFile = None,
    set_: cli.Set = None,
    dry_run: cli.DryRun = False,
    verbose: cli.Verbose = False,
) -> None:
    """Make clips, train a VAE, then a network on small clips and on whole ones; leave the base and its record."""

    def work() -> dict[str, Any]:
        experiment = cli.settings(config.Experiment, "demo_base", config_file, set_)
        parts = divided(experiment, seconds, output)
        if dry_run:
            message = ", then ".join(f"{p.experiment.train.seconds:g} s on {p.experiment.data.shape}" for p in parts)
            vae_s = VAE_SHARE * seconds
            terminal.console.print(
                f"Would render {rendered} clips, train a VAE for {vae_s:g} s, a network for {message}, "
                f"and leave {folder}."
            )
            return {}
        claim.take(output, "demo_base", {"--rendered": rendered, "--held-out": held_out})
        torch.set_num_threads(threads)
        material = clips(experiment.data.shape, output, rendered, held_out, verbose=verbose)
        return run(parts, material, output, folder, VAE_SHARE * seconds)

    cli.run("demo_base", None if dry_run else output, work, verbose=verbose)


def divided(experiment: Experiment, seconds: float, output: Path) -> tuple[Part, Part]:
    """The experiment on small clips, and then on whole ones, each with its share of the seconds."""
    whole, small, left_s = experiment.data.shape, SMALL.of(experiment.data.shape), (1 - VAE_SHARE) * seconds

    def part(name: str, base: dict[str, Any], shape: ClipShape, share: float, clips: int, cooldown: float) -> Part:
        values = config.merge(
            experiment.model_dump(),
            {
                "data": {"shape": shape.model_dump(), "batch_size": clips},
                "train": {
                    "steps": None, "seconds": share * left_s, "cooldown_share": cooldown,
                    "held_out_every": 1_000_000_000,  # judged here, before and after
                },
            },
        )  # fmt: skip
        return Part(name, config.build({**values, "model": {**values["model"], **base}}), output / name)

    batch = experiment.data.batch_size
    return (
        part("small", {"vae": str(output / "vae")}, small, SMALL_SHARE, SMALL_BATCH, SMALL_COOLDOWN),
        part(
            "whole",
            {"init": {}, "base": str(output / "small" / "model"), "vae": "auto"},
            whole,
            1 - SMALL_SHARE,
            batch,
            COOLDOWN,
        ),
    )


# ---- clips ----


def clips(shape: ClipShape, output: Path, rendered: int, held_out: int, *, verbose: bool) -> Material:
    """Make the clips that are not there yet, and decode them all."""
    with session.ray_cluster(2, verbose=verbose):
        mocap.run(output / "rendered", "varied", rendered, held_out, shape, 0)
        demo.prepared(output, shape, verbose=verbose)
    dataset, real = shards.read_dataset(output / "rendered"), shards.read_dataset(output / "real" / "shards")
    fingerprint = config.digest(dataset.fingerprint, real.fingerprint)
    return Material(decoded(dataset, "train"), decoded(dataset, "held_out"), decoded(real, "train"), fingerprint)


def decoded(dataset: shards.Dataset, split: str) -> Clips:
    """All clips of a split; positions count from 0."""
    numbers = np.arange(dataset.clips(split))
    return clip_stream.to_clips({**clip_stream.decode(dataset, split, numbers), "position": numbers})


def some(of: Clips, numbers: np.ndarray, positions: np.ndarray) -> Clips:
    """Clips by their number, put at some positions of a run."""
    rows = torch.from_numpy(numbers)
    return Clips(of.video[rows], of.reference[rows], of.pose[rows], torch.from_numpy(positions))


# ---- training ----


def run(parts: tuple[Part, ...], material: Material, output: Path, folder: Path, vae_s: float) -> dict[str, Any]:
    """Train the VAE, then part after part; write the base, its record and a picture of what it draws."""
    vae = encoder(material, output / "vae", vae_s)
    curves, seen, took = {"vae": vae["curve"]}, 0, vae["seconds"]
    for part in parts:
        done = trained(part, material)
        curves[part.name] = done["curve"]
        seen, took = seen + done["clips"], took + done["seconds"]
    last = parts[-1]
    family, shape = models.family(last.experiment.model.family), last.experiment.data.shape
    network = family.load(last.experiment.model.model_copy(update={"base": str(last.folder / "model")}))
    record = {
        "command": cli.command(), "commit": cli.commit(), "device": common.describe("cpu"),
        "seconds": round(took, 1), "clips_seen": seen,
    }  # fmt: skip
    network = replace(network, provenance={})  # the record says it, and no folder of this machine
    for part in (network.network, network.vae):
        part.register_to_config(_name_or_path=folder.name)
    network.network.half()
    network.vae.half()
    network.save(folder, shape=shape, **record)
    stored = family.load(config.Model(family=last.experiment.model.family, base=str(folder), conditions=["reference"]))
    figures = record | {
        "held_out_loss": judged(stored, material.held_out),
        "parameters": sum(parameter.numel() for parameter in stored.network.parameters()),
        "bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        "clips": len(material.train.position),
        "vae_psnr_db": {
            name: vae_psnr(stored, of) for name, of in (("held_out", material.held_out), ("real", material.real))
        },
        "shape": shape.model_dump(),
    }
    common.write(
        "demo_base", [figures], device="cpu", repeats=1,
        more={"curves": curves, "settings": {part.name: config.settings(part.experiment) for part in parts}},
    )  # fmt: skip
    picture = drawn(stored, material, shape, output / "samples.png")
    terminal.console.print(f"The base is in {folder}; what it draws: {picture}")
    return figures | {"base": str(folder), "picture": str(picture)}


def encoder(material: Material, folder: Path, seconds: float) -> dict[str, Any]:
    """Train the VAE, unless there is one, which the networks' checkpoints belong to; its figures. A kill loses what it
    had learnt."""
    done, key = folder.with_suffix(".json"), config.digest(material.fingerprint, demo_vae.CONFIGURATION)
    if (known := _read(done)).get("key") == key:
        return known
    figures = {"key": key, **demo_vae.train(frames(material), seconds, folder, terminal.console.print)}
    files.write_json(done, figures)
    return figures


def frames(material: Material) -> demo_vae.Frames:
    """Batches for the VAE: frames of rendered and of real clips, and their poses as they are drawn."""
    lot = np.random.default_rng(0)

    def some_frames() -> torch.Tensor:
        parts = []
        for _ in range(FRAMES_AT_ONCE // 2):
            of = material.real if lot.random() < SHOWN_REAL else material.train
            clip = of.part(slice(number := int(lot.integers(len(of.position))), number + 1))
            height, width = clip.reference.shape[1:3]
            is_pose = lot.random() < SHOWN_POSES
            parts.append(
                (skeleton.draw(clip.pose, height, width) if is_pose else yuv420_to_rgb(clip.video)).flatten(0, 1)
            )
        every = torch.cat(parts)
        return every[torch.from_numpy(lot.permutation(len(every))[:FRAMES_AT_ONCE])].unsqueeze(2)

    return some_frames


def trained(part: Part, material: Material) -> dict[str, Any]:
    """Train a part to its end, from its newest checkpoint if it has one; its figures."""
    experiment, folder = part.experiment, part.folder
    done = folder / "done.json"
    settings = {name: value for name, value in config.settings(experiment).items() if name != "train.seconds"}
    key = config.digest(settings, material.fingerprint, fingerprints.base(experiment.model))
    if (known := _read(done)).get("key") == key and known["seconds"] >= experiment.train.seconds:
        return known
    denoiser = models.family(experiment.model.family).load(experiment.model, "cpu", experiment.train.seed)
    state = start(denoiser.network, experiment)
    if name := checkpoint.newest(folder / "checkpoints"):
        checkpoint.load(folder / "checkpoints", name, denoiser.network, state, key)
    curve = [point for point in _read(folder / "curve.json").get("curve", []) if point["step"] <= state.step]
    batches = _batches(experiment, encoded(denoiser, material.train, experiment.data.shape))
    sample = next(batches(experiment.data.shape, 0))
    found = cei.blocks_in_order(blocks(denoiser.network), denoiser.predict, sample.part(slice(0, 1)))
    held_out = [latents.encode(denoiser, material.held_out.part(slice(0, 2)).resized(experiment.data.shape))]
    recent, saved = [], time.monotonic()
    for step in fit(denoiser, found, batches, held_out, sample, None, experiment, state):
        recent.append(step.loss)
        if step.step % CURVE_EVERY == 0:
            curve.append(
                {"step": step.step, "seconds": round(step.charged_s, 1), "loss": round(float(np.mean(recent)), 4)}
            )
            recent.clear()
            total = experiment.train.seconds
            terminal.console.print(
                f"{part.name}: {step.charged_s:.0f}/{total:.0f} s, step {step.step}, {curve[-1]['loss']}"
            )
        if time.monotonic() - saved > SAVE_EVERY_S or step.last:
            checkpoint.save(folder / "checkpoints", denoiser.network, state, key, keep=2)
            files.write_json(folder / "curve.json", {"curve": curve})
            saved = time.monotonic()
    denoiser.save(folder / "model", shape=experiment.data.shape)
    figures = {"key": key, "curve": curve, "clips": state.position, "seconds": state.seconds.total}
    files.write_json(done, figures)
    return figures


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def encoded(denoiser: Denoiser, clips: Clips, shape: ClipShape) -> Latents:
    """All clips at a shape; what repeats over frames is kept once."""
    parts = []
    for first in range(0, len(clips.position), ENCODED_AT_ONCE):
        batch = denoiser.encode(clips.part(slice(first, first + ENCODED_AT_ONCE)).resized(shape))
        parts.append((batch.clean, batch.conditions["reference"][:, :, :1].clone()))
    clean, reference = (torch.cat(each) for each in zip(*parts, strict=True))
    return Latents(clean, {"reference": reference.expand_as(clean)}, clips.position)


def _batches(experiment: Experiment, of: Latents):
    seed, size = experiment.train.seed, experiment.data.batch_size

    def open_at(shape: ClipShape, position: int) -> Iterator[Latents]:
        while True:
            positions = position + np.arange(size)
            rows = torch.from_numpy(clip_stream.clips_at(positions, len(of.position), seed))
            conditions = {name: value[rows] for name, value in of.conditions.items()}
            yield Latents(of.clean[rows], conditions, torch.from_numpy(positions))
            position += size

    return open_at


# ---- what came of it ----


def judged(denoiser: Denoiser, held_out: Clips) -> float:
    """Loss of rendered people in a motion that was not trained on."""
    parts = [held_out.part(slice(i, i + 4)) for i in range(0, min(JUDGED, len(held_out.position)), 4)]
    batches = [latents.encode(denoiser, part) for part in parts]
    return losses.held_out_loss(denoiser, batches, 2, 0)


def vae_psnr(denoiser: Denoiser, clips: Clips) -> float:
    """Of some clips that went through the VAE and back."""
    video = yuv420_to_rgb(clips.part(slice(0, JUDGED)).video)
    return round(demo_vae.psnr_db(denoiser.vae, video.flatten(0, 1).unsqueeze(2)), 2)


def drawn(denoiser: Denoiser, material: Material, shape: ClipShape, path: Path) -> Path:
    """A picture of reference, drawn clip and truth for some held-out clips."""
    of = material.held_out
    numbers = np.linspace(0, len(of.position) - 1, SHOWN).round().astype(int)
    motions = rendering.motions_of(some(of, numbers, np.arange(SHOWN)), [f"held out {number}" for number in numbers])
    made = rendering.make(denoiser, motions, shape, Generate(steps=SHOWN_STEPS))
    rows = [
        (f"{motion.name}: reference, drawn, truth", np.concatenate([motion.reference[None], clip, motion.video]))
        for motion, clip in zip(motions, made, strict=True)
    ]
    return sheet.contact_sheet(rows, path, columns=1 + 2 * shape.frames)


if __name__ == "__main__":
    app()
