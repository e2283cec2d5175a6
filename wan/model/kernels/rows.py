"""Casting rows to e4m3, after a GELU or not, and what all kernels share.

A row is read in two pieces, since Triton's blocks are powers of two: 5,120 values as 4,096 and 1,024 fill them, where
one of 8,192 would leave three of eight threads idle.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..eight_bits import E4M3
from ..linear import Fp8Tokens, LinearInput, cast_tokens


@triton.jit
def load_piece(ptr, column, columns, FULL: tl.constexpr):
    """Values of a row, 0 beyond its end. FULL: its pieces end where it does."""
    if FULL:
        piece = tl.load(ptr + column)
    else:
        piece = tl.load(ptr + column, mask=column < columns, other=0.0)
    return piece


@triton.jit
def store_piece(ptr, column, columns, piece, FULL: tl.constexpr):
    piece = piece.to(ptr.dtype.element_ty)
    if FULL:
        tl.store(ptr + column, piece)
    else:
        tl.store(ptr + column, piece, mask=column < columns)


@triton.jit
def code_scale(first, rest):
    """Of a row in two pieces, float32, 0 where there are no columns: its scale in e4m3 (`linear.quantise_rows`)."""
    scale = tl.maximum(tl.max(tl.abs(first), axis=0), tl.max(tl.abs(rest), axis=0)) / 448.0
    return safe_scale(scale)


@triton.jit
def safe_scale(scale):
    # One over a smaller one is infinite: such values become zeros, as if all were.
    return tl.where(scale > 1e-37, scale, 1.0)


@triton.jit
def codes(x, scale):
    """x: float32 -> what rounds to its codes."""
    # One division for all: each would take as long as three products. No bound: the largest comes out at 448 but for
    # the last bits of float32, and all below 464 rounds to 448, here as in `linear.quantise_rows`. NaN stays NaN.
    return x * (1.0 / scale)


@triton.jit
def _gelu(x):
    # 0.5 x (1 + tanh(u)) = x / (1 + exp(-2u)), u = sqrt(2 / pi) (x + 0.044715 x^3); here exp(-2u) = 2^v.
    v = x * (-2.302208198144325 - 0.1029432395800235 * (x * x))
    # The square of a reciprocal root takes two instructions, a quotient six. Of infinity it is 0, as it must be.
    root = tl.rsqrt(1.0 + tl.exp2(v))
    return x * root * root


@triton.jit
def _rows_kernel(
    x_ptr, out_ptr, scale_ptr, columns, GELU: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr, FULL: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    near, far = tl.arange(0, FIRST), FIRST + tl.arange(0, REST)
    x_ptr += row * columns
    out_ptr += row * columns
    first = load_piece(x_ptr, near, columns, True).to(tl.float32)
    rest = load_piece(x_ptr, far, columns, FULL).to(tl.float32)
    if GELU:
        first, rest = _gelu(first), _gelu(rest)
    scale = code_scale(first, rest)
    tl.store(scale_ptr + row, scale)
    store_piece(out_ptr, near, columns, codes(first, scale), True)
    store_piece(out_ptr, far, columns, codes(rest, scale), FULL)


def cast(x: Tensor, dtype: torch.dtype) -> LinearInput:
    """`ops.cast`."""
    return _launch(x, gelu=False) if dtype == E4M3 else cast_tokens(x, dtype)


def gelu_fp8(x: Tensor) -> Fp8Tokens:
    """GELU (its tanh form) of [S, N], as e4m3 codes."""
    return _launch(x, gelu=True)


def _launch(x: Tensor, *, gelu: bool) -> Fp8Tokens:
    assert x.is_contiguous(), x.stride()
    rows, columns = x.shape
    made = torch.empty_like(x, dtype=E4M3)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    first, rest = pieces(columns)
    _rows_kernel[(rows,)](
        x, made, scale, columns, GELU=gelu, FIRST=first, REST=rest, FULL=first + rest == columns, num_warps=warps(first)
    )
    return Fp8Tokens(made, scale)


def pieces(count: int) -> tuple[int, int]:
    """Two powers of two that hold so many: the largest that is less, and what holds the rest."""
    first = 1 << max(count - 1, 1).bit_length() - 1
    return first, next_power(max(count - first, 1))


def next_power(count: int) -> int:
    """The power of two that holds so many."""
    return triton.next_power_of_2(count)


def warps(block: int) -> int:
    """About 32 elements per thread: more would spill registers."""
    return min(max(block // 1024, 1), 16)
