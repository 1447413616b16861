"""Networks in single files, of Wan's original format and ComfyUI's: the same network as in a folder, or one line."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from entprog import models
from entprog.errors import UserError
from entprog.models import fingerprints
from helpers.families import again, load, settings
from helpers.networks import SHAPE, latents

ORIGINAL = (
    (r"^condition_embedder\.time_embedder\.linear_1", "time_embedding.0"),
    (r"^condition_embedder\.time_embedder\.linear_2", "time_embedding.2"),
    (r"^condition_embedder\.text_embedder\.linear_1", "text_embedding.0"),
    (r"^condition_embedder\.text_embedder\.linear_2", "text_embedding.2"),
    (r"^condition_embedder\.time_proj", "time_projection.1"),
    (r"^(vace_blocks\.\d+)\.proj_in", r"\1.before_proj"),
    (r"^(vace_blocks\.\d+)\.proj_out", r"\1.after_proj"),
    (r"^proj_out", "head.head"),
    (r"^scale_shift_table", "head.modulation"),
    (r"\.scale_shift_table", ".modulation"),
    (r"\.attn1\.", ".self_attn."),
    (r"\.attn2\.", ".cross_attn."),
    (r"\.to_out\.0\.", ".o."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.ffn\.net\.0\.proj\.", ".ffn.0."),
    (r"\.ffn\.net\.2\.", ".ffn.2."),
    (r"\.norm2\.", ".norm3."),
)
"""Names of the weights of Wan's networks, text to video and VACE, in diffusers, and in their own code."""


def original(name: str) -> str:
    for ours, theirs in ORIGINAL:
        name = re.sub(ours, theirs, name)
    return name


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    load("wan", conditions=()).save(folder, shape=SHAPE)
    return folder


def single(base, folder, prefix="", change=lambda tensors: tensors):
    tensors = load_file(base / "transformer" / "diffusion_pytorch_model.safetensors")
    named = {f"{prefix}{original(name)}": tensor for name, tensor in tensors.items()}
    save_file(change(named), folder / "wan.safetensors")
    return str(folder / "wan.safetensors")


def without_network(base, folder):
    """The base's folder as somebody has it who fetched its configuration alone."""
    for path in base.rglob("*.json"):
        (folder / path.relative_to(base)).parent.mkdir(parents=True, exist_ok=True)
        (folder / path.relative_to(base)).write_bytes(path.read_bytes())
    return folder


def test_a_vace_network_is_that_of_the_folder(tmp_path):
    load("wan_vace").save(tmp_path / "vace", shape=SHAPE)
    file = single(tmp_path / "vace", tmp_path)
    names = load_file(file).keys()
    assert {"vace_blocks.0.before_proj.weight", "vace_blocks.1.after_proj.bias"} <= names
    ours = again(without_network(tmp_path / "vace", tmp_path / "base"), "wan_vace", weights=file)
    theirs = again(tmp_path / "vace", "wan_vace").network.state_dict()
    assert theirs.keys() == ours.network.state_dict().keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.network.state_dict().items())


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_it_is_the_network_of_the_folder(prefix, base, tmp_path):
    file = single(base, tmp_path, prefix)
    assert any("self_attn.q" in name for name in load_file(file))
    empty = without_network(base, tmp_path / "base")
    ours = again(empty, "wan", weights=file, conditions=("reference", "pose"))
    theirs = again(base, "wan", conditions=("reference", "pose"))
    states = ours.network.state_dict(), theirs.network.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    batch = latents([0, 1])
    predicted = [d.predict(batch.clean, torch.tensor([0.2, 0.8]), batch.conditions) for d in (ours, theirs)]
    assert torch.equal(*predicted) and predicted[0].requires_grad, "it can be trained"
    ours.save(tmp_path / "tuned", shape=SHAPE)
    assert again(tmp_path / "tuned", "wan").provenance["of_base"]["weights"] == file


def test_its_content_is_what_counts_and_not_its_name(base, tmp_path):
    file = single(base, tmp_path)
    one, other = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    changed = load_file(file)
    changed["head.head.bias"] = changed["head.head.bias"] + 1
    save_file(load_file(file), one)
    save_file(changed, other)
    own = {"init": {}, "base": str(base), "vae": "auto", "conditions": ()}
    keys = [fingerprints.base(settings("wan", weights=str(path), **own)) for path in (file, one, other)]
    assert keys[0] == keys[1] != keys[2]


def dropped(tensors):
    return {name: tensor for name, tensor in tensors.items() if name != "head.head.weight"}


def extra(tensors):
    return tensors | {"vace.0.weight": torch.zeros(2)}


def narrow(tensors):
    return tensors | {"head.head.weight": tensors["head.head.weight"][:, :3].contiguous()}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dropped, r"lacks weights that the WanTransformer3DModel of model\.base has"),
        (extra, r"weights that have no place in the WanTransformer3DModel"),
        (narrow, r"cannot load WanTransformer3DModel from"),
        (lambda t: {"transformer.blocks.0.attn1.to_q.lora_A.weight": torch.zeros(2, 2)}, r"give it as model\.adapter"),
        (lambda t: {"pose_net.conv.weight": torch.zeros(2), "unet.x": torch.zeros(2)}, r"MimicMotion's, whose PoseNet"),
    ],
)
def test_a_file_that_does_not_fit_is_one_line(change, said, base, tmp_path):
    file = single(base, tmp_path, change=change)
    with pytest.raises(UserError, match=rf"model\.weights: .*{said}"):
        again(base, "wan", weights=file, conditions=())


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("gone.safetensors", None, "no such file"),
        ("cut.safetensors", b"\x10\0\0", "cannot read"),
        ("wan.pth", b"pickle", "is no safetensors"),
    ],
)
def test_a_file_that_is_none_is_one_line_before_anything_is_read(name, content, said, base, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    model = settings("wan", init={}, base=str(base), vae="auto", conditions=(), weights=str(tmp_path / name))
    for act in (models.family("wan").inspect, models.family("wan").files):
        with pytest.raises(UserError, match=rf"model\.weights: .*{said}"):
            act(model)


def test_what_goes_with_what_is_said(base, tmp_path):
    file = single(base, tmp_path)
    with pytest.raises(UserError, match=r"without model\.base: .*Wan-AI/Wan2\.1-T2V-1\.3B-Diffusers"):
        load("wan", weights=file)
    with pytest.raises(UserError, match=r"give a single file of a network's weights as model\.weights"):
        again(file, "wan")
    load("latte", conditions=()).save(tmp_path / "latte", shape=SHAPE)
    with pytest.raises(UserError, match=r"diffusers reads no single file of a LatteTransformer3DModel"):
        again(tmp_path / "latte", "latte", weights=file, conditions=())
