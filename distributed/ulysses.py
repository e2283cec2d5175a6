"""Ulysses attention: the two all-to-alls around it (Jacobs et al., 2023, arXiv 2309.14509).

Shapes: P = ranks, S = tokens per rank (padding included), H = heads, h = heads of one rank, D = channels per head.
Before attention a rank holds all heads of its S tokens; inside, all P * S tokens of its h heads. Heads need not divide:
ranks may hold different numbers of them, or none.
Only `all_to_all_single` is used, which every backend has.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ..wan.attention import Attention
from ..wan.linear import LinearInput
from ..wan.model import SelfAttention
from ..wan.ops import HeadPlaces, Ops, Rope
from .sequence import SequenceShard, split_evenly


class Exchange(Protocol):
    """Attention over the tokens of all ranks (`wan.model.TokenAttention`). One serves all blocks, in their order."""

    shard: SequenceShard
    """May be replaced between videos, which have other lengths."""

    def __call__(self, layer: SelfAttention, x: LinearInput, rope: Rope, ops: Ops) -> Tensor:
        """x: this rank's [S, C], which `layer` projects -> [S, H, D]. Collective."""


class PackedUlysses:
    """One all-to-all in for q, k and v together, one out.

    The receive buffer is [P * S, 3, h, D], so q, k and v are strided views of it: attention reads them without a copy.
    """

    def __init__(self, group: dist.ProcessGroup, shard: SequenceShard, attention: Attention) -> None:
        self._group = group
        self.shard = shard
        self._attention = attention
        self._places: tuple[int, list[HeadPlaces]] | None = None

    def __call__(self, layer: SelfAttention, x: LinearInput, rope: Rope, ops: Ops) -> Tensor:
        heads = split_evenly(layer.num_heads, self.shard.world)
        if ops.write_heads is None:
            message = self._pack(*layer.queries_keys_values(x, rope, ops), heads)
        else:
            message = self._write(layer, x, rope, ops, heads)
        q, k, v = self._exchange(message, heads).unbind(1)
        # Keys past the true length are padding.
        y = self._attention(q, k[: self.shard.length], v[: self.shard.length])
        return self._gather_heads(y, heads)

    def _pack(self, q: Tensor, k: Tensor, v: Tensor, heads: list[int]) -> Tensor:
        """q, k, v: [S, H, D] -> the message [S * 3 * H, D]: per rank its [S, 3, h, D]."""
        tokens, _, channels = q.shape
        send = q.new_empty(tokens * 3 * sum(heads), channels)
        first = 0
        for chunk, h in zip(send.split([tokens * 3 * h for h in heads]), heads, strict=True):
            packed = chunk.view(tokens, 3, h, channels)
            for i, x in enumerate((q, k, v)):
                packed[:, i].copy_(x[:, first : first + h])
            first += h
        return send

    def _write(self, layer: SelfAttention, x: LinearInput, rope: Rope, ops: Ops, heads: list[int]) -> Tensor:
        """The message of `_pack`, into which each projection is written as it is rotated."""
        q, k, v = layer.q(x), layer.k(x), layer.v(x)
        channels, tokens = layer.head_dim, q.shape[0]
        if self._places is None or self._places[0] != tokens:
            # All layers have the same heads.
            self._places = tokens, [_message_places(heads, which, tokens, channels, q.device) for which in range(3)]
        send = q.new_empty(tokens * 3 * layer.num_heads, channels)
        sources = (q, layer.norm_q.weight, rope), (k, layer.norm_k.weight, rope), (v, None, None)
        for source, places in zip(sources, self._places[1], strict=True):
            ops.write_heads(*source, channels, send, places)
        return send

    def _exchange(self, message: Tensor, heads: list[int]) -> Tensor:
        """[S * 3 * H, D] -> [P * S, 3, h, D]."""
        tokens, channels = self.shard.size, message.shape[1]
        mine = heads[self.shard.rank]
        send_sizes = [tokens * 3 * h * channels for h in heads]
        received = message.new_empty(tokens * self.shard.world, 3, mine, channels)
        share = [tokens * 3 * mine * channels] * self.shard.world
        dist.all_to_all_single(received.view(-1), message.view(-1), share, send_sizes, group=self._group)
        return received

    def _gather_heads(self, y: Tensor, heads: list[int]) -> Tensor:
        """y: [P * S, h, D] -> [S, H, D]."""
        tokens, channels = self.shard.size, y.shape[-1]
        receive_sizes = [tokens * h * channels for h in heads]
        received = y.new_empty(sum(receive_sizes))
        share = [tokens * heads[self.shard.rank] * channels] * self.shard.world
        dist.all_to_all_single(received, y.contiguous().view(-1), receive_sizes, share, group=self._group)
        parts = [part.view(tokens, h, channels) for part, h in zip(received.split(receive_sizes), heads, strict=True)]
        return torch.cat(parts, dim=1)


def _message_places(heads: list[int], which: int, tokens: int, channels: int, device: torch.device) -> HeadPlaces:
    """Where the message of `PackedUlysses._pack` has the heads of q, k or v (`which` of 0, 1, 2)."""
    # Before a rank's [S, 3, h, D] lie the 3 * S rows of every head of the ranks before it.
    first = [(3 * tokens * sum(heads[:r]) + which * h + i) * channels for r, h in enumerate(heads) for i in range(h)]
    step = [3 * h * channels for h in heads for _ in range(h)]
    return HeadPlaces(torch.tensor([first, step], device=device))


class DeepSpeedUlysses:
    """DeepSpeed's DistributedAttention: four all-to-alls; heads must divide by the number of ranks."""

    def __init__(self, group: dist.ProcessGroup, shard: SequenceShard, attention: Attention) -> None:
        import deepspeed
        from deepspeed.sequence.layer import DistributedAttention

        # DeepSpeed wraps the process group that is already there.
        deepspeed.init_distributed(dist_backend=dist.get_backend(group), verbose=False)

        self.shard = shard

        def between_exchanges(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            """[1, P * S, h, D] three times -> [1, P * S, h, D]."""
            return attention(q[0], k[0, : self.shard.length], v[0, : self.shard.length])[None]

        self._attention = DistributedAttention(between_exchanges, group, scatter_idx=2, gather_idx=1)

    def __call__(self, layer: SelfAttention, x: LinearInput, rope: Rope, ops: Ops) -> Tensor:
        q, k, v = layer.queries_keys_values(x, rope, ops)
        return self._attention(q[None], k[None], v[None], batch_dim_idx=0)[0]
