"""Weights of the loss at faces and hands: where they count, that nothing else does, and where they come from."""

import dataclasses
import functools

import numpy as np
import pytest
import torch

from entprog import config
from entprog.config import ClipShape
from entprog.data import clip_stream, latents, shards
from entprog.data.clips import Clips
from entprog.diffusion import losses, objectives, regions
from entprog.errors import UserError
from entprog.media import wholebody
from helpers import networks, real_clips, wholebodies
from helpers.networks import tiny_denoiser, tiny_experiment
from pipelines.stream import feed
from pipelines.training import checks

FACE, HAND = wholebody.FACE, (wholebody.LEFT_HAND, wholebody.RIGHT_HAND)


def posed(clips: int = 2, frames: int = 2) -> torch.Tensor:
    return torch.from_numpy(wholebodies.moving(frames))[None].repeat(clips, 1, 1, 1)


def train(**values) -> config.Train:
    return tiny_experiment(train=values).train


def batch(pose=None):
    return dataclasses.replace(networks.latents([3, 5]), pose=pose)


@pytest.mark.parametrize("points", [33, 133])
def test_weights_of_one_are_todays_bits_and_so_are_poses_without_face_and_hands(points):
    denoiser, pose = tiny_denoiser(tiny_experiment()), wholebody.laid_out(posed(), points)
    plain = losses.training_loss(denoiser, batch(), train())
    assert regions.weights(batch(pose), train()) is None and regions.weights(batch(), train(face_weight=5)) is None
    assert torch.equal(losses.training_loss(denoiser, batch(pose), train()), plain)
    weighted = losses.training_loss(denoiser, batch(pose), train(face_weight=5, hand_weight=3))
    if points == 33:
        torch.testing.assert_close(weighted, plain)
    else:
        assert not torch.isclose(weighted, plain)


def test_a_weight_is_within_its_boxes_alone_and_a_clips_share_stays():
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(2, 3, 2, 16, 16, generator=generator)
    pose = posed()
    pose[1, :, :, 2] = 0  # a clip in which nothing is seen
    within = regions.weights(batch(pose), train(face_weight=4, hand_weight=2))
    face = regions.covered(pose, (FACE,), (2, 16, 16))
    hand = regions.covered(pose, HAND, (2, 16, 16))
    assert 0 < face[0].float().mean() < 0.3 and 0 < hand[0].float().mean() < 0.3
    assert not (face[1].any() or hand[1].any()) and not (face & hand).any()

    def gradient(weights):
        prediction = torch.zeros_like(target, requires_grad=True)
        objectives.loss(prediction, target, within=weights).sum().backward()
        return prediction.grad

    plain, weighted = gradient(None), gradient(within)
    torch.testing.assert_close(weighted[1], plain[1])
    ratio = (weighted / plain)[0]
    outside = ~(face | hand)[0].expand_as(ratio)
    level = 1 / within[0].mean()
    torch.testing.assert_close(ratio[outside], level.expand(int(outside.sum())))
    torch.testing.assert_close(ratio[face[0].expand_as(ratio)].mean(), 4 * level)
    torch.testing.assert_close(ratio[hand[0].expand_as(ratio)].mean(), 2 * level)
    uniform = torch.full_like(within, 7.0)
    torch.testing.assert_close(gradient(uniform), plain)


def test_where_the_reference_is_given_the_rest_counts_with_its_weights():
    target = torch.arange(1.0, 17).view(1, 1, 4, 2, 2)
    given, within = torch.zeros(1, 1, 4, 2, 2), torch.ones(1, 1, 4, 2, 2)
    given[:, :, 0], within[:, :, 2] = 1, 3
    found = objectives.loss(torch.zeros_like(target), target, given=(given, target), within=within)
    squares = target.square().flatten()
    torch.testing.assert_close(found, (squares[4:].sum() + 2 * squares[8:12].sum())[None] / (12 + 8))


def test_training_counts_them_and_held_out_loss_does_not():
    denoiser, one = tiny_denoiser(tiny_experiment()), batch(posed())
    wanted = train(face_weight=9)
    with torch.no_grad():
        t = objectives.timesteps(one.position, wanted.seed)
        noise = objectives.noise_like(one.clean, one.position, wanted.seed)
        noisy, target = denoiser.process.pair(one.clean, noise, t)
        errors = (denoiser.predict(noisy, t, one.conditions) - target).square().mean(1, keepdim=True)
        within = regions.weights(one, wanted)
        due = ((errors * within).flatten(1).sum(1) / within.flatten(1).sum(1)).mean()
        torch.testing.assert_close(losses.training_loss(denoiser, one, wanted), due)
    held = [losses.held_out_loss(denoiser, [each], 2, 0) for each in (one, batch())]
    assert held[0] == held[1]


@pytest.mark.parametrize(("frames", "latent"), [(1, 1), (5, 5), (5, 2), (9, 3), (17, 3), (13, 4), (4, 1)])
def test_a_latent_shows_what_one_of_its_frames_shows(frames, latent):
    """As a video VAE groups frames: the first alone, then every few."""
    each = (frames - 1) // (latent - 1) if latent > 1 else frames
    groups = [{0}, *(range(first, first + each) for first in range(1, frames, each))] if latent > 1 else [range(frames)]
    for seen in range(frames):
        pose = posed(1, frames)
        pose[:, [f for f in range(frames) if f != seen], :, 2] = 0
        shown = regions.covered(pose, (FACE,), (latent, 12, 8)).flatten(3).any(-1)[0, 0]
        assert shown.tolist() == [seen in group for group in groups]


@pytest.mark.parametrize(("height", "width"), [(12, 8), (60, 104), (7, 9)])
def test_boxes_hold_their_points_and_some_room_and_no_more(height, width):
    pose = posed(1, 1)
    shown = regions.covered(pose, (FACE,), (1, height, width))[0, 0, 0]
    places = pose[0, 0, FACE, :2] * torch.tensor([width, height])
    rows, columns = places[:, 1].floor().long(), places[:, 0].floor().long()
    assert shown[rows, columns].all()
    low, high = places.amin(0), places.amax(0)
    room = regions.MARGIN * (high - low).max()
    there = shown.nonzero().flip(-1)
    assert (there.amin(0) >= (low - room).floor()).all() and (there.amax(0) <= (high + room).floor()).all()
    assert (there.amin(0) < low - room + 1).all() and (there.amax(0) > high + room - 2).all()


def test_boxes_go_with_the_clips_shape_as_their_pictures_do():
    pose = torch.from_numpy(wholebodies.moving(5))[None]
    video, reference = torch.zeros(1, 5, 48, 32, dtype=torch.uint8), torch.zeros(1, 32, 32, 3, dtype=torch.uint8)
    clips = Clips(video, reference, pose, torch.tensor([0]))
    small = clips.resized(ClipShape(frames=3, height=16, width=16, fps=8))
    assert torch.equal(small.pose, pose[:, 1:4])
    whole, part = (regions.covered(c.pose, (FACE,), (c.pose.shape[1], 16, 16)) for c in (clips, small))
    assert torch.equal(whole[:, :, 1:4], part)


def test_points_out_of_the_picture_few_of_them_or_unsure_ones_are_no_box():
    away, few, unsure = (
        lambda p: p[..., FACE, :2].add_(3),
        lambda p: p[:, :, 40:91, 2].zero_(),
        lambda p: p[..., 2].mul_(0.2),
    )
    for change in (away, few, unsure):
        pose = posed(1, 1)
        change(pose)
        assert not regions.covered(pose, (FACE,), (1, 12, 8)).any()


# ---- from shards ----

SHAPE = ClipShape(frames=5, height=48, width=32, fps=12)


@pytest.fixture(scope="module")
def rows():
    whole = [real_clips.row("cam01", "train", 0.1 * i, SHAPE) for i in range(3)]
    moved = [{**row, "pose": wholebodies.moving(5) + np.float32([0.01 * i, 0, 0])} for i, row in enumerate(whole)]
    return moved, {**real_clips.row("cam04", "held_out", 0.2, SHAPE), "pose": wholebodies.moving(5)}


def written(folder, rows, points):
    train_rows, held = rows
    infos = {
        "train": [shards.write_shard(folder, "train/0.parquet", train_rows, SHAPE, points)],
        "held_out": [shards.write_shard(folder, "held_out/0.parquet", [held], SHAPE, points)],
    }
    return shards.write_dataset(folder, SHAPE, infos, {}, points)


def test_cached_latents_bring_the_poses_of_their_clips(rows, tmp_path):
    dataset = written(tmp_path, rows, 133)
    numbers = np.array([2, 0, 2])
    clips = clip_stream.decode(dataset, "train", numbers, frames=3)
    poses = functools.partial(clip_stream.poses, dataset, "train", frames=3)
    assert np.array_equal(poses(numbers), clips["pose"]) and clips["pose"].shape == (3, 3, 133, 3)
    clean = np.random.default_rng(0).random((3, 4, 3, 6, 4), np.float32)
    piece = latents.Piece("train/0.parquet", dataset.splits["train"][0].sha256, 0, 3)
    file = latents.write(tmp_path / "latents" / "k", piece, [{"clean": clean[i : i + 1]} for i in range(3)])
    cache = latents.finish(tmp_path / "latents" / "k", {"clean": (4, 3, 6, 4)}, [file], {})
    for given in (None, poses):
        arrays = {**feed._read_latents(cache, given, numbers), "position": numbers}
        found = latents.to_latents(arrays, cache.shapes, clip_stream.to_device)
        assert np.array_equal(found.clean, clean[numbers])
        assert found.pose is None if given is None else np.array_equal(found.pose, clips["pose"])


def test_shards_without_faces_and_hands_are_refused_before_anything_starts(rows, tmp_path):
    for points, weight in ((33, 1.0), (33, 2.0), (133, 2.0)):
        folder = tmp_path / str(points)
        if not folder.exists():
            written(folder, rows, points)
        data = {"shards": str(folder), "shape": SHAPE.model_dump()}
        experiment = tiny_experiment(data=data, train={"hand_weight": weight})
        if points == 133 or weight == 1:
            assert checks.check(experiment).points == points
        else:
            with pytest.raises(UserError, match="33 points, without face and hands: prepare them anew"):
                checks.check(experiment)


def test_a_weight_of_one_is_no_part_of_what_decides():
    names = config.deciding(tiny_experiment()).keys()
    assert not {"train.face_weight", "train.hand_weight"} & names
    assert "train.face_weight" in config.deciding(tiny_experiment(train={"face_weight": 2}))
    for wrong in (0, -1, float("nan"), float("inf")):
        with pytest.raises(UserError, match=r"train\.face_weight"):
            tiny_experiment(train={"face_weight": wrong})
