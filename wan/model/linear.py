"""Linear layers, and their weights and products in 8-bit floating point.

W = codes * scale      one scale per output row (Micikevicius et al., 2022, arXiv 2209.05433, has the formats)
x = codes * scale      one scale per token, where products are fp8 by fp8
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
E4M3 = FP8_DTYPES[0]
FP8_PRODUCTS = (
    "self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "cross_attn.q", "cross_attn.o", "ffn.0", "ffn.2"
)  # fmt: skip
"""The layers of a block that "fp8" multiplies in fp8: those that every token goes through."""


@dataclass(frozen=True, slots=True)
class Fp8Weight:
    """How a layer keeps its weight."""

    dtype: torch.dtype
    """One of `FP8_DTYPES`."""
    scaled: bool
    """There is a scale per output row; without one the codes are the weight."""


class Fp8Tokens(NamedTuple):
    """Activations in e4m3."""

    codes: Tensor
    """[n, in]."""
    scale: Tensor
    """[n, 1], float32."""


LinearInput = Tensor | Fp8Tokens


class Linear(nn.Linear):
    """A linear layer that computes in `compute_dtype`, or multiplies fp8 codes and returns that.

    An fp8 weight stays fp8 in memory: `weight_scale` is None or [out, 1] float32, which a sharding over rows cuts as it
    cuts the weight. It is unpacked for each use unless `fp8_product` is on.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.register_parameter("weight_scale", None)
        self._compute_dtype: torch.dtype | None = None
        self.fp8_product = False
        """Multiply e4m3 codes by e4m3 codes; the weight must be kept as such."""

    @property
    def compute_dtype(self) -> torch.dtype:
        """That of the weight, unless `keep_fp8` set another."""
        return self._compute_dtype or self.weight.dtype

    @property
    def input_dtype(self) -> torch.dtype:
        """What `forward` multiplies; it takes other float types too. E4M3 stands for `Fp8Tokens`."""
        return E4M3 if self.fp8_product else self.compute_dtype

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

    def forward(self, x: LinearInput) -> Tensor:
        """x: [n, in], as tensors of any float type or, where products are fp8, as codes -> [n, out]."""
        if not self.fp8_product:
            assert isinstance(x, Tensor), "codes are made for the layers that multiply them"
            return F.linear(x.to(self.compute_dtype), self.unpacked_weight(), self.bias)
        rows = fp8_tokens(x)
        product = _multiply if rows.codes.is_cuda else _multiply_unpacked
        return product(rows, self.weight, self.weight_scale, self.bias, self.compute_dtype)


def fp8_tokens(x: LinearInput) -> Fp8Tokens:
    """x: [n, in] -> its codes with a scale per row."""
    return x if isinstance(x, Fp8Tokens) else Fp8Tokens(*quantise_rows(x.float(), E4M3))


def cast_tokens(x: LinearInput, dtype: torch.dtype) -> LinearInput:
    """x: [n, in] -> the same in `dtype`; E4M3: as codes with a scale per token."""
    if dtype == E4M3:
        return fp8_tokens(x)
    assert isinstance(x, Tensor), dtype
    return x.to(dtype)


def _multiply(x: Fp8Tokens, weight: Tensor, scale: Tensor | None, bias: Tensor | None, out: torch.dtype) -> Tensor:
    """On the GPU's fp8 units. The sums are float32, scaled, biased and rounded once, to bf16."""
    if scale is None:
        scale = torch.ones(weight.shape[0], 1, device=weight.device)
    bias = None if bias is None else bias.to(torch.bfloat16)
    # Adding up within the tensor cores is twice as fast; what it rounds is far below what the codes do.
    if hasattr(F, "scaled_mm"):
        rows = F.ScalingType.RowWise
        y = F.scaled_mm(
            x.codes, weight.t(), x.scale, rows, scale.t(), rows,
            bias=bias, output_dtype=torch.bfloat16, use_fast_accum=True,
        )  # fmt: skip
    else:
        # Before torch 2.10.
        y = torch._scaled_mm(
            x.codes, weight.t(), x.scale, scale.t(), bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True
        )
    return y.to(out)


def _multiply_unpacked(
    x: Fp8Tokens, weight: Tensor, scale: Tensor | None, bias: Tensor | None, out: torch.dtype
) -> Tensor:
    """The same arithmetic where there are no such units: products of fp8 codes are exact in float32."""
    y = F.linear(x.codes.float(), weight.float()) * x.scale
    if scale is not None:
        y = y * scale.t()
    return (y if bias is None else y + bias.float()).to(out)


def quantise_rows(values: Tensor, dtype: torch.dtype, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """values: [n, in] float32 -> codes [n, in] of an fp8 `dtype` and scales [n, 1] float32: each row's largest
    magnitude becomes the type's largest. A row of zeros has scale 1.

    Args:
        kept: [n, 1], scales that stay those of rows that fit them: no value is rounded by more than half a step then,
            and values that were codes times this scale get the same codes again.
    """
    largest = torch.finfo(dtype).max
    magnitudes = values.abs().amax(dim=1, keepdim=True)
    scale = magnitudes / largest
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    if kept is not None:
        half_step = torch.finfo(dtype).eps * 2 ** math.floor(math.log2(largest)) / 2
        scale = torch.where(magnitudes <= kept * (largest + half_step), kept, scale)
    # Rounding may push a row's largest just over the type's, which casts to NaN.
    return (values / scale).clamp_(-largest, largest).to(dtype), scale
