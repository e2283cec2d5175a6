"""Ulysses attention whose exchange is hidden: every rank writes into the others' memory while it computes.

Shapes: as in ulysses.py. v and q are on their way while k is projected. A rank's heads are attended in parts, and what
one part results in is sent while the next one is attended. What is sent beside other work is copied by the copy
engines, which take no multiprocessor from it: NCCL takes some, and so gains nothing by running beside products.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from ...wan.model.attention import Attention
from ...wan.model.linear import LinearInput
from ...wan.model.ops import HeadPlaces, Ops, Rope
from ...wan.transformer.self_attention import SelfAttention
from .peer_memory import PeerMemory, peer_memory
from .sequence import SequenceShard, split_evenly
from .ulysses import Destination, PackedUlysses, write_projections

FIRST, LAST = 0, 2
"""Heads of the first part and of the last one: the attention waits for the first one's keys, and nothing hides what the
last one results in. FlashAttention-3's tiles of two heads of 32,760 or 75,600 tokens are whole rounds of 132
multiprocessors, so that the parts together take no longer than all heads at once."""
DIRECT = ("k",)
"""What the rotating kernel writes to the other ranks itself: the last that is projected has nothing to hide behind."""

Copies = list[tuple[Tensor, Tensor]]
"""(to, from), all contiguous."""


def parts_of(heads: int, first: int, last: int) -> list[int]:
    """Sizes of the three parts in which a rank's heads are attended; any may be 0."""
    last = min(last, heads // 2)
    first = min(first, (heads - last) // 2)
    return [first, heads - first - last, last]


@dataclass(slots=True)
class _Sent(Destination):
    """One of q, k and v on its way into the ranks' memories. The heads of a rank are one run or more."""

    copies: list[Copies]
    """What follows when `runs` are written: for each run of a rank's heads."""
    received: list[Tensor]
    """Each run of this rank's heads, [P * S, w, D]."""


class _Layout:
    """The memories of the ranks: q, k and v of their heads, then what attention returns for their tokens.

    Args:
        dtypes: of q, k and v; attention returns that of v.
    """

    def __init__(
        self, memory: PeerMemory, shard: SequenceShard, heads: list[int], channels: int, dtypes: list[torch.dtype],
        *, first: int, last: int, direct: frozenset[str],
    ) -> None:  # fmt: skip
        self.shard, self._memory = shard, memory
        self._channels, self._dtype = channels, dtypes[2]
        self._parts = [parts_of(h, first, last) for h in heads]
        self.first_head = sum(heads[: shard.rank])
        device = memory.buffers[0].device
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
        whole = [[h] for h in heads]
        # The keys of the first part are waited for alone.
        keys = [[parts[0], h - parts[0]] for parts, h in zip(self._parts, heads, strict=True)] if first else whole
        self.sent, start = [], 0
        for name, runs, dtype in zip("qkv", (whole, keys, whole), dtypes, strict=True):
            self.sent.append(self._sent(start, runs, dtype, staged=name not in direct))
            start += self.bytes_of(shard, heads, channels, dtype)
        self._returned = start

    @staticmethod
    def bytes_of(shard: SequenceShard, heads: list[int], channels: int, dtype: torch.dtype) -> int:
        """What one of q, k and v takes in a memory."""
        return shard.world * shard.size * max(heads) * channels * dtype.itemsize

    @classmethod
    def nbytes(cls, shard: SequenceShard, heads: list[int], channels: int, dtypes: list[torch.dtype]) -> int:
        """What each rank's memory must hold."""
        received = sum(cls.bytes_of(shard, heads, channels, dtype) for dtype in dtypes)
        return received + shard.size * sum(heads) * channels * dtypes[2].itemsize

    def received(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """q, k and v of each part of this rank's heads, [P * S, w, D]."""
        parts = self._parts[self.shard.rank]
        q, k, v = (sent.received for sent in self.sent)
        keys = k[0].split(parts, dim=1) if len(k) == 1 else (k[0], *k[1].split(parts[1:], dim=1))
        return list(zip(q[0].split(parts, dim=1), keys, v[0].split(parts, dim=1), strict=True))

    def beside(self) -> AbstractContextManager[object]:
        """Inside, work is queued beside what is to follow, and after what was queued so far."""
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        return torch.cuda.stream(self._stream)

    def arrival(self) -> torch.cuda.Event | None:
        """Passes when what every rank has sent before has arrived. Collective."""
        with self.beside():
            self._memory.barrier()
        return None if self._stream is None else self._stream.record_event()

    def wait(self, arrival: torch.cuda.Event | None) -> None:
        if arrival is not None and self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(arrival)

    def outgoing(self, part: int, y: Tensor) -> Copies:
        """y: what attention returns for a part of this rank's heads, [P * S, w, D]."""
        mine = self.shard.rank
        return [(self._piece(rank, mine, part), y.chunk(self.shard.world)[rank]) for rank in self._others()]

    def incoming(self, results: list[Tensor]) -> Tensor:
        """results: this rank's own, [P * S, w, D] for each part -> [S, H, D], of all ranks' heads."""
        mine = self.shard.rank
        pieces = [
            results[part].chunk(self.shard.world)[mine] if rank == mine else self._piece(mine, rank, part)
            for rank, parts in enumerate(self._parts)
            for part in range(len(parts))
        ]
        return torch.cat(pieces, dim=1)

    def _others(self) -> list[int]:
        """Each rank begins with its successor, so that all links are in use."""
        world = self.shard.world
        return [(self.shard.rank + step) % world for step in range(1, world)]

    def _view(self, rank: int, start: int, dtype: torch.dtype, *shape: int) -> Tensor:
        """In the memory of a rank, from byte `start` on."""
        size = torch.Size(shape)
        return self._memory.buffers[rank][start : start + size.numel() * dtype.itemsize].view(dtype).view(size)

    def _piece(self, at: int, of: int, part: int) -> Tensor:
        """In the memory of rank `at`: its tokens in a part of rank `of`'s heads, [S, w, D]."""
        before = sum(map(sum, self._parts[:of])) + sum(self._parts[of][:part])
        start = self._returned + before * self.shard.size * self._channels * self._dtype.itemsize
        return self._view(at, start, self._dtype, self.shard.size, self._parts[of][part], self._channels)

    def _sent(self, start: int, runs: list[list[int]], dtype: torch.dtype, *, staged: bool) -> _Sent:
        """The tensor that begins at byte `start` of every memory; `runs` of the heads of every rank."""
        mine, tokens, world = self.shard.rank, self.shard.size, self.shard.world
        copies: list[dict[int, tuple[Tensor, Tensor]]] = [{} for _ in runs[0]]
        written, received = [], []
        for rank, widths in enumerate(runs):
            offset = start
            for run, width in enumerate(widths):
                everyones = self._view(rank, offset, dtype, world * tokens, width, self._channels)
                offset += everyones.nbytes
                place = everyones.chunk(world)[mine]
                if rank == mine:
                    received.append(everyones)
                elif staged:
                    there, place = place, torch.empty_like(place)
                    copies[run][rank] = there, place
                written.append(place)
        order = [[by_rank[rank] for rank in self._others() if rank in by_rank] for by_rank in copies]
        base = self._view(mine, start, dtype, world * tokens)
        return _Sent(base, written, HeadPlaces.of(written, base), order, received)


class SymmetricUlysses(PackedUlysses):
    """Where the ranks cannot write to each other's memory it is what it inherits.

    Args:
        first, last: heads of those parts.
        direct: of q, k and v what is written to the other ranks at once, not copied.
    """

    def __init__(
        self, group: dist.ProcessGroup, shard: SequenceShard, attention: Attention,
        *, first: int = FIRST, last: int = LAST, direct: Sequence[str] = DIRECT,
    ) -> None:  # fmt: skip
        super().__init__(group, shard, attention)
        self._make_layout = partial(_Layout, first=first, last=last, direct=frozenset(direct))
        self._layout: _Layout | None = None
        self._able = True

    def __call__(self, layer: SelfAttention, x: LinearInput, rope: Rope, ops: Ops) -> Tensor:
        if self._able and (self._layout is None or self._layout.shard != self.shard):
            self._layout = None
            self._layout = self._lay_out(layer)
            self._able = self._layout is not None
        if self._layout is None:
            return super().__call__(layer, x, rope, ops)
        return self._hidden(self._layout, layer, x, rope, ops)

    def _lay_out(self, layer: SelfAttention) -> _Layout | None:
        heads = split_evenly(layer.num_heads, self.shard.world)
        what = self.shard, heads, layer.head_dim, self._dtypes(layer)
        memory = peer_memory(self._group, _Layout.nbytes(*what), layer.norm_q.weight.device)
        return None if memory is None else self._make_layout(memory, *what)

    def _hidden(self, layout: _Layout, layer: SelfAttention, x: LinearInput, rope: Rope, ops: Ops) -> Tensor:
        def on_their_way(which: int) -> None:
            with layout.beside():
                _copy(layout.sent[which].copies[0])

        scales = write_projections(layer, x, rope, ops, layout.sent, written=on_their_way)
        arrivals = [layout.arrival()]
        for copies in layout.sent[1].copies[1:]:
            with layout.beside():
                _copy(copies)
            arrivals.append(layout.arrival())
        results, first = [], layout.first_head
        for part, (q, k, v) in enumerate(layout.received()):
            layout.wait(arrivals[min(part, len(arrivals) - 1)])
            y = self._attend(q, k, v, scales, slice(first, first + q.shape[1]), ops).contiguous()
            first += q.shape[1]
            with layout.beside():
                _copy(layout.outgoing(part, y))
            results.append(y)
        layout.wait(layout.arrival())
        return layout.incoming(results)


def _copy(copies: Copies) -> None:
    for there, here in copies:
        there.copy_(here)
