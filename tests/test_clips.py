"""The training stream: the same clips in the same order whoever reads them, on real clips and a real Ray."""

import io
import itertools
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from entprog import config
from entprog.config import ClipShape
from entprog.data import clip_stream, shards
from entprog.errors import UserError
from entprog.media import assets, color, h264, video
from helpers import hostile, processes, real_clips
from pipelines.cluster import stalls
from pipelines.stream import feed
from pipelines.training import checks

SHAPE = ClipShape(frames=6, height=48, width=32, fps=12)
BATCH = 3


def row(source: str, split: str, start_s: float) -> dict:
    return real_clips.row(source, split, start_s, SHAPE)


def write(folder, splits) -> shards.Dataset:
    return real_clips.write(folder, splits, SHAPE)


@pytest.fixture(scope="module")
def rows():
    """13 training clips of two sources, 5 held out of a third."""
    return {
        "train": [row("cam01", "train", 0.1 * i) for i in range(9)] + [row("walk", "train", 0.3 * i) for i in range(4)],
        "held_out": [row("cam04", "held_out", 0.2 * i) for i in range(5)],
    }


@pytest.fixture(scope="module")
def dataset(rows, tmp_path_factory):
    train = rows["train"]  # shards of unequal length, one longer than a row group
    files = {"train": [train[:9], train[9:11], train[11:]], "held_out": [rows["held_out"]]}
    return write(tmp_path_factory.mktemp("shards"), files)


def local(dataset, batch=BATCH, **options):
    return clip_stream.local_stream(dataset, "train", SHAPE, batch, **options)


def take(stream, count) -> list:
    out = [next(stream) for _ in range(count)]
    stream.close()
    return out


def assert_equal(found, due):
    assert len(found) == len(due)
    for one, other in zip(found, due, strict=True):
        for name in ("position", "video", "reference", "pose"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name


# ---- which clip is where ----


@given(st.integers(1, 50), st.integers(0, 2**40), st.integers(0, 5))
def test_each_clip_once_per_epoch(count, seed, epoch):
    positions = np.arange(epoch * count, (epoch + 1) * count)
    assert sorted(clip_stream.clips_at(positions, count, seed)) == list(range(count))


@given(st.integers(1, 9), st.integers(1, 5), st.integers(0, 10**9), st.integers(1, 6))
def test_ranks_share_each_global_batch_without_gap_or_overlap(batch, world, start, steps):
    parts = [
        clip_stream.rank_positions(np.arange(batch * steps), start, batch, rank, world).reshape(steps, batch)
        for rank in range(world)
    ]
    assert np.concatenate(parts, axis=1).ravel().tolist() == list(range(start, start + batch * world * steps))


@st.composite
def histories(draw):
    """A run in pieces: after each some updates more, by another number of workers."""
    batches = draw(st.integers(1, 12))
    pieces = draw(st.lists(st.tuples(st.integers(0, 5), st.integers(1, batches)), min_size=1, max_size=5))
    return batches, pieces


@given(st.integers(1, 40), st.integers(0, 2**40), st.integers(1, 5), histories())
def test_resumed_by_any_workers_a_run_sees_the_clips_of_the_uninterrupted_one(count, seed, batch, history):
    """Each update the same clips, so each clip once an epoch, wherever a run was cut and however many went on."""
    batches, pieces = history
    due = clip_stream.clips_at(np.arange(sum(steps for steps, _ in pieces) * batches * batch), count, seed)
    found, position = [], 0
    for steps, world in pieces:
        ranks = [
            clip_stream.rank_positions(np.arange(steps * share * batch), position, batch, rank, world, batches)
            for rank in range(world)
            if (share := len(range(rank, batches, world)))
        ]
        for step in range(steps):
            parts = [rows.reshape(steps, -1)[step] for rows in ranks]
            found.append(np.sort(np.concatenate(parts)))
        position += steps * batches * batch
    positions = np.concatenate(found) if found else np.empty(0, int)
    assert clip_stream.clips_at(positions, count, seed).tolist() == due.tolist()
    whole_epochs = len(due) // count * count
    assert all(sorted(epoch) == list(range(count)) for epoch in due[:whole_epochs].reshape(-1, count))


@given(st.integers(1, 30), st.integers(0, 100), st.integers(0, 200), st.integers(0, 40))
def test_a_clip_depends_on_its_position_alone(count, seed, first, length):
    whole = clip_stream.clips_at(np.arange(first + length), count, seed)
    assert clip_stream.clips_at(np.arange(first, first + length), count, seed).tolist() == whole[first:].tolist()


def test_epochs_and_seeds_differ():
    epochs = [clip_stream.permutation(50, 0, epoch).tolist() for epoch in range(3)]
    assert len({tuple(order) for order in [*epochs, clip_stream.permutation(50, 1, 0).tolist()]}) == 4


def test_order_is_what_it_was():
    """A resumed run, perhaps under a newer numpy, must go on in the same order."""
    assert clip_stream.permutation(8, 0, 0).tolist() == [5, 0, 6, 1, 7, 2, 4, 3]
    assert clip_stream.permutation(8, 7, 3).tolist() == [4, 3, 5, 6, 0, 7, 1, 2]


# ---- decoding ----


def test_clips_are_what_was_written(dataset, rows):
    batch = next(local(dataset, 13))
    order = clip_stream.clips_at(np.arange(13), 13, 0)
    for place, clip in enumerate(order):
        written = rows["train"][clip]
        assert np.array_equal(batch.pose[place], written["pose"])
        assert np.array_equal(batch.reference[place], Image.open(io.BytesIO(written["reference"])))
        shown = (color.yuv420_to_rgb(batch.video[place]).permute(0, 2, 3, 1) + 1) * 127.5
        assert (shown - torch.tensor(h264.decode_rgb(written["video"]))).abs().max() <= 1.01
    assert (batch.video.dtype, batch.reference.dtype, batch.pose.dtype) == (torch.uint8, torch.uint8, torch.float32)


def test_held_out_is_spread_evenly_and_shared(dataset, rows):
    whole = clip_stream.held_out(dataset, 3, batch_size=2)
    assert [len(part.pose) for part in whole] == [2, 1]
    poses = torch.cat([part.pose for part in whole])
    assert np.array_equal(poses, np.stack([rows["held_out"][i]["pose"] for i in (0, 1, 3)]))
    shared = [clip_stream.held_out(dataset, 3, 2, rank, 2) for rank in range(2)]
    positions = [torch.cat([part.position for part in parts]).tolist() for parts in shared]
    assert positions == [[0, 2], [1]]
    assert torch.equal(shared[0][0].pose, poses[[0, 2]])
    assert sum(len(part.pose) for part in clip_stream.held_out(dataset, 100, 2)) == 5


@pytest.mark.parametrize(("count", "world"), [(4, 1), (4, 3), (4, 4), (3, 7), (1, 5), (2, 64), (100, 9)])
def test_more_ranks_than_held_out_clips_share_their_draws(dataset, count, world):
    """Every draw of every clip has one rank, and no rank has much more of them than another."""
    draws, taken = 4, []
    for rank in range(world):
        clips = [int(p) for part in clip_stream.held_out(dataset, count, 2, rank, world) for p in part.position]
        own = range(draws)[clip_stream.held_out_share(min(count, dataset.clips("held_out")), rank, world)[1]]
        taken.append([(clip, draw) for clip in clips for draw in own])
    count = min(count, dataset.clips("held_out"))
    assert sorted(itertools.chain.from_iterable(taken)) == [
        (clip, draw) for clip in range(count) for draw in range(draws)
    ]
    assert max(map(len, taken)) <= draws * -(-count // world)
    assert world < draws * count or max(map(len, taken)) == 1


def test_wrong_shape_and_empty_split_are_told(dataset, rows, tmp_path):
    with pytest.raises(UserError, match=r"6 frames of 32x48 at 12 fps.*6 frames of 32x64"):
        feed.stream(dataset, "train", SHAPE.model_copy(update={"height": 64}), BATCH)
    empty = write(tmp_path, {"train": [rows["train"][:1]], "held_out": []})
    with pytest.raises(UserError, match="no held-out clips"):
        clip_stream.held_out(empty, 3, 2)
    with pytest.raises(UserError, match="no clips in split 'held_out'"):
        feed.stream(empty, "held_out", SHAPE, BATCH)


def damaged(rows, folder, **columns) -> shards.Dataset:
    """Three clips; the second one's columns are replaced: damage that no checksum sees."""
    train = [dict(r) for r in rows["train"][:3]]
    train[1].update(columns)
    return write(folder, {"train": [train], "held_out": []})


@pytest.mark.parametrize("column", ["video", "reference"])
def test_undecodable_clip_is_named(rows, tmp_path, column):
    cut = rows["train"][1][column][:60]
    for number, value in enumerate((cut, b"")):
        folder = tmp_path / str(number)
        with pytest.raises(shards.DamagedShardError, match=r"train/00000\.parquet, row 1"):
            next(local(damaged(rows, folder, **{column: value})))


def test_a_reference_that_unpacks_to_far_more_than_its_clip_is_not_decoded(rows, tmp_path):
    png = io.BytesIO()
    Image.fromarray(np.zeros((3000, 3000, 3), np.uint8)).save(png, "PNG")
    with pytest.raises(shards.DamagedShardError, match=r"row 1: .*avcodec"):
        next(local(damaged(rows, tmp_path, reference=png.getvalue())))


def test_a_clip_of_far_more_pixels_than_its_shape_is_not_decoded(rows, tmp_path):
    """Nor one that grows in its middle, behind a header of the right size."""
    large = np.zeros((2, 2048, 2048, 3), np.uint8)
    due = np.zeros((2, SHAPE.height, SHAPE.width, 3), np.uint8)
    with pytest.raises(shards.DamagedShardError, match=r"row 1: .*2048x2048, more than \d+ pixels are not decoded"):
        next(local(damaged(rows, tmp_path / "1", video=h264.encode(large, SHAPE.fps))))
    grows = b"".join(hostile.remuxed(h264.encode(part, SHAPE.fps), "mpegts", {}) for part in (due, large))
    with pytest.raises(shards.DamagedShardError, match="row 1"):
        next(local(damaged(rows, tmp_path / "2", video=grows)))


def test_clip_of_fewer_frames_is_not_stretched(rows, tmp_path):
    frames, _ = video.read_frames(assets.clip("cam01"), [0.0], size=(SHAPE.height, SHAPE.width))
    with pytest.raises(shards.DamagedShardError, match="row 1"):
        next(local(damaged(rows, tmp_path, video=h264.encode(frames, SHAPE.fps))))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 6))
def test_only_the_middle_frames_are_decoded_and_are_those_of_the_whole_clip(dataset, frames):
    whole, few = next(local(dataset, 4)), next(local(dataset, 4, frames=frames))
    cut = whole.resized(SHAPE.model_copy(update={"frames": frames}))
    assert few.video.shape[1] == frames
    assert_equal([few], [cut])


def test_a_task_decodes_into_the_memory_of_the_one_before(dataset):
    found = [
        clip_stream.decode(dataset, "train", clips, room=clip_stream.reused) for clips in np.arange(6).reshape(2, 3)
    ]
    due = clip_stream.decode(dataset, "train", np.arange(3, 6))
    for name in ("video", "reference"):
        assert np.shares_memory(found[0][name], found[1][name])
        assert np.array_equal(found[1][name], due[name])


def test_processes_that_need_no_network_load_none():
    """Each would need seconds and 200 MB for it: decode tasks, the board, and what the controller unpickles of ours."""
    program = """
import sys, pipelines.stream.feed, pipelines.cluster.launch, pipelines.cluster.message_board
sys.exit([name for name in ("torch", "diffusers", "mlflow") if name in sys.modules] or 0)
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_workers_may_change_on_a_resume_where_an_update_stays_the_same(dataset):
    def identity(**numbers) -> str:
        settings = {"model": {"init": {"num_layers": 1}}, "train": {"steps": 1, **numbers}}
        return checks.identity(config.build(settings), dataset)

    assert identity(workers=4) == identity(workers=1, accumulate=4) == identity(workers=2, accumulate=2)
    assert identity(workers=4) != identity(workers=2)


# ---- through Ray Data ----


def ray_stream(dataset, batch=BATCH, **options):
    return feed.stream(dataset, "train", SHAPE, batch, **options)


@pytest.mark.parametrize("where", ["worker", "cluster"])
def test_ray_data_gives_the_same_bits_over_epochs_and_executions(local_ray, dataset, monkeypatch, where):
    monkeypatch.setattr(feed, "TASKS", 3)
    monkeypatch.setattr(feed, "TASK_BATCHES", 2)
    found = take(
        ray_stream(dataset, cpus=2, seed=5, where=where), 15
    )  # 45 clips: 3 epochs of 13, 3 executions of 6 batches
    assert_equal(found, take(local(dataset, seed=5), 15))
    epoch = torch.cat([batch.position for batch in found])
    assert epoch.tolist() == list(range(45))


def test_executions_overlap_at_the_end_alone(local_ray, dataset, monkeypatch):
    """While two are there, Ray's executors take a core from training."""
    monkeypatch.setattr(feed, "TASKS_HELD_BACK", 2)
    monkeypatch.setattr(feed, "TASK_BATCHES", 5)
    begun, original = [], feed._execute
    monkeypatch.setattr(feed, "_execute", lambda *given: begun.append(len(begun)) or original(*given))
    stream, after = ray_stream(dataset, where="cluster"), []
    try:
        for _ in range(12):
            next(stream)
            after.append(len(begun))
    finally:
        stream.close()
    assert after[:8] == [1] * 8, "of ten batches of an execution"
    assert after[10:] == [2, 2], "then the next one is there"


def test_two_ranks_together_are_one_and_a_start_in_the_middle_is_the_tail(local_ray, dataset):
    ranks = [ray_stream(dataset, rank=rank, world=2, start_position=2 * BATCH) for rank in range(2)]
    pairs = [(next(ranks[0]), next(ranks[1])) for _ in range(4)]
    for stream in ranks:
        stream.close()
    whole = take(local(dataset, 2 * BATCH), 5)[1:]
    for pair, one in zip(pairs, whole, strict=True):
        for name in ("position", "video", "reference", "pose"):
            assert torch.equal(torch.cat([getattr(part, name) for part in pair]), getattr(one, name))


def test_nothing_global_is_changed_and_closing_frees_the_cpus(local_ray, dataset):
    from ray.data import DataContext

    stream = ray_stream(dataset, cpus=2)
    next(stream)
    assert stream.wait_s > 0
    options = DataContext.get_current().execution_options
    assert not options.preserve_order and options.resource_limits.cpu in (None, float("inf"))
    stream.close()
    stream.close()
    all_free(local_ray)
    with pytest.raises(StopIteration):
        next(stream)


def all_free(ray):
    deadline = time.time() + 60
    while ray.available_resources().get("CPU", 0) < ray.cluster_resources()["CPU"]:
        assert time.time() < deadline, f"CPUs still held: {ray.available_resources()}"
        time.sleep(0.05)


def test_a_reader_that_ends_waits_for_no_execution_that_cannot_begin(local_ray, dataset, monkeypatch):
    """As where another job has taken the CPUs meanwhile; once they are free nothing of it is left."""
    monkeypatch.setattr(feed, "TASKS", 2)
    monkeypatch.setattr(feed, "TASK_BATCHES", 1)
    monkeypatch.setattr(feed, "CLOSING_S", 0.1)
    stream = ray_stream(dataset)
    next(stream)

    class Other:
        def has_begun(self):
            return True

    other = local_ray.remote(num_cpus=int(local_ray.cluster_resources()["CPU"]))(Other).remote()
    assert local_ray.get(other.has_begun.remote())
    next(stream)  # the last of this execution: the next one is asked for
    (starting,) = [thread for thread in threading.enumerate() if thread.name == "next-execution"]
    closing = threading.Thread(target=stream.close, daemon=True)
    closing.start()
    closing.join(60)
    assert not closing.is_alive() and starting.is_alive()
    local_ray.kill(other)
    starting.join(60)
    assert not starting.is_alive()
    all_free(local_ray)


def test_tasks_do_not_run_far_ahead_of_a_slow_reader(local_ray, dataset, monkeypatch, tmp_path):
    decoded = tmp_path / "decoded"
    decoded.mkdir()

    def task(rows, **options):
        (decoded / str(rows["first"][0])).touch()
        return original(rows, **options)

    original = feed._task
    monkeypatch.setattr(feed, "_task", task)
    stream = ray_stream(dataset, cpus=2, where="cluster")
    next(stream)
    due, before = feed._to_decode(2).ahead + 2, -1
    while before != (before := len(list(decoded.iterdir()))) and before <= due:
        cpu_s, began = split_cpu_s(), time.monotonic()
        time.sleep(2)
    busy = (split_cpu_s() - cpu_s) / (time.monotonic() - began)
    stream.close()
    assert before <= due, "an execution has 256 tasks: the reader does not hold them back"
    assert busy < 0.5, "of a core: while it waits for room its executor rests"


def split_cpu_s() -> float:
    """CPU seconds of the actors that execute for streams."""
    return sum(sum(process.cpu_times()[:2]) for process in processes.running("ray::SplitCoordinator"))


def test_decoding_threads_do_not_run_far_ahead_of_a_slow_reader(local_ray, dataset, monkeypatch):
    begun = []
    original = clip_stream.decoded
    monkeypatch.setattr(clip_stream, "decoded", lambda *args: (begun.append(1), original(*args))[1])
    stream = ray_stream(dataset, cpus=2, batch=1)
    for taken in range(1, 9):
        next(stream)
        time.sleep(0.3)
        assert len(begun) - taken <= max(feed.BATCHES_AHEAD)
    stream.close()
    ended = len(begun)
    time.sleep(0.3)
    assert len(begun) == ended


@pytest.mark.parametrize("where", ["worker", "cluster"])
def test_a_damaged_clip_ends_the_stream_with_its_name(local_ray, rows, tmp_path, where):
    stream = ray_stream(damaged(rows, tmp_path, video=b"not a video"), where=where)
    with pytest.raises(shards.DamagedShardError, match=r"train/00000\.parquet, row 1"):
        take(stream, 3)


def test_spilling_of_the_object_store_is_seen(local_ray):
    message = []
    with stalls.watched(message.append, every_s=0.2) as watch:
        held = [local_ray.put(np.zeros(100 << 20, np.uint8)) for _ in range(6)]
        assert len(held) == 6
    assert watch.figures()["spilled_bytes"] > 0 and watch.peak_used_share > 0.2
    assert any("spilled" in line for line in message)


@pytest.mark.slow
def test_inside_two_train_workers(local_ray, dataset, tmp_path):
    """Each worker holds a CPU and opens its own pipeline; neither waits for the other."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    def loop(config):
        import ray.train

        rank = ray.train.get_context().get_world_rank()
        world = ray.train.get_context().get_world_size()
        for shape in range(2):  # a stage ends, the next one opens another stream
            stream = feed.stream(config["dataset"], "train", SHAPE, BATCH, rank, world, shape * 5 * world * BATCH)
            batches = [next(stream) for _ in range(5)]
            stream.close()
            torch.save(batches, config["out"] / f"{shape}-{rank}.pt")

    TorchTrainer(
        loop,
        train_loop_config={"dataset": dataset, "out": tmp_path},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(name="clips", storage_path=str(tmp_path / "ray")),
    ).fit()
    for rank in range(2):
        parts = [torch.load(tmp_path / f"{shape}-{rank}.pt", weights_only=False) for shape in range(2)]
        assert_equal(parts[0] + parts[1], take(local(dataset, rank=rank, world=2), 10))
