"""What VACE's blocks cost where they are not split: every GPU computes all tokens of them, as some packs do."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor


class Unsplit:
    """Replaces the forwards of a spread model's VACE blocks. Their hints are the same; each GPU keeps its own part.

    Args:
        kernel: of attention, for all tokens.
        tokens: of the noise, the whole [L, 4 * in_dim].
        controls: whole as well.
        rope: of all tokens.
    """

    def __init__(
        self, model: Any, kernel: Any, shard: Any, tokens: Tensor, controls: Sequence[Any], rope: tuple[Tensor, Tensor]
    ) -> None:
        from wan_pack.wan.transformer.self_attention import local_attention

        self._model, self._shard, self._tokens = model, shard, tokens
        self._controls, self._rope = controls, rope
        self._streams: list[Tensor] = []
        self._forwards = [type(block).forward for block in model.vace_blocks]
        for block, forward in zip(model.vace_blocks, self._forwards, strict=True):
            block.self_attn.attention = local_attention(kernel)
            block.forward = partial(self._forward, block, forward)

    def _forward(
        self, block: Any, forward: Any, streams: list[Tensor], begin: list[Tensor], strengths: Any, e: Tensor,
        which: Any, rope: Any, attended: Any,
    ) -> Tensor:  # fmt: skip
        whole: list[Tensor] = []
        if begin:
            begin.clear()
            whole = [self._model.patch_embedding(self._tokens).float()]
            self._streams = [self._model.vace_patch_embedding(control.values).float() for control in self._controls]
        hint = forward(block, self._streams, whole, strengths, e, which, self._rope, attended)
        return self._shard.split(hint)


def controls_for(config: Any, grid: tuple[int, int, int], device: torch.device) -> list[Any]:
    """One random control of whole tokens for a VACE model, none for others."""
    from wan_pack.wan.transformer.vace import Control

    if not config.vace_layers:
        return []
    generator = torch.Generator().manual_seed(1)
    length = grid[0] * grid[1] * grid[2]
    return [Control(torch.randn(length, 4 * config.control_dim, generator=generator).to(device))]
