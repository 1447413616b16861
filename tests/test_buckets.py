"""Data in a bucket: the same clips, latents and texts as in a folder, of which no more is fetched than is wanted."""

import json
import pickle
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from entprog import config, storage
from entprog.blocks import blocks
from entprog.config import ClipShape
from entprog.data import clip_stream, latents, shards
from entprog.errors import UserError
from entprog.media import assets, h264, video
from entprog.models import captions
from entprog.preparing import ledger
from entprog.scoring import cache
from helpers import real_clips, servers
from helpers.networks import TINY, tiny_denoiser, tiny_experiment
from pipelines import compare, demo, evaluate, generate, prepare, score, train, tune
from pipelines.generating import judging, motions
from pipelines.preparing import additions
from pipelines.stream import feed

SHAPE = ClipShape(frames=6, height=48, width=32, fps=12)


@pytest.fixture(scope="module")
def s3():
    with servers.s3() as endpoint:
        storage.Place.at(address(endpoint, "data")).system.create_dir("data")
        yield endpoint


def address(endpoint, folder):
    return (
        f"s3://{folder}?scheme=http&endpoint_override={endpoint.removeprefix('http://')}&region=us-east-1"
        "&allow_bucket_creation=true"
    )


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    rows = [real_clips.row("cam01", "train", 0.1 * i, SHAPE) for i in range(20)]
    held_out = [real_clips.row("cam04", "held_out", 0.2 * i, SHAPE) for i in range(3)]
    files = {"train": [rows[:12], rows[12:14], rows[14:]], "held_out": [held_out]}
    return real_clips.write(tmp_path_factory.mktemp("shards"), files, SHAPE)


@pytest.fixture
def bucket(s3, local, request):
    """Address of a folder in a bucket with a copy of the shards, a folder for each test."""
    where = address(s3, f"data/{abs(hash(request.node.name))}")
    storage.Place.at(where).upload(local.folder)
    return where


def assert_equal(found, due):
    assert found.keys() == due.keys()
    for name, value in due.items():
        assert np.array_equal(found[name], value), name


@pytest.mark.parametrize("decode", [clip_stream.read, clip_stream.decode])
def test_clips_are_those_of_the_folder(decode, bucket, local):
    there = pickle.loads(pickle.dumps(shards.read_dataset(bucket)))  # as Ray's tasks get it
    assert there == replace(local, folder=there.folder) and str(there.folder).startswith("s3://data/")
    shards.verify(there, "sha256")
    for split, clips in (("train", [19, 0, 13, 0, 5, 11]), ("held_out", [2, 0])):
        assert_equal(decode(there, split, np.array(clips)), decode(local, split, np.array(clips)))


def test_of_a_shard_the_clips_asked_for_alone_are_fetched(bucket, s3, local, tmp_path):
    """A row group's columns and, once a process, the footer; no other clips."""
    known = shards.read_rows(local.folder / local.splits["train"][0].file, range(12))
    long = [{**row, "clip_id": f"{row['clip_id']} again {i}"} for i in range(6) for row in known]
    real_clips.write(tmp_path, {"train": [long], "held_out": []}, SHAPE)
    storage.Place.at(address(s3, "data/long")).upload(tmp_path)
    with servers.counting(s3) as (counted, read):
        there = shards.read_dataset(address(counted, "data/long"))
        (shard,) = there.splits["train"]
        opened = len(read)
        clip_stream.read(there, "train", np.array([30]))
        assert sum(read[opened:]) < shards._TAIL_BYTES + shard.bytes / 4, (shard.bytes, read[opened:])
        first = len(read)
        clip_stream.read(there, "train", np.array([9]))
    assert len(read) - first <= 2, "one answer for a row group, or two for what lies far apart in it"


def test_latents_and_texts_are_those_of_the_folder(bucket, local, tmp_path):
    dataset = replace(local, folder=tmp_path / "shards")
    shutil.copytree(local.folder, dataset.folder)
    generator, files = torch.Generator().manual_seed(0), []
    shapes = {"clean": (4, 2, 3, 2), "conditions.reference": (4, 1, 3, 2)}
    for number, piece in enumerate(latents.pieces(dataset, latents.FILE_BYTES // 3)):
        clips = [{n: torch.randn(1, *shape, generator=generator).numpy() for n, shape in shapes.items()}]
        clips *= piece.clips
        if number == 1:  # as of a VAE in bfloat16
            clips = [{n: torch.tensor(v).bfloat16().float().numpy() for n, v in clip.items()} for clip in clips]
        files.append(latents.write(dataset.folder / "latents" / "key", piece, clips, halves=number == 1))
    here = latents.finish(dataset.folder / "latents" / "key", shapes, files, {})
    folder = dataset.folder / captions.FOLDER / "KEY"
    captions._write(folder, "a person", {"prompt_embeds": torch.ones(3, 4)})
    place = storage.Place.at(bucket)
    place.upload(dataset.folder)
    away = shards.read_dataset(bucket)
    there = pickle.loads(pickle.dumps(latents.find(away, "key")))
    latents.verify(there, "sha256")
    wanted = np.array([19, 3, 12, 3, 0])
    assert_equal(latents.read(there, wanted), latents.read(here, wanted))
    # One more text, written there.
    beside = place / captions.FOLDER / "KEY"
    captions._write(beside, "two persons", {"prompt_embeds": torch.ones(2, 4)})
    assert captions.missing(["a person", "nobody", "two persons"], beside) == ["nobody"]
    assert captions.others(place / captions.FOLDER / "OTHER") == 1
    texts = captions.Texts(beside, 5, {}, {"text": "prompt_embeds"})
    assert torch.equal(texts.of("a person")["text"], replace(texts, folder=folder).of("a person")["text"])
    assert captions.of_clips(away, "train") == [""] * 20
    # Damage is told; a bucket that does not answer is none.
    file = here.files[0]
    content = bytearray((here.folder / file.piece.file).read_bytes())
    content[-5] ^= 1
    (there.folder / file.piece.file).write_bytes(bytes(content))
    latents._opened.cache_clear()
    with pytest.raises(latents.DamagedLatentsError, match=r"damaged latents s3://data/.*row"):
        latents.read(there, np.arange(20))
    (there.folder / file.piece.file).write_bytes(bytes(content[:-9]))
    latents._opened.cache_clear()
    with pytest.raises(latents.DamagedLatentsError):
        latents.read(there, np.arange(20))
    with pytest.raises(latents.DamagedLatentsError):
        latents.verify(there, "auto")


@pytest.mark.parametrize("how", ["cut short", "gone", "another's", "a byte of a page", "a byte of the footer"])
@pytest.mark.parametrize("when", ["before", "while it is read"])
def test_a_shard_that_is_not_what_it_was_is_never_used(how, when, bucket, local):
    dataset = shards.read_dataset(bucket)
    info = dataset.splits["train"][0]
    path, content = dataset.folder / info.file, bytearray((local.folder / info.file).read_bytes())
    shards._opened.cache_clear()
    if when == "while it is read":
        clip_stream.read(dataset, "train", np.array([0]))  # its footer is known from now on
    if how == "gone":
        path.system.delete_file(path.root)
    elif how == "another's":
        path.write_bytes((local.folder / dataset.splits["train"][2].file).read_bytes())
    else:
        content = content[: len(content) // 2] if how == "cut short" else content
        content[{"a byte of a page": 3000, "a byte of the footer": -400}.get(how, 0)] ^= 1
        path.write_bytes(bytes(content))
    if "byte" not in how:
        with pytest.raises(shards.DamagedShardError, match=r"(damaged )?shard s3://data/.*00000\.parquet"):
            shards.verify(dataset, "auto")
    else:
        with pytest.raises(shards.DamagedShardError, match="sha256"):
            shards.verify(dataset, "sha256")
    if (how, when) == ("a byte of the footer", "while it is read"):
        return  # a footer that was read before it was damaged is not read again
    with pytest.raises((shards.DamagedShardError, OSError)) as told:
        for _ in range(2):
            clip_stream.read(dataset, "train", np.arange(12))
    assert "\n" not in str(told.value)


def test_a_bucket_that_does_not_answer_is_no_damage(s3, local):
    with servers.s3() as endpoint:
        where = storage.Place.at(address(endpoint, "gone/shards"))
        where.system.create_dir("gone")
        where.upload(local.folder)
        dataset = shards.read_dataset(where)
        clip_stream.read(dataset, "train", np.array([0]))
    with pytest.raises(OSError) as away:
        clip_stream.read(dataset, "train", np.array([11]))
    assert "damaged" not in str(away.value)


def test_what_is_evaluated_and_generated_is_that_of_the_folder(bucket, local, tmp_path):
    settings = config.build({"generate": {"count": 2}}, config.Generation)
    away = motions.motions_from_shards(bucket, None, "held_out", settings, SHAPE)
    for found, due in zip(
        away, motions.motions_from_shards(local.folder, None, "held_out", settings, SHAPE), strict=True
    ):
        assert np.array_equal(found.video, due.video) and np.array_equal(found.reference, due.reference)
    there = judging.places(shards.read_dataset(bucket), "train", 3, tmp_path)
    for found, due in zip(there, judging.places(local, "train", 3, tmp_path), strict=True):
        clips = [motions.from_row(storage.at(one.shard, "shards"), one.row, SHAPE) for one in (found, due)]
        assert found.clip_id == due.clip_id and np.array_equal(clips[0].video, clips[1].video)


# ---- commands ----


MODEL = ["--set", f"model.init={TINY}", "--set", "model.vae=none", "--set", f"data.shape={SHAPE.model_dump()}"]


def run(job, *words):
    done = CliRunner().invoke(job.app, [str(word) for word in words])
    return done.exit_code, done.output


@pytest.mark.parametrize("job", [train, score, tune])
def test_dry_runs_read_the_bucket(job, bucket, tmp_path):
    words = ["--space", "cei", "--seconds", "9"] if job is tune else ["--set", "train.steps=2"]
    code, said = run(job, "--shards", bucket, *MODEL, *words, "--dry-run")
    assert code == 0 and "endpoint_override" not in said, said
    assert not list(tmp_path.iterdir())


AWAY = "s3://data/none?scheme=http&endpoint_override=127.0.0.1:1&region=us-east-1"


@pytest.mark.parametrize("words", [[prepare, "--input", ".", "--output"], [train, "--tables"]])
def test_an_output_in_a_bucket_that_does_not_answer_is_one_line(words, s3, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, said = run(*words, AWAY)
    assert code == 2 and said.count("\n") == 1 and not list(tmp_path.iterdir()), said
    assert said.startswith("error: cannot look at ") and " s3://data/none: " in said, said


def test_a_score_table_is_made_once_and_found_in_the_bucket(s3, local):
    folder = storage.Place.at(address(s3, "data/tables"))
    experiment = tiny_experiment(priority={"kind": "depth_first"})
    denoiser = tiny_denoiser(experiment)
    of = denoiser, blocks(denoiser.network), local, experiment, "weights", folder
    made = cache.table(*of)
    (file,) = folder.iterdir()
    file.write_text(json.dumps(json.loads(file.read_text()) | {"seconds": 77.0}))
    found = cache.table(*of)
    assert found.seconds == 77.0 and found.as_json() == made.as_json() | {"seconds": 77.0}


BAD = {
    "no dataset": ("s3://data/none?{}", "s3://data/none is not a finished dataset"),
    "no bucket": ("s3://never-made/none?{}", "s3://never-made/none"),
    "no such kind": ("ftp://data/none", "ftp://data/none is no place for shards: "),
    "credentials": ("s3://AKIA:secret-of-mine@data/none?{}", "credentials in the environment"),
}


@pytest.mark.parametrize("how", BAD)
@pytest.mark.parametrize("job", [train, score, tune])
def test_an_address_that_cannot_be_read_is_one_line_before_anything_starts(job, how, s3, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    where, due = BAD[how]
    where = where.format(address(s3, "x").partition("?")[2].replace("&allow_bucket_creation=true", ""))
    words = ["--space", "cei", "--seconds", "9"] if job is tune else ["--set", "train.steps=2"]
    code, said = run(job, "--shards", where, "--output", tmp_path / "out", *words, *MODEL)
    assert code == 2 and due in said and "secret-of-mine" not in said and said.count("error:") == 1, said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("job", [compare, demo, evaluate, generate, score, train, tune])
def test_what_no_bucket_can_hold_is_refused_in_one_line(job, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, said = run(job, "--output", "s3://data/run")
    assert code == 2 and said.count("\n") == 1 and "--output s3:/data/run: a bucket may hold" in said, said
    assert not list(tmp_path.iterdir())


# ---- prepare ----


def test_what_is_prepared_into_a_bucket_is_there_once_it_is_whole(s3, local_ray, tmp_path, monkeypatch):
    """Ended when all clips are cut and packed, the same command goes on."""
    videos, where = tmp_path / "videos", address(s3, "data/prepared")
    videos.mkdir()
    for name in ("cam01", "cam04"):
        frames = (frame for _, frame in video.iter_frames(assets.clip(name), fps=20, end_s=1.2, size=(480, 270)))
        h264.write(videos / f"{name}.mp4", frames, fps=20)
    words = ["--input", videos, "--frames", 6, "--height", 48, "--width", 32, "--fps", 10, "--held-out", "cam04"]

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(additions, "finish", killed)
        code, said = run(prepare, *words, "--output", where)
    assert code == 1, said
    with pytest.raises(UserError, match="s3://data/prepared is not a finished dataset"):
        shards.read_dataset(where)
    code, said = run(prepare, *words, "--output", where)
    assert code == 0 and "resuming: 2 of 2 sources are done already" in said, said
    there = shards.read_dataset(where)
    shards.verify(there, "sha256")
    files = [info.file for infos in there.splits.values() for info in infos]
    others = {"contact_sheet.png", "dataset.json", "entprog-job.json", "ledger.parquet", "result.json"}
    assert there.folder.below().keys() == {*files, *others} and len(files) == 2
    kept = sum(row["kept"] for row in ledger.read(there.folder / "ledger.parquet") if row["kind"] == "clip")
    assert kept == there.clips("train") + there.clips("held_out") > 4
    assert clip_stream.decode(there, "held_out", np.array([0]))["video"].any()
    code, said = run(prepare, *words, "--output", where)
    assert code == 0 and "nothing to do: s3://data/prepared is finished" in said, said
    code, said = run(prepare, *words, "--output", where, "--fps", 11)
    assert code == 2 and "s3://data/prepared holds a prepare job of other settings (data.shape.fps" in said, said
    code, said = run(prepare, *words, "--output", "s3://never-made/x?" + where.partition("?")[2].split("&allow")[0])
    assert code == 2 and "cannot be written to s3://never-made/x" in said and said.count("error:") == 1, said


# ---- Ray Data ----


@pytest.mark.parametrize("where", ["worker", "cluster"])
def test_the_stream_of_a_bucket_is_that_of_the_folder(where, local_ray, bucket, local):
    stream = feed.stream(shards.read_dataset(bucket), "train", SHAPE, 3, rank=1, world=2, where=where)
    due = clip_stream.local_stream(local, "train", SHAPE, 3, rank=1, world=2)
    try:
        for _ in range(9):
            found, expected = next(stream), next(due)
            assert torch.equal(found.video, expected.video) and torch.equal(found.position, expected.position)
    finally:
        stream.close()
