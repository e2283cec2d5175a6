"""Memory of one rank that the other ranks of its group write to: torch's symmetric memory."""

from __future__ import annotations

import logging
import os
import socket
import zlib
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

log = logging.getLogger(__name__)


class PeerMemory(Protocol):
    """One buffer on each rank of a group, of the same size."""

    buffers: list[Tensor]
    """By rank, uint8 [n], as this rank reaches them; its own among them."""

    def barrier(self) -> None:
        """On the current stream: afterwards every rank sees what all of them had written before it. Collective."""


class SymmetricMemory:
    """torch's, with CUDA's own handles. Collective to make, and so is letting it go: no rank may still write."""

    def __init__(self, group: dist.ProcessGroup, nbytes: int, device: torch.device) -> None:
        import torch.distributed._symmetric_memory as symmetric

        # Nothing here uses multicast, and on a host that others share it must not be set up.
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
        self._own = symmetric.empty(nbytes, dtype=torch.uint8, device=device)
        self._handle = symmetric.rendezvous(self._own, group)
        self.buffers = [self._handle.get_buffer(rank, (nbytes,), torch.uint8) for rank in range(group.size())]

    def barrier(self) -> None:
        self._handle.barrier()


_opened: dict[str, PeerMemory | str] = {}
"""By name of the group, or why there is none. What exchanges over a group takes turns: one buffer serves all of it."""


def peer_memory(group: dist.ProcessGroup, nbytes: int, device: torch.device) -> PeerMemory | None:
    """At least `nbytes` on each rank of `group`; what was there before may be let go. Collective.

    None where the ranks cannot write to each other's memory: alike on all of them.
    """
    found = _opened.get(group.group_name)
    if found is None or (not isinstance(found, str) and found.buffers[0].nbytes < nbytes):
        if device.type == "cuda":
            # What is let go may be at work.
            torch.cuda.synchronize(device)
        del found
        _opened.pop(group.group_name, None)
        found = _opened[group.group_name] = _open(group, nbytes, device)
    return None if isinstance(found, str) else found


def refusal(group: dist.ProcessGroup) -> str:
    """Why `peer_memory` returned None; empty if it has not."""
    found = _opened.get(group.group_name)
    return found if isinstance(found, str) else ""


def _open(group: dist.ProcessGroup, nbytes: int, device: torch.device) -> PeerMemory | str:
    reason = _obstacle(group, device)
    if _all(group, not reason, device):
        memory = None
        try:
            memory = SymmetricMemory(group, nbytes, device)
        except RuntimeError as error:
            reason = f"{type(error).__name__}: {error}"
        if _all(group, memory is not None, device):
            assert memory is not None
            return memory
    reason = reason or "another rank cannot"
    log.warning("the GPUs do not write to each other's memory: %s", reason)
    return reason


def _obstacle(group: dist.ProcessGroup, device: torch.device) -> str:
    """What is known before it is tried to keep this rank from it; empty: nothing. Collective."""
    index = device.index if device.type == "cuda" else -1
    mine = torch.tensor([zlib.crc32(socket.gethostname().encode()), index], device=device)
    everyone = mine.new_empty(2 * group.size())
    dist.all_gather_into_tensor(everyone, mine, group=group)
    return obstacle(everyone.view(-1, 2).tolist(), group.rank())


def obstacle(places: list[list[int]], rank: int) -> str:
    """What keeps `rank` from writing to the others' memory; empty: nothing that is known.

    Args:
        places: of each rank a number for its machine, and its GPU's index there; -1 without one.
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


def _all(group: dist.ProcessGroup, value: bool, device: torch.device) -> bool:
    """Whether `value` is true on all ranks."""
    flag = torch.tensor([int(value)], device=device)
    dist.all_reduce(flag, dist.ReduceOp.MIN, group=group)
    return bool(flag.item())
