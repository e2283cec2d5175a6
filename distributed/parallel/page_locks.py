"""Page-locking of the host's memory, so that copies to and from a GPU run by themselves."""

from __future__ import annotations

import logging
import mmap
from contextlib import suppress

import torch
from torch import Tensor

PORTABLE_AND_MAPPED = 3
"""Every device's streams find it, also what is no copy."""


def take_host(nbytes: int, *, locked: bool) -> Tensor:
    """uint8 [nbytes] of new host memory.

    Args:
        locked: its pages are, for copies to and from a GPU; where they cannot be, copies are slower, not wrong.
    """
    host = torch.empty(nbytes, dtype=torch.uint8)
    if not locked:
        return host
    # Locking has the system find and clear the pages one after the other; touched first, all of torch's threads do.
    host[:: mmap.PAGESIZE].zero_()
    if not lock_pages(host):
        logging.getLogger(__name__).warning("host memory could not be page-locked; copies to the GPU are slower")
    return host


def lock_pages(host: Tensor, *, mapped: bool = False) -> bool:
    """Locks a CPU tensor. Returns whether it could: a container may forbid locked memory.

    Args:
        mapped: streams read and write single words of it.
    """
    locked = int(torch.cuda.cudart().cudaHostRegister(host.data_ptr(), host.nbytes, PORTABLE_AND_MAPPED * mapped)) == 0
    if not locked:
        _forget_error()
    return locked


def unlock_pages(host: Tensor) -> None:
    """Undoes `lock_pages`, before the tensor's memory is freed."""
    if int(torch.cuda.cudart().cudaHostUnregister(host.data_ptr())) != 0:
        # It was never locked.
        _forget_error()


def _forget_error() -> None:
    """CUDA keeps a failed call's error until it is asked for, and torch asks after each of its kernels."""
    with suppress(RuntimeError):
        torch.ones(1, device="cuda")
