"""Whether frozen blocks are quicker in fp8 on this device: measured, for small blocks are not."""

from collections.abc import Callable
from typing import Any

import torch

from entprog import blocks
from entprog.blocks import Block


@torch.no_grad()
def share(block: Block, forward: Callable[[], Any], meter: Callable[[Callable], float]) -> float:
    """Seconds that a block's forward pass takes in its fp8 twin, over those that it takes itself; both as the block is,
    compiled or not.

    forward() → a pass of the network, in which the block gets its inputs. meter(run) → what running it costs.
    """
    module, shares = block.module, []
    own = blocks.own_forward(module)

    def timed(*args, **kwargs):
        low, high = (meter(lambda run=run: run(*args, **kwargs)) for run in (twin, own))
        shares.append(low / high)
        return own(*args, **kwargs)

    blocks.make_twin(module)
    twin = blocks.variants(module).twin_forward
    try:
        with blocks.replaced({module: timed}):
            forward()
    finally:
        blocks.drop_twin(module)
    return shares[0]
