"""Residual, layer norm and modulation in one pass over [S, C], each row in two pieces (rows.py)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..config import EPS
from ..eight_bits import E4M3
from ..linear import Fp8Tokens, LinearInput
from .rows import code_scale, codes, load_piece, pieces, store_piece, warps


@triton.jit
def _summed(
    x_ptr, y_ptr, gate_ptr, sum_ptr, column, columns, ADD: tl.constexpr, GATE: tl.constexpr, FULL: tl.constexpr
):  # fmt: skip
    """A piece of a row, to which what is to be added is."""
    x = load_piece(x_ptr, column, columns, FULL)
    if ADD:
        y = load_piece(y_ptr, column, columns, FULL).to(tl.float32)
        if GATE:
            y = y * load_piece(gate_ptr, column, columns, FULL)
        x = x + y
        store_piece(sum_ptr, column, columns, x, FULL)
    return x


@triton.jit
def _modulated(normed, weight_ptr, bias_ptr, column, columns, FULL: tl.constexpr):
    weight = load_piece(weight_ptr, column, columns, FULL)
    return normed * weight + load_piece(bias_ptr, column, columns, FULL)


@triton.jit
def _norm_kernel(
    x_ptr, y_ptr, gate_ptr, weight_ptr, bias_ptr, sum_ptr, out_ptr, scale_ptr,
    columns, gate_stride, weight_stride, eps,
    ADD: tl.constexpr, GATE: tl.constexpr, NORM: tl.constexpr, QUANTISE: tl.constexpr,
    FIRST: tl.constexpr, REST: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    near, far = tl.arange(0, FIRST), FIRST + tl.arange(0, REST)
    x_ptr += row * columns
    y_ptr += row * columns
    gate_ptr += row * gate_stride
    sum_ptr += row * columns
    first = _summed(x_ptr, y_ptr, gate_ptr, sum_ptr, near, columns, ADD, GATE, True)
    rest = _summed(x_ptr, y_ptr, gate_ptr, sum_ptr, far, columns, ADD, GATE, FULL)
    if NORM:
        mean = (tl.sum(first, axis=0) + tl.sum(rest, axis=0)) / columns
        first = first - mean
        rest = rest - mean
        if not FULL:
            rest = tl.where(far < columns, rest, 0.0)
        factor = tl.rsqrt((tl.sum(first * first, axis=0) + tl.sum(rest * rest, axis=0)) / columns + eps)
        weight_ptr += row * weight_stride
        bias_ptr += row * weight_stride
        first = _modulated(first * factor, weight_ptr, bias_ptr, near, columns, True)
        rest = _modulated(rest * factor, weight_ptr, bias_ptr, far, columns, FULL)
        if QUANTISE:
            scale = code_scale(first, rest)
            tl.store(scale_ptr + row, scale)
            first, rest = codes(first, scale), codes(rest, scale)
        out_ptr += row * columns
        store_piece(out_ptr, near, columns, first, True)
        store_piece(out_ptr, far, columns, rest, FULL)


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
    first, rest = pieces(columns)
    _norm_kernel[(rows,)](
        x, x if y is None else y, x if gate is None else gate, x if weight is None else weight,
        x if bias is None else bias, total, out, scale,
        columns, _row_stride(gate, rows), _row_stride(weight, rows), EPS,
        ADD=y is not None, GATE=gate is not None, NORM=weight is not None, QUANTISE=dtype == E4M3,
        FIRST=first, REST=rest, FULL=first + rest == columns, num_warps=warps(first),
    )  # fmt: skip
    return total, (Fp8Tokens(out, scale) if dtype == E4M3 else out)


def _row_stride(parameter: Tensor | None, rows: int) -> int:
    """0 for one row that all tokens share."""
    return parameter.shape[-1] if parameter is not None and parameter.numel() == rows * parameter.shape[-1] else 0
