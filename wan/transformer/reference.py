"""A reference picture in front of the video, as a frame of tokens that have an embedding of their own and no noise.

What the model says of them is dropped: they are the same at every step. (Wan Fun-Control.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..model.patch import patchify
from .part import Split, bytes_of, places


@dataclass(frozen=True, slots=True)
class Reference:
    """On one rank, if at all."""

    values: Tensor
    """Latents [C, 1, h, w], normalised; on a rank those of its tokens that are there, [n, 4 * C]. Float32."""
    rows: Tensor | None = None
    """[n] int64: which of the rank's tokens they are."""

    def on_rank(self, split: Split, length: int) -> Reference:
        tokens = patchify(self.values)
        index = places(split, length)
        rows = ((index >= 0) & (index < len(tokens))).nonzero()[:, 0]
        return Reference(tokens[index[rows]], rows)

    def on_device(self, device: torch.device) -> Reference:
        return Reference(self.values.to(device), None if self.rows is None else self.rows.to(device))

    def for_expert(self, *, keep: bool) -> Reference:
        return self

    def device_bytes(self) -> int:
        return bytes_of(self.values, self.rows)

    def put_into(self, x: Tensor, embedding: nn.Module) -> Tensor:
        """x: a rank's tokens as embedded, [S, C] float32 -> the same with the picture's in their places."""
        assert self.rows is not None, "the picture is on a rank"
        return x.index_copy(0, self.rows, embedding(self.values).float())

    def taken_out(self, velocity: Tensor) -> Tensor:
        """[S, 4 * out_dim], with zeros for the picture's."""
        assert self.rows is not None, "the picture is on a rank"
        return velocity.index_fill(0, self.rows, 0.0)
