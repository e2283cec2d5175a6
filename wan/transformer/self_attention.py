"""Attention between a video's tokens, whatever joins them.

Shapes as in transformer.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..model.attention import Attention, attention
from ..model.codes import CodesAttention, HeadCodes
from ..model.config import WanConfig
from ..model.linear import Linear, LinearInput
from ..model.ops import Ops, Rope

H = TypeVar("H", Tensor, HeadCodes)
Rotate = Callable[[Tensor, Tensor, Rope, int], H]
"""`Ops.rotate` or `Ops.rotate_codes`."""


class RMSNorm(nn.Module):
    """The weight [C] of a root mean square norm over all heads together, which `Ops` computes."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))


class SelfAttention(nn.Module):
    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.q = Linear(config.dim, config.dim)
        self.k = Linear(config.dim, config.dim)
        self.v = Linear(config.dim, config.dim)
        self.o = Linear(config.dim, config.dim)
        self.norm_q = RMSNorm(config.dim)
        self.norm_k = RMSNorm(config.dim)
        self.attention: TokenAttention = local_attention(attention)
        """Sequence parallelism puts its own here."""
        self.exact_attention: TokenAttention | None = None
        """Where `attention` rounds to 8 bits, what does not."""
        self.exact = False
        """For now nothing is rounded to 8 bits."""

    def attend(self, x: LinearInput, rope: Rope, ops: Ops) -> Tensor:
        """x: this rank's [S, C] -> [S, H, D], up to the last projection."""
        exact = self.exact_attention if self.exact else None
        return (exact or self.attention)(self, x, rope, ops)

    def queries_keys_values(self, x: LinearInput, rope: Rope, rotate: Rotate[H]) -> tuple[H, H, Tensor]:
        """x: [S, C] -> q, k, v, [S, H, D] each, q and k as `rotate` gives them, in the dtype of the matrix products."""
        q = rotate(self.q(x), self.norm_q.weight, rope, self.head_dim)
        k = rotate(self.k(x), self.norm_k.weight, rope, self.head_dim)
        return q, k, self.v(x).unflatten(-1, (-1, self.head_dim))


TokenAttention = Callable[[SelfAttention, LinearInput, Rope, Ops], Tensor]
"""(the layer, x [S, C], rope, ops) -> [S, H, D]: the layer's attention up to its last projection.

It is given what the projections start from, so that it may send some of them while it computes the others.
"""


def local_attention(kernel: Attention) -> TokenAttention:
    """Attention between the tokens that are here."""

    def attend(layer: SelfAttention, x: LinearInput, rope: Rope, ops: Ops) -> Tensor:
        if not isinstance(kernel, CodesAttention):
            return kernel(*layer.queries_keys_values(x, rope, ops.rotate))
        q, k, v = layer.queries_keys_values(x, rope, ops.rotate_codes)
        return kernel(q, k, ops.quantise_heads(v))

    return attend
