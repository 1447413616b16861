"""Every model family, real diffusers classes at tiny sizes, through the same tests.

A new family is one file in `entprog/models/`, one entry in `TINY` and what its pipeline makes of it (`helpers.parity`).
"""

import random
from dataclasses import replace

import diffusers
import pytest
import torch
from diffusers import AutoencoderKLWan
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from entprog import blocks, models
from entprog.config import ClipShape, Generate, Priority
from entprog.cost import counting, measuring
from entprog.data.clips import Latents
from entprog.diffusion import losses, sampling
from entprog.errors import UserError
from entprog.media.color import yuv420_to_rgb
from entprog.models import inputs
from entprog.schedule.freezing import Freeze
from entprog.schedule.plans import Plan
from entprog.schedule.prices import Prices
from entprog.scoring import cei
from entprog.training import checkpoint
from entprog.training.fit import fit, start
from helpers import suite
from helpers.families import (
    NAMES,
    TINY,
    T,
    again,
    clips,
    load,
    ordered,
    predict,
    settings,
)
from helpers.networks import SHAPE, batches, latents, tiny_experiment
from helpers.runs import differing

WAN22_VAE = {  # as TI2V-5B's: more channels, 16×16 pixels
    "base_dim": 8, "decoder_base_dim": 8, "z_dim": 6, "num_res_blocks": 1, "is_residual": True, "patch_size": 2,
    "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16, "latents_mean": [0.1] * 6,
    "latents_std": [1.5] * 6,
}  # fmt: skip

NATIVE = {"wan_animate", "wan_vace"}
"""Families whose networks have inputs of their own for reference and pose."""
APART = {"latte", "svd", "motion_unet"}
"""Families whose spatial and temporal blocks are apart."""


def by_hand(block):
    """y = bypass(x) + (f(x) - bypass(x)).detach(), written out."""
    own = type(block.module).forward.__get__(block.module)

    def forward(*args, **kwargs):
        shortcut = blocks.bypass(block.module, *args, **kwargs)
        with torch.no_grad():
            whole = own(*args, **kwargs)
        if isinstance(whole, tuple):
            return tuple(x + (y - x).detach() for x, y in zip(shortcut, whole, strict=True))
        return shortcut + (whole - shortcut).detach()

    return forward


def small(batch):
    """A corner of every clip: UNets have many blocks."""
    conditions = {name: value[..., :8, :8] for name, value in batch.conditions.items()}
    return Latents(batch.clean[..., :8, :8], conditions, batch.position)


def gradients(denoiser, batch):
    denoiser.network.zero_grad(set_to_none=True)
    predict(denoiser, batch).square().mean().backward()
    return {name: p.grad.clone() for name, p in denoiser.network.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module", params=NAMES)
def tiny(request):
    """(name, a network in evaluation mode that no test changes, a batch, its blocks in execution order)"""
    denoiser, batch = load(request.param), latents(range(2))
    return request.param, denoiser, batch, ordered(denoiser, batch)


def test_blocks_are_found_once_and_in_the_order_in_which_they_run(tiny):
    name, denoiser, batch, found = tiny
    ran = []
    hooks = [
        b.module.register_forward_hook(lambda *_, n=b.name: ran.append(n)) for b in blocks.blocks(denoiser.network)
    ]
    with torch.no_grad():
        predict(denoiser, batch)
    for hook in hooks:
        hook.remove()
    assert [block.name for block in found] == ran and len(set(ran)) == len(hooks)
    kinds = {"spatial", "temporal"} if name in APART else {"both", "control"} if name == "wan_vace" else {"both"}
    assert {block.kind for block in found} == kinds
    for block in found:
        assert (block.kind == "temporal") == any(word in block.name for word in ("temporal", "motion")), block.name


@pytest.mark.parametrize("check", suite.OF_A_NETWORK, ids=lambda check: check.__name__)
def test_it_keeps_to_its_entry(tiny, check, tmp_path):
    name, denoiser, batch, _ = tiny
    check(suite.Case(name, denoiser, batch, tmp_path))


def test_every_parameter_is_in_one_place(tiny):
    name, denoiser, _, found = tiny
    groups = denoiser.outside()
    places = [p for block in found for p in block.module.parameters()] + groups["conditions"] + groups["rest"]
    assert len(places) == len({id(p) for p in places})
    left_out = {n for n, p in denoiser.network.named_parameters() if id(p) not in {id(q) for q in places}}
    assert all(n.startswith("motion_encoder.") for n in left_out) and bool(left_out) == (name == "wan_animate")


@torch.no_grad()
def test_every_skip_changes_the_output_and_restores_it(tiny):
    _, denoiser, batch, found = tiny
    before = predict(denoiser, batch)
    assert before.shape == batch.clean.shape and before.dtype == torch.float32 and before.std() > 0
    for block in found:
        with blocks.skipped(block):
            without = predict(denoiser, batch)
        assert not torch.equal(without, before) and without.isfinite().all(), block.name
    assert torch.equal(predict(denoiser, batch), before)
    for name in denoiser.conditions:  # every condition is seen
        other = {**batch.conditions, name: batch.conditions[name] + 1}
        assert not torch.equal(denoiser.predict(batch.clean, T, other), before), name
    # one clip's prediction does not depend on the others in its batch
    one = batch.part(slice(0, 1))
    torch.testing.assert_close(denoiser.predict(one.clean, T[:1], one.conditions), before[:1], rtol=1e-3, atol=1e-4)


def test_replayed_scores_equal_naive_scores(tiny):
    _, denoiser, _, found = tiny
    batch, few = small(latents(range(4))), Priority(conditions=2, draws=4)
    replayed, naive = (cei.cei(denoiser, found, [batch], few, replay=replay) for replay in (True, False))
    assert replayed.per_condition == naive.per_condition
    assert [b.loss_increase for b in replayed.blocks] == [b.loss_increase for b in naive.blocks]
    assert replayed.flops < naive.flops


@pytest.mark.parametrize("backward", ["exact", "residual"])
def test_gradients_of_trained_blocks_are_right_and_others_have_none(tiny, backward):
    """Exact: those of full training. Residual: of y = bypass + (f - bypass).detach(), written out."""
    name, denoiser, batch, found = tiny
    with torch.no_grad():
        plain = predict(denoiser, batch)
    trained = [block.name for block in found[1 :: max(len(found) // 3, 2)]]
    outside = denoiser.outside()["conditions"]
    try:
        blocks.unfreeze(denoiser.network, found, trained, outside, backward)
        now = predict(denoiser, batch).detach()
        if name == "hunyuan_video":  # a Linear on a slice of one text token: its last bit depends on requires_grad
            torch.testing.assert_close(now, plain, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(now, plain)
        got = gradients(denoiser, batch)
        for how in ("on_host", "keep_attention"):
            blocks.unfreeze(denoiser.network, found, trained, outside, backward, how)
            for n, gradient in gradients(denoiser, batch).items():
                close = {"rtol": 1e-5, "atol": 1e-7}
                torch.testing.assert_close(gradient, got[n], **close, msg=lambda m, n=n, how=how: f"{how}, {n}: {m}")
        if backward == "exact":
            blocks.unfreeze(denoiser.network, found, [b.name for b in found], outside)
            everything = gradients(denoiser, batch)
            expected = {n: everything[n] for n in got}
        else:
            blocks.unfreeze(denoiser.network, found, trained, outside, "exact")
            for block in found:
                if block.name not in trained:
                    block.module.forward = by_hand(block)
            expected = gradients(denoiser, batch)
        of_conditions = {n for n, p in denoiser.network.named_parameters() if any(p is q for q in outside)}
        of_blocks = {n for n in got if n.startswith(tuple(f"{name}." for name in trained))}
        assert of_blocks and of_conditions and got.keys() == of_blocks | of_conditions == expected.keys()
        for n, gradient in got.items():
            torch.testing.assert_close(gradient, expected[n], rtol=1e-3, atol=1e-6, msg=lambda m, n=n: f"{n}: {m}")
    finally:
        blocks.unfreeze(denoiser.network, found, [b.name for b in found], outside)
        denoiser.network.requires_grad_(True).zero_grad(set_to_none=True)


@pytest.mark.parametrize("backward", ["exact", "residual"])
def test_costs_are_foreseen(tiny, backward):
    _, denoiser, batch, found = tiny
    outside, names = denoiser.outside()["conditions"], [block.name for block in found]
    loss = lambda: predict(denoiser, batch).square().mean()  # noqa: E731
    try:
        model = measuring.measure(denoiser.network, found, outside, loss, clips=2, seconds=False)
        for trainable in (names, names[::3], names[-1:]):
            trained = blocks.unfreeze(denoiser.network, found, trainable, outside, backward)
            counted = counting.count(denoiser.network, trained, loss)
            assert model.step(trainable, backward) == pytest.approx(counted.flops, rel=0.1), trainable
            assert model.memory(trainable, backward) == pytest.approx(counted.memory_bytes(1), rel=0.15), trainable
    finally:
        blocks.unfreeze(denoiser.network, found, names, outside)
        denoiser.network.requires_grad_(True).zero_grad(set_to_none=True)


def test_counted_is_what_torch_counts(tiny):
    _, denoiser, batch, _ = tiny
    counters = counting.flop_counter(), FlopCounterMode(display=False, custom_mapping=counting.CPU_ATTENTION)
    totals = []
    for counter in counters:
        with counter as mode:
            predict(denoiser, batch).square().mean().backward()
        totals.append(mode.get_total_flops())
    assert totals[0] == totals[1] > 0
    denoiser.network.zero_grad(set_to_none=True)


@pytest.mark.parametrize("backward", ["exact", "residual"])
def test_plans_of_one_likeness_cost_the_same(tiny, backward):
    """Draws of as many blocks are counted once where that is all there is to count: counted apart, they agree."""
    name, denoiser, batch, found = tiny
    experiment = tiny_experiment(model=settings(name).model_dump())
    counts, draw = {}, random.Random(0)
    for _ in range(6):
        prices = Prices(denoiser, found, batch, Freeze(denoiser, found, experiment), experiment, {})
        drawn = {block.name for block in draw.sample(found, 2)}
        plan = Plan(trainable=tuple(b.name for b in found if b.name in drawn), backward=backward, shape=SHAPE)
        counts.setdefault(prices.likeness(plan), []).append(prices.counted(plan))
    for alike in counts.values():
        assert all(count == alike[0] for count in alike), alike
    assert len(counts) < 6 or backward == "exact" or name in APART
    blocks.unfreeze(denoiser.network, found, [b.name for b in found], denoiser.outside()["conditions"])
    denoiser.network.requires_grad_(True).zero_grad(set_to_none=True)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in NATIVE])
def test_conditions_that_a_base_lacks_change_nothing_at_step_0(tmp_path, name):
    base = load(name, conditions=())
    base.save(tmp_path / "base")
    wide, batch = again(tmp_path / "base", name), latents(range(2))
    assert wide.conditions == ("reference", "pose")
    with torch.no_grad():
        assert torch.equal(predict(wide, batch), base.predict(batch.clean, T, {}))
    got = gradients(wide, batch)[f"{wide.INPUT}.weight"]
    layer = wide.network.get_submodule(wide.INPUT)
    new = layer.weight.split(layer.splits, dim=1)[1]
    assert new.shape[1] == 2 * layer.splits[0] and not new.any()
    assert got.split(layer.splits, dim=1)[1].any()  # and they learn
    # a network that was widened and saved is wide, also to itself
    wide.save(tmp_path / "wide")
    assert inputs.splits(again(tmp_path / "wide", name).network.get_submodule(wide.INPUT), 9) == (3, 6)


def test_a_saved_network_gives_the_same_bits_and_is_a_diffusers_folder(tmp_path, tiny):
    name, denoiser, batch, _ = tiny
    denoiser.save(tmp_path / "model", shape=SHAPE)
    loaded = again(tmp_path / "model", name, seed=9)
    with torch.no_grad():  # weights read from a file lie elsewhere in memory, which the CPU's last bits may depend on
        torch.testing.assert_close(predict(loaded, batch), predict(denoiser, batch), rtol=1e-4, atol=1e-5)
    saved = denoiser.network.state_dict()
    assert not differing(saved, loaded.network.state_dict())
    assert loaded.shape == SHAPE and loaded.process == denoiser.process and loaded.conditions == denoiser.conditions
    plain = getattr(diffusers, models.family(denoiser.FAMILY).CLASS).from_pretrained(tmp_path / "model" / denoiser.PART)
    assert plain.state_dict().keys() == saved.keys() and not differing(plain.state_dict(), saved)
    scheduler = denoiser.scheduler()
    read = type(scheduler).from_pretrained(tmp_path / "model" / "scheduler")
    strip = lambda c: {k: v for k, v in c.items() if not k.startswith("_")}  # noqa: E731
    assert strip(read.config) == strip(scheduler.config)
    assert again(tmp_path / "model" / denoiser.PART, name).shape == SHAPE  # the network's own folder is the checkpoint


def test_fit_resumes_to_the_bit_and_frozen_blocks_never_move(tmp_path, tiny):
    name = tiny[0]
    model = settings(name).model_dump()
    experiment = tiny_experiment(
        model=model,
        data={"held_out_draws": 1},
        train={"steps": 5, "held_out_every": 5, "ema_decay": 0.9},
        schedule={"stages": 1, "search_steps": 1, "backward": "residual", "outside": "conditions", "search_share": 1.0},
    )
    table = cei.cei(tiny[1], tiny[3], [small(latents(range(4)))], experiment.priority)

    def run(folder=None):
        denoiser = load(name)
        found = ordered(denoiser, tiny[2])
        state = start(denoiser.network, experiment)
        if folder:
            checkpoint.load(folder, checkpoint.newest(folder), denoiser.network, state, "id")
        steps = fit(denoiser, found, batches(experiment), [latents([0])], latents([0, 1]), table, experiment, state)
        return denoiser, state, steps

    whole, _, steps = run()
    before = {n: p.detach().clone() for n, p in whole.network.named_parameters()}
    conditions = {id(p) for p in whole.outside()["conditions"]}
    narrow, losses_ = 0, []
    for step in steps:
        losses_.append(step.loss)
        for n, p in whole.network.named_parameters():
            trained = n.startswith(tuple(f"{b}." for b in step.plan.trainable))
            assert trained or id(p) in conditions or torch.equal(p, before[n]), (step.step, n)
            before[n] = p.detach().clone()
        narrow += len(step.plan.trainable) < len(tiny[3])
    assert narrow and len(losses_) == 5
    first, state, steps = run()
    for step in steps:
        if step.step == 3:
            checkpoint.save(tmp_path, first.network, state, "id", keep=1)
            break
    second, _, steps = run(tmp_path)
    assert [step.loss for step in steps] == losses_[3:]
    assert all(torch.equal(p, before[n]) for n, p in second.network.named_parameters())


def test_training_lowers_the_loss(tiny):
    denoiser, batch = load(tiny[0]), tiny[2]
    train = tiny_experiment().train
    optimizer = torch.optim.AdamW(denoiser.network.parameters(), lr=3e-3)
    seen = []
    for _ in range(12):
        loss = losses.training_loss(denoiser, batch, train)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    assert seen[-1] < 0.9 * seen[0], seen


@torch.no_grad()
def test_a_clip_is_sampled_and_its_noise_is_its_own(tiny):
    _, denoiser, batch, _ = tiny
    size = (2, *denoiser.latent_shape(SHAPE))
    clip = sampling.sample(denoiser, batch.conditions, size, Generate(steps=4, seed=1), [0, 1])
    assert clip.shape == batch.clean.shape and clip.isfinite().all()
    one = batch.part(slice(1, 2))
    alone = sampling.sample(denoiser, one.conditions, (1, *size[1:]), Generate(steps=4, seed=1), [1])
    torch.testing.assert_close(alone, clip[1:], rtol=1e-2, atol=1e-2)
    assert denoiser.decode(clip).shape == (2, SHAPE.frames, 3, SHAPE.height, SHAPE.width)


@torch.no_grad()
@pytest.mark.parametrize("name", [*(name for name in NAMES if name != "cogvideox15"), "wan22"])
def test_a_pipeline_s_vae_is_used_as_the_pipeline_does(tmp_path, name):
    kind, sizes = (AutoencoderKLWan, WAN22_VAE) if name == "wan22" else TINY[name]["vae"]
    name = "wan" if name == "wan22" else name
    torch.manual_seed(3)
    vae = kind(**sizes).eval()
    vae.save_pretrained(tmp_path / "vae")
    init = {k: v for k, v in TINY[name]["init"].items() if k != "out_channels"}
    if sizes is WAN22_VAE:
        init["patch_size"] = [1, 2, 2]
    denoiser = load(name, vae=str(tmp_path), init=init)
    shape = ClipShape(frames=9, height=32, width=32, fps=8)
    denoiser.check(shape)
    encoded = denoiser.encode(clips(2, shape))
    assert encoded.clean.shape == (2, *denoiser.latent_shape(shape)) and encoded.clean.is_contiguous()
    for value in encoded.conditions.values():
        assert value.shape == encoded.clean.shape and value.std() > 0
    alone = denoiser.encode(clips(2, shape).part(slice(0, 1)))
    torch.testing.assert_close(alone.clean, encoded.clean[:1], rtol=1e-3, atol=1e-4)
    video = denoiser.decode(encoded.clean)
    assert video.shape == (2, 9, 3, 32, 32) and video.abs().max() <= 1
    expected = suite.unscaled(vae, yuv420_to_rgb(clips(2, shape).video).transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(video, expected.clamp(-1, 1), rtol=1e-3, atol=1e-4)
    assert predict(denoiser, encoded).isfinite().all()
    denoiser.save(tmp_path / "model", shape=shape)
    assert torch.equal(again(tmp_path / "model", name).encode(clips(2, shape)).clean, encoded.clean)


def test_half_precision_and_checkpointing(tiny):
    name, _, batch, _ = tiny
    if name == "svd":
        with pytest.raises(UserError, match="SVD's temporal convolutions"):
            load(name, dtype="bfloat16")
        network = load(name)
        replace(network, autocast=torch.bfloat16)  # as the final network of a sharded training, on the host to be saved
        return
    half = load(name, dtype="bfloat16")
    found = ordered(half, batch)
    for backward in ("exact", "residual"):
        blocks.unfreeze(half.network, found, [found[1].name], half.outside()["conditions"], backward, True)
        got = gradients(half, batch)
        assert got and all(g.isfinite().all() for g in got.values())
    with NormTypes() as seen:
        assert predict(half, batch).dtype == torch.float32
    assert bool(seen.given) == (name in ("wan", "wan_vace", "wan_animate")) and all(a == b for a, b in seen.given)
    assert not any(seen.autocast), "which makes float32 of both on a GPU"


class NormTypes(TorchFunctionMode):
    """Notes the types of every RMS norm's input and weight: of two types, torch has no fused kernel."""

    def __init__(self):
        super().__init__()
        self.given, self.autocast = [], []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") == "rms_norm":
            input, weight = args[0], (kwargs or {}).get("weight", args[-2])
            self.given.append((input.dtype, weight.dtype))
            self.autocast.append(torch.is_autocast_enabled(input.device.type))
        return function(*args, **(kwargs or {}))


WRONG = [
    ({"base": "{}/other"}, "holds a NoSuchTransformer3DModel, not a .*; families there are: .*docs/families.md"),
    ({"base": "{}/family"}, "set model.family="),
    ({"init": {}, "base": None}, "no network: set model.base"),
    ({"init": {"no_such_setting": 2}}, "unknown setting model.init.no_such_setting"),
    ({"init": {"in_channels": 2}}, "computed"),
    ({"vae": "{}/vae"}, "holds AutoencoderKLMochi, .* needs Autoencoder"),
]


@pytest.fixture(scope="module")
def wrong(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "other" / "transformer").mkdir(parents=True)
    (folder / "other" / "transformer" / "config.json").write_text('{"_class_name": "NoSuchTransformer3DModel"}')
    (folder / "vae").mkdir()
    (folder / "vae" / "config.json").write_text('{"_class_name": "AutoencoderKLMochi"}')
    return folder


@pytest.mark.parametrize(("changes", "message"), WRONG)
@pytest.mark.parametrize("name", NAMES)
def test_mistakes_are_one_line(wrong, tmp_path, name, changes, message):
    if changes.get("base") == "{}/family":
        other = "latte" if TINY[name]["family"] != "latte" else "svd"
        load(other).save(tmp_path / "family")
        changes = {"base": str(tmp_path / "family")}
    given = {key: value.format(wrong) if isinstance(value, str) else value for key, value in changes.items()}
    if given.get("base"):
        given["init"] = {}
    with pytest.raises(UserError, match=message) as error:
        models.family(TINY[name]["family"]).inspect(settings(name, **given))
    assert "\n" not in str(error.value)
