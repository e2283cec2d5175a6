"""Attention of a video's tokens to what they are made from.

Shapes as in transformer.py.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..model.attention import attention
from ..model.config import WanConfig
from ..model.linear import Linear, LinearInput
from ..model.ops import Ops, rms_norm
from .self_attention import RMSNorm

KeysValues = tuple[Tensor, Tensor]


class CrossAttention(nn.Module):
    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.q = Linear(config.dim, config.dim)
        self.k = Linear(config.dim, config.dim)
        self.v = Linear(config.dim, config.dim)
        self.o = Linear(config.dim, config.dim)
        self.norm_q = RMSNorm(config.dim)
        self.norm_k = RMSNorm(config.dim)

    def keys_values(self, context: Tensor) -> KeysValues:
        """context: [R, C] -> k, v: [R, H, D]."""
        v = self.v(context).unflatten(-1, (-1, self.head_dim))
        k = rms_norm(self.k(context), self.norm_k.weight).unflatten(-1, (-1, self.head_dim))
        return k, v

    def forward(self, x: LinearInput, k: Tensor, v: Tensor, ops: Ops) -> Tensor:
        """x: [S, C] -> [S, C]. All 512 text tokens are attended, padding included, as the model was trained."""
        q = ops.rms_norm(self.q(x), self.norm_q.weight).unflatten(-1, (-1, self.head_dim))
        return self.o(ops.cast(attention(q, k, v).flatten(-2), self.o.input_dtype))
