"""What others wrote, damaged or hostile, ends in one line: nested JSON, headers of safetensors, numbers, cards."""

import contextlib
import json
import os
import resource
import struct
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import huggingface_hub as hub
import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import save_file

import pipelines
from entprog import config, files
from entprog.data import latents, shards
from entprog.errors import UnreachableError, UserError
from entprog.models import adapters, captions, folders, texts, weight_files
from entprog.storage import tensors
from pipelines.outputs import claim
from pipelines.training import model_card, standing, steplog

DEEP = '{"a":' + "[" * 200_000


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("dataset.json", shards.read_dataset),
        ("entprog.json", folders.saved),
        (claim.MARK, lambda folder: claim.check(folder, "train", {})),
        ("steps.jsonl", standing.read),
    ],
)
def test_json_that_is_nested_too_deeply_is_one_line(name, read, tmp_path):
    (tmp_path / name).write_text(f"{DEEP}\n")
    (tmp_path / "x").write_text("x")
    with pytest.raises(UserError, match="nested too deeply") as error:
        read(tmp_path)
    assert name in str(error.value)


@pytest.mark.parametrize("line", ['{"step": 1}', "1", "[]", "{"])
def test_lines_that_no_training_writes_are_one_line(line, tmp_path):
    (tmp_path / "steps.jsonl").write_text(f"{line}\n")
    with pytest.raises(UserError, match=r"steps\.jsonl is damaged"):
        standing.read(tmp_path)


def test_a_log_goes_on_after_a_line_that_is_nested_too_deeply(tmp_path):
    (tmp_path / "steps.jsonl").write_text('{"step": 1}\n' + f"{DEEP}\n")
    steplog.StepLog(tmp_path / "steps.jsonl", 5).close()
    assert (tmp_path / "steps.jsonl").read_text() == '{"step": 1}\n'


def held(header):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return pa.BufferReader(struct.pack("<Q", len(text)) + text + bytes(64))


SOUND = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "entry",
    [
        {"shape": "ab"}, {"shape": [2.0]}, {"shape": [-2, -1]}, {"shape": [True, 2]}, {"dtype": ["F32"]},
        {"dtype": "X"}, {"data_offsets": [0.0, 8.0]}, {"data_offsets": [-8, 0]}, {"data_offsets": [0]},
        {"shape": {"2": 1}},
    ],
)  # fmt: skip
def test_a_header_with_an_odd_entry_is_damaged(entry):
    assert list(tensors.header(held({"a": SOUND}))[0]) == ["a"]
    with pytest.raises(ValueError, match=r"its header is damaged|unpack"):
        tensors.header(held({"a": SOUND | entry}))


@pytest.mark.parametrize("header", [b"[" * 200_000, b"[]", b'{"__metadata__": 1}', b'{"__metadata__": {"a": []}}'])
def test_a_header_that_is_none_is_damaged(header):
    with pytest.raises(ValueError, match=r"damaged|deeply"):
        tensors.header(held(header))


@pytest.mark.parametrize("number", ["9" * 5000, "0x" + "f" * 5000])
def test_a_number_too_long_to_read_is_one_line(number):
    with pytest.raises(UserError, match=r"train\.steps") as error:
        config.build(config.parse_overrides([f"train.steps={number}"]))
    assert len(str(error.value)) < 700


@pytest.mark.parametrize(
    ("front", "licence"),
    [
        ("license: mit\ndate: 2024-02-30", {"license": "mit"}),
        ("license: mit\na: " + "[" * 1500, {}),
        ("license: [mit]", {}),
        ("- mit", {}),
    ],
)
def test_whatever_a_bases_card_says_its_licence_is_looked_for(front, licence, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n\n# A base\n")
    assert model_card.licence_of(str(tmp_path)) == licence


def test_a_card_that_cannot_be_written_is_a_warning(tmp_path):
    assert "README.md could not be written: KeyError" in model_card.tried(tmp_path, "a run")


def test_json_is_read_whole_or_refused():
    assert files.from_json(b'{"a": 1}') == {"a": 1}
    with pytest.raises(ValueError, match="deeply"):
        files.from_json(DEEP)


@contextlib.contextmanager
def too_many_open_files():
    """As the system has it: no file can be opened inside."""
    free = os.dup(0)
    os.close(free)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


PERSON = shards.read_dataset(Path(pipelines.__file__).parent / "demo_person")
TEXT = captions._file("a dance")


@pytest.mark.parametrize(
    "read",
    [
        lambda cache: shards.read_dataset(PERSON.folder),
        lambda cache: shards.verify(PERSON),
        lambda cache: shards.read_rows(PERSON.folder / "train/00000.parquet", [0], ["pose"]),
        lambda cache: latents.read_cache(cache.folder),
        lambda cache: latents.read(cache, np.array([1])),
        lambda cache: captions.Texts(cache.folder, 4, {}, {"text": "text"}).of("a dance"),
        lambda cache: folders.read_json(cache.folder / latents.RECORD),
        lambda cache: weight_files.check_file(cache.folder / TEXT, "model.base"),
        lambda cache: texts._tensors(cache.folder / TEXT, "text"),
        lambda cache: adapters._load(cache.folder / TEXT, "model.adapter"),
    ],
)
def test_a_disk_that_is_away_has_damaged_nothing(read, tmp_path):
    """Such a run is tried again, where one with a damaged file is refused."""
    (tmp_path / TEXT).parent.mkdir()
    save_file({"text": torch.ones(1, 2)}, tmp_path / TEXT)
    clip = {"clean": np.zeros((1, 3, 2, 4, 4), np.float32)}
    file = latents.write(tmp_path, latents.Piece("train/00000.parquet", "0" * 64, 0, 2), [clip, clip])
    cache = latents.finish(tmp_path, {"clean": (3, 2, 4, 4)}, [file], {})
    read(cache)  # it is sound; and what reads it is imported
    captions._KEPT.tensors.clear()
    with too_many_open_files(), pytest.raises((OSError, UnreachableError), match="Too many open files") as away:
        read(cache)
    assert files.may_pass(away.value) or away.type is UnreachableError


def test_a_hub_that_does_not_answer_is_no_mistake(monkeypatch):
    gone, busy = (
        hub.errors.HfHubHTTPError("no", response=SimpleNamespace(status_code=code, headers={}, request=None))
        for code in (404, 503)
    )
    for error, kind in ((gone, UserError), (busy, UnreachableError), (TimeoutError("no answer"), UnreachableError)):
        monkeypatch.setattr(hub, "snapshot_download", Mock(side_effect=error))
        with pytest.raises(UserError, match="nor could it be fetched") as told:
            folders._fetched("who/what", "model.base", ["*.json"])
        assert told.type is kind
