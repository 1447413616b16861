"""A sweep's state that was cut off by a kill, as Ray Tune copies it."""

import json
import pickle
import shutil

from pipelines.sweeping import keeping
from pipelines.sweeping.keeping import Keeper, mend

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


def test_what_is_kept_takes_the_place_of_what_was_cut_off_or_mixed(tmp_path):
    written, folder = tmp_path / "written", tmp_path / "tune"
    assert mend(folder), "nothing was begun"
    first = write(written, FIRST, [1])
    keeper = Keeper(folder)
    write(folder, FIRST, [1])
    assert mend(folder) and there(folder) == first, "it was ended before it was kept"
    keeper.keep(written)
    for name in first:
        for wrong in (b"", first[name][:1], first[name][:-1], pickle.dumps("of another moment")):
            (folder / name).write_bytes(wrong)
            assert mend(folder) and there(folder) == first, (name, wrong)

    second = write(written, SECOND, [1, 2])
    write(folder, SECOND, [1, 2])
    assert mend(folder) and there(folder) == first, "of the start before: the newest was not kept"
    keeper.keep(written)
    write(folder, SECOND, [1])
    assert mend(folder) and there(folder) == first | second
    kept = (tmp_path / keeping.KEPT).stat().st_ino
    keeper.keep(written)
    assert (tmp_path / keeping.KEPT).stat().st_ino == kept, "the same is not written again"
    (written / f"experiment_state-{SECOND}.json").write_bytes(b"{")
    keeper.keep(written)  # its disk is full
    assert mend(folder) and there(folder) == first | second
    shutil.rmtree(folder)  # by a person
    assert mend(folder) and there(folder) == second


def test_a_state_that_was_never_whole_is_told(tmp_path):
    write(tmp_path / "tune", FIRST, [1])
    (tmp_path / "tune" / f"experiment_state-{FIRST}.json").write_bytes(b"")
    assert not mend(tmp_path / "tune") and not there(tmp_path / "tune")
