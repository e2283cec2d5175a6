"""Memory that gloo ranks reach as GPUs with peer access reach each other's: files that all of them map."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from wan_pack.distributed.parallel import opened_memory
from wan_pack.distributed.parallel.peer_memory import PeerMemory


class FileMemory(PeerMemory):
    """Instead of `SymmetricMemory`."""

    folder: Path

    def __init__(self, group: dist.ProcessGroup, own: torch.Tensor, host: Any) -> None:
        super().__init__(group, own, host)
        self._group = group

    def join(self) -> None:
        group, nbytes = self._group, self.own.nbytes
        files = [self.folder / f"{group.group_name}-{nbytes}-{rank}" for rank in range(group.size())]
        files[group.rank()].write_bytes(bytes(nbytes))
        dist.barrier(group)
        self.buffers = [torch.from_file(str(file), shared=True, size=nbytes, dtype=torch.uint8) for file in files]
        self.own = self.buffers[group.rank()]


def reach_as_gpus(folder: Path) -> None:
    """From here on, in this process, ranks without a GPU reach each other's memory as GPUs with peer access do."""
    FileMemory.folder = folder
    opened_memory.SymmetricMemory = FileMemory  # type: ignore[assignment,misc]
    opened_memory.obstacle = lambda places, rank: ""
