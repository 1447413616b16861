"""generate, through the real command: tiny checkpoints, real clips."""

import io
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from entprog.config import ClipShape, Generate, Generation, Model
from entprog.data import shards
from entprog.errors import UserError
from entprog.media import assets, drawing, h264, retarget, video
from entprog.models.wan import load
from helpers import bases, encoders, families, wholebodies
from pipelines import generate
from pipelines.generating import checkpoints, driving, motions, protocol, rendering, retargeting
from tests.test_wan import NETWORK

SHAPE = ClipShape(frames=5, height=48, width=32, fps=12)


def command(*arguments, expected=0):
    """Run the job by its command line; its standard output, or standard error when it is to fail."""
    done = CliRunner().invoke(generate.app, list(map(str, arguments)), env={"COLUMNS": "200"})
    assert done.exit_code == expected, done.output
    return done.stderr if expected else done.stdout


def process(*arguments):
    """The command as a person types it."""
    words = [sys.executable, "-m", "pipelines.generate", *map(str, arguments)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def row(number, split="held_out"):
    """A clip of a moving square, and a pose that moves along."""
    frames = np.full((SHAPE.frames, SHAPE.height, SHAPE.width, 3), 60, np.uint8)
    points = np.ones((SHAPE.frames, 33, 3), np.float32)
    points[..., :2] = np.random.default_rng(number).uniform(0.2, 0.8, (33, 2))
    for i in range(SHAPE.frames):
        frames[i, 10 : 30 + number, 2 * i : 2 * i + 12] = (200, 80, 40)
        points[i, :, 0] += i / SHAPE.width
    zeros = dict.fromkeys(("crop_left", "crop_top", "crop_width", "crop_height", "source_height", "source_width"), 0)
    return {
        "clip_id": f"square {number}.mp4#000000",
        "source": f"square {number}.mp4",
        "source_sha256": "",
        "split": split,
        "caption": "",
        "start_s": 0.0,
        "fps": SHAPE.fps,
        "frames": SHAPE.frames,
        "height": SHAPE.height,
        "width": SHAPE.width,
        **zeros,
        "visibility": 1.0,
        "reference_s": 0.0,
        "reference": png(frames[0]),
        "pose": points,
        "video": h264.encode(frames, SHAPE.fps),
    }


def png(image):
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A checkpoint, shards with two held-out clips and one for training, a picture and poses."""
    folder = tmp_path_factory.mktemp("generate")
    load(Model(init=NETWORK, vae="none")).save(folder / "run" / "model", shape=SHAPE)
    held_out = shards.write_shard(folder / "shards", "held_out/0.parquet", [row(0), row(1)], SHAPE)
    train = shards.write_shard(folder / "shards", "train/0.parquet", [row(2, "train")], SHAPE)
    shards.write_dataset(folder / "shards", SHAPE, {"train": [train], "held_out": [held_out]}, {})
    Image.new("RGB", (32, 48), "green").save(folder / "me.png")
    np.savez(folder / "poses.npz", pose=np.random.default_rng(0).random((9, 33, 3)))
    return folder


def test_clips_of_a_split_by_the_command(made, tmp_path):
    given = ["--checkpoint", made / "run", "--shards", made / "shards", "--split", "held_out", "--count", 2]
    with process(*given, "--steps", 2, "--output", tmp_path, "--set", "generate.batch_size=1") as person:
        out, errors = person.communicate()
    assert person.returncode == 0 and "2/2 clips" in out, errors
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["job"], result["status"], len(result["videos"])) == ("generate", "done", 2)
    assert result["settings"]["generate.steps"] == 2
    for path, record in zip(result["videos"], result["clips"], strict=True):
        beside = h264.decode_rgb(Path(path).read_bytes())
        alone, _ = video.read_frames(record["result"], video.clip_times(0, SHAPE.frames, SHAPE.fps))
        assert len(beside) == SHAPE.frames and beside.shape[2] > 3 * beside.shape[1] * 32 / 48
        assert alone.shape == (SHAPE.frames, SHAPE.height, SHAPE.width, 3) and alone.std() > 10
    with Image.open(result["sheet"]) as sheet:
        assert sheet.width > 200 and np.asarray(sheet).std() > 10


def test_poses_with_a_reference_are_repeatable_and_follow_the_seed(made, tmp_path):
    def bytes_of(name, **settings):
        chosen = Generation.model_validate({"generate": {"steps": 2, **settings}})
        paths = {"reference": made / "me.png", "pose": made / "poses.npz"}
        result = generate.run(made / "run" / "model", tmp_path / name, chosen, **paths)
        assert len(result["videos"]) == 1
        return Path(result["clips"][0]["result"]).read_bytes()

    one = bytes_of("one")
    assert one == bytes_of("same")
    assert one != bytes_of("seed", seed=1)
    assert one != bytes_of("later", start_s=0.25)
    assert one != bytes_of("guided", pose_guidance=3.0)


def test_a_network_is_sampled_in_the_type_it_was_trained_under_where_there_is_a_gpu(made, tmp_path, monkeypatch):
    load(Model(init=NETWORK, vae="none")).save(tmp_path / "model", shape=SHAPE, dtype="bfloat16")
    found, before = (checkpoints.find(str(path), Generate()) for path in (tmp_path, made / "run"))
    chosen = [Generate(), Generate(dtype="float32"), Generate(gpus="no"), Generate(dtype="bfloat16", gpus="no")]

    def dtypes(of):
        return [checkpoints.dtype_of(of, each, checkpoints.gpu_here(each)) for each in chosen]

    assert dtypes(found) == ["float32"] * 3 + ["bfloat16"]
    half = checkpoints.load(found, chosen[-1])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert dtypes(found) == ["bfloat16", "float32", "float32", "bfloat16"]
    assert dtypes(before)[0] == "float32", "of an earlier version, which did not say it"

    plain = load(Model(base=str(tmp_path / "model"), conditions=("reference", "pose"), dtype="bfloat16"))
    sizes = [sum(p.nbytes for p in of.network.blocks.parameters()) for of in (half, plain)]
    assert sizes[0] < 0.6 * sizes[1]
    noisy, t = torch.randn(1, *half.latent_shape(SHAPE)), torch.full((1,), 0.5)
    seen = {name: noisy.roll(1, -1) for name in half.conditions}
    with torch.no_grad():
        assert torch.equal(half.predict(noisy, t, seen), plain.predict(noisy, t, seen))


def test_poses_of_a_layout_that_the_network_has_not_seen_are_said(made, tmp_path):
    for points in (33, 133):
        denoiser = load(Model(init=NETWORK, vae="none", skeleton="dwpose"))
        denoiser.save(tmp_path / f"{points}" / "model", shape=SHAPE, points=points)
    np.savez(tmp_path / "whole.npz", pose=np.random.default_rng(0).random((9, 133, 3)))
    body, whole = ["--pose", made / "poses.npz"], ["--pose", tmp_path / "whole.npz"]
    said = {}
    for name, points, given in (("bare", 133, body), ("new", 33, whole), ("as one", 33, body), ("as all", 133, whole)):
        asked = ["--checkpoint", tmp_path / f"{points}", "--reference", made / "me.png", *given]
        said[name] = command(*asked, "--output", tmp_path / "out", "--dry-run")
    assert "poses of 33 points draw the body alone; the network was trained on 133" in said["bare"]
    assert "poses of 133 points draw face and hands, which the network has not seen" in said["new"]
    assert "points draw" not in said["as one"] + said["as all"] and not (tmp_path / "out").exists()


def test_a_text_is_shown_as_the_base_s_pipeline_encodes_it(made, tmp_path):
    import diffusers
    import transformers

    root = tmp_path / "run" / "model"
    denoiser = load(Model(init=NETWORK, vae="none"))
    with torch.no_grad():
        for parameter in denoiser.network.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    denoiser.save(root, shape=SHAPE)
    given = ["--reference", made / "me.png", "--pose", made / "poses.npz", "--steps", 2]
    asked = ["--text", "a person dances", "--output", tmp_path / "out"]
    refused = command("--checkpoint", root, *given, *asked, expected=2)
    assert f"--text: {root} has no text_encoder/ and tokenizer/: set generate.text_encoder" in refused
    assert not (tmp_path / "out").exists()
    model = encoders.encoder(tmp_path / "encoders", width=NETWORK["text_dim"])
    command("--checkpoint", root, *given, *asked, "--set", f"generate.text_encoder={tmp_path / 'encoders'}")
    plain = command("--checkpoint", root, *given, "--output", tmp_path / "plain")
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("out", "plain")]
    ours, theirs = (Path(result["clips"][0]["result"]).read_bytes() for result in results)
    assert ours != theirs and plain
    shutil.copytree(tmp_path / "encoders", root, dirs_exist_ok=True)  # as train.save=whole leaves them
    wanted = Generation.model_validate({"generate": {"text": "a person dances"}}).generate
    shown = checkpoints.load(checkpoints.find(str(root), wanted), wanted).text
    tokenizer = transformers.AutoTokenizer.from_pretrained(root / "tokenizer")
    pipe = diffusers.WanPipeline(tokenizer, model, vae=None, scheduler=None, transformer=None)
    with torch.no_grad():
        expected = pipe.encode_prompt("a person dances", do_classifier_free_guidance=False, max_sequence_length=512)[0]
    torch.testing.assert_close(shown, expected, rtol=1e-4, atol=1e-5)


def test_the_same_command_after_a_kill_makes_only_what_is_missing(made, tmp_path):
    for number in range(4):
        np.savez(tmp_path / f"{number}.npz", pose=np.random.default_rng(number).random((5, 33, 3)))
    output = tmp_path / "out"
    given = ["--checkpoint", made / "run", "--reference", made / "me.png", "--pose", tmp_path, "--output", output]
    given += ["--steps", 80, "--set", "generate.batch_size=1"]
    first = process(*given)
    whole = lambda: sorted((output / "videos").glob("*.json"))  # noqa: E731
    while len(whole()) < 2:
        assert first.poll() is None, "it ended before it was killed"
        time.sleep(0.01)
    first.kill()
    first.communicate()
    notes = whole()
    kept = {path: path.stat().st_mtime_ns for note in notes for path in output.glob(f"videos/{note.stem}*")}
    assert len(notes) < 4 and len(kept) == 4 * len(notes)
    assert f"{len(notes)} of 4 clips are there already" in command(*given)
    result = json.loads((output / "result.json").read_text())
    assert len(whole()) == len(result["clips"]) == 4 and {p: p.stat().st_mtime_ns for p in kept} == kept

    # What was made after the kill is what one run makes; a clip that was lost comes back, one of another motion is new.
    chosen = Generation.model_validate({"generate": {"steps": 80}})
    paths = {"reference": made / "me.png", "pose": tmp_path}
    again = generate.run(made / "run", tmp_path / "again", chosen, **paths)
    results = [[Path(clip["result"]) for clip in found["clips"]] for found in (result, again)]
    for one, other in zip(*results, strict=True):  # in batches of other sizes, which the last bits depend on
        one, other = (h264.decode_rgb(path.read_bytes()).astype(int) for path in (one, other))
        assert np.abs(one - other).mean() < 1
    before = {path: path.stat().st_mtime_ns for path in results[1]}
    results[1][0].unlink()
    np.savez(tmp_path / "3.npz", pose=np.random.default_rng(9).random((5, 33, 3)))
    generate.run(made / "run", tmp_path / "again", chosen, **paths)
    assert [path.stat().st_mtime_ns != before[path] for path in results[1]] == [True, False, False, True]
    other = Generation.model_validate({"generate": {"steps": 81}})
    with pytest.raises(UserError, match=r"generate.steps was 80, now 81\): choose another --output"):
        generate.run(made / "run", tmp_path / "again", other, **paths)


def test_a_last_frame_is_given_or_the_clips_own(made, tmp_path):
    """Of networks that see it; of others it is refused."""
    two = Generation.model_validate({"generate": {"steps": 2}})
    bases.image_to_video(tmp_path / "i2v", clip=False)
    denoiser = load(Model(base=str(tmp_path / "i2v"), last_frame=True))
    with torch.no_grad():
        for layer in (denoiser.network.patch_embedding, denoiser.network.proj_out):
            layer.weight *= 20  # so that what is seen matters
    denoiser.save(tmp_path / "model", shape=SHAPE)
    own = generate.run(tmp_path / "model", tmp_path / "own", two, shards=made / "shards", clip=[row(1)["clip_id"]])
    one = {"reference": tmp_path / "one.png", "pose": tmp_path / "dance.npz"}
    (tmp_path / "one.png").write_bytes(row(1)["reference"])
    (tmp_path / "end.png").write_bytes(png(np.full((SHAPE.height, SHAPE.width, 3), 250, np.uint8)))
    np.savez(tmp_path / "dance.npz", pose=row(1)["pose"], fps=SHAPE.fps)
    with pytest.raises(UserError, match="was trained with the last frame of each clip: give --last PICTURE") as error:
        generate.run(tmp_path / "model", tmp_path / "no", two, **one)
    assert "\n" not in str(error.value) and not (tmp_path / "no").exists()
    ends = {}
    for name in ("end", "one"):
        ends[name] = generate.run(tmp_path / "model", tmp_path / name, two, last=tmp_path / f"{name}.png", **one)
    results = {Path(result["clips"][0]["result"]).read_bytes() for result in (own, *ends.values())}
    assert len(results) == 3
    with pytest.raises(UserError, match="--last: no such file"):
        generate.run(tmp_path / "model", tmp_path / "no", two, last=tmp_path / "none.png", **one)
    with pytest.raises(UserError, match=r"--last: .* sees no last frame .*: leave it out"):
        generate.run(made / "run" / "model", tmp_path / "no", two, last=tmp_path / "end.png", **one)


def test_every_motion_of_a_folder_with_every_reference(made, tmp_path, capfd):
    for folder in ("people", "poses"):
        (tmp_path / folder).mkdir()
    for name, color in (("anna", "red"), ("ben", "blue")):
        Image.new("RGB", (32, 48), color).save(tmp_path / "people" / f"{name}.png")
    for name in ("walk", "turn"):
        np.savez(tmp_path / "poses" / f"{name}.npz", pose=np.random.default_rng(0).random((9, 33, 3)))
    steering = "[bold] :bomb: \x1b]0;title\x07\x9b31m"  # markup, and what steers a terminal
    Image.new("RGB", (32, 48), "green").save(tmp_path / "people" / f"{steering}.png")
    (tmp_path / "poses" / "broken.npz").write_text("no arrays")
    (tmp_path / "poses" / f"{steering}.npz").write_text("no arrays")
    paths = {"reference": tmp_path / "people", "pose": tmp_path / "poses"}
    chosen = Generation.model_validate({"generate": {"steps": 1}})
    result = generate.run(made / "run", tmp_path / "[" / "x]", chosen, **paths)  # a path that ends a style: [/x]
    names = [record["clip"] for record in result["clips"]]
    shown = r"[bold] :bomb: \x1b]0;title\x07\x9b31m"
    assert names == [f"{who} as {how}" for how in ("turn", "walk") for who in (shown, "anna", "ben")]
    assert len({Path(record["result"]).read_bytes() for record in result["clips"]}) == 6
    said = capfd.readouterr().out
    assert shown in said and not {*"\x1b\x07\x9b"} & {*said}
    steered, broken = sorted(result["left_out"])
    assert broken.endswith("broken.npz") and "cannot read" in result["left_out"][broken] and steering in steered
    (tmp_path / "poses" / f"{steering}.npz").unlink()
    (tmp_path / "poses" / "turn.npz").unlink()
    (tmp_path / "poses" / "walk.npz").unlink()
    (tmp_path / "poses" / "broken2.npz").write_text("no arrays")
    with pytest.raises(UserError, match=r"none of 2 files can be used; the first: .*broken"):
        generate.run(made / "run", tmp_path / "out", chosen, **paths)


def test_clips_of_files_that_are_given_no_longer_do_not_stay(made, tmp_path, capfd):
    (tmp_path / "people").mkdir()
    for name in ("b", "c"):
        Image.new("RGB", (32, 48), "red").save(tmp_path / "people" / f"{name}.png")
    paths = {"reference": tmp_path / "people", "pose": made / "poses.npz"}
    chosen = Generation.model_validate({"generate": {"steps": 1}})
    first = generate.run(made / "run", tmp_path / "out", chosen, **paths)
    own = tmp_path / "out" / "videos" / "000_mine.json"
    own.write_text("{}")
    own.with_suffix(".mp4").write_text("")
    Image.new("RGB", (32, 48), "blue").save(tmp_path / "people" / "a.png")
    second = generate.run(made / "run", tmp_path / "out", chosen, **paths)
    assert not [record for record in first["clips"] if Path(record["video"]).exists()]
    assert "Removed 2 clips of files that are given no longer: 000_b_as_poses, 001_c_as_poses" in capfd.readouterr().out
    ends = (".json", ".mp4", "_pose.mp4", "_result.mp4")
    due = {Path(record["video"]).with_suffix("").name + end for record in second["clips"] for end in ends}
    assert {path.name for path in own.parent.iterdir()} == due | {own.name, "000_mine.mp4"} and len(due) == 12


def test_a_long_motion_is_made_in_windows(made, tmp_path):
    points = np.random.default_rng(0).random((1, 33, 3)).repeat(14, 0)
    np.savez(tmp_path / "long.npz", pose=points)
    paths = {"reference": made / "me.png", "pose": tmp_path / "long.npz"}

    def frames(**values):
        chosen = Generation.model_validate({"generate": {"steps": 2, **values}})
        (record,) = generate.run(made / "run", tmp_path / str(values), chosen, **paths)["clips"]
        return h264.decode_rgb(Path(record["result"]).read_bytes())

    assert len(frames()) == SHAPE.frames
    assert len(frames(seconds=1.0)) == 12
    assert len(frames(seconds=float("inf"), overlap=0.6)) == 14
    with pytest.raises(UserError, match=r"0.1 s are 1 frames, one clip of this checkpoint has 5"):
        frames(seconds=0.1)


def test_seconds_are_made_of_whole_groups_of_frames_and_what_is_cut_is_said(made, tmp_path):
    kind, configuration = families.TINY["wan"]["vae"]
    kind(**configuration).save_pretrained(tmp_path / "vae")
    shape = ClipShape(frames=5, height=32, width=32, fps=12)
    families.load("wan", vae=str(tmp_path / "vae")).save(tmp_path / "run", shape=shape)
    given = ["--checkpoint", tmp_path / "run", "--reference", made / "me.png", "--output", tmp_path / "out"]

    def said(there):
        np.savez(tmp_path / "poses.npz", pose=np.random.default_rng(0).random((there, 33, 3)))
        return command(*given, "--pose", tmp_path / "poses.npz", "--seconds", 1, "--dry-run")

    assert "the longest of 13 frames" in (enough := said(14)) and "4n+1" not in enough
    short = said(12)
    assert "the longest of 9 frames" in short
    assert f"1 clip(s) of 9 of the motion's 12 frames: {tmp_path / 'run'} makes 4n+1" in short


def test_no_more_frames_are_held_than_allowed(made, tmp_path, capsys):
    nine = 9 * 3 * SHAPE.height * SHAPE.width
    np.savez(tmp_path / "long.npz", pose=np.random.default_rng(0).random((1, 33, 3)).repeat(14, 0))
    paths = {"reference": made / "me.png", "pose": tmp_path / "long.npz"}

    def run(dry_run=True, **values):
        chosen = Generation.model_validate({"generate": {"steps": 1, "max_bytes": nine, **values}})
        return generate.run(made / "run", tmp_path / str(values), chosen, **paths, dry_run=dry_run)

    (record,) = run(dry_run=False, seconds=float("inf"))["clips"]
    assert len(h264.decode_rgb(Path(record["result"]).read_bytes())) == 9
    assert "cut to 9 frames (0.75 s), the most for generate.max_bytes" in capsys.readouterr().out
    run(seconds=0.75)
    assert "cut to" not in capsys.readouterr().out
    for values in ({"seconds": 1.0}, {"seconds": 1e9}, {"max_bytes": 1000}, {"max_bytes": 1000, "seconds": np.inf}):
        with pytest.raises(UserError, match=r"no room for .* fit into generate.max_bytes"):
            run(**values)
    paths = {"shards": made / "shards"}
    with pytest.raises(UserError, match=r"2 clips of .*no room for 10 frames of 32x48, 9 more fit"):
        run(count=2)


def test_clips_made_at_once_keep_within_the_room():
    clips = [rendering.Files(Path(), i, motions.Motion("", None, np.zeros((n, 33, 3)), None), None)
             for i, n in enumerate([5, 5, 5, 5, 9, 9, 40])]  # fmt: skip
    got = [[len(clip.motion.pose) for clip in batch] for batch in rendering._batches(clips, 3, 12)]
    assert got == [[5, 5], [5, 5], [9], [9], [40]]


def test_with_and_without_pose_are_equal_before_training_and_differ_after(made, tmp_path):
    """Identity at step 0: a condition that was just added has zero weights."""
    base = Model(init=NETWORK, vae="none", conditions=("reference",))
    load(base).save(tmp_path / "base", shape=SHAPE)
    load(Model(base=str(tmp_path / "base"), vae="none")).save(tmp_path / "step0", shape=SHAPE)
    paths = {"shards": made / "shards", "without": "pose"}
    chosen = Generation.model_validate({"generate": {"steps": 2, "count": 1}})
    (record,) = generate.run(tmp_path / "step0", tmp_path / "out", chosen, **paths)["clips"]
    assert record["difference"] == 0
    (record,) = generate.run(made / "run", tmp_path / "trained", chosen, **paths)["clips"]
    assert record["difference"] > 0
    assert {path.name[4:].partition("_000000")[2] for path in (tmp_path / "trained/videos").iterdir()} == {
        ".json", ".mp4", "_pose.mp4", "_result.mp4", "_truth.mp4", "_without.mp4",
    }  # fmt: skip
    with pytest.raises(UserError, match=r"--without: pose is no condition of .*; its conditions: reference"):
        generate.run(tmp_path / "base", tmp_path / "out", chosen, **paths)


def test_one_named_clip_with_another_reference(made, tmp_path):
    paths = {"shards": made / "shards", "clip": ["square 2.mp4#000000"], "reference": made / "me.png"}
    result = generate.run(made / "run", tmp_path, Generation.model_validate({"generate": {"steps": 1}}), **paths)
    assert [record["clip"] for record in result["clips"]] == ["square 2.mp4#000000"]
    made_by = json.loads((tmp_path / protocol.FILE).read_text())
    assert protocol.shown(made_by) == ["not the split's own: reference"]


def test_driving_video_and_picture_of_a_real_person(made, tmp_path):
    frames, _ = video.read_frames(assets.clip("cam04"), [0.5])
    Image.fromarray(frames[0]).save(tmp_path / "person.jpg")
    crop = Generation().prepare
    points, cut = driving.clip(assets.clip("cam01"), SHAPE, crop, start_s=0.2)
    assert points.shape == (5, 33, 3) and cut.shape == (5, 48, 32, 3)
    seen = points[..., 2] > 0.5
    assert seen.mean() > 0.7 and (points[seen][:, :2] > 0).all() and (points[seen][:, :2] < 1).all()
    # as `prepare` crops: the body fills most of the picture
    x_y = points[seen][:, :2]
    assert (x_y.max(0) - x_y.min(0)).max() > 0.6
    who = motions.reference_image(tmp_path / "person.jpg", SHAPE, crop)
    assert who.shape == (48, 32, 3) and who.std() > 20


def test_a_motion_takes_the_proportions_of_who_is_to_move(made, tmp_path):
    frames, _ = video.read_frames(assets.clip("cam04"), [0.5])
    Image.fromarray(frames[0]).save(tmp_path / "person.png")
    driving = wholebodies.moving(SHAPE.frames)
    driving[:, 7:11, 1] += 0.1  # long forearms
    np.savez(tmp_path / "long.npz", pose=driving)
    given = ("--checkpoint", made / "run", "--pose", tmp_path / "long.npz", "--steps", 2, "--retarget")
    out = command(*given, "--reference", tmp_path / "person.png", "--output", tmp_path / "out")
    assert "long: retargeted by body " in out and "retarget.png" in out
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    with Image.open(result["preview"]) as preview:
        assert preview.height > 2 * 192 and np.asarray(preview).std() > 20
    own = retargeting.own_pose(tmp_path / "person.png", SHAPE, Generation().prepare)
    due = retarget.retarget(driving, own, SHAPE.height, SHAPE.width)
    drawn = rendering.pixels(drawing.draw(torch.from_numpy(due), SHAPE.height, SHAPE.width))
    shown = h264.decode_rgb((tmp_path / "out" / "videos" / "000_long_pose.mp4").read_bytes())
    assert np.abs(shown.astype(int) - drawn).mean() < 6, "the clip is made of the retargeted motion"
    plain = command(*given[:-1], "--reference", tmp_path / "person.png", "--output", tmp_path / "out", expected=2)
    assert "--retarget was true, now not set" in plain
    nobody = command(*given, "--reference", made / "me.png", "--output", tmp_path / "none", expected=2)
    assert nobody.count("\n") == 1 and "--retarget: nobody was found in" in nobody and not (tmp_path / "none").exists()
    hidden = driving * np.float32([1, 1, 0])
    hidden[:, 0, 2] = 1  # a nose alone
    np.savez(tmp_path / "long.npz", pose=hidden)
    blind = command(*given, "--reference", tmp_path / "person.png", "--output", tmp_path / "none", expected=2)
    assert "show no limb that is visible in both" in blind


def test_picture_without_a_person_is_cut_in_the_middle(tmp_path, capsys):
    picture = np.zeros((40, 100, 3), np.uint8)
    picture[:, 40:60] = 255
    Image.fromarray(picture).save(tmp_path / "wide.png")
    who = motions.reference_image(tmp_path / "wide.png", SHAPE, Generation().prepare)
    assert who.shape == (48, 32, 3) and who[:, 10:22].mean() > 240
    assert "nobody was found" in capsys.readouterr().out


def test_turned_picture_is_made_upright(tmp_path):
    picture = Image.new("RGB", (48, 32))
    picture.paste("red", (0, 0, 24, 32))
    exif = picture.getexif()
    exif[0x0112] = 6  # turn clockwise to view
    picture.save(tmp_path / "turned.png", exif=exif)
    who = motions.reference_image(tmp_path / "turned.png", SHAPE, Generation().prepare)
    assert who[:20, :, 0].min() == 255 and who[30:, :, 0].max() == 0


def test_dry_run_writes_nothing_and_help_explains(made, tmp_path):
    given = ["--checkpoint", made / "run", "--shards", made / "shards", "--output", tmp_path / "out", "--dry-run"]
    done = CliRunner().invoke(generate.app, [str(word) for word in given])
    assert done.exit_code == 0 and "Would generate 2 clip(s) of 5 frames of 32x48" in done.output
    assert not (tmp_path / "out").exists()
    assert "--reference" in command("--help")


@pytest.fixture(scope="module")
def wrong(made):
    """Files that must not be taken, beside the good ones."""
    load(Model(init=NETWORK, vae="none")).save(made / "shapeless")
    load(Model(init=NETWORK, vae="none", conditions=("reference",))).save(made / "poseless", shape=SHAPE)
    load(Model(init=NETWORK, vae="none", conditions=("pose",))).save(made / "faceless", shape=SHAPE)
    (made / "empty").mkdir()
    (made / "text.mp4").write_text("no video")
    (made / "text.png").write_text("no picture")
    (made / "text.npz").write_text("no arrays")
    np.savez(made / "short.npz", pose=np.zeros((2, 33, 3)))
    np.savez(made / "body25.npz", pose=np.zeros((9, 25, 3)))
    np.savez(made / "other.npz", keypoints=np.zeros((9, 33, 3)))
    np.savez(made / "pickled.npz", pose=np.array([{"a": 1}], dtype=object))
    other = ClipShape(frames=5, height=32, width=32, fps=12)
    (made / "square_shards").mkdir()
    shards.write_dataset(made / "square_shards", other, {"train": [], "held_out": []}, {})
    return made


def asking(**values):
    return Generation(generate=Generate(**values))


PICTURE = {"reference": "{}/me.png"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"checkpoint": "{}/nowhere", "shards": "{}/shards"}, "--checkpoint: no such folder"),
        ({"checkpoint": "{}/empty", "shards": "{}/shards"}, "was not written by pipelines.train"),
        ({"checkpoint": "{}/shapeless", "shards": "{}/shards"}, "does not say which clips it was trained on"),
        ({}, "one of --video, --pose and --shards .*; none was given"),
        ({"pose": "{}/poses.npz", "shards": "{}/shards"}, "--pose and --shards were given"),
        ({"pose": "{}/poses.npz"}, "--pose needs --reference too"),
        ({"pose": "{}/poses.npz", **PICTURE, "split": "train"}, "--clip and --split choose among --shards"),
        ({"shards": "{}/shards", "split": "train", "clip": ["x"]}, "both --clip and --split"),
        (
            {"shards": "{}/shards", "settings": asking(start_s=0.5, seconds=1.0)},
            r"generate.seconds and generate.start_s: .* --shards are taken whole",
        ),
        ({"pose": "{}/poses.npz", **PICTURE, "settings": asking(count=4)}, "--count .* split of --shards; --pose was"),
        ({"shards": "{}/shards", "clip": ["x"], "settings": asking(count=1)}, "--count .*; --clip names them"),
        ({"shards": "{}/nowhere"}, "no such folder of shards"),
        ({"shards": "{}/square_shards"}, "hold clips of 5 frames of 32x32 .* the checkpoint makes 5 frames of 32x48"),
        ({"shards": "{}/shards", "split": "test"}, "no clips in split 'test' .*held_out .2 clips"),
        ({"shards": "{}/shards", "clip": ["square 1.mp4"]}, "no clip 'square 1.mp4' .*did you mean square 1.mp4#000"),
        ({"pose": "{}/nowhere.npz", **PICTURE}, "--pose: no such file"),
        (
            {"checkpoint": "{}/poseless", "pose": "{}/poses.npz", **PICTURE, "settings": asking(pose_guidance=2.0)},
            "--pose-guidance .* sees no pose; .*: reference",
        ),
        (
            {"checkpoint": "{}/faceless", "shards": "{}/shards", "settings": asking(reference_guidance=5.0)},
            "--reference-guidance .generate.reference_guidance.: .* sees no reference; its conditions: pose",
        ),
        ({"pose": "{}/text.npz", **PICTURE}, "--pose: cannot read"),
        ({"pose": "{}/pickled.npz", **PICTURE}, "--pose: .*Python objects, which are never unpickled"),
        ({"pose": "{}/short.npz", **PICTURE}, "has 2 frames, a clip from 0 s on needs 5"),
        ({"pose": "{}/body25.npz", **PICTURE}, r"\[9, 25, 3\], needed is float \[frames, 33 or 133, 3\]"),
        ({"pose": "{}/other.npz", **PICTURE}, "no array named pose, only keypoints"),
        ({"pose": "{}/poses.npz", "reference": "{}/nowhere.png"}, "--reference: no such file"),
        ({"pose": "{}/poses.npz", "reference": "{}/text.png"}, "--reference: cannot read .* as a picture"),
        ({"video": "{}/text.mp4", **PICTURE}, "--video: "),
        ({"video": "{}/empty", **PICTURE}, "--video: no file in the folder .* ends in .*.mp4"),
        ({"video": "{}/nowhere.mp4", **PICTURE}, "--video: "),
    ],
)
def test_wrong_input_is_one_clear_line(wrong, tmp_path, given, message):
    given = {"checkpoint": "{}/run", **given}
    paths = {k: Path(v.format(wrong)) if isinstance(v, str) and "{}" in v else v for k, v in given.items()}
    with pytest.raises(UserError, match=message) as error:
        generate.run(output=tmp_path, **paths)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_a_picture_that_the_network_does_not_see_is_said(wrong, tmp_path):
    given = ["--pose", wrong / "poses.npz", "--reference", wrong / "me.png", "--output", tmp_path, "--dry-run"]
    said = "sees no reference (its conditions: pose): clips do not show who is in --reference"
    assert said in command("--checkpoint", wrong / "faceless", *given)
    assert "sees no" not in command("--checkpoint", wrong / "run", *given)


def test_a_checkpoint_that_sees_no_pose_draws_a_motion_s_length_and_says_so(wrong, tmp_path):
    given = ["--checkpoint", wrong / "poseless", "--pose", wrong / "poses.npz", "--reference", wrong / "me.png"]
    said = command(*given, "--steps", 1, "--output", tmp_path / "out")
    assert "sees no pose" in said and len(list((tmp_path / "out" / "videos").glob("*_result.mp4"))) == 1


def test_video_with_nobody_or_too_short(made):
    crop = Generation().prepare
    with pytest.raises(UserError, match="nobody was found"):
        driving.clip(assets.clip("no_face"), SHAPE, crop)
    with pytest.raises(UserError, match="a clip has 5"):
        driving.clip(assets.clip("cam01"), SHAPE, crop, start_s=1.5)


def test_status_2_and_one_line_for_a_person_s_mistake(made, tmp_path):
    given = ["--checkpoint", made / "run", "--shards", made / "shards", "--output", tmp_path]
    output = command(*given, "--set", "generate.step=3", expected=2)
    assert output.strip() == "error: unknown setting generate.step (did you mean generate.steps?)"
    output = command(*given, "--steps", 0, expected=2)
    assert output.strip() == "error: setting generate.steps: must be 1 or more, given 0"
    output = command(*given, "--seed", 2**63, expected=2)
    assert output.strip() == f"error: setting generate.seed: must be less than 9.22337e+18, given {2**63}"
    assert not list(tmp_path.iterdir())
