"""Matrices kept in 8 bits: codes and a scale per row.

    W = codes * scale      fp8 (Micikevicius et al., 2022, arXiv 2209.05433, has the formats) or int8

Int8 weights may be rotated: W is then in another basis of its inputs, in which no group of them has a value that is
much larger than the rest (ConvRot). The rotation is its own inverse.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
E4M3 = FP8_DTYPES[0]
CODES = (*FP8_DTYPES, torch.int8)
INT8_STORAGE = E4M3
"""What a parameter of int8 codes is called: FSDP shards no parameters of integers, and moves bytes."""


@dataclass(frozen=True, slots=True)
class KeptWeight:
    """How a layer keeps its weight."""

    dtype: torch.dtype
    """One of `CODES`."""
    scaled: bool
    """There is a scale per output row; without one the codes are the weight."""
    rotated_by: int = 0
    """Neighbouring inputs that are rotated together; 0: none."""
    lora_rank: int = 0
    """Of the LoRAs that stay beside the weight, together; 0: none."""

    def holds(self, other: KeptWeight) -> bool:
        """Whether a layer that keeps its weight so can keep it as `other` says: LoRAs of a lower rank leave zeros."""
        return other.lora_rank <= self.lora_rank and replace(other, lora_rank=self.lora_rank) == self

    @property
    def storage(self) -> torch.dtype:
        """Of the parameter."""
        return INT8_STORAGE if self.dtype == torch.int8 else self.dtype


def quantise_rows(values: Tensor, dtype: torch.dtype, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """values: [n, in] float32 -> codes [n, in] of `dtype`, one of `CODES`, and scales [n, 1] float32: each row's
    largest magnitude becomes the type's largest. A row of zeros has scale 1.

    Args:
        kept: [n, 1], scales that stay those of rows that fit them: no value is rounded by more than half a step then,
            and values that were codes times this scale get the same codes again.
    """
    least, largest, step = _range(dtype)
    scale = values.abs().amax(dim=1, keepdim=True) / largest
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    if kept is not None:
        fits = values.amax(dim=1, keepdim=True) <= kept * (largest + step / 2)
        fits &= values.amin(dim=1, keepdim=True) >= kept * (least - step / 2)
        # A row of zeros may have scale 0 in its file.
        fits &= kept > 0
        scale = torch.where(fits, kept, scale)
    codes = values / scale
    if not dtype.is_floating_point:
        codes = codes.round_()
    # Rounding may push a row's largest just over the type's, which casts to NaN.
    return codes.clamp_(least, largest).to(dtype), scale


def _range(dtype: torch.dtype) -> tuple[float, float, float]:
    """The least and the largest code, and the step between the largest ones."""
    if not dtype.is_floating_point:
        info = torch.iinfo(dtype)
        return info.min, info.max, 1
    largest = torch.finfo(dtype).max
    return -largest, largest, torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(largest))


def rotate_inputs(x: Tensor, group: int) -> Tensor:
    """x: [n, in] -> each group of `group` neighbours times the matrix of ConvRot, in the dtype of x."""
    return (x.view(-1, group) @ regular_hadamard(group, x.device, x.dtype)).view_as(x)


@functools.lru_cache(maxsize=8)
def regular_hadamard(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[size, size]: the normalised Kronecker power of the smallest regular Hadamard matrix, symmetric and orthogonal,
    of one power of two and its negative. Regular: all rows have the same sum. size: a power of 4."""
    smallest = torch.tensor([[1.0, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]) / 2
    matrix = smallest
    while matrix.shape[0] < size:
        matrix = torch.kron(matrix, smallest)
    assert matrix.shape[0] == size, size
    return matrix.to(device, dtype)
