"""Ranks: gradients equal the single process's on the union batch with a trained set that changes; all decide alike."""

import collections
import dataclasses
import functools
import itertools
import json
import math
import threading
import time
from contextlib import closing
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from entprog.blocks import blocks, unfreeze
from entprog.data import hashing
from entprog.distributed import agree, fsdp, reducing
from entprog.distributed.reducing import Reducer
from entprog.schedule.freezing import Freeze
from entprog.schedule.prices import Prices
from entprog.scoring import cache, cei
from entprog.training import checkpoint
from entprog.training import fit as fit_module
from entprog.training.fit import fit, start
from helpers.networks import batches, latents, tiny_denoiser, tiny_experiment
from helpers.processes import join, leave, run_ranks
from helpers.runs import Trained
from pipelines.training import networks

SETS = [["blocks.0", "blocks.5"], ["blocks.2"], [f"blocks.{i}" for i in range(6)], ["blocks.5"]]


WAYS = [(parallel, backward) for parallel in ("ddp", "fsdp") for backward in ("exact", "residual")]


class OnTheWire(TorchDispatchMode):
    """Counts the bytes that this rank gives to collectives, by kind: what torch.distributed is really asked for."""

    def __init__(self):
        super().__init__()
        self.bytes = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            name = function.__name__.split(".")[0].strip("_")
            given = args[1] if name in ("allgather_base", "reduce_scatter_base") else args[0]  # after the output
            self.bytes[name] += sum(tensor.nbytes for tensor in tree_leaves(given))
        return function(*args, **(kwargs or {}))


def _gradient_rank(rank, world, folder):
    """All ways of training in parallel, through all sets; two batches of two clips for each rank. Few buckets may be on
    their way at once; with one of the backwards they are waited for as on a GPU."""
    join(rank, world, folder)
    reducing.UNDER_WAY_BYTES = 40_000
    out = []
    for way, backward in WAYS:
        reducing.in_stream = lambda flat, backward=backward: backward == "residual"
        denoiser = tiny_denoiser(tiny_experiment())
        found = blocks(denoiser.network)
        if way == "fsdp":
            fsdp.shard(denoiser.network, found)
        for trained in SETS:
            fsdp.in_parts(denoiser.network)
            outside = denoiser.outside()["conditions"]
            parameters = unfreeze(denoiser.network, found, trained, outside, backward)
            fsdp.spare_frozen(found, trained, backward)
            denoiser.network.zero_grad(set_to_none=True)
            reducer = Reducer(parameters if way == "ddp" else [], bucket_bytes=20_000)
            with OnTheWire() as wire:
                for half in range(2):
                    first = (half * world + rank) * 2
                    if half == 1:
                        reducer.begin()
                    (loss_of(denoiser, [first, first + 1]) / 2).backward()
                    early = wire.bytes["allreduce"]
                reducer.flush()
                reducer.finish()
            reducer.close()
            named = denoiser.network.named_parameters()
            gradients = {name: p.grad for name, p in named if p.grad is not None}
            held = sum(fsdp.held(gradient).nbytes for gradient in gradients.values())
            whole = {name: fsdp.whole(gradient).clone() for name, gradient in gradients.items()}
            parts = sum(fsdp.held(p).nbytes for p in denoiser.network.parameters())
            out.append({"gradients": whole, "held": held, "weights": parts, "wire": +wire.bytes, "early": early})
    torch.save(out, folder / f"{rank}.pt")
    leave()


def loss_of(denoiser, rows):
    batch = latents(rows)
    out = denoiser.predict(batch.clean, torch.full((len(rows),), 0.5), batch.conditions)
    return (out - batch.clean).square().mean()


def test_gradients_equal_a_single_process_on_the_union_batch(tmp_path):
    world = 3  # which divides hardly a weight's rows evenly
    run_ranks(_gradient_rank, world, tmp_path)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(world)]
    denoiser = tiny_denoiser(tiny_experiment())
    found = blocks(denoiser.network)
    weights = sum(p.nbytes for p in denoiser.network.parameters())
    block_bytes = {block.name: sum(p.nbytes for p in block.module.parameters()) for block in found}
    for number, ((way, backward), trained) in enumerate(itertools.product(WAYS, SETS)):
        unfreeze(denoiser.network, found, trained, denoiser.outside()["conditions"], backward)
        denoiser.network.zero_grad(set_to_none=True)
        loss_of(denoiser, list(range(4 * world))).backward()
        expected = {n: p.grad for n, p in denoiser.network.named_parameters() if p.grad is not None}
        trained_bytes = sum(gradient.nbytes for gradient in expected.values())
        for rank in ranks:
            got = rank[number]
            assert got["gradients"].keys() == expected.keys(), "frozen parameters have no gradient"
            for name in expected:
                torch.testing.assert_close(got["gradients"][name], expected[name], rtol=1e-4, atol=1e-7)
                assert torch.equal(got["gradients"][name], ranks[0][number]["gradients"][name])
            wire = got["wire"]
            if way == "ddp":
                assert got["held"] == trained_bytes and got["weights"] == weights
                assert wire == {"allreduce": trained_bytes}, "once an update, frozen ones not at all"
                assert 0 < got["early"] <= trained_bytes, "the first ones while the backward pass goes on"
                assert got["early"] == trained_bytes or backward == "exact", "all of them, where the stream waits"
            else:
                every = [rank[number] for rank in ranks]
                assert sum(each["held"] for each in every) == trained_bytes
                assert sum(each["weights"] for each in every) == weights
                assert got["weights"] < 1.2 * weights / world, "rows that do not divide evenly go to the first ranks"
                scattered = wire.pop("reduce_scatter_base")  # each batch's, so that no whole gradient is kept
                assert 2 * trained_bytes <= scattered <= 2.2 * trained_bytes
                frozen = sum(size for name, size in block_bytes.items() if name not in trained)
                again = 0 if backward == "residual" else frozen
                needed = 2 * (weights + (weights - frozen) + again) / world
                assert needed * 0.75 <= wire.pop("allgather_base") <= needed * 1.1
                assert not wire


def _fit_rank(rank, world, folder):
    join(rank, world, folder)
    experiment = tiny_experiment(train={"steps": 16, "workers": 2}, schedule={"clock": "seconds"})
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
        "weights": hashing.content_hash(denoiser.network),
    }
    (folder / f"{rank}.json").write_text(json.dumps(record))
    leave()


def test_ranks_score_decide_and_end_alike_though_their_seconds_differ(tmp_path):
    run_ranks(_fit_rank, 2, tmp_path)
    a, b = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert a == b and len(a["decisions"]) == 2 and len(a["losses"]) == 16


def fitted(experiment, rank, world):
    """Losses, gradient norms and plans of a whole run with its searches, and the weights it came to."""
    denoiser = networks.load(experiment, torch.device("cpu"))
    found = blocks(denoiser.network)
    table = cei.cei(denoiser, found, [latents(range(2))], experiment.priority)
    state = start(denoiser.network, experiment)
    held_out = [latents(range(3))] if rank == 0 else []  # sharded ranks too may run different numbers of forwards
    steps = list(
        fit(denoiser, found, batches(experiment, rank, world), held_out, latents([0, 1]), table, experiment, state)
    )
    weights = {name: fsdp.whole(tensor).clone() for name, tensor in denoiser.network.state_dict().items()}
    return {
        "losses": [step.loss for step in steps],
        "norms": [step.gradient_norm for step in steps],
        "held_out": [step.held_out_loss for step in steps if step.held_out_loss is not None],
        "plans": [step.plan.as_json() for step in steps],
        "clips": state.position,
        "memory": max(step.memory_bytes for step in steps),
        "weights": weights,
    }


def shared_out(way, workers, accumulate):
    """The same updates of eight clips."""
    return tiny_experiment(
        train={
            "steps": 12, "parallel": way, "workers": workers, "accumulate": accumulate, "ema_decay": 0.9,
            "gradient_clip": 0.05,
        },
        schedule={"backward": ["exact", "residual"]},
    )  # fmt: skip


def _run_rank(rank, world, folder):
    join(rank, world, folder)
    out = {way: fitted(shared_out(way, world, 4 // world), rank, world) for way in ("ddp", "fsdp")}
    torch.save(out, folder / f"{rank}.pt")
    leave()


def test_a_whole_run_is_the_same_in_one_process_and_shared_out_either_way(tmp_path):
    """Search, clipping, averages and accumulation: one process takes four batches an update, two ranks two each."""
    run_ranks(_run_rank, 2, tmp_path)
    alone = fitted(shared_out("ddp", 1, 4), 0, 1)
    assert max(alone["norms"]) > 0.05, "the clip has something to do"
    for rank in range(2):
        got = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for way in ("ddp", "fsdp"):
            mine = got[way]
            assert mine["plans"] == alone["plans"] and mine["clips"] == alone["clips"] == 12 * 8
            for name in ("losses", "norms", "held_out"):
                assert mine[name] == pytest.approx(alone[name], rel=1e-3), (way, name)
            for name, tensor in alone["weights"].items():
                torch.testing.assert_close(mine["weights"][name], tensor, rtol=2e-2, atol=2e-4)
        assert got["fsdp"]["memory"] < got["ddp"]["memory"], "weights, gradients and moments in parts"


def _disagreeing_rank(rank, world, folder):
    join(rank, world, folder)
    message = []
    try:
        agree.agree("the plan", {"m": rank, "shape": "the same"})
    except agree.DisagreementError as error:
        message.append(str(error))
    experiment = tiny_experiment(train={"workers": 2, "learning_rate": 1e-3 * (rank + 1)})
    denoiser = tiny_denoiser(experiment)
    found = blocks(denoiser.network)
    table = cei.cei(denoiser, found, [latents(range(2))], experiment.priority)
    other = tiny_experiment(train={"workers": 2})
    if rank == 1:
        flipped = [dataclasses.replace(block, score=-block.score) for block in table.blocks]
        table = dataclasses.replace(table, blocks=tuple(flipped))
    for settings in (experiment, other):
        try:
            state, source = start(denoiser.network, settings), batches(settings, rank, world)
            next(fit(denoiser, found, source, [latents(range(3))], latents([0]), table, settings, state))
        except agree.DisagreementError as error:
            message.append(str(error))
    (folder / f"{rank}.json").write_text(json.dumps(message))
    leave()


def test_a_rank_that_disagrees_fails_everywhere_at_once_with_a_clear_message(tmp_path):
    """No rank is left waiting for another: both end, long before a collective would time out."""
    run_ranks(_disagreeing_rank, 2, tmp_path)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0] == ranks[1]
    plan, settings, priorities = ranks[0]
    assert plan == 'ranks disagree on the plan: rank 0: the plan = {"m": 0}; rank 1: the plan = {"m": 1}'
    assert "the settings" in settings and '"train.learning_rate": 0.002' in settings and "batch_size" not in settings
    assert "priorities" in priorities


def test_the_first_loss_does_not_depend_on_how_an_update_is_cut_into_batches():
    """A clip's noise and timestep follow its position."""
    losses = []
    for size, accumulate in ((4, 1), (2, 2), (1, 4)):
        experiment = tiny_experiment(
            data={"batch_size": size}, train={"steps": 1, "accumulate": accumulate}, schedule={"kind": "full"}
        )
        denoiser = tiny_denoiser(experiment)
        found, state = blocks(denoiser.network), start(denoiser.network, experiment)
        (step,) = fit(denoiser, found, batches(experiment), [latents(range(4))], latents([0]), None, experiment, state)
        losses.append(step.loss)
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


def _uneven_rank(rank, world, folder, workers):
    join(rank, world, folder)
    out = {}
    for way in ("ddp", "fsdp"):
        run = fitted(plain(way, workers), rank, world)
        out[way] = {name: run[name] for name in ("losses", "norms", "clips", "weights")}
    torch.save(out, folder / f"{rank}.pt")
    leave()


def plain(way, workers, accumulate=1):
    settings = {"steps": 4, "parallel": way, "workers": workers, "accumulate": accumulate, "gradient_clip": 0.05}
    return tiny_experiment(train=settings, schedule={"kind": "full"})


def test_fewer_workers_than_wanted_train_alike_though_they_share_batches_unevenly(tmp_path):
    """As an elastic group does after machines have gone; sharded ranks go through the network equally often."""
    here, wanted = 3, 5  # two batches, two, and one
    run_ranks(_uneven_rank, here, tmp_path, wanted)
    alone = fitted(plain("ddp", 1, wanted), 0, 1)
    for rank in range(here):
        got = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for way in ("ddp", "fsdp"):
            assert got[way]["clips"] == alone["clips"] == 4 * 2 * wanted
            for name in ("losses", "norms"):
                assert got[way][name] == pytest.approx(alone[name], rel=1e-3), (way, name)
            for name, tensor in alone["weights"].items():
                torch.testing.assert_close(got[way]["weights"][name], tensor, rtol=2e-2, atol=2e-4)


class Odd:
    """A source of batches, one of whose clips is not finite."""

    def __init__(self, source, position):
        self.source, self.position = source, position

    def __call__(self, shape, position):
        for batch in self.source(shape, position):
            batch.clean[batch.position == self.position] = math.inf
            yield batch


def _odd_rank(rank, world, folder):
    """Update 3 of 4 sees a clip that is not finite; rank 1 alone holds it."""
    join(rank, world, folder)
    out = {}
    for way in ("ddp", "fsdp"):
        experiment = plain(way, world)
        denoiser = tiny_denoiser(experiment)
        found = blocks(denoiser.network)
        if way == "fsdp":
            fsdp.shard(denoiser.network, found)
        state, source = start(denoiser.network, experiment), Odd(batches(experiment, rank, world), 2 * 4 + 2)
        weights, skipped = [], []
        for step in fit(denoiser, found, source, [latents(range(2))], latents([0]), None, experiment, state):
            weights.append(fsdp.whole(denoiser.network.blocks[0].ffn.net[2].weight).clone())
            skipped.append((step.skipped, step.skipped_updates))
        out[way] = {"weights": torch.stack(weights), "skipped": skipped}
    torch.save(out, folder / f"{rank}.pt")
    leave()


def test_all_ranks_skip_an_update_that_is_not_finite_on_one(tmp_path):
    run_ranks(_odd_rank, 2, tmp_path)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for way in ("ddp", "fsdp"):
        for rank in ranks:
            assert rank[way]["skipped"] == [(False, 0), (False, 0), (True, 1), (False, 1)]
            assert torch.equal(rank[way]["weights"], ranks[0][way]["weights"])
            _, second, third, fourth = rank[way]["weights"]
            assert torch.equal(second, third) and not torch.equal(third, fourth) and fourth.isfinite().all()


def _held_out_rank(rank, world, folder):
    """Two held-out clips on three ranks: the first one's draws are shared, the second one's are not."""
    join(rank, world, folder)
    out = {}
    for way in ("ddp", "fsdp"):
        experiment = plain(way, world)
        denoiser, ran = tiny_denoiser(experiment), []
        found = blocks(denoiser.network)
        if way == "fsdp":
            fsdp.shard(denoiser.network, found)
        clips, own = ([latents([0])], slice(rank // 2, None, 2)) if rank != 1 else ([latents([1])], slice(None))
        denoiser.network.register_forward_hook(lambda *_, ran=ran: ran.append(torch.is_grad_enabled()))
        given = batches(experiment, rank, world), clips, latents([0]), None, experiment
        with OnTheWire() as wire:
            steps = list(fit(denoiser, found, *given, start(denoiser.network, experiment), (), own))
        out[way] = {
            "losses": [step.held_out_loss for step in steps if step.held_out_loss is not None],
            "forwards": ran.count(False),
            "gathered": wire.bytes["allgather_base"],
        }
    (folder / f"{rank}.json").write_text(json.dumps(out))
    leave()


def test_held_out_draws_are_shared_and_sharded_ranks_run_equally_many_forwards(tmp_path):
    """Two held-out losses, of two draws a clip."""
    run_ranks(_held_out_rank, 3, tmp_path)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    experiment = plain("ddp", 1, 3)
    denoiser = tiny_denoiser(experiment)
    found, state = blocks(denoiser.network), start(denoiser.network, experiment)
    given = batches(experiment), [latents([0]), latents([1])], latents([0]), None, experiment, state
    alone = [s.held_out_loss for s in fit(denoiser, found, *given) if s.held_out_loss is not None]
    for way in ("ddp", "fsdp"):
        assert all(rank[way]["losses"] == ranks[0][way]["losses"] for rank in ranks) and len(alone) == 2
        assert ranks[0][way]["losses"] == pytest.approx(alone, rel=1e-4), way
    assert [rank["ddp"]["forwards"] for rank in ranks] == [2, 4, 2]
    assert [rank["fsdp"]["forwards"] for rank in ranks] == [4, 4, 4]
    assert len({rank["fsdp"]["gathered"] for rank in ranks}) == 1


class OverTheWire(TorchDispatchMode):
    """Counts the calls of collectives, and the bytes that this rank gives to them and gets from them."""

    def __init__(self):
        super().__init__()
        self.calls, self.bytes = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            tensors = {tensor.data_ptr(): tensor.nbytes for tensor in tree_leaves(args) if torch.is_tensor(tensor)}
            self.calls, self.bytes = self.calls + 1, self.bytes + sum(tensors.values())
        return function(*args, **(kwargs or {}))


def _message_rank(rank, world, folder):
    join(rank, world, folder)
    experiment = tiny_experiment(
        data={"batch_size": 1}, train={"steps": 5, "workers": world, "held_out_every": 1}, schedule={"kind": "full"}
    )
    denoiser = tiny_denoiser(experiment)
    found, state, source = (
        blocks(denoiser.network),
        start(denoiser.network, experiment),
        batches(experiment, rank, world),
    )
    steps, out = fit(denoiser, found, source, [latents(range(2))], latents([0]), None, experiment, state), []
    while True:
        with OverTheWire() as wire:
            step = next(steps, None)
        if step is None:
            break
        out.append((wire.calls, wire.bytes, step.pace is not None))
    timed = tiny_experiment(schedule={"clock": "seconds"})
    costs = Prices(denoiser, found, latents([0, 1]), Freeze(denoiser, found, timed), timed, {})
    said = {}
    for what, say in {
        "costs": lambda: costs.model(timed.data.shape).as_json(),
        "a place": lambda: agree.for_first(f"place {rank}"),
        "a plan": lambda: agree.agree("the plan", list(range(500))),
        "a table": lambda: agree.of_first(lambda: "a table" * 1000),
    }.items():
        with OverTheWire() as wire:
            heard = say()
        said[what] = wire.calls, wire.bytes, heard
    (folder / f"{rank}.json").write_text(json.dumps({"steps": out, "said": said}))
    leave()


def test_what_a_step_says_to_other_ranks_does_not_grow_with_the_square_of_them(tmp_path):
    """A held-out loss included. Rank 0 alone hears each of the others: eight bytes, how long it took."""
    ranks = {}
    for world in (2, 3):
        (folder := tmp_path / str(world)).mkdir()
        run_ranks(_message_rank, world, folder)
        records = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]
        ranks[world] = [record["steps"][1:4] for record in records]
        said = [record["said"] for record in records]
        assert [each["a plan"] for each in said] == [[1, 16, None]] * world, "two numbers, while they agree"
        assert all(calls == 2 and size < 2 * 7_200 for calls, size, _ in (each["a table"] for each in said)), "once"
        assert [each["a place"][2] for each in said] == [[f"place {r}" for r in range(world)], *[None] * (world - 1)]
        assert all(each["costs"] == said[0]["costs"] for each in said), "timed by each, the slowest's for all"
        assert said[0]["costs"][1] < 2_000, "a number for each that is measured, however many ranks"
    two, three = ranks[2], ranks[3]
    assert all(rank == two[1] for rank in (*two[1:], *three[1:])), "the same for every rank, whatever their number"
    assert not any(told for _, _, told in two[1])
    for (calls, size, told), (more_calls, more_size, _) in zip(two[0], three[0], strict=True):
        assert told and more_calls == calls and more_size == size + 8


ALONE_S = 0.4


def _slow_rank(rank, world, folder):
    """Many buckets, of which few may be on their way at once; one rank's backward pass is slow, and its clips late, the
    first most; the other one does something else after the first step."""
    join(rank, world, folder)
    reducing.UNDER_WAY_BYTES = 20_000
    fit_module.Reducer = functools.partial(Reducer, bucket_bytes=5_000)
    experiment = tiny_experiment(
        data={"batch_size": 1}, train={"steps": 3, "workers": world}, schedule={"kind": "full"}
    )
    denoiser = tiny_denoiser(experiment)
    found, state = blocks(denoiser.network), start(denoiser.network, experiment)
    for block in found if rank else ():
        block.module.register_full_backward_hook(lambda *_: time.sleep(0.02))

    given_s, at_s, charged_s = [], [], []

    def source(shape, position):
        for batch in batches(experiment, rank, world)(shape, position):
            time.sleep(rank * (0.2 if given_s else ALONE_S))
            given_s.append(time.perf_counter())
            yield batch

    for step in fit(denoiser, found, source, [latents(range(2))], latents([0]), None, experiment, state):
        at_s.append(time.perf_counter())
        charged_s.append(step.charged_s)
        if rank == 0 and step.step == 1:
            time.sleep(ALONE_S)
    weights = [p.detach().flatten() for p in denoiser.network.parameters()]
    times = {"first_s": at_s[0] - given_s[0], "first_charged_s": charged_s[0]}
    times |= {"clock_s": at_s[-1] - at_s[0], "charged_s": charged_s[-1] - charged_s[0]}
    torch.save({"weights": torch.cat(weights), **times}, folder / f"{rank}.pt")
    leave()


def test_ranks_of_unequal_speed_send_their_gradients_in_one_order_and_are_charged_once(tmp_path):
    """What one rank waits for its clips the others wait for it: the clock shows that once. What one rank does between
    steps, and begins later than the others, it does not show."""
    run_ranks(_slow_rank, 2, tmp_path)
    fast, slow = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert torch.equal(fast["weights"], slow["weights"])
    assert fast["charged_s"] <= max(fast["clock_s"], slow["clock_s"]) - ALONE_S / 2
    assert slow["first_charged_s"] <= slow["first_s"] + ALONE_S / 2


def _hold(lock, held):
    with FileLock(lock):
        held.set()
        time.sleep(4.5)


def _waiting_rank(rank, world, folder):
    """A training group that gives up after three seconds, and a rank 0 that waits for longer: for another run that is
    making the same score table, and for a slow disk."""
    join(rank, world, folder, timeout_s=3)
    experiment = tiny_experiment(priority={"kind": "random"})
    denoiser, dataset = tiny_denoiser(experiment), SimpleNamespace(fingerprint="clips")
    scored = denoiser, blocks(denoiser.network), dataset, experiment, "new", folder / "tables"
    first = cache.table(*scored)
    if rank == 0:
        (lock,) = (folder / "tables").glob("*.lock")
        held = threading.Event()
        threading.Thread(target=_hold, args=(lock, held)).start()
        held.wait()
    agree.wait_for_all()
    assert cache.table(*scored) == first
    run = Trained()
    with closing(checkpoint.Saver(folder / "checkpoints", "id", keep=1, warn=pytest.fail)) as saver:
        if rank == 0:
            saver.thread.submit(time.sleep, 4.5)  # a disk that is slow
        saver.save(run.network, run.state)
        saver.wait()
        assert agree.slowest(float(rank)) == 1.0
    leave()


def test_ranks_wait_for_one_that_works_alone_longer_than_the_training_group_would(tmp_path):
    run_ranks(_waiting_rank, 2, tmp_path)
