"""Residual, layer norm and modulation in one pass over [S, C]."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..config import EPS
from ..eight_bits import E4M3
from ..linear import Fp8Tokens, LinearInput
from .rows import next_power, quantised, warps


@triton.jit
def _norm_kernel(
    x_ptr, y_ptr, gate_ptr, weight_ptr, bias_ptr, sum_ptr, out_ptr, scale_ptr,
    columns, gate_stride, weight_stride, eps,
    ADD: tl.constexpr, GATE: tl.constexpr, NORM: tl.constexpr, QUANTISE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    x = tl.load(x_ptr + row * columns + column, mask=inside, other=0.0)
    if ADD:
        y = tl.load(y_ptr + row * columns + column, mask=inside, other=0.0).to(tl.float32)
        if GATE:
            y = y * tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0)
        x = x + y
        tl.store(sum_ptr + row * columns + column, x, mask=inside)
    if NORM:
        centred = tl.where(inside, x - tl.sum(x, axis=0) / columns, 0.0)
        normed = centred * tl.rsqrt(tl.sum(centred * centred, axis=0) / columns + eps)
        weight = tl.load(weight_ptr + row * weight_stride + column, mask=inside, other=0.0)
        out = normed * weight + tl.load(bias_ptr + row * weight_stride + column, mask=inside, other=0.0)
        if QUANTISE:
            out, scale = quantised(out)
            tl.store(scale_ptr + row, scale)
        tl.store(out_ptr + row * columns + column, out.to(out_ptr.dtype.element_ty), mask=inside)


def norm(x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> LinearInput:
    """`ops.norm`."""
    return _launch(x, None, None, weight, bias, dtype)[1]


def add_norm(
    x: Tensor, y: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor, dtype: torch.dtype
) -> tuple[Tensor, LinearInput]:
    """`ops.add_norm`."""
    return _launch(x, y, gate, weight, bias, dtype)


def add(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """`ops.add`."""
    return _launch(x, y, gate, None, None, x.dtype)[0]


def _launch(
    x: Tensor, y: Tensor | None, gate: Tensor | None, weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, LinearInput]:
    rows, columns = x.shape
    for tensor in (x, y, gate, weight, bias):
        assert tensor is None or (tensor.is_contiguous() and tensor.shape[-1] == columns), tensor.shape
    total = x if y is None else torch.empty_like(x)
    out = x if weight is None else torch.empty_like(x, dtype=dtype)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=x.device) if dtype == E4M3 else x
    block = next_power(columns)
    _norm_kernel[(rows,)](
        x, x if y is None else y, x if gate is None else gate, x if weight is None else weight,
        x if bias is None else bias, total, out, scale,
        columns, _row_stride(gate, rows), _row_stride(weight, rows), EPS,
        ADD=y is not None, GATE=gate is not None, NORM=weight is not None, QUANTISE=dtype == E4M3, BLOCK=block,
        num_warps=warps(block),
    )  # fmt: skip
    return total, (Fp8Tokens(out, scale) if dtype == E4M3 else out)


def _row_stride(parameter: Tensor | None, rows: int) -> int:
    """0 for one row that all tokens share."""
    return parameter.shape[-1] if parameter is not None and parameter.numel() == rows * parameter.shape[-1] else 0
