"""Trainings by the command, as a person types it: what `benchmarks.gpu_check` measures of them."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn import functional

from benchmarks import step_cost
from benchmarks.gpu_common import FP8_WAN, Row, SkippedError
from benchmarks.tiny_families import TINY
from entprog import config, models
from entprog.config import ClipShape

CLIPS = 8
SHAPE = ClipShape(frames=5, height=64, width=32)
STEPS, KEPT = 8, 4
"""Of a training, and between its checkpoints."""
TRAINING = (
    f"train.steps={STEPS}", "train.samples=0", "data.batch_size=2", "data.held_out_clips=2", "data.latents=require",
    "data.shape.frames=5", "data.shape.height=64", "data.shape.width=32", "schedule.kind=full", "model.dtype=bfloat16",
)  # fmt: skip
QUARTER = ("schedule.kind=lisa", "schedule.lisa_share=0.25", "schedule.stages=1")
"""Moments of all of a large network are much to look through and to write."""
OTHERS = (
    "train.parallel=fsdp", "train.optimizer=adamw_bf16", "train.ema_decay=0.9", f"train.preview_every={KEPT}",
    f"train.checkpoint_every={KEPT}",
)  # fmt: skip


def train_rows(device: str) -> Iterator[Row]:
    """`prepare --latents` and `train` on encoded clips of moving patterns, with a tiny Wan and its VAE: how long the
    start-up takes, part by part."""
    with encoded(device) as (place, row):
        yield row
        yield trained(place, "tiny")


def large_rows(device: str) -> Iterator[Row]:
    """The same with one of 1.3B's shape, of which a quarter of the blocks is trained."""
    with encoded(device) as (place, _):
        base_of(step_cost.network_of(*((4, 1, False) if device == "cpu" else (30, 12, True))), place / "large", device)
        yield trained(place, "large", QUARTER)


def other_rows(device: str) -> Iterator[Row]:
    """A training in parts, with averages and previews; resumed from the checkpoint in its middle; and what `generate`
    makes of it."""
    with encoded(device) as (place, _):
        yield trained(place, "tiny", OTHERS)
        output = place / "run tiny"
        shutil.rmtree(output / "checkpoints" / f"step-{STEPS:08d}")
        (output / "finished.json").unlink()
        row = trained(place, "tiny", OTHERS)
        yield row | {"previews": len(list((output / "previews").glob("step-*")))}
        yield ran(place, "clips", ["generate", "--checkpoint", str(output), "--shards", "shards", "--count", "1"])


@contextmanager
def encoded(device: str) -> Iterator[tuple[Path, Row]]:
    """A folder with a base, `tiny`, and `shards` whose latents are cached; and the row of that."""
    for package in ("ray", "mlflow", "pyarrow", "av"):
        if importlib.util.find_spec(package) is None:
            raise SkippedError(f"{package} is not installed")
    from benchmarks import stream  # here: what reads and writes shards is needed for these parts alone

    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        frames = [pattern(number) for number in range(CLIPS + 2)]
        rows = [stream.row_of(f"pattern#{number}", each, SHAPE) for number, each in enumerate(frames)]
        stream.write_rows(place / "shards", rows, SHAPE, held_out=2)
        base_of(FP8_WAN, place / "tiny", device)
        yield place, ran(place, "shards", ["prepare", "--latents", "--base", "tiny"])


def trained(place: Path, base: str, settings: tuple[str, ...] = ()) -> Row:
    words = [word for pair in (*TRAINING, *settings) for word in ("--set", pair)]
    row = ran(place, f"run {base}", ["train", "--shards", "shards", "--base", base, *words])
    return {**row, "base": base}


def ran(place: Path, output: str, words: list[str]) -> Row:
    """A command's row. Raises RuntimeError with the last lines of a command that fails."""
    run_job(place, [sys.executable, "-m", f"pipelines.{words[0]}", *words[1:], "--output", output])
    result = json.loads((place / output / "result.json").read_text())
    kept = ("status", "seconds", "startup_s", "stalls", "peak_memory_bytes")
    return {"command": words[0]} | {key: result[key] for key in kept if key in result}


def run_job(place: Path, words: list[str]) -> None:
    """Raises RuntimeError with the last lines of a command that fails."""
    own = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    paths = [str(Path(__file__).resolve().parents[1]), *filter(None, [own.get("PYTHONPATH")])]
    own |= {"MLFLOW_TRACKING_URI": f"sqlite:///{place}/mlflow.db", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(words, cwd=place, env=own, capture_output=True, text=True)
    if done.returncode:
        said = [line.strip() for line in f"{done.stdout}\n{done.stderr}".splitlines() if line.strip()]
        raise RuntimeError(f"{' '.join(words[2:4])} ended with {done.returncode}: {' | '.join(said[-12:])[-1500:]}")


def pattern(number: int):
    """A moving pattern, uint8 RGB [F, H, W, 3]."""
    generator = torch.Generator().manual_seed(number)
    coarse = torch.rand(1, 3, SHAPE.frames, 4, 2, generator=generator)
    size = (SHAPE.frames, SHAPE.height, SHAPE.width)
    fine = functional.interpolate(coarse, size=size, mode="trilinear")[0]
    return (fine.permute(1, 2, 3, 0) * 255).to(torch.uint8).contiguous().numpy()


def base_of(sizes: Row, folder: Path, device: str) -> None:
    """A Wan of random bfloat16 weights with a tiny VAE, as training leaves it."""
    kind, vae_sizes = TINY["wan"]["vae"]
    vae = folder.with_name("vae")
    torch.manual_seed(0)
    kind(**vae_sizes).save_pretrained(vae)
    of_vae = {"out_channels": vae_sizes["z_dim"], "patch_size": [1, 2, 2]}
    inits = [{"init": {**given, **of_vae}, "vae": str(vae)} for given in (FP8_WAN, sizes)]
    settings = [config.build(init, config.Model) for init in inits]
    family = models.family("wan")
    tiny, configuration = family.load(settings[0], "cpu", 0), family.inspect(settings[1]).network.config
    with torch.device(device):  # its weights alone: a CPU takes half a minute for a billion
        network = tiny.NETWORK.from_config(configuration)
        tiny.initialise(network)
    replace(tiny, network=network.bfloat16().cpu()).save(folder, shape=SHAPE)
