"""RMS norm over all heads, rotary embedding, and the place of each head in the buffer that Ulysses sends."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..config import EPS
from ..ops import Rope
from .rows import next_power, warps


@triton.jit
def _heads_kernel(
    x_ptr, weight_ptr, cos_ptr, sin_ptr, out_ptr,
    tokens, columns, eps, which, of, heads, ranks,
    HEAD: tl.constexpr, NORM: tl.constexpr, ROTATE: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Writes the row of token t, tensor `which` of `of`, head by head.

    The buffer holds for each rank in turn [tokens, of, h, HEAD]; the first heads % ranks ranks have one head more.
    """
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
    head = both // HEAD
    small = heads // ranks
    large = heads % ranks
    is_large = head < large * (small + 1)
    mine = tl.where(is_large, small + 1, small)
    start = tl.where(
        is_large,
        head // (small + 1) * (small + 1),
        large + (head - large) // tl.maximum(small, 1) * tl.maximum(small, 1),
    )
    # Before a rank's chunk lie `start` heads of every token and tensor.
    offset = (tokens * of * start + (token * of + which) * mine + head - start) * HEAD + both % HEAD
    tl.store(out_ptr + offset, x.to(out_ptr.dtype.element_ty), mask=both < columns)


def message(
    projections: tuple[Tensor, Tensor, Tensor], weights: tuple[Tensor, Tensor], rope: Rope, head_dim: int, ranks: int
) -> Tensor:
    """`ops.message`."""
    tokens, columns = projections[0].shape
    out = projections[0].new_empty(tokens * 3 * columns // head_dim, head_dim)
    for which, (x, weight) in enumerate(zip(projections, (*weights, None), strict=True)):
        _launch(x, weight, None if weight is None else rope, out, which, 3, head_dim, ranks)
    return out


def rotate(x: Tensor, weight: Tensor, rope: Rope, head_dim: int) -> Tensor:
    """`ops.rotate`."""
    out = torch.empty_like(x)
    _launch(x, weight, rope, out, 0, 1, head_dim, 1)
    return out.unflatten(-1, (-1, head_dim))


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """`ops.rms_norm`."""
    out = torch.empty_like(x)
    _launch(x, weight, None, out, 0, 1, x.shape[1], 1)
    return out


def _launch(
    x: Tensor, weight: Tensor | None, rope: Rope | None, out: Tensor, which: int, of: int, head_dim: int, ranks: int
) -> None:
    tokens, columns = x.shape
    assert x.is_contiguous() and out.is_contiguous() and columns % head_dim == 0, (x.stride(), columns, head_dim)
    pairs = next_power(columns) // 2
    cos, sin = (x, x) if rope is None else rope
    _heads_kernel[(tokens,)](
        x, x if weight is None else weight, cos, sin, out,
        tokens, columns, EPS, which, of, columns // head_dim, ranks,
        HEAD=head_dim, NORM=weight is not None, ROTATE=rope is not None, PAIRS=pairs, num_warps=warps(2 * pairs),
    )  # fmt: skip
