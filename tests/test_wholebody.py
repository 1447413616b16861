"""Whole-body poses: two layouts, files beside videos, and shards that keep either."""

import json
import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from entprog import config
from entprog.config import ClipShape
from entprog.data import clip_stream, shards
from entprog.media import footage, h264, posefile, wholebody
from entprog.media.limits import LIMITS, Limits
from entprog.media.video import VideoError
from entprog.preparing import beside, cutting, inputs, ledger, probing
from helpers import wholebodies
from pipelines import prepare
from pipelines.generating import protocol
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
    assert beside.bad_poses(found.rows, config.Prepare()) == []
    rows = cut(folder, tmp_path)
    assert {name: row["points"] for name, row in rows.items() if not row["reason"]} == {"a": 133, "b": 133, "c": 33}
    (line,) = json.loads((tmp_path / "bad.json").read_text())["ledger"]
    assert line["reason"] == "bad_pose" and line["message"].startswith("3 poses, the video has 14 frames: without")
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


def test_pixels_of_mmpose_are_those_that_are_stored(tmp_path):
    """OpenCV, with which it reads, makes none square."""
    points, high, wide = wholebodies.moving(14), 96, 128
    with av.open(tmp_path / "a.mp4", "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"bf": "0"})
        stream.width, stream.height, stream.pix_fmt = wide, high, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(2)
        for image in wholebodies.pictures(points, high, wide):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image)))
        container.mux(stream.encode(None))
    (tmp_path / "a.pose.json").write_text(json.dumps(wholebodies.mmpose(points, high, wide)))
    row = cut(tmp_path, tmp_path)["a"]
    assert (row["source_width"], row["source_height"]) == (256, 96)
    found = np.frombuffer(row["track"], np.float32).reshape(-1, 133, 3)
    np.testing.assert_allclose(found[:14], points, atol=1e-5)


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
        entry = packing.pack({"plan": json.dumps(plan)}, tmp_path, shape)
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
    "pixels": lambda path: np.savez(path, pose=POINTS * [WIDTH, HEIGHT, 1]),
    "pixels of some": lambda path: np.savez(path, pose=np.concatenate([POINTS[:1], POINTS[1:] * [640, 480, 1]])),
    "pixels of a body": lambda path: np.savez(path, pose=wholebody.body(POINTS) * [1920, 1080, 1], fps=9),
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
    "OpenPose": '{"version": 1.3, "people": [{"pose_keypoints_2d": [1, 2, 1]}]}',
}


@pytest.mark.parametrize("name", [*BAD, *BAD_JSON])
def test_what_holds_no_poses_is_said_in_one_line(name, tmp_path):
    path = tmp_path / ("x.pose.npz" if name in BAD else "x.pose.json")
    BAD[name](path) if name in BAD else path.write_text(BAD_JSON[name])
    with pytest.raises(VideoError) as error:
        posefile.read(path, HEIGHT, WIDTH, LIMITS)
    said = str(error.value)
    assert error.value.reason == "bad_pose" and "\n" not in said and said.startswith("x.pose.")
    assert ("OpenPose's `people` are not read" in said) == (name == "OpenPose")
    assert ("predictions of MMPose" in said) == (name in ("OpenPose", "metadata"))
    assert [*beside.bad_poses([{"poses": b""}, {"poses": bytes(path)}], config.Prepare())] == [
        f"{said}: videos with such poses are rejected (bad_pose)"
    ]


def followed(poses: posefile.Poses) -> tuple[np.ndarray, np.ndarray]:
    """Who is followed through all rows, and where others are too."""
    return posefile.foremost(poses, np.arange(len(poses.people)))


def test_of_several_people_the_foremost_is_followed_and_what_is_not_finite_is_not_seen(tmp_path):
    values = wholebodies.mmpose(POINTS, HEIGHT, WIDTH)
    for frame in values["instance_info"][2:]:
        frame["instances"].reverse()
    values["instance_info"][3]["instances"] = []
    values["instance_info"][0]["instances"][1]["keypoints"][100] = [float("nan"), 3]
    (tmp_path / "x.pose.json").write_text(json.dumps(values))
    points, crowded = followed(posefile.read(tmp_path / "x.pose.json", HEIGHT, WIDTH, LIMITS))
    np.testing.assert_allclose(points[1:3], POINTS[1:3], atol=1e-5)
    assert np.isnan(points[0, 100, :2]).all() and points[0, 100, 2] == 0
    assert np.isnan(points[3, :, :2]).all() and not crowded.any()
    with pytest.raises(VideoError, match=r"MiB to read, more than .* times 4"):
        posefile.read(tmp_path / "x.pose.json", HEIGHT, WIDTH, Limits(max_decoded_bytes=1000))


def two_people(path, missing):
    """MMPose's file of a large person on the left, who is missing in some of 32 frames, and a smaller one beside."""
    body = wholebodies.standing()[:, :2]
    large, small = body * (500, 700) + (0, 10), body * (260, 360) + (900, 300)
    frames = [[small] if i in missing else [large, small] for i in range(32)]
    lists = [[{"keypoints": one.tolist(), "keypoint_scores": [0.9] * 133} for one in people] for people in frames]
    path.write_text(json.dumps([{"instances": people} for people in lists]))
    return posefile.read(path, 720, 1280, LIMITS)


@pytest.mark.parametrize(
    ("missing", "rows", "lost", "of_the_small_one"),
    [
        ([9], range(32), [9], []),
        (range(9, 32), range(32), range(9, 19), range(19, 32)),
        (range(9, 32), [0, 4, 8, 20, 24], [3], [4]),  # the rows of nobody lie between those that are wanted
        (range(9, 12), range(0, 32, 4), [], []),
    ],
)
def test_nobody_else_goes_on_in_the_place_of_who_is_followed(missing, rows, lost, of_the_small_one, tmp_path):
    poses = two_people(tmp_path / "x.pose.json", missing)
    points, _ = posefile.at_frames(poses, len(rows), 1, (np.array(rows), 32))
    found = np.isfinite(points).all((1, 2))
    assert np.flatnonzero(~found).tolist() == list(lost)
    at_the_right = points[:, wholebody.BODY, 0].mean(1) > 0.5
    assert np.flatnonzero(found & at_the_right).tolist() == list(of_the_small_one)


def test_a_new_shot_begins_with_whoever_is_there(tmp_path):
    poses = two_people(tmp_path / "x.pose.json", range(9, 32))
    for rows, cut in ((range(32), 9), (range(0, 32, 4), 3)):
        points, _ = posefile.at_frames(poses, len(rows), 1, (np.array(rows), 32), [cut])
        assert np.isfinite(points).all(), "no frame is lost where the picture cuts to another person"


@pytest.mark.parametrize(("rate", "fps", "frames"), [(30, 10, 7), (10, 30, 40), (25, 12, 9), (12, 12, 12)])
def test_each_clip_frame_gets_the_row_nearest_in_time(rate, fps, frames):
    rows = int(np.ceil(frames / fps * rate))
    points = np.zeros((rows, 33, 3), np.float32) + np.arange(rows, dtype=np.float32)[:, None, None]
    poses = posefile.Poses(points[:, None], rate)
    found, _ = posefile.at_frames(poses, frames, fps, None)
    off = found[:, 0, 0] / rate - np.arange(frames) / fps
    assert np.abs(off).max() <= 0.5 / rate + 1e-6
    found, _ = posefile.at_frames(poses, frames + fps // 3, fps, None)
    assert np.isnan(found[-1, :, :2]).all() and (found[-1, :, 2] == 0).all(), "beyond the last row there is nobody"


def test_what_leaves_the_picture_is_no_pixel(tmp_path):
    points = POINTS.copy()
    points[:, :60, :2] += 3  # of 133
    points[:, 60:, 1] += 0.7
    hidden = np.where(np.arange(133)[:, None] < 100, [500.0, 500.0, 0.0], POINTS).astype(np.float32)
    for poses in (points, hidden):
        np.savez(tmp_path / "x.pose.npz", pose=poses)
        points, _ = followed(posefile.read(tmp_path / "x.pose.npz", HEIGHT, WIDTH, LIMITS))
        np.testing.assert_array_equal(points, poses)
    np.savez(tmp_path / "x.pose.npz", pose=POINTS * [WIDTH, HEIGHT, 1])
    with pytest.raises(VideoError, match=r"x and y must be in 0\.\.1 of the picture; these go up to 1[67]\d"):
        posefile.read(tmp_path / "x.pose.npz", HEIGHT, WIDTH, LIMITS)


def ghost(scores: float, size: float = 3.0, nan: str = "") -> dict:
    """A person of MMPose's who is larger than the real one."""
    pixels, sure = POINTS[0, :, :2] * (WIDTH, HEIGHT) * size, np.full(133, scores)
    if nan:
        pixels[: 17 if nan == "body" else 5] = np.nan
    return {"keypoints": pixels.tolist(), "keypoint_scores": sure.tolist()}


@pytest.mark.parametrize("other", [ghost(0.0), ghost(0.2), ghost(0.9, nan="body"), ghost(np.nan)])
def test_who_is_a_guess_is_nobody(other, tmp_path):
    values = wholebodies.mmpose(POINTS, HEIGHT, WIDTH)
    for frame in values["instance_info"]:
        frame["instances"].append(other)
    (tmp_path / "x.pose.json").write_text(json.dumps(values))
    points, crowded = followed(posefile.read(tmp_path / "x.pose.json", HEIGHT, WIDTH, LIMITS))
    np.testing.assert_allclose(points, POINTS, atol=1e-5)
    assert not crowded.any()


def test_a_person_some_of_whose_points_are_not_known_is_one(tmp_path):
    values = wholebodies.mmpose(POINTS, HEIGHT, WIDTH)
    for frame in values["instance_info"]:
        frame["instances"][1]["keypoints"][9] = [float("nan"), float("nan")]
        frame["instances"].append(ghost(0.9, 0.9))
    (tmp_path / "x.pose.json").write_text(json.dumps(values))
    points, crowded = followed(posefile.read(tmp_path / "x.pose.json", HEIGHT, WIDTH, LIMITS))
    assert np.isnan(points[:, 9, :2]).all() and crowded.all()
    np.testing.assert_allclose(points[:, 0], POINTS[:, 0], atol=1e-5)


def test_json_of_ten_minutes_is_read_by_default_and_what_unpacks_to_more_is_not(tmp_path, monkeypatch):
    """Both in small: a hundredth of the time in a hundredth of the room."""
    rng, room = np.random.default_rng(0), Limits(max_decoded_bytes=LIMITS.max_decoded_bytes // 100)
    whole = np.repeat(wholebodies.moving(2), 90, axis=0) + rng.normal(0, 1e-4, (180, 133, 3))  # 6 s at 30 fps
    values = wholebodies.mmpose(whole, 1080, 1920)
    for frame in values["instance_info"]:
        del frame["instances"][0]
    path = tmp_path / "x.pose.json"
    path.write_text(json.dumps(values))
    assert path.stat().st_size > 1e6 and len(posefile.read(path, 1080, 1920, room).people) == 180
    most = 4 * room.max_decoded_bytes
    hostile = (
        "[" + "[]," * (most // 100) + "[]]",
        "[" + '{"a":1},' * (most // 300) + "{}]",
        "[" + "1.5," * (most // 40),
    )
    monkeypatch.setattr(json, "loads", lambda text: pytest.fail("it was unpacked"))
    for text in (*hostile, '["' + "a" * (most // 8) + "\U0001f600" + '"]'):
        assert len(text) < most
        path.write_text(text)
        with pytest.raises(VideoError, match=r"MiB to read, more than 10\.2 .* save the poses as \.pose\.npz"):
            posefile.read(path, 1080, 1920, room)


# ---- which row is which frame's ----


def timed(path: Path, times_ms: list[int], size=(48, 32)) -> Path:
    """A video whose frames stand at these times, each one of another grey."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=1000)
        stream.height, stream.width = size
        stream.pix_fmt, stream.codec_context.time_base = "yuv420p", Fraction(1, 1000)
        for number, time_ms in enumerate(times_ms):
            frame = av.VideoFrame.from_ndarray(np.full((*size, 3), 20 + 10 * number, np.uint8))
            frame.pts, frame.time_base = time_ms, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


UNEVEN = {
    "a phone's": [0, 33, 67, 100, 400, 433, 467, 500, 900, 933, 967, 1000],
    "slower and slower": [0, 10, 30, 70, 150, 310, 630, 1000],
    "even": [100 * i for i in range(11)],
    "a gap": [0, 40, 80, 120, 1000],
}


@pytest.mark.parametrize("times_ms", UNEVEN.values(), ids=UNEVEN)
@pytest.mark.parametrize("fps", [10, 24])
def test_without_a_rate_a_row_is_a_frame_wherever_that_stands_in_time(times_ms, fps, tmp_path):
    source = footage.footage(timed(tmp_path / "a.mkv", times_ms), 0, "", config.Prepare())
    pictures = [int(picture.mean()) for picture in footage.pictures(source, fps)]
    numbers, there = footage.numbers(source, len(pictures), fps, lambda frames: frames)
    assert there == len(times_ms) and np.abs(20 + 10 * numbers - pictures).max() <= 3, "the pictures' own frames"
    points = np.zeros((there, 33, 3), np.float32) + np.arange(there, dtype=np.float32)[:, None, None]
    for rows in (there - 1, there, there + 1):
        poses = posefile.Poses((points if rows <= there else np.repeat(points, 2, 0))[:rows, None], None)
        if rows == there:
            track, _ = posefile.at_frames(poses, len(pictures), fps, (numbers, there))
            assert np.array_equal(track[:, 0, 0], numbers)
            continue
        with pytest.raises(VideoError, match=rf"{rows} poses, the video has {there} frames") as error:
            posefile.at_frames(poses, len(pictures), fps, (numbers, there))
        assert error.value.reason == "bad_pose"


def test_of_a_folder_of_images_a_row_is_an_image(tmp_path):
    for number in range(7):
        Image.new("RGB", (32, 48), (20 + 10 * number,) * 3).save(tmp_path / f"{number:03d}.png")
    source = footage.footage(tmp_path, 7.5, "", config.Prepare())
    pictures = [int(picture.mean()) for picture in footage.pictures(source, 12)]
    numbers, there = footage.numbers(source, len(pictures), 12, lambda frames: frames)
    assert there == 7 and np.array_equal(20 + 10 * numbers, pictures)


# ---- what else lies in the folder, and what changes ----


def test_only_videos_without_poses_need_an_estimator(folder, tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a.mp4", "a.pose.npz"):
        (tmp_path / "in" / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "in" / "notes.md").write_text("# notes")
    settings = config.build({"data": {"shape": SHAPE}}, config.Preparation)
    rows = inputs.find(tmp_path / "in").rows
    assert not prepare.needs_estimator(rows)
    (tmp_path / "parts").mkdir()
    rows = cut(tmp_path / "in", tmp_path / "parts")
    assert rows["notes"]["reason"] == "not_a_video" and not rows["a"]["reason"]
    (tmp_path / "in" / "a.pose.npz").unlink()
    assert prepare.needs_estimator(inputs.find(tmp_path / "in").rows)
    track = cutting.Track(settings)
    track({**rows["a"], "poses": b"", "reason": "corrupt"})
    assert "estimator" not in vars(track), "nor one that is rejected already"


def test_of_two_files_of_poses_one_is_read_and_neither_is_a_source(folder, tmp_path):
    for name in ("a.mp4", "a.pose.npz"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "a.pose.json").write_bytes((folder / "b.pose.json").read_bytes())
    found = inputs.find(tmp_path)
    (tmp_path / "a_000_keypoints.json").touch()
    assert any("1 file of OpenPose (a_000_keypoints.json) not read" in note for note in inputs.find(tmp_path).notes)
    assert [row["file"] for row in found.rows] == ["a.mp4"]
    assert (
        found.rows[0]["poses"].endswith(b"a.pose.npz")
        and found.notes[1] == "1 video with both (a.mp4): .pose.npz is read"
    )


def test_a_touched_file_of_poses_is_the_same_and_one_replaced_meanwhile_is_noticed(folder, tmp_path):
    for name in ("a.mp4", "a.pose.npz"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (row,) = inputs.find(tmp_path).rows
    os.utime(tmp_path / "a.pose.npz", (1, 1))
    assert ledger.stamp(inputs.find(tmp_path).rows[0]) == ledger.stamp(row)
    settings = config.build({"data": {"shape": SHAPE}}, config.Preparation)
    looked = probing.cut_shots(probing.probe(row, settings), settings)
    assert not cutting.Track(settings)(looked)["reason"]
    np.savez(tmp_path / "a.pose.npz", pose=wholebodies.moving(14)[::-1])
    found = cutting.Track(settings)(looked)
    assert found["reason"] == "changed" and "a.pose.npz" in found["message"]


def test_parts_and_cards_say_where_poses_come_from(folder, tmp_path):
    cut(folder, tmp_path)
    records = [packing.read_part(tmp_path, name) for name in "abc"]
    assert packing.made_by(records) == [cutting.FILES]
    assert packing.made_by([*records, {"poses": "rtmlib"}, None, {}], ["blazepose"]) == [
        "blazepose",
        cutting.FILES,
        "rtmlib",
    ]

    def said(name, made_by, pose="blazepose"):
        return protocol.judged(name, config.Evaluation(), {"pose": pose}, made_by)

    for name in ("pck", "hand_distance"):
        assert said(name, [cutting.FILES], "rtmlib").endswith("wanted pose by files beside the videos")
        assert said(name, ["rtmlib", cutting.FILES]).endswith("wanted pose by rtmlib and files beside the videos")
    assert said("hand_distance", (), "rtmlib").endswith("by rtmlib") and said("pck", ()).endswith("by blazepose")


def test_parts_of_nodes_that_differ_are_said(folder, tmp_path):
    cut(folder, tmp_path)
    records = [packing.read_part(tmp_path, name) for name in "abc"]
    assert records[0]["versions"]["av"] == av.__version__ and {"entprog", "pillow"} <= records[0]["versions"].keys()
    earlier = {key: value for key, value in records[0].items() if key != "versions"}
    assert packing.other_versions([*records, None, earlier]) is None
    other = {**records[0], "versions": records[0]["versions"] | {"av": "9.0.0"}}
    said = packing.other_versions([*records, other])
    assert said.startswith(
        f"clips were cut with different versions: av {av.__version__} (3 videos), 9.0.0 (1 videos): the same video"
    )
    assert packing.slower([*records, None, earlier], FPS) is None
    of_slow = packing.slower([*records, {**records[1], "source_fps": FPS / 2}], FPS)
    assert of_slow.startswith(
        f"1 video with fewer frames a second than clips have, {FPS:g} (b.mp4 {FPS / 2:g}): frames"
    )
    assert packing.slower(records, 2 * FPS).startswith("3 videos")
    del other["versions"]["ai-edge-litert"]
    assert "ai-edge-litert" in packing.other_versions([*records, other])


def test_parts_of_rtmlib_s_earlier_layout_are_done_anew(folder):
    rows, keys = inputs.find(folder).rows, {}
    for pose in ("blazepose", "rtmlib"):
        settings = config.build({"data": {"shape": SHAPE}, "prepare": {"pose": pose}}, config.Preparation)
        same = config.digest(packing.cut_settings(settings), shards.FORMAT, cutting.READING)
        keys[pose] = {row["file"]: config.digest(row["file"], ledger.stamp(row), same) for row in rows}
        assert (packing.part_keys(rows, settings) == keys[pose]) == (pose == "blazepose")
