"""AdamW (arXiv 1711.05101) with moments in bfloat16 that are rounded at random, up or down in proportion to nearness.

A second moment moves by a thousandth at a step, where bfloat16 has steps of four thousandths: rounded to the nearest it
would stand still for ever. Rounded at random its mean is right. Weights stay in float32 and are moved by the moments
before they are rounded.
"""

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from entprog.distributed.fsdp import held


class RoundedAdamW(torch.optim.Optimizer):
    """Takes 4 bytes a trained parameter where AdamW takes 8. What it draws is a function of the seed, the number of the
    update (`update` of each group) and the parameter's place alone; of weights in parts, each rank draws for its own.
    """

    def __init__(
        self,
        groups: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        learning_rate: float,
        weight_decay: float = 0.0,
        seed: int = 0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ):
        self.seed = seed
        defaults = {"lr": learning_rate, "weight_decay": weight_decay, "betas": betas, "eps": eps, "update": 0}
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Move every parameter that has a gradient."""
        places = ((group, parameter) for group in self.param_groups for parameter in group["params"])
        for place, (group, parameter) in enumerate(places):
            if parameter.grad is not None:
                self._move(parameter, group, generator(held(parameter).device, self.seed, group["update"], place))
        for group in self.param_groups:
            group["update"] += 1

    def _move(self, parameter: nn.Parameter, group: dict[str, Any], draws: torch.Generator) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter, dtype=torch.bfloat16)
        weight, gradient = held(parameter), held(parameter.grad)
        first, second = held(state["exp_avg"]), held(state["exp_avg_sq"])
        beta1, beta2 = group["betas"]
        step = state["step"].add_(1)
        mean = first.float().lerp_(gradient, 1 - beta1)
        square = second.float().mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        size = (square / (1 - beta2**step)).sqrt_().add_(group["eps"])
        weight.sub_((mean / size).mul_(group["lr"] / (1 - beta1**step)))
        first.copy_(rounded(mean, draws))
        second.copy_(rounded(square, draws))


def rounded(values: torch.Tensor, draws: torch.Generator) -> torch.Tensor:
    """Finite float32 values in bfloat16, their mean over many draws unchanged. Uses up `values`."""
    bits = values.view(torch.int32)  # bfloat16 is the upper half of float32: a carry out of the lower one rounds up
    noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device, generator=draws)
    return bits.add_(noise).bitwise_and_(-1 << 16).view(torch.float32).bfloat16()


def generator(device: torch.device, *numbers: int) -> torch.Generator:
    """Random numbers that are a function of some numbers."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=4).digest()  # a CPU's generator uses 32 bits of it
    return torch.Generator(device).manual_seed(int.from_bytes(digest))
