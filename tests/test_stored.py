"""Frozen weights stored in bfloat16: the very bits of a training without that, and a block's memory to the byte."""

import functools
import threading
from contextlib import closing
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from entprog import blocks, config
from entprog.blocks import full_state, lasting, store_frozen, unfreeze
from entprog.blocks.stored import layer_weights
from entprog.cost import counting, measuring
from entprog.diffusion.losses import training_loss
from entprog.models import lora
from entprog.schedule import plans
from entprog.schedule.freezing import Freeze, outside
from entprog.scoring import priorities
from entprog.training import checkpoint, optimizer
from entprog.training.fit import start
from helpers.families import NAMES, load, ordered, predict
from helpers.memory import Peak
from helpers.networks import SHAPE, TINY, bfloat16_base, latents, tiny_denoiser, tiny_experiment
from helpers.runs import Run, comparable
from pipelines.training import checks, networks

HALF = {"model": {"dtype": "bfloat16"}}
FAMILIES = [name for name in NAMES if name != "svd"]
"""SVD's temporal convolutions do not take bfloat16."""
MEMORY = ("memory_bytes", "plan_memory_bytes", "predicted_memory_bytes", "decision")
"""Of a step: what is less, and what may say so."""
ANEW = [{"until": 0.7, "share": 0.34, "choose": "random", "redraw_every": 2}, {"until": 1, "share": 0.5}]


def stored_names(found):
    return {b.name: set(blocks.variants(b.module).stored.masters) for b in found}


def assert_equal(got, expected):
    assert got.keys() == expected.keys()
    for name in expected:
        assert got[name].dtype == expected[name].dtype and torch.equal(got[name], expected[name]), name


def in_float32(tensors):
    """Of a checkpoint, which holds some in bfloat16 to the bit."""
    return {name: tensor.float() for name, tensor in tensors.items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_familys_outputs_and_gradients_have_equal_bits(name):
    plain, stored = load(name, dtype="bfloat16"), load(name, dtype="bfloat16")
    batch, seen = latents([0, 1]), []
    for denoiser in (plain, stored):
        found = ordered(denoiser, batch)
        chosen = [block.name for block in found[1::3]]
        if denoiser is stored:
            store_frozen(found)
        of_this = []
        for backward, checkpointing in (("exact", False), ("residual", False), ("exact", True)):
            network, free = denoiser.network, denoiser.outside()["conditions"]
            unfreeze(network, found, chosen, free, backward, checkpointing)
            output = predict(denoiser, batch)
            output.square().mean().backward()
            of_this.append(output.detach())
            of_this += [p.grad.clone() for p in network.parameters() if p.grad is not None]
            network.zero_grad(set_to_none=True)
        seen.append(of_this)
    assert len(seen[0]) == len(seen[1]) > 6
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(*seen, strict=True))
    half = {n for n, p in stored.network.named_parameters() if p.dtype == torch.bfloat16}
    assert half and all(n.startswith(tuple(f"{b.name}." for b in found if b.name not in chosen)) for n in half)
    assert_equal(stored.network.state_dict(), plain.network.state_dict())


def settings(backward, precision="auto", **parts):
    schedule = {"kind": "progressive", "table": ANEW, "backward": backward, "frozen_precision": precision}
    train = {"steps": 9, "ema_decay": 0.9}
    return tiny_experiment(**config.merge({**HALF, "train": train, "schedule": schedule}, parts))


def record(step):
    return {name: value for name, value in comparable(step).items() if name not in MEMORY}


@pytest.mark.parametrize("backward", ["exact", "residual"])
def test_a_training_that_freezes_and_thaws_has_the_bits_of_one_without(backward, tmp_path):
    """Steps, checkpoints, averages, moments; interrupted by either and taken up by the other, too."""
    runs = {precision: Run(settings(backward, precision)) for precision in ("full", "auto")}
    steps: dict[str, list] = {}
    thawed = set()
    for precision, run in runs.items():
        steps[precision] = []
        for step in run.steps():
            steps[precision].append(record(step))
            if precision == "auto":
                frozen = stored_names(run.found)
                assert all(bool(frozen[name]) != (name in step.plan.trainable) for name in frozen)
                thawed |= {frozenset(step.plan.trainable)}
            if step.step == 5:
                checkpoint.save(tmp_path / precision, run.denoiser.network, run.state, "id", keep=1)
    assert steps["auto"] == steps["full"] and len(thawed) > 2, "it froze and thawed"
    state = {kind: in_float32(checkpoint.contents(run.denoiser.network, run.state)) for kind, run in runs.items()}
    assert_equal(state["auto"], state["full"])
    kept = [in_float32(load_file(next((tmp_path / precision).glob("*/*.safetensors")))) for precision in runs]
    assert_equal(*kept)
    for precision, other in (("auto", "full"), ("full", "auto"), ("auto", "auto")):
        again = Run(settings(backward, precision), tmp_path / other)
        assert [record(step) for step in again.steps()] == steps["full"][5:]
        assert_equal(in_float32(checkpoint.contents(again.denoiser.network, again.state)), state["full"])


def test_a_saved_folder_is_the_same_with_averages_put_in(tmp_path):
    for precision in ("full", "auto"):
        run = Run(settings("residual", precision, train={"steps": 5}))
        list(run.steps())
        run.denoiser.network.load_state_dict(run.state.ema, strict=False)
        run.denoiser.save(tmp_path / precision)
    full, auto = (load_file(next((tmp_path / p / "transformer").glob("*.safetensors"))) for p in ("full", "auto"))
    assert_equal(auto, full)


@pytest.mark.parametrize("rounded", [True, False])
def test_a_checkpoint_is_saved_and_taken_up_without_a_second_network(rounded, tmp_path, monkeypatch):
    """Only what may change meanwhile is copied, frozen weights in bfloat16, or not at all where the host has their
    float32 numbers; what training does while it is written does not come into it."""
    model, go_on = {"init": {**TINY, "num_layers": 8}}, threading.Event()
    if rounded:
        bfloat16_base(tiny_experiment(model=model), tmp_path / "base")
        model = {"init": {}, "base": str(tmp_path / "base")}
    table = [{"until": 1, "share": 0.13, "choose": "random", "redraw_every": 1}]
    experiment = settings("exact", model=model, train={"steps": 5, "ema_decay": None}, schedule={"table": table})
    monkeypatch.setattr("helpers.runs.tiny_denoiser", lambda experiment: networks.load(experiment, torch.device("cpu")))
    run, write, expected, thawed = Run(experiment), checkpoint._save, [], set()
    network, state = run.denoiser.network, run.state
    monkeypatch.setattr(checkpoint, "_save", lambda *given: go_on.wait() and write(*given))
    with closing(checkpoint.Saver(tmp_path / "kept", "id", 1)) as saver:
        for step in run.steps():
            expected.append(record(step))
            thawed |= {*step.plan.trainable} if step.step > 2 else set()
            if step.step == 2:
                before = {name: tensor.clone() for name, tensor in full_state(network)}
                least, masters = checkpoint.contents(network, state), lasting(network)
                with Peak([*least.values(), *network.parameters()]) as peak:
                    saver.save(network, state)
                copied = {n: t for n, t in least.items() if n.removeprefix("network/") not in masters}
                trained = {*step.plan.trainable}
        go_on.set()

    size = lambda tensors: sum(t.nbytes for n, t in tensors.items() if n.startswith("network/blocks."))  # noqa: E731
    whole = size({f"network/{name}": tensor for name, tensor in before.items()})
    assert peak.bytes < sum(tensor.nbytes for tensor in copied.values()) + 100
    assert size(copied) < (0.6 if rounded else 0.2) * whole
    assert len(trained) == 1 and thawed - trained
    file = load_file(next((tmp_path / "kept").glob("*/*.safetensors")))
    assert_equal({name: file[f"network/{name}"].float() for name in before}, before)
    again = Run(experiment)
    with Peak(again.denoiser.network.parameters()) as peak:
        checkpoint.load(tmp_path / "kept", "step-00000002", again.denoiser.network, again.state, "id")
    of_block = sum(4 * p.numel() for p in run.found[0].module.parameters())
    moments = sum(tensor.nbytes for name, tensor in file.items() if name.startswith("moments/"))
    if rounded:  # else float32 numbers come for those that the host has
        assert peak.bytes < moments + 4 * of_block < moments + whole, "two blocks', and of two that were trained"
    assert [record(step) for step in again.steps()] == expected[2:]


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_no_second_network_is_made_at_the_end(lora, tmp_path):
    """Of a base whose numbers bfloat16 holds nothing else has float32 ones."""
    bfloat16_base(tiny_experiment(), tmp_path)
    experiment = settings("exact", model={"init": {}, "base": str(tmp_path)}, train={"lora": lora})
    denoiser = networks.load(experiment, torch.device("cpu"))
    network, state = denoiser.network, start(denoiser.network, experiment)
    with Peak() as peak:
        networks.final(denoiser, experiment, state)
    own = sum(parameter.nbytes for parameter in network.parameters())
    largest = max(4 * parameter.numel() for parameter in network.parameters())
    assert peak.bytes < own + 2 * largest


def adapted(experiment, seed=0):
    denoiser = tiny_denoiser(experiment, seed)
    lora.add(denoiser.network, blocks.blocks(denoiser.network), experiment.train.lora, experiment.train.seed)
    return denoiser


def test_adapters_over_a_stored_base_have_the_same_bits_and_merge_into_float32(monkeypatch, tmp_path):
    monkeypatch.setattr("helpers.runs.tiny_denoiser", adapted)
    seen = {}
    for precision in ("full", "auto"):
        experiment = settings("exact", precision, train={"steps": 5, "lora": {"rank": 4, "alpha": 8}})
        run = Run(experiment)
        steps = [record(step) for step in run.steps()]
        base = {p.dtype for n, p in run.denoiser.network.named_parameters() if "base_layer" in n}
        assert base == {torch.float32 if precision == "full" else torch.bfloat16}
        free = [*outside(run.denoiser, experiment), run.found[0].module.ffn.net[2].weight]
        lora.save(run.denoiser.network, experiment.train.lora, free, tmp_path / precision)
        lora.merge(run.denoiser.network)
        seen[precision] = steps, run.denoiser.network.state_dict()
    assert seen["auto"][0] == seen["full"][0]
    assert_equal(seen["auto"][1], seen["full"][1])
    written = {precision: sorted((tmp_path / precision).rglob("*.safetensors")) for precision in seen}
    assert written["full"] and written["full"][0].name == written["auto"][0].name
    for full, auto in zip(*written.values(), strict=True):
        assert_equal(load_file(auto), load_file(full))


def test_one_block_moves_and_the_host_holds_what_rounding_would_lose(denoiser, found):
    network = denoiser.network
    with torch.no_grad():
        for parameter in network.parameters():  # a checkpoint in bfloat16
            parameter.copy_(parameter.bfloat16())
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    store_frozen(found)
    masters = [master for b in found for master in blocks.variants(b.module).stored.masters.values()]
    assert masters and all(master is None for master in masters), "nothing is lost, so nothing waits on the host"
    assert_equal(network.state_dict(), before)

    def places():
        return {name: p.data_ptr() for name, p in network.named_parameters()}

    lay = places()
    unfreeze(network, found, ["blocks.2"], [])
    moved = {name for name, place in places().items() if place != lay[name]}
    assert moved and all(name.startswith("blocks.2.") for name in moved)
    with torch.no_grad():
        for parameter in found[2].module.parameters():
            assert parameter.dtype == torch.float32
            parameter += 1e-4
    trained = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    unfreeze(network, found, ["blocks.4"], [])
    kept = blocks.variants(found[2].module).stored.masters
    assert kept and any(master is not None for master in kept.values())
    assert_equal(network.state_dict(), trained)
    unfreeze(network, found, ["blocks.2", "blocks.4"], [])
    assert not blocks.variants(found[2].module).stored.masters
    assert all(torch.equal(p, trained[n]) for n, p in network.named_parameters())
    assert all(p.dtype == torch.float32 for p in found[2].module.parameters())


@pytest.mark.parametrize(
    ("share", "adapters", "expected"),
    [(1, None, {"full": 16, "auto": 16}), (0.5, None, {"full": 10, "auto": 9}), (1, 4, {"full": 4, "auto": 2})],
)
def test_bytes_a_parameter(share, adapters, expected):
    """Weights, gradients and AdamW's moments on the device, over the parameters of the blocks' own layers."""
    for precision in expected:
        settings = {"frozen_precision": precision, "outside": "never"}
        experiment = tiny_experiment(**HALF, train={"lora": adapters and {"rank": adapters}}, schedule=settings)
        denoiser = adapted(experiment) if adapters else tiny_denoiser(experiment)
        found = blocks.blocks(denoiser.network)
        freeze, adamw = Freeze(denoiser, found, experiment), optimizer.adamw(denoiser.network, experiment.train)
        names = tuple(block.name for block in found)
        freeze.put(plans.of_set(names[: int(share * len(names))], names, "exact", SHAPE))
        training_loss(denoiser, latents([0]), experiment.train).backward()
        adamw.step()
        layers = {p for block in found for _, p in layer_weights(block.module)}
        live = [*layers, *(p.grad for p in layers if p.grad is not None)]
        live += [t for p, state in adamw.state.items() if p in layers for t in state.values() if t.ndim]
        assert sum(t.nbytes for t in live) == expected[precision] * sum(p.numel() for p in layers)


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("backward", ["exact", "residual"])
def test_memory_is_foreseen(backward, adapters):
    experiment = tiny_experiment(**HALF, train={"lora": {"rank": 4}} if adapters else {})
    denoiser = adapted(experiment) if adapters else tiny_denoiser(experiment)
    found, free = blocks.blocks(denoiser.network), denoiser.outside()["conditions"]
    loss = functools.partial(training_loss, denoiser, latents([0]), experiment.train)
    full = {n: p.nbytes for n, p in denoiser.network.named_parameters()}
    store_frozen(found)
    model = measuring.measure(denoiser.network, found, free, loss, clips=1, seconds=False)
    assert all(stored_names(found).values()), "measuring leaves every block frozen"
    for trainable in (["blocks.1"], ["blocks.0", "blocks.4"], [block.name for block in found]):
        trained = unfreeze(denoiser.network, found, trainable, free, backward)
        counted = counting.count(denoiser.network, trained, loss)
        assert model.step(trainable, backward) == pytest.approx(counted.flops, rel=0.02)
        assert model.memory(trainable, backward) == pytest.approx(counted.memory_bytes(1), rel=0.05)
        assert model.trained_bytes(trainable) == counted.gradient_bytes
        assert (counted.weight_bytes < sum(full.values())) == (adapters or len(trainable) < len(found))


@pytest.mark.parametrize("kind", ["cei", "gradient", "fisher"])
def test_scores_are_the_same(kind):
    experiment = tiny_experiment(**HALF, priority={"kind": kind})
    tables = []
    for stores in (False, True):
        denoiser = tiny_denoiser(experiment)
        found = blocks.blocks(denoiser.network)
        if stores:
            store_frozen(found)
        tables.append(priorities.score(denoiser, found, [latents(range(2))], experiment.priority))
    assert tables[0].scores() == tables[1].scores()


def test_it_is_on_where_it_changes_no_bit():
    half = {"model": {"dtype": "bfloat16"}}
    assert tiny_experiment(**half).stores_frozen
    assert tiny_experiment(**half, schedule={"kind": "full"}, train={"lora": {}}).stores_frozen
    assert tiny_experiment(**half, train={"parallel": "fsdp"}).stores_frozen
    for off in (
        {},
        {**half, "schedule": {"kind": "full"}},
        {**half, "schedule": {"frozen_precision": "full"}},
        {**half, "train": {"parallel": "fsdp", "lora": {}}},
    ):
        assert not tiny_experiment(**off).stores_frozen


def test_it_makes_no_other_training_of_one_that_began_without():
    decides = {
        p: checks.deciding(settings("residual", p), SimpleNamespace(fingerprint="")) for p in ("auto", "full", "fp8")
    }
    assert decides["auto"] == decides["full"] != decides["fp8"]
    assert "train.optimizer" not in decides["auto"]
