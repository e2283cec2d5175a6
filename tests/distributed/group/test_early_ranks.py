"""Ranks do not wait for their agent, and are torchrun's all the same."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from jobs import STUB_WORKER, pack_with, run_stub, stub_job
from wan_pack.distributed.group import worker_group
from wan_pack.distributed.group.early_ranks import EarlyRanks
from wan_pack.distributed.launch.launcher import JobFailed

LATE = """
import os, time
from pathlib import Path
from .real_rendezvous import *

deadline = time.monotonic() + 120
while not list(Path(os.environ["WAN_GROUP_FOLDER"]).parent.glob("wan-job-*/rank1.denoises")):
    assert time.monotonic() < deadline, "no rank came up"
    time.sleep(0.02)
"""
"""In the place of what the agent imports first of torch: it comes when both ranks are at their steps."""


def late_agent(folder: Path, action: str, **fault: object) -> Path:
    pack = pack_with(STUB_WORKER, folder, action=action, **fault)
    rendezvous = pack / "group" / "rendezvous.py"
    rendezvous.rename(rendezvous.with_name("real_rendezvous.py"))
    rendezvous.write_text(LATE)
    return pack


@pytest.mark.processes
def test_ranks_work_before_their_agent_has_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(worker_group, "AGENT", late_agent(tmp_path, "good", seconds=0.3))
    run_stub(tmp_path).remove()
    assert not list((tmp_path / "jobs").iterdir())


@pytest.mark.processes
def test_what_ends_before_its_agent_has_torch_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(worker_group, "AGENT", late_agent(tmp_path, "raise"))
    with pytest.raises(JobFailed, match=r"^rank 1: ValueError: the weights of layer 3 are bad"):
        run_stub(tmp_path, stub_job())


@pytest.mark.processes
def test_torchrun_is_given_what_runs_already(tmp_path: Path):
    """Each rank once, in the environment that torchrun would give it, in a session of its own."""
    code = "import json, os, sys; print(json.dumps([dict(os.environ), os.getsid(0)]), file=open(sys.argv[1], 'x'))"
    script = tmp_path / "rank.py"
    script.write_text(code.replace("sys.argv[1]", "sys.argv[1] + os.environ['RANK']"))
    early = EarlyRanks([str(script), f"{tmp_path}/said-"], 3)
    handler = type("Handler", (), {})
    early.hand_over(handler)
    for rank in (2, 0, 1):
        environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "3"}
        process: subprocess.Popen[bytes] = handler._popen(SimpleNamespace(), (), environment)
        assert process.wait(60) == 0
        seen, session = json.loads((tmp_path / f"said-{rank}").read_text())
        assert {**seen, **environment, "LOCAL_WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1"} == seen
        assert session == process.pid
    with pytest.raises(KeyError):
        handler._popen(SimpleNamespace(), (), environment)
