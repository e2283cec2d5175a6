"""Casting rows to e4m3, after a GELU or not, and what all kernels share."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..eight_bits import E4M3
from ..linear import Fp8Tokens, LinearInput, cast_tokens


@triton.jit
def quantised(x):
    """x: one row, float32, 0 where it is masked -> the row in e4m3's range, and its scale (`linear.quantise_rows`)."""
    scale = tl.max(tl.abs(x), axis=0) / 448.0
    scale = tl.where(scale > 0.0, scale, 1.0)
    # One division for all: each would take as long as three products.
    x = x * (1.0 / scale)
    return tl.minimum(tl.maximum(x, -448.0), 448.0), scale


@triton.jit
def _rows_kernel(x_ptr, out_ptr, scale_ptr, columns, GELU: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    x = tl.load(x_ptr + row * columns + column, mask=inside, other=0.0).to(tl.float32)
    if GELU:
        # 0.5 x (1 + tanh(u)) = x sigmoid(2u), u = sqrt(2 / pi) (x + 0.044715 x^3).
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    x, scale = quantised(x)
    tl.store(scale_ptr + row, scale)
    tl.store(out_ptr + row * columns + column, x.to(out_ptr.dtype.element_ty), mask=inside)


def cast(x: Tensor, dtype: torch.dtype) -> LinearInput:
    """`ops.cast`."""
    return _launch(x, gelu=False) if dtype == E4M3 else cast_tokens(x, dtype)


def gelu_fp8(x: Tensor) -> Fp8Tokens:
    """GELU (its tanh form) of [S, N], as e4m3 codes."""
    return _launch(x, gelu=True)


def _launch(x: Tensor, *, gelu: bool) -> Fp8Tokens:
    assert x.is_contiguous(), x.stride()
    rows, columns = x.shape
    codes = torch.empty_like(x, dtype=E4M3)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    block = next_power(columns)
    _rows_kernel[(rows,)](x, codes, scale, columns, GELU=gelu, BLOCK=block, num_warps=warps(block))
    return Fp8Tokens(codes, scale)


def next_power(columns: int) -> int:
    """The power of two that holds a row, as Triton's blocks must be."""
    return triton.next_power_of_2(columns)


def warps(block: int) -> int:
    """About 32 elements per thread: more would spill registers."""
    return min(max(block // 1024, 1), 16)
