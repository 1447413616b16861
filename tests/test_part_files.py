"""A checkpoint of others brings no files of this machine into what is saved and published."""

import json

import pytest

from entprog import files
from entprog.errors import UserError
from entprog.models import part_files, whole

TOKENIZER = json.dumps({"tokenizer_class": "T5Tokenizer"})


def named(folder, part="tokenizer"):
    """The `entprog.json`, as far as it counts, of a checkpoint that names a folder as one of its parts."""
    place = {"name": str(folder), "revision": None, "subfolder": "", "library": "transformers", "kind": "T5Tokenizer"}
    return {"elsewhere": {part: place}}


def copied(root, about, out):
    origins = whole.encoders(str(root), root, about)
    whole.copy_others(origins, whole.elsewhere(origins, "whole"), out)
    return sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())


@pytest.fixture
def place(tmp_path):
    for name in ("base", "there", "out"):
        (tmp_path / name).mkdir()
    return tmp_path


@pytest.mark.parametrize("config", [None, "{}", '{"tokenizer_class": 1}', '{"tokenizer_class": "Keys"}', "[]", "x"])
def test_a_folder_that_is_no_such_part_is_not_copied(config, place):
    (place / "there" / "application_default_credentials.json").write_text('{"secret": 1}')
    if config is not None:
        (place / "there" / "tokenizer_config.json").write_text(config)
    about = named(place / "there")
    assert copied(place / "base", about, place / "out") == [] and whole.named_folders(place / "base", about) == {}


def test_of_a_part_its_own_files_are_copied_and_it_is_said_from_where(place):
    for name in ("tokenizer_config.json", "spiece.model", "secrets.json", "notes.txt", "key.safetensors"):
        (place / "there" / name).write_text(TOKENIZER)
    about = named(place / "there")
    assert copied(place / "base", about, place / "out") == ["tokenizer/spiece.model", "tokenizer/tokenizer_config.json"]
    assert whole.named_folders(place / "base", about) == {"tokenizer": place / "there"}


def test_settings_that_are_links_out_of_a_part_are_not_of_it_but_for_the_hubs_cache(place):
    (place / "secret").write_text(TOKENIZER)
    (place / "there" / "tokenizer_config.json").symlink_to(place / "secret")
    assert part_files.of(place / "there", "tokenizer") == []
    snapshot = place / "cache" / "snapshots" / "abc" / "tokenizer"
    snapshot.mkdir(parents=True)
    (place / "cache" / "blobs").mkdir()
    (place / "cache" / "blobs" / "1").write_text(TOKENIZER)
    (snapshot / "tokenizer_config.json").symlink_to("../../../blobs/1")
    assert part_files.of(snapshot, "tokenizer") == [snapshot / "tokenizer_config.json"]
    assert not files.lies_in(place / "there" / "tokenizer_config.json", snapshot)


def test_weights_that_an_index_names_lie_beside_it(place):
    (place / "secret.safetensors").write_text("x")
    (place / "there" / "config.json").write_text('{"architectures": ["UMT5EncoderModel"]}')
    index = place / "there" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    assert part_files.of(place / "there", "text_encoder") == []
    index.write_text("{")
    with pytest.raises(UserError, match="cannot read"):
        part_files.of(place / "there", "text_encoder")
