"""DWPose's drawing of poses, and the setting that chooses between it and ours."""

import runpy
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from entprog import config
from entprog.config import ClipShape
from entprog.data import latents
from entprog.data.clips import Clips
from entprog.errors import UserError
from entprog.media import drawing, dwpose, skeleton, styles, wholebody
from entprog.models import adapters, folders
from helpers import wholebodies
from helpers.networks import TINY, tiny_denoiser, tiny_experiment
from pipelines.generating import checkpoints, motions
from pipelines.training import model_card, networks, outline

SIDE = 512


def pixel(drawn: torch.Tensor, x: float, y: float) -> list[int]:
    """RGB, 0..255, at a place in 0..1 of [3, H, W]."""
    _, height, width = drawn.shape
    color = drawn[:, min(int(y * height), height - 1), min(int(x * width), width - 1)]
    return ((color + 1) * 127.5).round().int().tolist()


def between(points: np.ndarray, a: int, b: int, share: float = 0.5) -> tuple[float, float]:
    x, y = points[a, :2] * (1 - share) + points[b, :2] * share
    return float(x), float(y)


@pytest.fixture(scope="module")
def person() -> np.ndarray:
    points = wholebodies.standing()
    points[wholebody.FACE, :2] += (0.0, -0.07)  # off the nose, so that no dot of the face lies on a joint
    return points


@pytest.fixture(scope="module")
def drawn(person) -> torch.Tensor:
    return dwpose.draw(torch.from_numpy(person), SIDE, SIDE)


def test_limbs_have_openposes_colors_dimmed_and_joints_are_bright(person, drawn):
    dimmed = {(6, 8): (255, 170, 0), (8, 10): (255, 255, 0), (5, 7): (170, 255, 0), (7, 9): (85, 255, 0)}
    dimmed |= {(12, 14): (0, 255, 85), (14, 16): (0, 255, 170), (11, 13): (0, 170, 255), (13, 15): (0, 85, 255)}
    for (a, b), color in dimmed.items():
        assert pixel(drawn, *between(person, a, b)) == pytest.approx([0.6 * level for level in color], abs=1)
    neck = person[5, :2] / 2 + person[6, :2] / 2
    joints = {0: (255, 0, 0), 6: (255, 170, 0), 8: (255, 255, 0), 5: (85, 255, 0), 7: (0, 255, 0)}
    joints |= {12: (0, 255, 170), 16: (0, 170, 255), 11: (0, 85, 255), 15: (85, 0, 255)}
    for joint, color in joints.items():
        assert pixel(drawn, *person[joint, :2]) == pytest.approx(color, abs=1), joint
    assert pixel(drawn, *neck) == pytest.approx((255, 85, 0), abs=1)
    for side, color in ((6, (255, 0, 0)), (5, (255, 85, 0))):  # to the shoulders
        at = neck * 0.5 + person[side, :2] * 0.5
        assert pixel(drawn, *at) == pytest.approx([0.6 * level for level in color], abs=1)
    assert pixel(drawn, 0.05, 0.95) == [0, 0, 0]


def test_hands_have_bones_of_the_rainbow_and_blue_points_and_the_face_white_ones():
    person = wholebodies.standing()
    person[wholebody.LEFT_HAND, :2] = (0.7, 0.5) + 6 * (person[wholebody.LEFT_HAND, :2] - person[9, :2])
    person[9, :2] = 0.9, 0.9
    drawn = dwpose.draw(torch.from_numpy(person), SIDE, SIDE)
    first = wholebody.LEFT_HAND.start
    for (a, b), color in {(1, 2): (255, 77, 0), (5, 6): (128, 255, 0), (17, 18): (255, 0, 230)}.items():
        assert pixel(drawn, *between(person, first + a, first + b)) == pytest.approx(color, abs=2)
    for point in (0, 4, 8, 20):
        assert pixel(drawn, *person[first + point, :2]) == [0, 0, 255]
    for dot in (23, 40, 90):
        assert pixel(drawn, *person[dot, :2]) == [255, 255, 255]


@pytest.mark.parametrize(("height", "width"), [(64, 48), (96, 64), (256, 512), (1024, 768)])
def test_sizes_follow_the_shorter_side_and_nothing_vanishes(height, width):
    bone = torch.full((1, 133, 3), 0.0)
    bone[0, [6, 8], 2] = 1
    bone[0, 6, :2], bone[0, 8, :2] = torch.tensor([0.2, 0.5]), torch.tensor([0.8, 0.5])
    column = (dwpose.draw(bone, height, width)[0, 0, :, width // 2] + 1).sum() / 2
    assert float(column) == pytest.approx(0.6 * max(8 * min(height, width) / 512, 1.5), rel=0.05)


@pytest.mark.parametrize("hide", ["score", "nan"])
@pytest.mark.parametrize(("part", "joints"), [(8, 2), (0, 5), (91, 5), (60, 0)])
def test_what_is_not_seen_is_not_drawn(person, hide, part, joints):
    hidden = person.copy()
    hidden[part] = (*person[part, :2], 0.29) if hide == "score" else (np.nan, np.nan, 1)
    both = [dwpose.draw(torch.from_numpy(points), SIDE, SIDE) for points in (person, hidden)]
    assert not torch.equal(*both) and both[1].isfinite().all()
    if part in (8, 91):
        assert pixel(both[1], *person[part, :2]) != pixel(both[0], *person[part, :2])


def test_frames_are_drawn_each_as_alone_in_pieces_and_none_at_all(person, monkeypatch):
    poses = torch.from_numpy(wholebodies.moving(6)).reshape(2, 3, 133, 3).clone()
    poses[0, 0, 8, 2] = 0
    poses[1, 1, :, 0] += 4  # out of the picture
    poses[1, 2, 90, :2] = torch.tensor([-3.0, 0.999])
    whole = dwpose.draw(poses, 40, 28)
    assert whole.shape == (2, 3, 3, 40, 28) and whole.min() == -1 and whole.max() <= 1
    alone = torch.stack([dwpose.draw(pose, 40, 28) for pose in poses.flatten(0, 1)]).reshape(whole.shape)
    torch.testing.assert_close(alone, whole, atol=1e-5, rtol=0)
    assert (whole[1, 1] == -1).all()
    monkeypatch.setattr(dwpose, "CHUNK_PIXELS", 2 * 40 * 28)
    torch.testing.assert_close(dwpose.draw(poses, 40, 28), whole, atol=1e-5, rtol=0)
    assert dwpose.draw(poses[:0], 40, 28).shape == (0, 3, 3, 40, 28)


def test_wan_animates_drawing_has_toes_and_hands_and_no_face(person):
    """Limbs to the toes in the colours that its makers' program gives them, points of toes in others."""
    look = dwpose.WAN_ANIMATE
    drawn = dwpose.draw(torch.from_numpy(person), SIDE, SIDE, look)
    assert pixel(drawn, *between(person, 8, 10)) == pytest.approx([0.6 * 255, 0.6 * 255, 0], abs=1), "as DWPose's"
    for ankle, toes, limb, point in (
        (15, (17, 18), (255, 0, 85), (200, 200, 0)),
        (16, (20, 21), (200, 200, 0), (100, 100, 0)),
    ):
        toe = person[toes, :2].mean(0)
        assert pixel(drawn, *toe) == pytest.approx(point, abs=1)
        assert pixel(drawn, *(person[ankle, :2] * 0.5 + toe * 0.5)) == pytest.approx(
            [0.6 * level for level in limb], abs=2
        )
    bare = person.copy()
    bare[wholebody.FACE, 2] = 0
    assert torch.equal(dwpose.draw(torch.from_numpy(bare), SIDE, SIDE, look), drawn), "no points of the face"
    bare[wholebody.LEFT_HAND, 2] = 0
    assert not torch.equal(dwpose.draw(torch.from_numpy(bare), SIDE, SIDE, look), drawn)


@pytest.mark.parametrize(("side", "limb", "bone"), [(200, 3, 1), (480, 3, 1), (720, 5, 1), (1080, 9, 2)])
def test_wan_animates_widths_are_its_makers(side, limb, bone):
    """In whole pixels: of a limb those of its thickest place, of a hand's bone between its points."""
    line = torch.zeros(1, 133, 3)
    for a, b, row in ((6, 8, 0.25), (92, 93, 0.75)):
        line[0, [a, b], 2] = 1
        line[0, a, :2], line[0, b, :2] = torch.tensor([0.2, row]), torch.tensor([0.8, row])
    light = (dwpose.draw(line, side, side, dwpose.WAN_ANIMATE)[0, :, :, side // 2] + 1) / 2
    upper, lower = light.amax(0).split(side // 2)
    assert float(upper.sum() / 0.6) == pytest.approx(limb, abs=0.2) and float(lower.sum()) == pytest.approx(
        bone, abs=0.2
    )


@pytest.mark.parametrize(("score", "there"), [(0.49, False), (0.5, True)])
def test_wan_animates_points_are_seen_from_half_on_and_hands_point_by_point(person, score, there):
    few = person.copy()
    few[wholebody.LEFT_HAND, 2] = 0
    without = dwpose.draw(torch.from_numpy(few), SIDE, SIDE, dwpose.WAN_ANIMATE)
    few[wholebody.LEFT_HAND.start + 8, 2] = score
    one = dwpose.draw(torch.from_numpy(few), SIDE, SIDE, dwpose.WAN_ANIMATE)
    assert torch.equal(one, without) != there


@pytest.mark.parametrize(
    ("points", "from_joint", "color"),
    [((5, 6), 0, (255, 85, 0)), ((17, 18), 15, (200, 200, 0)), ((20, 21), 16, (100, 100, 0))],
    ids=["neck", "left toes", "right toes"],
)
def test_wan_animates_joint_between_two_points_is_as_sure_as_their_mean(person, points, from_joint, color):
    """As its makers average the two with their scores; DWPose wants both of the neck's."""
    joint = person[list(points), :2].mean(0)
    along = (joint + person[from_joint, :2]) / 2
    cases = [(dwpose.WAN_ANIMATE, (0.3, 0.9), True), (dwpose.WAN_ANIMATE, (0.9, 0.12), True)]
    cases += [(dwpose.WAN_ANIMATE, (0.9, 0.09), False), (dwpose.DWPOSE, (0.9, 0.29), False)]
    for look, scores, there in cases:
        some = person.copy()
        some[list(points), 2] = scores
        drawn = dwpose.draw(torch.from_numpy(some), SIDE, SIDE, look)
        assert (pixel(drawn, *joint) == pytest.approx(color, abs=1)) == there
        assert any(pixel(drawn, *along)) == there


def test_of_a_bodys_33_points_no_look_draws_hands_or_a_face(person):
    """Knuckles are among the 33, in shards of 133 too."""
    body = wholebody.body(torch.from_numpy(person))
    bare = torch.from_numpy(person).clone()
    bare[wholebody.FACE.start :, 2] = 0
    bare[[18, 21], :2] = bare[[17, 20], :2]  # the toe that a body has
    for style in ("wan_animate", "dwpose"):
        for points in (body, wholebody.whole(body)):
            drawn = drawing.draw(points, SIDE, SIDE, style)
            assert torch.equal(drawn, drawing.draw(bare, SIDE, SIDE, style))
            for knuckle in (5, 17):
                assert pixel(drawn, *person[wholebody.LEFT_HAND.start + knuckle, :2]) != [0, 0, 255]


def test_of_a_bodys_33_points_wan_animates_toes_are_the_big_ones(person):
    body = wholebody.body(torch.from_numpy(person))
    drawn = drawing.draw(body, SIDE, SIDE, "wan_animate")
    assert pixel(drawn, *person[17, :2]) == pytest.approx((200, 200, 0), abs=1)
    assert pixel(drawn, *person[20, :2]) == pytest.approx((100, 100, 0), abs=1)


def test_both_styles_draw_both_layouts():
    whole = torch.from_numpy(wholebodies.moving(3))
    body = wholebody.body(whole)
    assert torch.equal(drawing.draw(whole, 64, 48), skeleton.draw(body, 64, 48))
    bare = whole.clone()
    bare[:, wholebody.FACE.start :, 2] = 0
    assert torch.equal(drawing.draw(body, 64, 48, "dwpose"), dwpose.draw(bare, 64, 48)), "the body alone"
    assert not torch.equal(dwpose.draw(whole, 64, 48), dwpose.draw(bare, 64, 48)), (
        "face and hands are drawn where known"
    )


@pytest.mark.parametrize("part", [wholebody.FACE, wholebody.LEFT_HAND, wholebody.RIGHT_HAND])
@pytest.mark.parametrize("hide", ["score", "nan"])
def test_a_face_or_hand_is_drawn_where_enough_of_its_points_are_sure(part, hide):
    """As the loss and the metrics count it."""
    whole = torch.from_numpy(wholebodies.standing())[None].repeat(3, 1, 1)
    count = part.stop - part.start
    bare = whole[:1].clone()
    bare[:, part, 2] = 0
    least = -(-count // 2)
    for frame, sure in enumerate((least - 1, least, count)):
        hidden = slice(part.start + sure, part.stop)
        if hide == "score":
            whole[frame, hidden, 2] = 0.29
        else:
            whole[frame, hidden, :2] = torch.nan
    drawn, without = dwpose.draw(whole, 96, 64), dwpose.draw(bare, 96, 64)[0]
    assert [not torch.equal(picture, without) for picture in drawn] == [False, True, True]
    assert (least - 1) / count < wholebody.ENOUGH <= least / count


# ---- the setting ----


def denoiser(skeleton=None, **model):
    return tiny_denoiser(tiny_experiment(model={"skeleton": skeleton, **model}))


def clips() -> Clips:
    pose = torch.from_numpy(wholebodies.moving(2))[None]
    return Clips(
        torch.zeros(1, 2, 24, 16, dtype=torch.uint8),
        torch.zeros(1, 16, 16, 3, dtype=torch.uint8),
        pose,
        torch.tensor([0]),
    )


def again(folder, **model):
    return tiny_denoiser(tiny_experiment(model={"init": {}, "base": str(folder), "vae": "auto", **model}))


def test_the_network_is_shown_what_the_setting_says_and_its_folder_remembers(tmp_path):
    shape, pose = ClipShape(frames=2, height=16, width=16, fps=8), clips().pose
    for style in styles.STYLES:
        one = denoiser(style)
        due = drawing.draw(pose, 16, 16, style).transpose(1, 2)
        assert torch.equal(one.encode(clips()).conditions["pose"], due)
        one.save(tmp_path / style, shape)
        assert folders.saved(tmp_path / style)["skeleton"] == style
        assert torch.equal(again(tmp_path / style).encode(clips()).conditions["pose"], due)
        other = again(tmp_path / style, skeleton="limbs")
        assert torch.equal(other.encode(clips()).conditions["pose"], drawing.draw(pose, 16, 16).transpose(1, 2))
        alone = runpy.run_path(str(tmp_path / style / "skeleton.py"))["draw"]
        points = pose if drawing.points(style) == 133 else wholebody.body(pose)
        assert torch.equal(alone(points, 16, 16).transpose(1, 2), due)
        card = model_card.card(folders.saved(tmp_path / style), {}, tmp_path / style, "x", None, {})
        assert f"float [F, {drawing.points(style)}, 3]" in card
    about = tmp_path / "limbs" / "entprog.json"
    about.write_text(about.read_text().replace('"skeleton": "limbs",', ""))
    assert again(tmp_path / "limbs").skeleton == "limbs", "of a folder that an earlier version saved"
    about.write_text(about.read_text().replace('"provenance"', '"skeleton": "stick",\n  "provenance"'))
    with pytest.raises(UserError, match="skeleton"):
        again(tmp_path / "limbs")


def test_caches_tell_the_styles_apart_where_a_pose_is_seen():
    shape = ClipShape(frames=2, height=16, width=16, fps=8)
    keys = [latents.key(denoiser(style), "wan", shape) for style in (None, *styles.STYLES)]
    assert keys[0] == keys[1] and len(set(keys)) == len(styles.STYLES)
    without = [latents.key(denoiser(s, conditions=["reference"]), "wan", shape) for s in ("limbs", "dwpose")]
    assert without[0] == without[1]
    named = [config.deciding(tiny_experiment(model={"skeleton": s})).get("model.skeleton") for s in (None, "dwpose")]
    assert named == [None, "dwpose"], "runs of before the setting are resumed"


def test_an_adapter_brings_its_skeleton(tmp_path):
    base = denoiser()
    base.save(tmp_path / "base", ClipShape(frames=2, height=16, width=16, fps=8))
    layer = "blocks.0.attn1.to_q"
    for said in ("dwpose", "stick"):
        width = TINY["num_attention_heads"] * TINY["attention_head_dim"]
        pair = adapters.Pair(torch.zeros(1, width), torch.zeros(width, 1), 1.0)
        about = {"family": "wan", "conditions": ["reference", "pose"], "skeleton": said}
        adapters.write(tmp_path / said, adapters.Adapter({layer: pair}, {}, about), "transformer")
    assert again(tmp_path / "base", adapter=str(tmp_path / "dwpose")).skeleton == "dwpose"
    assert again(tmp_path / "base", adapter=str(tmp_path / "dwpose"), skeleton="limbs").skeleton == "limbs"
    with pytest.raises(UserError, match="with skeleton 'stick', unknown here"):
        again(tmp_path / "base", adapter=str(tmp_path / "stick"))


# ---- the points that a network was trained on ----


def test_folder_and_adapter_remember_how_many_points_poses_had(tmp_path):
    shape, one = ClipShape(frames=2, height=16, width=16, fps=8), denoiser("dwpose")
    assert one.points == 33
    one.save(tmp_path / "body", shape)
    one.save(tmp_path / "whole", shape, points=133)
    assert folders.saved(tmp_path / "body")["points"] == again(tmp_path / "body").points == 33
    assert again(tmp_path / "whole").points == 133
    again(tmp_path / "whole").save(tmp_path / "merged", shape)
    assert folders.saved(tmp_path / "merged")["points"] == 133, "saved anew, it is the same network"
    denoiser().save(tmp_path / "limbs", shape)
    base, lora = {"init": {}, "base": str(tmp_path / "limbs"), "vae": "auto"}, {"steps": 1, "lora": {"rank": 2}}
    experiment = tiny_experiment(model={**base, "skeleton": "dwpose"}, train=lora)
    tuned = networks.load(experiment, torch.device("cpu"))
    networks.leave_adapter(tuned, experiment, tmp_path / "adapter", 133)
    goes_on = tiny_experiment(model={**base, "adapter": str(tmp_path / "adapter")}, train=lora)
    assert networks.load(goes_on, torch.device("cpu")).skeleton == "dwpose", "where an adapter is trained on, too"
    assert again(tmp_path / "body", adapter=str(tmp_path / "adapter")).points == 133
    about = tmp_path / "body" / "entprog.json"
    about.write_text(about.read_text().replace('"points": 33,', ""))
    assert again(tmp_path / "body").points == 33, "of a folder that an earlier version saved"
    about.write_text(about.read_text().replace('"provenance"', '"points": 17,\n  "provenance"', 1))
    with pytest.raises(UserError, match="points"):
        again(tmp_path / "body")


def checkpoint(skeleton: str, points: int, *sees: str) -> checkpoints.Checkpoint:
    about = {"skeleton": skeleton, "points": points, "conditions": sees or ("reference", "pose")}
    return checkpoints.Checkpoint(None, about, None, None)


@pytest.mark.parametrize("installed", [True, False])
def test_poses_are_estimated_with_the_points_that_the_network_was_trained_on(installed, monkeypatch, capsys):
    monkeypatch.setattr(motions, "find_spec", lambda name: installed or None)

    def taken(maker, **prepare):
        return motions.estimating(config.build({"prepare": prepare}, config.Generation), maker).prepare.pose

    assert taken(checkpoint("dwpose", 133)) == ("rtmlib" if installed else "blazepose")
    assert ("estimated by rtmlib" in capsys.readouterr().out) == installed
    assert taken(checkpoint("dwpose", 133), margin=0.2) == ("rtmlib" if installed else "blazepose")
    assert taken(checkpoint("dwpose", 133), pose="blazepose") == "blazepose", "as it was asked for"
    assert taken(checkpoint("dwpose", 33), pose="rtmlib") == "rtmlib"
    for other in (checkpoint("dwpose", 33), checkpoint("limbs", 133), checkpoint("dwpose", 133, "reference")):
        assert taken(other) == "blazepose"


def test_what_is_drawn_otherwise_than_in_training_is_said():
    assert "draw the body alone; the network was trained on 133" in checkpoint("dwpose", 133).unlike(33)
    assert "draw face and hands, which the network has not seen" in checkpoint("dwpose", 33).unlike(133)
    same = [checkpoint("dwpose", 33).unlike(33), checkpoint("limbs", 133).unlike(33)]
    assert [*same, checkpoint("dwpose", 133, "reference").unlike(33)] == ["", "", ""]

    def line(skeleton, points, shards, about=True, conditions=("pose",), faces=False):
        about = {"points": points, "about": about, "faces": faces}
        source = SimpleNamespace(skeleton=skeleton, conditions=conditions, **about)
        return outline.poses(SimpleNamespace(points=shards), source)

    assert "without face and hands" in line("dwpose", 33, 33) and "without face and hands" in line("dwpose", 133, 33)
    assert "draws the body alone, and no face is shown (" in line("wan_animate", 133, 33, faces=True)
    assert "it was trained on 33" in line("dwpose", 33, 133)
    nothing = [line("dwpose", 133, 133), line("dwpose", 33, 133, about={}), line("limbs", 133, 33)]
    assert [*nothing, line("dwpose", 33, 33, conditions=("reference",))] == [None] * 4


@pytest.mark.parametrize("look", [dwpose.DWPOSE, dwpose.WAN_ANIMATE])
def test_a_device_is_waited_for_twice_not_for_every_limb(look, person, monkeypatch):
    waits, own = [], torch.Tensor.tolist
    for name in ("tolist", "item", "__int__", "__bool__"):
        ask = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, ask=ask: (waits.append(ask), ask(self))[1])
    dwpose.draw(np.stack([person] * 3), 96, 64, look)
    assert waits == [own, own]  # limbs, and what lies over them
