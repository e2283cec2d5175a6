"""Linear layers, and their weights in 8-bit floating point.

W = codes * scale      one scale per output row (Micikevicius et al., 2022, arXiv 2209.05433, has the formats)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True, slots=True)
class Fp8Weight:
    """How a layer keeps its weight."""

    dtype: torch.dtype
    """One of `FP8_DTYPES`."""
    scaled: bool
    """There is a scale per output row; without one the codes are the weight."""


class Linear(nn.Linear):
    """A linear layer that computes in `compute_dtype`.

    An fp8 weight stays fp8 in memory, and is unpacked for each use: `weight_scale` is None or [out, 1] float32, which
    a sharding over rows cuts as it cuts the weight.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.register_parameter("weight_scale", None)
        self._compute_dtype: torch.dtype | None = None

    @property
    def compute_dtype(self) -> torch.dtype:
        """That of the weight, unless `keep_fp8` set another."""
        return self._compute_dtype or self.weight.dtype

    def keep_fp8(self, stored: Fp8Weight, compute: torch.dtype) -> None:
        """Keeps the weight as `stored` and computes in `compute`. Leaves the values undefined."""
        assert stored.dtype in FP8_DTYPES, stored
        self._compute_dtype = compute
        self.weight = nn.Parameter(torch.empty_like(self.weight, dtype=stored.dtype), requires_grad=False)
        if stored.scaled:
            scale = torch.empty(self.out_features, 1, dtype=torch.float32, device=self.weight.device)
            self.weight_scale = nn.Parameter(scale, requires_grad=False)

    def unpacked_weight(self) -> Tensor:
        """The weight [out, in] in `compute_dtype`."""
        # fp8 codes are exact in every wider type; the product is float32 inside and rounded once.
        weight = self.weight.to(self.compute_dtype)
        return weight if self.weight_scale is None else weight.mul_(self.weight_scale)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.compute_dtype), self.unpacked_weight(), self.bias)


def quantise_rows(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """values: [n, in] float32 -> codes [n, in] of an fp8 `dtype` and scales [n, 1] float32: each row's largest
    magnitude becomes the type's largest. A row of zeros has scale 1."""
    largest = torch.finfo(dtype).max
    scale = values.abs().amax(dim=1, keepdim=True) / largest
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    # Rounding may push a row's largest just over the type's, which casts to NaN.
    return (values / scale).clamp_(-largest, largest).to(dtype), scale
