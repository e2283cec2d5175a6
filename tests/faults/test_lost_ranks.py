"""Ranks that are gone while the agent does not say so: it is frozen, or waits for something itself."""

from __future__ import annotations

import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from jobs import Watch, agent_of, rank_of, stub_job
from patience import AT_ONCE
from wan_pack.distributed.group import worker_group
from wan_pack.distributed.group.group_folder import GroupDir
from wan_pack.distributed.hosts import host_agent as hosts_agent
from wan_pack.distributed.hosts.host_agent import Tether
from wan_pack.distributed.hosts.hostfile import HostsDir
from wan_pack.distributed.job.job_folder import JobDir
from wan_pack.distributed.job.json_files import read_json
from wan_pack.distributed.launch.launcher import JobFailed
from wan_pack.distributed.machine.processes import Process

pytestmark = pytest.mark.processes


def test_fault_01_10_a_killed_rank_is_named_though_the_agent_is_frozen(fails: Callable[..., JobFailed], tmp_path: Path):
    def act(folder: JobDir) -> None:
        agent_of(folder).kill(signal.SIGSTOP)
        rank_of(folder, 1).kill()

    watch = Watch(tmp_path, act)
    error = fails("stand still", {"on_progress": watch})
    assert watch.seconds_ago < AT_ONCE
    assert str(error).startswith("rank 1 was killed by SIGKILL, often by the system's out-of-memory killer")
    assert "in denoise at step 2" in str(error)


def test_fault_02_10_a_ranks_own_words_come_though_the_agent_is_frozen(fails: Callable[..., JobFailed], tmp_path: Path):
    def act(folder: JobDir) -> None:
        agent_of(folder).kill(signal.SIGSTOP)
        (tmp_path / "frozen").touch()

    watch = Watch(tmp_path, act)
    error = fails("raise", {"on_progress": watch}, fault={"until": str(tmp_path / "frozen")})
    assert watch.seconds_ago < AT_ONCE
    assert str(error).startswith("rank 1: ValueError: the weights of layer 3 are bad\nin denoise at step 2")


def test_fault_01_06_a_deaf_rank_does_not_hide_how_another_one_ended(fails: Callable[..., JobFailed], tmp_path: Path):
    """The agent says who has ended before it ends the others, for which it has patience."""
    watch = Watch(tmp_path, lambda folder: rank_of(folder, 1).kill())
    error = fails("deaf peer", {"on_progress": watch}, fault={"delay": 60})
    assert watch.seconds_ago < AT_ONCE
    assert str(error).startswith("rank 1 was killed by SIGKILL")


def test_fault_10_an_agent_that_fails_says_why(
    stub_pack: Callable[..., None], fails: Callable[..., JobFailed], monkeypatch: pytest.MonkeyPatch
):
    create = GroupDir.create

    def damaged(parent: Path, ranks: int) -> GroupDir:
        folder = create(parent, ranks)
        folder.group.write_text("{")
        return folder

    monkeypatch.setattr(worker_group.GroupDir, "create", damaged)
    assert str(fails("good")).startswith("the agent failed: JobError: group.json cannot be read")


def test_fault_01_10_of_several_machines_one_ends_though_torchrun_waits_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Whose agent may be frozen."""
    ended = threading.Event()
    monkeypatch.setattr(hosts_agent, "_end", lambda folder, node: ended.set())
    job = stub_job(gpu_count=4, hosts=("a", "b"))
    folder, job_folder = HostsDir.create_for(tmp_path, job, {}), JobDir.create(tmp_path)
    rank = subprocess.Popen(["sleep", "60"])
    process = Process.of(rank.pid)
    assert process is not None
    alive = {"pid": process.pid, "started": process.started, "phase": "denoise", "step": 2}
    job_folder.write_json(job_folder.alive(3), alive)
    # Of the first machine, on which this pid means nothing.
    job_folder.write_json(job_folder.alive(0), {**alive, "pid": 1, "started": 1})
    folder.heartbeat.write_text("0")
    folder.write_request(1, job_folder)
    Tether(folder, 1, job.parallel).start()
    assert not ended.wait(2.5)
    rank.kill()
    assert ended.wait(AT_ONCE)
    rank.wait()
    (found,) = read_json(folder.failed(1))["failures"]
    assert (found["rank"], found["signal"]) == (3, "SIGKILL")
    # Its threads end with the folder, and say so.
    ended.clear()
    folder.remove()
    assert ended.wait(AT_ONCE)
    job_folder.remove()
