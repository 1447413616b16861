"""Where clips are decoded on clusters of several kinds; that they are decoded there: test_faults."""

import pytest

from entprog import config
from helpers.commands import SETTINGS
from pipelines.stream import decoding

GPUS = {"CPU": 48.0, "GPU": 4.0}


def node(name, alive=True, **resources):
    return {"NodeID": name, "Alive": alive, "Resources": resources or {"CPU": 8.0}}


TRAINS = [node("head", CPU=0.0), node("a", **GPUS), node("b", **GPUS)]


@pytest.mark.parametrize(
    ("others", "nodes", "cpus"),
    [
        ([node("c")], 1, 2.0),
        ([node("c"), node("d", CPU=32.0)], 2, 10.0),
        ([node("c"), node("gone", alive=False), node("d", memory=1.0), node("e", **GPUS)], 1, 2.0),
        ([node("c", CPU=3.0)], None, None),  # four workers would wait for each other
        ([node("leaving")], None, None),
        ([node("e", **GPUS)], None, None),  # nobody trains there yet
        ([], None, None),
    ],
)
def test_nodes_without_gpus_decode_where_there_are_any(others, nodes, cpus):
    """Four workers, on two machines."""
    found = decoding.elsewhere(config.Data(), TRAINS + others, ["a", "a", "b", "b"], {"leaving"})
    assert (found and found.nodes, found and found.cpus) == (nodes, cpus)
    if found:
        assert found.where == "cluster" and {"head", "a", "b"} <= set(found.avoid) and "c" not in found.avoid
        assert ("e" in found.avoid) == any(each["NodeID"] == "e" for each in others) and "gone" not in found.avoid
        assert decoding.elsewhere(config.Data(decode_cpus=3), TRAINS + others, ["a", "b"]).cpus == 3


def test_where_no_node_has_a_gpu_those_without_a_worker_decode():
    nodes = [node("a"), node("b", CPU=4.0)]
    assert decoding.elsewhere(config.Data(), nodes, ["a"]).avoid == ("a",)
    assert decoding.elsewhere(config.Data(), nodes, ["a", "b"]) is None
    assert decoding.elsewhere(config.Data(), nodes[:1], ["a"]) is None, "a machine alone"


@pytest.mark.parametrize(
    ("nodes", "settings", "said", "cpus"),
    [
        (None, {}, "by threads of each worker on this machine", 2),
        (None, {"data": {"decode_cpus": 0.5}}, "by threads of each worker on this machine", 1),
        (None, {"data": {"decode": "cluster"}}, "by tasks of Ray Data on this machine", 2),
        ([*TRAINS, node("c")], {}, "by tasks of Ray Data on the 1 node(s) without GPUs that are there now", 8),
        ([*TRAINS, node("c")], {"data": {"decode": "worker"}}, "by threads of each worker, on its own node", None),
        ([*TRAINS, node("c")], {"data": {"decode": "cluster"}}, "by tasks of Ray Data on any node", None),
        (TRAINS, {}, "by threads of each worker, on its own node, unless nodes without GPUs join before", None),
        ([], {"train": {"gpus": "yes"}}, "by threads of each worker, on its own node, unless nodes without", None),
        ([node("a"), node("b")], {}, "by tasks of Ray Data on nodes that hold no worker, else by threads", None),
    ],
)
def test_a_dry_run_says_where_as_far_as_that_is_known(nodes, settings, said, cpus, monkeypatch):
    monkeypatch.setattr(decoding.session, "cores", lambda: 2)
    experiment = config.build(config.merge(SETTINGS, config.merge({"train": {"workers": 2}}, settings)))
    where, counted = decoding._foreseen(experiment, nodes)
    assert where.startswith(said) and counted == cpus
