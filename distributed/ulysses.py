"""Ulysses attention: the two all-to-alls around it (Jacobs et al., 2023, arXiv 2309.14509).

Shapes: P = ranks, S = tokens per rank (padding included), H = heads, h = heads of one rank, D = channels per head.
Before attention a rank holds all heads of its S tokens; inside, all P * S tokens of its h heads. Heads need not divide:
ranks may hold different numbers of them, or none.
Only `all_to_all_single` is used, which every backend has.
"""

from __future__ import annotations

from dataclasses import dataclass
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

    takes_message = True
    """It may be called with what it would send (`wan.ops.message`), which a kernel has written."""

    def __init__(self, group: dist.ProcessGroup, shard: SequenceShard, attention: Attention) -> None:
        self._group = group
        self.shard = shard
        """May be replaced between videos, which have other lengths."""
        self._attention = attention

    def __call__(self, *qkv: Tensor) -> Tensor:
        """q, k, v, [S, H, D] each, or the message [S * 3 * H, D] -> [S, H, D]."""
        if len(qkv) == 1:
            (message,) = qkv
            heads = split_evenly(message.shape[0] // (3 * self.shard.size), self.shard.world)
        else:
            heads = split_evenly(qkv[0].shape[1], self.shard.world)
            message = self._pack(*qkv, heads)
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


@dataclass(slots=True)
class _InFlight:
    """A tensor [P * S, h, D] that is being received, and what keeps it coming."""

    tensor: Tensor
    sent: Tensor
    work: dist.Work

    def wait(self) -> Tensor:
        self.work.wait()
        return self.tensor


class OverlappedUlysses:
    """Five all-to-alls that run beside the arithmetic: v's and q's beside the projections that follow them, that of the
    output's first half of the heads beside the attention of the second."""

    takes_message = False

    def __init__(self, group: dist.ProcessGroup, shard: SequenceShard, attention: Attention) -> None:
        self._group = group
        self.shard = shard
        self._attention = attention

    def send(self, x: Tensor) -> _InFlight:
        """x: one of q, k and v, [S, H, D]; starts its exchange, in the same order on all ranks."""
        heads = split_evenly(x.shape[1], self.shard.world)
        tokens, channels = x.shape[0], x.shape[2]
        sizes = [tokens * h * channels for h in heads]
        message = x.new_empty(x.numel())
        for chunk, part in zip(message.split(sizes), x.split(heads, dim=1), strict=True):
            chunk.view(part.shape).copy_(part)
        mine = heads[self.shard.rank]
        received = x.new_empty(tokens * self.shard.world, mine, channels)
        return self._start(received, message, [tokens * mine * channels] * self.shard.world, sizes)

    def __call__(self, q: Tensor | _InFlight, k: Tensor | _InFlight, v: Tensor | _InFlight) -> Tensor:
        """[S, H, D] three times, or what `send` returned for them -> [S, H, D]."""
        v, q, k = (x if isinstance(x, _InFlight) else self.send(x) for x in (v, q, k))
        total = q.sent.numel() // (self.shard.size * q.tensor.shape[2])
        heads = split_evenly(total, self.shard.world)
        q, k, v = q.wait(), k.wait()[: self.shard.length], v.wait()[: self.shard.length]
        tokens, channels, mine = self.shard.size, q.shape[2], heads[self.shard.rank]
        # Of each rank's heads; one of none is still an exchange, as ranks may differ.
        halves = [[-(-h // 2) for h in heads], [h // 2 for h in heads]]
        flying, first = [], 0
        for half in halves:
            own = slice(first, first + half[self.shard.rank])
            first = own.stop
            y = self._attention(q[:, own], k[:, own], v[:, own]).contiguous()
            sizes = [tokens * h * channels for h in half]
            share = [y.numel() // self.shard.world] * self.shard.world
            flying.append(self._start(y.new_empty(sum(sizes)), y.view(-1), sizes, share))
        assert first == mine, (first, mine)
        parts = [
            [
                part.view(tokens, h, channels)
                for part, h in zip(sent.wait().split([tokens * h * channels for h in half]), half, strict=True)
            ]
            for sent, half in zip(flying, halves, strict=True)
        ]
        return torch.cat([part for pair in zip(*parts, strict=True) for part in pair], dim=1)

    def _start(self, received: Tensor, message: Tensor, receive: list[int], send: list[int]) -> _InFlight:
        work = dist.all_to_all_single(received.view(-1), message, receive, send, group=self._group, async_op=True)
        return _InFlight(received, message, work)


class DeepSpeedUlysses:
    """DeepSpeed's DistributedAttention: four all-to-alls; heads must divide by the number of ranks."""

    takes_message = False

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

    takes_message: bool

    def __call__(self, group: dist.ProcessGroup, shard: SequenceShard, attention: Attention) -> Attention: ...


ENGINES: dict[str, Engine] = {
    "packed": PackedUlysses,
    "packed-overlap": OverlappedUlysses,
    "deepspeed": DeepSpeedUlysses,
}
"""The names are those of `Parallel.ulysses_engine`."""
