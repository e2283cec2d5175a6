"""Ranks in groups, on a process group that only pretends."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed import fake_pg
from wan_pack.distributed.parallel.mesh import Mesh


@pytest.fixture(params=[2, 4])
def world(request: pytest.FixtureRequest) -> Iterator[int]:
    assert fake_pg, "its import registers the backend"
    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=request.param)
    yield request.param
    dist.destroy_process_group()


def test_halves_of_one_rank_each_talk_in_the_group_of_all(world: int):
    """Another group of the same ranks would have connections of its own to make; larger halves need it."""
    for mesh in (Mesh.of("cpu", world).laid_out(2), Mesh.of("cpu", world, cfg=2)):
        assert (mesh.cfg_group is mesh.group) is (world == 2)
        assert mesh.cfg_group is not None
        assert dist.get_process_group_ranks(mesh.cfg_group) == [0, world // 2]
        assert dist.get_process_group_ranks(mesh.ulysses_group) == list(range(world // 2))
        assert (mesh.cfg_size, mesh.cfg_rank, mesh.ulysses_size, mesh.ulysses_rank) == (2, 0, world // 2, 0)
