"""Calls of a VAE, seen from ComfyUI: memory, and whom they ask to rest; a function is in the place of a group."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from wan_pack.distributed.job.errors import JobError
from wan_pack.distributed.job.job import FileIdentity, Parallel, VaeJob
from wan_pack.distributed.job.job_folder import JobDir
from wan_pack.distributed.launch import vae_calls
from wan_pack.distributed.launch.pool import Pool
from wan_pack.distributed.launch.vae_calls import VaeCalls
from wan_pack.distributed.machine.memory_file import OpenedMemory

FILE = FileIdentity(path="/models/vae.safetensors", size=1, mtime_ns=1)
JOB = VaeJob(
    id="0f", vae=(FILE,), encode=False, given=(1, 16, 1, 4, 4), made=(1, 3, 1, 32, 32), parallel=Parallel(gpu_count=1)
)


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`rested`: how often others were asked to; `started`: the jobs."""
    rested: list[int] = []
    calls: Any = VaeCalls(Pool(), lambda: rested.append(1), parent=tmp_path, failed=tmp_path)
    calls.rested, calls.started = rested, []

    def run_job(job: VaeJob, write: Any, **how: Any) -> JobDir:
        folder = JobDir.create(tmp_path)
        write(folder.inputs)
        memory = OpenedMemory(Path(folder.read_json(folder.pictures)["memory"]))
        whole = memory.map(job.memory[1].stop)
        memory.close()
        calls.started.append(torch.frombuffer(whole, dtype=torch.uint8)[job.memory[0]].view(torch.float32).clone())
        torch.frombuffer(whole, dtype=torch.uint8)[job.memory[1]].view(torch.float32).fill_(1.5)
        return folder

    monkeypatch.setattr(vae_calls, "run_job", run_job)
    return calls


def test_what_is_at_work_rests_once_for_calls_that_are_together(calls: Any):
    given = torch.randn(JOB.given)
    with calls.together():
        with calls.together():
            assert torch.equal(calls.run(JOB, given), torch.full(JOB.made, 1.5))
        calls.run(JOB, given)
    assert calls.rested == [1]
    with calls.together():
        pass
    assert calls.rested == [1, 1]
    assert all(torch.equal(seen, given.view(-1)) for seen in calls.started)


@pytest.mark.parametrize("more", [-1, 0])
def test_memory_that_is_not_there_is_said_before_anything_starts(
    calls: Any, more: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(vae_calls, "available_bytes", lambda: JOB.memory[1].stop + more)
    with calls.together():
        if more < 0:
            with pytest.raises(JobError, match="decode or encode fewer frames at a time"):
                calls.run(JOB, torch.zeros(JOB.given))
        else:
            calls.run(JOB, torch.zeros(JOB.given))
    assert len(calls.started) == 1 + more
