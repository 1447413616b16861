"""Whole-body poses: two layouts, files beside videos, and shards that keep either."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from entprog import config
from entprog.config import ClipShape
from entprog.data import clip_stream, shards
from entprog.media import h264, posefile, wholebody
from entprog.media.limits import LIMITS, Limits
from entprog.media.video import VideoError
from entprog.preparing import cutting, inputs, ledger, probing
from helpers import wholebodies
from pipelines.preparing import packing

HEIGHT, WIDTH, FPS = 192, 128, 10
SHAPE = {"frames": 6, "height": 48, "width": 32, "fps": FPS}


@pytest.mark.parametrize("of", [np.array, torch.tensor], ids=["numpy", "torch"])
def test_the_body_is_in_the_whole_one_and_comes_out_of_it_as_it_went_in(of):
    poses = np.random.default_rng(0).random((2, 5, 33, 3), np.float32)
    whole = wholebody.whole(of(poses))
    assert whole.shape == (2, 5, 133, 3) and np.array_equal(wholebody.body(whole), poses)
    known = np.isfinite(np.asarray(whole)).all((0, 1, 3))
    assert known.sum() == 33 and (np.asarray(whole)[..., ~known, 2] == 0).all()
    assert wholebody.whole(whole) is whole and np.array_equal(wholebody.laid_out(whole, 33), poses)


# ---- files beside videos ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Four videos of one person without a network: three with poses beside them, one of them of 33 points."""
    folder = tmp_path_factory.mktemp("in")
    points = wholebodies.moving(14)
    for name in ("a", "b", "c", "bad"):
        h264.write(folder / f"{name}.mp4", np.stack(wholebodies.pictures(points, HEIGHT, WIDTH)), fps=FPS)
    np.savez(folder / "a.pose.npz", pose=points)
    (folder / "b.pose.json").write_text(json.dumps(wholebodies.mmpose(points, HEIGHT, WIDTH)))
    np.savez(folder / "c.pose.npz", pose=np.repeat(wholebody.body(points), 2, axis=0), fps=2 * FPS)
    np.savez(folder / "bad.pose.npz", pose=points[:3])
    return folder


def cut(folder: Path, parts: Path) -> dict[str, dict]:
    """{name: row of all stages but packing}, their parts written."""
    settings = config.build({"data": {"shape": SHAPE}}, config.Preparation)
    track, out = cutting.Track(settings, parts), {}
    for row in inputs.find(folder).rows:
        key = Path(row["file"]).stem
        row = track(probing.cut_shots(probing.probe({**row, "key": key}, settings, parts), settings, parts))
        cutting.cut(row, settings, parts)
        out[key] = row
    assert "estimator" not in vars(track), "no network is needed for poses that are there"
    return out


def test_poses_beside_videos_are_taken_and_need_no_network(folder, tmp_path):
    found = inputs.find(folder)
    assert [row["file"] for row in found.rows] == ["a.mp4", "b.mp4", "bad.mp4", "c.mp4"], "they are no sources"
    assert found.notes == ("poses of 4 videos are those of the .pose.npz and .pose.json files beside them",)
    rows = cut(folder, tmp_path)
    assert {name: row["points"] for name, row in rows.items() if not row["reason"]} == {"a": 133, "b": 133, "c": 33}
    (line,) = json.loads((tmp_path / "bad.json").read_text())["ledger"]
    assert line["reason"] == "bad_pose" and line["message"].startswith(
        "3 poses at 10 fps are 0.30 s, the video has 1.5"
    )
    wanted, records = wholebodies.moving(14), {}
    for name, points in (("a", 133), ("b", 133), ("c", 33)):
        records[name] = packing.read_part(tmp_path, name)
        assert records[name]["points"] == points and records[name]["clips"]
        clip = shards.read_rows(tmp_path / f"{name}.parquet", [0])[0]
        size = np.array([WIDTH, HEIGHT, 1])
        crop = (
            np.array([clip["crop_left"], clip["crop_top"], 0]),
            np.array([clip["crop_width"], clip["crop_height"], 1]),
        )
        back = (clip["pose"] * crop[1] + crop[0]) / size
        np.testing.assert_allclose(back, wholebody.laid_out(wanted[:6], points), atol=1e-5)
        assert clip["visibility"] == 1


def test_a_dataset_of_both_keeps_all_points_and_gives_each_its_own_back(folder, tmp_path):
    parts = tmp_path / "parts"
    parts.mkdir()
    cut(folder, parts)
    records = {name: packing.read_part(parts, name) for name in "abc"}
    points = packing.points_of(records.values())
    clips = [(f"{name}.mp4#0", f"{name}.mp4", name, 0) for name in records]
    shape, infos = ClipShape(**SHAPE), {}
    for count in (points, 33):
        plan = {"file": f"train/{count}.parquet", "split": "train", "points": count, "clips": clips}
        entry = packing.pack({"plan": json.dumps(plan)}, str(tmp_path), shape)
        infos[count] = shards.ShardInfo(**{name: entry[name] for name in ("file", "clips", "bytes", "sha256")})
    for count, info in infos.items():
        dataset = shards.write_dataset(tmp_path, shape, {"train": [info], "held_out": []}, {}, count)
        assert dataset == shards.read_dataset(tmp_path) and dataset.points == count
        whole, _, small = clip_stream.decode(dataset, "train", np.arange(3))["pose"]
        assert np.isfinite(whole).all() and whole.shape == (6, count, 3)
        part = shards.read_rows(parts / "c.parquet", [0], ["pose"])[0]["pose"]
        assert np.array_equal(wholebody.body(small), part)


def test_a_changed_file_of_poses_is_a_changed_input(folder, tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a.mp4", "a.pose.npz"):
        (tmp_path / "in" / name).write_bytes((folder / name).read_bytes())
    before = ledger.stamp(inputs.find(tmp_path / "in").rows[0])
    np.savez(tmp_path / "in" / "a.pose.npz", pose=wholebodies.moving(14)[::-1])
    after = ledger.stamp(inputs.find(tmp_path / "in").rows[0])
    (tmp_path / "in" / "a.pose.npz").unlink()
    without = ledger.stamp(inputs.find(tmp_path / "in").rows[0])
    assert len({before, after, without}) == 3
    assert before.split()[0] == without.split()[0], "the video itself is the same"


POINTS = wholebodies.moving(4)
BAD = {
    "no array": lambda path: np.savez(path, poses=POINTS),
    "points": lambda path: np.savez(path, pose=POINTS[:, :50]),
    "flat": lambda path: np.savez(path, pose=POINTS[..., 0]),
    "text": lambda path: np.savez(path, pose=np.full((4, 133, 3), "a")),
    "objects": lambda path: np.savez(path, pose=np.array([{}], object)),
    "rate": lambda path: np.savez(path, pose=POINTS, fps=0.0),
    "no rows": lambda path: np.savez(path, pose=POINTS[:0]),
    "not a zip": lambda path: path.write_bytes(b"PK\3\4 no"),
}
BAD_JSON = {
    "not JSON": "{",
    "a number": "3",
    "no frames": "[]",
    "no people": '[{"frame": 1}]',
    "few points": '[{"instances": [{"keypoints": [[1, 2]], "keypoint_scores": [1]}]}]',
    "deep": "[" * 100_000,
    "too large a number": f'[{{"instances": [{{"keypoints": [[1{"0" * 400}, 2]], "keypoint_scores": [1]}}]}}]',
    "metadata": '{"title": "a dance", "duration": 3}',
}


@pytest.mark.parametrize("name", [*BAD, *BAD_JSON])
def test_what_holds_no_poses_is_said_in_one_line(name, tmp_path):
    path = tmp_path / ("x.pose.npz" if name in BAD else "x.pose.json")
    BAD[name](path) if name in BAD else path.write_text(BAD_JSON[name])
    with pytest.raises(VideoError) as error:
        posefile.read(path, HEIGHT, WIDTH, LIMITS)
    assert error.value.reason == "bad_pose" and "\n" not in str(error.value) and str(error.value).startswith("x.pose.")


def test_of_several_people_the_foremost_is_followed_and_what_is_not_finite_is_not_seen(tmp_path):
    values = wholebodies.mmpose(POINTS, HEIGHT, WIDTH)
    for frame in values["instance_info"][2:]:
        frame["instances"].reverse()
    values["instance_info"][3]["instances"] = []
    values["instance_info"][0]["instances"][1]["keypoints"][100] = [float("nan"), 3]
    (tmp_path / "x.pose.json").write_text(json.dumps(values))
    found = posefile.read(tmp_path / "x.pose.json", HEIGHT, WIDTH, LIMITS)
    np.testing.assert_allclose(found.points[1:3], POINTS[1:3], atol=1e-5)
    assert np.isnan(found.points[0, 100, :2]).all() and found.points[0, 100, 2] == 0
    assert np.isnan(found.points[3, :, :2]).all() and not found.crowded.any()
    with pytest.raises(VideoError, match="more than are read"):
        posefile.read(tmp_path / "x.pose.json", HEIGHT, WIDTH, Limits(max_decoded_bytes=1000))


@pytest.mark.parametrize(("rate", "fps", "frames"), [(30, 10, 7), (10, 30, 40), (25, 12, 9), (12, 12, 12)])
def test_each_clip_frame_gets_the_row_nearest_in_time(rate, fps, frames):
    rows = int(np.ceil(frames / fps * rate))
    points = np.zeros((rows, 33, 3), np.float32) + np.arange(rows, dtype=np.float32)[:, None, None]
    poses = posefile.Poses(points, rate, np.zeros(rows, bool))
    found, _ = posefile.at_frames(poses, frames, fps, 99)
    off = found[:, 0, 0] / rate - np.arange(frames) / fps
    assert np.abs(off).max() <= 0.5 / rate + 1e-6
    found, _ = posefile.at_frames(poses, frames + fps // 3, fps, 99)
    assert np.isnan(found[-1, :, :2]).all() and (found[-1, :, 2] == 0).all(), "beyond the last row there is nobody"
