"""RMS norms that compute in their input's type, as torch's fused kernel asks for.

Under autocast a norm with float32 weights is given bfloat16. On CPUs torch has no fused kernel for two types: it
takes eight small ones, and keeps three float32 copies of the input for the backward pass instead of the input itself,
12 bytes a number instead of 2. On GPUs autocast makes float32 of both, and what follows goes on in float32. Of a Wan
block such norms (of queries and keys) are three.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional


class MatchingRMSNorm(nn.RMSNorm):
    """The class of an RMS norm whose weight is rounded to its input's type at every use, as autocast does with linear
    layers' weights. The weight itself, its gradient and its name stay what they were."""

    def forward(self, input: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.to(input.dtype)
        with torch.autocast(input.device.type, enabled=False):
            return functional.rms_norm(input, self.normalized_shape, weight, self.eps)


def match_norms(network: nn.Module) -> None:
    """Let a network's RMS norms round their weights to their inputs' type, in place. For networks that run under
    autocast: without it nothing changes."""
    for module in network.modules():
        if type(module) is nn.RMSNorm:  # one derived from it may do other things with its weight
            module.__class__ = MatchingRMSNorm
