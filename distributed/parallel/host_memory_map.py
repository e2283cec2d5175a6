"""Memory of the host that all ranks of a machine have mapped."""

from __future__ import annotations

import mmap
import os
from contextlib import closing
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from ..machine.memory_file import MemoryFile, OpenedMemory
from .page_locks import lock_pages, unlock_pages
from .sequence import gather_rows


class HostMemoryMap:
    """`nbytes` for each rank of a group on one machine, page-locked for GPUs.

    Raises:
        OSError: there is no more memory, or no descriptor.
    """

    of: list[Tensor]
    """By rank, uint8 [nbytes]; once it has joined."""

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._file = MemoryFile("wan-exchange")
        self._locked: list[Tensor] = []
        try:
            os.truncate(self._file.path, nbytes)
        except OSError:
            self._file.close()
            raise

    def join(self, group: dist.ProcessGroup, device: torch.device) -> None:
        """Finds the others'. Collective.

        Raises:
            OSError: the system keeps one process from another's memory.
            RuntimeError: CUDA cannot lock it.
        """
        nbytes, place = self._nbytes, torch.tensor([os.getpid(), int(self._file.path.name)], device=device)
        found = [Path(f"/proc/{pid}/fd/{descriptor}") for pid, descriptor in gather_rows(place, group)]
        self.of = [torch.frombuffer(_mapped(path, nbytes), dtype=torch.uint8) for path in found]
        for memory in self.of if device.type == "cuda" else []:
            if not lock_pages(memory, mapped=True):
                self.close()
                raise RuntimeError(f"CUDA cannot lock {nbytes / 2**20:.0f} MiB of the host's memory")
            self._locked.append(memory)

    def close(self) -> None:
        """Gives it back. Nothing may be under way."""
        for memory in self._locked:
            unlock_pages(memory)
        self._locked.clear()
        self._file.close()


def _mapped(path: Path, nbytes: int) -> mmap.mmap:
    with closing(OpenedMemory(path)) as memory:
        return memory.map(nbytes)
