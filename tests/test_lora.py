"""Adapters inside the chosen blocks: what trains, what it costs, what a resume keeps, and what is saved."""

import re

import pytest
import torch
from safetensors.torch import load_file

from entprog import config
from entprog.blocks import ADAPTER, blocks, unfreeze
from entprog.cost import counting, measuring
from entprog.diffusion.losses import training_loss
from entprog.errors import UserError
from entprog.models import adapters, lora
from entprog.schedule.freezing import outside
from entprog.training import checkpoint
from helpers.memory import Peak
from helpers.networks import TINY, bfloat16_base, latents, tiny_denoiser, tiny_experiment
from helpers.runs import Run, comparable, course, differing
from pipelines.training import networks

LORA = {"train": {"steps": 12, "lora": {"rank": 4, "alpha": 8}}, "schedule": {"search_steps": 1}}


def adapted(experiment, seed=0):
    denoiser = tiny_denoiser(experiment, seed)
    lora.add(denoiser.network, blocks(denoiser.network), experiment.train.lora, experiment.train.seed)
    return denoiser


@pytest.fixture
def experiment():
    return tiny_experiment(**LORA)


@pytest.fixture
def runs(monkeypatch):
    monkeypatch.setattr("helpers.runs.tiny_denoiser", adapted)


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("given", [None, "always", "conditions", "never"])
def test_outside_blocks_adapters_leave_all_but_the_input_layer_unless_told(given, adapters):
    """A run of before, whose settings say `always`, is the same one only where that is what is trained now."""
    lora = LORA["train"]["lora"] if adapters else None
    experiment = tiny_experiment(schedule={"outside": given}, train={"lora": lora})
    wanted = given or ("conditions" if adapters else "always")
    groups = (denoiser := tiny_denoiser(experiment)).outside()
    trained = {"always": [p for each in groups.values() for p in each], "conditions": groups["conditions"], "never": []}
    assert list(map(id, outside(denoiser, experiment))) == list(map(id, trained[wanted])) and groups["rest"]
    assert config.deciding(experiment)["schedule.outside"] == wanted


def prediction(denoiser, network=None):
    batch = latents(range(2))
    with torch.no_grad():
        return denoiser.predict(batch.clean, torch.tensor([0.2, 0.8]), batch.conditions)


def test_new_adapters_change_nothing_and_depend_on_the_seed_alone(experiment):
    plain, one, two = tiny_denoiser(experiment), adapted(experiment), adapted(experiment)
    assert torch.equal(prediction(one), prediction(plain))
    states = [denoiser.network.state_dict() for denoiser in (one, two)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert sum(ADAPTER in name for name in states[0]) == 6 * 2 * 4 * 2  # blocks, attentions, layers, A and B


@pytest.mark.parametrize("backward", ["exact", "residual"])
def test_only_chosen_blocks_adapters_and_what_lies_outside_train(runs, backward):
    run = Run(tiny_experiment(**LORA | {"schedule": {"search_steps": 1, "backward": backward}}))
    before, narrow = run.weights(), 0
    for step in run.steps():
        after = run.weights()
        moved = {name for name in after if not torch.equal(after[name], before[name])}
        inside = tuple(name + "." for name in step.plan.trainable)
        chosen = {n for n in after if n.startswith(inside) and ADAPTER in n}
        assert moved and {n for n in moved if n.startswith("blocks.")} <= chosen, step.step
        narrow += step.plan.m < 6
        before = after
    assert narrow and step.optimizer_bytes < sum(p.nbytes for p in run.denoiser.network.parameters())  # else twice


@pytest.mark.parametrize("backward", ["exact", "residual"])
def test_costs_are_foreseen(experiment, backward):
    denoiser = adapted(experiment)
    found, free = blocks(denoiser.network), denoiser.outside()["conditions"]
    loss = lambda: training_loss(denoiser, latents([0]), experiment.train)  # noqa: E731
    model = measuring.measure(denoiser.network, found, free, loss, clips=1, seconds=False)
    for trainable in (["blocks.1"], ["blocks.0", "blocks.4"], [block.name for block in found]):
        trained = unfreeze(denoiser.network, found, trainable, free, backward)
        counted = counting.count(denoiser.network, trained, loss)
        assert model.step(trainable, backward) == pytest.approx(counted.flops, rel=0.01)
        assert model.memory(trainable, backward) == pytest.approx(counted.memory_bytes(1), rel=0.05)
        assert model.trained_bytes(trainable) == counted.gradient_bytes


def test_resume_equals_no_interruption(runs, tmp_path):
    experiment = tiny_experiment(**LORA | {"train": LORA["train"] | {"ema_decay": 0.9}})
    whole = Run(experiment)
    expected = course(whole, {5: tmp_path})
    second = Run(experiment, tmp_path)
    assert [comparable(step) for step in second.steps()] == expected[5:]
    assert not differing(whole.weights(), second.weights())
    assert {name for name in whole.state.ema if name.startswith("blocks.")} == {
        name for name in whole.weights() if ADAPTER in name
    }


@pytest.mark.parametrize("precision", ["auto", "full"])
def test_a_checkpoint_holds_what_may_change_and_takes_no_memory_for_the_rest(precision, monkeypatch, tmp_path):
    """One of before, which holds the base, is taken up too."""
    small = {**TINY, "num_layers": 2}
    bfloat16_base(tiny_experiment(model={"init": small}), tmp_path / "base")
    experiment = tiny_experiment(
        model={"init": {}, "base": str(tmp_path / "base"), "dtype": "bfloat16"},
        train={"steps": 4, "lora": {"rank": 4}, "ema_decay": 0.9},
        schedule={"kind": "progressive", "table": [{"until": 1, "share": 0.5}], "frozen_precision": precision},
    )
    monkeypatch.setattr("helpers.runs.tiny_denoiser", lambda experiment: networks.load(experiment, torch.device("cpu")))
    run, expected = Run(experiment), []
    network, state = run.denoiser.network, run.state
    for step in run.steps():
        expected.append(comparable(step))
        if step.step == 2:
            with Peak() as peak:
                contents = checkpoint.contents(network, state)
            checkpoint.save(tmp_path / "new", network, state, "id", keep=1)
            before = contents | {f"network/{name}": tensor for name, tensor in network.state_dict().items()}
            with monkeypatch.context() as patch:
                patch.setattr(checkpoint, "contents", lambda *_, before=before: before)
                checkpoint.save(tmp_path / "old", network, state, "id", keep=1)
    kept, there = (load_file(next((tmp_path / name).glob("*/*.safetensors"))) for name in ("new", "old"))
    adapted = {name for name in there if re.search(r"\.base_layer\.|\.ffn\.net\.", name)}
    assert there.keys() - kept.keys() == adapted and len(adapted) == 2 * (8 + 2) * 2, "weights and biases"
    assert peak.bytes <= sum(tensor.nbytes for name, tensor in contents.items() if name.startswith("network/"))
    for folder in ("new", "old"):
        again = Run(experiment, tmp_path / folder)
        assert [comparable(step) for step in again.steps()] == expected[2:]
        assert not differing(run.weights(), again.weights())


def test_saved_merged_and_as_an_adapter(runs, experiment, tmp_path):
    from diffusers import WanTransformer3DModel
    from peft import PeftModel

    run = Run(experiment)
    list(run.steps())
    network, expected = run.denoiser.network, prediction(run.denoiser)
    assert not torch.equal(expected, prediction(tiny_denoiser(experiment)))
    lora.save(network, experiment.train.lora, outside(run.denoiser, experiment), tmp_path / "adapter")
    lora.merge(network)
    torch.testing.assert_close(prediction(run.denoiser), expected, rtol=1e-4, atol=1e-5)
    run.denoiser.save(tmp_path / "model")
    merged = WanTransformer3DModel.from_pretrained(tmp_path / "model" / "transformer")
    assert not differing(merged.state_dict(), network.state_dict())

    other = tiny_denoiser(experiment)  # the base, with what was trained beside it
    rest = load_file(tmp_path / "adapter" / adapters.OUTSIDE)
    assert not other.network.load_state_dict(rest, strict=False).unexpected_keys
    assert rest.keys() == {"patch_embedding.weight", "patch_embedding.bias"}
    PeftModel.from_pretrained(other.network, str(tmp_path / "adapter"))  # adapts the network in place
    torch.testing.assert_close(prediction(other), expected, rtol=1e-4, atol=1e-5)


def test_a_target_that_is_no_layer_is_refused_with_those_there_are(experiment):
    wrong = tiny_experiment(train={"lora": {"targets": ["to_q", "query"]}})
    with pytest.raises(UserError, match=r"ends in query; there are: .*ffn\.net\.2.*to_q"):
        adapted(wrong)
