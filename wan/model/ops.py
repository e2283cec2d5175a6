"""The arithmetic around a block's matrix products: plain torch, or fused kernels that compute the same.

Shapes as in transformer.py. What each function does is said at `PLAIN`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .codes import HeadCodes, quantise_heads, spread_codes
from .config import EPS
from .linear import Linear, LinearInput, cast_tokens
from .rope import apply_rope

Rope = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class HeadPlaces:
    """Where each head of a row goes. Counted in elements, from the start of the tensor that is written."""

    table: Tensor
    """[2, H] int64, on the device: a head's place for the first token, and from one token's to the next one's. Both are
    multiples of D, so that a kernel may write 16 bytes at a time."""

    @classmethod
    def of(cls, runs: Sequence[Tensor], base: Tensor) -> HeadPlaces:
        """Of all heads of `runs`, [S, w, D] each, from the start of `base`: they may lie in other memory than that."""
        table = [
            ((run.data_ptr() - base.data_ptr()) // base.itemsize + head * run.shape[2], run.stride(0))
            for run in runs
            for head in range(run.shape[1])
        ]
        return cls(torch.tensor(table, dtype=torch.int64, device=base.device).t().contiguous())


@dataclass(frozen=True, slots=True)
class Ops:
    """One implementation. The functions of `PLAIN` say what each does; others round at most once more or less."""

    name: str
    cast: Callable[[Tensor, torch.dtype], LinearInput]
    norm: Callable[[Tensor, Tensor, Tensor, torch.dtype], LinearInput]
    add_norm: Callable[[Tensor, Tensor, Tensor | None, Tensor, Tensor, torch.dtype], tuple[Tensor, LinearInput]]
    add: Callable[[Tensor, Tensor, Tensor], Tensor]
    rms_norm: Callable[[Tensor, Tensor], Tensor]
    rotate: Callable[[Tensor, Tensor, Rope, int], Tensor]
    gelu_linear: Callable[[Linear, LinearInput, torch.dtype], LinearInput]
    rotate_codes: Callable[[Tensor, Tensor, Rope, int], HeadCodes]
    quantise_heads: Callable[[Tensor], HeadCodes]
    write_heads: Callable[[Tensor, Tensor | None, Rope | None, int, Tensor, HeadPlaces], Tensor | None] | None = None
    """(x, weight, rope, head_dim, out, places): writes what `rotate` returns, or with neither weight nor rope x as it
    is, head by head into the memory of `out`; where that is e4m3, the codes of `rotate_codes`, whose scale it returns.
    None: it would be no faster than copies of what those return."""


def norm(x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> LinearInput:
    """Layer norm, times `weight` plus `bias`, cast (linear.cast_tokens).

    Args:
        x: [S, C] float32.
        weight, bias: float32; [C] of the layer, or a modulation's [1, C] or [S, C].
    """
    if weight.dim() == 1:
        return cast_tokens(F.layer_norm(x, weight.shape, weight, bias, eps=EPS), dtype)
    return cast_tokens(F.layer_norm(x, weight.shape[-1:], eps=EPS) * weight + bias, dtype)


def add_norm(
    x: Tensor, y: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor, dtype: torch.dtype
) -> tuple[Tensor, LinearInput]:
    """The residual x + gate * y (gate None: 1), [S, C] float32, and its `norm`. y: [S, C]; gate: [1, C] or [S, C]."""
    x = x + y if gate is None else add(x, y, gate)
    return x, norm(x, weight, bias, dtype)


def add(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + gate * y: [S, C] float32."""
    return x + y * gate


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """x: [S, C] -> normed over all heads together and times `weight` [C] float32, then in the dtype of x."""
    return F.rms_norm(x.float(), weight.shape, weight, EPS).to(x.dtype)


def rotate(x: Tensor, weight: Tensor, rope: Rope, head_dim: int) -> Tensor:
    """x: [S, C], a projection to queries or keys -> [S, H, D]: normed over all heads, with `weight` [C] in float32,
    rotated, rounded to the dtype of x."""
    normed = F.rms_norm(x.float(), weight.shape, weight, EPS)
    return apply_rope(normed.unflatten(-1, (-1, head_dim)), *rope).to(x.dtype)


def rotate_codes(x: Tensor, weight: Tensor, rope: Rope, head_dim: int) -> HeadCodes:
    """What `rotate` returns, times the Hadamard matrix, as codes (codes.spread_codes)."""
    normed = F.rms_norm(x.float(), weight.shape, weight, EPS)
    return spread_codes(apply_rope(normed.unflatten(-1, (-1, head_dim)), *rope), weight, x.dtype)


def gelu_linear(linear: Linear, x: LinearInput, dtype: torch.dtype) -> LinearInput:
    """`linear`, then GELU (its tanh form), cast."""
    return cast_tokens(F.gelu(linear(x), approximate="tanh"), dtype)


PLAIN = Ops("plain", cast_tokens, norm, add_norm, add, rms_norm, rotate, gelu_linear, rotate_codes, quantise_heads)
