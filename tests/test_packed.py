"""Frozen weights packed into a byte or half of one: how near, how many bytes, and that nothing else changes."""

import functools
import itertools
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from entprog import blocks, config
from entprog.blocks import packed, store_frozen, unfreeze
from entprog.blocks.held import all_held
from entprog.blocks.stored import linear_weights
from entprog.cost import counting, measuring
from entprog.diffusion.losses import training_loss
from entprog.errors import UserError
from entprog.models import adapters, fingerprints, lora
from entprog.training import averages, checkpoint
from helpers.families import NAMES, load, ordered, predict
from helpers.networks import SHAPE, TINY, latents, tiny_denoiser, tiny_experiment
from helpers.runs import Run, comparable, course, differing
from pipelines.training import checks, networks

FORMS = ("fp8", "nf4")
ALONE = {"fp8": "fp8_alone", "nf4": "nf4"}
NEAR = {"fp8": 0.03, "nf4": 0.12}
"""Largest relative difference of a weight."""
HALF = {"model": {"dtype": "bfloat16"}}
FAMILIES = [name for name in NAMES if name != "svd"]
HALF_OF_THEM = [{"until": 1, "share": 0.5}]
ANEW = [{"until": 0.7, "share": 0.34, "choose": "random", "redraw_every": 2}, {"until": 1, "share": 0.5}]


def lora_settings(form, **parts):
    values = {
        **HALF,
        "train": {"steps": 6, "ema_decay": 0.9, "lora": {"rank": 4, "alpha": 8}},
        "schedule": {"kind": "progressive", "table": HALF_OF_THEM, "frozen_precision": ALONE.get(form, "auto")},
    }
    return tiny_experiment(**config.merge(values, parts))


def block_settings(form, **parts):
    schedule = {"kind": "progressive", "table": ANEW, "frozen_precision": ALONE.get(form, "auto")}
    return tiny_experiment(
        **config.merge({**HALF, "train": {"steps": 9, "ema_decay": 0.9}, "schedule": schedule}, parts)
    )


def adapted(experiment, seed=0):
    denoiser = tiny_denoiser(experiment, seed)
    if experiment.train.lora:
        lora.add(denoiser.network, blocks.blocks(denoiser.network), experiment.train.lora, experiment.train.seed)
    return denoiser


def as_a_worker_loads_it(experiment, seed=0):
    denoiser = adapted(experiment, seed)
    store_frozen(blocks.blocks(denoiser.network), experiment.frozen_form, torch.device("cpu"))
    return denoiser


@pytest.fixture(autouse=True)
def _with_adapters(monkeypatch):
    monkeypatch.setattr("helpers.runs.tiny_denoiser", as_a_worker_loads_it)


# ---- a weight ----


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(48, 64), (96, 32), (3, 64)])
def test_a_weight_comes_back_near_and_in_so_many_bytes(form, shape):
    torch.manual_seed(0)
    weight = torch.randn(shape) * torch.logspace(-3, 2, shape[0])[:, None]
    parts = packed.pack(weight, form)
    assert sum(part.nbytes for part in parts) == packed.nbytes(shape, form)
    for dtype in (torch.float32, torch.bfloat16):
        back = packed.unpack(parts, form, shape, dtype)
        assert back.shape == weight.shape and back.dtype == dtype
        off = (back.float() - weight).norm(dim=1) / weight.norm(dim=1)
        assert 0 < off.max() < 2 * NEAR[form] and off.mean() < NEAR[form]
    again = packed.pack(packed.unpack(parts, form, shape, torch.float32), form)
    assert all(torch.equal(a, b) for a, b in zip(again, parts, strict=True)), "packing twice loses nothing more"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_torchs_default_type_changes_nothing(form, default):
    torch.manual_seed(0)
    weight, before = torch.randn(64, 64), torch.get_default_dtype()
    wanted = packed.pack(weight, form)
    torch.set_default_dtype(default)
    try:
        parts = packed.pack(weight, form)
    finally:
        torch.set_default_dtype(before)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(parts, wanted, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_zeros_stay_zeros_and_large_weights_finite(form):
    for value in (0.0, 1e30, -1e-30):
        weight = torch.full((2, 64), value)
        back = packed.unpack(packed.pack(weight, form), form, weight.shape, torch.float32)
        torch.testing.assert_close(back, weight, rtol=0.01, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_a_weight_is_unpacked_in_the_bytes_that_are_foreseen(form):
    weight = torch.randn(256, 512)
    parts = packed.pack(weight, form)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        packed.unpack(parts, form, weight.shape, torch.bfloat16)
    changes = [e for e in seen.events() if e.self_cpu_memory_usage]
    held = itertools.accumulate(e.self_cpu_memory_usage for e in sorted(changes, key=lambda e: e.time_range.start))
    assert max(held) == pytest.approx(packed.unpacking_bytes(weight.shape, form), rel=0.01)


def test_nf4_is_as_near_as_torchaos():
    from torchao.quantization import NF4Tensor

    torch.manual_seed(0)
    weight = torch.randn(256, 512)
    theirs = NF4Tensor.from_tensor(weight.bfloat16(), 64, 256).get_original_weight()
    ours = packed.unpack(packed.pack(weight, "nf4"), "nf4", weight.shape, torch.float32)
    assert (ours - weight).norm() < 1.01 * (theirs.float() - weight).norm()


# ---- a network ----


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("form", FORMS)
def test_every_familys_outputs_and_gradients_are_near_and_the_same_for_both_backwards(name, form):
    plain, small = load(name, dtype="bfloat16"), load(name, dtype="bfloat16")
    batch, seen = latents([0, 1]), []
    for denoiser in (plain, small):
        found = ordered(denoiser, batch)
        store_frozen(found, form if denoiser is small else "bfloat16")
        chosen, of_this = [block.name for block in found[1::3]], []
        for backward, checkpointing in (("exact", False), ("residual", False), ("exact", True)):
            unfreeze(denoiser.network, found, chosen, denoiser.outside()["conditions"], backward, checkpointing)
            output = predict(denoiser, batch)
            output.square().mean().backward()
            gradients = [p.grad.flatten() for p in denoiser.network.parameters() if p.grad is not None]
            of_this.append((output.detach().flatten(), torch.cat(gradients)))
            denoiser.network.zero_grad(set_to_none=True)
        seen.append(of_this)
    for (output, gradient), (wanted, wanted_gradient) in zip(seen[1], seen[0], strict=True):
        assert gradient.shape == wanted_gradient.shape and output.isfinite().all()
        for got, expected in ((output, wanted), (gradient, wanted_gradient)):
            assert 0 < (got - expected).norm() < 4 * NEAR[form] * expected.norm()
    assert all(torch.equal(a, b) for a, b in zip(seen[1][0], seen[1][2], strict=True)), (
        "checkpointing computes the same"
    )
    frozen = [block for block in found if block.name not in chosen]
    assert all(all_held(b.module) for b in frozen) and not any(all_held(b.module) for b in found if b not in frozen)


def _same(tensor):
    return tensor


@pytest.mark.parametrize("form", FORMS)
def test_compiled_blocks_share_their_code_and_compute_the_same(form, monkeypatch):
    monkeypatch.setattr("entprog.blocks.block._limit", dict)
    results, batch = [], latents([0, 1])
    for compiled in (False, True):
        denoiser = tiny_denoiser(tiny_experiment(**HALF))
        found = blocks.blocks(denoiser.network)
        store_frozen(found, form)
        if compiled:
            torch.compiler.reset()
            blocks.compile_blocks(found, backend="aot_eager")
        unfreeze(denoiser.network, found, ["blocks.1"], [], "exact", checkpointing=True)
        with torch._dynamo.config.patch(error_on_recompile=False, recompile_limit=4, fail_on_recompile_limit_hit=True):
            saved = []
            with saved_tensors_hooks(lambda tensor, into=saved: into.append(tuple(tensor.shape)) or tensor, _same):
                output = predict(denoiser, batch)
            shapes = {held.shape for held in all_held(denoiser.network)}
            assert saved and not {*saved} & (shapes | {shape[::-1] for shape in shapes}), "no unpacked weight is kept"
            output.square().mean().backward()
        results.append((output.detach(), *(p.grad for p in found[1].module.parameters())))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-2, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_the_gradient_is_that_of_the_layer_with_the_unpacked_weight(form):
    torch.manual_seed(0)
    layer, block = nn.Linear(64, 32), nn.ModuleDict()
    block["layer"] = layer
    block.requires_grad_(False)
    blocks.stored.Stored(form).settle(block)
    (held,) = all_held(block)
    x = torch.randn(2, 5, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = layer(input=x)
    assert got.dtype == torch.bfloat16 and layer.weight.numel() == 0
    weight = held.weight(torch.bfloat16)
    wanted = nn.functional.linear(x.bfloat16(), weight, layer.bias)
    assert torch.equal(got, wanted)
    up = torch.randn_like(got)
    assert torch.equal(*(torch.autograd.grad(y, x, up)[0] for y in (got, wanted)))


@pytest.mark.parametrize("form", FORMS)
def test_bytes_a_parameter(form):
    """Of every live tensor that a layer holds; no master of a base under adapters is kept anywhere."""
    denoiser = adapted(lora_settings(form))
    found = blocks.blocks(denoiser.network)
    weights = [p for b in found for _, p in linear_weights(b.module)]
    numbers, rows = sum(p.numel() for p in weights), sum(p.shape[0] for p in weights)
    layers = [m for b in found for n, m in b.module.named_modules() if type(m) is nn.Linear and ".lora_" not in n]
    store_frozen(found, form)
    live = [t for m in layers for t in (m.weight, *m.buffers())]
    tables = 1024 * len(weights)  # nothing beside weights that are no toys
    expected = {"fp8": numbers + 2 * rows, "nf4": numbers // 2 + numbers // 32 + tables}[form]
    assert sum(t.untyped_storage().nbytes() for t in live) == expected == blocks.packed_bytes(denoiser.network)
    masters = [n for b in found for n in blocks.variants(b.module).stored.masters if n.endswith("weight")]
    assert not [n for n in masters if "attn" in n and "to_" in n]


# ---- a training ----


def steps_of(run):
    return [comparable(step) for step in run.steps()]


@pytest.mark.parametrize(("form", "backward"), [("fp8", "exact"), ("nf4", "residual")])
def test_adapters_over_a_packed_base_learn_as_over_bfloat16(form, backward):
    parts = {"schedule": {"backward": backward}, "train": {"steps": 12}}
    losses = {}
    for each in (form, "bfloat16"):
        steps = list(Run(lora_settings(each, **parts)).steps())
        losses[each] = [step.loss for step in steps], steps[-1].held_out_loss
    near = torch.tensor(losses["bfloat16"][0])
    torch.testing.assert_close(torch.tensor(losses[form][0]), near, rtol=NEAR[form], atol=0)
    assert losses[form][1] == pytest.approx(losses["bfloat16"][1], rel=NEAR[form])
    assert losses[form][1] != losses["bfloat16"][1]


@pytest.mark.parametrize(
    ("form", "settings", "checkpointing"),
    [
        ("fp8", lora_settings, False),
        ("nf4", lora_settings, True),
        ("nf4", block_settings, False),
        ("fp8", block_settings, True),
    ],
)
def test_a_resume_goes_on_bit_for_bit(form, settings, checkpointing, tmp_path):
    experiment = settings(form, model={"gradient_checkpointing": checkpointing})
    whole = Run(experiment)
    expected = course(whole, {4: tmp_path})
    again = Run(experiment, tmp_path)
    assert steps_of(again) == expected[4:]
    contents = (checkpoint.contents(run.denoiser.network, run.state) for run in (whole, again))
    assert not differing(*contents)
    kept = load_file(next(tmp_path.glob("*/*.safetensors")))
    base = {name for name in kept if "base_layer.weight" in name or "ffn.net.2.weight" in name}
    assert not base if settings is lora_settings else {kept[n].dtype for n in base} == {torch.float32}


@pytest.mark.parametrize("form", FORMS)
def test_blocks_that_thaw_have_their_float32_weights_again(form):
    run = Run(block_settings(form))
    before, thawed = run.weights(), set()
    for step in run.steps():
        after = run.weights()
        inside = tuple(f"{name}." for name in step.plan.trainable)
        moved = {n for n in after if n.startswith("blocks.") and not torch.equal(after[n], before[n])}
        assert moved and all(name.startswith(inside) for name in moved), step.step
        for block in run.found:
            frozen = block.name not in step.plan.trainable
            assert bool(all_held(block.module)) == frozen
            assert frozen or {p.dtype for p in block.module.parameters()} == {torch.float32}
        before, thawed = after, thawed | {inside}
    assert len(thawed) > 2 and all(t.dtype == torch.float32 for t in before.values())


def test_masters_of_a_bfloat16_checkpoint_take_two_bytes(denoiser, found):
    with torch.no_grad():
        for parameter in denoiser.network.parameters():
            parameter.copy_(parameter.bfloat16())
    before = {name: tensor.clone() for name, tensor in denoiser.network.state_dict().items()}
    store_frozen(found, "nf4")
    assert {m.dtype for b in found for m in blocks.variants(b.module).stored.masters.values() if m is not None} == {
        torch.bfloat16
    }
    after = denoiser.network.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    unfreeze(denoiser.network, found, [b.name for b in found], [])
    assert all(torch.equal(p, before[name]) for name, p in denoiser.network.named_parameters())


@pytest.mark.parametrize("form", FORMS)
def test_what_is_saved_is_the_base_in_full_with_the_adapters_merged(form, tmp_path):
    experiment = lora_settings(form)
    run = Run(experiment)
    list(run.steps())
    networks.leave_adapter(run.denoiser, experiment, tmp_path / "adapter", 33)
    merged = networks.merged(run.denoiser, experiment, fingerprints.base(experiment.model)).network
    base = tiny_denoiser(experiment).network
    adapters.merge(adapters.read(str(tmp_path / "adapter"), "model.adapter"), base, "model.adapter")
    there, here = base.state_dict(), merged.state_dict()
    assert there.keys() == here.keys()
    for name in there:
        torch.testing.assert_close(here[name], there[name], rtol=1e-5, atol=1e-6)
    assert all_held(run.denoiser.network), "samples are drawn by the network as it was trained"


@pytest.mark.parametrize("change", ["other weights", "another shape", "gone"])
def test_adapters_are_not_merged_into_a_base_that_changed_meanwhile(change, tmp_path):
    first = tiny_denoiser(lora_settings("nf4"))
    first.save(tmp_path / "base", shape=SHAPE)
    experiment = lora_settings("nf4", model={"base": str(tmp_path / "base"), "init": {}})
    weights = fingerprints.base(experiment.model)
    trained = networks.load(experiment, torch.device("cpu"))
    assert networks.merged(trained, experiment, weights).network.blocks
    if change == "gone":
        shutil.rmtree(tmp_path / "base")
    else:
        sizes = {**TINY, "ffn_dim": 128} if change == "another shape" else TINY
        tiny_denoiser(lora_settings("nf4", model={"init": sizes}), seed=1).save(tmp_path / "base", shape=SHAPE)
    networks.leave_adapter(trained, experiment, tmp_path / "adapter", 33)
    assert adapters.read(str(tmp_path / "adapter"), "it").pairs
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "base"))) as error:
        networks.merged(trained, experiment, weights)
    assert "\n" not in str(error.value) and (change == "gone" or "adapter merge" in str(error.value))


def test_whole_weights_that_an_adapter_brought_stay_in_its_folder(tmp_path):
    """Also of a layer that is packed now, and has no adapter of its own."""
    experiment = lora_settings("nf4")
    base = tiny_denoiser(experiment).network
    start, brought = tmp_path / "start", {"blocks.1.ffn.net.2.weight": base.blocks[1].ffn.net[2].weight.detach() + 1}
    pairs = {
        name.removesuffix(".weight"): adapters.Pair(torch.randn(4, p.shape[1]), torch.zeros(p.shape[0], 4), 8.0)
        for name, p in base.named_parameters()
        if re.fullmatch(r"blocks\.\d+\.attn\d\.to_(q|k|v|out\.0)\.weight", name)
    }
    adapters.write(start, adapters.Adapter(pairs, brought, {"family": "wan"}), "transformer")
    again = lora_settings("nf4", model={"adapter": str(start)})
    denoiser = networks.load(again, torch.device("cpu"))
    networks.leave_adapter(denoiser, again, tmp_path / "adapter", 33)
    kept = adapters.read(str(tmp_path / "adapter"), "it").outside
    whole = networks.merged(denoiser, again, fingerprints.base(again.model)).network
    merged = whole.get_parameter("blocks.1.ffn.net.2.weight")
    for name, tensor in brought.items():
        assert torch.equal(kept[name], tensor) and torch.equal(merged, tensor)


@pytest.mark.parametrize("settings", [lora_settings, block_settings])
def test_a_preview_shows_averages_and_leaves_everything_as_it_was(settings):
    run = Run(settings("nf4"))
    for step in run.steps():
        if step.step == 7 or step.last:
            break
    network, ema, gaps = run.denoiser.network, run.state.ema, run.state.ema_gaps
    before = run.weights()
    now = {name: averages.as_of_now(ema[name], before[name], averages.gap_of(name, gaps)) for name in ema}
    with averages.averaged(network, ema, gaps):
        drawn = predict(run.denoiser, latents([0]))
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.weights().items())
    own = predict(run.denoiser, latents([0]))
    network.load_state_dict(now, strict=False)
    assert torch.equal(predict(run.denoiser, latents([0])), drawn) and not torch.equal(own, drawn)


# ---- what it costs ----


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backward", ["exact", "residual"])
def test_memory_is_foreseen(form, backward):
    experiment = block_settings(form)
    denoiser = tiny_denoiser(experiment)
    found, free = blocks.blocks(denoiser.network), denoiser.outside()["conditions"]
    loss = functools.partial(training_loss, denoiser, latents([0]), experiment.train)
    largest = max(p.numel() for b in found for _, p in linear_weights(b.module))
    store_frozen(found, form)
    model = measuring.measure(denoiser.network, found, free, loss, clips=1, seconds=False)
    assert model.unpacking_bytes == {"fp8": 2, "nf4": 4}[form] * largest
    for trainable in (["blocks.1"], ["blocks.0", "blocks.4"], [block.name for block in found]):
        trained = unfreeze(denoiser.network, found, trainable, free, backward)
        counted = counting.count(denoiser.network, trained, loss)
        assert model.step(trainable, backward) == pytest.approx(counted.flops, rel=0.02)
        assert model.memory(trainable, backward) == pytest.approx(counted.memory_bytes(1), rel=0.05)


# ---- whom it is refused to ----


@pytest.mark.parametrize("precision", ALONE.values())
@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"model": {"dtype": "float32"}}, "model.dtype=bfloat16"),
        ({"train": {"parallel": "fsdp"}}, "train.parallel=fsdp"),
        ({"schedule": {"kind": "full"}}, "no block is ever frozen"),
        ({"schedule": {"kind": "entprog"}}, "set train.lora"),
        ({"priority": {"kind": "fisher"}}, "priority.kind=fisher"),
        ({"model": {"compile_blocks": True}}, "model.gradient_checkpointing=true"),
        ({"model": {"compile_blocks": True}, "train": {"lora": {"rank": 4}}}, "model.gradient_checkpointing=true"),
    ],
)
def test_it_is_refused_in_a_line_where_it_has_no_place(precision, parts, said):
    values = {**HALF, "schedule": {"kind": "progressive", "table": HALF_OF_THEM}}
    values = config.merge(values, {"schedule": {"frozen_precision": precision}})
    tiny_experiment(**values)
    with pytest.raises(UserError, match=re.escape(said)) as error:
        tiny_experiment(**config.merge(values, parts))
    assert f"frozen_precision={precision}" in str(error.value) and "\n" not in str(error.value)


def test_it_makes_another_training():
    decides = [
        checks.deciding(lora_settings(form), SimpleNamespace(fingerprint="")) for form in ("bfloat16", "fp8", "nf4")
    ]
    assert len({config.digest(each) for each in decides}) == 3
