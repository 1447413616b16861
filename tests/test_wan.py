"""models/wan.py: real diffusers classes at tiny sizes."""

import json
import logging

import diffusers
import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import load_file, save_file

from entprog import blocks
from entprog.config import ClipShape, Model
from entprog.errors import UserError
from entprog.models import families, family, fingerprints
from entprog.models.folders import saved
from entprog.models.wan import inspect, load
from helpers.families import FIVE as SHAPE
from helpers.families import clips
from helpers.runs import differing

NETWORK = {
    "patch_size": [1, 4, 4],
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "text_dim": 8,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 3,
    "rope_max_seq_len": 32,
}


def new(seed=0, **settings):
    return load(Model(**{"init": NETWORK, "vae": "none", **settings}), seed=seed)


def draws(denoiser, shape=SHAPE, batch=2, seed=1):
    """Random noisy latents, times and conditions, none of them zero."""
    generator = torch.Generator().manual_seed(seed)
    size = (batch, *denoiser.latent_shape(shape))
    names = ("noisy", "reference", "pose")
    noisy, *given = (torch.randn(size, generator=generator) for _ in names)
    conditions = dict(zip(names[1:], given, strict=True))
    return noisy, torch.rand(batch, generator=generator), conditions


def plain(folder):
    return WanTransformer3DModel.from_pretrained(folder)


def run(network, inputs, t, tokens=1):
    text = torch.zeros(len(inputs), tokens, network.config.text_dim)
    with torch.no_grad():
        return network(inputs, t * 1000, text, return_dict=False)[0]


def vae(**changes):
    torch.manual_seed(3)
    sizes = {"base_dim": 8, "z_dim": 4, "num_res_blocks": 1, "latents_mean": [0.1, -0.2, 0.3, 0.0]}
    return AutoencoderKLWan(**{**sizes, "latents_std": [1.5, 0.5, 2.0, 1.0], **changes})


@pytest.fixture
def warnings_of_diffusers(caplog):
    logger = logging.getLogger("diffusers")
    before = logger.propagate
    logger.propagate = True
    with caplog.at_level(logging.WARNING, "diffusers"):
        yield caplog
    logger.propagate = before


def test_family_is_found():
    assert "wan" in families() and family("wan").CLASS == "WanTransformer3DModel"


def test_new_network_depends_on_seed_alone_and_leaves_torch_s_state():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, same, other = new(7), new(7), new(8)
    assert torch.equal(before, torch.get_rng_state())
    pairs = list(zip(one.network.parameters(), same.network.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(one.network.proj_out.weight, other.network.proj_out.weight)
    assert one.network.config.in_channels == 9 and one.network.config.out_channels == 3
    noisy, t, conditions = draws(one)
    with torch.no_grad():
        assert one.predict(noisy, t, conditions).std() > 0


def test_blocks_and_outside_are_every_parameter_once():
    denoiser = new()
    found = blocks.blocks(denoiser.network)
    assert len(found) == 3
    parts = denoiser.outside()
    inside = [p for block in found for p in block.module.parameters()]
    every = [*inside, *parts["conditions"], *parts["rest"]]
    assert len(every) == len({id(p) for p in every}) == len(list(denoiser.network.parameters()))
    assert parts["conditions"][0].shape == (24, 9, 1, 4, 4)


def test_every_skip_changes_the_output_and_restores_it():
    denoiser = new()
    given = draws(denoiser)
    with torch.no_grad():
        before = denoiser.predict(*given)
        for block in blocks.blocks(denoiser.network):
            with blocks.skipped(block):
                assert not torch.equal(denoiser.predict(*given), before)
        assert torch.equal(denoiser.predict(*given), before)


def test_bypass_gives_the_first_argument_also_by_name():
    block = new().network.blocks[0]
    x = torch.zeros(1)
    assert blocks.bypass(block, x, 1, 2, 3) is x
    assert blocks.bypass(block, hidden_states=x, temb=2) is x


@torch.no_grad()
@pytest.mark.parametrize("conditions", [("reference",), ("pose",), ()])
def test_widened_base_gives_its_own_bits_and_plain_diffusers_agree(tmp_path, conditions):
    base = new(conditions=conditions)
    base.save(tmp_path / "base", shape=SHAPE)
    wide = load(Model(base=str(tmp_path / "base")))
    missing = [name for name in ("reference", "pose") if name not in conditions]
    assert wide.conditions == (*conditions, *missing)
    noisy, t, given = draws(wide)
    expected = base.predict(noisy, t, given)
    assert torch.equal(wide.predict(noisy, t, given), expected)
    inputs = torch.cat([noisy, *(given[name] for name in conditions)], dim=1)
    assert torch.equal(run(plain(tmp_path / "base" / "transformer"), inputs, t), expected)
    assert not wide.network.patch_embedding.weight[:, 3 * (1 + len(conditions)) :].any()


def test_new_channels_learn(tmp_path):
    new(conditions=["reference"]).save(tmp_path / "base")
    wide = load(Model(base=str(tmp_path / "base")))
    noisy, t, given = draws(wide)
    wide.predict(noisy, t, given).square().mean().backward()
    assert wide.network.patch_embedding.weight.grad[:, 6:].abs().sum() > 0


@torch.no_grad()
def test_saved_network_gives_the_same_bits_and_loads_in_diffusers(tmp_path, warnings_of_diffusers):
    new(conditions=["reference"]).save(tmp_path / "base", shape=SHAPE, shift=3.0)
    wide = load(Model(base=str(tmp_path / "base")))
    wide.network.patch_embedding.weight.normal_(generator=torch.Generator().manual_seed(1))
    wide.save(tmp_path / "tuned", note="a test")
    again = load(Model(base=str(tmp_path / "tuned")), seed=9)
    given = draws(wide)
    assert torch.equal(again.predict(*given), wide.predict(*given))
    assert not differing(wide.network.state_dict(), again.network.state_dict())

    network = plain(tmp_path / "tuned" / "transformer")
    assert network.config.in_channels == 9
    noisy, t, conditions = given
    output = run(network, torch.cat([noisy, conditions["reference"], conditions["pose"]], dim=1), t)
    torch.testing.assert_close(output, wide.predict(*given), rtol=1e-4, atol=1e-5)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "tuned" / "scheduler")
    assert scheduler.config.shift == 3.0
    assert not warnings_of_diffusers.records, warnings_of_diffusers.text

    about = saved(tmp_path / "tuned")
    assert about["conditions"] == ["reference", "pose"] and about["provenance"]["note"] == "a test"
    assert again.shape == SHAPE and again.shift == 3.0
    assert str(tmp_path / ".cache") not in (tmp_path / "tuned" / "transformer" / "config.json").read_text()


def test_saving_again_replaces_the_folder_and_leaves_nothing_beside(tmp_path):
    denoiser = new()
    denoiser.save(tmp_path / "model")
    (tmp_path / "model" / "stray").touch()
    denoiser.save(tmp_path / "model")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == [
        "entprog.json", "model_index.json", "pipeline.py", "scheduler", "skeleton.py", "transformer",
    ]  # fmt: skip


def test_transformer_s_own_folder_of_a_saved_checkpoint_is_the_checkpoint(tmp_path):
    new().save(tmp_path / "model", shape=SHAPE)
    assert load(Model(base=str(tmp_path / "model" / "transformer"))).shape == SHAPE


@torch.no_grad()
def test_pipeline_folder_with_vae(tmp_path):
    torch.manual_seed(0)
    network = WanTransformer3DModel(**{**NETWORK, "patch_size": [1, 2, 2]}, in_channels=4, out_channels=4)
    network.save_pretrained(tmp_path / "wan" / "transformer")
    vae().save_pretrained(tmp_path / "wan" / "vae")
    diffusers.UniPCMultistepScheduler(flow_shift=5.0).save_pretrained(tmp_path / "wan" / "scheduler")
    (tmp_path / "wan" / "model_index.json").write_text('{"_class_name": "WanPipeline"}')

    denoiser = load(Model(base=str(tmp_path / "wan")))
    assert denoiser.shift == 5.0 and denoiser.network.config.in_channels == 12
    assert denoiser.latent_shape(SHAPE) == (4, 2, 4, 2)
    denoiser.check(SHAPE)
    with pytest.raises(UserError, match=r"4n\+1 with this VAE, given 8: take 5 or 9"):
        denoiser.check(ClipShape(frames=8, height=32, width=16))
    with pytest.raises(UserError, match=r"data.shape.width must be a multiple of 16 .*, given 40"):
        denoiser.check(ClipShape(frames=5, height=32, width=40))

    latents = denoiser.encode(clips())
    assert latents.clean.shape == (2, 4, 2, 4, 2)
    assert {n: tuple(c.shape) for n, c in latents.conditions.items()} == dict.fromkeys(
        ("reference", "pose"), (2, 4, 2, 4, 2)
    )
    # a clip's latents do not depend on its batch, and are what WanPipeline's decoding takes
    alone = denoiser.encode(clips().part(slice(0, 1)))
    torch.testing.assert_close(alone.clean, latents.clean[:1], rtol=1e-4, atol=1e-5)
    assert torch.equal(latents.conditions["reference"][:, :, 0], latents.conditions["reference"][:, :, 1])
    video = denoiser.decode(latents.clean)
    assert video.shape == (2, 5, 3, 32, 16) and video.abs().max() <= 1
    expected = denoiser.vae.decode(
        latents.clean * torch.tensor([1.5, 0.5, 2, 1]).view(4, 1, 1, 1)
        + torch.tensor([0.1, -0.2, 0.3, 0]).view(4, 1, 1, 1)
    ).sample
    torch.testing.assert_close(video, expected.transpose(1, 2))
    noisy, t, _ = draws(denoiser)
    velocity = denoiser.predict(noisy, t, latents.conditions)
    assert torch.equal(velocity, run(network, noisy, t))
    # 512 zero tokens, as the pipeline pads, say no more than one
    torch.testing.assert_close(velocity, run(network, noisy, t, tokens=512), rtol=1e-4, atol=1e-5)

    denoiser.save(tmp_path / "tuned", shape=SHAPE)
    again = load(Model(base=str(tmp_path / "tuned")))
    assert again.shift == 5.0 and torch.equal(again.encode(clips()).clean, latents.clean)
    (tmp_path / "tuned" / "vae" / "config.json").unlink()
    with pytest.raises(UserError, match="saved with a VAE"):
        load(Model(base=str(tmp_path / "tuned")))


def test_pixels_round_trip():
    denoiser = new()
    latents = denoiser.encode(clips())
    assert latents.clean.shape == (2, 3, 5, 32, 16) and latents.clean.is_contiguous()
    assert all(c.shape == latents.clean.shape and c.abs().max() <= 1 for c in latents.conditions.values())
    assert latents.conditions["pose"].std() > 0
    reference = (latents.conditions["reference"][:, :, 3].permute(0, 2, 3, 1) + 1) * 127.5
    assert torch.equal(reference.round().to(torch.uint8), clips().reference)
    assert torch.equal(denoiser.decode(latents.clean), latents.clean.transpose(1, 2))
    assert not latents.clean.requires_grad and torch.equal(latents.position, torch.arange(2))


def test_only_conditions_of_the_network_are_computed():
    assert list(new(conditions=["reference"]).encode(clips()).conditions) == ["reference"]


@torch.no_grad()
def test_prompt_embeds_are_seen_and_kept(tmp_path):
    save_file({"prompt_embeds": torch.randn(6, 8)}, tmp_path / "prompt.safetensors")
    without, denoiser = new(), new(prompt_embeds=str(tmp_path / "prompt.safetensors"))
    given = draws(denoiser)
    assert not torch.equal(denoiser.predict(*given), without.predict(*given))
    denoiser.save(tmp_path / "model")
    assert torch.equal(load(Model(base=str(tmp_path / "model"))).predict(*given), denoiser.predict(*given))


@torch.no_grad()
def test_prompt_embeds_are_filled_up_as_the_base_has_seen_texts(tmp_path):
    """What lies with a network that an earlier version trained is left as it was."""
    embeds = torch.randn(6, 8)
    kept, hashes = {}, set()
    for name, tokens in {"short": embeds, "whole": torch.nn.functional.pad(embeds, (0, 0, 0, 506))}.items():
        save_file({"prompt_embeds": tokens}, tmp_path / name)
        model = {"init": NETWORK, "vae": "none", "prompt_embeds": str(tmp_path / name)}
        kept[name] = new(prompt_embeds=str(tmp_path / name))
        source = inspect(Model(**model))
        assert source.filled is (name == "short") and source.tensors["text"].shape == (1, 512, 8)
        hashes.add(fingerprints.base(Model(**model)))
    given = draws(kept["short"])
    assert torch.equal(*(denoiser.predict(*given) for denoiser in kept.values())) and len(hashes) == 2
    kept["short"].save(tmp_path / "model")
    save_file({"prompt_embeds": embeds}, tmp_path / "model" / "prompt_embeds.safetensors")
    old = inspect(Model(base=str(tmp_path / "model"), vae="none"))
    assert not old.filled and old.tensors["text"].shape == (1, 6, 8)
    assert inspect(Model(init=NETWORK, vae="none")).tensors["text"].shape == (1, 1, 8), "zeros are as many as one"


@torch.no_grad()
def test_bfloat16_autocast_keeps_float32_outside(tmp_path):
    full, half = new(), new(dtype="bfloat16")
    given = draws(full)
    velocity = half.predict(*given)
    assert velocity.dtype == torch.float32 == half.network.proj_out.weight.dtype
    assert not torch.equal(velocity, full.predict(*given))
    torch.testing.assert_close(velocity, full.predict(*given), rtol=0.1, atol=0.1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Checkpoints that must not load, by what is wrong with them."""
    tmp_path = tmp_path_factory.mktemp("broken")
    new().save(tmp_path / "good")
    torch.manual_seed(0)
    diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, num_layers=1, text_embed_dim=8, time_embed_dim=8
    ).save_pretrained(tmp_path / "other" / "transformer")
    WanTransformer3DModel(**NETWORK, in_channels=16, out_channels=16).save_pretrained(tmp_path / "latents")
    (tmp_path / "empty").mkdir()

    def broken(name, change):
        new().save(tmp_path / name)
        change(tmp_path / name)

    weights = "transformer/diffusion_pytorch_model.safetensors"
    broken("truncated", lambda f: (f / weights).write_bytes((f / weights).read_bytes()[:5000]))
    broken("garbage", lambda f: (f / weights).write_bytes(b"garbage" * 100))
    broken("weightless", lambda f: (f / weights).unlink())
    broken("partial", lambda f: save_file({"proj_out.bias": torch.zeros(48)}, f / weights, {"format": "pt"}))
    broken("not_json", lambda f: (f / "transformer" / "config.json").write_text("{"))
    broken("foreign_record", lambda f: (f / "entprog.json").write_text('{"format": "x"}'))
    broken("wrong_shape", lambda f: _edit(f / "transformer" / "config.json", ffn_dim=40))
    broken("odd_record", lambda f: _edit(f / "entprog.json", conditions=["depth"], shift="x"))
    broken("bad_record", lambda f: _edit(f / "entprog.json", input_channels=[5]))
    return tmp_path


def _edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base": "{}/nowhere"}, "no such folder"),
        ({"base": "{}/empty"}, "no diffusers checkpoint in .* neither config.json nor transformer/config.json"),
        (
            {"base": "{}/other"},
            "holds a CogVideoXTransformer3DModel, not a WanTransformer3DModel; set model.family=cogvideox",
        ),
        ({"base": "{}/latents"}, "16 output channels, pixels have 3 channels: give its own VAE as model.vae"),
        ({"base": "{}/truncated"}, r"cannot read .*truncated/transformer/.*.safetensors"),
        ({"base": "{}/garbage"}, r"cannot read .*garbage/transformer/.*.safetensors"),
        ({"base": "{}/weightless"}, r"has no weights"),
        ({"base": "{}/partial"}, r"\d+ weights are missing from the WanTransformer3DModel"),
        ({"base": "{}/not_json"}, "cannot read"),
        ({"base": "{}/foreign_record"}, "has format 'x'"),
        ({"base": "{}/odd_record"}, "entprog.json is damaged: setting conditions"),
        ({"base": "{}/bad_record"}, "input layer has 9 channels"),
        ({"base": "{}/good", "vae": "{}/good"}, "no VAE in"),
        ({"base": "{}/good", "vae": "{}/nowhere"}, "model.vae: no such folder"),
        ({"base": "{}/good", "vae": "{}/other/transformer"}, "needs AutoencoderKLWan"),
        ({"base": "{}/good", "conditions": ["pose"]}, "trained with reference, pose; add reference"),
        ({"base": "{}/good", "init": {"num_layers": 2}}, "both given"),
        ({"base": "{}/wrong_shape"}, r"has shape \[.*by its config.json it should have"),
        ({"base": "{}/good", "prompt_embeds": "{}/none.safetensors"}, "prompt_embeds: cannot read"),
        ({}, "no network: set model.base"),
        ({"init": {"num_layer": 2}}, "model.init.num_layer .did you mean num_layers"),
        ({"init": {"in_channels": 2}}, "computed"),
        ({"init": {**NETWORK, "out_channels": 16}}, "16 output channels"),
        ({"init": {**NETWORK, "num_layers": "many"}}, "model.init does not describe a WanTransformer3DModel"),
        ({"init": {**NETWORK, "attention_head_dim": 15}}, "model.init does not describe a WanTransformer3DModel"),
        ({"init": {**NETWORK, "patch_size": []}}, "patch_size needs 3 numbers"),
    ],
)
def test_wrong_settings_give_one_clear_line(folders, settings, message):
    given = {k: v.format(folders) if isinstance(v, str) else v for k, v in settings.items()}
    with pytest.raises(UserError, match=message) as error:
        load(Model(**given))
    with pytest.raises(UserError, match=message):  # before weights are read
        inspect(Model(**given))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("pieces", [1, 2], ids=["one file", "an index"])
def test_weights_are_held_against_config_json_before_they_are_read(pieces, tmp_path):
    new().save(tmp_path / "good")
    folder = tmp_path / "good" / "transformer"
    network = WanTransformer3DModel.from_pretrained(folder)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    network.save_pretrained(folder, max_shard_size="5KB" if pieces == 2 else "5GB")
    whole = {path: load_file(path) for path in sorted(folder.glob("*.safetensors"))}
    assert (len(whole) > 1) == (pieces == 2)
    inspect(Model(base=str(tmp_path / "good")))
    path, tensors = next(iter(whole.items()))
    other = next(iter(tensors))
    for changed, message in (
        ({name: tensor for name, tensor in tensors.items() if name != other}, "1 weights are missing from"),
        ({**tensors, "blocks.9.bias": tensors[other].clone()}, "1 weights have no place in"),
        ({**tensors, other: tensors[other][..., None].clone()}, f"{other} in .* has shape"),
    ):
        save_file(changed, path, metadata={"format": "pt"})
        with pytest.raises(UserError, match=message):
            inspect(Model(base=str(tmp_path / "good")))
    for passed in ("blocks.0.attn2.norm_added_q.weight", "old.proj_attn.weight"):  # diffusers passes over, or renames
        save_file({**tensors, passed: tensors[other].clone()}, path, metadata={"format": "pt"})
        inspect(Model(base=str(tmp_path / "good")))


def test_hub_name_that_cannot_be_reached(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="neither a folder here nor could it be fetched"):
        load(Model(base="an-owner-that-is-not/a-model"))
