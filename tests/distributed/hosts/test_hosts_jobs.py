"""Jobs over two machines, in namespaces of their own on this one: the same video, and the same endings."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jobs
import pytest
import torch
from fresh_jobs import run_fresh
from jobs import HELPERS, STUB_WORKER, Watch, pack_with, read_latents, run_stub, run_tiny, stub_job, tiny_job
from machines import Machines
from mount import SUPPORT
from patience import AT_ONCE, COMES_UP
from wan_pack.distributed.group import worker_group
from wan_pack.distributed.hosts import host_check as hosts_check
from wan_pack.distributed.hosts.hosts_group import CONNECT_SECONDS
from wan_pack.distributed.job.errors import JobCancelled
from wan_pack.distributed.job.job import FileIdentity
from wan_pack.distributed.job.job_folder import JobDir
from wan_pack.distributed.launch.launcher import JobFailed

Light = Callable[..., Path]
REAL_LAUNCHER = "from deepspeed.launcher.runner import main as run_deepspeed"
PARENT = """
import sys
sys.path.insert(0, sys.argv[1])
from mount import mount_pack
mount_pack()
from pathlib import Path
import jobs
from wan_pack.distributed.group import worker_group
from wan_pack.distributed.hosts import host_check as hosts_check
from wan_pack.distributed.job.job import FileIdentity
jobs.FILE = FileIdentity.of(jobs.STUB_WORKER)
worker_group.AGENT = Path(sys.argv[3])
hosts_check.PACK = worker_group.AGENT.parent
jobs.run_stub(Path(sys.argv[2]), jobs.stub_job(hosts=tuple(sys.argv[4:])))
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    try:
        machines = Machines(tmp_path_factory.mktemp("machines") / "tools")
    except OSError as error:
        pytest.skip(f"two machines need namespaces, which only root may make: {error}")
    yield machines
    machines.close()


@pytest.fixture
def machines(two: Machines, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machines]:
    """Two machines, and after the test a look at what is left on them."""
    monkeypatch.setenv("PATH", str(two.tools), prepend=":")
    yield two
    two.empty_within(AT_ONCE)


@pytest.fixture(scope="module")
def plain(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The latents of one machine and one rank."""
    folder = run_fresh(tiny_job(tiny_models, gpu_count=1), tmp_path_factory.mktemp("plain"))
    latents = read_latents(folder)
    folder.remove()
    return latents


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Light:
    """Puts a copy of the pack in the place of this one: with light_launcher.py, and `worker` as its ranks."""

    def put(worker: Path, **fault: Any) -> Path:
        monkeypatch.setattr(jobs, "ODD_NAME", "pack")
        # A stub's ranks read no file, but every machine looks whether it is there.
        monkeypatch.setattr(jobs, "FILE", FileIdentity.of(STUB_WORKER))
        agent = pack_with(worker, tmp_path, **fault)
        launch = agent / "hosts" / "launch.py"
        text = launch.read_text()
        assert REAL_LAUNCHER in text
        launch.write_text(text.replace(REAL_LAUNCHER, "from .light_launcher import main as run_deepspeed"))
        shutil.copyfile(HELPERS / "light_launcher.py", agent / "hosts" / "light_launcher.py")
        monkeypatch.setattr(worker_group, "AGENT", agent)
        monkeypatch.setattr(hosts_check, "PACK", agent.parent)
        return agent

    return put


def test_two_machines_of_two_ranks_make_the_same_latents(
    machines: Machines, plain: Any, tiny_models: Path, tmp_path: Path
):
    """Through DeepSpeed's launcher itself."""
    spread = run_tiny(tiny_job(tiny_models, gpu_count=4, hosts=machines.hosts, cfg_parallel=True), tmp_path)
    torch.testing.assert_close(read_latents(spread.folder), plain, rtol=1e-4, atol=1e-4)
    spread.remove()


def listening(machines: Machines) -> Iterator[str]:
    for number in range(2):
        command = [*machines.inside(number), "ss", "-tlnH"]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        yield from (line.split()[3].rpartition(":")[0] for line in lines)


def test_a_rank_killed_on_the_second_machine_is_named(machines: Machines, light: Light, tmp_path: Path):
    light(STUB_WORKER, action="none")

    def kill(folder: JobDir) -> None:
        (rank,) = [line.split()[0] for line in machines.processes(1) if "__main__.py worker" in line]
        os.kill(int(rank), signal.SIGKILL)

    watch = Watch(tmp_path, kill)
    with pytest.raises(JobFailed) as caught:
        run_stub(tmp_path, stub_job(hosts=machines.hosts), on_progress=watch)
    assert watch.seconds_ago < AT_ONCE
    assert str(caught.value).startswith("rank 1 was killed by SIGKILL")
    assert f"on {machines.hosts[1]}" in str(caught.value).splitlines()[0]
    assert caught.value.rank == 1


def test_cancel_ends_both_machines(machines: Machines, light: Light, tmp_path: Path):
    light(STUB_WORKER, action="child")
    watch = Watch(tmp_path)
    with pytest.raises(JobCancelled):
        run_stub(tmp_path, stub_job(hosts=machines.hosts), on_progress=watch, cancelled=lambda: bool(watch.at))
    # The agents have confirmed that nothing is left, so that the GPUs are free when the cancel is done.
    machines.empty_within(AT_ONCE)
    assert watch.seconds_ago < AT_ONCE


def test_both_machines_end_with_comfyui(machines: Machines, light: Light, tmp_path: Path):
    agent = light(STUB_WORKER, action="child")
    with (tmp_path / "parent.log").open("wb") as log:
        command = [sys.executable, "-c", PARENT, str(SUPPORT), str(tmp_path), str(agent), *machines.hosts]
        parent = subprocess.Popen(command, stderr=log)
    try:
        deadline = time.monotonic() + COMES_UP
        while not list((tmp_path / "jobs").glob("wan-job-*/child.pid")):
            assert time.monotonic() < deadline and parent.poll() is None, (tmp_path / "parent.log").read_text()
            time.sleep(0.05)
    finally:
        parent.kill()
        parent.wait(AT_ONCE)
    machines.empty_within(AT_ONCE)
    shutil.rmtree(tmp_path / "jobs")


def test_a_machine_that_is_not_there_is_named(machines: Machines, light: Light, tmp_path: Path):
    light(STUB_WORKER, action="good")
    start = time.monotonic()
    with pytest.raises(JobFailed, match=r"^host 10\.231\.7\.9 did not start: .*No route to host"):
        run_stub(tmp_path, stub_job(hosts=(machines.hosts[0], "10.231.7.9")))
    assert time.monotonic() - start < CONNECT_SECONDS / 2


def test_a_cut_link_ends_both_machines(machines: Machines, light: Light, tiny_models: Path, tmp_path: Path):
    """Nothing closes, and nobody answers: the stall time-out is what is left. Until then there are few listeners."""
    light(worker_group.AGENT / "rank" / "worker.py")
    job = tiny_job(tiny_models, hosts=machines.hosts, cfg_parallel=True, steps=1000, stall_timeout=6.0)

    listeners: list[str] = []

    def cut(folder: JobDir) -> None:
        listeners.extend(listening(machines))
        machines.cut()

    watch = Watch(tmp_path, cut)
    try:
        with pytest.raises(JobFailed, match=r"made no progress for 6 s") as caught:
            run_tiny(job, tmp_path, on_progress=watch)
        assert 2 < watch.seconds_ago < COMES_UP
        assert re.search(r"rank [01] on 10\.231\.7\.[12] made no progress", str(caught.value))
        machines.empty_within(AT_ONCE)
    finally:
        machines.join()
    # torch's stores and gloo: on the interface between the machines, never on all.
    assert set(listeners) <= {*machines.hosts, "127.0.0.1"}
    assert set(machines.hosts) <= set(listeners)
