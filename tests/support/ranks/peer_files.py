"""Memory that gloo ranks share, as GPUs share theirs: files that all of them map."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist


class FileMemory:
    """`distributed.parallel.peer_memory.PeerMemory`."""

    direct = True

    def __init__(self, folder: Path, group: dist.ProcessGroup, nbytes: int, device: torch.device) -> None:
        self._group = group
        files = [folder / f"{group.group_name}-{nbytes}-{rank}" for rank in range(group.size())]
        files[group.rank()].write_bytes(bytes(nbytes))
        dist.barrier(group)
        self.buffers = [torch.from_file(str(file), shared=True, size=nbytes, dtype=torch.uint8) for file in files]

    def put(self, rank: int, there: torch.Tensor, here: torch.Tensor) -> None:
        there.copy_(here)

    def arrival(self, incoming: Sequence[tuple[int, torch.Tensor]]) -> None:
        dist.barrier(self._group)


def reach_as_gpus(folder: Path) -> None:
    """From here on, in this process, ranks without a GPU reach each other's memory as GPUs with peer access do."""
    from wan_pack.distributed.parallel import peer_memory

    peer_memory.SymmetricMemory = functools.partial(FileMemory, folder)  # type: ignore[assignment,misc]
    peer_memory.obstacle = lambda places, rank: ""
