"""The process group and the device mesh of one job. Nothing else holds groups."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from .loopback import listen

ULYSSES = "ulysses"
"""Mesh axis: ranks that share one sequence, and one copy of the weights under FSDP."""


def init_mesh(
    *, rank: int, world: int, device: torch.device, store_file: Path, master_port: int, timeout: float
) -> DeviceMesh | None:
    """Joins the process group and lays the mesh over it. None for a single rank: there is nobody to talk to.

    Args:
        store_file: rendezvous file in the job folder, used while `master_port` is 0.
        master_port: TCP port on 127.0.0.1 for the rendezvous instead.
        timeout: seconds after which a collective that a peer never joined fails.
    """
    if world == 1:
        return None
    limit = timedelta(seconds=timeout)
    store = (
        _tcp_store(master_port, rank=rank, world=world, timeout=limit)
        if master_port
        else dist.FileStore(str(store_file), world)
    )
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=world,
        timeout=limit,
        device_id=device if device.type == "cuda" else None,
    )
    return init_device_mesh(device.type, (world,), mesh_dim_names=(ULYSSES,))


def _tcp_store(port: int, *, rank: int, world: int, timeout: timedelta) -> dist.TCPStore:
    """torch's TCPStore, listening on 127.0.0.1 only: by itself it listens on every interface."""
    if rank > 0:
        return dist.TCPStore("127.0.0.1", port, world, is_master=False, timeout=timeout)
    listener = listen(port)
    # The store owns the descriptor from here on.
    return dist.TCPStore(
        "127.0.0.1",
        port,
        world,
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
