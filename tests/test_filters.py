"""Shot cuts, people, motion, sharpness: each filter on real clips that it is about."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from entprog import config, files
from entprog.data import shards
from entprog.media import assets, footage, h264, video
from entprog.media.pictures import png
from entprog.preparing import attempts, cutting, inputs, probing, shots, windows

SHAPE = {"frames": 6, "height": 48, "width": 32, "fps": 10}


def some(name: str, seconds: float = 1.2, start_s: float = 0.0) -> list[np.ndarray]:
    """The first part of a real clip at 10 fps, 480 pixels high and 270 wide."""
    frames = video.iter_frames(assets.clip(name), fps=10, start_s=start_s, end_s=start_s + seconds, size=(480, 270))
    return [frame for _, frame in frames]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("in")
    one, other = some("cam01"), some("cam03")
    made = {
        "plain": one,
        "spliced": [*one, *other],
        "flickers": [*one[:3], *other[:2], *one[3:5], *other[2:4]],
        "frozen": [one[0]] * 10,
        "two people": [np.concatenate(pair, 1) for pair in zip(one, other, strict=True)],
    }
    for name, frames in made.items():
        h264.write(folder / f"{name}.mp4", frames, fps=10)
    return folder


@pytest.fixture(scope="module")
def outcome(folder, tmp_path_factory):
    """{name: (row after all stages but the last, ledger of its clips, part)}"""
    parts = tmp_path_factory.mktemp("parts")
    settings = config.build({"data": {"shape": SHAPE}}, config.Preparation)
    track = cutting.Track(settings, parts)
    out = {}
    for row in inputs.find(folder).rows:
        key = Path(row["file"]).stem
        row = track(probing.cut_shots(probing.probe({**row, "key": key}, settings, parts), settings, parts))
        cutting.cut(row, settings, parts)
        out[key] = row, json.loads((parts / f"{key}.json").read_text())["ledger"], parts / f"{key}.parquet"
    return out


def test_a_splice_of_two_real_videos_is_cut_there(outcome):
    row, (_, *clips), part = outcome["spliced"]
    assert np.frombuffer(row["cuts"], np.int32).tolist() == [12]
    starts = [round(clip["start_s"] * 10) for clip in clips]
    assert starts == [0, 3, 6, 12, 15, 18] and all(clip["kept"] for clip in clips)
    for clip in shards.read_rows(part, range(6), ["start_s", "reference_s"]):
        assert (clip["start_s"] < 1.2) == (clip["reference_s"] < 1.2), "its reference is from another shot"
    assert np.frombuffer(outcome["plain"][0]["cuts"], np.int32).tolist() == []


def test_a_full_disk_ends_the_job_and_is_no_verdict(outcome, tmp_path, monkeypatch):
    settings = config.build({"data": {"shape": SHAPE}}, config.Preparation)
    row, *_ = outcome["plain"]
    monkeypatch.setattr(files.secrets, "token_hex", lambda count: "mine")
    (tmp_path / ".plain.parquet.mine.tmp").symlink_to("/dev/full")  # where the part is written first
    with pytest.raises(attempts.MachineError, match="No space left"):
        cutting.cut(row, settings, tmp_path)
    assert not (tmp_path / "plain.json").exists(), "a source that could not be written is not done"


def test_shots_shorter_than_a_clip_are_too_short(outcome):
    row, (line,), _ = outcome["flickers"]
    assert row["reason"] == line["reason"] == "too_short" and "longest shot of 4" in line["message"]


def test_frozen_and_crowded_clips_are_rejected_for_what_they_are(outcome):
    for name, reason in {"frozen": "too_still", "two people": "several_people"}.items():
        _, (line, *clips), _ = outcome[name]
        assert line["reason"] == reason and {clip["reason"] for clip in clips} == {reason}
    assert all(clip["kept"] for clip in outcome["plain"][1])


def test_foremost_takes_one_of_several(outcome):
    row = outcome["two people"][0]
    for people, due in (("one", {"several_people"}), ("foremost", {""})):
        settings = config.build({"data": {"shape": SHAPE}, "prepare": {"people": people}}, config.Preparation)
        track = np.frombuffer(row["track"], np.float32).reshape(-1, 33, 3)
        _, verdicts = cutting._choose(row, track, settings)
        assert {reason for _, reason in verdicts.values()} == due


@pytest.mark.parametrize(("name", "fps"), [("cam01", 8), ("cam04", 16), ("jump", 8), ("woman", 16)])
def test_no_cut_is_seen_where_there_is_none(name, fps):
    pictures = video.thumbnails(assets.clip(name), fps, shots.SIZE)
    assert shots.cuts(shots.changes(pictures), config.Prepare().shot_change) == []


@pytest.mark.parametrize("images", [False, True])
def test_cuts_are_those_of_the_part_that_is_looked_at(images, tmp_path):
    """Of four panels beside each other the first one cuts, and no other; and the other way round."""
    one, other = ([video.scale(frame, (120, 68)) for frame in some(name)] for name in ("cam01", "cam03"))
    steady, cut = [*one, *one[::-1]], [*one, *other]
    for panels, cuts in (([cut, steady, steady, steady], [len(one)]), ([steady, cut, cut, cut], [])):
        pictures = [np.concatenate(row, 1) for row in zip(*panels, strict=True)]
        path = tmp_path / f"{len(cuts)}"
        if images:
            path.mkdir()
            for i, picture in enumerate(pictures):
                (path / f"{i:03d}.png").write_bytes(png(picture))
        else:
            path = h264.write(path.with_suffix(".mp4"), pictures, fps=10)
        of = footage.footage(path, 10.0 * images, "0,0,68,120", config.Prepare())
        assert shots.cuts(shots.changes(footage.thumbnails(of, 10, shots.SIZE)), config.Prepare().shot_change) == cuts


def test_every_pair_of_real_clips_is_told_apart():
    names = ("cam01", "cam02", "cam03", "cam04", "walk", "woman", "no_face")
    small = {n: [video.scale(f, shots.SIZE) for f in some(n, 0.6)] for n in names}
    for one in names:
        for other in names:
            if one != other:
                change = shots.changes((0, f) for f in [*small[one], *small[other]])
                assert shots.cuts(change, config.Prepare().shot_change) == [len(small[one])], (one, other)


def test_sharpness_falls_with_blur_and_motion_with_time():
    frames = [video.scale(frame, (96, 54)) for frame in some("cam02")]
    blurred = [
        windows.sharpness(video.scale(video.scale(frames[0], (96 // k, 54 // k)), (96, 54))) for k in (1, 2, 4, 8)
    ]
    assert blurred == sorted(blurred, reverse=True) and blurred[0] > 100 * blurred[-1] > 0
    assert windows.motion(np.stack([frames[0]] * 3)) == 0 < windows.motion(np.stack(frames))
    soft = np.stack([video.scale(video.scale(frame, (8, 5)), (96, 54)) for frame in frames])
    assert windows.picture_verdict(soft, 0.2, 10) == "blurred"
    assert windows.picture_verdict(np.stack(frames), 0.2, 10) is None
    assert windows.sharpness(np.zeros((1, 1, 3), np.uint8)) == 0


def test_a_source_that_stands_still_ends_its_process(tmp_path):
    program = (
        "import sys, time; from pathlib import Path; from entprog.preparing import attempts\n"
        "with attempts.attempt(Path(sys.argv[1]), 'k', 'probe', 0.5) as may_try:\n"
        "    print(may_try, flush=True)\n"
        "    for _ in attempts.heartbeats(range(8 if may_try else 0), 0.5, True): time.sleep(0.2)\n"
        "    print('goes on', flush=True)\n"
        "    time.sleep(60 if may_try else 0)\n"
    )
    message = []
    for _ in range(attempts.MAX_CRASHES + 1):
        done = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, timeout=50)
        message.append((done.returncode, done.stdout.split()))
    assert message == [(1, ["True", "goes", "on"])] * 2 + [(0, ["False", "goes", "on"])]
