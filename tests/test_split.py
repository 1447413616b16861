"""Scoring shared out: every pass once, no rank with much more to do than another, the same bits on any number."""

import collections
import json
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entprog.blocks import blocks
from entprog.config import Priority
from entprog.scoring import cache, cei, priorities, split
from helpers.networks import latents, tiny_denoiser, tiny_experiment
from helpers.processes import join, leave, run_ranks

costs_of = st.builds(
    split.Costs,
    st.lists(st.integers(1, 10**13), min_size=1, max_size=40).map(tuple),
    st.integers(0, 10**12),
)


@given(st.integers(4, 200), st.integers(1, 9), st.lists(st.integers(1, 250), max_size=4))
def test_pieces_are_all_draws_in_order_and_end_at_every_mark(draws, at_once, marks):
    cut = split.pieces(draws, at_once, marks)
    assert [draw for piece in cut for draw in piece] == list(range(draws)) and all(cut)
    assert {mark for mark in marks if mark < draws} <= {piece.stop for piece in cut}
    assert len(cut) <= split.PIECES + len(marks)


@settings(deadline=None, max_examples=60)
@given(costs_of, st.integers(1, 12), st.integers(4, 60), st.integers(1, 4), st.integers(1, 300))
def test_every_pass_has_one_rank_and_none_has_much_more_than_the_others(costs, conditions, draws, at_once, ranks):
    cut = split.pieces(draws, at_once, [draws])
    parts = split.shared(range(5, 5 + conditions), cut, costs, ranks)
    places = range(len(costs.blocks) + 1)
    taken = [(part.condition, part.piece, place) for own in parts for part in own for place in part.places]
    assert taken == [(c, p, q) for c in range(5, 5 + conditions) for p in range(len(cut)) for q in places]
    assert len(parts) == ranks and all(part.draws == cut[part.piece] for own in parts for part in own)
    loads = [sum(len(part.draws) * costs.of(part.places) for part in own) for own in parts]
    forward = (costs.outside + sum(costs.blocks)) * max(map(len, cut))
    alone = conditions * draws * costs.of(places)
    assert alone <= sum(loads) <= alone + ranks * forward, "what is run over again is less than a forward a rank"
    assert max(loads) <= alone / ranks + 2 * forward


def test_costs_are_those_of_passes_that_replay_what_one_of_them_recorded():
    """Four blocks; each cost is told apart by its digits."""
    costs = split.Costs((1000, 100, 10, 1), 0)
    assert costs.of(range(5)) == 1111 + 111 + 11 + 1 + 0, "the whole network, then what follows each block"
    assert costs.of(range(4)) == 1110 + 111 + 11 + 1 and costs.of(range(2, 3)) == 1101
    assert costs.of(range(1, 3)) == 1101 + 11 and costs.of(range(0)) == 0
    for places in (range(first, end) for end in range(6) for first in range(end)):
        steps = costs.beginning(places.start) + sum(map(costs.going_on, places))
        assert costs.of(places) == steps


# -- on ranks

CASES = {
    "conditions": Priority(conditions=8, draws=4),
    "draws": Priority(conditions=2, draws=16),
    "blocks": Priority(conditions=2, draws=4),
    "marks": Priority(conditions=2, draws=55),
    "rounds": Priority(conditions=7, draws=4, until_stable=0.99),
    "loss_increase": Priority(conditions=3, draws=4, kind="loss_increase"),
}


class Counted(collections.abc.Sequence):
    def __init__(self, batches):
        self.batches, self.asked = batches, set()

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, number):
        self.asked.add(range(len(self.batches))[number])
        return self.batches[number]


def scored():
    """Every case's table, and how many blocks were run for it, each clip counted."""
    out = {}
    for name, wanted in CASES.items():
        denoiser = tiny_denoiser(tiny_experiment())
        found, ran = blocks(denoiser.network), collections.Counter()
        for block in found:
            block.module.ffn.register_forward_hook(lambda _, args, __, ran=ran: ran.update(n=len(args[0])))
        batches, told = Counted([latents([number]) for number in range(wanted.conditions)]), []
        table = priorities.score(denoiser, found, batches, wanted, progress=lambda *pair, told=told: told.append(pair))
        values = table.as_json()
        assert values.pop("seconds") > 0
        out[name] = {"table": values, "blocks": ran["n"], "told": told[-1:], "asked": sorted(batches.asked)}
    return out


def _rank(rank, world, folder):
    join(rank, world, folder)
    (folder / f"{rank}.json").write_text(json.dumps(scored()))
    leave()


@pytest.fixture(scope="module")
def alone():
    return json.loads(json.dumps(scored()))


@pytest.mark.parametrize("world", [3, 5])
def test_ranks_share_conditions_draws_and_blocks_and_get_the_bits_of_one(tmp_path, alone, world):
    run_ranks(_rank, world, tmp_path)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(world)]
    for name, wanted in CASES.items():
        assert all(rank[name]["table"] == alone[name]["table"] for rank in ranks), name
        ran = [rank[name]["blocks"] for rank in ranks]
        forward = 6 * max(map(len, split.pieces(wanted.draws, 1, [wanted.draws])))  # of one piece, in blocks
        rounds = 3 if name == "rounds" else 1
        assert max(ran) - min(ran) <= rounds * 2 * forward, (name, ran)
        assert all(n < 0.85 * alone[name]["blocks"] for n in ran), (name, ran)
        assert (
            ranks[0][name]["told"] == alone[name]["told"] == [[alone[name]["table"]["conditions"], wanted.conditions]]
        )


def test_sums_of_a_shared_condition_are_let_go_when_they_are_complete(monkeypatch):
    """As large as a prediction for every block: those of one condition at a time."""
    alive, held = weakref.WeakSet(), []
    begin, join_ = cei._Moments.__init__, cei._Moments.join

    def begun(self, *given, **options):
        begin(self, *given, **options)
        alive.add(self)

    def joined(self, later):
        join_(self, later)
        held.append(sum(each.n > 0 for each in alive))

    monkeypatch.setattr(cei._Moments, "__init__", begun)
    monkeypatch.setattr(cei._Moments, "join", joined)
    denoiser = tiny_denoiser(tiny_experiment())
    batches = [latents([number]) for number in range(3)]
    cei.cei(denoiser, blocks(denoiser.network), batches, Priority(conditions=3, draws=6))
    assert max(held) <= 2 * 7 + 1, "seven passes: the sums so far, and those of the piece"


def test_training_clips_to_score_on_are_encoded_when_they_are_asked_for(monkeypatch):
    experiment = tiny_experiment(priority={"conditions": 5})
    encoded = []

    def stream(dataset, split, shape, size, start_position, seed, device):
        encoded.append(start_position)
        return iter([SimpleClips(start_position, size)])

    class SimpleClips:
        def __init__(self, first, size):
            self.batch = latents(range(first, first + size))

        def resized(self, shape):
            return self.batch

    monkeypatch.setattr(cache.clip_stream, "local_stream", stream)
    monkeypatch.setattr(cache.latents, "encode", lambda denoiser, batch: batch)
    dataset = type("Dataset", (), {"shape": experiment.data.shape})
    clips = cache.clips(tiny_denoiser(experiment), dataset, experiment)
    assert len(clips) == 3 and encoded == []
    assert clips[1].position.tolist() == [2, 3] and clips[-1] is clips[2] and clips[1] is clips[1]
    assert encoded == [2, 4] and torch.equal(clips[0].clean, latents([0, 1]).clean)
