"""Cancelled jobs whose processes stay: they stop between two steps, and make the next video at once."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fresh_jobs import run_fresh
from jobs import (
    STUB_WORKER,
    Watch,
    agent_of,
    gone_within,
    pack_with,
    rank_of,
    read_latents,
    run_stub,
    run_tiny,
    stub_job,
    tiny_job,
    write_embeddings,
)
from left_over import settled
from patience import AT_ONCE
from wan_pack.distributed.group import worker_group
from wan_pack.distributed.group.signs_of_life import Seen
from wan_pack.distributed.job.errors import JobCancelled
from wan_pack.distributed.job.job_folder import JobDir
from wan_pack.distributed.launch import pool as pools
from wan_pack.distributed.launch import stopping
from wan_pack.distributed.launch.held import HeldGroup
from wan_pack.distributed.launch.pool import Pool
from wan_pack.distributed.launch.stopping import seconds_to_stop
from wan_pack.distributed.machine.gpus import Gpu
from wan_pack.distributed.machine.processes import Process

WARM = {"keep_warm_seconds": 600.0}
LONG = 600.0
"""Seconds that are not waited for."""


class Cancelled:
    """Runs a job and cancels it at a step."""

    def __init__(self, folder: Path, step: int = 2) -> None:
        self.processes: list[Process] = []
        self.watch = Watch(folder, self._look, step=step)

    def _look(self, folder: JobDir) -> None:
        self.processes = [rank_of(folder, rank) for rank in (0, 1)]
        self.agent = agent_of(folder)

    def run(self, run: Callable[..., Any]) -> float:
        """Returns the seconds that the cancel took."""
        with pytest.raises(JobCancelled):
            run(on_progress=self.watch, cancelled=lambda: bool(self.watch.at))
        return self.watch.seconds_ago


@pytest.mark.ranks
def test_the_next_seed_runs_on_the_same_processes_and_is_right(
    tiny_models: Path, tmp_path: Path, pool: Pool, monkeypatch: pytest.MonkeyPatch
):
    """Cancelled in the middle, with the second expert still to come; then the same video and one of another size."""
    monkeypatch.setattr(stopping, "SECONDS", LONG)
    # More than there is time for: those that end by themselves would stay as well.
    job = tiny_job(tiny_models, steps=1000, **WARM)
    cancelled = Cancelled(tmp_path)
    assert cancelled.run(lambda **more: run_tiny(job, tmp_path, pool=pool, **more)) < AT_ONCE
    made, weights = [], []
    for settings in ({"seed": 7}, {"seed": 8, "width": 96}):
        nxt = tiny_job(tiny_models, **WARM, **settings)
        result = run_tiny(
            nxt, tmp_path, pool=pool, on_progress=lambda p: weights.append(p.message) if p.phase == "load" else None
        )
        alive = [result.folder.read_json(result.folder.alive(rank)) for rank in (0, 1)]
        assert [Process(entry["pid"], entry["started"]) for entry in alive] == cancelled.processes
        assert result.folder.video(".mp4").stat().st_size > 0
        made.append((nxt, read_latents(result.folder)))
        result.remove()
    # The expert that had run was there; what was still being read is read again behind the first steps.
    assert not any("high" in message for message in weights)
    for nxt, latents in made:
        folder = run_fresh(dataclasses.replace(nxt, decode=False), tmp_path / "fresh", write_embeddings)
        assert torch.equal(read_latents(folder), latents)
        folder.remove()
    assert pool.release() == 1


@pytest.mark.processes
@pytest.mark.parametrize("held", [False, True], ids=["", "of a batch"])
def test_fault_07_a_rank_that_does_not_stop_is_ended_and_the_cancel_does_not_wait(
    held: bool, tmp_path: Path, pool: Pool, monkeypatch: pytest.MonkeyPatch
):
    """Also that of a batch's last job, whose ranks stay as those of any other."""
    monkeypatch.setattr(worker_group, "AGENT", pack_with(STUB_WORKER, tmp_path, action="good", seconds=LONG))
    monkeypatch.setattr(stopping, "SECONDS", LONG)
    later = [0.0]
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + later[-1], sleep=time.sleep)
    monkeypatch.setattr(stopping, "time", clock)
    cancelled = Cancelled(tmp_path)
    source = HeldGroup(pool) if held else pool
    assert cancelled.run(lambda **more: run_stub(tmp_path, stub_job(**WARM), pool=source, **more)) < AT_ONCE
    assert all(process.alive() for process in cancelled.processes)
    # For the plan of the next job their memory is free already, as that of a group that waits.
    (member,) = pool._members
    member.free_bytes = {"0": 7}
    gpu = Gpu(index="0", uuid="GPU-a", name="", total_bytes=9, free_bytes=1)
    assert [known.free_bytes for known in pool.without_idle([gpu])] == [7]
    later.append(2 * LONG)
    settled()
    assert gone_within(AT_ONCE, *cancelled.processes, cancelled.agent)
    assert not list((tmp_path / "jobs").iterdir()) and pool.view() == []


@pytest.mark.processes
@pytest.mark.parametrize("way", ["release", "another kind"])
def test_fault_07_who_needs_the_gpus_does_not_wait_for_the_step(
    way: str, tmp_path: Path, pool: Pool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(worker_group, "AGENT", pack_with(STUB_WORKER, tmp_path, action="good", seconds=LONG))
    monkeypatch.setattr(stopping, "SECONDS", LONG)
    cancelled = Cancelled(tmp_path)
    cancelled.run(lambda **more: run_stub(tmp_path, stub_job(**WARM), pool=pool, **more))
    if way == "release":
        assert pool.release() == 1
    else:
        pack_with(STUB_WORKER, tmp_path, action="good", seconds=0.0)
        run_stub(tmp_path, stub_job(gpu_count=1, **WARM), pool=pool).remove()
    assert gone_within(AT_ONCE, *cancelled.processes)
    settled()
    assert pool.release() == (way == "another kind")


@pytest.mark.processes
def test_fault_07_08_the_next_job_waits_for_the_step_and_can_be_cancelled_meanwhile(
    tmp_path: Path, pool: Pool, monkeypatch: pytest.MonkeyPatch
):
    """The stub's ranks end their step, and with it their job, when they are told to."""
    ends = tmp_path / "the step ends"
    monkeypatch.setattr(worker_group, "AGENT", pack_with(STUB_WORKER, tmp_path, action="good", until=str(ends)))
    monkeypatch.setattr(stopping, "SECONDS", LONG)
    cancelled, told = Cancelled(tmp_path), []
    cancelled.run(lambda **more: run_stub(tmp_path, stub_job(**WARM), pool=pool, **more))
    waits = "waiting for the end of the step that was cancelled"

    def waited() -> bool:
        return any(progress.message == waits for progress in told)

    with pytest.raises(JobCancelled):
        run_stub(tmp_path, stub_job(**WARM), pool=pool, on_progress=told.append, cancelled=waited)
    assert waited()
    (member,) = pool._members
    ends.touch()
    result = run_stub(tmp_path, stub_job(**WARM), pool=pool)
    result.remove()
    assert [member.group] == [other.group for other in pool._members]
    assert member.group.ranks == cancelled.processes
    pool.release()


def test_when_ranks_may_stay():
    def of(phase: str = "denoise", **more: Any) -> Any:
        return SimpleNamespace(phase=phase, **{"stopped": False, "gone": False, **more})

    job, both = stub_job(**WARM), {0: of(), 1: of()}
    assert seconds_to_stop(job, both, None) == 5.0
    assert seconds_to_stop(job, both, 2.5) == 7.5
    assert seconds_to_stop(job, both, 21.0) is None
    assert seconds_to_stop(stub_job(), both, None) is None
    assert seconds_to_stop(stub_job(more_follow=True, **WARM), both, None) is None
    assert seconds_to_stop(job, {0: of()}, None) is None
    for other in (of("load"), of("decode"), of(stopped=True), of(gone=True)):
        assert seconds_to_stop(job, {0: of(), 1: other}, None) is None
    assert Seen.__dataclass_fields__.keys() >= {"phase", "stopped", "gone"} and pools.POLL < 1
