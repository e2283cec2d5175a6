"""Ulysses attention whose exchange is hidden: every rank writes into the others' memory while it computes.

Shapes: as in ulysses.py. v and q are on their way while k is projected. A rank's heads are attended in parts, and what
one part results in is sent while the next one is attended. What is sent beside other work is copied by the copy
engines, which take no multiprocessor from it: NCCL takes some, and so gains nothing by running beside products.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..wan.attention import Attention
from ..wan.linear import LinearInput
from ..wan.model import SelfAttention
from ..wan.ops import HeadPlaces, Ops, Rope
from .peer_memory import PeerMemory, peer_memory
from .sequence import SequenceShard, split_evenly
from .ulysses import PackedUlysses

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


@dataclass(frozen=True, slots=True)
class _Sent:
    """One of q, k and v on its way into the ranks' memories. The heads of a rank are one run or more."""

    written: list[Tensor]
    """Where this rank writes each run of heads, [S, w, D]: the runs of rank 0, those of rank 1, ..."""
    copies: list[Copies]
    """Then, for each run of a rank's heads."""
    received: list[Tensor]
    """Each run of this rank's heads, [P * S, w, D]."""
    places: HeadPlaces
    """`written`, from the start of `_Layout.base`."""


class _Layout:
    """The memories of the ranks: q, k and v of their heads, then what attention returns for their tokens."""

    def __init__(
        self, memory: PeerMemory, shard: SequenceShard, heads: list[int], channels: int, dtype: torch.dtype,
        *, first: int, last: int, direct: frozenset[str],
    ) -> None:  # fmt: skip
        self.shard, self._memory = shard, memory
        self._channels = channels
        self._buffers = [
            buffer[: buffer.nbytes // dtype.itemsize * dtype.itemsize].view(dtype) for buffer in memory.buffers
        ]
        self._parts = [parts_of(h, first, last) for h in heads]
        device = self._buffers[0].device
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
        whole = [[h] for h in heads]
        # The keys of the first part are waited for alone.
        keys = [[parts[0], h - parts[0]] for parts, h in zip(self._parts, heads, strict=True)] if first else whole
        size = shard.world * shard.size * max(heads) * channels
        self.q, self.k, self.v = (
            self._sent(index * size, runs, staged=name not in direct)
            for index, (name, runs) in enumerate(zip("qkv", (whole, keys, whole), strict=True))
        )
        self._returned = 3 * size

    @property
    def base(self) -> Tensor:
        """This rank's memory."""
        return self._buffers[self.shard.rank]

    @property
    def parts(self) -> list[int]:
        """Of this rank's heads."""
        return self._parts[self.shard.rank]

    @staticmethod
    def elements(shard: SequenceShard, heads: list[int], channels: int) -> int:
        """What each rank's memory must hold."""
        return shard.size * channels * (3 * shard.world * max(heads) + sum(heads))

    def keys(self) -> list[Tensor]:
        """k for each of `parts`."""
        first, middle, last = self.parts
        if len(self.k.received) == 1:
            return list(self.k.received[0].split([first, middle, last], dim=1))
        return [self.k.received[0], *self.k.received[1].split([middle, last], dim=1)]

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
        if arrival is not None:
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

    def _view(self, rank: int, start: int, *shape: int) -> Tensor:
        size = torch.Size(shape)
        return self._buffers[rank][start : start + size.numel()].view(size)

    def _piece(self, at: int, of: int, part: int) -> Tensor:
        """In the memory of rank `at`: its tokens in a part of rank `of`'s heads, [S, w, D]."""
        before = sum(map(sum, self._parts[:of])) + sum(self._parts[of][:part])
        row = self.shard.size * self._channels
        return self._view(at, self._returned + before * row, self.shard.size, self._parts[of][part], self._channels)

    def _sent(self, start: int, runs: list[list[int]], *, staged: bool) -> _Sent:
        """The tensor that begins at `start` of every memory; `runs` of the heads of every rank."""
        mine, tokens, world = self.shard.rank, self.shard.size, self.shard.world
        copies: list[dict[int, tuple[Tensor, Tensor]]] = [{} for _ in runs[0]]
        written, received = [], []
        for rank, widths in enumerate(runs):
            offset = start
            for run, width in enumerate(widths):
                everyones = self._view(rank, offset, world * tokens, width, self._channels)
                offset += everyones.numel()
                place = everyones.chunk(world)[mine]
                if rank == mine:
                    received.append(everyones)
                elif staged:
                    there, place = place, torch.empty_like(place)
                    copies[run][rank] = there, place
                written.append(place)
        order = [[by_rank[rank] for rank in self._others() if rank in by_rank] for by_rank in copies]
        return _Sent(written, order, received, _places(written, self.base))


def _places(runs: list[Tensor], base: Tensor) -> HeadPlaces:
    """Of every head of `runs`, each [S, w, D]. They may lie in other memory than `base`, also in another rank's."""
    table = [
        ((run.data_ptr() - base.data_ptr()) // base.itemsize + head * run.shape[2], run.stride(0))
        for run in runs
        for head in range(run.shape[1])
    ]
    return HeadPlaces(torch.tensor(table, dtype=torch.int64, device=base.device).t().contiguous())


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
        self._how = {"first": first, "last": last, "direct": frozenset(direct)}
        self._layout: _Layout | None = None
        self._able = True

    def __call__(self, layer: SelfAttention, x: LinearInput, rope: Rope, ops: Ops) -> Tensor:
        if self._able and (self._layout is None or self._layout.shard != self.shard):
            self._layout = None
            self._layout = self._lay_out(layer)
            self._able = self._layout is not None
        if self._layout is None:
            return super().__call__(layer, x, rope, ops)
        self._send(self._layout, layer, x, rope, ops)
        return self._attend(self._layout)

    def _lay_out(self, layer: SelfAttention) -> _Layout | None:
        heads = split_evenly(layer.num_heads, self.shard.world)
        dtype, device = layer.q.compute_dtype, layer.norm_q.weight.device
        elements = _Layout.elements(self.shard, heads, layer.head_dim)
        memory = peer_memory(self._group, elements * dtype.itemsize, device)
        return None if memory is None else _Layout(memory, self.shard, heads, layer.head_dim, dtype, **self._how)

    def _send(self, layout: _Layout, layer: SelfAttention, x: LinearInput, rope: Rope, ops: Ops) -> None:
        ready = None if ops.write_heads else layer.queries_keys_values(x, rope, ops)
        steps = (
            (layout.v, lambda: (layer.v(x), None, None)),
            (layout.q, lambda: (layer.q(x), layer.norm_q.weight, rope)),
            (layout.k, lambda: (layer.k(x), layer.norm_k.weight, rope)),
        )
        for index, (sent, project) in zip((2, 0, 1), steps, strict=True):
            if ready is None:
                ops.write_heads(*project(), layer.head_dim, layout.base, sent.places)
            else:
                _copy(
                    list(zip(sent.written, ready[index].split([r.shape[1] for r in sent.written], dim=1), strict=True))
                )
            with layout.beside():
                _copy(sent.copies[0])

    def _attend(self, layout: _Layout) -> Tensor:
        """-> [S, H, D]."""
        length, arrivals = self.shard.length, [layout.arrival()]
        for copies in layout.k.copies[1:]:
            with layout.beside():
                _copy(copies)
            arrivals.append(layout.arrival())
        results = []
        qkv = (
            layout.q.received[0].split(layout.parts, dim=1),
            layout.keys(),
            layout.v.received[0].split(layout.parts, dim=1),
        )
        for part, (q, k, v) in enumerate(zip(*qkv, strict=True)):
            layout.wait(arrivals[min(part, len(arrivals) - 1)])
            # Keys past the true length are padding.
            results.append(self._attention(q, k[:length], v[:length]).contiguous())
            with layout.beside():
                _copy(layout.outgoing(part, results[-1]))
        layout.wait(layout.arrival())
        return layout.incoming(results)


def _copy(copies: Copies) -> None:
    for there, here in copies:
        there.copy_(here)
