"""VACE: blocks beside the main ones that read a control video and add hints to the main stream.

    c = before_proj(embedded control) + x       before the first VACE block; x as embedded, before any block
    c = block(c)                                for each VACE block
    x = x + strength * after_proj(c)            behind the main block that it belongs to

(Jiang et al., 2025, arXiv 2503.07598.) Each runs right after its main block, so that one hint is held at a time.
Several controls have a stream c each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..model.config import WanConfig
from ..model.linear import Linear
from ..model.ops import Rope
from ..model.patch import patchify
from .block import Block, Stream, Which
from .context import Attended
from .part import Split


@dataclass(frozen=True, slots=True)
class Control:
    """One control video."""

    values: Tensor
    """Latents [96, T, h, w], or a rank's tokens of them, [S, 4 * 96], float32: what is kept [16] and what is made anew
    [16], normalised, then the mask (1: made anew) [64]."""
    strength: float = 1.0

    def on_rank(self, split: Split, length: int) -> Control:
        return replace(self, values=split(patchify(self.values)).clone())

    def on_device(self, device: torch.device) -> Control:
        return replace(self, values=self.values.to(device))

    def for_expert(self, *, keep: bool) -> Control:
        return self

    def device_bytes(self) -> int:
        return self.values.nbytes


class VaceBlock(Block):
    """For all controls at once: its weights come to the device once a step.

    Args:
        first: the one that has the streams begin.
    """

    def __init__(self, config: WanConfig, *, first: bool) -> None:
        super().__init__(config)
        if first:
            self.before_proj = Linear(config.dim, config.dim)
        self.after_proj = Linear(config.dim, config.dim)

    def forward(
        self,
        streams: list[Tensor],
        begin: list[Tensor],
        strengths: Sequence[float],
        e: Tensor,
        which: Which,
        rope: Rope,
        attended: Sequence[Attended],
    ) -> Tensor:
        """Returns what is to be added to the main stream, [S, C].

        Args:
            streams: [S, C] for each control, replaced by what they become: nothing else may hold them, they are large.
            begin: the main stream as embedded, which the first of these blocks takes out.
        """
        if begin:
            x = begin.pop()
            for i, stream in enumerate(streams):
                streams[i] = self.before_proj(stream) + x
            del x, stream
        hints = []
        for i, strength in enumerate(strengths):
            streams[i] = self.through([Stream(streams[i])], e, which, rope, attended).sum(self.ops)
            hints.append(self.after_proj(streams[i]).float() * strength)
        return sum(hints[1:], hints[0])
