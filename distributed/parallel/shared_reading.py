"""Weights that every rank holds whole: each is read by one of them, and sent to the others over the GPUs' links."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ...wan.checkpoint.checkpoint import Checkpoint
from ...wan.checkpoint.weights import owners, read_weights
from ..job.job import Parallel
from .mesh import Mesh


@dataclass(frozen=True, slots=True)
class SharedReading:
    """Who reads an expert's files."""

    group: dist.ProcessGroup | None
    """The ranks that share the work; None: this one reads all that it holds."""

    @classmethod
    def of(cls, parallel: Parallel, mesh: Mesh | None, device: torch.device) -> SharedReading:
        """For ranks that hold the same on GPUs of one machine that reach each other's memory.

        To others a file in the system's memory is as near as a peer's copy.
        """
        apart = parallel.use_fsdp or parallel.stream_blocks or parallel.hosts
        if mesh is None or apart or not _reach_each_other(device, parallel.gpu_count):
            return cls(None)
        return cls(mesh.group)

    def read(self, model: nn.Module, checkpoint: Checkpoint, names: Sequence[str] | None = None, **how: Any) -> None:
        """This rank's part, by `read_weights`; not collective, on any thread."""
        part, parts = (0, 1) if self.group is None else (self.group.rank(), self.group.size())
        read_weights(model, checkpoint, names, part=part, parts=parts, **how)

    def send(
        self, model: nn.Module, names: Sequence[str] | None = None, *, on_send: Callable[[], None] = lambda: None
    ) -> None:
        """Afterwards all ranks have what each has read. Collective, with the same `names`.

        Args:
            on_send: called first, where anything is sent.
        """
        if self.group is None:
            return
        on_send()
        parameters, pending = dict(model.named_parameters()), []
        for name, owner in owners(model, names, self.group.size()).items():
            # As bytes: not every backend knows every dtype.
            data = parameters[name].data.view(-1).view(torch.uint8)
            pending.append(dist.broadcast(data, group=self.group, group_src=owner, async_op=True))
        for work in pending:
            work.wait()


ALONE = SharedReading(None)


def _reach_each_other(device: torch.device, world: int) -> bool:
    """Whether the first `world` GPUs of this process can write into each other's memory; CPU processes do."""
    if device.type != "cuda":
        return True
    if os.environ.get("NCCL_P2P_DISABLE", "0") not in ("", "0"):
        return False
    return all(torch.cuda.can_device_access_peer(a, b) for a, b in permutations(range(world), 2))
