"""Where seconds went, and what a person is told to do."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.cluster import stalls
from pipelines.cluster.ray_internals import Store
from pipelines.cluster.stalls import Stalls

CACHING = "prepare --latents"
SECONDS = st.floats(0, 1e5)


def test_steps_are_added_up_and_what_is_part_of_waiting_counts_once():
    first = {"seconds": 1.0, "wait_s": 5.0, "open_s": 3.0, "encode_s": 0.5, "copy_s": 0.2}
    other = {"seconds": 2.0, "wait_s": 1.0, "open_s": 0.0, "encode_s": 0.5, "copy_s": 0.2}
    found = stalls.of([first, other, {"seconds": 1.0, "wait_s": 0.0}])  # the last one of an older version
    assert found == Stalls(wait_s=2.0, open_s=3.0, encode_s=1.0, copy_s=0.4, compute_s=4.0)
    assert found.total_s == 10.0 and found.share(found.wait_s) == 0.2


def test_waiting_names_the_cpus_that_are_missing():
    lost = Stalls(wait_s=43, open_s=0, encode_s=0, copy_s=1, compute_s=57)
    (line,) = stalls.advice(lost, decode_cpus=4, workers=1, vae=False, caching=CACHING)
    assert line.startswith("decode-bound: waiting 43% of the time: give decoding about 4 more CPUs (data.decode_cpus=8")
    assert "latents" not in line
    encoding = Stalls(wait_s=43, open_s=0, encode_s=1, copy_s=1, compute_s=56)
    (line,) = stalls.advice(encoding, decode_cpus=4, workers=2, vae=True, caching=CACHING)
    assert "4 more CPUs per worker" in line and CACHING in line


def test_where_all_latents_are_cached_nothing_is_said_of_decoding():
    lost = Stalls(wait_s=43, open_s=0, encode_s=0, copy_s=1, compute_s=57)
    (line,) = stalls.advice(lost, decode_cpus=4, workers=1, vae=True, caching=CACHING)
    assert line.startswith("reading-bound: waiting 43% of the time for cached latents") and "decod" not in line


def test_each_cause_has_its_own_advice():
    assert stalls.advice(Stalls(1, 50, 0, 5, 50), 2, 1, True, CACHING) == []  # starting is no stall
    (line,) = stalls.advice(Stalls(0, 0, 30, 5, 70), 2, 1, True, CACHING)
    assert line.startswith("encode-bound: 30% of the time in the VAE") and CACHING in line
    lines = stalls.advice(Stalls(50, 0, 0, 60, 50), 2, 1, False, CACHING)
    assert [line.split(":")[0] for line in lines] == ["decode-bound", "copy-bound"]


@given(SECONDS, SECONDS, SECONDS, SECONDS, SECONDS, st.floats(0.1, 64), st.integers(1, 64), st.booleans())
def test_advice_is_given_exactly_where_it_pays(wait_s, open_s, encode_s, copy_s, compute_s, cpus, workers, vae):
    lost = Stalls(wait_s, open_s, encode_s, copy_s, compute_s)
    lines = stalls.advice(lost, cpus, workers, vae, CACHING)
    running_s = max(lost.total_s - open_s, 1e-9)
    bound = "reading-bound" if vae and not encode_s else "decode-bound"
    assert any(bound in line for line in lines) == (wait_s / running_s >= stalls.WORTH_TELLING)
    in_vae = vae and encode_s / lost.total_s >= stalls.WORTH_TELLING
    assert any("encode-bound" in line for line in lines) == in_vae


@pytest.mark.parametrize(
    ("address", "setting"), [("local", "ENTPROG_OBJECT_STORE_BYTES"), ("10.0.0.1:6379", "--object-store-memory")]
)
def test_a_full_store_and_spilling_are_told_once_each(address, setting, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", address)
    message = []
    watch = stalls.Watch(message.append)
    assert watch.figures() == {"object_store_peak_share": None, "spilled_bytes": None}, "not measured is not zero"
    watch.see(Store(used=100, capacity=1000, spilled=70))  # by somebody else, before
    assert watch.figures() == {"object_store_peak_share": 0.1, "spilled_bytes": 0} and not message
    for _ in range(2):
        watch.see(Store(used=950, capacity=1000, spilled=70))
    assert len(message) == 1 and "95% full" in message[0]
    for _ in range(2):
        watch.see(Store(used=500, capacity=1000, spilled=2 * 10**9 + 70))
    assert len(message) == 2 and "spilled 2 GB" in message[1] and setting in message[1]
    assert watch.figures() == {"object_store_peak_share": 0.95, "spilled_bytes": 2 * 10**9}
