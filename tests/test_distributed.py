"""Ranks: gradients equal the single process's on the union batch with a trained set that changes; all decide alike."""

import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import batches, latents, tiny_denoiser, tiny_experiment

from entprog import cei, distributed, scores
from entprog.blocks import blocks, unfreeze
from entprog.training import fit, start

SETS = [["blocks.0", "blocks.5"], ["blocks.2"], [f"blocks.{i}" for i in range(6)], ["blocks.5"]]


def join(rank, world, folder):
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)


def leave():
    """Together: a rank that ends first would take the others' connections with it."""
    dist.barrier()
    dist.destroy_process_group()


def run_ranks(target, world, folder, *args):
    # A spawned child imports this module by name.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    mp.spawn(target, args=(world, folder, *args), nprocs=world)


def gradients(denoiser, found, trained, backward, rows):
    parameters = unfreeze(denoiser.network, found, trained, denoiser.outside()["conditions"], backward)
    batch = latents(rows)
    denoiser.network.zero_grad(set_to_none=True)
    out = denoiser.predict(batch.clean, torch.full((len(rows),), 0.5), batch.conditions)
    (out - batch.clean).square().mean().backward()
    return parameters


def _gradient_rank(rank, world, folder, backward):
    join(rank, world, folder)
    denoiser = tiny_denoiser(tiny_experiment())
    found = blocks(denoiser.network)
    out = []
    for trained in SETS:
        parameters = gradients(denoiser, found, trained, backward, list(range(rank * 2, rank * 2 + 2)))
        distributed.reduce_gradients(parameters, bucket_bytes=20_000)
        out.append({n: p.grad.clone() for n, p in denoiser.network.named_parameters() if p.grad is not None})
    torch.save(out, folder / f"{rank}.pt")
    leave()


@pytest.mark.parametrize("backward", ["exact", "residual"])
def test_gradients_equal_a_single_process_on_the_union_batch(tmp_path, backward):
    run_ranks(_gradient_rank, 2, tmp_path, backward)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    denoiser = tiny_denoiser(tiny_experiment())
    found = blocks(denoiser.network)
    for number, trained in enumerate(SETS):
        gradients(denoiser, found, trained, backward, [0, 1, 2, 3])
        expected = {n: p.grad for n, p in denoiser.network.named_parameters() if p.grad is not None}
        for got in ranks:
            assert got[number].keys() == expected.keys()
            for name in expected:
                torch.testing.assert_close(got[number][name], expected[name], rtol=1e-4, atol=1e-7)
        for name in expected:
            assert torch.equal(ranks[0][number][name], ranks[1][number][name])


def _fit_rank(rank, world, folder):
    join(rank, world, folder)
    experiment = tiny_experiment(train={"steps": 16, "seconds": None}, schedule={"clock": "seconds"})
    denoiser = tiny_denoiser(experiment)
    found = blocks(denoiser.network)
    table = cei.cei(denoiser, found, [latents(range(2))], experiment.priority)
    held_out = [latents(range(3))] if rank == 0 else []  # fewer held-out clips than ranks is no error
    state, source = start(denoiser.network, experiment), batches(experiment, rank, world)
    steps = list(fit(denoiser, found, source, held_out, latents([0]), table, experiment, state))
    record = {
        "losses": [s.loss for s in steps],
        "held_out": [s.held_out_loss for s in steps],
        "decisions": [d.as_json() for d in state.decisions],
        "scores": table.scores(),
        "weights": scores.content_hash(denoiser.network),
    }
    (folder / f"{rank}.json").write_text(json.dumps(record))
    leave()


def test_ranks_score_decide_and_end_alike_though_their_seconds_differ(tmp_path):
    run_ranks(_fit_rank, 2, tmp_path)
    a, b = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert a == b and len(a["decisions"]) == 2 and len(a["losses"]) == 16


def _disagreeing_rank(rank, world, folder):
    join(rank, world, folder)
    try:
        distributed.agree("the plan", {"m": rank})
    except RuntimeError as error:
        (folder / f"{rank}.txt").write_text(str(error))
    leave()


def test_a_rank_that_disagrees_fails_everywhere_with_a_clear_message(tmp_path):
    run_ranks(_disagreeing_rank, 2, tmp_path)
    for rank in range(2):
        assert "ranks disagree on the plan" in (tmp_path / f"{rank}.txt").read_text()


def test_two_workers_train_like_one_with_the_union_batch():
    """A clip's noise and timestep follow its position: the first loss does not depend on how the batch is cut."""
    wide = tiny_experiment(data={"batch_size": 4}, train={"steps": 1}, schedule={"kind": "full"})
    narrow = tiny_experiment(data={"batch_size": 2}, train={"steps": 1}, schedule={"kind": "full"})
    losses = []
    for experiment, ranks in ((wide, 1), (narrow, 2)):
        parts = []
        for rank in range(ranks):
            denoiser = tiny_denoiser(experiment)
            found = blocks(denoiser.network)
            state = start(denoiser.network, experiment)
            source = batches(experiment, rank, ranks)
            held_out = [latents(range(4))]
            (step,) = fit(denoiser, found, source, held_out, latents([0]), None, experiment, state)
            parts.append(step.loss)
        losses.append(sum(parts) / len(parts))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
