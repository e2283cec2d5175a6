"""Weights that were rotated before they were rounded, turned back while they are read (ConvRot).

W = codes * scale, group by group of neighbouring inputs times the normalised regular Hadamard matrix, its own inverse:
rotated, no group has a value that is much larger than the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..model.eight_bits import rotate_inputs
from .stored_tensor import Unpacked, row_pieces


@dataclass(frozen=True, slots=True)
class Rotated(Unpacked):
    """A matrix [out, in] in the basis of the model."""

    group: int
    """A power of 4 that divides `in`."""

    def read_into(self, out: Tensor, *, start: int = 0, staging: Tensor | None = None) -> None:
        if out.dtype == torch.int8:
            self.stored.read_into(out, start=start, staging=staging)
            return
        width = self.shape[1]
        for row, piece in row_pieces(out, start, width):
            values = torch.empty(piece.shape, dtype=torch.float32, device=out.device)
            self.stored.read_into(values, start=row * width, staging=staging)
            piece.copy_(rotate_inputs(values, self.group))
