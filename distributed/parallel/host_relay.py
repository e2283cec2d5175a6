"""Memory of one rank that the other ranks of its machine write to through the host's memory.

For GPUs without peer access, as most cards for desktops are. Shapes: P = ranks, n = bytes.
What is written to another rank is copied into memory of the host that both processes have mapped, and from there by
the receiver. Copy engines do both, beside whatever the GPUs compute; NCCL's own way through the host is a kernel, which
waits until an attention kernel leaves it a multiprocessor. A counter in that memory for each pair of ranks says how
much has arrived: one GPU's stream writes it, the other's waits for it, and no processor takes part.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..machine.memory_file import MemoryFile
from .sequence import gather_rows

COUNTERS = 4096
"""Bytes in front of what arrives: a counter of each sender, int32."""
POLL = 5e-5
"""Seconds between two looks at a counter where no GPU waits for it."""


class HostRelay:
    """`peer_memory.PeerMemory` of ranks on one machine, with GPUs or without. Collective to make.

    Raises:
        OSError: the system keeps one process from another's memory.
        RuntimeError: CUDA cannot lock the memory.
    """

    direct = False

    def __init__(self, group: dist.ProcessGroup, nbytes: int, device: torch.device) -> None:
        self._rank, world = group.rank(), group.size()
        self._own_file = MemoryFile("wan-relay")
        os.truncate(self._own_file.path, nbytes + COUNTERS)
        place = torch.tensor([os.getpid(), int(self._own_file.path.name)], device=device)
        self._maps = [
            _map(f"/proc/{pid}/fd/{descriptor}", nbytes + COUNTERS) for pid, descriptor in gather_rows(place, group)
        ]
        host = [torch.frombuffer(mapped, dtype=torch.uint8) for mapped in self._maps]
        self._counters = [memory[:COUNTERS].view(torch.int32) for memory in host]
        self._host = [memory[COUNTERS:] for memory in host]
        self.own = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self.buffers = [self.own if rank == self._rank else memory for rank, memory in enumerate(self._host)]
        self._put, self._taken = [0] * world, [0] * world
        self._stream = None
        if device.type == "cuda":
            from .stream_counters import StreamCounters, lock_mapped

            for memory in host:
                lock_mapped(memory)
            self._counting: Any = StreamCounters()
            # Its own, so that what arrives and what leaves are copied at the same time.
            self._stream = torch.cuda.Stream(device, priority=-1)
        else:
            self._counting = ProcessCounters()

    def put(self, rank: int, there: Tensor, here: Tensor) -> None:
        there.copy_(here, non_blocking=True)
        self._put[rank] += 1
        self._counting.write(self._counters[rank][self._rank], self._put[rank])

    def arrival(self, incoming: Sequence[tuple[int, Tensor]]) -> torch.cuda.Event | None:
        if self._stream is None:
            self._take(incoming)
            return None
        with torch.cuda.stream(self._stream):
            self._take(incoming)
            return self._stream.record_event()

    def _take(self, incoming: Sequence[tuple[int, Tensor]]) -> None:
        for rank, here in incoming:
            self._taken[rank] += 1
            self._counting.wait(self._counters[self._rank][rank], self._taken[rank])
            start = here.data_ptr() - self.own.data_ptr()
            arrived = self._host[self._rank][start : start + here.nbytes]
            if here.numel():
                here.view(-1).view(torch.uint8).copy_(arrived, non_blocking=True)

    def close(self) -> None:
        """Gives the host's memory back. Nothing may be under way."""
        if self._stream is not None:
            from .stream_counters import unlock_mapped

            for counters in self._counters:
                unlock_mapped(counters)
        self._own_file.close()


class ProcessCounters:
    """Counters that processes write and wait for."""

    def write(self, counter: Tensor, value: int) -> None:
        """counter: int32, of no dimension, in memory that others have mapped."""
        counter.fill_(value)

    def wait(self, counter: Tensor, value: int) -> None:
        """Until it is at least `value`."""
        while int(counter) < value:
            time.sleep(POLL)


def _map(path: str, nbytes: int) -> mmap.mmap:
    with open(path, "r+b") as file:
        return mmap.mmap(file.fileno(), nbytes)
