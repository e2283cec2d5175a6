"""Ulysses attention: the two all-to-alls around it (Jacobs et al., 2023, arXiv 2309.14509).

Shapes: P = ranks, S = tokens per rank (padding included), H = heads, h = heads of one rank, D = channels per head.
Before attention a rank holds all heads of its S tokens; inside, all P * S tokens of its h heads. Heads need not divide:
ranks may hold different numbers of them, or none.
Only `all_to_all_single` is used, which every backend has.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ...wan.model.attention import Attention
from ...wan.model.codes import CodesAttention, HeadCodes
from ...wan.model.eight_bits import E4M3
from ...wan.model.linear import LinearInput
from ...wan.model.ops import HeadPlaces, Ops, Rope
from ...wan.transformer.self_attention import SelfAttention
from .sequence import SequenceShard, split_evenly

Scales = tuple[Tensor, Tensor] | None
"""Of q's and k's codes, [H] each; None where they are no codes."""


class Exchange(ABC):
    """Attention over the tokens of all ranks (`wan.transformer.self_attention.TokenAttention`).

    One serves all blocks, in their order.
    """

    shard: SequenceShard
    """May be replaced between videos, which have other lengths."""

    @abstractmethod
    def __call__(self, layer: SelfAttention, x: LinearInput, rope: Rope, ops: Ops) -> Tensor:
        """x: this rank's [S, C], which `layer` projects -> [S, H, D]. Collective."""


@dataclass(slots=True)
class Destination:
    """Where a rank writes one of q, k and v."""

    base: Tensor
    """The memory that `places` counts in."""
    runs: list[Tensor]
    """Of all H heads in their order, [S, w, D] each; not necessarily in that memory."""
    places: HeadPlaces


def write_projections(
    layer: SelfAttention, x: LinearInput, rope: Rope, ops: Ops, to: Sequence[Destination],
    *, written: Callable[[int], None] = lambda which: None,
) -> Scales:  # fmt: skip
    """Projects x and writes v, q and k, in this order, each once where `ops` can.

    Args:
        to: for q, k and v. Where q and k are to be e4m3, they are codes.
        written: called with 0, 1 or 2 when q, k or v is.
    """
    scales: list[Tensor | None] = [None, None, None]
    if ops.write_heads is None:
        if to[0].base.dtype == E4M3:
            (q, scales[0]), (k, scales[1]), v = layer.queries_keys_values(x, rope, ops.rotate_codes)
        else:
            q, k, v = layer.queries_keys_values(x, rope, ops.rotate)
        for which, heads in ((2, v), (0, q), (1, k)):
            widths = [run.shape[1] for run in to[which].runs]
            for into, part in zip(to[which].runs, heads.split(widths, 1), strict=True):
                into.copy_(part)
            written(which)
    else:
        for which, project, weight in (
            (2, layer.v, None),
            (0, layer.q, layer.norm_q.weight),
            (1, layer.k, layer.norm_k.weight),
        ):
            turned = None if weight is None else rope
            there = to[which]
            scales[which] = ops.write_heads(project(x), weight, turned, layer.head_dim, there.base, there.places)
            written(which)
    q_scale, k_scale, _ = scales
    return None if q_scale is None or k_scale is None else (q_scale, k_scale)


class PackedUlysses(Exchange):
    """One all-to-all in for q, k and v together, one out.

    A token's q, k and v lie side by side in the receive buffer, so they are strided views of it: attention reads them
    without a copy.
    """

    def __init__(self, group: dist.ProcessGroup, shard: SequenceShard, attention: Attention) -> None:
        self._group = group
        self.shard = shard
        self._attention = attention
        self._places: tuple[int, list[HeadPlaces]] | None = None

    def __call__(self, layer: SelfAttention, x: LinearInput, rope: Rope, ops: Ops) -> Tensor:
        heads, dtypes = split_evenly(layer.num_heads, self.shard.world), self._dtypes(layer)
        tokens, mine = self.shard.size, heads[self.shard.rank]
        size = tokens * layer.head_dim * sum(dtype.itemsize for dtype in dtypes)
        message = torch.empty(size * sum(heads), dtype=torch.uint8, device=layer.norm_q.weight.device)
        scales = write_projections(layer, x, rope, ops, self._destinations(message, heads, dtypes, layer.head_dim))
        received = message.new_empty(size * mine * self.shard.world)
        share = [size * mine] * self.shard.world
        dist.all_to_all_single(received, message, share, [size * h for h in heads], group=self._group)
        q, k, v = _side_by_side(received, tokens * self.shard.world, mine, dtypes, layer.head_dim)
        first = sum(heads[: self.shard.rank])
        return self._gather_heads(self._attend(q, k, v, scales, slice(first, first + mine), ops), heads)

    def _dtypes(self, layer: SelfAttention) -> list[torch.dtype]:
        """Of q, k and v on their way."""
        full = layer.q.compute_dtype
        return [E4M3, E4M3, full] if isinstance(self._attention, CodesAttention) else [full] * 3

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, scales: Scales, heads: slice, ops: Ops) -> Tensor:
        """q, k, v: [P * S, w, D] of these `heads` of all -> [P * S, w, D]."""
        # Keys past the true length are padding.
        k, v = k[: self.shard.length], v[: self.shard.length]
        if scales is None:
            return self._attention(q, k, v)
        assert isinstance(self._attention, CodesAttention), "codes are made for it alone"
        q_scale, k_scale = (scale[heads] for scale in scales)
        return self._attention(HeadCodes(q, q_scale), HeadCodes(k, k_scale), ops.quantise_heads(v))

    def _destinations(
        self, message: Tensor, heads: list[int], dtypes: list[torch.dtype], channels: int
    ) -> list[Destination]:
        """In the message, uint8: per rank its heads of every token, q, k and v side by side."""
        tokens = self.shard.size
        chunks = message.split([len(message) // sum(heads) * h for h in heads])
        runs = zip(
            *(_side_by_side(c, tokens, h, dtypes, channels) for c, h in zip(chunks, heads, strict=True)), strict=True
        )
        found = [(message.view(dtype), list(views)) for dtype, views in zip(dtypes, runs, strict=True)]
        if self._places is None or self._places[0] != tokens:
            # All layers have the same heads.
            self._places = tokens, [HeadPlaces.of(views, base) for base, views in found]
        return [Destination(*pair, places) for pair, places in zip(found, self._places[1], strict=True)]

    def _gather_heads(self, y: Tensor, heads: list[int]) -> Tensor:
        """y: [P * S, h, D] -> [S, H, D]."""
        tokens, channels = self.shard.size, y.shape[-1]
        receive_sizes = [tokens * h * channels for h in heads]
        received = y.new_empty(sum(receive_sizes))
        share = [tokens * heads[self.shard.rank] * channels] * self.shard.world
        dist.all_to_all_single(received, y.contiguous().view(-1), receive_sizes, share, group=self._group)
        parts = [part.view(tokens, h, channels) for part, h in zip(received.split(receive_sizes), heads, strict=True)]
        return torch.cat(parts, dim=1)


def _side_by_side(memory: Tensor, tokens: int, heads: int, dtypes: list[torch.dtype], channels: int) -> list[Tensor]:
    """Bytes -> a tensor [tokens, heads, channels] for each dtype; those of a token are neighbours."""
    if heads == 0:
        # Nothing of one dtype cannot be viewed as nothing of another.
        return [memory.new_empty(tokens, 0, channels, dtype=dtype) for dtype in dtypes]
    widths = [heads * channels * dtype.itemsize for dtype in dtypes]
    columns = memory.view(tokens, sum(widths)).split(widths, dim=1)
    return [part.view(dtype).view(tokens, heads, channels) for part, dtype in zip(columns, dtypes, strict=True)]


class DeepSpeedUlysses(Exchange):
    """DeepSpeed's DistributedAttention: four all-to-alls; heads must divide by the number of ranks."""

    def __init__(self, group: dist.ProcessGroup, shard: SequenceShard, attention: Attention) -> None:
        import deepspeed
        from deepspeed.sequence.layer import DistributedAttention

        # On a CPU it would compile an operation for its own all-reduce, which nothing here calls, under a lock that
        # outlives a process that is killed meanwhile: the next job would wait for it without end.
        deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
        # DeepSpeed wraps the process group that is already there.
        deepspeed.init_distributed(dist_backend=dist.get_backend(group), verbose=False)

        self.shard = shard

        def between_exchanges(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            """[1, P * S, h, D] three times -> [1, P * S, h, D]."""
            return attention(q[0], k[0, : self.shard.length], v[0, : self.shard.length])[None]

        self._attention = DistributedAttention(between_exchanges, group, scatter_idx=2, gather_idx=1)

    def __call__(self, layer: SelfAttention, x: LinearInput, rope: Rope, ops: Ops) -> Tensor:
        q, k, v = layer.queries_keys_values(x, rope, ops.rotate)
        return self._attention(q[None], k[None], v[None], batch_dim_idx=0)[0]
