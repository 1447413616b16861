"""A perceptual distance between two frames: shift-tolerant AlexNet features, weighted as people judged.

Ghildyal and Liu, Shift-tolerant Perceptual Similarity Metric, arXiv 2207.13686: built as LPIPS (Zhang et al.,
arXiv 1801.03924), but with reflected, blurred downsampling, so that a picture moved by a pixel stays near itself. Its
values are not LPIPS's. Parameters bear the names of the published weights (`assets.network("stlpips")`).
"""

import torch
from torch import nn
from torch.nn import functional as F

CHANNELS = (64, 192, 384, 256, 256)
LEAST_SIDE = 21
"""Of a frame, in pixels: of a smaller one the last blur has nothing to reflect."""


class _Blur(nn.Module):
    """Binomial blur of 3×3 on reflected borders, then every second pixel."""

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("filt", torch.empty(channels, 1, 3, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), self.filt, stride=2, groups=x.shape[1])


class _Trunk(nn.Module):
    """AlexNet's five layers; modules are numbered through, as in the published weights."""

    def __init__(self):
        super().__init__()
        layers = (
            (nn.Conv2d(3, 64, 11, padding=2), _Blur(64), nn.ReLU()),
            (nn.MaxPool2d(3, 1), _Blur(64), nn.Conv2d(64, 192, 5, padding=2), nn.ReLU()),
            (nn.MaxPool2d(3, 1), _Blur(192), nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
            (nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
            (nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()),
        )
        number = 0
        for i, modules in enumerate(layers, 1):
            layer = nn.Sequential()
            for module in modules:
                layer.add_module(str(number), module)
                number += 1
            setattr(self, f"slice{i}", layer)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        out = []
        for i in range(1, len(CHANNELS) + 1):
            x = getattr(self, f"slice{i}")(x)
            out.append(x)
        return out


class _Weights(nn.Module):
    """One weight a channel."""

    def __init__(self, channels: int):
        super().__init__()
        self.model = nn.Sequential(nn.Dropout(), nn.Conv2d(channels, 1, 1, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)


class _Scaling(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.empty(1, 3, 1, 1))
        self.register_buffer("scale", torch.empty(1, 3, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - self.shift) / self.scale


class ShiftTolerantDistance(nn.Module):
    """Two batches float [N, 3, H, W] in -1..1 → distances float [N]: 0 for equal pictures."""

    def __init__(self):
        super().__init__()
        self.scaling_layer = _Scaling()
        self.net = _Trunk()
        for i, channels in enumerate(CHANNELS):
            setattr(self, f"lin{i}", _Weights(channels))

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        total = a.new_zeros(len(a))
        pairs = zip(self.net(self.scaling_layer(a)), self.net(self.scaling_layer(b)), strict=True)
        for i, (x, y) in enumerate(pairs):
            difference = (_unit(x) - _unit(y)) ** 2
            total = total + getattr(self, f"lin{i}")(difference).mean((1, 2, 3))
        return total


def _unit(x: torch.Tensor) -> torch.Tensor:
    """Each pixel's features to length 1."""
    return x / (x.norm(dim=1, keepdim=True) + 1e-10)
