"""What lies between the VAE's convolutions, in one pass over [T, H, W, C] each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..model.kernels.rows import next_power
from .vae_ops import EPS, Sum, VaeOps

ELEMENTS = 4096
"""Of one program: 32 per thread."""
SIZES = ("height", "width", "sum_frame", "sum_row", "out_frame", "out_row")
"""Sizes and strides, in positions: no kernel is compiled anew for a picture of another size."""


@triton.jit
def _load_sum(x_ptr, bias_ptr, residual_ptr, here, column, inside, COLUMNS, BIAS: tl.constexpr, RESIDUAL: tl.constexpr):
    x = tl.load(x_ptr + here, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        x += tl.load(bias_ptr + column, mask=column < COLUMNS, other=0.0).to(tl.float32)[None, :]
    if RESIDUAL:
        x += tl.load(residual_ptr + here, mask=inside, other=0.0).to(tl.float32)
    return x


@triton.jit(do_not_specialize=SIZES)
def _norm_kernel(
    x_ptr, bias_ptr, residual_ptr, weight_ptr, sum_ptr, out_ptr,
    height, width, sum_frame, sum_row, out_frame, out_row, eps,
    COLUMNS: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, KEEP: tl.constexpr,
    NORM: tl.constexpr, SILU: tl.constexpr, POSITIONS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    position = tl.program_id(1) * POSITIONS + tl.arange(0, POSITIONS)
    column = tl.arange(0, BLOCK)
    inside = (position < width)[:, None] & (column < COLUMNS)[None, :]
    in_row = position[:, None] * COLUMNS + column[None, :]
    here = row * width * COLUMNS + in_row
    x = _load_sum(x_ptr, bias_ptr, residual_ptr, here, column, inside, COLUMNS, BIAS, RESIDUAL)
    frame, row = row // height, row % height
    if KEEP:
        place = (frame * sum_frame + row * sum_row) * COLUMNS + in_row
        tl.store(sum_ptr + place, x.to(sum_ptr.dtype.element_ty), mask=inside)
    if NORM:
        scale = tl.rsqrt(tl.sum(x * x, axis=1) / COLUMNS + eps)
        weight = tl.load(weight_ptr + column, mask=column < COLUMNS, other=0.0).to(tl.float32)
        x = x * scale[:, None] * weight[None, :]
        if SILU:
            x = x * tl.sigmoid(x)
        place = (frame * out_frame + row * out_row) * COLUMNS + in_row
        tl.store(out_ptr + place, x.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=("height", "width", "out_frame", "out_row"))
def _upsample_kernel(
    x_ptr, bias_ptr, residual_ptr, out_ptr,
    height, width, out_frame, out_row,
    COLUMNS: tl.constexpr, OF: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    POSITIONS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    frame, row = row // height, row % height
    position = tl.program_id(1) * POSITIONS + tl.arange(0, POSITIONS)
    column = tl.arange(0, BLOCK)
    inside = (position < width)[:, None] & (column < COLUMNS)[None, :]
    # A position holds `OF` frames, which follow each other.
    which = frame % OF * COLUMNS
    start = ((frame // OF) * height + row) * width * OF * COLUMNS + which
    here = start + position[:, None] * (OF * COLUMNS) + column[None, :]
    x = _load_sum(x_ptr, bias_ptr + which, residual_ptr, here, column, inside, COLUMNS, BIAS, RESIDUAL)
    x = x.to(out_ptr.dtype.element_ty)
    for down in tl.static_range(2):
        start = (frame * out_frame + (2 * row + down) * out_row) * COLUMNS
        for right in tl.static_range(2):
            place = start + (2 * position[:, None] + right) * COLUMNS + column[None, :]
            tl.store(out_ptr + place, x, mask=inside)


def add(total: Sum, out: Tensor | None = None) -> Tensor:
    """`vae_ops.add`."""
    if out is None:
        if total.bias is None and total.residual is None:
            return total.x
        out = torch.empty_like(total.x)
    _launch(total, None, out, None, silu=False)
    return out


def norm(total: Sum, weight: Tensor, out: Tensor, silu: bool, keep: bool) -> Tensor:
    """`vae_ops.norm`."""
    added = total.bias is not None or total.residual is not None
    _launch(total, weight, total.x if keep and added else None, out, silu=silu)
    return total.x


def upsample(total: Sum, of: int, out: Tensor) -> None:
    """`vae_ops.upsample`."""
    x, bias, residual = total
    frames, height, width, columns = x.shape
    columns //= of
    _check(total)
    frame, row = _strides(out, (of * frames, 2 * height, 2 * width, columns))
    block, positions, blocks = _blocks(columns, width)
    _upsample_kernel[(of * frames * height, blocks)](
        x, x if bias is None else bias, x if residual is None else residual, out,
        height, width, frame, row,
        COLUMNS=columns, OF=of, BIAS=bias is not None, RESIDUAL=residual is not None,
        POSITIONS=positions, BLOCK=block,
    )  # fmt: skip


def vae_ops() -> VaeOps:
    """Needs Triton, which comes with torch's CUDA builds."""
    return VaeOps(add, norm, upsample)


def _launch(total: Sum, weight: Tensor | None, kept: Tensor | None, out: Tensor | None, *, silu: bool) -> None:
    x, bias, residual = total
    frames, height, width, columns = x.shape
    _check(total)
    kept_strides, out_strides = ((0, 0) if y is None else _strides(y, tuple(x.shape)) for y in (kept, out))
    block, positions, blocks = _blocks(columns, width)
    _norm_kernel[(frames * height, blocks)](
        x, x if bias is None else bias, x if residual is None else residual, x if weight is None else weight,
        x if kept is None else kept, x if out is None else out,
        height, width, *kept_strides, *out_strides, EPS / columns,
        COLUMNS=columns, BIAS=bias is not None, RESIDUAL=residual is not None, KEEP=kept is not None,
        NORM=out is not None, SILU=silu, POSITIONS=positions, BLOCK=block,
    )  # fmt: skip


def _check(total: Sum) -> None:
    for tensor in total:
        assert tensor is None or tensor.is_contiguous(), tensor.stride()
    assert total.residual is None or total.residual.shape == total.x.shape, total.residual.shape


def _strides(out: Tensor, shape: tuple[int, ...]) -> tuple[int, int]:
    """From frame to frame and from row to row."""
    columns = shape[-1]
    assert tuple(out.shape) == shape and out.stride()[2:] == (columns, 1), (out.shape, shape, out.stride())
    return out.stride(0) // columns, out.stride(1) // columns


def _blocks(columns: int, width: int) -> tuple[int, int, int]:
    """Of one program: channels and positions; and how many programs a row of the picture takes."""
    block = next_power(columns)
    positions = min(max(ELEMENTS // block, 1), next_power(width))
    return block, positions, triton.cdiv(width, positions)
