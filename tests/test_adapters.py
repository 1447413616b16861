"""Adapters as files: equal to the bit in diffusers and back, in all kinds of keys; merged, extracted, trained on."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from entprog import models
from entprog.blocks import ADAPTER, blocks
from entprog.config import Lora
from entprog.errors import UserError
from entprog.models import adapters, folders, lora
from entprog.models.adapters import Adapter, Pair
from helpers import families
from helpers.families import TINY
from helpers.networks import SHAPE, latents, tiny_denoiser, tiny_experiment
from pipelines import adapter as job
from pipelines.training import networks

TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")


def experiment(conditions=(), **lora_settings):
    settings = {"rank": 4, "alpha": 8, "targets": TARGETS, **lora_settings}
    return tiny_experiment(
        model={"conditions": conditions}, train={"lora": settings}, schedule={"outside": "conditions"}
    )


def tuned(wanted, seed=0):
    """A network whose adapters, and the input layer beside them, were trained: here by chance."""
    denoiser, generator = tiny_denoiser(wanted, seed), torch.Generator().manual_seed(7)
    lora.add(denoiser.network, blocks(denoiser.network), wanted.train.lora, 0)
    with torch.no_grad():
        for name, parameter in denoiser.network.named_parameters():
            if ADAPTER in name or name.startswith("patch_embedding"):
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return denoiser


def prediction(denoiser):
    batch = latents(range(2))
    conditions = {name: batch.conditions[name] for name in denoiser.conditions}
    with torch.no_grad():
        return denoiser.predict(batch.clean, torch.tensor([0.2, 0.8]), conditions)


def equal(one: Adapter, other: Adapter) -> bool:
    same = one.pairs.keys() == other.pairs.keys()
    return same and all(
        torch.equal(a.down, b.down) and torch.equal(a.up, b.up) and a.alpha == b.alpha
        for a, b in ((one.pairs[name], other.pairs[name]) for name in one.pairs)
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(the base's folder, the adapter's, the network that they make together)"""
    folder, wanted = tmp_path_factory.mktemp("adapters"), experiment()
    tiny_denoiser(wanted).save(folder / "base", shape=SHAPE)
    denoiser = tuned(wanted)
    about = {"family": "wan", "conditions": [], "base": str(folder / "base")}
    outside = denoiser.outside()["conditions"]
    lora.save(denoiser.network, wanted.train.lora, outside, folder / "adapter", "transformer", about)
    return folder / "base", folder / "adapter", denoiser


def pipeline(base):
    import diffusers

    network = diffusers.WanTransformer3DModel.from_pretrained(base / "transformer")
    return diffusers.WanPipeline(None, None, vae=None, scheduler=None, transformer=network)


def given_to(network) -> dict[str, torch.Tensor]:
    """Tensors of a network's adapters, whatever the adapter is called."""
    parts = {n: t for n, t in network.state_dict().items() if ADAPTER in n}
    return {n.replace(n.split(ADAPTER)[1].split(".")[1], "x"): t for n, t in parts.items()}


def test_diffusers_takes_it_to_the_bit(saved):
    base, folder, denoiser = saved
    pipe = pipeline(base)
    pipe.load_lora_weights(str(folder))
    ours, theirs = given_to(denoiser.network), given_to(pipe.transformer)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    rest = load_file(folder / adapters.OUTSIDE)
    assert set(rest) == {"patch_embedding.weight", "patch_embedding.bias"}
    pipe.transformer.load_state_dict(rest, strict=False)
    other = tiny_denoiser(experiment())
    object.__setattr__(other, "network", pipe.transformer)
    assert torch.equal(prediction(other), prediction(denoiser)), "alpha over rank is the same too"
    said = (folder / "README.md").read_text()
    assert "half of what was trained" in said and "patch_embedding.weight" in said


@pytest.mark.parametrize("name", TINY)
def test_the_card_names_diffusers_where_its_pipeline_takes_adapters(name, tmp_path):
    denoiser, settings = families.load(name), Lora(rank=2)
    lora.add(denoiser.network, blocks(denoiser.network), settings, 0)
    lora.save(denoiser.network, settings, [], tmp_path / "a", denoiser.PART, {"family": TINY[name]["family"]})
    taken = hasattr(denoiser.NETWORK, "load_lora_adapter")
    assert ("`pipe.load_lora_weights(" in (tmp_path / "a" / "README.md").read_text()) == taken


def test_what_diffusers_saves_is_taken_to_the_bit(saved, tmp_path):
    from peft.utils import get_peft_model_state_dict

    base, folder, _ = saved
    pipe = pipeline(base)
    pipe.load_lora_weights(str(folder), adapter_name="x")
    config = pipe.transformer.peft_config["x"].to_dict()
    layers = get_peft_model_state_dict(pipe.transformer, adapter_name="x")
    pipe.save_lora_weights(tmp_path, layers, transformer_lora_adapter_metadata=config)
    assert equal(adapters.read(str(tmp_path), "it"), adapters.read(str(folder), "it"))


def test_all_kinds_of_keys_are_the_same_adapter(saved, tmp_path):
    _, folder, _ = saved
    first = adapters.read(str(folder), "it")
    assert first.pairs["blocks.0.ffn.net.0.proj"].alpha == 8 and len(first.pairs) == 6 * (2 * 4 + 2)
    shutil.copytree(folder, tmp_path / "peft")
    (tmp_path / "peft" / adapters.DIFFUSERS).unlink()
    assert equal(adapters.read(str(tmp_path / "peft"), "it"), first)
    assert equal(adapters.read(str(folder / adapters.COMFYUI), "it"), first)
    keys = load_file(folder / adapters.COMFYUI)
    assert {key.split("blocks.0.")[1] for key in keys if ".blocks.0." in key and "alpha" in key} == {
        f"{part}.{name}.alpha" for part in ("self_attn", "cross_attn") for name in "qkvo"
    } | {"ffn.0.alpha", "ffn.2.alpha"}


def test_diffusers_reads_comfyuis_keys_as_the_same_change(saved):
    base, folder, _ = saved
    pipe, ours = pipeline(base), adapters.read(str(folder), "it")
    pipe.load_lora_weights(str(folder / adapters.COMFYUI), adapter_name="x")
    for name, pair in ours.pairs.items():
        layer = pipe.transformer.get_submodule(name)
        assert torch.equal(layer.get_delta_weight("x"), pair.delta()), name


def test_merged_it_is_the_network_that_was_trained(saved):
    base, folder, denoiser = saved
    wanted = experiment()
    model = wanted.model.model_copy(update={"base": str(base), "init": {}, "adapter": str(folder)})
    merged = models.family("wan").load(model)
    reference = tuned(wanted)
    lora.merge(reference.network)
    ours, theirs = merged.network.state_dict(), reference.network.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    torch.testing.assert_close(prediction(merged), prediction(denoiser), rtol=1e-4, atol=1e-5)
    assert merged.provenance["adapter"] == str(folder)
    files = models.family("wan").files(model)
    assert {name for name in files if name.startswith("adapter/")} == {
        f"adapter/{name}" for name in (adapters.DIFFUSERS, adapters.OUTSIDE, adapters.ABOUT, "adapter_config.json")
    }


def test_a_training_of_adapters_goes_on_where_it_ended(saved):
    _, folder, denoiser = saved
    wanted = experiment()
    again = tiny_denoiser(wanted)
    lora.add(again.network, blocks(again.network), wanted.train.lora, seed=5)
    adapters.go_on(adapters.read(str(folder), "it"), again.network, wanted.train.lora, "it")
    ours, theirs = again.network.state_dict(), denoiser.network.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    with pytest.raises(UserError, match=r"has rank 4 and alpha 8, train.lora rank 2 and alpha 8"):
        adapters.check_goes_on(adapters.read(str(folder), "it"), Lora(rank=2, alpha=8), "it")


@pytest.mark.parametrize("rank", [2, 4, 64])
def test_extracted_is_the_best_of_its_rank_and_the_rest_is_whole(rank):
    wanted = experiment(conditions=("pose",))
    base, after = tiny_denoiser(wanted), tuned(wanted)
    lora.merge(after.network)
    with torch.no_grad():
        after.network.blocks[1].norm2.weight += 0.1
    found, lost = adapters.extract(base.network, after.network, blocks(after.network), rank, {})
    assert set(found.outside) == {"patch_embedding.weight", "patch_embedding.bias", "blocks.1.norm2.weight"}
    assert (lost < 1e-6) == (rank >= 4), "the change was of rank 4"
    adapters.merge(found, base.network, "it")
    if rank >= 4:
        torch.testing.assert_close(prediction(base), prediction(after), rtol=1e-4, atol=1e-5)
    nothing, _ = adapters.extract(base.network, base.network, blocks(base.network), rank, {})
    assert not nothing.pairs and not nothing.outside


def test_layers_of_several_ranks_and_alphas_are_kept_apart(tmp_path):
    pairs = {
        f"blocks.{n}.attn1.to_q": Pair(torch.ones(rank, 32), torch.ones(32, rank), alpha)
        for n, (rank, alpha) in enumerate([(4, 4.0), (4, 4.0), (2, 8.0)])
    }
    adapters.write(tmp_path / "a", Adapter(pairs, about={"family": "wan"}), "transformer")
    for name in (adapters.DIFFUSERS, adapters.COMFYUI):
        read = adapters.read(str(tmp_path / "a" / name), "it")
        assert equal(read, Adapter(pairs))


def scaled(folder, change):
    """The scale of layer blocks.0.attn1.to_q as peft applies it, after a change of its configuration."""
    from peft import PeftModel

    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    network = PeftModel.from_pretrained(tiny_denoiser(experiment()).network, folder)
    return network.base_model.model.get_submodule("blocks.0.attn1.to_q").scaling["default"]


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"lora_alpha": 16},
        {"use_rslora": True},
        {"alpha_pattern": {"to_q": 2}},
        {"alpha_pattern": {"blocks.0.attn1.to_q": 3}, "use_rslora": True},
        {"alpha_pattern": {r"attn\d.to_.*": 5}},
    ],
)
def test_scales_are_peft_s(saved, change, tmp_path):
    """Of the folder, and of its file alone."""
    _, folder, _ = saved
    shutil.copytree(folder, tmp_path / "a")
    (tmp_path / "a" / adapters.DIFFUSERS).unlink()
    scale = scaled(tmp_path / "a", change)
    for given in (tmp_path / "a", tmp_path / "a" / adapters.PEFT):
        pair = adapters.read(str(given), "it").pairs["blocks.0.attn1.to_q"]
        assert pair.alpha / pair.rank == pytest.approx(scale), given


@pytest.mark.parametrize(
    "change",
    [
        {"alpha_pattern": {"(a+)+b": 1}},  # of a long name of a's, it would never end
        {"alpha_pattern": {".*.*.*b": 1}},
        {"alpha_pattern": {"a{99999999999}": 1}},
        {"lora_alpha": 10**400},
    ],
)
def test_an_alpha_that_cannot_be_told_is_a_line(change, saved, tmp_path):
    shutil.copytree(saved[1], tmp_path / "a")
    (tmp_path / "a" / adapters.DIFFUSERS).unlink()
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match="says its alpha in no known way"):
        adapters.read(str(tmp_path / "a"), "it")


def test_whole_weights_of_adapted_layers_go_on_too(tmp_path):
    """A full training changed biases beside the weights that an adapter was extracted from."""
    wanted = experiment()
    base, after = tiny_denoiser(wanted), tiny_denoiser(wanted)
    with torch.no_grad():
        for block in blocks(after.network):
            block.module.attn1.to_q.weight += 0.1
            block.module.attn1.to_q.bias += 0.1
    found, _ = adapters.extract(base.network, after.network, blocks(after.network), 4, {})
    assert "blocks.0.attn1.to_q.bias" in found.outside
    settings = Lora(rank=1, alpha=1, targets=("attn1.to_q",))
    one = Adapter({name: Pair(pair.down[:1], pair.up[:, :1], 1.0) for name, pair in found.pairs.items()}, found.outside)
    lora.add(base.network, blocks(base.network), settings, seed=0)
    adapters.go_on(one, base.network, settings, "it")
    whole = [p for name, p in base.network.named_parameters() if adapters.plain_name(name) in found.outside]
    lora.save(base.network, settings, whole, tmp_path / "again")
    again = adapters.read(str(tmp_path / "again"), "it")
    assert again.outside.keys() == found.outside.keys()
    assert all(torch.equal(again.outside[name], found.outside[name]) for name in found.outside)
    adapters.check(again, tiny_denoiser(wanted).network, "it")


def test_comfyuis_file_has_no_keys_that_its_network_lacks(tmp_path):
    layers = ["blocks.0.attn2.add_k_proj", "face_adapter.0.to_q", "face_adapter.0.to_v", "face_adapter.1.to_out"]
    pairs = {name: Pair(torch.ones(2, 32), torch.ones(32, 2), 2.0) for name in layers}
    for name, kept in (("both", pairs), ("faces", dict(list(pairs.items())[1:]))):
        adapters.write(tmp_path / name, Adapter(kept, about={"family": "wan_animate"}), "transformer")
        assert equal(adapters.read(str(tmp_path / name), "it"), Adapter(kept)), "the others' files have all"
    keys = load_file(tmp_path / "both" / adapters.COMFYUI)
    assert {key.split(".", 1)[1].rsplit(".", 1)[0].removesuffix(".lora_A").removesuffix(".lora_B") for key in keys} == {
        "blocks.0.cross_attn.k_img"
    }
    said = (tmp_path / "both" / "README.md").read_text()
    assert "comfyui.safetensors, without 3 layers" in said and "face_adapter.1.to_out" in said
    assert not (tmp_path / "faces" / adapters.COMFYUI).exists()
    assert "ComfyUI:" not in (tmp_path / "faces" / "README.md").read_text()


def test_commands(saved, tmp_path):
    base, folder, denoiser = saved
    options = ["merge", "--adapter", str(folder), "--base", str(base), "--output", str(tmp_path / "merged")]
    dry = CliRunner().invoke(job.app, [*options, "--dry-run"])
    assert dry.exit_code == 0 and "Would merge 60 layers and 2 whole weights" in dry.output, dry.output
    assert not (tmp_path / "merged").exists()
    done = CliRunner().invoke(job.app, options)
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "merged" / "result.json").read_text())
    assert (result["layers"], result["whole_weights"]) == (60, 2)
    said = shutil.copytree(folder, tmp_path / "said")  # as training leaves it: with clip shape, and text where one is
    about = json.loads((said / adapters.ABOUT).read_text())
    (said / adapters.ABOUT).write_text(json.dumps(about | {"shape": SHAPE.model_dump(), "dtype": "bfloat16"}))
    text = torch.rand(3, denoiser.text.shape[-1])
    save_file({"prompt_embeds": text}, said / folders.PROMPT)
    again = ["merge", "--adapter", str(said), "--base", str(base), "--output", str(tmp_path / "with text")]
    known = CliRunner().invoke(job.app, again)
    assert known.exit_code == 0 and ["Neither says which type" in each.output for each in (done, known)] == [
        True,
        False,
    ]
    merged = folders.saved(tmp_path / "with text" / "model")
    assert merged["shape"] == SHAPE.model_dump() and merged["provenance"]["dtype"] == "bfloat16"
    assert torch.equal(load_file(tmp_path / "with text" / "model" / folders.PROMPT)["prompt_embeds"], text)
    after = Path(result["model"])
    about = json.loads((after / folders.ABOUT).read_text())
    trained = {"provenance": about["provenance"] | {"dtype": "bfloat16"}}
    (after / folders.ABOUT).write_text(json.dumps(about | {"native": True, "shape": SHAPE.model_dump()} | trained))
    save_file({"prompt_embeds": text}, after / folders.PROMPT)
    options = ["extract", "--before", str(base), "--after", result["model"], "--output", str(tmp_path / "out")]
    done = CliRunner().invoke(job.app, [*options, "--rank", "4"])
    assert done.exit_code == 0 and "without 0.0% of their change" in done.output, done.output
    again = models.family("wan").load(
        experiment().model.model_copy(update={"base": str(base), "init": {}, "adapter": str(tmp_path / "out/adapter")})
    )
    assert torch.equal(again.text[0], text), "an adapter's own text is shown, whoever loads it"
    kept = json.loads((tmp_path / "out/adapter" / adapters.ABOUT).read_text())
    assert kept["native"] and kept["shape"] == SHAPE.model_dump() and kept["dtype"] == "bfloat16"
    again = replace(again, text=denoiser.text)
    torch.testing.assert_close(prediction(again), prediction(denoiser), rtol=1e-4, atol=1e-5)
    weights = Path(result["model"]) / "transformer" / f"{folders.STEM}.safetensors"
    tensors = load_file(weights)
    next(iter(tensors.values())).view(-1)[0] = torch.nan
    save_file(tensors, weights, metadata={"format": "pt"})
    for last in ([], ["--dry-run"]):
        done = CliRunner().invoke(job.app, [*options[:5], "--output", str(tmp_path / "nan"), *last])
        assert done.exit_code == 2 and "--after: " in done.output and "is not finite" in done.output
        assert not (tmp_path / "nan").exists()
    same = CliRunner().invoke(job.app, [*options[:3], "--after", str(base), "--output", str(tmp_path / "none")])
    assert same.exit_code == 2 and "nothing to adapt" in same.output and not (tmp_path / "none").exists()


def test_no_adapter_is_merged_twice(saved, tmp_path):
    base, folder, _ = saved

    def merge(adapter, into, output):
        given = ["merge", "--adapter", str(adapter), "--base", str(into), "--output", str(tmp_path / output)]
        return CliRunner().invoke(job.app, given)

    assert merge(folder, base, "once").exit_code == 0
    other = adapters.read(str(folder), "it")
    pairs = {name: replace(pair, alpha=1.0) for name, pair in other.pairs.items()}
    adapters.write(tmp_path / "other", replace(other, pairs=pairs), "transformer")
    assert merge(tmp_path / "other", tmp_path / "once", "both").exit_code == 0
    for into in ("once", "both"):
        for form in (folder, folder / adapters.COMFYUI, folder / adapters.PEFT):
            again = merge(form, tmp_path / into, "twice")
            assert again.exit_code == 2 and len(again.output.splitlines()) == 1, again.output
            assert "is in the weights of" in again.output and not (tmp_path / "twice").exists()


def test_the_network_that_a_training_of_adapters_leaves_says_which_is_in_it(saved, tmp_path):
    base, _, _ = saved
    wanted = experiment()
    wanted = wanted.model_copy(update={"model": wanted.model.model_copy(update={"base": str(base), "init": {}})})
    trained = replace(tuned(wanted), provenance={"base": str(base)})
    said = networks.leave_adapter(trained, wanted, tmp_path / "adapter", 33)
    assert adapters.read(str(tmp_path / "adapter"), "it").about["dtype"] == wanted.model.dtype
    networks.merged(trained, wanted, "").save(tmp_path / "model", shape=SHAPE, **said)
    model = wanted.model.model_copy(update={"base": str(tmp_path / "model"), "adapter": str(tmp_path / "adapter")})
    with pytest.raises(UserError, match=r"model\.adapter: .* is in the weights of .*/model already"):
        models.family("wan").inspect(model)
    models.family("wan").inspect(model.model_copy(update={"base": str(base)}))


def test_a_merged_network_that_is_not_finite_is_not_written(saved, tmp_path):
    base, folder, _ = saved
    shutil.copytree(base, tmp_path / "base")
    weights = tmp_path / "base" / "transformer" / f"{folders.STEM}.safetensors"
    tensors = load_file(weights)
    save_file(
        tensors
        | {"patch_embedding.bias": tensors["patch_embedding.bias"] / 0, "proj_out.bias": tensors["proj_out.bias"] / 0},
        weights,
        metadata={"format": "pt"},
    )
    done = CliRunner().invoke(
        job.app,
        ["merge", "--adapter", str(folder), "--base", str(tmp_path / "base"), "--output", str(tmp_path / "out")],
    )
    assert done.exit_code == 2 and "proj_out.bias is not finite" in done.output and not (tmp_path / "out").exists()


def wrong(kind, folder):
    good = folder / adapters.DIFFUSERS
    tensors = load_file(good)
    if kind == "half":
        del tensors["transformer.blocks.0.attn1.to_q.lora_B.weight"]
    if kind == "another base":
        tensors["transformer.blocks.0.attn1.to_q.lora_A.weight"] = torch.zeros(4, 7)
    if kind == "another network":
        tensors = {key.replace("blocks.0", "layers.0"): tensor for key, tensor in tensors.items()}
    if kind == "convolution":
        tensors["transformer.patch_embedding.lora_A.weight"] = torch.zeros(4, 3, 1, 1)
    if kind == "no adapter":
        tensors = {"transformer.blocks.0.alpha": torch.tensor(1.0)}
    if kind == "not finite":
        tensors["transformer.blocks.0.attn1.to_q.lora_A.weight"][0, 0] = torch.nan
    if kind == "two alphas":
        tensors["transformer.blocks.0.attn1.to_q.alpha"] = torch.ones(2)
    if kind == "no rank":
        tensors["transformer.blocks.0.attn1.to_q.lora_A.weight"] = torch.zeros(0, 32)
        tensors["transformer.blocks.0.attn1.to_q.lora_B.weight"] = torch.zeros(32, 0)
    save_file(tensors, good)
    if kind == "infinite alpha":
        save_file(tensors, good, metadata={adapters.METADATA: '{"lora_alpha": Infinity}'})
    if kind == "outside":
        whole = load_file(folder / adapters.OUTSIDE)
        save_file({name: tensor / 0 for name, tensor in whole.items()}, folder / adapters.OUTSIDE)
    if kind == "cut":
        good.write_bytes(good.read_bytes()[:100])
    if kind == "gone":
        good.unlink()
        (folder / adapters.PEFT).unlink()
    if kind == "version":
        (folder / adapters.ABOUT).write_text('{"format": "entprog-adapter-9"}')
    if kind == "alpha":
        save_file(tensors, good, metadata={adapters.METADATA: "[1]"})


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("half", r"half of an adapter's pair for blocks\.0\.attn1\.to_q"),
        ("another base", r"is for a weight of \[32, 7\], this network's is \[32, 32\]"),
        ("another network", r"has no linear layer layers\.0"),
        ("convolution", r"patch_embedding\.lora_A\.weight, which is no part"),
        ("no adapter", r"holds no low-rank adapter"),
        ("cut", r"cannot read .*pytorch_lora_weights"),
        ("gone", r"no adapter in "),
        ("version", r"has format 'entprog-adapter-9'"),
        ("alpha", r"says its alpha in no known way"),
        ("not finite", r"is no trained adapter: its blocks\.0\.attn1\.to_q is not finite"),
        ("two alphas", r"attn1\.to_q\.alpha has shape \[2\]"),
        ("no rank", r"to_q\.lora_[AB]\.weight has shape \[(0, 32|32, 0)\]"),
        ("infinite alpha", r"is not finite"),
        ("outside", r"outside\.safetensors is no part of a trained adapter: patch_embedding\.\w+ is not finite"),
    ],
)
def test_a_wrong_adapter_is_one_line_before_weights_are_read(kind, said, saved, tmp_path):
    base, folder, _ = saved
    shutil.copytree(folder, tmp_path / "adapter")
    wrong(kind, tmp_path / "adapter")
    model = experiment().model.model_copy(update={"base": str(base), "init": {}, "adapter": str(tmp_path / "adapter")})
    with pytest.raises(UserError, match=rf"model\.adapter: .*{said}"):
        models.family("wan").inspect(model)


def test_an_adapter_of_other_conditions_is_refused(saved, tmp_path):
    base, folder, _ = saved
    shutil.copytree(folder, tmp_path / "adapter")
    about = json.loads((folder / adapters.ABOUT).read_text()) | {"conditions": ["pose"]}
    (tmp_path / "adapter" / adapters.ABOUT).write_text(json.dumps(about))
    model = experiment().model.model_copy(update={"base": str(base), "init": {}, "adapter": str(tmp_path / "adapter")})
    with pytest.raises(UserError, match=r"was trained with pose: add that to model\.conditions"):
        models.family("wan").inspect(model)
