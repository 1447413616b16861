"""Masks beside videos: read, cut out with the clip, kept in shards, and shown to networks that replace a person."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from PIL import Image

from entprog import config
from entprog.config import ClipShape, Drop, Model
from entprog.data import clip_stream, latents, shards
from entprog.diffusion import dropping
from entprog.media import h264, masks
from entprog.media.limits import LIMITS
from entprog.models import wan_animate
from entprog.preparing import beside, cutting, extracting, inputs, ledger, probing
from helpers import bases, real_clips, wholebodies
from helpers.families import load
from pipelines.generating import checkpoints, motions, protocol, rendering, replacing
from pipelines.preparing import latents as caching
from pipelines.preparing import packing
from pipelines.training import outline

HEIGHT, WIDTH, FPS, FRAMES = 192, 128, 10, 14
CUT = ClipShape(frames=6, height=48, width=32, fps=FPS)


# ---- beside videos ----


def boxes(frames=FRAMES, height=HEIGHT, width=WIDTH):
    """A mask's frames: white in a box that moves to the right."""
    out = np.zeros((frames, height, width, 3), np.uint8)
    for i in range(frames):
        out[i, height // 4 : -height // 4, 20 + 2 * i : 70 + 2 * i] = 255
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Videos with poses beside them, and masks beside most."""
    folder = tmp_path_factory.mktemp("in")
    points = wholebodies.moving(FRAMES)
    video = np.stack(wholebodies.pictures(points, HEIGHT, WIDTH))
    for name in ("moving", "still", "bare", "small", "short", "black", "broken"):
        h264.write(folder / f"{name}.mp4", video, fps=FPS)
        np.savez(folder / f"{name}.pose.npz", pose=points)
    h264.write(folder / "moving.mask.mp4", boxes(), fps=FPS)
    Image.fromarray(boxes()[0]).save(folder / "still.mask.png")
    h264.write(folder / "small.mask.mp4", boxes(height=96), fps=FPS)
    h264.write(folder / "short.mask.mp4", boxes(frames=5), fps=FPS)
    h264.write(folder / "black.mask.mkv", np.zeros_like(boxes()), fps=FPS)
    (folder / "broken.mask.mp4").write_bytes(b"no video")
    return folder


def test_masks_are_cut_out_as_their_clips_are_and_bad_ones_are_in_the_ledger(folder, tmp_path):
    settings = config.build({"data": {"shape": CUT.model_dump()}}, config.Preparation)
    found = inputs.find(folder)
    assert len(found.rows) == 7 and "masks of 6 videos are those of the .mask files beside them" in found.notes
    track = cutting.Track(settings, tmp_path)
    for row in found.rows:
        row = {**row, "key": Path(row["file"]).stem}
        cutting.cut(track(probing.cut_shots(probing.probe(row, settings), settings)), settings, tmp_path)
    records = {Path(row["file"]).stem: packing.read_part(tmp_path, Path(row["file"]).stem) for row in found.rows}
    said = {name: (record["ledger"][0]["reason"], record["ledger"][0]["message"]) for name, record in records.items()}
    assert {name: reason for name, (reason, _) in said.items() if reason} == dict.fromkeys(
        ("small", "short", "black", "broken"), "bad_mask"
    )
    assert said["small"][1] == "small.mask.mp4: it is 128x96, the video 128x192"
    assert said["short"][1].startswith("short.mask.mp4: it lasts 0.50 s, the video 1.")
    assert {line["reason"] for line in records["black"]["ledger"]} == {"bad_mask"}
    for name in ("moving", "still"):
        for clip in shards.read_rows(tmp_path / f"{name}.parquet", range(records[name]["clips"])):
            at = round(clip["start_s"] * FPS)
            whole = (
                boxes()[np.arange(at, at + 6).clip(max=FRAMES - 1)] if name == "moving" else boxes()[:1].repeat(6, 0)
            )
            left, top, width, height = (clip[f"crop_{side}"] for side in ("left", "top", "width", "height"))
            due = [extracting.crop(f, (left, top, width, height), (48, 32)) for f in whole]
            kept = masks.unpacked(clip["mask"], 6, 48, 32)
            assert kept.any() and (kept == masks.white(np.stack(due))).mean() > 0.98, "an edge may differ by a pixel"
    assert "mask" not in shards.read_rows(tmp_path / "bare.parquet", [0])[0]
    assert shards.read_rows(tmp_path / "bare.parquet", [0], ["mask"]) == [{"mask": None}]
    rows = packing.shard_plans(
        [line for name in ("bare", "moving") for line in records[name]["ledger"]],
        {f"{name}.mp4": "train" for name in records}, {f"{name}.mp4": name for name in records}, 99, None, 133,
        packing.masked(records.values()),
    )  # fmt: skip
    (tmp_path / "parts").symlink_to(tmp_path)
    packing.pack({"plan": json.dumps(rows[0])}, tmp_path, CUT)
    kept = [row["mask"] is not None for row in shards.read_rows(tmp_path / "train/00000.parquet", range(2), ["mask"])]
    assert kept == [False, False] and not packing.masked([records["bare"], records["black"]])


def test_no_clip_has_another_mask_than_the_one_that_was_listed(folder, tmp_path, monkeypatch):
    for name in ("still.mp4", "still.pose.npz", "still.mask.png"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    settings = config.build({"data": {"shape": CUT.model_dump()}}, config.Preparation)
    (row,) = inputs.find(tmp_path).rows
    row = cutting.Track(settings)(probing.cut_shots(probing.probe({**row, "key": "k"}, settings), settings))
    read = masks.read

    def overwritten(path, *options):
        Image.fromarray(boxes()[-1]).save(path)
        return read(path, *options)

    monkeypatch.setattr(masks, "read", overwritten)
    assert cutting.cut(row, settings, tmp_path) == {"file": "still.mp4", "clips": 0, "reason": "changed"}


@pytest.mark.parametrize("ending", [".mask.png", ".mask.mov"])
def test_where_a_mask_is_transparent_it_is_black(ending, tmp_path):
    """As editors save what was cut free: white, and nothing around it."""
    mask = np.zeros((48, 32, 4), np.uint8)
    mask[10:30, 8:20] = 255
    path = tmp_path / f"a{ending}"
    if ending == masks.PICTURE:
        Image.fromarray(mask).save(path)
    else:
        with av.open(str(path), "w") as container:
            stream = container.add_stream("png", rate=FPS)
            stream.width, stream.height, stream.pix_fmt = 32, 48, "rgba"
            for _ in range(5):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(mask, "rgba")))
            container.mux(stream.encode())
    frame = next(masks.read(path, 48, 32, 0.5, None, FPS, LIMITS))
    assert np.array_equal(masks.white(frame), mask[..., 0] == 255)
    if ending != masks.PICTURE:
        span = {"shape": ClipShape(frames=5, height=48, width=32, fps=FPS), "crop": config.Prepare(), "start_s": 0.0}
        scene = replacing.Scene(path, path).around(np.zeros((5, 33, 3)), None, None, **span)
        assert (scene["person"] == (mask[..., 0] == 255)).all()


def test_a_changed_mask_is_a_changed_input(folder, tmp_path):
    for name in ("moving.mp4", "moving.mask.mp4"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (one,) = inputs.find(tmp_path).rows
    assert ledger.stamp(one) != ledger.stamp({**one, "mask": b""}), "a video without a mask keeps the stamp it had"
    (tmp_path / "moving.mask.mp4").write_bytes((folder / "black.mask.mkv").read_bytes())
    (other,) = inputs.find(tmp_path).rows
    assert ledger.stamp(one) != ledger.stamp(other)
    (tmp_path / "moving.mask.png").write_bytes(b"")
    assert inputs.find(tmp_path).notes[-1].startswith("1 video with several masks (moving.mp4): one of them is read")
    there = ("a.mp4", "a.mask.mp4", "b.mask.mp4", "a.pose.npz", "b.pose.npz")
    away = [{**one, "file": name, "path": f"s3://x/{name}".encode()} for name in there]
    left, notes = beside.elsewhere(away)
    assert [row["file"] for row in left] == ["a.mp4", "b.mask.mp4", "a.pose.npz", "b.pose.npz"]
    poses, of_masks = notes
    assert poses.startswith("1 files of poses there are not read") and "estimated" in poses
    assert of_masks.startswith("1 masks there are not read")


def test_what_lies_beside_no_video_is_named(tmp_path):
    for name in ("a.mp4", "a.pose.npz", "b.pose.json", "b.mask.mp4"):
        (tmp_path / name).write_bytes(b"x")
    found = inputs.find(tmp_path)
    assert [row["file"] for row in found.rows] == ["a.mp4", "b.mask.mp4", "b.pose.json"]
    assert "1 files of poses belong to no video by their names (b.pose.json): not read" in found.notes
    assert any(note.startswith("1 masks belong to no video by their names (b.mask.mp4)") for note in found.notes)


# ---- in shards, and in what networks are shown ----

SHAPE = ClipShape(frames=9, height=64, width=64, fps=12)


def person(number):
    """Where the person is in a clip, bool [F, H, W]."""
    out = np.zeros((SHAPE.frames, SHAPE.height, SHAPE.width), bool)
    out[:, 8:40, 4 + 8 * number : 36 + 8 * number] = True
    return out


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Three training clips, the second one without a mask, and a held-out one."""
    folder = tmp_path_factory.mktemp("shards")
    rows = [real_clips.row("cam01", "train", 0.1 * i, SHAPE) for i in range(3)]
    rows[0]["mask"], rows[2]["mask"] = masks.packed(person(0)), masks.packed(person(2))
    held = {**real_clips.row("cam04", "held_out", 0.2, SHAPE), "mask": masks.packed(person(1))}
    infos = {
        split: [shards.write_shard(folder, f"{split}/0.parquet", of, SHAPE, masks=True)]
        for split, of in (("train", rows), ("held_out", [held]))
    }
    return shards.write_dataset(folder, SHAPE, infos, {}, masks=True)


@pytest.fixture(scope="module")
def animate(tmp_path_factory):
    bases.animate(tmp_path_factory.mktemp("animate"))
    folder = tmp_path_factory.mktemp("animate")
    bases.animate(folder)
    return wan_animate.load(Model(family="wan_animate", base=str(folder)))


def clips_of(dataset, *numbers):
    return clip_stream.to_clips(
        {**clip_stream.decode(dataset, "train", np.array(numbers)), "position": np.array(numbers)}
    )


def test_clips_have_their_masks_and_smaller_ones_too(dataset):
    clips = clips_of(dataset, 2, 1, 0)
    assert clips.mask.dtype == torch.bool and clips.mask.shape == (3, 9, 64, 64)
    assert np.array_equal(clips.mask[0], person(2)) and not clips.mask[1].any()
    small = clips.resized(SHAPE.model_copy(update={"frames": 5, "height": 32, "width": 32}))
    assert np.array_equal(small.mask[2], person(0)[2:7, ::2, ::2])
    part = clip_stream.decode(dataset, "train", np.array([0]), frames=5)
    assert np.array_equal(part["mask"][0], person(0)[2:7])
    assert clips_of(replace(dataset, masks=False), 0).mask is None
    bits = masks.packed(person(0))
    with pytest.raises(ValueError, match=r"its mask has 4607 bytes where the dataset's shape gives 4608"):
        masks.unpacked(bits[:-1], 9, 64, 64)


@torch.no_grad()
def test_what_lies_around_is_shown_and_kept_with_the_latents(dataset, animate):
    clips = clips_of(dataset, 0, 1, 2)
    seen = latents.encode(animate, clips).conditions
    without = latents.encode(animate, replace(clips, mask=None)).conditions
    assert seen.keys() - without.keys() == {"background"}
    assert all(torch.equal(seen[name], value) for name, value in without.items())
    noise, t = torch.randn(3, *animate.latent_shape(SHAPE)), torch.tensor([0.3, 0.5, 0.8])
    ours, bare = animate.predict(noise, t, seen), animate.predict(noise, t, without)
    one = animate.predict(noise[1:2], t[1:2], {name: value[1:2] for name, value in without.items()})
    torch.testing.assert_close(ours[1:2], one, rtol=1e-5, atol=1e-5)
    assert all(not torch.allclose(ours[i], bare[i], atol=1e-3) for i in (0, 2)), "it is to make a difference"
    key = latents.key(animate, "wan_animate", SHAPE, dataset.masks)
    assert key != latents.key(animate, "wan_animate", SHAPE)
    rows = caching.encoded(animate, clip_stream.decode(dataset, "train", np.arange(3)), SHAPE, "cpu")
    piece = latents.Piece("train/0.parquet", dataset.splits["train"][0].sha256, 0, 3)
    file = latents.write(dataset.folder / "latents" / key, piece, rows)
    shapes = {"clean": tuple(animate.latent_shape(SHAPE))}
    shapes |= {f"conditions.{name}": tuple(value.shape[1:]) for name, value in seen.items()}
    cache = latents.finish(dataset.folder / "latents" / key, shapes, [file], {})
    arrays = {**latents.read(cache, np.array([2, 1])), "position": np.array([2, 1])}
    again = latents.to_latents(arrays, cache.shapes, clip_stream.to_device).conditions
    assert torch.equal(again["background"], seen["background"][[2, 1]])
    kept = dropping.dropped(animate, latents.encode(animate, clips), Drop(pose=1.0, reference=1.0), 0).conditions
    assert torch.equal(kept["background"], seen["background"])


@torch.no_grad()
def test_pictures_of_clips_with_masks_are_drawn_into_them(dataset, animate):
    of_shard = [motions.from_row(dataset.folder / "train/0.parquet", i, SHAPE, i) for i in range(3)]
    of_clips = rendering.motions_of(clips_of(dataset, 0, 1, 2), "abc")
    for found in (of_shard, of_clips):
        assert [motion.background is not None for motion in found] == [True, False, True]
        assert not found[0].background[person(0)].any()
        assert np.array_equal(found[0].background[~person(0)], found[0].video[~person(0)])
    settings = config.Generate(steps=1)
    drawn = rendering.make(animate, of_clips, SHAPE, settings)
    bare = [replace(motion, background=None, person=None) for motion in of_clips]
    differ = np.abs(drawn.astype(int) - rendering.make(animate, bare, SHAPE, settings)).mean((1, 2, 3, 4))
    assert differ[1] < 0.1 < min(differ[0], differ[2])


def test_a_card_tells_clips_that_are_put_into_videos(dataset, animate, tmp_path):
    animate.save(tmp_path, shape=SHAPE)
    maker, settings = checkpoints.find(str(tmp_path), config.Generate()), config.Evaluation()
    whole, masked = (
        protocol.how_made(maker, settings, replace(dataset, masks=with_them)) for with_them in (False, True)
    )
    assert masked == {**whole, "guidance": "reference 1, pose 1, put into clips with masks"}
    how, last = protocol.how_sampled(maker, settings.generate, gpu=False), {**maker.about, "last_frame": True}
    assert protocol.of_shards(how, maker, dataset, "held_out") == masked, "as generate --shards leaves it"
    ending = protocol.of_shards(how, replace(maker, about=last), dataset, "held_out")
    assert protocol.shown(ending) == ["shown the last frame of the truth"] and protocol.shown(masked) == []
    assert "of the truth" not in protocol.of_shards(how, replace(maker, about=last), dataset, "held_out", last=False)


def test_other_networks_are_shown_none_and_that_is_said(dataset):
    pixels = load("wan_animate")
    assert not pixels.replaces and "background" not in pixels.encode(clips_of(dataset, 0)).conditions
    assert latents.key(pixels, "wan_animate", SHAPE, True) == latents.key(pixels, "wan_animate", SHAPE)
    said = [outline.masks(dataset, SimpleNamespace(replaces=replaces)) for replaces in (True, False)]
    assert re.search("shown with what lies around", said[0]) and re.search("are not shown", said[1])
    assert outline.masks(replace(dataset, masks=False), SimpleNamespace(replaces=True)) is None
