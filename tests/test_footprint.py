"""What a run holds of a device's memory whatever its clips are: foreseen from shapes, held in fact."""

import importlib.util
from functools import partial

import pytest

from entprog import config, models
from entprog.blocks import (
    blocks,
    layer_weights,
    packed_bytes,
    room_bytes,
    swap_of,
    unfreeze,
    unpacking_bytes,
    variants,
    waiting_bytes,
)
from entprog.blocks.held import all_held
from entprog.cost import counting
from entprog.diffusion.losses import training_loss
from entprog.errors import UserError
from entprog.models import lora
from entprog.schedule.freezing import Freeze
from entprog.schedule.plans import of_set
from entprog.schedule.prices import Prices
from entprog.training import averages, optimizer
from helpers import bases, families
from helpers.networks import SHAPE, TINY, latents, tiny_denoiser, tiny_experiment
from pipelines.training import footprint

TABLE = [{"until": 0.5, "share": 0.34, "choose": "random"}, {"until": 1}]


def settings(**parts):
    values = {"model": {"dtype": "bfloat16", "conditions": []}, "schedule": {"kind": "progressive", "table": TABLE}}
    return tiny_experiment(**config.merge(values, parts))


def source(experiment):
    return models.family("wan").inspect(experiment.model)


@pytest.mark.parametrize("adapters", [None, {"rank": 4}])
@pytest.mark.parametrize("precision", ["auto", "full"])
@pytest.mark.parametrize("kind", ["adamw", "adamw_bf16"])
def test_what_is_foreseen_is_held(kind, precision, adapters):
    schedule = {"frozen_precision": precision, "outside": "always" if adapters is None else "conditions"}
    experiment = settings(train={"optimizer": kind, "lora": adapters}, schedule=schedule)
    denoiser = tiny_denoiser(experiment)
    if adapters:
        lora.add(denoiser.network, blocks(denoiser.network), experiment.train.lora, 0)
    found = blocks(denoiser.network)
    freeze = Freeze(denoiser, found, experiment)
    names = [block.name for block in found]
    for number, m in enumerate((2, 6)):
        adamw = optimizer.adamw(denoiser.network, experiment.train)
        freeze.put(of_set(names[:m], names, "exact", SHAPE))
        training_loss(denoiser, latents([0], ()), experiment.train).backward()
        adamw.step()
        foreseen = footprint.stages(experiment, source(experiment))[number]
        parameters = list(denoiser.network.parameters())
        assert foreseen.weights == sum(p.nbytes for p in parameters)
        assert foreseen.gradients == sum(p.grad.nbytes for p in parameters if p.grad is not None)
        counters = 4 * len(adamw.state)
        assert foreseen.moments == optimizer.state_bytes(adamw, denoiser.device) - counters
        adamw.zero_grad(set_to_none=True)


@pytest.mark.parametrize("adapters", [None, {"rank": 4}])
def test_averages_of_all_that_was_trained_are_foreseen(adapters):
    """They stay where they are while other blocks are trained."""
    schedule = {"outside": "conditions", "table": [{"until": 0.5, "share": 0.34, "choose": "random"}, {"until": 1}]}
    experiment = settings(train={"ema_decay": 0.9, "lora": adapters}, schedule=schedule)
    denoiser = tiny_denoiser(experiment)
    if adapters:
        lora.add(denoiser.network, blocks(denoiser.network), experiment.train.lora, 0)
    found, averaged = blocks(denoiser.network), {}
    freeze, names = Freeze(denoiser, found, experiment), [block.name for block in found]
    stages = footprint.stages(experiment, source(experiment))
    for chosen in (names[:2], names[2:4], names[4:]):
        freeze.put(of_set(chosen, names, "exact", SHAPE))
        averages.start(averaged, denoiser.network)
    held = sum(tensor.nbytes for tensor in averaged.values())
    assert [stage.averages for stage in stages] == [held] * 2 and held > stages[0].gradients
    plain = footprint.stages(settings(train={"lora": adapters}, schedule=schedule), source(experiment))
    assert [a.device - b.device for a, b in zip(stages, plain, strict=True)] == [held] * 2
    tight = config.build(config.merge(experiment.model_dump(), {"schedule": {"memory_budget_bytes": plain[1].device}}))
    assert "moments and averages alone" in footprint.advice(tight, source(tight))


def test_a_budget_that_cannot_hold_it_says_what_would():
    wide = {"model": {"init": {**TINY, "attention_head_dim": 128, "ffn_dim": 1024}}, "schedule": {"outside": "never"}}
    plain = settings(**wide)
    needed, least = (
        footprint.largest(plain, source(plain)),
        footprint.largest(settings(**wide, train={"lora": {}}), source(plain)),
    )
    assert footprint.advice(plain, source(plain)) is None
    for budget, said in (
        (needed, None),
        (needed - 1, "train.optimizer=adamw_bf16"),
        (int(needed * 0.7), "train.optimizer=adamw_8bit"),
        (least, "train.lora={}"),
        (int(least * 0.8), "train.lora={} and schedule.frozen_precision=fp8_alone"),
        (int(least * 0.65), "train.lora={} and schedule.frozen_precision=nf4"),
        (int(least * 0.58), "frozen_precision=nf4 and model.swap_blocks=4"),
        (least // 10, "smaller shares"),
    ):
        tight = settings(**config.merge(wide, {"schedule": {"memory_budget_bytes": budget}}))
        line = footprint.advice(tight, source(tight))
        assert (line is None) if said is None else said in line, line


def test_where_peft_is_missing_adapters_are_no_proposal(monkeypatch):
    """And nothing ends for want of what nobody asked for."""
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None if name == "peft" else found(name, *more))
    plain = settings(schedule={"outside": "never"})
    needed = footprint.largest(plain, source(plain))
    for budget, said in ((needed - 1, "train.optimizer=adamw_bf16"), (needed // 100, "smaller shares")):
        tight = settings(schedule={"outside": "never", "memory_budget_bytes": budget})
        line = footprint.advice(tight, source(tight))
        assert said in line and "lora" not in line


def test_a_card_that_cannot_hold_it_is_as_good_as_a_budget(monkeypatch):
    experiment = settings(schedule={"outside": "never"})
    needed = footprint.largest(experiment, source(experiment))
    for there, said in ((None, None), (needed, None), (needed - 1, "this machine's GPU has")):
        monkeypatch.setattr(footprint, "card_bytes", lambda there=there: there)
        line = footprint.advice(experiment, source(experiment))
        assert line is None if said is None else said in line and "train.optimizer=adamw_bf16" in line
        assert footprint.advice(settings(train={"gpus": "no"}), source(experiment)) is None


@pytest.mark.parametrize("precision", ["auto", "fp8_alone", "nf4"])
@pytest.mark.parametrize("adapters", [None, {"rank": 4}])
def test_what_is_foreseen_of_packed_and_waiting_blocks_is_held(precision, adapters):
    schedule = {"frozen_precision": precision, "outside": "conditions", "table": [{"until": 1, "share": 0.34}]}
    experiment = settings(model={"swap_blocks": 3}, train={"lora": adapters}, schedule=schedule)
    denoiser = tiny_denoiser(experiment)
    if adapters:
        lora.add(denoiser.network, blocks(denoiser.network), experiment.train.lora, 0)
    found = blocks(denoiser.network)
    freeze, names = Freeze(denoiser, found, experiment), [block.name for block in found]
    freeze.put(of_set(names[:2], names, "exact", SHAPE))
    training_loss(denoiser, latents([0], ()), experiment.train).backward()
    (foreseen,) = footprint.stages(experiment, source(experiment))
    network, rooms = denoiser.network, room_bytes(denoiser.network)
    padded = 256 * sum(len(held.parts()) for held in all_held(network) if held.waiting)
    here = sum(p.nbytes for p in network.parameters()) + packed_bytes(network) + rooms
    assert foreseen.weights <= here <= foreseen.weights + padded and rooms > 0
    assert foreseen.unpacking == unpacking_bytes(network) and bool(foreseen.unpacking) == (precision != "auto")
    assert footprint.largest(experiment, source(experiment)) == foreseen.device + foreseen.unpacking
    copied = swap_of(found).fetched_bytes
    assert foreseen.copied == 2 * waiting_bytes(network) and copied <= foreseen.copied + 2 * padded
    assert footprint.copying(experiment, source(experiment))
    bare = settings(model={"swap_blocks": 3}, train={"lora": adapters, "gpus": "no"}, schedule=schedule)
    (unpinned,) = footprint.stages(bare, source(bare))
    sizes = [sum(held.nbytes for held in waiting.places) for waiting in swap_of(found).waiting]
    rounded = sum(next(2**n for n in range(40) if 2**n >= size) for size in sizes)
    assert foreseen.host - unpinned.host == rounded - sum(sizes)
    masters = [m for b in found for m in variants(b.module).stored.masters.values() if m is not None]
    assert sum(m.nbytes for m in masters) + waiting_bytes(network) <= foreseen.host


def test_what_blocks_are_given_is_foreseen_where_it_waits():
    """As much as counting finds to have left the device; a U-Net's blocks differ."""
    experiment = settings(model={"gradient_checkpointing": "on_host", "dtype": "float32"}, train={"gpus": "no"})
    counted = []
    for how in (True, "on_host"):
        denoiser = tiny_denoiser(experiment)
        found = blocks(denoiser.network)
        trained = unfreeze(denoiser.network, found, [block.name for block in found], [], "exact", how)
        loss = partial(training_loss, denoiser, latents([0], ()), experiment.train)
        counted.append(counting.count(denoiser.network, trained, loss).saved_bytes)
    one = footprint.inputs_bytes(experiment, source(experiment))
    assert one == experiment.data.batch_size * (counted[0] - counted[1]) > 0
    assert footprint.written(one) in footprint.inputs(experiment, source(experiment))
    plain = settings()
    assert footprint.inputs(plain, source(plain)) is None
    two = config.build(config.merge(experiment.model_dump(), {"data": {"batch_size": 999}, "train": {"workers": 2}}))
    most = footprint.inputs_bytes(two, source(two))
    needed = 2 * (most + max(stage.host for stage in footprint.stages(two, source(two))))
    assert most == 999 * one / experiment.data.batch_size
    assert footprint.host_advice(two, source(two), needed) is None
    assert "and blocks' inputs" in footprint.host_advice(two, source(two), needed - 1)
    of_svd = {"family": "svd", "init": families.TINY["svd"]["init"], "vae": "none", "gradient_checkpointing": "on_host"}
    unet = config.build({"model": of_svd, "train": {"steps": 1}})
    assert "not foreseen" in footprint.inputs(unet, models.family("svd").inspect(unet.model))


def test_a_machine_with_too_little_memory_is_told():
    two, source_ = settings(train={"workers": 2}), source(settings())
    needed = 2 * footprint.loading_bytes(two, source_)
    assert needed >= 2 * max(stage.host for stage in footprint.stages(two, source_))
    assert footprint.host_advice(two, source_, needed) is None
    assert footprint.host_advice(two, source_, None) is None, "workers of a cluster are elsewhere"
    said = footprint.host_advice(two, source_, needed - 1)
    assert "2 worker(s) hold all of the network in float32" in said and footprint.written(needed // 2) in said
    on_host = {"swap_blocks": 3, "gradient_checkpointing": "on_host"}
    waiting = settings(model=on_host, data={"batch_size": 999})
    host = max(stage.host for stage in footprint.stages(waiting, source(waiting)))
    host += footprint.inputs_bytes(waiting, source(waiting))
    said = footprint.host_advice(waiting, source(waiting), host - 1)
    assert f"hold up to {footprint.written(host)} each" in said and "model.swap_blocks" in said
    sharded = settings(train={"workers": 2, "parallel": "fsdp"})
    assert "schedule.frozen_precision=full" in footprint.host_advice(sharded, source(sharded), 1)
    full = settings(train={"workers": 2, "parallel": "fsdp"}, schedule={"frozen_precision": "full"})
    assert footprint.host_advice(full, source_, 1) is None


@pytest.mark.parametrize("changes", [{}, {"train": {"lora": {"rank": 4}}, "schedule": {"frozen_precision": "nf4"}}])
def test_what_loading_takes_on_the_host_is_said(changes, tmp_path):
    """Of a base, all of which is read in float32 before any of it is packed."""
    experiment = settings(**changes)
    tiny_denoiser(experiment).save(tmp_path, shape=SHAPE)
    based = config.build(config.merge(experiment.model_dump(), {"model": {"init": {}, "base": str(tmp_path)}}))
    held = []
    load = models.family("wan").load
    load(based.model, prepare=lambda network: held.extend((p.nbytes, p.device.type) for p in network.parameters()))
    foreseen = footprint.loading_bytes(based, source(based))
    assert foreseen == sum(size for size, _ in held) and {place for _, place in held} == {"cpu"}
    said = footprint.loading(based, source(based))
    assert footprint.written(foreseen) in said and ("merged" in said) == bool(changes)
    sharded = settings(train={"parallel": "fsdp", "workers": 2})
    assert footprint.loading(sharded, source(sharded)) is None


def test_the_table_of_a_dry_run():
    rows = footprint.rows(settings(), source(settings()))
    assert [len(row) for row in rows] == [len(footprint.COLUMNS)] * 2 and rows[1][-1] == "0 MB"
    sharded = footprint.stages(settings(train={"parallel": "fsdp", "workers": 2}), source(settings()))
    whole = footprint.stages(settings(), source(settings()))
    for part in ("device", "host"):
        assert [2 * getattr(s, part) for s in sharded] == pytest.approx([getattr(w, part) for w in whole], abs=6)
    copies = {"parallel": "fsdp", "workers": 4, "replicas": 2}
    assert footprint.stages(settings(train=copies), source(settings())) == sharded
    network = source(settings()).network
    layers = [sum(p.numel() for _, p in layer_weights(block.module)) for block in blocks(network)]
    rest = 4 * (sum(p.numel() for p in network.parameters()) - sum(layers))
    assert {each.unpacking for each in sharded} == {2 * 2 * max(layers) + rest}, "whole while a pass goes on"
    full = settings(model={"dtype": "float32"}, train={"parallel": "fsdp", "workers": 2})
    found = [4 * sum(p.numel() for p in block.module.parameters()) for block in blocks(network)]
    beside = 4 * sum(p.numel() for p in network.parameters()) - sum(found)
    assert {each.unpacking for each in footprint.stages(full, source(full))} == {2 * max(found) + beside}


def test_vae_and_image_encoder_are_counted_beside_the_network(tmp_path):
    """Where they stay on the device a budget holds them too; elsewhere they are the host's."""
    bases.image_to_video(tmp_path, clip=True)
    model = {"init": {}, "base": str(tmp_path), "vae": "auto", "conditions": ["reference", "pose"]}

    def with_budget(size, latents="never"):
        data = {"shape": families.FIVE.model_dump(), "latents": latents}
        return settings(model=model, schedule={"memory_budget_bytes": size}, data=data)

    experiment = with_budget(None)
    there, denoiser = source(experiment), models.family("wan").load(experiment.model)
    beside = footprint.beside_bytes(there)
    held = sum(p.nbytes for module in (denoiser.vae, denoiser.image_encoder) for p in module.parameters())
    assert beside == pytest.approx(held, rel=0.01) and footprint.written(beside) in footprint.beside(experiment, there)
    assert footprint.beside(settings(), source(settings())) is None
    least = max(s.weights + s.gradients + s.moments for s in footprint.stages(experiment, there, smallest=True))
    footprint.check_budget(with_budget(least + beside), there)
    with pytest.raises(UserError, match="of the smallest plan, with VAE and image encoder, alone are"):
        footprint.check_budget(with_budget(least + beside - 1), there)
    most = footprint.largest(experiment, there) + beside
    assert footprint.advice(with_budget(most), there) is None
    assert "and moments, with VAE and image encoder, alone are up to" in footprint.advice(with_budget(most - 1), there)

    footprint.check_budget(with_budget(least, "auto"), there)  # they may be cached
    footprint.check_budget(with_budget(least, "require"), there)
    assert "alone are up to" in footprint.advice(with_budget(most - 1, "auto"), there)
    assert footprint.advice(with_budget(most - beside, "require"), there) is None
    said = [footprint.beside(with_budget(None, latents), there) for latents in ("never", "auto", "require")]
    assert [("of a device" in line, "wait on the host" in line) for line in said] == [(1, 0), (1, 1), (0, 1)]
    host = with_budget(None, "require")
    held = max(stage.host for stage in footprint.stages(host, there)) + beside
    assert footprint.loading_bytes(host, there) < held
    assert footprint.host_advice(host, there, held) is None
    assert "with VAE and image encoder: fewer" in footprint.host_advice(host, there, held - 1)

    found = blocks(denoiser.network)
    sample = denoiser.encode(families.clips(1))
    prices = Prices(denoiser, found, sample, Freeze(denoiser, found, experiment), experiment, {})
    of_network = prices.model(prices.full.shape).memory(prices.full.trainable, prices.full.backward)
    assert prices.memory(prices.full) - of_network == pytest.approx(beside, rel=0.01)
    (encoder,) = (tmp_path / "image_encoder").glob("*.safetensors")
    encoder.write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(UserError, match=f"model.base: {encoder} cannot be read"):
        footprint.beside_bytes(there)


def test_what_is_proposed_leaves_the_network_as_it_was():
    wide = {"model": {"init": {**TINY, "attention_head_dim": 128, "ffn_dim": 1024}}}
    experiment = settings(**wide, schedule={"memory_budget_bytes": 1}, train={"parallel": "fsdp", "workers": 2})
    there = source(experiment)
    before, names = footprint.stages(experiment, there), [name for name, _ in there.network.named_parameters()]
    advice = footprint.host_advice(experiment, there, 1)
    assert "alone are up to" in footprint.advice(experiment, there)
    assert [name for name, _ in there.network.named_parameters()] == names
    assert (footprint.stages(experiment, there), footprint.host_advice(experiment, there, 1)) == (before, advice)
