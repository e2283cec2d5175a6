"""The process group of a job and how its ranks are laid out. Nothing else holds groups."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ..hosts.network import open_store


@dataclass(frozen=True, slots=True)
class Mesh:
    """Ranks in `cfg` groups of `ulysses` ranks; neighbours in a group are neighbours in rank.

    A group shares one sequence (Ulysses). Of two groups, one computes what the prompt asks for and the other what the
    negative prompt does (CFG parallel). All ranks together share one copy of the weights under FSDP. Ranks are numbered
    machine by machine, so that of two machines each is a group, and only CFG's one exchange per step leaves it.
    """

    world: DeviceMesh
    """All ranks, in one dimension."""
    ulysses_group: dist.ProcessGroup
    """This rank's group."""
    cfg_group: dist.ProcessGroup | None
    """The ranks that hold the same tokens for both prompts; None without CFG parallel."""

    @classmethod
    def of(cls, device_type: str, world: int, *, cfg: int = 1, timeout: timedelta | None = None) -> Mesh:
        """Over the default process group, which `world` ranks have joined.

        Args:
            cfg: groups, 1 or a divisor of `world`.
            timeout: of the groups' collectives, which do not take over the default group's; None for
                torch's own.
        """
        assert world % cfg == 0, f"{cfg} groups do not divide {world} ranks"
        line = init_device_mesh(device_type, (world,))
        return cls(line, line.get_group(), None).laid_out(cfg, timeout)

    def laid_out(self, cfg: int, timeout: timedelta | None = None) -> Mesh:
        """The same ranks in `cfg` groups. Collective."""
        if cfg == 1:
            return Mesh(self.world, self.group, None)
        table = torch.arange(self.world.size()).view(cfg, -1)
        ulysses, _ = dist.new_subgroups_by_enumeration(table.tolist(), timeout=timeout)
        across = self.group
        if cfg < self.world.size():
            # Else it would be all of them once more: connections to make while the first step waits.
            across, _ = dist.new_subgroups_by_enumeration(table.T.tolist(), timeout=timeout)
        return Mesh(self.world, ulysses, across)

    @property
    def group(self) -> dist.ProcessGroup:
        """Of all ranks."""
        return self.world.get_group()

    @property
    def ulysses_rank(self) -> int:
        return self.ulysses_group.rank()

    @property
    def ulysses_size(self) -> int:
        return self.ulysses_group.size()

    @property
    def cfg_size(self) -> int:
        """Groups that share a sequence."""
        return 1 if self.cfg_group is None else self.cfg_group.size()

    @property
    def cfg_rank(self) -> int:
        """0 for the prompt, 1 for the negative prompt."""
        return 0 if self.cfg_group is None else self.cfg_group.rank()


def init_mesh(
    *,
    rank: int,
    world: int,
    cfg: int = 1,
    device: torch.device,
    store_file: Path | None,
    master_port: int,
    timeout: float,
    published: Path | None = None,
) -> Mesh | None:
    """Joins the process group and lays the mesh over it. None for a single rank: there is nobody to talk to.

    Args:
        cfg: groups of the mesh, 1 or 2.
        store_file: file for the rendezvous, in memory; not used where rank 0 listens.
        timeout: seconds after which a collective that a peer never joined fails.
        published: the file in which rank 0 says where it listens for the others; None for a rendezvous in memory.
        master_port: TCP port at which it listens; 0 for any free one.
    """
    if world == 1:
        return None
    limit = timedelta(seconds=timeout)
    if published is not None:
        store: dist.Store = open_store(published, listens=rank == 0, world=world, timeout=timeout, port=master_port)
    else:
        assert store_file is not None, "the launcher gives the ranks one"
        store = dist.FileStore(str(store_file), world)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=world,
        timeout=limit,
        device_id=device if device.type == "cuda" else None,
    )
    return Mesh.of(device.type, world, cfg=cfg, timeout=limit)
