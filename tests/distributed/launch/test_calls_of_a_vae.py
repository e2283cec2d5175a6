"""Calls of a VAE, seen from ComfyUI: memory, and whom they ask to rest; a function is in the place of a group."""

from __future__ import annotations

import dataclasses
import mmap
import threading
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
from wan_pack.distributed.machine.memory_file import MemoryFile, OpenedMemory

FILE = FileIdentity(path="/models/vae.safetensors", size=1, mtime_ns=1)
JOB = VaeJob(
    id="0f", vae=(FILE,), encode=False, given=(1, 16, 1, 4, 4), made=(1, 3, 1, 32, 32), parallel=Parallel(gpu_count=1)
)


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`rested`: how often others were asked to; `started`: the jobs; `there()`: others can still open its memory."""
    rested: list[int] = []
    calls: Any = VaeCalls(Pool(), lambda: rested.append(1), parent=tmp_path, failed=tmp_path)
    calls.rested, calls.started, made = rested, [], list[MemoryFile]()

    def memory_file(name: str) -> MemoryFile:
        made.append(MemoryFile(name))
        return made[-1]

    def there() -> bool:
        return any(memory._descriptor >= 0 for memory in made)

    calls.there = there
    monkeypatch.setattr(vae_calls, "MemoryFile", memory_file)

    def run_job(job: VaeJob, write: Any, **how: Any) -> JobDir:
        folder = JobDir.create(tmp_path)
        write(folder.inputs)
        memory = OpenedMemory(Path(folder.read_json(folder.pictures)["memory"]))
        whole = memory.map(job.memory[1].stop)
        memory.close()
        given = torch.frombuffer(whole, dtype=torch.uint8)[job.memory[0]].view(getattr(torch, job.given_dtype))
        calls.started.append(given.clone())
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
            monkeypatch.setattr(vae_calls, "available_bytes", lambda: 3 << 30)
            large = dataclasses.replace(JOB, made=(1, 3, 100, 2048, 2048))
            with pytest.raises(JobError, match=r"take 4\.7 GiB of memory, where 3\.0 GiB are available; decode"):
                calls.run(large, torch.zeros(JOB.given))
        else:
            calls.run(JOB, torch.zeros(JOB.given))
    assert len(calls.started) == 1 + more


def test_frames_are_given_as_the_vae_of_a_gpu_takes_them(calls: Any):
    """Which halves what is copied. Sizes that do not fill whole words are apart all the same."""
    frames = torch.randn(1, 3, 1, 5, 7)
    for layout, dtype in (
        ({"gpu_ids": ("0",)}, torch.bfloat16), ({}, torch.float32),
        ({"gpu_ids": ("0",), "mixed_precision": "fp32"}, torch.float32),
    ):  # fmt: skip
        parallel = Parallel(gpu_count=1, **layout)
        job = dataclasses.replace(JOB, encode=True, given=(1, 3, 1, 5, 7), made=(1, 16, 1, 4, 4), parallel=parallel)
        with calls.together():
            assert torch.equal(calls.run(job, frames), torch.full(job.made, 1.5))
        assert torch.equal(calls.started[-1], frames.view(-1).to(dtype))
        decode = dataclasses.replace(JOB, parallel=parallel)
        assert decode.given_dtype == "float32", "latents are small"


def test_memory_for_what_is_made_is_found_meanwhile(calls: Any, monkeypatch: pytest.MonkeyPatch):
    found: list[tuple[int, slice]] = []

    class Stub(vae_calls.Populating):
        def __init__(self, memory: mmap.mmap, part: slice) -> None:
            found.append((len(memory), part))
            super().__init__(memory, part)

    monkeypatch.setattr(vae_calls, "Populating", Stub)
    with calls.together():
        calls.run(JOB, torch.zeros(JOB.given))
    assert found == [(JOB.memory[1].stop, JOB.memory[1])]
    assert "wan-memory" not in [thread.name for thread in threading.enumerate()]
    assert not calls.there(), "what was made is the caller's alone"


def test_after_a_failure_its_memory_is_nobodys(calls: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fails(job: VaeJob, write: Any, **how: Any) -> JobDir:
        folder = JobDir.create(tmp_path)
        write(folder.inputs)
        assert calls.there()
        folder.remove()
        raise JobError("rank 0 was killed")

    monkeypatch.setattr(vae_calls, "run_job", fails)
    with calls.together(), pytest.raises(JobError, match="rank 0"):
        calls.run(JOB, torch.zeros(JOB.given))
    assert not calls.there()


def test_a_call_is_a_job_of_the_group_that_is_held(calls: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With what its caller gave for all of them; its folder goes, and what it tells stays."""
    seen: list[dict[str, Any]] = []
    run = vae_calls.run_job
    monkeypatch.setattr(vae_calls, "run_job", lambda job, write, **how: (seen.append(how), run(job, write))[1])
    calls._failed, told = tmp_path / "failed", {"_on_progress": print, "_on_log_line": repr, "_cancelled": bool}
    for name, value in told.items():
        setattr(calls, name, value)
    with calls.together():
        held = calls._held
        calls.run(JOB, torch.zeros(JOB.given))
    assert seen == [{
        "parent": tmp_path, "failed": tmp_path / "failed", "pool": held, "on_progress": print, "on_log_line": repr,
        "cancelled": bool,
    }]  # fmt: skip
    assert held is not None and calls._held is None
    assert calls.result is not None and not calls.result.path.exists()


def test_memory_that_the_system_refuses_is_said(calls: Any, monkeypatch: pytest.MonkeyPatch):
    def refuses(memory: MemoryFile, size: int) -> None:
        raise OSError("Cannot allocate memory")

    monkeypatch.setattr(vae_calls, "available_bytes", lambda: None)
    monkeypatch.setattr(MemoryFile, "map", refuses)
    large = dataclasses.replace(JOB, made=(1, 3, 100, 2048, 2048))
    words = r"^there is no memory for 4\.7 GiB of latents and frames: Cannot allocate memory$"
    with calls.together(), pytest.raises(JobError, match=words):
        calls.run(large, torch.zeros(JOB.given))
    assert not calls.there() and calls.started == []


def test_a_call_moves_to_where_the_pool_says(calls: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Pool, "moved", lambda pool, job: ("moved", job))
    assert calls.moved(JOB) == ("moved", JOB)
