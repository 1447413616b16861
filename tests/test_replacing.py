"""A person who is put into a video (`generate --mask`): what of it the network sees, and what is refused."""

import json
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from entprog.config import ClipShape, Model, Prepare
from entprog.errors import UserError
from entprog.media import assets, h264, video
from entprog.models import wan_animate
from helpers import bases, wholebodies
from pipelines import generate
from pipelines.generating import driving, replacing

SHAPE = ClipShape(frames=9, height=64, width=64, fps=12)
SPAN = {"shape": SHAPE, "crop": Prepare(), "start_s": 0.0}


def scene_of(path, height, width, box, frames=12):
    """A mask and a plate in files: the mask is white inside the box (left, top, width, height)."""
    left, top, wide, high = box
    mask = np.zeros((frames, height, width, 3), np.uint8)
    mask[:, top : top + high, left : left + wide] = 255
    plate = np.full_like(mask, 90)
    plate[:, : height // 2] = 200
    h264.write(path / "mask.mp4", mask, SHAPE.fps)
    h264.write(path / "plate.mp4", plate, SHAPE.fps)
    return path / "mask.mp4", path / "plate.mp4"


def test_what_is_kept_of_a_driving_video_is_cut_out_as_its_person_is(tmp_path):
    source = assets.clip("cam01")
    info = video.probe(source)
    followed = driving.followed(source, **SPAN)
    left, top, wide, high = followed.box
    inner = (left + wide // 4, top + high // 4, wide // 2, high // 2)
    mask, plate = scene_of(tmp_path, info.height, info.width, inner)
    frames = driving.cut_out(source, followed, **SPAN)
    kept = replacing.Scene(mask, None).around(followed.pose, followed, frames, **SPAN)
    wanted = np.zeros((9, 64, 64), bool)
    wanted[:, 16:48, 16:48] = True
    assert (kept["person"] == wanted).mean() > 0.95, "a pixel's width at its edge may differ"
    assert not kept["background"][kept["person"]].any()
    assert (kept["background"] == frames)[~kept["person"]].all()
    other = replacing.Scene(mask, plate).around(followed.pose, followed, frames, **SPAN)["background"]
    first = followed.height // 2 - top  # rows of the box above the plate's edge
    assert other.shape == frames.shape and first > 0
    assert abs(int(other[0, 0, 0, 0]) - 200) < 8


@pytest.mark.parametrize("sizes", [(128, 256), (256, 128)])
def test_a_video_whose_picture_changes_size_is_one_line(sizes, tmp_path):
    path = tmp_path / "both.h264"
    with path.open("wb") as both:  # of such a stream both parts are one
        for side in sizes:
            with av.open(str(tmp_path / "part.h264"), "w") as part:
                stream = part.add_stream("libx264", rate=12)
                stream.width, stream.height, stream.pix_fmt = side, side, "yuv420p"
                for frame in [av.VideoFrame.from_ndarray(np.zeros((side, side, 3), np.uint8), "rgb24")] * 10:
                    part.mux(stream.encode(frame))
                part.mux(stream.encode())
            both.write((tmp_path / "part.h264").read_bytes())
    first = driving.Followed(np.zeros((9, 33, 3), np.float32), (0, 0, sizes[0], sizes[0]), sizes[0], sizes[0])
    for take in (driving.followed, partial(driving.cut_out, of=first)):
        with pytest.raises(UserError, match=r"--video: .*both.h264: its picture changes size at 0\.\d+ s") as error:
            take(path, **SPAN)
        assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a model of Wan-Animate, one of Wan, a pose, a picture, and a scene at the clip's size."""
    folder = tmp_path_factory.mktemp("replacing")
    bases.animate(folder / "base")
    wan_animate.load(Model(family="wan_animate", base=str(folder / "base"))).save(folder / "model", shape=SHAPE)
    np.savez(folder / "pose.npz", pose=wholebodies.moving(12))
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(folder / "me.png")
    scene_of(folder, 128, 128, (32, 32, 64, 64))
    return folder


def command(made, output, *more):
    given = ["--checkpoint", made / "model", "--reference", made / "me.png", "--output", output, "--steps", 1, *more]
    done = CliRunner().invoke(generate.app, [str(value) for value in given])
    return done.exit_code, " ".join(done.output.split())


def test_a_person_is_put_into_a_video_along_a_pose(made, tmp_path):
    pose = ("--pose", made / "pose.npz")
    scene = ("--mask", made / "mask.mp4", "--background", made / "plate.mp4")
    results = []
    for name, more in {"alone": (), "into": scene}.items():
        code, said = command(made, tmp_path / name, *pose, *more)
        assert code == 0, said
        (clip,) = json.loads((tmp_path / name / "result.json").read_text())["clips"]
        results.append(h264.decode_rgb(Path(clip["result"]).read_bytes()))
    assert np.abs(results[0].astype(int) - results[1]).mean() > 1, "what lies around is to make a difference here"
    code, said = command(made, tmp_path / "into", *pose, "--mask", made / "mask.mp4", "--background", made / "mask.mp4")
    assert code == 2 and "--background was" in said, "the output is of another background"


WRONG = {
    "no mask": (("--background", "plate.mp4"), "--background needs --mask"),
    "nothing to keep": (("--mask", "mask.mp4"), "--mask with --pose needs --background too"),
    "no such file": (("--mask", "none.mp4", "--background", "plate.mp4"), "--mask: no such file"),
    "no video": (("--mask", "mask.mp4", "--background", "pose.npz"), "--background: .*pose.npz"),
    "nowhere white": (("--mask", "black.mp4", "--background", "plate.mp4"), "--mask: .* is nowhere white"),
    "too short": (("--mask", "short.mp4", "--background", "plate.mp4"), "--mask: .*short.mp4 has 5 frames"),
    "another aspect": (("--mask", "wide.mp4", "--background", "plate.mp4"), "--mask: .* is 256x128, the clip 64x64"),
}


@pytest.fixture(scope="module")
def wrong(made):
    """More files, of which no scene can be made."""
    for name, (frames, width, level) in {"black": (12, 128, 0), "short": (5, 128, 255), "wide": (12, 256, 255)}.items():
        h264.write(made / f"{name}.mp4", np.full((frames, 128, width, 3), level, np.uint8), SHAPE.fps)
    return made


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_scene_is_one_line(wrong, tmp_path, name):
    options, said = WRONG[name]
    given = [option if option.startswith("--") else wrong / option for option in options]
    code, line = command(wrong, tmp_path / "out", "--pose", wrong / "pose.npz", *given)
    assert code == 2 and line.startswith("error: ") and re.search(said, line), line
    assert not (tmp_path / "out" / "videos").exists()


def test_a_network_without_a_place_for_it_and_motions_of_shards_are_refused():
    able, other = SimpleNamespace(replaces=True, root="able"), SimpleNamespace(replaces=False, root="other")
    mask = moves = Path("mask.mp4")
    with pytest.raises(UserError, match=r"--mask: other has no place for a video that a person is put into"):
        replacing.scene(mask, None, other, moves, driven=True)
    with pytest.raises(UserError, match=r"--mask is of one motion"):
        replacing.scene(mask, None, able, None, driven=False)
    with pytest.raises(UserError, match=r"--mask is of one motion"):
        replacing.scene(mask, None, able, Path(), driven=True)
    assert replacing.scene(None, None, other, None, driven=False) is None
