"""What one LoRA file adds to one parameter, read from the file row range by row range."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..files.headers import TensorInfo
from ..files.regular_files import regular

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
Adder = Callable[[Tensor, int], None]
"""(rows [n, in] float32, index of the first of them among the rows asked for): adds the change in place."""


@dataclass(frozen=True, slots=True)
class LowRank:
    """scale * up @ down."""

    path: str
    down: TensorInfo
    """[rank, in], or a convolution's [rank, in, ...]."""
    up: TensorInfo
    """[out, rank]."""
    scale: float

    def adder(self, first: int, count: int, device: torch.device) -> Adder:
        rank = self.down.shape[0]
        down = read_elements(self.path, self.down, 0, math.prod(self.down.shape)).view(rank, -1).to(device)
        up = read_elements(self.path, self.up, first * rank, count * rank).view(count, rank).to(device)

        def add(rows: Tensor, start: int) -> None:
            rows.addmm_(up[start : start + rows.shape[0]], down, alpha=self.scale)

        return add


@dataclass(frozen=True, slots=True)
class Difference:
    """scale * diff."""

    path: str
    diff: TensorInfo
    """As many elements as the parameter has."""
    scale: float

    def adder(self, first: int, count: int, device: torch.device) -> Adder:
        def add(rows: Tensor, start: int) -> None:
            width = rows.shape[1]
            diff = read_elements(self.path, self.diff, (first + start) * width, rows.numel())
            rows.add_(diff.view_as(rows).to(device), alpha=self.scale)

        return add


def read_elements(path: str, info: TensorInfo, first: int, count: int) -> Tensor:
    """Elements [first, first + count) of a tensor as float32, on the CPU. Not a memory map, whose pages would stay."""
    dtype = DTYPES[info.dtype]
    data = bytearray(count * dtype.itemsize)
    with open(path, "rb", opener=regular) as file:
        file.seek(info.start + first * dtype.itemsize)
        if file.readinto(data) != len(data):
            raise OSError(f"{path} ended early: {info.end} bytes are needed")
    return torch.frombuffer(data, dtype=dtype).float()
