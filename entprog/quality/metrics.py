"""Which metrics there are, and what they measure of one clip and of a set."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
import torch

from entprog import files
from entprog.config import ClipShape, Evaluate, close_to
from entprog.errors import UserError, install
from entprog.media import assets, wholebody
from entprog.media.pose import PoseEstimator
from entprog.media.rtm import RtmEstimator
from entprog.quality import consistency, networks, perceptual, pictures, posing


@dataclass(frozen=True)
class Metric:
    """What a metric is."""

    meaning: str
    better: Literal["higher", "lower"]
    network: str | None = None
    """A name of `networks.NETWORKS`, `blazepose`, `rtmw`, or None for a formula on pixels."""
    of: Literal["clip", "set"] = "clip"
    """`clip`: a number a clip, averaged; `set`: a Fréchet distance between all clips and their truths."""
    least_side: int = 1
    """Smallest height and width that it is defined for, in pixels."""
    least_frames: int = 1
    points: int = len(wholebody.BLAZEPOSE)
    """Fewest points of the wanted poses."""
    windowed: bool = False
    """Whether `evaluate.window_frames` cuts its samples out of clips."""
    offline: bool = True
    """Its weights are among the assets (or there are none): measured unless a person asks for others."""


METRICS = {
    "psnr": Metric("peak signal-to-noise ratio, dB, frame by frame", "higher"),
    "ssim": Metric("structural similarity, frame by frame", "higher", least_side=pictures.SSIM_SIDE),
    "ms_ssim": Metric("multi-scale structural similarity", "higher", least_side=pictures.MS_SSIM_SIDE),
    "stlpips": Metric(
        "shift-tolerant perceptual distance (not LPIPS)", "lower", "stlpips", least_side=perceptual.LEAST_SIDE
    ),
    "frechet_efficientnet_lite0": Metric(
        "Fréchet distance on EfficientNet-Lite0's features of frames (not FID)", "lower", "efficientnet_lite0", "set"
    ),
    "frechet_transnetv2": Metric(
        "Fréchet distance on TransNet V2's features of clips (not FVD)", "lower", "transnetv2", "set"
    ),
    "identity": Metric(
        "cosine of whole frame and reference image, EfficientNet-Lite0 (not face similarity)",
        "higher",
        "efficientnet_lite0",
    ),
    "temporal": Metric(
        "cosine of neighbouring frames, EfficientNet-Lite0", "higher", "efficientnet_lite0", least_frames=2
    ),
    "pose_distance": Metric("mean joint distance over the body's size", "lower", "blazepose"),
    "pck": Metric("share of joints within evaluate.pck_threshold of the body's size", "higher", "blazepose"),
    "pose_found": Metric("share of frames in which a person is found", "higher", "blazepose"),
    "face_distance": Metric(
        "mean distance of the face's points over its size", "lower", "rtmw", points=wholebody.POINTS, offline=False
    ),
    "hand_distance": Metric(
        "mean distance of the hands' points over a hand's size", "lower", "rtmw", points=wholebody.POINTS, offline=False
    ),
    "lpips": Metric("LPIPS", "lower", "lpips", least_side=32, offline=False),
    "fid": Metric("FID of all frames", "lower", "inception", "set", offline=False),
    "fid_vid": Metric("FID-VID", "lower", "resnet3d", "set", windowed=True, offline=False),
    "fvd": Metric("FVD", "lower", "i3d", "set", least_frames=networks.I3D_FRAMES, windowed=True, offline=False),
}
LEAST_CLIPS = 2
"""Clips that a Fréchet distance needs: with one there is no covariance."""


def choose(
    wanted: Sequence[str],
    shape: ClipShape,
    clips: int,
    points: int = wholebody.POINTS,
    window_frames: int | None = None,
) -> tuple[list[str], dict[str, str]]:
    """(names in the table's order, {name: why it is left out}).

    Nothing wanted: all offline metrics that fit. Raises UserError for a wrong name, or for one that is wanted and does
    not fit clips of this shape and number, with poses of so many points. window_frames: `evaluate.window_frames`.
    """
    for name in wanted:
        if name not in METRICS:
            raise UserError(f"no metric {name!r}{close_to(name, METRICS)}; there are: {', '.join(METRICS)}")
    names = [name for name, metric in METRICS.items() if (name in wanted if wanted else metric.offline)]
    unfit = {name: why for name in names if (why := _unfit(METRICS[name], shape, clips, points, window_frames))}
    if wanted and unfit:
        name, why = next(iter(unfit.items()))
        raise UserError(f"metric {name} {why}: leave it out")
    return [name for name in names if name not in unfit], unfit


def _unfit(metric: Metric, shape: ClipShape, clips: int, points: int, window_frames: int | None) -> str | None:
    frames = max(metric.least_frames, (metric.windowed and window_frames) or 0)
    if min(shape.height, shape.width) < metric.least_side:
        return f"needs frames of {metric.least_side} pixels a side, these are {shape.width}x{shape.height}"
    if shape.frames < frames:
        return f"needs clips of {frames} frames, these have {shape.frames}"
    if points < metric.points:
        return f"needs wanted poses of {metric.points} points, face and hands among them, these shards have {points}"
    if metric.of == "set" and clips < LEAST_CLIPS:
        return f"needs {LEAST_CLIPS} clips, there is {clips}"
    return None


@dataclass(frozen=True)
class Measured:
    """What was measured of one clip."""

    values: dict[str, float]
    """Value of each metric; NaN where the clip has none."""
    features: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    """Features for each metric over a set: (truth's, result's), each float32 [rows, D]."""


class Meter:
    """Measures clips; its networks are loaded once. Not picklable: create it where it works.

    Raises UserError for weights or libraries that are not there.
    """

    def __init__(self, names: Sequence[str], settings: Evaluate, device: str | torch.device = "cpu"):
        self._names, self._settings, self._device = tuple(names), settings, torch.device(device)
        wanted = dict.fromkeys(METRICS[name].network for name in names)
        self.networks = {n: networks.load(n, settings, device) for n in wanted if n in networks.NETWORKS}
        self._sees_poses = "blazepose" in wanted
        if self._sees_poses:  # known now, though the estimator is made by the first clip
            assets.network("pose_landmark_full")
            if importlib.util.find_spec("ai_edge_litert") is None:
                raise UserError(f"pose metrics need ai-edge-litert: {install('pose')}")
        self._whole_bodies = None
        if "rtmw" in wanted:
            self._whole_bodies = RtmEstimator(torch.device(device).type)

    @cached_property
    def _poses(self) -> PoseEstimator:
        return PoseEstimator()

    def measure(self, result: np.ndarray, truth: np.ndarray, reference: np.ndarray, pose: np.ndarray) -> Measured:
        """result, truth uint8 RGB [F, H, W, 3]; reference uint8 RGB [H, W, 3]; pose float [F, 33 or 133, 3], the wanted
        one.

        Raises ValueError if result and truth have unlike shapes.
        """
        if result.shape != truth.shape:
            raise ValueError(f"result and truth differ in shape: {result.shape} and {truth.shape}")
        made, real = _frames(result), _frames(truth)
        features: dict[tuple[str, str], np.ndarray] = {}

        def seen(network: str, which: str) -> np.ndarray:
            """Features that several metrics share, computed once."""
            if (network, which) not in features:
                frames = {"made": made, "real": real, "reference": _frames(reference[None])}[which]
                features[network, which] = self._samples(network, frames).numpy()
            return features[network, which]

        values, sets = {}, {}
        for name in self._names:
            metric = METRICS[name]
            if metric.of == "set":
                sets[name] = (seen(metric.network, "real"), seen(metric.network, "made"))
            elif metric.network is None:
                values[name] = getattr(pictures, name)(made.to(self._device), real.to(self._device))
            elif name in ("stlpips", "lpips"):
                values[name] = float(self.networks[metric.network].judge(made, real).mean())
            elif name == "identity":
                values[name] = consistency.identity(seen(metric.network, "made"), seen(metric.network, "reference")[0])
            elif name == "temporal":
                values[name] = consistency.temporal(seen(metric.network, "made"))
        if self._sees_poses:
            found = self._poses.track(result)
            poses = posing.pose_values(pose, found, *result.shape[1:3], self._settings.pck_threshold)
            values |= {name: value for name, value in poses.items() if name in self._names}
        if self._whole_bodies is not None:
            found = posing.part_values(pose, self._whole_bodies.track(result), *result.shape[1:3])
            values |= {name: value for name, value in found.items() if name in self._names}
        return Measured(values, sets)

    def _samples(self, network: str, frames: torch.Tensor) -> torch.Tensor:
        """Features [rows, D] of frames uint8 [F, 3, H, W]: a row a window, where the network's metric has such."""
        judge, length = self.networks[network].judge, self._settings.window_frames
        if length is None or not any(
            METRICS[name].network == network and METRICS[name].windowed for name in self._names
        ):
            return judge(frames)
        return torch.cat([judge(frames[start : start + length]) for start in range(len(frames) - length + 1)])

    def judge(self, name: str) -> tuple[str | None, str | None, str]:
        """(network, its weights' sha256, resize) of a metric, for its card."""
        network = METRICS[name].network
        if network is None:
            return None, None, "none"
        if network == "blazepose":
            parts = ("pose_detection", "pose_landmark_full")
            return "blazepose full", "+".join(assets.ASSETS[part].sha256 for part in parts), "as BlazePose cuts"
        if network == "rtmw":
            weights = "+".join(map(files.sha256, self._whole_bodies.weights))
            return "RTMW by rtmlib", weights, "as RTMW cuts"
        found = self.networks[network]
        return found.name, found.sha256, found.resize


def _frames(clip: np.ndarray) -> torch.Tensor:
    """uint8 [F, H, W, 3] → uint8 [F, 3, H, W]."""
    return torch.from_numpy(np.array(clip)).permute(0, 3, 1, 2)  # a copy: what comes from elsewhere may be read-only
