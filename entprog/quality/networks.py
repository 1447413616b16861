"""The networks that judge clips: what each is fed, and where its weights come from.

Offline ones (`assets`, checked by hash) go under their own names; the field's usual ones are loaded by the libraries
that carry them, or from a person's file. No file is unpickled: state dicts are read with `weights_only`. A TorchScript
file is a program, and runs only where a person says that it may (`evaluate.trust_torchscript`), in a process that can
open nothing (`confined`).
"""

import hashlib
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from entprog import files
from entprog.config import Evaluate
from entprog.errors import UserError, install
from entprog.masking import one_line
from entprog.media import assets
from entprog.quality import confined, efficientnet, perceptual, resnet3d, transnet

FRAMES_AT_ONCE = 16
I3D_SIZE, I3D_FRAMES = 224, 10
CANONICAL = f"{install('canonical')} where torchvision loads"


@dataclass(frozen=True)
class Network:
    """A network that judges, on its device."""

    name: str
    sha256: str
    """SHA-256 of the network's weights."""
    resize: str
    """How frames are brought to what it sees."""
    judge: Callable[..., torch.Tensor]
    """Frames uint8 [F, 3, H, W] → features float32 [rows, D]; for a distance two such clips → float32 [F]."""


@torch.no_grad()
def by_frames(network: Callable[..., torch.Tensor], *clips: torch.Tensor) -> torch.Tensor:
    """A function of frames applied to a few at a time: a long clip at full size needs gigabytes otherwise."""
    parts = zip(*(clip.split(FRAMES_AT_ONCE) for clip in clips), strict=True)
    return torch.cat([network(*part) for part in parts]).float().cpu()


def resized(frames: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """uint8 [F, 3, H, W] → float [F, 3, height, width] in 0..255, bicubic, antialiased."""
    return _bicubic(frames, height, width).clamp(0, 255)


def _bicubic(frames: torch.Tensor, height: int, width: int) -> torch.Tensor:
    return F.interpolate(frames.float(), (height, width), mode="bicubic", antialias=True)


def load(name: str, settings: Evaluate, device: str | torch.device = "cpu") -> Network:
    """The network of that name, one of NETWORKS. Raises UserError if its weights or its library are not there."""
    return NETWORKS[name](settings, torch.device(device))


# ---- under their own names ----


def _stlpips(settings: Evaluate, device: torch.device) -> Network:
    network = _ready(perceptual.ShiftTolerantDistance(), _state(assets.network("stlpips")), "stlpips", device)

    def distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return network(*(x.to(device).float() / 127.5 - 1 for x in (a, b)))

    return Network("stlpips alex", assets.ASSETS["stlpips"].sha256, "none", lambda a, b: by_frames(distance, a, b))


def _efficientnet(settings: Evaluate, device: torch.device) -> Network:
    path = assets.network("efficientnet_lite0")
    state = {name: value for name, value in _state(path).items() if not name.startswith("_fc")}
    network = _ready(efficientnet.EfficientNetLite0(), state, "efficientnet_lite0", device)
    size = efficientnet.SIZE

    def features(frames: torch.Tensor) -> torch.Tensor:
        return network(resized(frames.to(device), size, size) / 255)

    sha256 = assets.ASSETS["efficientnet_lite0"].sha256
    return Network("efficientnet_lite0", sha256, f"bicubic {size}x{size}", lambda x: by_frames(features, x))


def _transnet(settings: Evaluate, device: torch.device) -> Network:
    path = assets.network("transnetv2")
    state = {name: value for name, value in _state(path).items() if name.startswith("SDDCNN.")}
    network = _ready(transnet.TransNetTrunk(), state, "transnetv2", device)
    height, width = transnet.SIZE

    @torch.no_grad()
    def features(frames: torch.Tensor) -> torch.Tensor:
        clip = resized(frames.to(device), height, width) / 255
        return network(clip.transpose(0, 1)[None]).float().cpu()

    sha256 = assets.ASSETS["transnetv2"].sha256
    return Network("transnetv2 trunk", sha256, f"bicubic {width}x{height}", features)


# ---- the field's usual ones ----


def _inception(settings: Evaluate, device: torch.device) -> Network:
    """FID's Inception of torch-fidelity: 2,048 features, resized as TensorFlow 1 did."""
    path = _given(settings.inception, "inception")
    if path is not None:
        _state(path, "evaluate.inception")  # the library would unpickle anything
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except (ImportError, RuntimeError) as error:
        raise UserError(f"metric fid needs torch-fidelity ({_line(error)}): {CANONICAL}") from None
    try:
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], path and str(path)).to(device)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"cannot load FID's Inception ({_line(error)}): give its weights as evaluate.inception=FILE"
        ) from None
    return Network(
        "inception-v3 (torch-fidelity)",
        files.sha256(path) if path else _hash(network),
        "bilinear 299x299, as TensorFlow 1",
        lambda x: by_frames(lambda frames: network(frames.to(device))[0], x),
    )


def _lpips(settings: Evaluate, device: torch.device) -> Network:
    """LPIPS of torchmetrics; torchvision fetches the trunk, or finds it in its cache (TORCH_HOME)."""
    try:
        from torchmetrics.image import LearnedPerceptualImagePatchSimilarity

        network = LearnedPerceptualImagePatchSimilarity(net_type=settings.lpips_trunk, reduction="mean")
    except (ImportError, RuntimeError, OSError) as error:
        raise UserError(
            f"metric lpips needs torchvision and its trunk's weights ({_line(error)}): {CANONICAL}"
        ) from None
    network = network.net.to(device).eval()

    def distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return network(*(x.to(device).float() / 127.5 - 1 for x in (a, b))).flatten()

    name = f"lpips {settings.lpips_trunk} (torchmetrics)"
    return Network(name, _hash(network), "none", lambda a, b: by_frames(distance, a, b))


def _i3d(settings: Evaluate, device: torch.device) -> Network:
    """FVD's I3D: cd-fvd's class with its Kinetics weights, or the TorchScript file `i3d_torchscript.pt`.

    Raises UserError for a TorchScript file that nobody has said may run.
    """
    path = _given(settings.i3d, "i3d")
    if path is not None and _is_torchscript(path):
        if not settings.trust_torchscript:
            raise UserError(
                f"evaluate.i3d: {path} is TorchScript, a program: set "
                "evaluate.trust_torchscript=yes if you trust where it came from, or give i3d_pretrained_400.pt"
            )
        network: Callable = confined.Judge(path)
        name, sha256 = "i3d (TorchScript)", files.sha256(path)
    else:
        network, name = _library_i3d(path), "i3d (cd-fvd)"
        network = network.to(device).eval()
        sha256 = files.sha256(path) if path else _hash(network)

    @torch.no_grad()
    def features(frames: torch.Tensor) -> torch.Tensor:
        clip = F.interpolate(frames.to(device).float(), (I3D_SIZE, I3D_SIZE), mode="bilinear", align_corners=False)
        return network((clip / 127.5 - 1).transpose(0, 1)[None]).reshape(1, -1).float().cpu()

    return Network(name, sha256, f"bilinear {I3D_SIZE}x{I3D_SIZE}", features)


def _library_i3d(path: Path | None) -> nn.Module:
    try:
        from cdfvd.third_party.i3d.pytorch_i3d import InceptionI3d
        from cdfvd.third_party.i3d.utils import load_i3d_model
    except ImportError as error:
        raise UserError(
            f"metric fvd needs cd-fvd ({_line(error)}): {install('canonical')}, or give a TorchScript I3D as "
            "evaluate.i3d=FILE"
        ) from None
    if path is not None:
        return _ready(InceptionI3d(400, in_channels=3), _state(path, "evaluate.i3d"), str(path), "cpu")
    try:
        return load_i3d_model("cpu")
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(f"cannot fetch FVD's I3D ({_line(error)}): give its weights as evaluate.i3d=FILE") from None


def _resnet3d(settings: Evaluate, device: torch.device) -> Network:
    """FID-VID's 3-D ResNet-50, from a person's file; frames resized as by Pillow in DisCo's tool/metrics/utils.py
    (github.com/Wangt-CN/DisCo), whole videos as its DatasetFVDVideoResize cuts them."""
    path = _given(settings.resnet3d, "resnet3d")
    if path is None:
        raise UserError("metric fid_vid needs resnet-50-kinetics.pth: give it as evaluate.resnet3d=FILE")
    state = _state(path, "evaluate.resnet3d")
    state = state.get("state_dict", state)
    state = {name.removeprefix("module."): value for name, value in state.items()}
    state = {name: value for name, value in state.items() if not name.startswith("fc.")}
    network = _ready(resnet3d.ResNet3d50(), state, str(path), device)
    size, length = resnet3d.SIZE, resnet3d.FRAMES

    @torch.no_grad()
    def features(frames: torch.Tensor) -> torch.Tensor:
        clip = _bicubic(frames.to(device), size, size)  # beyond 0..255 at edges, as there
        missing = -len(clip) % length
        clip = torch.cat([clip, clip[-1:].expand(missing, -1, -1, -1)])
        parts = clip.unflatten(0, (-1, length)).transpose(1, 2)
        return network(parts).mean(0, keepdim=True).float().cpu()

    resize = f"bicubic {size}x{size}, antialiased, parts of {length} frames (last one repeated), averaged"
    return Network("resnet3d-50 kinetics", files.sha256(path), resize, features)


NETWORKS: dict[str, Callable[[Evaluate, torch.device], Network]] = {
    "stlpips": _stlpips,
    "efficientnet_lite0": _efficientnet,
    "transnetv2": _transnet,
    "inception": _inception,
    "lpips": _lpips,
    "i3d": _i3d,
    "resnet3d": _resnet3d,
}


# ---- files ----


def _given(name: str | None, setting: str) -> Path | None:
    if name is None:
        return None
    path = Path(name).expanduser()
    if not path.is_file():
        raise UserError(f"evaluate.{setting}: no such file: {name}")
    return path


def _state(path: Path, setting: str | None = None) -> dict[str, torch.Tensor]:
    """A state dict, read without unpickling objects. Raises UserError if the file is none."""
    where = f"{setting}: " if setting else ""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise UserError(f"{where}cannot read {path} as plain weights: {_line(error)}") from None
    if not isinstance(state, dict):
        raise UserError(f"{where}{path} holds a {type(state).__name__}, not weights by name")
    return state


def _ready(network: nn.Module, state: dict, name: str, device: str | torch.device) -> nn.Module:
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"the weights of {name} do not fit a {type(network).__name__}: {_line(error)}") from None
    return network.requires_grad_(False).eval().to(device)


def _is_torchscript(path: Path) -> bool:
    """Whether a file holds a program, seen without running any of it: loading alone would."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.rpartition("/")[2] == "constants.pkl" or "/code/" in name for name in archive.namelist())


def _hash(network: nn.Module) -> str:
    """SHA-256 of the names and values of weights that a library loaded."""
    found = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        found.update(name.encode())
        found.update(value.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def _line(error: BaseException) -> str:
    return one_line(error, most=160)
