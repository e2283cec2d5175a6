"""What one LoRA file adds to one parameter, read from the file row range by row range.

W is the parameter as a matrix, [out, in]; what depends on W itself is in dora.py and oft.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from ..files.stored_tensor import StoredTensor

Adder = Callable[[Tensor, int, Tensor], None]
"""(rows [n, in] float32, index of the first of them among the rows asked for, the same rows of W): adds the change in
place."""
ReadRows = Callable[[int, int], Tensor]
"""(first, count) -> those rows of W, [count, in] float32."""


class Update(Protocol):
    """A change of W."""

    needs_base: ClassVar[bool]
    """It depends on W, so that it must see W without what others have added."""

    def adder(self, first: int, count: int, device: torch.device, read_rows: ReadRows) -> Adder:
        """For rows [first, first + count). Raises OSError if a file cannot be read any more, or ended early."""


@dataclass(frozen=True, slots=True)
class LowRank:
    """scale * up @ down."""

    needs_base: ClassVar[bool] = False
    down: StoredTensor
    """[rank, in], or a convolution's [rank, in, ...]."""
    up: StoredTensor
    """[out, rank]."""
    scale: float

    def adder(self, first: int, count: int, device: torch.device, read_rows: ReadRows) -> Adder:
        down, up = read_matrix(self.down).to(device), read_matrix(self.up, first, count).to(device)

        def add(rows: Tensor, start: int, base: Tensor) -> None:
            rows.addmm_(up[start : start + rows.shape[0]], down, alpha=self.scale)

        return add


@dataclass(frozen=True, slots=True)
class Hadamard:
    """scale * (a1 @ b1) * (a2 @ b2), element by element: LoHa (Hyeon-Woo et al., 2021, arXiv 2108.06098)."""

    needs_base: ClassVar[bool] = False
    ups: tuple[StoredTensor, StoredTensor]
    """[out, rank] each."""
    downs: tuple[StoredTensor, StoredTensor]
    """[rank, in] each."""
    scale: float

    def adder(self, first: int, count: int, device: torch.device, read_rows: ReadRows) -> Adder:
        downs = [read_matrix(down).to(device) for down in self.downs]
        ups = [read_matrix(up, first, count).to(device) for up in self.ups]

        def add(rows: Tensor, start: int, base: Tensor) -> None:
            one, two = (up[start : start + rows.shape[0]] @ down for up, down in zip(ups, downs, strict=True))
            rows.addcmul_(one, two, value=self.scale)

        return add


@dataclass(frozen=True, slots=True)
class Kronecker:
    """scale * kron(w1, w2), each a matrix or a product of two: LoKr (Edalati et al., 2022, arXiv 2212.10650)."""

    needs_base: ClassVar[bool] = False
    w1: tuple[StoredTensor, ...]
    """[o1, i1], or [o1, rank] and [rank, i1]."""
    w2: tuple[StoredTensor, ...]
    """[out / o1, in / i1], or its two factors."""
    scale: float

    def adder(self, first: int, count: int, device: torch.device, read_rows: ReadRows) -> Adder:
        w1, w2 = (_product(factors).to(device) for factors in (self.w1, self.w2))

        def add(rows: Tensor, start: int, base: Tensor) -> None:
            index = torch.arange(first + start, first + start + rows.shape[0], device=device)
            outer = w1[index // w2.shape[0], :, None] * w2[index % w2.shape[0], None, :]
            rows.add_(outer.view_as(rows), alpha=self.scale)

        return add


@dataclass(frozen=True, slots=True)
class Difference:
    """scale * diff."""

    needs_base: ClassVar[bool] = False
    diff: StoredTensor
    """As many elements as the parameter has."""
    scale: float

    def adder(self, first: int, count: int, device: torch.device, read_rows: ReadRows) -> Adder:
        def add(rows: Tensor, start: int, base: Tensor) -> None:
            width = rows.shape[1]
            diff = read_elements(self.diff, (first + start) * width, rows.numel())
            rows.add_(diff.view_as(rows).to(device), alpha=self.scale)

        return add


def _product(factors: tuple[StoredTensor, ...]) -> Tensor:
    first, *rest = (read_matrix(factor) for factor in factors)
    return first if not rest else first @ rest[0]


def read_matrix(stored: StoredTensor, first: int = 0, count: int | None = None) -> Tensor:
    """Rows [first, first + count) of a tensor taken as a matrix, all by default, as float32 on the CPU."""
    count = stored.shape[0] if count is None else count
    width = math.prod(stored.shape[1:])
    return read_elements(stored, first * width, count * width).view(count, width)


def read_elements(stored: StoredTensor, first: int, count: int) -> Tensor:
    """Elements [first, first + count) of a tensor as float32, on the CPU."""
    values = torch.empty(count, dtype=stored.dtype)
    stored.read_into(values, start=first)
    return values.float()
