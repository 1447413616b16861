"""What others wrote, damaged or hostile, ends in one line: nested JSON, headers of safetensors, numbers, cards."""

import errno
import json
import struct
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import huggingface_hub as hub
import pyarrow as pa
import pytest

from entprog import config, files
from entprog.data import latents, shards
from entprog.errors import UnreachableError, UserError
from entprog.media import limits
from entprog.models import captions, folders
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


def away(*_, **__):
    raise OSError(errno.ESTALE, "Stale file handle")


@pytest.mark.parametrize(
    ("of", "name", "read"),
    [
        (limits, "parquet", lambda path: shards.read_rows(path, [3])),
        (latents, "safe_open", lambda path: [*latents._rows(path, [0], ["clean"])]),
        (captions, "load", lambda path: captions.Texts(path, 4, {}, {"text": "text"}).of("a dance")),
        (shards, "_size", lambda path: shards.answered(path, OSError(errno.EMFILE, "Too many open files"))),
    ],
)
def test_a_disk_that_is_away_has_damaged_nothing(of, name, read, tmp_path, monkeypatch):
    """Such a run is tried again, where one with a damaged file is refused."""
    monkeypatch.setattr(of, name, away)
    monkeypatch.setattr(Path, "read_bytes", away)
    with pytest.raises((OSError, UnreachableError), match=r"Stale file handle|Too many open files"):
        read(tmp_path)


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
