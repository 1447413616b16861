"""A sweep's state that was cut off by a kill, as Ray Tune writes it."""

import json
import pickle

from pipelines.sweeping import keeping

FIRST, SECOND = "2026-11-28_08-44-38", "2026-11-28_08-45-36"


def write(folder, start, trials):
    folder.mkdir(exist_ok=True)
    (folder / ".validate_storage_marker").write_bytes(b"")
    (folder / "a-trial").mkdir(exist_ok=True)
    contents = {
        f"experiment_state-{start}.json": json.dumps({"trial_data": trials, "best": float("nan")}).encode(),
        f"search_gen_state-{start}.json": pickle.dumps({"of": start}),  # as Ray Tune names it
        f"searcher-state-{start}.pkl": pickle.dumps(trials),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return contents


def there(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*state-*")}


def test_the_last_whole_state_takes_the_place_of_one_that_was_cut_off(tmp_path):
    folder = tmp_path / "tune"
    assert keeping.mend(folder), "nothing was begun"
    first = write(folder, FIRST, [1])
    for name in first:
        keeping.keep(folder)
        for cut in (b"", first[name][:1], first[name][:-1]):
            (folder / name).write_bytes(cut)
            keeping.keep(folder)
            assert keeping.mend(folder) and there(folder) == first, (name, cut)

    second = write(folder, SECOND, [1, 2])
    assert keeping.mend(folder) and there(folder) == first | second
    (folder / f"searcher-state-{SECOND}.pkl").unlink()
    (folder / f"experiment_state-{SECOND}.json").write_bytes(b"")
    assert keeping.mend(folder) and there(folder) == first, "of the start before: the newest has none that is whole"
    write(folder, SECOND, [1, 2])
    keeping.keep(folder)
    (folder / f"experiment_state-{SECOND}.json").write_bytes(b"{")
    assert keeping.mend(folder) and there(folder) == first | second


def test_a_state_that_was_never_whole_is_told(tmp_path):
    write(tmp_path / "tune", FIRST, [1])
    (tmp_path / "tune" / f"experiment_state-{FIRST}.json").write_bytes(b"")
    assert not keeping.mend(tmp_path / "tune") and not there(tmp_path / "tune")
