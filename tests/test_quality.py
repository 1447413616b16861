"""Quality: known answers, worsening clips, agreement with references."""

import collections
import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch
import torchmetrics.functional.image
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.ndimage import gaussian_filter
from torchmetrics.image.fid import FrechetInceptionDistance

from entprog import files
from entprog.config import ClipShape, Evaluate
from entprog.errors import UserError
from entprog.media import assets, rtm, video, wholebody
from entprog.media.pose import PoseEstimator
from entprog.quality import consistency, metrics, networks, pictures, posing
from entprog.quality.card import ProtocolCard, unlike
from entprog.quality.figures import frechet_figure, mean_figure
from entprog.quality.frechet import frechet_distance
from entprog.quality.metrics import METRICS, Meter, choose
from helpers import wholebodies

NAMES = ("psnr", "ssim", "stlpips", "frechet_efficientnet_lite0", "frechet_transnetv2", "identity", "temporal")
FRAMES = 8


def real_clip(start_s: float, size: tuple[int, int]) -> np.ndarray:
    """The man of the held-out view, cut out."""
    times = video.clip_times(start_s, FRAMES, 12)
    return video.read_frames(assets.clip("cam04"), times, crop=(144, 240, 800, 1200), size=size)[0]


@pytest.fixture(scope="module")
def clips():
    return [real_clip(start_s, (96, 64)) for start_s in (0.0, 0.4)]


@pytest.fixture(scope="module")
def meter():
    return Meter(NAMES, Evaluate())


def figures(meter, clips, change) -> dict[str, float]:
    """Every metric of changed clips against the clips."""
    pose = np.zeros((FRAMES, 33, 3))
    found = [meter.measure(change(clip), clip, clip[0], pose) for clip in clips]
    values = {name: np.mean([m.values[name] for m in found]) for name in found[0].values}
    for name in found[0].features:
        real, made = (np.concatenate([m.features[name][side] for m in found]) for side in (0, 1))
        values[name] = frechet_distance(real, made)
    return values


def worsens(figures: list[dict[str, float]], name: str) -> bool:
    """Whether each step is worse than the one before."""
    sign = 1 if METRICS[name].better == "lower" else -1
    return bool((np.diff([sign * f[name] for f in figures]) > 0).all())


@pytest.fixture(scope="module")
def same(meter, clips):
    return figures(meter, clips, lambda clip: clip)


def test_equal_clips_have_perfect_figures(same):
    assert same["psnr"] == pictures.PSNR_LIMIT and same["ssim"] == pytest.approx(1, abs=1e-9)
    assert same["stlpips"] == 0
    assert same["frechet_efficientnet_lite0"] == pytest.approx(0, abs=1e-6)
    assert same["frechet_transnetv2"] == pytest.approx(0, abs=1e-6)
    assert 0.5 < same["identity"] < 1 and 0.5 < same["temporal"] < 1


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("psnr", "peak_signal_noise_ratio"),
        ("ssim", "structural_similarity_index_measure"),
        ("ms_ssim", "multiscale_structural_similarity_index_measure"),
    ],
)
def test_likeness_is_measured_frame_by_frame_and_is_that_of_the_whole_clip(name, function, monkeypatch):
    """A frame of 832x480 takes 2 GB in torchmetrics' convolution: a whole clip's would not fit a host."""
    own, seen = getattr(torchmetrics.functional.image, function), []
    monkeypatch.setattr(
        torchmetrics.functional.image, function, lambda *given, **how: seen.append(len(given[0])) or own(*given, **how)
    )
    generator = np.random.default_rng(0)
    truth = generator.integers(0, 256, (2, pictures.MS_SSIM_SIDE, 180, 3), dtype=np.uint8)
    noise = np.array([10, 60])[:, None, None, None] * generator.standard_normal(truth.shape)
    result = (truth + noise).clip(0, 255).astype(np.uint8)
    value = Meter([name], Evaluate()).measure(result, truth, truth[0], np.zeros((2, 33, 3))).values[name]
    assert seen == [1, 1]
    whole = [torch.from_numpy(clip).permute(0, 3, 1, 2).double() / 255 for clip in (result, truth)]
    how = {"dim": (1, 2, 3)} if name == "psnr" else {}
    each = own(*whole, data_range=1.0, reduction="none", **how).clamp(max=pictures.PSNR_LIMIT)
    assert value == pytest.approx(float(each.mean()), abs=1e-9) and each[0] > each[1]
    if name == "ms_ssim":
        with pytest.raises(ValueError, match="height must be larger"):
            pictures.ms_ssim(*(torch.zeros(1, 3, pictures.MS_SSIM_SIDE - 1, 180) for _ in range(2)))


def test_noise_worsens_what_looks_at_pixels(meter, clips, same):
    def noisy(sigma):
        return lambda clip: (clip + np.random.default_rng(0).normal(0, sigma, clip.shape)).clip(0, 255).astype(np.uint8)

    found = [same, *(figures(meter, clips, noisy(sigma)) for sigma in (8, 40))]
    for name in ("psnr", "ssim", "stlpips", "frechet_efficientnet_lite0", "frechet_transnetv2", "identity"):
        assert worsens(found, name), name


def test_blur_worsens_what_looks_at_pixels(meter, clips, same):
    def blurred(sigma):
        return lambda clip: gaussian_filter(clip, (0, sigma, sigma, 0))

    found = [same, *(figures(meter, clips, blurred(sigma)) for sigma in (1, 3))]
    for name in ("psnr", "ssim", "stlpips", "frechet_efficientnet_lite0"):
        assert worsens(found, name), name


def test_frames_out_of_order_worsen_what_looks_at_time_alone(meter, clips, same):
    def shuffled(stride):
        order = np.concatenate([np.arange(FRAMES)[i::stride] for i in range(stride)])
        return lambda clip: clip[order]

    found = [same, *(figures(meter, clips, shuffled(stride)) for stride in (2, 3))]
    assert worsens(found[:2], "temporal") and worsens(found[:2], "frechet_transnetv2")
    assert worsens([found[0], found[2]], "temporal") and worsens([found[0], found[2]], "frechet_transnetv2")
    assert all(f["frechet_efficientnet_lite0"] == pytest.approx(0, abs=1e-6) for f in found)
    assert all(f["identity"] == pytest.approx(same["identity"], abs=1e-6) for f in found)


def test_a_person_who_is_elsewhere_has_a_worse_pose():
    clip = real_clip(0.0, (288, 192))[:3]
    estimator = PoseEstimator()
    wanted = estimator.track(clip)
    assert np.isfinite(wanted).all()
    found = []
    for pixels in (0, 6, 24):
        moved = np.pad(clip, ((0, 0), (0, 0), (pixels, 0), (0, 0)), mode="edge")[:, :, : clip.shape[2]]
        found.append(posing.pose_values(wanted, estimator.track(moved), *clip.shape[1:3], pck_threshold=0.05))
    assert found[0] == {"pose_distance": 0.0, "pck": 1.0, "pose_found": 1.0}
    assert worsens(found, "pose_distance") and found[1]["pck"] >= found[2]["pck"] and found[2]["pck"] < 0.5
    size = np.ptp(wanted[..., :2] * (192, 288), axis=1).max()
    assert found[2]["pose_distance"] == pytest.approx(24 / size, rel=0.35)


def test_a_lost_person_counts_as_far_away_and_hidden_joints_do_not_count():
    wanted = np.random.default_rng(0).random((2, 33, 3))
    wanted[..., 2] = 1
    seen = wanted.copy()
    seen[1] = np.nan
    assert posing.pose_values(wanted, seen, 96, 64, 0.1) == {"pose_distance": 0.5, "pck": 0.5, "pose_found": 0.5}
    wanted[..., 2] = 0
    hidden = posing.pose_values(wanted, seen, 96, 64, 0.1)
    assert np.isnan(hidden["pck"]) and np.isnan(hidden["pose_distance"])


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 40), st.integers(2, 40), st.integers(1, 12), st.floats(0.1, 10), st.integers(0, 2**31))
def test_frechet_distance_is_that_of_the_formula(n, m, width, scale, seed):
    rng = np.random.default_rng(seed)
    one, other = rng.normal(size=(n, width)), scale * rng.normal(size=(m, width)) @ rng.normal(size=(width, width)) + 1
    found = frechet_distance(one, other)
    covariances = [np.atleast_2d(np.cov(x, rowvar=False)) for x in (one, other)]
    eigenvalues = scipy.linalg.eigvals(covariances[0] @ covariances[1])
    root = np.sqrt(eigenvalues.real.clip(0)).sum()
    due = np.square(one.mean(0) - other.mean(0)).sum() + sum(map(np.trace, covariances)) - 2 * root
    assert found == pytest.approx(due, rel=1e-5, abs=1e-5)
    assert found == pytest.approx(frechet_distance(other, one), rel=1e-9, abs=1e-9)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(one, one + 2) == pytest.approx(4 * width, rel=1e-9)


def test_frechet_distance_agrees_with_a_matrix_square_root_to_a_millionth():
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(400, 64)) @ rng.normal(size=(64, 64)), rng.normal(1, 2, size=(300, 64))
    root = scipy.linalg.sqrtm(np.cov(one, rowvar=False) @ np.cov(other, rowvar=False)).real
    due = np.square(one.mean(0) - other.mean(0)).sum() + np.trace(
        np.cov(one, rowvar=False) + np.cov(other, rowvar=False) - 2 * root
    )
    assert frechet_distance(one, other) == pytest.approx(due, rel=1e-6)


def test_frechet_distance_of_real_features_agrees_with_torchmetrics(clips):
    network = networks.load("efficientnet_lite0", Evaluate())

    class Features(torch.nn.Module):
        num_features = 12

        def forward(self, frames):
            return network.judge(frames)[:, :12].double()

    library = FrechetInceptionDistance(Features(), input_img_size=(3, 96, 64), normalize=False).set_dtype(torch.float64)
    sides = [torch.from_numpy(clip).permute(0, 3, 1, 2) for clip in clips]
    # More frames than features: the library's matrix square root is exact only for full rank.
    more = [torch.cat([side, side.flip(3)]) for side in sides]
    for frames, real in zip(more, (True, False), strict=True):
        library.update(frames, real=real)
    ours = frechet_distance(*(network.judge(frames)[:, :12].numpy() for frames in more))
    assert ours == pytest.approx(float(library.compute()), rel=1e-4)


def wave(frames: int, height: int, width: int, phase: float) -> torch.Tensor:
    f, y, x = torch.meshgrid(torch.arange(frames), torch.arange(height), torch.arange(width), indexing="ij")
    channels = [127.5 + 127.5 * torch.sin(0.1 * (x * (c + 1) + y) + 0.7 * f + phase) for c in range(3)]
    return torch.stack(channels, 1).to(torch.uint8)


def test_networks_give_what_their_authors_code_gives():
    """Numbers computed once with the packages that the weights come from."""
    one, other = wave(4, 96, 64, 0.0), wave(4, 96, 64, 1.0)
    distance = networks.load("stlpips", Evaluate()).judge(one, other)
    assert distance.tolist() == pytest.approx([0.13179885, 0.13099015, 0.13124523, 0.12760982], rel=1e-4)
    least = METRICS["stlpips"].least_side
    small = networks.load("stlpips", Evaluate()).judge(*(side[:, :, :least] for side in (one, other)))
    assert small.isfinite().all()
    features = networks.load("efficientnet_lite0", Evaluate()).judge(one)
    assert features.shape == (4, 1280)
    assert features[:, 2].tolist() == pytest.approx([0.84434539, 0.93462467, 0.82136208, 0.68392795], rel=1e-3)
    trunk = networks.load("transnetv2", Evaluate()).judge(one)
    assert trunk.shape == (1, 256)
    assert trunk[0, :4].tolist() == pytest.approx([0.56109387, 0.76945502, 0.24455422, 0.28794205], rel=1e-3)


def test_the_usual_networks_load_from_files(tmp_path):
    from entprog.quality import resnet3d

    torch.manual_seed(0)
    network = resnet3d.ResNet3d50().eval()
    state = {f"module.{name}": value for name, value in network.state_dict().items()}
    torch.save({"epoch": 1, "state_dict": state | {"module.fc.weight": torch.zeros(400, 2048)}}, tmp_path / "r.pth")
    loaded = networks.load("resnet3d", Evaluate(resnet3d=str(tmp_path / "r.pth")))
    large, side = wave(2, 300, 200, 0.0) // 128 * 255, resnet3d.SIZE  # with edges, beyond which bicubic goes
    channels = [[Image.fromarray(c.numpy().astype(np.float32)) for c in frame] for frame in large]
    pillow = torch.tensor(np.array([[c.resize((side, side), Image.BICUBIC) for c in frame] for frame in channels]))
    assert pillow.min() < 0 and pillow.max() > 255
    with torch.no_grad():
        direct = network(pillow[[0, *[1] * (resnet3d.FRAMES - 1)]].transpose(0, 1)[None])
    assert direct.shape == (1, 2048) and len(loaded.sha256) == 64
    torch.testing.assert_close(loaded.judge(large), direct, rtol=1e-3, atol=1e-4)

    class Script(torch.nn.Module):
        def forward(self, x: torch.Tensor, rescale: bool, resize: bool, return_features: bool) -> torch.Tensor:
            return x.mean((2, 3, 4)) if return_features else x

    torch.jit.script(Script()).save(str(tmp_path / "i3d.pt"))
    script, frames = (
        networks.load("i3d", Evaluate(i3d=str(tmp_path / "i3d.pt"), trust_torchscript=True)),
        wave(5, 32, 32, 0.0),
    )
    found = {}
    for length in (None, 10):
        given = {"i3d": str(tmp_path / "i3d.pt"), "trust_torchscript": True, "window_frames": length}
        clip = wave(12, 32, 32, 0.0).permute(0, 2, 3, 1).numpy()
        meter = Meter(("fvd",), Evaluate(**given))
        found[length] = meter.measure(clip, clip, clip[0], np.zeros((12, 33, 3))).features["fvd"][1]
    assert [each.shape for each in found.values()] == [(1, 3), (3, 3)]
    assert found[10][1].tolist() == pytest.approx((clip[1:11] / 127.5 - 1).mean((0, 1, 2)).tolist(), abs=0.02)
    assert script.judge(frames)[0].tolist() == pytest.approx((frames / 127.5 - 1).mean((0, 2, 3)).tolist(), abs=0.02)


class Prints(torch.nn.Module):
    def forward(self, x: torch.Tensor, rescale: bool, resize: bool, return_features: bool) -> torch.Tensor:
        print("to whoever listens")
        return torch.nn.functional.conv3d(x, torch.ones(2, 3, 1, 1, 1)).mean((2, 3, 4))


class Writes(torch.nn.Module):
    def forward(self, x: torch.Tensor, rescale: bool, resize: bool, return_features: bool) -> torch.Tensor:
        torch.save([x], "written")
        return x.mean((2, 3, 4))


class AtLoading(Writes):
    @torch.jit.export
    def __getstate__(self) -> tuple[torch.Tensor, bool]:
        return torch.zeros(1), self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, bool]):
        torch.save([state[0]], "written")
        self.training = state[1]


class Maps(torch.nn.Module):
    def forward(self, x: torch.Tensor, rescale: bool, resize: bool, return_features: bool) -> torch.Tensor:
        return x.mean((2, 3, 4)) + torch.from_file("mine", True, 4, dtype=torch.uint8).fill_(0).sum()


class Reads(torch.nn.Module):
    def forward(self, x: torch.Tensor, rescale: bool, resize: bool, return_features: bool) -> torch.Tensor:
        return torch.from_file("mine", False, 4, dtype=torch.uint8).float()[None]


HOSTILE = (Writes, AtLoading, Maps, Reads)


@pytest.mark.parametrize("made", HOSTILE)
def test_a_program_runs_only_with_consent_and_opens_nothing_even_then(made, tmp_path, monkeypatch):
    """TorchScript can write a file when it is run, and already when it is loaded."""
    monkeypatch.chdir(tmp_path)
    Path("mine").write_bytes(b"mine")
    torch.jit.script(made()).save("i3d.pt")
    Path("written").unlink(missing_ok=True)
    with pytest.raises(UserError, match=r"evaluate\.trust_torchscript=yes"):
        Meter(["fvd"], Evaluate(i3d="i3d.pt"))
    try:  # torch does not notice that what it saves is nowhere
        networks.load("i3d", Evaluate(i3d="i3d.pt", trust_torchscript=True)).judge(wave(5, 32, 32, 0.0))
        assert made not in (Maps, Reads)
    except UserError as error:
        assert str(error).startswith("evaluate.i3d: i3d.pt cannot be used: ") and "\n" not in str(error)
    assert not Path("written").exists() and Path("mine").read_bytes() == b"mine"
    torch.jit.load("i3d.pt")(torch.zeros(1, 3, 1, 1, 1), False, False, True)
    harmed = Path("written").exists() or Path("mine").read_bytes() != b"mine"
    assert harmed or made is Reads, "the attack is none"


def test_a_program_computes_its_features_in_its_own_process(tmp_path, capfd):
    torch.jit.script(Prints()).save(str(tmp_path / "i3d.pt"))
    network = networks.load("i3d", Evaluate(i3d=str(tmp_path / "i3d.pt"), trust_torchscript=True))
    for phase in (0.0, 1.0):
        frames = wave(5, 32, 32, phase)
        mean = (frames / 127.5 - 1).mean((0, 2, 3)).sum().item()
        assert network.judge(frames)[0].tolist() == pytest.approx([mean, mean], abs=0.05)
    assert not capfd.readouterr().out


class Evil:
    def __reduce__(self):
        return print, ("unpickled",)


def test_weights_that_cannot_be_used_are_one_line(tmp_path, capsys):
    torch.save({"state_dict": Evil()}, tmp_path / "evil.pth")
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "other.pth")
    for values, name, message in (
        ({"resnet3d": str(tmp_path / "none.pth")}, "resnet3d", "evaluate.resnet3d: no such file"),
        ({"resnet3d": str(tmp_path / "evil.pth")}, "resnet3d", "as plain weights"),
        ({"inception": str(tmp_path / "evil.pth")}, "inception", "as plain weights"),
        ({"resnet3d": str(tmp_path / "other.pth")}, "resnet3d", "do not fit a ResNet3d50"),
        ({}, "resnet3d", "give it as evaluate.resnet3d=FILE"),
    ):
        with pytest.raises(UserError, match=message) as error:
            networks.load(name, Evaluate(**values))
        assert "\n" not in str(error.value)
    assert "unpickled" not in capsys.readouterr().out


# ---- faces and hands ----


def test_a_face_and_hands_that_are_elsewhere_are_further_away():
    wanted = wholebodies.moving(4)
    same = posing.part_values(wanted, wanted.copy(), 192, 128)
    assert same == {"face_distance": 0.0, "hand_distance": 0.0}
    seen, pixels = wanted.copy(), np.array([128, 192])
    seen[:, wholebody.LEFT_HAND, 0] += 3 / 128  # one hand three pixels off
    found = posing.part_values(wanted, seen, 192, 128)
    size = np.ptp(wanted[0, wholebody.LEFT_HAND, :2] * pixels, axis=0).max()
    assert found["face_distance"] == 0 and found["hand_distance"] == pytest.approx(3 / size / 2, rel=1e-3)
    for height, width in ((192, 128), (768, 512)):
        assert posing.part_values(wanted, seen, height, width) == pytest.approx(found, rel=1e-4), "over its own size"
    seen[:, wholebody.FACE] = np.nan
    assert posing.part_values(wanted, seen, 192, 128)["face_distance"] == 1, "a face that is lost"
    seen[1:] = np.nan
    assert posing.part_values(wanted, seen, 192, 128)["hand_distance"] == pytest.approx(
        (3 + found["hand_distance"]) / 4
    )


def test_parts_that_the_wanted_pose_does_not_show_are_not_measured():
    wanted = wholebodies.moving(4)
    seen = wanted + np.float32([0.01, 0, 0])
    whole = posing.part_values(wanted, seen, 192, 128)
    wanted[2:, wholebody.LEFT_HAND, 2] = 0.2
    wanted[:2, 91:96, 2] = 0.1  # some points of it
    part = posing.part_values(wanted, seen, 192, 128)
    assert part["face_distance"] == whole["face_distance"] and np.isfinite(part["hand_distance"])
    wanted[:, wholebody.RIGHT_HAND, 2] = wanted[:, wholebody.LEFT_HAND, 2] = 0
    assert np.isnan(posing.part_values(wanted, seen, 192, 128)["hand_distance"])
    nothing = posing.part_values(wholebody.body(wanted), seen, 192, 128)
    assert np.isnan(list(nothing.values())).all()


def test_faces_and_hands_are_measured_and_carded_by_what_sees_them(tmp_path, monkeypatch):
    """Around RTMW, whose networks are fetched and not run here."""
    seen = wholebodies.moving(4) + np.float32([0.01, 0, 0])

    class Sees(rtm.RtmEstimator):
        def __init__(self, device):
            parts = {name: tmp_path / f"{name}.onnx" for name in ("det", "pose")}
            for name, path in parts.items():
                path.write_text(name)
            tools = {f"{name}_model": SimpleNamespace(onnx_model=str(path)) for name, path in parts.items()}
            self._model = SimpleNamespace(**tools)

        def track(self, frames):
            return seen[: len(frames)]

    monkeypatch.setattr(metrics, "RtmEstimator", Sees)
    meter = Meter(("hand_distance", "psnr", "face_distance"), Evaluate())
    clip = np.zeros((4, 192, 128, 3), np.uint8)
    found = meter.measure(clip, clip, clip[0], wholebodies.moving(4)).values
    due = posing.part_values(wholebodies.moving(4), seen, 192, 128)
    assert found.keys() == {"psnr", "hand_distance", "face_distance"} and due == {n: found[n] for n in due}
    network, sha256, _ = meter.judge("hand_distance")
    assert network == "RTMW by rtmlib" and sha256 == "+".join(map(files.sha256, meter._whole_bodies.weights))
    assert METRICS["hand_distance"].better == METRICS["face_distance"].better == "lower"


def test_faces_and_hands_need_their_points_and_the_extra(monkeypatch):
    shape = ClipShape(frames=9, height=96, width=64, fps=12)
    assert not {"face_distance", "hand_distance"} & set(choose((), shape, 4, 133)[0]), "on request"
    assert choose(("hand_distance",), shape, 4, 133) == (["hand_distance"], {})
    with pytest.raises(UserError, match=r"hand_distance needs wanted poses of 133 points, .* these shards have 33"):
        choose(("hand_distance",), shape, 4, 33)
    monkeypatch.setitem(sys.modules, "rtmlib", None)  # as if it were not installed
    with pytest.raises(UserError, match=r"pip install '\.\[rtmlib\]'"):
        Meter(("hand_distance",), Evaluate())


def test_metrics_that_fit_are_chosen_and_those_that_do_not_are_told():
    small, large = ClipShape(frames=9, height=96, width=64, fps=12), ClipShape(frames=16, height=512, width=320, fps=16)
    names, left_out = choose((), small, 4)
    assert "psnr" in names and "fid" not in names and set(left_out) == {"ms_ssim"}
    assert "ms_ssim" in choose((), large, 4)[0] and choose(("fvd", "psnr"), large, 4)[0] == ["psnr", "fvd"]
    assert set(choose((), small, 1)[1]) == {"ms_ssim", "frechet_efficientnet_lite0", "frechet_transnetv2"}
    assert choose(("fid_vid", "psnr"), large, 4, 33, 16)[0] == ["psnr", "fid_vid"]
    with pytest.raises(UserError, match="fid_vid needs clips of 17 frames, these have 16"):
        choose(("fid_vid",), large, 4, 33, 17)
    for wanted, shape, clips, message in (
        (("psrn",), large, 4, "no metric 'psrn' .did you mean psnr"),
        (("fvd",), small, 4, "fvd needs clips of 10 frames, these have 9"),
        (("frechet_transnetv2",), small, 1, "needs 2 clips, there is 1"),
        (("stlpips",), ClipShape(frames=9, height=16, width=64, fps=12), 4, "needs frames of 21 pixels a side"),
    ):
        with pytest.raises(UserError, match=message):
            choose(wanted, shape, clips)


def test_cosines():
    one = np.random.default_rng(0).random((5, 16))
    assert consistency.identity(one, one[0]) < 1 == pytest.approx(consistency.identity(one[:1], one[0]))
    assert np.isnan(consistency.temporal(one[:1]))
    assert consistency.temporal(np.repeat(one[:1], 3, 0)) == pytest.approx(1)


def test_identity_is_no_face_similarity(meter):
    """What docs/quality.md says of it."""
    reference, frame = real_clip(0.0, (240, 160))[[0, 4]]
    (points,) = PoseEstimator().track(frame[None])
    seen = (points[:, 1::-1] * frame.shape[:2]).round().astype(int)  # row, column

    def within(points: np.ndarray, room: int) -> tuple[slice, slice]:
        return tuple(map(slice, np.maximum(points.min(0) - room, 0), points.max(0) + room))

    faceless, elsewhere = frame.copy(), np.full_like(frame, 120)
    faceless[within(seen[:11], 8)] = frame[within(seen[:11], 8)].mean((0, 1))
    elsewhere[within(seen, 0)] = frame[within(seen, 0)]
    made = torch.from_numpy(np.stack([reference, frame, faceless, elsewhere])).permute(0, 3, 1, 2)
    features = meter.networks["efficientnet_lite0"].judge(made).numpy()
    same, erased, moved = (consistency.identity(each[None], features[0]) for each in features[1:])
    assert abs(same - erased) < 0.5 * (same - moved)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(-100, 100), min_size=2, max_size=30), st.integers(0, 100))
def test_interval_of_a_mean_holds_it(values, seed):
    figure = mean_figure([*values, float("nan")], 200, 0.95, seed)
    assert figure.clips == len(values) and figure.value == pytest.approx(np.mean(values))
    assert min(values) - 1e-9 <= figure.low <= figure.high <= max(values) + 1e-9
    assert mean_figure([*values, float("nan")], 200, 0.95, seed) == figure


def test_interval_of_a_mean_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        figure = mean_figure(rng.normal(size=40), 300, 0.9, 0)
        hits += figure.low <= 0 <= figure.high
    assert 0.82 <= hits / 200 <= 0.96


def test_interval_over_clips_of_the_same_videos_is_as_wide_as_videos_differ():
    """Clips drawn as if each were of another video cover the truth a third of the time."""
    rng = np.random.default_rng(2)
    names = np.repeat([f"{i}.mp4" for i in range(20)], 10)
    hits = collections.Counter()
    for _ in range(100):
        values = np.repeat(rng.normal(size=20), 10) + 0.5 * rng.normal(size=200)
        for sources in (names, None):
            figure = mean_figure(values, 200, 0.9, 0, sources)
            assert figure.sources == (20 if sources is names else 200)
            hits[sources is names] += figure.low <= 0 <= figure.high
    assert hits[True] >= 76 and hits[False] <= 60
    one = mean_figure([1.0, 2.0, 4.0], 100, 0.95, 0, ["a"] * 3)
    assert one.sources == 1 and one.low < one.value < one.high, "of one video clips are drawn"


def test_interval_of_a_distance_lies_around_it_and_narrows_with_more_clips():
    rng = np.random.default_rng(0)
    real, made = rng.normal(size=(2, 60, 4, 3))
    few, many = (frechet_figure(real[:n], made[:n] + 1, 60, 0.95, 0) for n in (8, 60))
    assert few.low < few.value < few.high and many.low < many.value < many.high
    assert many.high - many.low < few.high - few.low
    alone = mean_figure([3.0], 100, 0.95, 0)
    assert (alone.value, alone.low, alone.high) == (3, None, None)


CARD = ProtocolCard(
    metric="psnr",
    better="higher",
    network=None,
    weights_sha256=None,
    resize="none",
    frames=9,
    height=96,
    width=64,
    fps=12.0,
    codec="h264 crf 16",
    clips=4,
    split="held_out",
    dataset="abc",
    sampler="FlowMatchEulerDiscreteScheduler",
    steps=20,
    guidance="1",
    seed=0,
)


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(ProtocolCard)])
def test_cards_differ_by_any_field(name):
    other = dataclasses.replace(CARD, **{name: "other"})
    assert unlike(CARD, other) == name and other.id != CARD.id
    assert unlike(dataclasses.asdict(CARD), other) == name
    assert unlike(CARD, dataclasses.replace(CARD)) is None


def test_cards_of_another_version_differ():
    older = {k: v for k, v in dataclasses.asdict(CARD).items() if k != "codec"}
    assert unlike(CARD, older) == "codec" and unlike({**older, "crop": "none"}, older) == "crop"
