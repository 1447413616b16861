"""AdamW with moments in 8 bits and a scale for every 256 of them (arXiv 2110.02861), by torchao.

torchao compiles the update for every shape of parameter. Of a parameter of fewer than 4,096 numbers, or of a number
that 256 does not divide, moments stay in float32.
"""

import importlib.util
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from entprog.errors import UserError, install

BLOCK = 256
MOMENTS = 2 * (1 + 4 / BLOCK) / 4
"""Bytes of moments for each byte of float32 weights."""
CODES, SCALE = ".codes", ".scale"
ON_HOST = ("step",)
"""Of a parameter's state, wherever the parameter lies: torchao makes it there, and where it came to a GPU the update
of every shape would be compiled a second time."""


def adamw(
    groups: Iterable[nn.Parameter] | Iterable[dict[str, Any]], learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """The optimizer; its learning rates are tensors, which are to be filled."""
    from torchao.optim import AdamW8bit

    return AdamW8bit(groups, lr=learning_rate, weight_decay=weight_decay, block_size=BLOCK)


def is_one(moment: torch.Tensor) -> bool:
    """Whether a moment is in 8 bits."""
    return hasattr(moment, "codes")


def parts(moment: torch.Tensor) -> dict[str, torch.Tensor]:
    """{end of its name: plain tensor} of a moment in 8 bits."""
    return {CODES: moment.codes, SCALE: moment.scale}


def joined(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A parameter's state with the moments put together that were in `parts`."""
    out = {name: value for name, value in state.items() if not name.endswith((CODES, SCALE))}
    for name in [name.removesuffix(CODES) for name in state if name.endswith(CODES)]:
        from torchao.optim.subclass_8bit import OptimState8bit

        codes, scale = state[name + CODES], state[name + SCALE]
        signed = name == "exp_avg"
        out[name] = OptimState8bit.zeros(codes.shape, signed, BLOCK, codes.device, dtype=torch.float32)
        out[name].codes.copy_(codes)
        out[name].scale.copy_(scale)
    return out


def check_installed() -> None:
    """Raises UserError without torchao."""
    if importlib.util.find_spec("torchao") is None:
        raise UserError(f"train.optimizer=adamw_8bit needs torchao: {install('fp8')}, or set it to adamw_bf16 or adamw")
