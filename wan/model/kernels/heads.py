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
from .rows import pieces, warps

CODE_ROWS = 16
"""Tokens, at least, per program of the kernel that writes codes, which takes the matrix once for all of them."""
LEAST_ROWS = 16
"""Of a product by the matrix units."""


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
def _spread(
    x, factor, weight, cos_ptr, sin_ptr, matrix, code, token,
    HEAD: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """x: heads of some tokens [T, ROWS, HEAD] -> normed by factor [T] and weight, rotated, times the matrix and `code`
    [ROWS]: what rounds to codes."""
    x = _rotated(x * factor[:, None, None] * weight[None, :, :], cos_ptr, sin_ptr, token, HEAD, ROWS, TOKENS)
    x = tl.dot(tl.reshape(x, (TOKENS * ROWS, HEAD)).to(matrix.dtype), matrix, input_precision="ieee")
    # No bound: none is over 448 by more than a rounding to bfloat16 (`codes.spread_codes`), and all below 464 rounds
    # to 448.
    return tl.reshape(x, (TOKENS, ROWS, HEAD)) * code[None, :, None]


@triton.jit
def _codes_kernel(
    x_ptr, weight_ptr, cos_ptr, sin_ptr, matrix_ptr, out_ptr, scale_ptr, table_ptr,
    tokens, heads, columns, eps, bound, root, least,
    HEAD: tl.constexpr, PLACES: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr, FULL: tl.constexpr,
    TOKENS: tl.constexpr, TURNS: tl.constexpr,
):  # fmt: skip
    """Writes rows as `codes.spread_codes`, TOKENS at a time, their heads in two pieces; bound is what a head's largest
    weight is multiplied by to be its scale."""
    channel = tl.arange(0, HEAD)
    matrix = tl.load(matrix_ptr + channel[:, None] * HEAD + channel[None, :])
    weight = _weights(weight_ptr, 0, heads, HEAD, FIRST, True)
    near_scale = tl.maximum(tl.max(tl.abs(weight), axis=1) * bound, least)
    weight = _weights(weight_ptr, FIRST, heads, HEAD, REST, FULL)
    far_scale = tl.maximum(tl.max(tl.abs(weight), axis=1) * bound, least)
    if tl.program_id(0) == 0:
        tl.store(scale_ptr + tl.arange(0, FIRST), near_scale)
        head = FIRST + tl.arange(0, REST)
        tl.store(scale_ptr + head, far_scale, mask=head < heads)
    near_code, far_code = 1.0 / (near_scale * root), 1.0 / (far_scale * root)
    for turn in range(TURNS):
        # The last program may write the last row again.
        token = (tl.program_id(0).to(tl.int64) * TURNS + turn) * TOKENS + tl.arange(0, TOKENS)
        token = tl.minimum(token, tokens - 1)
        near = _heads(x_ptr, token, 0, heads, HEAD, FIRST, True)
        far = _heads(x_ptr, token, FIRST, heads, HEAD, REST, FULL)
        factor = tl.rsqrt((_squares(near) + _squares(far)) / columns + eps)
        weight = _weights(weight_ptr, 0, heads, HEAD, FIRST, True)
        near = _spread(near, factor, weight, cos_ptr, sin_ptr, matrix, near_code, token, HEAD, FIRST, TOKENS)
        offset = _offsets(table_ptr, token, 0, heads, PLACES, HEAD, FIRST, True)
        _store(out_ptr, near, offset, 0, heads, FIRST, True)
        weight = _weights(weight_ptr, FIRST, heads, HEAD, REST, FULL)
        far = _spread(far, factor, weight, cos_ptr, sin_ptr, matrix, far_code, token, HEAD, REST, TOKENS)
        offset = _offsets(table_ptr, token, FIRST, heads, PLACES, HEAD, REST, FULL)
        _store(out_ptr, far, offset, FIRST, heads, REST, FULL)


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
    first, rest = pieces(heads)
    together = max(LEAST_ROWS // rest, 1)
    turns = max(CODE_ROWS // together, 1)
    _codes_kernel[(triton.cdiv(tokens, together * turns),)](
        x, weight, *rope, hadamard(head_dim, x.device, x.dtype), out, scale, x if places is None else places.table,
        tokens, heads, columns, EPS, columns**0.5 / LARGEST, head_dim**0.5, LEAST_BOUND,
        HEAD=head_dim, PLACES=places is not None, FIRST=first, REST=rest, FULL=first + rest == heads,
        TOKENS=together, TURNS=turns, num_warps=warps(together * first * head_dim),
        # Room for two programs on a multiprocessor: rows fetched ahead would take its shared memory for one.
        num_stages=1, maxnreg=128,
    )  # fmt: skip
    return scale
