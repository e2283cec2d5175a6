"""Memory of the host that all ranks of a machine have mapped."""

from __future__ import annotations

import mmap
import os

import torch
import torch.distributed as dist
from torch import Tensor

from ..machine.memory_file import MemoryFile
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
        found = [f"/proc/{pid}/fd/{descriptor}" for pid, descriptor in gather_rows(place, group)]
        self.of = [torch.frombuffer(_map(path, nbytes), dtype=torch.uint8) for path in found]
        """By rank, uint8 [nbytes]."""
        self._locked: list[Tensor] = []
        for memory in self.of if device.type == "cuda" else []:
            # 1 | 2: portable and mapped, so that streams of every device find it.
            code = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), nbytes, 3))
            if code != 0:
                raise RuntimeError(f"CUDA cannot lock {nbytes / 2**20:.0f} MiB of the host's memory (error {code})")
            self._locked.append(memory)

    def close(self) -> None:
        """Gives it back. Nothing may be under way."""
        for memory in self._locked:
            torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())
        self._file.close()


def _map(path: str, nbytes: int) -> mmap.mmap:
    with open(path, "r+b") as file:
        return mmap.mmap(file.fileno(), nbytes)
