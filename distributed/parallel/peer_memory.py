"""Memory of one rank that the other ranks of its group write to: torch's symmetric memory, or through the host's."""

from __future__ import annotations

import logging
import os
import socket
import zlib
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ..machine.host_memory import available_bytes
from .host_relay import HostRelay
from .sequence import gather_rows

log = logging.getLogger(__name__)


class PeerMemory(Protocol):
    """One buffer on each rank of a group, of the same size."""

    buffers: list[Tensor]
    """By rank, uint8 [n], as this rank reaches them; its own among them."""
    direct: bool
    """Kernels may write to the others' buffers, not only `put`."""

    def put(self, rank: int, there: Tensor, here: Tensor) -> None:
        """Copies, on the current stream, to a part of the buffer of another rank; also nothing, if it has no element.

        Both are contiguous.
        """

    def arrival(self, incoming: Sequence[tuple[int, Tensor]]) -> torch.cuda.Event | None:
        """Passes when what all ranks have put before it, or written on the current stream, is in this rank's buffer.

        Collective. None where there are no streams: then it has arrived.

        Args:
            incoming: what was put for this rank since the last one: (the rank that put it, the part of this rank's
                buffer), of each rank in its order.
        """


class SymmetricMemory:
    """torch's, with CUDA's own handles. Collective to make, and so is letting it go: no rank may still write."""

    direct = True

    def __init__(self, group: dist.ProcessGroup, nbytes: int, device: torch.device) -> None:
        import torch.distributed._symmetric_memory as symmetric

        # Nothing here uses multicast, and on a host that others share it must not be set up.
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
        self._own = symmetric.empty(nbytes, dtype=torch.uint8, device=device)
        self._handle = symmetric.rendezvous(self._own, group)
        self.buffers = [self._handle.get_buffer(rank, (nbytes,), torch.uint8) for rank in range(group.size())]

    def put(self, rank: int, there: Tensor, here: Tensor) -> None:
        there.copy_(here)

    def arrival(self, incoming: Sequence[tuple[int, Tensor]]) -> torch.cuda.Event:
        self._handle.barrier()
        return torch.cuda.current_stream(self._own.device).record_event()


_opened: dict[str, PeerMemory | None] = {}
"""By name of the group. What exchanges over a group takes turns: one buffer serves all of it."""
_reasons: dict[str, list[str]] = {}
"""By name of the group: why it is not the first way, and why not the second."""


def peer_memory(group: dist.ProcessGroup, nbytes: int, device: torch.device) -> PeerMemory | None:
    """At least `nbytes` on each rank of `group`; what was there before may be let go. Collective.

    None where the ranks cannot write to each other's memory, not even through the host's: alike on all of them.
    """
    name = group.group_name
    found = _opened.get(name)
    if name not in _opened or (found is not None and found.buffers[group.rank()].nbytes < nbytes):
        if device.type == "cuda":
            # What is let go may be at work.
            torch.cuda.synchronize(device)
        if isinstance(found, HostRelay):
            dist.barrier(group)
            found.close()
        del found
        _opened.pop(name, None)
        found = _opened[name] = _open(group, nbytes, device)
    return found


def way_of(group: dist.ProcessGroup) -> str:
    """For the status, how `group` exchanges: symmetric, relayed or packed, and why it is not the one before."""
    reasons = _reasons.get(group.group_name, [])
    names = ["symmetric", "relayed through the host's memory", "packed"]
    return names[len(reasons)] + (f" ({'; '.join(reasons)})" if reasons else "")


def _open(group: dist.ProcessGroup, nbytes: int, device: torch.device) -> PeerMemory | None:
    places = _places(group, device)
    rank = group.rank()
    ways: tuple[tuple[str, Callable[..., PeerMemory]], ...] = (
        (obstacle(places, rank), SymmetricMemory),
        (relay_obstacle(places, rank, nbytes), HostRelay),
    )
    reasons = _reasons[group.group_name] = []
    for reason, make in ways:
        memory = None
        # Before any of them begins, or one would wait for another that has given up.
        if _all(group, not reason, device):
            try:
                memory = make(group, nbytes, device)
            except (RuntimeError, OSError, ImportError) as error:
                reason = f"{type(error).__name__}: {error}"
            if _all(group, memory is not None, device):
                assert memory is not None
                return memory
        reasons.append(reason or "another rank cannot")
        log.info("not through memory: %s", reasons[-1])
    return None


def _places(group: dist.ProcessGroup, device: torch.device) -> list[list[int]]:
    """Of each rank a number for its machine, and its GPU's index there; -1 without one. Collective."""
    index = device.index if device.type == "cuda" else -1
    return gather_rows(torch.tensor([zlib.crc32(socket.gethostname().encode()), index], device=device), group)


def obstacle(places: list[list[int]], rank: int) -> str:
    """What keeps `rank` from writing to the others' memory; empty: nothing that is known.

    Args:
        places: see `_places`.
    """
    machine, index = places[rank]
    if any(gpu < 0 for _, gpu in places):
        return "no GPU"
    if any(other != machine for other, _ in places):
        return "the ranks are on several machines"
    if os.environ.get("NCCL_P2P_DISABLE", "0") not in ("", "0"):
        return "NCCL_P2P_DISABLE is set"
    far = [gpu for _, gpu in places if gpu != index and not torch.cuda.can_device_access_peer(index, gpu)]
    return f"GPU {index} has no peer access to {', '.join(map(str, far))}" if far else ""


def relay_obstacle(places: list[list[int]], rank: int, nbytes: int) -> str:
    """What keeps `rank` from sending through the host's memory; empty: nothing that is known.

    Args:
        nbytes: of each rank's part of that memory.
    """
    if any(machine != places[rank][0] for machine, _ in places):
        return "the ranks are on several machines"
    needed, available = nbytes * len(places), available_bytes()
    if available is not None and available < needed:
        return f"{needed / 2**30:.1f} GiB of the host's memory are not free"
    return ""


def _all(group: dist.ProcessGroup, value: bool, device: torch.device) -> bool:
    """Whether `value` is true on all ranks."""
    flag = torch.tensor([int(value)], device=device)
    dist.all_reduce(flag, dist.ReduceOp.MIN, group=group)
    return bool(flag.item())
