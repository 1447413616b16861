"""The 3-D ResNet-50 of FID-VID: 2,048 numbers a clip, before the classifier.

Hara et al., Can Spatiotemporal 3D CNNs Retrace the History of 2D CNNs and ImageNet?, arXiv 1711.09577. Parameters bear
the names of the published Kinetics weights (`resnet-50-kinetics.pth`, shortcut type B), which no package carries.
FID-VID is Fréchet distance on them, on clips of 16 frames of 112×112 pixels.
"""

import torch
from torch import nn
from torch.nn import functional as F

SIZE = 112
FRAMES = 16
MEAN = (114.7748, 107.7354, 99.4750)
"""Red, green and blue of Kinetics, 0..255; nothing is divided by a standard deviation."""
WIDTHS, DEPTHS, EXPANSION = (64, 128, 256, 512), (3, 4, 6, 3), 4


class _Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        outputs = width * EXPANSION
        self.conv1, self.bn1 = nn.Conv3d(inputs, width, 1, bias=False), nn.BatchNorm3d(width)
        self.conv2 = nn.Conv3d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm3d(width)
        self.conv3, self.bn3 = nn.Conv3d(width, outputs, 1, bias=False), nn.BatchNorm3d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            shortcut = nn.Conv3d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm3d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + (x if self.downsample is None else self.downsample(x)))


class ResNet3d50(nn.Module):
    """float [B, 3, 16, 112, 112] in 0..255 → float [B, 2048]."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv3d(3, 64, 7, (1, 2, 2), padding=3, bias=False)
        self.bn1 = nn.BatchNorm3d(64)
        inputs = 64
        for i, (width, depth) in enumerate(zip(WIDTHS, DEPTHS, strict=True), 1):
            blocks = []
            for j in range(depth):
                blocks.append(_Bottleneck(inputs, width, 2 if i > 1 and j == 0 else 1))
                inputs = width * EXPANSION
            setattr(self, f"layer{i}", nn.Sequential(*blocks))
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1, 1), persistent=False)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = F.max_pool3d(F.relu(self.bn1(self.conv1(pixels - self.mean))), 3, 2, padding=1)
        for i in range(1, len(DEPTHS) + 1):
            x = getattr(self, f"layer{i}")(x)
        return x.mean((2, 3, 4))
