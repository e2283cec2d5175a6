"""RMS norm over all heads, rotary embedding, e4m3 codes, and writing each head where it is wanted."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..codes import LARGEST, LEAST_BOUND, HeadCodes, hadamard
from ..config import EPS
from ..eight_bits import E4M3
from ..ops import HeadPlaces, Rope
from .rows import next_power, warps

CODE_ROWS = 8
"""Per program of the kernel that writes codes, which takes the matrix once for all of them."""


@triton.jit
def _rotated_row(
    x_ptr, weight_ptr, cos_ptr, sin_ptr, token, columns, eps,
    HEAD: tl.constexpr, NORM: tl.constexpr, ROTATE: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """The row of one token, float32, 0 where there are no columns."""
    pair = tl.arange(0, PAIRS)
    inside = 2 * pair < columns
    both = tl.arange(0, 2 * PAIRS)
    x = tl.load(x_ptr + token * columns + both, mask=both < columns, other=0.0).to(tl.float32)
    if NORM:
        x = x * tl.rsqrt(tl.sum(x * x, axis=0) / columns + eps)
        x = x * tl.load(weight_ptr + both, mask=both < columns, other=0.0)
    if ROTATE:
        first, second = tl.split(tl.reshape(x, (PAIRS, 2)))
        place = token * (HEAD // 2) + pair % (HEAD // 2)
        cos = tl.load(cos_ptr + place, mask=inside, other=0.0)
        sin = tl.load(sin_ptr + place, mask=inside, other=0.0)
        x = tl.interleave(first * cos - second * sin, first * sin + second * cos)
    return x


@triton.jit
def _head_offsets(table_ptr, token, heads, HEAD: tl.constexpr, ROWS: tl.constexpr):
    """Where the heads of a token go (`ops.HeadPlaces`), [ROWS, HEAD], and which of the rows are heads, [ROWS, 1]."""
    head = tl.arange(0, ROWS)
    real = head < heads
    start = tl.load(table_ptr + head, mask=real, other=0)
    step = tl.load(table_ptr + heads + head, mask=real, other=0)
    # Known to be a multiple, 16 bytes are stored at a time.
    row = tl.multiple_of(start + token * step, [HEAD])
    return row[:, None] + tl.arange(0, HEAD)[None, :], real[:, None]


@triton.jit
def _heads_kernel(
    x_ptr, weight_ptr, cos_ptr, sin_ptr, out_ptr, table_ptr,
    columns, eps,
    HEAD: tl.constexpr, NORM: tl.constexpr, ROTATE: tl.constexpr, PLACES: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Writes the row of one token: as it lies, or with PLACES head by head."""
    token = tl.program_id(0).to(tl.int64)
    x = _rotated_row(x_ptr, weight_ptr, cos_ptr, sin_ptr, token, columns, eps, HEAD, NORM, ROTATE, PAIRS)
    x = x.to(out_ptr.dtype.element_ty)
    if PLACES:
        offset, real = _head_offsets(table_ptr, token, columns // HEAD, HEAD, 2 * PAIRS // HEAD)
        tl.store(out_ptr + offset, tl.reshape(x, (2 * PAIRS // HEAD, HEAD)), mask=real)
    else:
        both = tl.arange(0, 2 * PAIRS)
        tl.store(out_ptr + token * columns + both, x, mask=both < columns)


@triton.jit
def _codes_kernel(
    x_ptr, weight_ptr, cos_ptr, sin_ptr, matrix_ptr, out_ptr, scale_ptr, table_ptr,
    tokens, columns, eps, bound, root, least, largest,
    HEAD: tl.constexpr, PLACES: tl.constexpr, PAIRS: tl.constexpr, CODE_ROWS: tl.constexpr,
):  # fmt: skip
    """Writes rows as `codes.spread_codes`; bound is what a head's largest weight is multiplied by to be its scale."""
    ROWS: tl.constexpr = 2 * PAIRS // HEAD
    both = tl.arange(0, 2 * PAIRS)
    channel = tl.arange(0, HEAD)
    head = tl.arange(0, ROWS)
    heads = columns // HEAD
    weight = tl.load(weight_ptr + both, mask=both < columns, other=0.0)
    scale = tl.maximum(tl.max(tl.abs(tl.reshape(weight, (ROWS, HEAD))), axis=1) * bound, least)
    if tl.program_id(0) == 0:
        tl.store(scale_ptr + head, scale, mask=head < heads)
    factor = 1.0 / (scale * root)
    matrix = tl.load(matrix_ptr + channel[:, None] * HEAD + channel[None, :])
    for row in range(CODE_ROWS):
        # The last program may write the last row again.
        token = tl.minimum(tl.program_id(0).to(tl.int64) * CODE_ROWS + row, tokens - 1)
        x = _rotated_row(x_ptr, weight_ptr, cos_ptr, sin_ptr, token, columns, eps, HEAD, True, True, PAIRS)
        x = tl.dot(tl.reshape(x, (ROWS, HEAD)).to(matrix.dtype), matrix, input_precision="ieee") * factor[:, None]
        x = tl.minimum(tl.maximum(x, -largest), largest).to(out_ptr.dtype.element_ty)
        if PLACES:
            offset, real = _head_offsets(table_ptr, token, heads, HEAD, ROWS)
        else:
            offset = token * columns + head[:, None] * HEAD + channel[None, :]
            real = (head < heads)[:, None]
        tl.store(out_ptr + offset, x, mask=real)


def write_heads(
    x: Tensor, weight: Tensor | None, rope: Rope | None, head_dim: int, out: Tensor, places: HeadPlaces
) -> Tensor | None:
    """`ops.write_heads`."""
    if out.dtype == E4M3:
        assert weight is not None and rope is not None, "only what is rotated becomes codes"
        return _launch_codes(x, weight, rope, out, head_dim, places)
    _launch(x, weight, rope, out, head_dim, places)
    return None


def rotate(x: Tensor, weight: Tensor, rope: Rope, head_dim: int) -> Tensor:
    """`ops.rotate`."""
    out = torch.empty_like(x)
    _launch(x, weight, rope, out, head_dim)
    return out.unflatten(-1, (-1, head_dim))


def rotate_codes(x: Tensor, weight: Tensor, rope: Rope, head_dim: int) -> HeadCodes:
    """`ops.rotate_codes`."""
    out = torch.empty_like(x, dtype=E4M3)
    scale = _launch_codes(x, weight, rope, out, head_dim)
    return HeadCodes(out.unflatten(-1, (-1, head_dim)), scale)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """`ops.rms_norm`."""
    out = torch.empty_like(x)
    _launch(x, weight, None, out, x.shape[1])
    return out


def _launch(
    x: Tensor, weight: Tensor | None, rope: Rope | None, out: Tensor, head_dim: int, places: HeadPlaces | None = None
) -> None:
    tokens, columns = x.shape
    assert x.is_contiguous() and out.is_contiguous() and columns % head_dim == 0, (x.stride(), columns, head_dim)
    pairs = next_power(columns) // 2
    cos, sin = (x, x) if rope is None else rope
    _heads_kernel[(tokens,)](
        x, x if weight is None else weight, cos, sin, out, x if places is None else places.table,
        columns, EPS,
        HEAD=head_dim, NORM=weight is not None, ROTATE=rope is not None, PLACES=places is not None, PAIRS=pairs,
        num_warps=warps(2 * pairs),
    )  # fmt: skip


def _launch_codes(
    x: Tensor, weight: Tensor, rope: Rope, out: Tensor, head_dim: int, places: HeadPlaces | None = None
) -> Tensor:
    """Returns the scales, [H]."""
    tokens, columns = x.shape
    assert x.is_contiguous() and out.is_contiguous() and columns % head_dim == 0, (x.stride(), columns, head_dim)
    scale = torch.empty(columns // head_dim, dtype=torch.float32, device=x.device)
    pairs = next_power(columns) // 2
    _codes_kernel[(triton.cdiv(tokens, CODE_ROWS),)](
        x, weight, *rope, hadamard(head_dim, x.device, x.dtype), out, scale, x if places is None else places.table,
        tokens, columns, EPS, columns**0.5 / LARGEST, head_dim**0.5, LEAST_BOUND, LARGEST,
        HEAD=head_dim, PLACES=places is not None, PAIRS=pairs, CODE_ROWS=CODE_ROWS, num_warps=warps(2 * pairs),
        # Room for two programs on a multiprocessor: rows fetched ahead would take its shared memory for one.
        num_stages=1, maxnreg=128,
    )  # fmt: skip
    return scale
