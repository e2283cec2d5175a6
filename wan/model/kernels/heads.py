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
from .rows import next_power, pieces, warps

CODE_HEADS, CODE_ROWS, CODE_WARPS = 8, 64, 4
"""Of the kernel that writes codes, the fastest of nine that were tried: heads of a token at a time; those of all its
tokens together, which the matrix units take at once; warps, so few that three programs share a multiprocessor."""


@triton.jit
def _heads(x_ptr, token, first, heads, HEAD: tl.constexpr, ROWS: tl.constexpr, FULL: tl.constexpr):
    """Heads of some tokens from number `first` on, [T, ROWS, HEAD] float32, 0 where there are none. FULL: all are."""
    head = first + tl.arange(0, ROWS)
    place = token[:, None, None] * (heads * HEAD) + head[None, :, None] * HEAD + tl.arange(0, HEAD)[None, None, :]
    if FULL:
        x = tl.load(x_ptr + place)
    else:
        x = tl.load(x_ptr + place, mask=(head < heads)[None, :, None], other=0.0)
    return x.to(tl.float32)


@triton.jit
def _squares(x):
    """[T, ROWS, HEAD] -> [T]."""
    return tl.sum(tl.sum(x * x, axis=2), axis=1)


@triton.jit
def _weights(weight_ptr, first, heads, HEAD: tl.constexpr, ROWS: tl.constexpr, FULL: tl.constexpr):
    """[ROWS, HEAD]."""
    head = first + tl.arange(0, ROWS)
    place = head[:, None] * HEAD + tl.arange(0, HEAD)[None, :]
    if FULL:
        weight = tl.load(weight_ptr + place)
    else:
        weight = tl.load(weight_ptr + place, mask=(head < heads)[:, None], other=0.0)
    return weight


@triton.jit
def _rotated(x, cos_ptr, sin_ptr, token, HEAD: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr):
    """x: [T, ROWS, HEAD]. All heads of a token turn alike: its angles are read once."""
    first, second = tl.split(tl.reshape(x, (TOKENS, ROWS, HEAD // 2, 2)))
    place = token[:, None, None] * (HEAD // 2) + tl.arange(0, HEAD // 2)[None, None, :]
    cos, sin = tl.load(cos_ptr + place), tl.load(sin_ptr + place)
    return tl.interleave(first * cos - second * sin, first * sin + second * cos)


@triton.jit
def _offsets(
    table_ptr, token, first, heads,
    PLACES: tl.constexpr, HEAD: tl.constexpr, ROWS: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Where heads of some tokens go, [T, ROWS, HEAD]: with PLACES by the table (`ops.HeadPlaces`)."""
    head = first + tl.arange(0, ROWS)
    if PLACES:
        real = head < heads
        start = tl.load(table_ptr + head, mask=real, other=0)
        step = tl.load(table_ptr + heads + head, mask=real, other=0)
        # Known to be a multiple, 16 bytes are stored at a time.
        row = tl.multiple_of(start[None, :] + token[:, None] * step[None, :], [HEAD, HEAD])
    else:
        row = token[:, None] * (heads * HEAD) + head[None, :] * HEAD
    return row[:, :, None] + tl.arange(0, HEAD)[None, None, :]


@triton.jit
def _store(out_ptr, x, offset, first, heads, ROWS: tl.constexpr, FULL: tl.constexpr):
    x = x.to(out_ptr.dtype.element_ty)
    if FULL:
        tl.store(out_ptr + offset, x)
    else:
        real = first + tl.arange(0, ROWS) < heads
        tl.store(out_ptr + offset, x, mask=real[None, :, None])


@triton.jit
def _heads_kernel(
    x_ptr, weight_ptr, cos_ptr, sin_ptr, out_ptr, table_ptr,
    heads, columns, eps,
    HEAD: tl.constexpr, NORM: tl.constexpr, ROTATE: tl.constexpr, PLACES: tl.constexpr,
    FIRST: tl.constexpr, REST: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Writes the row of one token, its heads in two pieces: as it lies, or with PLACES head by head."""
    token = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    near = _heads(x_ptr, token, 0, heads, HEAD, FIRST, True)
    far = _heads(x_ptr, token, FIRST, heads, HEAD, REST, FULL)
    if NORM:
        factor = tl.rsqrt((_squares(near) + _squares(far)) / columns + eps)[:, None, None]
        near = near * factor * _weights(weight_ptr, 0, heads, HEAD, FIRST, True)[None, :, :]
        far = far * factor * _weights(weight_ptr, FIRST, heads, HEAD, REST, FULL)[None, :, :]
    if ROTATE:
        near = _rotated(near, cos_ptr, sin_ptr, token, HEAD, FIRST, 1)
        far = _rotated(far, cos_ptr, sin_ptr, token, HEAD, REST, 1)
    _store(out_ptr, near, _offsets(table_ptr, token, 0, heads, PLACES, HEAD, FIRST, True), 0, heads, FIRST, True)
    _store(out_ptr, far, _offsets(table_ptr, token, FIRST, heads, PLACES, HEAD, REST, FULL), FIRST, heads, REST, FULL)


@triton.jit
def _codes_kernel(
    x_ptr, weight_ptr, cos_ptr, sin_ptr, matrix_ptr, out_ptr, scale_ptr, table_ptr,
    tokens, heads, columns, eps, bound, root, least,
    HEAD: tl.constexpr, PLACES: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, FULL: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """Writes the rows of TOKENS tokens as `codes.spread_codes`, ROWS heads of each at a time. They are read twice, for
    the sum of their squares and then from the cache, since all heads at once would fill a multiprocessor's registers.
    bound is what a head's largest weight is multiplied by to be its scale."""
    channel = tl.arange(0, HEAD)
    matrix = tl.load(matrix_ptr + channel[:, None] * HEAD + channel[None, :])
    # The last program may write the last row again.
    token = tl.minimum(tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS), tokens - 1)
    squares = tl.zeros((TOKENS, ROWS, HEAD), dtype=tl.float32)
    for group in tl.static_range(GROUPS):
        x = _heads(x_ptr, token, group * ROWS, heads, HEAD, ROWS, FULL)
        squares += x * x
    factor = tl.rsqrt(tl.sum(tl.reshape(squares, (TOKENS, ROWS * HEAD)), axis=1) / columns + eps)
    for group in range(GROUPS):
        first = group * ROWS
        head = first + tl.arange(0, ROWS)
        weight = _weights(weight_ptr, first, heads, HEAD, ROWS, FULL)
        scale = tl.maximum(tl.max(tl.abs(weight), axis=1) * bound, least)
        if tl.program_id(0) == 0:
            tl.store(scale_ptr + head, scale, mask=head < heads)
        x = _heads(x_ptr, token, first, heads, HEAD, ROWS, FULL)
        x = x * factor[:, None, None] * weight[None, :, :]
        x = _rotated(x, cos_ptr, sin_ptr, token, HEAD, ROWS, TOKENS)
        x = tl.dot(tl.reshape(x, (TOKENS * ROWS, HEAD)).to(matrix.dtype), matrix, input_precision="ieee")
        # No bound: none is over 448 by more than a rounding to bfloat16 (`codes.spread_codes`), and all below 464
        # rounds to 448.
        x = tl.reshape(x, (TOKENS, ROWS, HEAD)) * (1.0 / (scale * root))[None, :, None]
        _store(out_ptr, x, _offsets(table_ptr, token, first, heads, PLACES, HEAD, ROWS, FULL), first, heads, ROWS, FULL)


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
    # As heads of any width.
    columns = x.shape[1]
    _launch(x, weight, None, out, columns & -columns)
    return out


def _launch(
    x: Tensor, weight: Tensor | None, rope: Rope | None, out: Tensor, head_dim: int, places: HeadPlaces | None = None
) -> None:
    tokens, columns = x.shape
    assert x.is_contiguous() and out.is_contiguous() and columns % head_dim == 0, (x.stride(), columns, head_dim)
    heads = columns // head_dim
    first, rest = pieces(heads)
    cos, sin = (x, x) if rope is None else rope
    _heads_kernel[(tokens,)](
        x, x if weight is None else weight, cos, sin, out, x if places is None else places.table,
        heads, columns, EPS,
        HEAD=head_dim, NORM=weight is not None, ROTATE=rope is not None, PLACES=places is not None,
        FIRST=first, REST=rest, FULL=first + rest == heads, num_warps=warps(first * head_dim),
    )  # fmt: skip


def _launch_codes(
    x: Tensor, weight: Tensor, rope: Rope, out: Tensor, head_dim: int, places: HeadPlaces | None = None
) -> Tensor:
    """Returns the scales, [H]."""
    tokens, columns = x.shape
    assert x.is_contiguous() and out.is_contiguous() and columns % head_dim == 0, (x.stride(), columns, head_dim)
    heads = columns // head_dim
    scale = torch.empty(heads, dtype=torch.float32, device=x.device)
    rows = min(CODE_HEADS, next_power(heads))
    together = max(CODE_ROWS // rows, 1)
    _codes_kernel[(triton.cdiv(tokens, together),)](
        x, weight, *rope, hadamard(head_dim, x.device, x.dtype), out, scale, x if places is None else places.table,
        tokens, heads, columns, EPS, columns**0.5 / LARGEST, head_dim**0.5, LEAST_BOUND,
        HEAD=head_dim, PLACES=places is not None, ROWS=rows, GROUPS=triton.cdiv(heads, rows),
        FULL=heads % rows == 0, TOKENS=together, num_warps=CODE_WARPS, num_stages=1,
    )  # fmt: skip
    return scale
