"""Sources that are tried again by the same command, or once a limit is raised; and those whose verdict stays."""

import errno
import functools
import http.server
import json
import os
import resource
import socket
import threading
from contextlib import ExitStack

import numpy as np
import pytest
from PIL import Image

from entprog import config
from entprog.config import Preparation
from entprog.data import shards
from entprog.media import h264
from entprog.media.video import VideoError
from entprog.preparing import again, attempts, cutting, extracting, fetching, inputs, ledger, probing
from pipelines.preparing import additions, packing


def settings(**prepare) -> Preparation:
    shape = {"frames": 4, "height": 48, "width": 32, "fps": 10}
    return config.build({"data": {"shape": shape}, "prepare": prepare}, Preparation)


@pytest.fixture
def videos(tmp_path):
    """A folder with a video with poses beside it, which take 3,200 bytes, and one that is damaged."""
    folder = tmp_path / "in"
    h264.write(folder / "posed.mp4", np.random.default_rng(0).integers(0, 255, (8, 64, 48, 3), np.uint8), fps=10)
    np.savez(folder / "posed.pose.npz", pose=np.full((8, 33, 3), 0.5, np.float32), fps=10.0)
    (folder / "damaged.mp4").write_bytes(b"no video")
    return folder


def through(rows, made_with: Preparation, parts) -> dict[str, ledger.Line]:
    """The rows through all stages, as a job takes them: the ledger's line of each."""
    parts.mkdir(exist_ok=True)
    keys = packing.part_keys(rows, made_with)
    track = cutting.Track(made_with)
    for row in rows:
        looked = probing.cut_shots(probing.probe({**row, "key": keys[row["file"]]}, made_with), made_with)
        cutting.cut(track(looked), made_with, parts)
    records = packing.read_parts(parts, [keys[row["file"]] for row in rows])
    return {row["file"]: record["ledger"][0] for row, record in zip(rows, records, strict=True)}


def left(rows, lines, made_with: Preparation, now: Preparation, parts, tmp_path) -> set[str]:
    """Sources that are to be done: the same after a command that was interrupted and after one that was finished."""
    done = packing.finished(parts, rows, packing.part_keys(rows, now), now)
    empty = shards.write_dataset(
        tmp_path, now.data.shape, {"train": [], "held_out": []}, {"prepare": made_with.prepare.model_dump(mode="json")}
    )
    to_do = additions.to_do(additions.Before(empty, [*lines.values()]), rows, tmp_path, now)
    assert {row["file"] for row in rows} - done.keys() == {row["file"] for row in to_do}
    return {row["file"] for row in to_do}


def test_a_server_that_did_not_answer_is_asked_again(videos, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    (videos / "m.csv").write_text(f"path\nhttp://{address}/damaged.mp4\nhttp://{address}/text.md\ngone.mp4\n")
    rows, now = inputs.find(videos / "m.csv").rows, settings(hosts=["127.0.0.1"])
    lines = through(rows, now, tmp_path / "parts")
    remote = f"http://{address}/damaged.mp4"
    assert lines[remote]["reason"] == lines["gone.mp4"]["reason"] == "unreadable"
    assert left(rows, lines, now, now, tmp_path / "parts", tmp_path) == {remote}

    lines = through(rows, settings(), tmp_path / "parts")
    assert lines[remote]["reason"] == "bad_address"
    assert left(rows, lines, settings(), now, tmp_path / "parts", tmp_path) == {remote}

    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(videos))
    with http.server.ThreadingHTTPServer(("127.0.0.1", int(address.rpartition(":")[2])), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        lines = through(rows, now, tmp_path / "parts")
        server.shutdown()
    assert lines[remote]["reason"] == "corrupt"
    assert left(rows, lines, now, now, tmp_path / "parts", tmp_path) == set()


def test_a_file_that_could_not_be_opened_is_tried_again_and_a_damaged_one_is_not(videos, tmp_path):
    rows, now = inputs.find(videos).rows, settings()
    lines = through(rows, now, tmp_path / "parts")
    assert left(rows, lines, now, now, tmp_path / "parts", tmp_path) == set()
    (row,) = (row for row in rows if row["file"] == "posed.mp4")
    key = packing.part_keys([row], now)[row["file"]]
    for reason, due in (("unreadable", {"posed.mp4"}), ("crashed", {"posed.mp4"}), ("too_large", set())):
        refused = ledger.rejected({**row, "key": key, "sha256": ""}, "probe", reason, "as a disk that is away")
        cutting.cut(refused, now, tmp_path / "parts")
        record = json.loads((tmp_path / "parts" / f"{key}.json").read_text())
        lines["posed.mp4"] = record["ledger"][0]
        assert left(rows, lines, now, now, tmp_path / "parts", tmp_path) == due


def test_what_a_limit_refused_is_tried_again_once_it_is_raised(videos, tmp_path):
    rows, small = inputs.find(videos).rows, settings(max_decoded_bytes=500, max_work_s=100)
    lines = through(rows, small, tmp_path / "parts")
    assert lines["posed.mp4"]["reason"] == "bad_pose"
    assert left(rows, lines, small, small, tmp_path / "parts", tmp_path) == set()
    for other in (settings(max_decoded_bytes=400, max_work_s=100), settings(max_decoded_bytes=500)):
        assert left(rows, lines, small, other, tmp_path / "parts", tmp_path) == set()
    assert left(rows, lines, small, settings(), tmp_path / "parts", tmp_path) == {"posed.mp4"}


def test_too_many_open_files_are_no_verdict_on_a_source(videos, tmp_path):
    row = next(row for row in inputs.find(videos).rows if row["file"] == "posed.mp4")
    looked = probing.probe(row, settings())
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ExitStack() as taken:
        taken.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        with pytest.raises(OSError, match="Too many open files"):
            while True:
                taken.enter_context((videos / "m").open("w"))
        for stage, given in ((probing.probe, row), (probing.cut_shots, looked)):
            with pytest.raises(attempts.MachineError, match=r"posed.mp4: Too many open files"):
                stage(given, settings())
    assert probing.cut_shots(probing.probe(row, settings()), settings())["reason"] == ""


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_full_disk_is_no_verdict_on_a_source(code, videos):
    (row,) = (row for row in inputs.find(videos).rows if row["file"] == "posed.mp4")

    def work(*_):
        raise OSError(code, os.strerror(code))

    with pytest.raises(attempts.MachineError, match=rf"posed.mp4: {os.strerror(code)}; run it again"):
        probing.tried(probing.probe(row, settings()), "cut", settings(), None, work)


def test_a_machine_without_a_scratch_folder_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    (tmp_path / "m.csv").write_text("path\nhttp://127.0.0.1:9/a.mp4\n")
    (row,) = inputs.find(tmp_path / "m.csv").rows
    with pytest.raises(attempts.MachineError, match=r"cannot make a scratch file .*: set TMPDIR"):
        probing.probe(row, settings(hosts=["127.0.0.1"]))
    with pytest.raises(attempts.MachineError, match=r"cannot make a scratch file .*: set TMPDIR"):
        next(extracting.extract({"file": "a.mp4"}, [], iter(()), iter(()), settings()))


@pytest.mark.parametrize(
    ("meanwhile", "reason", "tries"),
    [("nothing", "", 2), ("damage", "corrupt", 2), ("write", "changed", 1), ("rename", "unreadable", 1)],
)
def test_damage_is_a_verdict_once_the_content_was_read_again(meanwhile, reason, tries, videos):
    """To a decoder a disk that is away, and a file that is being written, are damage; the file is looked at anew."""
    path, asked = videos / "posed.mp4", []
    (row,) = (row for row in inputs.find(videos).rows if row["file"] == "posed.mp4")
    probed, known = probing.probe(row, settings()), path.stat()

    def work(row, *_):
        asked.append(row["file"])
        if meanwhile == "write":
            path.write_bytes(path.read_bytes()[::-1])
            os.utime(path, ns=(known.st_atime_ns, known.st_mtime_ns))
        if meanwhile == "rename":
            path.rename(videos / "other.mp4")
        if len(asked) == 1 or meanwhile == "damage":
            raise VideoError("corrupt", "Input/output error")
        return row

    assert probing.tried(probed, "shots", settings(), None, work)["reason"] == reason
    assert len(asked) == tries


def write(path, seed: int) -> None:
    """Noise as a video, or as numbered images."""
    pictures = np.random.default_rng(seed).integers(0, 255, (8, 64, 48, 3), np.uint8)
    if path.suffix:
        h264.write(path, pictures, fps=10)
        return
    path.mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(path / f"{i}.png")


@pytest.mark.parametrize("name", ["a.mp4", "images"])
def test_a_source_that_changes_between_stages_or_in_one_is_changed_and_tried_again(name, tmp_path):
    """Else clips had the pixels of one content and the poses of another."""
    folder, now = tmp_path / "in", settings(hosts=["127.0.0.1"], frames_fps=10)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        (tmp_path / "m.csv").write_text(f"path,fps\nhttp://127.0.0.1:{server.server_address[1]}/{name},10\n")
        write(folder / name, 0)
        (local,), (remote,) = inputs.find(folder, now.prepare).rows, inputs.find(tmp_path / "m.csv", now.prepare).rows
        assert local["frames_fps"] == remote["frames_fps"] == (0 if "." in name else 10)
        probed = [probing.probe(row, now) for row in (local, remote)]
        assert [probing.cut_shots(row, now)["reason"] for row in probed] == ["", ""]
        assert probed[0]["sha256"] == probed[1]["sha256"]
        write(folder / name, 1)
        for row in probed:
            after = probing.cut_shots(row, now)
            assert after["reason"] == "changed" and "it was changed" in after["message"], after
            assert again.may_mend(row, ledger.line(after), {}, now.prepare)
        server.shutdown()
    (row,) = inputs.find(folder, now.prepare).rows
    with pytest.raises(VideoError, match="it was changed") as error, fetching.fetched(row, now.prepare):
        write(folder / name, 2)
    assert error.value.reason == "changed"


def test_a_source_of_the_same_name_at_another_address_is_another(tmp_path):
    def found(address: str) -> dict:
        (tmp_path / "m.txt").write_text(f"{address}\n")
        return inputs.find(tmp_path / "m.txt").rows[0] | {"file": "1.mp4"}  # as a manifest there calls it

    def to_do(row, line) -> list[str]:
        return [row["file"] for row in additions.to_do(additions.Before(empty, [line]), [row], tmp_path, now)]

    now = settings(hosts=["127.0.0.1"])
    one, other, anew = (found(f"http://127.0.0.1:9/{name}") for name in ("A/1.mp4?sig=1", "B/1.mp4", "A/1.mp4?sig=2"))
    key, another, same = (packing.part_keys([row], now) for row in (one, other, anew))
    assert key == same != another
    empty = shards.write_dataset(tmp_path, now.data.shape, {"train": [], "held_out": []}, {})
    line = ledger.line({**one, "sha256": "5" * 64, "stage": "probe", "reason": "corrupt", "message": ""})
    assert to_do(one, line) == to_do(anew, line) == [] and to_do(other, line) == ["1.mp4"]
    earlier = line | {"stamp": f" {line['stamp'].rpartition(' ')[2]}"}
    assert to_do(one, earlier) == [], "nothing is read again for a ledger of an earlier version"
