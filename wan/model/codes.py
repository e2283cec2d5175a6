"""Heads in 8 bits: e4m3 codes with one scale per head (Micikevicius et al., 2022, arXiv 2209.05433).

    x = codes * scale

Queries and keys are multiplied by a signed Hadamard matrix before: that leaves q k^T as it is and spreads a loud
channel over all of its head (FlashAttention-3, Shah et al., 2024, arXiv 2407.08608, section 3.3). Their scale is known
before they are: they are normed, so that no head can be longer than its norm's weights allow. It is looser than what
their largest magnitude would give, which costs nothing: e4m3 is as fine at 4 as at 400.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .eight_bits import E4M3

LARGEST = torch.finfo(E4M3).max
LEAST_BOUND = 1e-20
"""Instead of 0, for heads whose norm has no weights."""


class HeadCodes(NamedTuple):
    """Heads in e4m3."""

    codes: Tensor
    """[S, H, D]."""
    scale: Tensor
    """[H], float32."""


Heads = Tensor | HeadCodes


@dataclass(frozen=True, slots=True)
class CodesAttention:
    """An attention kernel (`attention.Attention`) that computes on codes. What comes without it rounds itself."""

    run: Callable[[Heads, Heads, Heads], Tensor]

    def __call__(self, q: Heads, k: Heads, v: Heads) -> Tensor:
        return self.run(q, k, v)


def quantise_heads(x: Tensor) -> HeadCodes:
    """x: [S, H, D]. Each head's largest magnitude becomes e4m3's."""
    # A norm reads the strided view once; abs() would write a copy of it.
    scale = torch.linalg.vector_norm(x, ord=float("inf"), dim=(0, 2), dtype=torch.float32) / LARGEST
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    # One pass. What rounding puts just over the type's largest becomes the largest again.
    codes = torch.div(x, scale[:, None], out=torch.empty(x.shape, dtype=E4M3, device=x.device))
    return HeadCodes(codes, scale)


def spread_codes(x: Tensor, weight: Tensor, dtype: torch.dtype) -> HeadCodes:
    """x: [S, H, D] float32, normed over all heads with `weight` [H * D] and rotated -> codes of x times `hadamard`.

    The norm makes rows as long as the square root of their channels, and weighs them; neither rotation makes a head
    longer, and no value is larger than its head is long.

    Args:
        dtype: of the products with the matrix.
    """
    head_dim = x.shape[-1]
    bound = torch.linalg.vector_norm(weight.unflatten(0, (-1, head_dim)), ord=float("inf"), dim=1)
    scale = (bound * (math.sqrt(weight.numel()) / LARGEST)).clamp_min(LEAST_BOUND)
    spread = x.to(dtype) @ hadamard(head_dim, x.device, dtype)
    codes = spread * (1 / (scale * math.sqrt(head_dim)))[:, None]
    return HeadCodes(codes.clamp(-LARGEST, LARGEST).to(E4M3), scale)


@functools.lru_cache(maxsize=4)
def hadamard(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[size, size] of 1 and -1: columns at right angles, rows with signs of their own. size: a power of two.

    Without the signs, which are the Rudin-Shapiro sequence, a head of equal values would become one loud channel.
    """
    assert size & (size - 1) == 0, size
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    signs = torch.tensor([(-1.0) ** (i & i >> 1).bit_count() for i in range(size)])
    return (signs[:, None] * matrix).to(device, dtype)
