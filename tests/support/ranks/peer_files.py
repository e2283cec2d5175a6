"""Memory that gloo ranks share, as GPUs share theirs: files that all of them map."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist


class FileMemory:
    """`distributed.parallel.peer_memory.PeerMemory`."""

    def __init__(self, folder: Path, group: dist.ProcessGroup, nbytes: int, device: torch.device) -> None:
        self._group = group
        files = [folder / f"{group.group_name}-{nbytes}-{rank}" for rank in range(group.size())]
        files[group.rank()].write_bytes(bytes(nbytes))
        dist.barrier(group)
        self.buffers = [torch.from_file(str(file), shared=True, size=nbytes, dtype=torch.uint8) for file in files]

    def barrier(self) -> None:
        dist.barrier(self._group)
