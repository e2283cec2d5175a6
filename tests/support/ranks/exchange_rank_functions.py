"""What tests of exchanges run on every rank (`ranks.run_ranks`)."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from layers import WRITING, Projected, random_layer
from peer_files import FileMemory, reach_as_gpus
from wan_pack.distributed.parallel import host_memory_map, opened_memory, peer_memory, symmetric
from wan_pack.distributed.parallel.parallelize import ENGINES
from wan_pack.distributed.parallel.peer_memory import HostRelay
from wan_pack.distributed.parallel.sequence import SequenceShard
from wan_pack.wan.model.attention import attention
from wan_pack.wan.model.ops import PLAIN
from wan_pack.wan.model.rope import rope_table


def attention_equals_plain(
    rank: int, world: int, *, engine: str, sizes: list[int], heads: list[int], lengths: list[int]
) -> None:
    """Sequence-parallel attention == attention in one process, for every group size, head count and length."""
    for size in sizes:
        group = dist.new_group(list(range(size)))
        if rank >= size:
            continue
        for h in heads:
            for length in lengths:
                generator = torch.Generator().manual_seed(h * 1000 + length)
                q, k, v = torch.randn(3, length, h, 4, generator=generator).unbind(0)
                shard = SequenceShard(length=length, rank=rank, world=size)
                local = [shard.split(x.flatten(1)).unflatten(1, (h, 4)) for x in (q, k, v)]
                y = ENGINES[engine](group, shard, attention)(Projected(*local), local[0], (), PLAIN)
                assert y.shape == (shard.size, h, 4)
                whole = shard.gather(y.flatten(1), group).unflatten(1, (h, 4))
                message = f"{engine}: {size} ranks, {h} heads, {length} tokens"
                torch.testing.assert_close(whole, attention(q, k, v), msg=lambda m, s=message: f"{s}: {m}")


def written_message_equals_packing(
    rank: int, world: int, *, sizes: list[int], heads: list[int], lengths: list[int]
) -> None:
    """A message into which heads are written one by one == one that is packed from tensors, in every bit."""
    for size in sizes:
        group = dist.new_group(list(range(size)))
        if rank >= size:
            continue
        for h in heads:
            engine = ENGINES["packed"](group, SequenceShard(length=1, rank=rank, world=size), attention)
            layer = random_layer(heads=h, channels=4)
            for length in lengths:
                engine.shard = shard = SequenceShard(length=length, rank=rank, world=size)
                x = shard.split(torch.randn(length, h * 4, generator=torch.Generator().manual_seed(length)))
                rope = rope_table((1, 1, length), 4, start=shard.start, stop=shard.stop)
                packed, written = (engine(layer, x, rope, ops) for ops in (PLAIN, WRITING))
                assert torch.equal(written, packed), f"{size} ranks, {h} heads, {length} tokens"


def hidden_exchange_equals_packed(
    rank: int, world: int, *, folder: str, sizes: list[int], heads: list[int], lengths: list[int]
) -> dict[str, int]:
    """In every bit, from tensors and from a kernel, in every number of parts, one video after another.

    Args:
        folder: for memory that ranks reach as GPUs with peer access do; empty: they relay.
    Returns:
        what was compared.
    """
    if folder:
        reach_as_gpus(Path(folder))
    compared = 0
    for size in sizes:
        group = dist.new_group(list(range(size)))
        if rank >= size:
            continue
        for h in heads:
            shard = SequenceShard(length=1, rank=rank, world=size)
            packed = ENGINES["packed"](group, shard, attention)
            hidden = ENGINES["symmetric"](group, shard, attention)
            layers = random_layer(heads=h, channels=8), random_layer(heads=h, channels=8, seed=1)
            for length, layer, ops in product(lengths, layers, (PLAIN, WRITING)):
                packed.shard = hidden.shard = shard = SequenceShard(length=length, rank=rank, world=size)
                x = shard.split(torch.randn(length, h * 8, generator=torch.Generator().manual_seed(length)))
                rope = rope_table((1, 1, length), 8, start=shard.start, stop=shard.stop)
                out = hidden(layer, x, rope, ops)
                # Nothing of it may be taken for the next. Before the other one, which no rank leaves before all enter.
                memory = memory_of(group)
                assert isinstance(memory, FileMemory if folder else HostRelay)
                memory.buffers[rank].fill_(255)
                expected = packed(layer, x, rope, ops)
                assert torch.equal(out, expected), f"{size} ranks, {h} heads, {length} tokens"
                compared += 1
    return {"compared": compared}


def memory_of(group: dist.ProcessGroup) -> Any:
    """What its last video went through."""
    (layout,) = symmetric._layouts[group.group_name].by_dtypes.values()
    assert layout is not None
    return layout._memory


def one_that_cannot_share_memory_keeps_nobody_waiting(rank: int, world: int) -> None:
    """All exchange as packed then, and say why; for a shorter video they try again, with what they can have."""

    def fails(error: Exception) -> Any:
        def step(*_: Any) -> Any:
            raise error

        return step

    def broken(owner: Any, name: str, error: Exception) -> tuple[Any, str, Any, str]:
        """On one rank, one step of making the memory."""
        replaced = fails(error) if rank == 1 else getattr(owner, name)
        return owner, name, replaced, f"{type(error).__name__}: {error}"

    steps = (
        broken(HostRelay, "allocated", torch.OutOfMemoryError("no room")),
        broken(host_memory_map, "MemoryFile", OSError("too many files")),
        broken(host_memory_map, "_mapped", OSError("not permitted")),
        broken(peer_memory, "SharedCounters", ImportError("no bindings")),
        broken(HostRelay, "join", RuntimeError("no way")),
    )
    layer = random_layer(heads=4, channels=8)
    for owner, name, replaced, why in steps:
        group = dist.new_group(list(range(world)))
        packed, hidden = (
            ENGINES[engine](group, SequenceShard(length=1, rank=rank, world=world), attention)
            for engine in ("packed", "symmetric")
        )
        whole = owner.__dict__.get(name, getattr(owner, name))
        setattr(owner, name, staticmethod(replaced) if name == "allocated" else replaced)
        for length, found in (
            (16, f"packed (no GPU; {why if rank == 1 else 'another rank cannot'})"),
            (16, ""),
            (8, ""),
        ):
            packed.shard = hidden.shard = shard = SequenceShard(length=length, rank=rank, world=world)
            x = shard.split(torch.randn(length, 32, generator=torch.Generator().manual_seed(1)))
            rope = rope_table((1, 1, length), 8, start=shard.start, stop=shard.stop)
            assert torch.equal(hidden(layer, x, rope, PLAIN), packed(layer, x, rope, PLAIN))
            if found:
                assert opened_memory.way_of(group) == found
            elif length == 16:
                # What could not be had is not asked for a second time.
                setattr(owner, name, whole)
                assert group.group_name not in opened_memory._opened
            else:
                assert opened_memory.way_of(group) == "relayed through the host's memory (no GPU)"


def models_take_turns(rank: int, world: int) -> None:
    """Each has an exchange of its own; one that needs more memory lets the other's go, which must not be used again."""
    group = dist.new_group(list(range(world)))
    engines = [
        ENGINES["symmetric"](group, SequenceShard(length=1, rank=rank, world=world), attention) for _ in range(2)
    ]
    packed = ENGINES["packed"](group, SequenceShard(length=1, rank=rank, world=world), attention)
    layer = random_layer(heads=6, channels=8)
    used = []
    for which, length in ((0, 16), (1, 400), (0, 16), (0, 900), (1, 400)):
        shard = SequenceShard(length=length, rank=rank, world=world)
        engines[which].shard = packed.shard = shard
        x = shard.split(torch.randn(length, 48, generator=torch.Generator().manual_seed(length)))
        rope = rope_table((1, 1, length), 8, start=shard.start, stop=shard.stop)
        assert torch.equal(engines[which](layer, x, rope, PLAIN), packed(layer, x, rope, PLAIN)), (which, length)
        used.append(memory_of(group))
        assert used[-1] is opened_memory._opened[group.group_name]
    # The larger one serves the smaller videos too.
    assert [memory is used[1] for memory in used] == [False, True, True, False, False]
    assert used[3] is used[4] and used[0]._host._file._descriptor == -1
    symmetric.let_go(group, torch.device("cpu"))
    assert used[4]._host._file._descriptor == -1 and group.group_name not in symmetric._layouts
    assert torch.equal(engines[1](layer, x, rope, PLAIN), packed(layer, x, rope, PLAIN))
    assert opened_memory._opened[group.group_name] is not used[4]
