"""e4m3 codes of heads whose largest magnitude must be found first."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..codes import LARGEST, HeadCodes
from ..eight_bits import E4M3
from .rows import codes, safe_scale

TOKENS = 64
"""Per program."""


@triton.jit
def _tile(x_ptr, tokens, token_stride, head_stride, TOKENS: tl.constexpr, HEAD: tl.constexpr):
    """This program's tokens of its head, [TOKENS, HEAD] float32; their numbers; which of them there are."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    inside = (token < tokens)[:, None]
    place = token[:, None] * token_stride + tl.program_id(1) * head_stride + tl.arange(0, HEAD)[None, :]
    return tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32), token, inside


@triton.jit
def _largest_kernel(x_ptr, largest_ptr, tokens, token_stride, head_stride, TOKENS: tl.constexpr, HEAD: tl.constexpr):
    x, _, _ = _tile(x_ptr, tokens, token_stride, head_stride, TOKENS, HEAD)
    # Magnitudes are in the order of their bits.
    tl.atomic_max(largest_ptr + tl.program_id(1), tl.max(tl.abs(x)).to(tl.int32, bitcast=True))


@triton.jit
def _codes_kernel(
    x_ptr, largest_ptr, out_ptr, scale_ptr, tokens, token_stride, head_stride, heads, most,
    TOKENS: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    x, token, inside = _tile(x_ptr, tokens, token_stride, head_stride, TOKENS, HEAD)
    head = tl.program_id(1)
    scale = safe_scale(tl.load(largest_ptr + head).to(tl.float32, bitcast=True) / most)
    if tl.program_id(0) == 0:
        tl.store(scale_ptr + head, scale)
    place = (token[:, None] * heads + head) * HEAD + tl.arange(0, HEAD)[None, :]
    tl.store(out_ptr + place, codes(x, scale).to(out_ptr.dtype.element_ty), mask=inside)


def quantise_heads(x: Tensor) -> HeadCodes:
    """`ops.quantise_heads`."""
    tokens, heads, head_dim = x.shape
    assert x.stride(2) == 1, x.stride()
    made = torch.empty(x.shape, dtype=E4M3, device=x.device)
    scale = torch.empty(heads, dtype=torch.float32, device=x.device)
    largest = torch.zeros(heads, dtype=torch.int32, device=x.device)
    grid = triton.cdiv(tokens, TOKENS), heads
    if x.numel():
        size = {"TOKENS": TOKENS, "HEAD": head_dim}
        _largest_kernel[grid](x, largest, tokens, x.stride(0), x.stride(1), **size)
        _codes_kernel[grid](x, largest, made, scale, tokens, x.stride(0), x.stride(1), heads, LARGEST, **size)
    return HeadCodes(made, scale)
