"""Weights of frozen linear layers in a byte (`fp8`) or half a byte (`nf4`) a number, and back; or as they are.

fp8: 8-bit floating point (e4m3), a scale for each row. nf4: 4-bit NormalFloat (arXiv 2305.14314, appendix E), two
numbers in a byte, a scale for every 64 of them. Scales are in bfloat16. A packed weight is plain tensors, and
unpacks within 4 bytes a number; torchao's own NF4 tensor takes 10 and more for that.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch

Form = Literal["float32", "bfloat16", "fp8", "nf4"]
"""What a frozen weight is held in."""
PARTS: dict[Form, tuple[str, ...]] = {
    "float32": ("whole",),
    "bfloat16": ("rounded",),
    "fp8": ("codes", "scale"),
    "nf4": ("codes", "scale", "pairs"),
}
"""Names of the tensors that hold it."""
PLAIN: dict[Form, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""Forms that are not packed."""
GROUP = 64
"""Numbers that share a scale in nf4."""
PAIRS_BYTES = 256 * 4
"""Of the table in nf4 of what each byte stands for: two numbers in bfloat16, in the bits of one, which are looked up at
once. Every layer has its own, so that it is where the layer is."""
LARGEST = torch.finfo(torch.float8_e4m3fn).max
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""What the 16 codes of nf4 stand for, over the largest magnitude of their group: quantiles of a normal distribution."""


def fits(shape: Sequence[int], form: Form) -> bool:
    """Whether a weight of that shape can be held in that form; what does not stays in bfloat16."""
    return form != "nf4" or math.prod(shape) % GROUP == 0


def nbytes(shape: Sequence[int], form: Form) -> int:
    """Bytes of a packed weight [outputs, inputs]."""
    numbers = math.prod(shape)
    if form == "nf4":
        return numbers // 2 + 2 * (numbers // GROUP) + PAIRS_BYTES
    return PLAIN[form].itemsize * numbers if form in PLAIN else numbers + 2 * shape[0]


def unpacking_bytes(shape: Sequence[int], form: Form) -> int:
    """Bytes beside a packed weight while it is used in bfloat16: of nf4 where each pair lies in the table, too."""
    return {"float32": 0, "bfloat16": 0, "fp8": 2, "nf4": 4}[form] * math.prod(shape)


@torch.no_grad()
def pack(weight: torch.Tensor, form: Form) -> tuple[torch.Tensor, ...]:
    """A weight [outputs, inputs] → the tensors of PARTS, on its device."""
    if form in PLAIN:
        return (weight.to(PLAIN[form]),)
    rows = weight.float() if form == "fp8" else weight.float().reshape(-1, GROUP)
    scale = rows.abs().amax(dim=1, keepdim=True)
    scale = (scale / LARGEST if form == "fp8" else scale).to(torch.bfloat16)
    over = torch.where(scale == 0, 1, scale).float()
    if form == "fp8":
        return (rows / over).clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale
    levels = torch.tensor(LEVELS, dtype=torch.float32, device=weight.device)
    codes = torch.bucketize(rows / over, (levels[1:] + levels[:-1]) / 2, out_int32=True).to(torch.uint8)
    both = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], dim=1).to(torch.bfloat16)
    return (codes[:, 0::2] << 4) | codes[:, 1::2], scale, both.view(torch.int32).squeeze(1)


@torch.no_grad()
def unpack(parts: Sequence[torch.Tensor], form: Form, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """The weight again, in a type; of a plain form in its own type itself, not a copy."""
    if form in PLAIN:
        return parts[0].to(dtype)
    codes, scale, *pairs = parts
    if form == "fp8":
        return codes.to(dtype).mul_(scale)
    numbers = pairs[0].index_select(0, codes.flatten().int()).view(torch.bfloat16)
    return numbers.to(dtype).view(-1, GROUP).mul_(scale).view(*shape)
