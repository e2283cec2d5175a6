"""How much a rank may still take, on its device and of the host."""

from __future__ import annotations

import torch

from ..machine.host_memory import available_bytes

EVER = 1 << 62
"""Where the system does not tell."""


def free_host_bytes(ranks: int) -> int:
    """For each of `ranks` that share the host's memory."""
    available = available_bytes()
    return EVER if available is None else available // ranks


def free_bytes(device: torch.device, ranks: int) -> int:
    """Of the device, with what torch keeps of it for itself."""
    if device.type != "cuda":
        return free_host_bytes(ranks)
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def reachable_bytes(device: torch.device, ranks: int) -> int:
    """As `free_bytes`, but what torch keeps stays with it: it gives that back by itself when it is short of memory."""
    if device.type != "cuda":
        return free_host_bytes(ranks)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept
