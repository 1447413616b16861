"""What generate takes from a person's files: pictures, poses and driving videos, of any size and kind."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from diffusers import AutoencoderKLWan
from PIL import Image

from entprog.config import ClipShape, Generate, Generation, Prepare
from entprog.data import shards
from entprog.errors import UserError
from entprog.media import assets, h264, video
from helpers import families, real_clips, wholebodies
from pipelines.generating import driving, judging, motions, rendering, retargeting
from pipelines.preparing import contact_sheet

SHAPE = ClipShape(frames=5, height=48, width=32, fps=10)
CROP = Generation().prepare


def test_every_file_of_a_folder_is_taken_or_named(tmp_path, capsys):
    taken = ["a.mp4", "b.M4V", "c.gif", "d.webm", "e.mpg"]
    for name in [*taken, "notes.txt", "f.jpg", "no ending", ".hidden.mp4"]:
        (tmp_path / name).touch()
    (tmp_path / "folder.mp4").mkdir()
    found, others = motions.files(tmp_path, motions.VIDEOS, "--video")
    assert [path.name for path in found] == taken
    assert {Path(name).name for name in others} == {"notes.txt", "f.jpg", "no ending", "folder.mp4"}
    assert "4 in" in capsys.readouterr().out
    assert [path.name for path in motions.files(tmp_path, motions.PICTURES, "--reference")[0]] == ["c.gif", "f.jpg"]
    for given, message in ((tmp_path / "folder.mp4", "no file in the folder"), (tmp_path / "none.mp4", "no such file")):
        with pytest.raises(UserError, match=message):
            motions.files(given, motions.VIDEOS, "--video")


def test_a_clip_of_the_datasets_shape_is_read_whatever_it_takes(tmp_path, monkeypatch):
    """What is due is no clip that claims more than it holds, and the contact sheet decodes what it shows."""
    shape = SHAPE.model_copy(update={"frames": 12})
    row = real_clips.row("jump", "train", 0.0, shape)
    dataset = real_clips.write(tmp_path, {"train": [[row]], "held_out": []}, shape)
    monkeypatch.setattr(h264, "MOST_BYTES", 8 * 48 * 32 * 3 - 1)
    contact_sheet.of_dataset(tmp_path, dataset)
    assert (tmp_path / "contact_sheet.png").exists()
    read = motions.from_row(tmp_path / "train" / "00000.parquet", 0, shape)
    assert np.array_equal(read.video, h264.decode_rgb(row["video"], range(12), (48, 32)))
    assert np.array_equal(read.video[[0, 5, 9]], h264.decode_rgb(row["video"], [0, 5, 9], (48, 32)))
    with pytest.raises(video.VideoError, match="MiB are not taken"):
        h264.decode_rgb(row["video"])


def test_inputs_of_one_stem_have_names_of_their_own(tmp_path):
    paths = [tmp_path / name for name in ("dance.mp4", "dance.mov", "walk.mp4")]
    called = motions.names(paths)
    assert list(called.values()) == ["dance.mp4", "dance.mov", "walk"]
    who = dict.fromkeys([tmp_path / "me.png", tmp_path / "me.jpg"], np.zeros((4, 4, 3), np.uint8))
    made = motions.pairs(who, [(called[path], np.zeros((5, 33, 3)), None) for path in paths])
    assert len({motion.name for motion in made}) == 6 and made[0].name == "me.png as dance.mp4"


def test_several_people_are_told(tmp_path, capsys):
    size = (480, 272)
    people = [
        [frame for _, frame in video.iter_frames(assets.clip(name), fps=10, end_s=0.6, size=size)]
        for name in ("cam04", "cam01")
    ]
    both = [np.concatenate(pair, 1) for pair in zip(*people, strict=True)]
    h264.write(tmp_path / "both.mp4", both, fps=10)
    h264.write(tmp_path / "one.mp4", people[0], fps=10)
    Image.fromarray(both[0]).save(tmp_path / "both.png")
    points, cut = driving.clip(tmp_path / "both.mp4", SHAPE, CROP)
    assert points.shape == (5, 33, 3) and cut.shape == (5, 48, 32, 3)
    assert "several people are in" in capsys.readouterr().out
    motions.reference_image(tmp_path / "both.png", SHAPE, CROP)
    assert "several people are in" in capsys.readouterr().out
    driving.clip(tmp_path / "one.mp4", SHAPE, CROP)
    said = capsys.readouterr().out
    assert "several" not in said and "visible" not in said
    driving.clip(assets.clip("woman"), SHAPE, CROP)
    assert "of the body's points are visible in" in capsys.readouterr().out


def test_a_retargeting_by_far_is_told(capsys):
    pose = wholebodies.moving(SHAPE.frames)
    motion = motions.Motion("one", np.zeros((48, 32, 3), np.uint8), pose, None)
    small = pose[0] * [0.1, 0.1, 1]
    for own, told in ((pose[0], False), (small, True)):
        retargeting.retargeted([motion], [own])
        assert ("more than 4 times as large in one of them" in capsys.readouterr().out) == told


@pytest.mark.parametrize("ending", [".png", ".webp", ".tif"])
def test_a_cut_out_reference_does_not_show_its_hidden_colours(ending, tmp_path):
    picture = np.zeros((48, 32, 4), np.uint8)
    picture[..., 0] = 255  # red everywhere, of which only a square is to be seen
    picture[10:20, 10:20, 3] = 255
    Image.fromarray(picture).save(tmp_path / f"me{ending}", **({"lossless": True} if ending == ".webp" else {}))
    who = motions.reference_image(tmp_path / f"me{ending}", SHAPE, CROP)
    assert (who[0, 0] == 255).all() and who[15, 15].tolist() == [255, 0, 0]


def test_a_reference_is_one_of_the_kinds_that_are_read(tmp_path):
    (tmp_path / "me.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 48\n(x) run\n")
    with pytest.raises(UserError, match=r"cannot read .* as a picture: .*no picture of a kind that is read"):
        motions.reference_image(tmp_path / "me.png", SHAPE, CROP)


def test_small_files_that_unpack_to_much_are_refused(tmp_path):
    small = Prepare(max_pixels=500_000, max_decoded_bytes=2**20)
    Image.new("1", (4000, 4000)).save(tmp_path / "wide.png")
    with pytest.raises(UserError, match=r"--reference: .*more than 500000 pixels"):
        motions.reference_image(tmp_path / "wide.png", SHAPE, small)
    np.savez_compressed(tmp_path / "long.npz", pose=np.zeros((20_000, 33, 3), np.float32))
    assert (tmp_path / "long.npz").stat().st_size < 20_000
    with pytest.raises(UserError, match=r"--pose: .*max_decoded_bytes"):
        motions.read_pose(tmp_path / "long.npz", SHAPE, small)
    h264.write(tmp_path / "wide.mp4", [np.zeros((800, 800, 3), np.uint8)] * 5, fps=10)
    with pytest.raises(UserError, match=r"--video: .*500000 pixels|--video: .*larger than is read"):
        driving.clip(tmp_path / "wide.mp4", SHAPE, small)


def test_two_frames_a_year_apart_are_no_driving_video(tmp_path):
    with av.open(str(tmp_path / "year.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"threads": "1"})
        stream.width, stream.height, stream.pix_fmt, stream.time_base = 64, 48, "yuv420p", Fraction(1, 10)
        for i, pts in enumerate((0, 365 * 24 * 3600 * 10)):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 90 * i, np.uint8), format="rgb24")
            frame.pts, frame.time_base = pts, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(UserError, match=r"--video: .*(stands still|not read)"):
        driving.clip(tmp_path / "year.mkv", SHAPE, CROP, most=float("inf"))


def test_a_pose_sequence_as_npz_and_as_npy(tmp_path):
    points = np.random.default_rng(0).random((9, 33, 3))
    np.save(tmp_path / "one.npy", points)
    np.savez(tmp_path / "one.npz", pose=points)
    one, other = (motions.read_pose(tmp_path / f"one.{kind}", SHAPE, CROP) for kind in ("npy", "npz"))
    assert one.shape == (5, 33, 3) and one.dtype == np.float32 and np.array_equal(one, other)


@pytest.mark.parametrize(("rate", "rows"), [(30, 30), (5, 5), (12.5, 14), (10, 9)])
def test_a_pose_sequence_of_another_rate_is_brought_to_the_clip_s(rate, rows, tmp_path):
    points = np.zeros((rows, 33, 3)) + np.arange(rows)[:, None, None] / 100
    points[..., 2] = 1
    np.savez(tmp_path / "a.npz", pose=points, fps=rate)
    found = motions.read_pose(tmp_path / "a.npz", SHAPE, CROP, start_s=0.2, most=float("inf"))
    at = 0.2 + np.arange(len(found)) / SHAPE.fps
    assert len(found) == np.ceil(rows * SHAPE.fps / rate - 1e-9) - 2
    seen = np.minimum(at, (rows - 1) / rate)
    assert np.abs(found[:, 0, 0] * 100 / rate - seen).max() <= 0.5 / rate + 1e-6
    assert len(motions.read_pose(tmp_path / "a.npz", SHAPE, CROP)) == SHAPE.frames
    with pytest.raises(UserError, match=rf"has {len(found) + 2} frames, a clip from 9 s on needs"):
        motions.read_pose(tmp_path / "a.npz", SHAPE, CROP, start_s=9)


@pytest.mark.parametrize("shown", [(np.nan, np.nan, np.nan), (np.nan, np.nan, 1.0), (0.5, 0.5, 0.0)])
def test_a_pose_sequence_that_shows_nobody_is_refused(shown, tmp_path):
    points = np.zeros((9, 33, 3)) + shown
    np.save(tmp_path / "a.npy", points)
    with pytest.raises(UserError, match=r"--pose: .*a\.npy shows nobody in 5 frames"):
        motions.read_pose(tmp_path / "a.npy", SHAPE, CROP)
    points[4, 0] = 0.5, 0.5, 1
    np.save(tmp_path / "a.npy", points)
    assert len(motions.read_pose(tmp_path / "a.npy", SHAPE, CROP)) == 5


@pytest.mark.parametrize("wrong", [{"fps": 0.0}, {"fps": "ten"}, {"pose": np.ones((9, 133, 3)) * 480}])
def test_a_pose_sequence_of_no_rate_or_in_pixels_is_one_line(wrong, tmp_path):
    np.savez(tmp_path / "a.npz", **{"pose": np.ones((9, 133, 3)), **wrong})
    with pytest.raises(UserError, match=r"--pose: .*a\.npz: (`fps` is no number|x and y must be in 0\.\.1)") as error:
        motions.read_pose(tmp_path / "a.npz", SHAPE, CROP)
    assert "\n" not in str(error.value)
    np.savez(tmp_path / "a.npz", pose=np.ones((9, 33, 3)), fps=1e-300)
    assert len(motions.read_pose(tmp_path / "a.npz", SHAPE, CROP)) == SHAPE.frames, (
        "none of it is held that is not asked for"
    )


@pytest.mark.parametrize("lie", [{"frames": 4}, {"frames": 9}, {"height": 32}, {"width": 64}])
def test_a_shard_s_clip_of_another_shape_is_not_decoded(lie, tmp_path):
    """What a data set says of its clips bounds what one of them may take."""
    shards.write_shard(tmp_path, "0.parquet", [real_clips.row("cam01", "train", 0.0, SHAPE)], SHAPE)
    assert motions.from_row(tmp_path / "0.parquet", 0, SHAPE).video.shape == (5, 48, 32, 3)
    with pytest.raises(shards.DamagedShardError, match=r"0.parquet, row 0: .*prepare it again"):
        motions.from_row(tmp_path / "0.parquet", 0, SHAPE.model_copy(update=lie))


def test_a_given_clip_is_read_no_further_than_it_is_due(tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (40, 48, 32, 3), np.uint8)
    long = h264.write(tmp_path / "long.mp4", frames, fps=10)
    with pytest.raises(UserError, match="is 6 frames of 32x48 or more, its truth 5 frames of 32x48"):
        judging.read_result(long, (5, 48, 32, 3))
    large = h264.write(tmp_path / "large.mp4", np.zeros((2, 1600, 1600, 3), np.uint8), fps=10)
    with pytest.raises(UserError, match="frames of 1600x1600, more than"):
        judging.read_result(large, (2, 48, 32, 3))


def test_driving_videos_share_the_room_for_frames(tmp_path, capsys):
    settings = Generation.model_validate({"generate": {"max_bytes": 7 * 3 * 48 * 32}}).generate
    room = motions.Room(settings, SHAPE)
    assert room.limited(np.inf, tmp_path / "a.mp4") == 7 and room.limited(5, tmp_path / "a.mp4") == 5
    room.take(6, np.inf, tmp_path / "a.mp4")  # it ended by itself
    assert not capsys.readouterr().out
    with pytest.raises(UserError, match=r"b.mp4: no room for 5 frames of 32x48, 1 more fit"):
        room.limited(np.inf, tmp_path / "b.mp4")


def unjoined(base_dim=8):
    """A Wan VAE whose latents are single frames: it still takes four of them at a time."""
    return AutoencoderKLWan(
        base_dim=base_dim, z_dim=4, num_res_blocks=1, dim_mult=[1, 2], temperal_downsample=[False],
        scale_factor_temporal=1, scale_factor_spatial=2, latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "vae", "frames", "wanted"),
    [
        ("wan", "none", 12, 12),
        ("wan", "its", 12, 9),
        ("wan", "its", 13, 13),
        ("wan", "unjoined", 12, 9),
        ("wan", "unjoined", 8, 5),
        ("cogvideox", "its", 16, 9),
        ("motion_unet", "its", 12, 12),
    ],
)
def test_a_motion_is_cut_to_what_its_vae_takes(tmp_path, name, vae, frames, wanted):
    """Its conditions then have as many latent frames as the clip, and every frame that is asked for is drawn."""
    kind, configuration = families.TINY[name]["vae"]
    if vae != "none":
        (unjoined() if vae == "unjoined" else kind(**configuration)).save_pretrained(tmp_path / "vae")
    denoiser = families.load(name, vae="none" if vae == "none" else str(tmp_path / "vae"))
    shape = ClipShape(frames=9 if name == "cogvideox" else 5, height=32, width=32, fps=10)
    video = np.zeros((frames, shape.height, shape.width, 3), np.uint8)
    motion = motions.Motion("long", video[0], np.zeros((frames, 33, 3), np.float32), video)
    cut = rendering.fitting(denoiser, motion, shape)
    assert len(cut.pose) == len(cut.video) == wanted
    made = rendering.make(denoiser, [cut], shape, Generate(steps=1))
    assert made.shape == (1, wanted, shape.height, shape.width, 3)
    denoiser.check(shape.model_copy(update={"frames": wanted}))
