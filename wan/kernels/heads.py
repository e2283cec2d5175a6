"""RMS norm over all heads, rotary embedding, and writing each head where it is wanted."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..config import EPS
from ..ops import HeadPlaces, Rope
from .rows import next_power, warps


@triton.jit
def _heads_kernel(
    x_ptr, weight_ptr, cos_ptr, sin_ptr, out_ptr, table_ptr,
    columns, eps,
    HEAD: tl.constexpr, NORM: tl.constexpr, ROTATE: tl.constexpr, PLACES: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Writes the row of one token: as it lies, or with PLACES head by head (`ops.HeadPlaces`)."""
    token = tl.program_id(0).to(tl.int64)
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
    if PLACES:
        head = tl.arange(0, 2 * PAIRS // HEAD)
        real = head * HEAD < columns
        start = tl.load(table_ptr + head, mask=real, other=0)
        step = tl.load(table_ptr + columns // HEAD + head, mask=real, other=0)
        # Known to be a multiple, 16 bytes are stored at a time.
        row = tl.multiple_of(start + token * step, [8])
        offset = row[:, None] + tl.arange(0, HEAD)[None, :]
        x = tl.reshape(x, (2 * PAIRS // HEAD, HEAD))
        tl.store(out_ptr + offset, x.to(out_ptr.dtype.element_ty), mask=real[:, None])
    else:
        tl.store(out_ptr + token * columns + both, x.to(out_ptr.dtype.element_ty), mask=both < columns)


def write_heads(
    x: Tensor, weight: Tensor | None, rope: Rope | None, head_dim: int, out: Tensor, places: HeadPlaces
) -> None:
    """`ops.write_heads`."""
    _launch(x, weight, rope, out, head_dim, places)


def rotate(x: Tensor, weight: Tensor, rope: Rope, head_dim: int) -> Tensor:
    """`ops.rotate`."""
    out = torch.empty_like(x)
    _launch(x, weight, rope, out, head_dim)
    return out.unflatten(-1, (-1, head_dim))


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
