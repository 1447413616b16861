"""Frozen blocks in fp8: the forward of a block that nothing is differentiated through, its linear layers in 8 bits.

A frozen block gets a *twin*: the same modules over the same parameters, except that each linear layer holds its
weight a second time, in fp8 with a scale per row (torchao). The block's own weights are never touched, so a block that
thaws is what it was, to the bit. A twin costs a byte and a bit for each of those weights, and the block's activations
are cast row by row as they come.

Only a branch without a graph runs in a twin: residual backward's frozen blocks. Where gradient crosses a frozen block
exactly, forward and gradient stay those of one function.
"""

import copy
import importlib.util

import torch
from torch import nn
from torch.nn import functional

from entprog.errors import UserError, install

MULTIPLE = 16
"""fp8 kernels want sizes that are multiples of this; other layers stay as they are."""
SMALLEST = 1e-12
"""Least largest magnitude of a row: one of zeros, as of an empty text's, would be divided by a scale of zero."""
CAPABILITY = (8, 9)
"""First compute capability with fp8 (Ada, Hopper)."""


class Fp8Linear(nn.Module):
    """What an nn.Linear computes, on fp8 copies of its weight and of its input; result in bfloat16."""

    def __init__(self, linear: nn.Linear):
        from torchao.float8.inference import Float8MMConfig
        from torchao.quantization import Float8Tensor, PerRow
        from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs

        super().__init__()
        half = linear.weight.detach().to(torch.bfloat16)
        self.weight = Float8Tensor.from_hp(
            half,
            granularity=PerRow(),
            mm_config=Float8MMConfig(use_fast_accum=True),
            hp_value_lb=SMALLEST,
            act_quant_kwargs=QuantizeTensorToFloat8Kwargs(granularity=PerRow(), hp_value_lb=SMALLEST),
        )
        self.bias = None if linear.bias is None else linear.bias.detach().to(torch.bfloat16)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., inputs] → bfloat16 [..., outputs]. Named as nn.Linear's: some blocks pass it by name."""
        return functional.linear(input.to(torch.bfloat16), self.weight, self.bias)

    @property
    def nbytes(self) -> int:
        """What it holds beside the layer that it stands for."""
        bias = 0 if self.bias is None else self.bias.nbytes
        return self.weight.qdata.nbytes + self.weight.scale.nbytes + bias


def twin(module: nn.Module) -> nn.Module:
    """The module with its linear layers in fp8, over the very parameters that it has for all else."""
    if isinstance(module, nn.Linear):
        fits = module.in_features % MULTIPLE == 0 and module.out_features % MULTIPLE == 0
        return Fp8Linear(module) if fits else module
    out = copy.copy(module)
    for ours in ("forward", "entprog"):  # what stands in for the block's own, and its other forms
        out.__dict__.pop(ours, None)
    out._modules = {name: twin(child) if child is not None else None for name, child in module._modules.items()}
    return out


def nbytes(module: nn.Module) -> int:
    """Bytes that a twin holds beside the parameters it shares."""
    return sum(part.nbytes for part in module.modules() if isinstance(part, Fp8Linear))


def check_installed() -> None:
    """Raises UserError without torchao."""
    if importlib.util.find_spec("torchao") is None:
        raise UserError(f"schedule.frozen_precision=fp8 needs torchao: {install('fp8')}, or set it to auto")


def check_device(device: torch.device) -> None:
    """Raises UserError if a worker's device has no fp8 arithmetic."""
    if device.type != "cuda":
        has = f"this worker has a {device.type.upper()}"
    elif torch.cuda.get_device_capability(device) < CAPABILITY:
        has = f"this is a {torch.cuda.get_device_name(device)}"
    else:
        return
    needed = ".".join(map(str, CAPABILITY))
    raise UserError(
        f"schedule.frozen_precision=fp8 needs a GPU of compute capability {needed} or later, {has}: set it to auto"
    )
