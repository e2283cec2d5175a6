"""Memory of one rank that the other ranks of its group write to: each other's GPUs', or through the host's.

Shapes: n = bytes.
What is written is copied by the copy engines, beside whatever the GPUs compute. NCCL's exchange is a kernel, which
waits until an attention kernel leaves it a multiprocessor.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .host_memory_map import HostMemoryMap
from .shared_counters import COUNTERS, SharedCounters


class PeerMemory:
    """One buffer on each rank of a group, of the same size.

    Args:
        group: the ranks.
        own: this rank's, of `allocated`, uint8 [n].
        host: `host_bytes` of each of them, which goes with this.
    """

    buffers: list[Tensor]
    """By rank, as this rank reaches them."""

    def __init__(self, group: dist.ProcessGroup, own: Tensor, host: HostMemoryMap) -> None:
        self.own, self._host, device = own, host, own.device
        self._counters = SharedCounters(group.rank(), [memory[:COUNTERS] for memory in host.of], device)
        # Its own, so that what arrives and what leaves are copied at the same time.
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None

    @staticmethod
    def allocated(nbytes: int, device: torch.device) -> Tensor:
        """This rank's buffer, by itself: that one rank has no room is known before the others wait for it."""
        return torch.empty(nbytes, dtype=torch.uint8, device=device)

    def join(self) -> None:
        """Finds the others' buffers. Collective."""

    @staticmethod
    def host_bytes(nbytes: int) -> int:
        """What it takes of the host's memory, for each rank."""
        return COUNTERS

    def put(self, rank: int, there: Tensor, here: Tensor) -> None:
        """Copies, on the current stream, to a part of the buffer of another rank; also nothing, if it has no element.

        Both are contiguous.
        """
        there.copy_(here, non_blocking=True)
        self._counters.signal(rank)

    def arrival(self, incoming: Sequence[tuple[int, Tensor]]) -> torch.cuda.Event | None:
        """Passes when what others have put is in this rank's buffer. None where there are no streams: then it is.

        Args:
            incoming: the next of it: (the rank that puts it, the part of `own`), of each rank in its order.
        """
        if self._stream is None:
            self._take(incoming)
            return None
        with torch.cuda.stream(self._stream):
            self._take(incoming)
            return self._stream.record_event()

    def _take(self, incoming: Sequence[tuple[int, Tensor]]) -> None:
        for rank, here in incoming:
            self._counters.wait(rank)
            self.fetch(here)

    def fetch(self, here: Tensor) -> None:
        """Copies a part of `own` that has arrived to its place, on the current stream."""

    def close(self) -> None:
        """Lets it go. Collective; nothing may be under way."""
        self._host.close()


class SymmetricMemory(PeerMemory):
    """For GPUs with peer access: torch's symmetric memory, with CUDA's own handles."""

    def __init__(self, group: dist.ProcessGroup, own: Tensor, host: HostMemoryMap) -> None:
        super().__init__(group, own, host)
        self._group = group

    def join(self) -> None:
        import torch.distributed._symmetric_memory as symmetric

        nbytes, ranks = self.own.nbytes, range(self._group.size())
        self._handle = symmetric.rendezvous(self.own, self._group)
        self.buffers = [self._handle.get_buffer(rank, (nbytes,), torch.uint8) for rank in ranks]

    @staticmethod
    def allocated(nbytes: int, device: torch.device) -> Tensor:
        import torch.distributed._symmetric_memory as symmetric

        # Nothing here uses multicast, and on a host that others share it must not be set up.
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
        return symmetric.empty(nbytes, dtype=torch.uint8, device=device)


class HostRelay(PeerMemory):
    """For GPUs without, as most cards for desktops are, and for processes without a GPU: into the host's memory, which
    the receiver fetches it from."""

    def __init__(self, group: dist.ProcessGroup, own: Tensor, host: HostMemoryMap) -> None:
        super().__init__(group, own, host)
        self.buffers = [memory[COUNTERS:] for memory in host.of]
        self._arrived, self.buffers[group.rank()] = self.buffers[group.rank()], self.own

    @staticmethod
    def host_bytes(nbytes: int) -> int:
        return COUNTERS + nbytes

    def fetch(self, here: Tensor) -> None:
        start = here.data_ptr() - self.own.data_ptr()
        if here.numel():
            here.view(-1).view(torch.uint8).copy_(self._arrived[start : start + here.nbytes], non_blocking=True)
