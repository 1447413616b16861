"""EfficientNet-Lite0's features of single frames: 1,280 numbers a frame, before the classifier.

Tan and Le, EfficientNet, arXiv 1905.11946; the Lite variant has ReLU6 and no squeeze-and-excitation. Parameters bear
the names of the published weights (`assets.network("efficientnet_lite0")`, trained on ImageNet). These are not the
features of FID.
"""

import torch
from torch import nn
from torch.nn import functional as F

SIZE = 224
WIDTH = 1280
STAGES = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192))
LAST_STAGE = (1, 3, 1, 6, 320)
"""Blocks, kernel, stride of the first block, expansion, channels out."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class SameConv2d(nn.Conv2d):
    """A convolution that pads as TensorFlow's `SAME`: what is odd goes to the right and the bottom."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (kernel, _), (stride, _) = self.kernel_size, self.stride
        missing = [max((-(-n // stride) - 1) * stride + kernel - n, 0) for n in (x.shape[3], x.shape[2])]
        return super().forward(F.pad(x, [part for n in missing for part in (n // 2, n - n // 2)]))


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> SameConv2d:
    return SameConv2d(inputs, outputs, kernel, stride, groups=groups, bias=False)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class InvertedResidual(nn.Module):
    """Expand, convolve each channel alone, project; added to its input where the shape stays."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        inner = inputs * expansion
        self.expands = expansion > 1
        self.adds = stride == 1 and inputs == outputs
        if self.expands:
            self._expand_conv, self._bn0 = _conv(inputs, inner, 1), _norm(inner)
        self._depthwise_conv, self._bn1 = _conv(inner, inner, kernel, stride, groups=inner), _norm(inner)
        self._project_conv, self._bn2 = _conv(inner, outputs, 1), _norm(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.adds else y


class EfficientNetLite0(nn.Module):
    """float [N, 3, 224, 224] in 0..1 → float [N, 1280]."""

    def __init__(self):
        super().__init__()
        self._conv_stem, self._bn0 = _conv(3, 32, 3, 2), _norm(32)
        blocks, channels = [], 32
        for count, kernel, stride, expansion, outputs in (*STAGES, LAST_STAGE):
            for i in range(count):
                blocks.append(InvertedResidual(channels, outputs, kernel, stride if i == 0 else 1, expansion))
                channels = outputs
        self._blocks = nn.Sequential(*blocks)
        self._conv_head, self._bn1 = _conv(channels, WIDTH, 1), _norm(WIDTH)
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = F.relu6(self._bn0(self._conv_stem((pixels - self.mean) / self.std)))
        x = F.relu6(self._bn1(self._conv_head(self._blocks(x))))
        return x.mean((2, 3))
