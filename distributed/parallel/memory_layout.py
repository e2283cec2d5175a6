"""Where in the memories of all ranks the exchange of attention lies (symmetric.py), and in which parts it goes.

Shapes: as in ulysses.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ...wan.model.ops import HeadPlaces
from .peer_memory import PeerMemory
from .sequence import SequenceShard
from .ulysses import Destination

LAST = 2
"""Heads of the last part: nothing hides what it results in."""
RELAY_FIRST, RELAY_MOST = 2, 6
"""Heads of the first part of what is relayed, and of a middle one: up to twice the one before, so that it arrives by
the end of that one's attention."""

Copies = list[tuple[int, Tensor, Tensor]]
"""(rank, to, from), all contiguous."""
Runs = list[list[int]]
"""The parts that each run of heads consists of, in their order."""


def parts_of(heads: int, first: int, last: int) -> list[int]:
    """Sizes of the three parts in which a rank's heads are attended; any may be 0."""
    last = min(last, heads // 2)
    first = min(first, (heads - last) // 2)
    return [first, heads - first - last, last]


def growing_parts(heads: int, most: int) -> list[int]:
    """Sizes of the parts in which `heads` of a rank are relayed, as many as `most` heads of a rank need."""
    sizes: list[int] = []
    while (left := most - sum(sizes)) > 0:
        size = min(2 * sizes[-1] if sizes else RELAY_FIRST, RELAY_MOST, left)
        # A small one at the end: nothing hides its return.
        sizes.append(size - LAST if size == left > LAST + 1 else size)
    ends = list(accumulate(sizes))
    # A rank with fewer heads than another has them in the first parts.
    return [min(heads, end) - min(heads, end - size) for size, end in zip(sizes, ends, strict=True)]


@dataclass(slots=True)
class Sent(Destination):
    """One of q, k and v on its way into the ranks' memories. The heads of a rank are one run or more."""

    copies: list[Copies]
    """What follows when `runs` are written: for each run of a rank's heads."""
    received: list[Tensor]
    """Each run of this rank's heads, [P * S, w, D]."""
    parts: list[Tensor]
    """The same in the parts that are attended."""


class MemoryLayout:
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
        if memory.direct:
            self._parts = [parts_of(h, first, last) for h in heads]
        else:
            self._parts = [growing_parts(h, max(heads)) for h in heads]
        count = len(self._parts[0])
        self.first_head = sum(heads[: shard.rank])
        self._device = memory.buffers[shard.rank].device
        self._stream = torch.cuda.Stream(self._device, priority=-1) if self._device.type == "cuda" else None
        whole, each = [list(range(count))], [[part] for part in range(count)]
        # The keys of the first part are waited for alone; of what is relayed all of the first part is.
        keys = [[0], list(range(1, count))] if first else whole
        runs = (whole, keys, whole) if memory.direct else (each, each, each)
        self.sent, start = [], 0
        for name, of_name, dtype in zip("qkv", runs, dtypes, strict=True):
            self.sent.append(self._sent(start, of_name, dtype, staged=not memory.direct or name not in direct))
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

    def received(self) -> list[tuple[Tensor, ...]]:
        """q, k and v of each part of this rank's heads, [P * S, w, D]."""
        return list(zip(*(sent.parts for sent in self.sent), strict=True))

    def beside(self) -> AbstractContextManager[object]:
        """Inside, work is queued beside what is to follow, and after what was queued so far."""
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        return torch.cuda.stream(self._stream)

    def send(self, copies: Copies) -> None:
        """Beside what is to follow."""
        with self.beside():
            for rank, there, here in copies:
                self._memory.put(rank, there, here)

    def incoming(self, sent: Sent, *runs: int) -> list[tuple[int, Tensor]]:
        """What the others send of one of q, k and v: of these runs, or of all."""
        mine, world = self.shard.rank, self.shard.world
        chosen = [sent.received[run] for run in runs] if runs else sent.received
        return [(rank, run.chunk(world)[rank]) for run in chosen for rank in range(world) if rank != mine]

    def arrival(self, incoming: Sequence[tuple[int, Tensor]]) -> torch.cuda.Event | None:
        """Passes when what every rank has sent before has arrived: `incoming` of it for this one. Collective."""
        with self.beside():
            return self._memory.arrival(incoming)

    def wait(self, arrival: torch.cuda.Event | None) -> None:
        if arrival is not None and self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(arrival)

    def outgoing(self, part: int, y: Tensor) -> Copies:
        """y: what attention returns for a part of this rank's heads, [P * S, w, D]."""
        mine = self.shard.rank
        return [(rank, self._piece(rank, mine, part), y.chunk(self.shard.world)[rank]) for rank in self._others()]

    def returning(self) -> list[tuple[int, Tensor]]:
        """What the others send of their results."""
        mine = self.shard.rank
        return [(rank, self._piece(mine, rank, part)) for rank in self._others() for part in range(len(self._parts[0]))]

    def joined(self, results: list[Tensor]) -> Tensor:
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

    def _sent(self, start: int, runs: Runs, dtype: torch.dtype, *, staged: bool) -> Sent:
        """The tensor that begins at byte `start` of every memory, in `runs` of the heads of every rank."""
        mine, tokens, world = self.shard.rank, self.shard.size, self.shard.world
        copies: list[dict[int, tuple[int, Tensor, Tensor]]] = [{} for _ in runs]
        written, received = [], []
        for rank, parts in enumerate(self._parts):
            offset = start
            for run, members in enumerate(runs):
                everyones = self._view(
                    rank, offset, dtype, world * tokens, sum(parts[p] for p in members), self._channels
                )
                offset += everyones.nbytes
                place = everyones.chunk(world)[mine]
                if rank == mine:
                    received.append(everyones)
                elif staged:
                    there, place = place, torch.empty_like(place, device=self._device)
                    copies[run][rank] = rank, there, place
                written.append(place)
        order = [[by_rank[rank] for rank in self._others() if rank in by_rank] for by_rank in copies]
        sizes = [[self._parts[mine][p] for p in members] for members in runs]
        split = [part for run, widths in zip(received, sizes, strict=True) for part in run.split(widths, dim=1)]
        base = self._view(mine, start, dtype, world * tokens)
        return Sent(base, written, HeadPlaces.of(written, base), order, received, split)
