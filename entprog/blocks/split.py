"""Parameters that ranks hold in parts (torch's DTensor), where blocks store what is frozen of them.

A part changes its type without its parameter becoming another object: optimizers and averages know it by that.
"""

import torch
from torch import nn


def is_split(tensor: torch.Tensor) -> bool:
    """Whether this rank holds a part of it alone."""
    return hasattr(tensor, "to_local")


@torch.no_grad()
def part(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor that may be in parts."""
    return tensor.to_local() if is_split(tensor) else tensor


def put(parameter: nn.Parameter, numbers: torch.Tensor) -> None:
    """Give a parameter other numbers, of another type too. numbers: this rank's part, if it is in parts; then
    `notice` is to be called."""
    if not is_split(parameter):
        parameter.data = numbers
        return
    from torch.distributed.tensor import DTensor  # there by now; who splits nothing does without

    other = DTensor.from_local(
        numbers,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
    torch.utils.swap_tensors(parameter, nn.Parameter(other, parameter.requires_grad))


@torch.no_grad()
def of_part(like: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """A tensor in parts as `like` is, of which this rank's part are those very numbers, wherever they lie."""
    if not is_split(like):
        return numbers
    out = torch.empty_like(like, dtype=numbers.dtype, device=numbers.device, requires_grad=False)
    out.to_local().data = numbers
    return out


def notice(module: nn.Module) -> None:
    """Let FSDP look anew at parts that were `put`: torch does so behind whatever is loaded, if that is nothing."""
    module.load_state_dict({}, strict=False)
