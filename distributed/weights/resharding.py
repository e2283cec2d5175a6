"""Weights that a group of ranks holds, laid otherwise: from whole on every rank to FSDP's shards, and back.

Everything is on the devices already: a shard is some rows of the whole, and the whole is what all ranks have together.
"""

from __future__ import annotations

import logging
import time

import torch
import torch.distributed as dist
from torch import Tensor

from ...wan.checkpoint.weights import empty_twin, local_rows, take_memory
from ...wan.transformer.transformer import WanModel
from ..job.job import Parallel
from ..parallel.mesh import Mesh
from ..parallel.parallelize import release_gathered, shard_weights
from ..parallel.sequence import everywhere
from .free_memory import free_bytes
from .offload import HostParking

log = logging.getLogger(__name__)


def resharded(
    model: WanModel, mesh: Mesh | None, parallel: Parallel, device: torch.device
) -> tuple[WanModel, HostParking] | None:
    """A model with the same weights, sharded over the mesh or whole on every rank, as `parallel` says, and what holds
    them. Collective.

    How it computes is still to be said (`parallelize.compute_as`). `model` is left without memory: each of its weights
    goes when it has been copied, so that there is never more than the larger of both and one weight.

    Args:
        model: which lies in the other way, on `device`.
    Returns:
        None, with `model` as it was: it cannot be, or a device has no room for it.
    """
    if mesh is None or parallel.stream_blocks:
        return None
    sharded, gather = parallel.sharded, parallel.gather
    # Where shards were there may be holes, of no use to what is larger.
    needed = 0 if sharded else sum(parameter.nbytes for parameter in model.parameters())
    if not everywhere(free_bytes(device, parallel.gpus_per_host) >= needed, mesh.group, device):
        return None
    start = time.perf_counter()
    release_gathered(model)
    moved = empty_twin(model)
    if sharded:
        shard_weights(moved, mesh, gather)
    names = {id(parameter): name for name, parameter in moved.named_parameters()}
    held = dict(model.named_parameters())

    def fill(empty: Tensor, taken: Tensor) -> None:
        source, _ = local_rows(held[names[id(empty)]])
        rows, row = local_rows(taken)
        if sharded:
            rows.copy_(source[row : row + rows.shape[0]])
        else:
            _gather(source, rows, mesh.group)
        # By the stream that has just been told to read it.
        source.untyped_storage().resize_(0)

    take_memory(moved, device, then=fill)
    how = "sharded over the ranks" if sharded else "whole on every rank"
    log.info("weights that lay here are now %s, after %.2f s", how, time.perf_counter() - start)
    return moved, HostParking(moved)


def _gather(mine: Tensor, whole: Tensor, group: dist.ProcessGroup) -> None:
    """mine: this rank's rows, of which the last ranks may have fewer or none -> all of them, in `whole`."""
    # As bytes: not every backend knows every dtype.
    out = whole.view(-1).view(torch.uint8)
    share = -(-whole.shape[0] // group.size()) * (out.numel() // whole.shape[0])
    given = mine.reshape(-1).view(torch.uint8)
    everyones = out if out.numel() == share * group.size() else out.new_empty(share * group.size())
    if given.numel() < share:
        given = torch.cat((given, given.new_zeros(share - given.numel())))
    dist.all_gather_into_tensor(everyones, given, group=group)
    if everyones is not out:
        out.copy_(everyones[: out.numel()])
