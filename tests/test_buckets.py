"""Data in a bucket: the same clips, latents and texts as in a folder, of which no more is fetched than is wanted."""

import json
import pickle
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import typer
from diffusers import WanTransformer3DModel
from fsspec.implementations.arrow import ArrowFSWrapper
from safetensors.torch import save_file
from typer.testing import CliRunner

from entprog import config, models, storage
from entprog.blocks import blocks
from entprog.config import ClipShape
from entprog.data import clip_stream, latents, shards
from entprog.data.clips import Latents
from entprog.errors import UnreachableError, UserError
from entprog.media import assets, h264, video
from entprog.models import adapters, captions, fingerprints, weight_files
from entprog.preparing import addresses, inputs, ledger
from entprog.scoring import cache
from helpers import real_clips, servers
from helpers.networks import TINY, tiny_denoiser, tiny_experiment
from helpers.servers import address
from pipelines import adapter, cli, compare, demo, evaluate, generate, prepare, publish, score, status, train, tune
from pipelines.generating import judging, motions
from pipelines.outputs import claim
from pipelines.outputs import tables as score_tables
from pipelines.preparing import additions, packing
from pipelines.preparing import latents as encoding
from pipelines.stream import feed

SHAPE = ClipShape(frames=6, height=48, width=32, fps=12)


@pytest.fixture(scope="module")
def s3():
    with servers.s3() as endpoint:
        storage.Place.at(address(endpoint, "data")).system.create_dir("data")
        yield endpoint


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


class Silent:
    """An open file whose bucket has stopped to answer."""

    def read_at(self, *_):
        raise OSError("slow down")


@pytest.mark.parametrize("fetched", [True, False])
def test_a_part_of_a_shard_that_does_not_come_is_no_damage(fetched, gone, local, monkeypatch):
    """Fetched beforehand, or asked for by Parquet itself."""
    content = (local.folder / local.splits["train"][0].file).read_bytes()
    footer = int.from_bytes(content[-8:-4], "little") + 8
    monkeypatch.setattr(shards, "_opened", lambda *_: (Silent(), len(content), content[-footer:]))
    if not fetched:
        monkeypatch.setattr(shards, "_fetch", lambda *_: None)
    with pytest.raises(OSError, match="slow down"):
        shards.read_rows(gone / "a.parquet", [3])


@pytest.fixture(scope="module")
def gone(s3):
    """A folder in a bucket that cannot be asked now."""
    with servers.refusing() as endpoint:
        yield storage.Place.at(address(endpoint, "data/none"))


PIECE = latents.Piece("train/00000.parquet", "5" * 64, 0, 1)


def cache_in(folder):
    return latents.Cache(folder, {}, (latents.Written(PIECE, 9, "5" * 64),))


UNANSWERED = {
    "part": lambda gone: packing.read_part(gone, "0" * 16),
    "packed": lambda gone: packing._packed(gone / "a.done", gone / "train" / "a.parquet", "plan"),
    "latents that are written": lambda gone: latents.written(gone, PIECE),
    "sizes of latents": lambda gone: latents.verify(cache_in(gone), "size"),
    "bytes of latents": lambda gone: latents.verify(cache_in(gone), "sha256"),
    "text": lambda gone: captions.Texts(gone, 5, {}, {"text": "prompt_embeds"}).of("a person"),
}


@pytest.mark.parametrize("what", UNANSWERED)
def test_what_does_not_answer_is_neither_missing_nor_damaged(what, gone, monkeypatch):
    if what == "bytes of latents":
        monkeypatch.setattr(shards, "sizes", lambda *_: {PIECE.file: 9})
    with pytest.raises((OSError, UnreachableError)) as told:
        UNANSWERED[what](gone)
    assert "\n" not in str(told.value) and "damaged" not in str(told.value)


def test_bytes_of_a_shard_that_do_not_come_are_one_line(gone, local, monkeypatch):
    monkeypatch.setattr(
        shards, "sizes", lambda *_: {info.file: info.bytes for infos in local.splits.values() for info in infos}
    )
    with pytest.raises(UnreachableError, match=r"cannot read s3://data/none/train/00000\.parquet: "):
        shards.verify(replace(local, folder=gone), "sha256")


def test_what_is_not_there_is_done_anew(s3):
    place = storage.Place.at(address(s3, "data/empty"))
    assert packing.read_part(place, "0" * 16) is None
    assert packing._packed(place / "a.done", place / "train" / "a.parquet", "plan") is None
    assert latents.written(place, PIECE) is None


def test_latents_of_another_shard_are_not_read(s3, tmp_path):
    """Their files are of one size, and each clip's checksum is right."""
    pieces = [latents.Piece(f"train/0000{i}.parquet", str(i) * 64, 0, 1) for i in range(2)]
    folder = storage.Place.at(address(s3, "data/swapped"))
    files = [
        latents.write(folder, piece, [{"clean": np.full((1, 4), i, np.float32)}]) for i, piece in enumerate(pieces)
    ]
    there = latents.finish(folder, {"clean": (4,)}, files, {})
    assert latents.read(there, np.array([1]))["clean"].tolist() == [[1.0] * 4]
    latents._opened.cache_clear()
    (folder / pieces[1].file).write_bytes((folder / pieces[0].file).read_bytes())
    latents.verify(there, "auto")
    with pytest.raises(latents.DamagedLatentsError, match="damaged latents s3://data/swapped/train/00001"):
        latents.read(there, np.array([0, 1]))


@pytest.mark.parametrize("folder", ["clips", "of/two", ""])
def test_shards_are_checked_where_their_description_has_them(folder, bucket, local):
    info = local.splits["train"][0]
    moved = replace(info, file=f"{folder}/one.parquet".lstrip("/"))
    place = storage.Place.at(bucket)
    (place / moved.file).write_bytes((local.folder / info.file).read_bytes())
    there = replace(local, folder=place, splits={"train": (moved,), "held_out": local.splits["held_out"]})
    shards.verify(there, "size")
    (place / moved.file).write_bytes(b"short")
    with pytest.raises(shards.DamagedShardError, match="5 bytes where"):
        shards.verify(there, "size")


def test_a_text_of_many_clips_is_fetched_once(s3, tmp_path):
    captions._write(tmp_path / "AB", "a person", {"prompt_embeds": torch.ones(3, 4)})
    storage.Place.at(address(s3, "data/once")).upload(tmp_path)
    with servers.counting(s3) as (counted, read):
        folder = storage.Place.at(address(counted, "data/once")) / "AB"
        texts = captions.Texts(folder, 5, {"train": ["a person"] * 8}, {"text": "prompt_embeds"})
        batch = Latents(torch.zeros(8, 4, 2, 3, 2), {}, torch.arange(8))
        for _ in range(2):
            seen = texts.beside(batch, "train", np.arange(8)).conditions["text"]
    assert seen.shape == (8, 5, 4) and len(read) == 1


def test_a_finished_cache_is_not_fetched_again(bucket, s3, local):
    estimate = encoding.Estimate(SHAPE, "KEY", {"clean": (4,)}, latents.FILE_BYTES // 12, 0.0, "cpu")
    pieces = latents.pieces(local, estimate.clip_bytes)
    dataset = shards.read_dataset(bucket)
    folder = latents.folder_of(dataset, "KEY")
    due = {p: latents.write(folder, p, [{"clean": np.zeros((1, 4096), np.float32)}] * p.clips) for p in pieces}
    latents.finish(folder, {"clean": (4096,)}, list(due.values()), {})
    with servers.counting(s3) as (counted, read):
        asked = shards.read_dataset(bucket.replace(s3.removeprefix("http://"), counted.removeprefix("http://")))
        read.clear()
        assert encoding.Work.of(asked, estimate).files == due
    assert sum(read) < 5000
    (folder / pieces[1].file).write_bytes(b"short")
    assert encoding.Work.of(dataset, estimate).files == due | {pieces[1]: None}


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
    words = ["--space", "optimizer", "--seconds", "9"] if job is tune else ["--set", "train.steps=2"]
    code, said = run(job, "--shards", bucket, *MODEL, *words, "--dry-run")
    assert code == 0 and "endpoint_override" not in said, said
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def adapted(s3, tmp_path_factory):
    """A folder with a base, an adapter of it and a text, and what makes the address of its copy in a bucket."""
    folder = tmp_path_factory.mktemp("adapted")
    base = tiny_denoiser(tiny_experiment(model={"conditions": ()}))
    base.save(folder / "base")
    name = blocks(base.network)[0].name + ".attn1.to_q"
    out, into = base.network.get_submodule(name).weight.shape
    pair = adapters.Pair(torch.rand(2, into), torch.rand(out, 2), 2.0)
    about = {"family": "wan", "conditions": [], "base": str(folder / "base")}
    adapters.write(folder / "adapter", adapters.Adapter({name: pair}, {}, about), "transformer")
    save_file({"prompt_embeds": torch.rand(3, base.text.shape[-1])}, folder / "text.safetensors")
    storage.Place.at(address(s3, "data/adapted")).upload(folder)
    return folder, lambda name: address(s3, f"data/adapted/{name}")


def test_an_adapter_is_merged_and_extracted_out_of_buckets(adapted, tmp_path, monkeypatch):
    (folder, there), kept = adapted, "model/transformer/diffusion_pytorch_model.safetensors"
    monkeypatch.setenv("ENTPROG_CACHE", str(tmp_path / "cache"))
    merge = ["merge", "--adapter", folder / "adapter", "--base", folder / "base", "--output", tmp_path / "here"]
    assert run(adapter, *merge)[0] == 0
    code, said = run(adapter, "merge", "--adapter", there("adapter"), "--base", there("base"), "--output", there("out"))
    assert code == 0 and "Merged 1 layers" in said and "endpoint_override" not in said, said
    merged = storage.Place.at(there("out"))
    assert (merged / kept).read_bytes() == (tmp_path / "here" / kept).read_bytes()
    words = "--before", there("base"), "--after", there("out"), "--rank", 2, "--output", there("again")
    code, said = run(adapter, "extract", *words)
    assert code == 0 and "endpoint_override" not in said, said
    (one,) = adapters.read(there("again/adapter"), "--adapter").pairs.values()
    (due,) = adapters.read(str(folder / "adapter"), "--adapter").pairs.values()
    torch.testing.assert_close(one.delta(), due.delta(), atol=1e-5, rtol=1e-4)
    assert "over base" in (storage.Place.at(there("again/adapter")) / "README.md").read_text()


def test_every_setting_of_a_network_s_files_takes_an_address(adapted, tmp_path, monkeypatch):
    """A folder, or a file alone; file:// is a folder of this machine; what is not there is one line."""
    folder, there = adapted
    monkeypatch.setenv("ENTPROG_CACHE", str(tmp_path / "cache"))
    given = {"base": "base", "adapter": "adapter", "prompt_embeds": "text.safetensors"}

    def loaded(where):
        settings = config.Model(conditions=(), **{name: where(path) for name, path in given.items()})
        denoiser = models.family("wan").load(settings)
        return {**denoiser.network.state_dict(), "text": denoiser.text}, fingerprints.base(settings)

    here, of_here = loaded(lambda name: str(folder / name))
    for where in (there, lambda name: f"file://{folder}/{name}", there):
        weights, same = loaded(where)
        assert same == of_here and all(torch.equal(weights[name], tensor) for name, tensor in here.items())
    single = "adapter/pytorch_lora_weights.safetensors"
    assert adapters.read(there(single), "x").pairs.keys() == adapters.read(str(folder / single), "x").pairs.keys()
    weights = there("base/transformer/diffusion_pytorch_model.safetensors")
    found = weight_files.check_single_file(WanTransformer3DModel, weights, "model.weights")
    assert found.is_relative_to(tmp_path / "cache")
    with pytest.raises(UserError, match=r"is a low-rank adapter: give it as model\.adapter"):
        models.family("wan").load(config.Model(base=there("base"), weights=there(single)))
    for name in given:
        with pytest.raises(UserError, match=rf"^model\.{name}: no such folder: s3://data/adapted/none$"):
            loaded(lambda path, name=name: there("none" if path == given[name] else path))


AWAY = "s3://data/none?scheme=http&endpoint_override=127.0.0.1:1&region=us-east-1"


WORDS = (
    [train, *MODEL, "--set", "train.steps=2", "--output"], [score, *MODEL, "--output"], [compare, "--output"],
    [generate, "--checkpoint", "out", "--output"], [generate, "--output", "out", "--shards", "x", "--checkpoint"],
    [publish, "--to", "out", "--checkpoint"], [status], [evaluate, "--shards", "x", "--output"],
    [evaluate, "--shards", "x", "--generated"], [tune, *MODEL, "--space", "cei", "--seconds", "9", "--output"],
    [adapter, "merge", "--adapter", "x", "--base", "x", "--output"],
)  # fmt: skip


@pytest.mark.parametrize("words", WORDS)
def test_a_bucket_that_refuses_is_one_line(words, gone, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, said = run(*words, gone.address)
    assert code == 2 and said.count("\n") == 1 and not list(tmp_path.iterdir()), said
    assert said.startswith(("error: cannot look at ", "error: --checkpoint: ")) and " s3://data/none" in said, said


@pytest.mark.parametrize("words", [[prepare, "--input", ".", "--output"], [train, "--tables"]])
def test_an_output_in_a_bucket_that_does_not_answer_is_one_line(words, s3, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, said = run(*words, AWAY)
    assert code == 2 and said.count("\n") == 1 and not list(tmp_path.iterdir()), said
    assert said.startswith(("error: cannot look at ", "error: --checkpoint: ")) and " s3://data/none" in said, said


@pytest.mark.parametrize("job", [train, score, tune])
def test_tables_that_cannot_be_written_are_one_line_before_anything_starts(job, s3, local, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    where = "s3://never-made/none?" + address(s3, "x").partition("?")[2].replace("&allow_bucket_creation=true", "")
    words = ["--space", "cei", "--seconds", "9"] if job is tune else ["--set", "train.steps=2"]
    code, said = run(job, "--shards", local.folder, "--output", tmp_path / "out", "--tables", where, *words, *MODEL)
    assert code == 2 and said.count("error:") == 1, said
    assert "score tables cannot be written to s3://never-made/none: " in said
    assert not list(tmp_path.iterdir())


def test_a_file_address_is_the_folder(tmp_path):
    for given in (f"file://{tmp_path}/a%20b", f"file://{tmp_path}/a%20b/"):
        assert storage.at(given, "shards") == cli.output_of(given) == tmp_path / "a b"


def test_a_check_is_given_up_soon_and_the_work_is_not(monkeypatch):
    asked = []
    monkeypatch.setattr(storage.Place, "exists", lambda self: asked.append(self.address))
    assert cli.output_of("gs://anonymous@bucket/x").address == "gs://anonymous@bucket/x"
    assert asked == ["gs://anonymous@bucket/x?retry_limit_seconds=20"]


@pytest.mark.parametrize("when", ["asked for", "refused", "done"])
def test_a_command_ends_as_it_should_while_its_bucket_does_not_answer(when, gone, monkeypatch, capfd):
    def interrupted(given):
        raise KeyboardInterrupt

    def refused():
        if when == "refused":
            raise UserError("no such base")
        return {}

    if when == "asked for":
        monkeypatch.setattr(cli, "output_of", interrupted)
    with pytest.raises(typer.Exit) as ended:
        cli.run("prepare", AWAY if when == "asked for" else gone, refused)
    said = capfd.readouterr().err
    if when == "done":
        assert ended.value.exit_code == 1 and said.startswith("failed: s3://data/none/result.json could not be written")
        assert said.count("\n") == 1
        return
    interrupted = 1, "interrupted: the same command resumes\n"
    assert (ended.value.exit_code, said) == (interrupted if when == "asked for" else (2, "error: no such base\n"))


def test_what_a_refused_or_killed_command_leaves_in_a_bucket_is_in_nobodys_way(s3):
    place = storage.Place.at(address(s3, "data/refused"))
    (place / ".probe-12345678").write_bytes(b"of a check that was killed")
    claim.take(place, "prepare", {"a": 1})
    claim.check(place, "prepare", {"a": 2})  # a mark alone is nobody's
    claim.release(place, [])
    (place / ".probe-12345678").unlink()
    claim.take(place, "prepare", {"a": 1})
    claim.release(place, [])
    assert not place.exists() and "refused" not in place.parent.folders()
    (place / "mine.txt").write_bytes(b"")
    with pytest.raises(UserError, match="not of a prepare job"):
        claim.check(place, "prepare", {})
    claim.release(place, [])
    assert place.files() == {"mine.txt": 0}


@pytest.mark.parametrize(
    ("protocol", "folder", "due"),
    [
        ("s3", "mine", ["a.mp4", "output.mp4", "output2/b.mp4"]),
        ("s3", "mine/output", None),
        ("s3", "mine/output/", None),
        ("s3", "mine/output/videos", ["c.mp4"]),
        ("gs", "mine/output", ["train/00000.parquet", "videos/c.mp4"]),
    ],
)
def test_an_output_in_a_bucket_is_not_its_own_input(protocol, folder, due, s3, monkeypatch):
    place = storage.Place.at(address(s3, "data/mine"))
    names = ["a.mp4", "output.mp4", "output2/b.mp4", "output/train/00000.parquet", "output/videos/c.mp4"]
    for name in names:
        (place / name).write_bytes(b"x")
    files = ArrowFSWrapper(place.system)
    monkeypatch.setattr(addresses, "filesystem", lambda *_, **__: (files, f"data/{folder}"))
    ask = partial(inputs.find, f"{protocol}://data/{folder}", leave_out=place / "output")
    if due is None:
        with pytest.raises(UserError, match="has no files"):
            ask()
    else:
        assert [row["file"] for row in ask().rows] == due


def test_a_score_table_is_made_once_and_found_in_the_bucket(s3, local):
    folder = storage.Place.at(address(s3, "data/tables"))
    experiment = tiny_experiment(priority={"kind": "depth_first"})
    denoiser = tiny_denoiser(experiment)
    of = denoiser, blocks(denoiser.network), local, experiment, "weights", folder
    made = cache.table(*of)
    (file,) = folder.iterdir()
    file.write_text(json.dumps(json.loads(file.read_text()) | {"seconds": 77.0, "ranks": 4}))
    found = cache.table(*of)
    assert found.as_json() == made.as_json() | {"seconds": 4 * 77.0}, "what it would take this one"


def test_tables_that_can_be_read_alone_are_copied(s3, tmp_path, capfd):
    (storage.Place.at(address(s3, "data/kept")) / "KEY.json").write_bytes(b"{}")
    with servers.counting(s3) as (reading, _):  # which takes no PUT
        where = address(reading, "data/kept")
        score_tables.check(where)
        folder = score_tables.place(tmp_path / "out", where)
        with pytest.raises(UserError, match="score tables cannot be written to s3://data/empty-one"):
            score_tables.check(address(reading, "data/empty-one"))
    assert folder == tmp_path / "out" / "cei" and (folder / "KEY.json").read_bytes() == b"{}"
    assert f"can be read alone: copied to {folder}" in capfd.readouterr().out
    assert score_tables.place(tmp_path, address(s3, "data/kept")) == storage.Place.at(address(s3, "data/kept"))


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


def test_what_no_bucket_can_hold_is_refused_in_one_line_that_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, said = run(demo, "--output", "s3://data/run")
    assert code == 2 and said.count("\n") == 1 and "--output s3:/data/run: this job alone writes to no bucket" in said
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


def test_a_place_of_a_place_keeps_its_settings():
    """What a message shows of it has none: asked anew by that, another server would answer, or nobody."""
    place = storage.Place.at("s3://bucket/run?endpoint_override=127.0.0.1:9&scheme=http&region=us-east-1")
    assert storage.Place.at(place) is place and storage.at(place, "the output") is place
