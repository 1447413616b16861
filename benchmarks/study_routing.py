"""Token routing, which the study alone knows: while a run trains, a frozen block sees a random share of the tokens and
the others take its bypass (cf. TREAD, arXiv 2501.04765).

Tokens that are seen keep their places' rotary embedding. Trained blocks see all of them, as evaluation does.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch import nn

from entprog.blocks import Block, along_bypass


def route(found: Sequence[Block], share: float, seed: int, routes: Callable[[], bool]) -> None:
    """Let Wan's blocks see `share` of the tokens, others at every step, wherever gradient crosses them on their bypass.

    routes: whether tokens are routed now. Counted FLOPs and bytes see it too. Raises TypeError for another network.
    """
    for number, block in enumerate(found):
        if not isinstance(block.module, WanTransformerBlock):
            raise TypeError(f"{type(block.module).__name__}: tokens are routed around Wan's blocks alone")
        draws = torch.Generator().manual_seed(seed * len(found) + number)
        routed = _Routed(share, draws, routes)
        block.module.register_forward_pre_hook(routed.before)
        block.module.register_forward_hook(routed.after)


class _Routed:
    """What stands around one block's forward, whatever that is at the time."""

    def __init__(self, share: float, draws: torch.Generator, routes: Callable[[], bool]):
        self.share, self.draws, self.routes = share, draws, routes
        self.whole: tuple[torch.Tensor, torch.Tensor] | None = None
        """All tokens, and the places of those that the block is seeing; None while it sees all."""

    def before(self, module: nn.Module, args: tuple) -> tuple | None:
        forward = module.__dict__.get("forward")
        frozen = isinstance(forward, functools.partial) and forward.func is along_bypass
        if not (frozen and torch.is_grad_enabled() and self.routes()):
            self.whole = None
            return None
        tokens, text, temb, rotary = args
        count = tokens.shape[1]
        picked = torch.randperm(count, generator=self.draws)[: max(1, round(self.share * count))]
        picked = picked.sort().values.to(tokens.device)
        self.whole = tokens, picked
        return tokens[:, picked], text, temb, tuple(part[:, picked] for part in rotary)

    def after(self, module: nn.Module, args: tuple, output: Any) -> torch.Tensor | None:
        if self.whole is None:
            return None
        (tokens, picked), self.whole = self.whole, None
        return tokens.index_copy(1, picked, output)
