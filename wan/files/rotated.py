"""Weights that were rotated before they were rounded, turned back while they are read (ConvRot).

W = codes * scale, group by group of neighbouring inputs times the normalised regular Hadamard matrix, its own inverse:
rotated, no group has a value that is much larger than the rest. Regular: all rows of the matrix have the same sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from .quant_formats import is_group
from .stored_tensor import StoredTensor, row_pieces


@dataclass(frozen=True, slots=True)
class Rotated:
    """A matrix [out, in] in the basis of the model."""

    inner: StoredTensor
    """As it was rotated."""
    group: int
    """A power of 4 that divides `in`."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape

    @property
    def nbytes(self) -> int:
        return self.inner.nbytes

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def read_into(self, out: Tensor, *, start: int = 0, staging: Tensor | None = None) -> None:
        width = self.shape[1]
        turn = hadamard(self.group).to(out.device)
        for row, piece in row_pieces(out, start, width):
            values = torch.empty(piece.shape, dtype=torch.float32, device=out.device)
            self.inner.read_into(values, start=row * width, staging=staging)
            piece.copy_((values.view(-1, self.group) @ turn).view_as(piece))


@cache
def hadamard(size: int) -> Tensor:
    """[size, size] float32: the Kronecker power of the smallest regular one, symmetric and orthogonal."""
    assert is_group(size), size
    smallest = torch.tensor([[1.0, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]) / 2
    matrix = smallest
    while matrix.shape[0] < size:
        matrix = torch.kron(matrix, smallest)
    return matrix
