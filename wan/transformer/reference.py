"""A reference picture in front of the video, as a frame of tokens that have an embedding of their own and no noise.

What the model says of them is dropped: they are the same at every step. (Wan Fun-Control.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..model.patch import patchify


@dataclass(frozen=True, slots=True)
class Reference:
    """On one rank, if at all."""

    values: Tensor
    """Latents [C, 1, h, w], normalised; on a rank those of its tokens that are there, [n, 4 * C]. Float32."""
    rows: Tensor | None = None
    """[n] int64: which of the rank's tokens they are."""

    def on_rank(self, split: Callable[[Tensor], Tensor], length: int, device: torch.device) -> Reference:
        """split: [length, C] of the whole sequence -> the rank's [S, C]."""
        tokens = patchify(self.values)
        # Counted from 1: what fills a rank up is 0.
        index = split(torch.arange(1, length + 1)[:, None])[:, 0] - 1
        rows = ((index >= 0) & (index < len(tokens))).nonzero()[:, 0]
        return Reference(tokens[index[rows]].to(device), rows.to(device))

    def put_into(self, x: Tensor, embedding: nn.Module) -> Tensor:
        """x: a rank's tokens as embedded, [S, C] float32 -> the same with the picture's in their places."""
        assert self.rows is not None, "the picture is on a rank"
        return x.index_copy(0, self.rows, embedding(self.values).float())

    def taken_out(self, velocity: Tensor) -> Tensor:
        """[S, 4 * out_dim], with zeros for the picture's."""
        assert self.rows is not None, "the picture is on a rank"
        return velocity.index_fill(0, self.rows, 0.0)
