"""The blocks of the transformer.

Shapes as in transformer.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..model.config import EPS, WanConfig
from ..model.linear import Fp8Tokens, Linear, LinearInput
from ..model.ops import PLAIN, Ops, Rope
from .context import Attended, KeysValues
from .cross_attention import CrossAttention
from .self_attention import SelfAttention

Which = Tensor | None
"""Which of the timesteps each token is at; None: there is one."""


class Stream(NamedTuple):
    """The float32 residual x + gate * y, whose sum is left to the kernel that norms it next."""

    x: Tensor
    """[S, C], float32."""
    added: tuple[Tensor, Tensor] | None = None
    """y, [S, C] in the dtype of the products, and its gate, [1, C] or [S, C]; None: x is all of it."""

    def sum(self, ops: Ops) -> Tensor:
        """[S, C], float32."""
        return self.x if self.added is None else ops.add(self.x, *self.added)


class Block(nn.Module):
    """Self-attention, cross-attention and feed-forward around a float32 residual.

    `attention_inputs`, `summed_inputs`, `SelfAttention.queries_keys_values` and `attention_outputs` hold all the
    arithmetic and no communication: they are what may be compiled. `through` is the glue.
    """

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.empty(1, 6, config.dim))
        self.self_attn = SelfAttention(config)
        self.norm3 = nn.LayerNorm(config.dim, eps=EPS)
        self.cross_attn = CrossAttention(config)
        self.ffn = nn.Sequential(
            Linear(config.dim, config.ffn_dim), nn.GELU(approximate="tanh"), Linear(config.ffn_dim, config.dim)
        )
        self.ffn_chunk: int | None = None
        """Tokens per feed-forward call; None: all at once."""
        self.ops: Ops = PLAIN
        self.always_exact = False
        """Nothing is ever rounded to 8 bits here."""

    def compute_exactly(self, exact: bool) -> None:
        """From now on nothing is rounded to 8 bits on its way through, or may be: no product's input, and nothing in
        self-attention. Weights stay as they are kept."""
        self.self_attn.exact = exact or self.always_exact
        for module in self.modules():
            if isinstance(module, Linear):
                module.exact = exact or self.always_exact

    def attention_inputs(self, x: Tensor, e: Tensor, which: Which) -> LinearInput:
        """x: [S, C] and e: [n, 6, C], float32; which: see `WanModel.forward` -> [S, C], what `self_attn` projects."""
        shift, scale, *_ = per_token(self.modulation + e, which)
        return self.ops.norm(x, 1 + scale, shift, self.self_attn.q.input_dtype)

    def summed_inputs(self, x: Tensor, y: Tensor, gate: Tensor, e: Tensor, which: Which) -> tuple[Tensor, LinearInput]:
        """The sum of a `Stream`, and `attention_inputs` of it."""
        shift, scale, *_ = per_token(self.modulation + e, which)
        return self.ops.add_norm(x, y, gate, 1 + scale, shift, self.self_attn.q.input_dtype)

    def attention_outputs(self, x: Tensor, y: Tensor, e: Tensor, which: Which, kv: Sequence[KeysValues]) -> Stream:
        """The rest of the block. y: self-attention's [S, H, D]; kv: what is attended to."""
        _, _, gate, shift, scale, ffn_gate = per_token(self.modulation + e, which)
        attn, cross, norm3, ops = self.self_attn, self.cross_attn, self.norm3, self.ops
        y = attn.o(ops.cast(y.flatten(-2), attn.o.input_dtype))
        x, normed = ops.add_norm(x, y, gate, norm3.weight, norm3.bias, cross.q.input_dtype)
        x, normed = ops.add_norm(x, cross(normed, kv, ops), None, 1 + scale, shift, self._ffn_layers()[0].input_dtype)
        return Stream(x, (self._feed_forward(normed), ffn_gate))

    def _ffn_layers(self) -> tuple[Linear, Linear]:
        up, _, down = self.ffn
        assert isinstance(up, Linear) and isinstance(down, Linear), self.ffn
        return up, down

    def _feed_forward(self, x: LinearInput) -> Tensor:
        up, down = self._ffn_layers()
        if self.ffn_chunk is None:
            return down(self.ops.gelu_linear(up, x, down.input_dtype))
        parts: Sequence[LinearInput]
        if isinstance(x, Fp8Tokens):
            parts = [Fp8Tokens(*part) for part in zip(*(tensor.split(self.ffn_chunk) for tensor in x), strict=True)]
        else:
            parts = x.split(self.ffn_chunk)
        return torch.cat([down(self.ops.gelu_linear(up, part, down.input_dtype)) for part in parts])

    def through(
        self, streams: list[Stream], e: Tensor, which: Which, rope: Rope, attended: Sequence[Attended]
    ) -> Stream:
        """What becomes of the stream that is taken out of `streams`: nothing else may hold its tensors, they are large.

        Args:
            attended: the text and the picture, as the model embeds them.
        """
        x, added = streams.pop()
        if added is None:
            inputs = self.attention_inputs(x, e, which)
        else:
            x, inputs = self.summed_inputs(x, *added, e, which)
        del added
        y = self.self_attn.attend(inputs, rope, self.ops)
        del inputs
        return self.attention_outputs(x, y, e, which, self.cross_attn.keys_values(attended))


class WanBlock(Block):
    """One of the main ones."""

    def forward(
        self, streams: list[Stream], e: Tensor, which: Which, rope: Rope, attended: Sequence[Attended]
    ) -> Stream:
        return self.through(streams, e, which, rope, attended)


def per_token(e: Tensor, which: Which) -> tuple[Tensor, ...]:
    """[n, k, C] -> k tensors that broadcast over tokens: [1, C], or [S, C] where tokens differ."""
    return e.unbind(1) if which is None else tuple(part[which] for part in e.unbind(1))
