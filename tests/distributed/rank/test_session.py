"""What a rank keeps between jobs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from jobs import stub_job
from wan_pack.distributed.rank import session


def test_groups_stay_but_let_each_other_have_their_memory(monkeypatch: pytest.MonkeyPatch):
    """Guidance to and fro: what one group exchanges through is not kept from the other."""
    freed: list[Any] = []
    monkeypatch.setattr(session, "let_go", lambda group, device: freed.append(group))
    made: dict[int, Any] = {}

    class FakeMesh:
        def __init__(self, cfg: int) -> None:
            self.cfg_size, self.ulysses_group = cfg, f"groups of {cfg}"

        def laid_out(self, cfg: int, timeout: Any) -> FakeMesh:
            assert cfg not in made, "making groups is collective"
            made[cfg] = FakeMesh(cfg)
            return made[cfg]

    rank = session.Session.__new__(session.Session)
    rank.device, rank._joined, rank._meshes = torch.device("cpu"), True, {}
    first: Any = FakeMesh(1)
    rank.mesh = first
    rank._remember_mesh()
    for cfg, at_last in ((1, []), (2, [1]), (2, [1]), (1, [1, 2]), (2, [1, 2, 1])):
        rank.begin(stub_job(gpu_count=2, cfg_parallel=cfg == 2), None)  # type: ignore[arg-type]
        assert rank.mesh is (made[2] if cfg == 2 else first)
        assert freed == [f"groups of {size}" for size in at_last]
