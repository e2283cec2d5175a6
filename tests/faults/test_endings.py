"""Cancel, and the deaths of ComfyUI and of the agent: nothing is left, and soon."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jobs import Watch, agent_of, gone_within, rank_of, run_stub
from mount import SUPPORT
from patience import AT_ONCE, COMES_UP
from wan_pack.distributed.group import worker_group
from wan_pack.distributed.group.leftovers import remove_abandoned
from wan_pack.distributed.group.lost_ranks import LostRanks
from wan_pack.distributed.group.worker_group import WorkerGroup
from wan_pack.distributed.job.errors import JobCancelled
from wan_pack.distributed.job.job_folder import JobDir
from wan_pack.distributed.launch.launcher import JobFailed, Result
from wan_pack.distributed.machine.processes import Process, descendants

StubPack = Callable[..., None]


def child_of(folder: JobDir) -> Process:
    """What rank 1 started."""
    deadline = time.monotonic() + COMES_UP
    while not (folder.path / "child.pid").exists() or not (folder.path / "child.pid").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process = Process.of(int((folder.path / "child.pid").read_text()))
    assert process is not None
    return process


@pytest.mark.processes
@pytest.mark.parametrize("ending", ["cancel", "agent", "rank"])
def test_fault_07_10_what_a_rank_started_ends_with_the_job(stub_pack: StubPack, tmp_path: Path, ending: str):
    """A child in its own session, deaf to SIGTERM; its parents die first when the agent or the rank is killed."""
    stub_pack("child")
    processes: list[Process] = []

    def act(folder: JobDir) -> None:
        processes.extend([child_of(folder), agent_of(folder), rank_of(folder, 0), rank_of(folder, 1)])
        if ending == "agent":
            processes[1].kill()
        if ending == "rank":
            processes[3].kill()

    watch = Watch(tmp_path, act)
    with pytest.raises(JobCancelled if ending == "cancel" else JobFailed) as caught:
        run_stub(tmp_path, on_progress=watch, cancelled=lambda: ending == "cancel" and bool(processes))
    assert watch.seconds_ago < AT_ONCE
    assert not any(process.alive() for process in processes)
    assert not list((tmp_path / "jobs").iterdir())
    if ending != "cancel":
        assert str(caught.value).startswith({"agent": "the agent was killed by SIGKILL", "rank": "rank 1 was"}[ending])


@pytest.mark.processes
@pytest.mark.parametrize("known", [False, True])
def test_fault_10_ranks_that_died_with_the_agent_are_not_the_cause(
    stub_pack: StubPack, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, known: bool
):
    """Whatever the launcher sees first: here that the ranks are gone, with or without the agent's exit code."""
    stub_pack("stand still")
    processes: list[Process] = []
    look, exit_code = LostRanks.look, WorkerGroup.exit_code.fget

    def look_after_the_end(lost: LostRanks, *arguments: Any) -> bool:
        if processes and processes[0].alive():
            processes[0].kill()
            while any(process.alive() for process in processes):
                time.sleep(0.005)
            ranks, *rest = arguments
            arguments = ({rank: dataclasses.replace(seen, gone=True) for rank, seen in ranks.items()}, *rest)
        return look(lost, *arguments)

    looks: list[int] = []

    def late_exit_code(group: WorkerGroup) -> int | None:
        # As of an agent whose other threads take longer than its first.
        code = exit_code(group)
        looks.append(1 if code is not None else 0)
        return None if not known and sum(looks) < 4 else code

    def act(folder: JobDir) -> None:
        processes.extend([agent_of(folder), rank_of(folder, 0), rank_of(folder, 1)])

    monkeypatch.setattr(LostRanks, "look", look_after_the_end)
    monkeypatch.setattr(WorkerGroup, "exit_code", property(late_exit_code))
    with pytest.raises(JobFailed, match=r"^the agent was killed by SIGKILL"):
        run_stub(tmp_path, on_progress=Watch(tmp_path, act))
    assert not list((tmp_path / "jobs").iterdir())


@pytest.mark.processes
def test_fault_07_a_cancel_is_quick_with_a_deaf_rank_and_the_next_job_runs(stub_pack: StubPack, tmp_path: Path):
    stub_pack("deaf peer", delay=60)
    watch = Watch(tmp_path)
    with pytest.raises(JobCancelled):
        run_stub(tmp_path, on_progress=watch, cancelled=lambda: bool(watch.at) and watch.seconds_ago > 0.3)
    assert watch.seconds_ago < AT_ONCE
    assert not list((tmp_path / "jobs").iterdir())
    stub_pack("good")
    run_stub(tmp_path).remove()


@pytest.mark.processes
def test_fault_07_an_exception_of_the_caller_ends_the_job(run_fake: Callable[..., Result], tmp_path: Path):
    """ComfyUI's own cancel is one, raised by its progress bar."""

    class InterruptProcessing(BaseException):
        pass

    def cancelled() -> bool:
        if list(tmp_path.glob("jobs/wan-group-*")):
            raise InterruptProcessing
        return False

    with pytest.raises(InterruptProcessing):
        run_fake("sleep", callbacks={"cancelled": cancelled})
    assert not list((tmp_path / "jobs").iterdir())


def test_fault_08_a_cancel_before_the_start_starts_nothing(run_fake: Callable[..., Result], tmp_path: Path):
    with pytest.raises(JobCancelled):
        run_fake("sleep", callbacks={"cancelled": lambda: True})
    assert not (tmp_path / "jobs").exists()


@pytest.mark.processes
def test_fault_08_a_cancel_while_the_agent_is_starting(stub_pack: StubPack, tmp_path: Path):
    """0.2 s after it was spawned it is importing torch; its ranks, which need none here, may be at their work."""
    stub_pack("stand still")
    others, spawned = set(descendants(os.getpid())), []

    def cancelled() -> bool:
        if list(tmp_path.glob("jobs/wan-group-*/agent.log")):
            spawned.append(time.monotonic())
        return bool(spawned) and spawned[-1] - spawned[0] > 0.2

    with pytest.raises(JobCancelled):
        run_stub(tmp_path, cancelled=cancelled)
    assert time.monotonic() - spawned[-1] < AT_ONCE
    assert set(descendants(os.getpid())) <= others
    assert not list((tmp_path / "jobs").iterdir())
    assert not (tmp_path / "failed").exists()


PARENT = """
import signal, sys, threading
# Ignored in what a shell runs in the background, and handed down.
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, sys.argv[1])
from mount import mount_pack
mount_pack()
from pathlib import Path
import jobs
from wan_pack.distributed.group import worker_group
worker_group.AGENT = Path(sys.argv[3])
# As ComfyUI: the job runs on a daemon thread, a Ctrl-C reaches the main one.
thread = threading.Thread(target=jobs.run_stub, args=(Path(sys.argv[2]),), daemon=True)
thread.start()
thread.join()
"""


@pytest.mark.processes
@pytest.mark.parametrize("how", ["killed", "killed, one rank frozen", "Ctrl-C"])
def test_fault_09_everything_ends_with_comfyui(stub_pack: StubPack, tmp_path: Path, how: str):
    stub_pack("stop" if "frozen" in how else "child")
    # To a file: a pipe nobody reads could stop it.
    with (tmp_path / "parent.log").open("wb") as log:
        parent = subprocess.Popen(
            [sys.executable, "-c", PARENT, str(SUPPORT), str(tmp_path), str(worker_group.AGENT)], stderr=log
        )
    try:
        deadline = time.monotonic() + COMES_UP
        while not (found := list((tmp_path / "jobs").glob("wan-job-*/rank[01].ready"))[1:]):
            assert time.monotonic() < deadline and parent.poll() is None
            time.sleep(0.05)
        folder = JobDir(found[0].parent)
        processes = [agent_of(folder), rank_of(folder, 0), rank_of(folder, 1)]
        if "frozen" in how:
            while not processes[2].stopped():
                assert time.monotonic() < deadline
                time.sleep(0.02)
        else:
            processes.append(child_of(folder))
    finally:
        parent.send_signal(signal.SIGINT if how == "Ctrl-C" else signal.SIGKILL)
        parent.wait(AT_ONCE)
    assert gone_within(AT_ONCE, *processes)
    # A ComfyUI that was killed cannot tidy up; the start of the next job does.
    if how != "Ctrl-C":
        assert list((tmp_path / "jobs").glob("wan-group-*/owner.lock"))
    remove_abandoned(tmp_path / "jobs")
    assert not list((tmp_path / "jobs").iterdir())
