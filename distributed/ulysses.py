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
from .sequence import SequenceShard, split_evenly


class PackedUlysses:
    """One all-to-all in for q, k and v together, one out.

    The receive buffer is [P * S, 3, h, D], so q, k and v are strided views of it: attention reads them without a copy.
    """

    def __init__(self, group: dist.ProcessGroup, shard: SequenceShard, attention: Attention) -> None:
        self._group = group
        self.shard = shard
        """May be replaced between videos, which have other lengths."""
        self._attention = attention

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[S, H, D] three times -> [S, H, D]."""
        heads = split_evenly(q.shape[1], self.shard.world)
        q, k, v = self._scatter_heads(q, k, v, heads).unbind(1)
        # Keys past the true length are padding.
        y = self._attention(q, k[: self.shard.length], v[: self.shard.length])
        return self._gather_heads(y, heads)

    def _scatter_heads(self, q: Tensor, k: Tensor, v: Tensor, heads: list[int]) -> Tensor:
        """q, k, v: [S, H, D] -> [P * S, 3, h, D]."""
        tokens, _, channels = q.shape
        mine = heads[self.shard.rank]
        send_sizes = [tokens * 3 * h * channels for h in heads]
        send = q.new_empty(sum(send_sizes))
        first = 0
        for chunk, h in zip(send.split(send_sizes), heads, strict=True):
            packed = chunk.view(tokens, 3, h, channels)
            for i, x in enumerate((q, k, v)):
                packed[:, i].copy_(x[:, first : first + h])
            first += h
        received = q.new_empty(tokens * self.shard.world, 3, mine, channels)
        share = [tokens * 3 * mine * channels] * self.shard.world
        dist.all_to_all_single(received.view(-1), send, share, send_sizes, group=self._group)
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


class DeepSpeedUlysses:
    """DeepSpeed's DistributedAttention: four all-to-alls; heads must divide by the number of ranks."""

    def __init__(self, group: dist.ProcessGroup, shard: SequenceShard, attention: Attention) -> None:
        import deepspeed
        from deepspeed.sequence.layer import DistributedAttention

        # DeepSpeed wraps the process group that is already there.
        deepspeed.init_distributed(dist_backend=dist.get_backend(group), verbose=False)

        self.shard = shard

        def local_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            """[1, P * S, h, D] three times -> [1, P * S, h, D]."""
            return attention(q[0], k[0, : self.shard.length], v[0, : self.shard.length])[None]

        self._attention = DistributedAttention(local_attention, group, scatter_idx=2, gather_idx=1)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[S, H, D] three times -> [S, H, D]."""
        return self._attention(q[None], k[None], v[None], batch_dim_idx=0)[0]


class Engine(Protocol):
    """Makes the attention of one rank out of a kernel's."""

    def __call__(self, group: dist.ProcessGroup, shard: SequenceShard, attention: Attention) -> Attention: ...


ENGINES: dict[str, Engine] = {
    "packed": PackedUlysses,
    "deepspeed": DeepSpeedUlysses,
}
"""The names are those of `Parallel.ulysses_engine`."""
