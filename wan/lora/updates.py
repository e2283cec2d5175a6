"""What one LoRA file adds to one parameter, read from the file row range by row range."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..files.stored_tensor import StoredTensor

Adder = Callable[[Tensor, int], None]
"""(rows [n, in] float32, index of the first of them among the rows asked for): adds the change in place."""


@dataclass(frozen=True, slots=True)
class LowRank:
    """scale * up @ down."""

    down: StoredTensor
    """[rank, in], or a convolution's [rank, in, ...]."""
    up: StoredTensor
    """[out, rank]."""
    scale: float

    def adder(self, first: int, count: int, device: torch.device) -> Adder:
        rank = self.down.shape[0]
        down = read_elements(self.down, 0, math.prod(self.down.shape)).view(rank, -1).to(device)
        up = read_elements(self.up, first * rank, count * rank).view(count, rank).to(device)

        def add(rows: Tensor, start: int) -> None:
            rows.addmm_(up[start : start + rows.shape[0]], down, alpha=self.scale)

        return add


@dataclass(frozen=True, slots=True)
class Difference:
    """scale * diff."""

    diff: StoredTensor
    """As many elements as the parameter has."""
    scale: float

    def adder(self, first: int, count: int, device: torch.device) -> Adder:
        def add(rows: Tensor, start: int) -> None:
            width = rows.shape[1]
            diff = read_elements(self.diff, (first + start) * width, rows.numel())
            rows.add_(diff.view_as(rows).to(device), alpha=self.scale)

        return add


def read_elements(stored: StoredTensor, first: int, count: int) -> Tensor:
    """Elements [first, first + count) of a tensor as float32, on the CPU."""
    values = torch.empty(count, dtype=stored.dtype)
    stored.read_into(values, start=first)
    return values.float()
