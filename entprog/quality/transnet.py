"""Features of short clips by the trunk of TransNet V2, a 3-D convolutional network: 256 numbers a clip.

Souček and Lokoč, TransNet V2, arXiv 2008.04838: trained to find shot boundaries, on frames of 48×27 pixels, with
convolutions over time at four dilations. It notices what jumps from frame to frame; it knows nothing of actions, and
these are not the features of FVD. Parameters bear the names of the published weights (`assets.network("transnetv2")`),
of which only the trunk is read.
"""

import torch
from torch import nn
from torch.nn import functional as F

SIZE = (27, 48)
FILTERS = 16
LAYERS = 3
DILATIONS = (1, 2, 4, 8)
WIDTH = FILTERS * 2 ** (LAYERS - 1) * len(DILATIONS)


class _Separable(nn.Module):
    """A convolution over space, then one over time."""

    def __init__(self, inputs: int, outputs: int, dilation: int):
        super().__init__()
        space = nn.Conv3d(inputs, 2 * outputs, (1, 3, 3), padding=(0, 1, 1), bias=False)
        time = nn.Conv3d(
            2 * outputs, outputs, (3, 1, 1), padding=(dilation, 0, 0), dilation=(dilation, 1, 1), bias=False
        )
        self.layers = nn.Sequential(space, time)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class _Dilated(nn.Module):
    """Separable convolutions at all dilations, side by side."""

    def __init__(self, inputs: int, filters: int):
        super().__init__()
        for dilation in DILATIONS:
            setattr(self, f"Conv3D_{dilation}", _Separable(inputs, filters, dilation))
        self.bn = nn.BatchNorm3d(filters * len(DILATIONS), eps=1e-3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(torch.cat([getattr(self, f"Conv3D_{dilation}")(x) for dilation in DILATIONS], dim=1))


class _Stack(nn.Module):
    """Two of them with a shortcut, then half the height and width."""

    def __init__(self, inputs: int, filters: int):
        super().__init__()
        self.DDCNN = nn.ModuleList([_Dilated(inputs, filters), _Dilated(filters * len(DILATIONS), filters)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = F.relu(self.DDCNN[0](x))
        return F.avg_pool3d(F.relu(self.DDCNN[1](first)) + first, (1, 2, 2))


class TransNetTrunk(nn.Module):
    """float [B, 3, F, 27, 48] in 0..1 → float [B, 256]: the last layer's channels, averaged over time and space."""

    def __init__(self):
        super().__init__()
        filters = [FILTERS * 2**i for i in range(LAYERS)]
        inputs = [3, *(f * len(DILATIONS) for f in filters[:-1])]
        self.SDDCNN = nn.Sequential(*(_Stack(i, f) for i, f in zip(inputs, filters, strict=True)))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.SDDCNN(pixels).mean((2, 3, 4))
