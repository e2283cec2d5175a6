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
    """`nbytes` for each rank of a group on one machine, page-locked for GPUs. Collective to make.

    Raises:
        OSError: the system keeps one process from another's memory.
        RuntimeError: CUDA cannot lock it.
    """

    def __init__(self, group: dist.ProcessGroup, nbytes: int, device: torch.device) -> None:
        self._file = MemoryFile("wan-exchange")
        os.truncate(self._file.path, nbytes)
        place = torch.tensor([os.getpid(), int(self._file.path.name)], device=device)
        found = [Path(f"/proc/{pid}/fd/{descriptor}") for pid, descriptor in gather_rows(place, group)]
        self.of = [torch.frombuffer(_mapped(path, nbytes), dtype=torch.uint8) for path in found]
        """By rank, uint8 [nbytes]."""
        self._locked: list[Tensor] = []
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
