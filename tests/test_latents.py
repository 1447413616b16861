"""Cached latents: the same batches bit for bit, made and used by the real commands with a real (tiny) VAE."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors import safe_open
from typer.testing import CliRunner

from benchmarks.tiny_families import TINY as TINY_FAMILIES
from entprog import config, files, models
from entprog.config import ClipShape
from entprog.data import clip_stream, latents, shards
from entprog.errors import UserError
from entprog.models import fingerprints
from entprog.schedule import plans
from helpers import families, real_clips, stores
from helpers.commands import PATIENCE_S
from helpers.networks import TINY
from pipelines import cli, prepare, train
from pipelines.preparing import latents as caching
from pipelines.stream import batches, feed
from pipelines.training import checks, expectation

SHAPE = ClipShape(frames=5, height=64, width=32, fps=12)
BATCH = 2


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> Path:
    torch.manual_seed(3)
    sizes = {"base_dim": 8, "z_dim": 4, "num_res_blocks": 1}
    folder = tmp_path_factory.mktemp("vae")
    scale = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.5, 0.5, 2.0, 1.0]}
    AutoencoderKLWan(**sizes, **scale).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(vae, tmp_path_factory) -> Path:
    """A tiny Wan with that VAE, as training leaves it."""
    settings = {"init": {**TINY, "out_channels": 4, "patch_size": [1, 2, 2]}, "vae": str(vae)}
    denoiser = models.family("wan").load(config.build(settings, config.Model), "cpu", 0)
    folder = tmp_path_factory.mktemp("base") / "model"
    denoiser.save(folder, shape=SHAPE)
    return folder


@pytest.fixture(scope="module")
def denoiser(base):
    return models.family("wan").load(config.build({"base": str(base)}, config.Model), "cpu", 0)


@pytest.fixture(scope="module")
def rows():
    return [real_clips.row("cam01", "train", 0.1 * i, SHAPE) for i in range(11)]


@pytest.fixture
def dataset(rows, tmp_path) -> shards.Dataset:
    return fresh(rows, tmp_path / "shards")


def fresh(rows, folder) -> shards.Dataset:
    held_out = [real_clips.row("cam04", "held_out", 0.2, SHAPE)]
    return real_clips.write(folder, {"train": [rows[:4], rows[4:6], rows[6:]], "held_out": [held_out]}, SHAPE)


def cached(dataset, denoiser, shape=SHAPE, clip_bytes=1, halves=False) -> latents.Cache:
    """A cache made in this process. clip_bytes: decides how many clips share a file."""
    folder = latents.folder_of(dataset, latents.key(denoiser, "wan", shape))
    files, before, tensors = [], 0, {}
    for piece in latents.pieces(dataset, clip_bytes):
        batch = clip_stream.decode(dataset, "train", np.arange(before, before := before + piece.clips))
        encoded = caching.encoded(denoiser, batch, shape, "cpu")
        files.append(latents.write(folder, piece, encoded, halves=halves))
        one = denoiser.encode(clip_stream.to_clips({**batch, "position": np.arange(piece.clips)}).resized(shape))
        tensors = {"clean": one.clean} | {f"conditions.{name}": value for name, value in one.conditions.items()}
    shapes = {name: tuple(value.shape[1:]) for name, value in tensors.items()}
    return latents.finish(folder, shapes, files, {})


def read(cache, numbers):
    arrays = {**latents.read(cache, np.array(numbers)), "position": np.array(numbers)}
    return latents.to_latents(arrays, cache.shapes, clip_stream.to_device)


def assert_same_bits(found, due):
    assert found.clean.dtype == due.clean.dtype == torch.float32
    assert torch.equal(found.position, due.position) and torch.equal(found.clean, due.clean)
    assert found.conditions.keys() == due.conditions.keys() == {"reference", "pose"}
    for name, value in due.conditions.items():
        assert torch.equal(found.conditions[name], value), name


# ---- the format ----


def test_read_in_any_order_is_what_the_stream_encodes(dataset, denoiser):
    cache = cached(dataset, denoiser, clip_bytes=latents.FILE_BYTES // 2)  # files of 2 clips at most
    assert [file.piece.clips for file in cache.files] == [2, 2, 2, 2, 2, 1]
    for numbers in ([3, 0, 10], [7, 7, 1, 6], list(range(11))):
        batch = {**clip_stream.decode(dataset, "train", np.array(numbers)), "position": np.array(numbers)}
        assert_same_bits(read(cache, numbers), latents.encode(denoiser, clip_stream.to_clips(batch)))


def test_what_repeats_is_stored_once(dataset, denoiser):
    stored = latents.read(cached(dataset, denoiser), np.array([0]))
    assert stored["clean"].shape == (1, 4, 2, 8, 4) and stored["conditions.reference"].shape == (1, 4, 1, 8, 4)


def test_a_smaller_shape_has_a_cache_of_its_own(dataset, denoiser):
    small = SHAPE.model_copy(update={"frames": 1})
    cache = cached(dataset, denoiser, small)
    batch = {**clip_stream.decode(dataset, "train", np.array([5, 2])), "position": np.array([5, 2])}
    assert_same_bits(read(cache, [5, 2]), latents.encode(denoiser, clip_stream.to_clips(batch).resized(small)))
    assert latents.find(dataset, latents.key(denoiser, "wan", SHAPE)) is None


def test_the_key_is_the_vae_and_what_it_encodes(denoiser, base, vae):
    key = latents.key(denoiser, "wan", SHAPE)
    again = models.family("wan").load(config.build({"base": str(base)}, config.Model), "cpu", 1)
    with torch.no_grad():
        next(again.network.parameters()).add_(1)  # the network that is trained encodes nothing
    assert latents.key(again, "wan", SHAPE) == key
    assert latents.key(denoiser, "wan", SHAPE.model_copy(update={"frames": 1})) != key
    assert latents.key(replace(denoiser, conditions=("reference",)), "wan", SHAPE) != key
    with torch.no_grad():
        next(again.vae.parameters()).add_(1)
    assert latents.key(again, "wan", SHAPE) != key


def test_a_cache_is_of_the_shards_as_they_are(rows, dataset, denoiser):
    cache = cached(dataset, denoiser)
    key = latents.key(denoiser, "wan", SHAPE)
    assert latents.find(dataset, key) == cache
    grown = [rows[:4], rows[4:6], rows[6:], rows[:1]]
    infos = {"train": grown, "held_out": []}
    assert latents.find(real_clips.write(dataset.folder, infos, SHAPE), key) is None
    # Of the shards that are still the same nothing has to be done again.
    again = shards.read_dataset(dataset.folder)
    done = [latents.written(cache.folder, piece) for piece in latents.pieces(again, 1)]
    assert [file is not None for file in done] == [True, True, True, False]


def test_damage_is_found(dataset, denoiser):
    cache = cached(dataset, denoiser)
    path = cache.folder / cache.files[1].piece.file
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    latents.verify(cache, "size")
    with pytest.raises(latents.DamagedLatentsError, match=path.name):
        latents.verify(cache, "sha256")
    assert latents.written(cache.folder, cache.files[1].piece) is None
    with pytest.raises(latents.DamagedLatentsError, match=f"{path.name}, row"):
        read(cache, [4, 5])
    read(cache, [0, 6])
    path.unlink()
    with pytest.raises(latents.DamagedLatentsError, match=path.name):
        latents.verify(cache, "size")
    (cache.folder / "latents.json").write_text("{")
    with pytest.raises(latents.DamagedLatentsError, match=r"latents\.json"):
        latents.find(dataset, latents.key(denoiser, "wan", SHAPE))


# ---- what encodes ----


def with_vae(name, folder):
    """A tiny base of a family with its VAE, whose network's weights are gone; the denoiser that it was."""
    kind, sizes = TINY_FAMILIES[name]["vae"]
    torch.manual_seed(3)
    kind(**sizes).save_pretrained(folder / "vae")
    before = families.load(name, vae=str(folder / "vae"), init=TINY_FAMILIES[name]["init"] | {"out_channels": 4})
    before.save(folder / "base")
    for file in (folder / "base" / before.PART).glob("*.safetensors"):
        file.unlink()
    return before


@pytest.mark.parametrize("name", [name for name in families.NAMES if name != "cogvideox15"])
def test_what_encodes_needs_no_weights_of_the_network(name, tmp_path):
    before = with_vae(name, tmp_path)
    family = models.family(TINY_FAMILIES[name]["family"])
    settings = config.Model(family=TINY_FAMILIES[name]["family"], base=str(tmp_path / "base"))
    with pytest.raises(UserError, match="no weights"):
        family.load(settings)
    encoder = family.encoder(settings)
    assert next(encoder.network.parameters()).is_meta and encoder.device == torch.device("cpu")
    assert latents.key(encoder, name, families.FIVE) == latents.key(before, name, families.FIVE)
    due, found = before.encode(families.clips()), encoder.encode(families.clips())
    assert torch.equal(due.clean, found.clean) and due.conditions.keys() == found.conditions.keys()
    assert all(torch.equal(value, found.conditions[c]) for c, value in due.conditions.items())


def test_the_command_encodes_by_a_base_without_its_network(dataset, base, tmp_path):
    """What its tasks run, up to a finished cache."""
    bare = tmp_path / "bare"
    shutil.copytree(base, bare, ignore=shutil.ignore_patterns("diffusion_pytorch_model*"))
    shutil.copytree(base / "vae", bare / "vae", dirs_exist_ok=True)
    encoding = config.build({"model": {"base": str(bare)}, "schedule": {"kind": "full"}}, config.Encoding)
    assert caching.check_model(encoding, SHAPE) == [SHAPE]
    (estimate,) = caching.estimates([(dataset, SHAPE)], encoding)
    whole = models.family("wan").load(config.build({"base": str(base)}, config.Model))
    assert estimate.key == latents.key(whole, "wan", SHAPE) and estimate.clip_bytes > 0


def test_datasets_and_shapes_that_are_encoded_together_are_what_each_is_alone(rows, base, denoiser, tmp_path):
    """By the operators that Ray Data runs, in whatever order; what was there before is not made again."""
    six = real_clips.write(tmp_path / "six", {"train": [rows[:4], rows[4:6]], "held_out": []}, SHAPE)
    two = [fresh(rows, tmp_path / "eleven"), six]
    shapes = [SHAPE, SHAPE.model_copy(update={"frames": 1})]
    asked = [(dataset, shape) for dataset in two for shape in shapes]
    encoding = config.build({"model": {"base": str(base)}}, config.Encoding)
    made = [replace(estimate, clip_bytes=1) for estimate in caching.estimates(asked, encoding)]
    works = [caching.Work.of(dataset, estimate) for (dataset, _), estimate in zip(asked, made, strict=True)]
    files = [file for work in works for file in work.left()]
    assert [work.clips_before for work in works] == [0] * 4 and sum(file.piece.clips for file in files) == 2 * 17
    assert {file.shape for file in files} == set(shapes) and all(file.folder.is_absolute() for file in files)
    encoder = caching.Encode(encoding, files)
    for number in reversed(range(len(files))):
        batch = caching._decode({"number": np.array([number])}, files)
        (found,) = encoder(batch)["number"]
        assert found == number
    for (dataset, shape), estimate in zip(asked, made, strict=True):
        again = caching.Work.of(dataset, estimate)
        assert not again.left() and again.clips_before == dataset.clips("train")
        again.finish("wan")
        cache = latents.find(dataset, latents.key(denoiser, "wan", shape))
        latents.verify(cache, "sha256")
        numbers = list(range(dataset.clips("train")))
        batch = {**clip_stream.decode(dataset, "train", np.array(numbers)), "position": np.array(numbers)}
        due = latents.encode(denoiser, clip_stream.to_clips(batch).resized(shape))
        assert_same_bits(read(cache, numbers), due)


@pytest.mark.parametrize("name", ["wan", "cogvideox", "hunyuan_video", "svd", "latte"])
def test_latents_in_bfloat16_take_half_the_space_and_are_the_streams_to_the_bit(name, tmp_path, rows):
    dataset = real_clips.write(tmp_path / "few", {"train": [rows[:2], rows[2:3]], "held_out": []}, SHAPE)
    plain = with_vae(name, tmp_path)
    given = {"family": TINY_FAMILIES[name]["family"], "base": str(tmp_path / "base")}
    half = models.family(given["family"]).encoder(config.Model(**given, vae_dtype="bfloat16"))
    assert latents.key(half, name, SHAPE) != latents.key(plain, name, SHAPE)
    numbers = list(range(3))
    batch = {**clip_stream.decode(dataset, "train", np.array(numbers)), "position": np.array(numbers)}
    due = latents.encode(half, clip_stream.to_clips(batch))
    exact = latents.encode(plain, clip_stream.to_clips(batch))
    assert due.clean.dtype == torch.float32 and not torch.equal(due.clean, exact.clean)
    assert (due.clean - exact.clean).norm() < 0.05 * exact.clean.norm()

    caches = {}
    for denoiser, halves in ((half, True), (plain, False)):
        cache = cached(dataset, denoiser, halves=halves)
        caches[halves] = cache
        latents.verify(cache, "sha256")
        pieces = latents.pieces(dataset, 1)
        assert all(latents.written(cache.folder, piece) for piece in pieces)
    found = read(caches[True], numbers)
    assert torch.equal(found.clean, due.clean)
    assert all(torch.equal(value, found.conditions[c]) for c, value in due.conditions.items())
    with safe_open(caches[True].folder / caches[True].files[0].piece.file, "numpy") as file:
        assert file.get_tensor("clean").dtype == np.uint16
    assert caches[True].clip_bytes < (0.8 if name == "svd" else 0.62) * caches[False].clip_bytes


def test_a_vae_that_encodes_in_bfloat16_makes_other_scores_and_held_out_losses(dataset):
    settings = {"data": {"shape": SHAPE.model_dump(), "held_out_clips": 1}, "train": {"steps": 1}}
    keys = {
        fingerprints.held_out(config.build(config.merge(settings, {"model": {"vae_dtype": kind}})), dataset)
        for kind in ("float32", "bfloat16")
    }
    assert len(keys) == 2


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"train": {"steps": 1000}}, "364 times each, which takes 201 TFLOP a clip in float32, 0.67 times what full"),
        ({"train": {"steps": 1000}, "model": {"gradient_checkpointing": True}}, "0.502 times what"),
        (
            {"train": {"seconds": 3600}, "model": {"vae_dtype": "bfloat16"}},
            "encodes its clips, which takes 201 TFLOP a",
        ),
        ({"train": {"steps": 999}}, None),
        ({"train": {"seconds": 60}}, None),
        ({"train": {"steps": 1000}, "data": {"latents": "never"}}, None),
        ({"train": {"steps": 1000}, "data": {"batch_size": 1}, "clips": 900}, None),
    ],
)
def test_a_long_run_without_a_cache_is_told_what_encoding_costs(settings, said):
    clips = settings.get("clips", 11)
    parts = {name: value for name, value in settings.items() if name != "clips"}
    experiment = config.build(config.merge({"data": {"batch_size": 4}}, parts))
    line = expectation.encoding(experiment, clips, 201e12, 100e12)
    assert line is None if said is None else said in line and "prepare --latents" in line and "\n" not in line


@pytest.mark.parametrize("preset", ["wan21_t2v_1_3b", "svd"])
def test_the_command_that_is_proposed_makes_the_latents_that_the_run_reads(preset):
    pairs = ["train.steps=9", "model.base=my bases/it's #1", "data.shards=shards of mine"]
    experiment = cli.settings(config.Experiment, preset, None, pairs)
    words = shlex.split(batches.caching(experiment))
    assert words[:6] == ["python", "-m", "pipelines.prepare", "--latents", "--output", "shards of mine"]
    assert set(words[6::2]) == {"--set"}
    of_clips, of_model = caching.mine(words[7::2])
    encoding = cli.settings(config.Encoding, None, None, of_model)
    ladders = [plans.ladder(each.schedule, experiment.data.shape, last=False) for each in (encoding, experiment)]
    assert not of_clips and encoding.model == experiment.model and ladders[0] == ladders[1] and len(ladders[0]) == 2


def test_it_is_said_for_which_schedule_latents_are_made():
    for schedule, said in (
        ({}, "schedule.kind=progressive, by default: "),
        ({"kind": "entprog"}, "entprog: 1 frames"),
    ):
        encoding = config.build({"schedule": schedule}, config.Encoding)
        line = caching.wanted(encoding, shapes := [SHAPE.model_copy(update={"frames": 1}), SHAPE])
        assert said in line and f"{shapes[0]}; {shapes[1]}" in line, line


# ---- the real commands ----


@pytest.fixture(scope="module")
def place(tmp_path_factory, local_ray):
    folder = tmp_path_factory.mktemp("latents")
    os.environ["MLFLOW_TRACKING_URI"] = stores.made(folder)
    yield folder
    del os.environ["MLFLOW_TRACKING_URI"]


def prepare_latents(*arguments, status=0):
    result = CliRunner().invoke(prepare.app, ["--latents", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == status, result.output
    return result


def test_ray_encodes_on_cpus_and_takes_the_same_on_gpus(rows, base, denoiser, tmp_path, local_ray):
    """Ray Data asks for a number of rows in a batch where GPUs work on it."""
    import ray

    dataset = real_clips.write(tmp_path / "few", {"train": [rows[:2], rows[2:3]], "held_out": []}, SHAPE)
    encoding = config.build({"model": {"base": str(base)}}, config.Encoding)
    (estimate,) = caching.estimates([(dataset, SHAPE)], encoding)
    work = caching.Work.of(dataset, estimate)
    caching._encoding(ray, work.left(), encoding, encoders=1, gpus=1)  # as far as it goes where there is none
    (done,) = caching._encode_all(ray, [work], encoding, encoders=1, gpus=0)
    done.finish("wan")
    batch = {**clip_stream.decode(dataset, "train", np.arange(3)), "position": np.arange(3)}
    due = latents.encode(denoiser, clip_stream.to_clips(batch).resized(SHAPE))
    assert_same_bits(read(latents.find(dataset, estimate.key), range(3)), due)


@pytest.mark.slow
def test_the_command_a_kill_in_the_middle_and_training_from_them(place, rows, base, denoiser):
    dataset = fresh(rows, place / "shards")
    small = ["--set", "schedule.kind=progressive", "--set", "schedule.table=[{until: 0.5, frames: 1}, {until: 1}]"]
    arguments = ["--output", dataset.folder, "--base", base, *small]
    message = " ".join(prepare_latents(*arguments, "--dry-run").output.split())
    assert "latents of 11 clips of 5 frames of 32x64" in message and "take about" in message
    assert "latents of 11 clips of 1 frames of 32x64" in message
    assert not (dataset.folder / "latents").exists()

    command = [sys.executable, "-m", "pipelines.prepare", "--latents", *map(str, arguments)]
    own = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}  # the other Ray here is closed
    killed = subprocess.Popen(command, env=own, stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.time() + PATIENCE_S
    while not (written := list(dataset.folder.rglob("*.safetensors"))):
        assert time.time() < deadline and killed.poll() is None, "nothing was written"
        time.sleep(0.005)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    first = {path: path.stat().st_mtime_ns for path in written}

    assert f"done: {dataset.folder / 'latents'}" in "".join(prepare_latents(*arguments).output.splitlines())
    assert {path: path.stat().st_mtime_ns for path in written} == first
    record = json.loads((dataset.folder / "result.json").read_text())["latents"]
    assert sum(made["done_before"] for made in record) > 0
    small, cache = (latents.find(dataset, made["key"]) for made in record)
    assert record[1]["clips"] == 11 and cache is not None
    latents.verify(small, "sha256")
    latents.verify(cache, "sha256")

    stream = feed.latent_stream(cache, BATCH, rank=1, world=2, start_position=8, seed=5)
    plain = clip_stream.local_stream(dataset, "train", SHAPE, BATCH, rank=1, world=2, start_position=8, seed=5)
    for _ in range(6):  # over the end of an epoch
        assert_same_bits(next(stream), latents.encode(denoiser, next(plain)))
    stream.close()

    both = {}
    for use in ("require", "never"):
        settings = {
            "model": {"base": str(base)},
            "data": {"shards": str(dataset.folder), "shape": SHAPE.model_dump(), "batch_size": BATCH, "latents": use},
            "train": {"steps": 6, "threads": 1, "samples": 0},
            "schedule": {"kind": "full"},
        }
        both[use] = train.run(config.build(settings), place / use)
    assert both["require"]["losses"] == both["never"]["losses"]
    assert both["require"]["held_out_loss"] == both["never"]["held_out_loss"]
    assert both["require"]["stalls"]["encode_s"] == 0 < both["never"]["stalls"]["encode_s"]
    assert both["never"]["stalls"]["open_s"] == 0 == both["never"]["spilled_bytes"]  # the start is no part of a run


def test_every_byte_of_shards_and_latents_is_read_once_a_run_whatever_the_number_of_ranks(
    rows, base, denoiser, tmp_path, monkeypatch
):
    """Of shards by the driver, whatever the phases; of latents by rank 0."""
    dataset = fresh(rows, tmp_path / "shards")
    cache, hashed = cached(dataset, denoiser), []
    sha256 = files.sha256
    monkeypatch.setattr(files, "sha256", lambda path: hashed.append(Path(path)) or sha256(path))

    def within(folder) -> int:
        count = sum(path.is_relative_to(folder) for path in hashed)
        hashed.clear()
        return count

    settings = {
        "model": {"base": str(base)},
        "data": {"shards": str(dataset.folder), "shape": SHAPE.model_dump(), "batch_size": 1},
        "train": {"steps": 1}, "schedule": {"kind": "full"},
    }  # fmt: skip
    in_phases = settings | {"phases": {"one": {}, "two": {"train": {"steps": 2}}}}
    for each in (settings, in_phases):
        checks.parts(config.build(each), tmp_path / "out")
        assert within(dataset.folder) == 4, "three shards to train on and one held out"
    ranks = 5
    for rank in range(ranks):
        monkeypatch.setattr(batches.agree, "world", lambda rank=rank: (rank, ranks))
        assert batches.caches(config.build(settings), dataset, denoiser) == {SHAPE: cache}
        clip_stream.held_out(shards.read_dataset(dataset.folder), 1, 1, rank, ranks)
        assert within(tmp_path) == (len(cache.files) if rank == 0 else 0)


def test_mistakes_are_one_line(rows, base, denoiser, tmp_path):
    dataset = fresh(rows, tmp_path / "shards")
    settings = {
        "model": {"base": str(base)},
        "data": {"shards": str(dataset.folder), "shape": SHAPE.model_dump(), "batch_size": 1, "latents": "require"},
        "train": {"steps": 1}, "schedule": {"kind": "full"},
    }  # fmt: skip
    with pytest.raises(UserError, match=r"hold no latents: .*prepare --latents"):
        checks.check(config.build(settings))
    (dataset.folder / "latents" / "of another VAE").mkdir(parents=True)
    for look in (checks.check, lambda of: batches.caches(of, dataset, denoiser)):  # before Ray, and by the workers
        with pytest.raises(UserError, match=r"hold no latents of 5 frames .*prepare --latents"):
            look(config.build(settings))
    auto, message = config.build(config.merge(settings, {"data": {"latents": "auto"}})), []
    assert batches.caches(auto, dataset, denoiser, message.append) == {} and not message
    cache = cached(dataset, denoiser)
    assert checks.check(config.build(settings)) == dataset
    assert batches.caches(auto, dataset, denoiser, message.append) == {SHAPE: cache} and not message
    (cache.folder / "latents.json").unlink()  # as after a kill
    assert batches.caches(auto, dataset, denoiser, message.append) == {} and "not finished" in message[0]

    def refused(*arguments) -> str:
        lines = [line for line in prepare_latents(*arguments, status=2).stderr.splitlines() if line.strip()]
        assert len(lines) == 1
        return lines[0]

    assert "no network" in refused("--output", dataset.folder)
    assert "missing" in refused("--output", dataset.folder, "--base", tmp_path / "missing")
    pixels = ["--set", "model.init={patch_size: [1, 4, 4], out_channels: 3}", "--set", "model.vae=none"]
    assert "works on pixels" in refused("--output", dataset.folder, *pixels)
    assert "not a finished dataset" in refused("--output", tmp_path, "--base", base)
    gpu = ["--set", "latents.gpus=yes"]
    assert "Ray has no GPU here" in refused("--output", dataset.folder, "--base", base, *gpu)
