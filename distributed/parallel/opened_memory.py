"""Which memory the ranks of a group write to each other through: opened once, kept from job to job."""

from __future__ import annotations

import importlib.util
import logging
import os
import socket
import zlib
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..machine.host_memory import available_bytes
from .host_memory_map import HostMemoryMap
from .peer_memory import HostRelay, PeerMemory, SymmetricMemory
from .sequence import everywhere, gather_rows

log = logging.getLogger(__name__)
T = TypeVar("T")

_opened: dict[str, PeerMemory] = {}
"""By name of the group. What exchanges over a group takes turns: one buffer serves all of it."""
_refused: dict[str, int] = {}
"""By name of the group: bytes that could not be had. For less, it is tried again."""
_reasons: dict[str, list[str]] = {}
"""By name of the group: why it is not the first way, and why not the second."""


def peer_memory(group: dist.ProcessGroup, nbytes: int, device: torch.device) -> PeerMemory | None:
    """At least `nbytes` on each rank of `group`; what was there before may be let go. Collective.

    None where the ranks cannot write to each other's memory, not even through the host's: alike on all of them.
    """
    name = group.group_name
    if name in _refused and nbytes >= _refused[name]:
        return None
    found = _opened.get(name)
    if found is not None and found.own.nbytes >= nbytes:
        return found
    del found
    close_memory(group, device)
    made = _open(group, nbytes, device)
    if made is None:
        _refused[name] = nbytes
    else:
        _opened[name] = made
    return made


def close_memory(group: dist.ProcessGroup, device: torch.device) -> None:
    """Frees the memory of `group`, if there is any. Collective."""
    _refused.pop(group.group_name, None)
    found = _opened.pop(group.group_name, None)
    if found is None:
        return
    if device.type == "cuda":
        # It may be at work.
        torch.cuda.synchronize(device)
    # No rank may still write to another's.
    dist.barrier(group)
    found.close()


def way_of(group: dist.ProcessGroup) -> str:
    """For the status, how `group` exchanges: symmetric, relayed or packed, and why it is not the one before."""
    reasons = _reasons.get(group.group_name, [])
    names = ["symmetric", "relayed through the host's memory", "packed"]
    # Both ways may have failed for one reason.
    return names[len(reasons)] + (f" ({'; '.join(dict.fromkeys(reasons))})" if reasons else "")


def _open(group: dist.ProcessGroup, nbytes: int, device: torch.device) -> PeerMemory | None:
    places = _places(group, device)
    rank, missing = group.rank(), "" if device.type != "cuda" or _bindings_there() else "cuda-bindings is not installed"
    ways: tuple[tuple[str, type[PeerMemory]], ...] = (
        (missing or obstacle(places, rank), SymmetricMemory),
        (missing or relay_obstacle(places, rank, nbytes), HostRelay),
    )
    reasons = _reasons[group.group_name] = []
    for reason, kind in ways:
        # All agree before each step, or one would wait for another that has given up.
        if everywhere(not reason, group, device):
            memory, reason = _made(kind, group, nbytes, device)
            if memory is not None:
                return memory
        reason = reason or "another rank cannot"
        if reason not in reasons:
            log.info("not through memory: %s", reason)
        reasons.append(reason)
    return None


def _made(
    kind: type[PeerMemory], group: dist.ProcessGroup, nbytes: int, device: torch.device
) -> tuple[PeerMemory | None, str]:
    """Or None, on all ranks, and what kept this one from it."""
    own, reason = _tried(partial(kind.allocated, nbytes, device))
    if not everywhere(own is not None, group, device):
        return None, reason
    assert own is not None
    host, reason = _tried(partial(HostMemoryMap, kind.host_bytes(nbytes)))
    if everywhere(host is not None, group, device):
        assert host is not None
        memory, reason = _joined(kind, group, own, host)
        if memory is not None:
            return memory, ""
    if host is not None:
        host.close()
    return None, reason


def _joined(
    kind: type[PeerMemory], group: dist.ProcessGroup, own: Tensor, host: HostMemoryMap
) -> tuple[PeerMemory | None, str]:
    """As `_made`. What each rank does by itself and what all do together are steps of their own."""
    _, reason = _tried(partial(host.join, group, own.device))
    if not everywhere(not reason, group, own.device):
        return None, reason
    memory, reason = _tried(partial(kind, group, own, host))
    if not everywhere(memory is not None, group, own.device):
        return None, reason
    assert memory is not None
    _, reason = _tried(memory.join)
    return (memory if everywhere(not reason, group, own.device) else None), reason


def _bindings_there() -> bool:
    """Whether streams can be told to count (shared_counters.py)."""
    try:
        return importlib.util.find_spec("cuda.bindings") is not None
    except ModuleNotFoundError:
        return False


def _tried(make: Callable[[], T]) -> tuple[T | None, str]:
    """What it makes, or None and why."""
    try:
        return make(), ""
    except (RuntimeError, OSError, ImportError) as error:
        return None, f"{type(error).__name__}: {error}"


def _places(group: dist.ProcessGroup, device: torch.device) -> list[list[int]]:
    """Of each rank a number for its machine, and its GPU's index there; -1 without one. Collective."""
    index = device.index if device.type == "cuda" else -1
    # Containers may have one name; what they do not share is the numbers of processes, by which memory is found.
    machine = f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    return gather_rows(torch.tensor([zlib.crc32(machine.encode()), index], device=device), group)


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
