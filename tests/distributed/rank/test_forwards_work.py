"""What a rank keeps of one evaluation for the next."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from wan_pack.distributed.parallel.sequence import SequenceShard
from wan_pack.distributed.rank.forwards_work import KEPT_GRIDS, ForwardsWork


@pytest.fixture
def work() -> Any:
    """Without a job's folder."""
    work = object.__new__(ForwardsWork)
    work.device, work.job, work.placed = torch.device("cpu"), None, {}
    return work


def test_places_of_the_sizes_that_were_used_last_are_kept(work: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, int, int]] = []

    def shard(job: object, grid: tuple[int, int, int]) -> SequenceShard:
        made.append(grid)
        return SequenceShard(length=grid[0] * grid[1] * grid[2])

    work.session, work.config = SimpleNamespace(shard=shard), SimpleNamespace(head_dim=8)
    grids = [(n, 2, 3) for n in range(1, KEPT_GRIDS + 2)]
    for grid in (*grids[:KEPT_GRIDS], grids[0], grids[-1], grids[0], grids[1]):
        found, (cos, _) = work.places(grid)
        assert found.length == len(cos) == grid[0] * 6
    # Of the four kept the second was used longest ago when the fifth came.
    assert made == [*grids, grids[1]]
    assert len(work.placed) == KEPT_GRIDS
