"""Where in the memories of all ranks the exchange of attention lies (symmetric.py), and in which parts it goes.

Shapes: as in ulysses.py.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ...wan.model.ops import HeadPlaces
from .peer_memory import PeerMemory
from .sequence import SequenceShard
from .ulysses import Destination

FIRST, MOST, LAST = 2, 6, 2
"""Heads of the first part, which is waited for; of a middle one, each up to twice the one before, so that it arrives by
the end of that one's attention; of the last, whose result nothing hides. FlashAttention-3's tiles of two heads of
32,760 or 75,600 tokens are whole rounds of 132 multiprocessors: the parts take no longer than all heads at once."""

ALIGNMENT = 256
"""Bytes, of where what arrives begins: kernels read 16 at a time."""

Copies = list[tuple[int, Tensor, Tensor]]
"""(rank, to, from), all contiguous."""


def parts_of(heads: int, most: int) -> list[int]:
    """Sizes of the parts in which a rank's `heads` are exchanged, as many as the rank with `most` heads needs."""
    sizes: list[int] = []
    while (left := most - sum(sizes)) > 0:
        size = min(2 * sizes[-1] if sizes else FIRST, MOST, left)
        sizes.append(size - LAST if size == left > LAST + 1 else size)
    ends = list(accumulate(sizes))
    # A rank with fewer heads than another has them in the first parts.
    return [min(heads, end) - min(heads, end - size) for size, end in zip(sizes, ends, strict=True)]


@dataclass(slots=True)
class Sent(Destination):
    """One of q, k and v on its way into the ranks' memories: `runs` are the parts of each rank's heads."""

    copies: list[Copies]
    """What follows when `runs` are written, part by part."""
    received: list[Tensor]
    """Each part of this rank's heads, [P * S, w, D]."""


class MemoryLayout:
    """The memories of the ranks: what attention returns for their tokens, then q, k and v of their heads.

    Layouts that differ in the dtypes of q and k only can take turns in one memory: what is returned lies at its
    beginning in all of them, and when it is there nobody reads the rest any more.

    Args:
        dtypes: of q, k and v; attention returns that of v.
    """

    def __init__(
        self, memory: PeerMemory, shard: SequenceShard, heads: list[int], channels: int, dtypes: list[torch.dtype]
    ) -> None:  # fmt: skip
        self.shard, self._memory = shard, memory
        self._channels, self._dtype = channels, dtypes[2]
        self._parts = [parts_of(h, max(heads)) for h in heads]
        self.first_head = sum(heads[: shard.rank])
        self._device = memory.own.device
        self._stream = torch.cuda.Stream(self._device, priority=-1) if self._device.type == "cuda" else None
        self.sent, start = [], self.returned_bytes(shard, heads, channels, dtypes)
        for dtype in dtypes:
            self.sent.append(self._sent(start, dtype))
            start += self.bytes_of(shard, heads, channels, dtype)

    @property
    def parts(self) -> range:
        """In which each rank's heads are attended, one after another."""
        return range(len(self._parts[0]))

    @staticmethod
    def bytes_of(shard: SequenceShard, heads: list[int], channels: int, dtype: torch.dtype) -> int:
        """What one of q, k and v takes in a memory."""
        return shard.world * shard.size * max(heads) * channels * dtype.itemsize

    @staticmethod
    def returned_bytes(shard: SequenceShard, heads: list[int], channels: int, dtypes: list[torch.dtype]) -> int:
        """What the results of all heads take in a memory, up to where the widest type may begin."""
        size = shard.size * sum(heads) * channels * dtypes[2].itemsize
        return -(-size // ALIGNMENT) * ALIGNMENT

    @classmethod
    def nbytes(cls, shard: SequenceShard, heads: list[int], channels: int, dtypes: list[torch.dtype]) -> int:
        """What each rank's memory must hold."""
        received = sum(cls.bytes_of(shard, heads, channels, dtype) for dtype in dtypes)
        return received + cls.returned_bytes(shard, heads, channels, dtypes)

    def leaves(self, nbytes: int) -> bool:
        """Whether the memory it is in has room for a layout of so many."""
        return self._memory.own.nbytes >= nbytes

    def received(self, part: int) -> tuple[Tensor, ...]:
        """q, k and v of a part of this rank's heads, [P * S, w, D]."""
        return tuple(sent.received[part] for sent in self.sent)

    def send(self, copies: Copies) -> None:
        """Beside what is to follow, and after what was queued so far."""
        with self._beside():
            for rank, there, here in copies:
                self._memory.put(rank, there, here)

    def arrival(self, *sent: tuple[Sent, int]) -> torch.cuda.Event | None:
        """Passes when what the others sent for this rank has arrived: the next parts of q, k or v."""
        world = self.shard.world
        pieces = [one.received[part].chunk(world) for one, part in sent]
        return self._memory.arrival([(rank, chunks[rank]) for chunks in pieces for rank in self._others()])

    def wait(self, arrival: torch.cuda.Event | None) -> None:
        if arrival is not None:
            torch.cuda.current_stream(self._device).wait_event(arrival)

    def outgoing(self, part: int, y: Tensor) -> Copies:
        """y: what attention returns for a part of this rank's heads, [P * S, w, D]."""
        mine = self.shard.rank
        return [(rank, self._piece(rank, mine, part), y.chunk(self.shard.world)[rank]) for rank in self._others()]

    def wait_for_returned(self) -> None:
        """What follows begins when the others' results are here, and this rank's have left."""
        mine = self.shard.rank
        self.wait(
            self._memory.arrival(
                [(rank, self._piece(mine, rank, part)) for rank in self._others() for part in self.parts]
            )
        )
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def joined(self, results: list[Tensor]) -> Tensor:
        """results: this rank's own, [P * S, w, D] for each part -> [S, H, D], of all ranks' heads."""
        mine = self.shard.rank
        pieces = [
            results[part].chunk(self.shard.world)[mine] if rank == mine else self._piece(mine, rank, part)
            for rank, parts in enumerate(self._parts)
            for part in range(len(parts))
        ]
        return torch.cat(pieces, dim=1)

    def _beside(self) -> AbstractContextManager[object]:
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        return torch.cuda.stream(self._stream)

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
        start = before * self.shard.size * self._channels * self._dtype.itemsize
        return self._view(at, start, self._dtype, self.shard.size, self._parts[of][part], self._channels)

    def _sent(self, start: int, dtype: torch.dtype) -> Sent:
        """The tensor that begins at byte `start` of every memory."""
        mine, tokens, world = self.shard.rank, self.shard.size, self.shard.world
        copies: list[dict[int, tuple[int, Tensor, Tensor]]] = [{} for _ in self.parts]
        written, received = [], []
        for rank, parts in enumerate(self._parts):
            offset = start
            for part, width in enumerate(parts):
                everyones = self._view(rank, offset, dtype, world * tokens, width, self._channels)
                offset += everyones.nbytes
                place = everyones.chunk(world)[mine]
                if rank == mine:
                    received.append(everyones)
                else:
                    there, place = place, torch.empty_like(place, device=self._device)
                    copies[part][rank] = rank, there, place
                written.append(place)
        order = [[by_rank[rank] for rank in self._others()] for by_rank in copies]
        base = self._view(mine, start, dtype, world * tokens)
        return Sent(base, written, HeadPlaces.of(written, base), order, received)
