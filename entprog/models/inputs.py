"""Input layers that take more channels than they were made for: how conditions enter a network that lacks them.

What an input layer sees, channel by channel: the noisy latents; of networks that an earlier version trained, their
base's own further inputs, fed zeros as then (an image-to-video checkpoint's image and mask); then the conditions, as
many channels each as the latents. A condition that the base lacks starts with zero weights, and its part of the layer
is computed apart and added: y + 0 = y, so step 0 equals the base bit for bit.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from entprog import config
from entprog.errors import UserError

CONDITIONS = ("reference", "pose")
"""Order in which new conditions enter an input layer."""


class _Split:
    """A layer as a sum over groups of input channels: y = Σ_g w_g * x_g + b.

    In exact arithmetic the plain layer with the same parameters. Summing group by group makes a group whose weights
    are zero leave the others' bits alone, whatever order of summation the device's kernels choose.
    """

    splits: tuple[int, ...]
    """Input channels (features of a linear layer) of each group."""
    along: int
    """Dimension of the input that is split."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = zip(x.split(self.splits, dim=self.along), self.weight.split(self.splits, dim=1), strict=True)
        (x, weight), *others = parts
        y = self.one(x, weight, self.bias)
        for x, weight in others:
            y = y + self.one(x, weight, None)
        return y


class _SplitConv(_Split):
    along = 1

    def one(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return self._conv_forward(x, weight, bias)


class SplitConv2d(_SplitConv, nn.Conv2d):
    """A Conv2d that sums over groups of input channels."""


class SplitConv3d(_SplitConv, nn.Conv3d):
    """A Conv3d that sums over groups of input channels."""


class SplitLinear(_Split, nn.Linear):
    """A Linear that sums over groups of input features."""

    along = -1

    def one(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return functional.linear(x, weight, bias)


def widened(layer: nn.Module, splits: Sequence[int], channels: int) -> nn.Module:
    """The layer with its input channels in groups; channels that it lacks come last, with zero weights.

    layer: Conv2d, Conv3d, or a Linear over patches, channel by channel. splits: channels of each group; channels: that
    it has now.
    """
    splits = [count * _features(layer, channels) for count in splits]
    total = sum(splits)
    if isinstance(layer, nn.Linear):
        new = SplitLinear(total, layer.out_features, bias=layer.bias is not None, device="meta")
    else:
        kind = SplitConv3d if isinstance(layer, nn.Conv3d) else SplitConv2d
        new = kind(
            total, layer.out_channels, layer.kernel_size, stride=layer.stride, padding=layer.padding,
            bias=layer.bias is not None, device="meta",
        )  # fmt: skip
    has, *kernel = layer.weight.shape[1:]
    zeros = layer.weight.new_zeros(layer.weight.shape[0], total - has, *kernel)
    new.weight = nn.Parameter(torch.cat([layer.weight.detach(), zeros], dim=1))
    if layer.bias is not None:
        new.bias = nn.Parameter(layer.bias.detach().clone())
    new.splits = tuple(splits)
    return new


def widen(network: nn.Module, name: str, splits: Sequence[int]) -> None:
    """The network's input layer takes `splits` channels, those it lacks with zero weights, and its configuration says
    so."""
    layer = network.get_submodule(name)
    network.set_submodule(name, widened(layer, splits, network.config.in_channels))
    outputs = network.config.out_channels or network.config.in_channels  # a class's default may be as many as inputs
    network.register_to_config(in_channels=sum(splits), out_channels=outputs)


def weight_shape(network: nn.Module, name: str, splits: Sequence[int]) -> list[int]:
    """Shape of the input layer's weight once it takes `splits` channels."""
    outputs, has, *kernel = network.get_submodule(name).weight.shape
    return [outputs, sum(splits) * (has // network.config.in_channels), *kernel]


def splits(layer: nn.Module, channels: int) -> tuple[int, ...]:
    """The layer's input channels, in the groups that are summed apart."""
    groups = layer.splits if isinstance(layer, _Split) else (layer.weight.shape[1],)
    return tuple(count // _features(layer, channels) for count in groups)


def _features(layer: nn.Module, channels: int) -> int:
    """Input features of the layer for each channel: pixels of a patch for a Linear, one for a convolution."""
    return layer.weight.shape[1] // channels


def planned(
    inputs: int, about: dict[str, Any], own: Sequence[str], channels: int, settings: config.Model
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """(conditions in the order of the input channels, input channels in groups), those that are new last.

    inputs: the network's channels as it is; about: the base's `entprog.json`, {} if it has none; own: the conditions
    of a base without one. Raises UserError if base and settings do not agree.
    """
    wanted = [name for name in CONDITIONS if name in settings.conditions]
    if settings.init:
        return tuple(wanted), (inputs,)
    has, groups = about.get("conditions", own), about.get("input_channels", [inputs])
    if sum(groups) != inputs or inputs < channels * (1 + len(has)):
        raise UserError(
            f"model.base: {settings.base}'s input layer has {inputs} channels, which do not fit {channels} latent "
            f"channels and the conditions it is said to have ({', '.join(has) or 'none'})"
        )
    if left_out := [name for name in has if name not in wanted]:
        raise UserError(
            f"model.conditions: {settings.base} was trained with {', '.join(has)}; add {', '.join(left_out)} "
            "to model.conditions"
        )
    new = [name for name in wanted if name not in has]
    return (*has, *new), (*groups, *[channels * len(new)] * bool(new))
