"""Previews of sharded runs: whatever fails in one, on whichever rank, no rank waits and training computes the same."""

import contextlib
import json
from functools import partial

import pytest
import torch

from entprog.blocks import blocks
from entprog.config import Generate
from entprog.distributed import agree, fsdp
from entprog.scoring import cei
from entprog.training.fit import fit, start
from helpers.networks import SHAPE, TINY, batches, latents, tiny_denoiser, tiny_experiment
from helpers.processes import join, leave, run_ranks
from pipelines.training import networks, previews, steplog
from test_previews import motions

PLACES = {
    "a block": "blocks.3.attn1.to_q",
    "what comes before blocks": "patch_embedding",
    "what comes after blocks": "proj_out",
    "bringing a block together": "blocks.4",
}
FAULTS = [
    *((0, place) for place in PLACES),
    *((1, place) for place in list(PLACES)[1:]),
    (1, "what comes before the network"),
    (0, "bringing together what lies outside blocks"),
    (1, "bringing together what lies outside blocks"),
]
"""Rank that runs out of memory, and where in a pass."""


def out_of_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory")


@contextlib.contextmanager
def failing(look, place):
    """The preview to draw while its rank runs out of memory there."""
    network = look.denoiser.network
    if place in PLACES:
        part = network.get_submodule(PLACES[place])
        hook = part.register_forward_pre_hook(out_of_memory, prepend=place == "bringing a block together")
        yield look
        hook.remove()
    elif place == "what comes before the network":
        yield previews.Previews(**{**vars(look), "spare": None})
    else:
        calls = iter([out_of_memory])
        own = type(network).unshard
        network.unshard = lambda: next(calls, partial(own, network))()
        yield look
        del network.unshard


def trained(rank, world, show):
    """Losses of a run with a look after each step."""
    train = {"steps": len(FAULTS) + 1, "parallel": "fsdp", "workers": world, "held_out_every": 3, "ema_decay": 0.9}
    experiment = tiny_experiment(model={"init": {**TINY, "num_layers": 6}}, train=train, schedule={"search_steps": 1})
    denoiser = networks.load(experiment, torch.device("cpu"))
    found = cei.blocks_in_order(blocks(denoiser.network), denoiser.predict, latents([0]))
    table = cei.cei(denoiser, found, [latents(range(2))], experiment.priority)
    state, held_out = start(denoiser.network, experiment), [latents(range(3))] if rank == 0 else []
    given = batches(experiment, rank, world), held_out, latents([0, 1]), table, experiment, state
    out = []
    for step in fit(denoiser, found, *given):
        out.append((step.loss, step.gradient_norm, step.held_out_loss, step.plan.as_json()))
        show(denoiser, found, step, state)
    return out


def _failing_rank(rank, world, folder):
    join(rank, world, folder, timeout_s=300)
    seen, warnings = [], []

    def show(denoiser, found, step, state):
        look = previews.Previews(
            denoiser, motions(1), SHAPE, folder, Generate(steps=2), lambda *_: None, warnings.append, blocks=found,
            spare=latents([0]),
        )  # fmt: skip
        if step.step > len(FAULTS):
            seen.append(look.show(step.step, 0.0, state.ema, state.ema_gaps))
            return
        where, place = FAULTS[step.step - 1]
        with failing(look, place) if rank == where else contextlib.nullcontext(look) as look:
            seen.append(look.show(step.step, 0.0, state.ema, state.ema_gaps))

    watched, plain = trained(rank, world, show), trained(rank, world, lambda *_: None)
    (folder / f"{rank}.json").write_text(json.dumps([seen, warnings, watched, plain]))
    leave()


def test_a_preview_that_fails_on_one_rank_is_a_warning_and_training_computes_the_same(tmp_path):
    run_ranks(_failing_rank, 2, tmp_path)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for rank, (seen, warnings, watched, plain) in enumerate(ranks):
        assert seen == [False] * len(FAULTS) + [True]
        assert watched == plain and watched == ranks[0][2]
        assert len(warnings) == (0 if rank else len(FAULTS))
    for step, ((rank, place), line) in enumerate(zip(FAULTS, ranks[0][1], strict=True), 1):
        kind = "AttributeError" if place == "what comes before the network" else "OutOfMemoryError"
        assert line.startswith(f"the preview after step {step} failed: PassError: on rank {rank}: {kind}"), (
            place,
            line,
        )
        assert line.endswith("; training goes on without previews")
    assert [line["step"] for line in steplog.lines_of(tmp_path / steplog.PREVIEWS)] == [len(FAULTS) + 1]
    assert not (tmp_path / previews.UNFINISHED).exists()


def _torn_rank(rank, world, folder):
    """Every try to bring the rest together fails too: that rank has to end."""
    join(rank, world, folder, timeout_s=300)
    denoiser = networks.load(tiny_experiment(train={"parallel": "fsdp", "workers": world}), torch.device("cpu"))
    look = previews.Previews(
        denoiser, motions(1), SHAPE, folder, Generate(steps=2), lambda *_: None, lambda line: None,
        blocks=blocks(denoiser.network), spare=latents([0]),
    )  # fmt: skip
    if rank == 0:
        denoiser.network.blocks[2].unshard = out_of_memory
        denoiser.network.blocks[1].attn1.to_q.register_forward_pre_hook(out_of_memory)
    with contextlib.suppress(RuntimeError):
        look.show(7, 0.0, {}, {})
        (folder / f"{rank} went on").touch()


def test_one_that_ends_its_workers_is_not_drawn_again(tmp_path):
    with contextlib.suppress(Exception):
        run_ranks(_torn_rank, 2, tmp_path)
    assert not list(tmp_path.glob("*went on"))
    assert previews.unfinished(tmp_path) == [7]
    line = previews.told(tmp_path, [7])
    assert "after step 7 ended its workers" in line and str(tmp_path / previews.UNFINISHED) in line
    experiment = tiny_experiment()
    look = previews.Previews(
        tiny_denoiser(experiment), motions(1), SHAPE, tmp_path, Generate(steps=2), lambda *_: None, pytest.fail,
        left_out=previews.unfinished(tmp_path),
    )  # fmt: skip
    assert look.show(7, 0.0, {}, {}) and not (tmp_path / steplog.PREVIEWS).exists()
    assert look.show(9, 0.0, {}, {})
    assert [line["step"] for line in steplog.lines_of(tmp_path / steplog.PREVIEWS)] == [9]
    assert previews.unfinished(tmp_path) == [7], "still not drawn"
    assert "steps 7, 9 ended their workers" in previews.told(tmp_path, [7, 9])


def test_a_note_that_is_not_one_is_none(tmp_path):
    assert previews.unfinished(tmp_path) == []
    (tmp_path / "previews").mkdir()
    for text in ("", "[", "{}", '{"steps": null}', '{"steps": ["a"]}', "[1]"):
        (tmp_path / previews.UNFINISHED).write_text(text)
        assert previews.unfinished(tmp_path) == []
    assert agree.world() == (0, 1) and not fsdp.is_sharded(tiny_denoiser(tiny_experiment()).network)
