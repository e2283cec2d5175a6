"""OFT: rows of a weight rotated among their neighbours (Qiu et al., 2023, arXiv 2306.07280), as LyCORIS stores it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..files.stored_tensor import StoredTensor
from .updates import Adder, ReadRows, read_elements


@dataclass(frozen=True, slots=True)
class Rotation:
    """strength * (rescale * R^T W - W), R of blocks along the rows, each the Cayley transform of a skew matrix.

    A row of the result needs all rows of W in its block, those of other ranks too.
    """

    needs_base: ClassVar[bool] = True
    blocks: StoredTensor
    """[count, size, size]; the skew matrix is the block minus its transpose."""
    rescale: StoredTensor | None
    """As many elements as W has rows."""
    limit: float
    """Of the norm of all skew matrices together; 0: none."""
    strength: float

    def adder(self, first: int, count: int, device: torch.device, read_rows: ReadRows) -> Adder:
        size = self.blocks.shape[1]
        begin, end = first // size, -(-(first + count) // size)
        whole = read_rows(begin * size, (end - begin) * size).to(device).view(end - begin, size, -1)
        turned = (self._rotations(begin, end, device).mT @ whole).flatten(0, 1)[first - begin * size :][:count]
        if self.rescale is not None:
            turned.mul_(read_elements(self.rescale, first, count).view(count, 1).to(device))

        def add(rows: Tensor, start: int, base: Tensor) -> None:
            rows.add_(turned[start : start + rows.shape[0]] - base, alpha=self.strength)

        return add

    def _rotations(self, begin: int, end: int, device: torch.device) -> Tensor:
        """[end - begin, size, size]."""
        blocks = read_elements(self.blocks, 0, math.prod(self.blocks.shape)).view(self.blocks.shape).to(device)
        skew = blocks - blocks.mT
        norm = torch.linalg.vector_norm(skew) + 1e-8
        if 0 < self.limit < norm:
            skew.mul_(self.limit / norm)
        skew = skew[begin:end]
        one = torch.eye(skew.shape[-1], device=device)
        # (1 + Q) (1 - Q)^-1
        return torch.linalg.solve(one - skew, one + skew, left=False)
