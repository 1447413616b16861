"""Checkpoints: whole or not at all, on a disk and behind s3://, from any number of ranks to any other."""

import json
import math
import os
import resource
import signal
import time
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from entprog.errors import UserError
from entprog.storage.place import Place
from entprog.training import checkpoint, optimizer
from helpers import disks, servers
from helpers.processes import forks, join, leave, run_ranks
from helpers.runs import Trained


def resumed(folder, **options):
    fresh = Trained(steps=0, **options)
    checkpoint.load(folder, checkpoint.newest(folder), fresh.network, fresh.state, "id")
    return fresh


def assert_equal(got, expected):
    assert got.keys() == expected.keys()
    for name in expected:
        assert torch.equal(got[name], expected[name]), name


def test_what_is_saved_is_the_moment_of_saving_though_training_goes_on(tmp_path):
    run = Trained()
    expected = run.tensors()
    with closing(checkpoint.Saver(tmp_path, "id", keep=1, warn=pytest.fail)) as saver:
        saver.save(run.network, run.state)
        run.update()  # while it is being written
    again = resumed(tmp_path)
    assert again.state.step == 2
    assert_equal(again.tensors(), expected)


def test_whole_pruned_and_guarded(tmp_path):
    run = Trained()
    for step in (1, 2, 3, 4):
        run.state.step = step
        checkpoint.save(tmp_path, run.network, run.state, "id", keep=2)
    assert checkpoint.found(tmp_path) == ["step-00000003", "step-00000004"]
    newest = tmp_path / checkpoint.newest(tmp_path)
    with pytest.raises(UserError, match="other settings"):
        checkpoint.load(tmp_path, newest.name, run.network, run.state, "another")
    (shard,) = newest.glob("*.safetensors")
    whole = shard.read_bytes()
    shard.write_bytes(b"\xff" * len(whole))
    with pytest.raises(UserError, match="damaged"):
        checkpoint.load(tmp_path, newest.name, run.network, run.state, "id")


def test_what_is_left_of_a_removal_that_was_cut_short_goes_with_the_next(tmp_path):
    """By a kill: it is called damaged at no later start. What is not this run's for sure stays."""
    run = Trained(layers=1)
    for step in range(1, 8):
        run.state.step = step
        checkpoint.save(tmp_path, run.network, run.state, "id", keep=4)
        if step == 4:
            next((tmp_path / "step-00000001").glob("*.safetensors")).unlink()
            (tmp_path / "step-00000002" / "state.json").unlink()
            (tmp_path / "step-00000003" / "state.json").write_text("{")
            (tmp_path / "step-00000000").mkdir()  # as another program names its own
            (tmp_path / "step-00000000" / "lit_model.pth").write_text("x")
            assert checkpoint.damaged(tmp_path) == [f"step-{left:08d}" for left in range(4)]
    checkpoint.save(tmp_path, run.network, run.state, "id", keep=2)
    assert checkpoint.damaged(tmp_path) == ["step-00000000", "step-00000003"]
    assert checkpoint.found(tmp_path) == ["step-00000006", "step-00000007"]


def test_folders_of_others_stay_and_checkpoints_of_others_are_refused_before(tmp_path):
    names = ["mine.partial", ".step-1.partial", "step-one", "step-00000001-best", ".step-00000009.0123abcd.partial"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious").write_text("x")
    run = Trained()
    for step in (1, 2, 3):
        run.state.step = step
        checkpoint.save(tmp_path, run.network, run.state, "id", keep=1)
    there = {path.name for path in tmp_path.iterdir()}
    assert there == {*names[:-1], "step-00000003"}, "its own leftover alone is removed"
    checkpoint.check_owner(tmp_path, "id")
    with pytest.raises(UserError, match="holds step-00000003 of another training"):
        checkpoint.check_owner(tmp_path, "another")


def test_what_another_saves_meanwhile_stays(tmp_path):
    """Of the same settings; or of a run whose lost node still writes, while others have begun in its place."""
    run = Trained(layers=1)
    with closing(checkpoint.Saver(tmp_path, "id", keep=1, warn=pytest.fail)) as saver:
        saver.save(run.network, run.state)
        run.state.step = 1
        checkpoint.save(tmp_path, run.network, run.state, "id", keep=2)
        under_way = tmp_path / ".step-00000003.0123abcd.partial"
        under_way.mkdir()
        run.state.step = 9
        saver.save(run.network, run.state)
    assert checkpoint.found(tmp_path) == ["step-00000001", "step-00000009"] and under_way.is_dir()
    run.state.step = 10
    checkpoint.save(tmp_path, run.network, run.state, "id", keep=1)  # who begins anew finds leftovers
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"]


@pytest.mark.parametrize("cut", ["a shard in the middle", "a shard missing", "the last file", "the last file missing"])
def test_a_checkpoint_cut_short_is_not_used_the_one_before_is(tmp_path, cut):
    run = Trained()
    checkpoint.save(tmp_path, run.network, run.state, "id", keep=2)
    expected = run.tensors()
    run.update()
    checkpoint.save(tmp_path, run.network, run.state, "id", keep=2)
    newest = tmp_path / checkpoint.newest(tmp_path)
    victim = newest / "state.json" if "last file" in cut else next(newest.glob("*.safetensors"))
    if "missing" in cut:
        victim.unlink()
    else:
        victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    assert checkpoint.damaged(tmp_path) == [newest.name]
    again = resumed(tmp_path)
    assert again.state.step == 2
    assert_equal(again.tensors(), expected)


@pytest.mark.parametrize("where", ["network", "moments", "ema"])
def test_what_is_not_finite_is_not_saved_and_takes_no_good_checkpoints_place(tmp_path, where):
    run, message = Trained(), []
    with closing(checkpoint.Saver(tmp_path, "id", keep=1, warn=message.append)) as saver:
        saver.save(run.network, run.state)
        for value in (math.nan, -math.inf):
            run.update()
            tensors = checkpoint.contents(run.network, run.state)
            name = next(name for name, tensor in tensors.items() if name.startswith(where) and tensor.dim() > 1)
            with torch.no_grad():
                tensors[name][0].view(-1)[0] = value
            saver.save(run.network, run.state)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]
    assert (
        len(message) == 2 and all("is not finite; training goes on" in line for line in message) and where in message[0]
    )
    assert all(tensor.isfinite().all() for tensor in resumed(tmp_path).tensors().values())


def little_memory(action):
    """`action` with 16 MiB more address space than the process has now: a machine that has hardly any memory free."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**24, before[1]))
    try:
        action()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_a_good_checkpoint_is_not_called_damaged_for_want_of_memory(tmp_path):
    run = Trained()
    run.state.ema["patch_embedding.bias"] = torch.zeros(2**26)  # more than is free
    checkpoint.save(tmp_path, run.network, run.state, "id", keep=1)
    with pytest.raises((MemoryError, RuntimeError, OSError)):
        little_memory(lambda: checkpoint.load(tmp_path, checkpoint.newest(tmp_path), run.network, run.state, "id"))
    assert resumed(tmp_path).state.step == 2, "it was good all the time"


def test_a_checkpoint_that_cannot_be_looked_at_now_is_not_passed_over(tmp_path):
    """A disk that does not answer: nobody may take the run to be new."""
    run = Trained()
    checkpoint.save(tmp_path, run.network, run.state, "id", keep=1)
    state = tmp_path / checkpoint.newest(tmp_path) / "state.json"
    content = state.read_bytes()
    state.unlink()
    state.symlink_to("/proc/self/mem")  # it is there, and reading it fails: EIO
    with pytest.raises(OSError, match="Input/output"):
        checkpoint.newest(tmp_path)
    state.unlink()
    state.write_bytes(content)
    assert resumed(tmp_path).state.step == 2


@pytest.mark.parametrize("how", ["no header", "another network", "not a checkpoint's state", "an older state"])
def test_a_bad_file_is_called_damaged_in_one_line(tmp_path, how):
    run, tmp_path = Trained(), tmp_path / "{x}"
    checkpoint.save(tmp_path, run.network, run.state, "id", keep=1)
    folder = tmp_path / checkpoint.newest(tmp_path)
    (shard,), state = folder.glob("*.safetensors"), folder / "state.json"
    values = json.loads(state.read_text())
    if how == "no header":
        shard.write_bytes(b"\xff" * shard.stat().st_size)
    elif how == "another network":
        save_file({"network/other": torch.zeros(2)}, shard)
        values["files"][shard.name] = shard.stat().st_size
    elif how == "not a checkpoint's state":
        del values["experiment"]
    else:
        del values["skipped"]
    state.write_text(json.dumps(values))
    with pytest.raises(UserError, match="another version" if how == "an older state" else "damaged") as message:
        checkpoint.load(tmp_path, folder.name, run.network, run.state, "id")
    assert "\n" not in str(message.value)


def _writer(folder, saved):
    torch.set_num_threads(1)
    run = Trained(steps=1)
    saver = checkpoint.Saver(folder, "id", keep=2)
    while True:
        run.state.step += 1
        saver.save(run.network, run.state)
        saver.wait()
        saved.send(run.state.step)


def test_sigkill_while_saving_leaves_a_checkpoint_that_loads(tmp_path):
    """Killed at three moments of a process that does nothing but save."""
    for kill in range(3):
        saved, end = forks().Pipe(duplex=False)
        writer = forks().Process(target=_writer, args=(tmp_path, end))
        writer.start()
        for _ in range(3):
            step = saved.recv()
        time.sleep(0.004 * kill)
        writer.kill()
        writer.join()
        assert writer.exitcode == -signal.SIGKILL
        again = resumed(tmp_path)
        assert again.state.step >= step
    run = Trained()
    run.state.step = 10**6
    checkpoint.save(tmp_path, run.network, run.state, "id", keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-01000000"], "no scratch folders stay behind"


def test_a_full_disk_is_told_and_the_run_goes_on(tmp_path):
    """The kernel refuses to write further, as a full disk does."""
    run, message = Trained(), []
    with closing(checkpoint.Saver(tmp_path, "id", keep=2, warn=message.append)) as saver:
        saver.save(run.network, run.state)
        saver.wait()
        run.update()
        with disks.full(100_000):
            saver.save(run.network, run.state)
            saver.wait()
        assert len(message) == 1 and "after step 3 was not saved" in message[0] and "training goes on" in message[0]
        assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]
        run.update()
        saver.save(run.network, run.state)
    assert checkpoint.found(tmp_path) == ["step-00000002", "step-00000004"] and len(message) == 1


def test_want_of_memory_for_a_save_is_told_and_the_run_goes_on(tmp_path):
    run, message = Trained(), []
    with closing(checkpoint.Saver(tmp_path, "id", keep=2, warn=message.append)) as saver:
        saver.save(run.network, run.state)
        saver.wait()
        run.update()
        run.state.ema["patch_embedding.bias"] = torch.zeros(2**26)  # more than is free
        little_memory(lambda: saver.save(run.network, run.state))
    assert len(message) == 1 and "after step 3 was not saved" in message[0] and "can't allocate memory" in message[0]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def _sharded_rank(rank, world, folder, how):
    join(rank, world, folder)
    if how == "save":
        listed = Place.files  # on a shared disk a listing may lack what another machine has just written
        Place.files = lambda place: {name: size for name, size in listed(place).items() if "part-00002" not in name}
        run, message = Trained(sharded=True), []
        with closing(checkpoint.Saver(folder / "checkpoints", "id", keep=1, warn=message.append)) as saver:
            saver.save(run.network, run.state)
            expected = run.tensors()
            run.update()
            if rank == 1:
                run.state.ema["patch_embedding.bias"] = torch.zeros(2**26)  # more than is free there
                saver.wait()
                little_memory(lambda: saver.save(run.network, run.state))
            else:
                saver.wait()
                saver.save(run.network, run.state)
        assert ["can't allocate memory" in line for line in message] == [True] * (rank == 0)
        sizes = [path.stat().st_size for path in (folder / "checkpoints" / "step-00000002").glob("*.safetensors")]
        assert len(sizes) == world and max(sizes) < 1.3 * min(sizes), "each rank its part"
    else:
        run = resumed(folder / "checkpoints", sharded=True)
        expected = run.tensors()
        run.network.load_state_dict(run.state.ema, strict=False)  # as the end of a training does
        averaged = run.tensors()
        assert all(torch.equal(averaged[f"network/{name}"], averaged[f"ema/{name}"]) for name in run.state.ema)
    if rank == 0:
        torch.save(expected, folder / f"{how}.pt")
    leave()


def test_parts_of_two_ranks_are_taken_up_by_three_and_by_one(tmp_path):
    run_ranks(_sharded_rank, 2, tmp_path, "save")
    (tmp_path / "store").unlink()
    promised = json.loads((tmp_path / "checkpoints" / "step-00000002" / "state.json").read_text())["files"]
    assert [name[:10] for name in sorted(promised)] == ["part-00001", "part-00002"]
    run_ranks(_sharded_rank, 3, tmp_path, "load")
    expected = torch.load(tmp_path / "save.pt", weights_only=True)
    assert_equal(torch.load(tmp_path / "load.pt", weights_only=True), expected)
    assert_equal(resumed(tmp_path / "checkpoints").tensors(), expected)
    state = tmp_path / "checkpoints" / "step-00000002" / "state.json"
    values = json.loads(state.read_text())
    del values["files"][max(promised)]  # as of a version that took what it saw for all there is
    state.write_text(json.dumps(values))
    with pytest.raises(UserError, match="damaged"):
        resumed(tmp_path / "checkpoints")


@pytest.fixture(scope="module")
def s3():
    """A real S3 server on loopback."""
    with servers.s3() as endpoint:
        yield endpoint


def address(endpoint, folder):
    where = f"endpoint_override={endpoint.removeprefix('http://')}&region=us-east-1"
    return f"s3://{folder}?scheme=http&{where}&allow_bucket_creation=true"


@pytest.fixture
def bucket(s3):
    return address(s3, "runs/one")


def _bucket_rank(rank, world, folder, how, *places):
    os.environ |= servers.CREDENTIALS  # the server that it is a fork of may have begun before
    join(rank, world, folder)
    if how == "save":
        (where, counted), run = places, Trained(sharded=True, layers=1)
        with closing(checkpoint.Saver(where, "id", keep=1, warn=pytest.fail)) as saver:
            saver.save(run.network, run.state)
        runs = [run, resumed(counted, sharded=True, layers=1)]
    else:
        runs = [resumed(each, sharded=n == 0, layers=1) for n, each in enumerate(places)]
        with pytest.raises(UserError, match="other settings"):  # which rank 0 alone has looked at
            checkpoint.load(places[1], "step-00000002", runs[1].network, runs[1].state, "another")
    for number, run in enumerate(runs):
        tensors = run.tensors()
        if rank == 0 or how == "load":
            torch.save(tensors, folder / f"{how}-{number}-{rank}.pt")
    leave()


def test_of_a_bucket_ranks_together_read_a_checkpoint_once(s3, tmp_path):
    """Saved by two ranks of a sharded network, it is taken up by two, by three, and by three that hold it whole."""
    from entprog.storage import Place

    there = Place.at(address(s3, "sliced/run"))
    there.system.create_dir("sliced")
    with servers.counting(s3) as two, servers.counting(s3) as three, servers.counting(s3) as whole:
        read = [address(endpoint, "sliced/run") for endpoint, _ in (two, three, whole)]
        run_ranks(_bucket_rank, 2, tmp_path, "save", address(s3, "sliced/run"), read[0])
        (tmp_path / "store").unlink()
        run_ranks(_bucket_rank, 3, tmp_path, "load", *read[1:])
        size = sum((there / "step-00000002").files().values())
        counts = {name: sum(of[1]) / size for name, of in (("two", two), ("three", three), ("whole", whole))}
    assert all(0.9 < count <= 1.2 for count in counts.values()), counts
    expected = torch.load(tmp_path / "save-0-0.pt", weights_only=True)
    for name in ("save-1-0", "load-0-0", "load-0-2", "load-1-0", "load-1-2"):
        assert_equal(torch.load(tmp_path / f"{name}.pt", weights_only=True), expected)


def test_s3(bucket):
    from entprog.storage import Place

    run = Trained()
    place = Place.at(bucket)
    place.system.create_dir("runs")
    place.check()
    assert place.files() == {}
    with pytest.raises(UserError, match="checkpoints cannot be written to s3://nowhere"):
        Place.at(bucket.replace("runs/one", "nowhere/one").replace("&allow_bucket_creation=true", "")).check()
    with closing(checkpoint.Saver(bucket, "id", keep=2, warn=pytest.fail)) as saver:
        for step in (1, 2, 3):
            run.state.step = step
            saver.save(run.network, run.state)
    assert checkpoint.found(bucket) == ["step-00000002", "step-00000003"]
    assert_equal(resumed(bucket).tensors(), run.tensors())
    # Saved again at a step where another number of ranks had begun to: their files are none of it.
    with place.system.open_output_stream("runs/one/step-00000003/part-00002-0badf00d.safetensors") as stream:
        stream.write(b"cut sh")
    checkpoint.save(bucket, run.network, run.state, "id", keep=2)
    assert len((place / "step-00000003").files()) == 2
    assert_equal(resumed(bucket).tensors(), run.tensors())
    # Cut short: an upload that ended before the last file, as an object store leaves it.
    place.system.delete_file("runs/one/step-00000003/state.json")
    assert checkpoint.newest(bucket) == "step-00000002" and checkpoint.damaged(bucket) == ["step-00000003"]
    assert resumed(bucket).state.step == 2


def test_what_a_bucket_does_not_take_leaves_the_checkpoint_before(s3):
    """It cannot be written to for a while: what comes after is saved."""
    run, message, real = Trained(layers=1), [], address(s3, "refusing/run")
    Place.at(real).system.create_dir("refusing")
    with servers.counting(s3) as (reading, _):  # which takes nothing
        for where in (real, address(reading, "refusing/run"), real):
            with closing(checkpoint.Saver(where, "id", keep=1, warn=message.append)) as saver:
                saver.save(run.network, run.state)
            if where != real:
                assert checkpoint.found(real) == ["step-00000002"] and checkpoint.damaged(real) == []
            run.update()
    assert checkpoint.found(real) == ["step-00000004"]
    (line,) = message
    assert "after step 3 was not saved in s3://refusing/run" in line and "training goes on" in line


@pytest.mark.parametrize(
    ("away", "shown", "why"),
    [
        ("gs://anonymous@runs/one?scheme=http&retry_limit_seconds=0.5", "gs://runs/one", "connect"),
        pytest.param(  # its client cannot be told to give up soon
            "s3://runs/one?scheme=http&region=us-east-1", "s3://runs/one", "NETWORK", marks=pytest.mark.slow
        ),
    ],
)
def test_a_bucket_that_is_away_is_told_and_training_goes_on(away, shown, why, monkeypatch):
    """Neither the upload nor clearing away after it comes through: nobody listens at the address."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    away += "&endpoint_override=127.0.0.1:1"
    run, message = Trained(), []
    with closing(checkpoint.Saver(away, "id", keep=2, warn=message.append)) as saver:
        saver.save(run.network, run.state)
        run.update()
    (line,) = message
    assert f"after step 2 was not saved in {shown}" in line and "training goes on" in line and "\n" not in line
    with pytest.raises(OSError, match=why):
        checkpoint.newest(away)  # and a resume does not take the run to be new


def test_no_place():
    with pytest.raises(UserError, match="s3:// or gs://"):
        checkpoint.newest("ftp://somewhere/else")


def test_the_state_is_plain_json(tmp_path):
    run = Trained()
    checkpoint.save(tmp_path, run.network, run.state, "id", keep=1)
    folder = tmp_path / checkpoint.newest(tmp_path)
    values = json.loads((folder / "state.json").read_text())
    assert values["files"] == {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}, "nothing to unpickle"


def test_moments_are_loaded_to_the_host_and_follow_what_is_trained(tmp_path, monkeypatch):
    """A device that trains a few blocks at a time never holds the moments of all that ever were."""
    saved, later, asked = Trained(), Trained(steps=0), {}
    checkpoint.save(tmp_path, saved.network, saved.state, "id", keep=1)
    later.network.to("meta")  # a device that is not the host, which torch loads nothing to
    monkeypatch.setattr(checkpoint.dcp, "load", lambda wanted, **options: asked.update(wanted))
    checkpoint.load(tmp_path, checkpoint.newest(tmp_path), later.network, later.state, "id")
    where = {(name.partition("/")[0], tensor.device.type) for name, tensor in asked.items()}
    assert where == {("network", "meta"), ("ema", "meta"), ("moments", "cpu")}
    here = later.state.optimizer.state
    trained, *frozen = here
    optimizer.follow(later.state.optimizer, [trained], "host")
    assert here[trained]["exp_avg"].device.type == "meta" and len(frozen) > 6
    assert {here[parameter]["exp_avg"].device.type for parameter in frozen} == {"cpu"}
