"""Every golden case on one rank, in this process: what is wrong is seen without starting one."""

from __future__ import annotations

from pathlib import Path

import pytest
from golden import LIMIT, GoldenRun, Layout, Ranks, cases
from mount import GOLDEN
from wan_pack.distributed.parallel import opened_memory

CASES = {case.name: (case, run) for case, run in cases(GOLDEN)}


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_official_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    for replaced in ("SymmetricMemory", "obstacle"):
        monkeypatch.setattr(opened_memory, replaced, getattr(opened_memory, replaced))
    layout = Layout("packed")
    rank = GoldenRun(Ranks(rank=0, world=1, store=tmp_path / "store", layouts=((layout,),)))
    rank.use(layout)
    case, run = CASES[name]
    assert run(rank, case) <= LIMIT
