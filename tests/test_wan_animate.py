"""Wan-Animate: the network sees at training what its diffusers pipeline shows it at inference, faces among that."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from entprog.config import ClipShape, Drop, Generate, Model
from entprog.data import latents as cache
from entprog.diffusion import dropping, sampling
from entprog.diffusion.objectives import noise_like
from entprog.errors import UserError
from entprog.media import drawing, faces, wholebody
from entprog.media.color import yuv420_to_rgb
from entprog.models import wan_animate
from entprog.models.wan_animate import inspect, load
from helpers import bases, wholebodies
from helpers.families import clips
from helpers.recording import calls
from pipelines.generating import checkpoints, motions, rendering

SHAPE = ClipShape(frames=9, height=64, width=64, fps=12)
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(pipeline, its folder)"""
    folder = tmp_path_factory.mktemp("animate")
    return bases.animate(folder), folder


def base(made, **more):
    return Model(family="wan_animate", base=str(made[1]), **more)


def batch_of(count, seen=True):
    pose = torch.from_numpy(wholebodies.moving(SHAPE.frames))[None].repeat(count, 1, 1, 1)
    pose[..., wholebody.FACE, :2] = pose[..., :1, :2] + 3 * (pose[..., wholebody.FACE, :2] - pose[..., :1, :2])
    for clip in range(count):
        pose[clip, ..., 1] += 0.04 * clip
    pose[:, 4, wholebody.FACE, 2] = 0  # a frame without a face
    return replace(clips(count, SHAPE), pose=pose if seen else wholebody.body(pose))


def pictures(video):
    """float [F, 3, H, W] in -1..1 as PIL pictures."""
    return [Image.fromarray(((frame + 1) * 127.5).round().byte().movedim(0, -1).numpy()) for frame in video]


def face_video(batch):
    """Cut by the makers' rule, written another way: 1.3 times the box's area, three quarters of what is added to its
    height above it; a frame without a face is black."""
    out, video = [], yuv420_to_rgb(batch.video)[0]
    for frame, points in zip(video, batch.pose[0].numpy(), strict=True):
        face = points[23:91]
        if (face[:, 2] < 0.3).mean() > 0.5:
            out.append(torch.full((3, 16, 16), -1.0))
            continue
        x, y = face[:, 0] * 64, face[:, 1] * 64
        width, height = np.ptp(x) * np.sqrt(1.3), np.ptp(y) * np.sqrt(1.3)
        left, right = x.min() - (width - np.ptp(x)) / 2, x.max() + (width - np.ptp(x)) / 2
        top, bottom = y.min() - 3 * (height - np.ptp(y)) / 4, y.max() + (height - np.ptp(y)) / 4
        left, top, right, bottom = (int(np.clip(value, 0, 64)) for value in (left, top, right, bottom))
        out.append(functional.interpolate(frame[None, :, top:bottom, left:right], (16, 16), mode="bilinear")[0])
    return torch.stack(out)


def around(seed=0):
    """A video that a person is put into, uint8 [1, F, 64, 64, 3], and where, bool [1, F, 64, 64]."""
    rng = np.random.default_rng(seed)
    person = np.zeros((1, SHAPE.frames, 64, 64), bool)
    for frame in range(SHAPE.frames):
        person[0, frame, 7:50, 3 * frame : 3 * frame + 21] = True
    return (torch.from_numpy(a) for a in (rng.integers(0, 256, (*person.shape, 3), dtype=np.uint8), person))


@torch.no_grad()
@pytest.mark.parametrize("mode", ["animate", "replace", "a clip with a mask"])
def test_inputs_are_those_of_the_pipeline(made, monkeypatch, mode):
    """Latents, mask, image tokens, pose; of the faces what the motion encoder says, so the prediction is its own."""
    pipe, _ = made
    draw = drawing.draw
    monkeypatch.setattr(drawing, "draw", lambda *given: ((draw(*given) + 1) * 127.5).round() / 127.5 - 1)
    denoiser, batch, more = load(base(made)), batch_of(1), {}
    assert denoiser.native and denoiser.skeleton == "wan_animate"
    video, person = around()
    if mode == "a clip with a mask":
        batch = replace(batch, mask=person)
        video = ((yuv420_to_rgb(batch.video) + 1) * 127.5).round().byte().movedim(2, -1) * ~person[..., None]
    encoded = denoiser.encode(batch)
    if mode == "replace":
        encoded.conditions.update(denoiser.background(video, person, batch.pose))
    if mode != "animate":
        more = {"background_video": [Image.fromarray(frame) for frame in video[0].numpy()], "mode": "replace"}
        more["mask_video"] = [Image.fromarray(frame.astype(np.uint8) * 255) for frame in person[0].numpy()]
    noise = noise_like(torch.empty(1, *denoiser.latent_shape(SHAPE)), torch.tensor([0]), 5)
    first = noise_like(torch.empty(1, 4, 1, 8, 8), torch.tensor([0]), 0)
    (told,) = calls(pipe.transformer, lambda: pipe(
        Image.fromarray(batch.reference[0].numpy()), pictures(drawing.draw(batch.pose, 64, 64, "wan_animate")[0]),
        pictures(face_video(batch)), height=64, width=64, segment_frame_length=9, num_inference_steps=1,
        guidance_scale=1.0, latents=torch.cat([first, noise], dim=2), prompt_embeds=torch.zeros(1, 512, 8),
        output_type="latent", **more,
    ))  # fmt: skip
    t = denoiser.process.t(told["timestep"].float())
    (ours,) = calls(denoiser.network, lambda: denoiser.predict(noise, t, encoded.conditions))
    for name in ("hidden_states", "encoder_hidden_states_image", "pose_hidden_states", "timestep"):
        torch.testing.assert_close(ours[name], told[name].float(), **CLOSE)
    (expected,) = pipe.transformer(**told)
    got = denoiser.predict(noise, t, encoded.conditions)
    torch.testing.assert_close(got, expected[:, :, 1:], **CLOSE)
    blank = denoiser.predict(noise, t, {**encoded.conditions, "face": 0 * encoded.conditions["face"]})
    assert not torch.allclose(blank, got, atol=1e-2), "faces are to make a difference here"
    (bare,) = pipe.transformer(**told | {"face_pixel_values": torch.full_like(told["face_pixel_values"], -1)})
    torch.testing.assert_close(blank, bare[:, :, 1:], **CLOSE)


@torch.no_grad()
def test_a_background_is_never_withheld_and_the_saved_pipeline_takes_it(made, tmp_path):
    denoiser, batch = load(base(made)), batch_of(1)
    video, person = around()
    encoded = denoiser.encode(batch).conditions | denoiser.background(video, person, batch.pose)
    assert dropping.named(encoded) == ("reference", "pose")
    assert torch.equal(dropping.without(encoded, [])["background"], encoded["background"])
    assert not dropping.without(encoded, [])["reference"].any()
    size = (1, *denoiser.latent_shape(SHAPE))
    settings = Generate(steps=2, seed=5, reference_guidance=2.0, pose_guidance=3.0)
    ours = sampling.sample(denoiser, encoded, size, settings, [0])
    assert sampling.sample(denoiser, encoded, size, settings, [0], window=2).isfinite().all()
    denoiser.save(tmp_path / "model", shape=SHAPE)
    pipe = diffusers.DiffusionPipeline.from_pretrained(
        tmp_path / "model", custom_pipeline=str(tmp_path / "model"), trust_remote_code=True
    )
    pipe.set_progress_bar_config(disable=True)
    noise = noise_like(torch.empty(size), torch.tensor([0]), 5)
    run = {"latents": noise, "num_inference_steps": 2, "output_type": "latent"}
    run |= {"reference_guidance": 2.0, "pose_guidance": 3.0}
    cut, _ = faces.cut(faces.Faces(yuv420_to_rgb(batch.video), batch.pose), 16)
    given = (batch.reference[0], drawing.draw(batch.pose[0], 64, 64, "wan_animate"))
    theirs = pipe(*given, face=cut[0], background=video[0], mask=person[0], **run).frames
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(pipe(*given, face=cut[0], **run).frames, ours, atol=1e-3)
    with pytest.raises(ValueError, match="belong together"):
        pipe(*given, face=cut[0], background=video[0], **run)


@torch.no_grad()
def test_faces_are_dropped_with_the_pose_and_of_a_body_alone_none_is_seen(made):
    denoiser, batch = load(base(made)), batch_of(2)
    encoded, t = denoiser.encode(batch), torch.tensor([0.3, 0.8])
    both = denoiser.predict(encoded.clean, t, encoded.conditions)
    alone = denoiser.encode(batch.part(slice(1, 2)))
    torch.testing.assert_close(denoiser.predict(alone.clean, t[1:], alone.conditions), both[1:], rtol=1e-3, atol=1e-4)
    body = denoiser.encode(batch_of(2, seen=False))
    assert not body.conditions["face"].any() and encoded.conditions["face"].any()
    dropped = dropping.dropped(denoiser, encoded, Drop(pose=1.0, reference=1.0), 0).conditions
    assert not any(dropped[name].any() for name in ("pose", "face", "reference", "image"))
    kept = dropping.without(encoded.conditions, ["pose"])
    assert kept["face"].any() and not kept["image"].any()
    size, settings = (2, *denoiser.latent_shape(SHAPE)), Generate(steps=2, reference_guidance=2.0, pose_guidance=3.0)
    for window in (None, 2):
        samples = sampling.sample(denoiser, encoded.conditions, size, settings, [0, 1], window=window)
        assert samples.isfinite().all()
    assert set(cache.compact(alone)) == {"clean", *(f"conditions.{name}" for name in encoded.conditions)}


@torch.no_grad()
def test_what_encodes_clips_alone_says_the_same(made):
    """Without the network's weights but the motion encoder's."""
    whole, alone = load(base(made)), wan_animate.encoder(base(made))
    assert next(alone.network.blocks.parameters()).is_meta
    batch = batch_of(1)
    for name, value in whole.encode(batch).conditions.items():
        assert torch.equal(alone.encode(batch).conditions[name], value), name
    assert cache.key(whole, "wan_animate", SHAPE) == cache.key(alone, "wan_animate", SHAPE)
    changed = load(base(made))
    changed.motion_encoder.conv_in.weight.mul_(1.1)
    assert cache.key(changed, "wan_animate", SHAPE) != cache.key(whole, "wan_animate", SHAPE)
    changed = load(base(made))
    changed.image_processor.image_mean = [0.4, 0.4, 0.4]
    assert cache.key(changed, "wan_animate", SHAPE) != cache.key(whole, "wan_animate", SHAPE)


@torch.no_grad()
def test_a_saved_network_and_its_pipeline_see_the_same_and_an_older_one_what_it_was_trained_with(made, tmp_path):
    denoiser, batch = load(base(made)), batch_of(1)
    denoiser.save(tmp_path / "model", shape=SHAPE)
    saved = Model(family="wan_animate", base=str(tmp_path / "model"))
    again, encoded = load(saved), denoiser.encode(batch)
    assert again.native and cache.key(again, "wan_animate", SHAPE) == cache.key(denoiser, "wan_animate", SHAPE)
    size, settings = (1, *denoiser.latent_shape(SHAPE)), Generate(steps=3, seed=5)
    ours = sampling.sample(again, encoded.conditions, size, settings, [0])
    pipe = diffusers.DiffusionPipeline.from_pretrained(
        tmp_path / "model", custom_pipeline=str(tmp_path / "model"), trust_remote_code=True
    )
    pipe.set_progress_bar_config(disable=True)
    noise = noise_like(torch.empty(size), torch.tensor([0]), 5)
    run = {"latents": noise, "num_inference_steps": 3, "output_type": "latent"}
    drawn = drawing.draw(batch.pose[0], 64, 64, "wan_animate")
    cut, _ = faces.cut(faces.Faces(yuv420_to_rgb(batch.video), batch.pose), 16)
    theirs = pipe(batch.reference[0], drawn, face=cut[0], **run).frames
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(pipe(batch.reference[0], drawn, **run).frames, ours, atol=1e-3)
    about = json.loads((tmp_path / "model" / "entprog.json").read_text())
    (tmp_path / "model" / "entprog.json").write_text(json.dumps({k: v for k, v in about.items() if k != "native"}))
    shutil.rmtree(tmp_path / "model" / "image_encoder")
    older = load(saved)
    assert not older.native and older.form == "" and set(older.encode(batch).conditions) == {"reference", "pose"}


def test_a_driving_clips_faces_are_where_its_driver_is():
    """Also where the motion was retargeted, or is shorter than its clip; of a file of poses there is none."""
    pose, other = wholebodies.moving(12), wholebodies.moving(12) * 0.9
    video = np.zeros((12, 64, 64, 3), np.uint8)
    still = np.zeros((64, 64, 3), np.uint8)
    plain, retargeted = (motions.Motion("a", still, one, video, driver=d) for one, d in ((pose, None), (other, pose)))
    shapes = SimpleNamespace(whole_frames=lambda frames: 9)
    for motion in (plain, retargeted):
        cut = rendering.fitting(shapes, motion, SHAPE)
        found = rendering._faces([cut])
        assert found.video.shape == (1, 9, 3, 64, 64) and torch.equal(found.pose[0], torch.from_numpy(pose[:9]))
    bare = motions.Motion("b", still, pose, None)
    assert rendering._faces([plain, bare]) is None
    network = checkpoints.Checkpoint(Path("x"), {"family": "wan_animate", "native": True}, SHAPE, None)
    body = replace(plain, pose=wholebody.body(pose))
    assert network.faceless([plain]) == ""
    assert network.faceless([plain, bare, body]).startswith("2 of 3 motions show the network no face")
    assert replace(network, about={"family": "wan_animate"}).faceless([bare]) == ""


def test_without_its_image_encoder_a_base_is_one_line(made, tmp_path):
    shutil.copytree(made[1], tmp_path / "bare", ignore=shutil.ignore_patterns("image_*"))
    with pytest.raises(
        UserError, match=r"bare has no image_encoder/ and image_processor/, .*: give its pipeline"
    ) as error:
        inspect(Model(family="wan_animate", base=str(tmp_path / "bare")))
    assert "\n" not in str(error.value)
