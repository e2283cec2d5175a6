"""What ranks write into each other's memory is where it is looked for: all ranks of a group in this process."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from wan_pack.distributed.parallel.memory_layout import FIRST, LAST, MOST, MemoryLayout, parts_of
from wan_pack.distributed.parallel.sequence import SequenceShard, split_evenly

CHANNELS, LENGTH = 4, 10


class Memory:
    """In the place of a PeerMemory; notes who was told of what."""

    def __init__(self, buffers: list[Tensor], rank: int) -> None:
        self.buffers, self.own, self.rank = buffers, buffers[rank], rank
        self.puts: list[int] = []
        self.put_at: set[tuple[int, int, int]] = set()
        """From, to, and where."""
        self.awaited: list[int] = []
        self.awaited_at: set[tuple[int, int, int]] = set()

    def put(self, rank: int, there: Tensor, here: Tensor) -> None:
        assert there.is_contiguous() and here.is_contiguous() and there.shape == here.shape
        there.copy_(here)
        self.puts.append(rank)
        if here.numel():
            self.put_at.add((self.rank, rank, there.data_ptr()))

    def arrival(self, incoming: list[tuple[int, Tensor]]) -> None:
        start = self.own.data_ptr()
        for rank, here in incoming:
            inside = here.numel() == 0 or start <= here.data_ptr() <= start + self.own.nbytes
            assert inside, "in this rank's memory"
            self.awaited.append(rank)
            if here.numel():
                self.awaited_at.add((rank, self.rank, here.data_ptr()))


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("num_heads", [12, 7, 2])
@pytest.mark.parametrize("narrow", [False, True], ids=["one dtype", "codes"])
def test_every_head_of_every_token_arrives_and_comes_back(world: int, num_heads: int, narrow: bool):
    """Heads that do not divide, ranks without any, and lengths with padding; q and k in fewer bytes than v."""
    heads = split_evenly(num_heads, world)
    dtypes = [torch.float8_e4m3fn, torch.float8_e4m3fn, torch.float32] if narrow else [torch.float32] * 3
    shards = [SequenceShard(length=LENGTH, rank=rank, world=world) for rank in range(world)]
    size = MemoryLayout.nbytes(shards[0], heads, CHANNELS, dtypes)
    buffers = [torch.zeros(size, dtype=torch.uint8) for _ in range(world)]
    memories = [Memory(buffers, rank) for rank in range(world)]
    layouts = [
        MemoryLayout(memory, shard, heads, CHANNELS, dtypes)  # type: ignore[arg-type]
        for memory, shard in zip(memories, shards, strict=True)
    ]
    tokens = world * shards[0].size
    whole = [torch.randn(tokens, num_heads, CHANNELS).to(dtype) for dtype in dtypes]
    for layout, shard in zip(layouts, shards, strict=True):
        for sent, values in zip(layout.sent, whole, strict=True):
            mine = values[shard.start : shard.stop]
            for run, part in zip(sent.runs, mine.split([run.shape[1] for run in sent.runs], 1), strict=True):
                run.copy_(part)
        for part in layout.parts:
            for sent in layout.sent:
                layout.send(sent.copies[part])
    results: list[list[Tensor]] = []
    for rank, layout in enumerate(layouts):
        assert layout.first_head == sum(heads[:rank])
        first, made = layout.first_head, []
        for part in layout.parts:
            layout.arrival(*((sent, part) for sent in layout.sent))
            received = layout.received(part)
            width = received[0].shape[1]
            for found, values in zip(received, whole, strict=True):
                assert torch.equal(found.float(), values[:, first : first + width].float())
            made.append((received[2] * 2 + rank).contiguous())
            first += width
        assert first == sum(heads[: rank + 1]), "all of this rank's heads"
        results.append(made)
    for layout, made in zip(layouts, results, strict=True):
        for part, y in zip(layout.parts, made, strict=True):
            layout.send(layout.outgoing(part, y))
    owner = torch.repeat_interleave(torch.arange(world), torch.tensor(heads))
    for layout, shard, made in zip(layouts, shards, results, strict=True):
        layout.wait_for_returned()
        expected = whole[2][shard.start : shard.stop] * 2 + owner[None, :, None]
        assert torch.equal(layout.joined(made), expected)
    # Each waits for what each other one puts, as often, and begins with its successor.
    for memory in memories:
        others = [(memory.rank + step) % world for step in range(1, world)]
        assert memory.puts[: world - 1] == memory.awaited[: world - 1] == others
        assert all(memory.puts.count(rank) == memories[rank].awaited.count(memory.rank) for rank in others)
    # And looks where it was put.
    assert set.union(*(memory.awaited_at for memory in memories)) == set.union(*(memory.put_at for memory in memories))


@pytest.mark.parametrize("most", range(1, 41))
def test_parts_begin_small_and_grow_to_a_bound(most: int):
    sizes = parts_of(most, most)
    assert sum(sizes) == most and all(0 < size <= MOST for size in sizes)
    assert sizes[0] <= FIRST or most == FIRST + 1 or len(sizes) == 1
    for before, size in pairwise(sizes):
        assert size <= 2 * before
    assert len(sizes) < 2 or sizes[-1] <= LAST + 1 or sizes[-1] <= 2 * sizes[-2]
    ends = list(accumulate(sizes))
    for fewer in range(most):
        # Of a rank with fewer heads the last parts are smaller, or empty.
        own: list[Any] = parts_of(fewer, most)
        assert len(own) == len(sizes) and list(accumulate(own)) == [min(fewer, end) for end in ends]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_kernel_may_write_whole_heads_wherever_the_tensor_begins(rank: int):
    """Heads' places are counted from there in whole heads; it begins at multiples of other bytes than a head has."""
    channels, heads, dtypes = 96, [2, 1], [torch.bfloat16, torch.bfloat16, torch.float32]
    shard = SequenceShard(length=2, rank=rank, world=2)
    size = MemoryLayout.nbytes(shard, heads, channels, dtypes)
    buffers = [torch.zeros(size, dtype=torch.uint8) for _ in range(2)]
    layout = MemoryLayout(Memory(buffers, rank), shard, heads, channels, dtypes)  # type: ignore[arg-type]
    own = slice(layout.first_head, layout.first_head + heads[rank])
    for sent in layout.sent:
        begins, apart = sent.places.table[:, own]
        assert not (begins % channels).any() and not (apart % channels).any()
