"""Bases: every file that is read is looked at before anything starts, what diffusers can load is loaded, no more."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import load_file, save_file

from entprog.config import Model
from entprog.errors import UserError
from entprog.models import fingerprints
from entprog.models.wan import inspect, load
from helpers.networks import TINY

STEM = "diffusion_pytorch_model"
SHARDS = {"max_shard_size": "40KB"}


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    sizes = {**TINY, "patch_size": (1, 2, 2), "in_channels": 4, "out_channels": 4, "num_layers": 2}
    return WanTransformer3DModel(**sizes)


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(1)
    scale = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    return AutoencoderKLWan(base_dim=8, z_dim=4, num_res_blocks=1, **scale)


@pytest.fixture
def saved(network, vae, tmp_path):
    """Writes a pipeline's folder, its two networks as asked for."""

    def save(network_as=None, vae_as=None) -> Path:
        network.save_pretrained(tmp_path / "base" / "transformer", **(network_as or {}))
        vae.save_pretrained(tmp_path / "base" / "vae", **(vae_as or {}))
        return tmp_path / "base"

    return save


def refused(base, match, **settings):
    """Each way in says it in one line before weights are read."""
    model = Model(base=str(base), **settings)
    for way in (inspect, fingerprints.base, load):
        with pytest.raises(UserError, match=match) as error:
            way(model)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("network_as", [{}, {"variant": "fp16"}, SHARDS, {**SHARDS, "variant": "fp16"}])
@pytest.mark.parametrize("vae_as", [{}, {"variant": "bf16"}])
def test_what_diffusers_can_load_is_loaded(saved, network, vae, network_as, vae_as):
    denoiser = load(Model(base=str(saved(network_as, vae_as))))
    mine, theirs = denoiser.network.state_dict(), network.state_dict()
    assert all(torch.equal(mine[name], value) for name, value in theirs.items() if name != "patch_embedding.weight")
    assert all(torch.equal(denoiser.vae.state_dict()[name], value) for name, value in vae.state_dict().items())


def test_full_weights_come_before_their_variants(saved, network):
    base = saved()
    state = {name: torch.zeros_like(value) for name, value in network.state_dict().items()}
    save_file(state, base / "transformer" / f"{STEM}.fp16.safetensors", {"format": "pt"})
    before = fingerprints.base(Model(base=str(base)))
    assert load(Model(base=str(base))).network.proj_out.weight.any()
    (base / "transformer" / f"{STEM}.fp16.safetensors").unlink()
    assert fingerprints.base(Model(base=str(base))) == before, "it was not read"


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_a_missing_or_broken_shard_is_named(saved, part):
    base = saved(SHARDS, SHARDS)
    shard = min((base / part).glob("*.safetensors"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    refused(base, f"cannot read .*{shard.name}")
    shard.unlink()
    refused(base, f"lacks {shard.name}, which .*index.json names")


@pytest.mark.parametrize(
    ("index", "match"),
    [
        ({"weight_map": {"a": "b.safetensors"}}, "is damaged: an index has metadata"),
        ({"metadata": {}}, "is damaged: an index has metadata"),
        ({"metadata": {}, "weight_map": {}}, "is damaged: an index has metadata"),
        ({"metadata": {}, "weight_map": ["a"]}, "is damaged: an index has metadata"),
        ({"metadata": {}, "weight_map": {"a": "../vae/config.json"}}, "weights lie beside their index"),
        ({"metadata": {}, "weight_map": {"a": "/etc/passwd"}}, "weights lie beside their index"),
        ({"metadata": {}, "weight_map": {"a": "config.json"}}, "is no file of weights"),
        ([], "does not hold a JSON object"),
    ],
)
def test_a_wrong_index_is_a_line(saved, index, match):
    base = saved(SHARDS)
    (base / "transformer" / f"{STEM}.safetensors.index.json").write_text(json.dumps(index))
    refused(base, match)


def test_other_files_beside_the_weights_do_not_count(saved):
    """What macOS leaves on foreign disks, weights under other names, another library's weights."""
    base = saved()
    before = fingerprints.base(Model(base=str(base)))
    for folder in (base, base / "transformer", base / "vae"):
        for name in (f"._{STEM}.safetensors", "._config.json", ".DS_Store", "model.safetensors", f"{STEM}.msgpack"):
            (folder / name).write_bytes(b"\x00\x05\x16\x07")
    assert load(Model(base=str(base))).vae is not None
    assert fingerprints.base(Model(base=str(base))) == before
    (base / "transformer" / f"{STEM}.safetensors").unlink()
    refused(base, "has no weights that diffusers reads")


def test_a_file_instead_of_a_folder_says_how_to_make_one(saved):
    file = saved() / "transformer" / f"{STEM}.safetensors"
    refused(file, r"model\.base: .* is a file, wanted is a folder .*from_single_file")
    refused(file.parents[1], r"model\.vae: .* is a file, wanted is a folder", vae=str(file))


class Evil:
    def __reduce__(self):
        return os.mkdir, ("unpickled",)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("legacy", [False, True])
def test_pickles_are_read_only_where_trusted_and_never_run(saved, network, tmp_path, monkeypatch, named, legacy):
    """As a file of its own, or named by an index of safetensors; as torch writes them now, and as it used to."""
    monkeypatch.chdir(tmp_path)
    folder = (base := saved()) / "transformer"
    state = load_file(folder / f"{STEM}.safetensors")
    (folder / f"{STEM}.safetensors").unlink()
    file = folder / ("weights.bin" if named else f"{STEM}.bin")
    if named:
        index = {"metadata": {"total_size": 0}, "weight_map": dict.fromkeys(state, file.name)}
        (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps(index))
    torch.save(state, file, _use_new_zipfile_serialization=not legacy)

    refused(base, r"is a pickle, .*model\.trust_pickle=yes")
    trusted = Model(base=str(base), trust_pickle=True)
    assert torch.equal(load(trusted).network.proj_out.weight, network.proj_out.weight)
    before = fingerprints.base(trusted)
    torch.save({**state, "proj_out.bias": state["proj_out.bias"] + 1}, file)
    assert fingerprints.base(trusted) != before, "its content counts"

    torch.save({**state, "proj_out.bias": Evil()}, file, _use_new_zipfile_serialization=not legacy)
    refused(base, "model.trust_pickle=yes")
    refused(base, f"cannot read .*{file.name}", trust_pickle=True)
    assert not Path("unpickled").exists()


def test_a_base_is_what_is_read_of_it(saved, vae, tmp_path):
    base = saved()
    before = fingerprints.base(Model(base=str(base)))
    copy = tmp_path / "copy"
    shutil.copytree(base, copy)
    (copy / "transformer_2").mkdir()
    shutil.copy(copy / "transformer" / f"{STEM}.safetensors", copy / "transformer_2")
    assert fingerprints.base(Model(base=str(copy))) == before, "a second network is not read"
    (copy / "scheduler").mkdir()
    (copy / "scheduler" / "scheduler_config.json").write_text(
        '{"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}'
    )
    assert fingerprints.base(Model(base=str(copy))) != before
    other = fingerprints.base(Model(base=str(base), vae=str(copy / "vae")))
    assert other == before, "the same VAE, given by its name"
    state = {name: value + 1 for name, value in vae.state_dict().items()}
    save_file(state, copy / "vae" / f"{STEM}.safetensors", {"format": "pt"})
    assert fingerprints.base(Model(base=str(base), vae=str(copy / "vae"))) != before
    assert fingerprints.base(Model(base=str(base), vae="none")) != before
