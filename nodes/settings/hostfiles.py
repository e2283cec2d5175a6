"""Hostfiles of the config node: a workflow picks one that is there, and never names a machine itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...distributed.hosts.hostfile import host_warnings, over_hosts, read_hostfile
from ...distributed.job.errors import counted, listed
from ...distributed.job.job import Parallel
from ...distributed.machine.gpus import split_gpu_ids
from ...wan.files.headers import brief
from ..host import host
from ..host.status import Status

if TYPE_CHECKING:
    from .spread import DistributedConfig

THIS_MACHINE = "this machine"


def hostfile_names() -> list[str]:
    """Of the files in ComfyUI's folder for them."""
    try:
        folder = host.hostfiles_folder()
    except ImportError:
        # Outside of ComfyUI.
        return []
    return sorted(path.name for path in folder.glob("*") if path.is_file()) if folder.is_dir() else []


def parallel_over(chosen: DistributedConfig, base: Parallel, *, guided: bool, status: Status) -> Parallel:
    """The layout over the machines of the config's hostfile.

    Args:
        base: the config's switches.
        guided: whether every step has an unconditional pass.
    Raises:
        ValueError: there is no such hostfile, or it asks for what cannot be.
    """
    # By membership, not by path: the name comes from a workflow.
    if chosen.hostfile not in hostfile_names():
        raise ValueError(
            f"hostfile is {brief(chosen.hostfile)}; the files in {host.hostfiles_folder()} are: "
            f"{listed(hostfile_names()) or 'none'}"
        )
    hosts = read_hostfile(host.hostfiles_folder() / chosen.hostfile)
    ids = tuple(split_gpu_ids(chosen.gpu_ids))
    if ids and len(ids) != hosts.slots:
        raise ValueError(
            f"gpu_ids is {brief(chosen.gpu_ids)}; with this hostfile it must name {hosts.slots} GPUs of every machine"
        )
    if base.keep_warm_seconds:
        status.warn("keep_warm_seconds has no effect over several machines: their processes end with the video")
    cfg = {"on": True, "off": False}.get(chosen.cfg_parallel)
    parallel = over_hosts(base, hosts, gpu_ids=ids, cfg_parallel=cfg, guided=guided)
    status.note(
        f"runs on {counted(len(hosts.names), 'machine')} with {counted(hosts.slots, 'process', 'processes')} each: "
        f"{', '.join(hosts.names)}"
    )
    status.warn(*host_warnings(parallel))
    return parallel
