"""Hashes of content: equal wherever it lies, different once a byte of it is."""

import hashlib
import json
import os
import shutil

import pytest
import torch

from entprog import config
from entprog.data.shards import Dataset, ShardInfo
from entprog.errors import UserError
from entprog.models import fingerprints
from helpers.networks import TINY, tiny_denoiser, tiny_experiment


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A saved tiny Wan checkpoint."""
    folder = tmp_path_factory.mktemp("base") / "model"
    tiny_denoiser(tiny_experiment()).save(folder)
    return folder


def of(folder, **model) -> str:
    return fingerprints.base(config.Model(base=str(folder), **model))


def test_a_file_that_was_replaced_under_its_old_time_is_read_again(tmp_path, monkeypatch):
    monkeypatch.setenv("ENTPROG_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"a" * 1000)
    before, first = path.stat(), fingerprints.file(path)

    def back_in_time():
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    path.write_bytes(b"b" * 1000)  # in place
    back_in_time()
    second = fingerprints.file(path)
    (tmp_path / "other").write_bytes(b"c" * 1000)  # another file under its name
    (tmp_path / "other").replace(path)
    back_in_time()
    assert len({first, second, fingerprints.file(path)}) == 3
    assert fingerprints.file(path) == hashlib.sha256(b"c" * 1000).hexdigest()


def test_a_base_is_its_content(base, tmp_path):
    copy = tmp_path / "elsewhere"
    shutil.copytree(base, copy)
    about = json.loads((copy / "entprog.json").read_text())
    (copy / "entprog.json").write_text(json.dumps({**about, "provenance": {"base": "another path"}}))
    assert of(copy) == of(base), "where it lies and where it came from are no content"
    weights = next((copy / "transformer").glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert of(copy) != of(base), "one bit of one weight is, in a file of equal size"
    (copy / "text_encoder").mkdir()
    before = of(copy)
    (copy / "text_encoder" / "model.safetensors").write_bytes(b"never read")
    assert of(copy) == before


def test_new_networks_differ_by_their_configuration():
    one, other = (fingerprints.base(config.Model(init={**TINY, "num_layers": n})) for n in (6, 7))
    assert one.startswith("new-") and one != other


def test_a_missing_base_is_a_line(tmp_path):
    with pytest.raises(UserError, match=r"model\.base: no such folder"):
        of(tmp_path / "nothing")
    with pytest.raises(UserError, match="cannot read"):
        fingerprints.file(tmp_path / "nothing")


def test_a_file_is_read_again_only_when_it_changed(tmp_path, monkeypatch):
    monkeypatch.setenv("ENTPROG_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    first = fingerprints.file(path)
    assert fingerprints.file(path) == first and len(list((tmp_path / "cache" / "hashes").iterdir())) == 1
    path.write_bytes(b"two")
    assert fingerprints.file(path) != first


def test_the_held_out_loss_has_one_hash_per_clips_draws_and_seed(tmp_path):
    def dataset(sha):
        return Dataset(tmp_path, config.ClipShape(), {"held_out": (ShardInfo("a", 6, 1, sha),)}, {}, "x")

    def held_out(sha="1", **data):
        return fingerprints.held_out(tiny_experiment(data=data), dataset(sha))

    usual = held_out()
    assert fingerprints.held_out(tiny_experiment(train={"seed": 5}), dataset("1")) == usual, "seeds are judged alike"
    assert held_out(held_out_clips=6) == held_out(held_out_clips=60), "there are six"
    others = [held_out("2"), held_out(held_out_clips=3), held_out(held_out_draws=3), held_out(held_out_seed=1)]
    assert len({usual, *others}) == 5


def test_the_device_has_a_name():
    assert len(fingerprints.device_name(torch.device("cpu"))) > 3
