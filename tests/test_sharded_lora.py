"""Low-rank adapters over a base that ranks hold in parts: all comes out as in a single process."""

import pytest
import torch
from safetensors.torch import load_file

from entprog.blocks import ADAPTER, blocks
from entprog.cost.holding import held
from entprog.distributed import agree, fsdp
from entprog.models import adapters, fingerprints, saving
from entprog.schedule import freezing
from entprog.scoring import cei, priorities
from entprog.training import checkpoint
from entprog.training.fit import fit, start
from helpers.networks import batches, latents, tiny_denoiser, tiny_experiment
from helpers.processes import join, leave, run_ranks
from pipelines.training import networks

WIDE = {
    "patch_size": [1, 4, 4], "num_attention_heads": 2, "attention_head_dim": 32, "out_channels": 3, "text_dim": 8,
    "freq_dim": 16, "ffn_dim": 256, "num_layers": 3, "rope_max_seq_len": 32, "cross_attn_norm": True,
}  # fmt: skip
STEPS, SAVED = 5, 3
TYPES = ("float32", "bfloat16")


def experiment(folder, dtype, world, way, **train):
    return tiny_experiment(
        model={"init": {}, "base": str(folder / "base"), "dtype": dtype},
        train={
            "steps": STEPS, "parallel": way, "workers": world, "accumulate": 4 // world, "lora": {"rank": 4},
            "ema_decay": 0.9,
        } | train,
        schedule={"stages": 2, "search_steps": 1, "backward": "residual"},
    )  # fmt: skip


def whole(network):
    return {name: fsdp.whole(p.detach()).clone() for name, p in network.named_parameters()}


def trained(settings, folder, rank, world, resumed=False):
    """A run from loading, or from a checkpoint, to saving: what it comes to."""
    denoiser = networks.load(settings, torch.device("cpu"))
    network, out = denoiser.network, {"loaded": whole(denoiser.network)}
    found = cei.blocks_in_order(blocks(network), denoiser.predict, latents([0]))
    table = cei.cei(denoiser, found, [latents(range(2))], settings.priority)
    state, out["scores"] = start(network, settings), table.scores()
    if settings.model.dtype == "float32":
        by_gradient = settings.priority.model_copy(update={"kind": "gradient"})
        scored = priorities.score(denoiser, found, [latents(range(2))], by_gradient).scores()
        out["scores"] |= {f"gradient of {name}": value for name, value in scored.items()}
    plan = held(network, found, [b.name for b in found], freezing.outside(denoiser, settings), settings)
    out["held"] = sum(fsdp.held(p).nbytes for p in network.parameters()), plan.weights
    if resumed:
        checkpoint.load(folder, checkpoint.newest(folder), network, state, "id")
    held_out, out["losses"] = [latents(range(2))] if rank == 0 else [], []
    for step in fit(denoiser, found, batches(settings, rank, world), held_out, latents([0, 1]), table, settings, state):
        out["losses"].append(step.loss)
        if step.step == SAVED and not resumed:
            checkpoint.save(folder, network, state, "id", keep=1)
    final = networks.final(denoiser, settings, state)
    out["trained"] = whole(network)
    if rank == 0 or fsdp.is_sharded(network):
        networks.leave_adapter(final, settings, folder / "adapter", 33)
        final = networks.merged(final, settings, fingerprints.base(settings.model))
        out["merged"] = {name: fsdp.whole(t).clone() for name, t in final.network.state_dict().items()}
    if rank == 0:
        saving.save(final.network, folder / "model")
    else:
        saving.lend(final.network)
    return out


def _lora_rank(rank, world, folder):
    join(rank, world, folder)
    for dtype in TYPES:
        settings = experiment(folder, dtype, world, "fsdp")
        out = trained(settings, folder / dtype, rank, world)
        if dtype == "bfloat16":
            again = trained(settings, folder / dtype, rank, world, resumed=True)
            assert out["losses"][SAVED:] == again["losses"]
            for part in ("trained", "merged"):
                assert all(torch.equal(tensor, again[part][name]) for name, tensor in out[part].items())
        goes_on = settings.model.model_copy(update={"adapter": str(folder / dtype / "adapter")})
        agree.wait_for_all()
        out["gone on"] = whole(networks.load(settings.model_copy(update={"model": goes_on}), "cpu").network)
        torch.save(out, folder / f"{dtype} {rank}.pt")
    fresh = tiny_experiment(model={"init": WIDE}, train={"parallel": "fsdp", "workers": world, "lora": {"rank": 4}})
    torch.save(whole(networks.load(fresh, torch.device("cpu")).network), folder / f"fresh {rank}.pt")
    leave()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two ranks left."""
    folder = tmp_path_factory.mktemp("lora")
    tiny_denoiser(tiny_experiment(model={"init": WIDE}), seed=3).save(folder / "base")
    run_ranks(_lora_rank, 2, folder)
    return folder


@pytest.mark.parametrize("dtype", TYPES)
def test_it_comes_out_as_in_a_single_process(folder, dtype, tmp_path):
    ranks = [torch.load(folder / f"{dtype} {rank}.pt", weights_only=True) for rank in range(2)]
    settings = experiment(folder, dtype, 1, "ddp")
    alone = trained(settings, tmp_path, 0, 1)
    base = {name for name in alone["loaded"] if ".base_layer.weight" in name}
    for rank in ranks:
        for name, tensor in alone["loaded"].items():
            assert rank["loaded"][name].dtype == tensor.dtype and torch.equal(rank["loaded"][name], tensor), name
        assert rank["scores"] == pytest.approx(alone["scores"], rel=1e-4 if dtype == "float32" else 2e-2)
        assert rank["losses"] == pytest.approx(alone["losses"], rel=1e-3)
        counted, foreseen = rank["held"]
        assert counted == pytest.approx(foreseen, rel=0.03)
        for name in alone["trained"]:
            moved = not torch.equal(rank["trained"][name], rank["loaded"][name])
            assert not moved or ADAPTER in name or not name.startswith("blocks."), name
            assert moved or ADAPTER not in name or "attn1" not in name, name
        tolerance = {"rtol": 2e-2, "atol": 2e-4 if dtype == "float32" else 4e-3}
        for part in ("trained", "merged"):
            for name, tensor in alone[part].items():
                torch.testing.assert_close(rank[part][name], tensor, **tolerance)
        for name, tensor in rank["gone on"].items():
            assert torch.equal(tensor, rank["trained"][name]), name
    assert len(base) == 24 and all(ranks[0]["loaded"][name].dtype == getattr(torch, dtype) for name in base)
    saved = load_file(folder / dtype / "model" / "diffusion_pytorch_model.safetensors")
    assert saved.keys() == ranks[0]["merged"].keys()
    assert all(torch.equal(tensor, ranks[0]["merged"][name]) for name, tensor in saved.items())
    own, theirs = (adapters.read(str(where / "adapter"), "model.adapter") for where in (folder / dtype, tmp_path))
    assert own.pairs.keys() == theirs.pairs.keys() and own.about == theirs.about
    assert own.outside.keys() == theirs.outside.keys() and own.outside
    for name, pair in own.pairs.items():
        torch.testing.assert_close(pair.delta(), theirs.pairs[name].delta(), **tolerance)


@pytest.mark.parametrize("dtype", TYPES)
def test_a_single_process_goes_on_from_its_checkpoint(folder, dtype, tmp_path):
    """Of what adapters adapt the checkpoint holds nothing: it is what it was."""
    settings = experiment(folder, dtype, 1, "ddp")
    kept = {name for file in (folder / dtype / "step-00000003").glob("*.safetensors") for name in load_file(file)}
    assert kept and not any(".base_layer." in name for name in kept)
    denoiser = networks.load(settings, torch.device("cpu"))
    before = {name: tensor.clone() for name, tensor in denoiser.network.state_dict().items()}
    state = start(denoiser.network, settings)
    checkpoint.load(folder / dtype, "step-00000003", denoiser.network, state, "id")
    moved = {name for name, t in denoiser.network.state_dict().items() if not torch.equal(t, before[name])}
    assert any(ADAPTER in name for name in moved) and not any(".base_layer." in name for name in moved)


def test_new_networks_get_the_adapters_that_one_process_gives_them(folder):
    fresh = tiny_experiment(model={"init": WIDE}, train={"lora": {"rank": 4}})
    wanted = whole(networks.load(fresh, torch.device("cpu")).network)
    for rank in range(2):
        got = torch.load(folder / f"fresh {rank}.pt", weights_only=True)
        assert got.keys() == wanted.keys() and all(torch.equal(got[name], wanted[name]) for name in wanted)
